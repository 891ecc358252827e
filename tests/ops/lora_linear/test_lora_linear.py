"""``lora_linear`` against float64: output and every gradient, on every backend and plan present."""

from __future__ import annotations

import pytest
import torch
from lora_linear_cases import PLANS, check, draw, every_plan
from operator_cases import (
    DEVICE,
    IMAGES,
    LAYOUTS,
    assert_format_kept,
    cast,
    every_backend,
    far_apart,
    leaves_of,
    plain_dtype,
    planned,
    rotated,
    seed,
)
from oracle import cotangent

import pyfused
from pyfused import reference
from pyfused.ops.lora_linear import MIXED_PLANS

ROWS = (0, 1, 7, 50, 197, 1370)
WIDTHS = [(k, n) for k in (1, 17, 96, 768) for n in (1, 17, 96, 768)]
RANKS = (1, 3, 8, 16, 64, 100)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KERNEL_DTYPES = DTYPES[:3]


def _grid():
    """Every M with every (K, N); rank, dtype, dropout and bias rotate so that each meets each M and each (K, N)."""
    for i, m in enumerate(ROWS):
        for j, (k, n) in enumerate(WIDTHS):
            r, dtype = RANKS[(j - i) % 6], DTYPES[(j + j // 4 + i) % 4]
            p, bias = (0.0, 0.3)[(j // 2 + i) % 2], (j // 3 + i) % 2 == 0
            name = f"{m}x{k}x{n}-r{r}-{str(dtype)[6:]}-p{p}" + "-bias" * bias
            yield pytest.param(m, k, n, r, dtype, p, bias, id=name)


@pytest.mark.parametrize(("m", "k", "n", "r", "dtype", "p", "bias"), list(_grid()))
def test_portable_grid(m, k, n, r, dtype, p, bias):
    check(draw((m, k), n, r, dtype, bias=bias), "portable", dropout_p=p, seed=seed())


# M, K and N each several tiles of the interpreter's configuration and a tail.
@pytest.mark.sanitize
@rotated(PLANS, rank=((1, 0.3), (3, 0.0), (16, 0.3), (20, 0.0), (20, 0.3)), dtype=KERNEL_DTYPES)
def test_several_tiles_and_a_tail(backend, plan, rank, dtype):
    r, p = rank
    if backend == "cuda" and dtype == torch.float32:
        pytest.skip("its kernels take float16 and bfloat16")
    check(draw((70, 50), 90, r, dtype, bias=r != 3), backend, plan, dropout_p=p, seed=seed())


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("m", "k", "n", "r"), [(1, 1, 1, 1), (1, 33, 2, 5), (37, 1, 3, 2), (2, 3, 37, 1), (0, 5, 6, 2)]
)
@pytest.mark.parametrize("p", [0.0, 0.3])
@every_plan
def test_smallest_shapes(backend, plan, m, k, n, r, p):
    check(draw((m, k), n, r, torch.float16), backend, plan, dropout_p=p, seed=seed())


@pytest.mark.parametrize(("r", "p"), [(33, 0.0), (64, 0.3), (100, 0.0), (256, 0.3)])
@every_plan
def test_large_ranks(backend, plan, r, p):
    tensors = draw((19, 18), 34, r, torch.bfloat16)
    if plan == "one_launch" and r > 64:
        with pytest.raises(ValueError, match=f"plan 'one_launch' takes lora_a .* with R <= 64, got R = {r}"):
            pyfused.lora_linear(**tensors, backend=backend, plan=plan)
        if backend == "cuda":
            return
        plan = "auto"
    check(tensors, backend, plan, dropout_p=p, seed=seed())


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_plan
def test_float32_adapters_over_a_16_bit_base(backend, plan, dtype, p):
    # More rows where that costs nothing: they are summed piece by piece.
    rows = 2100 if backend == "portable" else 70
    tensors = draw((rows, 20), 34, 3, dtype, adapters=torch.float32)
    results = check(tensors, backend, plan, dropout_p=p, seed=seed())
    for name in ("dlora_a", "dlora_b"):
        gradient = results[name]
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, gradient.to(dtype).float()), f"{name} went through {dtype}"


def _check_layout(x, channel_dim, backend, p, dtype=torch.bfloat16):
    tensors = draw(tuple(x.shape), 34, 3, dtype, channel_dim=channel_dim)
    tensors["x"] = cast(x, dtype)
    return check(tensors, backend, dropout_p=p, seed=seed(), channel_dim=channel_dim)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("layout", LAYOUTS)
@every_backend
def test_layouts_of_x(backend, layout, p):
    _check_layout(LAYOUTS[layout](), -1, backend, p)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("layout", IMAGES)
@every_backend
def test_layouts_of_images(backend, layout, p):
    x = IMAGES[layout]()
    results = _check_layout(x, 1, backend, p)
    assert_format_kept(x, results["output"])
    assert_format_kept(x, results["dx"])


STRIDED = {
    "weight (K, N) transposed": ("weight", lambda w: w.t().contiguous().t()),
    "weight expanded": ("weight", lambda w: w[:1].expand_as(w)),
    "lora_a (K, R) transposed": ("lora_a", lambda a: a.t().contiguous().t()),
    "lora_a every other column": ("lora_a", lambda a: a.repeat_interleave(2, dim=1)[:, ::2]),
    "lora_b (R, N) transposed": ("lora_b", lambda b: b.t().contiguous().t()),
    "bias every other element": ("bias", lambda b: b.repeat_interleave(2)[::2]),
    "bias expanded": ("bias", lambda b: b[:1].expand_as(b)),
}


@pytest.mark.parametrize("strided", STRIDED)
@every_plan
def test_strided_parameters(backend, plan, strided):
    tensors = draw((2, 9, 20), 34, 3, plain_dtype(backend))
    name, restride = STRIDED[strided]
    tensors[name] = restride(tensors[name])
    check(tensors, backend, plan, dropout_p=0.3, seed=seed())


@pytest.mark.usefixtures("overflow_checked")
@pytest.mark.parametrize("layout", ["rows far apart", "columns far apart"])
@every_backend
def test_offsets_beyond_32_bits(backend, layout):
    """The elements of x lie over 2**31 elements apart."""
    if DEVICE != "cpu":
        pytest.skip("sparse memory is the host's; test_lora_linear_gpu.py allocates on the device")
    far = 2**27
    shape, strides = ((35, 20), (far, 1)) if layout == "rows far apart" else ((20, 35), (1, far))
    tensors = draw(shape, 34, 3, torch.float16)
    tensors["x"] = far_apart(tensors["x"], strides)
    check(tensors, backend, dropout_p=0.3, seed=seed())


@every_plan
def test_the_rank_r_term_is_rounded_with_the_sum(backend, plan):
    """1 + 2**-8 is a tie that bfloat16 rounds to 1; the low-rank term's 2**-12 decides it, if it arrives in time."""
    if plan == "blas":
        pytest.skip("the library's GEMM rounds before the rank-r term is added")
    tensors = {
        "x": torch.ones(1, 2, dtype=torch.bfloat16, device=DEVICE),
        "weight": torch.tensor([[1.0, 2.0**-8]], dtype=torch.bfloat16, device=DEVICE),
        "lora_a": torch.tensor([[2.0**-6, 0.0]], dtype=torch.bfloat16, device=DEVICE),
        "lora_b": torch.tensor([[2.0**-6]], dtype=torch.bfloat16, device=DEVICE),
    }
    assert pyfused.lora_linear(**tensors, backend=backend, plan=plan).item() == 1 + 2.0**-7


# Backend -> plans.
SERVED = {backend: plans for backend, plans in MIXED_PLANS.items() if backend != "cuda"}


def _without_index(backend: str) -> str:
    """What a call without an index has in the place of a backend that serves it alone with one."""
    return backend if backend in PLANS else "portable"


@pytest.mark.sanitize
@rotated(SERVED, groups=((3, 5, 0.0), (7, 9, 0.0), (8, 16, 0.3)), dtype=KERNEL_DTYPES)
def test_mixed_adapters(backend, plan, groups, dtype):
    """Several tiles and a tail; blocks of the rank that are no power of two, and more than a tile of them."""
    adapters, r, p = groups
    if plan == "one_launch" and adapters * r > 64:
        adapters = 64 // r
    index = torch.randint(-1, adapters + 1, (70,), generator=torch.Generator().manual_seed(7)).to(DEVICE)
    tensors = draw((70, 50), 90, r, dtype, bias=r != 3, mixed=adapters, adapters=torch.float32 if r == 9 else None)
    check(tensors, backend, plan, dropout_p=p, seed=seed(), adapter_index=index)


@planned(SERVED)
@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_a_mixed_batch_is_its_samples_one_by_one(backend, plan, channel_dim):
    shape, index = ((5, 9, 20) if channel_dim == -1 else (5, 20, 3, 3)), torch.tensor([2, 0, -1, 2, 1], device=DEVICE)
    tensors = leaves_of(draw(shape, 34, 3, torch.float32, channel_dim=channel_dim, mixed=3))
    options = {"scaling": -1.5, "channel_dim": channel_dim, "plan": plan}
    by_sample = index[:, None] if channel_dim == -1 else index[:, None, None]
    mixed = pyfused.lora_linear(**tensors, **options, adapter_index=by_sample, backend=backend)
    x, weight, lora_a, lora_b, bias = tensors.values()
    one_by_one = torch.cat([
        pyfused.lora_linear(
            sample[None], weight, lora_a[max(i, 0)], lora_b[:, max(i, 0)] * (i >= 0), bias, **options,
            backend=_without_index(backend),
        )
        for sample, i in zip(x, index.tolist(), strict=True)
    ])  # fmt: skip
    wanted, dy = list(tensors.values()), cotangent(mixed)
    for actual, expected in zip(
        (mixed, *torch.autograd.grad(mixed, wanted, dy)),
        (one_by_one, *torch.autograd.grad(one_by_one, wanted, dy)),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@planned(SERVED)
def test_a_row_without_an_adapter_is_the_base_layers(backend, plan):
    tensors = draw((6, 20), 34, 3, mixed=2)
    none = torch.full((6,), -1, device=DEVICE)
    y = pyfused.lora_linear(**tensors, backend=backend, plan=plan, adapter_index=none)
    plain = tensors | {"lora_a": tensors["lora_a"][0], "lora_b": torch.zeros_like(tensors["lora_b"][:, 0])}
    base = pyfused.lora_linear(**plain, backend=_without_index(backend), plan=plan)
    torch.testing.assert_close(y, base, rtol=0, atol=0)
    assert not torch.equal(y, pyfused.lora_linear(**tensors, backend=backend, plan=plan, adapter_index=none + 1))


@planned(SERVED)
def test_an_index_out_of_range_is_no_adapter(backend, plan):
    tensors = draw((6, 20), 34, 3, mixed=2)
    beyond = torch.tensor([2**32, -(2**32), 2**63 - 1, 2, -2, 3], device=DEVICE)
    indices = beyond, torch.full((6,), -1, device=DEVICE)
    ys = [pyfused.lora_linear(**tensors, backend=backend, plan=plan, adapter_index=each) for each in indices]
    assert torch.equal(*ys)


def test_dropout_acts_in_training_only():
    tensors = draw((50, 17), 9, 3)
    plain = pyfused.lora_linear(**tensors)
    assert torch.equal(pyfused.lora_linear(**tensors, dropout_p=0.5, training=False), plain)
    assert not torch.equal(pyfused.lora_linear(**tensors, dropout_p=0.5), plain)


def test_reference_is_the_formula():
    """The oracle itself, against the formula written with matrix products."""
    t = draw((6, 5), 4, 3, torch.float64)
    expected = t["x"] @ t["weight"].T + t["bias"] + 0.7 * (t["x"] @ t["lora_a"].T) @ t["lora_b"].T
    torch.testing.assert_close(reference.lora_linear(**t, scaling=0.7), expected)
    image = t["x"].T.reshape(1, 5, 2, 3)
    by_channel = reference.lora_linear(**(t | {"x": image}), scaling=0.7, channel_dim=1)
    torch.testing.assert_close(by_channel.reshape(4, 6).T, expected)
