"""``projection_residual`` in plain torch: the library's product, then everything else block by block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyfused.portable.activations import ACTIVATIONS
from pyfused.portable.gemm import add_product_, cast, product, sum_over_rows

# Elements of y in a block on a CPU: small copies in float32 of what comes in 16 bits.
_CPU_BLOCK, _BLOCK = 1 << 19, 1 << 26


def projection_residual_fwd(
    o: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gate: Tensor | None,
    factor: float,
    skip: float,
    activation: str,
    norm_match: bool,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y (B, L, C) in the residual's dtype, h in o's; see `pyfused.ops.projection_residual` for the contract."""
    wide = torch.promote_types(o.dtype, torch.float32)
    y = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    if activation == "identity" and not norm_match and gate is None and residual.dtype == o.dtype == wide:
        # The product goes onto the residual: the branch has no memory of its own. Not with a gate, whose gradient
        # needs the branch: with and without grad mode y has the same bits.
        if bias is not None and skip == 1.0:
            torch.add(residual, bias, alpha=factor, out=y)
        elif bias is not None:
            torch.add(bias * factor, residual, alpha=skip, out=y)
        else:
            torch.mul(residual, skip, out=y)
        add_product_(y, o, weight, factor)
        return y, o.new_empty(0)
    scale = factor if gate is None else cast(gate, wide)
    pre = product(o, weight, False, bias)
    phi, memory = ACTIVATIONS[activation][0], _Memory(wide)
    for h, x, out in _blocks(pre, residual, y):
        c, x = phi(cast(h, wide), memory.like(h)), cast(x, wide)
        if not norm_match:
            _add(x, skip, c, scale, out)
            continue
        rho = _match(c, x, eps)[0]
        if gate is None:
            rho.mul_(factor)
        else:
            c.mul_(scale)
        _add(x, skip, c, rho, out)
    return y, pre if save else o.new_empty(0)


def projection_residual_bwd(
    dy: Tensor,
    o: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    pre: Tensor | None,
    factor: float,
    skip: float,
    activation: str,
    norm_match: bool,
    eps: float,
    need_do: bool,
    need_weight: bool,
    need_residual: bool,
    need_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """do, dW, db in o's dtype, dx in dy's, dw (C,) wide; empty where not needed."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = factor if gate is None else cast(gate, wide)
    d_residual = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device) if need_residual else dy.new_empty(0)
    d_gate = weight.new_zeros(weight.shape[0], dtype=wide) if need_gate else weight.new_empty(0, dtype=wide)
    # Without h dh is w dy, and a number w is left to the products.
    alpha = 1.0
    if pre is None and gate is None and dy.dtype == weight.dtype:
        dh, alpha = dy, factor
    elif pre is None:
        dh = torch.empty(dy.shape, dtype=weight.dtype, device=dy.device)
        for upstream, out in _blocks(dy, dh):
            out.copy_(upstream.to(wide) * scale)
    else:
        dh, largest = torch.empty_like(pre), torch.finfo(pre.dtype).max
        (phi, times_derivative), memory, second = ACTIVATIONS[activation], _Memory(wide), _Memory(wide)
        blocks = _blocks(dy, pre, residual, d_residual if need_residual else None, dh)
        for upstream, h, x, dx, out in blocks:
            upstream, h = cast(upstream, wide), cast(h, wide)
            x = None if x is None else cast(x, wide)
            c, dc = phi(h, memory.like(h)), out if out.dtype == wide else second.like(out)
            if norm_match:
                rho, length, norm, inverse = _match(c, x, eps)
                along = _along(upstream, c, scale)
                torch.mul(upstream, rho * scale, out=dc)
                dc.addcmul_(c, along * rho * inverse / norm.masked_fill(norm == 0, torch.inf), value=-1)
                if dx is not None:
                    _add(upstream, skip, x, along * inverse / length.masked_fill(length == 0, torch.inf), dx)
                c = c.mul_(rho) if need_gate else c
            else:
                torch.mul(upstream, scale, out=dc)
            if need_gate:
                d_gate += c.mul_(upstream).sum((0, 1))
            times_derivative(dc, h, dc)
            if norm_match and out.dtype == torch.float16:
                # rho is |x| / eps where c is 0: times o = 0, where every key is masked, not NaN.
                torch.where(norm == 0, dc.clamp(-largest, largest), dc, out=dc)
            if dc is not out:
                out.copy_(dc)
    d_o = product(dh, weight.t(), False, alpha=alpha) if need_do else weight.new_empty(0)
    d_weight = weight.new_empty(0)
    if need_weight and o is not None:
        d_weight = sum_over_rows(dh, o, weight.dtype, alpha)
    if not need_weight or bias is None:
        d_bias = weight.new_empty(0)
    else:
        d_bias = cast(dh.sum((0, 1), dtype=wide).mul_(alpha), bias.dtype)
    return d_o, d_weight, d_bias, d_residual, d_gate


class _Memory:
    """Of one block, for all of them: new memory at each costs more than the arithmetic."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._of: Tensor | None = None

    def like(self, block: Tensor) -> Tensor:
        """Of the shape of a block, as large as the first at the most."""
        if self._of is None:
            self._of = torch.empty(block.shape, dtype=self._dtype, device=block.device)
        return self._of[: block.shape[0], : block.shape[1]]


def _add(x: Tensor, skip: float, c: Tensor, w: float | Tensor, out: Tensor) -> None:
    """out <- skip x + w c; in one pass where skip is 1."""
    made = out if out.dtype == x.dtype else None
    if skip != 1.0:
        total = torch.mul(c, w, out=made).add_(x, alpha=skip)
    elif isinstance(w, Tensor):
        total = torch.addcmul(x, c, w, out=made)
    else:
        total = torch.add(x, c, alpha=w, out=made)
    if total is not out:
        out.copy_(total)


def _match(c: Tensor, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rho = |x| / (|c| + eps), |x|, |c| and 1 / (|c| + eps), each (images, rows, 1); 1 / 0 is 0."""
    length, norm = x.norm(dim=-1, keepdim=True), c.norm(dim=-1, keepdim=True)
    denominator = norm + eps
    inverse = 1.0 / denominator.masked_fill_(denominator == 0, torch.inf)
    return length * inverse, length, norm, inverse


def _along(upstream: Tensor, c: Tensor, scale: float | Tensor) -> Tensor:
    """w dy . c of each row, (images, rows, 1)."""
    if not isinstance(scale, Tensor):
        return torch.linalg.vecdot(upstream, c)[..., None].mul_(scale)
    return (upstream * c) @ scale.expand(c.shape[-1])[:, None]


def _blocks(*tensors: Tensor | None) -> Iterator[list[Tensor | None]]:
    """The same rows of all, (B, L, C) or None, part by part."""
    first = next(tensor for tensor in tensors if tensor is not None)
    batch, length, channels = first.shape
    most = max(16, (_CPU_BLOCK if first.device.type == "cpu" else _BLOCK) // channels)
    together = max(1, most // max(1, length))
    for image in range(0, batch, together):
        for row in range(0, length, most):
            yield [None if x is None else x[image : image + together, row : row + most] for x in tensors]
