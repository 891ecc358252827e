"""Tensors as the raw operators see them: (B, L, C) with any strides; row m of the mathematics is b * L + l."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def as_rows(channel_dim: int, *tensors: Tensor) -> tuple[list[Tensor], list[bool]]:
    """Tensors of one shape as (B, L, C), views where strides allow it, and whether each one's memory runs (B, C, L).

    All leading dimensions become L, and B is 1, where the strides of every tensor allow that.
    """
    if channel_dim == -1 and all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.reshape(1, -1, tensor.shape[-1]) for tensor in tensors], [False] * len(tensors)
    channels_first = [channel_dim == 1 and not runs_by_rows(tensor) for tensor in tensors]
    rows = [tensor if channel_dim == -1 else tensor.movedim(1, -1) for tensor in tensors]
    if not any(channels_first):
        merged = [tensor for tensor in map(_merged, rows) if tensor is not None]
        if len(merged) == len(rows):
            return merged, channels_first
    return [tensor.flatten(1, -2) for tensor in rows], channels_first


def to_rows(*tensors: Tensor) -> list[Tensor]:
    """Tensors (..., C), of one leading shape, as (1, M, C), or as (B, L, C) where strides do not allow that."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [x if x.dim() == 3 and x.shape[0] == 1 else x.view(1, -1, x.shape[-1]) for x in tensors]
    return as_rows(-1, *tensors)[0]


def from_rows(y: Tensor, x: Tensor) -> Tensor:
    """y, rows of x, in x's leading shape, and for autograd no view: it may be changed in place."""
    shape = (*x.shape[:-1], y.shape[-1])
    return y if y.shape == shape else torch.ops.aten._unsafe_view(y, shape)


def rows_as(shape: Sequence[int], *tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors (..., C) as (B, L, C), where ``shape`` is (B, L)."""
    return [None if tensor is None else tensor.reshape(*shape, tensor.shape[-1]) for tensor in tensors]


def vector(gate: Tensor | None) -> Tensor | None:
    """A gate of one number, or of one for each channel, with one dimension."""
    return gate if gate is None or gate.dim() == 1 else gate.reshape(-1)


def as_channels(y: Tensor, x: Tensor, channels_first: bool) -> Tensor:
    """(B, L, N) -> x's shape (B, ...) with N channels in dimension 1, a view of y."""
    if channels_first:
        return y.transpose(1, 2).reshape(x.shape[0], y.shape[-1], *x.shape[2:])
    return y.reshape(x.shape[0], *x.shape[2:], y.shape[-1]).movedim(-1, 1)


def rows_like(x: Tensor, width: int, channels_first: bool, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (B, L, width) tensor, laid out in memory as (B, width, L) when ``channels_first``."""
    batch, length, _ = x.shape
    if channels_first:
        return x.new_empty((batch, width, length), dtype=dtype).transpose(1, 2)
    return x.new_empty((batch, length, width), dtype=dtype)


def runs_by_rows(x: Tensor) -> bool:
    """Whether the channels (B, C, ...) of a position lie together: channels_last, and images of one position."""
    if all(size == 1 for size in x.shape[2:]):
        return True
    # Both formats describe the same memory when C is 1: then the default one is meant.
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _merged(x: Tensor) -> Tensor | None:
    """(..., C) as (1, M, C) without a copy; None where strides forbid it."""
    if x.dim() <= 2 or x.is_contiguous():
        return x.reshape(1, -1, x.shape[-1])
    x = x.flatten(1, -2)
    if x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1):
        return None
    return x.reshape(1, -1, x.shape[-1])
