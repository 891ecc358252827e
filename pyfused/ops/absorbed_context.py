"""What the absorbed plans of cross-attention make of a context, with a derivative by hand.

    K = context W_k^T + b_k         V = context W_v^T + b_v             (B T, H d), in the context's dtype
    E[h] = s K[h] W_q[h]            c[h] = s K[h] b_q[h]                s = 1 / sqrt(d), in float32 or wider
    F[h] = V[h] W_o[h]^T

Backward:

    dK[h] = s (dE[h] W_q[h]^T + dc[h] b_q[h]^T)          dV[h] = dF[h] W_o[h]
    dW_q[h] = s K[h]^T dE[h]        db_q[h] = s K[h]^T dc[h]            dW_o[h] = dF[h]^T V[h]
    dW_k = dK^T context             db_k = sum dK                       as of dV: dW_v, db_v
    dcontext = dK W_k + dV W_v

A dozen products, where autograd would take fifty steps: next to the rows of x a context is small, and what it costs is
what the host takes to ask for it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfused.ops.contract import checks, registry

# (B, H, T, C), (B, H, T) or None, (B, H, T, C)
Absorbed = tuple[Tensor, Tensor | None, Tensor]


class _AbsorbedContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx, context, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, out_weight, heads):
        need_context, need_q, need_q_bias, need_k, need_k_bias = ctx.needs_input_grad[:5]
        need_keys = need_context or need_k or need_k_bias
        need_values = need_context or any(ctx.needs_input_grad[5:8])
        absorbed, k, v = _absorbed(context, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, out_weight, heads)
        wanted = need_keys or need_q, need_keys or need_q_bias, need_values
        ctx.mark_non_differentiable(
            *(output for output, needed in zip(absorbed, wanted, strict=True) if output is not None and not needed)
        )
        ctx.save_for_backward(context, q_weight, q_bias, k_weight, v_weight, out_weight, k, v)
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in (k_bias, v_bias)]
        ctx.heads = heads
        return absorbed

    @staticmethod
    @registry.differentiable_once
    def backward(ctx, de, dc, df):
        needs = ctx.needs_input_grad
        need_context, need_q, need_q_bias = needs[:3]
        # Read once: activation checkpointing hands them out once.
        context, q_weight, q_bias, k_weight, v_weight, out_weight, k, v = ctx.saved_tensors
        heads, wide, rows = ctx.heads, de.dtype, context.reshape(-1, context.shape[2])
        width = q_weight.shape[0] // heads
        gradients: list[Tensor | None] = [None] * 8
        with checks.without_autocast(context):
            # Index of the weight, whose bias is the next; the gradient of what it makes; the weight; its bias's dtype.
            projected: list[tuple[int, Tensor, Tensor, torch.dtype | None]] = []
            if need_context or any(needs[1:5]):
                de = _heads_first(de).mul(width**-0.5)
                dc = None if q_bias is None else _heads_first(dc.unsqueeze(-1)).mul(width**-0.5)
                keys = _by_head(k, heads).to(wide).mT if need_q or need_q_bias else None
                if need_q:
                    gradients[1] = torch.bmm(keys, de).view(q_weight.shape).to(q_weight.dtype)
                if need_q_bias:
                    gradients[2] = torch.bmm(keys, dc).view(-1).to(q_bias.dtype)
                if need_context or needs[3] or needs[4]:
                    dk = torch.bmm(de, _rows_by_head(q_weight, heads).to(wide).mT)
                    if dc is not None:
                        dk.addcmul_(dc, q_bias.reshape(heads, 1, width).to(wide))
                    projected.append((3, _side_by_side(dk), k_weight, ctx.bias_dtypes[0]))
            if need_context or any(needs[5:8]):
                df = _heads_first(df)
                if needs[7]:
                    gradients[7] = _side_by_side(torch.bmm(df.mT, _by_head(v, heads).to(wide))).to(out_weight.dtype)
                if need_context or needs[5] or needs[6]:
                    dv = torch.bmm(df, _columns_by_head(out_weight, heads).to(wide))
                    projected.append((5, _side_by_side(dv), v_weight, ctx.bias_dtypes[1]))
            for at, wide_gradient, weight, bias_dtype in projected:
                gradient = wide_gradient.to(context.dtype)
                if needs[at]:
                    gradients[at] = torch.mm(gradient.t(), rows).to(weight.dtype)
                if needs[at + 1]:
                    gradients[at + 1] = wide_gradient.sum(0).to(bias_dtype)
                if need_context:
                    part = torch.mm(gradient, weight.to(context.dtype))
                    gradients[0] = part if gradients[0] is None else gradients[0].add_(part)
        if need_context:
            gradients[0] = gradients[0].view(context.shape)
        return *gradients, None


def absorb(
    name: str, context: Tensor, projections: Mapping[str, Tensor | None], heads: int, directly: bool
) -> Absorbed:
    """E and F (B, H, T, C), float32 or wider, and c (B, H, T), None without ``q_bias``, of a context (B, T, Cc).

    Args:
        name: the operator that errors name.
        context: its dtype is the one that K and V are made in.
        projections: by name and in order, all but ``out_bias``.
        heads: H.
        directly: as `registry.run`'s.
    """
    if not directly:
        registry.refuse_tangents(name, {"context": context, **projections})
    tensors = (context, *projections.values())
    return registry.run(name, _AbsorbedContext, _without_gradient, tensors, (heads,), (), directly)


def _without_gradient(*arguments) -> tuple[Absorbed]:
    return (_absorbed(*arguments[:-1])[0],)


def _absorbed(
    context, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, out_weight, heads
) -> tuple[Absorbed, Tensor, Tensor]:
    """E, c and F; K and V."""
    dtype = context.dtype
    wide = torch.promote_types(dtype, torch.float32)
    (batch, tokens, _), width = context.shape, q_weight.shape[0] // heads
    with checks.without_autocast(context):
        k, v = (
            F.linear(context, weight.to(dtype), None if bias is None else bias.to(dtype))
            for weight, bias in ((k_weight, k_bias), (v_weight, v_bias))
        )
        keys, values = _by_head(k, heads).to(wide) * width**-0.5, _by_head(v, heads).to(wide)
        e = _batch_first(torch.bmm(keys, _rows_by_head(q_weight, heads).to(wide)), batch, tokens)
        f = _batch_first(torch.bmm(values, _columns_by_head(out_weight, heads).to(wide).mT), batch, tokens)
        c = None
        if q_bias is not None:
            # No product, whose strides would depend on the batch: other kernels for each.
            logits = (keys.transpose(0, 1) * q_bias.reshape(heads, width).to(wide)).sum(-1)
            c = logits.view(batch, tokens, heads).transpose(1, 2)
    return (e, c, f), k, v


def _by_head(tokens: Tensor, heads: int) -> Tensor:
    """(B, T, H d) -> (H, B T, d)."""
    return tokens.reshape(-1, heads, tokens.shape[2] // heads).transpose(0, 1)


def _side_by_side(by_head: Tensor) -> Tensor:
    """(H, M, d) -> (M, H d), as of a weight (H, C, d) -> (C, H d)."""
    heads, rows, width = by_head.shape
    return by_head.transpose(0, 1).reshape(rows, heads * width)


def _batch_first(by_head: Tensor, batch: int, tokens: int) -> Tensor:
    """(H, B T, C) -> (B, H, T, C)."""
    heads, _, channels = by_head.shape
    return by_head.view(heads, batch, tokens, channels).transpose(0, 1)


def _heads_first(tensor: Tensor) -> Tensor:
    """(B, H, T, C) -> (H, B T, C)."""
    batch, heads, tokens, channels = tensor.shape
    return tensor.transpose(0, 1).reshape(heads, batch * tokens, channels)


def _rows_by_head(weight: Tensor, heads: int) -> Tensor:
    """(H d, C) -> (H, d, C)."""
    return weight.reshape(heads, weight.shape[0] // heads, weight.shape[1])


def _columns_by_head(weight: Tensor, heads: int) -> Tensor:
    """(C, H d) -> (H, C, d)."""
    return weight.reshape(weight.shape[0], heads, weight.shape[1] // heads).transpose(0, 1)
