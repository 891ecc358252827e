"""Launch configurations of the bottleneck family: pure functions of shape, dtype and target.

No row has been timed on a GPU yet. Tile shapes come from compiling ahead of time (`pyfused.kernels.audit`: no spills,
shared memory within the limit) and from counting bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyfused.kernels.launch import block_width
from pyfused.kernels.recording import INTERPRETER, LaunchWork, Target, suits_best


@dataclass(frozen=True)
class RowsConfig:
    """Launch configuration of a pass that holds the narrow middle of ``block_m`` rows on chip."""

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


# Padded narrow width -> most rows of a tile, by what multiplies matrices; 16-bit numbers, without dropout and with it
# (drawing a mask takes registers). wgmma reads operands from shared memory; mma.sync passes them through registers.
_MMA_SYNC = {16: 128, 32: 128, 64: 128, 128: 64, 256: 32, 512: 16}
_MMA_SYNC_DROPOUT = {16: 64, 32: 64, 64: 64, 128: 32, 256: 32, 512: 16}
_MOST_ROWS = {
    9: (_MMA_SYNC | {256: 64, 512: 32}, _MMA_SYNC_DROPOUT | {128: 64}),
    10: (_MMA_SYNC | {128: 32}, _MMA_SYNC_DROPOUT),
}
# Exact float32 has no matrix instruction at all.
_MOST_ROWS_FLOAT32 = {16: 32, 32: 32, 64: 32, 128: 32}


def rows_config(
    batch: int,
    length: int,
    channels: int,
    width: int,
    dtype: torch.dtype,
    target: Target,
    *,
    vectorised: bool,
    beside: int,
) -> RowsConfig:
    """Of the tiles that fit on chip the one for which, at sizes like these, the busiest multiprocessor moves the fewest
    bytes.

    ``vectorised``: rows can be loaded 16 bytes at a time; if not, more threads share the addresses. ``beside``: tiles
    as wide as the middle that live beside it, such as a dropout mask.
    """
    if target == INTERPRETER:
        return RowsConfig(32, 32, num_warps=4, num_stages=2)
    padded = block_width(width)
    if dtype == torch.float32:
        most, block_c = _MOST_ROWS_FLOAT32[padded] if vectorised else 16, 16
    else:
        tables = _MOST_ROWS.get(target.capability[0], (_MMA_SYNC, _MMA_SYNC_DROPOUT))
        most = tables[beside > 0][padded]
        # With 32 columns a product beside 256 of the middle is cut into instructions of 16 by wgmma, with 64 of 32.
        widest = 256 if target.capability[0] == 9 else 128
        block_c = 64 if padded <= widest and vectorised and beside < 2 else 16 if padded == 512 and beside else 32
    most = max(16, most >> max(0, beside - 1))

    steps = -(-channels // block_c)

    def config(block_m: int) -> RowsConfig:
        heavy = block_m == 128 or block_m * padded > 4096 or beside or not vectorised or dtype == torch.float32
        # Loads in flight hide memory's latency: as many as there are, or as leave room for a second block.
        stage = block_c * (block_m + padded) * dtype.itemsize
        stages = 1 + (target.shared_memory // 2 - block_c * padded * dtype.itemsize) // stage
        return RowsConfig(block_m, block_c, num_warps=8 if heavy else 4, num_stages=max(2, min(4, stages, steps)))

    def bytes_moved(config: RowsConfig, batch: int, length: int) -> float:
        work = rows_work(config, batch, length, channels, width, dtype)
        return -(-work.programs // target.multiprocessors) * work.nbytes

    configs = [config(rows) for rows in (128, 64, 32, 16) if min(32, most) <= rows <= most]
    return suits_best(configs, bytes_moved, batch, length)


def rows_work(config: RowsConfig, batch: int, length: int, channels: int, width: int, dtype: torch.dtype) -> LaunchWork:
    """Two products with weights that each tile of rows reads whole, and three rows read or written once."""
    rows = config.block_m
    tile = (3 * rows + 2 * width) * channels * dtype.itemsize
    return LaunchWork(batch * -(-length // rows), 4 * rows * channels * block_width(width), tile)


def weights_config(
    batch: int,
    length: int,
    channels: int,
    width: int,
    dtype: torch.dtype,
    target: Target,
    *,
    vectorised: bool,
    beside: int,
    groups: int = 1,
) -> WeightsConfig:
    """Two (C, h) sums at once; as many splits as give every multiprocessor two programs.

    ``beside`` as in `rows_config`. ``groups``: of images, each with sums of its own; 1 (the default) or ``batch``.
    """
    if target == INTERPRETER:
        return WeightsConfig(32, 32, 32, 3, num_warps=4, num_stages=2)
    block_m, block_c, block_h, warps = 64, 64, 64, 8 if beside else 4
    if dtype == torch.float32:
        block_m, block_c, block_h, warps = (32, 32, 32, 8) if beside < 2 else (32, 16, 16, 8)
    elif not vectorised:
        block_m, block_h, warps = 32, 32, 8
    elif target.capability[0] not in _MOST_ROWS:
        block_m, block_c, warps = 32, 64 if beside < 2 else 32, 8
    block_h = min(block_h, block_width(width))
    tiles = groups * -(-channels // block_c) * -(-width // block_h)
    splits = max(1, min(batch // groups * -(-length // block_m), -(-2 * target.multiprocessors // tiles)))
    return WeightsConfig(block_m, block_c, block_h, splits, warps, num_stages=2)


def weights_work(
    config: WeightsConfig, batch: int, length: int, channels: int, width: int, dtype: torch.dtype, groups: int
) -> LaunchWork:
    """Two sums over rows of products of a tile of channels and a tile of the narrow width."""
    tiles = groups * -(-channels // config.block_c) * -(-width // config.block_h)
    rows = batch // groups * length / config.splits
    nbytes = 2 * rows * (config.block_c + config.block_h) * dtype.itemsize
    return LaunchWork(tiles * config.splits, 4 * rows * config.block_c * config.block_h, nbytes)
