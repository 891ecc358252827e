"""Attention by torch itself: projections, and what of them depends on the context alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfused.ops.absorbed_context import absorb
from pyfused.ops.contract import checks

PROJECTIONS = ("q_weight", "q_bias", "k_weight", "k_bias", "v_weight", "v_bias", "out_weight", "out_bias")


@dataclass(frozen=True)
class Projections:
    """The projections of one attention, weights and biases as torch's linear layers hold them.

    Attributes:
        q_weight: (H d, C).
        k_weight, v_weight: (H d, Cc).
        out_weight: (C, H d).
        q_bias, k_bias, v_bias: (H d,) or None.
        out_bias: (C,) or None.
        num_heads: H.
    """

    q_weight: Tensor
    q_bias: Tensor | None
    k_weight: Tensor
    k_bias: Tensor | None
    v_weight: Tensor
    v_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    num_heads: int

    @property
    def head_dim(self) -> int:
        return self.q_weight.shape[0] // self.num_heads

    @property
    def absorbed(self) -> dict[str, Tensor | None]:
        """Those that the absorbed plans make E, c and F of."""
        return {name: getattr(self, name) for name in PROJECTIONS[:-1]}

    def heads(self, tokens: Tensor, part: str) -> Tensor:
        """(B, T, ...) -> (B, T, H, d) by the projection ``part``, "q", "k" or "v", in the tokens' dtype."""
        weight, bias = getattr(self, f"{part}_weight"), getattr(self, f"{part}_bias")
        bias = None if bias is None else bias.to(tokens.dtype)
        projected = F.linear(tokens, weight.to(tokens.dtype), bias)
        return projected.reshape(*tokens.shape[:2], self.num_heads, self.head_dim)


@dataclass(frozen=True)
class PreparedContext:
    """A context as one plan reads it.

    Attributes:
        plan: the plan.
        dtype: of the products with x's rows.
        keys: E (B or 1, H, T, C), or K (B or 1, T, H, d) in plan "standard". E is float32 or wider: its gradient, a sum
            over rows, is more than 16 bits hold. Rows meet it in ``dtype``.
        values: F, or V; shapes and dtypes as the keys'.
        logits: c (B or 1, H, T), float32 or wider, -inf where a key is masked, or None; plan "standard" has none.
        mask: of the keys, (B or 1, T), in plan "standard"; elsewhere c has it.
        reason: why this plan.
    """

    plan: str
    dtype: torch.dtype
    keys: Tensor
    values: Tensor
    logits: Tensor | None
    mask: Tensor | None
    reason: str

    @property
    def tokens(self) -> int:
        """T."""
        return self.keys.shape[1 if self.plan == "standard" else 2]


def prepare_context(
    name: str,
    context: Tensor,
    projections: Projections,
    mask: Tensor | None,
    normalize: bool,
    plan: str,
    reason: str,
    directly: bool = False,
) -> PreparedContext:
    """What depends on the context alone, whose dtype is that of the products; errors name ``name``.

    ``directly`` as `registry.run`'s.
    """
    dtype = context.dtype
    if normalize:
        # float16 has no 1e-12.
        wide = torch.promote_types(dtype, torch.float32)
        context = F.normalize(context.to(wide), dim=-1, eps=1e-12).to(dtype)
    if plan == "standard":
        k, v = (projections.heads(context, part) for part in "kv")
        return PreparedContext(plan, dtype, k, v, None, mask, reason)
    e, c, f = absorb(name, context, projections.absorbed, projections.num_heads, directly)
    if mask is not None:
        logits = e.new_zeros(e.shape[:3]) if c is None else c
        c = torch.where(mask[:, None], -torch.inf, logits)
    return PreparedContext(plan, dtype, e, f, c, None, reason)


def attend_standard(x: Tensor, prepared: PreparedContext, projections: Projections, dropout_p: float) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, (B, L, H d)."""
    q = projections.heads(x, "q").transpose(1, 2)
    k, v = (tensor.transpose(1, 2) for tensor in (prepared.keys, prepared.values))
    if k.shape[0] != x.shape[0]:
        k, v = (tensor.expand(x.shape[0], -1, -1, -1) for tensor in (k, v))
    if prepared.mask is None:
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    else:
        # A row without any key would be 0 / 0: it may look at all of them, and what it sees is dropped.
        dead = prepared.mask.all(-1, keepdim=True)
        allowed = (~prepared.mask | dead)[:, None, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout_p)
        attended = attended.masked_fill(dead[:, None, None], 0.0)
    return attended.transpose(1, 2).flatten(2)


def check_projections(name: str, projections: Projections) -> None:
    """Shapes and devices of the eight tensors among themselves."""
    for argument in PROJECTIONS:
        tensor = getattr(projections, argument)
        if tensor is None and argument.endswith("bias"):
            continue
        checks.tensor(name, argument, tensor)
        checks.dtype(name, argument, tensor, checks.FLOATING)
        checks.same_device(name, argument, tensor, projections.q_weight.device, "q_weight")
    heads = projections.num_heads
    checks.integer(name, "num_heads", heads)
    q_weight, k_weight = projections.q_weight, projections.k_weight
    for argument, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] < 1:
            letters = "(H d, C)" if argument == "q_weight" else "(H d, Cc)"
            raise ValueError(f"{name}: {argument} must have shape {letters}, got {tuple(weight.shape)}")
    inner, channels = q_weight.shape
    if heads < 1 or inner % heads:
        raise ValueError(f"{name}: num_heads must divide H d = {inner}, the rows of q_weight, got num_heads = {heads}")
    width = k_weight.shape[1]
    checks.shape(name, "k_weight", k_weight, (inner, width), "(H d, Cc), H d as in q_weight,")
    checks.shape(name, "v_weight", projections.v_weight, (inner, width), "(H d, Cc), as in q_weight and k_weight,")
    checks.shape(name, "out_weight", projections.out_weight, (channels, inner), "(C, H d), as in q_weight,")
    for argument, size, letters in (
        ("q_bias", inner, "(H d,)"), ("k_bias", inner, "(H d,)"), ("v_bias", inner, "(H d,)"),
        ("out_bias", channels, "(C,)"),
    ):  # fmt: skip
        bias = getattr(projections, argument)
        if bias is not None:
            checks.shape(name, argument, bias, (size,), letters)


def check_context(name: str, context: Tensor, mask: Tensor | None, projections: Projections, x: Tensor | None) -> None:
    """The context and its mask against the projections, and against x where that is known."""
    checks.tensor(name, "context", context)
    width = projections.k_weight.shape[1]
    if context.dim() != 3 or context.shape[1] < 1 or context.shape[2] != width:
        raise ValueError(
            f"{name}: context must have shape (B or 1, T, Cc) with T >= 1 and k_weight's Cc = {width}, "
            f"got {tuple(context.shape)}"
        )
    if x is not None:
        checks.dtype(name, "context", context, (x.dtype,) if checks.autocast_dtype(x) is None else checks.NARROW)
        checks.same_device(name, "context", context, x.device)
        if context.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"{name}: context must have x's batch B = {x.shape[0]} or 1, got {context.shape[0]}")
    if mask is None:
        return
    checks.tensor(name, "key_padding_mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: key_padding_mask must have dtype torch.bool, got {mask.dtype}")
    checks.same_device(name, "key_padding_mask", mask, context.device, "context")
    tokens = context.shape[1]
    batches = (1, context.shape[0] if x is None else x.shape[0])
    if mask.dim() != 2 or mask.shape[0] not in batches or mask.shape[1] != tokens:
        raise ValueError(
            f"{name}: key_padding_mask must have shape (B or 1, T) = ({batches[1]} or 1, {tokens}), "
            f"got {tuple(mask.shape)}"
        )
