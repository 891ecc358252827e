"""Changing a model in place: paths, what trains, replacing modules, norms that stay in eval mode."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Sequence, Set

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy


def names(caller: str, argument: str, value: str | Iterable[str]) -> tuple[str, ...]:
    """``value``, one name or several, as a tuple."""
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, Sequence | Set) or not all(isinstance(name, str) for name in found):
        raise TypeError(f"{caller}: {argument} must be a name or a sequence of names, got {value!r}")
    return tuple(found)


def close(name: str, known: Iterable[str]) -> list[str]:
    """What of ``known`` looks like ``name``, the nearest first."""
    return difflib.get_close_matches(name, sorted(set(known)), n=5, cutoff=0.5)


def near(name: str, known: Iterable[str]) -> str:
    """What of ``known`` looks like ``name``, in words."""
    found = close(name, known)
    return f"near names: {', '.join(found)}" if found else f"there are: {', '.join(sorted(set(known))[:12])}"


def resolve(caller: str, argument: str, paths: Iterable[str], known: Set[str]) -> None:
    """Refuse paths that are not in ``known``."""
    for path in paths:
        if not path or path not in known:
            raise ValueError(
                f"{caller}: {argument} must hold dotted paths inside the model, got {path!r}; {near(path, known)}"
            )


def under(path: str, roots: Iterable[str]) -> bool:
    """Whether ``path`` is one of ``roots`` or inside one."""
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def trained_parameters(caller: str, model: nn.Module, train: tuple[str, ...]) -> list[nn.Parameter]:
    """The parameters at or under the paths ``train``."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
    resolve(caller, "train", train, modules | parameters.keys())
    chosen = {name: parameter for name, parameter in parameters.items() if under(name, train)}
    for name, parameter in chosen.items():
        if not parameter.is_floating_point():
            raise TypeError(f"{caller}: train must name floating parameters, got {name} of dtype {parameter.dtype}")
    return list(chosen.values())


def check_parameters(caller: str, model: nn.Module) -> None:
    """Refuse parameters that cannot be counted, or told to train or not."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"{caller}: every parameter of model must have a shape, got the uninitialized {name}; run one forward"
            )
        if parameter.is_inference():
            raise ValueError(
                f"{caller}: every parameter of model must be a normal tensor, got {name}, made under inference_mode; "
                "make the model outside it"
            )


def replace(model: nn.Module, paths: Iterable[str], module: nn.Module) -> None:
    """``module`` at each of ``paths``, in place of what is there."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return type(module).train(module, False)


def is_held(module: nn.Module) -> bool:
    """Whether `hold_batchnorms` keeps this module in eval mode."""
    return getattr(module.__dict__.get("train"), "func", None) is _stay_in_eval


def hold_batchnorms(model: nn.Module, train: Iterable[str] = ()) -> list[str]:
    """Frozen norms with running statistics to eval for good, by a ``train`` of their own that copies and pickles.

    Norms under ``train``, or with a parameter that trains, are left. Returns notes for a report.
    """
    held = 0
    for path, module in model.named_modules():
        if not isinstance(module, _NormBase) or not module.track_running_stats or under(path, train):
            continue
        if not any(parameter.requires_grad for parameter in module.parameters()):
            module.eval()
            module.__dict__["train"] = functools.partial(_stay_in_eval, module)
            held += 1
    return [f"{held} frozen BatchNorm stay in eval mode (freeze_batchnorm=False lets them move)"] if held else []
