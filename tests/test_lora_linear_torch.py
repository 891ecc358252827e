"""``lora_linear`` inside torch: autograd, raw operators, compilation, checkpointing, autocast."""

from __future__ import annotations

import functools
import gc
import itertools

import pytest
import torch
from lora_linear_cases import draw, every_plan
from operator_cases import DEVICE, RawCalls, autocast, every_backend, fresh_compiler, leaves_of, plain_dtype, run, seed
from oracle import assert_as_accurate_as_torch, cotangent, randn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import pyfused
from pyfused import reference

NAMES = ("x", "weight", "lora_a", "lora_b", "bias")
SUBSETS = [subset for size in range(1, 6) for subset in itertools.combinations(NAMES, size)]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
@every_backend
def test_what_requires_grad_gets_it_and_costs_alone(backend, subset, p):
    dtype = plain_dtype(backend)
    tensors = draw((2, 3, 6), 7, 3, dtype)
    options = {"dropout_p": p, "seed": seed(), "scaling": 0.5}
    expected = dict(zip(NAMES, run(reference.lora_linear, tensors, **options)[1:], strict=True))
    leaves, saved = leaves_of(tensors, subset), []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with RawCalls() as raw:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = pyfused.lora_linear(**leaves, **options, backend=backend)
        y.backward(cotangent(y))

    for name, leaf in leaves.items():
        if name in subset:
            close = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.float16 else {}
            torch.testing.assert_close(leaf.grad, expected[name], **close)
        else:
            assert leaf.grad is None, name
    # Backward runs once, and not at all for weight and bias, which are torch's; it makes what is needed alone.
    (_, forward), *backward = raw.calls
    assert forward["save"] is ("lora_b" in subset)
    if set(subset) & {"x", "lora_a", "lora_b"}:
        ((_, call),) = backward
        needs = call["need_dx"], call["need_da"], call["need_db"]
        assert needs == tuple(name in subset for name in ("x", "lora_a", "lora_b"))
    else:
        assert not backward
    # Beyond the parameters: x where dA or dW asks for it, P where dB does, and the seed.
    parameters = {leaves[name].data_ptr() for name in ("weight", "lora_a", "lora_b")}
    activations = [tensor for tensor in saved if tensor.data_ptr() not in parameters]
    sizes = {"x": leaves["x"].nbytes, "P": 6 * 3 * dtype.itemsize, "seed": 8}
    kept = {"x": {"lora_a", "weight"} & set(subset), "P": "lora_b" in subset, "seed": p > 0.0}
    assert sorted(tensor.nbytes for tensor in activations) == sorted(sizes[name] for name in kept if kept[name])
    assert bool(kept["x"]) == (leaves["x"].data_ptr() in {tensor.data_ptr() for tensor in activations})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@every_backend
def test_nothing_is_saved_without_grad(backend, mode):
    tensors, saved = draw((5, 6), 7, 3, plain_dtype(backend)), []
    leaves = leaves_of(tensors, () if mode is torch.enable_grad else NAMES)
    with mode(), RawCalls() as raw, torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        y = pyfused.lora_linear(**leaves, dropout_p=0.1, backend=backend)
    assert not y.requires_grad
    assert not saved
    ((_, forward),) = raw.calls
    assert forward["save"] is False


@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(p, channel_dim):
    tensors = draw((2, 3, 4), 5, 2, torch.float64, channel_dim=channel_dim)

    def function(*values):
        return pyfused.lora_linear(
            *values, scaling=1.7, dropout_p=p, seed=3, channel_dim=channel_dim, backend="portable"
        )

    assert torch.autograd.gradcheck(function, tuple(leaves_of(tensors).values()))


@every_backend
def test_double_backward_raises(backend):
    leaves = leaves_of(draw((5, 6), 7, 3, plain_dtype(backend)))
    y = pyfused.lora_linear(**leaves, backend=backend)
    (dx,) = torch.autograd.grad(y.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@every_backend
def test_the_output_may_be_changed_in_place(backend, layout, channel_dim):
    tensors = draw((2, 6, 5, 6), 7, 3, plain_dtype(backend), channel_dim=channel_dim)
    tensors["x"] = tensors["x"].to(memory_format=layout)

    def in_place(**tensors):
        return pyfused.lora_linear(**tensors, channel_dim=channel_dim, backend=backend).mul_(2.0).relu_()

    def out_of_place(**tensors):
        return pyfused.lora_linear(**tensors, channel_dim=channel_dim, backend=backend).mul(2.0).relu()

    for actual, expected in zip(run(in_place, tensors), run(out_of_place, tensors), strict=True):
        assert torch.equal(actual, expected)
    with torch.no_grad():
        assert torch.equal(in_place(**tensors), out_of_place(**tensors))


@every_backend
def test_a_saved_input_changed_in_place_is_noticed(backend):
    leaves = leaves_of(draw((5, 6), 7, 3, plain_dtype(backend)))
    x = leaves["x"] * 1.0
    y = pyfused.lora_linear(**(leaves | {"x": x}), backend=backend)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def _raw(backend):
    namespace = getattr(torch.ops, f"pyfused_{backend}")
    return namespace.lora_linear_fwd.default, namespace.lora_linear_bwd.default


def _raw_arguments(backend, p=0.0, channels_first=False, bias=True, adapters=None, plan="auto", dtype=None):
    """Arguments of forward less ``save`` and of backward less the three needs."""
    dtype = dtype or plain_dtype(backend)
    t = draw((2, 4, 6), 7, 3, dtype, bias=bias, adapters=adapters)
    key = seed() if p else None
    if channels_first:
        t["x"] = t["x"].transpose(1, 2).contiguous().transpose(1, 2)
    settings = (0.5, p, channels_first, plan)
    dy = randn(2, 4, 7, dtype=dtype, seed=6, device=DEVICE)
    saved = randn(8, 3, dtype=dtype, seed=7, device=DEVICE)
    forward = (t["x"], t["weight"], t["lora_a"], t["lora_b"], t["bias"], key, *settings)
    return forward, (dy, t["x"], t["weight"], t["lora_a"], t["lora_b"], saved, key, *settings)


RAW = {
    "plain": {},
    "no bias": {"bias": False},
    "dropout": {"p": 0.3},
    "channels first": {"channels_first": True},
    "channels first, dropout": {"channels_first": True, "p": 0.3},
    "float32 adapters": {"dtype": torch.bfloat16, "adapters": torch.float32},
}


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("case", RAW)
@every_plan
def test_opcheck_forward(backend, plan, case, save):
    forward, _ = _raw_arguments(backend, **RAW[case], plan=plan)
    opcheck(_raw(backend)[0], (*forward, save))


@pytest.mark.parametrize("case", RAW)
@every_plan
def test_opcheck_backward(backend, plan, case):
    _, backward = _raw_arguments(backend, **RAW[case], plan=plan)
    opcheck(_raw(backend)[1], (*backward, True, True, True))


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)), ids=str)
@every_plan
def test_opcheck_backward_of_some(backend, plan, needs):
    _, backward = _raw_arguments(backend, p=0.3, plan=plan)
    opcheck(_raw(backend)[1], (*backward, *needs))


@every_plan
def test_backward_without_what_it_does_not_need(backend, plan):
    """The Function passes None for what no wanted gradient reads; each gradient alone is what it is with the others."""
    _, backward = _raw_arguments(backend, p=0.3, plan=plan)
    _, op = _raw(backend)
    together = op(*backward, True, True, True)
    dy, x, weight, a, b, p, *rest = backward
    dx, da, db = op(dy, None, weight, a, b, None, *rest, True, False, False)
    torch.testing.assert_close(dx, together[0])
    assert da.numel() == db.numel() == 0
    dx, da, db = op(dy, x, None, a, b, None, *rest, False, True, False)
    torch.testing.assert_close(da, together[1])
    assert dx.numel() == db.numel() == 0
    dx, da, db = op(dy, None, None, a, b, p, *rest, False, False, True)
    torch.testing.assert_close(db, together[2])
    assert dx.numel() == da.numel() == 0


@every_backend
def test_raw_operators_refuse_to_drop_a_gradient(backend):
    forward, backward = _raw_arguments(backend)
    fwd, bwd = _raw(backend)
    for op, arguments, rest in ((fwd, forward, (True,)), (bwd, backward, (True, True, True))):
        for i, (value, argument) in enumerate(zip(arguments, op._schema.arguments, strict=False)):
            if not isinstance(value, torch.Tensor):
                continue
            requiring = (*arguments[:i], value.detach().requires_grad_(), *arguments[i + 1 :], *rest)
            with pytest.raises(RuntimeError, match=f"{argument.name} requires grad"):
                op(*requiring)
            with torch.no_grad():
                op(*requiring)


@every_plan
def test_outputs_share_no_memory(backend, plan):
    forward, backward = _raw_arguments(backend, plan=plan)
    fwd, bwd = _raw(backend)
    outputs = (*fwd(*forward, True), *bwd(*backward, True, True, True))
    inputs = [value for value in (*forward, *backward) if isinstance(value, torch.Tensor)]
    storages = [value.untyped_storage().data_ptr() for value in outputs]
    assert len(set(storages)) == len(storages)
    assert not set(storages) & {value.untyped_storage().data_ptr() for value in inputs}


def test_meta_tensors_give_shapes():
    tensors = draw((2, 10, 3, 6), 7, 3, torch.bfloat16, channel_dim=1, device="meta")
    y = pyfused.lora_linear(**tensors, dropout_p=0.1, channel_dim=1)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 7, 3, 6), torch.bfloat16)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("channel_dim", [-1, 1])
@every_backend
def test_compiled_equals_eager(backend, channel_dim, p, compiler):
    tensors = draw((2, 5, 5, 5), 7, 3, plain_dtype(backend), channel_dim=channel_dim)
    function = functools.partial(
        pyfused.lora_linear, scaling=0.5, dropout_p=p, seed=5, channel_dim=channel_dim, backend=backend
    )
    compiled = torch.compile(function, fullgraph=True, backend=fresh_compiler(compiler))
    for actual, expected in zip(run(compiled, tensors), run(function, tensors), strict=True):
        torch.testing.assert_close(actual, expected)
        assert actual.stride() == expected.stride()


@every_backend
def test_compiled_draws_one_mask_for_both_directions(backend):
    # Two tensors, because dynamo traces no Function that is given one twice.
    dtype = plain_dtype(backend)
    eye, again = torch.eye(20, dtype=dtype, device=DEVICE), torch.eye(20, dtype=dtype, device=DEVICE)

    @torch.compile(fullgraph=True, backend=fresh_compiler("aot_eager"))
    def dropped(x):
        return pyfused.lora_linear(x, torch.zeros_like(eye), eye, again, dropout_p=0.5, backend=backend)

    ys = []
    for _ in range(2):
        x = torch.ones(30, 20, dtype=dtype, device=DEVICE, requires_grad=True)
        y = dropped(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(y, dx)
        ys.append(y)
    assert not torch.equal(*ys)


SHAPES = {
    "rows": (-1, [(m, 6) for m in (4, 5, 9, 33, 70)]),
    "batch and length": (-1, [(b, m, 6) for b, m in ((2, 4), (3, 5), (4, 9), (5, 33))]),
    "images": (1, [(b, 6, s, s + 1) for b, s in ((2, 4), (3, 5), (4, 7))]),
}


@pytest.mark.parametrize("case", SHAPES)
@every_backend
def test_dynamic_shapes_do_not_recompile(backend, case):
    channel_dim, shapes = SHAPES[case]
    counter = CompileCounterWithBackend(fresh_compiler("aot_eager"))
    function = functools.partial(pyfused.lora_linear, dropout_p=0.3, seed=5, channel_dim=channel_dim, backend=backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for shape in shapes:
        tensors = draw(shape, 7, 3, plain_dtype(backend), channel_dim=channel_dim)
        for actual, expected in zip(run(compiled, tensors), run(function, tensors), strict=True):
            torch.testing.assert_close(actual, expected)
    # The first shape is compiled as a constant; the second finds that it changes.
    assert counter.frame_count <= 2


@pytest.mark.parametrize("use_reentrant", [True, False])
@every_backend
def test_checkpointing_equals_no_checkpointing(backend, use_reentrant):
    tensors = draw((9, 20), 20, 3, plain_dtype(backend))

    def two_layers(**tensors):
        layer = functools.partial(pyfused.lora_linear, dropout_p=0.4, backend=backend)
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


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("x_dtype", [torch.float32, None], ids=["float32 x", "autocast x"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_plan
def test_autocast_equals_torch_autocast(backend, plan, dtype, x_dtype, p):
    tensors = draw((33, 20), 34, 3)
    tensors["x"] = tensors["x"].to(x_dtype or dtype)
    if backend == "cuda":
        with pytest.raises(ValueError, match=f"weight must have dtype {dtype} there, got torch.float32"):
            autocast(pyfused.lora_linear, dtype)(**tensors, backend=backend)
        tensors["weight"] = tensors["weight"].to(dtype)
    results = assert_as_accurate_as_torch(
        autocast(functools.partial(pyfused.lora_linear, backend=backend, plan=plan), dtype),
        autocast(reference.lora_linear, dtype),
        tensors,
        dtype,
        scaling=1.5,
        dropout_p=p,
        seed=seed(),
    )
    assert results["output"].dtype == dtype
    assert all(results[f"d{name}"].dtype == tensors[name].dtype for name in NAMES)


@pytest.mark.parametrize("scaling", [1 / 64, 1e-3])
def test_a_small_scaling_costs_no_digits_in_float16(scaling):
    x, dy = torch.randn(64, 32).half(), torch.randn(64, 24).half()
    a, b = torch.randn(4, 32).half(), (1e-4 * torch.randn(24, 4)).half()
    results = []
    for function, dtype in (
        (pyfused.lora_linear, None),
        (reference.lora_linear, None),
        (reference.lora_linear, torch.float64),
    ):
        tensors = [tensor.to(DEVICE, dtype).requires_grad_() for tensor in (x, a, b)]
        y = function(tensors[0], torch.zeros_like(tensors[0][:24]), *tensors[1:], scaling=scaling)
        results.append([y, *torch.autograd.grad(y, tensors, dy.to(y))])
    ours, plain, exact = ([tensor.detach().double() for tensor in each] for each in results)
    for mine, other, right in zip(ours, plain, exact, strict=True):
        assert (mine - right).norm() <= 2 * (other - right).norm() + 1e-3 * right.norm()


@pytest.mark.parametrize("argument", ["lora_a", "lora_b"])
def test_autocast_takes_no_float64_adapters(argument):
    tensors = {
        "x": torch.ones(4, 6),
        "weight": torch.ones(5, 6),
        "lora_a": torch.ones(3, 6),
        "lora_b": torch.ones(5, 3),
    }
    tensors = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    tensors[argument] = tensors[argument].double()
    with pytest.raises(
        TypeError, match=f"lora_linear: {argument} must have dtype torch.float32 or .*, got torch.float64"
    ):
        autocast(pyfused.lora_linear, torch.bfloat16)(**tensors)


@every_backend
def test_autocast_leaves_float64_alone(backend):
    tensors = draw((5, 6), 7, 3, torch.float64)
    if backend != "portable":
        pytest.skip("its kernels take no float64")
    y = autocast(functools.partial(pyfused.lora_linear, backend=backend), torch.bfloat16)(**tensors)
    torch.testing.assert_close(y, reference.lora_linear(**tensors))


def _casts(function, shape):
    """How often ``function`` casts a tensor of ``shape``."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        function()
    return sum(e.name == "aten::_to_copy" and e.input_shapes[0] == list(shape) for e in profile.events())


@every_backend
def test_a_frozen_weight_is_cast_at_most_once_under_autocast(backend):
    if backend == "cuda":
        pytest.skip("it takes a weight of x's dtype only")
    leaves = leaves_of(draw((9, 37), 53, 3), ("x", "lora_a", "lora_b"))
    weight = leaves["weight"]

    def step(weight, dtype=torch.bfloat16):
        y = autocast(functools.partial(pyfused.lora_linear, backend=backend), dtype)(**(leaves | {"weight": weight}))
        return y.detach(), torch.autograd.grad(y, leaves["x"], cotangent(y))[0]

    def assert_current(dtype=torch.bfloat16):
        # A weight that trains is cast anew at every call.
        expected = step(weight.clone().requires_grad_(), dtype)
        for ours, fresh in zip(step(weight, dtype), expected, strict=True):
            assert torch.equal(ours, fresh)

    assert _casts(lambda: step(weight), weight.shape) <= 1
    assert _casts(lambda: step(weight), weight.shape) == 0
    assert_current()
    weight.mul_(-2.0)
    assert _casts(lambda: step(weight), weight.shape) <= 1
    assert_current()
    weight.data = -3.0 * weight.data
    assert_current()
    assert_current(torch.float16)
    assert_current()


@every_backend
def test_a_cast_weight_is_freed_with_the_weight(backend):
    if backend == "cuda":
        pytest.skip("it takes a weight of x's dtype only")
    tensors = draw((9, 37), 53, 3)
    autocast(functools.partial(pyfused.lora_linear, backend=backend), torch.bfloat16)(**tensors)
    del tensors
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == (53, 37)]
    assert not alive


@pytest.mark.parametrize("channel_dim", [-1, 1])
@every_plan
def test_backward_under_autocast_keeps_the_forwards_precision(backend, plan, channel_dim):
    shape = (37, 18) if channel_dim == -1 else (2, 18, 5, 7)

    def gradients(autocast: bool) -> list[torch.Tensor]:
        drawn = draw(shape, 34, 3, plain_dtype(backend), channel_dim=channel_dim)
        tensors = {name: t.requires_grad_() for name, t in drawn.items()}
        y = pyfused.lora_linear(**tensors, channel_dim=channel_dim, backend=backend, plan=plan)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            y.backward(torch.ones_like(y))
        return [t.grad for t in tensors.values()]

    for inside, outside in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(inside, outside)
