"""Put LoRA into a model by module name, report what was done, and take it out again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyfused.modules import LoRAConv2d, LoRALinear, LoRAModule, LoRAMultiheadAttention, surgery
from pyfused.modules.lora import check_base, check_settings, places
from pyfused.modules.report import LoRAReport, lora_report

ALL_LINEAR = "all-linear"
_CALLER = "inject_lora"
_PARTS = ("in_proj", "out_proj")
_WRAPPERS = {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d, nn.MultiheadAttention: LoRAMultiheadAttention}


@dataclass
class _Site:
    """A module to adapt: all the paths it stands at, and for an attention which of its projections."""

    module: nn.Module
    paths: list[str]
    parts: set[str]


def inject_lora(
    model: nn.Module,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    use_rslora: bool = False,
    qkv: str = "joint",
    freeze: bool = True,
    train: Sequence[str] = (),
    exclude: Sequence[str] = (),
    lora_dtype: torch.dtype | None = None,
    freeze_batchnorm: bool = True,
) -> LoRAReport:
    """Replace modules of ``model`` by LoRA modules on the same parameters, in place, and freeze the rest.

    All or nothing: when this raises, the model is as it was. The output does not change until B has been trained.

    Args:
        model: any module, on any device, e.g. ``clip.visual`` for one tower.
        target_modules: names of nn.Linear, nn.Conv2d and nn.MultiheadAttention modules. A name is one or more path
            components, and selects every module whose dotted path ends in them: "c_proj" selects "mlp.c_proj", "proj"
            does not. "in_proj" and "out_proj" also select those projections of an nn.MultiheadAttention, the
            attention's own name selects both. "all-linear" (the default): every nn.Linear and both projections of
            every nn.MultiheadAttention, but not a language model's output embedding.
        rank: R, 1 to 256. Default 16.
        alpha: the low-rank term is scaled by alpha / R. Default 32.
        dropout: probability of zeroing an element of a low-rank term's input, in [0, 1). Default 0.
        use_rslora: scale by alpha / sqrt(R) instead. Default False.
        qkv: "joint" (the default): one pair for an attention's q, k and v; "split": one each. An attention with kdim
            or vdim of its own is always split.
        freeze: whether everything in ``model`` stops training but the LoRA parameters and ``train``. Default True.
        train: dotted paths, from ``model``, of modules or parameters that train whole, e.g. ("head",). Modules there
            get no LoRA.
        exclude: dotted paths, from ``model``, of modules where nothing is adapted.
        lora_dtype: of the LoRA parameters. Default: float32 for float16 and bfloat16 weights, else the weight's.
        freeze_batchnorm: with ``freeze``, a BatchNorm that has nothing to train stays in eval mode, also when the
            model is put in training mode, so that its running statistics stay. Default True.

    Returns:
        A `LoRAReport`; ``print`` it.

    Raises:
        TypeError: an argument has the wrong type, a name selects a module that cannot carry LoRA, or ``lora_dtype`` is
            neither a weight's dtype nor float32 over a narrower one.
        ValueError: a name or path selects nothing (near names are listed) or what carries LoRA already, a setting is
            out of range, or a parameter of ``model`` is uninitialized or made under inference_mode.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; "all-linear" as in PEFT.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_CALLER}: model must be an nn.Module, got {type(model).__name__}")
    check_settings(_CALLER, rank, alpha, dropout, lora_dtype)
    if qkv not in ("joint", "split"):
        raise ValueError(f"{_CALLER}: qkv must be 'joint' or 'split', got {qkv!r}")
    train, exclude = surgery.names(_CALLER, "train", train), surgery.names(_CALLER, "exclude", exclude)
    trained = surgery.trained_parameters(_CALLER, model, train)
    modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
    surgery.resolve(
        _CALLER, "exclude", exclude, modules | {name for m, paths in places(model) for name in _answers(m, paths)}
    )
    targets = surgery.names(_CALLER, "target_modules", target_modules)
    if not targets:
        raise ValueError(f"{_CALLER}: target_modules must hold at least one name, got {target_modules!r}")
    notes: list[str] = []
    sites = _find_sites(model, targets, (*train, *exclude), notes)
    surgery.check_parameters(_CALLER, model)

    settings = {"alpha": alpha, "dropout": dropout, "use_rslora": use_rslora, "lora_dtype": lora_dtype}
    built = [(site, _wrap(site, rank, qkv, notes, settings)) for site in sites]

    # Nothing above has touched the model, nothing below raises.
    for site, adapted in built:
        surgery.replace(model, site.paths, adapted)
    if freeze:
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, LoRAModule):
                for parameter in module.own_lora_parameters().values():
                    parameter.requires_grad_(True)
    for parameter in trained:
        parameter.requires_grad_(True)
    if freeze and freeze_batchnorm:
        notes += surgery.hold_batchnorms(model, train)
    notes += _keep_dense(model)
    return lora_report(model, notes)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The LoRA parameters of ``model`` by their full names: what an adapter checkpoint holds.

    The tensors are detached and share memory with the model. Whatever else trains (``train`` of `inject_lora`) is not
    among them.
    """
    return {
        f"{path}.{name}" if path else name: parameter.detach()
        for path, module in model.named_modules()
        if isinstance(module, LoRAModule)
        for name, parameter in module.own_lora_parameters().items()
    }


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy an adapter checkpoint, as `lora_state_dict` gives it, into a model with the same LoRA modules.

    Raises:
        ValueError: names are missing or unknown, or shapes differ. The model is as it was.
    """
    own = lora_state_dict(model)
    if own.keys() != state.keys():
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        raise ValueError(
            f"load_lora_state_dict: state must have the model's {len(own)} LoRA parameters, got {len(missing)} "
            f"missing {missing[:5]} and {len(unknown)} unknown {unknown[:5]}"
        )
    differing = [
        f"{name} expected {tuple(parameter.shape)}, got {tuple(state[name].shape)}"
        for name, parameter in own.items()
        if state[name].shape != parameter.shape
    ]
    if differing:
        raise ValueError(f"load_lora_state_dict: state must have the model's shapes: {'; '.join(differing)}")
    model.load_state_dict(state, strict=False)


def remove_lora(model: nn.Module, merge: bool = True) -> None:
    """Put plain modules back in place of every LoRA module of ``model``, and BatchNorms back under ``train()``.

    What was frozen stays frozen, and what trained trains. All or nothing.

    Args:
        model: a model with LoRA modules somewhere inside it.
        merge: with the low-rank terms merged into the weights (the default; see `LoRAModule.merge` for what 16-bit
            weights lose), or dropped.

    Raises:
        RuntimeError: ``merge`` on a convolution with groups, which cannot hold its low-rank term.
        ValueError: ``model`` itself is a LoRA module; call its ``to_base()``.
    """
    if isinstance(model, LoRAModule):
        raise ValueError("remove_lora: model must contain LoRA modules, got one itself; use its to_base()")
    plain = [(paths, module.to_base(merge)) for module, paths in places(model) if isinstance(module, LoRAModule)]
    for paths, module in plain:
        surgery.replace(model, paths, module)
    surgery.release_batchnorms(model)


# ---- finding


def _answers(module: nn.Module, paths: list[str]) -> dict[str, set[str]]:
    """Each name the module answers to, and which projections (of an attention) that name selects."""
    answers = {path: set(_PARTS) for path in paths}
    if isinstance(module, nn.MultiheadAttention):
        answers |= {f"{path}.{part}".lstrip("."): {part} for path in paths for part in _PARTS}
    return answers


def _find_sites(model: nn.Module, targets: tuple[str, ...], left_out: tuple[str, ...], notes: list[str]) -> list[_Site]:
    output = getattr(model, "get_output_embeddings", None)
    output = output() if callable(output) else None
    sites: list[_Site] = []
    matched: set[str] = set()
    known: set[str] = set()
    skipped: Counter[str] = Counter()
    for module, paths in places(model):
        if any(surgery.under(path, left_out) for path in paths):
            continue
        linear = ALL_LINEAR in targets and _is_linear(module) and module is not output
        hits = {ALL_LINEAR} if linear else set()
        parts = set(_PARTS) if linear else set()
        for name, selected in _answers(module, paths).items():
            named = {target for target in targets if f".{name}".endswith(f".{target}")}
            hits |= named
            parts |= selected if named else set()
            if _wrapper(module) is not None:
                known.add(name.rpartition(".")[2])
            if surgery.under(name, left_out):
                parts -= selected
        matched |= hits
        if not parts:
            continue
        try:
            _check_site(module, paths)
        except TypeError:
            if hits != {ALL_LINEAR}:
                raise
            skipped[type(module).__name__] += 1
            continue
        sites.append(_Site(module, paths, parts))
        if len(paths) > 1:
            notes.append(f"one module stands at {', '.join(paths)}: adapted once, for all of them")
    left_alone = ", ".join(f"{count} {name}" for name, count in skipped.items())
    for target in targets:
        if target not in matched or not sites:
            raise ValueError(
                f"{_CALLER}: target_modules must select modules outside train and exclude, got {target!r}, which "
                f"selects none{f' ({left_alone} cannot carry LoRA)' if skipped else ''}; {surgery.near(target, known)}"
            )
    if skipped:
        notes.append(f"left alone, as no plain nn.Linear: {left_alone}")
    return sites


def _is_linear(module: nn.Module) -> bool:
    # transformers' Conv1D is a linear layer with its weight transposed: to be counted as skipped, not overlooked.
    return isinstance(module, nn.Linear | nn.MultiheadAttention) or type(module).__name__ == "Conv1D"


def _wrapper(module: nn.Module) -> type[LoRAModule] | None:
    return next((wrapper for kind, wrapper in _WRAPPERS.items() if isinstance(module, kind)), None)


def _check_site(module: nn.Module, paths: list[str]) -> None:
    wrapper = _wrapper(module)
    if wrapper is None:
        raise TypeError(
            f"{_CALLER}: target_modules must select nn.Linear, nn.Conv2d or nn.MultiheadAttention, "
            f"got {paths[0]!r}, which is a {type(module).__name__}"
        )
    if "" in paths:
        raise ValueError(
            f"{_CALLER}: model must contain the modules to adapt, got a {type(module).__name__} itself; "
            f"use {wrapper.__name__}.from_..."
        )
    check_base(f"{_CALLER}: {paths[0]}", module, wrapper)


# ---- replacing


def _wrap(site: _Site, rank: int, qkv: str, notes: list[str], settings: dict) -> LoRAModule:
    module = site.module
    if isinstance(module, nn.Linear):
        return LoRALinear.from_linear(module, rank, freeze=False, **settings)
    if isinstance(module, nn.Conv2d):
        return LoRAConv2d.from_conv(module, rank, freeze=False, **settings)
    assert isinstance(module, nn.MultiheadAttention)
    in_proj, out_proj = (part in site.parts for part in _PARTS)
    if in_proj and qkv == "joint" and not module._qkv_same_embed_dim:
        qkv = "split"
        notes.append(f"{site.paths[0]}: q, k and v adapted separately, because key or value have a width of their own")
    return LoRAMultiheadAttention.from_mha(
        module, rank, qkv=qkv, in_proj=in_proj, out_proj=out_proj, freeze=False, **settings
    )


def _keep_dense(model: nn.Module) -> list[str]:
    """nn.TransformerEncoder must not turn padded batches into nested tensors: only its layers' fast path takes them."""
    dense = 0
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoder) or not module.use_nested_tensor:
            continue
        if any(isinstance(child, LoRAModule) for child in module.modules()):
            module.use_nested_tensor = False
            dense += 1
    return [f"{dense} nn.TransformerEncoder no longer use nested tensors"] if dense else []
