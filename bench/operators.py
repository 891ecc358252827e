"""Every operator that is measured and checked: a new one is a file like these and an entry here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from pyfused.bench import adapter_residual, cross_attention_residual, lora_linear, projection_residual
from pyfused.bench.cases import Case

OPERATORS = {
    "lora_linear": lora_linear,
    "adapter_residual": adapter_residual,
    "cross_attention_residual": cross_attention_residual,
    "projection_residual": projection_residual,
}


def timed_cases(device: torch.device) -> list[Case]:
    return [case for module in OPERATORS.values() for case in module.timed_cases(device)]


def parity_cases(device: torch.device) -> Iterator[Case]:
    for module in OPERATORS.values():
        yield from module.parity_cases(device)


def tiny_cases(device: torch.device) -> list[Case]:
    """One case of each operator whose time is that of its call."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return [dataclasses.replace(module.TINY, dtype=dtype) for module in OPERATORS.values()]
