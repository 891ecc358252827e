"""``lora_linear`` in Triton.

    y = x W^T + b + s P B^T        P = drop(x) A^T
    dx = dy W + mask (Q A)         Q = s dy B       dA = Q^T drop(x)        dB = s dy^T P

Without dropout dx is y's own kernel on (dy, W^T, B^T, A^T). Letters: M rows, N out, K in, R rank; x is (B, L, K) with
any strides and row m is b * L + l; P and Q are (M, R), rounded to x's dtype once, Q with its scaling. A and B are
dense, (R, K) and (N, R), and like W in x's dtype: `prepared` and torch convert them before. With an index of adapters P
and Q hold zeros outside the columns of a row's own adapter.
"""

import torch
import triton
import triton.language as tl

from pyfused.kernels.device import dropout_keep_mask, known_multiple, swizzle
from pyfused.kernels.launch import (
    MAX_REGISTERS,
    block_width,
    configuration,
    dot_precision,
    dropout_arguments,
    has_wgmma,
    launch,
    mat,
    offset_type,
    row_length,
    rows_like,
    target,
    vectorised,
)
from pyfused.kernels.lora_linear_config import (
    EXPAND_BLOCK_R,
    gemm_config,
    rank_divisor,
    shares_pass,
    shrink_config,
    wgrad_config,
)
from pyfused.kernels.lora_linear_tma import tma_fits, tma_gemm
from pyfused.kernels.prepared import prepared
from pyfused.kernels.program import per_signature
from pyfused.kernels.recording import INTERPRETER
from pyfused.kernels.sums import sum_partials
from pyfused.kernels.tiles import (
    dense_rows,
    keep_own,
    load_tile,
    load_vector,
    load_weight,
    row_pointers,
    store_tile,
    tile_pointers,
    tile_rows,
    weight_pointers,
)

# What changes with the batch is not specialised, but for whether 16 divides it where that makes vectors of loads:
# another number of rows must not compile another kernel. Nor must another rank: a kernel knows the power of two that it
# is padded to, and by that what divides it, as zeros in A and B see to.


@triton.jit(do_not_specialize=["length", "rank", "width", "tiles_l", "tiles_m", "tiles_n", "threshold"])
def _lora_gemm_kernel(
    x, w, a_ptr, b_ptr, bias, p_ptr, y, seed_ptr, index_ptr, length, n, k, rank, width, tiles_l, tiles_m, tiles_n,
    scaling, saved_scaling, inverse_keep, threshold: tl.uint32,
    OWN_P: tl.constexpr, SAVE_P: tl.constexpr, DROP_X: tl.constexpr, DROP_P: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, OFFSET: tl.constexpr, LENGTH_MULTIPLE_OF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y = x W^T + b + s P B^T for one tile. OWN_P: P comes from the tiles of x at hand, else from memory.

    SAVE_P keeps ``saved_scaling`` P. DROP_X drops x on its way into P (forward); DROP_P masks the rank-r term itself
    (dx). TRANSPOSED: a lies in memory as (K, R) and b as (R, N), as they do for dx.
    """
    length, rank = known_multiple(length, LENGTH_MULTIPLE_OF), known_multiple(rank, rank_divisor(BLOCK_R))
    pid_m, pid_n = swizzle(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    batch, offs_l, rows, ok_l = tile_rows(pid_m, tiles_l, length, OFFSET, BLOCK_M)
    offs_n, offs_k = pid_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    ok_n = offs_n < n
    p_rows = dense_rows(p_ptr, batch, offs_l, length, rank, OFFSET)
    dtype = x.ptr.dtype.element_ty
    step_k = tl.full((), BLOCK_K, tl.int64)
    stride_ar, stride_ak = (1, rank) if TRANSPOSED else (k, 1)
    stride_bn, stride_br = (1, n) if TRANSPOSED else (rank, 1)

    x_ptrs = tile_pointers(row_pointers(x, batch, offs_l, OFFSET), offs_k, x.strides[2], OFFSET)
    w_ptrs = weight_pointers(w.ptr, offs_k, offs_n, w.strides[1], w.strides[0], OFFSET)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if OWN_P:
        offs_r = tl.arange(0, BLOCK_R)
        ok_r = offs_r < rank
        a_ptrs = weight_pointers(a_ptr, offs_k, offs_r, stride_ak, stride_ar, OFFSET)
        p_acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if DROP_X or DROP_P:
        seed = tl.load(seed_ptr)
    # What the end needs is loaded during the products; of more than one block of the rank it does not fit beside them.
    AHEAD: tl.constexpr = not OWN_P and BLOCK_R <= 16
    if AHEAD:
        if bias is not None:
            bias_n = load_vector(bias, offs_n, ok_n)
        offs_r = tl.arange(0, BLOCK_R)
        ok_r = offs_r < rank
        p = load_tile(p_rows, offs_r, 1, ok_l, ok_r, OFFSET)
        b = load_weight(b_ptr, offs_r, offs_n, stride_br, stride_bn, ok_r, ok_n, OFFSET)
    for start in range(tl.cdiv(k, BLOCK_K)):
        ok_k = offs_k < k - start * BLOCK_K
        x_tile = tl.load(x_ptrs, mask=ok_l[:, None] & ok_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w_tile = tl.load(w_ptrs, mask=ok_n[None, :] & ok_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        if OWN_P:
            a = tl.load(a_ptrs, mask=ok_r[None, :] & ok_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_R]
            if DROP_X:
                keep = dropout_keep_mask(seed, rows, start * BLOCK_K, threshold, BLOCK_M, BLOCK_K)
                x_tile = tl.where(keep, x_tile, 0.0).to(dtype)
            p_acc = tl.dot(x_tile, a, p_acc, input_precision=PRECISION)
            a_ptrs += step_k * stride_ak
        x_ptrs += step_k * x.strides[2]
        w_ptrs += step_k * w.strides[1]

    if bias is not None:
        if not AHEAD:
            bias_n = load_vector(bias, offs_n, ok_n)
        acc += bias_n[None, :]
    if OWN_P:
        if DROP_X:
            p_acc *= inverse_keep
        if index_ptr is not None:
            p_acc = keep_own(p_acc, index_ptr, rows, ok_l, offs_r, width)
        if SAVE_P:  # noqa: SIM102 (one condition is the compiler's, the other the program's)
            if pid_n == 0:
                store_tile(p_rows, offs_r, 1, p_acc * saved_scaling, ok_l, ok_r, OFFSET)
        b = load_weight(b_ptr, offs_r, offs_n, stride_br, stride_bn, ok_r, ok_n, OFFSET)  # [BLOCK_R, BLOCK_N]
        p = (p_acc * scaling).to(dtype)  # [BLOCK_M, BLOCK_R]
        if DROP_P:
            low_rank = tl.dot(p, b, input_precision=PRECISION)
        else:
            acc = tl.dot(p, b, acc, input_precision=PRECISION)
    else:
        low_rank = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32) if DROP_P else acc
        if AHEAD:
            # All of the rank.
            p = (p.to(tl.float32) * scaling).to(dtype)  # [BLOCK_M, BLOCK_R]
            low_rank = tl.dot(p, b, low_rank, input_precision=PRECISION)
        else:
            for start_r in tl.range(0, tl.cdiv(rank, BLOCK_R), num_stages=1):
                offs_r = start_r * BLOCK_R + tl.arange(0, BLOCK_R)
                ok_r = offs_r < rank
                p = load_tile(p_rows, offs_r, 1, ok_l, ok_r, OFFSET)
                p = (p.to(tl.float32) * scaling).to(dtype)  # [BLOCK_M, BLOCK_R]
                b = load_weight(b_ptr, offs_r, offs_n, stride_br, stride_bn, ok_r, ok_n, OFFSET)
                low_rank = tl.dot(p, b, low_rank, input_precision=PRECISION)
        if not DROP_P:
            acc = low_rank
    if DROP_P:
        keep = dropout_keep_mask(seed, rows, pid_n * BLOCK_N, threshold, BLOCK_M, BLOCK_N)
        acc += tl.where(keep, low_rank * inverse_keep, 0.0)

    store_tile(row_pointers(y, batch, offs_l, OFFSET), offs_n, y.strides[2], acc, ok_l, ok_n, OFFSET)


@triton.jit(do_not_specialize=["length", "rows_total", "rank", "width", "tiles_l", "steps", "threshold"])
def _lora_shrink_kernel(
    x, a_ptr, p_ptr, seed_ptr, index_ptr, length, rows_total, k, rank, width, tiles_l, steps,
    scaling, inverse_keep, threshold: tl.uint32,
    DROP_X: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
    LENGTH_MULTIPLE_OF: tl.constexpr, WGMMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """P[split] (M, R) = s drop(x) A^T over the split's ``steps`` blocks of K. TRANSPOSED: A lies as (K, R)."""
    length, rank = known_multiple(length, LENGTH_MULTIPLE_OF), known_multiple(rank, rank_divisor(BLOCK_R))
    pid_m, split = tl.program_id(0), tl.program_id(1)
    batch, offs_l, rows, ok_l = tile_rows(pid_m, tiles_l, length, OFFSET, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    ok_r = offs_r < rank
    stride_ar, stride_ak = (1, rank) if TRANSPOSED else (k, 1)
    dtype = x.ptr.dtype.element_ty
    x_rows = row_pointers(x, batch, offs_l, OFFSET)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if DROP_X:
        seed = tl.load(seed_ptr)
    if WGMMA:
        # Of a loop that might never run the assembler serialises these products. Others would take more registers.
        tl.assume(steps > 0)
    for step in range(steps):
        start = (split * steps + step) * BLOCK_K
        offs_k = start + tl.arange(0, BLOCK_K)
        ok_k = offs_k < k
        x_tile = load_tile(x_rows, offs_k, x.strides[2], ok_l, ok_k, OFFSET)  # [BLOCK_M, BLOCK_K]
        a = load_weight(a_ptr, offs_k, offs_r, stride_ak, stride_ar, ok_k, ok_r, OFFSET)  # [BLOCK_K, BLOCK_R]
        if DROP_X:
            keep = dropout_keep_mask(seed, rows, start, threshold, BLOCK_M, BLOCK_K)
            x_tile = tl.where(keep, x_tile, 0.0).to(dtype)
        acc = tl.dot(x_tile, a, acc, input_precision=PRECISION)
    acc *= scaling
    if DROP_X:
        acc *= inverse_keep
    if index_ptr is not None:
        acc = keep_own(acc, index_ptr, rows, ok_l, offs_r, width)
    p_rows = dense_rows(p_ptr + split.to(tl.int64) * rows_total * rank, batch, offs_l, length, rank, OFFSET)
    store_tile(p_rows, offs_r, 1, acc, ok_l, ok_r, OFFSET)


@triton.jit(do_not_specialize=["length", "rows_total", "rank", "width", "tiles_l", "tiles_m", "steps", "threshold"])
def _lora_wgrad_kernel(
    t, p_ptr, g_ptr, f_ptr, q_ptr, seed_ptr, index_ptr,
    length, rows_total, columns, rank, width, tiles_l, tiles_m, steps,
    scaling, q_scaling, inverse_keep, threshold: tl.uint32,
    DROP_T: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
    LENGTH_MULTIPLE_OF: tl.constexpr, WGMMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """g[split] (C, R) = s drop(t)^T p over the split's ``steps`` tiles of rows. TRANSPOSED: g lies in memory as (R, C).

    With a factor f (C, R) the same pass over t also gives q[column tile] (M, R) = s t f, a part of t's own product.
    """
    length, rank = known_multiple(length, LENGTH_MULTIPLE_OF), known_multiple(rank, rank_divisor(BLOCK_R))
    pid_c, split = tl.program_id(0), tl.program_id(1)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    ok_c, ok_r = offs_c < columns, offs_r < rank
    dtype = t.ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    if DROP_T:
        seed = tl.load(seed_ptr)
    if f_ptr is not None:
        f = load_weight(f_ptr, offs_c, offs_r, rank, 1, ok_c, ok_r, OFFSET)  # [BLOCK_C, BLOCK_R]
        q_ptr += pid_c.to(tl.int64) * rows_total * rank
    if WGMMA:
        # Of a loop that might never run the assembler serialises these products. Others would take more registers.
        tl.assume(steps > 0)
    for step in range(steps):
        tile = split * steps + step
        batch, offs_l, rows, ok_l = tile_rows(tile, tiles_l, length, OFFSET, BLOCK_M)
        ok_l &= tile < tiles_m
        t_rows = row_pointers(t, batch, offs_l, OFFSET)
        t_tile = load_tile(t_rows, offs_c, t.strides[2], ok_l, ok_c, OFFSET)  # [BLOCK_M, BLOCK_C]
        p_rows = dense_rows(p_ptr, batch, offs_l, length, rank, OFFSET)
        p = load_tile(p_rows, offs_r, 1, ok_l, ok_r, OFFSET)  # [BLOCK_M, BLOCK_R]
        kept = t_tile
        if DROP_T:
            keep = dropout_keep_mask(seed, rows, pid_c * BLOCK_C, threshold, BLOCK_M, BLOCK_C)
            kept = tl.where(keep, t_tile, 0.0).to(dtype)
        # First: behind q's own products these would wait for each other, one by one.
        acc = tl.dot(tl.trans(kept), p, acc, input_precision=PRECISION)
        if f_ptr is not None:
            q = tl.dot(t_tile, f, input_precision=PRECISION) * q_scaling
            if index_ptr is not None:
                q = keep_own(q, index_ptr, rows, ok_l, offs_r, width)
            store_tile(dense_rows(q_ptr, batch, offs_l, length, rank, OFFSET), offs_r, 1, q, ok_l, ok_r, OFFSET)
    if DROP_T:
        acc *= inverse_keep
    acc *= scaling
    stride_gc, stride_gr = (1, columns) if TRANSPOSED else (rank, 1)
    g_ptrs = weight_pointers(g_ptr + split.to(tl.int64) * columns * rank, offs_c, offs_r, stride_gc, stride_gr, OFFSET)
    tl.store(g_ptrs, acc.to(g_ptr.dtype.element_ty), mask=ok_c[:, None] & ok_r[None, :])


@triton.jit(do_not_specialize=["length", "rank", "tiles_l", "threshold"])
def _lora_expand_kernel(
    y, p_ptr, a_ptr, seed_ptr, length, n, rank, tiles_l, scaling, inverse_keep, threshold: tl.uint32,
    PRECISION: tl.constexpr, OFFSET: tl.constexpr, LENGTH_MULTIPLE_OF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y += s mask (P A), A (R, N), in place: dx's term in plan blas, whose GEMM is the library's."""
    length, rank = known_multiple(length, LENGTH_MULTIPLE_OF), known_multiple(rank, rank_divisor(BLOCK_R))
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    batch, offs_l, rows, ok_l = tile_rows(pid_m, tiles_l, length, OFFSET, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ok_n = offs_n < n
    p_rows = dense_rows(p_ptr, batch, offs_l, length, rank, OFFSET)
    low_rank = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start_r in tl.range(0, tl.cdiv(rank, BLOCK_R), num_stages=1):
        offs_r = start_r * BLOCK_R + tl.arange(0, BLOCK_R)
        ok_r = offs_r < rank
        p = load_tile(p_rows, offs_r, 1, ok_l, ok_r, OFFSET)  # [BLOCK_M, BLOCK_R]
        a = load_weight(a_ptr, offs_r, offs_n, n, 1, ok_r, ok_n, OFFSET)  # [BLOCK_R, BLOCK_N]
        low_rank = tl.dot(p, a, low_rank, input_precision=PRECISION)
    keep = dropout_keep_mask(tl.load(seed_ptr), rows, pid_n * BLOCK_N, threshold, BLOCK_M, BLOCK_N)
    y_rows = row_pointers(y, batch, offs_l, OFFSET)
    out = load_tile(y_rows, offs_n, y.strides[2], ok_l, ok_n, OFFSET).to(tl.float32)
    out += tl.where(keep, low_rank * (scaling * inverse_keep), 0.0)
    store_tile(y_rows, offs_n, y.strides[2], out, ok_l, ok_n, OFFSET)


# What a launch has of an index of adapters; see `_mixed`.
_UNMIXED = {"index_ptr": None, "width": None}


def _gemm(
    x, weight, a, b, bias, p, seed, scaling, dropout_p, channels_first, *,
    own_p, save_p=False, saved_scaling=1.0, drop_x=False, drop_p=False, transposed=False, mixed=_UNMIXED,
) -> torch.Tensor:  # fmt: skip
    """y = x weight^T + bias + scaling P b^T; P is made from x and ``a`` when ``own_p``, read from ``p`` otherwise.

    With ``save_p`` saved_scaling P goes to ``p``. a is (R, K) and b (N, R); ``transposed``, (K, R) and (R, N).
    ``mixed`` is `_mixed`'s.
    """
    y = rows_like(x, weight.shape[0], channels_first)
    given = x, weight, a, b, bias, p, y, seed, scaling, dropout_p
    settings = {
        "own_p": own_p, "save_p": save_p, "saved_scaling": saved_scaling, "drop_p": drop_p, "transposed": transposed,
        "mixed": mixed if own_p else _UNMIXED,
    }  # fmt: skip
    if not drop_x and tma_fits(x, weight, y, a if own_p else None, p.shape[1]):
        tma_gemm(*given, **settings)
    else:
        pointer_gemm(*given, drop_x=drop_x, **settings)
    return y


def pointer_gemm(
    x, weight, a, b, bias, p, y, seed, scaling, dropout_p, *,
    own_p, save_p, saved_scaling, drop_x, drop_p, transposed, mixed,
) -> None:  # fmt: skip
    """`_gemm` into y, of any strides."""
    (batch, length, k), n, rank = x.shape, weight.shape[0], p.shape[1]
    config = configuration(
        _lora_gemm_kernel, gemm_config, x.device, batch, length, n, k, rank, x.dtype,
        vectorised=vectorised(x, weight), own_p=own_p, drop_x=drop_x, drop_p=drop_p,
    )  # fmt: skip
    tiles_l, tiles_n = triton.cdiv(length, config.block_m), triton.cdiv(n, config.block_n)
    launch(
        _lora_gemm_kernel, (batch * tiles_l * tiles_n,),
        x=mat(x), w=mat(weight), a_ptr=a, b_ptr=b, bias=mat(bias), p_ptr=p, y=mat(y),
        **row_length(length, x, y), n=n, k=k, rank=rank, **mixed,
        tiles_l=tiles_l, tiles_m=batch * tiles_l, tiles_n=tiles_n,
        scaling=scaling, saved_scaling=saved_scaling, **dropout_arguments(seed, dropout_p),
        OWN_P=own_p, SAVE_P=save_p, DROP_X=drop_x, DROP_P=drop_p, TRANSPOSED=transposed,
        PRECISION=dot_precision(x.dtype), OFFSET=offset_type(x, weight, a, b, y, p),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        BLOCK_R=block_width(rank) if own_p else min(block_width(rank), EXPAND_BLOCK_R), GROUP_M=config.group_m,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _shrink(x, a, seed, dropout_p, scaling=1.0, transposed=False, mixed=_UNMIXED) -> torch.Tensor:
    """scaling drop(x) a^T, (M, R), in x's dtype; a is (R, K), or, ``transposed``, (K, R)."""
    (batch, length, k), rank = x.shape, a.shape[1 if transposed else 0]
    config = configuration(_lora_shrink_kernel, shrink_config, x.device, batch, length, k, rank, x.dtype)
    steps = triton.cdiv(triton.cdiv(k, config.block_c), config.splits)
    splits = triton.cdiv(triton.cdiv(k, config.block_c), steps)
    p = x.new_empty((batch * length, rank))
    parts = p if splits == 1 else p.new_empty((splits, *p.shape), dtype=torch.float32)
    tiles_l = triton.cdiv(length, config.block_m)
    launch(
        _lora_shrink_kernel, (batch * tiles_l, splits),
        x=mat(x), a_ptr=a, p_ptr=parts, **row_length(length, x), rows_total=batch * length, k=k,
        rank=rank, **mixed, tiles_l=tiles_l, steps=steps,
        scaling=scaling, **dropout_arguments(seed, dropout_p),
        DROP_X=dropout_p > 0.0, TRANSPOSED=transposed,
        PRECISION=dot_precision(x.dtype), OFFSET=offset_type(x, a, p), WGMMA=has_wgmma(x.device),
        BLOCK_M=config.block_m, BLOCK_K=config.block_c, BLOCK_R=block_width(rank),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        sum_partials(parts, p, 1.0)
    return p


def _most_registers(columns: int, shared: bool, dtype: torch.dtype) -> int | None:
    """A limit for the compiler where it would else spill, to fit blocks that nobody starts: the audit shows it."""
    if columns < 16:
        # They are loaded one by one.
        return MAX_REGISTERS
    # Two products in float32 are unrolled into all that a limit leaves.
    return 80 if shared and dtype == torch.float32 else None


def _wgrad(
    t, p, gradient, seed, scaling, dropout_p, factor=None, transposed=False, mixed=_UNMIXED
) -> torch.Tensor | None:
    """gradient (C, R), or, ``transposed``, (R, C) <- scaling drop(t)^T p; returns scaling t factor (M, R) where it is
    given a ``factor`` (C, R)."""
    (batch, length, columns), rank = t.shape, p.shape[1]
    config = configuration(
        _lora_wgrad_kernel, wgrad_config, t.device, batch, length, columns, rank, t.dtype, vectorised=vectorised(t)
    )
    tiles_l, tiles_c = triton.cdiv(length, config.block_m), triton.cdiv(columns, config.block_c)
    steps = triton.cdiv(batch * tiles_l, config.splits)
    splits = triton.cdiv(batch * tiles_l, steps)
    q = None if factor is None else t.new_empty((batch * length, rank))
    # A sum of one part is that part.
    parts = gradient if splits == 1 else gradient.new_empty((splits, *gradient.shape), dtype=torch.float32)
    q_parts = q if q is None or tiles_c == 1 else q.new_empty((tiles_c, *q.shape), dtype=torch.float32)
    launch(
        _lora_wgrad_kernel, (tiles_c, splits),
        t=mat(t), p_ptr=p, g_ptr=parts, f_ptr=factor, q_ptr=q_parts,
        **row_length(length, t), rows_total=batch * length, columns=columns, rank=rank,
        **(_UNMIXED if factor is None else mixed),
        tiles_l=tiles_l, tiles_m=batch * tiles_l, steps=steps,
        scaling=scaling if splits == 1 else 1.0, q_scaling=scaling if tiles_c == 1 else 1.0,
        **dropout_arguments(seed, dropout_p), DROP_T=dropout_p > 0.0, TRANSPOSED=transposed,
        PRECISION=dot_precision(t.dtype), OFFSET=offset_type(t, gradient, p), WGMMA=has_wgmma(t.device),
        BLOCK_M=config.block_m, BLOCK_C=config.block_c, BLOCK_R=block_width(rank),
        num_warps=config.num_warps, num_stages=config.num_stages,
        maxnreg=_most_registers(columns, factor is not None, t.dtype),
    )  # fmt: skip
    if splits > 1:
        sum_partials(parts, gradient, scaling)
    if q is not None and tiles_c > 1:
        sum_partials(q_parts, q, scaling)
    return q


@per_signature
def lora_linear_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    channels_first: bool,
    plan: str,
    save: bool,
    adapter_index: torch.Tensor | None = None,
    adapters: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, L, N) and P (M, R) in x's dtype; see `pyfused.ops.lora_linear` for the contract."""
    (batch, length, _), (n, rank) = x.shape, lora_b.shape
    if batch * length == 0:
        return rows_like(x, n, channels_first), x.new_empty((0, rank))
    mixed = _mixed(adapter_index, rank, adapters)
    with torch.cuda.device_of(x):
        weight = weight.to(x.dtype)
        lora_a, lora_b = _prepared(lora_a, lora_b, x.dtype)
        p = x.new_empty((batch * length if save else 0, len(lora_a)))
        if plan == "blas":
            p = _shrink(x, lora_a, seed, dropout_p, mixed=mixed)
            y = _blas_product(x, weight, bias, channels_first)
            _blas_add_(y, p, lora_b, scaling)
        else:
            own = plan == "one_launch"
            if not own:
                p = _shrink(x, lora_a, seed, dropout_p, mixed=mixed)
            y = _gemm(
                x, weight, lora_a, lora_b, bias, p, seed, scaling, dropout_p, channels_first,
                own_p=own, save_p=own and save, drop_x=own and dropout_p > 0.0, mixed=mixed,
            )  # fmt: skip
    return y, _narrower(p, rank) if save else x.new_empty((0, rank))


@per_signature
def lora_linear_bwd(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    p: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    channels_first: bool,
    plan: str,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    adapter_index: torch.Tensor | None = None,
    adapters: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx (B, L, K) in dy's dtype, dA and dB in their parameters' dtypes; empty where not needed."""
    (batch, length, n), (rank, k) = dy.shape, lora_a.shape
    dx = dy.new_empty(0)
    if batch * length == 0:
        da, db = lora_a.new_zeros((rank, k) if need_da else 0), lora_b.new_zeros((n, rank) if need_db else 0)
        return rows_like(dy, k, channels_first) if need_dx else dx, da, db
    mixed = _mixed(adapter_index, rank, adapters)
    wide = _padded_rank(rank)
    da, db = lora_a.new_empty((wide, k) if need_da else 0), lora_b.new_empty((n, wide) if need_db else 0)
    own = plan == "one_launch" and need_dx
    need_q = need_da or need_dx
    with torch.cuda.device_of(dy):
        if need_q:
            lora_a, lora_b = _prepared(lora_a, lora_b, dy.dtype)
        if need_dx:
            weight = weight.to(dy.dtype)
        if p is not None and wide > rank:
            p = torch.nn.functional.pad(p, (0, wide - rank))
        share = need_db and need_q and not own and shares_pass(wide)
        q = None
        if own:
            q = dy.new_empty((batch * length if need_da else 0, wide))
        elif need_q and not share:
            q = _shrink(dy, lora_b, None, 0.0, scaling, transposed=True, mixed=mixed)
        if need_db:
            made = _wgrad(dy, p, db, None, scaling, 0.0, factor=lora_b if share else None, mixed=mixed)
            q = q if made is None else made
        if need_dx and plan == "blas":
            dx = _blas_product(dy, weight.t(), None, channels_first)
            if dropout_p > 0.0:
                _expand_(dx, q, lora_a, seed, 1.0, dropout_p)
            else:
                _blas_add_(dx, q, lora_a.t(), 1.0)
        elif need_dx:
            dx = _gemm(
                dy, weight.t(), lora_b, lora_a, None, q, seed, scaling if own else 1.0, dropout_p, channels_first,
                own_p=own, save_p=own and need_da, saved_scaling=scaling, drop_p=dropout_p > 0.0, transposed=True,
                mixed=mixed,
            )  # fmt: skip
        if need_da:
            _wgrad(x, q, da, seed, 1.0, dropout_p, transposed=True)
    return dx, da if wide == rank else da[:rank], _narrower(db, rank) if need_db else db


def _mixed(adapter_index: torch.Tensor | None, rank: int, adapters: int) -> dict:
    """The arguments of a kernel that say which columns of P are a row's own; it has none without an index."""
    return _UNMIXED if adapter_index is None else {"index_ptr": adapter_index, "width": rank // adapters}


def _padded_rank(rank: int) -> int:
    """The rank of every launch, which `rank_divisor` divides."""
    return rank + -rank % rank_divisor.fn(rank)  # its wrapper for device code takes 3 us


def _prepared(lora_a: torch.Tensor, lora_b: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as launches take them, with zeros up to their rank."""
    rank = _padded_rank(len(lora_a))
    return prepared(dtype, lora_a, lora_b, ((rank, lora_a.shape[1]), (len(lora_b), rank)))


def _narrower(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """Dense, without the columns beyond the rank."""
    return tensor if tensor.shape[1] == rank else tensor[:, :rank].contiguous()


def _blas_product(x, weight, bias, channels_first) -> torch.Tensor:
    if channels_first:
        batched = weight.expand(x.shape[0], *weight.shape)
        if bias is None:
            return torch.bmm(batched, x.transpose(1, 2)).transpose(1, 2)
        return torch.baddbmm(bias.to(x.dtype)[:, None], batched, x.transpose(1, 2)).transpose(1, 2)
    y = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), weight, None if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:2], weight.shape[0])


def _blas_add_(y, p, b, scaling) -> None:
    if y.stride(2) == 1:
        y.view(-1, y.shape[-1]).addmm_(p, b.t(), alpha=scaling)
    else:
        y.transpose(1, 2).baddbmm_(
            b.expand(y.shape[0], *b.shape), p.view(*y.shape[:2], p.shape[1]).transpose(1, 2), alpha=scaling
        )


def _expand_(y, p, a, seed, scaling, dropout_p) -> None:
    """y += scaling mask (p a), a (R, N)."""
    (batch, length, n), rank = y.shape, p.shape[1]
    block = 32 if target(y.device) == INTERPRETER else 128
    tiles_l = triton.cdiv(length, block)
    launch(
        _lora_expand_kernel, (batch * tiles_l, triton.cdiv(n, block)),
        y=mat(y), p_ptr=p, a_ptr=a,
        **row_length(length, y), n=n, rank=rank,
        tiles_l=tiles_l, scaling=scaling, **dropout_arguments(seed, dropout_p),
        PRECISION=dot_precision(y.dtype), OFFSET=offset_type(y, a, p),
        BLOCK_M=block, BLOCK_N=block, BLOCK_R=min(block_width(rank), EXPAND_BLOCK_R), num_warps=8, num_stages=2,
    )  # fmt: skip
