"""Weights as the products take them: dense, in the rows' dtype, padded with zeros, and times a gate.

One launch makes those of a call. A kernel that converts a tile of a weight at each step of a product makes the tensor
cores of 9.0 wait at every step, and reads and holds twice the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfused.kernels.launch import launch, mat, offset_type
from pyfused.kernels.tiles import gate_root, load_vector

# Elements of a program.
_BLOCK = 1024


@triton.jit
def _prepare_block(
    weight_ptr, to_ptr, gate, root, block, rows, columns, width, elements,
    OVER_ROOT: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some of the ``elements`` of a matrix ``width`` wide; 0 beyond the weight's rows and columns. Both are dense."""
    offs = block.to(OFFSET) * BLOCK + tl.arange(0, BLOCK)
    i, j = offs // width, offs % width
    ok = (i < rows) & (j < columns)
    # Rounded before the gate too, as where there is none.
    w = tl.load(weight_ptr + i * columns + j, mask=ok, other=0.0).to(to_ptr.dtype.element_ty)
    if gate is not None:
        factor = load_vector(gate, i, ok) / root
        if OVER_ROOT:
            factor = factor / root
        w = w.to(tl.float32) * factor
    tl.store(to_ptr + offs, w.to(to_ptr.dtype.element_ty), mask=offs < elements)


# One compilation for every size: it loads single elements, side by side. What vectors would gain is not timed.
@triton.jit(do_not_specialize=[
    "first_rows", "first_columns", "first_width", "first_elements",
    "second_rows", "second_columns", "second_width", "second_elements", "blocks",
])  # fmt: skip
def _prepare_kernel(
    first_ptr, to_first_ptr, first_rows, first_columns, first_width, first_elements,
    second_ptr, to_second_ptr, second_rows, second_columns, second_width, second_elements, gate, blocks,
    OVER_ROOT: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Two weights: ``blocks`` programs write the first, all others the second, its rows times gate / its root."""
    block = tl.program_id(0)
    if block < blocks:
        _prepare_block(
            first_ptr, to_first_ptr, None, 1.0, block, first_rows, first_columns, first_width, first_elements,
            False, OFFSET, BLOCK,
        )  # fmt: skip
    else:
        root = 1.0
        if gate is not None:
            root = gate_root(gate, second_rows)
        _prepare_block(
            second_ptr, to_second_ptr, gate, root, block - blocks, second_rows, second_columns, second_width,
            second_elements, OVER_ROOT, OFFSET, BLOCK,
        )  # fmt: skip


def prepared(
    dtype: torch.dtype,
    first: Tensor,
    second: Tensor,
    shapes: tuple[tuple[int, int], tuple[int, int]] | None = None,
    *,
    gate: Tensor | None = None,
    over_root: bool = False,
) -> tuple[Tensor, Tensor]:
    """Two weights of a call, dense in ``dtype``: themselves where they are that.

    Args:
        shapes: of both, with zeros beyond what they hold; None (the default) for their own.
        gate: (rows of the second,) or (1,), over its `gate_root` multiplies the rows of the second.
        over_root: the second is over the root once more, for rows that are times the root.
    """
    first_shape, second_shape = shapes or (first.shape, second.shape)
    if gate is None and _is(first, dtype, first_shape) and _is(second, dtype, second_shape):
        return first, second
    to_first, to_second = first.new_empty(first_shape, dtype=dtype), second.new_empty(second_shape, dtype=dtype)
    blocks = triton.cdiv(to_first.numel(), _BLOCK)
    launch(
        _prepare_kernel, (blocks + triton.cdiv(to_second.numel(), _BLOCK),),
        **_part("first", first, to_first), **_part("second", second, to_second), gate=mat(gate), blocks=blocks,
        OVER_ROOT=over_root, OFFSET=offset_type(to_first, to_second), BLOCK=_BLOCK, num_warps=4, num_stages=1,
    )  # fmt: skip
    return to_first, to_second


def _is(weight: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> bool:
    return weight.dtype == dtype and weight.shape == shape and weight.is_contiguous()


def _part(name: str, weight: Tensor, to: Tensor) -> dict[str, Any]:
    rows, columns = weight.shape
    return {
        f"{name}_ptr": weight.contiguous(), f"to_{name}_ptr": to, f"{name}_rows": rows, f"{name}_columns": columns,
        f"{name}_width": to.shape[1], f"{name}_elements": to.numel(),
    }  # fmt: skip
