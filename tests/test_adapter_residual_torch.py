"""``adapter_residual`` inside torch: autograd, raw operators, compilation, checkpointing, autocast."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from adapter_residual_cases import NAMES, draw, every_plan, sample_scale
from operator_cases import (
    DEVICE,
    RawCalls,
    autocast,
    every_backend,
    fresh_compiler,
    leaves_of,
    plain_dtype,
    run,
    seed,
)
from oracle import cotangent, randn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import pyfused
from pyfused import reference
from pyfused.ops.adapter_residual import ACTIVATIONS, PLANS

# Each alone, each with each, all but one, all.
SUBSETS = [subset for size in (1, 2, 6, 7) for subset in itertools.combinations(NAMES, size)]
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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@every_plan
def test_nothing_is_saved_without_grad(backend, plan, mode):
    tensors, saved = draw((5, 6), 7, plain_dtype(backend)), []
    leaves = leaves_of(tensors, () if mode is torch.enable_grad else NAMES)
    with mode(), RawCalls() as raw, torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        y = pyfused.adapter_residual(**leaves, dropout_p=0.1, backend=backend, plan=plan)
    assert not y.requires_grad
    assert not saved
    ((_, forward),) = raw.calls
    assert forward["save"] is False


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

    assert torch.autograd.gradcheck(function, tuple(leaves_of(given).values()))


@every_plan
def test_double_backward_raises(backend, plan):
    leaves = leaves_of(draw((5, 6), 7, plain_dtype(backend)))
    y = pyfused.adapter_residual(**leaves, backend=backend, plan=plan)
    (dz,) = torch.autograd.grad(y.square().sum(), leaves["z"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dz.sum().backward()


@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@every_backend
def test_the_output_may_be_changed_in_place(backend, layout, channel_dim):
    tensors = draw((2, 6, 5, 6), 7, plain_dtype(backend), channel_dim=channel_dim)
    tensors["z"] = tensors["z"].to(memory_format=layout)
    options = {"channel_dim": channel_dim, "sample_scale": sample_scale(2, "some"), "backend": backend}

    def in_place(**tensors):
        return pyfused.adapter_residual(**tensors, **options).mul_(2.0).relu_()

    def out_of_place(**tensors):
        return pyfused.adapter_residual(**tensors, **options).mul(2.0).relu()

    for actual, expected in zip(run(in_place, tensors), run(out_of_place, tensors), strict=True):
        assert torch.equal(actual, expected)
    with torch.no_grad():
        assert torch.equal(in_place(**tensors), out_of_place(**tensors))


@pytest.mark.parametrize("name", ["z", "layer_scale", "sample_scale"])
@every_plan
def test_a_saved_tensor_changed_in_place_is_noticed(backend, plan, name):
    leaves = leaves_of(draw((5, 6), 7, plain_dtype(backend)))
    arguments = leaves | {"sample_scale": sample_scale(5, "kept")}
    arguments[name] = arguments[name] * 1.0
    y = pyfused.adapter_residual(**arguments, backend=backend, plan=plan)
    with torch.no_grad():
        arguments[name].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_plan
def test_the_residual_may_be_changed_in_place(backend, plan):
    """Backward does not read it: a residual stream may be updated where it lies."""
    tensors = draw((5, 6), 7, plain_dtype(backend), residual=torch.float32)
    expected = run(functools.partial(pyfused.adapter_residual, backend=backend, plan=plan), tensors)
    leaves = leaves_of(tensors)
    residual = leaves["residual"] * 1.0
    y = pyfused.adapter_residual(**(leaves | {"residual": residual}), backend=backend, plan=plan)
    residual.zero_()
    gradients = torch.autograd.grad(y, list(leaves.values()), cotangent(y))
    for actual, gradient in zip((y, *gradients), expected, strict=True):
        assert torch.equal(actual, gradient)


def _raw(backend, direction):
    return getattr(getattr(torch.ops, f"pyfused_{backend}"), f"adapter_residual_{direction}").default


RAW = {
    "plain": {"bias": False, "layer_scale": None},
    "all": {"p": 0.3, "drop": "some", "residual": torch.float32},
    "channels first": {"channel_dim": 1, "p": 0.3, "layer_scale": "scalar"},
    "channels first, bfloat16 residual": {"channel_dim": 1, "drop": "some", "residual": torch.bfloat16},
    "float32 adapters": {"dtype": torch.bfloat16, "adapters": torch.float32, "residual": torch.float32},
}


def _raw_arguments(backend, plan, *, dtype=None, p=0.0, drop=None, channel_dim=-1, **drawn):
    """Arguments of both raw operators, as the public function makes them."""
    tensors = draw((2, 4, 6), 5, dtype or plain_dtype(backend), channel_dim=channel_dim, **drawn)
    with RawCalls() as raw:
        run(
            pyfused.adapter_residual, tensors, dropout_p=p, seed=seed(), sample_scale=sample_scale(2, drop),
            skip=0.5, channel_dim=channel_dim, backend=backend, plan=plan,
        )  # fmt: skip
    (_, forward), (_, backward) = raw.calls
    return [
        [value.detach() if isinstance(value, torch.Tensor) else value for value in call.values()]
        for call in (forward, backward)
    ]


@pytest.mark.parametrize("case", RAW)
@every_backend
def test_opcheck_forward(backend, case):
    forward, _ = _raw_arguments(backend, PLANS[list(RAW).index(case) % 2], **RAW[case])
    opcheck(_raw(backend, "fwd"), tuple(forward))


@pytest.mark.parametrize("case", RAW)
@every_backend
def test_opcheck_backward(backend, case):
    _, backward = _raw_arguments(backend, PLANS[list(RAW).index(case) % 2], **RAW[case])
    opcheck(_raw(backend, "bwd"), tuple(backward))


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3))[:-1], ids=str)
@every_backend
def test_opcheck_backward_of_some(backend, needs):
    _, backward = _raw_arguments(backend, PLANS[sum(needs) % 2], **RAW["all"])
    opcheck(_raw(backend, "bwd"), (*backward[:-3], *needs))


@pytest.mark.parametrize("case", RAW)
@every_plan
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
    if plan == "save":
        # The Function passes no z where no wanted gradient reads it.
        dy, _, *rest = backward
        dz, d_down, d_down_bias, *_ = op(dy, None, *rest[:-3], True, False, False)
        assert torch.equal(dz, together[0])
        assert d_down.numel() == d_down_bias.numel() == 0


@every_backend
def test_raw_operators_refuse_to_drop_a_gradient(backend):
    for direction, arguments in zip(("fwd", "bwd"), _raw_arguments(backend, "save", **RAW["all"]), strict=True):
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
@every_plan
def test_outputs_share_no_memory(backend, plan, case):
    calls = _raw_arguments(backend, plan, **RAW[case])
    outputs = [value for op, call in zip(("fwd", "bwd"), calls, strict=True) for value in _raw(backend, op)(*call)]
    storages = [value.untyped_storage().data_ptr() for value in outputs if value.numel()]
    inputs = [value for call in calls for value in call if isinstance(value, torch.Tensor)]
    assert len(set(storages)) == len(storages)
    assert not set(storages) & {value.untyped_storage().data_ptr() for value in inputs}


def test_meta_tensors_give_shapes():
    tensors = draw((2, 10, 3, 6), 7, torch.bfloat16, residual=torch.float32, channel_dim=1, device="meta")
    y = pyfused.adapter_residual(**tensors, dropout_p=0.1, channel_dim=1)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 10, 3, 6), torch.float32)


@pytest.mark.parametrize(
    ("compiler", "channel_dim", "residual"),
    [("aot_eager", -1, None), ("aot_eager", 1, torch.float32), ("inductor", 1, None)],
)
@every_plan
def test_compiled_equals_eager(backend, plan, channel_dim, residual, compiler):
    tensors = draw((2, 5, 5, 5), 7, plain_dtype(backend), residual=residual, channel_dim=channel_dim)
    function = functools.partial(
        pyfused.adapter_residual, skip=0.5, dropout_p=0.3, seed=5, sample_scale=sample_scale(2, "some"),
        channel_dim=channel_dim, backend=backend, plan=plan,
    )  # fmt: skip
    compiled = torch.compile(function, fullgraph=True, backend=fresh_compiler(compiler))
    for actual, expected in zip(run(compiled, tensors), run(function, tensors), strict=True):
        torch.testing.assert_close(actual, expected)
        assert actual.stride() == expected.stride()


@every_backend
def test_compiled_draws_one_mask_for_both_directions(backend):
    # Two tensors, because dynamo traces no Function that is given one twice.
    like = {"dtype": plain_dtype(backend), "device": DEVICE}
    eye, again = torch.eye(20, **like), torch.eye(20, **like)

    @torch.compile(fullgraph=True, backend=fresh_compiler("aot_eager"))
    def dropped(z):
        return pyfused.adapter_residual(
            z, eye, None, again, None, residual=torch.zeros_like(z), skip=0.0, activation="identity", dropout_p=0.5,
            backend=backend,
        )  # fmt: skip

    ys = []
    for _ in range(2):
        z = torch.ones(30, 20, **like, requires_grad=True)
        y = dropped(z)
        (dz,) = torch.autograd.grad(y, z, torch.ones_like(y))
        assert torch.equal(y, dz)
        assert set(y.unique().tolist()) == {0.0, 2.0}
        ys.append(y)
    assert not torch.equal(*ys)


SHAPES = {
    "rows": (-1, [(m, 6) for m in (4, 5, 9, 33)]),
    "batch and length": (-1, [(b, m, 6) for b, m in ((2, 4), (3, 5), (4, 9))]),
    "images": (1, [(b, 6, s, s + 1) for b, s in ((2, 4), (3, 5), (4, 7))]),
}


@pytest.mark.parametrize("case", SHAPES)
@every_backend
def test_dynamic_shapes_do_not_recompile(backend, case):
    channel_dim, shapes = SHAPES[case]
    counter = CompileCounterWithBackend(fresh_compiler("aot_eager"))
    function = functools.partial(
        pyfused.adapter_residual, dropout_p=0.3, seed=5, channel_dim=channel_dim, backend=backend
    )
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for shape in shapes:
        tensors = draw(shape, 7, plain_dtype(backend), channel_dim=channel_dim)
        scale = sample_scale(shape[0], "some")
        results = (run(f, tensors, sample_scale=scale) for f in (compiled, function))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
    # The first shape is compiled as a constant; the second finds that it changes.
    assert counter.frame_count <= 2


@pytest.mark.parametrize("use_reentrant", [True, False])
@every_plan
def test_checkpointing_equals_no_checkpointing(backend, plan, use_reentrant):
    tensors = draw((9, 20), 12, plain_dtype(backend))

    def two_layers(**tensors):
        layer = functools.partial(pyfused.adapter_residual, dropout_p=0.4, backend=backend, plan=plan)
        return layer(**(tensors | {"z": layer(**tensors)}))

    def checkpointed(**tensors):
        given = [name for name, value in tensors.items() if value is not None]

        def function(*values):
            return two_layers(**tensors | dict(zip(given, values, strict=True)))

        return checkpoint(function, *(tensors[name] for name in given), use_reentrant=use_reentrant)

    runs = []
    for function in (two_layers, checkpointed):
        torch.manual_seed(3)
        runs.append(run(function, tensors))
    for plain, again in zip(*runs, strict=True):
        assert torch.equal(plain, again)


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


@pytest.mark.parametrize("channel_dim", [-1, 1])
@every_plan
def test_backward_under_autocast_keeps_the_forwards_precision(backend, plan, channel_dim):
    shape = (37, 18) if channel_dim == -1 else (2, 18, 5, 7)
    tensors = draw(shape, 34, plain_dtype(backend), residual=torch.float32, channel_dim=channel_dim)

    def gradients(enabled: bool) -> list[torch.Tensor]:
        leaves = leaves_of(tensors)
        y = pyfused.adapter_residual(**leaves, channel_dim=channel_dim, backend=backend, plan=plan)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            y.backward(randn(*shape, seed=8, device=DEVICE))
        return [leaf.grad for leaf in leaves.values()]

    for inside, outside in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(inside, outside)


@every_backend
def test_forward_mode_raises(backend):
    like = {"dtype": plain_dtype(backend), "device": DEVICE}
    weights = randn(3, 6, **like), None, randn(6, 3, **like), None
    z = randn(5, 6, **like)
    with pytest.raises(RuntimeError, match="z has a tangent, but there is no forward-mode derivative"):
        torch.func.jvp(lambda z: pyfused.adapter_residual(z, *weights, backend=backend), (z,), (z,))


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
