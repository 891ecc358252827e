"""`PCACompressor` against scikit-learn's PCA: at once, batch by batch, saved and loaded, on bad input."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import randn
from sklearn.decomposition import PCA
from torch import Tensor, nn

from pyfused.models import PCACompressor

FEATURES, KEPT = 24, 7


def data(rows: int = 200, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Correlated features with means of their own."""
    mixed = randn(rows, FEATURES, seed=seed, dtype=torch.float64) @ randn(FEATURES, FEATURES, seed=8).double()
    return (mixed + 5 * randn(FEATURES, seed=9).double()).to(dtype)


def assert_same_fit(one: PCACompressor, other: PCACompressor, tolerance: float = 1e-10) -> None:
    for (name, a), (_, b) in zip(one.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)


class TestFit:
    # More rows than features, as many, and fewer: there the rank is that of the rows.
    @pytest.mark.parametrize("rows", [200, FEATURES, 12])
    def test_numbers_are_those_of_scikit_learn(self, rows):
        e = data(rows)
        ours, theirs = PCACompressor(KEPT).fit(e), PCA(KEPT, svd_solver="full").fit(e.numpy())
        for name in ("components_", "mean_", "explained_variance_", "explained_variance_ratio_"):
            np.testing.assert_allclose(getattr(ours, name).numpy(), getattr(theirs, name), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(ours.var_.numpy(), e.numpy().var(0), rtol=1e-10)
        assert ours.n_samples_seen_.item() == theirs.n_samples_ == rows
        c = ours.transform(e)
        np.testing.assert_allclose(c.numpy(), theirs.transform(e.numpy()), rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(
            ours.inverse_transform(c).numpy(), theirs.inverse_transform(c.numpy()), rtol=1e-8, atol=1e-8
        )

    def test_batch_by_batch_is_the_whole(self):
        e, whole = data(), PCACompressor(KEPT).fit(data())
        parts = e.split([10, 1, 89, 0, 100])
        one_by_one = PCACompressor(KEPT)
        for seen, part in zip((10, 11, 100, 100, 200), parts, strict=True):
            assert one_by_one.partial_fit(part) is one_by_one
            assert one_by_one.n_samples_seen_.item() == seen
        assert_same_fit(one_by_one, whole)
        assert_same_fit(PCACompressor(KEPT).fit(part for part in parts), whole)

    def test_fit_forgets_and_partial_fit_adds(self):
        pca = PCACompressor(KEPT).fit(data(seed=3))
        assert_same_fit(copy.deepcopy(pca).fit(data()), PCACompressor(KEPT).fit(data()))
        both = torch.cat([data(seed=3), data()])
        assert_same_fit(pca.partial_fit(data()), PCACompressor(KEPT).fit(both))

    def test_leading_dimensions_are_rows(self):
        e = data(120)
        assert_same_fit(PCACompressor(KEPT).fit(e.reshape(4, 30, FEATURES)), PCACompressor(KEPT).fit(e))

    def test_a_mean_far_from_0_costs_nothing(self):
        """Sums of squares in float32 would have no digit left."""
        e = data(dtype=torch.float32)
        far = PCACompressor(KEPT).fit(part + 4096.0 for part in (e.double()).split(40))
        torch.testing.assert_close(far.components_, PCACompressor(KEPT).fit(e.double()).components_, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_statistics_of_narrow_data_are_float32(self, dtype):
        e = data(dtype=dtype)
        pca, exact = PCACompressor(KEPT).fit(e), PCACompressor(KEPT).fit(e.double())
        assert {name: buffer.dtype for name, buffer in pca.named_buffers() if buffer.dtype != torch.float32} == {
            "n_samples_seen_": torch.int64
        }
        assert_same_fit(pca.double(), exact, 1e-6)


class TestTransform:
    def test_formula_and_gradient(self):
        pca, e = PCACompressor(KEPT).fit(data()), data(6).reshape(2, 3, FEATURES).requires_grad_()
        c = pca(e)
        torch.testing.assert_close(c, (e - pca.mean_) @ pca.components_.t(), rtol=1e-12, atol=1e-12)
        dc = randn(2, 3, KEPT, dtype=torch.float64)
        (de,) = torch.autograd.grad(c, e, dc)
        torch.testing.assert_close(de, dc @ pca.components_, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_narrow_embeddings_are_centred_in_float32(self, dtype):
        e = (data(50) / 20 + 8).to(dtype)
        pca = PCACompressor(KEPT).fit(e)
        c, exact = pca.transform(e), (e.double() - pca.mean_.double()) @ pca.components_.double().t()
        assert c.dtype == pca.inverse_transform(c).dtype == dtype
        # Two roundings of factors and one of the sum; a mean in 16 bits alone would cost as much as eps * 8.
        assert (c.double() - exact).norm() < 1.5 * torch.finfo(dtype).eps * exact.norm()

    def test_under_autocast_the_dtype_is_the_embeddings(self):
        pca, e = PCACompressor(KEPT).fit(data(dtype=torch.float32)), data(4, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            c = pca.transform(e)
        assert c.dtype == pca.inverse_transform(c).dtype == torch.float32
        assert 0 < F.mse_loss(c, pca.transform(e)).sqrt() < 0.02 * c.std()

    def test_casts_leave_the_statistics(self):
        pca = PCACompressor(KEPT).fit(data(dtype=torch.float32))
        before = {name: buffer.clone() for name, buffer in pca.named_buffers()}
        nn.Sequential(pca).half().bfloat16()
        assert all(torch.equal(buffer, before[name]) for name, buffer in pca.named_buffers())
        assert pca.double().mean_.dtype == torch.float64
        assert pca.float().mean_.dtype == torch.float32


class TestFiles:
    def test_saved_with_a_model_and_loaded_into_an_unfitted_one(self):
        e = data()
        model = nn.Sequential(PCACompressor(KEPT).fit(e), nn.Linear(KEPT, 3, dtype=torch.float64))
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        loaded = nn.Sequential(PCACompressor(KEPT), nn.Linear(KEPT, 3, dtype=torch.float64))
        loaded.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(loaded(e), model(e))
        assert_same_fit(loaded[0], model[0], 0.0)
        with pytest.raises(RuntimeError, match="partial_fit needs sums that a state_dict does not hold; call fit"):
            loaded[0].partial_fit(e)
        assert_same_fit(loaded[0].fit(data(seed=4)), PCACompressor(KEPT).fit(data(seed=4)))

    def test_of_another_width(self):
        pca = PCACompressor(KEPT).fit(data())
        pca.load_state_dict(PCACompressor(KEPT).fit(randn(50, 9)).state_dict())
        assert pca.transform(randn(2, 9)).shape == (2, KEPT)
        with pytest.raises(RuntimeError, match="size mismatch for components_"):
            PCACompressor(KEPT + 1).load_state_dict(pca.state_dict())

    def test_a_copy_goes_on_alone(self):
        pca = PCACompressor(KEPT).fit(data())
        other = copy.deepcopy(pca)
        other.partial_fit(data(seed=5))
        assert_same_fit(pca, PCACompressor(KEPT).fit(data()), 0.0)
        assert other.n_samples_seen_.item() == 400


def unfitted() -> PCACompressor:
    return PCACompressor(KEPT)


def fitted() -> PCACompressor:
    return unfitted().fit(data())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PCACompressor(0), ValueError, "PCACompressor: n_components must be at least 1, got 0"),
        (lambda: PCACompressor(2.0), TypeError, "PCACompressor: n_components must be an int, got float"),
        (lambda: unfitted().transform(data()), RuntimeError, "PCACompressor: call fit, partial_fit or load"),
        (lambda: unfitted().inverse_transform(data()), RuntimeError, "PCACompressor: call fit, partial_fit or load"),
        (lambda: unfitted().fit([]), ValueError, "PCACompressor: data must hold at least one tensor, got none"),
        (lambda: unfitted().fit(data(0)), ValueError, "PCACompressor: data must hold at least one tensor, got none"),
        (lambda: unfitted().fit([[1.0]]), TypeError, "PCACompressor: data must be a torch.Tensor, got list"),
        (lambda: unfitted().fit(data().long()), TypeError, r"data must have dtype .*, got torch\.int64"),
        (lambda: unfitted().fit(data()[0]), ValueError, r"data must have shape \(\.\.\., n_features\), got \(24,\)"),
        (lambda: unfitted().fit(data(6)), ValueError, "n_components = 7 must be at most the number of samples, 6, and"),
        (lambda: PCACompressor(25).fit(data()), ValueError, "25 must be at most .* samples, 200, and of features, 24"),
        (lambda: fitted().transform(randn(2, 9)), ValueError, r"e must have shape .*24\), got \(2, 9\)"),
        (lambda: fitted().inverse_transform(randn(2, 9)), ValueError, r"c must have shape .*7\), got \(2, 9\)"),
        (lambda: fitted().transform(data().long()), TypeError, r"e must have dtype .*, got torch\.int64"),
        (lambda: fitted().transform(data().tolist()), TypeError, "e must be a torch.Tensor, got list"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_data_leaves_the_compressor_as_it_was(bad):
    pca = PCACompressor(KEPT).fit(data())
    before = copy.deepcopy(pca)
    broken = data(20)
    broken[3, 2] = bad
    for call in (lambda: pca.partial_fit(broken), lambda: pca.fit([data(seed=2), broken])):
        with pytest.raises(ValueError, match="PCACompressor: data must be finite, got NaN or inf"):
            call()
    with pytest.raises(ValueError, match=r"data must have shape .*24\), got \(9, 5\)"):
        pca.partial_fit(randn(9, 5))
    assert_same_fit(pca, before, 0.0)
    assert_same_fit(pca.partial_fit(data(seed=6)), before.partial_fit(data(seed=6)), 0.0)
