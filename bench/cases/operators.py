"""Every operator that is measured and checked: a new one is a file beside this one and an entry here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from pyfused.bench.cases import adapter_residual, cross_attention_residual, lora_linear, projection_residual
from pyfused.bench.cases.case import Case

OPERATORS = {
    "lora_linear": lora_linear,
    "adapter_residual": adapter_residual,
    "cross_attention_residual": cross_attention_residual,
    "projection_residual": projection_residual,
}


# Operator -> how many of its first cases are timed against torch.compile on a GPU: the adapter's at its token rows,
# where there is a number to reach, and one of each other operator.
COMPILED = dict.fromkeys(OPERATORS, 1) | {"adapter_residual": len(adapter_residual.GPU_ROWS)}


def timed_cases(device: torch.device) -> list[Case]:
    """Operator by operator; on a GPU those that drop something come after all others, for a run that is cut short."""
    found = [case for module in OPERATORS.values() for case in module.timed_cases(device)]
    return found if device.type == "cpu" else sorted(found, key=_drops)


def _drops(case: Case) -> bool:
    return bool(case.dropout_p or case.facts().get("drop_path"))


def compiled_cases(device: torch.device) -> list[Case]:
    """What is timed against torch.compile in rows of its own, on a GPU alone: there a compilation takes longer than all
    else of a case, and comes after what needs none. On a CPU the operators' own rows hold it."""
    if device.type == "cpu":
        return []
    narrow = [
        [case for case in module.timed_cases(device) if case.adapter_dtype is None] for module in OPERATORS.values()
    ]
    return [case for cases, count in zip(narrow, COMPILED.values(), strict=True) for case in cases[:count]]


def parity_cases(device: torch.device) -> Iterator[Case]:
    for module in OPERATORS.values():
        yield from module.parity_cases(device)


def tiny_cases(device: torch.device) -> list[Case]:
    """One case of each operator whose time is that of its call."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return [dataclasses.replace(module.TINY, dtype=dtype) for module in OPERATORS.values()]
