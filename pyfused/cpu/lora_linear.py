"""``lora_linear`` of a mixed batch on a CPU: torch's product with the base weight, and the low-rank terms of each row's
own adapter by C++ kernels.

Plain torch multiplies every row with the adapters of all rows, and then keeps the products with its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyfused.portable.gemm import cast, product
from pyfused.portable.lora_linear import as_images, dropped, rows_of
from pyfused.portable.philox import dropout_

# csrc/cpu/low_rank.cpp. Rows are (B, L, C) of any strides, A is (G R, K), B (N, G R), P (B L, G R); what is None is not
# wanted. The terms are added to y and dx; of P only the columns of a row's own adapter are written.
_library = torch.library.Library("pyfused_cpu", "FRAGMENT")
_library.define(
    "low_rank_fwd(Tensor(a!) y, Tensor(b!)? p, Tensor x, Tensor lora_a, Tensor lora_b, Tensor adapter_index, "
    "int adapters, float scaling) -> ()"
)
_library.define(
    "low_rank_bwd(Tensor(a!)? dx, Tensor(b!)? da, Tensor(c!)? db, Tensor dy, Tensor? x, Tensor lora_a, Tensor lora_b, "
    "Tensor? p, Tensor adapter_index, int adapters, float scaling) -> ()"
)
_low_rank_fwd = torch.ops.pyfused_cpu.low_rank_fwd.default
_low_rank_bwd = torch.ops.pyfused_cpu.low_rank_bwd.default


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
    adapter_index: Tensor,
    adapters: int,
) -> tuple[Tensor, Tensor]:
    """y (B, L, N) and P (B * L, R) in x's dtype; see `pyfused.ops.lora_linear` for the contract."""
    dtype = x.dtype
    by_channels, (rows,) = rows_of(channels_first, x)
    y = product(rows, cast(weight, dtype), by_channels, None if bias is None else cast(bias, dtype))
    p = x.new_zeros((adapter_index.shape[0], lora_a.shape[0])) if save else None
    _low_rank_fwd(
        _images(y), p, _images(dropped(rows, seed, dropout_p)), cast(lora_a, dtype), cast(lora_b, dtype), adapter_index,
        adapters, scaling,
    )  # fmt: skip
    return as_images(y, x, channels_first), x.new_empty((0, lora_a.shape[0])) if p is None else p


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
    adapter_index: Tensor,
    adapters: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (B, L, K) in dy's dtype, dA and dB in their parameters' dtypes; empty where not needed."""
    dtype = dy.dtype
    by_channels, (rows, x) = rows_of(channels_first, dy, x)
    dx = product(rows, cast(weight, dtype).t(), by_channels) if need_dx else None
    # Under dropout it is masked before dx gets it.
    term = torch.zeros(dx.shape, dtype=dtype) if need_dx and dropout_p > 0.0 else dx
    da = lora_a.new_empty(lora_a.shape) if need_da else None
    db = lora_b.new_empty(lora_b.shape) if need_db else None
    _low_rank_bwd(
        _images(term), da, db, _images(rows), _images(dropped(x, seed, dropout_p)) if need_da else None,
        cast(lora_a, dtype), cast(lora_b, dtype), p, adapter_index, adapters, scaling,
    )  # fmt: skip
    if need_dx and dropout_p > 0.0:
        dropout_(term.view(-1, term.shape[-1]), seed, dropout_p)
        dx.add_(term)
    return (
        as_images(dx, dy, channels_first) if need_dx else dy.new_empty(0),
        da if need_da else lora_a.new_empty(0),
        db if need_db else lora_b.new_empty(0),
    )


def _images(rows: Tensor | None) -> Tensor | None:
    """(B, L, C) of what may be (M, C)."""
    return rows if rows is None or rows.dim() == 3 else rows[None]
