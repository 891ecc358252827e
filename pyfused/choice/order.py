"""The order in which backend "auto" takes the backends for a call: measured, or else by what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from pyfused.choice import measured
from pyfused.choice.costs import costs

_CUDA, _TRITON = ("cuda", "triton", "portable"), ("triton", "cuda", "portable")
# Backends in their order, and a function that says why: traced code cannot make text of sizes.
Preference = tuple[tuple[str, ...], Callable[[], str]]


def preference(operator: str, device: torch.device, dtype: torch.dtype, sizes: Mapping[str, float]) -> Preference:
    """(backends in the order in which "auto" takes them for this call, function that says why in this order).

    A row measured on this GPU for such sizes decides; else the costs by arithmetic.

    Args:
        operator: whose kernels serve the call.
        device, dtype: of the tensors.
        sizes: M, and all else that the order depends on: N, K, R, dropout_p of "lora_linear"; C, h, dropout_p,
            cuda_rows of "adapter_residual"; C, J, dropout_p, norm_match, cuda_rows of "cross_attention_residual"; K, C,
            norm_match of "projection_residual". ``cuda_rows`` is `cuda_limits.cuda_rows`.
    """
    if device.type != "cuda":
        return _CUDA, lambda: "only by name: without a GPU kernels are interpreted or emulated"
    capability = torch.cuda.get_device_capability(device)
    if not measured.TABLE.rows:
        return _by_costs(operator, capability, sizes)
    gpu = torch.cuda.get_device_properties(device).name
    row = measured.TABLE.nearest(gpu, operator, str(dtype).removeprefix("torch."), sizes["M"], others(sizes))
    if row is None:
        return _by_costs(operator, capability, sizes)
    order = tuple(row.found)
    # Portable serves every call and is measured too. A backend without a measurement comes after it.
    return order + tuple(name for name in _TRITON if name not in order), lambda: _times(row)


def others(sizes: Mapping[str, float]) -> dict[str, object]:
    """By which of these sizes, besides M, a measured row is found."""
    return {name: value for name, value in sizes.items() if name != "M"}


def _times(row: measured.Row) -> str:
    return f"measured at M = {row.rows}: " + ", ".join(f"{name} {time:.1f} us" for name, time in row.found.items())


def _by_costs(operator: str, capability: tuple[int, int], sizes: Mapping[str, float]) -> Preference:
    cuda, triton, why = costs(operator, capability, sizes)
    return _CUDA if cuda <= triton else _TRITON, lambda: f"{why()} (not measured)"
