"""The products of the portable backend, by either library: what they compute, and which library makes them."""

from __future__ import annotations

import pytest
import torch
from oracle import randn

from pyfused.portable import gemm

BATCH, LENGTH, K, N = 3, 37, 29, 23


@pytest.fixture(params=["torch's own", "oneDNN"])
def library(request, monkeypatch):
    """Every product by one of the two, whatever its size and the machine."""
    if request.param == "oneDNN":
        packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
        if packet is None:
            pytest.skip("this torch has no oneDNN")
        monkeypatch.setattr(gemm, "_onednn", packet.default)
        monkeypatch.setattr(gemm, "_SMALL", 1)
        monkeypatch.setattr(gemm, "_NARROW", 0)
    else:
        monkeypatch.setattr(gemm, "_onednn", None)


def _images(columns: int, layout: str, seed: int) -> torch.Tensor:
    if layout == "rows":
        return randn(BATCH, LENGTH, columns, seed=seed)
    if layout == "by channels":
        return randn(BATCH, columns, LENGTH, seed=seed).mT
    if layout == "side by side":
        return randn(columns, BATCH, LENGTH, seed=seed).permute(1, 2, 0)
    return randn(BATCH, LENGTH, 2 * columns + 1, seed=seed)[..., 1::2]


LAYOUTS = ("rows", "by channels", "side by side", "apart")


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_product(layout, library):
    x, weight, bias = _images(K, layout, 1), randn(N, K, seed=2), randn(N, seed=3)
    channels_first = layout in ("by channels", "side by side")
    exact = x.double() @ weight.double().T
    _close(gemm.product(x, weight, channels_first), exact)
    _close(gemm.product(x, weight, channels_first, alpha=0.5), 0.5 * exact)
    _close(gemm.product(x, weight, channels_first, bias), exact + bias)
    out = _images(N, layout, 4) if layout != "apart" else torch.empty(BATCH, LENGTH, N)
    made = gemm.product(x, weight, channels_first, bias, out=out)
    assert made.data_ptr() == out.data_ptr()
    _close(out, exact + bias)


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_added_in_place(layout, library):
    x, weight, y = _images(K, layout, 1), randn(N, K, seed=2), _images(N, layout, 3)
    expected = y.double() + 0.25 * x.double() @ weight.double().T
    gemm.add_product_(y, x, weight, 0.25)
    _close(y, expected)


def test_added_in_place_to_rows(library):
    x, weight, y = randn(LENGTH, K, seed=1), randn(N, K, seed=2), randn(LENGTH, N, seed=3)
    expected = y.double() + x.double() @ weight.double().T
    gemm.add_product_(y, x, weight)
    _close(y, expected)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_of_images(layout, shared, library):
    left, right = _images(K, layout, 1), randn(1 if shared else BATCH, K, N, seed=2)
    exact = left.double() @ right.double()
    _close(gemm.bmm(left, right), exact)
    y, out = randn(BATCH, LENGTH, N, seed=3), torch.empty(BATCH, LENGTH, N)
    gemm.baddbmm(y, left, right, out)
    _close(out, y + exact)


@pytest.mark.parametrize("columns", [5, 23, 200])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_over_rows(layout, columns, library):
    left, right = _images(K, layout, 1), _images(columns, layout, 2)
    exact = torch.einsum("bli,blj->ij", left.double(), right.double())
    _close(gemm.sum_over_rows(left, right, torch.float32), exact)
    _close(gemm.sum_over_rows(left, right, torch.float32, 0.5), 0.5 * exact)
    total = randn(K, columns, seed=3)
    expected = total + 2 * exact
    gemm.add_outer_(total, left, right, 2.0)
    _close(total, expected)


def test_small_products_are_torchs_own(monkeypatch):
    monkeypatch.setattr(gemm, "_onednn", object())
    x = torch.empty(64, 128)
    most = gemm._SMALL // x.numel()
    assert gemm._takes_onednn(x, most)
    assert not gemm._takes_onednn(x, most - 1)
    assert not gemm._takes_onednn(x, most, images=2)
    assert not gemm._takes_onednn(x.double(), most)
    assert not gemm._takes_onednn(x[:0], most)
