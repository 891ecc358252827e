"""Dotted paths of a model: what a caller names, what stands where."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass

from torch import nn


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


@dataclass
class Place:
    """A module and everywhere it stands in a model: its dotted paths, and (parent, name) for each."""

    module: nn.Module
    paths: list[str]
    spots: list[tuple[nn.Module, str]]


def places(model: nn.Module, whole: Callable[[nn.Module], bool] = lambda module: False) -> list[Place]:
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
