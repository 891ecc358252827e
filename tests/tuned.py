"""A model whose cross-attention has two plans on a CPU, and a clock for it."""

from __future__ import annotations

import torch
from torch import nn

import pyfused


class FakeClock:
    """Tells the seconds that it is given for a plan in a direction, "absorbed_forward" say, and 1 for all others.

    Attributes:
        rounds: how many it has timed.
        parts: what was in them.
    """

    mode = "fake"

    def __init__(self, seconds):
        self.seconds = seconds
        self.rounds = 0
        self.parts = set()

    def round(self, calls):
        self.rounds += 1
        for part, call in calls.items():
            if part not in self.parts:
                self.parts.add(part)
                call()
        return {part: self.seconds.get(f"{part.plan}_{part.direction}", 1.0) for part in calls}


class Towers(nn.Module):
    """Two attentions of one size, a LoRA layer and a BatchNorm."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = pyfused.ScaledCrossAttention(32, 24, 2, dropout=dropout)
        self.second = pyfused.ScaledCrossAttention(32, 24, 2, dropout=dropout)
        self.linear = pyfused.LoRALinear(32, 32, rank=4)
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x, context):
        x = self.linear(self.second(self.first(x, context), context))
        return self.norm(x.transpose(1, 2))


def inputs(length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, length, 32, generator=generator), torch.randn(1, 3, 24, generator=generator)


def plans(model: nn.Module, *given: torch.Tensor) -> list[str]:
    """Of the calls of cross-attention."""
    return [call.plan for call in pyfused.explain(model, *given).calls if call.operator == "cross_attention_residual"]
