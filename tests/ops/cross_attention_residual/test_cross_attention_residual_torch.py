"""``cross_attention_residual`` inside torch: autograd, raw operators, compilation, checkpointing, autocast."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from cross_attention_cases import ABSORBED, NAMES, draw, every_plan, padding
from operator_cases import DEVICE, RawCalls, autocast, leaves_of, run, seed
from oracle import cotangent, randn

import pyfused
from pyfused import reference
from pyfused.ops.cross_attention_residual import PLANS
from pyfused.ops.prepared_context import PROJECTIONS

# Each alone, all.
SUBSETS = [subset for size in (1, 11) for subset in itertools.combinations(NAMES, size)]
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

    assert torch.autograd.gradcheck(function, tuple(leaves_of(given).values()), fast_mode=True)


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
