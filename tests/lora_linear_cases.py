"""What the tests of ``lora_linear`` share: its backends and plans, its inputs, and its comparison with the oracle."""

from __future__ import annotations

import functools

import torch
from operator_cases import DEVICE, planned
from oracle import Tensors, assert_as_accurate_as_torch, exact, randn
from torch import Tensor

import pyfused
from pyfused import reference
from pyfused.ops.lora_linear import PLANS

every_plan = planned(PLANS)


def draw(
    shape: tuple[int, ...],
    n: int,
    r: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    adapters: torch.dtype | None = None,
    channel_dim: int = -1,
    mixed: int | None = None,
    device: torch.device | str = DEVICE,
) -> dict[str, Tensor | None]:
    """Tensors for x of ``shape``, sized so that the low-rank term weighs as much as the base; A and B of ``mixed``
    adapters of rank r, as ``adapter_index`` wants them."""
    k = shape[channel_dim]
    of_a, of_b = ((r, k), (n, r)) if mixed is None else ((mixed, r, k), (n, mixed, r))
    return {
        "x": randn(*shape, dtype=dtype, seed=1, device=device),
        "weight": (randn(n, k, seed=2) / k**0.5).to(dtype).to(device),
        "lora_a": (randn(*of_a, seed=3) / k**0.5).to(adapters or dtype).to(device),
        "lora_b": (randn(*of_b, seed=4) / r**0.5).to(adapters or dtype).to(device),
        "bias": randn(n, dtype=dtype, seed=5, device=device) if bias else None,
    }


def check(tensors: Tensors, backend: str, plan: str = "auto", *, scaling: float = -1.5, dy=None, **options):
    """Holds the operator to the oracle. Returns its output and gradients."""

    def scales(tensors: Tensors, cotangent: Tensor) -> dict[str, Tensor]:
        # Root of the sum of the squares of the terms: the size that a result has unless its terms cancel, as the few
        # terms of a tensor with width 1 may.
        squares = {name: None if value is None else value.double().square() for name, value in tensors.items()}
        sums = exact(
            reference.lora_linear, squares, torch.float64, cotangent.double() ** 2, scaling=scaling**2, **options
        )
        return {name: value.sqrt() for name, value in sums.items()}

    return assert_as_accurate_as_torch(
        functools.partial(pyfused.lora_linear, backend=backend, plan=plan),
        reference.lora_linear,
        tensors,
        tensors["x"].dtype,
        scales=scales,
        scaling=scaling,
        **({} if dy is None else {"dy": dy}),
        **options,
    )
