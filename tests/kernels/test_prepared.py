"""Weights as the products take them, against torch."""

import functools
import os

import pytest

pytest.importorskip("triton")

import torch

from pyfused.kernels import device  # noqa: F401 (it mends what the interpreter rounds)
from pyfused.kernels.prepared import prepared
from pyfused.kernels.recording import SHARED_MEMORY, Target, record

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="about Triton's interpreter")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _weights(dtype, first=(5, 700), second=(33, 5)):
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    return draw(first).to(dtype), draw(second).to(dtype)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_they_are_cast_and_padded_with_zeros(source, dtype):
    # More than one program for the first, fewer elements than one for the second.
    first, second = _weights(source)
    made = prepared(dtype, first, second, ((8, 700), (33, 8)))
    for weight, to, shape in ((first, made[0], (8, 700)), (second, made[1], (33, 8))):
        want = torch.zeros(shape, dtype=dtype)
        want[: weight.shape[0], : weight.shape[1]] = weight.to(dtype)
        assert to.dtype == dtype
        assert torch.equal(to, want)


@interpreted
@pytest.mark.parametrize("over_root", [False, True])
@pytest.mark.parametrize("largest", [1e-6, 1.0, 300.0, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gate_over_its_root_multiplies_the_rows_of_the_second(dtype, largest, over_root):
    # More channels than a program takes of the gate at once, the largest behind them.
    first, second = _weights(torch.float32, (5, 1500), (1500, 5))
    gate = 0.1 * largest * torch.linspace(-1.0, 0.5, 1500)
    gate[-1] = -largest
    made = prepared(dtype, first, second, gate=gate, over_root=over_root)
    root = torch.tensor(largest or 1.0).sqrt()
    factor = gate / root / root if over_root else gate / root
    assert torch.equal(made[0], first.to(dtype))
    torch.testing.assert_close(
        made[1].float(),
        (second.to(dtype).float() * factor[:, None]).to(dtype).float(),
        atol=0.0,
        rtol=4 * torch.finfo(dtype).eps,
    )


@interpreted
def test_of_any_strides_and_of_size_one():
    first, second = torch.randn(700, 10)[::2, ::2].t(), torch.randn(1, 1)
    made = prepared(torch.float16, first, second)
    assert torch.equal(made[0], first.half())
    assert torch.equal(made[1], second.half())
    assert all(each.is_contiguous() for each in made)


def test_what_is_as_it_should_be_is_taken_as_it_is():
    first, second = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((16, 64), (64, 16)))
    with record(Target((9, 0), 132, SHARED_MEMORY[9, 0])) as launches:
        assert all(a is b for a, b in zip(prepared(torch.bfloat16, first, second), (first, second), strict=True))
        assert not launches
        prepared(torch.bfloat16, first, second, ((16, 64), (64, 32)))
        prepared(torch.bfloat16, first, second.t().contiguous().t())
        prepared(torch.bfloat16, first, second, gate=torch.empty(64, device="meta"))
    assert len(launches) == 3
