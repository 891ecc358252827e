"""`cross_attention_residual`: its shapes, and plain torch, projections with torch's attention and torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfused.bench.cases.baselines import narrowed
from pyfused.bench.cases.case import Case, Result, Work, normal, short, with_both_adapters
from pyfused.bench.cases.projection_residual import eager_projection_residual
from pyfused.ops.cross_attention_residual import PLANS
from pyfused.ops.prepared_context import PROJECTIONS

SDPA = "projections + SDPA"
# (B, T, whether norms are matched) over ViT-L/14 at 518 px, 1370 tokens of 1024, with 16 heads of 64.
CPU_ROWS = ((2, 2, False), (2, 12, False), (2, 77, False), (2, 2, True))
GPU_ROWS = ((16, 2, False), (16, 16, False), (16, 77, False), (16, 77, True), (2, 2, False))


@dataclass(frozen=True)
class CrossAttentionCase(Case):
    """One shape of ``cross_attention_residual``: x (B, L, C), a context (B, T, Cc), and all biases.

    Attributes:
        batch, length, channels, heads, tokens: B, L, C, H, T.
        context_channels: Cc; None (the default) means C.
        head_dim: d; None (the default) means C / H.
        norm_match: whether the attention's output gets the norm of x, default False.
        dtype: of x, the context and the products.
        adapter_dtype: of the four projections and their biases; None (the default) means ``dtype``.
        weight: w, default 0.5.
    """

    operator = "cross_attention_residual"
    inputs = ("x", "context")
    # Softmax does not see k_bias, whose gradient is zero but for rounding.
    trained = tuple(name for name in PROJECTIONS if name != "k_bias")
    dropout_p = 0.0

    batch: int
    length: int
    channels: int
    heads: int
    tokens: int
    context_channels: int | None = None
    head_dim: int | None = None
    norm_match: bool = False
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    weight: float = 0.5

    @property
    def rows(self) -> int:
        """M."""
        return self.batch * self.length

    @property
    def inner(self) -> int:
        """H d."""
        return self.channels if self.head_dim is None else self.heads * self.head_dim

    @property
    def context_width(self) -> int:
        """Cc."""
        return self.context_channels or self.channels

    @property
    def name(self) -> str:
        heads = f"H{self.heads}" + (f"x{self.head_dim}" if self.head_dim else "")
        tokens = f"T{self.tokens}" + (f"x{self.context_channels}" if self.context_channels else "")
        parts = [f"{self.operator} {self.batch}x{self.length}x{self.channels} {heads} {tokens}", short(self.dtype)]
        if self.adapter_dtype not in (None, self.dtype):
            parts.append(f"adapters {short(self.adapter_dtype)}")
        return " ".join([*parts, "norm-match"] if self.norm_match else parts)

    def facts(self) -> dict[str, object]:
        return {
            "batch": self.batch,
            "length": self.length,
            "channels": self.channels,
            "heads": self.heads,
            "head_dim": self.inner // self.heads,
            "tokens": self.tokens,
            "context_channels": self.context_width,
            "norm_match": self.norm_match,
            "dtype": short(self.dtype),
            "adapter_dtype": short(self.parameter_dtype),
        }

    def tensors(self, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """x, context, the projections and dy: logits from N(0, 1), and an attention's output about as large as x."""
        draw = normal(device, seed)
        c, width, inner, own = self.channels, self.context_width, self.inner, self.parameter_dtype
        return {
            "x": draw((self.batch, self.length, c), 1.0, self.dtype),
            "context": draw((self.batch, self.tokens, width), 1.0, self.dtype),
            "q_weight": draw((inner, c), c**-0.5, own),
            "q_bias": draw((inner,), 0.1, own),
            "k_weight": draw((inner, width), width**-0.5, own),
            "k_bias": draw((inner,), 0.1, own),
            "v_weight": draw((inner, width), width**-0.5, own),
            "v_bias": draw((inner,), 0.1, own),
            # A mean of T values is smaller than one of them, but for their bias.
            "out_weight": draw((c, inner), (inner * (1 / self.tokens + 0.1**2)) ** -0.5, own),
            "out_bias": draw((c,), 0.1, own),
            "dy": draw((self.batch, self.length, c), 1.0, self.dtype),
        }

    def call(self, function: Callable[..., Result], tensors: Mapping[str, Tensor], **options) -> Result:
        return function(
            *(tensors[name] for name in ("x", "context", *PROJECTIONS)),
            num_heads=self.heads, weight=self.weight, norm_match=self.norm_match, **options,
        )  # fmt: skip

    def passes(self) -> tuple[Work, Work]:
        """Of the plan that an H200 would be done with first, in both directions together."""
        return min(map(self.plan_passes, PLANS), key=lambda both: sum(work.least_seconds() for work in both))

    def plan_passes(self, plan: str) -> tuple[Work, Work]:
        """Work of forward and of backward in one plan; norm matching adds nothing that counts beside it."""
        m, c, inner, width, size = self.rows, self.channels, self.inner, self.context_width, self.dtype.itemsize
        columns, contexts = self.heads * self.tokens, self.batch * self.tokens
        parameters = self.parameter_dtype.itemsize * 2 * inner * (c + width)
        # K and V; then E and F and the products of rows and columns, or the two wide projections and attention.
        flops = 4 * contexts * inner * width
        if plan == "standard":
            flops += 4 * m * inner * (c + self.tokens)
            again, kept = 2 * m * inner * self.tokens, 2 * m * inner
        else:
            flops += 4 * contexts * inner * c + 4 * m * columns * c
            again, kept = (0, m * columns) if plan == "absorbed" else (2 * m * columns * c, 0)
        # Forward reads x and writes y and what is kept: p, or q and the attended values. Backward reads that, dy and x,
        # writes dx and the parameters' gradients, and makes the logits again that were not kept.
        forward = Work(flops, size * (2 * m * c + contexts * width + kept) + parameters)
        moved = size * (3 * m * c + 2 * contexts * width + kept) + 2 * parameters
        return forward, Work(2 * flops + again, moved)

    def plain(self) -> dict[str, Callable[..., Tensor]]:
        def eager(x: Tensor, context: Tensor, *projections: Tensor, **options) -> Tensor:
            return eager_cross_attention_residual(x, context, *narrowed(projections, x.dtype), **options)

        return {"eager": eager, SDPA: functools.partial(eager, attention=F.scaled_dot_product_attention)}

    def plans(self, backend: str) -> tuple[str, ...]:
        return PLANS


# Next to no arithmetic.
TINY = CrossAttentionCase(1, 16, 64, 4, 2)


def timed_cases(device: torch.device) -> list[CrossAttentionCase]:
    """Contexts of 2 to 77 tokens: in float32 on a CPU; on a GPU in bfloat16, and the second stage of AA-CLIP."""
    if device.type == "cpu":
        return [CrossAttentionCase(b, 1370, 1024, 16, t, norm_match=match) for b, t, match in CPU_ROWS]
    found = [CrossAttentionCase(b, 1370, 1024, 16, t, norm_match=match) for b, t, match in GPU_ROWS]
    found.append(CrossAttentionCase(2, 1370, 1024, 8, 1232, context_channels=768, head_dim=96, norm_match=True))
    return list(with_both_adapters(replace(case, dtype=torch.bfloat16) for case in found))


def parity_cases(device: torch.device) -> Iterator[CrossAttentionCase]:
    """The timed shapes, then small ones whose sizes are no powers of two."""
    yield from timed_cases(device)
    for small in (
        CrossAttentionCase(3, 77, 768, 12, 3),
        CrossAttentionCase(2, 197, 768, 8, 5, context_channels=512, head_dim=96, norm_match=True),
    ):
        yield small
        yield replace(small, dtype=torch.bfloat16)
        yield replace(small, dtype=torch.bfloat16, adapter_dtype=torch.float32)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v as people wrote it before torch had it."""
    return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1) @ v


def eager_cross_attention_residual(
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
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = explicit_attention,
) -> Tensor:
    """The formula as people write it: four linear layers, ``attention`` of (B, H, ., d), norms and sums."""

    def heads(tokens: Tensor, projection: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(tokens, projection, bias).unflatten(-1, (num_heads, -1)).transpose(1, 2)

    q, k, v = heads(x, q_weight, q_bias), heads(context, k_weight, k_bias), heads(context, v_weight, v_bias)
    attended = attention(q, k, v).transpose(1, 2).flatten(2)
    return eager_projection_residual(
        attended, out_weight, out_bias, residual=x, gate=weight, norm_match=norm_match, eps=eps
    )
