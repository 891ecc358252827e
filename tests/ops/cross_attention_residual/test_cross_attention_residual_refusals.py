"""What ``cross_attention_residual`` and ``projection_residual`` refuse.

Each error names the argument, what was expected and what came.
"""

from __future__ import annotations

import math

import pytest
import torch
from cross_attention_cases import ABSORBED, check, draw, every_plan
from operator_cases import DEVICE, every_backend

import pyfused
from pyfused.choice import backends
from pyfused.ops.adapter_residual import ACTIVATIONS
from pyfused.ops.cross_attention_residual import PLANS, most_columns

B, L, T, C, CC, HEADS, INNER = 3, 4, 5, 6, 7, 2, 8


def _ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype, device=DEVICE)


def _half(*shape):
    return _ones(*shape, dtype=torch.float16)


def _ints(*shape):
    return _ones(*shape, dtype=torch.int64)


def _mask(*shape, dtype=torch.bool):
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def _meta(*shape):
    return torch.ones(shape, device="meta")


def _arguments(**changes):
    arguments = {
        "x": _ones(B, L, C),
        "context": _ones(B, T, CC),
        "q_weight": _ones(INNER, C),
        "q_bias": _ones(INNER),
        "k_weight": _ones(INNER, CC),
        "k_bias": _ones(INNER),
        "v_weight": _ones(INNER, CC),
        "v_bias": _ones(INNER),
        "out_weight": _ones(C, INNER),
        "out_bias": _ones(C),
        "num_heads": HEADS,
        "weight": _ones(C),
        "key_padding_mask": _mask(B, T),
    }
    return arguments | changes


DROPOUT = {"dropout_p": 0.1, "plan": "absorbed"}
# Changed arguments, exception, and what its message holds: the argument, the expectation, what came.
REFUSALS = {
    "x a list": ({"x": [1.0]}, TypeError, ("x must be a torch.Tensor", "list")),
    "x integer": ({"x": _ints(B, L, C)}, TypeError, ("x must have dtype", "float32", "got torch.int64")),
    "x complex": ({"x": _ones(B, L, C) * 1j}, TypeError, ("x must have dtype", "got torch.complex64")),
    "x 2-D": ({"x": _ones(B, C)}, ValueError, ("x must have shape (B, L, C)", "C = 6", "got (3, 6)")),
    "x too wide": ({"x": _ones(B, L, C + 1)}, ValueError, ("x must have shape", "C = 6", "got (3, 4, 7)")),
    "x on meta": ({"x": _meta(B, L, C)}, ValueError, ("must be on meta like x", f"got {DEVICE}")),
    "x float64 alone": ({"x": _ones(B, L, C).double()}, TypeError, ("must have dtype torch.float64", "torch.float32")),
    "context None": ({"context": None}, TypeError, ("context must be a torch.Tensor", "NoneType")),
    "context 2-D": ({"context": _ones(T, CC)}, ValueError, ("context must have shape (B or 1, T, Cc)", "got (5, 7)")),
    "context of x's width": (
        {"context": _ones(B, T, C)}, ValueError, ("context must have shape", "Cc = 7", "got (3, 5, 6)"),
    ),
    "context without tokens": (
        {"context": _ones(B, 0, CC), "key_padding_mask": None}, ValueError, ("context must", "T >= 1", "got (3, 0, 7)"),
    ),
    "context of another batch": (
        {"context": _ones(2, T, CC)}, ValueError, ("context must have x's batch B = 3 or 1", "got 2"),
    ),
    "context of a larger batch": (
        {"x": _ones(1, L, C), "key_padding_mask": None}, ValueError, ("x's batch B = 1 or 1", "got 3"),
    ),
    "context float16": (
        {"context": _half(B, T, CC)}, TypeError, ("context must have dtype torch.float32", "got torch.float16"),
    ),
    "context integer": ({"context": _ints(B, T, CC)}, TypeError, ("context must have dtype", "got torch.int64")),
    "context on meta": (
        {"context": _meta(B, T, CC)}, ValueError, (f"context must be on {DEVICE} like x", "got meta"),
    ),
    "num_heads that does not divide": (
        {"num_heads": 3}, ValueError, ("num_heads must divide H d = 8", "got num_heads = 3"),
    ),
    "num_heads 0": ({"num_heads": 0}, ValueError, ("num_heads must divide", "got num_heads = 0")),
    "num_heads negative": ({"num_heads": -2}, ValueError, ("num_heads must divide", "got num_heads = -2")),
    "num_heads a float": ({"num_heads": 2.0}, TypeError, ("num_heads must be an int", "got float")),
    "num_heads True": ({"num_heads": True}, TypeError, ("num_heads must be an int", "got bool")),
    "q_weight None": ({"q_weight": None}, TypeError, ("q_weight must be a torch.Tensor", "NoneType")),
    "q_weight 1-D": ({"q_weight": _ones(C)}, ValueError, ("q_weight must have shape (H d, C)", "got (6,)")),
    "q_weight without rows": ({"q_weight": _ones(0, C)}, ValueError, ("q_weight must have shape", "got (0, 6)")),
    "q_weight float16": ({"q_weight": _half(INNER, C)}, TypeError, ("q_weight must have dtype", "got torch.float16")),
    "q_weight integer": ({"q_weight": _ints(INNER, C)}, TypeError, ("q_weight must have dtype", "got torch.int64")),
    "q_bias of C": ({"q_bias": _ones(C)}, ValueError, ("q_bias must have shape (H d,) = (8,)", "got (6,)")),
    "q_bias a number": ({"q_bias": 0.0}, TypeError, ("q_bias must be a torch.Tensor", "float")),
    "k_weight of other heads": (
        {"k_weight": _ones(INNER + 2, CC)}, ValueError, ("k_weight must have shape (H d, Cc)", "(8, 7)", "got (10, 7)"),
    ),
    "k_weight 3-D": ({"k_weight": _ones(INNER, CC, 1)}, ValueError, ("k_weight must have shape", "got (8, 7, 1)")),
    "k_weight on meta": ({"k_weight": _meta(INNER, CC)}, ValueError, ("k_weight must be on", "got meta")),
    "k_bias 2-D": ({"k_bias": _ones(1, INNER)}, ValueError, ("k_bias must have shape (H d,) = (8,)", "got (1, 8)")),
    "v_weight of other heads": (
        {"v_weight": _ones(INNER - 2, CC)}, ValueError, ("v_weight must have shape (H d, Cc)", "(8, 7)", "got (6, 7)"),
    ),
    "v_weight of another context": (
        {"v_weight": _ones(INNER, CC + 1)}, ValueError, ("v_weight must have shape", "(8, 7)", "got (8, 8)"),
    ),
    "v_bias bfloat16": (
        {"v_bias": _ones(INNER, dtype=torch.bfloat16)}, TypeError, ("v_bias must have dtype", "got torch.bfloat16"),
    ),
    "out_weight transposed": (
        {"out_weight": _ones(INNER, C)}, ValueError, ("out_weight must have shape (C, H d)", "(6, 8)", "got (8, 6)"),
    ),
    "out_weight of other heads": (
        {"out_weight": _ones(C, INNER + 2)}, ValueError, ("out_weight must have shape", "(6, 8)", "got (6, 10)"),
    ),
    "out_bias of H d": ({"out_bias": _ones(INNER)}, ValueError, ("out_bias must have shape (C,) = (6,)", "got (8,)")),
    "out_bias on meta": ({"out_bias": _meta(C)}, ValueError, ("out_bias must be on", "got meta")),
    "weight nan": ({"weight": math.nan}, ValueError, ("weight must be finite", "got nan")),
    "weight inf": ({"weight": -math.inf}, ValueError, ("weight must be finite", "got -inf")),
    "weight None": ({"weight": None}, TypeError, ("weight must be a Python number", "NoneType")),
    "weight of H": ({"weight": _ones(HEADS)}, ValueError, ("weight must be a number", "(C,) = (6,)", "got (2,)")),
    "weight (C, 1)": ({"weight": _ones(C, 1)}, ValueError, ("weight", "got (6, 1)")),
    "weight empty": ({"weight": _ones(0)}, ValueError, ("weight", "got (0,)")),
    "weight integer": ({"weight": _ints(C)}, TypeError, ("weight must have dtype", "got torch.int64")),
    "weight on meta": ({"weight": _meta(C)}, ValueError, (f"weight must be on {DEVICE}", "got meta")),
    "eps negative": ({"eps": -1e-6}, ValueError, ("eps must be at least 0", "got -1e-06")),
    "eps nan": ({"eps": math.nan}, ValueError, ("eps must be finite", "got nan")),
    "eps a tensor": ({"eps": _ones()}, TypeError, ("eps must be a Python number", "got Tensor")),
    "mask of another T": (
        {"key_padding_mask": _mask(B, T + 1)}, ValueError, ("key_padding_mask", "(3 or 1, 5)", "got (3, 6)"),
    ),
    "mask of another batch": (
        {"key_padding_mask": _mask(2, T)}, ValueError, ("key_padding_mask", "(3 or 1, 5)", "got (2, 5)"),
    ),
    "mask 1-D": ({"key_padding_mask": _mask(T)}, ValueError, ("key_padding_mask must have shape", "got (5,)")),
    "mask of attention": (
        {"key_padding_mask": _mask(B, L, T)}, ValueError, ("key_padding_mask must have shape", "got (3, 4, 5)"),
    ),
    "mask float": (
        {"key_padding_mask": _ones(B, T)}, TypeError, ("key_padding_mask must have dtype torch.bool", "torch.float32"),
    ),
    "mask of bytes": (
        {"key_padding_mask": _mask(B, T, dtype=torch.uint8)}, TypeError, ("dtype torch.bool", "got torch.uint8"),
    ),
    "mask a list": ({"key_padding_mask": [False]}, TypeError, ("key_padding_mask must be a torch.Tensor", "list")),
    "mask on meta": (
        {"key_padding_mask": _mask(B, T).to("meta")}, ValueError, ("key_padding_mask must be on", "got meta"),
    ),
    "dropout_p negative": ({"dropout_p": -0.1}, ValueError, ("dropout_p must be in [0, 1)", "got -0.1")),
    "dropout_p 1": ({"dropout_p": 1.0}, ValueError, ("dropout_p must be in [0, 1)", "got 1.0")),
    "dropout_p None": ({"dropout_p": None}, TypeError, ("dropout_p must be a Python number", "got NoneType")),
    "dropout_p 1 in eval": ({"dropout_p": 1.0, "training": False}, ValueError, ("dropout_p must be in [0, 1)",)),
    "seed in plan standard": (
        {"seed": 3, "dropout_p": 0.1, "plan": "standard"}, ValueError, ("seed must be None in plan 'standard'",),
    ),
    "seed float": ({"seed": 0.5} | DROPOUT, TypeError, ("seed must be", "float")),
    "seed beyond 64 bits": ({"seed": 2**63} | DROPOUT, ValueError, ("seed must fit a signed 64-bit", str(2**63))),
    "two seeds": ({"seed": _ints(2)} | DROPOUT, ValueError, ("seed must have one element", "got shape (2,)")),
    "unknown plan": ({"plan": "fast"}, ValueError, ("plan must be one of", "'auto'", *PLANS, "got 'fast'")),
    "unknown backend": ({"backend": "tpu"}, ValueError, ("backend must be one of", "'portable'", "got 'tpu'")),
}  # fmt: skip


def _refused(function, arguments, error, fragments):
    with pytest.raises(error) as caught:
        function(**arguments)
    message = str(caught.value)
    missing = [fragment for fragment in fragments if fragment not in message]
    assert not missing, f"{message!r} does not say {missing}"


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    changes, error, fragments = REFUSALS[case]
    _refused(pyfused.cross_attention_residual, _arguments(**changes), error, fragments)


@pytest.mark.parametrize("weight", [(), (1,), (C,)], ids=str)
@every_plan
def test_the_arguments_that_the_refusals_change_are_served(backend, plan, weight):
    y = pyfused.cross_attention_residual(**_arguments(weight=_ones(*weight)), backend=backend, plan=plan)
    # Equal tokens: every v is 7 + 1, and the output projection adds 8 of them and 1 to x's 1.
    torch.testing.assert_close(y, torch.full_like(y, 1.0 + 8 * 8.0 + 1.0))


@pytest.mark.parametrize("plan", ABSORBED)
@pytest.mark.parametrize("norm_match", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_columns_over_the_kernels_width(dtype, norm_match, plan, monkeypatch):
    """The kernels say how many columns they take; portable, and so auto, takes any."""
    monkeypatch.setattr(backends, "TRITON_REFUSAL", None)
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", True)
    widest = most_columns(dtype, norm_match)
    # One token over: T pads to the next power of two.
    heads, tokens = 3, widest // 4 + 1
    tensors = draw(1, 5, tokens, 18, heads, 4, dtype)
    options = {"num_heads": heads, "norm_match": norm_match, "plan": plan}
    with pytest.raises(ValueError, match="backend 'triton' cannot serve this call") as caught:
        pyfused.cross_attention_residual(**tensors, **options, backend="triton")
    for fragment in (f"plan {plan!r}", f"at most {widest} columns", str(dtype), f"got {2 * widest}"):
        assert fragment in str(caught.value)
    results = check(tensors, "portable", **options)
    if DEVICE == "cpu":
        assert torch.equal(results["output"], pyfused.cross_attention_residual(**tensors, **options))


@pytest.mark.parametrize("plan", PLANS)
def test_explicit_backend_never_falls_back(plan):
    double = {
        name: value.double() if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value
        for name, value in _arguments(plan=plan).items()
    }
    with pytest.raises(RuntimeError, match="backend 'triton' cannot serve") as caught:
        pyfused.cross_attention_residual(**double, backend="triton")
    for name in backends.BACKENDS:
        assert f"{name}: " in str(caught.value), "the reason of every backend is listed"
    assert pyfused.cross_attention_residual(**double).dtype == torch.float64, "auto serves it"


def _projection_arguments(**changes):
    arguments = {
        "o": _ones(B, L, INNER), "weight": _ones(C, INNER), "bias": _ones(C), "residual": _ones(B, L, C),
        "gate": _ones(C),
    }  # fmt: skip
    return arguments | changes


PROJECTION_REFUSALS = {
    "o a list": ({"o": [1.0]}, TypeError, ("o must be a torch.Tensor", "list")),
    "o integer": ({"o": _ints(B, L, INNER)}, TypeError, ("o must have dtype", "got torch.int64")),
    "o 0-D": ({"o": _ones()}, ValueError, ("o must have at least 1 dimension", "got shape ()")),
    "o too wide": ({"o": _ones(B, L, C)}, ValueError, ("o must have shape (..., K)", "(3, 4, 8)", "got (3, 4, 6)")),
    "o on meta": ({"o": _meta(B, L, INNER)}, ValueError, ("must be on meta like o", f"got {DEVICE}")),
    "weight None": ({"weight": None}, TypeError, ("weight must be a torch.Tensor", "NoneType")),
    "weight of a convolution": (
        {"weight": _ones(C, INNER, 1, 1)}, ValueError, ("weight must have shape (C, K)", "got (6, 8, 1, 1)"),
    ),
    "weight transposed": ({"weight": _ones(INNER, C)}, ValueError, ("o must have shape", "got (3, 4, 8)")),
    "weight empty": ({"weight": _ones(0, INNER)}, ValueError, ("weight must have shape (C, K)", "got (0, 8)")),
    "weight float16": ({"weight": _half(C, INNER)}, TypeError, ("weight must have dtype", "got torch.float16")),
    "weight on meta": ({"weight": _meta(C, INNER)}, ValueError, (f"weight must be on {DEVICE} like o", "got meta")),
    "bias of K": ({"bias": _ones(INNER)}, ValueError, ("bias must have shape (C,) = (6,)", "got (8,)")),
    "bias a number": ({"bias": 0.0}, TypeError, ("bias must be a torch.Tensor", "float")),
    "bias integer": ({"bias": _ints(C)}, TypeError, ("bias must have dtype", "got torch.int64")),
    "residual None": ({"residual": None}, TypeError, ("residual must be a torch.Tensor", "NoneType")),
    "residual that broadcasts": (
        {"residual": _ones(1, L, C)}, ValueError, ("residual must have shape (..., C) = (3, 4, 6)", "got (1, 4, 6)"),
    ),
    "residual of K": ({"residual": _ones(B, L, INNER)}, ValueError, ("residual must have shape", "got (3, 4, 8)")),
    "residual integer": ({"residual": _ints(B, L, C)}, TypeError, ("residual must have dtype", "got torch.int64")),
    "residual wider than the sum": (
        {"residual": _ones(B, L, C).double()}, TypeError, ("residual must have dtype", "got torch.float64"),
    ),
    "residual on meta": ({"residual": _meta(B, L, C)}, ValueError, (f"residual must be on {DEVICE}", "got meta")),
    "gate nan": ({"gate": math.nan}, ValueError, ("gate must be finite", "got nan")),
    "gate None": ({"gate": None}, TypeError, ("gate must be a Python number", "NoneType")),
    "gate of K": ({"gate": _ones(INNER)}, ValueError, ("gate must be a number", "(C,) = (6,)", "got (8,)")),
    "gate integer": ({"gate": _ints(C)}, TypeError, ("gate must have dtype", "got torch.int64")),
    "gate on meta": ({"gate": _meta(C)}, ValueError, (f"gate must be on {DEVICE}", "got meta")),
    "skip inf": ({"skip": math.inf}, ValueError, ("skip must be finite", "got inf")),
    "skip a tensor": ({"skip": _ones()}, TypeError, ("skip must be a Python number", "got Tensor")),
    "eps negative": ({"eps": -1.0}, ValueError, ("eps must be at least 0", "got -1.0")),
    "unknown activation": (
        {"activation": "tanh"}, ValueError, ("activation must be one of", *ACTIVATIONS, "got 'tanh'"),
    ),
    "unknown backend": ({"backend": "tpu"}, ValueError, ("backend must be one of", "'portable'", "got 'tpu'")),
}  # fmt: skip


@pytest.mark.parametrize("case", PROJECTION_REFUSALS)
def test_projection_refusals(case):
    changes, error, fragments = PROJECTION_REFUSALS[case]
    _refused(pyfused.projection_residual, _projection_arguments(**changes), error, fragments)


@pytest.mark.parametrize("gate", [(), (1,), (C,)], ids=str)
@every_backend
def test_the_projection_arguments_that_the_refusals_change_are_served(backend, gate):
    reason = backends.refusal(backend, torch.device(DEVICE), torch.float32, "projection_residual")
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    y = pyfused.projection_residual(**_projection_arguments(gate=_ones(*gate)), backend=backend)
    torch.testing.assert_close(y, torch.full_like(y, 1.0 + 8.0 + 1.0))
