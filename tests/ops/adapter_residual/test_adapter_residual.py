"""``adapter_residual`` against float64: output and every gradient, on every backend and plan present."""

from __future__ import annotations

import pytest
import torch
from adapter_residual_cases import FORMATS, check, check_drawn, draw, every_backend, every_plan, image, sample_scale
from operator_cases import (
    COTANGENTS,
    DEVICE,
    FAST,
    IMAGES,
    LAYOUTS,
    assert_format_kept,
    cast,
    far_apart,
    leaves_of,
    plain_dtype,
    seed,
    skips,
)
from oracle import norms, randn

import pyfused
from pyfused import reference
from pyfused.ops.adapter_residual import ACTIVATIONS, MAX_CUDA_HIDDEN, PLANS, choose_plan

HIDDEN = (1, 8, 24, 64, 192, 256, 512)
CHANNELS = (1, 48, 76, 152, 640, 768, 1024)
SIDES = (7, 14, 56)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KERNEL_DTYPES = DTYPES[:3]
SKIPS = (1.0, 0.0, -0.5)
LAYER_SCALES = ("channels", "scalar", None)
DROPS = (None, "some", "kept", "all")


def _grid():
    """Every (h, C) on 7 x 7 positions, every h and C on the larger; format and the rest rotate at odd paces."""
    cases = [(7, i, j, FORMATS[(i + 2 * j) % 3]) for i in range(7) for j in range(7)]
    cases += [(side, i, (2 * i + side) % 7, FORMATS[i % 3]) for side in SIDES[1:] for i in range(7)]
    for n, (side, i, j, layout) in enumerate(cases):
        h, c = HIDDEN[i], CHANNELS[j]
        z_dtype = DTYPES[(n + n // 28) % 4]
        options = {
            "dtype": z_dtype,
            "layout": layout,
            "plan": PLANS[(n // 3) % 2],
            "activation": ACTIVATIONS[(i + 2 * j + n // 49) % 7],
            "skip": SKIPS[(n // 2) % 3],
            "layer_scale": LAYER_SCALES[(n // 4) % 3],
            "drop": DROPS[(n // 2 + n // 7) % 4],
            "bias": n % 5 != 0,
            "p": (0.0, 0.0, 0.2)[(n // 7) % 3],
            # Mixed with z in both directions.
            "residual": (None, torch.float32, z_dtype, torch.bfloat16)[(n // 3 + n // 12) % 4],
            "adapters": torch.float32 if z_dtype.itemsize == 2 and n % 3 else None,
        }
        yield pytest.param(side, h, c, options, id=f"{side}x{side}-h{h}-C{c}-{layout}-{str(z_dtype)[6:]}")


@pytest.mark.parametrize("backend", [pytest.param(name, marks=skips(name)) for name in FAST])
@pytest.mark.parametrize(("side", "hidden", "channels", "options"), list(_grid()))
def test_grid(side, hidden, channels, options, backend):
    if backend == "cpu" and options["dtype"] == torch.float64:
        narrow = {"dtype": torch.float32, "residual": options["residual"] and torch.float32}
        options = options | narrow
    shape, channel_dim = image(side, channels, options["layout"], batch=3 if side == 7 else 1)
    check_drawn(shape, channel_dim, hidden, backend, options)


# Rows of each image, C and h are two tiles of the interpreter's configuration, the second a tail.
@pytest.mark.sanitize
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_backend
def test_several_tiles_and_a_tail(backend, activation, layout):
    n = ACTIVATIONS.index(activation) + 7 * FORMATS.index(layout)
    dtype = plain_dtype(backend, KERNEL_DTYPES[(n + n // 7) % 3])
    options = {
        "dtype": dtype,
        "layout": layout,
        "plan": PLANS[n % 2],
        "activation": activation,
        "skip": SKIPS[(n // 2) % 3],
        "layer_scale": LAYER_SCALES[(n // 3) % 3],
        "drop": ("some", None, "kept")[(n // 2) % 3],
        "bias": n % 4 != 0,
        "p": (0.0, 0.3)[(n // 3) % 2],
        "residual": (None, torch.float32, dtype, torch.bfloat16)[(n + n // 4) % 4],
        "adapters": torch.float32 if dtype.itemsize == 2 and n % 2 else None,
    }
    shape, channel_dim = image(6, 41, layout, batch=2)
    check_drawn(shape, channel_dim, 39, backend, options)


@pytest.mark.parametrize(
    ("dtype", "adapters", "residual"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float32, None),
        (torch.float16, None, torch.bfloat16),
        (torch.float32, None, torch.float16),
    ],
    ids=str,
)
@every_plan
def test_mixed_dtypes(backend, plan, dtype, adapters, residual):
    dtype = plain_dtype(backend, dtype)
    # More rows where that costs nothing: they are summed piece by piece.
    rows = 2100 if backend in FAST else 70
    tensors = draw((2, rows // 2, 36), 20, dtype, adapters=adapters, residual=residual)
    results = check(tensors, backend, plan, sample_scale=sample_scale(2, "kept", torch.float64))
    assert results["output"].dtype == (residual or dtype)
    for name in ("ddown_weight", "ddown_bias", "dup_weight", "dup_bias") if adapters is not None else ():
        gradient = results[name]
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, gradient.to(dtype).float()), f"{name} went through {dtype}"


@pytest.mark.sanitize
@pytest.mark.parametrize("drop", [None, "some"])
@pytest.mark.parametrize(
    ("shape", "hidden"), [((1, 1), 1), ((1, 33), 2), ((37, 1), 3), ((2, 3), 37), ((0, 5), 6), ((3, 0, 5), 2)], ids=str
)
@every_plan
def test_smallest_shapes(backend, plan, shape, hidden, drop):
    tensors = draw(shape, hidden, torch.float16, residual=torch.float32, layer_scale="scalar")
    check(tensors, backend, plan, sample_scale=sample_scale(shape[0], drop), dropout_p=0.3, seed=seed())


@every_plan
def test_widest_hidden_of_the_kernels(backend, plan):
    check(draw((7, 18), MAX_CUDA_HIDDEN if backend == "cuda" else 512, torch.bfloat16), backend, plan)


def test_auto_saves_a_narrow_hidden():
    plans = {width: choose_plan(width, 96)[0] for width in (1, 24, 48, 49, 96, 192)}
    assert plans == {1: "save", 24: "save", 48: "save", 49: "recompute", 96: "recompute", 192: "recompute"}
    assert "h = 48 <= C / 2" in choose_plan(48, 96)[1]
    assert "h = 49 > C / 2 = 47.5" in choose_plan(49, 95)[1]


# Where the residual lies in memory, from z: it is z, or one walk cannot serve both.
RESIDUALS = {
    "z": lambda z: None,
    "other strides": COTANGENTS["transposed"],
}


def _check_layout(x, channel_dim, backend, residual, dtype=torch.bfloat16):
    tensors = draw(tuple(x.shape), 34, dtype, channel_dim=channel_dim)
    tensors["z"] = cast(x, dtype)
    tensors["residual"] = RESIDUALS[residual](tensors["z"])
    scale = sample_scale(x.shape[0], "some") if x.dim() > 1 else None
    return check(tensors, backend, sample_scale=scale, dropout_p=0.3, seed=seed(), channel_dim=channel_dim)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("layout", LAYOUTS)
@every_backend
def test_layouts_of_z(backend, layout, residual):
    _check_layout(LAYOUTS[layout](), -1, backend, residual)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("layout", IMAGES)
@every_backend
def test_layouts_of_images(backend, layout, residual):
    z = IMAGES[layout]()
    results = _check_layout(z, 1, backend, residual)
    assert_format_kept(z, results["dz"])
    if residual == "z":
        assert_format_kept(z, results["output"])


@pytest.mark.parametrize("formats", [FORMATS[1:], FORMATS[:0:-1]], ids="residual ".join)
@every_plan
def test_z_and_residual_of_different_formats(backend, plan, formats):
    memory = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
    tensors = draw((2, 36, 5, 7), 20, plain_dtype(backend), residual=torch.float32, channel_dim=1)
    for name, layout in zip(("z", "residual"), formats, strict=True):
        tensors[name] = tensors[name].to(memory_format=memory[layout])
    results = check(tensors, backend, plan, channel_dim=1, sample_scale=sample_scale(2, "some"))
    assert results["dz"].is_contiguous(memory_format=memory[formats[0]]), "dz lies as z does"
    assert results["output"].is_contiguous(memory_format=memory[formats[1]]), "the output lies as the residual does"


STRIDED = {
    "down_weight (C, h) transposed": ("down_weight", lambda w: w.t().contiguous().t()),
    "down_weight expanded": ("down_weight", lambda w: w[:1].expand_as(w)),
    "up_weight (h, C) transposed": ("up_weight", lambda w: w.t().contiguous().t()),
    "up_weight every other column": ("up_weight", lambda w: w.repeat_interleave(2, dim=1)[:, ::2]),
    "down_bias every other element": ("down_bias", lambda b: b.repeat_interleave(2)[::2]),
    "up_bias expanded": ("up_bias", lambda b: b[:1].expand_as(b)),
    "layer_scale every other element": ("layer_scale", lambda g: g.repeat_interleave(2)[::2]),
    "layer_scale expanded": ("layer_scale", lambda g: g[:1].expand_as(g)),
    "layer_scale of one element": ("layer_scale", lambda g: g[:1].clone()),
    "sample_scale every other element": ("sample_scale", lambda k: k.repeat_interleave(2)[::2]),
    "sample_scale expanded": ("sample_scale", lambda k: k[1:2].expand_as(k)),
}


@pytest.mark.parametrize("strided", STRIDED)
@every_backend
def test_strided_parameters(backend, strided):
    tensors = draw((2, 9, 20), 34, plain_dtype(backend))
    tensors["sample_scale"] = sample_scale(2, "some")
    name, restride = STRIDED[strided]
    tensors[name] = restride(tensors[name])
    scale = tensors.pop("sample_scale")
    check(tensors, backend, PLANS[len(strided) % 2], sample_scale=scale, dropout_p=0.3, seed=seed())


@pytest.mark.usefixtures("overflow_checked")
@pytest.mark.parametrize("layout", ["rows far apart", "columns far apart"])
@every_backend
def test_offsets_beyond_32_bits(backend, layout):
    """The elements of z lie over 2**31 elements apart."""
    if DEVICE != "cpu":
        pytest.skip("sparse memory is the host's; test_adapter_residual_gpu.py allocates on the device")
    far = 2**27
    shape, strides = ((35, 20), (far, 1)) if layout == "rows far apart" else ((20, 35), (1, far))
    tensors = draw(shape, 9, torch.float16, residual=torch.float16)
    for name in ("z", "residual"):
        tensors[name] = far_apart(tensors[name], strides)
        check(tensors, backend, dropout_p=0.3, seed=seed())
        tensors[name] = tensors[name].contiguous()


@every_plan
def test_sums_over_rows_in_several_groups(backend, plan, monkeypatch):
    if backend != "triton":
        pytest.skip("portable adds block by block, cuda has no groups: test_adapter_residual_cuda.py")
    from pyfused.kernels import adapter_residual as kernels

    # Three splits of the rows: two in a group and one alone.
    monkeypatch.setattr(kernels, "SLOTS_PER_GROUP", 2)
    check(draw((200, 40), 34), backend, plan, dropout_p=0.3, seed=seed())


@pytest.mark.parametrize("drop", [None, "kept", "some"])
@pytest.mark.parametrize("side", [6, 9])
@pytest.mark.parametrize("layout", FORMATS)
def test_images_in_several_blocks(layout, side, drop, monkeypatch):
    """Small images lie side by side in a block, which may end where dropped ones begin."""
    from pyfused.portable import adapter_residual as portable

    assert 6 * 6 <= portable._SMALL < 9 * 9
    shape, channel_dim = image(side, 12, layout, batch=5)
    # Blocks of part of an image, then of two images; the last one is shorter.
    for block, skipped in ((12 * 20, 0), (12 * 2 * side**2, 0), (12 * 2 * side**2, portable._SKIPPED)):
        monkeypatch.setattr(portable, "_SKIPPED", skipped)
        monkeypatch.setattr(portable, "_CPU_BLOCK", block)
        monkeypatch.setattr(portable, "_CPU_WIDENED", block)
        # U's gradient is summed up as it lies, or transposed.
        for hidden, dtype, plan in ((7, torch.float32, "save"), (4, torch.float32, "save"), (7, torch.float16, "auto")):
            tensors = draw(shape, hidden, dtype, residual=torch.float32, channel_dim=channel_dim)
            options = {"sample_scale": sample_scale(5, drop), "dropout_p": 0.3, "seed": seed()}
            check(tensors, "portable", plan, channel_dim=channel_dim, **options)


@pytest.mark.parametrize("gate", ["layer_scale", "sample_scale"])
@every_backend
def test_gates_are_not_rounded_to_16_bits(backend, gate):
    tensors = draw((2, 9, 20), 8, torch.bfloat16, residual=torch.float32, layer_scale=None)
    z, zeros = tensors["z"], {name: torch.zeros_like(tensors[name]) for name in ("up_weight", "up_bias", "residual")}
    value = torch.full((20 if gate == "layer_scale" else 2,), 1.0 + 2.0**-12, device=DEVICE)
    y = pyfused.adapter_residual(**(tensors | zeros | {gate: value}), backend=backend)
    assert torch.equal(y, value[0] * z.float())


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
@every_plan
def test_a_tiny_layer_scale_in_float16(backend, plan, loss_scale):
    """gamma = 1e-6 underflows to 6e-8's multiples in float16; unrounded, it costs no gradient a digit."""
    gamma = 1e-6
    tensors = draw((70, 36), 20, torch.float16, adapters=torch.float32, residual=torch.float32)
    exact_z = {name: None if value is None else value.double() for name, value in tensors.items()}
    tensors["layer_scale"] = torch.full((36,), gamma, device=DEVICE)
    exact_z["layer_scale"] = tensors["layer_scale"].double()
    for name in ("down_weight", "down_bias", "up_weight", "up_bias"):
        tensors[name] = tensors[name].half().float()
        exact_z[name] = tensors[name].double()
    dy = loss_scale * randn(70, 36, device=DEVICE)

    def gradients(function, tensors, dy, **options):
        leaves = leaves_of(tensors)
        grads = torch.autograd.grad(function(**leaves, **options), list(leaves.values()), dy)
        return dict(zip(leaves, grads, strict=True))

    ours = gradients(pyfused.adapter_residual, tensors, dy, backend=backend, plan=plan)
    oracle = gradients(reference.adapter_residual, exact_z, dy.double())
    # Everything but gamma's own gradient is linear in gamma: plain torch at gamma = 1 shows what float16 costs.
    one = {"layer_scale": torch.ones_like(tensors["layer_scale"])}
    plain = gradients(reference.adapter_residual, tensors | one, dy)
    exact_one = gradients(
        reference.adapter_residual, exact_z | {"layer_scale": one["layer_scale"].double()}, dy.double()
    )
    for name in ("z", "down_weight", "down_bias", "up_weight", "up_bias"):
        assert ours[name].isfinite().all()
        assert ours[name].count_nonzero() > 0.9 * ours[name].numel(), name
        # dz itself is float16: what it can hold is a multiple of its smallest number.
        spacing = torch.finfo(torch.float16).smallest_normal * 2.0**-10 if name == "z" else 0.0
        errors = norms(ours[name].double() - oracle[name])
        allowed = norms(plain[name].double() - exact_one[name])
        for error, unit, size, count in zip(errors, allowed, norms(oracle[name]), (ours[name].numel(), 1), strict=True):
            assert error <= 2 * gamma * unit + 2.0**-10 * size + spacing * count**0.5, name


def test_dropout_acts_in_training_only_and_sample_scale_always():
    tensors, scale = draw((50, 17), 9), sample_scale(50, "some")
    plain = pyfused.adapter_residual(**tensors)
    assert torch.equal(pyfused.adapter_residual(**tensors, dropout_p=0.5, training=False), plain)
    assert not torch.equal(pyfused.adapter_residual(**tensors, dropout_p=0.5), plain)
    dropped = pyfused.adapter_residual(**tensors, sample_scale=scale, training=False)
    assert torch.equal(dropped, pyfused.adapter_residual(**tensors, sample_scale=scale))
    assert not torch.equal(dropped, plain)


FORMULAS = {
    "identity": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_formula(activation):
    """The oracle itself, against the formula written with matrix products."""
    t = draw((6, 5), 4, torch.float64, residual=torch.float64)
    scale = sample_scale(6, "some", torch.float64)
    hidden = FORMULAS[activation](t["z"] @ t["down_weight"].T + t["down_bias"])
    branch = 0.7 * t["z"] + hidden @ t["up_weight"].T + t["up_bias"]
    expected = t["residual"] + scale[:, None] * t["layer_scale"] * branch
    options = {"skip": 0.7, "activation": activation}
    torch.testing.assert_close(reference.adapter_residual(**t, sample_scale=scale, **options), expected)
    image = t | {name: t[name].reshape(6, 5, 1) for name in ("z", "residual")}
    by_channel = reference.adapter_residual(**image, sample_scale=scale, channel_dim=1, **options)
    torch.testing.assert_close(by_channel.reshape(6, 5), expected)
    own = reference.adapter_residual(**(t | {"residual": None}), sample_scale=scale, **options)
    torch.testing.assert_close(own, expected - t["residual"] + t["z"])
