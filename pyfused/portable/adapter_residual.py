"""``adapter_residual`` in plain torch, by blocks of rows that stay in cache from the first product to the last sum.

Everything is computed in float32 or wider. gamma goes into the weights, U' = gamma U, which no dtype in use rounds to
nothing; inputs of 16 bits are widened block by block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyfused.portable.activations import ACTIVATIONS
from pyfused.portable.gemm import (
    add_outer_,
    add_product_,
    beside,
    cast,
    narrow_first,
    one_image,
    product,
    small_images,
    sum_over_rows,
)
from pyfused.portable.philox import dropout_

# Elements of z in a block: products want many rows, copies in float32 of what comes in 16 bits want few.
_CPU_BLOCK, _CPU_WIDENED, _BLOCK = 1 << 22, 1 << 20, 1 << 26
# Rows that are added up one after another.
_CHAIN = 512
# Up to as many rows two calls take less time than the one pass, which is seven.
_FEW = 64
# Images of fewer rows than this are computed side by side.
_SMALL = 50
# Samples of fewer multiplications, rows x C x h, are computed, dropped or not: those between two dropped ones would be
# a block of their own, which takes the host longer.
_SKIPPED = 1 << 21


class _Block(NamedTuple):
    """Rows of one image, or several whole images; ``first`` is their first row of all. ``live``: not dropped.

    ``whole``: all rows there are.
    """

    images: slice
    rows: slice
    first: int
    live: bool
    whole: bool

    def of(self, x: Tensor) -> Tensor:
        """x (B, L, C) -> its part (images, rows, C), a view."""
        return x if self.whole else x[self.images, self.rows]

    def scale(self, sample_scale: Tensor | None) -> Tensor | None:
        """k (images, 1, 1)."""
        return None if sample_scale is None else sample_scale[self.images, None, None]


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
    z_channels_first: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y (B, L, C) in the residual's dtype, h in z's; see `pyfused.ops.adapter_residual` for the contract."""
    wide = torch.promote_types(z.dtype, torch.float32)
    down, d_bias, up, u_bias = _rounded(wide, z.dtype, down_weight, down_bias, up_weight, up_bias)
    gamma = None if layer_scale is None else cast(layer_scale, wide)
    if gamma is not None:
        up, u_bias = up * gamma[:, None], None if u_bias is None else u_bias * gamma
    y = _rows_like(z if residual is None else residual, z.shape[2], channels_first)
    hidden = z.new_empty((z.shape[0] * z.shape[1], down.shape[0])) if save else None
    scale = None if sample_scale is None else cast(sample_scale, wide)
    small = small_images(z, z_channels_first, _SMALL)
    pre = None if hidden is None else _rows_of(hidden, z, z_channels_first, small)
    by_sample = _by_sample(sample_scale, z, z if residual is None else residual, y, pre)
    for block in _blocks(by_sample[0], down.shape[0], sample_scale):
        x, stream, out, pre = (None if tensor is None else block.of(tensor) for tensor in by_sample)
        if not block.live:
            out.copy_(stream)
            if pre is not None:
                pre.zero_()
            continue
        k = block.scale(scale)
        dead = _dead(k)
        x = _wide(_alive(x, dead), wide, small)
        h = product(x, down, z_channels_first, d_bias, out=None if pre is None else _computed(pre, wide))
        if pre is not None:
            _store(h, pre)
        a = _activated(h, activation, seed, dropout_p, block.first)
        if k is not None:
            a.mul_(k)
        total = _total(x, skip, gamma, k, _computed(out, wide), stream, a, up, u_bias, small)
        if dead is not None:
            _copy_dead(dead, stream, total)
        _store(total, out)
    return y, z.new_empty(0) if hidden is None else hidden


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
    gamma = None if layer_scale is None else cast(layer_scale, wide)
    gated_up = up if gamma is None else up * gamma[:, None]
    dz = _rows_like(dy, up.shape[0], channels_first, dtype) if need_dz else None
    small = small_images(dy, channels_first, _SMALL)
    if hidden is not None:
        hidden = _rows_of(hidden, dy, channels_first, small)
    sums = _Sums()
    transposed = narrow_first(dy.shape[0] * dy.shape[1], *up.shape)
    scale = None if sample_scale is None else cast(sample_scale, wide)
    by_sample = _by_sample(sample_scale, dy, z, hidden, dz)
    for block in _blocks(by_sample[0], down.shape[0], sample_scale):
        g, x, h, out = (None if tensor is None else block.of(tensor) for tensor in by_sample)
        plus = g if z_is_residual else None
        if not block.live:
            if out is not None:
                out.zero_() if plus is None else out.copy_(plus)
            continue
        k = block.scale(scale)
        dead = _dead(k)
        g = _wide(_alive(g, dead), wide, small)
        x = None if x is None else _alive(x, dead)
        if h is None:
            x = _wide(x, wide, small)
            h = product(x, down, channels_first, d_bias)
        else:
            h = cast(h, wide)
        dh = _dropped(product(g, gated_up.t(), channels_first), seed, dropout_p, block.first)
        if k is not None:
            dh.mul_(k)
        ACTIVATIONS[activation][1](dh, h, dh)
        if out is not None:
            total = _total(g, skip, gamma, k, _computed(out, wide), plus, dh, down.t(), None, small)
            _store(total, out)
            del total
        # What is small or of 16 bits has a copy of x, which lives no longer than it must, as dh does.
        if x is not None and hidden is not None:
            x = _wide(x, wide, small)
        if need_down:
            if d_bias is not None:
                sums.add("down_bias", dh.sum((0, 1)))
            if x is not None:
                sums.add_outer("down", dh, x)
        del dh
        if need_up:
            scaled = g if k is None else g * k
            if skip != 0.0 and x is not None:
                dot, upstream = _sum_rows_with(scaled, x)
                sums.add("dy z", dot if skip == 1.0 else dot.mul_(skip))
                sums.add("dy", upstream)
            elif u_bias is not None:
                sums.add("dy", scaled.sum((0, 1)))
            del scaled, x
            a = _activated(h, activation, seed, dropout_p, block.first)
            a = a if k is None else a.mul_(k)
            sums.add_outer("up^T", a, g) if transposed else sums.add_outer("up", g, a)
    del gated_up
    parameters = _gradients(sums.of, down_weight, down_bias, up_weight, up_bias, up, u_bias, gamma, need_down, need_up)
    return dy.new_empty(0, dtype=dtype) if dz is None else dz, *parameters


class _Sums:
    """Sums over blocks, by name."""

    def __init__(self) -> None:
        self.of: dict[str, Tensor] = {}

    def add(self, name: str, part: Tensor) -> None:
        """``part``, which is the caller's no longer."""
        self.of[name] = part if name not in self.of else self.of[name].add_(part)

    def add_outer(self, name: str, left: Tensor, right: Tensor) -> None:
        """The sum over rows of left^T right."""
        if name in self.of:
            add_outer_(self.of[name], left, right)
        else:
            self.of[name] = sum_over_rows(left, right, left.dtype)


def _gradients(
    sums, down_weight, down_bias, up_weight, up_bias, up, u_bias, gamma, need_down, need_up
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dD, dd, dU, du and dgamma from the sums over rows; a sum of no rows is not there."""

    def total(name: str, *shape: int) -> Tensor:
        return sums[name] if name in sums else up.new_zeros(shape)

    (channels, width), nothing = up.shape, up_weight.new_empty
    d_down = cast(total("down", width, channels), down_weight.dtype) if need_down else nothing(0)
    d_down_bias = nothing(0)
    if need_down and down_bias is not None:
        d_down_bias = cast(total("down_bias", width), down_bias.dtype)
    if not need_up:
        return d_down, d_down_bias, nothing(0), nothing(0), nothing(0, dtype=up.dtype)
    upstream = total("dy", channels)
    if "up^T" in sums:
        sums["up"] = torch.empty_like(up, memory_format=torch.contiguous_format).copy_(sums["up^T"].t())
    d_up = total("up", channels, width)
    d_gamma = (d_up * up).sum(1)
    if "dy z" in sums:
        d_gamma.add_(sums["dy z"])
    if u_bias is not None:
        d_gamma.addcmul_(upstream, u_bias)
    if gamma is not None:
        d_up.mul_(gamma[:, None])
        upstream = upstream * gamma
    d_up_bias = nothing(0) if up_bias is None else cast(upstream, up_bias.dtype)
    return d_down, d_down_bias, cast(d_up, up_weight.dtype), d_up_bias, d_gamma


def _rows_of(hidden: Tensor, x: Tensor, channels_first: bool, small: bool) -> Tensor:
    """The buffer (M, h) as (B, L, h), which lies in memory as x (B, L, C) does, or side by side."""
    batch, length, _ = x.shape
    if small:
        return hidden.view(hidden.shape[1], batch, length).permute(1, 2, 0)
    if channels_first:
        return hidden.view(batch, hidden.shape[1], length).transpose(1, 2)
    return hidden.view(batch, length, hidden.shape[1])


def _by_sample(sample_scale: Tensor | None, *tensors: Tensor | None) -> list[Tensor | None]:
    """(1, M, C) as (S, M / S, C), so that every image has one k; views."""

    def split(x: Tensor | None) -> Tensor | None:
        if x is None or x.shape[0] != 1 or sample_scale is None:
            return x
        samples = sample_scale.shape[0]
        return x[0].unflatten(0, (samples, x.shape[1] // max(1, samples)))

    return [split(tensor) for tensor in tensors]


def _blocks(x: Tensor, width: int, sample_scale: Tensor | None) -> Iterator[_Block]:
    """Blocks that cover all rows of (B, L, C), whose bottleneck has ``width``.

    Dropped samples are told apart on a CPU alone: elsewhere that would wait for the device.
    """
    batch, length, channels = x.shape
    if x.numel() == 0:
        return
    runs = [(batch, True)]
    if sample_scale is not None and x.device.type == "cpu" and length * channels * width > _SKIPPED:
        runs = [(len(list(run)), live) for live, run in itertools.groupby((sample_scale != 0).tolist())]
    block = _BLOCK if x.device.type != "cpu" else _CPU_BLOCK if x.dtype.itemsize >= 4 else _CPU_WIDENED
    most = max(16, block // channels)
    image = 0
    for count, live in runs:
        end, together = image + count, max(1, most // length)
        for first, start in itertools.product(range(image, end, together), range(0, length, most)):
            images, rows = slice(first, min(first + together, end)), slice(start, min(start + most, length))
            whole = (images, rows) == (slice(0, batch), slice(0, length))
            yield _Block(images, rows, first * length + start, live, whole)
        image = end


def _dead(k: Tensor | None) -> Tensor | None:
    """Which samples are dropped: their numbers, None where there are none; where asking would wait, a mask like k."""
    if k is None:
        return None
    if k.device.type != "cpu":
        return k == 0
    dead = (k.view(-1) == 0).nonzero().view(-1)
    return dead if dead.numel() else None


def _alive(x: Tensor, dead: Tensor | None) -> Tensor:
    """x (images, rows, C) with zeros in dead samples, whatever those hold."""
    if dead is None:
        return x
    return x.masked_fill(dead, 0.0) if dead.dtype == torch.bool else x.index_fill(0, dead, 0.0)


def _copy_dead(dead: Tensor, x: Tensor, out: Tensor) -> None:
    """out <- x in dead samples."""
    if dead.dtype == torch.bool:
        torch.where(dead, x.to(out.dtype), out, out=out)
    else:
        out.index_copy_(0, dead, x.index_select(0, dead).to(out.dtype))


def _activated(h: Tensor, activation: str, seed: Tensor | None, p: float, first_row: int) -> Tensor:
    return _dropped(ACTIVATIONS[activation][0](h, None), seed, p, first_row)


def _dropped(x: Tensor, seed: Tensor | None, p: float, first_row: int) -> Tensor:
    """drop(x), in place unless x's memory runs by channels."""
    return x if p == 0.0 else dropout_(x.reshape(-1, x.shape[2]), seed, p, first_row).view(x.shape)


def _sum_rows_with(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """sum over rows of g x and of g: (images, rows, C) -> (C,), (C,).

    Of many rows in one pass where it can be: they are the gradients of batch normalisation with mean 0 and variance 1,
    of its weight and bias. torch's returns wrong sums where its two tensors do not lie alike, and adds rows up in one
    long chain.
    """
    if g.shape[0] * g.shape[1] <= _FEW:
        return (g * x).sum((0, 1)), g.sum((0, 1))
    if g.stride(2) != 1:
        g, x = one_image(g, x)
    if g.is_contiguous() and x.is_contiguous():
        chains = [tensor.view(-1, tensor.shape[2]).split(_CHAIN) for tensor in (g, x)]
        parts = [[rows.t()[None, :, :, None] for rows in pair] for pair in zip(*chains, strict=True)]
    elif g.mT.is_contiguous() and x.mT.is_contiguous():
        parts = [[g.mT, x.mT]]
    else:
        return (g * x).sum((0, 1)), g.sum((0, 1))
    zero, one = x.new_zeros(x.shape[2]), x.new_ones(x.shape[2])
    dot, total = _by_batch_norm(parts[0], one, zero)
    for pair in parts[1:]:
        more, also = _by_batch_norm(pair, one, zero)
        dot += more
        total += also
    return dot, total


_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


def _by_batch_norm(pair: Sequence[Tensor], one: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a g and an x, images or rows in the first dimension and channels in the second."""
    return _batch_norm_backward(*pair, one, zero, one, None, None, False, 0.0, [False, True, True])[1:]


def _wide(x: Tensor, dtype: torch.dtype, small: bool) -> Tensor:
    """x (images, rows, C) in a dtype, small images side by side."""
    return beside(x, x.shape[2], dtype).copy_(x) if small else cast(x, dtype)


def _computed(out: Tensor, dtype: torch.dtype) -> Tensor:
    """Where to compute ``out`` in ``dtype``: itself if it can be."""
    return out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)


def _store(total: Tensor, out: Tensor) -> None:
    if total is not out:
        out.copy_(total)


def _scaled(x: Tensor, skip: float, gamma: Tensor | None, k: Tensor | None, out: Tensor, plus: Tensor | None) -> Tensor:
    """out <- plus + skip k gamma x."""
    if skip == 0.0:
        return out.zero_() if plus is None else out.copy_(plus)
    gates = [gate for gate in (gamma, k) if gate is not None]
    if not gates:
        return torch.mul(x, skip, out=out) if plus is None else torch.add(cast(plus, x.dtype), x, alpha=skip, out=out)
    gate = gates[0] if len(gates) == 1 else gates[0] * gates[1]
    if plus is None:
        return torch.mul(x, gate if skip == 1.0 else gate * skip, out=out)
    return torch.addcmul(cast(plus, x.dtype), x, gate, value=skip, out=out)


def _total(
    x: Tensor,
    skip: float,
    gamma: Tensor | None,
    k: Tensor | None,
    out: Tensor,
    plus: Tensor | None,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    small: bool,
) -> Tensor:
    """out <- plus + skip k gamma x + k b + a W^T."""
    if small:
        # The product lies as a does and not as out: what is added takes it there.
        _scaled(x, skip, gamma, k, out, product(a, weight, True))
        if plus is not None:
            out.add_(plus)
    else:
        _scaled(x, skip, gamma, k, out, plus)
    if bias is not None:
        out.add_(bias) if k is None else out.addcmul_(bias, k)
    if not small:
        add_product_(out, a, weight)
    return out


def _rounded(wide: torch.dtype, dtype: torch.dtype, *parameters: Tensor | None) -> list[Tensor | None]:
    """The parameters as z's dtype holds them, widened."""
    return [None if parameter is None else cast(cast(parameter, dtype), wide) for parameter in parameters]


def _rows_like(x: Tensor, width: int, channels_first: bool, dtype: torch.dtype | None = None) -> Tensor:
    batch, length, _ = x.shape
    if channels_first:
        return x.new_empty((batch, width, length), dtype=dtype).transpose(1, 2)
    return x.new_empty((batch, length, width), dtype=dtype)
