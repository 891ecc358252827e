"""What every operator owes ``torch.compile``, fake tensors, export and the other ways to trace.

To a tracer the raw operators of all backends are alike: what is not about their fake tensors is asked of one.
"""

from __future__ import annotations

import functools
import io

import adapter_residual_cases
import lora_linear_cases
import pytest
import torch
from operator_cases import fresh_compiler, leaves_of, plain_dtype
from operators import (
    OPERATORS,
    call,
    close,
    every_backend_of_it,
    every_portable_call,
    given,
    some_variants,
    variant_of,
)
from oracle import cotangent
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import pyfused


def _assert_alike(compiled, function, tensors, dtype):
    results = []
    for each in (compiled, function):
        leaves = leaves_of(tensors)
        y = each(**leaves)
        results.append((y, *torch.autograd.grad(y, given(leaves), cotangent(y))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **close(dtype))
        assert actual.stride() == expected.stride()


@some_variants
def test_compiled_equals_eager(operator, backend, plan, variant):
    function, tensors = variant_of(operator, backend, plan, variant)
    compiled = torch.compile(function, fullgraph=True, backend=fresh_compiler("aot_eager"))
    _assert_alike(compiled, function, tensors, plain_dtype(backend))


@every_portable_call
def test_inductor_equals_eager(operator, backend, plan):
    function, tensors = call(operator, backend, plan)
    compiled = torch.compile(function, fullgraph=True, backend=fresh_compiler("inductor"))
    _assert_alike(compiled, function, tensors, plain_dtype(backend))


@every_portable_call
def test_dynamic_rows_do_not_recompile(operator, backend, plan):
    function, _ = call(operator, backend, plan)
    counter = CompileCounterWithBackend(fresh_compiler("aot_eager"))
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for rows in (5, 6, 9, 13):
        _assert_alike(compiled, function, OPERATORS[operator].rows(rows, plain_dtype(backend)), plain_dtype(backend))
    # The first number of rows is compiled as a constant; the second finds that it changes.
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("function", "draw"),
    [
        (pyfused.lora_linear, lambda shape: lora_linear_cases.draw(shape, 7, 3, channel_dim=1)),
        (pyfused.adapter_residual, lambda shape: adapter_residual_cases.draw(shape, 5, channel_dim=1)),
    ],
    ids=["lora_linear", "adapter_residual"],
)
def test_images_of_other_sizes_do_not_recompile(function, draw):
    counter = CompileCounterWithBackend(fresh_compiler("aot_eager"))
    by_channel = functools.partial(function, channel_dim=1)
    compiled = torch.compile(by_channel, fullgraph=True, backend=counter)
    for batch, side in ((2, 4), (3, 5), (4, 7)):
        _assert_alike(compiled, by_channel, draw((batch, 6, side, side + 1)), torch.float32)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(("operator", "backend", "plan"), [("lora_linear", "portable", "blas")])
def test_dynamic_from_the_first_call(operator, backend, plan):
    """Of one operator: to a compiler the others' schemas are no different."""
    function, tensors = call(operator, backend, plan)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=fresh_compiler("aot_eager"))
    _assert_alike(compiled, function, tensors, plain_dtype(backend))


@every_backend_of_it
def test_compiled_draws_one_mask_for_both_directions(operator, backend, plan):
    """Under one mask y is linear in one of the tensors: what it adds is its own derivative along it."""
    row = OPERATORS[operator]
    if row.linear is None:
        pytest.skip("torch's attention draws its mask itself")
    function, tensors = call(operator, backend, plan, dropout_p=0.5)
    tensors |= {name: None for name in ("up_bias", "v_bias", "out_bias") if name in tensors}
    compiled = torch.compile(function, fullgraph=True, backend=fresh_compiler("aot_eager"))
    without = function(**(tensors | {row.linear: torch.zeros_like(tensors[row.linear])}))
    ys = []
    for _ in range(3):
        leaves = leaves_of(tensors, (row.linear,))
        y = compiled(**leaves)
        dy = cotangent(y)
        (gradient,) = torch.autograd.grad(y, leaves[row.linear], dy)
        added, along = (dy * (y - without)).double().sum(), (gradient * tensors[row.linear]).double().sum()
        torch.testing.assert_close(along, added, **close(plain_dtype(backend)))
        ys.append(y.detach())
    assert not (torch.equal(ys[0], ys[1]) and torch.equal(ys[1], ys[2])), "every call draws a mask of its own"


@every_portable_call
def test_compiled_checkpointing_draws_the_mask_again(operator, backend, plan):
    row = OPERATORS[operator]
    function, tensors = call(operator, backend, plan, **({"dropout_p": 0.4} if "dropout_p" in row.floats else {}))
    names = [name for name, value in tensors.items() if value is not None]

    def checkpointed(*values):
        return checkpoint(
            lambda *inner: function(**tensors | dict(zip(names, inner, strict=True))), *values, use_reentrant=False
        )

    compiled = torch.compile(checkpointed, backend=fresh_compiler("aot_eager"))
    runs = []
    for each in (checkpointed, compiled):
        torch.manual_seed(3)
        leaves = leaves_of(tensors)
        y = each(*(leaves[name] for name in names))
        runs.append((y, *torch.autograd.grad(y, given(leaves), cotangent(y))))
    for actual, expected in zip(*runs, strict=True):
        torch.testing.assert_close(actual, expected, **close(plain_dtype(backend)))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: pyfused.lora_linear(x, w, w, w),
        lambda x, w: pyfused.adapter_residual(x, w, None, w, None, residual=x),
        lambda x, w: pyfused.projection_residual(x, w, residual=x, gate=0.5),
        lambda x, w: pyfused.cross_attention_residual(
            x[None], x[None], w, None, w, None, w, None, w, None, num_heads=2
        ),
    ],
    ids=["lora_linear", "adapter_residual", "projection_residual", "cross_attention_residual"],
)
def test_a_tensor_may_be_two_arguments(function):
    x, w = torch.randn(4, 6, requires_grad=True), torch.randn(6, 6, requires_grad=True)
    results = []
    for called in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        y = called(x, w)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, w))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("operator", OPERATORS)
def test_meta_tensors_give_shapes(operator):
    row = OPERATORS[operator]
    for variant in row.variants:
        function, tensors = variant_of(operator, "portable", row.plans["portable"][0], variant)
        expected = function(**tensors)
        keywords = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in function.keywords.items()}
        leaves = leaves_of({n: None if t is None else t.to("meta") for n, t in tensors.items()})
        y = function.func(**(leaves | keywords))
        assert (y.device.type, y.shape, y.dtype) == ("meta", expected.shape, expected.dtype)
        # torch.autocast knows no such device, not even to be switched off there.
        gradients = torch.autograd.grad(y, given(leaves), torch.empty_like(y))
        assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in given(leaves)]


class _Module(nn.Module):
    """The operator on parameters, of one input."""

    def __init__(self, function, tensors):
        super().__init__()
        (self.stream, _), *rest = tensors.items()
        for name, value in rest:
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self.function = function

    def forward(self, x):
        return self.function(**{self.stream: x}, **self._parameters)


def _module(operator, backend, plan):
    function, tensors = call(operator, backend, plan)
    return _Module(function, tensors).eval(), next(iter(tensors.values()))


def _gradients(function, module, x):
    y = function(x)
    return y, torch.autograd.grad(y.square().sum(), list(module.parameters()), allow_unused=True)


@every_portable_call
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_has_its_gradients(operator, backend, plan, strict, grad):
    module, x = _module(operator, backend, plan)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(module, (x,), strict=strict)
    exported = program.module()
    y, expected = _gradients(module, module, x)
    again, gradients = _gradients(exported, exported, x)
    torch.testing.assert_close(again, y)
    by_name = dict(zip((name for name, _ in exported.named_parameters()), gradients, strict=True))
    for (name, _), right in zip(module.named_parameters(), expected, strict=True):
        torch.testing.assert_close(by_name[name], right, **close(plain_dtype(backend)))
    with torch.inference_mode():
        torch.testing.assert_close(exported(x), y)


@every_portable_call
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_a_jit_trace_has_its_gradients(operator, backend, plan, grad):
    module, x = _module(operator, backend, plan)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, (x,))
    y, expected = _gradients(module, module, x)
    again, gradients = _gradients(traced, traced, x)
    torch.testing.assert_close(again, y)
    for gradient, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, right, **close(plain_dtype(backend)))


@every_portable_call
@pytest.mark.filterwarnings("ignore")
def test_onnx_is_refused_by_name(operator, backend, plan):
    module, x = _module(operator, backend, plan)
    with pytest.raises(RuntimeError, match=f"{OPERATORS[operator].name}: ONNX has no such operator.*remove_lora"):
        torch.onnx.export(module, (x,), io.BytesIO(), dynamo=False)


@every_portable_call
@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jacrev", "jacfwd", "vmap", "vmap of grad"])
@pytest.mark.filterwarnings("ignore")
def test_transforms_of_torch_func_are_refused_by_name(operator, backend, plan, transform):
    module, x = _module(operator, backend, plan)

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x,)).float().sum()

    parameters = {name: value.detach() for name, value in module.named_parameters()}
    transforms = {
        "grad": lambda: torch.func.grad(loss)(parameters, x),
        "vjp": lambda: torch.func.vjp(module, x),
        "jvp": lambda: torch.func.jvp(lambda x: loss(parameters, x), (x,), (x,)),
        "jacrev": lambda: torch.func.jacrev(loss)(parameters, x),
        "jacfwd": lambda: torch.func.jacfwd(lambda x: loss(parameters, x))(x),
        "vmap": lambda: torch.func.vmap(module)(torch.stack((x, x))),
        "vmap of grad": lambda: torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(
            parameters, torch.stack((x, x))
        ),
    }
    name = OPERATORS[operator].name
    with pytest.raises(RuntimeError, match=rf"{name}.*(torch\.func|has a tangent, but there is no forward-mode)"):
        transforms[transform]()


@every_portable_call
@pytest.mark.filterwarnings("ignore")
def test_vmap_without_grad_equals_one_by_one(operator, backend, plan):
    module, x = _module(operator, backend, plan)
    with torch.no_grad():
        y = torch.func.vmap(module)(torch.stack((x, 2 * x)))
        torch.testing.assert_close(y, torch.stack((module(x), module(2 * x))), **close(plain_dtype(backend)))
