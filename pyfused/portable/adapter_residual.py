"""``adapter_residual`` in plain torch, by blocks of rows that stay in cache from the first product to the last sum.

Everything is computed in float32 or wider. gamma goes into the weights, U' = gamma U, which no dtype in use rounds to
nothing; inputs of 16 bits are widened block by block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyfused.portable.activations import ACTIVATIONS
from pyfused.portable.gemm import add_product_, matmul, sum_outer
from pyfused.portable.philox import dropout_

# Elements of z in a block; on a CPU the block and what is made of it stay in the caches.
_CPU_BLOCK, _BLOCK = 1 << 20, 1 << 26
# Images of fewer rows than this are gathered into blocks of about so many elements: products of so few rows are slow.
_SHORT, _GATHERED = 128, 1 << 17
# Samples of fewer rows than this are computed, dropped or not: one block holds many of them.
_SKIPPED_ROWS = 16


class _Block(NamedTuple):
    """Rows of one image, or several whole images; ``first`` is their first row of all. ``live``: not dropped."""

    images: slice
    rows: slice
    first: int
    live: bool

    def of(self, x: Tensor) -> Tensor:
        """x (B, L, C) -> (rows, C), a view where it is one image."""
        return x[self.images, self.rows].reshape(-1, x.shape[2])

    def in_hidden(self, hidden: Tensor) -> Tensor:
        return hidden[self.first : self.first + self._count()]

    def scale(self, sample_scale: Tensor | None, rows: int) -> Tensor | None:
        """k of each row, (rows, 1), or (1, 1) where all rows are of one sample; ``rows``: of all samples together."""
        if sample_scale is None:
            return None
        per_sample = rows // sample_scale.numel()
        first, last = self.first // per_sample, (self.first + self._count() - 1) // per_sample
        if first == last:
            return sample_scale[first].view(1, 1)
        sample = torch.arange(self.first, self.first + self._count(), device=sample_scale.device) // per_sample
        return sample_scale[sample][:, None]

    def _count(self) -> int:
        return (self.images.stop - self.images.start) * (self.rows.stop - self.rows.start)

    def out(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Where to compute this block of y in ``dtype``: y itself if it can be."""
        view = y[self.images, self.rows]
        if y.dtype == dtype and len(view) == 1:
            return view[0]
        return torch.empty((view.shape[0] * view.shape[1], y.shape[2]), dtype=dtype, device=y.device)

    def store(self, out: Tensor, y: Tensor) -> None:
        view = y[self.images, self.rows]
        if out.data_ptr() != view.data_ptr():
            view.copy_(out.view(view.shape))


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
    """y (B, L, C) in the residual's dtype, h (M, h) in z's; see `pyfused.ops.adapter_residual` for the contract."""
    wide = torch.promote_types(z.dtype, torch.float32)
    down, d_bias, up, u_bias = _rounded(wide, z.dtype, down_weight, down_bias, up_weight, up_bias)
    gamma = None if layer_scale is None else layer_scale.to(wide)
    if gamma is not None:
        up, u_bias = up * gamma[:, None], None if u_bias is None else u_bias * gamma
    stream = z if residual is None else residual
    y = _rows_like(stream, z.shape[2], channels_first)
    hidden = z.new_empty((z.shape[0] * z.shape[1], down.shape[0])) if save else z.new_empty(0)
    batch, length, _ = z.shape
    scale = None if sample_scale is None else sample_scale.to(wide)
    for block in _blocks(z, sample_scale):
        if not block.live:
            y[block.images, block.rows].copy_(stream[block.images, block.rows])
            block.in_hidden(hidden).zero_()
            continue
        k = block.scale(scale, batch * length)
        dead = _dead(k)
        rows = _alive(block.of(z), dead).to(wide)
        h = matmul(rows, down, d_bias)
        if save:
            block.in_hidden(hidden).copy_(h)
        a = _activated(h, activation, seed, dropout_p, block.first)
        if k is not None:
            a.mul_(k)
        out = _scaled(rows, skip, gamma, k, block.out(y, wide), plus=block.of(stream))
        if u_bias is not None:
            out.add_(u_bias) if k is None else out.addcmul_(u_bias, k)
        add_product_(out, a, up)
        if dead is not None:
            torch.where(dead, block.of(stream).to(wide), out, out=out)
        block.store(out, y)
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
    wide = torch.promote_types(dtype, torch.float32)
    down, d_bias, up, u_bias = _rounded(wide, dtype, down_weight, down_bias, up_weight, up_bias)
    gamma = None if layer_scale is None else layer_scale.to(wide)
    gated_up = up if gamma is None else up * gamma[:, None]
    channels, width = up.shape
    dz = _rows_like(dy, channels, channels_first, dtype) if need_dz else dy.new_empty(0, dtype=dtype)
    sums = {name: up.new_zeros((width, channels)) for name in ("down", "outer")}
    sums |= {"down_bias": up.new_zeros(width)} | {name: up.new_zeros(channels) for name in ("dy", "dy z")}
    batch, length, _ = dy.shape
    scale = None if sample_scale is None else sample_scale.to(wide)
    for block in _blocks(dy, sample_scale):
        if not block.live:
            if need_dz:
                part = dz[block.images, block.rows]
                part.copy_(dy[block.images, block.rows]) if z_is_residual else part.zero_()
            continue
        k = block.scale(scale, batch * length)
        dead = _dead(k)
        upstream = _alive(block.of(dy), dead).to(wide)
        if hidden is None:
            h = matmul(_alive(block.of(z), dead).to(wide), down, d_bias)
        else:
            h = block.in_hidden(hidden).to(wide)
        t = _dropped(matmul(upstream, gated_up.t()), seed, dropout_p, block.first)
        dh = ACTIVATIONS[activation][1](t, h)
        del t
        if k is not None:
            dh = dh * k
        if need_dz:
            plus = block.of(dy) if z_is_residual else None
            out = _scaled(upstream, skip, gamma, k, block.out(dz, wide), plus)
            add_product_(out, dh, down.t())
            block.store(out, dz)
            del out
        rows = None if z is None else _alive(block.of(z), dead).to(wide)
        if need_down:
            sums["down_bias"].add_(dh.sum(0))
            if rows is not None:
                sum_outer(dh, rows, sums["down"])
        if need_up:
            if k is not None:
                upstream = upstream * k
            sum_outer(_activated(h, activation, seed, dropout_p, block.first), upstream, sums["outer"])
            sums["dy"].add_(upstream.sum(0))
            if skip != 0.0 and rows is not None:
                sums["dy z"].add_((upstream * rows).sum(0), alpha=skip)
    del gated_up
    return dz, *_gradients(sums, down_weight, down_bias, up_weight, up_bias, up, u_bias, gamma, need_down, need_up)


def _gradients(
    sums, down_weight, down_bias, up_weight, up_bias, up, u_bias, gamma, need_down, need_up
) -> tuple[Tensor, ...]:
    """dD, dd, dU, du and dgamma from the sums over rows."""
    nothing = up_weight.new_empty
    d_down = sums["down"].to(down_weight.dtype) if need_down else nothing(0)
    d_down_bias = sums["down_bias"].to(down_bias.dtype) if need_down and down_bias is not None else nothing(0)
    if not need_up:
        return d_down, d_down_bias, nothing(0), nothing(0), nothing(0, dtype=sums["dy"].dtype)
    outer, upstream = sums["outer"], sums["dy"]
    d_gamma = (outer * up.t()).sum(0).add_(sums["dy z"])
    if u_bias is not None:
        d_gamma.addcmul_(upstream, u_bias)
    if gamma is not None:
        outer.mul_(gamma)
        upstream = upstream * gamma
    d_up = torch.empty_like(up_weight, memory_format=torch.contiguous_format).copy_(outer.t())
    d_up_bias = up_weight.new_empty(0) if up_bias is None else upstream.to(up_bias.dtype)
    return d_down, d_down_bias, d_up, d_up_bias, d_gamma


def _blocks(z: Tensor, sample_scale: Tensor | None) -> Iterator[_Block]:
    """Blocks that cover all rows.

    Dropped samples are told apart on a CPU alone: elsewhere that would wait for the device.
    """
    batch, length, channels = z.shape
    rows = batch * length
    runs = [(rows, True)]
    if sample_scale is not None and z.device.type == "cpu" and rows >= _SKIPPED_ROWS * len(sample_scale) > 0:
        groups = itertools.groupby((sample_scale != 0).tolist())
        runs = [(rows // len(sample_scale) * len(list(group)), live) for live, group in groups]
    on_cpu = z.device.type == "cpu"
    most = max(16, (_CPU_BLOCK if on_cpu else _BLOCK) // channels)
    first = 0
    for count, live in runs:
        end = first + count
        while first < end:
            image, start = divmod(first, length)
            images = 1
            if start == 0 and not (on_cpu and length >= _SHORT):
                gathered = min(most, max(16, _GATHERED // channels)) if on_cpu else most
                images = max(1, min(gathered // length, (end - first) // length))
            stop = min(start + most, start + end - first, length)
            yield _Block(slice(image, image + images), slice(start, stop), first, live)
            first += images * (stop - start)


def _dead(k: Tensor | None) -> Tensor | None:
    """Which rows belong to dropped samples; None where none does, as far as that is known without waiting."""
    if k is None or (k.device.type == "cpu" and bool(k.all())):
        return None
    return k == 0


def _alive(x: Tensor, dead: Tensor | None) -> Tensor:
    """x with zeros in dead rows, whatever those hold."""
    return x if dead is None else x.masked_fill(dead, 0.0)


def _activated(h: Tensor, activation: str, seed: Tensor | None, p: float, first_row: int) -> Tensor:
    return _dropped(ACTIVATIONS[activation][0](h), seed, p, first_row)


def _dropped(x: Tensor, seed: Tensor | None, p: float, first_row: int) -> Tensor:
    return x if p == 0.0 else dropout_(x, seed, p, first_row)


def _scaled(x: Tensor, skip: float, gamma: Tensor | None, k: Tensor | None, out: Tensor, plus: Tensor | None) -> Tensor:
    """out <- plus + skip k gamma x."""
    if skip == 0.0:
        return out.zero_() if plus is None else out.copy_(plus)
    gates = [gate for gate in (gamma, k) if gate is not None]
    if not gates:
        return torch.mul(x, skip, out=out) if plus is None else torch.add(plus.to(x.dtype), x, alpha=skip, out=out)
    gate = gates[0] if len(gates) == 1 else gates[0] * gates[1]
    if plus is None:
        return torch.mul(x, gate * skip, out=out)
    return torch.addcmul(plus.to(x.dtype), x, gate, value=skip, out=out)


def _rounded(wide: torch.dtype, dtype: torch.dtype, *parameters: Tensor | None) -> list[Tensor | None]:
    """The parameters as z's dtype holds them, widened."""
    return [None if parameter is None else parameter.to(dtype).to(wide) for parameter in parameters]


def _rows_like(x: Tensor, width: int, channels_first: bool, dtype: torch.dtype | None = None) -> Tensor:
    batch, length, _ = x.shape
    if channels_first:
        return x.new_empty((batch, width, length), dtype=dtype).transpose(1, 2)
    return x.new_empty((batch, length, width), dtype=dtype)
