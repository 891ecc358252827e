"""Changing a model in place: paths, what trains, replacing modules, norms that stay in eval mode."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence, Set
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from typing_extensions import Self


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


def sharded(model: nn.Module) -> str | None:
    """What of ``model`` is sharded over processes, in words; None where nothing is."""
    # Looked up by name: torch.distributed may not be there, and is slow to import.
    for path, module in model.named_modules():
        if any(base.__name__ in ("FullyShardedDataParallel", "FSDPModule") for base in type(module).__mro__):
            return f"the {type(module).__name__} {path or 'model'!r}"
    for name, parameter in model.named_parameters():
        if any(base.__name__ == "DTensor" for base in (*type(parameter).__mro__, *type(parameter.data).__mro__)):
            return f"the DTensor {name!r}"
    return None


def check_whole(caller: str, model: nn.Module) -> None:
    """Refuse a model that PEFT has changed, or that is sharded: LoRA goes in before either."""
    for path, module in model.named_modules():
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


def replace(model: nn.Module, paths: Iterable[str], module: nn.Module) -> None:
    """``module`` at each of ``paths``, in place of what is there."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)


class _NotABatchNorm(type):
    """Makes a class of norms that are what they were, ``nn.BatchNorm2d`` say, but not torch's ``_BatchNorm``.

    By that name `nn.SyncBatchNorm.convert_sync_batchnorm` finds what it puts another module in the place of, and
    `torch.optim.swa_utils.update_bn` what it restarts. What fuses a norm into a convolution asks for the former.
    """

    def mro(cls) -> list[type]:
        return [base for base in super().mro() if base is not _BatchNorm]


class FrozenNorm(nn.Module):
    """What a norm in eval mode for good has beside its own class, ``base_class``."""

    base_class: type[nn.Module]

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_blank_frozen, (self.base_class,), *reduced[2:])


_frozen_classes: dict[type[nn.Module], Any] = {}


def _frozen_class(base: type[nn.Module]) -> Any:
    if base not in _frozen_classes:
        # torch.fx goes by the module whether to look into a forward.
        members: dict[str, Any] = {"base_class": base, "__module__": base.__module__}
        if base.forward is _BatchNorm.forward:
            members["forward"] = base.forward
        _frozen_classes[base] = _NotABatchNorm(f"Frozen{base.__name__}", (FrozenNorm, base), members)
    return _frozen_classes[base]


def _blank_frozen(base: type[nn.Module]) -> Any:
    """For copies and pickles, which cannot look up a class that is made."""
    cls = _frozen_class(base)
    return cls.__new__(cls)


def hold_batchnorms(model: nn.Module, train: Iterable[str] = ()) -> list[str]:
    """Frozen norms with running statistics to eval for good, by a class of their own: see `FrozenNorm`.

    Norms under ``train``, or with a parameter that trains, are left. Returns notes for a report.
    """
    held = 0
    for path, module in model.named_modules():
        if not isinstance(module, _NormBase) or not module.track_running_stats or under(path, train):
            continue
        if not any(parameter.requires_grad for parameter in module.parameters()):
            module.eval()
            if not isinstance(module, FrozenNorm):
                module.__class__ = _frozen_class(type(module))
            held += 1
    return [f"{held} frozen BatchNorm stay in eval mode (freeze_batchnorm=False lets them move)"] if held else []


def release_batchnorms(model: nn.Module) -> None:
    """What `hold_batchnorms` holds back under ``train()``."""
    for module in model.modules():
        if isinstance(module, FrozenNorm):
            module.__class__ = module.base_class  # type: ignore[assignment]
