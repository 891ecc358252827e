"""Changes of a model in place, each with its way back."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterable, Iterator

from torch import nn

from pyfused.surgery.added import added_names
from pyfused.surgery.paths import Place
from pyfused.surgery.variants import Variant, check_own_forward, dressed, plain_class

# On a module: which of its own parameters this package was told to train whole. Copies and pickles carry it.
_TOLD = "_told_to_train"


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

    def keep(self, module: nn.Module) -> None:
        """Let ``module`` get back its attributes, parameters and submodules of now, and which parameters train."""
        held = dict(module.__dict__)
        inside = {name: dict(value) for name, value in held.items() if isinstance(value, dict)}
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        trains = [parameter.requires_grad for parameter in own]

        def restore() -> None:
            module.__dict__.clear()
            module.__dict__.update(held)
            # The same dictionaries: the way back of another change may hold one.
            for name, value in inside.items():
                held[name].clear()
                held[name].update(value)
            for parameter, before in zip(own, trains, strict=True):
                parameter.requires_grad_(before)

        self._undo.callback(restore)

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
            module.__class__ = dressed(type(module), [kind])

    def as_base(self, module: nn.Module, kind: type[Variant]) -> None:
        """Make ``module`` what it was before it became a ``kind``.

        Raises:
            RuntimeError: another class was put on top of it since, or the forward of a ``kind`` was replaced.
        """
        plain, kinds = plain_class(type(module))
        if not any(issubclass(own, kind) for own in kinds):
            raise RuntimeError(
                f"{type(module).__name__}: expected the class that this package made, got one on top of it; undo first "
                "what came later (fully_shard, a parametrization)"
            )
        base = dressed(plain, [other for other in kinds if not issubclass(other, kind)])
        if type(module).forward is not base.forward:
            check_own_forward(module, f"a {base.__name__} in its place")
        self._undo.callback(setattr, module, "__class__", type(module))
        module.__class__ = base

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

    def freeze(self, model: nn.Module) -> None:
        """Nothing in ``model`` trains but what this package set to train."""
        stay = {
            id(module._parameters.get(name))
            for module in model.modules()
            for name in (*added_names(module), *module.__dict__.get(_TOLD, ()))
        }
        self.train((parameter for parameter in model.parameters() if id(parameter) not in stay), False)


def told_to_train(model: nn.Module) -> list[str]:
    """Full names of the parameters that this package was told to train whole; each name of a tied one."""
    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in sorted(module.__dict__.get(_TOLD, ()))
        if module._parameters.get(name) is not None
    ]


_around: contextvars.ContextVar[contextlib.ExitStack | None] = contextvars.ContextVar("_around", default=None)


@contextlib.contextmanager
def all_or_nothing() -> Iterator[Change]:
    """Gives a `Change`; what was done by it is undone where the body raises.

    Inside another one it is undone also where the rest of that one's body raises.
    """
    with contextlib.ExitStack() as undo:
        around, token = _around.get(), _around.set(undo)
        try:
            yield Change(undo)
        finally:
            _around.reset(token)
        done = undo.pop_all()
        if around is not None:
            around.push(done)
