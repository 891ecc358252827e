"""PEFT's LoRA layer over ``nn.MultiheadAttention``, whose projections ``lora_linear`` computes.

PEFT merges the adapters into both weights before each call and takes them out after it, so that backward makes the
gradient of a whole weight. It ignores LoRA's dropout there. This stands for what PEFT computes, with its faults.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyfused.integrations.peft_adapters import (
    FusedLayer,
    active_adapters,
    base_refusal,
    dtypes_refusal,
    input_refusal,
    leave,
    low_rank,
    own_forward,
    pairs_refusal,
    switched_off,
)
from pyfused.lora.called_attention import attend, check_call, in_project, projection
from pyfused.ops.lora_linear import lora_linear


class FusedAttention(FusedLayer):
    """PEFT's layer over an nn.MultiheadAttention.

    Attributes:
        _variant_out_term: how often PEFT's output has out_proj's low-rank term, and how often its gradients do; None
            where PEFT does neither what it should nor what it was seen to do.
    """

    _variant_out_term: tuple[float, float] | None

    @classmethod
    def _variant_members(cls, base: type[nn.Module]) -> dict[str, Any]:
        return super()._variant_members(base) | {"_variant_out_term": _out_term()}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As that of `torch.nn.MultiheadAttention`; the results are in query's dtype, under autocast too."""
        active = active_adapters(self)
        masks = key_padding_mask, attn_mask, is_causal
        why = not_now(self, active) or _not_this_call(self, active, (query, key, value), masks, kwargs)
        if why is not None:
            leave(self, why)
            result: tuple[Tensor, Tensor | None] = super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal, **kwargs
            )
            return result
        base: Any = self.base_layer

        def project(x: Tensor, first: int, last: int) -> Tensor:
            lora_a, lora_b, scaling = low_rank(self, active)
            rows = slice(first * base.embed_dim, last * base.embed_dim)
            weight, bias = projection(base, first, last)
            return lora_linear(x, weight, lora_a, lora_b[rows], bias, scaling=scaling)

        q, k, v = in_project(project, True, query, key, value)
        attended, weights = attend(
            base, q, k, v, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
        out = _out_project(base.out_proj, active, attended, self._variant_out_term)
        return out.to(query.dtype), None if weights is None else weights.to(query.dtype)


KIND = FusedAttention


def never(layer: Any) -> str | None:
    """Why no operator serves ``layer``, whatever its adapters are."""
    base = layer.base_layer
    if type(base).forward is not nn.MultiheadAttention.forward:
        return own_forward(base)
    return None if base._qkv_same_embed_dim else "q, k and v have weights of their own"


def not_now(layer: Any, active: list[str]) -> str | None:
    """Why PEFT computes ``layer`` as its adapters are now."""
    base, out = layer.base_layer, layer.base_layer.out_proj
    why = switched_off(layer, active)
    if why is not None:
        return why
    if type(layer)._variant_out_term is None:
        return "this PEFT adds out_proj's term in another way than is known"
    if "forward" in base.__dict__:
        return own_forward(base)
    if len(active) > 1:
        return "several active adapters, of which PEFT gives the last alone a gradient"
    if out.active_adapters != layer.active_adapters or out.merged or out.fan_in_fan_out:
        return "its out_proj has other adapters or other settings"
    weights = base.in_proj_weight, out.base_layer.weight
    why = base_refusal(base, *weights, base.in_proj_bias, out.base_layer.bias)
    for holder in (layer, out):
        for adapter in active:
            if adapter in holder.lora_variant:
                return f"variant {type(holder.lora_variant[adapter]).__name__}"
            if holder.lora_B[adapter].bias is not None:
                return "B has a bias, to which PEFT gives no gradient"
        why = why or pairs_refusal(holder, active, "linear")
    if why is None and any(weight.requires_grad for weight in weights):
        return "its weights train, and PEFT gives them no gradient"
    return why


def _not_this_call(
    layer: Any, active: list[str], inputs: tuple[Any, Any, Any], masks: tuple[Any, Any, bool], kwargs: dict[str, Any]
) -> str | None:
    """Why PEFT computes this call of a layer that could be served."""
    if kwargs:
        return f"called with {', '.join(kwargs)}"
    why = input_refusal(*inputs)
    if why is not None:
        return why
    base = layer.base_layer
    try:
        check_call("fuse", base, *inputs, *masks)
    except (TypeError, ValueError):
        return "its inputs do not fit"
    linear = base.out_proj.base_layer
    for x in inputs:
        why = why or dtypes_refusal(layer, active, x, base.in_proj_weight, base.in_proj_bias)
    return why or dtypes_refusal(base.out_proj, active, inputs[0], linear.weight, linear.bias)


def _out_project(out: Any, active: list[str], x: Tensor, term: tuple[float, float] | None) -> Tensor:
    assert term is not None
    forward, backward = term
    lora_a, lora_b, scaling = low_rank(out, active)
    if backward != forward:
        # The same numbers, with a part of the gradient.
        lora_a, lora_b = (torch.lerp(t.detach(), t, backward / forward) for t in (lora_a, lora_b))
    return lora_linear(x, out.base_layer.weight, lora_a, lora_b, out.base_layer.bias, scaling=forward * scaling)


def _out_term() -> tuple[float, float] | None:
    """See `FusedAttention`: asked of an attention of width 1 whose projections are 1, as is its low-rank term."""
    from peft import LoraConfig, inject_adapter_in_model

    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        model: Any = nn.Sequential(nn.MultiheadAttention(1, 1, bias=False, dtype=torch.float32))
        inject_adapter_in_model(LoraConfig(r=1, lora_alpha=1, target_modules=["0"]), model)
        layer = model[0]
        out = layer.base_layer.out_proj
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(1.0)
            layer.lora_B["default"].weight.fill_(0.0)
        x = torch.ones(1, 1, 1)
        y = layer(x, x, x, need_weights=False)[0]
        y.sum().backward()
        forward, backward = (
            float(y.detach()) - 1.0,
            [float(pair["default"].weight.grad) for pair in (out.lora_A, out.lora_B)],
        )
    known = (forward, *backward) in ((1.0, 1.0, 1.0), (2.0, 1.0, 1.0))
    return (forward, backward[0]) if known else None
