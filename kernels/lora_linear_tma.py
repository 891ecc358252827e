"""``lora_linear``'s product with its rank-r term for 9.0 and later: operands by tensor descriptors.

The tensor memory accelerator copies a tile that a descriptor names. Nobody forms an address or a mask, and x, W and y
move while the tensor cores multiply. It takes what lies in memory as descriptors ask, see `tma_fits`; the rest is for
the kernel of `lora_linear`, which computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from pyfused.kernels.device import dropout_keep_mask, known_multiple, swizzle
from pyfused.kernels.launch import (
    MAX_REGISTERS,
    block_width,
    configuration,
    dropout_arguments,
    launch,
    mat,
    offset_type,
    target,
)
from pyfused.kernels.lora_linear_config import TMA_TILES, rank_divisor, tma_config
from pyfused.kernels.recording import INTERPRETER
from pyfused.kernels.tiles import keep_own, load_vector, load_weight, store_tile

# Columns of P, in one block that lies in registers beside the tile.
MAX_RANK = 64
# Fewer rows are few tiles, behind each of which a program makes descriptors first.
MIN_ROWS = 128
# In a row or a column: within what 32 bits hold, and a tile less.
_MOST_ELEMENTS = 2**31 - 2**8


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile [ROWS, COLUMNS]."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["rows_total", "rank", "width", "tiles_m", "tiles_n", "threshold"])
def _lora_tma_kernel(
    x, w, a_ptr, b_ptr, bias, p_ptr, y, seed_ptr, index_ptr, rows_total, n, k, rank, width, tiles_m, tiles_n,
    scaling, saved_scaling, inverse_keep, threshold: tl.uint32,
    OWN_P: tl.constexpr, SAVE_P: tl.constexpr, DROP_P: tl.constexpr, TRANSPOSED: tl.constexpr, W_BY_ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y (M, N) = x W^T + b + s P B^T, the tiles in turn among the programs, of which each multiprocessor has one.

    OWN_P: P comes from the tiles of x at hand, else from memory. SAVE_P keeps ``saved_scaling`` P. DROP_P masks the
    rank-r term (dx). TRANSPOSED: a lies in memory as (K, R) and b as (R, N), as they do for dx. W_BY_ROWS: w lies as
    (N, K), else as (K, N).
    """
    rank = known_multiple(rank, rank_divisor(BLOCK_R))
    dtype = x.ptr.dtype.element_ty
    x_tiles = tl.make_tensor_descriptor(x.ptr, [rows_total, k], [x.strides[0], 1], [BLOCK_M, BLOCK_K])
    if W_BY_ROWS:
        w_tiles = tl.make_tensor_descriptor(w.ptr, [n, k], [w.strides[0], 1], [BLOCK_N, BLOCK_K])
    else:
        w_tiles = tl.make_tensor_descriptor(w.ptr, [k, n], [w.strides[1], 1], [BLOCK_K, BLOCK_N])
    if OWN_P:
        if TRANSPOSED:
            a_tiles = tl.make_tensor_descriptor(a_ptr, [k, rank], [rank, 1], [BLOCK_K, BLOCK_R])
        else:
            a_tiles = tl.make_tensor_descriptor(a_ptr, [rank, k], [k, 1], [BLOCK_R, BLOCK_K])
    # Of y what is stored at once.
    WIDTH: tl.constexpr = BLOCK_N // 4 if DROP_P else BLOCK_N
    y_tiles = tl.make_tensor_descriptor(y.ptr, [rows_total, n], [y.strides[0], 1], [BLOCK_M, WIDTH])
    stride_bn, stride_br = (1, n) if TRANSPOSED else (rank, 1)
    offs_r = tl.arange(0, BLOCK_R)
    ok_r = offs_r < rank
    # What the end needs is loaded during the products; of more of the rank it does not fit beside their tiles.
    AHEAD: tl.constexpr = BLOCK_R <= 16
    steps = tl.cdiv(k, BLOCK_K)
    if DROP_P:
        seed = tl.load(seed_ptr)

    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = swizzle(tile, tiles_m, tiles_n, GROUP_M)
        row, column = pid_m * BLOCK_M, pid_n * BLOCK_N
        rows, offs_n = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        ok_m, ok_n = rows < rows_total, offs_n < n
        p_rows = p_ptr + rows.to(OFFSET) * rank
        p_ptrs = p_rows[:, None] + offs_r[None, :]
        if AHEAD and not OWN_P:
            p = tl.load(p_ptrs, mask=ok_m[:, None] & ok_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        if AHEAD and not DROP_P:
            b = load_weight(b_ptr, offs_r, offs_n, stride_br, stride_bn, ok_r, ok_n, OFFSET)  # [BLOCK_R, BLOCK_N]
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if bias is not None:
            acc += load_vector(bias, offs_n, ok_n)[None, :]
        if OWN_P:
            p_acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for step in range(steps):
            start = step * BLOCK_K
            x_tile = x_tiles.load([row, start])  # [BLOCK_M, BLOCK_K]
            w_tile = w_tiles.load([column, start]).T if W_BY_ROWS else w_tiles.load([start, column])
            acc = tl.dot(x_tile, w_tile, acc)
            if OWN_P:
                a = a_tiles.load([start, 0]) if TRANSPOSED else a_tiles.load([0, start]).T  # [BLOCK_K, BLOCK_R]
                p_acc = tl.dot(x_tile, a, p_acc)
        if OWN_P:
            if index_ptr is not None:
                p_acc = keep_own(p_acc, index_ptr, rows, ok_m, offs_r, width)
            if SAVE_P:  # noqa: SIM102 (one condition is the compiler's, the other the program's)
                if pid_n == 0:
                    store_tile(p_rows, offs_r, 1, p_acc * saved_scaling, ok_m, ok_r, OFFSET)
            p = (p_acc * scaling).to(dtype)  # [BLOCK_M, BLOCK_R]
        else:
            if not AHEAD:
                p = tl.load(p_ptrs, mask=ok_m[:, None] & ok_r[None, :], other=0.0)
            p = (p.to(tl.float32) * scaling).to(dtype)
        if DROP_P:
            # A quarter of the columns at a time, in a loop: the masked term of more of them, or of quarters that the
            # compiler makes side by side, does not fit into registers beside the sum.
            left, right = _halves(acc, BLOCK_M, BLOCK_N)
            part, second = _halves(left, BLOCK_M, BLOCK_N // 2)
            third, fourth = _halves(right, BLOCK_M, BLOCK_N // 2)
            for start in tl.range(column, column + BLOCK_N, WIDTH, num_stages=1, loop_unroll_factor=1):
                offs_w = start + tl.arange(0, WIDTH)
                b = load_weight(b_ptr, offs_r, offs_w, stride_br, stride_bn, ok_r, offs_w < n, OFFSET)
                keep = dropout_keep_mask(seed, rows.to(tl.int64), start, threshold, BLOCK_M, WIDTH)
                term = tl.where(keep, tl.dot(p, b) * inverse_keep, 0.0)
                y_tiles.store([row, start], (part + term).to(dtype))
                part, second, third, fourth = second, third, fourth, part
        else:
            if not AHEAD:
                b = load_weight(b_ptr, offs_r, offs_n, stride_br, stride_bn, ok_r, ok_n, OFFSET)
            y_tiles.store([row, column], tl.dot(p, b, acc).to(dtype))


def tma_fits(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, a: torch.Tensor | None, rank: int) -> bool:
    """Whether the kernel makes y (B, L, N) = x (B, L, K) weight^T (N, K) with a term of rank R.

    They lie as tensor descriptors ask: of one dtype of 16 bits, in rows of one distance, of weight also in columns, and
    each row begins at a multiple of 16 bytes.

    Args:
        a: of which P is made, dense in either order of its dimensions; None where P is given.
        rank: R.
    """
    there = target(x.device)
    if there.capability[0] not in TMA_TILES and there != INTERPRETER:
        return False
    if x.dtype.itemsize != 2 or weight.dtype != x.dtype or rank > MAX_RANK:
        return False
    if x.shape[0] * x.shape[1] < MIN_ROWS:
        return False
    matrices = [_matrix(x), _matrix(y), weight if _by_rows(weight) else weight.t(), *[a] * (a is not None)]
    return all(matrix is not None and _described(matrix) for matrix in matrices)


def _matrix(rows: torch.Tensor) -> torch.Tensor | None:
    """(B, L, C) as (M, C); None where its rows have more than one distance."""
    batch, length, columns = rows.shape
    if batch > 1 and length > 1 and rows.stride(0) != length * rows.stride(1):
        return None
    return rows.view(batch * length, columns)


def _by_rows(weight: torch.Tensor) -> bool:
    return weight.stride(1) == 1


def _described(matrix: torch.Tensor) -> bool:
    """Whether a descriptor takes it: whole rows, each at a multiple of 16 bytes."""
    apart, beside = matrix.stride()
    # The last tile may reach beyond the matrix, and its offsets have 32 bits.
    if beside != 1 or matrix.data_ptr() % 16 or min(matrix.shape) == 1 or max(matrix.shape) > _MOST_ELEMENTS:
        return False
    return apart >= matrix.shape[1] and apart * matrix.itemsize % 16 == 0


def tma_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    p: torch.Tensor,
    y: torch.Tensor,
    seed: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    *,
    own_p: bool,
    save_p: bool,
    saved_scaling: float,
    drop_p: bool,
    transposed: bool,
    mixed: Mapping[str, Any],
) -> None:
    """y <- x weight^T + bias + scaling P b^T; the arguments are those of `lora_linear`'s own GEMM."""
    rows, k, (n, rank) = x.shape[0] * x.shape[1], x.shape[2], (weight.shape[0], p.shape[1])
    config = configuration(
        _lora_tma_kernel, tma_config, x.device, 1, rows, n, k, rank, x.dtype, own_p=own_p, drop_p=drop_p
    )
    tiles_m, tiles_n = triton.cdiv(rows, config.block_m), triton.cdiv(n, config.block_n)
    launch(
        _lora_tma_kernel, (min(tiles_m * tiles_n, target(x.device).multiprocessors),),
        x=mat(_matrix(x)), w=mat(weight), a_ptr=a, b_ptr=b, bias=mat(bias), p_ptr=p, y=mat(_matrix(y)), **mixed,
        rows_total=rows, n=n, k=k, rank=rank, tiles_m=tiles_m, tiles_n=tiles_n,
        scaling=scaling, saved_scaling=saved_scaling, **dropout_arguments(seed, dropout_p),
        OWN_P=own_p, SAVE_P=save_p, DROP_P=drop_p, TRANSPOSED=transposed, W_BY_ROWS=_by_rows(weight),
        OFFSET=offset_type(b, p),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=block_width(rank),
        GROUP_M=config.group_m, num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
