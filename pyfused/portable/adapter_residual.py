"""``adapter_residual`` in plain torch: blocks of rows that stay in a CPU's cache from the first product to the last sum."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from pyfused.portable.activations import ACTIVATIONS
from pyfused.portable.gemm import product, sum_over_rows
from pyfused.portable.philox import dropout_

# Rows of a block on a CPU; other devices take all rows at once.
_ROWS = 512
# Samples of fewer rows than this are computed, dropped or not: one block holds many of them.
_SKIPPED_ROWS = 16


def adapter_residual_fwd(
    z: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
    seed: Tensor | None,
    skip: float,
    activation: str,
    dropout_p: float,
    channels_first: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y (B, L, C) in the residual's dtype, h (B, L, h) in z's; see `pyfused.ops.adapter_residual` for the contract."""
    down_weight, down_bias, up_weight, up_bias = _cast(z.dtype, down_weight, down_bias, up_weight, up_bias)
    stream = z if residual is None else residual
    gamma = _epilogue(z.dtype, layer_scale)
    y = _rows_like(stream, z.shape[2], channels_first)
    hidden = _rows_like(z, down_weight.shape[0], channels_first) if save else z.new_empty(0)
    scale = _row_scale(z, sample_scale)
    for where, first_row, live in _blocks(z, sample_scale):
        if not live:
            y[where].copy_(stream[where])
            if save:
                hidden[where].zero_()
            continue
        rows, k = _alive(z[where], scale, where)
        h = product(rows, down_weight, channels_first, down_bias)
        if save:
            hidden[where].copy_(h)
        branch = product(_activated(h, activation, seed, dropout_p, first_row), up_weight, channels_first, up_bias)
        if skip != 0.0:
            branch = branch.to(_wide(z.dtype)).add_(rows, alpha=skip)
        _add_gated(stream[where], branch, gamma, k, y[where])
    return y, hidden


def adapter_residual_bwd(
    dy: Tensor,
    z: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
    hidden: Tensor | None,
    seed: Tensor | None,
    skip: float,
    activation: str,
    dropout_p: float,
    channels_first: bool,
    z_is_residual: bool,
    need_dz: bool,
    need_down: bool,
    need_up: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dz (B, L, C) in z's dtype, the parameters' gradients in theirs, dgamma (C,) wide; empty where not needed."""
    dtype = hidden.dtype if z is None else z.dtype
    down, d_bias, up = _cast(dtype, down_weight, down_bias, up_weight)
    gamma = _epilogue(dtype, layer_scale)
    unit, magnitude = _normalised(gamma, dtype)
    dz = _rows_like(dy, dy.shape[2], channels_first).to(dtype) if need_dz else dy.new_empty(0, dtype=dtype)
    sums = _Sums(up_weight, _wide(dtype), need_down, need_up)
    scale = _row_scale(dy, sample_scale)
    for where, first_row, live in _blocks(dy, sample_scale):
        if not live:
            if need_dz:
                dz[where].copy_(dy[where]) if z_is_residual else dz[where].zero_()
            continue
        upstream, k = _alive(dy[where], scale, where)
        rows = None if z is None else _alive(z[where], scale, where)[0]
        h = product(rows, down, channels_first, d_bias) if hidden is None else hidden[where]
        gated = upstream if unit is None else upstream * unit
        t = _drop_rows(product(gated.to(dtype), up.t(), channels_first), seed, dropout_p, first_row)
        dh = ACTIVATIONS[activation][1](t, h)
        if k is not None:
            dh = (dh * k).to(dtype)
        if need_dz:
            branch = product(dh, down.t(), channels_first).to(_wide(dtype))
            if magnitude is not None:
                branch.mul_(magnitude)
            _add_direct(branch, upstream, gamma, k, skip, z_is_residual, dz[where])
        if need_down:
            sums.add_down(dh, rows)
        if need_up:
            activated = _activated(h, activation, seed, dropout_p, first_row)
            sums.add_up(upstream, activated, rows if skip != 0.0 else None, k, dtype)
    return dz, *sums.gradients(down_weight, down_bias, up_weight, up_bias, gamma, magnitude, skip)


class _Sums:
    """The sums over rows that the parameters' gradients are made of, in float32 or wider."""

    def __init__(self, up_weight: Tensor, dtype: torch.dtype, need_down: bool, need_up: bool) -> None:
        channels, hidden = up_weight.shape
        self.dtype, self.need_down, self.need_up = dtype, need_down, need_up
        self.down = up_weight.new_zeros((hidden, channels), dtype=dtype) if need_down else None
        self.down_bias = up_weight.new_zeros(hidden, dtype=dtype) if need_down else None
        self.outer = up_weight.new_zeros((channels, hidden), dtype=dtype) if need_up else None
        self.upstream, self.upstream_z = up_weight.new_zeros((2, channels), dtype=dtype) if need_up else (None, None)

    def add_down(self, dh: Tensor, z: Tensor | None) -> None:
        if z is not None:
            self.down.add_(sum_over_rows(dh, z, self.dtype))
        self.down_bias.add_(dh.sum((0, 1), dtype=self.dtype))

    def add_up(self, dy: Tensor, activated: Tensor, z: Tensor | None, k: Tensor | None, dtype: torch.dtype) -> None:
        if k is not None:
            activated = (activated * k).to(dtype)
        self.outer.add_(sum_over_rows(dy.to(dtype), activated, self.dtype))
        dy = dy.to(self.dtype) if k is None else dy * k
        self.upstream.add_(dy.sum((0, 1)))
        if z is not None:
            self.upstream_z.add_((dy * z).sum((0, 1)))

    def gradients(self, down_weight, down_bias, up_weight, up_bias, gamma, magnitude, skip) -> tuple[Tensor, ...]:
        nothing = up_weight.new_empty(0)
        d_down = d_down_bias = d_up = d_up_bias = nothing
        d_gamma = nothing.to(self.dtype)
        if self.need_down:
            if magnitude is not None:
                self.down.mul_(magnitude)
                self.down_bias.mul_(magnitude)
            d_down = self.down.to(down_weight.dtype)
            d_down_bias = nothing if down_bias is None else self.down_bias.to(down_bias.dtype)
        if self.need_up:
            d_gamma = (up_weight * self.outer).sum(1).add_(self.upstream_z, alpha=skip)
            if up_bias is not None:
                d_gamma.addcmul_(up_bias.to(self.dtype), self.upstream)
            scale = 1.0 if gamma is None else gamma.view(-1)
            d_up_bias = nothing if up_bias is None else self.upstream.mul(scale).to(up_bias.dtype)
            d_up = self.outer.mul(scale if gamma is None else scale[:, None]).to(up_weight.dtype)
        return d_down, d_down_bias, d_up, d_up_bias, d_gamma


def _blocks(z: Tensor, sample_scale: Tensor | None) -> Iterator[tuple[tuple[slice, slice], int, bool]]:
    """(index of rows of one block, its first row m, whether any of its samples is live), which cover all rows.

    Samples are told apart on a CPU alone: elsewhere their scales could only be read by waiting for the device.
    """
    batch, length, _ = z.shape
    if z.device.type != "cpu":
        yield (slice(0, batch), slice(0, length)), 0, True
        return
    rows = batch * length
    runs = [(rows, True)]
    if sample_scale is not None and rows >= _SKIPPED_ROWS * len(sample_scale) > 0:
        per_sample = rows // len(sample_scale)
        groups = itertools.groupby((sample_scale != 0).tolist())
        runs = [(per_sample * len(list(group)), live) for live, group in groups]
    start = 0
    for count, live in runs:
        end = start + count
        while start < end:
            image, first = divmod(start, length)
            step = min(_ROWS, end - start, length - first)
            yield (slice(image, image + 1), slice(first, first + step)), start, live
            start += step


def _row_scale(z: Tensor, sample_scale: Tensor | None) -> Tensor | None:
    """k of each row as (B, L, 1), in float32 or wider."""
    if sample_scale is None or sample_scale.numel() == 0:
        return None
    batch, length, _ = z.shape
    repeats = batch * length // sample_scale.numel()
    scale = sample_scale.to(_wide(z.dtype))[:, None].expand(-1, repeats)
    return scale.reshape(batch, length, 1)


def _alive(x: Tensor, scale: Tensor | None, where: tuple[slice, slice]) -> tuple[Tensor, Tensor | None]:
    """x with zeros in the rows of dropped samples, whatever those hold, and k of its rows."""
    if scale is None:
        return x, None
    k = scale[where]
    if x.device.type == "cpu" and bool((k != 0).all()):
        return x, k
    return x.masked_fill(k == 0, 0.0), k


def _activated(h: Tensor, activation: str, seed: Tensor | None, p: float, first_row: int) -> Tensor:
    return _drop_rows(ACTIVATIONS[activation][0](h), seed, p, first_row)


def _drop_rows(x: Tensor, seed: Tensor | None, p: float, first_row: int) -> Tensor:
    """drop(x) for (B, L, h), whose first row is row ``first_row`` of the mask; may change x."""
    if p == 0.0:
        return x
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return dropout_(rows, seed, p, first_row).view(x.shape)


def _add_gated(residual: Tensor, branch: Tensor, gamma: Tensor | None, k: Tensor | None, out: Tensor) -> None:
    """out <- residual + k gamma branch, rounded once; changes branch."""
    gates = [gate for gate in (k, gamma) if gate is not None]
    if residual.dtype == branch.dtype and branch.dtype == _wide(branch.dtype):
        if len(gates) == 2:
            branch.mul_(gates[0])
        if gates:
            torch.addcmul(residual, branch, gates[-1], out=out)
        else:
            torch.add(residual, branch, out=out)
        return
    branch = branch.to(_wide(branch.dtype))
    for gate in gates:
        branch.mul_(gate)
    out.copy_(branch.add_(residual))


def _add_direct(
    branch: Tensor, dy: Tensor, gamma: Tensor | None, k: Tensor | None, skip: float, z_is_residual: bool, out: Tensor
) -> None:
    """out <- branch + (skip k gamma + [z is the residual]) dy, rounded once; changes branch."""
    direct = 1.0 if z_is_residual else 0.0
    gates = [gate for gate in (k, gamma) if gate is not None]
    if not gates:
        branch.add_(dy, alpha=skip + direct)
    elif skip != 0.0:
        factor = skip * gates[0] if len(gates) == 1 else skip * gates[0] * gates[1]
        branch.addcmul_(dy.to(branch.dtype), factor + direct)
    elif direct:
        branch.add_(dy)
    out.copy_(branch)


def _normalised(gamma: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """gamma = magnitude * unit, |unit| <= 1: products in float16 would lose a gamma of 1e-6, and need no care else."""
    if gamma is None or dtype != torch.float16:
        return gamma, None
    magnitude = gamma.abs().amax()
    magnitude = torch.where(magnitude == 0, 1.0, magnitude)
    return gamma / magnitude, magnitude


def _epilogue(dtype: torch.dtype, layer_scale: Tensor | None) -> Tensor | None:
    return None if layer_scale is None else layer_scale.to(_wide(dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _rows_like(x: Tensor, width: int, channels_first: bool) -> Tensor:
    batch, length, _ = x.shape
    if channels_first:
        return x.new_empty((batch, width, length)).transpose(1, 2)
    return x.new_empty((batch, length, width))
