"""What was tuned in a model, whatever the method: read from a model, and put into one.

Three kinds of tensors: parameters of modules that this package has added or put in another's place, the whole state of
modules that train, and single parameters that train, a bias say.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyfused.lora.attention import LoRAProjections
from pyfused.lora.base import LoRAModule
from pyfused.lora.conv import LoRAConv2d
from pyfused.lora.inject import inject_lora
from pyfused.lora.linear import LoRALinear
from pyfused.lora.pairs import DEFAULT
from pyfused.lora.state import SETTINGS, adapters_of, lora_state_dict
from pyfused.lora.targets import layers_of
from pyfused.methods import virtual_tokens
from pyfused.methods.bias_tuning import is_bias
from pyfused.methods.prefix import PrefixTuning
from pyfused.methods.virtual_tokens import VirtualTokens
from pyfused.surgery import checkpoint
from pyfused.surgery.added import KeepsWide, added_names
from pyfused.surgery.change import all_or_nothing, told_to_train
from pyfused.surgery.checkpoint import plain_name
from pyfused.surgery.paths import near, under
from pyfused.surgery.procedure import Request, adapt
from pyfused.surgery.refusals import check_model, check_module
from pyfused.surgery.variants import plain_class

# Kinds of LoRA modules. One for every linear layer, whichever way it holds its weight; an attention's own for its
# out_proj, which other packages treat apart.
LINEAR, OUT_PROJ, CONV, ATTENTION, PACKED = (
    "LoRALinear", "out_proj of LoRAMultiheadAttention", "LoRAConv2d", "LoRAMultiheadAttention", "LoRAPackedAttention",
)  # fmt: skip
LORA_KINDS = (LINEAR, OUT_PROJ, CONV, ATTENTION, PACKED)


@dataclass(frozen=True)
class Tuned:
    """What was tuned in a model. All names and paths are those without wrappers around modules.

    Attributes:
        tensors: full name -> tensor.
        modules: path of each module of this package -> "kind", and its settings.
        trained_modules: paths of modules of the model that train whole; all of their state is in ``tensors``.
        trained_parameters: names of further parameters of the model that train.
        partial: whether it says no more than what another package's file says: what it leaves out stays as it is in
            the model that it is put into.
    """

    tensors: dict[str, Tensor]
    modules: dict[str, dict[str, Any]]
    trained_modules: tuple[str, ...] = ()
    trained_parameters: tuple[str, ...] = ()
    partial: bool = False

    def trained(self) -> set[str]:
        """Names of the tensors that are the model's own."""
        return {name for name in self.tensors if under(name, (*self.trained_modules, *self.trained_parameters))}

    def added(self) -> set[str]:
        """Names of the tensors that are parameters of ``modules``."""
        return self.tensors.keys() - self.trained()

    def of_module(self, path: str) -> dict[str, Tensor]:
        """The tensors of one module of ``modules``, by their own names."""
        prefix = f"{path}." if path else ""
        found = {name: tensor for name, tensor in self.tensors.items() if name.rpartition(".")[0] == path}
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def collect(caller: str, model: nn.Module, trains: bool = False, adapter: str | None = None) -> Tuned:
    """What was tuned in ``model``; the tensors share memory with it.

    Args:
        caller: in whose name errors are raised. model: any module.
        trains: whether what requires grad counts too, beside what a call of this package set to train; where nothing
            was tuned by this package, nothing does.
        adapter: which of several LoRA adapters; None is the only one.

    Raises:
        TypeError: ``model`` is no nn.Module.
        ValueError: a module of this package keeps buffers, which are not covered; ``model`` has several LoRA adapters,
            and none is named.
        RuntimeError: a LoRA parameter is computed (parametrized, pruned).
    """
    check_module(caller, model)
    tensors: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Any]] = {}
    known = adapters_of(module for module in model.modules() if isinstance(module, LoRAModule))
    if adapter is None and len(known) > 1:
        raise ValueError(
            f"{caller}: model must have one LoRA adapter, got {', '.join(known)}; save_lora and load_lora take the "
            "name of one"
        )
    # Under another name there is none of it yet.
    if known and adapter in (None, *known):
        tensors = lora_state_dict(model, adapter)
        settings = checkpoint.read_settings(caller, SETTINGS, tensors.pop(SETTINGS))
        holding = {name.rpartition(".")[0] for name in tensors}
        of = {plain_name(path): module for path, module in model.named_modules()}
        modules = {path: _lora(path, of) | own for path, own in settings.items() if path in holding}
    for path, module in model.named_modules():
        kind = plain_class(type(module))[0]
        ours = isinstance(module, KeepsWide) or kind.__module__.partition(".")[0] == "pyfused"
        if isinstance(module, LoRAModule) or not ours:
            continue
        kept = [name for name, buffer in module.named_buffers(recurse=False) if buffer is not None]
        if kept:
            raise ValueError(
                f"{caller}: model must keep what was tuned in parameters, got the {kind.__name__} {path!r} with the "
                f"buffers {', '.join(kept)}; keep its state_dict()"
            )
        stated: Any = getattr(module, "settings", None)
        if not isinstance(module, KeepsWide) and stated is None:
            continue
        modules[plain_name(path)] = {"kind": kind.__name__} | (stated() if callable(stated) else {})
        for name in added_names(module):
            tensors[plain_name(f"{path}.{name}" if path else name)] = module.get_parameter(name).detach()
    roots, single = _told(model, trains and bool(modules))
    live = _live(model)
    tensors |= {name: tensor for name, tensor in live.items() if under(name, (*roots, *single))}
    # As a file gives them back.
    return Tuned(tensors, json.loads(json.dumps(modules)), roots, single)


def _lora(path: str, of: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The kind of a LoRA module, and what of the layer that it adapts gives its parameters their meaning."""
    module, parent = of[path], of.get(path.rpartition(".")[0])
    if isinstance(module, LoRAConv2d):
        names = ("kernel_size", "groups", "dilation", "padding_mode")
        return {"kind": CONV} | {name: getattr(module, name) for name in names}
    if isinstance(module, LoRAProjections):
        return {"kind": ATTENTION if isinstance(module, nn.MultiheadAttention) else PACKED}
    held = isinstance(module, LoRALinear) and isinstance(parent, LoRAProjections)
    return {"kind": OUT_PROJ if held and isinstance(parent, nn.MultiheadAttention) else LINEAR}


def _live(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their plain names, not those of this package."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        ours = set(added_names(module))
        tensors = {name: p for name, p in module._parameters.items() if name not in ours} | {
            name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set
        }
        for name, tensor in tensors.items():
            if tensor is not None:
                found[plain_name(f"{path}.{name}" if path else name)] = tensor.detach()
    return found


def _told(model: nn.Module, trains: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of the modules that train whole, and the names of what else does, of the model's own parameters.

    That is what this package was told to train, and with ``trains`` what requires grad.
    """
    told = {plain_name(name) for name in told_to_train(model)}
    if trains:
        named = model.named_parameters(remove_duplicate=False)
        told |= {plain_name(name) for name, parameter in named if parameter.requires_grad}
    told &= _live(model).keys()
    roots: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        path = plain_name(path)
        names = [plain_name(f"{path}.{name}") for name, _ in module.named_parameters()]
        if path and names and not under(path, roots) and told.issuperset(names):
            roots.append(path)
    return tuple(roots), tuple(name for name in sorted(told) if not under(name, roots))


# ---- into a model


def put(caller: str, model: nn.Module, tuned: Tuned, adapter: str | None = None) -> None:
    """Put ``tuned`` into ``model``, all or nothing; methods that the model has none of yet are put into it first.

    Its LoRA becomes ``adapter``; None is the model's only one.

    Raises:
        TypeError: ``model`` is no nn.Module, or a tensor has the wrong dtype.
        ValueError: names, shapes or settings differ; what is missing cannot be put into the model here.
    """
    before = collect(caller, model, adapter=adapter)
    fresh = not before.tensors
    # What is merged is merged anew; and where anything raises, the model is as it was.
    with all_or_nothing(), contextlib.ExitStack() as stack:
        _add(caller, model, tuned, before, adapter)
        own = collect(caller, model, adapter=adapter)
        live = _live(model)
        _check(caller, own, live, tuned)
        untold = [*tuned.trained_modules, *tuned.trained_parameters]
        untold = [path for path in untold if not under(path, [*own.trained_modules, *own.trained_parameters])]
        if untold:
            _train(caller, model, tuned, fresh)
        for module in model.modules():
            if isinstance(module, LoRAModule):
                stack.enter_context(module.held(merged=False))
        targets = live | own.tensors
        with torch.no_grad():
            for name, value in tuned.tensors.items():
                _copy(targets[name], value)


def _check(caller: str, own: Tuned, live: dict[str, Tensor], tuned: Tuned) -> None:
    whole = {name for name in live if under(name, tuned.trained_modules)}
    expected = whole | (tuned.trained() & live.keys())
    if not tuned.partial:
        expected |= own.tensors.keys()
    else:
        expected |= own.tensors.keys() & tuned.tensors.keys()
        absent = tuned.tensors.keys() - expected
        if absent:
            first = min(absent)
            raise ValueError(
                f"{caller}: model must have the parameters of the file, got one without {sorted(absent)[:5]}; of "
                f"{first}, {near(first, own.tensors or live)}"
            )
    checkpoint.check_names(caller, "file", expected, tuned.tensors.keys())
    targets = {name: (live | own.tensors)[name] for name in expected}
    checkpoint.check_shapes(caller, "file", targets, tuned.tensors)
    for name, value in tuned.tensors.items():
        mine = targets[name]
        if mine.dtype != value.dtype and not (mine.is_floating_point() and value.is_floating_point()):
            raise TypeError(f"{caller}: {name} of the file must have dtype {mine.dtype}, got {value.dtype}")
    settings = own.modules
    if tuned.partial:
        settings = {
            path: {name: own.modules.get(path, {}).get(name) for name in stated}
            for path, stated in tuned.modules.items()
        }
    checkpoint.check_settings(caller, "file", settings, tuned.modules)


def _copy(mine: Tensor, value: Tensor) -> None:
    mesh = getattr(mine, "device_mesh", None)
    if mesh is not None:
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(mesh.device_type, mine.dtype), mesh, mine.placements)  # type: ignore[attr-defined]
    mine.copy_(value)


def _train(caller: str, model: nn.Module, tuned: Tuned, freeze: bool) -> None:
    """Let what trained in the file train in ``model``, and with ``freeze`` nothing else of it."""
    check_model(caller, model)
    request = Request(caller, model, _roots(model, tuned), ())
    named = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    single = [named[name] for name in tuned.trained_parameters]
    # As `bitfit` holds them.
    stays = any(is_bias(name) for name in tuned.trained_parameters)
    adapt(request, also=lambda: single, freeze=freeze, stays=stays)


def _roots(model: nn.Module, tuned: Tuned) -> list[str]:
    """What of ``model`` trains whole by the file, by the names that it has here."""
    actual = {plain_name(path): path for path, _ in model.named_modules(remove_duplicate=False)}
    return [actual[path] for path in tuned.trained_modules if path in actual]


def _add(caller: str, model: nn.Module, tuned: Tuned, before: Tuned, adapter: str | None) -> None:
    """Put the methods of ``tuned`` that ``model`` has none of yet into it; what cannot be put there is refused."""
    puts: dict[tuple[str, ...], Callable[[str, nn.Module, dict[str, dict[str, Any]], Tuned], None]] = {
        LORA_KINDS: functools.partial(_add_lora, adapter=adapter or DEFAULT),
        (VirtualTokens.__name__,): _add_tokens,
    }
    for kinds, add in puts.items():
        wanted = {path: own for path, own in tuned.modules.items() if own.get("kind") in kinds}
        if wanted and not any(own["kind"] in kinds for own in before.modules.values()):
            check_model(caller, model)
            add(caller, model, wanted, tuned)
    addable = {kind for kinds in puts for kind in kinds}
    for path, own in tuned.modules.items():
        kind = own.get("kind")
        if kind not in addable and path not in before.modules:
            raise ValueError(
                f"{caller}: model must have the file's modules that cannot be put into it here, got one without the "
                f"{kind} {path!r}; {near(path, before.modules) if before.modules else 'it has no such modules'}; make "
                "the model as it was when it was saved (add_adapters, AdaptedCLIP, your own modules), then load"
            )


def _add_lora(caller: str, model: nn.Module, wanted: dict[str, dict[str, Any]], tuned: Tuned, adapter: str) -> None:
    layers = layers_of(model, caller)
    names = {plain_name(name): name for layer in layers for name in layer.names()}
    parts = {path: f"{path}.in_proj" if own["kind"] in (ATTENTION, PACKED) else path for path, own in wanted.items()}
    for path, part in parts.items():
        if part.lstrip(".") not in names:
            raise ValueError(
                f"{caller}: model must have the layers that the file adapts, got a {type(model).__name__} without "
                f"{path!r}; {near(path, names) if names else 'it has none that LoRA has a form for'}"
            )
    groups: dict[tuple[Any, ...], list[str]] = {}
    for path, own in wanted.items():
        lacking = {"rank", "alpha", "dropout", "use_rslora"} - own.keys()
        if lacking:
            raise ValueError(f"{caller}: file must hold every setting of {path!r}, got none of {sorted(lacking)}")
        around = wanted.get(path.rpartition(".")[0], {}) if own["kind"] in (OUT_PROJ, LINEAR) else own
        groups.setdefault((own["dropout"], own["use_rslora"], around.get("qkv") or "joint"), []).append(path)
    for (dropout, use_rslora, qkv), paths in groups.items():
        # The longest name first: it is the one that a layer was meant by, where another ends in the same components.
        targets = {names[parts[path].lstrip(".")]: path for path in sorted(paths, key=len, reverse=True)}
        inject_lora(
            model,
            list(targets),
            {target: wanted[path]["rank"] for target, path in targets.items()},
            {target: wanted[path]["alpha"] for target, path in targets.items()},
            dropout,
            use_rslora,
            qkv,
            train=_roots(model, tuned),
            exclude=_besides(targets, names.values()),
            adapter=adapter,
        )


def _besides(targets: Iterable[str], names: Iterable[str]) -> list[str]:
    """What of ``names`` the targets, whole names themselves, select besides."""
    chosen = set(targets)
    # An attention's own name stands for its parts.
    chosen |= {target.rpartition(".")[0] for target in chosen if target.endswith((".in_proj", ".out_proj"))}
    return [name for name in names if name not in chosen and any(name.endswith(f".{target}") for target in chosen)]


def _add_tokens(caller: str, model: nn.Module, wanted: dict[str, dict[str, Any]], tuned: Tuned) -> None:
    made = {
        (own["sets"], own["projection"], own["dropout"], tuned.tensors[f"{path}.tokens"].shape[-2])
        for path, own in wanted.items()
        if f"{path}.tokens" in tuned.tensors
    }
    if len(made) != 1:
        raise ValueError(
            f"{caller}: file must have virtual tokens of one PrefixTuning, got {len(made)} kinds; put them into the "
            "model first, then load"
        )
    ((sets, projection, dropout, count),) = made
    exclude = []
    if sets == 2:
        hosts = {path.rpartition(".")[0] for path in wanted}
        attentions = {path: m for path, m in model.named_modules() if virtual_tokens.is_attention(m)}
        exclude = [path for path in attentions if plain_name(path) not in hosts]
    PrefixTuning(model, count, sets == 2, projection, dropout, train=_roots(model, tuned), exclude=exclude)


def is_lora(own: Mapping[str, Any]) -> bool:
    """Whether a module of these settings is a LoRA module."""
    return own.get("kind") in LORA_KINDS
