"""The adapters of PEFT's LoRA layers: what is active, what of it ``lora_linear`` computes, and with which matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from pyfused.ops import decision
from pyfused.ops.contract import checks
from pyfused.ops.lora_linear import MAX_RANK
from pyfused.surgery.variants import Variant, plain_class

PLAIN = (Tensor, nn.Parameter)
_DROPOUTS = (nn.Dropout, nn.Identity)


class FusedLayer(Variant):
    """One of PEFT's LoRA layers that calls ``lora_linear`` where that serves the call, else runs as PEFT made it."""

    _variant_whole = True

    @classmethod
    def _variant_made(cls, base: type[nn.Module]) -> Any:
        # PEFT's name, which its messages and its users' print-outs hold.
        return type(base.__name__, (cls, base), cls._variant_members(base))


def what(layer: nn.Module) -> str:
    """``layer`` in words."""
    return f"PEFT's {plain_class(type(layer))[0].__name__}"


def leave(layer: nn.Module, why: str) -> None:
    """Tell who watches that PEFT computes this call."""
    if decision.observers:
        decision.notify(decision.LeftToTorch(what(layer), why))


def active_adapters(layer: Any) -> list[str]:
    """The adapters that PEFT would add, in its order."""
    return [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]


def form_of(base: nn.Module) -> str | None:
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


def own_forward(base: nn.Module) -> str:
    """Why no operator stands for ``base``."""
    return f"its base is a {type(base).__name__}, with a forward of its own"


def drops(dropout: Any) -> bool:
    """Whether ``dropout`` changes its input."""
    return type(dropout) is nn.Dropout and dropout.training and dropout.p > 0.0


def hooked(module: Any) -> bool:
    """Whether a call of ``module`` runs more than its forward."""
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


def switched_off(layer: Any, active: list[str]) -> str | None:
    """Why PEFT adds no adapter in forward; None where it adds some."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged"
    return None if active else "none of its adapters is active"


def base_refusal(base: nn.Module, *parameters: Tensor | None) -> str | None:
    """Why PEFT calls ``base`` itself; ``parameters`` are what the operator would read of it."""
    if hooked(base):
        return "its base has hooks"
    for parameter in parameters:
        if parameter is not None and type(parameter) not in PLAIN:
            return f"its base's weight is a {type(parameter).__name__}"
    return None


def pairs_refusal(layer: Any, active: list[str], form: str) -> str | None:
    """Why the operator does not compute the terms of A and B; ``form`` is that of the base, see `form_of`."""
    ranks = 0
    for adapter in active:
        a, b, dropout = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]
        for module in (a, b):
            if form_of(module) != ("conv1x1" if form == "conv1x1" else "linear") or "forward" in module.__dict__:
                return f"A or B is a {type(module).__name__}, with a forward of its own"
            if type(module.weight) not in PLAIN:
                return f"the weight of A or B is a {type(module.weight).__name__}"
        if a.bias is not None:
            return "A has a bias"
        if type(dropout) not in _DROPOUTS or "forward" in dropout.__dict__:
            return f"dropout by {type(dropout).__name__}"
        if hooked(a) or hooked(b) or hooked(dropout):
            return "A, B or dropout has hooks"
        if not isinstance(layer.scaling[adapter], int | float):
            return f"scaling is a {type(layer.scaling[adapter]).__name__}"
        ranks += a.weight.shape[0]
    return f"rank {ranks} > {MAX_RANK}" if ranks > MAX_RANK else None


def input_refusal(*inputs: Any) -> str | None:
    """Why the operator does not see these inputs as PEFT would."""
    for x in inputs:
        if type(x) not in PLAIN or x.layout is not torch.strided or x.is_nested or not x.is_floating_point():
            return "its input is no plain floating tensor"
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            return "a transform of torch.func is active"
        if forward_ad._current_level >= 0:
            return "forward-mode differentiation is on"
        if _has_any_global_hook():
            return "every module has a hook"
    return None


def dtypes_refusal(layer: Any, active: list[str], x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why dtypes or devices of ``x``, of the base's weight and of the adapters do not fit the operator."""
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


def low_rank(layer: Any, active: list[str]) -> tuple[Tensor, Tensor, float]:
    """A (R, K), B (N, R) and scaling of the sum of the active adapters' terms."""
    pairs = [(layer.lora_A[adapter].weight.flatten(1), layer.lora_B[adapter].weight.flatten(1)) for adapter in active]
    if len(active) == 1:
        return *pairs[0], layer.scaling[active[0]]
    scaled = [b * layer.scaling[adapter] for (_, b), adapter in zip(pairs, active, strict=True)]
    return torch.cat([a for a, _ in pairs]), torch.cat(scaled, dim=1), 1.0
