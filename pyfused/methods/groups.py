"""Which method each trained parameter belongs to, and the optimizer's groups by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pyfused.lora.base import LoRAModule
from pyfused.methods.bias_tuning import is_bias
from pyfused.methods.presets import RATES
from pyfused.methods.virtual_tokens import VirtualTokens
from pyfused.modules import ConvLoRA
from pyfused.ops.contract import checks
from pyfused.surgery.added import KeepsWide, added_parameters
from pyfused.surgery.paths import near
from pyfused.surgery.refusals import check_module

_CALLER = "param_groups"


def methods_of(model: nn.Module) -> dict[str, str]:
    """Name of each parameter that trains -> its method.

    "lora", "prefix" and "adapter" are parameters of this package's modules; "bitfit" is a bias of a module of whose own
    parameters only biases train, while weights there, or where there are none in the model, are frozen; "whole" is
    every other.
    """
    kinds = {LoRAModule: "lora", ConvLoRA: "lora", VirtualTokens: "prefix", KeepsWide: "adapter"}
    found: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, KeepsWide):
            method = next(method for kind, method in kinds.items() if isinstance(module, kind))
            found |= {id(parameter): method for parameter in added_parameters(module)}
    added = set(found)

    def weights(module: nn.Module) -> list[nn.Parameter]:
        return [p for name, p in module.named_parameters() if not is_bias(name) and id(p) not in added]

    anywhere = weights(model)
    for module in model.modules():
        own = {name: p for name, p in module._parameters.items() if p is not None and id(p) not in added}
        biases = all(is_bias(name) for name, p in own.items() if p.requires_grad)
        frozen = any(not p.requires_grad for p in weights(module) or anywhere)
        found |= {id(p): "bitfit" if biases and frozen else "whole" for p in own.values()}
    return {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def param_groups(
    model: nn.Module, lr: float | Mapping[str, float] | None = None, weight_decay: float = 0.01, lora_plus: float = 1.0
) -> list[dict[str, Any]]:
    """What trains in ``model`` as groups for an optimizer of Adam's kind: a rate for each method, decay where it helps.

    Methods are "lora", "bitfit", "prefix", "adapter" (whatever else this package adds) and "whole", a new head say.
    Biases, norms, layer-scales, gates and single tokens get no weight decay: what is a vector or a number and no
    layer's ``weight`` of two dimensions or more.

    Args:
        model: a model in which something trains.
        lr: one rate for all, or a mapping of methods to it; methods that it leaves out, and None (the default), take
            lora 2e-4, bitfit 1e-3, prefix 5e-4, adapter 5e-4, whole 2e-4.
        weight_decay: of matrices. Default 0.01, as torch.optim.AdamW's.
        lora_plus: LoRA+: how many times A's rate B's is; its authors recommend 16. Default 1.

    Returns:
        Groups: "params", "lr", "weight_decay", and "name", such as "lora b" or "whole, no decay".

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: nothing trains, a method is unknown, or a number is out of range.

    Source: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024.
    """
    check_module(_CALLER, model)
    rates = dict(RATES)
    given = lr if isinstance(lr, Mapping) else {} if lr is None else dict.fromkeys(RATES, lr)
    for method, rate in given.items():
        if method not in RATES:
            known = ", ".join(RATES)
            raise ValueError(f"{_CALLER}: lr must name methods of {known}, got {method!r}; {near(str(method), RATES)}")
        rates[method] = _number(f"lr of {method}" if isinstance(lr, Mapping) else "lr", rate)
    weight_decay = _number("weight_decay", weight_decay)
    lora_plus = _number("lora_plus", lora_plus)
    if lora_plus == 0:
        raise ValueError(f"{_CALLER}: lora_plus must be positive, got 0: B would never move, and A have no gradient")
    groups: dict[str, dict[str, Any]] = {}
    parameters = dict(model.named_parameters())
    for name, method in methods_of(model).items():
        parameter, title, rate, decay = parameters[name], method, rates[method], weight_decay
        if method == "lora":
            # By name: at rank 1 they have the shape of a vector.
            title = "lora b" if name.endswith("lora_b") else "lora"
            rate *= lora_plus if name.endswith("lora_b") else 1.0
        elif parameter.numel() == max(parameter.shape, default=1) and not _is_layers(name, parameter):
            title, decay = f"{method}, no decay", 0.0
        group = groups.setdefault(title, {"params": [], "lr": rate, "weight_decay": decay, "name": title})
        group["params"].append(parameter)
    if not groups:
        raise ValueError(
            f"{_CALLER}: model must have parameters that train, got a {type(model).__name__} without; call "
            "inject_lora, bitfit, PrefixTuning or add_adapters first"
        )
    return list(groups.values())


def _is_layers(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a layer's weight, which may have the shape of a vector: a head for one class, a width of 1."""
    return parameter.dim() > 1 and name.endswith("weight")


def _number(argument: str, value: float) -> float:
    checks.finite(_CALLER, argument, value)
    if value < 0:
        raise ValueError(f"{_CALLER}: {argument} must not be negative, got {value}")
    return float(value)
