"""Which adapters a model carries, counted."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from pyfused.modules.table import table


@dataclass(frozen=True)
class AdapterRow:
    """One adapter: its dotted path, what carries it, C, width of the bottleneck (or rank), parameter count."""

    path: str
    kind: str
    channels: int
    hidden: int
    parameters: int


@dataclass(frozen=True)
class AdapterReport:
    """What `add_adapters` did.

    Attributes:
        rows: one `AdapterRow` per adapter; a RepMixer block carries one, an attention block two, a stage one ConvLoRA.
        repmixer_blocks, attention_blocks, stages: adapted blocks of each kind, and stages with a ConvLoRA.
        adapter_parameters: elements of all parameters of the adapters and ConvLoRAs.
        trainable_parameters: elements of all parameters that train.
        total_parameters: elements of all parameters of the given model, adapters included; tied ones count once.
        notes: what else was changed or left out, in words.
    """

    rows: tuple[AdapterRow, ...]
    repmixer_blocks: int
    attention_blocks: int
    stages: int
    adapter_parameters: int
    trainable_parameters: int
    total_parameters: int
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Adapted blocks."""
        return self.repmixer_blocks + self.attention_blocks

    @property
    def trainable_percent(self) -> float:
        """100 * trainable_parameters / total_parameters."""
        return 100.0 * self.trainable_parameters / max(self.total_parameters, 1)

    def __str__(self) -> str:
        def alike(row: AdapterRow) -> tuple:
            path = re.sub(r"(?<=blocks\.)\d+", "*", row.path)
            return path, row.kind, row.channels, row.hidden, row.parameters

        rows = [("adapter", "kind", "C", "h", "count", "parameters")]
        for (path, kind, channels, hidden, parameters), count in Counter(map(alike, self.rows)).items():
            rows.append((path, kind, str(channels), str(hidden), str(count), f"{count * parameters:,}"))
        lines = table(rows, "<<>>>>")
        lines += [
            f"adapted blocks        {self.total} = {self.repmixer_blocks} RepMixer + {self.attention_blocks} attention"
            + (f", and {self.stages} stages with ConvLoRA" if self.stages else ""),
            f"adapter parameters    {self.adapter_parameters:,}",
            f"trainable parameters  {self.trainable_parameters:,} of {self.total_parameters:,} "
            f"({self.trainable_percent:.2f} %)",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
