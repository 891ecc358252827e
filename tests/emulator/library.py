"""The CUDA C++ kernels of all operators in one library for the emulator, served as backend "cuda" to CPU tensors."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

import torch
from emulator import build
from emulator.build import HERE, ROOT

from pyfused.choice import backends

TORCH = Path(torch.__file__).parent


def sources() -> list[Path]:
    """All of csrc but the Python module; the slowest to compile first."""
    files = (path for suffix in ("cu", "cpp") for path in sorted((ROOT / "csrc").glob(f"*.{suffix}")))
    return [path for path in files if "<Python.h>" not in path.read_text()]


@functools.cache
def load() -> ModuleType:
    """Build what changed and load it, once a process."""
    link = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}"]
    defines = ["TORCH_TARGET_VERSION=0x020a000000000000"]
    own = HERE / "library.cpp"
    path = build.build([*sources(), own], "kernels", defines=defines, include=[TORCH / "include"], link=link)
    backends.load_cuda(path)
    return build.load(path)


def emulate(device: tuple[int, ...] = (), schedule: int = 0) -> None:
    """Set the emulated device (capability, multiprocessors, bytes of shared memory that one block can have) and the
    seed of the order in which threads run."""
    load().emulate(*device, seed=schedule)
