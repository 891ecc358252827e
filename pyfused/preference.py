"""The order in which backend "auto" takes the backends for a call: measured, or else by arithmetic.

The arithmetic: where both multiply with the same instruction, what counts is how many bytes the kernels read and write
through the second-level cache for one row of the operator's tall matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from pyfused import measured

_CUDA, _TRITON = ("cuda", "triton", "portable"), ("triton", "cuda", "portable")
# Backends in their order, and what says why: code that is traced makes no text of sizes.
Preference = tuple[tuple[str, ...], Callable[[], str]]

# Operators whose tiles of rows keep a narrow middle on chip -> what the middle's width is called in their sizes.
_NARROW = {"adapter_residual": "h", "cross_attention_residual": "J"}


def preference(operator: str, device: torch.device, dtype: torch.dtype, sizes: Mapping[str, float]) -> Preference:
    """(backends in the order in which "auto" takes them for this call, function that says why in this order).

    Args:
        operator: whose kernels serve the call.
        device, dtype: of the tensors.
        sizes: M, and all else that the order depends on: N, K, R, dropout_p of "lora_linear"; C, h, dropout_p,
            cuda_rows of "adapter_residual"; C, J, dropout_p, norm_match, cuda_rows of "cross_attention_residual"; K, C,
            norm_match of "projection_residual". ``cuda_rows`` is `bottleneck.cuda_rows`.
    """
    if device.type != "cuda":
        return _CUDA, lambda: "only by name: without a GPU kernels are interpreted or emulated"
    if measured.TABLE.rows:
        found = _measured(operator, device, dtype, sizes)
        if found is not None:
            return found
    order, why = _by_arithmetic(operator, torch.cuda.get_device_capability(device), sizes)
    return order, lambda: f"{why()} (not measured yet)"


def others(sizes: Mapping[str, float]) -> dict[str, object]:
    """By which of these sizes, besides M, a measured row is found: ``cuda_rows`` follows from the GPU."""
    return {name: value for name, value in sizes.items() if name not in ("M", "cuda_rows")}


def _measured(operator, device, dtype, sizes) -> Preference | None:
    gpu = torch.cuda.get_device_properties(device).name
    row = measured.TABLE.nearest(gpu, operator, str(dtype).removeprefix("torch."), sizes["M"], others(sizes))
    if row is None:
        return None
    order = tuple(row.found)
    # Portable, which serves every call, is measured too: whoever was not there to be measured comes after it.
    return order + tuple(name for name in _TRITON if name not in order), lambda: _times(row)


def _times(row: measured.Row) -> str:
    return f"measured at M = {row.rows}: " + ", ".join(f"{name} {time:.1f} us" for name, time in row.found.items())


def _by_arithmetic(operator, capability, sizes) -> Preference:
    if operator == "projection_residual":
        return _TRITON, lambda: "no other backend has kernels for it"
    if operator == "lora_linear":
        return _lora_linear(capability, sizes)
    return _bottleneck(capability, sizes["C"], sizes[_NARROW[operator]], sizes["cuda_rows"])


def _lora_linear(capability: tuple[int, int], sizes: Mapping[str, float]) -> Preference:
    if capability >= (9, 0):
        return _TRITON, lambda: "triton's products use wgmma or what followed it, cuda's do not"
    if sizes["dropout_p"]:
        return _TRITON, lambda: "triton draws dropout's mask once, cuda once per column of tiles"
    # The CUDA C++ kernels make P anew for each column of tiles, of 256 columns up to rank 16 and of 128 beyond.
    rank = 16 * -(-sizes["R"] // 16)
    limit = 184 * (256 if rank == 16 else 128) // rank
    if sizes["N"] >= limit:
        return _TRITON, lambda: f"N = {sizes['N']} >= {limit}: another pass over x costs less than P anew"
    return _CUDA, lambda: "cuda and triton use the same matrix instruction here"


def _bottleneck(capability: tuple[int, int], channels: int, narrow: int, cuda_rows: int) -> Preference:
    """Each tile of rows reads both weights whole; triton reads the rows themselves twice, cuda once."""
    if not cuda_rows:
        return _TRITON, lambda: "a tile of rows does not fit beside cuda's weights on chip"
    triton_rows = max(64 if capability[0] == 9 else 32, min(128, 8192 // max(64, narrow)))
    # Each weight has C x narrow elements; forward also reads the residual and writes y, all of 2 bytes.
    cuda, triton = (
        2 * channels * (streams + 2 * narrow / rows) for streams, rows in ((3, cuda_rows), (4, triton_rows))
    )
    order = _CUDA if cuda <= triton else _TRITON
    return order, lambda: f"forward moves {cuda:.0f} bytes a row on chip with cuda, {triton:.0f} with triton"
