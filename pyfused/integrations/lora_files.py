"""``save_lora`` and ``load_lora``: a model's LoRA in a folder that PEFT reads, and from one that PEFT wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pyfused import files
from pyfused.integrations.peft_format import CONFIG, PICKLED, WEIGHTS, from_peft, to_peft
from pyfused.lora.state import adapters_of, known_adapter, lora_modules
from pyfused.lora.targets import kind_of
from pyfused.methods.files import write_whole
from pyfused.methods.tuned import collect, put
from pyfused.surgery.refusals import check_module


def save_lora(model: nn.Module, folder: str | os.PathLike[str], adapter: str | None = None) -> None:
    """Write the LoRA of ``model`` into ``folder`` as PEFT does: "adapter_model.safetensors", "adapter_config.json".

    ``PeftModel.from_pretrained(base, folder)`` then gives the same outputs on the plain base model. What of the model
    itself trains, by ``train`` of `inject_lora` say, goes along, with its buffers, as PEFT's ``modules_to_save``. PEFT
    adds out_proj's term of an nn.MultiheadAttention twice, so half of its B is written.

    Files that were there are replaced whole, or stay where this raises. Tensors are written whole where FSDP2 or
    another user of DTensor has sharded them: then every process calls this, and the first writes.

    Args:
        model: a model with LoRA, on any device, compiled by `torch.compile` or not.
        folder: where to write; made where it is not there.
        adapter: which of several adapters, by its name. Default None: the only one.

    Raises:
        ImportError: the package safetensors is not installed.
        TypeError: an argument has the wrong type.
        ValueError: ``model`` has no LoRA, or no such adapter, or several and none is named, or something tuned that
            PEFT's files have no form for, by name: q, k and v apart, one projection of an attention alone, open_clip's
            own attention, convolutions with groups or dilation, single parameters, adapters, virtual tokens
            (`pyfused.save_tuned` keeps all of these); ``model`` is in DistributedDataParallel or
            FullyShardedDataParallel; or ``folder`` is a file.
        RuntimeError: a LoRA parameter is computed (parametrized, pruned), or the first process could not write.
        OSError: the disk is full, or the folder may not be written to.

    Source: huggingface/peft, ``PeftModel.save_pretrained``, 0.21.
    """
    caller = "save_lora"
    place = files.as_path(caller, "folder", folder)
    modules = [module for _, module in lora_modules(caller, model)]
    if adapter is not None:
        known_adapter(caller, "adapter", adapter, adapters_of(modules))
    adapted = [module for module in modules if adapter is None or adapter in module.adapters]
    tuned = collect(caller, model, trains=True, adapter=adapter)
    linear = {kind_of(module) for module in adapted} & {"linear", "conv1d"}
    config, state = to_peft(tuned, conv1d=linear == {"conv1d"}, caller=caller)
    everywhere = [path for path, _ in model.named_modules(remove_duplicate=False)]
    for root in tuned.trained_modules:
        besides = [path for path in everywhere if path.endswith(root) and path not in tuned.trained_modules]
        if besides:
            raise ValueError(
                f"{caller}: PEFT has no form for {root!r}, which trains whole, alone: it goes by the end of names and "
                f"would take {besides[0]!r} too; save_tuned keeps it"
            )
    write_whole(caller, model, state, lambda tensors: write(caller, place, config, tensors))


def load_lora(model: nn.Module, folder: str | os.PathLike[str], adapter: str | None = None) -> None:
    """Put a LoRA that `save_lora` wrote, or PEFT, into ``model``.

    All or nothing: when this raises, the model is as it was. A model that has no LoRA yet gets it by the file's
    settings, as `inject_lora` does, and the rest of it is frozen, but for PEFT's ``modules_to_save``, which train. A
    model that has LoRA must have it in the file's places, with its settings. PEFT adds out_proj's term of an
    nn.MultiheadAttention twice, so twice its B is loaded: the outputs are equal.

    Args:
        model: the base model, or a model with LoRA, on any device.
        folder: with "adapter_config.json", and "adapter_model.safetensors" or "adapter_model.bin".
        adapter: the name that it gets in a model with several adapters; it is added beside the others where the model
            has none of that name. Default None: the model's only one.

    Raises:
        ImportError: the package safetensors is not installed.
        TypeError: an argument has the wrong type, or a tensor has the wrong dtype.
        ValueError: ``folder`` is a file, or lacks a file, or one is damaged; names, shapes or settings differ (near
            names are listed); the file has what has no form here, by name: DoRA, biases, embeddings, convolutions with
            groups, ...; or ``model`` cannot carry LoRA there (see `inject_lora`).

    Source: huggingface/peft, ``PeftModel.from_pretrained``, 0.21.
    """
    caller = "load_lora"
    check_module(caller, model)
    put(caller, model, from_peft(*read(caller, folder), caller), adapter)


def write(caller: str, folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """PEFT's two files."""
    with files.replacing_in(caller, folder, CONFIG, WEIGHTS) as (settings, weights):
        files.write_tensors(caller, weights, state, {"format": "pt"})
        settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read(caller: str, folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's configuration and tensors.

    Raises:
        ValueError: ``folder`` lacks a file, or one is damaged.
    """
    config = files.read_json(caller, files.folder_with(caller, folder, CONFIG))
    path = files.folder_with(caller, folder, WEIGHTS, PICKLED)
    state = files.read_tensors(caller, path)[0] if path.name == WEIGHTS else files.read_pickled(caller, path)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{caller}: {str(path)!r} must hold tensors by name, got something else")
    return config, state
