"""``lora_linear`` refuses what it cannot serve: each error names the argument, what was expected and what came."""

from __future__ import annotations

import math

import pytest
import torch
from lora_linear_cases import every_plan
from operator_cases import DEVICE, plain_dtype

import pyfused
from pyfused.choice import backends

M, K, N, R = 4, 6, 5, 3


def _arguments(**changes):
    arguments = {
        "x": torch.ones(M, K, device=DEVICE),
        "weight": torch.ones(N, K, device=DEVICE),
        "lora_a": torch.ones(R, K, device=DEVICE),
        "lora_b": torch.ones(N, R, device=DEVICE),
        "bias": torch.ones(N, device=DEVICE),
    }
    return arguments | changes


def _half(*shape):
    return torch.ones(shape, dtype=torch.float16, device=DEVICE)


def _ints(*shape):
    return torch.ones(shape, dtype=torch.int64, device=DEVICE)


def _ones(*shape):
    return torch.ones(shape, device=DEVICE)


DROPOUT = {"dropout_p": 0.1}


def _mixed(**changes):
    return {"lora_a": _ones(2, R, K), "lora_b": _ones(N, 2, R), "adapter_index": _ints(M)} | changes


# Changed arguments, exception, and what its message holds: the argument, the expectation, what came.
REFUSALS = {
    "x a list": ({"x": [1.0]}, TypeError, ("x must be a torch.Tensor", "list")),
    "x integer": ({"x": _ints(M, K)}, TypeError, ("x must have dtype", "float32", "got torch.int64")),
    "x complex": ({"x": _ones(M, K) * 1j}, TypeError, ("x must have dtype", "float32", "got torch.complex64")),
    "x 0-D": ({"x": _ones()}, ValueError, ("x must have at least 1 dim", "got shape ()")),
    "x too wide": ({"x": _ones(M, K + 1)}, ValueError, ("x must have", "K = 6", "got shape (4, 7)")),
    "x 2-D by channels": (
        {"x": _ones(M, K), "channel_dim": 1}, ValueError, ("x must have at least 3 dim", "got shape (4, 6)"),
    ),
    "x on meta": ({"x": _ones(M, K).to("meta")}, ValueError, ("must be on meta like x", f"got {DEVICE}")),
    "channels elsewhere": (
        {"x": _ones(M, 2, 2, K), "channel_dim": 1}, ValueError, ("K = 6 in dimension 1", "got shape (4, 2, 2, 6)"),
    ),
    "channel_dim 0": ({"channel_dim": 0}, ValueError, ("channel_dim must be one of (-1, 1)", "got 0")),
    "weight None": ({"weight": None}, TypeError, ("weight must be a torch.Tensor", "NoneType")),
    "weight 1-D": ({"weight": _ones(K)}, ValueError, ("weight must have shape (N, K)", "got (6,)")),
    "weight 3-D": ({"weight": _ones(1, N, K)}, ValueError, ("weight must have shape (N, K)", "got (1, 5, 6)")),
    "weight transposed": ({"weight": _ones(K, N)}, ValueError, ("x must have", "K = 5", "got shape (4, 6)")),
    "weight without rows": (
        {"weight": _ones(0, K), "lora_b": _ones(0, R), "bias": _ones(0)}, ValueError, ("weight", "got", "(0, 6)"),
    ),
    "weight float16": ({"weight": _half(N, K)}, TypeError, ("weight must have dtype torch.float32", "torch.float16")),
    "weight integer": ({"weight": _ints(N, K)}, TypeError, ("weight must have dtype", "got torch.int64")),
    "weight on meta": ({"weight": _ones(N, K).to("meta")}, ValueError, (f"weight must be on {DEVICE}", "got meta")),
    "lora_a None": ({"lora_a": None}, TypeError, ("lora_a must be a torch.Tensor", "NoneType")),
    "lora_a 1-D": ({"lora_a": _ones(K)}, ValueError, ("lora_a must have shape (R, K)", "got (6,)")),
    "rank 0": (
        {"lora_a": _ones(0, K), "lora_b": _ones(N, 0)}, ValueError, ("lora_a", "1 <= R <= 256", "got (0, 6)"),
    ),
    "rank 257": (
        {"lora_a": _ones(257, K), "lora_b": _ones(N, 257)}, ValueError, ("lora_a", "1 <= R <= 256", "got (257, 6)"),
    ),
    "lora_a transposed": ({"lora_a": _ones(K, R)}, ValueError, ("lora_a must have shape (R, K)", "got (6, 3)")),
    "lora_a float16": ({"lora_a": _half(R, K)}, TypeError, ("lora_a must have dtype torch.float32", "torch.float16")),
    "lora_a float64": (
        {"lora_a": _ones(R, K).double()}, TypeError, ("lora_a must have dtype torch.float32", "got torch.float64"),
    ),
    "lora_a on meta": ({"lora_a": _ones(R, K).to("meta")}, ValueError, (f"lora_a must be on {DEVICE}", "got meta")),
    "lora_b a number": ({"lora_b": 1.0}, TypeError, ("lora_b must be a torch.Tensor", "float")),
    "lora_b transposed": ({"lora_b": _ones(R, N)}, ValueError, ("lora_b must have shape (N, R) = (5, 3)", "(3, 5)")),
    "lora_b of another rank": ({"lora_b": _ones(N, 4)}, ValueError, ("lora_b", "(N, R) = (5, 3)", "got (5, 4)")),
    "lora_b float16": ({"lora_b": _half(N, R)}, TypeError, ("lora_b must have dtype torch.float32", "torch.float16")),
    "lora_b on meta": ({"lora_b": _ones(N, R).to("meta")}, ValueError, (f"lora_b must be on {DEVICE}", "got meta")),
    "float64 with float32 adapters": (
        {"x": _ones(M, K).double(), "weight": _ones(N, K).double(), "bias": None},
        TypeError,
        ("lora_a must have dtype torch.float64", "got torch.float32"),
    ),
    "bias True": ({"bias": True}, TypeError, ("bias must be a torch.Tensor", "bool")),
    "bias of K": ({"bias": _ones(K)}, ValueError, ("bias must have shape (N,) = (5,)", "got (6,)")),
    "bias 2-D": ({"bias": _ones(1, N)}, ValueError, ("bias must have shape (N,) = (5,)", "got (1, 5)")),
    "bias float16": ({"bias": _half(N)}, TypeError, ("bias must have dtype torch.float32", "torch.float16")),
    "bias integer": ({"bias": _ints(N)}, TypeError, ("bias must have dtype", "got torch.int64")),
    "bias on meta": ({"bias": _ones(N).to("meta")}, ValueError, (f"bias must be on {DEVICE}", "got meta")),
    "scaling nan": ({"scaling": math.nan}, ValueError, ("scaling must be finite", "got nan")),
    "scaling inf": ({"scaling": -math.inf}, ValueError, ("scaling must be finite", "got -inf")),
    "scaling a string": ({"scaling": "2"}, TypeError, ("scaling must be a Python number", "got str")),
    "scaling a tensor": ({"scaling": _ones()}, TypeError, ("scaling must be a Python number", "got Tensor")),
    "dropout_p negative": ({"dropout_p": -0.1}, ValueError, ("dropout_p must be in [0, 1)", "got -0.1")),
    "dropout_p 1": ({"dropout_p": 1.0}, ValueError, ("dropout_p must be in [0, 1)", "got 1.0")),
    "dropout_p nan": ({"dropout_p": math.nan}, ValueError, ("dropout_p must be finite", "got nan")),
    "dropout_p None": ({"dropout_p": None}, TypeError, ("dropout_p must be a Python number", "got NoneType")),
    "dropout_p 1 in eval": ({"dropout_p": 1.0, "training": False}, ValueError, ("dropout_p must be in [0, 1)",)),
    "seed float": ({"seed": 0.5} | DROPOUT, TypeError, ("seed must be", "float")),
    "seed True": ({"seed": True} | DROPOUT, TypeError, ("seed must be", "bool")),
    "seed beyond 64 bits": ({"seed": 2**63} | DROPOUT, ValueError, ("seed must fit a signed 64-bit", str(2**63))),
    "seed int32": ({"seed": _ints(1).int()} | DROPOUT, TypeError, ("seed must have dtype torch.int64", "torch.int32")),
    "seed float tensor": ({"seed": _ones(1)} | DROPOUT, TypeError, ("seed must have dtype torch.int64", "float32")),
    "two seeds": ({"seed": _ints(2)} | DROPOUT, ValueError, ("seed must have one element", "got shape (2,)")),
    "seed on meta": ({"seed": _ints(1).to("meta")} | DROPOUT, ValueError, (f"seed must be on {DEVICE}", "got meta")),
    "index a list": (_mixed(adapter_index=[0, 1]), TypeError, ("adapter_index must be a torch.Tensor", "list")),
    "index int32": (_mixed(adapter_index=_ints(M).int()), TypeError, ("adapter_index must have dtype torch.int64",)),
    "index float": (_mixed(adapter_index=_ones(M)), TypeError, ("adapter_index must have dtype torch.int64", "float")),
    "index on meta": (
        _mixed(adapter_index=_ints(M).to("meta")), ValueError, (f"adapter_index must be on {DEVICE}", "got meta"),
    ),
    "index of other rows": (
        _mixed(adapter_index=_ints(M + 1)), ValueError, ("adapter_index", "without its channels, (4,)", "got (5,)"),
    ),
    "index of too many dimensions": (
        _mixed(adapter_index=_ints(1, M)), ValueError, ("adapter_index", "without its channels, (4,)", "got (1, 4)"),
    ),
    "index of channels": (
        _mixed(x=_ones(2, K, 3, 5), channel_dim=1, adapter_index=_ints(2, 1, 3)), ValueError,
        ("adapter_index", "without its channels, (2, 3, 5)", "got (2, 1, 3)"),
    ),
    "mixed lora_a 2-D": (
        _mixed(lora_a=_ones(2 * R, K)), ValueError, ("lora_a must have shape (G, R, K)", "adapter_index", "got (6, 6)"),
    ),
    "mixed lora_b 2-D": (
        _mixed(lora_b=_ones(N, 2 * R)), ValueError, ("lora_b must have shape (N, G, R) = (N, 2, 3)", "got (5, 6)"),
    ),
    "mixed lora_b (G, N, R)": (
        _mixed(lora_b=_ones(2, N, R)), ValueError, ("lora_b must have shape (N, G, R) = (N, 2, 3)", "got (2, 5, 3)"),
    ),
    "mixed lora_b of other rows": (
        _mixed(lora_b=_ones(N + 1, 2, R)), ValueError, ("lora_b must have shape (N, R) = (5, 3)", "(6, 3)"),
    ),
    "mixed lora_a of other columns": (
        _mixed(lora_a=_ones(2, R, 7)), ValueError, ("lora_a must have shape (R, K) = (3, 6)", "got (3, 7)"),
    ),
    "mixed ranks of 258": (
        _mixed(lora_a=_ones(86, R, K), lora_b=_ones(N, 86, R)), ValueError, ("1 <= G R <= 256", "got (86, 3, 6)"),
    ),
    "lora_a 3-D without an index": (
        {"lora_a": _ones(2, R, K)}, ValueError, ("lora_a must have shape (R, K)", "got (2, 3, 6)"),
    ),
    "unknown plan": ({"plan": "fast"}, ValueError, ("plan", "'auto'", "'blas'", "got 'fast'")),
    "unknown backend": ({"backend": "tpu"}, ValueError, ("backend must be one of", "'portable'", "got 'tpu'")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    changes, error, fragments = REFUSALS[case]
    with pytest.raises(error) as caught:
        pyfused.lora_linear(**_arguments(**changes))
    message = str(caught.value)
    missing = [fragment for fragment in fragments if fragment not in message]
    assert not missing, f"{message!r} does not say {missing}"


def test_the_arguments_that_the_refusals_change_are_served():
    assert pyfused.lora_linear(**_arguments()).shape == (M, N)


@pytest.mark.parametrize("plan", ["one_launch", "shrink_expand"])
def test_portable_has_no_triton_plan(plan):
    with pytest.raises(ValueError, match=f"plan on backend 'portable'.*'blas'.*got {plan!r}"):
        pyfused.lora_linear(**_arguments(), backend="portable", plan=plan)


def _refused(backend: str, **changes) -> str:
    with pytest.raises(RuntimeError) as caught:
        pyfused.lora_linear(**_arguments(**changes), backend=backend)
    message = str(caught.value)
    assert f"backend {backend!r} cannot serve" in message
    for name in backends.BACKENDS:
        assert f"{name}: " in message, "the reason of every backend is listed"
    return message


def test_explicit_backend_never_falls_back():
    double = {name: value.double() for name, value in _arguments().items()}
    assert "float64" in _refused("triton", **double)
    assert pyfused.lora_linear(**double).dtype == torch.float64, "auto serves it"
    if backends.CUDA_REFUSAL is not None:
        assert backends.CUDA_REFUSAL in _refused("cuda")


def test_triton_refuses_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", False)
    monkeypatch.setattr(backends, "TRITON_REFUSAL", None)
    cpu = {name: value.cpu() for name, value in _arguments().items()}
    assert "TRITON_INTERPRET=1" in _refused("triton", **cpu)
    monkeypatch.setattr(backends, "TRITON_REFUSAL", "triton is not installed")
    assert "triton is not installed" in _refused("triton", **cpu)


def test_cuda_takes_no_index(monkeypatch):
    """Where it serves such tensors it says which argument it lacks; elsewhere why it serves none."""
    monkeypatch.setattr(backends, "CUDA_REFUSAL", None)
    monkeypatch.setattr(backends, "CUDA_OPERATORS", {DEVICE: frozenset(["lora_linear"])})
    half = {name: value if name == "adapter_index" else value.half() for name, value in _arguments(**_mixed()).items()}
    message = _refused("cuda", **half)
    assert "cuda: it has no kernels for mixed_lora_linear" in message
    assert "lora_linear: adapter_index must be None there" in message
    assert pyfused.lora_linear(**half).dtype == torch.float16, "auto serves it"


@every_plan
def test_every_plan_can_be_named(backend, plan):
    arguments = {name: value.to(plain_dtype(backend)) for name, value in _arguments().items()}
    assert pyfused.lora_linear(**arguments, backend=backend, plan=plan).shape == (M, N)
