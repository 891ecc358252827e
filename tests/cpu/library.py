"""`pyfused._cpu` built otherwise than an installation has it: by setup.py, in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

import setuptools
from tree import ROOT


def build(folder: Path, sets: Mapping[str, Sequence[str]] | None = None, more: Sequence[str] = ()) -> Path:
    """The library, in ``folder`` with its objects.

    ``sets``: instruction set -> the compiler's options; None (the default) for those that an installation has, and
    what is not named here gets those of "baseline". ``more``: options of every compilation and of the link.

    Raises:
        setuptools.errors.CompileError: a compiler failed.
    """
    with mock.patch.object(setuptools, "setup"), mock.patch.dict(os.environ, PYFUSED_CUDA="0", PYFUSED_CPU=""):
        made_by = runpy.run_path(str(ROOT / "setup.py"))

    class Toolchain(made_by["Cpu"]):
        objects = folder

        @property
        def options(self):
            return [*super().options, *more]

        @property
        def sets(self):
            if sets is None:
                return super().sets
            return {name: list(sets.get(name, sets["baseline"])) for name in super().sets}

        def rules(self):
            rules = super().rules()
            return rules | {"link": [*rules["link"], *more]}

    with _in(ROOT):
        made_by["build"](Toolchain.find(), Toolchain.sources(), folder / "pyfused" / "_cpu.so")
    return folder / "pyfused" / "_cpu.so"


def installed(folder: Path) -> None:
    """``folder``, where `build` has made a library, as a place to import pyfused from: all else is the checkout's."""
    for path in (ROOT / "pyfused").iterdir():
        link = folder / "pyfused" / path.name
        if not path.name.startswith("_cpu.") and not link.is_symlink():
            link.symlink_to(path)


@contextlib.contextmanager
def _in(folder: Path):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
