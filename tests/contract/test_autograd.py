"""What every operator owes autograd."""

from __future__ import annotations

import pytest
import torch
from operator_cases import COTANGENTS, DEVICE, FAST, RawCalls, leaves_of, plain_dtype
from operators import (
    OPERATORS,
    call,
    close,
    every_backend_of_it,
    every_call,
    every_portable_call,
    every_variant,
    given,
    raw_calls,
    some_variants,
    variant_of,
)
from oracle import cotangent
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint


def _step(function, tensors, dy=cotangent, requiring=None):
    """y, and the gradients of what requires grad by name."""
    leaves = leaves_of(tensors, requiring)
    y = function(**leaves)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    return y, dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy(y)), strict=True))


@some_variants
def test_opcheck(operator, backend, plan, variant):
    for op, arguments in raw_calls(*variant_of(operator, backend, plan, variant)):
        # What is compiled holds no kernel: one backend's traces stand for all.
        wanted = {} if backend in FAST else {"test_utils": ("test_schema", "test_faketensor")}
        opcheck(op, tuple(arguments), **wanted)


def _needs(op, arguments) -> list[int]:
    return [i for i, argument in enumerate(op._schema.arguments) if argument.name.startswith("need_") and arguments[i]]


@some_variants
def test_each_gradient_alone_is_what_it_is_with_the_others(operator, backend, plan, variant):
    *_, (op, arguments) = raw_calls(*variant_of(operator, backend, plan, variant))
    together = op(*arguments)
    made = set()
    for asked in _needs(op, arguments):
        alone = [i == asked if i in _needs(op, arguments) else value for i, value in enumerate(arguments)]
        opcheck(op, tuple(alone), test_utils=("test_schema", "test_faketensor"))
        for i, (mine, whole) in enumerate(zip(op(*alone), together, strict=True)):
            if mine.numel():
                torch.testing.assert_close(mine, whole, **close(plain_dtype(backend)))
                made.add(i)
    assert made == {i for i, gradient in enumerate(together) if gradient.numel()}


def _subsets(tensors):
    """Each alone, all but one."""
    names = [name for name, value in tensors.items() if value is not None]
    return [(name,) for name in names], [tuple(n for n in names if n != name) for name in names]


@every_call
def test_what_requires_grad_gets_it_and_nothing_else_does(operator, backend, plan):
    function, tensors = call(operator, backend, plan)
    _, expected = _step(function, tensors)
    alone, others = _subsets(tensors)
    # A kernel that is interpreted or emulated is asked for half of them.
    for subset in (*alone, *(others if backend in FAST else others[:1])):
        leaves = leaves_of(tensors, subset)
        y = function(**leaves)
        y.backward(cotangent(y))
        for name, leaf in leaves.items():
            if leaf is None or name not in subset:
                assert leaf is None or leaf.grad is None, (name, subset)
            else:
                torch.testing.assert_close(leaf.grad, expected[name], **close(plain_dtype(backend)))
                assert leaf.grad.dtype == leaf.dtype


@every_call
@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["linear", "quadratic"])
def test_differentiating_twice_raises(operator, backend, plan, loss):
    function, tensors = call(operator, backend, plan)
    names = [name for name in tensors if tensors[name] is not None]
    # One class of function serves all backends: of kernels that are interpreted or emulated a few gradients do.
    for name in names if backend in FAST else names[::4]:
        leaves = leaves_of(tensors, (name,))
        y = loss(function(**leaves))
        with pytest.raises(RuntimeError, match="no second derivative, which create_graph=True is for"):
            torch.autograd.grad(y, leaves[name], create_graph=True)


@every_portable_call
def test_no_part_of_a_hessian_is_left_out(operator, backend, plan):
    """torch takes a gradient for constant where no node leads from it to what it is differentiated by."""
    function, tensors = call(operator, backend, plan)
    name, first = next(iter(tensors.items()))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.hessian(lambda value: function(**(tensors | {name: value})).sum(), first)


@every_call
def test_a_tangent_is_refused(operator, backend, plan):
    function, tensors = call(operator, backend, plan)
    name, first = next(iter(tensors.items()))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"{name}.* has a tangent, but there is no forward"):
        function(**(tensors | {name: forward_ad.make_dual(first, torch.ones_like(first))}))


@every_call
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_equals_no_checkpointing(operator, backend, plan, use_reentrant):
    row = OPERATORS[operator]
    function, tensors = call(operator, backend, plan, **({"dropout_p": 0.4} if "dropout_p" in row.floats else {}))
    names = [name for name, value in tensors.items() if value is not None]

    def checkpointed(**leaves):
        def inner(*values):
            return function(**leaves | dict(zip(names, values, strict=True)))

        return checkpoint(inner, *(leaves[name] for name in names), use_reentrant=use_reentrant)

    runs = []
    for each in (function, checkpointed):
        torch.manual_seed(3)
        leaves = leaves_of(tensors)
        y = each(**leaves)
        y.backward(cotangent(y))
        runs.append((y, *(leaf.grad for leaf in given(leaves))))
    assert all(map(torch.equal, *runs))


@every_call
@pytest.mark.parametrize("dy", [name for name in COTANGENTS if name != "channels_last"])
def test_strided_cotangents(operator, backend, plan, dy):
    function, tensors = call(operator, backend, plan)

    def dense(y):
        return COTANGENTS[dy](y).contiguous()

    for strided, expected in zip(
        _step(function, tensors, COTANGENTS[dy])[1].values(), _step(function, tensors, dense)[1].values(), strict=True
    ):
        torch.testing.assert_close(strided, expected, **close(plain_dtype(backend)))


@every_backend_of_it
def test_batched_cotangents(operator, backend, plan):
    function, tensors = call(operator, backend, plan)
    leaves = leaves_of(tensors)
    y = function(**leaves)
    dys = torch.stack([cotangent(y), 2.0 * cotangent(y)])
    batched = torch.autograd.grad(y, given(leaves), dys, is_grads_batched=True, retain_graph=True)
    for dy, *gradients in zip(dys, *batched, strict=True):
        for gradient, expected in zip(
            gradients, torch.autograd.grad(y, given(leaves), dy, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(gradient, expected, **close(plain_dtype(backend)))


@every_call
def test_same_bits_every_run(operator, backend, plan):
    function, tensors = call(operator, backend, plan)
    first, *others = (_step(function, tensors) for _ in range(3))
    for other in others:
        assert torch.equal(first[0], other[0])
        assert all(torch.equal(first[1][name], other[1][name]) for name in first[1])


@every_variant
def test_outputs_share_no_memory(operator, backend, plan, variant):
    calls = raw_calls(*variant_of(operator, backend, plan, variant))
    outputs = [value for op, arguments in calls for value in op(*arguments)]
    storages = [value.untyped_storage().data_ptr() for value in outputs if value.numel()]
    inputs = [value for _, arguments in calls for value in arguments if isinstance(value, torch.Tensor)]
    assert len(set(storages)) == len(storages)
    assert not set(storages) & {value.untyped_storage().data_ptr() for value in inputs}


@every_variant
def test_the_output_may_be_changed_in_place(operator, backend, plan, variant):
    function, tensors = variant_of(operator, backend, plan, variant)
    changed = _step(lambda **leaves: function(**leaves).mul_(2.0).relu_(), tensors)
    expected = _step(lambda **leaves: function(**leaves).mul(2.0).relu(), tensors)
    assert torch.equal(changed[0], expected[0])
    assert all(torch.equal(changed[1][name], expected[1][name]) for name in expected[1])
    with torch.no_grad():
        assert torch.equal(function(**tensors).mul_(2.0).relu_(), expected[0])


@every_call
def test_what_is_saved_must_not_change_and_the_rest_may(operator, backend, plan):
    function, tensors = call(operator, backend, plan)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        leaves = leaves_of(tensors)
        function(**leaves)
    kept = {tensor.untyped_storage().data_ptr() for tensor in saved}
    _, expected = _step(function, tensors)
    for name in leaves:
        if leaves[name] is None:
            continue
        again = leaves_of(tensors)
        middle = again[name] * 1.0
        y = function(**(again | {name: middle}))
        with torch.no_grad():
            middle.add_(1.0)
        if leaves[name].untyped_storage().data_ptr() in kept:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(y, given(again), cotangent(y))
        else:
            for gradient, right in zip(
                torch.autograd.grad(y, given(again), cotangent(y)), expected.values(), strict=True
            ):
                assert torch.equal(gradient, right), name


@every_call
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_nothing_is_saved_without_grad(operator, backend, plan, mode):
    function, tensors = call(operator, backend, plan)
    # With grad mode on nothing requires grad.
    leaves, saved = leaves_of(tensors, () if mode is torch.enable_grad else None), []
    with mode(), RawCalls() as recorded, torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        y = function(**leaves)
    assert not y.requires_grad
    assert not saved
    assert [arguments["save"] for _, arguments in recorded.calls] == [False]


@every_call
def test_raw_operators_drop_no_gradient(operator, backend, plan):
    """Forward has its derivative, as an exported program needs it; backward has none and says so."""
    function, tensors = call(operator, backend, plan)
    (forward, given_forward), (backward, given_backward) = raw_calls(function, tensors)
    save = [argument.name for argument in forward._schema.arguments].index("save")
    given_forward[save] = False
    for i, value in enumerate(given_forward):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            leaf = value.clone().requires_grad_()
            y, _ = forward(*given_forward[:i], leaf, *given_forward[i + 1 :])
            (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
            assert gradient.isfinite().all()
    for i, (value, argument) in enumerate(zip(given_backward, backward._schema.arguments, strict=True)):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            requiring = (*given_backward[:i], value.clone().requires_grad_(), *given_backward[i + 1 :])
            with pytest.raises(RuntimeError, match=f"{argument.name} requires grad"):
                backward(*requiring)
            with torch.no_grad():
                backward(*requiring)


@every_call
def test_the_raw_forwards_gradient_is_the_functions(operator, backend, plan):
    function, tensors = call(operator, backend, plan)
    (forward, arguments), _ = raw_calls(function, tensors)
    name = next(name for name, value in tensors.items() if value is not None)
    _, expected = _step(function, tensors, requiring=(name,))
    save = [argument.name for argument in forward._schema.arguments].index("save")
    leaf = arguments[0].clone().requires_grad_()
    y, _ = forward(leaf, *arguments[1:save], False, *arguments[save + 1 :])
    (gradient,) = torch.autograd.grad(y, leaf, cotangent(function(**tensors)).reshape(y.shape))
    if "standard" not in operator:
        torch.testing.assert_close(
            gradient.reshape(expected[name].shape), expected[name], **close(plain_dtype(backend))
        )


@every_call
def test_backward_under_autocast_keeps_the_forwards_precision(operator, backend, plan):
    function, tensors = call(operator, backend, plan)

    def gradients(enabled):
        leaves = leaves_of(tensors)
        y = function(**leaves)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            return torch.autograd.grad(y, given(leaves), cotangent(y))

    if "standard" in operator:
        pytest.skip("torch's own attention is autocast's to judge")
    # Of a cross-attention the rows' alone: the context's goes on through torch's own products.
    most = 1 if "cross_attention" in operator else None
    assert all(map(torch.equal, gradients(True)[:most], gradients(False)[:most]))
