"""``projection_residual`` in Triton: y = skip x + w match(phi(o W^T + b)).

One launch forward; with norm matching, which needs whole rows, a second, light one over what the first wrote, h and the
squares of each tile's part of |c|. Backward one launch for everything of y's size (dh, dx, and dw and db tile by tile);
the products do = dh W and dW = dh^T o are the library's.
"""

import torch
import triton
import triton.language as tl

from pyfused.kernels.device import activation, activation_slope, inverse_or_zero, known_multiple, swizzle
from pyfused.kernels.launch import (
    configuration,
    dot_precision,
    launch,
    mat,
    offset_type,
    row_length,
    target,
    vectorised,
)
from pyfused.kernels.lora_linear_config import gemm_config
from pyfused.kernels.program import per_signature
from pyfused.kernels.recording import INTERPRETER
from pyfused.kernels.tiles import (
    load_tile,
    load_vector,
    row_pointers,
    store_tile,
    tile_pointers,
    tile_rows,
    weight_pointers,
)

# Rows and channels of a tile in the passes over rows, which multiply no matrices; not timed on a GPU yet.
_ROWS, _CHANNELS = 16, 128


@triton.jit
def _gate(gate, offs_c, ok_c, factor):
    """w of each channel, float32."""
    if gate is None:
        return tl.where(ok_c, factor, 0.0)
    else:
        return load_vector(gate, offs_c, ok_c)


@triton.jit(do_not_specialize=["length", "tiles_l", "tiles_m", "tiles_n"])
def _projection_fwd_kernel(
    o, w, bias, x, gate, pre_ptr, squares_ptr, y, length, channels, k, tiles_l, tiles_m, tiles_n, factor, skip,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr, LENGTH_MULTIPLE_OF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of h = o W^T + b, and of y; with squares_ptr the tile's part of |c|^2 in place of y."""
    length = known_multiple(length, LENGTH_MULTIPLE_OF)
    pid_m, pid_n = swizzle(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    batch, offs_l, rows, ok_m = tile_rows(pid_m, tiles_l, length, OFFSET, BLOCK_M)
    offs_c, offs_k = pid_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    ok_c = offs_c < channels
    dtype = o.ptr.dtype.element_ty
    step_k = tl.full((), BLOCK_K, tl.int64)
    o_ptrs = tile_pointers(row_pointers(o, batch, offs_l, OFFSET), offs_k, o.strides[2], OFFSET)
    w_ptrs = weight_pointers(w.ptr, offs_k, offs_c, w.strides[1], w.strides[0], OFFSET)
    h = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(tl.cdiv(k, BLOCK_K)):
        ok_k = offs_k < k - start * BLOCK_K
        o_tile = tl.load(o_ptrs, mask=ok_m[:, None] & ok_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w_tile = tl.load(w_ptrs, mask=ok_c[None, :] & ok_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        h = tl.dot(o_tile, w_tile, h, input_precision=PRECISION)
        o_ptrs += step_k * o.strides[2]
        w_ptrs += step_k * w.strides[1]
    if bias is not None:
        h += load_vector(bias, offs_c, ok_c)[None, :]
    ok = ok_m[:, None] & ok_c[None, :]
    if pre_ptr is not None:
        tl.store(pre_ptr + rows[:, None] * channels + offs_c[None, :], h.to(dtype), mask=ok)
    if squares_ptr is not None:
        # Of what is stored: the second pass reads that. Where nothing is, phi(0) = 0.
        c = activation(h.to(dtype).to(tl.float32), ACTIVATION)
        tl.store(squares_ptr + rows * tiles_n + pid_n, tl.sum(c * c, axis=1), mask=ok_m)
    else:
        x_rows, y_rows = row_pointers(x, batch, offs_l, OFFSET), row_pointers(y, batch, offs_l, OFFSET)
        out = skip * load_tile(x_rows, offs_c, x.strides[2], ok_m, ok_c, OFFSET).to(tl.float32)
        out += _gate(gate, offs_c, ok_c, factor)[None, :] * activation(h, ACTIVATION)
        store_tile(y_rows, offs_c, y.strides[2], out, ok_m, ok_c, OFFSET)


@triton.jit(do_not_specialize=["length", "tiles_l", "tiles_n"])
def _projection_match_kernel(
    pre_ptr, squares_ptr, x, gate, y, length, channels, tiles_l, tiles_n, factor, skip, eps,
    ACTIVATION: tl.constexpr, OFFSET: tl.constexpr, LENGTH_MULTIPLE_OF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y of one tile of rows from h and the parts of |c|^2."""
    length = known_multiple(length, LENGTH_MULTIPLE_OF)
    batch, offs_l, rows, ok_m = tile_rows(tl.program_id(0), tiles_l, length, OFFSET, BLOCK_M)
    x_rows, y_rows = row_pointers(x, batch, offs_l, OFFSET), row_pointers(y, batch, offs_l, OFFSET)
    square, square_x = tl.zeros((BLOCK_M,), dtype=tl.float32), tl.zeros((BLOCK_M,), dtype=tl.float32)
    for tile in range(tiles_n):
        square += tl.load(squares_ptr + rows * tiles_n + tile, mask=ok_m, other=0.0)
    for start in range(tl.cdiv(channels, BLOCK_C)):
        offs_c = start * BLOCK_C + tl.arange(0, BLOCK_C)
        x_tile = load_tile(x_rows, offs_c, x.strides[2], ok_m, offs_c < channels, OFFSET).to(tl.float32)
        square_x += tl.sum(x_tile * x_tile, axis=1)
    rho = tl.sqrt(square_x) * inverse_or_zero(tl.sqrt(square) + eps)
    for start in range(tl.cdiv(channels, BLOCK_C)):
        offs_c = start * BLOCK_C + tl.arange(0, BLOCK_C)
        ok_c = offs_c < channels
        ok = ok_m[:, None] & ok_c[None, :]
        h = tl.load(pre_ptr + rows[:, None] * channels + offs_c[None, :], mask=ok, other=0.0).to(tl.float32)
        out = skip * load_tile(x_rows, offs_c, x.strides[2], ok_m, ok_c, OFFSET).to(tl.float32)
        out += _gate(gate, offs_c, ok_c, factor)[None, :] * (rho[:, None] * activation(h, ACTIVATION))
        store_tile(y_rows, offs_c, y.strides[2], out, ok_m, ok_c, OFFSET)


@triton.jit(do_not_specialize=["length", "tiles_l"])
def _projection_bwd_kernel(
    dy, pre_ptr, x, gate, dh_ptr, dx_ptr, parts_ptr, length, channels, tiles_l, factor, skip, eps,
    ACTIVATION: tl.constexpr, NORM_MATCH: tl.constexpr, LARGEST: tl.constexpr, OFFSET: tl.constexpr,
    LENGTH_MULTIPLE_OF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dh and, with dx_ptr, dx of one tile of rows; the tile's parts of dw and db, (2, C)."""
    length = known_multiple(length, LENGTH_MULTIPLE_OF)
    batch, offs_l, rows, ok_m = tile_rows(tl.program_id(0), tiles_l, length, OFFSET, BLOCK_M)
    dy_rows = row_pointers(dy, batch, offs_l, OFFSET)
    rho = tl.full((BLOCK_M,), 1.0, tl.float32)
    if NORM_MATCH:
        x_rows = row_pointers(x, batch, offs_l, OFFSET)
        along, square, square_x = rho * 0.0, rho * 0.0, rho * 0.0
        for start in range(tl.cdiv(channels, BLOCK_C)):
            offs_c = start * BLOCK_C + tl.arange(0, BLOCK_C)
            ok_c = offs_c < channels
            ok = ok_m[:, None] & ok_c[None, :]
            h = tl.load(pre_ptr + rows[:, None] * channels + offs_c[None, :], mask=ok, other=0.0).to(tl.float32)
            c = activation(h, ACTIVATION)
            x_tile = load_tile(x_rows, offs_c, x.strides[2], ok_m, ok_c, OFFSET).to(tl.float32)
            dy_tile = load_tile(dy_rows, offs_c, dy.strides[2], ok_m, ok_c, OFFSET).to(tl.float32)
            along += tl.sum(dy_tile * _gate(gate, offs_c, ok_c, factor)[None, :] * c, axis=1)
            square += tl.sum(c * c, axis=1)
            square_x += tl.sum(x_tile * x_tile, axis=1)
        norm, norm_x = tl.sqrt(square), tl.sqrt(square_x)
        inverse = inverse_or_zero(norm + eps)
        rho = norm_x * inverse
        kappa = along * rho * inverse * inverse_or_zero(norm)
        towards = along * inverse * inverse_or_zero(norm_x)
    parts_ptr += tl.program_id(0).to(tl.int64) * 2 * channels
    for start in range(tl.cdiv(channels, BLOCK_C)):
        offs_c = start * BLOCK_C + tl.arange(0, BLOCK_C)
        ok_c = offs_c < channels
        ok = ok_m[:, None] & ok_c[None, :]
        at = rows[:, None] * channels + offs_c[None, :]
        h = tl.load(pre_ptr + at, mask=ok, other=0.0).to(tl.float32)
        c = activation(h, ACTIVATION)
        dy_tile = load_tile(dy_rows, offs_c, dy.strides[2], ok_m, ok_c, OFFSET).to(tl.float32)
        scaled = dy_tile * rho[:, None]
        dc = scaled * _gate(gate, offs_c, ok_c, factor)[None, :]
        if NORM_MATCH:
            dc -= kappa[:, None] * c
        dh = dc * activation_slope(h, ACTIVATION)
        if NORM_MATCH:
            # rho is |x| / eps where c is 0: times o = 0, where every key is masked, not NaN.
            bounded = tl.minimum(tl.maximum(dh, -LARGEST), LARGEST)
            dh = tl.where((norm == 0.0)[:, None], bounded, dh)
        tl.store(dh_ptr + at, dh.to(dh_ptr.dtype.element_ty), mask=ok)
        tl.store(parts_ptr + offs_c, tl.sum(scaled * c, axis=0), mask=ok_c)
        tl.store(parts_ptr + channels + offs_c, tl.sum(dh, axis=0), mask=ok_c)
        if dx_ptr is not None:
            x_tile = load_tile(x_rows, offs_c, x.strides[2], ok_m, ok_c, OFFSET).to(tl.float32)
            dx = skip * dy_tile + towards[:, None] * x_tile
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=ok)


@per_signature
def projection_residual_fwd(
    o: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    gate: torch.Tensor | None,
    factor: float,
    skip: float,
    activation: str,
    norm_match: bool,
    eps: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, L, C) in the residual's dtype, h in o's; see `pyfused.ops.projection_residual` for the contract."""
    (batch, length, k), channels = o.shape, weight.shape[0]
    y = residual.new_empty(residual.shape)
    pre = o.new_empty((batch, length, channels) if save or norm_match else 0)
    if batch * length == 0:
        return y, pre if save else o.new_empty(0)
    # The residual's tile lies beside the accumulator, as a masked term of lora_linear's would.
    config = configuration(
        _projection_fwd_kernel, gemm_config, o.device, batch, length, channels, k, 16, o.dtype,
        vectorised=vectorised(o, weight), own_p=False, drop_x=False, drop_p=True,
    )  # fmt: skip
    tiles_l, tiles_n = triton.cdiv(length, config.block_m), triton.cdiv(channels, config.block_n)
    squares = o.new_empty((batch * length, tiles_n), dtype=torch.float32) if norm_match else None
    shared = {
        "x": mat(residual), "gate": mat(gate), "y": mat(y), "channels": channels,
        "factor": factor, "skip": skip, "ACTIVATION": activation, "OFFSET": offset_type(o, weight, residual),
    }  # fmt: skip
    with torch.cuda.device_of(o):
        launch(
            _projection_fwd_kernel, (batch * tiles_l * tiles_n,), **shared,
            o=mat(o), w=mat(weight), bias=mat(bias), pre_ptr=pre if save or norm_match else None, squares_ptr=squares,
            **row_length(length, o, residual, y), k=k, tiles_l=tiles_l, tiles_m=batch * tiles_l, tiles_n=tiles_n,
            PRECISION=dot_precision(o.dtype), BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            GROUP_M=config.group_m, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if norm_match:
            block_m, block_c = _rows_block(o.device)
            row_tiles = triton.cdiv(length, block_m)
            launch(
                _projection_match_kernel, (batch * row_tiles,), **shared,
                pre_ptr=pre, squares_ptr=squares, **row_length(length, residual, y), tiles_l=row_tiles, tiles_n=tiles_n,
                eps=eps,
                BLOCK_M=block_m, BLOCK_C=block_c, num_warps=4, num_stages=2,
            )  # fmt: skip
    return y, pre if save else o.new_empty(0)


@per_signature
def projection_residual_bwd(
    dy: torch.Tensor,
    o: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    pre: torch.Tensor | None,
    factor: float,
    skip: float,
    activation: str,
    norm_match: bool,
    eps: float,
    need_do: bool,
    need_weight: bool,
    need_residual: bool,
    need_gate: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """do, dW, db in o's dtype, dx in dy's, dw (C,) in float32; empty where not needed."""
    (batch, length, channels), nothing = dy.shape, weight.new_empty
    dx = dy.new_empty(dy.shape) if need_residual else dy.new_empty(0)
    d_o, d_weight, d_bias = nothing(0), nothing(0), nothing(0)
    d_gate = nothing(channels if need_gate else 0, dtype=torch.float32)
    scale = factor if gate is None else gate.to(torch.float32)
    # Without h dh is w dy, and a number w is left to the products.
    alpha, sum_dh = 1.0, None
    if pre is None and gate is None and dy.dtype == weight.dtype:
        dh, alpha = dy.reshape(-1, channels), factor
    elif pre is None:
        dh = (dy.to(torch.float32) * scale).to(weight.dtype).view(-1, channels)
    else:
        dh = nothing((batch * length, channels))
        block_m, block_c = _rows_block(dy.device)
        tiles_l = triton.cdiv(length, block_m)
        parts = dy.new_empty((batch * tiles_l, 2, channels), dtype=torch.float32)
        if batch * length > 0:
            with torch.cuda.device_of(dy):
                launch(
                    _projection_bwd_kernel, (batch * tiles_l,),
                    dy=mat(dy), pre_ptr=pre, x=mat(residual), gate=mat(gate), dh_ptr=dh,
                    dx_ptr=dx if need_residual else None, parts_ptr=parts,
                    **row_length(length, dy, residual), channels=channels, tiles_l=tiles_l,
                    factor=factor, skip=skip, eps=eps,
                    ACTIVATION=activation, NORM_MATCH=norm_match, LARGEST=torch.finfo(pre.dtype).max,
                    OFFSET=offset_type(dy, residual),
                    BLOCK_M=block_m, BLOCK_C=block_c, num_warps=4 if vectorised(dy, pre, residual) else 8, num_stages=2,
                )  # fmt: skip
        if need_gate:
            torch.sum(parts[:, 0], 0, out=d_gate)
        sum_dh = parts[:, 1].sum(0)
    if need_do:
        d_o = _product(dh, weight, alpha).view(batch, length, weight.shape[1])
    if need_weight and o is not None:
        d_weight = _product(dh.mT, o.reshape(-1, o.shape[2]), alpha)
    if need_weight and bias is not None:
        sum_dh = dh.sum(0, dtype=torch.float32).mul_(alpha) if sum_dh is None else sum_dh
        d_bias = sum_dh.to(bias.dtype)
    return d_o, d_weight, d_bias, dx, d_gate


def _product(left: torch.Tensor, right: torch.Tensor, alpha: float) -> torch.Tensor:
    """alpha left right, rounded once: 16 bits may hold it and not the product, nor alpha times a factor."""
    if alpha == 1.0:
        return left @ right
    y = left.new_empty((left.shape[0], right.shape[1]))
    return torch.addmm(y, left, right, beta=0.0, alpha=alpha, out=y)


def _rows_block(device: torch.device) -> tuple[int, int]:
    return (32, 32) if target(device) == INTERPRETER else (_ROWS, _CHANNELS)
