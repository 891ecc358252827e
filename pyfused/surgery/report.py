"""What a change of a model left to train, as every report of this package says it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


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
        return "\n".join(
            [
                *self._found(),
                f"trainable parameters  {self.trainable_parameters:,} of {self.total_parameters:,} "
                f"({self.trainable_percent:.2f} %)",
                *(f"note: {note}" for note in self.notes),
            ]
        )

    def _found(self) -> list[str]:
        """The lines of a report that are its own."""
        return []


@dataclass
class LeftAlone:
    """Weights of one kind that a method left alone, and why.

    Attributes:
        kind: class of the modules, or "Parameter" for weights that stand outside any layer.
        why: the reason, in words.
        paths: dotted paths of the modules or parameters.
        parameters: elements of all of them.
    """

    kind: str
    why: str
    paths: list[str] = field(default_factory=list)
    parameters: int = 0

    @property
    def count(self) -> int:
        """Modules or parameters."""
        return len(self.paths)


def left_lines(left: Sequence[LeftAlone], title: str) -> list[str]:
    """Lines that say what was left alone, and why; none where nothing was."""
    if not left:
        return []
    rows = [(row.kind, str(row.count), f"{row.parameters:,}", row.paths[0], row.why) for row in left]
    return ["", title, *table([("kind", "count", "parameters", "the first", "why"), *rows], "<>><<")]


def elements(tensors: Iterable[Tensor]) -> int:
    """How many numbers ``tensors`` hold."""
    return sum(tensor.numel() for tensor in tensors)


def count(model: nn.Module, notes: Iterable[str] = ()) -> dict[str, Any]:
    """The fields of a `Counts`, by name."""
    parameters = list(model.parameters())
    return {
        "trainable_parameters": elements(parameter for parameter in parameters if parameter.requires_grad),
        "total_parameters": elements(parameters),
        "notes": tuple(notes),
    }


def folded(path: str, after: str | None = None) -> str:
    """A dotted path with "*" for its numbers, those after a component ``after`` or all of them."""
    parts = path.split(".")
    return ".".join(
        "*" if part.isdecimal() and after in (None, before) else part
        for before, part in zip(["", *parts], parts, strict=False)
    )


def table(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Lines of a table whose first row is the header; ``sides`` has "<" or ">" for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)) for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return [line.rstrip() for line in lines]


def table_of_alike(header: Sequence[str], rows: Iterable[tuple[Any, ...]], sides: str) -> list[str]:
    """`table` with one line for rows that are alike, how many they are, and the sum of their last column.

    ``header`` has a name for that count, before the last.
    """
    lines = [(*map(str, cells), str(times), f"{times * size:,}") for (*cells, size), times in Counter(rows).items()]
    return table([header, *lines], sides)
