"""``fuse`` and ``unfuse``: PEFT's LoRA layers, run by ``lora_linear`` where it serves the call.

A fused layer is PEFT's layer with a class on top of its own. Adapters, configuration, merging and files stay PEFT's,
which knows of nothing: each call asks PEFT's own attributes anew whether the operator computes what PEFT would, and
where it does not, PEFT does.

PEFT is not imported with this module: who holds one of its layers has imported it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from pyfused.integrations import peft_attention, peft_linear
from pyfused.integrations.peft_adapters import FusedLayer, active_adapters, what
from pyfused.lora.third_party import bypassed
from pyfused.ops import decision
from pyfused.ops.contract import checks
from pyfused.surgery.change import all_or_nothing
from pyfused.surgery.paths import Place, places
from pyfused.surgery.refusals import check_module
from pyfused.surgery.report import Counts, LeftAlone, count, elements, folded, left_lines, table_of_alike
from pyfused.surgery.variants import plain_class


@dataclass(frozen=True)
class FusedRow:
    """One served layer: its dotted path, its base's class and weight (N, K), and its active adapters.

    Attributes:
        shape: (N, K); of an attention that of in_proj.
        adapters: (name, rank) of each.
        parameters: elements of their A and B, with DoRA's magnitudes and out_proj's pairs.
    """

    path: str
    kind: str
    shape: tuple[int, int]
    adapters: tuple[tuple[str, int], ...]
    parameters: int


@dataclass(frozen=True, kw_only=True)
class FuseReport(Counts):
    """What `fuse` did.

    Attributes:
        rows: one `FusedRow` per layer that an operator serves as the model is now.
        left: PEFT's LoRA layers that it does not serve, by kind and reason.
        trainable_parameters, total_parameters, notes: see `Counts`.
    """

    rows: tuple[FusedRow, ...]
    left: tuple[LeftAlone, ...] = ()

    @property
    def total(self) -> int:
        """Layers that are served."""
        return len(self.rows)

    def _found(self) -> list[str]:
        alike = [
            (
                folded(row.path),
                row.kind,
                " x ".join(map(str, row.shape)),
                ", ".join(f"{name} r{rank}" for name, rank in row.adapters),
                row.parameters,
            )
            for row in self.rows
        ]
        header = ("module", "base", "weight", "active adapters", "count", "LoRA parameters")
        others = sum(row.count for row in self.left)
        return [
            *table_of_alike(header, alike, "<<<<>>"),
            f"PEFT's LoRA layers    {self.total} fused" + (f", {others} left to PEFT" if others else ""),
        ]

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *left_lines(self.left, "left to PEFT, and why")])


def fuse(model: nn.Module, *, attention: bool = False) -> FuseReport:
    """Let ``lora_linear`` compute the LoRA layers that PEFT has put into ``model``, in place.

    Each of PEFT's linear layers (over nn.Linear and transformers' Conv1D), 1x1 convolutions and, where ``attention``
    asks for it, attentions gets a class on top of its own; nothing is copied, and nothing else is touched. Parameters,
    their names, the configuration, ``merge``, ``unload``, ``save_pretrained``, adapters that are added, weighted or
    switched: PEFT's, as before. In each call the operator serves what it computes as PEFT would, DoRA without dropout
    among it, and everything else runs as PEFT made it: merged or disabled adapters, ``adapter_names``, other variants
    such as aLoRA, quantised, sharded and hooked layers, dropout of several adapters, with DoRA or on a CPU, transforms
    of torch.func. `explain` says so for each layer.

    PEFT's layer for nn.MultiheadAttention may add out_proj's low-rank term twice to its output and once to its
    gradients, and it ignores LoRA's dropout. A fused attention does as the PEFT that is installed does, which ``fuse``
    tries out on an attention of width 1. It keeps the weights as they are; PEFT puts new ones in place in each call.
    Several adapters, a bias of B and weights that train are left to PEFT there, which drops gradients of theirs.

    Adapters that are added on new layers are not fused: call ``fuse`` again, which leaves alone what is fused.

    Output and gradients equal PEFT's to rounding. What differs:

    - Over 16-bit weights PEFT computes the term of a float32 adapter in float32, and `lora_linear` in 16 bits, with
      sums and gradients in float32. In an attention PEFT rounds the sum of weight and term instead.
    - In training the mask of dropout is Philox's, as in `lora_linear`: the same distribution, another mask than that
      of nn.Dropout for the same seed.
    - The norms of DoRA come from a formula that loses digits in rows of W + s B A that are far shorter than those of W.
    - A derivative of a derivative raises.

    Args:
        model: a model with LoRA layers of PEFT's somewhere inside it: a PeftModel, what it wraps, what
            ``inject_adapter_in_model`` or transformers' ``add_adapter`` made, a part of one. On any device.
        attention: whether PEFT's layers for nn.MultiheadAttention are fused too. Default False: the model that they
            train is another one than LoRA's formula says where PEFT adds the term twice.

    Returns:
        A `FuseReport`: which layers are served as they are now, and why the others are not; ``print`` it.

    Raises:
        TypeError: ``model`` is no nn.Module, or ``attention`` no bool.
        ValueError: it has no LoRA layer of PEFT's; for other models there is `inject_lora`.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, for its norms.

    Example:
        ``print(pyfused.fuse(get_peft_model(model, LoraConfig(target_modules="all-linear"))))``
    """
    checks.flag("fuse", "attention", attention)
    found = _lora_places("fuse", model)
    fused = sum(isinstance(place.module, FusedLayer) for place in found)
    notes = [f"{fused} layers were fused before"] if fused else []
    rows: list[FusedRow] = []
    left: dict[tuple[str, str], LeftAlone] = {}
    with all_or_nothing() as change:
        for place in found:
            layer: Any = place.module
            part = _part_of(layer)
            why = None if isinstance(layer, FusedLayer) else _never(layer, attention) or _never_called(place)
            if why is None:
                change.as_variant(layer, part.KIND)
                active = active_adapters(layer)
                why = part.not_now(layer, active)
            if why is None:
                rows.append(_row(place.paths[0], layer, active))
                continue
            kind = what(layer)
            alone = left.setdefault((kind, why), LeftAlone(kind, why))
            alone.paths.append(place.paths[0])
            alone.parameters += elements(layer.parameters())
    return FuseReport(**count(model, notes), rows=tuple(rows), left=tuple(left.values()))


def unfuse(model: nn.Module) -> None:
    """Give every layer that `fuse` changed in ``model`` back the class that PEFT made it with. All or nothing.

    Layers that are not fused stay as they are.

    Raises:
        TypeError: ``model`` is no nn.Module.
        ValueError: it has no LoRA layer of PEFT's.
        RuntimeError: another class was put on top of a fused layer, by ``fully_shard`` say, or its forward was
            replaced.
    """
    found = _lora_places("unfuse", model)
    with all_or_nothing() as change:
        for place in found:
            if isinstance(place.module, FusedLayer):
                change.as_base(place.module, FusedLayer)


def left_to_peft(module: nn.Module) -> decision.LeftToTorch | None:
    """What `explain` says of a layer of PEFT's that is not fused; None of any other module."""
    if not _is_lora(module) or isinstance(module, FusedLayer):
        return None
    return decision.LeftToTorch(what(module), _never(module, True) or "not fused: see pyfused.fuse")


# ---- finding


def _is_lora(module: nn.Module) -> bool:
    # Where PEFT's layers were not imported, no module is one.
    if "peft.tuners.lora.layer" not in sys.modules:
        return False
    from peft.tuners.lora.layer import LoraLayer

    return isinstance(module, LoraLayer)


def _lora_places(caller: str, model: nn.Module) -> list[Place]:
    check_module(caller, model)
    # Not what is in a layer that stays PEFT's as a whole: a layer for an attention holds one for its out_proj.
    found = [place for place in places(model, _is_attention) if _is_lora(place.module)]
    if not found:
        raise ValueError(
            f"{caller}: model must hold LoRA layers of PEFT's, got a {type(model).__name__} without one; for a model "
            "that PEFT has not changed there is inject_lora"
        )
    return found


def _is_attention(module: nn.Module) -> bool:
    return _is_lora(module) and isinstance(module.base_layer, nn.MultiheadAttention)


def _row(path: str, layer: Any, active: list[str]) -> FusedRow:
    first, base = layer.lora_A[active[0]].weight, layer.base_layer
    adapters = tuple((adapter, int(layer.lora_A[adapter].weight.shape[0])) for adapter in active)
    sizes = int(layer.lora_B[active[0]].weight.shape[0]), int(first.shape[1])
    holders = [layer, base.out_proj] if _is_attention(layer) else [layer]
    tensors = [
        parameter
        for holder in holders
        for adapter in active
        for part in (holder.lora_A, holder.lora_B, holder.lora_magnitude_vector)
        if adapter in part
        for name, parameter in part[adapter].named_parameters()
        if name == "weight"
    ]
    return FusedRow(path, type(base).__name__, sizes, adapters, elements(tensors))


# ---- which kind serves a layer


def _part_of(layer: Any) -> Any:
    """The module of this package that serves ``layer``."""
    return peft_attention if _is_attention(layer) else peft_linear


def _never(layer: Any, attention: bool) -> str | None:
    """Why no operator serves ``layer``, whatever its adapters are."""
    from peft.tuners.lora import layer as made

    plain = plain_class(type(layer))[0]
    if plain not in (made.Linear, made.Conv2d, made.MultiheadAttention):
        return "no linear layer, no 1x1 convolution and no attention of PEFT's own"
    if "forward" in layer.__dict__:
        return "its forward was replaced, which a class does not see"
    if not hasattr(layer, "lora_variant"):
        return "this PEFT is too old: its layers do not say which variant they are"
    if plain is made.MultiheadAttention and not attention:
        return "an attention, which is fused where attention=True asks for it"
    why: str | None = _part_of(layer).never(layer)
    return why


def _never_called(place: Place) -> str | None:
    return next((why for spot in place.spots if (why := bypassed(*spot)) is not None), None)
