"""Every operator that is measured and checked: a new one is a file like these and an entry here."""

from __future__ import annotations

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
