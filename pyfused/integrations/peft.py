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

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from pyfused.ops import decision
from pyfused.ops.contract import checks
from pyfused.ops.lora_linear import MAX_RANK, lora_linear
from pyfused.surgery.change import all_or_nothing
from pyfused.surgery.paths import Place, places
from pyfused.surgery.refusals import check_module
from pyfused.surgery.report import Counts, LeftAlone, count, elements, folded, left_lines, table_of_alike
from pyfused.surgery.variants import Variant, plain_class


@dataclass(frozen=True)
class FusedRow:
    """One served layer: its dotted path, its base's class and weight (N, K), and its active adapters.

    Attributes:
        adapters: (name, rank) of each.
        parameters: elements of their A and B.
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


class FusedLayer(Variant):
    """One of PEFT's LoRA layers that calls ``lora_linear`` where that serves the call, else runs as PEFT made it."""

    _variant_whole = True

    @classmethod
    def _variant_made(cls, base: type[nn.Module]) -> Any:
        # PEFT's name, which its messages and its users' print-outs hold.
        return type(base.__name__, (cls, base), cls._variant_members(base))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: (..., K) -> (..., N), of a 1x1 convolution (B, K, H, W) -> (B, N, H, W)."""
        active = _active(self)
        why = _not_now(self, active) or _not_this_call(self, active, x, args, kwargs)
        if why is None:
            return _fused(self, active, x)
        if decision.observers:
            decision.notify(decision.LeftToTorch(_what(self), why))
        result: Tensor = super().forward(x, *args, **kwargs)
        return result


def fuse(model: nn.Module) -> FuseReport:
    """Let ``lora_linear`` compute the LoRA layers that PEFT has put into ``model``, in place.

    Each of PEFT's linear layers (over nn.Linear and transformers' Conv1D) and 1x1 convolutions gets a class on top of
    its own; nothing is copied, and nothing else is touched. Parameters, their names, the configuration, ``merge``,
    ``unload``, ``save_pretrained``, adapters that are added, weighted or switched: PEFT's, as before. In each call the
    operator serves what it computes as PEFT would, and everything else runs as PEFT made it: merged or disabled
    adapters, ``adapter_names``, variants such as DoRA and aLoRA, quantised, sharded and hooked layers, dropout of
    several adapters or on a CPU, transforms of torch.func. `explain` says so for each layer.

    Layers of PEFT's for nn.MultiheadAttention are left alone: PEFT adds out_proj's term twice, and a right result
    would not equal what its ``merge`` makes. Adapters that are added on new layers are not fused: call ``fuse`` again,
    which leaves alone what is fused.

    Output and gradients equal PEFT's to rounding. What differs:

    - Over 16-bit weights PEFT computes the term of a float32 adapter in float32, and `lora_linear` in 16 bits, with
      sums and gradients in float32.
    - In training the mask of dropout is Philox's, as in `lora_linear`: the same distribution, another mask than that
      of nn.Dropout for the same seed.
    - A derivative of a derivative raises.

    Args:
        model: a model with LoRA layers of PEFT's somewhere inside it: a PeftModel, what it wraps, what
            ``inject_adapter_in_model`` or transformers' ``add_adapter`` made, a part of one. On any device.

    Returns:
        A `FuseReport`: which layers are served as they are now, and why the others are not; ``print`` it.

    Raises:
        TypeError: ``model`` is no nn.Module.
        ValueError: it has no LoRA layer of PEFT's; for other models there is `inject_lora`.

    Example:
        ``print(pyfused.fuse(get_peft_model(model, LoraConfig(target_modules="all-linear"))))``
    """
    found = _lora_places("fuse", model)
    fused = sum(isinstance(place.module, FusedLayer) for place in found)
    notes = [f"{fused} layers were fused before"] if fused else []
    rows: list[FusedRow] = []
    left: dict[tuple[str, str], LeftAlone] = {}
    with all_or_nothing() as change:
        for place in found:
            layer: Any = place.module
            why = None if isinstance(layer, FusedLayer) else _never(layer) or _never_called(place)
            if why is None:
                change.as_variant(layer, FusedLayer)
                active = _active(layer)
                why = _not_now(layer, active)
            if why is None:
                rows.append(_row(place.paths[0], layer, active))
                continue
            kind = _what(layer)
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
        RuntimeError: another class was put on top of a fused layer, by ``fully_shard`` say.
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
    return decision.LeftToTorch(_what(module), _never(module) or "not fused: see pyfused.fuse")


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


def _what(layer: nn.Module) -> str:
    return f"PEFT's {plain_class(type(layer))[0].__name__}"


def _row(path: str, layer: Any, active: list[str]) -> FusedRow:
    pairs = [(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight) for adapter in active]
    (a, b), kind = pairs[0], type(layer.base_layer).__name__
    adapters = tuple((adapter, int(a.shape[0])) for adapter, (a, _) in zip(active, pairs, strict=True))
    sizes = int(b.shape[0]), int(a.shape[1])
    return FusedRow(path, kind, sizes, adapters, elements(tensor for pair in pairs for tensor in pair))


# ---- what is served, and what is PEFT's


def _form(base: nn.Module) -> str | None:
    """How ``base`` holds its weight: "linear" (N, K), "conv1d" (K, N), "conv1x1" (N, K, 1, 1); None: it is no such."""
    kind = type(base)
    if kind.forward is nn.Linear.forward:
        return "linear"
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return "conv1d"
    if kind.forward is nn.Conv2d.forward:
        plain = base.kernel_size == (1, 1) and base.stride == (1, 1) and base.groups == 1
        return "conv1x1" if plain and base.padding in ((0, 0), "valid", "same") else None
    return None


def _never(layer: Any) -> str | None:
    """Why no operator serves ``layer``, whatever its adapters are."""
    from peft.tuners.lora import layer as made

    plain, base = plain_class(type(layer))[0], layer.base_layer
    if plain is made.MultiheadAttention:
        return "PEFT adds out_proj's term twice, which a right result would not equal"
    if plain not in (made.Linear, made.Conv2d):
        return "no linear layer and no 1x1 convolution of PEFT's own"
    if "forward" in layer.__dict__:
        return "its forward was replaced, which a class does not see"
    if not hasattr(layer, "lora_variant"):
        return "this PEFT is too old: its layers do not say which variant they are"
    if _form(base) is None:
        if plain is made.Conv2d:
            return "its convolution is no 1x1 without stride, padding and groups"
        return f"its base is a {type(base).__name__}, with a forward of its own"
    return None


def _never_called(place: Place) -> str | None:
    if any(isinstance(parent, nn.MultiheadAttention) for parent, _ in place.spots):
        return "nn.MultiheadAttention reads its weight and does not call it"
    return None


def _active(layer: Any) -> list[str]:
    """The adapters that PEFT would add, in its order."""
    return [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]


# Where the operator draws its mask in plain torch, which takes longer than PEFT's layer with nn.Dropout's own.
_SLOW_MASKS = ("cpu",)
_PLAIN = (Tensor, nn.Parameter)
_DROPOUTS = (nn.Dropout, nn.Identity)


def _drops(dropout: Any) -> bool:
    return type(dropout) is nn.Dropout and dropout.training and dropout.p > 0.0


def _hooked(module: Any) -> bool:
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


def _not_now(layer: Any, active: list[str]) -> str | None:
    """Why PEFT computes ``layer`` as its adapters are now."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged"
    if not active:
        return "none of its adapters is active"
    base = layer.base_layer
    form = _form(base)
    if form is None or "forward" in base.__dict__:
        return f"its base is a {type(base).__name__}, with a forward of its own"
    if _hooked(base):
        return "its base has hooks"
    if type(base.weight) not in _PLAIN or (base.bias is not None and type(base.bias) not in _PLAIN):
        return f"its base's weight is a {type(base.weight).__name__}"
    ranks, drops = 0, False
    for adapter in active:
        if adapter in layer.lora_variant:
            return f"variant {type(layer.lora_variant[adapter]).__name__}"
        a, b, dropout = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]
        for module in (a, b):
            if _form(module) != ("conv1x1" if form == "conv1x1" else "linear") or "forward" in module.__dict__:
                return f"A or B is a {type(module).__name__}, with a forward of its own"
            if type(module.weight) not in _PLAIN:
                return f"the weight of A or B is a {type(module.weight).__name__}"
        if a.bias is not None:
            return "A has a bias"
        if type(dropout) not in _DROPOUTS or "forward" in dropout.__dict__:
            return f"dropout by {type(dropout).__name__}"
        if _hooked(a) or _hooked(b) or _hooked(dropout):
            return "A, B or dropout has hooks"
        if not isinstance(layer.scaling[adapter], int | float):
            return f"scaling is a {type(layer.scaling[adapter]).__name__}"
        if _drops(dropout):
            drops = True
            if dropout.p >= 1.0:
                return "dropout leaves nothing"
        ranks += a.weight.shape[0]
    if ranks > MAX_RANK:
        return f"rank {ranks} > {MAX_RANK}"
    if drops and len(active) > 1:
        return "several active adapters with dropout, each with its own mask"
    return None


def _not_this_call(layer: Any, active: list[str], x: Any, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Why PEFT computes this call of a layer that could be served."""
    given = [name for name, value in kwargs.items() if value is not None]
    if args or given:
        return f"called with {', '.join(given) or 'further arguments'}"
    if type(x) not in _PLAIN or x.layout is not torch.strided or x.is_nested or not x.is_floating_point():
        return "its input is no plain floating tensor"
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            return "a transform of torch.func is active"
        if forward_ad._current_level >= 0:
            return "forward-mode differentiation is on"
        if _has_any_global_hook():
            return "every module has a hook"
    if x.device.type in _SLOW_MASKS and _drops(layer.lora_dropout[active[0]]):
        return f"dropout on a {x.device.type.upper()}, where the operator's mask takes longer than PEFT's"
    base = layer.base_layer
    weight, bias = base.weight, base.bias
    # What does not fit is PEFT's to refuse; a weight of no elements is one that another library has put aside.
    form = _form(base)
    if weight.dim() != (4 if form == "conv1x1" else 2) or (x.dim() != 4 if form == "conv1x1" else x.dim() < 1):
        return "its input or its weight has another number of dimensions"
    width = weight.shape[0 if form == "conv1d" else 1]
    if width == 0 or x.shape[1 if form == "conv1x1" else -1] != width:
        return "the width of its input is not that of its weight"
    autocast = checks.autocast_dtype(x)
    if autocast is None:
        allowed = (weight.dtype,) if weight.dtype.itemsize > 2 else (weight.dtype, torch.float32)
        fits = x.dtype == weight.dtype and x.dtype in checks.FLOATING and (bias is None or bias.dtype == x.dtype)
    else:
        allowed = autocast, torch.float32
        fits = weight.dtype in checks.NARROW and (bias is None or bias.dtype in checks.NARROW)
    if not fits:
        return f"its input is {x.dtype} and its weight {weight.dtype}"
    first = layer.lora_A[active[0]].weight.dtype
    for adapter in active:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        if a.dtype not in allowed or a.dtype != first or b.dtype != first:
            return f"A is {a.dtype} and B {b.dtype} over a weight of {weight.dtype}"
        if autocast is None and x.dtype != first and not layer.cast_input_dtype_enabled:
            return "its input is not cast to the adapter's dtype"
        if not x.device == weight.device == a.device == b.device:
            return "its input and its weights are on several devices"
    return None


def _fused(layer: Any, active: list[str], x: Tensor) -> Tensor:
    base = layer.base_layer
    form = _form(base)
    weight, bias, matrices = base.weight, base.bias, []
    for adapter in active:
        a, b = layer.lora_A[adapter], layer.lora_B[adapter]
        matrices.append((a.weight.flatten(1), b.weight.flatten(1)) if form == "conv1x1" else (a.weight, b.weight))
        if b.bias is not None:
            # Rounded once, to what the weight is in.
            own = b.bias * layer.scaling[adapter]
            bias = (own if bias is None else bias + own).to(weight.dtype)
    dropout = layer.lora_dropout[active[0]]
    p = dropout.p if type(dropout) is nn.Dropout else 0.0
    if len(active) == 1:
        (lora_a, lora_b), scaling = matrices[0], layer.scaling[active[0]]
    else:
        scaling, p = 1.0, 0.0
        lora_a = torch.cat([a for a, _ in matrices])
        lora_b = torch.cat(
            [b * layer.scaling[adapter] for (_, b), adapter in zip(matrices, active, strict=True)], dim=1
        )
    if form == "conv1d":
        weight = weight.t()
    elif form == "conv1x1":
        weight = weight.flatten(1)
    return lora_linear(
        x, weight, lora_a, lora_b, bias,
        scaling=scaling, dropout_p=p, training=dropout.training, channel_dim=1 if form == "conv1x1" else -1,
    )  # fmt: skip
