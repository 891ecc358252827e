"""``lora_linear`` inside torch: autograd, raw operators, compilation, checkpointing, autocast."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from lora_linear_cases import draw, every_plan
from operator_cases import DEVICE, RawCalls, autocast, every_backend, leaves_of, plain_dtype, run, seed
from oracle import assert_as_accurate_as_torch, cotangent

import pyfused
from pyfused import reference

NAMES = ("x", "weight", "lora_a", "lora_b", "bias")
SUBSETS = [subset for size in (1, 5) for subset in itertools.combinations(NAMES, size)]


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


@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(p, channel_dim):
    tensors = draw((2, 3, 4), 5, 2, torch.float64, channel_dim=channel_dim)

    def function(*values):
        return pyfused.lora_linear(
            *values, scaling=1.7, dropout_p=p, seed=3, channel_dim=channel_dim, backend="portable"
        )

    assert torch.autograd.gradcheck(function, tuple(leaves_of(tensors).values()), fast_mode=True)


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


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.mul_(2.0),
        lambda weight: weight.data.mul_(2.0),
        lambda weight: weight.data.copy_(weight.data * 2.0),
        lambda weight: setattr(weight, "data", 2.0 * weight.data),
        lambda weight: weight.untyped_storage().copy_((2.0 * weight).untyped_storage()),
    ],
    ids=["in place", ".data in place", ".data copied", "new storage", "storage"],
)
@every_backend
def test_a_changed_weight_is_never_cast_from_what_it_was(backend, change):
    """A frozen weight is cast in every call: no copy of it outlives one, whatever way the weight is changed."""
    if backend == "cuda":
        pytest.skip("it takes a weight of x's dtype only")
    leaves = leaves_of(draw((9, 37), 53, 3, bias=False), ("x", "lora_a", "lora_b"))
    leaves["lora_b"] = torch.zeros_like(leaves["lora_b"]).requires_grad_()

    def step():
        y = autocast(functools.partial(pyfused.lora_linear, backend=backend), torch.bfloat16)(**leaves)
        return y.detach(), torch.autograd.grad(y, leaves["x"], cotangent(y))[0]

    before = step()
    change(leaves["weight"])
    # Twice a bfloat16 is exact.
    for first, second in zip(before, step(), strict=True):
        assert torch.equal(2.0 * first, second)
