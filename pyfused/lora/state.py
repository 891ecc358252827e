"""LoRA's checkpoints: the parameters of a model's LoRA modules, and their settings."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from pyfused.lora.base import LoRAModule
from pyfused.surgery import checkpoint
from pyfused.surgery.paths import near
from pyfused.surgery.refusals import check_module

# The entry of a checkpoint that holds the settings.
SETTINGS = "lora_settings"
# How PEFT ends the names of its parameters, in files and in models.
_PEFTS = re.compile(r"\.lora_(embedding_)?[AB](\.|$)")


def lora_state_dict(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """The LoRA parameters of ``model`` by their full names, and their settings: what an adapter checkpoint holds.

    The tensors are detached and share memory with the model. "lora_settings" is JSON in a tensor of bytes: each
    module's rank, alpha, use_rslora, dropout and qkv. Whatever else trains (``train`` of `inject_lora`) is not there.
    Names are those of the model without `torch.compile` around it.

    Of several adapters ``adapter`` names one; None, the default, is the only one. Its parameters are called ``lora_a``
    and ``lora_b`` as in a model that has no other, so that the checkpoint loads there, and under any other name.

    Raises:
        TypeError: ``model`` is not an nn.Module.
        ValueError: ``model`` has no LoRA, or no such adapter, or several and none is named.
        RuntimeError: a LoRA parameter is computed (parametrized, pruned).
    """
    return checkpoint.packed(*_own_state("lora_state_dict", model, adapter), SETTINGS)


def load_lora_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], check_settings: bool = True, adapter: str | None = None
) -> None:
    """Copy an adapter checkpoint, as `lora_state_dict` gives it, into a model with the same LoRA modules.

    All or nothing: when this raises, the model is as it was.

    Args:
        model: a model with LoRA in the places that the checkpoint names, compiled by `torch.compile` or not.
        state: the checkpoint.
        check_settings: whether the settings of the checkpoint must be there. Where they are there they must be the
            model's in either case. Default True.
        adapter: which of the model's adapters takes it. Default None: the only one.

    Raises:
        TypeError: an argument has the wrong type, or a tensor is not a dense floating one.
        ValueError: names are missing or unknown, or PEFT's, shapes or settings differ, settings are missing, ``model``
            is sharded or on device meta, or has no such adapter, or several and none is named.
    """
    caller = "load_lora_state_dict"
    if isinstance(state, Mapping) and any(isinstance(name, str) and _PEFTS.search(name) for name in state):
        raise ValueError(
            f"{caller}: state must be what lora_state_dict gave, got PEFT's names; load_lora(model, folder) reads "
            "PEFT's folder, and `pyfused convert SRC DST --from peft --to pyfused` converts it"
        )
    own, settings = _own_state(caller, model, adapter)
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


def adapters_of(modules: Iterable[LoRAModule]) -> list[str]:
    """The names of all adapters, each once."""
    return list(dict.fromkeys(name for module in modules for name in module.adapters))


def known_adapter(caller: str, argument: str, name: object, known: list[str]) -> str:
    """``name``, which must be one of ``known``."""
    if not isinstance(name, str):
        raise TypeError(f"{caller}: {argument} must be the name of an adapter, got {type(name).__name__}")
    if name not in known:
        raise ValueError(f"{caller}: {argument} must name adapters of the model, got {name!r}; {near(name, known)}")
    return name


def _own_state(
    caller: str, model: nn.Module, adapter: str | None
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """An adapter's parameters by name, and its settings in each LoRA module by plain path."""
    modules = lora_modules(caller, model)
    known = adapters_of(module for _, module in modules)
    if adapter is None and len(known) > 1:
        raise ValueError(f"{caller}: adapter must name one of the model's adapters, {', '.join(known)}, got None")
    one = known[0] if adapter is None else known_adapter(caller, "adapter", adapter, known)
    state: dict[str, Tensor] = {}
    settings: dict[str, dict[str, Any]] = {}
    for path, module in modules:
        module.refuse_computed(f"{caller} of {path or 'the model'}")
        # An attention whose out_proj alone carries it says so in its settings.
        if any(one in part.adapters for part in module._parts()):
            prefix = f"{path}." if path else ""
            state |= {f"{prefix}{name}": parameter.detach() for name, parameter in module.plain_pairs(one).items()}
            settings[checkpoint.plain_name(path)] = module.lora_settings(one)
    return state, settings
