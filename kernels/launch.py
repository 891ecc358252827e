"""Launches a kernel, or records the launch for the audit, which compiles it for a GPU that is not there."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton.language as tl

from pyfused.choice import measured

_Config = TypeVar("_Config")

# Largest shared memory of one block in bytes, by compute capability (CUDA C++ Programming Guide, table of technical
# specifications per compute capability: the opt-in maximum per block).
SHARED_MEMORY = {(8, 0): 166_912, (8, 6): 101_376, (8, 9): 101_376, (9, 0): 232_448, (10, 0): 232_448, (12, 0): 101_376}


# All that a thread can have, up to 8 warps: the compiler would rather spill a few to fit a second block.
MAX_REGISTERS = 255


@dataclass(frozen=True)
class Target:
    """The GPU that a launch configuration is chosen for, with the name that rows measured on it carry.

    ``INTERPRETER`` stands for Triton's interpreter.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    name: str = ""


INTERPRETER = Target((0, 0), 4, 1 << 30)


@dataclass(frozen=True)
class LaunchWork:
    """What a launch does at least: its programs, and of each the FLOPs and the bytes to and from the L2 cache."""

    programs: int
    flops: float
    nbytes: float


@dataclass(frozen=True)
class Chosen:
    """A launch configuration as it was chosen: of which kernel, by which function, from which arguments."""

    kernel: str
    function: Callable[..., object]
    sizes: tuple[object, ...]
    settings: tuple[tuple[str, object], ...]

    @property
    def arguments(self) -> dict[str, object]:
        bound = inspect.signature(self.function).bind(*self.sizes, **dict(self.settings))
        bound.apply_defaults()
        return bound.arguments

    def config(self) -> object:
        """What the function returns."""
        return self.function(*self.sizes, **dict(self.settings))


@dataclass(frozen=True)
class Launch:
    """One recorded launch: ``kernel[grid](**arguments, num_warps=..., num_stages=...)``."""

    kernel: object
    grid: tuple[int, ...]
    arguments: dict[str, object]
    num_warps: int
    num_stages: int
    maxnreg: int | None


_recording: tuple[Target, list[Launch]] | None = None


@functools.cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        properties.name,
    )


def target(device: torch.device) -> Target:
    if _recording is not None:
        return _recording[0]
    if device.type == "cuda":
        return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)
    return INTERPRETER


def configuration(kernel: object, function: Callable[..., _Config], *sizes: object, **settings: object) -> _Config:
    """The configuration in which ``kernel`` starts: ``function``'s, unless a row measured on this GPU knows better."""
    chosen = Chosen(kernel.__name__, function, sizes, tuple(settings.items()))
    if _forced is None:
        return _measured_or_own(chosen)
    configs, found = _forced
    found.append(chosen)
    return configs.get(chosen) or chosen.config()


@functools.lru_cache(4096)
def _measured_or_own(chosen: Chosen) -> object:
    own = chosen.config()
    if not measured.TABLE.rows:
        return own
    gpu, dtype, rows, others = measured_for(chosen.arguments)
    row = measured.TABLE.nearest(gpu, chosen.kernel, dtype, rows, others)
    return own if row is None else dataclasses.replace(own, **row.found)


def forget() -> None:
    """To be called after `measured.TABLE` has changed."""
    _measured_or_own.cache_clear()


def measured_for(arguments: Mapping[str, object]) -> tuple[str, str, int, dict[str, object]]:
    """(GPU, dtype, M, all other sizes) by which a row of a configuration is found."""
    others = dict(arguments)
    where, dtype = others.pop("target"), str(others.pop("dtype")).removeprefix("torch.")
    batch, length = others.pop("batch"), others.pop("length")
    # Images have a size of their own; a matrix has rows.
    return where.name, dtype, batch * length, others | ({"length": length} if batch > 1 else {})


_forced: tuple[Mapping[Chosen, object], list[Chosen]] | None = None


@contextlib.contextmanager
def forced(configs: Mapping[Chosen, object]) -> Iterator[list[Chosen]]:
    """Inside, kernels start in these configurations, all others in their functions' own; collects what was chosen.

    One thread at a time: a tool for tuning, not for programs that train.
    """
    global _forced
    if _forced is not None:
        raise RuntimeError("forced() does not nest")
    found: list[Chosen] = []
    _forced = configs, found
    try:
        yield found
    finally:
        _forced = None


@contextlib.contextmanager
def record(for_target: Target) -> Iterator[list[Launch]]:
    """Collect the launches made inside, on meta tensors, instead of running them; configurations are ``for_target``'s.

    One thread at a time: a tool for the audit, not for programs that train.
    """
    global _recording
    if _recording is not None:
        raise RuntimeError("record() does not nest")
    launches: list[Launch] = []
    _recording = for_target, launches
    try:
        yield launches
    finally:
        _recording = None


def launch(
    kernel, grid: tuple[int, ...], *, num_warps: int, num_stages: int, maxnreg: int | None = None, **arguments
) -> None:
    """``maxnreg``: registers a thread may have; None lets the compiler spill a few of them for another block."""
    if _recording is not None:
        _recording[1].append(Launch(kernel, grid, arguments, num_warps, num_stages, maxnreg))
    else:
        kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg)


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Kernels start on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: for float32, torch's own setting for matrix products."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def offset_type(*tensors: torch.Tensor | None) -> tl.dtype:
    """The integer that holds every offset inside these tensors: 64 bits cost registers, so only where needed."""
    for tensor in tensors:
        if tensor is None:
            continue
        if sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) >= 2**31:
            return tl.int64
    return tl.int32


def strides(name: str, dimensions: str, tensor: torch.Tensor | None) -> dict[str, int]:
    """``strides("x", "blk", x)`` -> {"stride_xb": ..., "stride_xl": ..., "stride_xk": ...}; zeros for None.

    Zero too where there is one element: that stride is never taken, and may be any number.
    """
    if tensor is None:
        return {f"stride_{name}{letter}": 0 for letter in dimensions}
    values = zip(dimensions, tensor.shape, tensor.stride(), strict=True)
    return {f"stride_{name}{letter}": 0 if size == 1 else stride for letter, size, stride in values}


def dropout_arguments(seed: torch.Tensor | None, p: float) -> dict[str, object]:
    return {"seed_ptr": seed, "inverse_keep": 1.0 / (1.0 - p), "threshold": int(p * 2**32)}


def rows_like(x: torch.Tensor, width: int, channels_first: bool, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised (B, L, width) tensor, laid out in memory as (B, width, L) when ``channels_first``."""
    batch, length, _ = x.shape
    if channels_first:
        return x.new_empty((batch, width, length), dtype=dtype).transpose(1, 2)
    return x.new_empty((batch, length, width), dtype=dtype)


def like_sizes(batch: int, length: int) -> list[tuple[int, int]]:
    """(B, L) of the sizes that share a configuration with this one: some between two powers of two.

    Of a matrix by its rows, of images by their number: these change with the batch, and every other configuration of a
    kernel is one more to compile.
    """
    number = length if batch == 1 else batch
    top = 1 << max(0, number - 1).bit_length()
    found = sorted({top // 2 + -(-top * part // 16) for part in range(1, 9)})
    return [(1, each) if batch == 1 else (each, length) for each in found]


def suits_best(
    configs: Sequence[_Config], cost: Callable[[_Config, int, int], float], batch: int, length: int
) -> _Config:
    """The one whose cost(config, B, L) over the least of any is lowest, in the mean of `like_sizes`."""
    sizes = like_sizes(batch, length)
    least = [min(cost(config, *size) for config in configs) for size in sizes]
    return min(configs, key=lambda config: sum(cost(config, *s) / best for s, best in zip(sizes, least, strict=True)))


def multiple(number: int) -> int:
    """16 if it divides ``number``, else 1: what a kernel may know of a number that it is not specialised for.

    Triton's own specialisation would also tell 1 from all other numbers.
    """
    return 16 if number % 16 == 0 else 1


def row_length(length: int, *rows: torch.Tensor | None) -> dict[str, int]:
    """The arguments of a kernel that say how many positions an image of ``rows``, (B, L, ...) each, has.

    Whether 16 divides it matters only where positions lie side by side in memory.
    """
    side_by_side = any(tensor is not None and tensor.stride(1) == 1 for tensor in rows)
    return {"length": length, "LENGTH_MULTIPLE_OF": multiple(length) if side_by_side else 1}


def vectorised(*tensors: torch.Tensor | None) -> bool:
    """Whether Triton can load these by vectors: it takes a stride for aligned when it is a multiple of 16 elements."""

    def one(x: torch.Tensor) -> bool:
        taken = [(size, stride) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
        dense = any(size >= 16 and stride == 1 for size, stride in taken)
        return dense and all(stride == 1 or stride % 16 == 0 for _, stride in taken)

    return all(one(tensor) for tensor in tensors if tensor is not None)
