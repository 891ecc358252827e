"""The dropout mask of the CUDA C++ kernels at rows that no test could reach through an operator."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from emulator import tests
from emulator.build import REFUSAL

from pyfused.portable.philox import dropout_

pytestmark = [pytest.mark.host, pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))]


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return tests.module()


@pytest.mark.parametrize("first_column", [0, 4, 96, 2**16])
@pytest.mark.parametrize("first_row", [2, 250, 2**31 - 2, 2**32 - 2, 3 * 2**32 + 2**31 + 5, 2**40])
def test_kernel_mask_equals_portable(module, first_row, first_column):
    seed, p = -0x1234_5678_9ABC, 0.7
    words = torch.zeros(4, 32, dtype=torch.uint32)
    module.philox_words(seed, first_row, first_column // 4, words.numpy())
    expected = dropout_(torch.ones(4, first_column + 32), torch.tensor([seed]), p, first_row).bool()
    assert torch.equal(words.long() >= int(p * 2**32), expected[:, first_column:])
