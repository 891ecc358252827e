"""Launch configurations of the bottleneck family: pure functions of shape, dtype and target.

No row has been timed on a GPU yet. Tile shapes come from compiling ahead of time (`pyfused.kernels.audit`: no spills,
shared memory within the limit) and from counting waves and bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyfused.kernels.launch import INTERPRETER, Target


@dataclass(frozen=True)
class RowsConfig:
    """Launch configuration of a pass that holds the narrow middle of ``block_m`` rows."""

    block_m: int
    block_c: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class WeightsConfig:
    """Launch configuration of the sums over rows; ``splits`` cuts the rows."""

    block_m: int
    block_c: int
    block_h: int
    splits: int
    num_warps: int
    num_stages: int


def block_width(width: int) -> int:
    """The narrow width padded to what a matrix instruction takes: a power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def rows_config(
    batch: int, length: int, channels: int, width: int, dtype: torch.dtype, target: Target, *, weight_bytes: int
) -> RowsConfig:
    """The tile whose waves over the multiprocessors move the fewest bytes."""
    if target == INTERPRETER:
        return RowsConfig(32, 32, num_warps=4, num_stages=2)
    padded = block_width(width)
    return RowsConfig(64, 64, num_warps=4 if padded <= 128 else 8, num_stages=2)


def weights_config(
    batch: int, length: int, channels: int, width: int, dtype: torch.dtype, target: Target
) -> WeightsConfig:
    if target == INTERPRETER:
        return WeightsConfig(32, 32, 32, 3, num_warps=4, num_stages=2)
    padded = block_width(width)
    block_h = min(padded, 64)
    block_c = 64
    tiles = -(-channels // block_c) * -(-width // block_h)
    splits = max(1, min(batch * -(-length // 64), -(-2 * target.multiprocessors // tiles)))
    return WeightsConfig(64, block_c, block_h, splits, num_warps=4, num_stages=2)
