"""Modules that become another kind of module: a class on top of their own, or one module in another's place."""

from __future__ import annotations

import copy
import types
from collections.abc import Sequence
from typing import Any

from torch import nn


class Variant(nn.Module):
    """A module whose class was replaced by a subclass of it: behaviour that no copy, pickle or converter loses.

    Attributes:
        _variant_of: what it was. _variant_kind: as what it was made. _variant_prefix: of the name of its class.
        _variant_whole: whether it stands for the modules inside it, whose hooks it must heed: a watcher hooks it alone.

    All its names begin so, for that it may stand on any class: one of that class's members would be out of sight.
    """

    _variant_of: type[nn.Module]
    _variant_prefix = "Variant"
    _variant_kind: type[Variant]
    _variant_whole = False

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


def check_own_forward(module: nn.Module, doing: str) -> None:
    """Refuse a module whose forward was replaced: the new one may call that of the module, or class, as it was.

    Raises:
        RuntimeError: it says what needs the module's own forward: ``doing``.
    """
    if "forward" in module.__dict__:
        hooked = "; accelerate.hooks.remove_hook_from_module takes accelerate's out"
        raise RuntimeError(
            f"{type(module).__name__}: {doing} needs the module's own forward, got one that replaces it; "
            f"take it out first{hooked * ('_hf_hook' in module.__dict__)}"
        )


def take_over(module: nn.Module, base: nn.Module) -> None:
    """Give a new ``module`` what ``base`` has: dictionaries and sets of its own, and what they hold shared.

    What is bound to ``base`` is bound to ``module``: its own methods kept as attributes, and hooks of its state dict.

    Raises:
        RuntimeError: the forward of ``base`` was replaced.
        ValueError: ``base`` was compiled by its own ``compile()``, which would go on running it.
    """
    check_own_forward(base, f"a {type(module).__name__} in its place")
    if getattr(base, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"{type(module).__name__}: expected a {type(base).__name__} that is not compiled, got one that its "
            "compile() goes on running; change the model first, and compile it afterwards"
        )
    for name, value in base.__dict__.items():
        if isinstance(value, dict | set):
            value = copy.copy(value)
        elif isinstance(value, types.MethodType) and value.__self__ is base:
            value = types.MethodType(value.__func__, module)
        module.__dict__[name] = value
    hooks: dict[int, Any] = module._load_state_dict_pre_hooks
    for key, hook in hooks.items():
        # torch's wrapper of a hook that gets the module holds it weakly: the base's would die with it.
        if getattr(hook, "with_module", False):
            hooks[key] = type(hook)(hook.hook, module)
