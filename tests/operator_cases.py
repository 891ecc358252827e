"""What the tests of every operator share: backends and plans, layouts, and ways to run a call and to look into it."""

from __future__ import annotations

import itertools
import mmap
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence

import pytest
import torch
from oracle import Tensors, cotangent, randn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyfused
from pyfused.choice import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def skips(backend: str) -> list[pytest.MarkDecorator]:
    # conftest.py loads the kernels of "cuda" when a test wants them.
    reason = None if backend == "cuda" else pyfused.available_backends()[backend]
    if backend == "cpu" and DEVICE != "cpu":
        reason = f"tensors are on {DEVICE}"
    skipped = [] if reason is None else [pytest.mark.skip(reason=f"{backend}: {reason}")]
    # A GPU has no part in it.
    return [pytest.mark.host, *skipped] if backend == "cpu" else skipped


# Those that take every shape at no cost; the others are interpreted or emulated where no GPU is.
FAST = ("portable", "cpu")
# The operators that backend "cpu" has kernels for.
ON_A_CPU = ("adapter_residual",)


def serving(operator: str) -> list[str]:
    """The backends that have kernels for an operator, or may have in time."""
    return [name for name in backends.BACKENDS if name != "cpu" or operator in ON_A_CPU]


def every_backend_of(operator: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "backend", [pytest.param(name, marks=skips(name), id=name) for name in serving(operator)]
    )


# Of operators that a CPU has no kernels of its own for.
every_backend = every_backend_of("")
# Tests of the CUDA C++ kernels alone.
cuda_backend = pytest.mark.parametrize("backend", ["cuda"])


def plain_dtype(backend: str, dtype: torch.dtype = torch.float32) -> torch.dtype:
    """``dtype``, but float16 for a float32 that the backend does not take."""
    return torch.float16 if backend == "cuda" and dtype == torch.float32 else dtype


def planned(plans: Mapping[str, Sequence[str]]) -> pytest.MarkDecorator:
    """Every plan of every backend in turn, from backend -> its plans."""
    cases = [
        pytest.param(backend, plan, marks=skips(backend), id=f"{backend}-{plan}")
        for backend, names in plans.items()
        for plan in names
    ]
    return pytest.mark.parametrize(("backend", "plan"), cases)


def rotated(plans: Mapping[str, Sequence[str]], **axes: Sequence) -> pytest.MarkDecorator:
    """Every plan of every backend with values of the axes: all products on backends that are fast anywhere; on the
    others, which an interpreter or the emulator serves, as few as hold every value of each axis."""
    cases = []
    for backend, names in plans.items():
        for shift, plan in enumerate(names):
            products = list(itertools.product(*axes.values()))
            if backend not in FAST:
                count = max(map(len, axes.values()))
                products = [tuple(axis[(i + shift) % len(axis)] for axis in axes.values()) for i in range(count)]
            for values in products:
                name = "-".join((backend, plan, *map(str, values)))
                cases.append(pytest.param(backend, plan, *values, marks=skips(backend), id=name))
    return pytest.mark.parametrize(("backend", "plan", *axes), cases)


def seed(value: int = 0x1234_5678_9ABC) -> Tensor:
    return torch.tensor([value], device=DEVICE)


class RawCalls(TorchDispatchMode):
    """Records the calls of raw operators: (direction, arguments by name), and in ``raw`` (operator, the same)."""

    def __init__(self) -> None:
        super().__init__()
        self.raw: list[tuple[torch._ops.OpOverload, dict]] = []

    @property
    def calls(self) -> list[tuple[str, dict]]:
        return [(op._schema.name.rpartition("_")[2], arguments) for op, arguments in self.raw]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("pyfused_"):
            names = [argument.name for argument in func._schema.arguments]
            self.raw.append((func, dict(zip(names, args, strict=True))))
        return func(*args, **(kwargs or {}))


def leaves_of(tensors: Tensors, requiring: Collection[str] | None = None) -> dict[str, Tensor | None]:
    """Leaves with the tensors' values; those that ``requiring`` names, by default all, require grad."""
    return {
        name: None if value is None else value.detach().requires_grad_(requiring is None or name in requiring)
        for name, value in tensors.items()
    }


def run(function: Callable, tensors: Tensors, **options) -> tuple[Tensor, ...]:
    """Output and gradients of all tensors."""
    leaves = leaves_of(tensors)
    y = function(**leaves, **options)
    y.backward(cotangent(y))
    return y.detach(), *(leaf.grad for leaf in leaves.values() if leaf is not None)


def autocast(function: Callable, dtype: torch.dtype) -> Callable:
    def call(**arguments):
        with torch.autocast(DEVICE, dtype):
            return function(**arguments)

    return call


def fresh_compiler(name: str) -> str:
    """``name``, with nothing compiled yet; skips where it cannot compile."""
    if name == "inductor" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    return name


IMAGE = (2, 20, 5, 7)
# Each with 20 channels: the last dimension, or the second of an image.
LAYOUTS = {
    "1-D": lambda: randn(20),
    "3-D": lambda: randn(2, 5, 20),
    "4-D": lambda: randn(2, 3, 4, 20),
    "empty batch": lambda: randn(0, 3, 20),
    "empty length": lambda: randn(3, 0, 20),
    "[L, B, D] permuted to [B, L, D]": lambda: randn(5, 3, 20).transpose(0, 1),
    "4-D permuted": lambda: randn(4, 3, 20, 2).permute(3, 1, 0, 2),
    "expanded rows": lambda: randn(20).expand(2, 9, 20),
    "expanded batch": lambda: randn(1, 9, 20).expand(3, 9, 20),
    "expanded columns": lambda: randn(9, 1).expand(9, 20),
    "every other column": lambda: randn(9, 40)[:, ::2],
    "columns first": lambda: randn(20, 9).t(),
    "slice with an offset": lambda: randn(4, 7, 23)[1:, 2:, 3:],
}
IMAGES = {
    "NCHW": lambda: randn(*IMAGE),
    "channels_last": lambda: randn(*IMAGE).to(memory_format=torch.channels_last),
    "one position": lambda: randn(5, 20, 1, 1),
    "NCL": lambda: randn(2, 20, 9),
    "NCDHW": lambda: randn(2, 20, 2, 3, 2),
    "empty NCHW": lambda: randn(0, 20, 3, 4),
    "empty channels_last": lambda: randn(0, 20, 3, 4).to(memory_format=torch.channels_last),
    "crop": lambda: randn(2, 23, 6, 9)[:, 3:, 1:, 2:],
    "crop of channels_last": lambda: randn(2, 23, 6, 9).to(memory_format=torch.channels_last)[:, 3:, 1:, 2:],
    "expanded batch": lambda: randn(1, 20, 3, 4).expand(2, 20, 3, 4),
}


def assert_format_kept(x: Tensor, y: Tensor) -> None:
    """y lies in memory as images x do, where those are dense and have elements."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if x.dim() == 4 and x.numel() > 0 and x.is_contiguous(memory_format=memory_format):
            assert y.is_contiguous(memory_format=memory_format)


COTANGENTS = {
    "transposed": lambda y: randn(*y.shape[::-1], dtype=y.dtype, device=y.device).permute(*range(y.dim())[::-1]),
    "expanded": lambda y: randn(1, dtype=y.dtype, device=y.device).expand(y.shape),
    "sliced": lambda y: randn(*y.shape[:-1], 2 * y.shape[-1], dtype=y.dtype, device=y.device)[..., ::2],
    "channels_last": lambda y: randn(*y.shape, dtype=y.dtype, device=y.device).to(memory_format=torch.channels_last),
}


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in ``dtype`` on `DEVICE` with its strides: an elementwise cast would lose those of an expanded tensor."""
    stored = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0).to(dtype).to(DEVICE)
    return stored.as_strided(x.shape, x.stride(), x.storage_offset())


def far_apart(x: Tensor, strides: Sequence[int]) -> Tensor:
    """x in memory of which only the pages that are touched exist: its elements may lie over 2**31 apart."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    file = os.memfd_create("far apart")
    try:
        os.truncate(file, (last + 1) * x.itemsize)
        memory = mmap.mmap(file, 0)
    finally:
        os.close(file)
    return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


def strided(
    shape: Sequence[int], order: Sequence[int], steps: Sequence[int], expanded: int | None, dtype: torch.dtype
) -> Tensor:
    """Numbers of ``shape`` whose memory runs in ``order``, with ``steps`` between elements, one dimension repeated."""
    stored = [1 if i == expanded else size * step for i, (size, step) in enumerate(zip(shape, steps, strict=True))]
    x = randn(*(stored[i] for i in order), dtype=dtype, device=DEVICE)
    x = x.permute([order.index(i) for i in range(len(shape))])
    return x[tuple(slice(None, None, step) for step in steps)].expand(shape)
