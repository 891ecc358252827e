"""How much of a model trains, as every report of this package says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a change of a model left to train.

    Attributes:
        trainable_parameters: elements of all parameters that train.
        total_parameters: elements of all parameters of the given model, added ones included; tied ones count once.
        notes: what else was changed or left out, in words.
    """

    trainable_parameters: int
    total_parameters: int
    notes: tuple[str, ...] = ()

    @property
    def trainable_percent(self) -> float:
        """100 * trainable_parameters / total_parameters."""
        return 100.0 * self.trainable_parameters / max(self.total_parameters, 1)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        return [
            f"trainable parameters  {self.trainable_parameters:,} of {self.total_parameters:,} "
            f"({self.trainable_percent:.2f} %)",
            *(f"note: {note}" for note in self.notes),
        ]


def count(model: nn.Module) -> dict[str, Any]:
    """The two numbers of a `Counts`, by name."""
    parameters = list(model.parameters())
    return {
        "trainable_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "total_parameters": sum(parameter.numel() for parameter in parameters),
    }
