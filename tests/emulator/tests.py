"""The kernels that the emulator is tested with, in one Python module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from emulator.build import HERE, ROOT, build, load
from torch import Tensor


def module(
    name: str = "tests", *, adapter: Path = HERE / "adapter.cu", emulator_defines: Sequence[str] = ()
) -> ModuleType:
    """Build what changed and import it; ``adapter`` is the source of the kernel of that name."""
    own = (HERE / source for source in ("tests.cpp", "probes.cu", "gemm.cu", "philox.cu"))
    sources = [*own, adapter, ROOT / "csrc" / "launch.cu"]
    return load(build(sources, name, emulator_defines=emulator_defines))


def bits(tensor: Tensor) -> np.ndarray:
    """The same memory as an array; of 16-bit numbers their bits, since NumPy has no bfloat16."""
    return (tensor.view(torch.uint16) if tensor.element_size() == 2 else tensor).numpy()
