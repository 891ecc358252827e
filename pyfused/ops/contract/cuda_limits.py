"""What the CUDA C++ kernels take: how many rows, and what a block of the bottleneck family needs of a GPU."""

from __future__ import annotations

import functools

import torch

from pyfused.choice import backends

# Rows are counted in 32 bits.
MAX_ROWS = 2**31 - 1


def cuda_row_limit(operator: str, rows: int) -> dict[str, str]:
    """{"cuda": why it does not take so many rows}, empty where it does."""
    if rows <= MAX_ROWS:
        return {}
    return {"cuda": f"{operator}: it takes at most {MAX_ROWS} rows there, got {rows}"}


def cuda_shared_memory(narrow: int, channels: int, *, rows: int, float_middle: bool = False) -> int:
    """Bytes of shared memory that a block needs at least, with ``rows`` of C there and two tiles of the weights.

    As `Bottleneck::shared_bytes` of csrc/bottleneck.cuh has it.

    Args:
        narrow: the middle's width, up to 256.
        rows: 16, 32 or 64.
        float_middle: the middle is kept in float32, not in 16 bits.
    """
    padded = next(width for width in (64, 128, 256) if narrow <= width)
    chunk, warps = (64, 1) if padded == 64 else (32, 2)

    def pitch(columns: int) -> int:
        return ((columns + 7) // 8 | 1) * 8

    wide = -(-channels // chunk) * chunk
    slot = max(padded * pitch(chunk), chunk * pitch(padded))
    numbers = rows * warps * (chunk // warps + 8) + rows + 32 + padded + 2 * wide
    return 2 * (rows * (pitch(wide) + pitch(padded * (1 + float_middle))) + 2 * slot) + 4 * numbers


def cuda_rows(narrow: int, channels: int, device: torch.device, *, rows: tuple[int, ...], float_middle: bool) -> int:
    """Of these numbers of rows the first with which a block fits into the shared memory of ``device``, else 0."""
    there = backends.shared_memory(device)
    needed = functools.partial(cuda_shared_memory, narrow, channels, float_middle=float_middle)
    return next((count for count in rows if needed(rows=count) <= there), 0)
