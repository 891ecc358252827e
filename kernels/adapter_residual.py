"""``adapter_residual`` in Triton.

    y = r + k gamma * (skip z + a U^T + u)         a = drop(phi(h)), h = z D^T + d
    dh = k mask phi'(h) * (dy (gamma U)) / (1 - p)     dz = dh D + skip k gamma dy, plus dy if z is the residual
    dD = dh^T z    dd = sum dh    G = k dy^T a    dU = gamma G    du = gamma sum k dy
    dgamma = skip sum k dy z + rowsum(U G) + u sum k dy

One launch forward, two backward: a pass over tiles of rows, and the sums over rows. Before each direction `prepared`
brings D and U in z's dtype, ``wide`` for ``width``, and U for dh times gamma, by one more where they are not so.
Letters: M rows, C channels, H the narrow width; z is (B, L, C) with any strides and row m is b * L + l; h is (M, H), dh
and k a are as wide as the weights. dh is divided by the root of the largest |gamma|, which is inside float16's range
for small gammas and for scaled losses.
"""

from typing import Any

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
    mat,
    offset_type,
    row_length,
    rows_like,
    vectorised,
)
from pyfused.kernels.prepared import prepared
from pyfused.kernels.program import per_signature
from pyfused.kernels.sums import SLOTS_PER_GROUP, load_part, sums_slots
from pyfused.kernels.tiles import (
    copy_rows,
    gate_root,
    load_tile,
    load_vector,
    load_weight,
    narrow_product,
    row_pointers,
    sample_of_rows,
    store_tile,
    tile_rows,
)


@triton.jit
def _pre_activation(
    z_rows, stride_zc, ok_m, down, d_bias, channels, width, wide,
    PRECISION: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """h = z D^T + d  [BLOCK_M, BLOCK_H] in float32; 0 in columns beyond the width."""
    offs_h = tl.arange(0, BLOCK_H)
    h = narrow_product(
        z_rows, stride_zc, ok_m, down.ptr, down.strides[1], offs_h.to(OFFSET) * down.strides[0], offs_h < wide,
        None, 1.0, channels, PRECISION, OFFSET, BLOCK_M, BLOCK_C, BLOCK_H,
    )  # fmt: skip
    if d_bias is not None:
        dtype = down.ptr.dtype.element_ty
        h += load_vector(d_bias, offs_h, offs_h < width).to(dtype).to(tl.float32)[None, :]
    return h


@triton.jit(do_not_specialize=["length", "tiles_l", "per_sample", "threshold"])
def _adapter_fwd_kernel(
    z, down, d_bias, up, u_bias, r, gamma, sample_ptr, y, h_ptr, seed_ptr,
    length, channels, width, wide, tiles_l, per_sample, skip, inverse_keep, threshold: tl.uint32,
    ACTIVATION: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
    LENGTH_MULTIPLE_OF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """y and, with h_ptr, h of one tile of rows. Tiles of dropped samples copy the residual and compute nothing."""
    length = known_multiple(length, LENGTH_MULTIPLE_OF)
    batch, offs_l, rows, ok_m = tile_rows(tl.program_id(0), tiles_l, length, OFFSET, BLOCK_M)
    dtype = z.ptr.dtype.element_ty
    residual = z if r is None else r
    z_rows, y_rows = row_pointers(z, batch, offs_l, OFFSET), row_pointers(y, batch, offs_l, OFFSET)
    r_rows = row_pointers(residual, batch, offs_l, OFFSET)
    offs_h = tl.arange(0, BLOCK_H)
    ok_h = offs_h < width
    h_ptrs = None if h_ptr is None else h_ptr + rows[:, None] * width + offs_h[None, :]
    ok_z = ok_m
    live = True
    if sample_ptr is not None:
        k = sample_of_rows(sample_ptr, rows, ok_m, per_sample)
        ok_z = ok_m & (k != 0.0)
        live = tl.max(ok_z.to(tl.int32)) > 0
    if live:
        h = _pre_activation(
            z_rows, z.strides[2], ok_z, down, d_bias, channels, width, wide,
            PRECISION, OFFSET, BLOCK_M, BLOCK_C, BLOCK_H,
        )  # fmt: skip
        if h_ptr is not None:
            tl.store(h_ptrs, h.to(dtype), mask=ok_m[:, None] & ok_h[None, :])
        a = activation(h, ACTIVATION)
        if DROP:
            keep = dropout_keep_mask(tl.load(seed_ptr), rows, 0, threshold, BLOCK_M, BLOCK_H)
            a = tl.where(keep, a * inverse_keep, 0.0)
        a = a.to(dtype)  # [BLOCK_M, BLOCK_H]
        READS_R: tl.constexpr = r is not None or sample_ptr is not None
        first_c = tl.arange(0, BLOCK_C)
        z_next = load_tile(z_rows, first_c, z.strides[2], ok_z, first_c < channels, OFFSET)
        if READS_R:
            # A dropped row of z is the residual too, whatever it holds.
            r_next = load_tile(r_rows, first_c, residual.strides[2], ok_m, first_c < channels, OFFSET)
        for start in range(tl.cdiv(channels, BLOCK_C)):
            offs_c = start * BLOCK_C + tl.arange(0, BLOCK_C)
            ok_c = offs_c < channels
            # The next step's rows are under way during this one's product.
            z_tile, next_c = z_next.to(tl.float32), offs_c + BLOCK_C
            z_next = load_tile(z_rows, next_c, z.strides[2], ok_z, next_c < channels, OFFSET)
            if READS_R:
                r_tile = r_next.to(tl.float32)
                r_next = load_tile(r_rows, next_c, residual.strides[2], ok_m, next_c < channels, OFFSET)
            u = load_weight(up.ptr, offs_h, offs_c, up.strides[1], up.strides[0], offs_h < wide, ok_c, OFFSET)
            out = tl.dot(a, u, input_precision=PRECISION) + skip * z_tile  # [BLOCK_M, BLOCK_C]
            if u_bias is not None:
                out += load_vector(u_bias, offs_c, ok_c).to(dtype).to(tl.float32)[None, :]
            if gamma is not None:
                out *= load_vector(gamma, offs_c, ok_c)[None, :]
            if not READS_R:
                out += z_tile
            elif sample_ptr is None:
                out += r_tile
            else:
                out = tl.where(ok_z[:, None], out * k[:, None] + r_tile, r_tile)
            store_tile(y_rows, offs_c, y.strides[2], out, ok_m, ok_c, OFFSET)
    else:
        copy_rows(r_rows, residual.strides[2], y_rows, y.strides[2], ok_m, ok_m, channels, OFFSET, BLOCK_C)
        if h_ptr is not None:
            tl.store(h_ptrs, tl.zeros((BLOCK_M, BLOCK_H), dtype), mask=ok_m[:, None] & ok_h[None, :])


@triton.jit(do_not_specialize=["length", "tiles_l", "per_sample", "threshold", "counters"])
def _adapter_bwd_rows_kernel(
    dy, z, h_ptr, down, d_bias, up, gamma, sample_ptr, dz, dh_ptr, a_ptr, seed_ptr, counter_ptr,
    length, channels, width, h_width, wide, tiles_l, per_sample, counters, skip, inverse_keep, threshold: tl.uint32,
    ACTIVATION: tl.constexpr, RECOMPUTE: tl.constexpr, Z_IS_RESIDUAL: tl.constexpr, DROP: tl.constexpr,
    PRECISION: tl.constexpr, OFFSET: tl.constexpr, LENGTH_MULTIPLE_OF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dh and, with dz and a_ptr, dz and k a of one tile of rows; RECOMPUTE: h too, whose place dh takes.

    Tiles of dropped samples compute nothing.

    up is gamma U / root, over root once more where dy is wider than it.
    """
    if tl.program_id(0) == 0:
        # The sums over rows, which follow, count their programs here.
        for start in range(tl.cdiv(counters, 128)):
            offs = start * 128 + tl.arange(0, 128)
            tl.store(counter_ptr + offs, tl.zeros((128,), tl.int32), mask=offs < counters)
    length = known_multiple(length, LENGTH_MULTIPLE_OF)
    batch, offs_l, rows, ok_m = tile_rows(tl.program_id(0), tiles_l, length, OFFSET, BLOCK_M)
    dtype = dh_ptr.dtype.element_ty
    dy_rows = row_pointers(dy, batch, offs_l, OFFSET)
    offs_h = tl.arange(0, BLOCK_H)
    ok_h = offs_h < width
    ok_live = ok_m
    live = True
    if sample_ptr is not None:
        k = sample_of_rows(sample_ptr, rows, ok_m, per_sample)
        ok_live = ok_m & (k != 0.0)
        live = tl.max(ok_live.to(tl.int32)) > 0
    if live:
        h_ptrs, ok_h_tile = h_ptr + rows[:, None] * h_width + offs_h[None, :], ok_live[:, None] & ok_h[None, :]
        offs_wide, ok_wide = rows[:, None] * wide + offs_h[None, :], ok_live[:, None] & (offs_h < wide)[None, :]
        if RECOMPUTE:
            h = _pre_activation(
                row_pointers(z, batch, offs_l, OFFSET), z.strides[2], ok_live, down, d_bias, channels, width, wide,
                PRECISION, OFFSET, BLOCK_M, BLOCK_C, BLOCK_H,
            )  # fmt: skip
            # It waits in memory: two such tiles do not fit in registers.
            tl.store(h_ptrs, h.to(dtype), mask=ok_h_tile)
            tl.debug_barrier()
        if a_ptr is not None:
            # Once: each tile of channels in the sums over rows would make it anew. First: beside t it does not fit.
            a = activation(tl.load(h_ptrs, mask=ok_h_tile, other=0.0).to(tl.float32), ACTIVATION)
            if DROP:
                keep = dropout_keep_mask(tl.load(seed_ptr), rows, 0, threshold, BLOCK_M, BLOCK_H)
                a = tl.where(keep, a * inverse_keep, 0.0)
            if sample_ptr is not None:
                a *= k[:, None]
            tl.store(a_ptr + offs_wide, a.to(dtype), mask=ok_wide)
        root = 1.0
        if gamma is not None:
            root = gate_root(gamma, channels)
        t = narrow_product(
            dy_rows, dy.strides[2], ok_live, up.ptr, up.strides[0], offs_h.to(OFFSET) * up.strides[1], offs_h < wide,
            None, root, channels, PRECISION, OFFSET, BLOCK_M, BLOCK_C, BLOCK_H,
        )  # fmt: skip
        if DROP:
            keep = dropout_keep_mask(tl.load(seed_ptr), rows, 0, threshold, BLOCK_M, BLOCK_H)
            t = tl.where(keep, t * inverse_keep, 0.0)
        if sample_ptr is not None:
            t *= k[:, None]
        h = tl.load(h_ptrs, mask=ok_h_tile, other=0.0).to(tl.float32)
        dh = (t * activation_slope(h, ACTIVATION)).to(dtype)  # [BLOCK_M, BLOCK_H]
        if RECOMPUTE:
            # It takes the place of h, which everybody has read.
            tl.debug_barrier()
        tl.store(dh_ptr + offs_wide, dh, mask=ok_wide)
        if dz is not None:
            dz_rows = row_pointers(dz, batch, offs_l, OFFSET)
            first_c = tl.arange(0, BLOCK_C)
            dy_next = load_tile(dy_rows, first_c, dy.strides[2], ok_m, first_c < channels, OFFSET)
            for start in range(tl.cdiv(channels, BLOCK_C)):
                offs_c = start * BLOCK_C + tl.arange(0, BLOCK_C)
                ok_c = offs_c < channels
                # The next step's rows are under way during this one's product.
                dy_tile, next_c = dy_next.to(tl.float32), offs_c + BLOCK_C
                dy_next = load_tile(dy_rows, next_c, dy.strides[2], ok_m, next_c < channels, OFFSET)
                ok_w = offs_h < wide
                d = load_weight(down.ptr, offs_h, offs_c, down.strides[0], down.strides[1], ok_w, ok_c, OFFSET)
                out = tl.dot(dh, d, input_precision=PRECISION) * root  # [BLOCK_M, BLOCK_C]
                direct = skip * dy_tile
                if gamma is not None:
                    direct *= load_vector(gamma, offs_c, ok_c)[None, :]
                if sample_ptr is not None:
                    direct = tl.where(ok_live[:, None], direct * k[:, None], 0.0)
                out += direct
                if Z_IS_RESIDUAL:
                    out += dy_tile
                store_tile(dz_rows, offs_c, dz.strides[2], out, ok_m, ok_c, OFFSET)
    elif dz is not None:
        dz_rows = row_pointers(dz, batch, offs_l, OFFSET)
        # Without a residual gradient to pass on, nothing is read: dz is 0.
        ok_read = ok_m & Z_IS_RESIDUAL
        copy_rows(dy_rows, dy.strides[2], dz_rows, dz.strides[2], ok_m, ok_read, channels, OFFSET, BLOCK_C)


@triton.jit(do_not_specialize=["length", "tiles_l", "tiles_m", "per_sample", "steps", "splits"])
def _adapter_bwd_weights_kernel(
    dy, z, a_ptr, dh_ptr, up, u_bias, gamma, sample_ptr, parts_ptr, counter_ptr,
    d_down_ptr, d_d_bias_ptr, d_up_ptr, d_u_bias_ptr, d_gamma_ptr,
    length, channels, width, wide, tiles_l, tiles_m, per_sample, steps, splits, skip,
    NEED_DOWN: tl.constexpr, NEED_UP: tl.constexpr,
    PRECISION: tl.constexpr, OFFSET: tl.constexpr, LENGTH_MULTIPLE_OF: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The parameters' gradients: sums over rows, cut into ``splits``; G ``root`` times that if dy is wider than z.

    Each program leaves its part in its split's slot of parts; the last to arrive finds all slots summed and writes the
    gradients. A slot holds dD^T and G (BLOCK_C, H each), then the sums of dh (H), k dy and k dy z (BLOCK_C each).
    """
    length = known_multiple(length, LENGTH_MULTIPLE_OF)
    pid_c, pid_h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_h = pid_h * BLOCK_H + tl.arange(0, BLOCK_H)
    ok_c = offs_c < channels
    z_dtype = dh_ptr.dtype.element_ty
    down = tl.zeros((BLOCK_C, BLOCK_H), dtype=tl.float32)
    outer = tl.zeros((BLOCK_C, BLOCK_H), dtype=tl.float32)
    sum_dh = tl.zeros((BLOCK_H,), dtype=tl.float32)
    sum_dy = tl.zeros((BLOCK_C,), dtype=tl.float32)
    sum_dyz = tl.zeros((BLOCK_C,), dtype=tl.float32)
    root = 1.0
    if gamma is not None:
        root = gate_root(gamma, channels)
    # Of a loop that might never run the assembler serialises the products.
    tl.assume(steps > 0)
    for step in range(steps):
        tile = split * steps + step
        batch, offs_l, rows, ok_m = tile_rows(tile, tiles_l, length, OFFSET, BLOCK_M)
        ok_m = ok_m & (tile < tiles_m)
        if sample_ptr is not None:
            # What is dropped is not read. A branch around all of it would keep loads from going ahead.
            k = sample_of_rows(sample_ptr, rows, ok_m, per_sample)
            ok_m = ok_m & (k != 0.0)
        h_offs, ok_tile = rows[:, None] * wide + offs_h[None, :], ok_m[:, None] & (offs_h < wide)[None, :]
        if z is not None:
            z_rows = row_pointers(z, batch, offs_l, OFFSET)
            z_tile = load_tile(z_rows, offs_c, z.strides[2], ok_m, ok_c, OFFSET)  # [BLOCK_M, BLOCK_C]
        if NEED_DOWN:
            dh = tl.load(dh_ptr + h_offs, mask=ok_tile, other=0.0)  # [BLOCK_M, BLOCK_H]
        if NEED_UP:
            dy_rows = row_pointers(dy, batch, offs_l, OFFSET)
            dy_tile = load_tile(dy_rows, offs_c, dy.strides[2], ok_m, ok_c, OFFSET)  # [BLOCK_M, BLOCK_C]
            a = tl.load(a_ptr + h_offs, mask=ok_tile, other=0.0)  # [BLOCK_M, BLOCK_H]
            scaled = dy_tile
            if dy_tile.dtype != z_dtype:
                scaled = (dy_tile.to(tl.float32) * root).to(z_dtype)
        # Side by side, or these would wait for each other.
        if NEED_DOWN and z is not None:
            down = tl.dot(tl.trans(z_tile), dh, down, input_precision=PRECISION)
        if NEED_UP:
            outer = tl.dot(tl.trans(scaled), a, outer, input_precision=PRECISION)
        if NEED_DOWN:  # noqa: SIM102 (one condition is the compiler's, the other the program's)
            if pid_c == 0:
                sum_dh += tl.sum(dh.to(tl.float32), axis=0)
        if NEED_UP:  # noqa: SIM102
            if pid_h == 0:
                g = dy_tile.to(tl.float32)
                if sample_ptr is not None:
                    g *= k[:, None]
                sum_dy += tl.sum(g, axis=0)
                if z is not None:
                    sum_dyz += tl.sum(g * z_tile.to(tl.float32), axis=0)

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
            parts_ptr + (splits + groups).to(tl.int64) * slot_size, up, u_bias, gamma, root,
            d_down_ptr, d_d_bias_ptr, d_up_ptr, d_u_bias_ptr, d_gamma_ptr, pid_c, tiles_h, channels, width, skip,
            z_dtype, dy.ptr.dtype.element_ty != z_dtype, NEED_DOWN, NEED_UP, OFFSET, BLOCK_C, BLOCK_H,
        )  # fmt: skip


@triton.jit
def _write_gradients(
    total_ptr, up, u_bias, gamma, root,
    d_down_ptr, d_d_bias_ptr, d_up_ptr, d_u_bias_ptr, d_gamma_ptr, pid_c, tiles_h, channels, width, skip,
    DTYPE: tl.constexpr, WIDER_DY: tl.constexpr, NEED_DOWN: tl.constexpr, NEED_UP: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK_C channels, contiguous, from the slot that holds their sums."""
    in_slot = tl.arange(0, BLOCK_C)
    offs_c = pid_c * BLOCK_C + in_slot
    ok_c = offs_c < channels
    scale = tl.full((BLOCK_C,), 1.0, tl.float32) if gamma is None else load_vector(gamma, offs_c, ok_c)
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
            u = load_weight(up.ptr, offs_c, offs_h, up.strides[0], up.strides[1], ok_c, ok_h, OFFSET)
            d_gamma += tl.sum(outer * u.to(DTYPE).to(tl.float32), axis=1)
            d_up = (outer * scale[:, None]).to(d_up_ptr.dtype.element_ty)
            tl.store(d_up_ptr + offs_c[:, None] * width + offs_h[None, :], d_up, ok)
    if NEED_UP:
        sum_dy = load_part(vectors_ptr + width + in_slot, ok_c)
        d_gamma += skip * load_part(vectors_ptr + width + BLOCK_C + in_slot, ok_c)
        if u_bias is not None:
            d_gamma += sum_dy * load_vector(u_bias, offs_c, ok_c).to(DTYPE).to(tl.float32)
            tl.store(d_u_bias_ptr + offs_c, (scale * sum_dy).to(d_u_bias_ptr.dtype.element_ty), mask=ok_c)
        tl.store(d_gamma_ptr + offs_c, d_gamma, mask=ok_c)


@per_signature
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
    samples = _samples(batch * length, sample_scale)
    y = rows_like(z if residual is None else residual, channels, channels_first)
    hidden = z.new_empty((batch * length, width) if save else 0)
    if batch * length == 0:
        return y, hidden
    config = configuration(
        _adapter_fwd_kernel, rows_config, z.device, batch, length, channels, width, z.dtype,
        vectorised=vectorised(z, y, residual), beside=int(dropout_p > 0.0),
    )  # fmt: skip
    tiles_l = triton.cdiv(length, config.block_m)
    with torch.cuda.device_of(z):
        down, up = _prepared(z.dtype, down_weight, up_weight)
        launch(
            _adapter_fwd_kernel, (batch * tiles_l,),
            z=mat(z), down=mat(down), d_bias=mat(down_bias), up=mat(up), u_bias=mat(up_bias),
            r=mat(residual), gamma=mat(layer_scale), y=mat(y), h_ptr=hidden if save else None,
            **row_length(length, z, y, residual), channels=channels, width=width, wide=len(down), tiles_l=tiles_l,
            **samples, skip=skip, **dropout_arguments(seed, dropout_p),
            ACTIVATION=activation, DROP=dropout_p > 0.0,
            PRECISION=dot_precision(z.dtype), OFFSET=offset_type(z, y, down, up, residual),
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, BLOCK_H=block_width(width),
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    return y, hidden


@per_signature
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
    like, samples = hidden if z is None else z, _samples(rows, sample_scale)
    # One empty tensor for all that is not needed would be outputs that alias.
    nothing = up_weight.new_empty
    d_down, d_d_bias = (_gradient(p) if need_down and p is not None else nothing(0) for p in (down_weight, down_bias))
    d_up, d_u_bias = (_gradient(p) if need_up and p is not None else nothing(0) for p in (up_weight, up_bias))
    d_gamma = up_weight.new_empty(channels if need_up else 0, dtype=torch.float32)
    dz = rows_like(dy, channels, channels_first, like.dtype) if need_dz else like.new_empty(0)
    gradients = dz, d_down, d_d_bias, d_up, d_u_bias, d_gamma
    if rows == 0:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    size = dy.device, batch, length, channels, width, like.dtype
    kind: dict[str, Any] = {"vectorised": vectorised(dy, z, dz if need_dz else None)}
    rows_cfg = configuration(_adapter_bwd_rows_kernel, rows_config, *size, **kind, beside=int(dropout_p > 0.0))
    wider = dy.dtype != like.dtype
    # A wider dy passes through registers; so do the factors of samples.
    beside = int(wider or sample_scale is not None)
    sums_cfg = configuration(_adapter_bwd_weights_kernel, weights_config, *size, **kind, beside=beside)
    tiles_c, tiles_h = triton.cdiv(channels, sums_cfg.block_c), triton.cdiv(width, sums_cfg.block_h)
    tiles_l = triton.cdiv(length, sums_cfg.block_m)
    steps = triton.cdiv(batch * tiles_l, sums_cfg.splits)
    splits = triton.cdiv(batch * tiles_l, steps)
    groups = triton.cdiv(splits, SLOTS_PER_GROUP)
    counter = dy.new_empty((tiles_c, groups + 1), dtype=torch.int32)
    recompute = hidden is None
    wide = _wide(width)
    dh = like.new_empty((rows, wide))
    h, a = dh if recompute else hidden, torch.empty_like(dh) if need_up else None
    shared = {
        "dy": mat(dy), "dh_ptr": dh, "a_ptr": a, "counter_ptr": counter, "gamma": mat(layer_scale),
        "channels": channels, "width": width, "wide": wide, **samples, "skip": skip,
        "PRECISION": dot_precision(like.dtype),
    }  # fmt: skip
    with torch.cuda.device_of(dy):
        down, gated_up = _prepared(like.dtype, down_weight, up_weight, gate=layer_scale, over_root=wider)
        row_tiles = triton.cdiv(length, rows_cfg.block_m)
        launch(
            _adapter_bwd_rows_kernel, (batch * row_tiles,), **shared,
            z=mat(z) if recompute else None, down=mat(down), d_bias=mat(down_bias), up=mat(gated_up),
            dz=mat(dz) if need_dz else None, h_ptr=h, **dropout_arguments(seed, dropout_p),
            **row_length(length, dy, z if recompute else None, dz if need_dz else None),
            h_width=h.shape[1], tiles_l=row_tiles, counters=counter.numel(),
            ACTIVATION=activation, DROP=dropout_p > 0.0, RECOMPUTE=recompute, Z_IS_RESIDUAL=z_is_residual,
            OFFSET=offset_type(dy, z, dz, down, gated_up),
            BLOCK_M=rows_cfg.block_m, BLOCK_C=rows_cfg.block_c, BLOCK_H=block_width(width),
            num_warps=rows_cfg.num_warps, num_stages=rows_cfg.num_stages, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
        if not (need_down or need_up):
            return gradients
        slot_size = 2 * sums_cfg.block_c * width + width + 2 * sums_cfg.block_c
        parts = dy.new_empty((tiles_c, splits + groups + 1, slot_size), dtype=torch.float32)
        z = z if need_down or skip != 0.0 else None
        launch(
            _adapter_bwd_weights_kernel, (tiles_c, tiles_h, splits), **shared,
            z=mat(z), up=mat(up_weight), u_bias=mat(up_bias), parts_ptr=parts,
            d_down_ptr=d_down if need_down else None, d_d_bias_ptr=d_d_bias if d_d_bias.numel() else None,
            d_up_ptr=d_up if need_up else None, d_u_bias_ptr=d_u_bias if d_u_bias.numel() else None,
            d_gamma_ptr=d_gamma if need_up else None,
            **row_length(length, dy, z), tiles_l=tiles_l, tiles_m=batch * tiles_l, steps=steps, splits=splits,
            NEED_DOWN=need_down, NEED_UP=need_up, OFFSET=offset_type(dy, z, up_weight), GROUP=SLOTS_PER_GROUP,
            BLOCK_M=sums_cfg.block_m, BLOCK_C=sums_cfg.block_c, BLOCK_H=sums_cfg.block_h,
            num_warps=sums_cfg.num_warps, num_stages=sums_cfg.num_stages, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    return gradients


def _wide(width: int) -> int:
    """The narrow width with as many zeros as let vectors load what has it."""
    return -(-width // 16) * 16


def _prepared(dtype: torch.dtype, down: torch.Tensor, up: torch.Tensor, **gate) -> tuple[torch.Tensor, torch.Tensor]:
    """D and U, `_wide`."""
    channels, wide = down.shape[1], _wide(len(down))
    return prepared(dtype, down, up, ((wide, channels), (channels, wide)), **gate)


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.new_empty(parameter.shape)


def _samples(rows: int, scale: torch.Tensor | None) -> dict[str, object]:
    """Dense: a stride would tell a batch of one from all others, and compile it a kernel of its own."""
    if scale is None:
        return {"sample_ptr": None, "per_sample": 1}
    return {"sample_ptr": scale.contiguous(), "per_sample": rows // max(1, scale.numel())}
