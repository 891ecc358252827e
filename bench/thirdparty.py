"""Packages that the benchmarks compare with or take data from, imported when a row needs them."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types


class Unavailable(RuntimeError):
    """A package that a row needs is not there; the message says which and why."""


def load(name: str) -> types.ModuleType:
    """The module ``name``.

    Raises:
        Unavailable: it is not installed, or cannot be imported.
    """
    _make_torchvision_importable()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f'{name} cannot be imported ({error}); pip install "pyfused[bench]" brings it') from error


def _make_torchvision_importable() -> None:
    if "torchvision" in sys.modules:
        return
    with contextlib.suppress(ImportError):
        try:
            import torchvision
        except RuntimeError:
            # A torchvision built for another torch registers shapes for operators that it could not load. open_clip,
            # timm and peft use none of those operators, only transforms.
            sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
            import torchvision  # noqa: F401
