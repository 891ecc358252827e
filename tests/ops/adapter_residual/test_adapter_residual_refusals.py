"""``adapter_residual`` refuses what it cannot serve: each error names the argument, what was expected and what came."""

from __future__ import annotations

import math

import pytest
import torch
from adapter_residual_cases import check, draw, every_backend, every_plan
from operator_cases import DEVICE, plain_dtype

import pyfused
from pyfused.choice import backends
from pyfused.ops.adapter_residual import ACTIVATIONS, MAX_KERNEL_HIDDEN

B, C, H = 4, 6, 3


def _ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype, device=DEVICE)


def _arguments(**changes):
    arguments = {
        "z": _ones(B, C),
        "down_weight": _ones(H, C),
        "down_bias": _ones(H),
        "up_weight": _ones(C, H),
        "up_bias": _ones(C),
        "residual": _ones(B, C),
        "layer_scale": _ones(C),
        "sample_scale": _ones(B),
    }
    return arguments | changes


def _half(*shape):
    return _ones(*shape, dtype=torch.float16)


def _ints(*shape):
    return _ones(*shape, dtype=torch.int64)


def _meta(*shape):
    return torch.ones(shape, device="meta")


DROPOUT = {"dropout_p": 0.1}
IMAGE = {"residual": None, "sample_scale": None, "channel_dim": 1}
# Changed arguments, exception, and what its message holds: the argument, the expectation, what came.
REFUSALS = {
    "z a list": ({"z": [1.0]}, TypeError, ("z must be a torch.Tensor", "list")),
    "z integer": ({"z": _ints(B, C)}, TypeError, ("z must have dtype", "float32", "got torch.int64")),
    "z complex": ({"z": _ones(B, C) * 1j}, TypeError, ("z must have dtype", "float32", "got torch.complex64")),
    "z 0-D": ({"z": _ones(), "sample_scale": None}, ValueError, ("z must have at least 1 dim", "got shape ()")),
    "z 1-D with samples": ({"z": _ones(C)}, ValueError, ("z must have at least 2 dim", "got shape (6,)")),
    "z too wide": ({"z": _ones(B, C + 1)}, ValueError, ("z must have", "C = 6", "got shape (4, 7)")),
    "z 2-D by channels": (IMAGE, ValueError, ("z must have at least 3 dim", "got shape (4, 6)")),
    "channels elsewhere": (
        {"z": _ones(B, 2, 2, C)} | IMAGE, ValueError, ("C = 6 in dimension 1", "got shape (4, 2, 2, 6)"),
    ),
    "z on meta": ({"z": _meta(B, C)}, ValueError, ("must be on meta like z", f"got {DEVICE}")),
    "channel_dim 0": ({"channel_dim": 0}, ValueError, ("channel_dim must be one of (-1, 1)", "got 0")),
    "channel_dim None": ({"channel_dim": None}, ValueError, ("channel_dim must be one of (-1, 1)", "got None")),
    "down_weight None": ({"down_weight": None}, TypeError, ("down_weight must be a torch.Tensor", "NoneType")),
    "down_weight 1-D": ({"down_weight": _ones(C)}, ValueError, ("down_weight must have shape (h, C)", "got (6,)")),
    "down_weight of a convolution": (
        {"down_weight": _ones(H, C, 1, 1)}, ValueError, ("down_weight must have shape (h, C)", "got (3, 6, 1, 1)"),
    ),
    "down_weight transposed": ({"down_weight": _ones(C, H)}, ValueError, ("z must have", "C = 3", "got shape (4, 6)")),
    "down_weight without rows": (
        {"down_weight": _ones(0, C), "down_bias": _ones(0), "up_weight": _ones(C, 0)},
        ValueError,
        ("down_weight must have shape (h, C)", "got (0, 6)"),
    ),
    "down_weight float16": (
        {"down_weight": _half(H, C)}, TypeError, ("down_weight must have dtype torch.float32", "got torch.float16"),
    ),
    "down_weight integer": (
        {"down_weight": _ints(H, C)}, TypeError, ("down_weight must have dtype torch.float32", "got torch.int64"),
    ),
    "down_weight on meta": (
        {"down_weight": _meta(H, C)}, ValueError, (f"down_weight must be on {DEVICE} like z", "got meta"),
    ),
    "down_bias True": ({"down_bias": True}, TypeError, ("down_bias must be a torch.Tensor", "bool")),
    "down_bias of C": ({"down_bias": _ones(C)}, ValueError, ("down_bias must have shape (h,) = (3,)", "got (6,)")),
    "down_bias float16": ({"down_bias": _half(H)}, TypeError, ("down_bias must have dtype", "torch.float16")),
    "down_bias on meta": ({"down_bias": _meta(H)}, ValueError, (f"down_bias must be on {DEVICE}", "got meta")),
    "up_weight None": ({"up_weight": None}, TypeError, ("up_weight must be a torch.Tensor", "NoneType")),
    "up_weight transposed": (
        {"up_weight": _ones(H, C)}, ValueError, ("up_weight must have shape (C, h) = (6, 3)", "got (3, 6)"),
    ),
    "up_weight of other channels": (
        {"up_weight": _ones(C + 1, H)}, ValueError, ("up_weight must have shape (C, h) = (6, 3)", "got (7, 3)"),
    ),
    "up_weight of another h": ({"up_weight": _ones(C, 4)}, ValueError, ("up_weight", "(C, h) = (6, 3)", "got (6, 4)")),
    "up_weight bfloat16": (
        {"up_weight": _ones(C, H, dtype=torch.bfloat16)}, TypeError, ("up_weight must have dtype", "torch.bfloat16"),
    ),
    "up_weight on meta": ({"up_weight": _meta(C, H)}, ValueError, (f"up_weight must be on {DEVICE}", "got meta")),
    "up_bias a number": ({"up_bias": 0.0}, TypeError, ("up_bias must be a torch.Tensor", "float")),
    "up_bias of h": ({"up_bias": _ones(H)}, ValueError, ("up_bias must have shape (C,) = (6,)", "got (3,)")),
    "up_bias 2-D": ({"up_bias": _ones(1, C)}, ValueError, ("up_bias must have shape (C,) = (6,)", "got (1, 6)")),
    "up_bias integer": ({"up_bias": _ints(C)}, TypeError, ("up_bias must have dtype", "got torch.int64")),
    "up_bias on meta": ({"up_bias": _meta(C)}, ValueError, (f"up_bias must be on {DEVICE}", "got meta")),
    "float64 with float32 adapters": (
        {"z": _ones(B, C).double()}, TypeError, ("down_weight must have dtype torch.float64", "got torch.float32"),
    ),
    "float16 with float64 adapters": (
        {"z": _half(B, C), "down_weight": _ones(H, C).double()},
        TypeError,
        ("down_weight must have dtype torch.float16 or torch.float32", "got torch.float64"),
    ),
    "residual a number": ({"residual": 0.0}, TypeError, ("residual must be a torch.Tensor", "float")),
    "residual that broadcasts": (
        {"residual": _ones(1, C)}, ValueError, ("residual must have shape of z = (4, 6)", "got (1, 6)"),
    ),
    "residual of other channels": (
        {"residual": _ones(B, C + 1)}, ValueError, ("residual must have shape of z = (4, 6)", "got (4, 7)"),
    ),
    "residual integer": ({"residual": _ints(B, C)}, TypeError, ("residual must have dtype", "got torch.int64")),
    "residual on meta": ({"residual": _meta(B, C)}, ValueError, (f"residual must be on {DEVICE}", "got meta")),
    "layer_scale a number": ({"layer_scale": 1.0}, TypeError, ("layer_scale must be a torch.Tensor", "float")),
    "layer_scale of h": ({"layer_scale": _ones(H)}, ValueError, ("layer_scale", "one element", "(C,) = (6,)", "(3,)")),
    "layer_scale (C, 1, 1)": ({"layer_scale": _ones(C, 1, 1)}, ValueError, ("layer_scale", "got (6, 1, 1)")),
    "layer_scale empty": ({"layer_scale": _ones(0)}, ValueError, ("layer_scale", "one element", "got (0,)")),
    "layer_scale integer": ({"layer_scale": _ints(C)}, TypeError, ("layer_scale must have dtype", "got torch.int64")),
    "layer_scale on meta": ({"layer_scale": _meta(C)}, ValueError, (f"layer_scale must be on {DEVICE}", "got meta")),
    "sample_scale a list": ({"sample_scale": [1.0]}, TypeError, ("sample_scale must be a torch.Tensor", "list")),
    "sample_scale too long": (
        {"sample_scale": _ones(B + 1)}, ValueError, ("sample_scale must have shape (B,) = (4,)", "got (5,)"),
    ),
    "sample_scale of one": (
        {"sample_scale": _ones(1)}, ValueError, ("sample_scale must have shape (B,) = (4,)", "got (1,)"),
    ),
    "sample_scale (B, 1)": (
        {"sample_scale": _ones(B, 1)}, ValueError, ("sample_scale must have shape (B,) = (4,)", "got (4, 1)"),
    ),
    "sample_scale requiring grad": (
        {"sample_scale": _ones(B).requires_grad_()}, ValueError, ("sample_scale must not require grad", "detached"),
    ),
    "sample_scale integer": (
        {"sample_scale": _ints(B)}, TypeError, ("sample_scale must have dtype", "got torch.int64"),
    ),
    "sample_scale bool": (
        {"sample_scale": _ones(B) > 0}, TypeError, ("sample_scale must have dtype", "got torch.bool"),
    ),
    "sample_scale on meta": ({"sample_scale": _meta(B)}, ValueError, (f"sample_scale must be on {DEVICE}", "meta")),
    "skip nan": ({"skip": math.nan}, ValueError, ("skip must be finite", "got nan")),
    "skip inf": ({"skip": -math.inf}, ValueError, ("skip must be finite", "got -inf")),
    "skip a tensor": ({"skip": _ones()}, TypeError, ("skip must be a Python number", "got Tensor")),
    "skip None": ({"skip": None}, TypeError, ("skip must be a Python number", "got NoneType")),
    "unknown activation": (
        {"activation": "tanh"}, ValueError, ("activation must be one of", *ACTIVATIONS, "got 'tanh'"),
    ),
    "activation a function": ({"activation": torch.relu}, ValueError, ("activation must be one of", *ACTIVATIONS)),
    "dropout_p negative": ({"dropout_p": -0.1}, ValueError, ("dropout_p must be in [0, 1)", "got -0.1")),
    "dropout_p 1": ({"dropout_p": 1.0}, ValueError, ("dropout_p must be in [0, 1)", "got 1.0")),
    "dropout_p nan": ({"dropout_p": math.nan}, ValueError, ("dropout_p must be finite", "got nan")),
    "dropout_p None": ({"dropout_p": None}, TypeError, ("dropout_p must be a Python number", "got NoneType")),
    "dropout_p 1 in eval": ({"dropout_p": 1.0, "training": False}, ValueError, ("dropout_p must be in [0, 1)",)),
    "seed float": ({"seed": 0.5} | DROPOUT, TypeError, ("seed must be", "float")),
    "seed beyond 64 bits": ({"seed": 2**63} | DROPOUT, ValueError, ("seed must fit a signed 64-bit", str(2**63))),
    "two seeds": ({"seed": _ints(2)} | DROPOUT, ValueError, ("seed must have one element", "got shape (2,)")),
    "seed on meta": ({"seed": _ints(1).to("meta")} | DROPOUT, ValueError, (f"seed must be on {DEVICE}", "got meta")),
    "unknown plan": ({"plan": "fast"}, ValueError, ("plan must be one of", "'auto'", "'recompute'", "got 'fast'")),
    "unknown backend": ({"backend": "tpu"}, ValueError, ("backend must be one of", "'portable'", "got 'tpu'")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    changes, error, fragments = REFUSALS[case]
    with pytest.raises(error) as caught:
        pyfused.adapter_residual(**_arguments(**changes))
    message = str(caught.value)
    missing = [fragment for fragment in fragments if fragment not in message]
    assert not missing, f"{message!r} does not say {missing}"


@pytest.mark.parametrize("scale", [(), (1,), (C,)], ids=str)
@every_plan
def test_the_arguments_that_the_refusals_change_are_served(backend, plan, scale):
    arguments = {name: value.to(plain_dtype(backend)) for name, value in _arguments(layer_scale=_ones(*scale)).items()}
    y = pyfused.adapter_residual(**arguments, backend=backend, plan=plan)
    # gelu(1 * 6 + 1) = 7 in float32, to five digits
    assert y.shape == (B, C)
    torch.testing.assert_close(y, torch.full_like(y, 1.0 + 1.0 + 3 * 7.0 + 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_h_over_the_kernels_width(dtype, monkeypatch):
    """The kernels say which width they take; portable, and so auto, takes any."""
    monkeypatch.setattr(backends, "TRITON_REFUSAL", None)
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", True)
    widest = MAX_KERNEL_HIDDEN[dtype.itemsize]
    assert widest == (128 if dtype == torch.float32 else 512)
    tensors = draw((5, 18), widest + 1, dtype)
    with pytest.raises(ValueError, match="backend 'triton' cannot serve this call") as caught:
        pyfused.adapter_residual(**tensors, backend="triton")
    for fragment in ("adapter_residual: down_weight (h, C)", f"h <= {widest}", str(dtype), f"got h = {widest + 1}"):
        assert fragment in str(caught.value)
    check(tensors, "auto")


def _refused(backend: str, **changes) -> str:
    with pytest.raises(RuntimeError) as caught:
        pyfused.adapter_residual(**_arguments(**changes), backend=backend)
    message = str(caught.value)
    assert f"backend {backend!r} cannot serve" in message
    for name in backends.BACKENDS:
        assert f"{name}: " in message, "the reason of every backend is listed"
    return message


def test_explicit_backend_never_falls_back():
    double = {name: value.double() for name, value in _arguments().items()}
    assert "float64" in _refused("triton", **double)
    assert pyfused.adapter_residual(**double).dtype == torch.float64, "auto serves it"
    if backends.CUDA_REFUSAL is not None:
        assert backends.CUDA_REFUSAL in _refused("cuda")


def test_triton_refuses_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", False)
    monkeypatch.setattr(backends, "TRITON_REFUSAL", None)
    cpu = {name: value.cpu() for name, value in _arguments().items()}
    assert "TRITON_INTERPRET=1" in _refused("triton", **cpu)


@every_backend
def test_a_residual_wider_than_the_sum_is_refused(backend):
    z = torch.randn(3, 4, dtype=plain_dtype(backend))
    weights = torch.randn(2, 4), None, torch.randn(4, 2), None
    with pytest.raises(TypeError, match=r"residual must have dtype .*float32.*, got torch.float64"):
        pyfused.adapter_residual(z, *weights, residual=z.double(), backend=backend)
    y = pyfused.adapter_residual(z.double(), *_double(weights), residual=z.double())
    assert y.dtype == torch.float64


def _double(weights):
    return [None if weight is None else weight.double() for weight in weights]
