"""AdapterHub's files of a bottleneck adapter, and what of them is a `BottleneckAdapter`.

Names stay up to the adapter's own, which is the path of the module here, "...output.adapters.<name>":

    adapter_down.0.weight (h, C), adapter_down.0.bias      ``down_weight``, ``down_bias``
    adapter_up.weight (C, h), adapter_up.bias              ``up_weight``, ``up_bias``
    scaling (1,) or (C,), where it is learned              ``gamma``; a number of the configuration other than 1 too

Where the adapters stand in the host, and what the host's layer norms do around them, is the host's here: a folder of
AdapterHub's is written by the configuration of another one.

Source: adapter-hub/adapters 1.3, src/adapters/loading.py, configuration/adapter_config.py, methods/modeling.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyfused import files
from pyfused.methods.tuned import Tuned

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
_HEADS = ("model_head.safetensors", "pytorch_model_head.bin")
# transformers' names, as AdapterHub takes them.
_ACTIVATIONS = {
    "relu": "relu", "leakyrelu": "leaky_relu", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "swish": "silu", "silu": "silu", "linear": "identity",
}  # fmt: skip
_NAMES = {
    "adapter_down.0.weight": "down_weight", "adapter_down.0.bias": "down_bias", "adapter_up.weight": "up_weight",
    "adapter_up.bias": "up_bias", "scaling": "gamma",
}  # fmt: skip
# What has no form here where it is on.
_NOT_HERE = ("dropout", "inv_adapter", "ln_after", "ln_before", "phm_layer", "use_gating")
_KIND = "BottleneckAdapter"


def read(caller: str, source: Path) -> tuple[Tuned, list[str]]:
    """The adapter of a folder of AdapterHub's, and what is to be said of it.

    Raises:
        ValueError: the folder lacks a file, one is damaged, or it holds what has no form here, by name.
    """
    name, config = _config(caller, source)
    path = files.folder_with(caller, source, WEIGHTS, PICKLED)
    state = files.read_tensors(caller, path)[0] if path.name == WEIGHTS else files.read_pickled(caller, path)
    if not isinstance(state, Mapping):
        raise ValueError(f"{caller}: {str(path)!r} must hold tensors by name, got {type(state).__name__}")
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        found = re.fullmatch(rf"(.*\badapters\.{re.escape(name)})\.(.+)", key)
        if not found or found[2] not in _NAMES or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{caller}: {key!r} of {str(path)!r} has no form here: names must be "
                f"'...adapters.{name}.' and one of {', '.join(_NAMES)}"
            )
        tensors[f"{found[1]}.{_NAMES[found[2]]}"] = tensor
    paths = sorted({key.rpartition(".")[0] for key in tensors})
    if not paths:
        raise ValueError(f"{caller}: {str(path)!r} must hold an adapter, got no tensors")
    scaling = config["scaling"]
    for place in paths:
        learned = f"{place}.gamma" in tensors
        if learned != isinstance(scaling, str):
            raise ValueError(
                f"{caller}: {place!r} must have a tensor of its scaling where {CONFIG} has no number, got "
                f"{'one' if learned else 'none'} beside {scaling!r}"
            )
        if not learned and scaling != 1.0:
            tensors[f"{place}.gamma"] = torch.tensor([float(scaling)])
        lacking = {"down_weight", "down_bias", "up_weight", "up_bias"} - {
            key.rpartition(".")[2] for key in tensors if key.rpartition(".")[0] == place
        }
        if lacking:
            raise ValueError(f"{caller}: {str(path)!r} must hold the whole adapter {place!r}, got no {sorted(lacking)}")
    heads = [head for head in _HEADS if (source / head).exists()]
    notes = [f"left out: the prediction head beside the adapter, {heads[0]}"] if heads else []
    return Tuned(tensors, {place: _settings(caller, config) for place in paths}), notes


def write(caller: str, tuned: Tuned, target: Path, like: Path) -> list[str]:
    """A folder of AdapterHub's with the configuration of the folder ``like``; what is to be said of it.

    Raises:
        ValueError: what AdapterHub has no form for, by name, or what contradicts that configuration.
    """
    name, config = _config(caller, like)
    expected = _settings(caller, config)
    back = {here: theirs for theirs, here in _NAMES.items()}
    state: dict[str, Tensor] = {}
    for path, own in tuned.modules.items():
        if own["kind"] != _KIND:
            raise ValueError(f"{caller}: AdapterHub has no form for {path!r}, a {own['kind']}")
        if own != expected:
            differing = [f"{key} {own.get(key)!r}, there {expected[key]!r}" for key in expected
                         if own.get(key) != expected[key]]  # fmt: skip
            raise ValueError(f"{caller}: {path!r} must have the settings of {str(like)!r}, got {'; '.join(differing)}")
        if not re.search(rf"\badapters\.{re.escape(name)}$", path):
            raise ValueError(f"{caller}: paths must end in 'adapters.{name}', the name in {str(like)!r}, got {path!r}")
        parts = tuned.of_module(path)
        gamma, scaling = parts.pop("gamma", None), config["scaling"]
        if isinstance(scaling, str):
            if gamma is None or (scaling == "learned" and gamma.numel() != 1):
                raise ValueError(f"{caller}: {path!r} must have a gamma for the scaling {scaling!r} of {str(like)!r}")
            parts["gamma"] = gamma
        elif not bool((torch.ones(1) if gamma is None else gamma).eq(scaling).all()):
            raise ValueError(
                f"{caller}: gamma of {path!r} must be the scaling {scaling!r} of {str(like)!r}, got "
                f"{'none' if gamma is None else gamma.tolist()[:3]}"
            )
        lacking = {"down_weight", "down_bias", "up_weight", "up_bias"} - parts.keys()
        if lacking:
            raise ValueError(f"{caller}: AdapterHub has no form for {path!r} without {sorted(lacking)}")
        state |= {f"{path}.{back[key]}": tensor for key, tensor in parts.items()}
    if tuned.trained():
        raise ValueError(f"{caller}: AdapterHub's adapter has no form for {min(tuned.trained())!r}, which trains whole")
    whole = files.read_json(caller, files.folder_with(caller, like, CONFIG))
    with files.replacing_in(caller, target, CONFIG, WEIGHTS) as (settings, weights):
        files.write_tensors(caller, weights, state, {"format": "pt"})
        settings.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [f"configuration as in {like}: where the adapters stand in the host is not in pyfused's file"]


def _config(caller: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """The adapter's name, and its own configuration, checked."""
    whole = files.read_json(caller, files.folder_with(caller, folder, CONFIG))
    name, config = whole.get("name"), whole.get("config")
    if not isinstance(name, str) or not isinstance(config, dict):
        raise ValueError(f"{caller}: {CONFIG} must hold AdapterHub's name and config, got {sorted(whole)[:8]}")
    if config.get("architecture") is not None:
        raise ValueError(f"{caller}: {CONFIG} must be of a bottleneck adapter, got one of {config['architecture']!r}")
    for key in _NOT_HERE:
        if config.get(key):
            raise ValueError(f"{caller}: {key} of {CONFIG} has no form here, got {config[key]!r}")
    config = {"scaling": 1.0, "stochastic_depth": 0.0, "is_parallel": False} | config
    scaling = config["scaling"]
    if scaling not in ("learned", "channel") and not isinstance(scaling, int | float):
        raise ValueError(f"{caller}: scaling of {CONFIG} must be a number, 'learned' or 'channel', got {scaling!r}")
    if config["is_parallel"] and config["stochastic_depth"]:
        raise ValueError(f"{caller}: stochastic_depth of {CONFIG} must be 0 in a parallel adapter, which ignores it")
    if "version" not in whole:
        raise ValueError(
            f"{caller}: {CONFIG} must say the version of its library, got none: names of activations meant others then"
        )
    return name, config


def _settings(caller: str, config: Mapping[str, Any]) -> dict[str, Any]:
    given = config.get("non_linearity")
    activation = _ACTIVATIONS.get(str(given).lower())
    if activation is None:
        raise ValueError(f"{caller}: non_linearity of {CONFIG} must be one of {', '.join(_ACTIVATIONS)}, got {given!r}")
    return {
        "kind": _KIND, "activation": activation, "skip": 0.0, "drop_path": float(config["stochastic_depth"]),
        "channel_dim": -1, "dropout": 0.0,
    }  # fmt: skip
