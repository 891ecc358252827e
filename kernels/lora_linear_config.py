"""Launch configurations of ``lora_linear``: pure functions of shape, dtype and target.

No row has been timed on a GPU yet. Tile shapes come from compiling ahead of time (`pyfused.kernels.audit`: no spills,
shared memory within the limit) and from counting waves and bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from pyfused.kernels.launch import block_width
from pyfused.kernels.recording import INTERPRETER, LaunchWork, Target, suits_best


@dataclass(frozen=True)
class GemmConfig:
    """Launch configuration of the base GEMM with its rank-r term."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8


@dataclass(frozen=True)
class PassConfig:
    """Launch configuration of a pass over one tall matrix; ``splits`` cuts the dimension that is summed over."""

    block_m: int
    block_c: int
    splits: int
    num_warps: int
    num_stages: int


# Columns of P that the epilogue takes at a time when P comes from memory.
EXPAND_BLOCK_R = 32


@triton.constexpr_function
def rank_divisor(width):
    """What divides the rank of every launch, for loads by vectors; ``width`` is the rank, or the width of its blocks.

    With 4 at rank 64 sums over rows spill on 10.0.
    """
    return 4 if width <= 16 else 8


_GEMM_TILES_WGMMA = (
    GemmConfig(128, 256, 64, num_warps=8, num_stages=3),
    GemmConfig(128, 128, 64, num_warps=8, num_stages=3),
    GemmConfig(64, 128, 64, num_warps=4, num_stages=3),
    GemmConfig(64, 64, 64, num_warps=4, num_stages=3),
)
_GEMM_TILES_TCGEN05 = (
    GemmConfig(128, 128, 64, num_warps=8, num_stages=3),
    GemmConfig(64, 128, 64, num_warps=8, num_stages=3),
)
_GEMM_TILES_MMA_SYNC = (
    GemmConfig(128, 128, 32, num_warps=8, num_stages=4),
    GemmConfig(64, 128, 32, num_warps=8, num_stages=4),
    GemmConfig(64, 64, 32, num_warps=8, num_stages=4),
)
# Exact float32 has no matrix instruction at all.
_GEMM_TILES_FLOAT32 = (GemmConfig(64, 64, 16, num_warps=4, num_stages=2),)
# Major compute capability -> tiles of the kernel that has tensor descriptors, with the most stages that each may have.
# On 12.0 Triton 3.6 spills in its loop.
TMA_TILES = {
    9: (
        GemmConfig(128, 256, 64, num_warps=8, num_stages=3),
        GemmConfig(128, 128, 64, num_warps=8, num_stages=4),
        GemmConfig(64, 128, 64, num_warps=4, num_stages=4),
    ),
    10: (GemmConfig(128, 128, 64, num_warps=8, num_stages=3),),
}
# Major compute capability -> tiles, and how many registers a thread may give to accumulators and the like. wgmma and
# tcgen05 read operands from shared memory; mma.sync, everywhere else, passes them through registers too.
_GEMM_TILES = {9: (_GEMM_TILES_WGMMA, 168), 10: (_GEMM_TILES_TCGEN05, 168)}


# Multiply-adds of a multiprocessor in a cycle, in 16 bits, by compute capability (data sheets); of all others the last.
PRODUCTS = {(8, 0): 1024, (9, 0): 2048, (10, 0): 4096}
_FEWEST_PRODUCTS = 512
# Bytes that the second-level cache gives a multiprocessor in a cycle: an H100's 5120 by its 132 multiprocessors, and
# more by as much as the clock is lower in long products. Cycles of a tile beside its loop over K, of loads by pointers
# and by descriptors: a model, fitted to public times of such GEMMs at K from 512 to 4096.
_CACHE_BYTES, _BESIDE_LOOP, _BESIDE_TMA = 44, 4000, 2300


def tile_cost(
    tiles: int, multiprocessors: int, k: int, block_m: int, block_n: int, narrow: int, operand_bytes: int,
    products: int, beside: int = _BESIDE_LOOP,
) -> float:  # fmt: skip
    """What the busiest multiprocessor does, in multiply-adds; csrc/gemm_cost.h has the same for the CUDA C++ kernels.

    A step along K takes its products, or as long as its operands take from the second-level cache: small tiles starve.

    Args:
        tiles: of the whole product, one after another on each of the ``multiprocessors``.
        k: the length of the sums, in whole steps.
        narrow: columns of P that a tile makes beside its own ``block_n``.
        operand_bytes: that a tile reads for each of k.
        products: multiply-adds of a multiprocessor in a cycle.
        beside: cycles of a tile beside its loop.
    """
    step = max(float(block_m * (block_n + narrow)), products * operand_bytes / _CACHE_BYTES)
    return -(-tiles // multiprocessors) * (k * step + products * beside)


def gemm_config(
    batch: int,
    length: int,
    n: int,
    k: int,
    rank: int,
    dtype: torch.dtype,
    target: Target,
    *,
    vectorised: bool,
    own_p: bool,
    drop_x: bool,
    drop_p: bool,
) -> GemmConfig:
    """The tile with which the busiest multiprocessor has least to do at sizes like these, among those that fit, or else
    the smallest.

    ``vectorised``: x and W can be loaded 16 bytes at a time; if not, more threads share the addresses.
    """
    if target == INTERPRETER:
        return GemmConfig(32, 32, 32, num_warps=4, num_stages=2)
    padded = block_width(rank)
    tiles, registers = _GEMM_TILES.get(target.capability[0], (_GEMM_TILES_MMA_SYNC, 88))
    if dtype == torch.float32:
        tiles = _GEMM_TILES_FLOAT32

    def fits(tile: GemmConfig) -> bool:
        columns = tile.block_m + tile.block_n
        row, epilogue = columns + (padded if own_p else 0), columns * min(padded, EXPAND_BLOCK_R)
        staged = dtype.itemsize * max(row * tile.block_k * tile.num_stages, epilogue)
        if staged > target.shared_memory - 2048:
            return False
        # Accumulators of one thread, a second one for a masked rank-r term, and what drawing a mask takes: of the 255
        # registers that there are, addresses and, with mma.sync, operands need the rest.
        accumulators = tile.block_m * (tile.block_n * (2 if drop_p else 1) + (padded if own_p else 0))
        drawing = 16 + padded // 2 if drop_x else 16 if drop_p else 0
        # Loads of single elements pass through registers, value and address, instead of going to shared memory.
        passing = 0 if vectorised else 2 * (tile.block_m + tile.block_n) * tile.block_k
        return (accumulators + passing) // (32 * tile.num_warps) + drawing <= registers

    def cost(tile: GemmConfig, batch: int, length: int) -> float:
        return _cost(tile, batch, length, n, k, padded if own_p else 0, dtype, target, _BESIDE_LOOP)

    if not vectorised:
        # Single elements of 2 bytes cannot be copied asynchronously: fewer stages lose nothing.
        tiles = tuple(replace(tile, num_warps=8, num_stages=2) for tile in tiles)
    fitting = [tile for tile in tiles if fits(tile)]
    return suits_best(fitting or tiles[-1:], cost, batch, length)


def _cost(
    tile: GemmConfig, batch: int, length: int, n: int, k: int, narrow: int, dtype: torch.dtype, target: Target,
    beside: int,
) -> float:  # fmt: skip
    """`tile_cost` of y (B, L, N) in such tiles, a sum of K each; ``narrow``: columns of P beside each."""
    tiles = batch * -(-length // tile.block_m) * -(-n // tile.block_n)
    operand_bytes = (tile.block_m + tile.block_n) * dtype.itemsize
    whole = -(-k // tile.block_k) * tile.block_k
    products = PRODUCTS.get(target.capability, _FEWEST_PRODUCTS)
    sides = tile.block_m, tile.block_n, narrow
    return tile_cost(tiles, target.multiprocessors, whole, *sides, operand_bytes, products, beside)


def tma_config(
    batch: int, length: int, n: int, k: int, rank: int, dtype: torch.dtype, target: Target, *, own_p: bool,
    drop_p: bool,
) -> GemmConfig:  # fmt: skip
    """As `gemm_config`, of the kernel that has tensor descriptors: with as many stages as fit beside the tile of y."""
    if target == INTERPRETER:
        return GemmConfig(32, 32, 32, num_warps=4, num_stages=2)
    padded = block_width(rank)
    narrow = padded if own_p else 0

    def staged(tile: GemmConfig) -> GemmConfig:
        stage = (tile.block_m + tile.block_n + narrow) * tile.block_k
        # Of y what is stored at once, and B where it is loaded ahead.
        beside = tile.block_n * (tile.block_m // 4 if drop_p else tile.block_m + 16 * (padded <= 16))
        room = (target.shared_memory - 2048) // dtype.itemsize - beside
        return replace(tile, num_stages=min(tile.num_stages, room // stage))

    def fits(tile: GemmConfig) -> bool:
        # Accumulators of a thread, and what masking a quarter of the term takes.
        registers = tile.block_m * (tile.block_n + narrow) // (32 * tile.num_warps) + (32 if drop_p else 0)
        return tile.num_stages >= 2 and registers <= 176

    def cost(tile: GemmConfig, batch: int, length: int) -> float:
        return _cost(tile, batch, length, n, k, narrow, dtype, target, _BESIDE_TMA)

    return suits_best(list(filter(fits, map(staged, TMA_TILES[target.capability[0]]))), cost, batch, length)


def gemm_work(
    config: GemmConfig, batch: int, length: int, n: int, k: int, rank: int, dtype: torch.dtype, own_p: bool
) -> LaunchWork:  # fmt: skip
    """A tile of the GEMM, and with ``own_p`` of P."""
    narrow = block_width(rank) if own_p else 0
    tiles = batch * -(-length // config.block_m) * -(-n // config.block_n)
    nbytes = k * (config.block_m + config.block_n) * dtype.itemsize
    return LaunchWork(tiles, 2 * k * config.block_m * (config.block_n + narrow), nbytes)


def shrink_config(batch: int, length: int, k: int, rank: int, dtype: torch.dtype, target: Target) -> PassConfig:
    """P = drop(x) A^T: ``splits`` cut K when there are too few tiles of rows to fill the GPU."""
    if target == INTERPRETER:
        return PassConfig(32, 32, 2, num_warps=4, num_stages=2)
    padded = block_width(rank)
    block_k = 16 if padded > 128 else 64 if padded < 64 and dtype.itemsize == 2 else 32
    tiles = batch * -(-length // 64)
    splits = max(1, min(8, (2 * target.multiprocessors) // max(1, tiles), -(-k // (2 * block_k))))
    return PassConfig(
        64, block_k, splits, num_warps=4 if padded < 64 else 8, num_stages=3 if dtype.itemsize == 2 else 2
    )


def shrink_work(config: PassConfig, batch: int, length: int, k: int, rank: int, dtype: torch.dtype) -> LaunchWork:
    """A tile of P, of a part of K."""
    part, narrow = k / config.splits, block_width(rank)
    nbytes = part * dtype.itemsize * (config.block_m + narrow)
    return LaunchWork(batch * -(-length // config.block_m) * config.splits, 2 * part * config.block_m * narrow, nbytes)


def wgrad_config(
    batch: int, length: int, columns: int, rank: int, dtype: torch.dtype, target: Target, *, vectorised: bool
) -> PassConfig:
    """The sum over rows of dA and dB: ``splits`` cut the rows. Loads that do not vectorise need more threads."""
    if target == INTERPRETER:
        return PassConfig(32, 32, 2, num_warps=4, num_stages=2)
    padded = block_width(rank)
    block_c = 128 if padded <= 64 else 64
    block_m = 64 if dtype.itemsize == 2 else 32
    tiles = -(-columns // block_c)
    splits = max(1, min(batch * -(-length // block_m), -(-4 * target.multiprocessors // tiles), 64))
    # With 8 warps tcgen05 spills at padded ranks 64 and 128, where every other matrix unit needs them.
    few = 128 if target.capability[0] == 10 else 32
    warps = 4 if vectorised and padded <= few else 8
    return PassConfig(block_m, block_c, splits, num_warps=warps, num_stages=3 if dtype.itemsize == 2 else 2)


def wgrad_work(config: PassConfig, batch: int, length: int, columns: int, rank: int, dtype: torch.dtype) -> LaunchWork:
    """A tile of the gradient, of a part of the rows."""
    part, narrow = batch * length / config.splits, block_width(rank)
    nbytes = part * dtype.itemsize * (config.block_c + narrow)
    return LaunchWork(-(-columns // config.block_c) * config.splits, 2 * part * config.block_c * narrow, nbytes)


def shares_pass(rank: int) -> bool:
    """Whether one pass over dy makes dB and Q together.

    Each tile of 128 columns writes its part of Q in float32 and a sum reads it: 8 R bytes a row, where a second pass
    would read the tile's row of dy again, 256 bytes.
    """
    return rank <= 16
