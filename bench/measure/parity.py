"""The gate before every clock: is the result as close to float64 as plain torch in the same dtype would be?

    error <= 2 x (error of plain torch) + floor(dtype) x scale

in Frobenius norm and in maximum norm, for the output and every gradient; scale is the exact tensor's own norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pyfused
from pyfused import reference
from pyfused.bench.cases.case import Case

# Roundings of the accumulator that a sum of a thousand terms in another order may cost.
_SUM = 16
SEED = 20_240_607


@dataclass(frozen=True)
class Deviation:
    """How far one tensor is from its float64 value.

    Attributes:
        tensor: its name, "y" or "d<argument>".
        norm: "Frobenius" or "maximum".
        error: norm of the difference, in units of the exact tensor's norm.
        plain: the same for plain torch in the same dtype.
        limit: the largest error that passes.
    """

    tensor: str
    norm: str
    error: float
    plain: float
    limit: float

    @property
    def passed(self) -> bool:
        # NaN compares false: written so that it fails.
        return self.error <= self.limit

    def __str__(self) -> str:
        return (
            f"{self.tensor} ({self.norm}): error {self.error:.2e}, plain torch {self.plain:.2e}, limit {self.limit:.2e}"
        )


def floor(dtype: torch.dtype) -> float:
    """What is forgiven where plain torch happens to err little: one rounding of the result and those of its sums."""
    return torch.finfo(dtype).eps + _SUM * torch.finfo(torch.float32).eps


def deviations(
    ours: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor], dtype: torch.dtype
) -> list[Deviation]:
    """Two figures (Frobenius, maximum) for each tensor of ``exact``.

    Args:
        ours, plain, exact: tensors by name: the candidate's, plain torch's and the float64 ones, of equal shapes.
        dtype: that the products are made in, 32 bits or fewer.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    found = []
    for name, expected in exact.items():
        for label, results in (("ours", ours), ("plain", plain)):
            if name not in results or results[name].shape != expected.shape:
                got = tuple(results[name].shape) if name in results else "nothing"
                raise ValueError(f"{label}[{name!r}] must have shape {tuple(expected.shape)}, got {got}")
        for norm, measure in (("Frobenius", torch.linalg.vector_norm), ("maximum", _largest)):
            scale = measure(expected).item() or 1.0
            error = measure(ours[name].double() - expected).item() / scale
            unit = measure(plain[name].double() - expected).item() / scale
            found.append(Deviation(name, norm, error, unit, 2 * unit + floor(dtype)))
    return found


def strain(item: Deviation) -> float:
    """Error in units of its limit; infinite for NaN, so that the worst sorts last."""
    ratio = item.error / item.limit
    return ratio if ratio == ratio else float("inf")


def results(
    case: Case, function: Callable[..., Tensor], tensors: Mapping[str, Tensor], *, double: bool = False, **options
) -> dict[str, Tensor]:
    """y and d<name> of every tensor that gets a gradient, by ``function`` at ``case``; in float64 if ``double``."""
    values = {name: value.double() if double else value for name, value in tensors.items()}
    leaves = {name: values[name].detach().requires_grad_() for name in (*case.inputs, *case.trained)}
    y = case.call(function, values | leaves, **options)
    gradients = torch.autograd.grad(y, list(leaves.values()), values["dy"])
    return {"y": y.detach()} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


class Judge:
    """The reference's results at one case, in float64 and in the case's dtype, the dropout mask included.

    Args:
        case: what is computed.
        device: where.
        tensors: the case's own there; None (the default) draws them.
    """

    def __init__(self, case: Case, device: torch.device, tensors: Mapping[str, Tensor] | None = None) -> None:
        self._case, self._tensors = case, case.tensors(device) if tensors is None else tensors
        self._options: dict[str, Any] = {"seed": torch.tensor([SEED], device=device)} if case.dropout_p else {}
        plainest = getattr(reference, case.operator)
        self._plain = results(case, plainest, self._tensors, **self._options)
        self._exact = results(case, plainest, self._tensors, double=True, **self._options)

    def check(
        self, *, backend: str = "auto", plan: str = "auto", function: Callable[..., Tensor] | None = None
    ) -> list[Deviation]:
        """How far ``function``, the case's operator by default, is from them."""
        function = getattr(pyfused, self._case.operator) if function is None else function
        ours = results(self._case, function, self._tensors, backend=backend, plan=plan, **self._options)
        return deviations(ours, self._plain, self._exact, self._case.dtype)


def check(case: Case, device: torch.device, **options) -> list[Deviation]:
    """`Judge.check` with these options, once."""
    return Judge(case, device).check(**options)


def _largest(value: Tensor) -> Tensor:
    return torch.linalg.vector_norm(value, float("inf"))
