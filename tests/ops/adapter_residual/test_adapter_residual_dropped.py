"""Dropped samples of ``adapter_residual``: copied whatever they hold, and no arithmetic done on them."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import types

import pytest
import torch
from adapter_residual_cases import draw, every_plan, sample_scale
from operator_cases import DEVICE, RawCalls, leaves_of, plain_dtype, run, skips
from oracle import randn
from torch.utils._python_dispatch import TorchDispatchMode

import pyfused
from pyfused.ops.adapter_residual import PLANS
from pyfused.portable import adapter_residual as portable

BATCH = 4
# Rows of each sample: one, fewer than a tile of rows, more.
SHAPES = {
    "one row": ((BATCH, 20), -1),
    "few rows": ((BATCH, 5, 20), -1),
    "rows": ((BATCH, 5, 7, 20), -1),
    "NCHW": ((BATCH, 20, 5, 7), 1),
    "channels_last": ((BATCH, 20, 5, 7), 1),
}
HOMES = {"portable": "pyfused.portable.adapter_residual", "triton": "pyfused.kernels.adapter_residual"}


@pytest.fixture
def way(request, monkeypatch):
    """How portable treats dropped samples: small ones are computed like others, large ones are told apart, and where
    asking which are dropped would wait for a GPU, a mask zeroes them."""
    if request.param != "together":
        monkeypatch.setattr(portable, "_SKIPPED", 0 if request.param == "apart" else 1 << 62)
    if request.param == "masked":
        monkeypatch.setattr(portable, "_dead", lambda k: None if k is None else k == 0)


_WAYS = [
    pytest.param(backend, way, marks=skips(backend), id=backend if way == "together" else f"{backend}-{way}")
    for backend, ways in (
        ("portable", ("together", "apart", "masked")),
        ("triton", ("together",)),
        ("cuda", ("together",)),
        ("cpu", ("together",)),
    )
    for way in ways
]


def every_way(test):
    """Parametrizes ``backend``, and portable's ways."""
    parametrized = pytest.mark.parametrize(("backend", "way"), _WAYS, indirect=["way"])(test)
    return pytest.mark.usefixtures("way")(parametrized)


def _gradients(leaves, dy, **options):
    y = pyfused.adapter_residual(**leaves, **options)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    return y.detach(), dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy), strict=True))


def _spoiled(x, dead):
    """x with NaN and infinities all over the dropped samples."""
    x = x.clone()
    for sample, value in zip(dead, (math.nan, math.inf, -math.inf), strict=False):
        x[sample] = value
    return x


@pytest.mark.parametrize("residual", [None, torch.float32], ids=["z is residual", "float32 residual"])
@pytest.mark.parametrize("case", SHAPES)
@every_way
def test_what_a_dropped_sample_holds_does_not_matter(backend, case, residual):
    shape, channel_dim = SHAPES[case]
    plan = PLANS[(list(SHAPES).index(case) + (residual is None)) % 2]
    clean = draw(shape, 12, torch.bfloat16, residual=residual, channel_dim=channel_dim)
    if case == "channels_last":
        clean["z"] = clean["z"].to(memory_format=torch.channels_last)
    scale = sample_scale(BATCH, "some")
    dead, live = (scale == 0).nonzero().flatten().tolist(), (scale != 0).nonzero().flatten()
    spoiled = clean | {"z": _spoiled(clean["z"], dead)}
    dy = randn(*shape, dtype=residual or torch.bfloat16, seed=8, device=DEVICE)
    spoiled_dy = _spoiled(dy, dead)
    options = {"channel_dim": channel_dim, "backend": backend, "plan": plan}

    y, gradients = _gradients(leaves_of(spoiled), spoiled_dy, sample_scale=scale, **options)
    passed = spoiled["z"] if residual is None else spoiled["residual"]
    torch.testing.assert_close(y[dead], passed[dead], rtol=0, atol=0, equal_nan=True)
    to_z = spoiled_dy if residual is None else torch.zeros_like(dy, dtype=torch.bfloat16)
    torch.testing.assert_close(gradients["z"][dead], to_z[dead], rtol=0, atol=0, equal_nan=True)

    expected_y, expected = _gradients(leaves_of(clean), dy, sample_scale=scale, **options)
    assert torch.equal(y[live], expected_y[live])
    assert torch.equal(gradients["z"][live], expected["z"][live])
    without = clean | {name: clean[name][live] for name in ("z", "residual") if clean[name] is not None}
    _, absent = _gradients(leaves_of(without), dy[live], sample_scale=scale[live], **options)
    for name in ("down_weight", "down_bias", "up_weight", "up_bias", "layer_scale"):
        assert gradients[name].isfinite().all(), name
        assert torch.equal(gradients[name], expected[name]), f"{name} depends on what dropped samples hold"
        assert absent[name].count_nonzero() > 0
        # Fewer rows are summed in another order, and an element's rounding is that of its terms, not of their sum.
        torch.testing.assert_close(
            gradients[name], absent[name], rtol=1e-5, atol=1e-5 * absent[name].abs().max().item()
        )


@pytest.mark.parametrize("residual", [None, torch.bfloat16], ids=["z is residual", "bfloat16 residual"])
@pytest.mark.parametrize("drop", ["some", "all"])
@pytest.mark.parametrize("case", ["one row", "rows", "channels_last"])
@every_way
def test_nothing_aliases(backend, case, drop, residual):
    shape, channel_dim = SHAPES[case]
    dtype = plain_dtype(backend)
    leaves = leaves_of(draw(shape, 12, dtype, residual=residual, channel_dim=channel_dim))
    dy = randn(*shape, dtype=residual or dtype, device=DEVICE)
    options = {"sample_scale": sample_scale(BATCH, drop), "channel_dim": channel_dim}
    y, gradients = _gradients(leaves, dy, **options, backend=backend)
    given = {value.untyped_storage().data_ptr() for value in (*leaves.values(), dy) if value is not None}
    assert y.untyped_storage().data_ptr() not in given
    assert gradients["z"].untyped_storage().data_ptr() not in given
    if drop == "all":
        assert torch.equal(y, leaves["z"] if residual is None else leaves["residual"])
        for name in ("down_weight", "down_bias", "up_weight", "up_bias", "layer_scale"):
            assert gradients[name].count_nonzero() == 0, name


class _Products(TorchDispatchMode):
    """Multiply-adds of the matrix products inside."""

    OPERATORS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_linear_pointwise", "linear")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name in self.OPERATORS:
            left = args[1] if "add" in name else args[0]
            self.count += out.numel() * left.shape[-1]
        return out


@contextlib.contextmanager
def _dots(monkeypatch):
    """``tl.dot`` of the interpreter inside."""
    from triton.runtime.interpreter import InterpreterBuilder

    counter, create_dot = types.SimpleNamespace(count=0), InterpreterBuilder.create_dot

    def counted(*args):
        counter.count += 1
        return create_dot(*args)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", counted)
        yield counter


@pytest.mark.parametrize("channel_dim", [-1, 1])
@every_plan
def test_dropped_samples_do_no_arithmetic(backend, plan, channel_dim, monkeypatch):
    if DEVICE != "cpu":
        pytest.skip("products are counted in plain torch on a CPU and in Triton's interpreter")
    if backend in ("cuda", "cpu"):
        pytest.skip("what is compiled counts no products; for cpu see test_adapter_residual_cpu.py")
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("counts the interpreter's products")
    monkeypatch.setattr(portable, "_SKIPPED", 0)
    # A sample is a tile of rows without a tail.
    shape = (BATCH, 32, 20) if channel_dim == -1 else (BATCH, 20, 4, 8)
    tensors = draw(shape, 12, residual=torch.float32, channel_dim=channel_dim)
    scales = {"kept": sample_scale(BATCH, "kept"), "all": sample_scale(BATCH, "all")}
    scales["half"] = torch.tensor([0.0, 1.5, 1.0, 0.0], device=DEVICE)
    scales["one"] = torch.tensor([0.0, 0.0, 1.5, 0.0], device=DEVICE)
    options = {"channel_dim": channel_dim, "backend": backend, "plan": plan}
    with RawCalls() as raw:
        run(pyfused.adapter_residual, tensors, sample_scale=scales["kept"], **options)
    assert [direction for direction, _ in raw.calls] == ["fwd", "bwd"]
    for direction, arguments in raw.calls:
        implementation = getattr(importlib.import_module(HOMES[backend]), f"adapter_residual_{direction}")
        products = {}
        for name, scale in scales.items():
            counting = _Products() if backend == "portable" else _dots(monkeypatch)
            with torch.no_grad(), counting as counter:
                implementation(**arguments | {"sample_scale": scale})
            products[name] = counter.count
        # Triton's sums over rows multiply what is not read, as zeros: a branch would keep loads from going ahead.
        zeros = products["all"] if (backend, direction) == ("triton", "bwd") else 0
        kept, half, one, none = (products[name] - zeros for name in ("kept", "half", "one", "all"))
        assert none == 0, direction
        assert kept == 2 * half == 4 * one > 0, direction


@pytest.mark.parametrize("length", [1, 7, 40])
@every_way
def test_a_dropped_residual_keeps_its_sign_of_zero(backend, length):
    options = {"dtype": plain_dtype(backend), "device": DEVICE}
    z = randn(4, length, 6, **options)
    residual = torch.full_like(z, -0.0)
    weights = randn(3, 6, **options), None, randn(6, 3, **options), None
    keep = torch.tensor([1.0, 0.0, 0.0, 2.0], device=DEVICE)
    y = pyfused.adapter_residual(z, *weights, residual=residual, sample_scale=keep, backend=backend)
    assert y[1:3].signbit().all()
    assert y[[0, 3]].any()
