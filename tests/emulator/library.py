"""The CUDA C++ kernels of all operators in one library for the emulator, served as backend "cuda" to CPU tensors."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from emulator.build import ROOT, build

from pyfused import backend

# Capability, multiprocessors, bytes of shared memory that a block can have.
DEFAULT = (90, 4, 232_448)
TORCH = Path(torch.__file__).parent


def sources() -> list[Path]:
    """All of csrc but the Python module; the slowest to compile first."""
    files = (path for suffix in ("cu", "cpp") for path in sorted((ROOT / "csrc").glob(f"*.{suffix}")))
    return [path for path in files if "<Python.h>" not in path.read_text()]


@functools.cache
def load() -> ctypes.CDLL:
    """Build what changed and load it, once a process."""
    link = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}"]
    defines = ["TORCH_TARGET_VERSION=0x020a000000000000"]
    path = build(sources(), "kernels", defines=defines, include=[TORCH / "include"], link=link)
    backend.load_cuda(path)
    return ctypes.CDLL(str(path))


def emulate(device: tuple[int, int, int] = DEFAULT, schedule: int = 0) -> None:
    """Set the emulated device and the seed of the order in which threads run."""
    load().pyfused_emulate(*device, ctypes.c_uint64(schedule))
