"""AA-CLIP's checkpoints, and what of them is an `AdaptedCLIP`'s.

A file of torch.save, a dictionary with state dicts of one stage or of both, "epoch" and optimizers beside them:

    text_adapter       <i>.fc.0.weight                  ``text_adapters.<i>.adapter_weight``, and the last one
                                                        ``text_projection.weight``
    image_adapter      layer_adapters.<i>.fc.0.weight   ``image_adapters.<i>.adapter_weight``
                       seg_proj.<i>.fc.weight           ``projections.<i>.weight``; fc.0.weight with a LeakyReLU
                       det_proj.fc.weight               ``detection_projection.weight``, the same
    text_cross_attn    {q,k,v,out}_proj.{weight,bias}   ``text_cross_attention.{q,k,v,out}_{weight,bias}``
    image_cross_attn   the same                         ``image_cross_attention....``

It says nothing of weights of blending, feature levels, heads and dropout.

Source: the published code of AA-CLIP (Ma et al., 2025), model/adapter.py and train.py, and of AA-CLIP with
cross-attention, model/adapter_cross_attention.py and train_cross_attention.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyfused import files
from pyfused.methods.tuned import Tuned

_OTHERS = ("epoch", "loop", "text_optimizer", "image_optimizer")
_CROSS = {"text_cross_attn": "text_cross_attention", "image_cross_attn": "image_cross_attention"}
_BLEND, _PROJ = "AdapterBlend", "SimpleProj"
UNSTATED = (
    "not in AA-CLIP's files, and as the model has them: weights of blending and of cross-attention, feature levels, "
    "heads, dropout"
)


def read(caller: str, source: Path) -> Tuned:
    """What a checkpoint of AA-CLIP holds.

    Raises:
        ValueError: it is damaged, or holds what has no form here, by name.
    """
    parts = files.read_pickled(caller, source)
    if not isinstance(parts, Mapping):
        raise ValueError(f"{caller}: {str(source)!r} must hold a dictionary, got {type(parts).__name__}")
    tensors: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Any]] = {}
    for part, state in parts.items():
        if part in _OTHERS:
            continue
        if part not in ("text_adapter", "image_adapter", *_CROSS) or not isinstance(state, Mapping):
            raise ValueError(f"{caller}: {part!r} of {str(source)!r} has no form here")
        last = max((int(name.partition(".")[0]) for name in state if name[:1].isdecimal()), default=-1)
        for name, tensor in state.items():
            here = _here(part, name, last)
            if here is None or not isinstance(tensor, Tensor):
                raise ValueError(f"{caller}: {name!r} in {part!r} of {str(source)!r} has no form here")
            path, parameter, own = here
            tensors[f"{path}.{parameter}"], modules[path] = tensor, own
    if not tensors:
        raise ValueError(
            f"{caller}: {str(source)!r} must hold an adapter of AA-CLIP, got {sorted(map(str, parts))[:8]}"
        )
    return Tuned(tensors, modules, partial=True)


def _here(part: str, name: str, last: int) -> tuple[str, str, dict[str, Any]] | None:
    """Path of the module, its parameter, and what is said of its settings; None for what is not AA-CLIP's."""
    if part in _CROSS:
        found = re.fullmatch(r"([qkv]|out)_proj\.(weight|bias)", name)
        kind = "TextCrossAttention" if part == "text_cross_attn" else "ImageCrossAttention"
        return (_CROSS[part], f"{found[1]}_{found[2]}", {"kind": kind}) if found else None
    if part == "text_adapter":
        found = re.fullmatch(r"(\d+)\.fc\.0\.weight", name)
        if found and int(found[1]) == last:
            return "text_projection", "weight", {"kind": _PROJ, "relu": True}
        return (f"text_adapters.{found[1]}", "adapter_weight", {"kind": _BLEND}) if found else None
    found = re.fullmatch(r"layer_adapters\.(\d+)\.fc\.0\.weight", name)
    if found:
        return f"image_adapters.{found[1]}", "adapter_weight", {"kind": _BLEND}
    found = re.fullmatch(r"(seg_proj\.(\d+)|det_proj)\.fc(\.0)?\.weight", name)
    if not found:
        return None
    path = f"projections.{found[2]}" if found[2] else "detection_projection"
    return path, "weight", {"kind": _PROJ, "relu": found[3] is not None}


def write(caller: str, tuned: Tuned, target: Path) -> list[str]:
    """A checkpoint of AA-CLIP's without optimizers; what is to be said of it.

    Raises:
        ValueError: what AA-CLIP has no form for, by name.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    adapters = {path for path in tuned.modules if path.startswith("text_adapters.")}
    for path, own in tuned.modules.items():
        if own["kind"] == "AdaptedCLIP":
            continue
        for name, tensor in tuned.of_module(path).items():
            there = _there(path, name, own, len(adapters))
            if there is None:
                raise ValueError(f"{caller}: AA-CLIP has no form for {path}.{name}, of a {own['kind']}")
            parts.setdefault(there[0], {})[there[1]] = tensor.contiguous()
    if tuned.trained():
        raise ValueError(f"{caller}: AA-CLIP has no form for {min(tuned.trained())!r}, which trains whole")
    with files.replacing_in(caller, target.parent, target.name) as (partial,):
        torch.save(parts, partial)
    return [UNSTATED]


def _there(path: str, name: str, own: Mapping[str, Any], adapters: int) -> tuple[str, str] | None:
    """The state dict of AA-CLIP's, and the name in it."""
    stem, _, number = path.partition(".")
    for part, here in _CROSS.items():
        if path == here:
            found = re.fullmatch(r"(q|k|v|out)_(weight|bias)", name)
            return (part, f"{found[1]}_proj.{found[2]}") if found else None
    layer = "fc.0.weight" if own.get("relu") else "fc.weight"
    return {
        "text_adapters": ("text_adapter", f"{number}.fc.0.weight"),
        "image_adapters": ("image_adapter", f"layer_adapters.{number}.fc.0.weight"),
        "projections": ("image_adapter", f"seg_proj.{number}.{layer}"),
        "detection_projection": ("image_adapter", f"det_proj.{layer}"),
        "text_projection": ("text_adapter", f"{adapters}.fc.0.weight") if own.get("relu") else None,
    }.get(stem)  # fmt: skip
