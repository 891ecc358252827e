"""``adapter_residual`` inside torch: autograd, raw operators, compilation, checkpointing, autocast."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from adapter_residual_cases import NAMES, draw, every_backend, every_plan, sample_scale
from operator_cases import (
    DEVICE,
    RawCalls,
    autocast,
    leaves_of,
    plain_dtype,
    run,
    seed,
)
from oracle import cotangent, randn

import pyfused
from pyfused import reference
from pyfused.ops.adapter_residual import ACTIVATIONS, PLANS

# Each alone, all.
SUBSETS = [subset for size in (1, 7) for subset in itertools.combinations(NAMES, size)]
# Which are needed is the Function's affair: kernels are asked for each gradient alone and for all.
COSTS = [
    pytest.param(*case.values, subset, marks=case.marks, id=f"{case.id}-{'+'.join(subset)}")
    for case in every_plan.args[1]
    for subset in SUBSETS
    if case.values[0] == "portable" or len(subset) in (1, 7)
]
DOWN, UP = {"down_weight", "down_bias"}, {"up_weight", "up_bias", "layer_scale"}


@pytest.mark.parametrize(("backend", "plan", "subset"), COSTS)
def test_what_requires_grad_gets_it_and_costs_alone(backend, plan, subset):
    subset, index = set(subset), SUBSETS.index(subset)
    p, skip = (0.0, 0.3)[index % 2], (1.0, 0.0, -0.5)[(index + index // 7) % 3]
    dtype, layer_scale = plain_dtype(backend), ("scalar", "channels")[index // 2 % 2]
    tensors = draw((2, 3, 6), 5, dtype, residual=torch.float32, layer_scale=layer_scale)
    options = {"dropout_p": p, "seed": seed(), "skip": skip, "sample_scale": sample_scale(2, "kept")}
    expected = dict(zip(NAMES, run(reference.adapter_residual, tensors, **options)[1:], strict=True))
    leaves, saved = leaves_of(tensors, subset), []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with RawCalls() as raw:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = pyfused.adapter_residual(**leaves, **options, backend=backend, plan=plan)
        y.backward(cotangent(y))

    for name, leaf in leaves.items():
        if name in subset:
            tolerance = {} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
            torch.testing.assert_close(leaf.grad, expected[name], **tolerance)
        else:
            assert leaf.grad is None, name
    # Backward runs once, and not at all for the residual; it makes what is needed alone.
    (_, forward), *backward = raw.calls
    branch = subset - {"residual"}
    assert forward["save"] is bool(branch and plan == "save")
    if branch:
        ((_, call),) = backward
        needs = call["need_dz"], call["need_down"], call["need_up"]
        assert needs == ("z" in subset, bool(DOWN & subset), bool(UP & subset))
    else:
        assert not backward
    # Beyond the parameters: z where dD or dgamma asks for it, or h is to be computed again; h, the seed.
    sizes = {"z": leaves["z"].nbytes, "h": 6 * 5 * dtype.itemsize, "seed": 8}
    kept = {
        "z": bool(branch) and (plan == "recompute" or "down_weight" in subset or ("layer_scale" in subset and skip)),
        "h": branch and plan == "save",
        "seed": bool(branch) and p > 0.0,
    }
    constant = {value.data_ptr() for name, value in leaves.items() if name != "z"}
    constant.add(options["sample_scale"].data_ptr())
    activations = [tensor for tensor in saved if tensor.data_ptr() not in constant]
    assert sorted(tensor.nbytes for tensor in activations) == sorted(sizes[name] for name in kept if kept[name])
    assert bool(kept["z"]) == (leaves["z"].data_ptr() in {tensor.data_ptr() for tensor in activations})


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("plan", PLANS)
def test_gradcheck(plan, activation):
    n = ACTIVATIONS.index(activation) + 7 * PLANS.index(plan)
    channel_dim = (-1, 1)[n % 2]
    tensors = draw(
        (3, 2, 4), 5, torch.float64, channel_dim=channel_dim, bias=n % 5 != 4,
        layer_scale=("channels", "scalar")[n // 2 % 2], residual=torch.float64 if n % 3 else None,
    )  # fmt: skip
    given = {name: value for name, value in tensors.items() if value is not None}

    def function(*values):
        return pyfused.adapter_residual(
            **tensors | dict(zip(given, values, strict=True)), skip=(1.0, -0.5, 0.0)[n % 3], activation=activation,
            sample_scale=sample_scale(3, "some", torch.float64), dropout_p=0.3 if n % 4 else 0.0, seed=3,
            channel_dim=channel_dim, plan=plan, backend="portable",
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, tuple(leaves_of(given).values()), fast_mode=True)


@pytest.mark.parametrize("residual", [None, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_plan
def test_autocast_casts_the_branch_and_not_the_residual(backend, plan, dtype, residual):
    """The same bits as the call with z cast by hand, whose residual stays as it is."""
    tensors = draw((33, 20), 12, residual=residual)
    options = {"skip": 0.5, "dropout_p": 0.3, "seed": seed(), "backend": backend, "plan": plan}

    def by_hand(z, residual, **rest):
        stream = z if residual is None else residual
        return pyfused.adapter_residual(z.to(dtype), residual=stream, **rest, **options)

    ours = run(autocast(functools.partial(pyfused.adapter_residual, **options), dtype), tensors)
    assert ours[0].dtype == (residual or torch.float32)
    assert [value.dtype for value in ours[1:]] == [value.dtype for value in tensors.values() if value is not None]
    for actual, expected in zip(ours, run(by_hand, tensors), strict=True):
        assert torch.equal(actual, expected)


@every_backend
def test_autocast_leaves_the_residual_stream_exact(backend):
    tensors = draw((33, 20), 12, layer_scale="scalar")
    tensors["layer_scale"].zero_()
    y = autocast(functools.partial(pyfused.adapter_residual, backend=backend), torch.bfloat16)(**tensors)
    assert torch.equal(y, tensors["z"])


def test_autocast_takes_parameters_of_other_dtypes_and_leaves_float64_alone():
    tensors = draw((5, 6), 7, torch.float64)
    y = autocast(pyfused.adapter_residual, torch.bfloat16)(**tensors, backend="portable")
    torch.testing.assert_close(y, reference.adapter_residual(**tensors))
    tensors["z"] = tensors["z"].half()
    with pytest.raises(TypeError, match=r"down_weight must have dtype torch\.float32 or torch\.float16"):
        autocast(pyfused.adapter_residual, torch.bfloat16)(**tensors, backend="portable")
    tensors = {name: None if value is None else value.float() for name, value in tensors.items()}
    tensors |= {"z": tensors["z"].half(), "up_weight": tensors["up_weight"].bfloat16()}
    y = autocast(pyfused.adapter_residual, torch.bfloat16)(**tensors, backend="portable")
    assert y.dtype == torch.float16


def test_a_layer_scale_is_checked_while_its_size_is_a_symbol():
    @torch.compile(fullgraph=True, backend="eager")
    def function(z, down, up, gamma):
        return pyfused.adapter_residual(z, down, None, up, None, layer_scale=gamma, backend="portable")

    for channels in (32, 32, 40, 32, 48):
        gamma = torch.rand(channels)
        z, down, up = torch.randn(5, channels), torch.randn(4, channels), torch.randn(channels, 4)
        expected = reference.adapter_residual(z, down, None, up, None, layer_scale=gamma)
        torch.testing.assert_close(function(z, down, up, gamma), expected)


@every_backend
def test_float16_under_a_float32_stream_survives_a_scaled_loss(backend):
    """|dy| beyond float16, gamma small: what is made of them is inside, as in plain torch."""
    z = randn(40, 24, dtype=torch.float16, seed=1, device=DEVICE)
    residual = randn(40, 24, seed=2, device=DEVICE)
    weights = randn(9, 24, seed=3, device=DEVICE), None, randn(24, 9, seed=4, device=DEVICE), None
    leaves = [z, residual, weights[0], weights[2], torch.full((24,), 1e-5, device=DEVICE)]
    dy = 1e5 * randn(40, 24, seed=5, device=DEVICE)

    def gradients(function, dtype, **options):
        z, residual, down, up, gamma = (leaf.to(dtype or leaf.dtype).detach().requires_grad_() for leaf in leaves)
        y = function(z, down, None, up, None, residual=residual, layer_scale=gamma, **options)
        return torch.autograd.grad(y, (z, down, up, gamma), dy.to(y.dtype))

    for value, exact in zip(
        gradients(pyfused.adapter_residual, None, backend=backend),
        gradients(reference.adapter_residual, torch.float64),
        strict=True,
    ):
        assert (value - exact).norm() < 4e-3 * exact.norm()
