"""Models and modules that cannot be changed, and why."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pyfused.ops.contract import checks
from pyfused.surgery.added import KeepsWide
from pyfused.surgery.variants import plain_class


def check_module(caller: str, model: object) -> None:
    """Refuse what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be an nn.Module, got {type(model).__name__}")


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


def sharded(model: nn.Module) -> str | None:
    """What of ``model`` is sharded over processes, in words; None where nothing is."""
    # Looked up by name: torch.distributed may not be there, and is slow to import.
    for path, module in model.named_modules():
        if any(base.__name__ in ("FullyShardedDataParallel", "FSDPModule") for base in type(module).__mro__):
            return f"the {type(module).__name__} {path or 'model'!r}"
    for name, parameter in model.named_parameters():
        if checks.is_dtensor(parameter):
            return f"the DTensor {name!r}"
    return None


def check_model(caller: str, model: nn.Module) -> None:
    """Refuse what is no module, PEFT's, or sharded or wrapped for it: a method changes a model before any of these."""
    check_module(caller, model)
    for path, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"{caller}: model must not be in DistributedDataParallel yet, got {path or 'model'!r}: it would not "
                "reduce the gradients of parameters that come later; inject first, and wrap the injected model"
            )
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(
                f"{caller}: model must not be PEFT's, got {path or 'model'!r}, a {type(module).__module__}."
                f"{type(module).__name__}; call merge_and_unload() on it, or give the model that it was made from"
            )
    shard = sharded(model)
    if shard is not None:
        raise ValueError(
            f"{caller}: model must not be sharded, got {shard}; inject first, and shard the injected model "
            "(fully_shard, FullyShardedDataParallel, parallelize_module)"
        )


# What a subclass of a base class may define for itself: an instance that exists needs none of it.
_TAKEN_OVER = {"__init__", "reset_parameters", "extra_repr", "__repr__", "_abc_impl", "__annotate__"}


def _own_members(cls: type, kind: type[nn.Module]) -> list[str]:
    """What ``cls`` defines beyond ``kind`` that an instance of another class would lack."""
    beyond = [base for base in cls.__mro__ if base not in kind.__mro__]
    return sorted(
        {
            name
            for base in beyond
            for name, value in vars(base).items()
            if name not in _TAKEN_OVER and (not name.startswith("__") or callable(value))
        }
    )


def check_plain(caller: str, module: nn.Module, kind: type[nn.Module], weights: Iterable[str]) -> None:
    """Refuse a module that nothing but a ``kind`` can be said to be, with ``weights`` as parameters.

    Raises:
        TypeError: another kind of module, one whose forward is its own, or of a class with members of its own.
        ValueError: this package's already, or its weights are no plain floating parameters.
    """
    if isinstance(module, KeepsWide):
        raise ValueError(
            f"{caller}: expected a plain nn.{kind.__name__}, got a {type(module).__name__}: already wrapped"
        )
    if not isinstance(module, kind):
        raise TypeError(f"{caller}: expected an nn.{kind.__name__}, got {type(module).__name__}")
    given, _ = plain_class(type(module))
    named = f"{given.__module__}.{given.__qualname__}"
    if given.forward is not kind.forward or "forward" in module.__dict__:
        raise TypeError(
            f"{caller}: expected an nn.{kind.__name__} with its own forward, got {named} "
            "with a forward that replaces it"
        )
    for name in weights:
        weight = module._parameters.get(name)
        if weight is None:
            raise ValueError(
                f"{caller}: {name} must be a parameter of the module, got a computed one; remove its parametrization"
            )
        if is_lazy(weight):
            raise ValueError(f"{caller}: {name} must have a shape, got an uninitialized parameter; run one forward")
        if weight.dtype not in checks.FLOATING:
            raise TypeError(f"{caller}: {name} must have dtype {checks.FLOATING}, got {weight.dtype}")
        checks.tensor(caller, name, weight)
        if weight.numel() == 0:
            raise ValueError(f"{caller}: {name} must have elements, got shape {tuple(weight.shape)}")
        if weight.is_inference() or torch.is_inference_mode_enabled():
            raise ValueError(f"{caller}: {name} must be adapted, and made, outside torch.inference_mode()")
    members = _own_members(given, kind)
    if members:
        raise TypeError(
            f"{caller}: expected an nn.{kind.__name__} or a subclass without members of its own, got {named} with "
            f"{', '.join(members[:5])}, which the adapted module would lack"
        )
