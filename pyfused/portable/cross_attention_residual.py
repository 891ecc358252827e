"""The core of absorbed cross-attention in plain torch: four narrow products with the rows forward and backward.

Everything is computed in float32 or wider. The output bias is one more column of the probabilities, always 1, and one
more row of F. A norm that is matched is that of c = a F itself: a F F^T a^T loses twice the digits where c is small
against F's rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from pyfused.portable.gemm import baddbmm, bmm
from pyfused.portable.philox import keep_mask

# Elements of x in a block on a CPU: what comes in 16 bits is copied in float32 block by block.
_CPU_BLOCK, _CPU_WIDENED, _BLOCK = 1 << 22, 1 << 20, 1 << 26


def cross_attention_residual_fwd(
    x: Tensor,
    e: Tensor,
    c: Tensor | None,
    f: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    weight: float,
    norm_match: bool,
    eps: float,
    dropout_p: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y (B, L, C) in x's dtype, p in e's; see `pyfused.ops.cross_attention_residual` for the contract."""
    wide = torch.promote_types(e.dtype, torch.float32)
    heads, tokens = e.shape[1:3]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    saved = e.new_empty(_saved_shape(x, e) if save else 0)
    keys, values = _stacked(e, wide), _with_bias(f, bias, wide)
    scale = weight if gate is None else gate.to(wide)
    gated = None if norm_match else values * scale
    for images, rows, first in _blocks(x, e):
        part = x[images, rows].to(wide)
        p = _probabilities(part, _of(keys, images), _of(c, images), heads, tokens)
        if save:
            saved[images, rows].copy_(p)
        a = _dropped(p, seed, dropout_p, first, heads, tokens, bias is not None)
        out = y[images, rows]
        total = out if out.dtype == wide else torch.empty_like(part)
        if gated is None:
            branch = bmm(a, _of(values, images))
            branch.mul_(_match(branch, part, eps)[0])
            torch.add(part, branch.mul_(scale), out=total)
        else:
            baddbmm(part, a, _of(gated, images), total)
        if total is not out:
            out.copy_(total)
    return y, saved


def cross_attention_residual_bwd(
    dy: Tensor,
    x: Tensor | None,
    e: Tensor,
    c: Tensor | None,
    f: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    p: Tensor | None,
    seed: Tensor | None,
    weight: float,
    norm_match: bool,
    eps: float,
    dropout_p: float,
    need_dx: bool,
    need_keys: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx in dy's dtype, dc and db_o in their tensors' dtypes, dE, dF, dw (C,) wide; empty where not needed."""
    wide = torch.promote_types(e.dtype, torch.float32)
    batch, heads, tokens, _ = e.shape
    columns = heads * tokens
    nothing = e.new_empty
    dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device) if need_dx else dy.new_empty(0)
    keys, values = _stacked(e, wide), _with_bias(f, bias, wide)
    scale = weight if gate is None else gate.to(wide)
    gated = None if norm_match else values * scale
    d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
    d_c = keys.new_zeros((batch if c is None else c.shape[0], tokens, heads))
    d_gate = keys.new_zeros(values.shape[2] if need_values else 0)
    for images, rows, first in _blocks(dy, e):
        g = dy[images, rows].to(wide)
        part = None if x is None else x[images, rows].to(wide)
        if p is None:
            kept = _probabilities(part, _of(keys, images), _of(c, images), heads, tokens)
        else:
            kept = p[images, rows].to(wide)
        a = _dropped(kept, seed, dropout_p, first, heads, tokens, bias is not None)
        upstream = g
        if norm_match:
            # What autograd would have: rho w dy - kappa c, the gradient of c = a F. kappa is gc |x| / (|c| (|c| +
            # eps)^2), with 1 / |c| = 0 at c = 0.
            branch = bmm(a, _of(values, images))
            rho, norm, inverse = _match(branch, part, eps)
            length = part.norm(dim=-1, keepdim=True)
            upstream = g * scale
            along = (upstream * branch).sum(-1, keepdim=True)
            if need_values and gate is not None:
                d_gate += (g * branch).mul_(rho).sum((0, 1))
            kappa = along * rho * inverse / norm.masked_fill(norm == 0, torch.inf)
            upstream.mul_(rho).addcmul_(branch, kappa, value=-1)
        if need_values:
            _add(d_values, images, bmm(a.mT, upstream))
        if not (need_dx or need_keys):
            continue
        da = bmm(upstream, _of(values if norm_match else gated, images).mT)
        dp = da[..., :columns].unflatten(-1, (tokens, heads))
        if dropout_p > 0.0:
            dp = _masked(dp, seed, dropout_p, first)
        kept = kept.unflatten(-1, (tokens, heads))
        ds = torch._softmax_backward_data(dp, kept, 2, wide).flatten(2)
        if need_keys:
            if part is not None:
                _add(d_keys, images, bmm(ds.mT, part))
            _add(d_c, images, ds.sum(1).unflatten(-1, (tokens, heads)))
        if need_dx:
            out = dx[images, rows]
            total = out if out.dtype == wide else torch.empty_like(g)
            baddbmm(g, ds, _of(keys, images), total)
            if norm_match:
                total.addcmul_(part, along * inverse / length.masked_fill(length == 0, torch.inf))
            if total is not out:
                out.copy_(total)
    de = d_keys.unflatten(1, (tokens, heads)).transpose(1, 2).contiguous() if need_keys else d_keys.new_empty(0)
    dc = d_c.transpose(1, 2).to(c.dtype).contiguous() if need_keys and c is not None else nothing(0)
    if not need_values:
        return dx, de, dc, d_values.new_empty(0), nothing(0), d_gate
    if not norm_match:
        if gate is not None:
            d_gate = (values * d_values).sum((0, 1))
        d_values.mul_(scale)
    df = d_values[:, :columns].unflatten(1, (tokens, heads)).transpose(1, 2).contiguous()
    db = nothing(0) if bias is None else d_values[:, columns].sum(0).to(bias.dtype)
    return dx, de, dc, df, db, d_gate


def _saved_shape(x: Tensor, e: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], e.shape[1] * e.shape[2]


def _stacked(e: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, T, C) -> (B, T H, C): softmax over a dimension that is not the last is computed many heads at a time."""
    return e.transpose(1, 2).flatten(1, 2).to(dtype)


def _with_bias(f: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """F (B, T H, C) and, below it, b_o."""
    stacked = _stacked(f, dtype)
    if bias is None:
        return stacked
    return torch.cat((stacked, bias.to(dtype).expand(f.shape[0], 1, -1)), dim=1)


def _of(tensor: Tensor | None, images: slice) -> Tensor | None:
    """The part that belongs to the images: all of it where one serves every image."""
    return tensor if tensor is None or tensor.shape[0] == 1 else tensor[images]


def _add(total: Tensor, images: slice, part: Tensor) -> None:
    if total.shape[0] == 1:
        total.add_(part.sum(0, keepdim=True) if part.shape[0] > 1 else part)
    else:
        total[images].add_(part)


def _blocks(x: Tensor, e: Tensor) -> Iterator[tuple[slice, slice, int]]:
    """(images, rows, first row of all) of blocks that cover (B, L, C)."""
    if x.numel() == 0:
        return
    batch, length, channels = x.shape
    block = _BLOCK if x.device.type != "cpu" else _CPU_BLOCK if x.dtype.itemsize >= 4 else _CPU_WIDENED
    most = max(16, block // max(channels, e.shape[1] * e.shape[2]))
    together = max(1, most // length)
    for image, row in itertools.product(range(0, batch, together), range(0, length, most)):
        yield slice(image, min(image + together, batch)), slice(row, row + most), image * length + row


def _probabilities(x: Tensor, keys: Tensor, c: Tensor | None, heads: int, tokens: int) -> Tensor:
    """softmax over T of x E^T + c: (images, rows, T H); 0 where every key is masked."""
    logits = bmm(x, keys.mT).unflatten(-1, (tokens, heads))
    if c is None:
        return logits.softmax(2).flatten(2)
    c = c.transpose(1, 2)[:, None].to(logits.dtype)
    dead = (c == -torch.inf).all(2, keepdim=True)
    return logits.add_(c).softmax(2).masked_fill_(dead, 0.0).flatten(2)


def _dropped(
    p: Tensor, seed: Tensor | None, dropout_p: float, first: int, heads: int, tokens: int, bias: bool
) -> Tensor:
    """drop(p) and, for a bias, a column of ones."""
    if dropout_p > 0.0:
        p = _masked(p.unflatten(-1, (tokens, heads)), seed, dropout_p, first).flatten(2)
    return torch.nn.functional.pad(p, (0, 1), value=1.0) if bias else p


def _masked(p: Tensor, seed: Tensor, dropout_p: float, first: int) -> Tensor:
    """(images, rows, T, H) after dropout; column of the mask h T' + t with T' the power of two from T on."""
    images, rows, tokens, heads = p.shape
    padded = 1 << (tokens - 1).bit_length()
    keep = keep_mask(seed, first, images * rows, heads * padded, dropout_p)
    keep = keep.view(images, rows, heads, padded)[..., :tokens].transpose(2, 3)
    return p * keep * (1.0 / (1.0 - dropout_p))


def _match(c: Tensor, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """rho = |x| / (|c| + eps), |c| and 1 / (|c| + eps), each (images, rows, 1); 1 / 0 is 0."""
    norm = c.norm(dim=-1, keepdim=True)
    denominator = norm + eps
    inverse = 1.0 / denominator.masked_fill_(denominator == 0, torch.inf)
    return x.norm(dim=-1, keepdim=True) * inverse, norm, inverse
