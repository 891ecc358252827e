"""Changing a model in place: paths, what trains, replacing modules, norms that stay in eval mode."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

from pyfused.modules.wide import KeepsWide

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


def asked(
    caller: str,
    model: nn.Module,
    train: str | Iterable[str],
    exclude: str | Iterable[str],
    known: Iterable[str] = (),
) -> tuple[tuple[str, ...], tuple[str, ...], list[nn.Parameter]]:
    """What a caller's ``train`` and ``exclude`` name, checked, and the parameters of ``train``.

    ``exclude`` may name modules, and what else is ``known``.
    """
    train, exclude = names(caller, "train", train), names(caller, "exclude", exclude)
    trained = trained_parameters(caller, model, train)
    paths = {path for path, _ in model.named_modules(remove_duplicate=False)}
    resolve(caller, "exclude", exclude, paths.union(known))
    return train, exclude, trained


def check_model(caller: str, model: object) -> None:
    """Refuse what is no module, and what `check_whole` does."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be an nn.Module, got {type(model).__name__}")
    check_whole(caller, model)


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
    """Refuse a model that PEFT has changed, or that is sharded or wrapped for it: LoRA goes in before any of them."""
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


def bar_fast_paths(module: nn.Module, args: tuple) -> None:
    """A forward pre-hook that does nothing: ``nn.TransformerEncoderLayer``'s inference path, which reads the weights of
    its submodules and never calls them, declines as soon as one of them has a hook."""


# On a module: which of its own parameters this package was told to train whole. Copies and pickles carry it.
_TOLD = "_told_to_train"


def trained_before(model: nn.Module) -> list[nn.Parameter]:
    """What earlier calls of this package set to train in ``model``, and trains still."""
    found = []
    for module in model.modules():
        own = module._wide_names() if isinstance(module, KeepsWide) else module.__dict__.get(_TOLD, ())
        parameters = [module._parameters.get(name) for name in own]
        found += [parameter for parameter in parameters if parameter is not None and parameter.requires_grad]
    return found


@dataclass
class Place:
    """A module and everywhere it stands in a model: its dotted paths, and (parent, name) for each."""

    module: nn.Module
    paths: list[str]
    spots: list[tuple[nn.Module, str]]


def places(model: nn.Module, whole: Callable[[nn.Module], bool]) -> list[Place]:
    """Every module of ``model`` once; not those inside a module that is ``whole``, which is replaced as one."""
    found: dict[int, Place] = {id(model): Place(model, [""], [])}
    _walk(model, "", whole, found)
    return list(found.values())


def _walk(parent: nn.Module, path: str, whole: Callable[[nn.Module], bool], found: dict[int, Place]) -> None:
    if whole(parent):
        return
    for name, child in parent._modules.items():
        if child is not None:
            place = found.setdefault(id(child), Place(child, [], []))
            place.paths.append(f"{path}.{name}" if path else name)
            place.spots.append((parent, name))
            _walk(child, place.paths[-1], whole, found)


class Change:
    """Changes of a model in place, each with its way back; see `all_or_nothing`."""

    def __init__(self, undo: contextlib.ExitStack) -> None:
        self._undo = undo

    def set(self, owner: nn.Module, name: str, value: object) -> None:
        """``owner.name = value``, a plain attribute."""
        self._undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def add(self, owner: nn.Module, name: str, value: object) -> None:
        """``owner.name = value``, a module or a plain attribute.

        Raises:
            ValueError: ``owner`` has a member of that name.
        """
        if hasattr(owner, name):
            raise ValueError(f"{type(owner).__name__}: expected a module without a member {name!r}, got one with it")
        setattr(owner, name, value)
        self._undo.callback(delattr, owner, name)

    def drop(self, owner: nn.Module, name: str) -> None:
        """``del owner.name``, where it is there."""
        if name in owner._modules or name in owner.__dict__:
            self._undo.callback(setattr, owner, name, getattr(owner, name))
            delattr(owner, name)

    def replace(self, place: Place, module: nn.Module) -> None:
        """``module`` wherever ``place`` is.

        Raises:
            ValueError: it is what `torch.compile` made a module of.
        """
        for parent, name in place.spots:
            if type(parent).__name__ == "OptimizedModule":
                raise ValueError(
                    f"{place.paths[0]}: torch.compile made a module of this {type(place.module).__name__}, which goes "
                    "on running it; change the model first, and compile it afterwards"
                )
            # Not by setattr, which a parent may refuse.
            self._undo.callback(parent._modules.__setitem__, name, place.module)
            setattr(parent, name, module)

    def as_variant(self, module: nn.Module, kind: type[Variant]) -> None:
        """Make ``module`` a ``kind`` of what it is."""
        if not isinstance(module, kind):
            self._undo.callback(setattr, module, "__class__", type(module))
            module.__class__ = _variant(kind, type(module))

    def as_base(self, module: nn.Module, kind: type[Variant]) -> None:
        """Make ``module`` what it was before it became a ``kind``.

        Raises:
            RuntimeError: another class was put on top of it since.
        """
        plain, kinds = plain_class(type(module))
        if not any(issubclass(own, kind) for own in kinds):
            raise RuntimeError(
                f"{type(module).__name__}: expected the class that this package made, got one on top of it; undo first "
                "what came later (fully_shard, a parametrization)"
            )
        self._undo.callback(setattr, module, "__class__", type(module))
        module.__class__ = dressed(plain, [other for other in kinds if not issubclass(other, kind)])

    def train(self, parameters: Iterable[nn.Parameter], trains: bool = True) -> None:
        """Set parameters to train or not."""
        for parameter in parameters:
            if parameter.requires_grad != trains:
                self._undo.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(trains)

    def keep_training(self, model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        """Set parameters of ``model`` to train, and to go on training when a later call freezes the rest."""
        chosen = {id(parameter): parameter for parameter in parameters}
        self.train(chosen.values())
        for module in model.modules():
            own = {name for name, parameter in module._parameters.items() if id(parameter) in chosen}
            if own:
                told = module.__dict__.get(_TOLD)
                restore = module.__dict__.pop if told is None else module.__dict__.__setitem__
                self._undo.callback(restore, _TOLD, told)
                module.__dict__[_TOLD] = own | (told or set())

    def freeze(self, model: nn.Module, kept: Iterable[nn.Parameter]) -> None:
        """Nothing in ``model`` trains but what of ``kept`` does."""
        stay = {id(parameter) for parameter in kept}
        self.train((parameter for parameter in model.parameters() if id(parameter) not in stay), False)


@contextlib.contextmanager
def all_or_nothing() -> Iterator[Change]:
    """Gives a `Change`; what was done by it is undone where the body raises."""
    with contextlib.ExitStack() as undo:
        yield Change(undo)
        undo.pop_all()


class Variant(nn.Module):
    """A module whose class was replaced by a subclass of it: behaviour that no copy, pickle or converter loses.

    Attributes:
        _variant_of: what it was. _variant_kind: as what it was made. _variant_prefix: of the name of its class.

    All its names begin so, for that it may stand on any class: one of that class's members would be out of sight.
    """

    _variant_of: type[nn.Module]
    _variant_prefix = "Variant"
    _variant_kind: type[Variant]

    @classmethod
    def _variant_made(cls, base: type[nn.Module]) -> Any:
        return type(f"{cls._variant_prefix}{base.__name__}", (cls, base), cls._variant_members(base))

    @classmethod
    def _variant_members(cls, base: type[nn.Module]) -> dict[str, Any]:
        return {"_variant_kind": cls, "_variant_of": base, "__module__": base.__module__}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_blank, plain_class(type(self)), *reduced[2:])


_variants: dict[tuple[type[Variant], type[nn.Module]], Any] = {}


def _variant(kind: type[Variant], base: type[nn.Module]) -> Any:
    if (kind, base) not in _variants:
        _variants[kind, base] = kind._variant_made(base)
    return _variants[kind, base]


def plain_class(cls: type[nn.Module]) -> tuple[type[nn.Module], list[type[Variant]]]:
    """The class under the variants of ``cls``, and their kinds, the outermost first."""
    kinds = []
    # Not of a class that somebody else put on top of one.
    while "_variant_of" in vars(cls):
        variant: Any = cls
        kinds.append(variant._variant_kind)
        cls = variant._variant_of
    return cls, kinds


def dressed(cls: type[nn.Module], kinds: Sequence[type[Variant]]) -> Any:
    """``cls`` as those variants, the outermost first."""
    for kind in reversed(kinds):
        cls = _variant(kind, cls)
    return cls


def _blank(plain: type[nn.Module], kinds: Sequence[type[Variant]]) -> Any:
    """For copies and pickles, which cannot look up a class that is made."""
    cls = dressed(plain, kinds)
    return cls.__new__(cls)


class _NotABatchNorm(type):
    """Makes a class of norms that are what they were, ``nn.BatchNorm2d`` say, but not torch's ``_BatchNorm``.

    By that name `nn.SyncBatchNorm.convert_sync_batchnorm` finds what it puts another module in the place of, and
    `torch.optim.swa_utils.update_bn` what it restarts. What fuses a norm into a convolution asks for the former.
    """

    def mro(cls) -> list[type]:
        return [base for base in super().mro() if base is not _BatchNorm]


class DenseEncoder(Variant):
    """An nn.TransformerEncoder that makes no nested tensors of padded batches, which no layer of this package takes."""

    _variant_prefix = "Dense"

    @property
    def use_nested_tensor(self) -> bool:
        """torch's switch."""
        return False


def keep_dense(model: nn.Module, change: Change) -> list[str]:
    """nn.TransformerEncoder must not turn padded batches into nested tensors: only its layers' fast path takes them.

    Returns notes for a report.
    """
    dense = 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor and _holds_ours(module):
            change.as_variant(module, DenseEncoder)
            dense += 1
    return [f"{dense} nn.TransformerEncoder no longer use nested tensors"] if dense else []


def release_dense(model: nn.Module, change: Change) -> None:
    """What `keep_dense` changed as it was, where nothing of this package is left in it."""
    for module in model.modules():
        if isinstance(module, DenseEncoder) and not _holds_ours(module):
            change.as_base(module, DenseEncoder)


def _holds_ours(module: nn.Module) -> bool:
    return any(isinstance(inside, KeepsWide) for inside in module.modules())


class FrozenNorm(Variant):
    """A norm that is in eval mode for good."""

    _variant_prefix = "Frozen"

    @classmethod
    def _variant_made(cls, base: type[nn.Module]) -> Any:
        members = cls._variant_members(base)
        # torch.fx goes by the module whether to look into a forward.
        if base.forward is _BatchNorm.forward:
            members["forward"] = base.forward
        return _NotABatchNorm(f"{cls._variant_prefix}{base.__name__}", (cls, base), members)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


# On a norm: it stays as it is also when nothing that was added to the model is left.
_STAYS = "_stays_frozen"


def hold_batchnorms(model: nn.Module, change: Change, train: Iterable[str] = (), stays: bool = False) -> list[str]:
    """Frozen norms with running statistics to eval for good: see `FrozenNorm`; ``stays``: `release_batchnorms` too.

    Norms under ``train``, or with a parameter that trains, are left. Returns notes for a report.
    """
    held = 0
    for path, module in model.named_modules():
        if not isinstance(module, _NormBase) or not module.track_running_stats or under(path, train):
            continue
        if not any(parameter.requires_grad for parameter in module.parameters()):
            change.set(module, "training", False)
            change.as_variant(module, FrozenNorm)
            held += 1
            if stays and _STAYS not in module.__dict__:
                change.add(module, _STAYS, True)
    return [f"{held} frozen BatchNorm stay in eval mode (freeze_batchnorm=False lets them move)"] if held else []


def release_batchnorms(model: nn.Module, change: Change) -> None:
    """What `hold_batchnorms` holds back under ``train()``, unless something of this package is left that needs it."""
    if _holds_ours(model):
        return
    for module in model.modules():
        if isinstance(module, FrozenNorm) and _STAYS not in module.__dict__:
            change.as_base(module, FrozenNorm)
            change.set(module, "training", model.training)
