"""LoRA's checkpoints: the parameters of a model's LoRA modules, and their settings."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pyfused.lora.base import LoRAModule
from pyfused.surgery import checkpoint
from pyfused.surgery.refusals import check_module

# The entry of a checkpoint that holds the settings.
SETTINGS = "lora_settings"
# How PEFT ends the names of its parameters, in files and in models.
_PEFTS = re.compile(r"\.lora_(embedding_)?[AB](\.|$)")


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The LoRA parameters of ``model`` by their full names, and their settings: what an adapter checkpoint holds.

    The tensors are detached and share memory with the model. "lora_settings" is JSON in a tensor of bytes: each
    module's rank, alpha, use_rslora, dropout and qkv. Whatever else trains (``train`` of `inject_lora`) is not there.
    Names are those of the model without `torch.compile` around it.

    Raises:
        TypeError: ``model`` is not an nn.Module.
        ValueError: ``model`` has no LoRA.
        RuntimeError: a LoRA parameter is computed (parametrized, pruned).
    """
    return checkpoint.packed(*_own_state("lora_state_dict", model), SETTINGS)


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor], check_settings: bool = True) -> None:
    """Copy an adapter checkpoint, as `lora_state_dict` gives it, into a model with the same LoRA modules.

    All or nothing: when this raises, the model is as it was.

    Args:
        model: a model with LoRA in the places that the checkpoint names, compiled by `torch.compile` or not.
        state: the checkpoint.
        check_settings: whether the settings of the checkpoint must be there. Where they are there they must be the
            model's in either case. Default True.

    Raises:
        TypeError: an argument has the wrong type, or a tensor is not a dense floating one.
        ValueError: names are missing or unknown, or PEFT's, shapes or settings differ, settings are missing, or
            ``model`` is sharded or on device meta.
    """
    caller = "load_lora_state_dict"
    if isinstance(state, Mapping) and any(isinstance(name, str) and _PEFTS.search(name) for name in state):
        raise ValueError(
            f"{caller}: state must be what lora_state_dict gave, got PEFT's names; load_lora(model, folder) reads "
            "PEFT's folder, and `pyfused convert SRC DST --from peft --to pyfused` converts it"
        )
    own, settings = _own_state(caller, model)
    with contextlib.ExitStack() as stack:
        for _, module in lora_modules(caller, model):
            # What is merged is merged anew.
            stack.enter_context(module.held(merged=False))
        checkpoint.load(caller, model, own, settings, SETTINGS, state, check_settings)


def lora_modules(caller: str, model: nn.Module) -> list[tuple[str, LoRAModule]]:
    check_module(caller, model)
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, LoRAModule)]
    if not found:
        raise ValueError(
            f"{caller}: model must contain LoRA modules, got a {type(model).__name__} with none; call inject_lora first"
        )
    return found


def _own_state(caller: str, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The model's LoRA parameters by name, and the settings of each LoRA module by plain path."""
    state: dict[str, Tensor] = {}
    settings: dict[str, dict[str, Any]] = {}
    for path, module in lora_modules(caller, model):
        module.refuse_computed(f"{caller} of {path or 'the model'}")
        prefix = f"{path}." if path else ""
        state |= {f"{prefix}{name}": parameter.detach() for name, parameter in module.own_lora_parameters().items()}
        settings[checkpoint.plain_name(path)] = module.lora_settings()
    return state, settings
