"""Which LoRA modules a model carries, counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from pyfused.lora.attention import LoRAProjections
from pyfused.lora.base import LoRAModule
from pyfused.lora.linear import LoRALinear
from pyfused.lora.pairs import DEFAULT
from pyfused.lora.targets import group_of, hosts_of, kind_of, lora_places
from pyfused.surgery.report import Counts, LeftAlone, count, elements, folded, left_lines, table_of_alike


@dataclass(frozen=True)
class LoRARow:
    """One adapted module: its dotted path, kind, group, base weight's (N, K), rank, alpha, and LoRA parameter count."""

    path: str
    kind: str
    group: str
    shape: tuple[int, ...]
    rank: int
    alpha: float
    parameters: int


@dataclass(frozen=True, kw_only=True)
class LoRAReport(Counts):
    """What `inject_lora` did.

    Attributes:
        rows: one `LoRARow` per adapted module; an attention's in_proj and out_proj are one each, however q, k and v
            are paired.
        adapter: the name of the adapter that this is about. Default "default".
        lora_parameters: elements of all its parameters.
        trainable_parameters, total_parameters, notes: see `Counts`.
        left: what carries no LoRA, by kind and reason.
    """

    rows: tuple[LoRARow, ...]
    lora_parameters: int
    left: tuple[LeftAlone, ...] = ()
    adapter: str = DEFAULT

    @property
    def total(self) -> int:
        """Adapted modules."""
        return len(self.rows)

    @property
    def attention(self) -> int:
        """Adapted modules that belong to an attention."""
        return sum(row.group == "attention" for row in self.rows)

    @property
    def mlp(self) -> int:
        """Adapted modules that belong to an MLP."""
        return sum(row.group == "mlp" for row in self.rows)

    def _found(self) -> list[str]:
        alike = [
            (folded(row.path), row.kind, " x ".join(map(str, row.shape)), row.rank, f"{row.alpha:g}", row.parameters)
            for row in self.rows
        ]
        other = self.total - self.attention - self.mlp
        header = ("module", "kind", "weight", "rank", "alpha", "count", "LoRA parameters")
        return [
            *table_of_alike(header, alike, "<<<>>>>"),
            f"LoRA modules          {self.total} = {self.attention} attention + {self.mlp} MLP"
            + (f" + {other} other" if other else ""),
            f"LoRA parameters       {self.lora_parameters:,}",
        ]

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *left_lines(self.left, "left alone, and why")])


def lora_report(
    model: nn.Module, notes: Iterable[str] = (), left: Iterable[LeftAlone] = (), adapter: str = DEFAULT
) -> LoRAReport:
    """Where ``model`` carries an adapter now, whoever put it there; ``notes`` and ``left`` are passed on."""
    rows: list[LoRARow] = []

    def add(path: str, kind: str, group: str, shape: tuple[int, ...], module: LoRAModule) -> None:
        if adapter in module.adapters:
            settings, own = module.settings_of(adapter), elements(module.own_lora_parameters(adapter).values())
            rows.append(LoRARow(path, kind, group, shape, settings.rank, float(settings.alpha), own))

    for place in lora_places(model):
        module, path = place.module, place.paths[0]
        if not isinstance(module, LoRAModule):
            continue
        if not isinstance(module, LoRAProjections):
            kind = kind_of(module)
            shape = tuple(module.get_parameter("weight").shape)
            # transformers' Conv1D holds its weight transposed.
            group = group_of(path, hosts_of(model, path))
            add(path, kind, group, shape[::-1] if kind == "conv1d" else shape, module)
            continue
        width, prefix = module.embed_dim, f"{path}." if path else ""
        add(f"{prefix}in_proj", "in_proj", "attention", (3 * width, width), module)
        out = module.out_proj
        if isinstance(out, LoRALinear):
            add(f"{prefix}out_proj", "out_proj", "attention", (width, width), out)
    return LoRAReport(
        **count(model, notes), rows=tuple(rows), lora_parameters=sum(row.parameters for row in rows),
        left=tuple(left), adapter=adapter,
    )  # fmt: skip
