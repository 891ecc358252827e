"""PEFT's LoRA layers over nn.Linear, transformers' Conv1D and 1x1 convolutions, DoRA among them, by ``lora_linear``.

DoRA without dropout, row n of the weight scaled to the length m_n (Liu et al., "DoRA: Weight-Decomposed Low-Rank
Adaptation", 2024), with the norm of row n held constant:

    y = m / norm * (x W^T + s (x A^T) B^T) + b
    norm^2 = |W|^2 + 2 s <W, B A> + s^2 |B A|^2,   <W, B A> = sum_R (W A^T) B,   |B A|^2 = sum_R (B A A^T) B
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyfused.integrations.peft_adapters import (
    FusedLayer,
    active_adapters,
    base_refusal,
    drops,
    dtypes_refusal,
    form_of,
    hooked,
    input_refusal,
    leave,
    low_rank,
    own_forward,
    pairs_refusal,
    switched_off,
)
from pyfused.ops.contract import checks
from pyfused.ops.lora_linear import lora_linear

# Where the operator draws its mask in plain torch, which takes longer than PEFT's layer with nn.Dropout's own.
_SLOW_MASKS = ("cpu",)
_DORA = {"DoraLinearVariant": "DoraLinearLayer", "DoraConv2dVariant": "DoraConv2dLayer"}


class FusedLinear(FusedLayer):
    """PEFT's layer over a linear layer or a 1x1 convolution."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: (..., K) -> (..., N), of a 1x1 convolution (B, K, H, W) -> (B, N, H, W)."""
        active = active_adapters(self)
        why = not_now(self, active) or _not_this_call(self, active, x, args, kwargs)
        if why is None:
            return _fused(self, active, x)
        leave(self, why)
        result: Tensor = super().forward(x, *args, **kwargs)
        return result


KIND = FusedLinear


def never(layer: Any) -> str | None:
    """Why no operator serves ``layer``, whatever its adapters are."""
    from peft.tuners.lora import layer as made

    base = layer.base_layer
    if form_of(base) is None:
        if isinstance(layer, made.Conv2d):
            return "its convolution is no 1x1 without stride, padding and groups"
        return own_forward(base)
    return None


def not_now(layer: Any, active: list[str]) -> str | None:
    """Why PEFT computes ``layer`` as its adapters are now."""
    base = layer.base_layer
    why = switched_off(layer, active)
    if why is not None:
        return why
    form = form_of(base)
    if form is None or "forward" in base.__dict__:
        return own_forward(base)
    why = base_refusal(base, base.weight, base.bias) or _variant_refusal(layer, active, form)
    why = why or pairs_refusal(layer, active, form)
    if why is not None:
        return why
    dropouts = [layer.lora_dropout[adapter] for adapter in active]
    dropping = [dropout for dropout in dropouts if drops(dropout)]
    if any(dropout.p >= 1.0 for dropout in dropping):
        return "dropout leaves nothing"
    if dropping and len(active) > 1:
        return "several active adapters with dropout, each with its own mask"
    return None


def _magnitude(layer: Any, active: list[str]) -> Any:
    """The module of DoRA's m, or None without DoRA."""
    return layer.lora_magnitude_vector[active[0]] if active[0] in layer.lora_variant else None


def _variant_refusal(layer: Any, active: list[str], form: str) -> str | None:
    if not any(adapter in layer.lora_variant for adapter in active):
        return None
    from peft.tuners.lora import dora

    for adapter in active:
        if adapter not in layer.lora_variant:
            continue
        variant = type(layer.lora_variant[adapter])
        if variant.__module__ != "peft.tuners.lora.variants" or variant.__name__ not in _DORA:
            return f"variant {variant.__name__}"
        if len(active) > 1:
            return "several active adapters with DoRA, which scales those before it too"
        # PEFT asks the layer whether dropout acts, and then the dropout itself.
        if layer.training and drops(layer.lora_dropout[adapter]):
            return "DoRA with dropout, which PEFT applies to the base's input too"
        if layer.lora_B[adapter].bias is not None:
            return "DoRA with a bias of B"
        magnitude = layer.lora_magnitude_vector[adapter]
        if type(magnitude).__name__ != _DORA[variant.__name__] or "forward" in magnitude.__dict__:
            return f"DoRA by {type(magnitude).__name__}"
        if magnitude.fan_in_fan_out != (form == "conv1d") and form != "conv1x1":
            return "DoRA with a fan_in_fan_out that is not its base's"
        if hooked(magnitude):
            return "DoRA's magnitude has hooks"
        if dora.ENABLE_DORA_CACHING and not magnitude.training:
            return "DoRA whose norms PEFT keeps between calls"
    return None


def _not_this_call(layer: Any, active: list[str], x: Any, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Why PEFT computes this call of a layer that could be served."""
    given = [name for name, value in kwargs.items() if value is not None]
    if args or given:
        return f"called with {', '.join(given) or 'further arguments'}"
    why = input_refusal(x)
    if why is not None:
        return why
    magnitude = _magnitude(layer, active)
    if magnitude is None and x.device.type in _SLOW_MASKS and drops(layer.lora_dropout[active[0]]):
        return f"dropout on a {x.device.type.upper()}, where the operator's mask takes longer than PEFT's"
    base = layer.base_layer
    weight, form = base.weight, form_of(base)
    # What does not fit is PEFT's to refuse; a weight of no elements is one that another library has put aside.
    if weight.dim() != (4 if form == "conv1x1" else 2) or (x.dim() != 4 if form == "conv1x1" else x.dim() < 1):
        return "its input or its weight has another number of dimensions"
    width = weight.shape[0 if form == "conv1d" else 1]
    if width == 0 or x.shape[1 if form == "conv1x1" else -1] != width:
        return "the width of its input is not that of its weight"
    why = dtypes_refusal(layer, active, x, weight, base.bias)
    if why is None and magnitude is not None and magnitude.weight.device != x.device:
        return "DoRA's magnitude is on another device"
    return why


def _fused(layer: Any, active: list[str], x: Tensor) -> Tensor:
    base = layer.base_layer
    form = form_of(base)
    weight, bias = base.weight, base.bias
    for adapter in active:
        own = layer.lora_B[adapter].bias
        if own is not None:
            # Rounded once, to what the weight is in.
            own = own * layer.scaling[adapter]
            bias = (own if bias is None else bias + own).to(weight.dtype)
    if form == "conv1d":
        weight = weight.t()
    elif form == "conv1x1":
        weight = weight.flatten(1)
    lora_a, lora_b, scaling = low_rank(layer, active)
    channel_dim = 1 if form == "conv1x1" else -1
    magnitude = _magnitude(layer, active)
    if magnitude is not None:
        y = lora_linear(x, weight, lora_a, lora_b, bias, scaling=scaling, channel_dim=channel_dim)
        return _scaled(y, magnitude.weight.flatten() / _norm(weight, lora_a, lora_b, scaling), bias, channel_dim)
    dropout = layer.lora_dropout[active[0]]
    p = dropout.p if len(active) == 1 and type(dropout) is nn.Dropout else 0.0
    return lora_linear(
        x, weight, lora_a, lora_b, bias,
        scaling=scaling, dropout_p=p, training=dropout.training, channel_dim=channel_dim,
    )  # fmt: skip


def _scaled(y: Tensor, scale: Tensor, bias: Tensor | None, channel_dim: int) -> Tensor:
    """``scale * (y - bias) + bias``, both (N,), in y's dtype; where the scale is 1, y itself."""
    shape = (-1, *(1,) * (y.dim() - 2)) if channel_dim == 1 else (-1,)
    own = y if bias is None else y - bias.view(shape)
    return (y + (scale - 1.0).view(shape) * own).to(y.dtype)


@torch.no_grad()
def _norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """(N,): the norm of each row of W + s B A, which is not made."""
    with checks.without_autocast(weight):
        dtype = torch.promote_types(torch.promote_types(weight.dtype, lora_a.dtype), torch.float32)
        weight, a, b = weight.to(dtype), lora_a.to(dtype), lora_b.to(dtype)
        lengths = torch.linalg.vector_norm(weight, dim=1)
        update = 2.0 * scaling * (weight @ a.t()) + scaling * scaling * (b @ (a @ a.t()))
        more = (update * b).sum(1)
        # Of a row that its update takes away the square is about zero, on either side. Where there is no update, not a
        # bit may change: DoRA starts as the base.
        return torch.where(more == 0.0, lengths, (lengths.square() + more).clamp_min(0.0).sqrt())
