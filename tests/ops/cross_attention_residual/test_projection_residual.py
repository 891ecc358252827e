"""``projection_residual`` against float64: output and every gradient, on every backend present."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from cross_attention_cases import PROJECTION_NAMES, check_projection, draw_projection
from operator_cases import (
    COTANGENTS,
    DEVICE,
    LAYOUTS,
    RawCalls,
    autocast,
    cast,
    every_backend,
    far_apart,
    leaves_of,
    rotated,
    run,
)
from oracle import cotangent, randn

import pyfused
from pyfused import reference
from pyfused.ops.adapter_residual import ACTIVATIONS

SKIPS = (1.0, 0.0, -0.5, 0.9)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GATES = ("channels", "scalar", None)
# (M, K, C)
SHAPES = ((1, 1, 1), (1, 33, 7), (67, 41, 36), (2, 5, 131), (0, 6, 5), (97, 96, 64))


def _number(gate: str | None) -> dict[str, float]:
    """What stands for a gate that is no tensor."""
    return {} if gate is not None else {"gate": -0.6}


@pytest.mark.sanitize
@rotated(
    {"portable": ("",), "triton": ("",)},
    activation=ACTIVATIONS,
    added=tuple(itertools.product(SKIPS, (False, True))),
)
def test_every_activation(backend, plan, activation, added):
    skip, norm_match = added
    n = ACTIVATIONS.index(activation) + 7 * SKIPS.index(skip) + 28 * norm_match
    dtype, gate = DTYPES[(n + n // 7) % (4 if backend == "portable" else 3)], GATES[(n + n // 3) % 3]
    tensors = draw_projection(
        (2, 35, 41), 37, dtype, gate=gate, bias=n % 4 != 0,
        residual=(None, torch.float32, torch.bfloat16)[n // 2 % 3] if dtype != torch.float64 else None,
        weights=torch.float32 if dtype.itemsize == 2 and n % 3 else None,
    )  # fmt: skip
    results = check_projection(
        tensors, backend, activation=activation, skip=skip, norm_match=norm_match, eps=(1e-6, 1e-2)[n % 2],
        **_number(gate),
    )  # fmt: skip
    assert results["output"].dtype == tensors["residual"].dtype
    assert results["output"].is_contiguous()


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
def test_odd_sizes(backend, dtype, shape):
    norm_match = (DTYPES.index(dtype) + SHAPES.index(shape)) % 2 == 0
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("no kernel takes float64")
    rows, width, channels = shape
    check_projection(draw_projection((rows, width), channels, dtype, gate="scalar"), backend, norm_match=norm_match)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ["identity", "leaky_relu"])
@pytest.mark.parametrize(
    ("dtype", "residual", "weights"),
    [
        (torch.bfloat16, torch.float32, None),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, None),
        (torch.float32, torch.bfloat16, None),
        (torch.float64, torch.float32, None),
    ],
    ids=str,
)
@every_backend
def test_mixed_dtypes(backend, dtype, residual, weights, activation, gate):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("no kernel takes float64")
    rows = 1500 if backend == "portable" else 70
    tensors = draw_projection((rows, 36), 20, dtype, residual=residual, weights=weights, gate=gate)
    results = check_projection(tensors, backend, activation=activation, skip=0.9, **_number(gate))
    assert results["output"].dtype == residual
    assert results["dweight"].dtype == (weights or dtype)


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@every_backend
def test_rows_of_zeros(backend, eps, activation):
    tensors = draw_projection((40, 24), 20, bias=False, gate="scalar")
    tensors["o"][3:6] = 0.0
    tensors["residual"][5:9] = 0.0
    results = check_projection(tensors, backend, activation=activation, norm_match=True, eps=eps, skip=0.5)
    for name, value in results.items():
        assert value.isfinite().all(), name
    assert torch.equal(results["output"][3:9], 0.5 * tensors["residual"][3:9]), "a norm of 0 on either side gives 0"


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@every_backend
def test_the_blend_of_aa_clip(backend, dtype):
    """(1 - w) x + w a |x| / |a| with a = LeakyReLU(W x)."""
    tensors = draw_projection((2, 35, 40), 40, torch.float64, bias=False, gate=None)
    x, weight = (tensors[name].to(dtype).requires_grad_() for name in ("o", "weight"))
    options = {"gate": 0.1, "skip": 0.9, "activation": "leaky_relu", "norm_match": True, "eps": 0.0}
    y = pyfused.projection_residual(x, weight, residual=x, **options, backend=backend)
    exact = [value.detach().double().requires_grad_() for value in (x, weight)]
    a = F.leaky_relu(exact[0] @ exact[1].T, 0.01)
    expected = 0.1 * a * exact[0].norm(dim=-1, keepdim=True) / a.norm(dim=-1, keepdim=True) + 0.9 * exact[0]
    dy = cotangent(y)
    ours = y, *torch.autograd.grad(y, (x, weight), dy)
    for actual, value in zip(ours, (expected, *torch.autograd.grad(expected, exact, dy.double())), strict=True):
        assert (actual - value).norm() < 4 * torch.finfo(dtype).eps * value.norm() + 1e-6


@pytest.mark.parametrize("residual", ["o's strides", *(name for name in COTANGENTS if name != "channels_last")])
@pytest.mark.parametrize("layout", LAYOUTS)
@every_backend
def test_layouts(backend, layout, residual):
    norm_match = (list(LAYOUTS).index(layout) + len(residual)) % 2 == 0
    o = cast(LAYOUTS[layout](), torch.bfloat16)
    tensors = draw_projection(tuple(o.shape), 20, torch.bfloat16, gate="scalar") | {"o": o}
    tensors["residual"] = o if residual == "o's strides" else COTANGENTS[residual](o)
    check_projection(tensors, backend, norm_match=norm_match, skip=0.9)


STRIDED = {
    "weight transposed": ("weight", lambda w: w.t().contiguous().t()),
    "weight expanded": ("weight", lambda w: w[:1].expand_as(w)),
    "weight every other column": ("weight", lambda w: w.repeat_interleave(2, dim=1)[:, ::2]),
    "bias every other element": ("bias", lambda b: b.repeat_interleave(2)[::2]),
    "gate every other element": ("gate", lambda g: g.repeat_interleave(2)[::2]),
    "gate expanded": ("gate", lambda g: g[:1].expand_as(g)),
    "gate of one element": ("gate", lambda g: g[:1].clone()),
}


@pytest.mark.parametrize("norm_match", [False, True])
@pytest.mark.parametrize("case", STRIDED)
@every_backend
def test_strided_parameters(backend, case, norm_match):
    tensors, (name, restride) = draw_projection((9, 34), 20), STRIDED[case]
    tensors[name] = restride(tensors[name])
    check_projection(tensors, backend, norm_match=norm_match)


@pytest.mark.usefixtures("overflow_checked")
@pytest.mark.parametrize("rows", ["o", "residual"])
@every_backend
def test_offsets_beyond_32_bits(backend, rows):
    """The elements lie over 2**31 elements apart."""
    if DEVICE != "cpu":
        pytest.skip("sparse memory is the host's")
    far = 2**27
    tensors = draw_projection((35, 24), 20, torch.float16)
    tensors[rows] = far_apart(tensors[rows], (far, 1))
    check_projection(tensors, backend, norm_match=True)


def test_rows_in_several_blocks(monkeypatch):
    from pyfused.portable import projection_residual as portable

    for block in (20 * 16, 20 * 90):
        # Blocks of part of a sample, then of two samples; the last one is shorter.
        monkeypatch.setattr(portable, "_CPU_BLOCK", block)
        monkeypatch.setattr(portable, "_BLOCK", block)
        tensors = draw_projection((3, 41, 24), 20)
        # Strides that keep the samples apart.
        tensors["residual"] = randn(41, 3, 20, seed=6, device=DEVICE).transpose(0, 1)
        check_projection(tensors, "portable", norm_match=True, activation="gelu", skip=0.9)


@every_backend
def test_a_gate_is_not_rounded_to_16_bits(backend):
    tensors = draw_projection((9, 20), 20, torch.bfloat16, residual=torch.float32, bias=False, gate=None)
    tensors |= {"weight": torch.eye(20, device=DEVICE), "residual": torch.zeros(9, 20, device=DEVICE)}
    for gate in (1.0 + 2.0**-12, torch.full((20,), 1.0 + 2.0**-12, device=DEVICE)):
        y = pyfused.projection_residual(**tensors, gate=gate, backend=backend)
        assert torch.equal(y, (1.0 + 2.0**-12) * tensors["o"].float())


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("norm_match", [False, True])
@every_backend
def test_float16_under_a_float32_stream_survives_a_scaled_loss(backend, norm_match, learned):
    """|dy| beyond float16, w small: what is made of them is inside, as in plain torch."""
    tensors = draw_projection((40, 24), 20, torch.float16, residual=torch.float32, gate=None)
    gate = {"gate": torch.full((20,), 1e-5, device=DEVICE)}
    tensors, options = (tensors | gate, {}) if learned else (tensors, gate)
    check_projection(tensors, backend, dy=lambda y: 1e5 * cotangent(y), norm_match=norm_match, **options)


# Each alone, all.
SUBSETS = [subset for size in (1, 5) for subset in itertools.combinations(PROJECTION_NAMES, size)]


@pytest.mark.parametrize(("activation", "norm_match"), [("identity", False), ("gelu", False), ("identity", True)])
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
@every_backend
def test_what_requires_grad_gets_it_and_costs_alone(backend, subset, activation, norm_match):
    tensors = draw_projection((2, 3, 5), 6, gate=("scalar", "channels")[SUBSETS.index(subset) % 2])
    options = {"activation": activation, "norm_match": norm_match, "skip": 0.9}
    expected = dict(zip(PROJECTION_NAMES, run(reference.projection_residual, tensors, **options)[1:], strict=True))
    leaves, saved = leaves_of(tensors, subset), []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with RawCalls() as raw:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = pyfused.projection_residual(**leaves, **options, backend=backend)
        y.backward(cotangent(y))
    for name, leaf in leaves.items():
        if name in subset:
            torch.testing.assert_close(leaf.grad, expected[name])
        else:
            assert leaf.grad is None, name
    # Backward makes what is needed alone, and is not called for a residual whose gradient is skip dy.
    (_, forward), *backward = raw.calls
    called = norm_match or set(subset) != {"residual"}
    assert len(backward) == called
    keeps = called and (activation != "identity" or norm_match or "gate" in subset)
    assert forward["save"] is keeps
    if called:
        call = backward[0][1]
        assert call["need_do"] is ("o" in subset)
        assert call["need_weight"] is bool({"weight", "bias"} & set(subset))
        assert call["need_residual"] is (norm_match and "residual" in subset)
        assert call["need_gate"] is ("gate" in subset)
    own = {leaf.data_ptr(): name for name, leaf in leaves.items()}
    kept = [own.get(tensor.data_ptr(), "h") for tensor in saved]
    assert set(kept) - {"weight", "bias", "gate"} == (
        ({"h"} if keeps else set()) | ({"o"} if "weight" in subset else set()) | ({"residual"} if norm_match else set())
    )
    assert sum(tensor.nbytes for tensor, name in zip(saved, kept, strict=True) if name == "h") == keeps * 6 * 6 * 4


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm_match", [False, True])
def test_gradcheck(norm_match, activation):
    n = ACTIVATIONS.index(activation) + 7 * norm_match
    tensors = draw_projection((3, 2, 4), 5, torch.float64, bias=n % 5 != 4, gate=("channels", "scalar")[n % 2])
    given = {name: value for name, value in tensors.items() if value is not None}

    def function(*values):
        return pyfused.projection_residual(
            **tensors | dict(zip(given, values, strict=True)), skip=SKIPS[n % 4], activation=activation,
            norm_match=norm_match, eps=(0.0, 0.1)[n % 2], backend="portable",
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, tuple(leaves_of(given).values()), fast_mode=True)


@pytest.mark.parametrize("norm_match", [False, True])
@every_backend
def test_autocast_casts_the_branch_and_not_the_residual(backend, norm_match):
    tensors = draw_projection((33, 20), 12)
    function = functools.partial(pyfused.projection_residual, norm_match=norm_match, backend=backend)

    def by_hand(o, weight, bias, **rest):
        return function(o.bfloat16(), weight.bfloat16(), bias.bfloat16(), **rest)

    ours = run(autocast(function, torch.bfloat16), tensors)
    assert {value.dtype for value in ours} == {torch.float32}
    for actual, expected in zip(ours, run(by_hand, tensors), strict=True):
        assert torch.equal(actual, expected)


FORMULAS = {
    "identity": lambda h: h,
    "relu": lambda h: h.clamp(min=0),
    "leaky_relu": lambda h: torch.where(h > 0, h, 0.01 * h),
    "gelu": lambda h: h * (1 + torch.erf(h / 2**0.5)) / 2,
    "gelu_tanh": lambda h: h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))) / 2,
    "quick_gelu": lambda h: h / (1 + torch.exp(-1.702 * h)),
    "silu": lambda h: h / (1 + torch.exp(-h)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_formula(activation):
    t = draw_projection((6, 4), 5, torch.float64)
    c = FORMULAS[activation](t["o"] @ t["weight"].T + t["bias"])
    options = {"skip": 0.7, "activation": activation}
    torch.testing.assert_close(reference.projection_residual(**t, **options), 0.7 * t["residual"] + t["gate"] * c)
    matched = c * (t["residual"].square().sum(-1) ** 0.5 / (c.square().sum(-1) ** 0.5 + 0.1))[:, None]
    y = reference.projection_residual(**t, **options, norm_match=True, eps=0.1)
    torch.testing.assert_close(y, 0.7 * t["residual"] + t["gate"] * matched)
