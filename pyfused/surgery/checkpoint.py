"""Checkpoints of what was added to a model: parameters by name, with the settings that give them their meaning.

A checkpoint is a dictionary of tensors and nothing else, so that any tool may carry it; the settings ride along as JSON
in a tensor of bytes. The files are another room's matter.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyfused.ops.contract import checks
from pyfused.surgery.paths import near
from pyfused.surgery.refusals import sharded

_VERSION = 1


# Components that torch.compile, checkpoint_wrapper and FullyShardedDataParallel put before a module's own.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def plain_name(name: str) -> str:
    """``name`` without the components of wrappers around a module."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def packed_settings(settings: Mapping[str, Mapping[str, Any]]) -> Tensor:
    """{path of a module: {setting: value}} as a tensor of bytes."""
    text = json.dumps({"version": _VERSION, "modules": settings}, sort_keys=True)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def packed(own: Mapping[str, Tensor], settings: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Tensor]:
    """A checkpoint: the tensors ``own`` by plain names, and under ``key`` their settings."""
    return {**{plain_name(name): tensor for name, tensor in own.items()}, key: packed_settings(settings)}


def read_settings(caller: str, key: str, packed: object) -> dict[str, dict[str, Any]]:
    try:
        if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
            raise ValueError("not a tensor of bytes")
        read = json.loads(bytes(packed.flatten().tolist()))
        if read["version"] != _VERSION:
            raise ValueError(f"version {read['version']!r}, this pyfused reads {_VERSION}")
        modules = read["modules"]
        if not isinstance(modules, dict) or not all(isinstance(value, dict) for value in modules.values()):
            raise ValueError("no modules in it")
        return modules
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{caller}: state[{key!r}] must be the settings that pyfused wrote, got {error}") from None


def check_settings(
    caller: str, what: str, own: Mapping[str, Mapping[str, Any]], given: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuse settings of ``what``, {path of a module: {setting: value}}, that are not the model's ``own``."""
    differing = []
    for path in own.keys() | given.keys():
        mine, theirs = own.get(path, {}), given.get(path, {})
        differing += [
            f"{path or 'the model'}: {setting} {theirs.get(setting)!r} in the {what}, {mine.get(setting)!r} in the "
            "model"
            for setting in sorted(mine.keys() | theirs.keys())
            if mine.get(setting) != theirs.get(setting)
        ]
    if differing:
        more = f", and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise ValueError(
            f"{caller}: {what} must have the model's settings, got {'; '.join(sorted(differing)[:4])}{more}"
        )


def check_names(caller: str, what: str, own: Collection[str], given: Collection[str]) -> None:
    """Refuse ``given`` names of ``what`` that are not the model's ``own``."""
    missing, unknown = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    if missing or unknown:
        hint = f"; of {unknown[0]}, {near(unknown[0], own)}" if unknown and own else ""
        raise ValueError(
            f"{caller}: {what} must have the model's {len(own)} parameters, got {len(missing)} missing {missing[:5]} "
            f"and {len(unknown)} unknown {unknown[:5]}{hint}"
        )


def check_shapes(caller: str, what: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Refuse tensors of ``what`` of another shape than the model's ``own``, and a model without values."""
    differing = [
        f"{name} expected {tuple(own[name].shape)}, got {tuple(value.shape)}"
        for name, value in given.items()
        if value.shape != own[name].shape
    ]
    if differing:
        raise ValueError(f"{caller}: {what} must have the model's shapes: {'; '.join(differing[:5])}")
    on_meta = [name for name, tensor in own.items() if tensor.is_meta]
    if on_meta:
        raise ValueError(f"{caller}: model must hold values, got {on_meta[0]} on device meta; call to_empty() first")


def load(
    caller: str,
    model: nn.Module,
    own: Mapping[str, Tensor],
    settings: Mapping[str, Mapping[str, Any]],
    key: str,
    state: Mapping[str, Tensor],
    settings_needed: bool,
) -> None:
    """Check ``state`` as a whole against the model's ``own`` tensors and their settings, then copy it into them.

    Raises:
        TypeError, ValueError: what is wrong with the state. The model is as it was.
    """
    checks.flag(caller, "check_settings", settings_needed)
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise TypeError(f"{caller}: state must be a mapping of names to tensors, got {type(state).__name__}")
    mine = {plain_name(name): tensor for name, tensor in own.items()}
    given = {plain_name(name): value for name, value in state.items()}
    packed = given.pop(key, None)
    check_names(caller, "state", mine.keys(), given.keys())
    for name, value in given.items():
        checks.tensor(caller, f"state[{name!r}]", value)
        checks.dtype(caller, f"state[{name!r}]", value, checks.FLOATING)
        if value.is_meta:
            raise ValueError(f"{caller}: state[{name!r}] must hold values, got a tensor on device meta")
    check_shapes(caller, "state", mine, given)
    shard = sharded(model)
    if shard is not None:
        raise ValueError(
            f"{caller}: model must not be sharded, got {shard}; load before sharding, or give "
            "torch.distributed.checkpoint.state_dict.set_model_state_dict whole tensors (full_state_dict=True)"
        )
    if packed is not None:
        check_settings(caller, "state", settings, read_settings(caller, key, packed))
    elif settings_needed:
        raise ValueError(
            f"{caller}: state must hold the settings of its modules as {key!r}, got none: whether its numbers mean "
            "here what they meant there is not known; check_settings=False takes them as they are"
        )
    with torch.no_grad():
        for name, value in given.items():
            mine[name].copy_(value)
