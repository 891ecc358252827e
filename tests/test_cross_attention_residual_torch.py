"""``cross_attention_residual`` inside torch: autograd, raw operators, compilation, checkpointing, autocast."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from cross_attention_cases import ABSORBED, NAMES, draw, every_absorbed_plan, every_plan, every_raw_plan, padding
from operator_cases import DEVICE, RawCalls, autocast, every_backend, fresh_compiler, leaves_of, plain_dtype, run, seed
from oracle import cotangent, randn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import pyfused
from pyfused import reference
from pyfused.ops.attention import PROJECTIONS
from pyfused.ops.cross_attention_residual import PLANS

# Each alone, all but one, all.
SUBSETS = [subset for size in (1, 10, 11) for subset in itertools.combinations(NAMES, size)]
KEYS = {"context", "q_weight", "k_weight", "k_bias"}
VALUES = {"context", "v_weight", "v_bias", "out_weight", "out_bias", "weight"}


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda subset: "+".join(subset) if len(subset) == 1 else None)
@every_plan
def test_what_requires_grad_gets_it_and_costs_alone(backend, plan, subset):
    subset, index = set(subset), SUBSETS.index(subset)
    norm_match, p = bool(index % 2), 0.3 if plan in ABSORBED and index % 3 else 0.0
    tensors = draw(2, 13, 4, 6, 2, 5, context_channels=7, weight=("scalar", "channels")[index // 2 % 2])
    options = {"num_heads": 2, "norm_match": norm_match, "dropout_p": p} | ({"seed": seed()} if p else {})
    expected = dict(zip(NAMES, run(reference.cross_attention_residual, tensors, **options)[1:], strict=True))
    leaves, saved = leaves_of(tensors, subset), []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with RawCalls() as raw:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = pyfused.cross_attention_residual(**leaves, **options, backend=backend, plan=plan)
        y.backward(cotangent(y))
    for name, leaf in leaves.items():
        if name in subset:
            torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-4, atol=1e-5)
        else:
            assert leaf.grad is None, name
    if plan == "standard":
        return
    (_, forward), (_, backward) = raw.calls
    assert forward["save"] is (plan == "absorbed")
    assert backward["need_dx"] is ("x" in subset)
    assert backward["need_keys"] is bool(subset & (KEYS | {"q_bias"}))
    assert backward["need_values"] is bool(subset & VALUES)
    # Only what has rows has 13 as a factor: x where dE, the norm or the probabilities ask for it, and p.
    rows = {tensor.data_ptr(): tensor.nbytes for tensor in saved if tensor.numel() % 13 == 0}
    keeps_x = plan == "absorbed_recompute" or norm_match or bool(subset & KEYS)
    assert (leaves["x"].data_ptr() in rows) is keeps_x
    assert sum(rows.values()) == 2 * 13 * 4 * (6 * keeps_x + 2 * 4 * (plan == "absorbed"))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@every_plan
def test_nothing_is_saved_without_grad(backend, plan, mode):
    tensors, saved = draw(2, 3, 4, 6, 2, 5), []
    leaves = leaves_of(tensors, () if mode is torch.enable_grad else NAMES)
    with mode(), RawCalls() as raw, torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        y = pyfused.cross_attention_residual(**leaves, num_heads=2, norm_match=True, backend=backend, plan=plan)
    assert not y.requires_grad
    assert not saved
    ((_, forward),) = raw.calls
    assert forward["save"] is False


@pytest.mark.parametrize("norm_match", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_gradcheck(plan, dropout, norm_match):
    absent = ("k_bias", "out_bias") if dropout else ()
    tensors = draw(
        2, 3, 4, 5, 2, 3, torch.float64, context_channels=4, context_batch=1 + dropout, absent=absent,
        weight="scalar" if norm_match else "channels",
    )  # fmt: skip
    given = {name: value for name, value in tensors.items() if value is not None}
    options = {"dropout_p": 0.3, "seed": 3} if dropout and plan in ABSORBED else {}

    def function(*values):
        return pyfused.cross_attention_residual(
            **tensors | dict(zip(given, values, strict=True)), num_heads=2, norm_match=norm_match,
            normalize_context=dropout, key_padding_mask=padding(1, 4), plan=plan, backend="portable", **options,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, tuple(leaves_of(given).values()))


@pytest.mark.parametrize("wrt", ["x", "v_weight"])
@every_plan
def test_double_backward_raises(backend, plan, wrt):
    leaves = leaves_of(draw(2, 3, 4, 6, 2, 5))
    y = pyfused.cross_attention_residual(**leaves, num_heads=2, backend=backend, plan=plan)
    (gradient,) = torch.autograd.grad(y.square().sum(), leaves[wrt], create_graph=True)
    # In plan "standard" torch's own attention may be the first to refuse.
    with pytest.raises(RuntimeError, match=r"differentiate twice|derivative for .* is not implemented"):
        gradient.sum().backward()


@every_plan
def test_the_output_may_be_changed_in_place(backend, plan):
    tensors = draw(2, 3, 4, 6, 2, 5)
    options = {"num_heads": 2, "norm_match": True, "backend": backend, "plan": plan}

    def in_place(**tensors):
        return pyfused.cross_attention_residual(**tensors, **options).mul_(2.0).relu_()

    def out_of_place(**tensors):
        return pyfused.cross_attention_residual(**tensors, **options).mul(2.0).relu()

    for actual, expected in zip(run(in_place, tensors), run(out_of_place, tensors), strict=True):
        assert torch.equal(actual, expected)


@every_plan
def test_a_saved_tensor_changed_in_place_is_noticed(backend, plan):
    leaves = leaves_of(draw(2, 3, 4, 6, 2, 5))
    x = leaves["x"] * 1.0
    y = pyfused.cross_attention_residual(**(leaves | {"x": x}), num_heads=2, backend=backend, plan=plan)
    with torch.no_grad():
        x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def _raw(backend, direction):
    return getattr(getattr(torch.ops, f"pyfused_{backend}"), f"cross_attention_residual_{direction}").default


RAW = {
    "plain": {"absent": ("q_bias", "out_bias"), "weight": None},
    "all": {"norm_match": True, "dropout_p": 0.3, "mask": True},
    "shared context": {"context_batch": 1, "weight": "scalar", "mask": True},
    "bfloat16, matched": {"dtype": torch.bfloat16, "norm_match": True, "context_batch": 1},
}


def _raw_arguments(backend, plan, *, mask=False, norm_match=False, dropout_p=0.0, **drawn):
    """Arguments of both raw operators, as the public function makes them."""
    drawn = {"dtype": plain_dtype(backend), **drawn}
    with RawCalls() as raw:
        run(
            pyfused.cross_attention_residual, draw(2, 3, 4, 6, 3, 5, **drawn), num_heads=3, norm_match=norm_match,
            dropout_p=dropout_p, key_padding_mask=padding(2, 4) if mask else None, backend=backend, plan=plan,
        )  # fmt: skip
    (_, forward), (_, backward) = raw.calls
    return [
        [value.detach() if isinstance(value, torch.Tensor) else value for value in call.values()]
        for call in (forward, backward)
    ]


@pytest.mark.parametrize("case", RAW)
@every_raw_plan
def test_opcheck(backend, plan, case):
    forward, backward = _raw_arguments(backend, plan, **RAW[case])
    opcheck(_raw(backend, "fwd"), tuple(forward))
    opcheck(_raw(backend, "bwd"), tuple(backward))


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3))[:-1], ids=str)
@every_backend
def test_opcheck_backward_of_some(backend, needs):
    _, backward = _raw_arguments(backend, ABSORBED[sum(needs) % 2], **RAW["all"])
    opcheck(_raw(backend, "bwd"), (*backward[:-3], *needs))


@pytest.mark.parametrize("case", RAW)
@every_raw_plan
def test_each_gradient_alone_is_what_it_is_with_the_others(backend, plan, case):
    _, backward = _raw_arguments(backend, plan, **RAW[case])
    op = _raw(backend, "bwd")
    together = op(*backward)
    for i, mine in enumerate(((0,), (1, 2), (3, 4, 5))):
        needs = [False, False, False]
        needs[i] = True
        for j, gradient in enumerate(op(*backward[:-3], *needs)):
            if j in mine:
                assert torch.equal(gradient, together[j])
            else:
                assert gradient.numel() == 0
    if plan == "absorbed" and not RAW[case].get("norm_match"):
        # The Function passes no x where no wanted gradient reads it.
        dy, _, *rest = backward
        dx, _, _, *values = op(dy, None, *rest[:-3], True, False, True)
        for actual, expected in zip((dx, *values), (together[0], *together[3:]), strict=True):
            assert torch.equal(actual, expected)


@every_backend
def test_raw_operators_refuse_to_drop_a_gradient(backend):
    for direction, arguments in zip(("fwd", "bwd"), _raw_arguments(backend, "absorbed", **RAW["all"]), strict=True):
        op = _raw(backend, direction)
        for i, (value, argument) in enumerate(zip(arguments, op._schema.arguments, strict=True)):
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                continue
            requiring = (*arguments[:i], value.detach().requires_grad_(), *arguments[i + 1 :])
            with pytest.raises(RuntimeError, match=f"{argument.name} requires grad"):
                op(*requiring)
            with torch.no_grad():
                op(*requiring)


@pytest.mark.parametrize("case", RAW)
@every_raw_plan
def test_outputs_share_no_memory(backend, plan, case):
    calls = _raw_arguments(backend, plan, **RAW[case])
    outputs = [value for op, call in zip(("fwd", "bwd"), calls, strict=True) for value in _raw(backend, op)(*call)]
    storages = [value.untyped_storage().data_ptr() for value in outputs if value.numel()]
    inputs = [value for call in calls for value in call if isinstance(value, torch.Tensor)]
    assert len(set(storages)) == len(storages)
    assert not set(storages) & {value.untyped_storage().data_ptr() for value in inputs}


@pytest.mark.parametrize("plan", PLANS)
def test_meta_tensors_give_shapes(plan):
    tensors = draw(2, 3, 4, 6, 2, 5, torch.bfloat16, device="meta")
    y = pyfused.cross_attention_residual(**tensors, num_heads=2, norm_match=True, dropout_p=0.1, plan=plan)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 3, 6), torch.bfloat16)


@pytest.mark.parametrize(
    ("compiler", "context_batch", "norm_match"),
    [("aot_eager", 1, False), ("aot_eager", 2, True), ("inductor", 1, True)],
)
@every_plan
def test_compiled_equals_eager(backend, plan, compiler, context_batch, norm_match):
    tensors = draw(2, 5, 3, 6, 2, 5, context_batch=context_batch)
    options = {"dropout_p": 0.3, "seed": 5} if plan in ABSORBED else {}
    function = functools.partial(
        pyfused.cross_attention_residual, num_heads=2, norm_match=norm_match, normalize_context=True,
        key_padding_mask=padding(2, 3), plan=plan, backend=backend, **options,
    )  # fmt: skip
    compiled = torch.compile(function, fullgraph=True, backend=fresh_compiler(compiler))
    for actual, expected in zip(run(compiled, tensors), run(function, tensors), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert actual.stride() == expected.stride()


@every_absorbed_plan
def test_compiled_draws_one_mask_for_both_directions(backend, plan):
    """Under one mask the branch is linear in v: it equals its own derivative along v."""
    tensors = draw(2, 30, 5, 6, 2, 5, absent=("v_bias", "out_bias"))

    @torch.compile(fullgraph=True, backend=fresh_compiler("aot_eager"))
    def dropped(**tensors):
        return pyfused.cross_attention_residual(**tensors, num_heads=2, dropout_p=0.5, plan=plan, backend=backend)

    ys = []
    for _ in range(2):
        leaves = leaves_of(tensors, ("v_weight",))
        y = dropped(**leaves)
        dy = cotangent(y)
        (gradient,) = torch.autograd.grad(y, leaves["v_weight"], dy)
        torch.testing.assert_close((gradient * tensors["v_weight"]).sum(), (dy * (y - tensors["x"])).sum())
        ys.append(y.detach())
    assert not torch.equal(*ys)


@pytest.mark.parametrize(("backend", "plan"), [*every_plan.args[1], ("portable", "auto")])
def test_dynamic_lengths_do_not_recompile(backend, plan):
    counter = CompileCounterWithBackend(fresh_compiler("aot_eager"))
    function = functools.partial(
        pyfused.cross_attention_residual, num_heads=2, norm_match=True, plan=plan, backend=backend
    )
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for length in (40, 50, 60, 73):
        tensors = draw(2, length, 3, 20, 2, 24, context_batch=1)
        for actual, expected in zip(run(compiled, tensors), run(function, tensors), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    # The first length is compiled as a constant; the second finds that it changes.
    assert counter.frame_count <= 2


@pytest.mark.parametrize("use_reentrant", [True, False])
@every_plan
def test_checkpointing_equals_no_checkpointing(backend, plan, use_reentrant):
    tensors = draw(2, 9, 4, 20, 2, 8)

    def two_layers(**tensors):
        layer = functools.partial(
            pyfused.cross_attention_residual, num_heads=2, dropout_p=0.4, norm_match=True, backend=backend, plan=plan
        )
        return layer(**(tensors | {"x": layer(**tensors)}))

    def checkpointed(**tensors):
        def function(*values):
            return two_layers(**dict(zip(tensors, values, strict=True)))

        return checkpoint(function, *tensors.values(), use_reentrant=use_reentrant)

    runs = []
    for function in (two_layers, checkpointed):
        torch.manual_seed(3)
        runs.append(run(function, tensors))
    for plain, again in zip(*runs, strict=True):
        assert torch.equal(plain, again)


@every_plan
def test_autocast_casts_the_branch_and_not_x(backend, plan):
    tensors = draw(2, 33, 4, 20, 2, 8)
    function = functools.partial(
        pyfused.cross_attention_residual, num_heads=2, norm_match=True, backend=backend, plan=plan
    )
    ours = run(autocast(function, torch.bfloat16), tensors)
    assert {value.dtype for value in ours} == {torch.float32}, "x is the residual stream, the rest parameters"
    exact = {name: value.double() for name, value in tensors.items()}
    expected = run(functools.partial(reference.cross_attention_residual, num_heads=2, norm_match=True), exact)
    for name, actual, value in zip(("y", *NAMES), ours, expected, strict=True):
        if name != "k_bias":
            assert (actual - value).norm() < 0.03 * value.norm(), name
    assert not torch.equal(ours[0], run(function, tensors)[0])
    zero = tensors | {"weight": torch.zeros_like(tensors["weight"])}
    assert torch.equal(autocast(function, torch.bfloat16)(**zero), tensors["x"]), "x's part of the sum is exact"


def test_autocast_takes_parameters_of_other_dtypes_and_leaves_float64_alone():
    tensors = draw(2, 3, 4, 6, 2, 5, torch.float64)
    y = autocast(pyfused.cross_attention_residual, torch.bfloat16)(**tensors, num_heads=2, backend="portable")
    torch.testing.assert_close(y, reference.cross_attention_residual(**tensors, num_heads=2))
    tensors = {name: value.float() for name, value in tensors.items()}
    tensors |= {"x": tensors["x"].half(), "context": tensors["context"].bfloat16()}
    y = autocast(pyfused.cross_attention_residual, torch.bfloat16)(**tensors, num_heads=2, backend="portable")
    assert y.dtype == torch.float16


@every_plan
def test_backward_under_autocast_keeps_the_forwards_precision(backend, plan):
    tensors = draw(2, 37, 4, 18, 2, 8)

    def gradients(enabled: bool) -> list[torch.Tensor]:
        leaves = leaves_of(tensors)
        y = pyfused.cross_attention_residual(**leaves, num_heads=2, norm_match=True, backend=backend, plan=plan)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            core = torch.autograd.grad(y, [leaves["x"], leaves["weight"]], randn(*y.shape, seed=8, device=DEVICE))
        return list(core)

    if plan == "standard":
        pytest.skip("x and the context meet torch's own operators there")
    for inside, outside in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(inside, outside)


@pytest.mark.parametrize("learned", [True, False])
@every_plan
def test_float16_under_a_float32_stream_survives_a_scaled_loss(backend, plan, learned):
    """|dy| beyond float16, w small: what is made of them is inside."""
    tensors = draw(2, 20, 4, 18, 2, 8)
    tensors["weight"] = torch.full((18,), 1e-5, device=DEVICE)
    names = [name for name in NAMES if name != "k_bias" and (learned or name != "weight")]

    def gradients(function, tensors):
        leaves = leaves_of(tensors, names)
        y = function(**leaves, num_heads=2)
        dy = 1e5 * randn(*y.shape, dtype=y.dtype, seed=5, device=DEVICE)
        return torch.autograd.grad(y, [leaves[name] for name in names], dy)

    ours = functools.partial(pyfused.cross_attention_residual, backend=backend, plan=plan)
    actual = gradients(autocast(ours, torch.float16), tensors)
    doubles = {name: value.double() for name, value in tensors.items()}
    for name, value, exact in zip(names, actual, gradients(reference.cross_attention_residual, doubles), strict=True):
        assert (value - exact).norm() < 1e-2 * exact.norm(), name


@every_absorbed_plan
def test_forward_mode_raises(backend, plan):
    tensors = draw(2, 3, 4, 6, 2, 5)
    x = tensors.pop("x")

    def function(x):
        return pyfused.cross_attention_residual(x, **tensors, num_heads=2, backend=backend, plan=plan)

    with pytest.raises(RuntimeError, match="x has a tangent, but there is no forward-mode derivative"):
        torch.func.jvp(function, (x,), (x,))


def test_a_frozen_context_costs_backward_nothing():
    """Only x requires grad: autograd keeps no product of the context, and backward makes dx alone."""
    leaves = leaves_of(draw(2, 13, 4, 6, 2, 5), ("x",))
    with RawCalls() as raw:
        y = pyfused.cross_attention_residual(**leaves, num_heads=2, plan="absorbed")
        y.sum().backward()
    _, (_, backward) = raw.calls
    assert backward["x"] is None
    assert (backward["need_dx"], backward["need_keys"], backward["need_values"]) == (True, False, False)
    assert all(leaves[name].grad is None for name in PROJECTIONS)
