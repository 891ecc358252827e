"""`projection_residual`: AA-CLIP's adapter, and plain torch and torch.compile beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfused.bench.cases.case import Case, Result, Work, normal, short
from pyfused.ops.projection_residual import keeps_projection
from pyfused.reference.adapter import ACTIVATIONS

# (B, L, C) of ViT-L/14 at 518 px, whose image adapters are square.
CPU_ROWS, GPU_ROWS = (2, 1370, 1024), (16, 1370, 1024)


@dataclass(frozen=True)
class ProjectionCase(Case):
    """One shape of ``projection_residual``: o and residual distinct, with a bias.

    Attributes:
        shape: of o: (B, L, K).
        channels: C.
        activation: phi, default "leaky_relu".
        norm_match: whether the branch gets the norm of the residual, default True.
        dtype: of every tensor.
        gate, skip: factors of the branch and of the residual.
    """

    operator = "projection_residual"
    inputs = ("o", "residual")
    trained = ("weight", "bias")
    adapter_dtype = None
    dropout_p = 0.0

    shape: tuple[int, int, int]
    channels: int
    activation: str = "leaky_relu"
    norm_match: bool = True
    dtype: torch.dtype = torch.float32
    gate: float = 0.4
    skip: float = 0.6

    @property
    def rows(self) -> int:
        """M."""
        return self.shape[0] * self.shape[1]

    @property
    def name(self) -> str:
        parts = [f"{self.operator} {self.rows}x{self.shape[2]}->{self.channels}", self.activation, short(self.dtype)]
        return " ".join([*parts, "norm-match"] if self.norm_match else parts)

    def facts(self) -> dict[str, object]:
        return {
            "rows": self.rows,
            "width": self.shape[2],
            "channels": self.channels,
            "activation": self.activation,
            "norm_match": self.norm_match,
            "dtype": short(self.dtype),
        }

    def tensors(self, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """o, residual, weight, bias and dy; the branch is about as large as the residual.

        o, weight and bias are numbers of few bits, so that h is exact in float32 in any order of its sum: else the side
        of a LeakyReLU on which the smallest of millions of h fall would be a matter of rounding.
        """
        draw = normal(device, seed)
        c, k = self.channels, self.shape[2]
        unit = 2.0 ** round(math.log2(0.25 * k**-0.5))

        def coarse(shape: tuple[int, ...], scale: float, step: float) -> Tensor:
            return draw(shape, scale / step, self.dtype).round() * step

        return {
            "o": coarse(self.shape, 1.0, 0.125),
            "residual": draw((*self.shape[:2], c), 1.0, self.dtype),
            "weight": coarse((c, k), 1.5 * k**-0.5, unit),
            "bias": coarse((c,), 0.1, 2.0**-6),
            "dy": draw((*self.shape[:2], c), 1.0, self.dtype),
        }

    def call(
        self, function: Callable[..., Result], tensors: Mapping[str, Tensor], plan: str = "auto", **options
    ) -> Result:
        """The operator has one plan and takes no name of one."""
        return function(
            tensors["o"], tensors["weight"], tensors["bias"], residual=tensors["residual"], gate=self.gate,
            skip=self.skip, activation=self.activation, norm_match=self.norm_match, **options,
        )  # fmt: skip

    def passes(self) -> tuple[Work, Work]:
        m, k, c, size = self.rows, self.shape[2], self.channels, self.dtype.itemsize
        kept = m * c * keeps_projection(self.activation, self.norm_match, need_gate=False)
        product, parameters = 2 * m * k * c, c * (k + 1)
        # Forward reads o and the residual and writes y and h; backward reads dy, o and h, for the norm the residual
        # too, and writes do, where the norms are differentiated the residual's gradient, and the parameters'.
        forward = Work(product, size * (m * (k + 2 * c) + parameters + kept))
        moved = m * (2 * k + (1 + 2 * self.norm_match) * c) + 2 * parameters + kept
        backward = Work(2 * product, size * moved)
        return forward, backward

    def plain(self) -> dict[str, Callable[..., Tensor]]:
        return {"eager": eager_projection_residual}

    def plans(self, backend: str) -> tuple[str, ...]:
        return ("auto",)


# Next to no arithmetic.
TINY = ProjectionCase((1, 16, 64), 64)


def timed_cases(device: torch.device) -> list[ProjectionCase]:
    """An image adapter of AA-CLIP: in float32 on a CPU, more images in bfloat16 on a GPU."""
    shape, dtype = (CPU_ROWS, torch.float32) if device.type == "cpu" else (GPU_ROWS, torch.bfloat16)
    return [ProjectionCase(shape, shape[2], dtype=dtype)]


def parity_cases(device: torch.device) -> Iterator[ProjectionCase]:
    """The timed shape, then small ones whose sizes are no powers of two, with and without the norms."""
    yield from timed_cases(device)
    for small in (
        ProjectionCase((3, 77, 768), 768),
        ProjectionCase((2, 197, 96), 760, activation="identity", norm_match=False),
    ):
        yield small
        yield replace(small, dtype=torch.bfloat16)


def eager_projection_residual(
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
    """The formula as people write it: a linear layer, its activation, norms and sums."""
    branch = ACTIVATIONS[activation](F.linear(o, weight, bias))
    if norm_match:
        branch = branch * (residual.norm(dim=-1, keepdim=True) / (branch.norm(dim=-1, keepdim=True) + eps))
    return (residual if skip == 1.0 else skip * residual) + gate * branch
