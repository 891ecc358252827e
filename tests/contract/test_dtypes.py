"""Every dtype that a docstring promises works on every backend that does not refuse it by name; no other is taken."""

from __future__ import annotations

import pytest
import torch
from operator_cases import DEVICE, leaves_of
from operators import OPERATORS, close, every_backend_of_it, function_of, given
from oracle import cotangent

import pyfused
from pyfused.choice import backends
from pyfused.ops.prepared_context import PROJECTIONS

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OTHERS = (torch.int64, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn)


def _own(base):
    return {base}


def _own_or_float32(base):
    return {base} if base == torch.float64 else {base, torch.float32}


def _stream(base):
    return set(FLOATING) if base == torch.float64 else set(FLOATING[1:])


def _any(base):
    return set(FLOATING)


# Operator -> argument -> the dtypes that its docstring promises beside a first argument of dtype ``base``.
PROMISED = {
    "lora_linear": {"weight": _own, "bias": _own, "lora_a": _own_or_float32, "lora_b": _own_or_float32},
    "adapter_residual": {
        **dict.fromkeys(("down_weight", "down_bias", "up_weight", "up_bias"), _own_or_float32),
        "residual": _stream,
        "layer_scale": _any,
        "sample_scale": _any,
    },
    "cross_attention_residual": {"context": _own, **dict.fromkeys(PROJECTIONS, _own_or_float32), "weight": _any},
    "projection_residual": {"weight": _own_or_float32, "bias": _own_or_float32, "residual": _stream, "gate": _any},
}


def _draw(operator, base):
    tensors = OPERATORS[operator].draw(base)
    if "residual" in tensors:
        tensors["residual"] = tensors["residual"].to(base)
    if OPERATORS[operator].name == "adapter_residual":
        tensors["sample_scale"] = torch.tensor([0.0, 1.25], device=DEVICE)
    return tensors


@every_backend_of_it
@pytest.mark.parametrize("base", FLOATING, ids=str)
def test_what_is_promised_works(operator, backend, plan, base):
    row, function = OPERATORS[operator], function_of(operator, backend, plan)
    if backend != "portable" and base not in backends.KERNEL_DTYPES[backend]:
        with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot serve {base} tensors"):
            function(**_draw(operator, base))
        return
    for argument, promised in PROMISED[row.name].items():
        for dtype in promised(base):
            tensors = _draw(operator, base)
            tensors[argument] = tensors[argument].to(dtype)
            leaves = leaves_of(tensors, [name for name in tensors if name != "sample_scale"])
            y = function(**leaves)
            expected = row.reference(**{name: value.double() for name, value in tensors.items()})
            torch.testing.assert_close(y.double(), expected, **close(torch.float16))
            wanted = [leaf for leaf in given(leaves) if leaf.requires_grad]
            for leaf, gradient in zip(wanted, torch.autograd.grad(y, wanted, cotangent(y)), strict=True):
                assert gradient.dtype == leaf.dtype, (argument, dtype)
                assert gradient.isfinite().all(), (argument, dtype)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("base", [torch.float32, torch.float16], ids=str)
def test_nothing_else_is_taken(operator, base):
    row, function = OPERATORS[operator], function_of(operator, "portable", OPERATORS[operator].plans["portable"][0])
    first = next(iter(_draw(operator, base)))
    for argument, promised in {first: _any, **PROMISED[row.name]}.items():
        for dtype in {*FLOATING, *OTHERS} - promised(base):
            tensors = _draw(operator, base)
            tensors[argument] = torch.zeros(tensors[argument].shape, dtype=dtype, device=DEVICE)
            with pytest.raises(TypeError, match=f"{row.name}: {argument} must have dtype .*, got {dtype}"):
                function(**tensors)


LAYOUTS = {
    "sparse": lambda x: x.to_sparse(),
    "CSR": lambda x: x.reshape(-1, x.shape[-1]).to_sparse_csr(),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "jagged": lambda x: torch.nested.nested_tensor([x.reshape(-1, x.shape[-1])] * 2, layout=torch.jagged),
}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore")
def test_only_dense_tensors_are_taken(operator, layout):
    row, function = OPERATORS[operator], function_of(operator, "portable", OPERATORS[operator].plans["portable"][0])
    for argument, value in row.draw(torch.float32).items():
        if layout == "mkldnn" and (DEVICE != "cpu" or not torch.backends.mkldnn.is_available()):
            pytest.skip("mkldnn's tensors are a CPU's")
        if value is None or (layout == "CSR" and value.dim() < 2):
            continue
        tensors = row.draw(torch.float32) | {argument: LAYOUTS[layout](value)}
        with pytest.raises(TypeError, match=f"{row.name}: {argument} must be a dense tensor, of layout torch.strided"):
            function(**tensors)


FLAGS = {
    "lora_linear": ("training",),
    "adapter_residual": ("training",),
    "cross_attention_residual": ("training", "norm_match", "normalize_context"),
    "projection_residual": ("norm_match",),
}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("value", ["no", 1, 0.0, None, torch.tensor(True)], ids=repr)
def test_flags_are_bools(operator, value):
    row = OPERATORS[operator]
    function = function_of(operator, "portable", row.plans["portable"][0])
    for flag in FLAGS[row.name]:
        with pytest.raises(TypeError, match=f"{row.name}: {flag} must be a bool, got "):
            function(**row.draw(torch.float32), **{flag: value})


@pytest.mark.parametrize("operator", ["lora_linear", "adapter_residual"])
@pytest.mark.parametrize("value", [1.0, True, "1", 0, 2, None], ids=repr)
def test_channel_dim_is_one_of_two_ints(operator, value):
    with pytest.raises(ValueError, match=rf"{operator}: channel_dim must be one of \(-1, 1\), got {value!r}"):
        getattr(pyfused, operator)(**OPERATORS[operator].draw(torch.float32), channel_dim=value)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39, 10**400], ids=str)
def test_numbers_are_finite_in_float32(operator, value):
    row = OPERATORS[operator]
    for setting in row.floats:
        tensors = {name: tensor for name, tensor in row.draw(torch.float32).items() if name != setting}
        function = function_of(operator, "portable", row.plans["portable"][0], **{setting: value})
        with pytest.raises(ValueError, match=f"{row.name}: {setting} must be finite"):
            function(**tensors)
