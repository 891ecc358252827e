"""An ``nn.MultiheadAttention`` that calls its projections, so that they may carry more than a weight and a bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfused.ops.contract import checks


class CalledAttention(nn.MultiheadAttention):
    """An nn.MultiheadAttention that calls its projections, and may attend to more than the keys it is given."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention, as `torch.nn.MultiheadAttention.forward` documents it.

        Args:
            query: (L, B, E), (B, L, E) when batch_first, or (L, E) without a batch.
            key: (S, B, kdim), (B, S, kdim) or (S, kdim).
            value: (S, B, vdim), (B, S, vdim) or (S, vdim).
            key_padding_mask: (B, S), or (S,) without a batch: bool with True = ignore, or floating and added.
            need_weights: whether the attention weights are returned. Default True; False is faster.
            attn_mask: (L, S) or (B * num_heads, L, S): bool with True = ignore, or floating and added.
            average_attn_weights: mean over heads of the returned weights. Default True.
            is_causal: a promise that attn_mask is causal. Default False.

        Returns:
            The output, of query's shape, and the weights of the given keys, (B, L, S), (B, num_heads, L, S) when not
            averaged, without B for unbatched input, or None.

        Raises:
            ValueError: shapes do not fit one another, or is_causal without attn_mask.
            TypeError: a mask neither bool nor floating, or a nested tensor.
        """
        if self._as_torch():
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        check_call(type(self).__name__, self, query, key, value, key_padding_mask, attn_mask, is_causal)
        q, k, v = in_project(self._project, self._packed(), query, key, value)
        attended, weights = attend(
            self, q, k, v, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal, self._virtual(q)
        )
        return self.out_proj(attended), weights

    def _as_torch(self) -> bool:
        """Whether torch's own forward does what this module stands for."""
        return False

    def _packed(self) -> bool:
        """Whether q, k and v of one input can be one product."""
        return self._qkv_same_embed_dim

    def _project(self, x: Tensor, first: int, last: int) -> Tensor:
        """Projections ``first`` to ``last`` of (q, k, v): (..., K) -> (..., (last - first) * E)."""
        return F.linear(x, *projection(self, first, last))

    def _virtual(self, like: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Keys and values (1, H, n, d), in like's dtype, that every query attends to beside the given ones."""
        return None, None


def in_project(
    project: Callable[[Tensor, int, int], Tensor], packed: bool, query: Tensor, key: Tensor, value: Tensor
) -> list[Tensor]:
    """q, k and v, (..., E) each, with one product for inputs that are one tensor, where they are ``packed``.

    ``project(x, first, last)`` makes projections ``first`` to ``last`` of (q, k, v).
    """
    inputs = query, key, value
    spans = [(0, 1), (1, 2), (2, 3)]
    if packed and key is value:
        spans = [(0, 3)] if query is key else [(0, 1), (1, 3)]
    projected: list[Tensor] = []
    for first, last in spans:
        projected += project(inputs[first], first, last).chunk(last - first, dim=-1)
    return projected


def attend(
    attention: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
    virtual: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
) -> tuple[Tensor, Tensor | None]:
    """What ``attention``, an nn.MultiheadAttention, makes of projections (..., E), before out_proj, and the weights."""
    batched = q.dim() == 3
    if not batched:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    to_heads = (0, 2, 1, 3) if attention.batch_first or not batched else (1, 2, 0, 3)
    q, k, v = (t.unflatten(-1, (attention.num_heads, attention.head_dim)).permute(to_heads) for t in (q, k, v))
    source = k.shape[2]
    k, v = _extend(attention, k, attention.bias_k, virtual[0]), _extend(attention, v, attention.bias_v, virtual[1])

    # Where nothing else masks, scaled_dot_product_attention knows the causal mask by itself.
    is_causal = is_causal and key_padding_mask is None and not need_weights and virtual[0] is None
    added = k.shape[2] - source
    mask = _additive_mask(None if is_causal else attn_mask, key_padding_mask, q, added)
    dropout_p = attention.dropout if attention.training else 0.0
    weights = None
    if need_weights:
        scores = (q * math.sqrt(1.0 / attention.head_dim)) @ k.transpose(-2, -1)
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = F.dropout(weights, dropout_p)
        attended = weights @ v
        weights = weights.mean(dim=1) if average_attn_weights else weights
        weights = weights if virtual[0] is None else weights[..., : -virtual[0].shape[2]]
    else:
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)
    from_heads = (0, 2, 1, 3) if attention.batch_first or not batched else (2, 0, 1, 3)
    attended = attended.permute(from_heads).flatten(2)
    if not batched:
        attended, weights = attended.squeeze(0), None if weights is None else weights.squeeze(0)
    return attended, weights


def _extend(attention: Any, t: Tensor, bias: Tensor | None, virtual: Tensor | None) -> Tensor:
    """(B, H, S, d) with bias_k or bias_v, the zero position and virtual tokens, in this order, after the last."""
    if bias is not None:
        bias = bias.to(t.dtype).view(1, attention.num_heads, 1, attention.head_dim)
        t = torch.cat([t, bias.expand(t.shape[0], -1, -1, -1)], dim=2)
    t = F.pad(t, (0, 0, 0, 1)) if attention.add_zero_attn else t
    return t if virtual is None else torch.cat([t, virtual.expand(t.shape[0], -1, -1, -1)], dim=2)


def _additive_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, added: int) -> Tensor | None:
    """The sum of both masks in q's dtype, broadcastable to (B, H, L, S + added)."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, q.shape[1])))
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None, :])
    total = None
    for mask in masks:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
        mask = F.pad(mask.to(q.dtype), (0, added)) if added else mask.to(q.dtype)
        total = mask if total is None else total + mask
    return total


def check_call(
    name: str,
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> None:
    """Refuse inputs that do not fit ``attention``, an nn.MultiheadAttention, or one another."""
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        checks.tensor(name, argument, tensor)
    if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
        raise ValueError(
            f"{name}: query, key and value must all have 3 dimensions, or 2 without a batch, got shapes "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    for argument, tensor, width in (
        ("query", query, attention.embed_dim), ("key", key, attention.kdim), ("value", value, attention.vdim),
    ):  # fmt: skip
        if tensor.shape[-1] != width:
            raise ValueError(f"{name}: {argument} must have width {width}, got shape {tuple(tensor.shape)}")
    if query.dim() == 2:
        batch, length, source = None, query.shape[0], key.shape[0]
        same_batch = True
    else:
        of_batch, of_length = (0, 1) if attention.batch_first else (1, 0)
        batch, length, source = query.shape[of_batch], query.shape[of_length], key.shape[of_length]
        same_batch = key.shape[of_batch] == batch
    if value.shape[:-1] != key.shape[:-1] or not same_batch:
        raise ValueError(
            f"{name}: key and value must have one length, and query's batch, got shapes {tuple(query.shape)}, "
            f"{tuple(key.shape)}, {tuple(value.shape)}"
        )
    if is_causal and attn_mask is None:
        raise ValueError(f"{name}: is_causal is a hint about attn_mask and needs one, got attn_mask=None")
    per_head = ((1 if batch is None else batch) * attention.num_heads, length, source)
    _check_mask(name, "attn_mask", attn_mask, (length, source), per_head)
    _check_mask(name, "key_padding_mask", key_padding_mask, (source,) if batch is None else (batch, source))


def projection(attention: Any, first: int, last: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of projections ``first`` to ``last`` of an attention's (q, k, v)."""
    rows = slice(first * attention.embed_dim, last * attention.embed_dim)
    whole = last - first == 3
    bias = attention.in_proj_bias if whole or attention.in_proj_bias is None else attention.in_proj_bias[rows]
    if not attention._qkv_same_embed_dim:
        return getattr(attention, f"{'qkv'[first]}_proj_weight"), bias
    return attention.in_proj_weight if whole else attention.in_proj_weight[rows], bias


def _check_mask(name: str, argument: str, mask: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if mask is None:
        return
    checks.tensor(name, argument, mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: {argument} must be bool or floating, got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{name}: {argument} must have shape {expected}, got {tuple(mask.shape)}")
