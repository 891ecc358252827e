"""The CUDA C++ kernels of ``lora_linear`` where the other tests do not reach: every tile, every schedule, the mask."""

from __future__ import annotations

import pytest
import torch
from lora_linear_cases import check, draw
from operator_cases import DEVICE, cuda_backend, leaves_of, seed
from oracle import cotangent

import pyfused
from pyfused.portable.philox import dropout_

# Capability, multiprocessors, bytes of shared memory in a block.
H200, SMALL = (90, 1, 232_448), (86, 1, 101_376)

pytestmark = cuda_backend


# On one multiprocessor the largest tile that fits is chosen: 128 x 256, or 128 x 128 where the rank or the device does
# not allow that; a larger rank on a small device leaves 64 x 64. A transposed W swaps the kernels of the directions.
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("device", "r"), [(H200, 7), (SMALL, 16), (H200, 33), (SMALL, 50)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_tile(backend, emulate, dtype, device, r, transposed):
    emulate(device)
    tensors = draw((250, 500), 504, r, dtype, adapters=torch.float32 if transposed else None)
    if transposed:
        tensors["weight"] = tensors["weight"].t().contiguous().t()
    check(tensors, backend, dropout_p=0.3 if transposed else 0.0, seed=seed())


def test_same_bits_under_every_schedule(backend, emulate):
    tensors = draw((2, 50, 7, 9), 40, 16, torch.bfloat16, channel_dim=1)
    runs = []
    for schedule in range(4):
        emulate(H200, schedule)
        leaves = leaves_of(tensors)
        y = pyfused.lora_linear(**leaves, dropout_p=0.3, seed=5, channel_dim=1, backend=backend)
        runs.append((y, *torch.autograd.grad(y, list(leaves.values()), cotangent(y))))
    for run in runs[1:]:
        for first, again in zip(runs[0], run, strict=True):
            assert torch.equal(first, again)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("k", [1, 6, 50, 64])
def test_the_mask_is_philoxs(backend, k, p):
    """Identities for A and B and no W: y and dx are the mask itself."""
    x = torch.ones(131, k, dtype=torch.float16, device=DEVICE, requires_grad=True)
    eye = torch.eye(k, dtype=x.dtype, device=DEVICE)
    y = pyfused.lora_linear(x, torch.zeros_like(eye), eye, eye, dropout_p=p, seed=seed(), backend=backend)
    y.backward(torch.ones_like(y))
    mask = dropout_(torch.ones_like(y), seed(), p)
    assert torch.equal(y, mask)
    assert torch.equal(x.grad, mask)


def test_what_the_kernels_do_not_take_is_refused(backend):
    tensors = draw((5, 6), 7, 65, torch.float16)
    with pytest.raises(ValueError, match=r"takes lora_a \(R, K\) with R <= 64, got R = 65"):
        pyfused.lora_linear(**tensors, backend=backend)
    tensors = draw((5, 6), 7, 3, torch.float16)
    with pytest.raises(ValueError, match=r"plan must be one of \('auto', 'one_launch'\) there, got 'blas'"):
        pyfused.lora_linear(**tensors, backend=backend, plan="blas")
    with pytest.raises(RuntimeError, match=r"cannot serve torch\.float32"):
        pyfused.lora_linear(**draw((5, 6), 7, 3), backend=backend)


def test_infinities_stay_in_their_row(backend):
    """Of x's columns beyond K and P's beyond the rank nothing reaches y, not even as 0 times infinity."""
    tensors = draw((70, 20), 34, 3, torch.float16)
    tensors["x"][5, 7] = torch.inf
    tensors |= {name: tensors[name].abs() for name in ("x", "weight", "lora_a", "lora_b")}
    y = pyfused.lora_linear(**tensors, backend=backend)
    assert torch.equal(y[5], torch.full_like(y[5], torch.inf))
    assert y[:5].isfinite().all()
    assert y[6:].isfinite().all()
