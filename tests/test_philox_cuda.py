"""The dropout mask of the CUDA C++ kernels at rows that no test could reach through an operator."""

from __future__ import annotations

import ctypes
import shutil

import pytest
import torch
from emulator.build import COMPILER, HERE, ROOT, build

from pyfused.portable.philox import dropout_

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs a C++ compiler: {COMPILER} is not on PATH"),
]


@pytest.fixture(scope="module")
def functions() -> ctypes.CDLL:
    return ctypes.CDLL(str(build([HERE / "philox.cu", ROOT / "csrc" / "launch.cu"], "philox")))


@pytest.mark.parametrize("first_column", [0, 4, 96, 2**16])
@pytest.mark.parametrize("first_row", [2, 250, 2**31 - 2, 2**32 - 2, 3 * 2**32 + 2**31 + 5, 2**40])
def test_kernel_mask_equals_portable(functions, first_row, first_column):
    seed, p = -0x1234_5678_9ABC, 0.7
    words = torch.zeros(4, 32, dtype=torch.uint32)
    functions.philox_words.restype = ctypes.c_char_p
    message = functions.philox_words(
        ctypes.c_uint64(seed), ctypes.c_int64(first_row), first_column // 4, ctypes.c_void_p(words.data_ptr())
    )
    assert message is None
    expected = dropout_(torch.ones(4, first_column + 32), torch.tensor([seed]), p, first_row).bool()
    assert torch.equal(words.long() >= int(p * 2**32), expected[:, first_column:])
