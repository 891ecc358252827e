"""What ``pyfused.cross_attention_residual`` and ``pyfused.projection_residual`` compute, in the plainest PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfused.reference.adapter import ACTIVATIONS
from pyfused.reference.philox import dropout_keep_mask


def norm_matched(c: Tensor, x: Tensor, eps: float) -> Tensor:
    """``c * |x| / (|c| + eps)``, norms over the last dimension in float32 or wider; 0 where that denominator is 0."""
    wide = torch.promote_types(c.dtype, torch.float32)
    denominator = c.to(wide).norm(dim=-1, keepdim=True) + eps
    ratio = x.to(wide).norm(dim=-1, keepdim=True) / denominator.masked_fill(denominator == 0, torch.inf)
    return (c * ratio).to(c.dtype)


def projection_residual(
    o: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor,
    gate: float | Tensor = 0.1,
    skip: float = 1.0,
    activation: str = "identity",
    norm_match: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """``skip * residual + gate * match(phi(o weight^T + bias))``; shapes and dtypes as in `pyfused`."""
    weight, bias = weight.to(o.dtype), None if bias is None else bias.to(o.dtype)
    c = ACTIVATIONS[activation](F.linear(o, weight, bias))
    if norm_match:
        c = norm_matched(c, residual, eps)
    return (skip * residual + gate * c).to(residual.dtype)


def attention_probabilities(
    q: Tensor, k: Tensor, key_padding_mask: Tensor | None, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """(B, H, L, T) from q (B, H, L, d) and k (B or 1, H, T, d), dropped from; 0 where every key is masked."""
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    if key_padding_mask is None:
        p = logits.softmax(-1)
    else:
        dead = key_padding_mask.all(-1, keepdim=True)
        p = logits.masked_fill((key_padding_mask & ~dead)[:, None, None], -torch.inf).softmax(-1)
        p = p.masked_fill(dead[:, None, None], 0.0)
    if dropout_p > 0.0:
        assert seed is not None
        batch, heads, length, tokens = p.shape
        padded = 1 << (tokens - 1).bit_length()
        keep = dropout_keep_mask(seed, batch * length, heads * padded, dropout_p)
        keep = keep.view(batch, length, heads, padded)[..., :tokens].transpose(1, 2)
        p = p * keep / (1.0 - dropout_p)
    return p


def cross_attention_residual(
    x: Tensor,
    context: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    num_heads: int,
    weight: float | Tensor = 0.1,
    norm_match: bool = False,
    eps: float = 1e-6,
    normalize_context: bool = False,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """``x + weight * match(CrossAttention(x, context))``; shapes and dtypes as in `pyfused.cross_attention_residual`.

    ``seed`` is required when dropout acts, and gives the mask that the absorbed plan draws on every backend.
    """
    if normalize_context:
        # float16 has no 1e-12.
        wide = torch.promote_types(context.dtype, torch.float32)
        context = F.normalize(context.to(wide), dim=-1, eps=1e-12).to(context.dtype)

    def heads(tokens: Tensor, projection: Tensor, bias: Tensor | None) -> Tensor:
        projected = F.linear(tokens, projection.to(tokens.dtype), None if bias is None else bias.to(tokens.dtype))
        return projected.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    q, k, v = heads(x, q_weight, q_bias), heads(context, k_weight, k_bias), heads(context, v_weight, v_bias)
    p = attention_probabilities(q, k, key_padding_mask, dropout_p if training else 0.0, seed)
    attended = (p @ v).transpose(1, 2).flatten(2)
    return projection_residual(
        attended, out_weight, out_bias, residual=x, gate=weight, norm_match=norm_match, eps=eps
    )  # fmt: skip
