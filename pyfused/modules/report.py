"""Which LoRA modules a model carries, counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from pyfused.modules.attention import LoRAProjections
from pyfused.modules.counts import Counts, count
from pyfused.modules.linear import LoRALinear
from pyfused.modules.lora import LoRAModule
from pyfused.modules.table import table
from pyfused.modules.targets import LeftAlone, group_of, kind_of, places


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
        lora_parameters: elements of all LoRA parameters.
        trainable_parameters, total_parameters, notes: see `Counts`.
        left: what carries no LoRA, by kind and reason.
    """

    rows: tuple[LoRARow, ...]
    lora_parameters: int
    left: tuple[LeftAlone, ...] = ()

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

    def __str__(self) -> str:
        def alike(row: LoRARow) -> tuple:
            path = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", row.path)
            return path, row.kind, row.shape, row.rank, row.alpha, row.parameters

        rows = [("module", "kind", "weight", "rank", "alpha", "count", "LoRA parameters")]
        for (path, kind, shape, rank, alpha, parameters), times in Counter(map(alike, self.rows)).items():
            size = " x ".join(map(str, shape))
            rows.append((path, kind, size, str(rank), f"{alpha:g}", str(times), f"{times * parameters:,}"))
        lines = table(rows, "<<<>>>>")
        other = self.total - self.attention - self.mlp
        lines += [
            f"LoRA modules          {self.total} = {self.attention} attention + {self.mlp} MLP"
            + (f" + {other} other" if other else ""),
            f"LoRA parameters       {self.lora_parameters:,}",
            *self._lines(),
        ]
        if self.left:
            lines += ["", "left alone, and why"]
            left = [(row.kind, str(row.count), f"{row.parameters:,}", row.paths[0], row.why) for row in self.left]
            lines += table([("kind", "count", "parameters", "the first", "why"), *left], "<>><<")
        return "\n".join(lines)


def lora_report(model: nn.Module, notes: Iterable[str] = (), left: Iterable[LeftAlone] = ()) -> LoRAReport:
    """What LoRA ``model`` carries now, whoever put it there; ``notes`` and ``left`` are passed on."""
    rows: list[LoRARow] = []
    for place in places(model):
        module, path = place.module, place.paths[0]
        if not isinstance(module, LoRAModule):
            continue
        own = sum(p.numel() for p in module.own_lora_parameters().values())
        if not isinstance(module, LoRAProjections):
            kind = kind_of(module)
            shape = tuple(module.get_parameter("weight").shape)
            # transformers' Conv1D holds its weight transposed.
            shape = shape[::-1] if kind == "conv1d" else shape
            rows.append(LoRARow(path, kind, group_of(path), shape, module.rank, module.alpha, own))
            continue
        width, prefix = module.embed_dim, f"{path}." if path else ""
        if module.qkv is not None:
            rows.append(
                LoRARow(f"{prefix}in_proj", "in_proj", "attention", (3 * width, width), module.rank, module.alpha, own)
            )
        out = module.out_proj
        if isinstance(out, LoRALinear):
            own = sum(p.numel() for p in out.own_lora_parameters().values())
            rows.append(LoRARow(f"{prefix}out_proj", "out_proj", "attention", (width, width), out.rank, out.alpha, own))
    return LoRAReport(
        **count(model),
        rows=tuple(rows),
        lora_parameters=sum(row.parameters for row in rows),
        notes=tuple(notes),
        left=tuple(left),
    )
