"""What tuning found, for a reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pyfused.choice.order import Choice
from pyfused.surgery.report import table


@dataclass(frozen=True)
class TunedCall:
    """A call that a model makes, and what serves it.

    Attributes:
        operator: the operator's name.
        shapes: the operator's letters and their sizes, such as ``(("M", 400), ("K", 768), ("N", 3072), ("R", 16))``.
        dtype: what the call computes in.
        device: of its input.
        count: how often it was made.
        share: of the time that the model spends in all calls of pyfused, from 0 to 1.
        before: backend and plans that served it.
        now: those that serve it from now on.
        gain: the time of pyfused's own choice over that of ``now``; 1 where that is the choice.
        dropped: (what was not taken though it was tried, why): results too far from its own choice's, or an error.
        note: why nothing was compared, else "".
    """

    operator: str
    shapes: tuple[tuple[str, int], ...]
    dtype: torch.dtype
    device: torch.device
    count: int
    share: float
    before: Choice
    now: Choice
    gain: float = 1.0
    dropped: tuple[tuple[str, str], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class TuningReport:
    """What `tune` returns, and `tuning` gives: the calls in the order of their share of the time.

    ``print`` shows them as a table.

    Attributes:
        calls: each different one.
        seconds: that tuning took.
        path: the file that holds what was found; None where nothing was, or it could not be written.
        notes: what else there is to know, in words.
    """

    calls: list[TunedCall] = field(default_factory=list)
    seconds: float = 0.0
    path: Path | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.calls:
            return "\n".join(["no call of pyfused to tune", *(f"note: {note}" for note in self.notes)])
        rows = [("operator", "shapes", "dtype", "calls", "share", "before", "now", "gain", "")]
        rows += [
            (
                call.operator,
                _sizes(call.shapes),
                str(call.dtype).removeprefix("torch."),
                str(call.count),
                f"{100 * call.share:.0f} %",
                named(call.before),
                named(call.now),
                f"{call.gain:.2f}x",
                call.note,
            )
            for call in self.calls
        ]
        lines = table(rows, "<<<>><<><")
        dropped = [
            f"dropped: {call.operator} {_sizes(call.shapes)}: {name}: {why}"
            for call in self.calls
            for name, why in call.dropped
        ]
        lines += dict.fromkeys(dropped)
        kept = "nothing was kept" if self.path is None else f"kept in {self.path}"
        return "\n".join([*lines, "", f"{self.seconds:.1f} s; {kept}", *(f"note: {note}" for note in self.notes)])


def named(choice: Choice) -> str:
    """Backend and plans, in words."""
    return " ".join([choice.backend, " / ".join(dict.fromkeys(plan for plan in choice[1:] if plan))]).strip()


def _sizes(shapes: Sequence[tuple[str, int]]) -> str:
    return " ".join(f"{letter}={size}" for letter, size in shapes)
