"""The dropout mask of the kernels at rows that no test could reach through an operator."""

from __future__ import annotations

import pytest
import torch

import pyfused
from pyfused.portable.philox import dropout_

triton = pytest.importorskip("triton")
_refusal = pyfused.available_backends()["triton"]
if _refusal is not None:
    pytest.skip(_refusal, allow_module_level=True)

tl = pytest.importorskip("triton.language")
dropout_keep_mask = pytest.importorskip("pyfused.kernels.device").dropout_keep_mask
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _mask_kernel(keep_ptr, seed_ptr, first_row, column_start, threshold):
    rows = first_row.to(tl.int64) + tl.arange(0, 16)
    keep = dropout_keep_mask(tl.load(seed_ptr), rows, column_start, threshold, 16, 32)
    tl.store(keep_ptr + tl.arange(0, 16)[:, None] * 32 + tl.arange(0, 32)[None, :], keep)


@pytest.mark.parametrize("column_start", [0, 4, 96, 2**16])
@pytest.mark.parametrize("first_row", [2, 250, 2**16 - 3, 2**31 - 3, 2**32 - 3, 3 * 2**32 + 2**31 + 5, 2**40])
def test_kernel_mask_equals_portable(first_row, column_start):
    seed, p = torch.tensor([-0x1234_5678_9ABC], device=DEVICE), 0.7
    keep = torch.zeros(16, 32, dtype=torch.bool, device=DEVICE)
    _mask_kernel[(1,)](keep, seed, first_row, column_start, int(p * 2**32))
    expected = dropout_(torch.ones(16, column_start + 32, device=DEVICE), seed, p, first_row).bool()
    assert torch.equal(keep, expected[:, column_start:])
