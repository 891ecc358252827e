"""Launches a kernel: for which GPU, in which configuration, and with what of its tensors."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

from pyfused.kernels import recording
from pyfused.kernels.recording import INTERPRETER, Chosen, Launch, Target

_Config = TypeVar("_Config")

# All that a thread can have, up to 8 warps: the compiler would rather spill a few to fit a second block.
MAX_REGISTERS = 255


def launch(
    kernel, grid: tuple[int, ...], *, num_warps: int, num_stages: int, maxnreg: int | None = None, **arguments
) -> None:
    """``maxnreg``: registers a thread may have; None lets the compiler spill a few of them for another block."""
    if recording.current is not None:
        recording.current[1].append(Launch(kernel, grid, arguments, num_warps, num_stages, maxnreg))
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    if recording.watches.current is not None:
        start = functools.partial(recording.watches.current.launch, kernel, grid, arguments, options)
    else:
        start = functools.partial(kernel[grid], **arguments, **options)
    parts = (value.ptr if isinstance(value, Mat) else value for value in arguments.values())
    with_scratch(next(part.device for part in parts if isinstance(part, torch.Tensor)), start)


def with_scratch(device: torch.device, start: Callable[..., Any], *arguments: Any) -> None:
    """Calls ``start``, a launch, with memory for what the kernel keeps for itself, such as tensor descriptors.

    Triton asks an allocator for it, which belongs to the context of the caller: autograd's threads have none, and a
    user may have one of his own, which stays.
    """
    context = contextvars.copy_context()
    context.run(triton.set_allocator, functools.partial(_scratch, device))
    context.run(start, *arguments)


def _scratch(device: torch.device, size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device=device)


@functools.cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        # torch's type stubs lack it.
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        properties.name,
    )


def target(device: torch.device) -> Target:
    if recording.current is not None:
        return recording.current[0]
    if device.type == "cuda":
        return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)
    return INTERPRETER


def has_wgmma(device: torch.device) -> bool:
    """Whether products are wgmma there, which 9.0 alone has."""
    return target(device).capability[0] == 9


def configuration(
    kernel: Any, function: Callable[..., _Config], device: torch.device, *sizes: object, **settings: Any
) -> _Config:
    """The configuration in which ``kernel`` starts: ``function``'s, unless a row measured on this GPU knows better."""
    chosen = Chosen(kernel.__name__, function, (*sizes, target(device)), tuple(settings.items()))
    if recording.forcing is None:
        return recording.measured_or_own(chosen)
    configs, found = recording.forcing
    found.append(chosen)
    return configs.get(chosen) or chosen.config()


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


class Mat(NamedTuple):
    """A tensor as a kernel takes it: in device code ``x.ptr`` and ``x.strides[i]``."""

    ptr: torch.Tensor
    strides: tuple[int, ...]


def mat(tensor: torch.Tensor | None) -> Mat | None:
    """Strides are zero where there is one element: that stride is never taken, and may be any number."""
    if tensor is None:
        return None
    sizes, strides = tensor.shape, tensor.stride()
    if 1 in sizes:
        strides = tuple([0 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True)])
    return Mat(tensor, strides)


def dropout_arguments(seed: torch.Tensor | None, p: float) -> dict[str, Any]:
    return {"seed_ptr": seed, "inverse_keep": 1.0 / (1.0 - p), "threshold": int(p * 2**32)}


def rows_like(x: torch.Tensor, width: int, channels_first: bool, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised (B, L, width) tensor, laid out in memory as (B, width, L) when ``channels_first``."""
    batch, length, _ = x.shape
    if channels_first:
        return x.new_empty((batch, width, length), dtype=dtype).transpose(1, 2)
    return x.new_empty((batch, length, width), dtype=dtype)


def multiple(number: int) -> int:
    """16 if it divides ``number``, else 1: what a kernel may know of a number that it is not specialised for.

    Triton's own specialisation would also tell 1 from all other numbers.
    """
    return 16 if number % 16 == 0 else 1


def block_width(width: int) -> int:
    """A rank or another narrow width, padded to what a matrix instruction takes: a power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


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
