"""``cross_attention_residual``, the core of absorbed attention: y = x + w rho (drop(softmax_T(x E^T + c)) F + b_o).

One launch forward. Two backward: rows (ds and dx), then sums over rows, dE, dc and G = (rho a)^T dy with its sum
rho dy, of which the last program to arrive makes dF, db_o and dw. Norm matching's part of dF is left to torch.

With norm matching the tiles of F are met once more, for |o| of a row's own o = a F + b_o: of a F F^T a^T float16 holds
neither the largest nor the smallest, and float32 half the digits where o is small against F. Backward's pass over the
rows goes by o's gradient do = rho g - kappa o, of which da = do F^T.

The J = H T columns of a tile are padded to powers of two in both: column j is head j // BLOCK_T, token j % BLOCK_T.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from pyfused.kernels.bottleneck_config import rows_config, weights_config
from pyfused.kernels.device import dropout_keep_mask, inverse_or_zero, known_multiple
from pyfused.kernels.launch import (
    MAX_REGISTERS,
    configuration,
    dot_precision,
    dropout_arguments,
    launch,
    mat,
    offset_type,
    row_length,
    vectorised,
)
from pyfused.kernels.program import per_signature
from pyfused.kernels.sums import SLOTS_PER_GROUP, load_part, sums_slots
from pyfused.kernels.tiles import (
    gate_root,
    load_tile,
    load_vector,
    load_weight,
    narrow_product,
    row_pointers,
    store_tile,
    tile_rows,
)


@triton.jit
def _columns(
    heads, tokens, stride_h, stride_t, OFFSET: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """Offset of each column's (head, token), and which columns exist."""
    offs_j = tl.arange(0, BLOCK_H * BLOCK_T)
    head, token = offs_j // BLOCK_T, offs_j % BLOCK_T
    return head.to(OFFSET) * stride_h + token.to(OFFSET) * stride_t, (head < heads) & (token < tokens)


@triton.jit
def _probabilities(
    x_rows, stride_xc, ok_m, e, c, batch, heads, tokens, channels,
    PRECISION: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """softmax over the tokens of each head  [BLOCK_M, BLOCK_J] in float32; 0 where a head has none."""
    columns, ok_j = _columns(heads, tokens, e.strides[1], e.strides[2], OFFSET, BLOCK_H, BLOCK_T)
    s = narrow_product(
        x_rows, stride_xc, ok_m, e.ptr + batch * e.strides[0], e.strides[3], columns, ok_j, None, 1.0, channels,
        PRECISION, OFFSET, BLOCK_M, BLOCK_C, BLOCK_H * BLOCK_T,
    )  # fmt: skip
    if c is not None:
        columns, ok_j = _columns(heads, tokens, c.strides[1], c.strides[2], OFFSET, BLOCK_H, BLOCK_T)
        s += tl.load(c.ptr + batch * c.strides[0] + columns, mask=ok_j, other=0.0).to(tl.float32)[None, :]
    s = tl.reshape(tl.where(ok_j[None, :], s, -float("inf")), (BLOCK_M, BLOCK_H, BLOCK_T))
    top = tl.max(s, axis=2)
    p = tl.exp(s - tl.where(top == -float("inf"), 0.0, top)[:, :, None])
    total = tl.sum(p, axis=2)
    return tl.reshape(p / tl.where(total == 0.0, 1.0, total)[:, :, None], (BLOCK_M, BLOCK_H * BLOCK_T))


@triton.jit
def _output_tile(
    a, f_ptr, columns, ok_j, stride_fc, bias_ptr, offs_c, ok_c, PRECISION: tl.constexpr, OFFSET: tl.constexpr
):  # fmt: skip
    """o = a F + b_o  [BLOCK_M, BLOCK_C] in float32."""
    f = load_weight(f_ptr, columns, offs_c, 1, stride_fc, ok_j, ok_c, OFFSET)
    o = tl.dot(a, f, input_precision=PRECISION)
    if bias_ptr is not None:
        o += tl.load(bias_ptr + offs_c, mask=ok_c, other=0.0).to(tl.float32)[None, :]
    return o


@triton.jit
def _upstream_tile(dy_rows, stride_dyc, ok_m, gate, weight, offs_c, ok_c, OFFSET: tl.constexpr):
    """g = w dy  [BLOCK_M, BLOCK_C] in float32; with a gate that is w."""
    g = load_tile(dy_rows, offs_c, stride_dyc, ok_m, ok_c, OFFSET).to(tl.float32)
    if gate is None:
        return g * weight
    else:
        return g * load_vector(gate, offs_c, ok_c)[None, :]


@triton.jit
def _norms(
    a, f_ptr, columns, ok_j, stride_fc, bias_ptr, x_rows, stride_xc, dy_rows, stride_dyc, ok_m,
    gate, weight, channels,
    BACKWARD: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(|o|, |x|, g . o) of each row; the last is 0 but in BACKWARD."""
    square = tl.zeros((BLOCK_M,), dtype=tl.float32)
    square_x = tl.zeros((BLOCK_M,), dtype=tl.float32)
    along = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(tl.cdiv(channels, BLOCK_C)):
        offs_c = start * BLOCK_C + tl.arange(0, BLOCK_C)
        ok_c = offs_c < channels
        o = _output_tile(a, f_ptr, columns, ok_j, stride_fc, bias_ptr, offs_c, ok_c, PRECISION, OFFSET)
        square += tl.sum(o * o, axis=1)
        if BACKWARD:
            g = _upstream_tile(dy_rows, stride_dyc, ok_m, gate, weight, offs_c, ok_c, OFFSET)
            along += tl.sum(g * o, axis=1)
        x = load_tile(x_rows, offs_c, stride_xc, ok_m, ok_c, OFFSET).to(tl.float32)
        square_x += tl.sum(x * x, axis=1)
    return tl.sqrt(square), tl.sqrt(square_x), along


@triton.jit
def _matched_product(
    a, norm, rho, kappa, f_ptr, columns, ok_j, stride_fc, bias_ptr, dy_rows, stride_dyc, ok_m,
    gate, weight, root, channels,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """da = (rho g - kappa o) F^T / root  [BLOCK_M, BLOCK_J] in float32."""
    acc = tl.zeros((BLOCK_M, BLOCK_J), dtype=tl.float32)
    for start in range(tl.cdiv(channels, BLOCK_C)):
        offs_c = start * BLOCK_C + tl.arange(0, BLOCK_C)
        ok_c = offs_c < channels
        o = _output_tile(a, f_ptr, columns, ok_j, stride_fc, bias_ptr, offs_c, ok_c, PRECISION, OFFSET)
        g = _upstream_tile(dy_rows, stride_dyc, ok_m, gate, weight, offs_c, ok_c, OFFSET)
        do = (rho[:, None] * g - kappa[:, None] * o) / root
        if tl.float16 == DTYPE:
            # rho is |x| / eps where o is 0: times F or p = 0, where every key is masked, not NaN.
            do = tl.where(norm[:, None] == 0.0, tl.minimum(tl.maximum(do, -65504.0), 65504.0), do)
        f = load_weight(f_ptr, offs_c, columns, stride_fc, 1, ok_c, ok_j, OFFSET)  # [BLOCK_C, BLOCK_J]
        acc = tl.dot(do.to(DTYPE), f, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["length", "tiles_l", "threshold"])
def _cross_attention_fwd_kernel(
    x, e, c, f, bias_ptr, gate, y, p_ptr, seed_ptr, length, channels, heads, tokens, tiles_l,
    weight, eps, inverse_keep, threshold: tl.uint32,
    NORM_MATCH: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
    LENGTH_MULTIPLE_OF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """y and, with p_ptr, p of one tile of rows."""
    length = known_multiple(length, LENGTH_MULTIPLE_OF)
    batch, offs_l, rows, ok_m = tile_rows(tl.program_id(0), tiles_l, length, OFFSET, BLOCK_M)
    dtype = e.ptr.dtype.element_ty
    x_rows = row_pointers(x, batch, offs_l, OFFSET)
    p = _probabilities(
        x_rows, x.strides[2], ok_m, e, c, batch, heads, tokens, channels,
        PRECISION, OFFSET, BLOCK_M, BLOCK_C, BLOCK_H, BLOCK_T,
    )  # fmt: skip
    if p_ptr is not None:
        in_row, ok_j = _columns(heads, tokens, tokens, 1, OFFSET, BLOCK_H, BLOCK_T)
        p_ptrs = p_ptr + rows[:, None] * (heads * tokens) + in_row[None, :]
        tl.store(p_ptrs, p.to(dtype), mask=ok_m[:, None] & ok_j[None, :])
    if DROP:
        keep = dropout_keep_mask(tl.load(seed_ptr), rows, 0, threshold, BLOCK_M, BLOCK_H * BLOCK_T)
        p = tl.where(keep, p * inverse_keep, 0.0)
    a = p.to(dtype)  # [BLOCK_M, BLOCK_J]
    f_ptr = f.ptr + batch * f.strides[0]
    columns, ok_j = _columns(heads, tokens, f.strides[1], f.strides[2], OFFSET, BLOCK_H, BLOCK_T)
    if NORM_MATCH:
        norm, norm_x, _ = _norms(
            a, f_ptr, columns, ok_j, f.strides[3], bias_ptr, x_rows, x.strides[2], x_rows, x.strides[2], ok_m,
            gate, weight, channels, False, PRECISION, OFFSET, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        rho = norm_x * inverse_or_zero(norm + eps)
    y_rows = row_pointers(y, batch, offs_l, OFFSET)
    first_c = tl.arange(0, BLOCK_C)
    x_next = load_tile(x_rows, first_c, x.strides[2], ok_m, first_c < channels, OFFSET)
    for start in range(tl.cdiv(channels, BLOCK_C)):
        offs_c = start * BLOCK_C + tl.arange(0, BLOCK_C)
        ok_c = offs_c < channels
        # The next step's rows are under way during this one's product.
        x_tile, next_c = x_next.to(tl.float32), offs_c + BLOCK_C
        x_next = load_tile(x_rows, next_c, x.strides[2], ok_m, next_c < channels, OFFSET)
        out = _output_tile(a, f_ptr, columns, ok_j, f.strides[3], bias_ptr, offs_c, ok_c, PRECISION, OFFSET)
        if NORM_MATCH:
            out *= rho[:, None]
        if gate is None:
            out *= weight
        else:
            out *= load_vector(gate, offs_c, ok_c)[None, :]
        out += x_tile
        store_tile(y_rows, offs_c, y.strides[2], out, ok_m, ok_c, OFFSET)


@triton.jit(do_not_specialize=["length", "tiles_l", "threshold", "counters"])
def _cross_attention_bwd_rows_kernel(
    dy, x, e, c, f, bias_ptr, gate, p_ptr, dx, ds_ptr, seed_ptr, counter_ptr, rho_ptr, kappa_ptr, a_ptr,
    length, channels, heads, tokens, tiles_l, counters, weight, root, eps, inverse_keep, threshold: tl.uint32,
    NORM_MATCH: tl.constexpr, RECOMPUTE: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
    OFFSET: tl.constexpr, LENGTH_MULTIPLE_OF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """ds / root and, with dx, dx of one tile of rows; RECOMPUTE: p too; NORM_MATCH: rho, kappa and a."""
    if tl.program_id(0) == 0:
        # The sums over rows, which follow, count their programs here.
        for start in range(tl.cdiv(counters, 128)):
            offs = start * 128 + tl.arange(0, 128)
            tl.store(counter_ptr + offs, tl.zeros((128,), tl.int32), mask=offs < counters)
    length = known_multiple(length, LENGTH_MULTIPLE_OF)
    batch, offs_l, rows, ok_m = tile_rows(tl.program_id(0), tiles_l, length, OFFSET, BLOCK_M)
    dtype = ds_ptr.dtype.element_ty
    dy_rows = row_pointers(dy, batch, offs_l, OFFSET)
    # What stands for an x that is not given is not read.
    from_x = dy if x is None else x
    x_rows = row_pointers(from_x, batch, offs_l, OFFSET)
    in_row, ok_j = _columns(heads, tokens, tokens, 1, OFFSET, BLOCK_H, BLOCK_T)
    p_offs = rows[:, None] * (heads * tokens) + in_row[None, :]
    ok_p = ok_m[:, None] & ok_j[None, :]
    if RECOMPUTE:
        p = _probabilities(
            x_rows, from_x.strides[2], ok_m, e, c, batch, heads, tokens, channels,
            PRECISION, OFFSET, BLOCK_M, BLOCK_C, BLOCK_H, BLOCK_T,
        )  # fmt: skip
        # It waits in memory, where the sums over rows need it too: two such tiles do not fit in registers.
        tl.store(p_ptr + p_offs, p.to(dtype), mask=ok_p)
        tl.debug_barrier()
    if gate is not None:
        root = gate_root(gate, channels)
    columns, ok_j = _columns(heads, tokens, f.strides[1], f.strides[2], OFFSET, BLOCK_H, BLOCK_T)
    f_ptr = f.ptr + batch * f.strides[0]
    towards = tl.zeros((BLOCK_M,), dtype=tl.float32)
    # From here on gradients are divided by root.
    if NORM_MATCH:
        a = tl.load(p_ptr + p_offs, mask=ok_p, other=0.0).to(tl.float32)
        if DROP:
            keep = dropout_keep_mask(tl.load(seed_ptr), rows, 0, threshold, BLOCK_M, BLOCK_H * BLOCK_T)
            a = tl.where(keep, a * inverse_keep, 0.0)
        tl.store(a_ptr + p_offs, a, mask=ok_p)
        a = a.to(dtype)
        norm, norm_x, along = _norms(
            a, f_ptr, columns, ok_j, f.strides[3], bias_ptr, x_rows, from_x.strides[2], dy_rows, dy.strides[2], ok_m,
            gate, weight, channels, True, PRECISION, OFFSET, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        inverse = inverse_or_zero(norm + eps)
        rho = norm_x * inverse
        kappa = along * rho * inverse * inverse_or_zero(norm)
        towards = along * inverse * inverse_or_zero(norm_x) / root
        tl.store(rho_ptr + rows, rho, mask=ok_m)
        tl.store(kappa_ptr + rows, kappa, mask=ok_m)
        da = _matched_product(
            a, norm, rho, kappa, f_ptr, columns, ok_j, f.strides[3], bias_ptr, dy_rows, dy.strides[2], ok_m,
            gate, weight, root, channels,
            dtype, PRECISION, OFFSET, BLOCK_M, BLOCK_C, BLOCK_H * BLOCK_T,
        )  # fmt: skip
    else:
        da = narrow_product(
            dy_rows, dy.strides[2], ok_m, f_ptr, f.strides[3], columns, ok_j, gate, 1.0 if gate is None else root,
            channels, PRECISION, OFFSET, BLOCK_M, BLOCK_C, BLOCK_H * BLOCK_T,
        )  # fmt: skip
        if gate is None:
            da *= weight / root
    p = tl.load(p_ptr + p_offs, mask=ok_p, other=0.0).to(tl.float32)
    if DROP:
        keep = dropout_keep_mask(tl.load(seed_ptr), rows, 0, threshold, BLOCK_M, BLOCK_H * BLOCK_T)
        da = tl.where(keep, da * inverse_keep, 0.0)
    grouped = tl.reshape(p, (BLOCK_M, BLOCK_H, BLOCK_T))
    dp = tl.reshape(da, (BLOCK_M, BLOCK_H, BLOCK_T))
    ds = tl.reshape(grouped * (dp - tl.sum(grouped * dp, axis=2)[:, :, None]), (BLOCK_M, BLOCK_H * BLOCK_T))
    ds = ds.to(dtype)  # [BLOCK_M, BLOCK_J]
    tl.store(ds_ptr + p_offs, ds, mask=ok_p)
    if dx is not None:
        dx_rows = row_pointers(dx, batch, offs_l, OFFSET)
        columns, ok_j = _columns(heads, tokens, e.strides[1], e.strides[2], OFFSET, BLOCK_H, BLOCK_T)
        e_ptr = e.ptr + batch * e.strides[0]
        first_c = tl.arange(0, BLOCK_C)
        dy_next = load_tile(dy_rows, first_c, dy.strides[2], ok_m, first_c < channels, OFFSET)
        for start in range(tl.cdiv(channels, BLOCK_C)):
            offs_c = start * BLOCK_C + tl.arange(0, BLOCK_C)
            ok_c = offs_c < channels
            dy_tile, next_c = dy_next.to(tl.float32), offs_c + BLOCK_C
            dy_next = load_tile(dy_rows, next_c, dy.strides[2], ok_m, next_c < channels, OFFSET)
            e_tile = load_weight(e_ptr, columns, offs_c, 1, e.strides[3], ok_j, ok_c, OFFSET)
            out = tl.dot(ds, e_tile, input_precision=PRECISION)  # [BLOCK_M, BLOCK_C]
            if NORM_MATCH:
                out += towards[:, None] * load_tile(x_rows, offs_c, x.strides[2], ok_m, ok_c, OFFSET).to(tl.float32)
            out = out * root + dy_tile
            store_tile(dx_rows, offs_c, dx.strides[2], out, ok_m, ok_c, OFFSET)


@triton.jit(do_not_specialize=["length", "tiles_l", "per_context", "steps", "splits", "threshold"])
def _cross_attention_bwd_weights_kernel(
    dy, x, f, bias_ptr, p_ptr, ds_ptr, rho_ptr, largest_ptr, gate, seed_ptr, parts_ptr, counter_ptr,
    de_ptr, dc_ptr, df_ptr, d_bias_ptr, d_gate_ptr,
    length, channels, heads, tokens, tiles_l, per_context, steps, splits, weight, root, inverse_keep,
    threshold: tl.uint32,
    NEED_KEYS: tl.constexpr, NEED_VALUES: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
    OFFSET: tl.constexpr, LENGTH_MULTIPLE_OF: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_T: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums over the rows of each context, cut into ``splits``, and the gradients that are made of them.

    Each program leaves its part in its split's slot of parts; in the last slot, when all are done, they are summed. A
    slot holds dE^T / root and G^T (BLOCK_C, COLUMNS each), then the sums of ds / root (COLUMNS) and rho dy (BLOCK_C);
    G's is root times as large where dy is wider than the products. With rho_ptr a and dy are weighted by it, at most 1.
    """
    length = known_multiple(length, LENGTH_MULTIPLE_OF)
    # One dimension holds them all: the others end at 65,535, and there may be more contexts.
    tiles_c, tiles_j = tl.cdiv(channels, BLOCK_C), COLUMNS // BLOCK_J
    pid_c, pid_j = tl.program_id(0) % tiles_c, tl.program_id(0) // tiles_c % tiles_j
    series = tl.program_id(0) // (tiles_c * tiles_j)
    context, split = series // splits, series % splits
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_j = pid_j * BLOCK_J + tl.arange(0, BLOCK_J)
    ok_c = offs_c < channels
    head, token = offs_j // BLOCK_T, offs_j % BLOCK_T
    in_row, ok_j = head * tokens + token, (head < heads) & (token < tokens)
    dtype = ds_ptr.dtype.element_ty
    WIDER: tl.constexpr = dy.ptr.dtype.element_ty != dtype
    keys = tl.zeros((BLOCK_C, BLOCK_J), dtype=tl.float32)
    outer = tl.zeros((BLOCK_C, BLOCK_J), dtype=tl.float32)
    sum_ds = tl.zeros((BLOCK_J,), dtype=tl.float32)
    sum_dy = tl.zeros((BLOCK_C,), dtype=tl.float32)
    if gate is not None:
        root = gate_root(gate, channels)
    for step in range(steps):
        in_context = split * steps + step
        batch, offs_l, rows, ok_m = tile_rows(context * per_context + in_context, tiles_l, length, OFFSET, BLOCK_M)
        ok_m = ok_m & (in_context < per_context)
        p_offs = rows[:, None] * (heads * tokens) + in_row[None, :]
        ok_p = ok_m[:, None] & ok_j[None, :]
        if NEED_KEYS:
            ds = tl.load(ds_ptr + p_offs, mask=ok_p, other=0.0)  # [BLOCK_M, BLOCK_J]
            if x is not None:
                x_rows = row_pointers(x, batch, offs_l, OFFSET)
                x_tile = load_tile(x_rows, offs_c, x.strides[2], ok_m, ok_c, OFFSET)  # [BLOCK_M, BLOCK_C]
                keys = tl.dot(tl.trans(x_tile.to(dtype)), ds, keys, input_precision=PRECISION)
            sum_ds += tl.sum(ds.to(tl.float32), axis=0)
        if NEED_VALUES:
            dy_rows = row_pointers(dy, batch, offs_l, OFFSET)
            dy_tile = load_tile(dy_rows, offs_c, dy.strides[2], ok_m, ok_c, OFFSET)  # [BLOCK_M, BLOCK_C]
            a = tl.load(p_ptr + p_offs, mask=ok_p, other=0.0).to(tl.float32)
            if DROP:
                keep = dropout_keep_mask(tl.load(seed_ptr), rows, pid_j * BLOCK_J, threshold, BLOCK_M, BLOCK_J)
                a = tl.where(keep, a * inverse_keep, 0.0)
            g = dy_tile.to(tl.float32)
            if rho_ptr is not None:
                rho = tl.load(rho_ptr + rows, mask=ok_m, other=0.0)
                a *= rho[:, None]
                g *= rho[:, None]
            if WIDER:
                dy_tile = dy_tile.to(tl.float32) * root
            outer = tl.dot(tl.trans(dy_tile.to(dtype)), a.to(dtype), outer, input_precision=PRECISION)
            sum_dy += tl.sum(g, axis=0)

    groups = tl.cdiv(splits, GROUP)
    slot_size = 2 * BLOCK_C * COLUMNS + COLUMNS + BLOCK_C
    sums = context.to(tl.int64) * tiles_c + pid_c
    parts_ptr += sums * (splits + groups + 1) * slot_size
    slot_ptr = parts_ptr + split.to(tl.int64) * slot_size
    at = tl.arange(0, BLOCK_C)[:, None] * COLUMNS + offs_j[None, :]
    tl.store(slot_ptr + at, keys)
    tl.store(slot_ptr + BLOCK_C * COLUMNS + at, outer)
    tl.store(slot_ptr + 2 * BLOCK_C * COLUMNS + offs_j, sum_ds)
    if pid_j == 0:
        tl.store(slot_ptr + 2 * BLOCK_C * COLUMNS + COLUMNS + tl.arange(0, BLOCK_C), sum_dy)
    if sums_slots(parts_ptr, slot_size, counter_ptr + sums * (groups + 1), split, splits, tiles_j, GROUP):
        _write_gradients(
            parts_ptr + (splits + groups).to(tl.int64) * slot_size, f, bias_ptr, gate, weight, root, largest_ptr,
            de_ptr, dc_ptr, df_ptr, d_bias_ptr, d_gate_ptr, context, pid_c, channels, heads, tokens,
            WIDER, NEED_KEYS, NEED_VALUES, BLOCK_C, BLOCK_J, BLOCK_T, COLUMNS,
        )  # fmt: skip


@triton.jit
def _write_gradients(
    total_ptr, f, bias_ptr, gate, weight, root, largest_ptr,
    de_ptr, dc_ptr, df_ptr, d_bias_ptr, d_gate_ptr, context, pid_c, channels, heads, tokens,
    WIDER_DY: tl.constexpr, NEED_KEYS: tl.constexpr, NEED_VALUES: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_T: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK_C channels of a context, contiguous, from the slot that holds their sums.

    With largest_ptr G and the sum of dy are that much larger than what the slot holds.
    """
    in_slot = tl.arange(0, BLOCK_C)
    offs_c = pid_c * BLOCK_C + in_slot
    ok_c = offs_c < channels
    scale = tl.zeros((BLOCK_C,), tl.float32) + weight if gate is None else load_vector(gate, offs_c, ok_c)
    larger = 1.0 if largest_ptr is None else tl.load(largest_ptr)
    d_gate = tl.zeros((BLOCK_C,), dtype=tl.float32)
    vectors_ptr = total_ptr + 2 * BLOCK_C * COLUMNS
    f_ptr = f.ptr + context.to(tl.int64) * f.strides[0]
    first = context.to(tl.int64) * heads * tokens
    for tile_j in range(COLUMNS // BLOCK_J):
        offs_j = tile_j * BLOCK_J + tl.arange(0, BLOCK_J)
        head, token = offs_j // BLOCK_T, offs_j % BLOCK_T
        ok_j = (head < heads) & (token < tokens)
        ok = ok_c[:, None] & ok_j[None, :]
        at = in_slot[:, None] * COLUMNS + offs_j[None, :]
        to_row = first + head * tokens + token
        to = to_row[None, :] * channels + offs_c[:, None]
        if NEED_KEYS:
            tl.store(de_ptr + to, load_part(total_ptr + at, ok) * root, mask=ok)
            if dc_ptr is not None:
                sum_ds = load_part(vectors_ptr + offs_j, ok_j) * root
                tl.store(dc_ptr + to_row, sum_ds.to(dc_ptr.dtype.element_ty), mask=ok_j & (pid_c == 0))
        if NEED_VALUES:
            outer = load_part(total_ptr + BLOCK_C * COLUMNS + at, ok) * larger  # [BLOCK_C, BLOCK_J]
            if WIDER_DY:
                outer = outer / root
            f_offs = head.to(tl.int64) * f.strides[1] + token * f.strides[2]
            f_tile = tl.load(f_ptr + f_offs[None, :] + offs_c[:, None] * f.strides[3], mask=ok, other=0.0)
            d_gate += tl.sum(outer * f_tile.to(tl.float32), axis=1)
            tl.store(df_ptr + to, outer * scale[:, None], mask=ok)
    if NEED_VALUES:
        if bias_ptr is not None:
            sum_dy = load_part(vectors_ptr + COLUMNS + in_slot, ok_c) * larger
            d_gate += sum_dy * tl.load(bias_ptr + offs_c, mask=ok_c, other=0.0).to(tl.float32)
            d_bias = (scale * sum_dy).to(d_bias_ptr.dtype.element_ty)
            tl.store(d_bias_ptr + context.to(tl.int64) * channels + offs_c, d_bias, mask=ok_c)
        tl.store(d_gate_ptr + context.to(tl.int64) * channels + offs_c, d_gate, mask=ok_c)


@per_signature
def cross_attention_residual_fwd(
    x: torch.Tensor,
    e: torch.Tensor,
    c: torch.Tensor | None,
    f: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    seed: torch.Tensor | None,
    weight: float,
    norm_match: bool,
    eps: float,
    dropout_p: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, L, C) in x's dtype, p in e's; see `pyfused.ops.cross_attention_residual` for the contract."""
    (batch, length, channels), (heads, tokens) = x.shape, e.shape[1:3]
    y = x.new_empty(x.shape)
    p = e.new_empty((batch, length, heads * tokens) if save else 0)
    if batch * length == 0:
        return y, p
    block_h, block_t = _blocks(heads, tokens)
    beside = _beside(e.dtype, block_h * block_t, dropout_p, norm_match)
    shared = _shared(e, c, f, bias, gate, block_h, block_t)
    config = configuration(
        _cross_attention_fwd_kernel, rows_config, x.device, batch, length, channels, block_h * block_t, e.dtype,
        vectorised=vectorised(x, y), beside=beside,
    )  # fmt: skip
    tiles_l = triton.cdiv(length, config.block_m)
    with torch.cuda.device_of(x):
        launch(
            _cross_attention_fwd_kernel, (batch * tiles_l,), **shared,
            x=mat(x), y=mat(y), p_ptr=p if save else None,
            **row_length(length, x, y), channels=channels, tiles_l=tiles_l,
            weight=weight, eps=eps, **dropout_arguments(seed, dropout_p),
            NORM_MATCH=norm_match, DROP=dropout_p > 0.0, OFFSET=offset_type(x, y, e, f),
            BLOCK_M=config.block_m, BLOCK_C=config.block_c,
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    return y, p


@per_signature
def cross_attention_residual_bwd(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    e: torch.Tensor,
    c: torch.Tensor | None,
    f: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    p: torch.Tensor | None,
    seed: torch.Tensor | None,
    weight: float,
    norm_match: bool,
    eps: float,
    dropout_p: float,
    need_dx: bool,
    need_keys: bool,
    need_values: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx in dy's dtype, dc and db_o in their tensors' dtypes, dE, dF, dw (C,) in float32; empty where not needed."""
    (batch, length, channels), (contexts, heads, tokens) = dy.shape, e.shape[:3]
    wide: dict[str, Any] = {"dtype": torch.float32}
    nothing = e.new_empty
    dx = dy.new_empty(dy.shape) if need_dx else dy.new_empty(0)
    block_h, block_t = _blocks(heads, tokens)
    rows, columns, padded = batch * length, heads * tokens, block_h * block_t
    rho, kappa, a = (nothing((rows, n), **wide) if norm_match else None for n in (1, 1, columns))
    beside = 1 + _beside(e.dtype, padded, dropout_p, norm_match)
    shared = _shared(e, c, f, bias, gate, block_h, block_t)
    size = dy.device, batch, length, channels, padded, e.dtype
    kind: dict[str, Any] = {"vectorised": vectorised(dy, x, dx if need_dx else None), "beside": beside}
    rows_cfg = configuration(
        _cross_attention_bwd_rows_kernel, rows_config, *size, **kind
    )  # fmt: skip
    sums_cfg = configuration(_cross_attention_bwd_weights_kernel, weights_config, *size, **kind, groups=contexts)
    block_j = min(sums_cfg.block_h, padded)
    # The channels in whole tiles: what the sums leave beyond C is cut off.
    tiles_c = triton.cdiv(channels, sums_cfg.block_c)
    tiles_l = triton.cdiv(length, sums_cfg.block_m)
    per_context = batch // contexts * tiles_l
    steps = max(1, triton.cdiv(per_context, sums_cfg.splits))
    splits = max(1, triton.cdiv(per_context, steps))
    groups = triton.cdiv(splits, SLOTS_PER_GROUP)
    counter = nothing((contexts, tiles_c, groups + 1), dtype=torch.int32)
    slot_size = (2 * sums_cfg.block_c + 1) * padded + sums_cfg.block_c
    parts = nothing((contexts, tiles_c, splits + groups + 1, slot_size), **wide)
    recompute = p is None
    ds = nothing((rows, columns))
    p = torch.empty_like(ds) if recompute else p
    arguments = {
        "dy": mat(dy), "p_ptr": p, "ds_ptr": ds, "rho_ptr": rho, "counter_ptr": counter, "channels": channels,
        "weight": weight, "root": math.sqrt(abs(weight)) or 1.0, **dropout_arguments(seed, dropout_p),
        "DROP": dropout_p > 0.0,
    }  # fmt: skip
    # One empty tensor for all that is not needed would be outputs that alias.
    de, df, d_gate = (nothing(0, **wide) for _ in range(3))
    dc, d_bias = nothing(0), nothing(0)
    made = e.new_zeros if rows == 0 else nothing
    # A mask of each image over a context that they share has its own way.
    of_images = c is not None and len(c) != contexts
    if need_keys:
        de = made(e.shape, **wide)
        dc = dc if c is None else made(c.shape, dtype=c.dtype)
    if need_values:
        of_channels = channels if contexts == 1 else (contexts, channels)
        df, d_gate = made(f.shape, **wide), made(of_channels, **wide)
        if bias is not None:
            # What is to be added to is not rounded yet.
            in_parts = contexts > 1 or norm_match
            d_bias = made(of_channels, dtype=torch.float32 if in_parts else bias.dtype)
    if rows > 0:
        with torch.cuda.device_of(dy):
            row_tiles = triton.cdiv(length, rows_cfg.block_m)
            from_x = x if recompute or norm_match else None
            launch(
                _cross_attention_bwd_rows_kernel, (batch * row_tiles,), **arguments, **shared,
                x=mat(from_x), dx=mat(dx) if need_dx else None, kappa_ptr=kappa, a_ptr=a,
                **row_length(length, dy, from_x, dx if need_dx else None),
                tiles_l=row_tiles, counters=counter.numel(),
                eps=eps, NORM_MATCH=norm_match, RECOMPUTE=recompute, OFFSET=offset_type(dy, x, e, f),
                BLOCK_M=rows_cfg.block_m, BLOCK_C=rows_cfg.block_c,
                num_warps=rows_cfg.num_warps, num_stages=rows_cfg.num_stages, maxnreg=MAX_REGISTERS,
            )  # fmt: skip
            if not (need_keys or need_values):
                return dx, de, dc, df, d_bias, d_gate
            largest = None
            if norm_match:
                # Of rho a float16 does not hold what it holds of a: |x| / eps where o is smaller.
                largest = rho.amax()
                largest = torch.where(largest == 0.0, 1.0, largest)
                arguments["rho_ptr"] = rho / largest
            launch(
                _cross_attention_bwd_weights_kernel, (tiles_c * (padded // block_j) * contexts * splits,),
                **arguments, **{name: shared[name] for name in ("f", "bias_ptr", "gate", "heads", "tokens")},
                x=mat(x) if need_keys else None, parts_ptr=parts, largest_ptr=largest,
                de_ptr=de if need_keys else None, dc_ptr=None if not need_keys or c is None or of_images else dc,
                df_ptr=df if need_values else None, d_gate_ptr=d_gate if need_values else None,
                d_bias_ptr=d_bias if need_values and bias is not None else None,
                **row_length(length, dy, x if need_keys else None), PRECISION=shared["PRECISION"],
                tiles_l=tiles_l, per_context=per_context, steps=steps, splits=splits,
                NEED_KEYS=need_keys, NEED_VALUES=need_values, OFFSET=offset_type(dy, x), GROUP=SLOTS_PER_GROUP,
                BLOCK_M=sums_cfg.block_m, BLOCK_C=sums_cfg.block_c, BLOCK_J=block_j, BLOCK_T=block_t, COLUMNS=padded,
                num_warps=sums_cfg.num_warps, num_stages=sums_cfg.num_stages, maxnreg=MAX_REGISTERS,
            )  # fmt: skip
    if need_keys and of_images:
        root = arguments["root"] if gate is None else _root(gate)
        dc = (ds.view(batch, length, heads, tokens).sum(1, dtype=torch.float32) * root).to(c.dtype)
    if need_values and contexts > 1:
        d_gate = d_gate.sum(0)
    if need_values and bias is not None and contexts > 1:
        d_bias = d_bias.sum(0)
    if need_values and norm_match and rows > 0:
        of_norms = _through_norms(f, bias, a, kappa)
        df -= of_norms[:, :columns].view(df.shape)
        if bias is not None:
            d_bias -= of_norms[:, -1].sum(0)
    if need_values and bias is not None and d_bias.dtype != bias.dtype:
        d_bias = d_bias.to(bias.dtype)
    return dx, de, dc, df, d_bias, d_gate


def _through_norms(f, bias, a, kappa) -> torch.Tensor:
    """The norms' part of dF and, below it, of db_o: (kappa a)^T o with o = a F + b_o."""
    contexts, heads, tokens, _ = f.shape
    values = f.flatten(1, 2).to(torch.float32)
    a = a.view(contexts, -1, heads * tokens)
    if bias is not None:
        values = torch.cat((values, bias.expand(contexts, 1, -1)), dim=1)
        a = torch.nn.functional.pad(a, (0, 1), value=1.0)
    weighted = (kappa.view(contexts, a.shape[1], 1) * a).mT
    # The shorter way cancels where o is small against F: what is left are more digits than 16 bits have.
    return weighted @ (a @ values) if f.dtype == torch.float32 else weighted @ a @ values


def _beside(dtype: torch.dtype, padded: int, dropout_p: float, norm_match: bool) -> int:
    """Tiles that live beside the logits in forward: the mask, or a tile of o for its norm."""
    return int(padded >= 64 or dropout_p > 0.0 or norm_match) + (dtype == torch.float32)


def _root(gate: torch.Tensor) -> torch.Tensor:
    """As `gate_root` has it."""
    largest = gate.to(torch.float32).abs().amax()
    return torch.where(largest < 1e-30, 1.0, largest).sqrt()


def _blocks(heads: int, tokens: int) -> tuple[int, int]:
    """BLOCK_H and BLOCK_T: a matrix instruction takes 16 columns at least."""
    block_t = triton.next_power_of_2(tokens)
    return max(triton.next_power_of_2(heads), 16 // block_t), block_t


def _shared(e, c, f, bias, gate, block_h: int, block_t: int) -> dict[str, object]:
    """The arguments that forward and backward have in common; what serves all images has a stride of 0 between them."""
    return {
        "e": mat(e), "c": mat(c), "f": mat(f), "gate": mat(gate),
        "bias_ptr": None if bias is None else bias.contiguous(),
        "heads": e.shape[1], "tokens": e.shape[2], "PRECISION": dot_precision(e.dtype),
        "BLOCK_H": block_h, "BLOCK_T": block_t,
    }  # fmt: skip
