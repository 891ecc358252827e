"""Which adapters a model carries, counted."""

from __future__ import annotations

from dataclasses import dataclass

from pyfused.surgery.report import Counts, folded, table_of_alike


@dataclass(frozen=True)
class AdapterRow:
    """One adapter: its dotted path, what carries it, C, width of the bottleneck (or rank), parameter count."""

    path: str
    kind: str
    channels: int
    hidden: int
    parameters: int


@dataclass(frozen=True, kw_only=True)
class AdapterReport(Counts):
    """What `add_adapters` did.

    Attributes:
        rows: one `AdapterRow` per adapter; a RepMixer block carries one, an attention block two, a stage one ConvLoRA.
        repmixer_blocks, attention_blocks, stages: adapted blocks of each kind, and stages with a ConvLoRA.
        adapter_parameters: elements of all parameters of the adapters and ConvLoRAs.
        trainable_parameters, total_parameters, notes: see `Counts`.
    """

    rows: tuple[AdapterRow, ...]
    repmixer_blocks: int
    attention_blocks: int
    stages: int
    adapter_parameters: int

    @property
    def total(self) -> int:
        """Adapted blocks."""
        return self.repmixer_blocks + self.attention_blocks

    def _found(self) -> list[str]:
        alike = [
            (folded(row.path, after="blocks"), row.kind, row.channels, row.hidden, row.parameters) for row in self.rows
        ]
        return [
            *table_of_alike(("adapter", "kind", "C", "h", "count", "parameters"), alike, "<<>>>>"),
            f"adapted blocks        {self.total} = {self.repmixer_blocks} RepMixer + {self.attention_blocks} attention"
            + (f", and {self.stages} stages with ConvLoRA" if self.stages else ""),
            f"adapter parameters    {self.adapter_parameters:,}",
        ]
