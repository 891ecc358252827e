"""Checkpoints of the fork of ml-fastvit with adapters, and what of them `add_adapters` puts into timm's FastViT.

The whole model's state dict, below "state_dict" or bare. With n the place in ``network``, s the stage, b the block:

    network.<n>.<b>.adapter1.0.{weight,bias}      (h, C, 1, 1)      ``stages.<s>.blocks.<b>.adapter.down_...``, in a
                                                                    block with two ``adapter_1``, and ``adapter_2``
    network.<n>.<b>.adapter1.2.{weight,bias}      (C, h, 1, 1)      ``....up_...``
    lora<s + 1>.lora_{A,B}.weight                 (R, C, 1, 1), (C, R, 1, 1)     ``stages.<s>.conv_lora.lora_{a,b}``

The adapters have GELU by erf and no skip. The file does not say in which order the blocks were trained: adapter before
layer-scale, "right", as pyfused computes it, or behind it, "broken"; nor the alpha of a ConvLoRA.

Source: RepMixerBlock_Adapter, AttentionBlock_Adapter, ConvLoRA, FastViT_adapter and FastViT_lora of the fork;
apple/ml-fastvit, models/fastvit.py; timm, ``checkpoint_filter_fn`` in timm/models/fastvit.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyfused import files
from pyfused.methods.tuned import Tuned

ORDERS = ("right", "broken")
_ADAPTER = re.compile(r"network\.(\d+)\.(\d+)\.adapter([12])\.([02])\.(weight|bias)")
_LORA = re.compile(r"lora([1-4])\.lora_([AB])\.weight")
_ADDED = re.compile(r"(^|\.)(adapter|lora|projector|deep_pompts)")
_OWN = {
    "kind": "BottleneckAdapter", "activation": "gelu", "skip": 0.0, "drop_path": 0.0, "channel_dim": 1, "dropout": 0.0,
}  # fmt: skip


def read(caller: str, source: Path, order: str | None) -> tuple[Tuned, list[str]]:
    """The adapters of a checkpoint of the fork's, and what is to be said of them.

    Args:
        caller: in whose name errors are raised. source: the file.
        order: "right" or "broken", which the file does not say; needed where it has adapters.

    Raises:
        ValueError: the file is damaged, or holds what has no form here, by name; or ``order`` is "broken" or missing.
    """
    state = _state(caller, source)
    starts = _starts(caller, state, source)
    tensors: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    for name, tensor in state.items():
        adapter, lora = _ADAPTER.fullmatch(name), _LORA.fullmatch(name)
        if adapter:
            net, block, which, layer, kind = adapter.groups()
            both = f"network.{net}.{block}.adapter2.0.weight" in state
            path = f"stages.{starts[int(net)]}.blocks.{block}.adapter{f'_{which}' if both else ''}"
            tensors[f"{path}.{'down' if layer == '0' else 'up'}_{kind}"] = (
                tensor.flatten(1) if tensor.dim() == 4 else tensor
            )
            modules[path] = dict(_OWN)
        elif lora:
            path = f"stages.{int(lora[1]) - 1}.conv_lora"
            tensors[f"{path}.lora_{lora[2].lower()}"] = tensor
            modules.setdefault(path, {"kind": "ConvLoRA"})
            if lora[2] == "A":
                modules[path] |= {"rank": tensor.shape[0], "kernel_size": tensor.shape[2]}
        elif _ADDED.search(name):
            if not name.startswith("projector."):
                raise ValueError(f"{caller}: {name!r} of {str(source)!r} has no form here")
            notes = ["left out: projector, the fork's head, which timm's FastViT has not; its weights are in the file"]
    if not tensors:
        raise ValueError(f"{caller}: {str(source)!r} must hold the fork's adapters, got none")
    if any(own["kind"] == "ConvLoRA" for own in modules.values()):
        notes.append("not in the fork's files, and as the model has it: alpha of ConvLoRA")
    if any(own["kind"] == "BottleneckAdapter" for own in modules.values()):
        if order != "right":
            raise ValueError(
                f"{caller}: order must be 'right', the adapter before the layer-scale, which pyfused's blocks compute, "
                f"got {order!r}: the file does not say by which it was trained; give --order"
            )
        notes.append("the base's weights are not in pyfused's file: give timm's model the same ones")
    return Tuned(tensors, modules, partial=True), notes


def write(caller: str, tuned: Tuned, target: Path, like: Path) -> list[str]:
    """The checkpoint ``like`` of the fork's with these adapters in place of its own; what is to be said of it.

    Raises:
        ValueError: what the fork has no form for, by name, or what ``like`` has no place for.
    """
    state = dict(_state(caller, like))
    net_of = {stage: net for net, stage in _starts(caller, state, like).items()}
    given: dict[str, Tensor] = {}
    for path, own in tuned.modules.items():
        adapter = re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.adapter(?:_([12]))?", path)
        lora = re.fullmatch(r"stages\.(\d+)\.conv_lora", path)
        for name, tensor in tuned.of_module(path).items():
            if adapter and own["kind"] == _OWN["kind"] and own == _OWN and name != "gamma":
                layer, kind = name.split("_")
                place = f"network.{net_of.get(int(adapter[1]))}.{adapter[2]}.adapter{adapter[3] or 1}"
                key = f"{place}.{'0' if layer == 'down' else '2'}.{kind}"
                given[key] = tensor[..., None, None] if kind == "weight" else tensor
            elif lora and own["kind"] == "ConvLoRA" and own.get("kernel_size") == 1:
                given[f"lora{int(lora[1]) + 1}.lora_{name[-1].upper()}.weight"] = tensor
            else:
                raise ValueError(f"{caller}: the fork has no form for {path}.{name}, of a {own}")
    if tuned.trained():
        raise ValueError(f"{caller}: the fork has no form for {min(tuned.trained())!r}, which trains whole")
    own_names = {name for name in state if _ADAPTER.fullmatch(name) or _LORA.fullmatch(name)}
    if own_names != given.keys() or any(state[name].shape != given[name].shape for name in given):
        differing = sorted(own_names ^ given.keys()) or sorted(n for n in given if state[n].shape != given[n].shape)
        raise ValueError(
            f"{caller}: {str(like)!r} must have places of the same shapes for the adapters, got {differing[:5]} in one "
            "of the two alone or of another shape"
        )
    with files.replacing_in(caller, target.parent, target.name) as (partial,):
        torch.save(state | {name: tensor.contiguous() for name, tensor in given.items()}, partial)
    return [f"the base's weights are those of {like}"]


def _state(caller: str, source: Path) -> Mapping[str, Tensor]:
    read = files.read_pickled(caller, source)
    state = read.get("state_dict", read) if isinstance(read, Mapping) else read
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{caller}: {str(source)!r} must hold a model's state dict, got something else")
    return state


def _blocks(state: Iterable[str]) -> set[str]:
    """ "network.<n>.<b>" of every block."""
    found = (re.match(r"network\.\d+\.\d+(?=\.)", name) for name in state)
    return {match[0] for match in found if match}


def _starts(caller: str, state: Mapping[str, Tensor], source: Path) -> dict[int, int]:
    """Place in ``network`` of each sequence of blocks -> its stage: their order, as the fork's own code counts them."""
    places = sorted({int(block.split(".")[1]) for block in _blocks(state)})
    if not places and any(name.startswith("network.") for name in state):
        raise ValueError(f"{caller}: {str(source)!r} must hold blocks named network.<n>.<b>, got none")
    return {place: stage for stage, place in enumerate(places)}
