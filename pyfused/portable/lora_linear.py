"""``lora_linear`` in plain torch: the library's GEMM, then the rank-r term added in place (plan ``blas``)."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfused.portable.gemm import SHORT, add_product_, cast, product, small_images, sum_over_rows
from pyfused.portable.philox import dropout_


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
    adapter_index: Tensor | None = None,
    adapters: int = 1,
) -> tuple[Tensor, Tensor]:
    """y (B, L, N) and P (B * L, R) in x's dtype; see `pyfused.ops.lora_linear` for the contract."""
    dtype = x.dtype
    by_channels, (rows,) = rows_of(channels_first, x)
    p = product(dropped(rows, seed, dropout_p), cast(lora_a, dtype), by_channels)
    if adapter_index is not None:
        _keep_own_(p, adapter_index, adapters)
    y = product(rows, cast(weight, dtype), by_channels, None if bias is None else cast(bias, dtype))
    add_product_(y, p, cast(lora_b, dtype), scaling)
    if by_channels and save:
        p = p.reshape(-1, p.shape[2]).contiguous()
    return as_images(y, x, channels_first), p if save else x.new_empty((0, lora_a.shape[0]))


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
    adapter_index: Tensor | None = None,
    adapters: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (B, L, K) in dy's dtype, dA and dB in their parameters' dtypes; empty where not needed."""
    dx = da = db = None
    images, dtype = dy, dy.dtype
    by_channels, (dy, x) = rows_of(channels_first, dy, x)
    if by_channels and need_db:
        p = p.view(*dy.shape[:2], p.shape[1])
    if need_dx or need_da:
        q = product(dy, cast(lora_b, dtype).t(), by_channels, alpha=scaling)
        if adapter_index is not None:
            _keep_own_(q, adapter_index, adapters)
    if need_dx:
        dx = product(dy, cast(weight, dtype).t(), by_channels)
        a = cast(lora_a, dtype).t()
        if dropout_p > 0.0:
            low_rank = product(q, a)
            dropout_(low_rank.view(-1, low_rank.shape[-1]), seed, dropout_p)
            dx.add_(low_rank)
        else:
            add_product_(dx, q, a)
        dx = as_images(dx, images, channels_first)
    if need_da:
        da = sum_over_rows(q, dropped(x, seed, dropout_p), lora_a.dtype)
    if need_db:
        db = sum_over_rows(dy, p, lora_b.dtype, scaling)
    return (
        dy.new_empty(0) if dx is None else dx,
        lora_a.new_empty(0) if da is None else da,
        lora_b.new_empty(0) if db is None else db,
    )


def rows_of(channels_first: bool, *tensors: Tensor | None) -> tuple[bool, list[Tensor | None]]:
    """Whether products of these (B, L, C) go by channels, and the tensors as products then take them: (B L, C) where
    not."""
    if channels_first and not small_images(tensors[0], channels_first, SHORT):
        return True, list(tensors)
    return False, [None if tensor is None else tensor.reshape(-1, tensor.shape[2]) for tensor in tensors]


def as_images(y: Tensor, x: Tensor, channels_first: bool) -> Tensor:
    """y, of as many rows as x (B, L, K) has, as (B, L, N) that lies by channels when ``channels_first``."""
    if y.dim() == 3:
        return y
    y = y.view(*x.shape[:2], y.shape[1])
    return y.mT.contiguous().mT if channels_first else y


def _keep_own_(p: Tensor, adapter_index: Tensor, adapters: int) -> None:
    """Zeros in (..., R), of two or three dimensions, where a column is not of its row's adapter."""
    blocks = p.unflatten(-1, (adapters, -1))
    others = adapter_index.view(*p.shape[:-1], 1) != torch.arange(adapters, device=p.device)
    blocks.masked_fill_(others.unsqueeze(-1), 0.0)


def dropped(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """drop(x), as fresh rows in memory when dropout acts."""
    if p == 0.0:
        return x
    rows = torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
    dropout_(rows.view(-1, x.shape[-1]), seed, p)
    return rows
