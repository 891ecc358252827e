"""``adapter_residual`` in Triton.

    y = r + k gamma * (skip z + a U^T + u)         a = drop(phi(h)), h = z D^T + d
    dh = k mask phi'(h) * (dy (gamma U)) / (1 - p)     dz = dh D + skip k gamma dy, plus dy if z is the residual
    dD = dh^T z    dd = sum dh    G = k dy^T a    dU = gamma G    du = gamma sum k dy
    dgamma = skip sum k dy z + rowsum(U G) + u sum k dy

One launch forward, two backward: a pass over tiles of rows, and the sums over rows. Letters: M rows, C channels, H the
narrow width; z is (B, L, C) with any strides and row m is b * L + l; h and dh are (M, H). dh is kept divided by the
root of the largest |gamma|, which is inside float16's range for small gammas and for scaled losses.
"""

import torch
import triton
import triton.language as tl

from pyfused.kernels.bottleneck_config import rows_config, weights_config
from pyfused.kernels.device import activation, activation_slope, dropout_keep_mask, known_multiple
from pyfused.kernels.launch import (
    MAX_REGISTERS,
    block_width,
    configuration,
    dot_precision,
    dropout_arguments,
    launch,
    offset_type,
    row_length,
    rows_like,
    strides,
    vectorised,
)
from pyfused.kernels.sums import load_part, sums_slots
from pyfused.kernels.tiles import (
    copy_rows,
    gate_root,
    load_tile,
    load_weight,
    narrow_product,
    row_pointers,
    sample_of_rows,
    store_tile,
    tile_rows,
)

# Splits of the sums over rows whose parts one program adds up.
_GROUP = 16


@triton.jit
def _pre_activation(
    z_rows, stride_zc, ok_m, down_ptr, d_bias_ptr, stride_downc, stride_downh, stride_d_bias, channels, width,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """h = z D^T + d  [BLOCK_M, BLOCK_H] in float32; 0 in columns beyond the width."""
    offs_h = tl.arange(0, BLOCK_H)
    h = narrow_product(
        z_rows, stride_zc, ok_m, down_ptr, stride_downc, offs_h.to(OFFSET) * stride_downh, offs_h < width, None, 0, 1.0,
        channels, DTYPE, PRECISION, OFFSET, BLOCK_M, BLOCK_C, BLOCK_H,
    )  # fmt: skip
    if d_bias_ptr is not None:
        bias = tl.load(d_bias_ptr + offs_h * stride_d_bias, mask=offs_h < width, other=0.0)
        h += bias.to(DTYPE).to(tl.float32)[None, :]
    return h


@triton.jit(do_not_specialize=["length", "tiles_l", "per_sample", "threshold"])
def _adapter_fwd_kernel(
    z_ptr, down_ptr, d_bias_ptr, up_ptr, u_bias_ptr, r_ptr, gamma_ptr, sample_ptr, y_ptr, h_ptr, seed_ptr,
    length, channels, width, tiles_l, per_sample,
    stride_zb, stride_zl, stride_zc, stride_downh, stride_downc, stride_upc, stride_uph,
    stride_rb, stride_rl, stride_rc, stride_yb, stride_yl, stride_yc,
    stride_d_bias, stride_u_bias, stride_gamma, stride_sample,
    skip, inverse_keep, threshold: tl.uint32,
    ACTIVATION: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
    LENGTH_MULTIPLE_OF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """y and, with h_ptr, h of one tile of rows. Tiles of dropped samples copy the residual and compute nothing."""
    length = known_multiple(length, LENGTH_MULTIPLE_OF)
    batch, offs_l, rows, ok_m = tile_rows(tl.program_id(0), tiles_l, length, OFFSET, BLOCK_M)
    dtype = z_ptr.dtype.element_ty
    z_rows = row_pointers(z_ptr, batch, offs_l, stride_zb, stride_zl, OFFSET)
    y_rows = row_pointers(y_ptr, batch, offs_l, stride_yb, stride_yl, OFFSET)
    r_rows = z_rows if r_ptr is None else row_pointers(r_ptr, batch, offs_l, stride_rb, stride_rl, OFFSET)
    offs_h = tl.arange(0, BLOCK_H)
    ok_h = offs_h < width
    h_ptrs = None if h_ptr is None else h_ptr + rows[:, None] * width + offs_h[None, :]
    ok_z = ok_m
    live = True
    if sample_ptr is not None:
        k = sample_of_rows(sample_ptr, stride_sample, rows, ok_m, per_sample)
        ok_z = ok_m & (k != 0.0)
        live = tl.max(ok_z.to(tl.int32)) > 0
    if live:
        h = _pre_activation(
            z_rows, stride_zc, ok_z, down_ptr, d_bias_ptr, stride_downc, stride_downh, stride_d_bias, channels, width,
            dtype, PRECISION, OFFSET, BLOCK_M, BLOCK_C, BLOCK_H,
        )  # fmt: skip
        if h_ptr is not None:
            tl.store(h_ptrs, h.to(dtype), mask=ok_m[:, None] & ok_h[None, :])
        a = activation(h, ACTIVATION)
        if DROP:
            keep = dropout_keep_mask(tl.load(seed_ptr), rows, 0, threshold, BLOCK_M, BLOCK_H)
            a = tl.where(keep, a * inverse_keep, 0.0)
        a = a.to(dtype)  # [BLOCK_M, BLOCK_H]
        for start in range(tl.cdiv(channels, BLOCK_C)):
            offs_c = start * BLOCK_C + tl.arange(0, BLOCK_C)
            ok_c = offs_c < channels
            u = load_weight(up_ptr, offs_h, offs_c, stride_uph, stride_upc, ok_h, ok_c, dtype, OFFSET)
            z = load_tile(z_rows, offs_c, stride_zc, ok_z, ok_c, OFFSET).to(tl.float32)
            out = tl.dot(a, u, input_precision=PRECISION) + skip * z  # [BLOCK_M, BLOCK_C]
            if u_bias_ptr is not None:
                bias = tl.load(u_bias_ptr + offs_c * stride_u_bias, mask=ok_c, other=0.0)
                out += bias.to(dtype).to(tl.float32)[None, :]
            if gamma_ptr is not None:
                out *= tl.load(gamma_ptr + offs_c * stride_gamma, mask=ok_c, other=0.0).to(tl.float32)[None, :]
            if r_ptr is None and sample_ptr is None:
                out += z
            else:
                # A dropped row of z is the residual too, whatever it holds.
                stride_c = stride_zc if r_ptr is None else stride_rc
                r = load_tile(r_rows, offs_c, stride_c, ok_m, ok_c, OFFSET).to(tl.float32)
                if sample_ptr is None:
                    out += r
                else:
                    out = tl.where(ok_z[:, None], out * k[:, None] + r, r)
            store_tile(y_rows, offs_c, stride_yc, out, ok_m, ok_c, OFFSET)
    else:
        stride_c = stride_zc if r_ptr is None else stride_rc
        copy_rows(r_rows, stride_c, y_rows, stride_yc, ok_m, ok_m, channels, OFFSET, BLOCK_C)
        if h_ptr is not None:
            tl.store(h_ptrs, tl.zeros((BLOCK_M, BLOCK_H), dtype), mask=ok_m[:, None] & ok_h[None, :])


@triton.jit(do_not_specialize=["length", "tiles_l", "per_sample", "threshold", "counters"])
def _adapter_bwd_rows_kernel(
    dy_ptr, z_ptr, h_ptr, down_ptr, d_bias_ptr, up_ptr, gamma_ptr, sample_ptr, dz_ptr, dh_ptr, seed_ptr, counter_ptr,
    length, channels, width, tiles_l, per_sample, counters,
    stride_dyb, stride_dyl, stride_dyc, stride_zb, stride_zl, stride_zc, stride_dzb, stride_dzl, stride_dzc,
    stride_downh, stride_downc, stride_upc, stride_uph, stride_d_bias, stride_gamma, stride_sample,
    skip, inverse_keep, threshold: tl.uint32,
    ACTIVATION: tl.constexpr, RECOMPUTE: tl.constexpr, Z_IS_RESIDUAL: tl.constexpr, DROP: tl.constexpr,
    PRECISION: tl.constexpr, OFFSET: tl.constexpr, LENGTH_MULTIPLE_OF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_ALL: tl.constexpr,
):  # fmt: skip
    """dh and, with dz_ptr, dz of one tile of rows; RECOMPUTE: h too. Tiles of dropped samples compute nothing."""
    if tl.program_id(0) == 0:
        # The sums over rows, which follow, count their programs here.
        for start in range(tl.cdiv(counters, 128)):
            offs = start * 128 + tl.arange(0, 128)
            tl.store(counter_ptr + offs, tl.zeros((128,), tl.int32), mask=offs < counters)
    length = known_multiple(length, LENGTH_MULTIPLE_OF)
    batch, offs_l, rows, ok_m = tile_rows(tl.program_id(0), tiles_l, length, OFFSET, BLOCK_M)
    dtype = dh_ptr.dtype.element_ty
    dy_rows = row_pointers(dy_ptr, batch, offs_l, stride_dyb, stride_dyl, OFFSET)
    offs_h = tl.arange(0, BLOCK_H)
    ok_h = offs_h < width
    h_offs = rows[:, None] * width + offs_h[None, :]
    ok_live = ok_m
    live = True
    if sample_ptr is not None:
        k = sample_of_rows(sample_ptr, stride_sample, rows, ok_m, per_sample)
        ok_live = ok_m & (k != 0.0)
        live = tl.max(ok_live.to(tl.int32)) > 0
    if live:
        ok_h_tile = ok_live[:, None] & ok_h[None, :]
        if RECOMPUTE:
            z_rows = row_pointers(z_ptr, batch, offs_l, stride_zb, stride_zl, OFFSET)
            h = _pre_activation(
                z_rows, stride_zc, ok_live, down_ptr, d_bias_ptr, stride_downc, stride_downh, stride_d_bias, channels,
                width, dtype, PRECISION, OFFSET, BLOCK_M, BLOCK_C, BLOCK_H,
            )  # fmt: skip
            # It waits in memory, where the sums over rows need it too: two such tiles do not fit in registers.
            tl.store(h_ptr + h_offs, h.to(dtype), mask=ok_h_tile)
            tl.debug_barrier()
        root = 1.0
        if gamma_ptr is not None:
            root = gate_root(gamma_ptr, stride_gamma, channels, BLOCK_ALL)
        t = narrow_product(
            dy_rows, stride_dyc, ok_live, up_ptr, stride_upc, offs_h.to(OFFSET) * stride_uph, ok_h, gamma_ptr,
            stride_gamma, root, channels, dtype, PRECISION, OFFSET, BLOCK_M, BLOCK_C, BLOCK_H,
        )  # fmt: skip
        if DROP:
            keep = dropout_keep_mask(tl.load(seed_ptr), rows, 0, threshold, BLOCK_M, BLOCK_H)
            t = tl.where(keep, t * inverse_keep, 0.0)
        if sample_ptr is not None:
            t *= k[:, None]
        h = tl.load(h_ptr + h_offs, mask=ok_h_tile, other=0.0).to(tl.float32)
        dh = (t * activation_slope(h, ACTIVATION)).to(dtype)  # [BLOCK_M, BLOCK_H]
        tl.store(dh_ptr + h_offs, dh, mask=ok_h_tile)
        if dz_ptr is not None:
            dz_rows = row_pointers(dz_ptr, batch, offs_l, stride_dzb, stride_dzl, OFFSET)
            for start in range(tl.cdiv(channels, BLOCK_C)):
                offs_c = start * BLOCK_C + tl.arange(0, BLOCK_C)
                ok_c = offs_c < channels
                d = load_weight(down_ptr, offs_h, offs_c, stride_downh, stride_downc, ok_h, ok_c, dtype, OFFSET)
                out = tl.dot(dh, d, input_precision=PRECISION) * root  # [BLOCK_M, BLOCK_C]
                dy = load_tile(dy_rows, offs_c, stride_dyc, ok_m, ok_c, OFFSET).to(tl.float32)
                direct = skip * dy
                if gamma_ptr is not None:
                    direct *= tl.load(gamma_ptr + offs_c * stride_gamma, mask=ok_c, other=0.0).to(tl.float32)[None, :]
                if sample_ptr is not None:
                    direct = tl.where(ok_live[:, None], direct * k[:, None], 0.0)
                out += direct
                if Z_IS_RESIDUAL:
                    out += dy
                store_tile(dz_rows, offs_c, stride_dzc, out, ok_m, ok_c, OFFSET)
    elif dz_ptr is not None:
        dz_rows = row_pointers(dz_ptr, batch, offs_l, stride_dzb, stride_dzl, OFFSET)
        # Without a residual gradient to pass on, nothing is read: dz is 0.
        copy_rows(dy_rows, stride_dyc, dz_rows, stride_dzc, ok_m, ok_m & Z_IS_RESIDUAL, channels, OFFSET, BLOCK_C)


@triton.jit
def _weights_tile(
    dy_ptr, z_ptr, h_ptr, dh_ptr, seed_ptr, batch, offs_l, rows, ok_m, k, offs_c, first_h, channels, width,
    stride_dyb, stride_dyl, stride_dyc, stride_zb, stride_zl, stride_zc, inverse_keep, threshold, root,
    down, outer, sum_dh, sum_dy, sum_dyz,
    NEED_DOWN: tl.constexpr, NEED_UP: tl.constexpr, ACTIVATION: tl.constexpr, DROP: tl.constexpr,
    PRECISION: tl.constexpr, OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """What one tile of rows adds to every sum, to G ``root`` times that if dy is wider than z; ``k`` None means 1."""
    offs_h = first_h + tl.arange(0, BLOCK_H)
    ok_c, ok_h = offs_c < channels, offs_h < width
    dtype = dh_ptr.dtype.element_ty
    h_offs = rows[:, None] * width + offs_h[None, :]
    ok_h_tile = ok_m[:, None] & ok_h[None, :]
    if z_ptr is not None:
        z_rows = row_pointers(z_ptr, batch, offs_l, stride_zb, stride_zl, OFFSET)
        z = load_tile(z_rows, offs_c, stride_zc, ok_m, ok_c, OFFSET)  # [BLOCK_M, BLOCK_C]
    if NEED_DOWN:
        dh = tl.load(dh_ptr + h_offs, mask=ok_h_tile, other=0.0)  # [BLOCK_M, BLOCK_H]
        if z_ptr is not None:
            down = tl.dot(tl.trans(z), dh, down, input_precision=PRECISION)
        sum_dh += tl.sum(dh.to(tl.float32), axis=0)
    if NEED_UP:
        dy_rows = row_pointers(dy_ptr, batch, offs_l, stride_dyb, stride_dyl, OFFSET)
        dy = load_tile(dy_rows, offs_c, stride_dyc, ok_m, ok_c, OFFSET)  # [BLOCK_M, BLOCK_C]
        a = activation(tl.load(h_ptr + h_offs, mask=ok_h_tile, other=0.0).to(tl.float32), ACTIVATION)
        if DROP:
            keep = dropout_keep_mask(tl.load(seed_ptr), rows, first_h, threshold, BLOCK_M, BLOCK_H)
            a = tl.where(keep, a * inverse_keep, 0.0)
        g = dy.to(tl.float32)
        if k is not None:
            a *= k[:, None]
            g *= k[:, None]
        if dy.dtype != dtype:
            dy = dy.to(tl.float32) * root
        outer = tl.dot(tl.trans(dy.to(dtype)), a.to(dtype), outer, input_precision=PRECISION)
        sum_dy += tl.sum(g, axis=0)
        if z_ptr is not None:
            sum_dyz += tl.sum(g * z.to(tl.float32), axis=0)
    return down, outer, sum_dh, sum_dy, sum_dyz


@triton.jit(do_not_specialize=["length", "tiles_l", "tiles_m", "per_sample", "steps", "splits", "threshold"])
def _adapter_bwd_weights_kernel(
    dy_ptr, z_ptr, h_ptr, dh_ptr, up_ptr, u_bias_ptr, gamma_ptr, sample_ptr, seed_ptr, parts_ptr, counter_ptr,
    d_down_ptr, d_d_bias_ptr, d_up_ptr, d_u_bias_ptr, d_gamma_ptr,
    length, channels, width, tiles_l, tiles_m, per_sample, steps, splits,
    stride_dyb, stride_dyl, stride_dyc, stride_zb, stride_zl, stride_zc, stride_upc, stride_uph,
    stride_u_bias, stride_gamma, stride_sample,
    skip, inverse_keep, threshold: tl.uint32,
    NEED_DOWN: tl.constexpr, NEED_UP: tl.constexpr, ACTIVATION: tl.constexpr, DROP: tl.constexpr,
    PRECISION: tl.constexpr, OFFSET: tl.constexpr, LENGTH_MULTIPLE_OF: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_ALL: tl.constexpr,
):  # fmt: skip
    """The parameters' gradients: sums over rows, cut into ``splits``.

    Each program leaves its part in its split's slot of parts; the last to arrive finds all slots summed and writes the
    gradients. A slot holds dD^T and G (BLOCK_C, H each), then the sums of dh (H), k dy and k dy z (BLOCK_C each).
    """
    length = known_multiple(length, LENGTH_MULTIPLE_OF)
    pid_c, pid_h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_h = pid_h * BLOCK_H + tl.arange(0, BLOCK_H)
    z_dtype = dh_ptr.dtype.element_ty
    down = tl.zeros((BLOCK_C, BLOCK_H), dtype=tl.float32)
    outer = tl.zeros((BLOCK_C, BLOCK_H), dtype=tl.float32)
    sum_dh = tl.zeros((BLOCK_H,), dtype=tl.float32)
    sum_dy = tl.zeros((BLOCK_C,), dtype=tl.float32)
    sum_dyz = tl.zeros((BLOCK_C,), dtype=tl.float32)
    root = 1.0
    if gamma_ptr is not None:
        root = gate_root(gamma_ptr, stride_gamma, channels, BLOCK_ALL)
    for step in range(steps):
        tile = split * steps + step
        batch, offs_l, rows, ok_m = tile_rows(tile, tiles_l, length, OFFSET, BLOCK_M)
        ok_m = ok_m & (tile < tiles_m)
        k = None
        live = True
        if sample_ptr is not None:
            k = sample_of_rows(sample_ptr, stride_sample, rows, ok_m, per_sample)
            ok_m = ok_m & (k != 0.0)
            live = tl.max(ok_m.to(tl.int32)) > 0
        if live:
            down, outer, sum_dh, sum_dy, sum_dyz = _weights_tile(
                dy_ptr, z_ptr, h_ptr, dh_ptr, seed_ptr, batch, offs_l, rows, ok_m, k, offs_c, pid_h * BLOCK_H, channels,
                width, stride_dyb, stride_dyl, stride_dyc, stride_zb, stride_zl, stride_zc, inverse_keep, threshold,
                root, down, outer, sum_dh, sum_dy, sum_dyz,
                NEED_DOWN, NEED_UP, ACTIVATION, DROP, PRECISION, OFFSET, BLOCK_M, BLOCK_H,
            )  # fmt: skip

    groups, tiles_h = tl.cdiv(splits, GROUP), tl.num_programs(1)
    slot_size = 2 * BLOCK_C * width + width + 2 * BLOCK_C
    parts_ptr += pid_c.to(tl.int64) * (splits + groups + 1) * slot_size
    slot_ptr = parts_ptr + split.to(tl.int64) * slot_size
    at = tl.arange(0, BLOCK_C)[:, None] * width + offs_h[None, :]
    ok_h = offs_h < width
    tl.store(slot_ptr + at, down, mask=ok_h[None, :])
    tl.store(slot_ptr + BLOCK_C * width + at, outer, mask=ok_h[None, :])
    vectors_ptr = slot_ptr + 2 * BLOCK_C * width
    tl.store(vectors_ptr + offs_h, sum_dh, mask=ok_h)
    if pid_h == 0:
        tl.store(vectors_ptr + width + tl.arange(0, BLOCK_C), sum_dy)
        tl.store(vectors_ptr + width + BLOCK_C + tl.arange(0, BLOCK_C), sum_dyz)
    if sums_slots(parts_ptr, slot_size, counter_ptr + pid_c * (groups + 1), split, splits, tiles_h, GROUP):
        _write_gradients(
            parts_ptr + (splits + groups).to(tl.int64) * slot_size, up_ptr, u_bias_ptr, gamma_ptr, root,
            d_down_ptr, d_d_bias_ptr, d_up_ptr, d_u_bias_ptr, d_gamma_ptr, pid_c, tiles_h, channels, width,
            stride_upc, stride_uph, stride_u_bias, stride_gamma, skip,
            z_dtype, dy_ptr.dtype.element_ty != z_dtype, NEED_DOWN, NEED_UP, OFFSET, BLOCK_C, BLOCK_H,
        )  # fmt: skip


@triton.jit
def _write_gradients(
    total_ptr, up_ptr, u_bias_ptr, gamma_ptr, root,
    d_down_ptr, d_d_bias_ptr, d_up_ptr, d_u_bias_ptr, d_gamma_ptr, pid_c, tiles_h, channels, width,
    stride_upc, stride_uph, stride_u_bias, stride_gamma, skip,
    DTYPE: tl.constexpr, WIDER_DY: tl.constexpr, NEED_DOWN: tl.constexpr, NEED_UP: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK_C channels, contiguous, from the slot that holds their sums."""
    in_slot = tl.arange(0, BLOCK_C)
    offs_c = pid_c * BLOCK_C + in_slot
    ok_c = offs_c < channels
    gamma = tl.full((BLOCK_C,), 1.0, tl.float32)
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + offs_c * stride_gamma, mask=ok_c, other=0.0).to(tl.float32)
    d_gamma = tl.zeros((BLOCK_C,), dtype=tl.float32)
    vectors_ptr = total_ptr + 2 * BLOCK_C * width
    for tile_h in range(tiles_h):
        offs_h = tile_h * BLOCK_H + tl.arange(0, BLOCK_H)
        ok_h = offs_h < width
        ok = ok_c[:, None] & ok_h[None, :]
        at = in_slot[:, None] * width + offs_h[None, :]
        if NEED_DOWN:
            down = load_part(total_ptr + at, ok) * root  # [BLOCK_C, BLOCK_H]
            tl.store(
                d_down_ptr + offs_h[None, :] * channels + offs_c[:, None], down.to(d_down_ptr.dtype.element_ty), ok
            )
            if d_d_bias_ptr is not None:
                sum_dh = load_part(vectors_ptr + offs_h, ok_h) * root
                tl.store(d_d_bias_ptr + offs_h, sum_dh.to(d_d_bias_ptr.dtype.element_ty), ok_h & (pid_c == 0))
        if NEED_UP:
            outer = load_part(total_ptr + BLOCK_C * width + at, ok)  # [BLOCK_C, BLOCK_H]
            if WIDER_DY:
                outer = outer / root
            u = load_weight(up_ptr, offs_c, offs_h, stride_upc, stride_uph, ok_c, ok_h, DTYPE, OFFSET)
            d_gamma += tl.sum(outer * u.to(tl.float32), axis=1)
            d_up = (outer * gamma[:, None]).to(d_up_ptr.dtype.element_ty)
            tl.store(d_up_ptr + offs_c[:, None] * width + offs_h[None, :], d_up, ok)
    if NEED_UP:
        sum_dy = load_part(vectors_ptr + width + in_slot, ok_c)
        d_gamma += skip * load_part(vectors_ptr + width + BLOCK_C + in_slot, ok_c)
        if u_bias_ptr is not None:
            bias = tl.load(u_bias_ptr + offs_c * stride_u_bias, mask=ok_c, other=0.0).to(DTYPE)
            d_gamma += sum_dy * bias.to(tl.float32)
            tl.store(d_u_bias_ptr + offs_c, (gamma * sum_dy).to(d_u_bias_ptr.dtype.element_ty), mask=ok_c)
        tl.store(d_gamma_ptr + offs_c, d_gamma, mask=ok_c)


def adapter_residual_fwd(
    z: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    sample_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    skip: float,
    activation: str,
    dropout_p: float,
    channels_first: bool,
    z_channels_first: bool,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, L, C) in the residual's dtype, h (M, h) in z's; see `pyfused.ops.adapter_residual` for the contract."""
    (batch, length, channels), width = z.shape, down_weight.shape[0]
    y = rows_like(z if residual is None else residual, channels, channels_first)
    hidden = z.new_empty((batch * length, width) if save else 0)
    if batch * length == 0:
        return y, hidden
    config = configuration(
        _adapter_fwd_kernel, rows_config, z.device, batch, length, channels, width, z.dtype,
        weight_bytes=down_weight.itemsize, vectorised=vectorised(z, y, residual), beside=int(dropout_p > 0.0),
    )  # fmt: skip
    tiles_l = triton.cdiv(length, config.block_m)
    with torch.cuda.device_of(z):
        launch(
            _adapter_fwd_kernel, (batch * tiles_l,),
            z_ptr=z, down_ptr=down_weight, d_bias_ptr=down_bias, up_ptr=up_weight, u_bias_ptr=up_bias, r_ptr=residual,
            gamma_ptr=layer_scale, sample_ptr=sample_scale, y_ptr=y, h_ptr=hidden if save else None,
            **row_length(length, z, y, residual), channels=channels, width=width, tiles_l=tiles_l,
            per_sample=_rows_per_sample(batch * length, sample_scale),
            **strides("z", "blc", z), **strides("down", "hc", down_weight), **strides("up", "ch", up_weight),
            **strides("r", "blc", residual), **strides("y", "blc", y),
            **_vector_strides(d_bias=down_bias, u_bias=up_bias, gamma=layer_scale),
            stride_sample=_sample_stride(sample_scale), skip=skip, **dropout_arguments(seed, dropout_p),
            ACTIVATION=activation, DROP=dropout_p > 0.0,
            PRECISION=dot_precision(z.dtype), OFFSET=offset_type(z, y, down_weight, up_weight, residual),
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, BLOCK_H=block_width(width),
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    return y, hidden


def adapter_residual_bwd(
    dy: torch.Tensor,
    z: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    sample_scale: torch.Tensor | None,
    hidden: torch.Tensor | None,
    seed: torch.Tensor | None,
    skip: float,
    activation: str,
    dropout_p: float,
    channels_first: bool,
    z_is_residual: bool,
    need_dz: bool,
    need_down: bool,
    need_up: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dz (B, L, C) in z's dtype, the parameters' gradients in theirs, dgamma (C,) float32; empty where not needed."""
    (batch, length, channels), width = dy.shape, down_weight.shape[0]
    rows = batch * length
    like = hidden if z is None else z
    dz = rows_like(dy, channels, channels_first, like.dtype) if need_dz else like.new_empty(0)
    # One empty tensor for all that is not needed would be outputs that alias.
    nothing = up_weight.new_empty
    d_down, d_d_bias = (_gradient(p) if need_down and p is not None else nothing(0) for p in (down_weight, down_bias))
    d_up, d_u_bias = (_gradient(p) if need_up and p is not None else nothing(0) for p in (up_weight, up_bias))
    d_gamma = up_weight.new_empty(channels if need_up else 0, dtype=torch.float32)
    gradients = dz, d_down, d_d_bias, d_up, d_u_bias, d_gamma
    if rows == 0:
        return dz, *(gradient.zero_() for gradient in gradients[1:])
    size = dy.device, batch, length, channels, width, like.dtype
    kind = {"vectorised": vectorised(dy, z, dz if need_dz else None), "beside": int(dropout_p > 0.0)}
    rows_cfg = configuration(_adapter_bwd_rows_kernel, rows_config, *size, weight_bytes=down_weight.itemsize, **kind)
    sums_cfg = configuration(_adapter_bwd_weights_kernel, weights_config, *size, **kind)
    tiles_c, tiles_h = triton.cdiv(channels, sums_cfg.block_c), triton.cdiv(width, sums_cfg.block_h)
    tiles_l = triton.cdiv(length, sums_cfg.block_m)
    steps = triton.cdiv(batch * tiles_l, sums_cfg.splits)
    splits = triton.cdiv(batch * tiles_l, steps)
    groups = triton.cdiv(splits, _GROUP)
    counter = torch.empty((tiles_c, groups + 1), dtype=torch.int32, device=dy.device)
    recompute = hidden is None
    dh = like.new_empty((rows, width))
    h = torch.empty_like(dh) if recompute else hidden
    shared = {
        "dy_ptr": dy, "dh_ptr": dh, "h_ptr": h, "counter_ptr": counter, "up_ptr": up_weight,
        "gamma_ptr": layer_scale, "sample_ptr": sample_scale,
        "channels": channels, "width": width, "per_sample": _rows_per_sample(rows, sample_scale),
        **strides("dy", "blc", dy), **strides("up", "ch", up_weight),
        **_vector_strides(gamma=layer_scale), "stride_sample": _sample_stride(sample_scale),
        "skip": skip, **dropout_arguments(seed, dropout_p), "ACTIVATION": activation, "DROP": dropout_p > 0.0,
        "PRECISION": dot_precision(like.dtype), "BLOCK_ALL": triton.next_power_of_2(channels),
    }  # fmt: skip
    with torch.cuda.device_of(dy):
        row_tiles = triton.cdiv(length, rows_cfg.block_m)
        launch(
            _adapter_bwd_rows_kernel, (batch * row_tiles,), **shared,
            z_ptr=z if recompute else None, down_ptr=down_weight, d_bias_ptr=down_bias, dz_ptr=dz if need_dz else None,
            **row_length(length, dy, z if recompute else None, dz if need_dz else None),
            tiles_l=row_tiles, counters=counter.numel(),
            **strides("z", "blc", z if recompute else None), **strides("dz", "blc", dz if need_dz else None),
            **strides("down", "hc", down_weight), **_vector_strides(d_bias=down_bias),
            RECOMPUTE=recompute, Z_IS_RESIDUAL=z_is_residual,
            OFFSET=offset_type(dy, z, dz, down_weight, up_weight),
            BLOCK_M=rows_cfg.block_m, BLOCK_C=rows_cfg.block_c, BLOCK_H=block_width(width),
            num_warps=rows_cfg.num_warps, num_stages=rows_cfg.num_stages, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
        if not (need_down or need_up):
            return gradients
        slot_size = 2 * sums_cfg.block_c * width + width + 2 * sums_cfg.block_c
        parts = torch.empty((tiles_c, splits + groups + 1, slot_size), dtype=torch.float32, device=dy.device)
        z = z if need_down or skip != 0.0 else None
        launch(
            _adapter_bwd_weights_kernel, (tiles_c, tiles_h, splits), **shared,
            z_ptr=z, u_bias_ptr=up_bias, parts_ptr=parts,
            d_down_ptr=d_down if need_down else None, d_d_bias_ptr=d_d_bias if d_d_bias.numel() else None,
            d_up_ptr=d_up if need_up else None, d_u_bias_ptr=d_u_bias if d_u_bias.numel() else None,
            d_gamma_ptr=d_gamma if need_up else None,
            **row_length(length, dy, z), tiles_l=tiles_l, tiles_m=batch * tiles_l, steps=steps, splits=splits,
            **strides("z", "blc", z), **_vector_strides(u_bias=up_bias),
            NEED_DOWN=need_down, NEED_UP=need_up, OFFSET=offset_type(dy, z, up_weight), GROUP=_GROUP,
            BLOCK_M=sums_cfg.block_m, BLOCK_C=sums_cfg.block_c, BLOCK_H=sums_cfg.block_h,
            num_warps=sums_cfg.num_warps, num_stages=sums_cfg.num_stages, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    return gradients


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(parameter, memory_format=torch.contiguous_format)


def _rows_per_sample(rows: int, sample_scale: torch.Tensor | None) -> int:
    return 1 if sample_scale is None else rows // sample_scale.numel()


def _sample_stride(sample_scale: torch.Tensor | None) -> int:
    """Of one sample any number serves: a batch of one compiles no kernel of its own."""
    return 1 if sample_scale is None or sample_scale.numel() == 1 else sample_scale.stride(0)


def _vector_strides(**vectors: torch.Tensor | None) -> dict[str, int]:
    """A scalar repeats: its stride is 0."""
    return {
        f"stride_{name}": 0 if vector is None or vector.numel() == 1 else vector.stride(0)
        for name, vector in vectors.items()
    }
