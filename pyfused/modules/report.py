"""Which LoRA modules a model carries, counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from pyfused.modules.attention import LoRAMultiheadAttention
from pyfused.modules.linear import LoRALinear
from pyfused.modules.lora import LoRAModule, places
from pyfused.modules.table import table

# A block's name says more than a layer's: "attn.c_proj" is attention, "mlp.c_proj" is not.
_BLOCKS = {
    "attention": "attn self_attn cross_attn attention self_attention cross_attention multihead_attn attnpool",
    "mlp": "mlp ffn convffn feed_forward feedforward intermediate",
}
_LAYERS = {
    "attention": "out_proj q_proj k_proj v_proj o_proj qkv qkv_proj query key value to_q to_k to_v to_out c_attn",
    "mlp": "c_fc c_proj fc1 fc2 linear1 linear2 gate_proj up_proj down_proj wi wo",
}


@dataclass(frozen=True)
class LoRARow:
    """One adapted module: its dotted path, kind, group, base weight's (N, K), and LoRA parameter count."""

    path: str
    kind: str
    group: str
    shape: tuple[int, ...]
    rank: int
    parameters: int


@dataclass(frozen=True)
class LoRAReport:
    """What `inject_lora` did.

    Attributes:
        rows: one `LoRARow` per adapted module; an attention's in_proj and out_proj are one each, however q, k and v
            are paired.
        lora_parameters: elements of all LoRA parameters. trainable_parameters: elements of all parameters that train.
        total_parameters: elements of all parameters of the given module, LoRA included; tied ones count once.
        notes: what else was changed or left out, in words.
    """

    rows: tuple[LoRARow, ...]
    lora_parameters: int
    trainable_parameters: int
    total_parameters: int
    notes: tuple[str, ...] = ()

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

    @property
    def trainable_percent(self) -> float:
        """100 * trainable_parameters / total_parameters."""
        return 100.0 * self.trainable_parameters / max(self.total_parameters, 1)

    def __str__(self) -> str:
        def alike(row: LoRARow) -> tuple:
            return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", row.path), row.kind, row.shape, row.rank, row.parameters

        rows = [("module", "kind", "weight", "rank", "count", "LoRA parameters")]
        for (path, kind, shape, rank, parameters), count in Counter(map(alike, self.rows)).items():
            size = " x ".join(map(str, shape))
            rows.append((path, kind, size, str(rank), str(count), f"{count * parameters:,}"))
        lines = table(rows, "<<<>>>")
        other = self.total - self.attention - self.mlp
        lines += [
            f"LoRA modules          {self.total} = {self.attention} attention + {self.mlp} MLP"
            + (f" + {other} other" if other else ""),
            f"LoRA parameters       {self.lora_parameters:,}",
            f"trainable parameters  {self.trainable_parameters:,} of {self.total_parameters:,} "
            f"({self.trainable_percent:.2f} %)",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def lora_report(model: nn.Module, notes: Iterable[str] = ()) -> LoRAReport:
    """What LoRA ``model`` carries now, whoever put it there; ``notes`` are passed on."""
    rows: list[LoRARow] = []
    for module, (path, *_) in places(model):
        if not isinstance(module, LoRAModule):
            continue
        own = sum(p.numel() for p in module.own_lora_parameters().values())
        if not isinstance(module, LoRAMultiheadAttention):
            kind = "conv2d" if isinstance(module, nn.Conv2d) else "linear"
            rows.append(
                LoRARow(path, kind, _group(path), tuple(module.get_parameter("weight").shape), module.rank, own)
            )
            continue
        width, prefix = module.embed_dim, f"{path}." if path else ""
        if module.qkv is not None:
            rows.append(LoRARow(f"{prefix}in_proj", "in_proj", "attention", (3 * width, width), module.rank, own))
        if isinstance(module.out_proj, LoRALinear):
            own = sum(p.numel() for p in module.out_proj.own_lora_parameters().values())
            rows.append(LoRARow(f"{prefix}out_proj", "out_proj", "attention", (width, width), module.rank, own))
    parameters = list(model.parameters())
    return LoRAReport(
        rows=tuple(rows),
        lora_parameters=sum(row.parameters for row in rows),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        total_parameters=sum(p.numel() for p in parameters),
        notes=tuple(notes),
    )


def _group(path: str) -> str:
    *blocks, layer = path.split(".")
    for names, components in ((_BLOCKS, reversed(blocks)), (_LAYERS, [layer])):
        for component in components:
            for group, members in names.items():
                if component in members.split():
                    return group
    return "other"
