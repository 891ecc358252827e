"""Put LoRA into a model by module name, report what was done, and take it out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pyfused.lora import third_party
from pyfused.lora.attention import LoRAProjections
from pyfused.lora.base import LoRAModule
from pyfused.lora.linear import LoRALinear
from pyfused.lora.pairs import DEFAULT, LoRASettings, check_adapter_name, check_lora_settings
from pyfused.lora.report import LoRAReport, lora_report
from pyfused.lora.shared_input import share_inputs
from pyfused.lora.state import lora_modules
from pyfused.lora.targets import ALL_LINEAR, KEYWORDS, PARTS, Layer, layers_of, left_alone, lora_places, wrapper_of
from pyfused.ops.contract import checks
from pyfused.surgery.change import Change
from pyfused.surgery.paths import Place, names, near, places, under
from pyfused.surgery.procedure import Request, adapt, take_out
from pyfused.surgery.refusals import check_model
from pyfused.surgery.watch import never_called

_CALLER = "inject_lora"
_RANK, _ALPHA = 16, 32.0
# What the same thing is called in PEFT.
_OTHER_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "rank_pattern": "rank, which takes a mapping",
    "alpha_pattern": "alpha, which takes a mapping",
    "modules_to_save": "train",
    "exclude_modules": "exclude",
    "adapter_name": "adapter",
}


@dataclass
class _Site:
    """A layer to adapt, which of its parts, and each part's rank and alpha."""

    layer: Layer
    parts: set[str]
    rank: dict[str, int]
    alpha: dict[str, float]


def inject_lora(
    model: nn.Module,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    rank: int | Mapping[str, int] = _RANK,
    alpha: float | Mapping[str, float] = _ALPHA,
    dropout: float = 0.0,
    use_rslora: bool = False,
    qkv: str = "joint",
    freeze: bool = True,
    train: Sequence[str] = (),
    exclude: Sequence[str] = (),
    lora_dtype: torch.dtype | None = None,
    freeze_batchnorm: bool = True,
    example_inputs: Any = None,
    adapter: str = DEFAULT,
    group: bool = False,
    **others: Any,
) -> LoRAReport:
    """Replace modules of ``model`` by LoRA modules on the same parameters, in place, and freeze the rest.

    All or nothing: when this raises, the model is as it was. The output does not change until B has been trained.

    Called again with another ``adapter`` it adds a further one, with its own targets and settings, beside those that
    the model has. A further adapter neither acts nor trains until `set_adapter` chooses it.

    Args:
        model: any module, on any device, e.g. ``clip.visual`` for one tower.
        target_modules: keywords and names, one or several. Keywords: "all-linear" (the default), every nn.Linear,
            transformers' Conv1D and both projections of every nn.MultiheadAttention and of open_clip's own attention;
            "attention" and "mlp", what of these and of 1x1 convolutions belongs to an attention or an MLP by its path;
            "conv1x1", every nn.Conv2d of kernel 1 without groups. A keyword leaves alone a language model's output
            embedding, a classifier head and what cannot carry LoRA, and the report says so. A name is one or more path
            components, and selects every layer whose dotted path ends in them: "c_proj" selects "mlp.c_proj", "proj"
            does not. "in_proj" and "out_proj" also select those projections of an attention, the attention's own name
            selects both.
        rank: R, 1 to 256, or a mapping of targets to it, of which the first that selects a layer counts:
            ``{"qkv": 8, "mlp": 32}``. Layers that none selects get the default, 16.
        alpha: the low-rank term is scaled by alpha / R; a number or a mapping as for ``rank``. Default 32.
        dropout: probability of zeroing an element of a low-rank term's input, in [0, 1). Default 0.
        use_rslora: scale by alpha / sqrt(R) instead. Default False.
        qkv: "joint" (the default): one pair for an attention's q, k and v; "split": one each. An attention with kdim
            or vdim of its own is always split.
        freeze: whether everything in ``model`` stops training but the LoRA parameters and ``train``. What an earlier
            call of this package set to train goes on training. Default True.
        train: dotted paths, from ``model``, of modules or parameters that train whole, e.g. ("head",). Modules and
            weights there get no LoRA.
        exclude: dotted paths, from ``model``, of modules where nothing is adapted.
        lora_dtype: of the LoRA parameters. Default: float32 for float16 and bfloat16 weights, else the weight's.
        freeze_batchnorm: with ``freeze``, a BatchNorm that has nothing to train stays in eval mode, also when the
            model is put in training mode, so that its running statistics stay. Default True.
        example_inputs: a tensor, a tuple of arguments or a dictionary of keywords of ``model``. Where given, the model
            is run once on it without gradients, and LoRA that did not run in it is refused. Default None: no run.
        adapter: the name of this adapter: letters, digits and "_". Default "default".
        group: whether linear layers of one module that read one x, q, k and v say, compute in one call: their weights
            move below each other in memory, under dropout they have one mask, and what runs compiled computes one by
            one. Needs ``example_inputs``, which show what reads what. The report and `explain` say which layers do,
            and why others do not. Default False.

    Returns:
        A `LoRAReport` of this adapter; ``print`` it.

    Raises:
        TypeError: an argument has the wrong type, a name selects a module that cannot carry LoRA, or ``lora_dtype`` is
            neither a weight's dtype nor float32 over a narrower one.
        ValueError: a name or path selects nothing (near names are listed), what carries this adapter already or what
            is compiled by itself, a setting is out of range, ``model`` is PEFT's, sharded or in
            DistributedDataParallel, LoRA of it is merged or inside `adapters_off` or `adapter_batch`, a parameter of it
            is uninitialized or made under inference_mode, or LoRA did not run on ``example_inputs``.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; "all-linear" as in PEFT.
    """
    for name in others:
        known = _OTHER_NAMES.get(name)
        raise TypeError(f"{_CALLER}: no argument {name!r}" + (f"; here it is {known}" if known else ""))
    check_model(_CALLER, model)
    for ranks, alphas in ((rank, _ALPHA), (_RANK, alpha)):
        for one_rank in ranks.values() if isinstance(ranks, Mapping) else (ranks,):
            for one_alpha in alphas.values() if isinstance(alphas, Mapping) else (alphas,):
                check_lora_settings(
                    _CALLER, one_rank, one_alpha, dropout, lora_dtype,
                    use_rslora=use_rslora, freeze=freeze, freeze_batchnorm=freeze_batchnorm,
                )  # fmt: skip
    checks.one_of(_CALLER, "qkv", qkv, ("joint", "split"))
    check_adapter_name(_CALLER, adapter)
    present = [module for module in model.modules() if isinstance(module, LoRAModule)]
    for module in present:
        module.refuse_busy(_CALLER)
    acts = not present or any(adapter in module.active_adapters for module in present)
    checks.flag(_CALLER, "group", group)
    if group and example_inputs is None:
        raise ValueError(f"{_CALLER}: group=True needs example_inputs, which show what layers read one x, got None")
    targets = names(_CALLER, "target_modules", target_modules)
    if not targets:
        raise ValueError(f"{_CALLER}: target_modules must hold at least one name, got {target_modules!r}")
    layers = layers_of(model, _CALLER)
    request = Request(_CALLER, model, train, exclude, {name for layer in layers for name in layer.names()})
    sites, why = _find_sites(request, layers, targets, adapter)
    _set_by_pattern("rank", rank, _RANK, sites)
    _set_by_pattern("alpha", alpha, _ALPHA, sites)
    settings = {"dropout": dropout, "use_rslora": use_rslora, "lora_dtype": lora_dtype}

    def put(change: Change) -> None:
        request.notes.extend(_tied(model, sites))
        further = [site for site in sites if isinstance(site.layer.module, LoRAModule)]
        made = [(site, _wrap(site, qkv, request.notes, settings)) for site in sites if site not in further]
        for site in further:
            _extend(change, site, qkv, request.notes, adapter, settings, acts)
        for site, adapted in made:
            for part in adapted._parts():
                part.name_first(adapter, acts)
            change.replace(site.layer.place, adapted)
            for host, name in site.layer.place.spots:
                variant = third_party.calling(host, name)
                if variant is not None:
                    change.as_variant(host, variant)

    def trial() -> None:
        if example_inputs is None:
            return
        args, kwargs = _arguments(example_inputs)
        _refuse_dead(model, args, kwargs)
        if group:
            linear = [(place, place.module) for place in places(model) if isinstance(place.module, LoRALinear)]
            request.notes.extend(share_inputs(model, linear, args, kwargs))

    adapt(request, put, trial=trial, freeze=freeze, freeze_batchnorm=freeze_batchnorm)
    if not acts:
        request.notes.append(f"adapter {adapter!r} neither acts nor trains yet: set_adapter(model, {adapter!r})")
    return lora_report(model, request.notes, left_alone(model, layers, why), adapter)


def remove_lora(model: nn.Module, merge: bool = True) -> None:
    """Put plain modules back in place of every LoRA module of ``model``, and BatchNorms back under ``train()``.

    What was frozen stays frozen, and what trained trains. All or nothing.

    Args:
        model: a model with LoRA modules somewhere inside it.
        merge: with the low-rank terms of the adapters that act merged into the weights (the default; see
            `LoRAModule.merge` for what 16-bit weights lose), or dropped; the other adapters are dropped.

    Raises:
        TypeError: an argument has the wrong type.
        RuntimeError: ``merge`` on a convolution with groups, which cannot hold its low-rank term; the forward of a LoRA
            module was replaced; a parameter of one is computed (parametrized, pruned) or sharded.
        ValueError: ``model`` has no LoRA, or itself is a LoRA module; call its ``to_base()``.
    """
    caller = "remove_lora"
    checks.flag(caller, "merge", merge)
    if isinstance(model, LoRAModule):
        raise ValueError(f"{caller}: model must contain LoRA modules, got one itself; use its to_base()")
    lora_modules(caller, model)
    adapted = [(place, place.module) for place in lora_places(model)]
    plain = [(place, module.to_base(merge)) for place, module in adapted if isinstance(module, LoRAModule)]

    def take(change: Change) -> None:
        for place, module in plain:
            change.replace(place, module)
        for inside in list(model.modules()):
            for kind in (third_party.CallingPool, third_party.CallingQKV):
                if isinstance(inside, kind):
                    change.as_base(inside, kind)

    take_out(model, take)


# ---- finding


def _find_sites(
    request: Request, layers: list[Layer], targets: tuple[str, ...], adapter: str
) -> tuple[list[_Site], dict[int, str]]:
    """The sites, and by id of a module why another is none."""
    sites: list[_Site] = []
    why: dict[int, str] = {}
    matched: set[str] = set()
    whole = {id(parameter) for parameter in request.trained}
    for layer in layers:
        aside = request.aside(*layer.place.paths)
        if aside is not None:
            why[id(layer.module)] = aside
            continue
        hits = {target: parts for target in targets if (parts := layer.parts(target))}
        named = {target: parts for target, parts in hits.items() if target not in KEYWORDS}
        if layer.reserved or isinstance(layer.refusal, TypeError):
            # A keyword passes over it; a name insists.
            hits = named
        if not hits:
            continue
        matched |= hits.keys()
        parts = set().union(*hits.values())
        if layer.refusal is not None:
            _refuse_layer(layer, parts, adapter)
        parts -= set().union(*(own for name, own in layer.names().items() if request.aside(name)))
        parts -= {part for part in parts if any(id(weight) in whole for weight in layer.weights(part))}
        if not parts:
            why[id(layer.module)] = "trains whole: in train"
        else:
            sites.append(_Site(layer, parts, {}, {}))
            request.note_shared(layer.place)
    for target in targets:
        if target not in matched or not sites:
            _refuse_target(request.model, layers, target, why)
    return sites, why


def _refuse_layer(layer: Layer, parts: set[str], adapter: str) -> None:
    """Raise, unless it is refused for another adapter alone."""
    assert layer.refusal is not None
    if not isinstance(layer.module, LoRAModule) or not layer.place.spots:
        raise layer.refusal
    holders = [_holder(layer, part) for part in parts]
    if any(holder is not None and adapter in holder.adapters for holder in holders):
        raise ValueError(f"{layer.refusal}, with adapter {adapter!r}; adapter=... names a further one")


def _holder(layer: Layer, part: str) -> LoRAModule | None:
    """The module that holds the pairs of a part of a LoRA module; None for an out_proj without any."""
    module: Any = layer.module
    if layer.kind != "attention" or part == "in_proj":
        return module
    return module.out_proj if isinstance(module.out_proj, LoRALinear) else None


def _refuse_target(model: nn.Module, layers: list[Layer], target: str, why: dict[int, str]) -> None:
    for path, module in model.named_modules():
        if target not in KEYWORDS and f".{path}".endswith(f".{target}") and wrapper_of(module) is None:
            inside = {layer.group for layer in layers if under(layer.path, (path,))} & set(KEYWORDS)
            hint = f'; "{min(inside)}" selects the layers in it' if inside else ""
            raise TypeError(
                f"{_CALLER}: target_modules must select nn.Linear, nn.Conv2d, transformers' Conv1D or attentions, got "
                f"{path!r}, which is a {type(module).__module__}.{type(module).__name__}{hint}"
            )
    known = {name.rpartition(".")[2] for layer in layers for name in layer.names()}
    rows = "; ".join(f"{row.count} {row.kind}: {row.why}" for row in left_alone(model, layers, why)[:3])
    raise ValueError(
        f"{_CALLER}: target_modules must select modules outside train and exclude, got {target!r}, which selects none"
        f"{f' (left alone: {rows})' if target in KEYWORDS and rows else ''}; {near(target, known)}"
    )


def _set_by_pattern(name: str, value: Any, default: Any, sites: list[_Site]) -> None:
    """Each site's ``name``, "rank" or "alpha", for each of its parts."""
    mapping = value if isinstance(value, Mapping) else {}
    names(_CALLER, name, list(mapping))
    used: set[str] = set()
    for site in sites:
        for part in site.parts:
            chosen = next((target for target in mapping if part in site.layer.parts(target)), None)
            used |= {target for target in mapping if part in site.layer.parts(target)}
            getattr(site, name)[part] = (default if mapping else value) if chosen is None else mapping[chosen]
    for target in mapping:
        if target not in used:
            known = {answer.rpartition(".")[2] for site in sites for answer in site.layer.names()}
            raise ValueError(
                f"{_CALLER}: {name} must name modules that are adapted, got {target!r}, which selects none; "
                f"{near(target, known)}"
            )


def _tied(model: nn.Module, sites: list[_Site]) -> list[str]:
    """What is said of adapted weights that another module holds too."""
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), []).append(path)
    notes = []
    for site in sites:
        others = {
            other
            for parameter in site.layer.module._parameters.values()
            for other in holders.get(id(parameter), ())
            if parameter is not None and other != site.layer.path
        }
        if others:
            notes.append(
                f"{site.layer.path} shares its weight with {', '.join(sorted(others))}, which gets no LoRA by that; "
                "merging gives it a weight of its own"
            )
    return notes


def _arguments(example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), {**example_inputs}
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}


def _refuse_dead(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    dead = never_called(model, lambda module: isinstance(module, LoRAModule), args, kwargs)
    if dead:
        raise ValueError(
            f"{_CALLER}: example_inputs must run every adapted module, got {len(dead)} that were never called: "
            f"{', '.join(dead[:5])}{', ...' if len(dead) > 5 else ''}; leave them out by exclude"
        )


# ---- replacing


def _extend(change: Change, site: _Site, qkv: str, notes: list[str], adapter: str, settings: dict, acts: bool) -> None:
    """Add the adapter to a module that has LoRA already."""
    module: Any = site.layer.module
    for part in sorted(site.parts):
        own = LoRASettings(site.rank[part], site.alpha[part], **settings)
        holder = _holder(site.layer, part)
        if holder is None:
            linear = LoRALinear.from_linear(module.out_proj, *own, freeze=False)
            linear.name_first(adapter, acts)
            change.replace(Place(module.out_proj, [f"{site.layer.path}.out_proj"], [(module, "out_proj")]), linear)
            continue
        change.keep(holder)
        if isinstance(holder, LoRAProjections) and holder.qkv is None:
            holder.qkv = _pairing(site, qkv, notes)
            holder._set_first(adapter, own)
            holder._add_pairs(adapter, own)
            holder.name_first(adapter, acts)
            continue
        if isinstance(holder, LoRAProjections) and holder.qkv != qkv:
            notes.append(f"{site.layer.path}: q, k and v adapted {holder.qkv}, as its first adapter has them")
        holder.add_adapter(adapter, own, acts)


def _pairing(site: _Site, qkv: str, notes: list[str]) -> str:
    """``qkv``, but "split" for an attention that has no joint in_proj."""
    if "in_proj" in site.parts and qkv == "joint" and not getattr(site.layer.module, "_qkv_same_embed_dim", True):
        notes.append(f"{site.layer.path}: q, k and v adapted separately, as key or value have a width of their own")
        return "split"
    return qkv


def _wrap(site: _Site, qkv: str, notes: list[str], settings: dict) -> LoRAModule:
    module, wrapper = site.layer.module, wrapper_of(site.layer.module)
    if site.layer.kind != "attention":
        own = {"rank": site.rank["in_proj"], "alpha": site.alpha["in_proj"]}
        make = getattr(wrapper, _MAKERS[site.layer.kind])
        adapted: LoRAModule = make(module, freeze=False, **own, **settings)
        return adapted
    qkv = _pairing(site, qkv, notes)
    make = wrapper.from_mha if isinstance(module, nn.MultiheadAttention) else wrapper.from_attention
    first = min(site.parts)
    whole = all(site.rank[first] == site.rank[part] and site.alpha[first] == site.alpha[part] for part in site.parts)
    parts = {part: part in site.parts and (whole or part == first) for part in PARTS}
    attention: Any = make(
        module, rank=site.rank[first], alpha=site.alpha[first], qkv=qkv, freeze=False, **parts, **settings
    )
    if not whole:
        attention.out_proj = LoRALinear.from_linear(
            attention.out_proj, site.rank["out_proj"], site.alpha["out_proj"], freeze=False, **settings
        )
    adapted = attention
    return adapted


_MAKERS = {"linear": "from_linear", "conv1d": "from_conv1d", "conv1x1": "from_conv", "conv2d": "from_conv"}
