"""C++ kernels for CPUs of a mixed batch's low-rank terms: every instruction set, any rows, any number of threads."""

from __future__ import annotations

import functools

import pytest
import torch
from cpu.machine import every_instruction_set, taken, threads
from lora_linear_cases import check, draw
from operator_cases import leaves_of, run, seed, skips
from oracle import cotangent

import pyfused
from pyfused.choice import backends

pytestmark = skips("cpu")
FORMATS = ("rows", "NCHW", "channels_last")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _index(rows: int, adapters: int, order: str) -> torch.Tensor:
    """Every adapter, some, or none of a few: by itself, among others, or side by side; -1 and numbers beyond too."""
    index = torch.randint(-1, adapters + 1, (rows,), generator=torch.Generator().manual_seed(rows))
    if order == "sorted":
        return index.sort().values
    # Every other number of a tensor: an index may have strides.
    return torch.stack([index, index + 1], 1)[:, 0] if order == "mixed" else torch.full_like(index, adapters - 1)


def check_calls() -> None:
    """Tails of every vector, panel and block; ranks of several panels; adapters without rows, and with many."""
    for n, (rows, k, width, adapters, rank, order) in enumerate(
        [
            (1, 1, 1, 1, 1, "one"),
            (7, 5, 3, 2, 3, "mixed"),
            (40, 17, 33, 3, 8, "sorted"),
            (97, 70, 31, 2, 16, "mixed"),
            (300, 129, 65, 2, 20, "sorted"),
            (260, 300, 257, 1, 70, "one"),
            (64, 48, 144, 30, 5, "mixed"),
            (420, 32, 270, 3, 17, "sorted"),
            (5, 1024, 16, 2, 128, "mixed"),
        ]
    ):
        layout, dtype, p = FORMATS[n % 3], DTYPES[n // 2 % 3], (0.0, 0.3)[n // 3 % 2]
        shape, channel_dim = ((rows, k), -1) if layout == "rows" else ((3, k, rows, 1), 1)
        tensors = draw(
            shape, width, rank, dtype, mixed=adapters, bias=n % 2 == 0, channel_dim=channel_dim,
            adapters=torch.float32 if n % 4 == 2 else None,
        )  # fmt: skip
        index = _index(rows if layout == "rows" else 3 * rows, adapters, order)
        if layout == "channels_last":
            tensors["x"] = tensors["x"].to(memory_format=torch.channels_last)
        if layout != "rows":
            index = index.view(3, rows, 1)
        check(tensors, "cpu", channel_dim=channel_dim, adapter_index=index, dropout_p=p, seed=seed())


@every_instruction_set
def test_every_instruction_set(instruction_set):
    with taken(instruction_set):
        check_calls()


@pytest.mark.parametrize("order", ["sorted", "mixed", "one"])
def test_the_same_bits_on_any_number_of_threads(order):
    tensors = draw((2500, 40), 300, 12, mixed=4)
    # Torch's own products may differ.
    weight = tensors.pop("weight").zero_()
    call = functools.partial(pyfused.lora_linear, weight=weight, adapter_index=_index(2500, 4, order), backend="cpu")
    found = []
    for count in (1, 2, 3, 5):
        with threads(count):
            found.append(run(call, tensors))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("wanted", ["x", "lora_a", "lora_b"])
def test_each_gradient_alone(wanted):
    tensors = draw((50, 40), 30, 5, mixed=3)
    index = _index(50, 3, "mixed")

    def gradient(backend: str, requiring: list[str]):
        leaves = leaves_of(tensors, requiring)
        y = pyfused.lora_linear(**leaves, adapter_index=index, backend=backend)
        return torch.autograd.grad(y, leaves[wanted], cotangent(y))[0]

    alone = gradient("cpu", [wanted])
    assert torch.equal(alone, gradient("cpu", ["x", "lora_a", "lora_b"]))
    torch.testing.assert_close(alone, gradient("portable", [wanted]), rtol=1e-4, atol=1e-5)


def test_what_another_adapter_holds_does_not_matter():
    tensors = draw((20, 40), 30, 5, mixed=3)
    index = torch.arange(20) % 2
    options = {"backend": "cpu", "adapter_index": index}
    y, *gradients = run(pyfused.lora_linear, tensors, **options)
    tensors["lora_a"][2], tensors["lora_b"][:, 2] = torch.inf, torch.nan
    again, *others = run(pyfused.lora_linear, tensors, **options)
    assert torch.equal(y, again)
    assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))
    assert not gradients[2][2].any(), "an adapter without rows has a gradient of zeros"


def test_where_it_serves(monkeypatch):
    tensors = draw((20, 40), 30, 5, mixed=3)
    index = torch.arange(20) % 3
    (call,) = pyfused.explain(pyfused.lora_linear, **tensors, adapter_index=index).calls
    assert (call.backend, call.plan) == ("cpu", "blas")
    monkeypatch.setattr(backends, "CPU_BY_NAME", "it is slow here")
    (call,) = pyfused.explain(pyfused.lora_linear, **tensors, adapter_index=index).calls
    assert call.backend == "portable"
    assert "not cpu: it is slow here" in call.why
    with pytest.raises(RuntimeError, match="lora_linear: adapter_index must be given there"):
        pyfused.lora_linear(**draw((20, 40), 30, 5), backend="cpu")
