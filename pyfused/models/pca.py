"""``PCACompressor``: principal components, fitted batch by batch without loss, as a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfused.ops.contract import checks

if TYPE_CHECKING:
    from typing_extensions import Self

# What a fit leaves.
_FITTED = ("components_", "mean_", "var_", "explained_variance_", "explained_variance_ratio_", "n_samples_seen_")
# Number of samples, their mean, and the products of what differs from it, summed over them.
_Sums = tuple[int, Tensor, Tensor]


class PCACompressor(nn.Module):
    """``c = (e - mu) P``: the first principal components of embeddings, with scikit-learn's names.

    Sums of mean and covariance are kept in float64 on the device of the data; `partial_fit` is therefore exact: batch
    by batch it gives what `fit` gives on all data at once. They are no part of the ``state_dict``, which holds what
    `transform` needs: a compressor that was loaded transforms, and must be fitted anew to be changed.

    Buffers, None before the first fit, in float32 (float64 of float64 data), and left there by ``half()`` and the like:
    ``components_`` P^T (n_components, n_features), in the sign in which the largest element of each row is positive;
    ``mean_`` mu and ``var_``, population variance, (n_features,); ``explained_variance_`` and
    ``explained_variance_ratio_`` (n_components,); ``n_samples_seen_``, int64.

    Args:
        n_components: width of c.

    Raises:
        TypeError: ``n_components`` is no int.
        ValueError: it is less than 1.

    Source: sklearn.decomposition.PCA, whose numbers these are, and IncrementalPCA, whose ``partial_fit`` is not exact.
    """

    components_: Tensor | None
    mean_: Tensor | None
    var_: Tensor | None
    explained_variance_: Tensor | None
    explained_variance_ratio_: Tensor | None
    n_samples_seen_: Tensor | None

    def __init__(self, n_components: int) -> None:
        super().__init__()
        checks.integer("PCACompressor", "n_components", n_components, 1)
        self.n_components = n_components
        for name in _FITTED:
            self.register_buffer(name, None)
        self._sums: _Sums | None = None

    def fit(self, data: Tensor | Iterable[Tensor]) -> Self:
        """Fit ``data`` (..., n_features), or each tensor that an iterable gives; what was fitted before is forgotten.

        Raises:
            TypeError, ValueError: as `partial_fit`, or there is no data.
        """
        return self._fit([data] if isinstance(data, Tensor) else data, None)

    def partial_fit(self, data: Tensor) -> Self:
        """Add ``data`` (..., n_features), and decompose the covariance anew, which `fit` does once for all its tensors.

        Raises:
            TypeError: ``data`` is no floating tensor.
            ValueError: its width differs from before, it holds NaN or inf, or fewer samples or features have come in
                all than ``n_components``; the compressor stays as it was.
            RuntimeError: the compressor was loaded from a ``state_dict``.
        """
        if self._sums is None and self.mean_ is not None:
            raise RuntimeError("PCACompressor: partial_fit needs sums that a state_dict does not hold; call fit")
        return self._fit([data], self._sums)

    @torch.no_grad()
    def _fit(self, batches: Iterable[Tensor], sums: _Sums | None) -> Self:
        dtype = torch.float32 if sums is None or self.mean_ is None else self.mean_.dtype
        for batch in batches:
            sums = _added(sums, batch)
            dtype = torch.promote_types(dtype, batch.dtype)
        if sums is None:
            raise ValueError("PCACompressor: data must hold at least one tensor, got none")
        count, mean, products = sums
        if self.n_components > min(count, len(mean)):
            raise ValueError(
                f"PCACompressor: n_components = {self.n_components} must be at most the number of samples, {count}, "
                f"and of features, {len(mean)}"
            )
        values, vectors = torch.linalg.eigh(products)
        components = vectors.t().flip(0)[: self.n_components]
        components = components * components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
        variance = values.flip(0).clamp(min=0.0) / max(1, count - 1)
        kept = variance[: self.n_components]
        device = mean.device if self.mean_ is None else self.mean_.device
        fitted = (components, mean, products.diagonal() / count, kept, kept / variance.sum())
        for name, value in zip(_FITTED, fitted, strict=False):
            setattr(self, name, value.to(device, dtype))
        self.n_samples_seen_ = torch.tensor(count, device=device)
        self._sums = sums
        return self

    def transform(self, e: Tensor) -> Tensor:
        """e (..., n_features) -> c (..., n_components) in e's dtype; differentiable, on the compressor's device.

        Raises:
            TypeError, ValueError: ``e`` has the wrong dtype or shape.
            RuntimeError: nothing has been fitted.
        """
        components, mean = self._ready("e", e, 1)
        wide = torch.promote_types(e.dtype, mean.dtype)
        return F.linear((e.to(wide) - mean).to(e.dtype), components.to(e.dtype)).to(e.dtype)

    def inverse_transform(self, c: Tensor) -> Tensor:
        """c (..., n_components) -> ``c P^T + mu`` (..., n_features) in c's dtype; errors as `transform`'s."""
        components, mean = self._ready("c", c, 0)
        return F.linear(c, components.t().to(c.dtype), mean.to(c.dtype)).to(c.dtype)

    forward = transform

    def _ready(self, name: str, x: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Components and mean; x checked against the components' size on ``side``."""
        if self.components_ is None or self.mean_ is None:
            raise RuntimeError("PCACompressor: call fit, partial_fit or load_state_dict before transform")
        width, letters = self.components_.shape[side], ("(..., n_components)", "(..., n_features)")[side]
        checks.tensor("PCACompressor", name, x)
        shape, device = (*x.shape[:-1], width), self.mean_.device
        checks.argument("PCACompressor", name, x, shape, letters, checks.FLOATING, device, "the components")
        return self.components_, self.mean_

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, wide in before.items():
            after = self._buffers[name]
            assert after is not None
            if after.dtype != torch.promote_types(after.dtype, torch.float32) and wide.is_floating_point():
                self._buffers[name] = wide.to(after.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Buffers to copy into: of another n_components torch then says that the sizes differ.
        for name in _FITTED:
            value, held = state_dict.get(prefix + name), getattr(self, name)
            if value is not None:
                rows = value.shape[:1] if name in ("mean_", "var_", "n_samples_seen_") else (self.n_components,)
                device = value.device if held is None else held.device
                setattr(self, name, torch.empty((*rows, *value.shape[1:]), dtype=value.dtype, device=device))
                self._sums = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"n_components={self.n_components}"


def _added(sums: _Sums | None, batch: Tensor) -> _Sums | None:
    """The sums with a batch (Chan, Golub and LeVeque, 1979)."""
    checks.tensor("PCACompressor", "data", batch)
    checks.dtype("PCACompressor", "data", batch, checks.FLOATING)
    if batch.dim() < 2 or batch.shape[-1] < 1:
        raise ValueError(f"PCACompressor: data must have shape (..., n_features), got {tuple(batch.shape)}")
    if sums is not None:
        checks.shape("PCACompressor", "data", batch, (*batch.shape[:-1], len(sums[1])), "(..., n_features)")
    rows = batch.flatten(0, -2).to(batch.device if sums is None else sums[1].device, torch.float64)
    count = len(rows)
    if not count:
        return sums
    if not rows.isfinite().all():
        raise ValueError("PCACompressor: data must be finite, got NaN or inf")
    mean = rows.mean(0)
    rows = rows - mean
    products = rows.t() @ rows
    if sums is None:
        return count, mean, products
    before, older, others = sums
    away, total = mean - older, before + count
    others = others + products + torch.outer(away, away) * (before * count / total)
    return total, older + away * (count / total), others
