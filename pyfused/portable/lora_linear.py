"""``lora_linear`` in plain torch: the library's GEMM, then the rank-r term added in place (plan ``blas``)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pyfused.portable.gemm import add_product_, product, sum_over_rows
from pyfused.portable.philox import dropout_

# Frozen weights in the dtype that autocast asked for: weight -> {part of it: ((version, address), cast copy)}.
_casts = WeakTensorKeyDictionary()


def lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    channels_first: bool,
    plan: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y (B, L, N) and P (B * L, R) in x's dtype; see `pyfused.ops.lora_linear` for the contract."""
    weight, bias = _cast_frozen(weight, x.dtype), None if bias is None else bias.to(x.dtype)
    lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    p = product(_dropped(x, seed, dropout_p), lora_a, channels_first)
    y = product(x, weight, channels_first, bias)
    add_product_(y, p, lora_b, scaling)
    return y, p.reshape(-1, lora_a.shape[0]).contiguous() if save else x.new_empty((0, lora_a.shape[0]))


def lora_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    p: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    channels_first: bool,
    plan: str,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (B, L, K) in dy's dtype, dA and dB in their parameters' dtypes; empty where not needed."""
    dx, da, db = dy.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    if need_dx or need_da:
        q = product(dy, lora_b.to(dy.dtype).t(), channels_first).mul_(scaling)
    if need_dx:
        dx = product(dy, _cast_frozen(weight, dy.dtype).t(), channels_first)
        a = lora_a.to(dy.dtype)
        if dropout_p > 0.0:
            low_rank = product(q, a.t(), channels_first=False)
            dropout_(low_rank.view(-1, a.shape[1]), seed, dropout_p)
            dx.add_(low_rank)
        else:
            add_product_(dx, q, a.t())
    if need_da:
        da = sum_over_rows(q, _dropped(x, seed, dropout_p), lora_a.dtype)
    if need_db:
        db = sum_over_rows(dy, p.view(*dy.shape[:2], lora_b.shape[1]), lora_b.dtype).mul_(scaling)
    return dx, da, db


def _dropped(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """drop(x), as fresh rows in memory when dropout acts."""
    if p == 0.0:
        return x
    rows = torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
    dropout_(rows.view(-1, x.shape[-1]), seed, p)
    return rows


def _cast_frozen(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` in ``dtype``; one that does not train is cast once and the copy kept for as long as it lives.

    On a GPU nothing is kept: another stream, or a graph's capture, could use the copy before it is there. A change made
    through ``weight.data`` in place, which torch does not count as a new version, is not noticed.
    """
    if weight.dtype == dtype:
        return weight
    if weight.requires_grad or weight.is_inference() or weight.is_cuda:
        return weight.to(dtype)
    owner = weight if weight._base is None else weight._base
    part = weight.storage_offset(), weight.shape, weight.stride(), dtype
    state = weight._version, weight.data_ptr()
    kept = _casts.setdefault(owner, {})
    if part not in kept or kept[part][0] != state:
        kept[part] = state, weight.to(dtype)
    return kept[part][1]
