"""The float64 oracle: how far from the exact result a backend may be.

An error is judged against the one that plain torch makes in the same dtype, so that no test chooses a tolerance:

    error(candidate) <= 2 error(plain torch) + floor(dtype) scale + spacing(dtype)

in the Frobenius norm and in the maximum, for the output and for every gradient. The oracle is the reference run in
float64 on the same rounded inputs; scale is the same norm of its result, or of what the caller gives in its place;
spacing is that of the result's dtype next to 0, for each of its elements.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor | None]
Function = Callable[..., Tensor]

# Roundings of the accumulator that a sum of a thousand terms in another order may cost (12 were seen, in float32).
_SUM = 16
# In float64 plain torch is the oracle itself, its error nil and the whole allowance the floor (87 were seen).
_SUM_FLOAT64 = 256


def spacing(dtype: torch.dtype) -> float:
    """What lies between two neighbouring numbers next to 0."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def floor(dtype: torch.dtype) -> float:
    """What is forgiven where plain torch happens to err little: one rounding of the result and those of its sums."""
    if dtype == torch.float64:
        return _SUM_FLOAT64 * torch.finfo(dtype).eps
    return torch.finfo(dtype).eps + _SUM * torch.finfo(torch.float32).eps


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Normal numbers that depend on the shape and the seed alone: the same on every device, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def cotangent(output: Tensor) -> Tensor:
    return randn(*output.shape, dtype=output.dtype, seed=99, device=output.device)


def forward_backward(function: Function, tensors: Tensors, dy: Tensor, **options) -> dict[str, Tensor]:
    """The output, and the gradient of each tensor given, for the cotangent ``dy``."""
    leaves = {name: value.detach().requires_grad_() for name, value in tensors.items() if value is not None}
    output = function(**{**tensors, **leaves}, **options)
    gradients = torch.autograd.grad(output, list(leaves.values()), dy)
    return {"output": output.detach()} | {f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def exact(
    reference: Function, tensors: Tensors, dtype: torch.dtype, dy: Tensor, *, unrounded: Collection[str] = (), **options
) -> dict[str, Tensor]:
    """``forward_backward`` in float64 on what is left of the tensors, but the ``unrounded``, in ``dtype``."""
    rounded = {
        name: None if value is None else (value if name in unrounded else value.to(dtype)).double()
        for name, value in tensors.items()
    }
    return forward_backward(reference, rounded, dy.double(), **options)


def norms(value: Tensor) -> tuple[float, float]:
    """Frobenius norm and maximum norm."""
    if value.numel() == 0:
        return 0.0, 0.0
    value = value.double()
    return value.norm().item(), value.abs().max().item()


def assert_within(
    actual: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    oracle: Mapping[str, Tensor],
    dtype: torch.dtype,
    scales: Mapping[str, Tensor] | None = None,
) -> None:
    """Holds each result of ``actual`` to the bound above, and its shape and dtype to plain torch's."""
    assert actual.keys() == plain.keys() == oracle.keys()
    broken = []
    for name, expected in oracle.items():
        assert actual[name].shape == plain[name].shape == expected.shape, name
        assert actual[name].dtype == plain[name].dtype, name
        errors, allowed = norms(actual[name].double() - expected), norms(plain[name].double() - expected)
        sizes = norms(expected if scales is None else scales[name])
        least = spacing(actual[name].dtype)
        spacings = least * expected.numel() ** 0.5, least
        for kind, error, unit, size, step in zip(
            ("Frobenius", "maximum"), errors, allowed, sizes, spacings, strict=True
        ):
            bound = 2 * unit + floor(dtype) * size + step
            # NaN compares false: written so that it counts as broken.
            if not error <= bound:
                broken.append(f"{name} ({kind}): error {error:.3g}, plain torch {unit:.3g}, bound {bound:.3g}")
    assert not broken, "\n".join(broken)


def assert_as_accurate_as_torch(
    function: Function,
    reference: Function,
    tensors: Tensors,
    dtype: torch.dtype,
    *,
    dy: Callable[[Tensor], Tensor] = cotangent,
    scales: Callable[[Tensors, Tensor], Mapping[str, Tensor]] | None = None,
    unrounded: Collection[str] = (),
    **options,
) -> dict[str, Tensor]:
    """Runs candidate, plain torch and oracle on one cotangent and compares them; returns the candidate's results.

    Args:
        dtype: what the products are made in: float32 adapters over a bfloat16 weight count as bfloat16.
        dy: makes the cotangent from the output.
        scales: makes, from tensors and cotangent, what stands for the size of each result.
        unrounded: names of tensors that the operator never rounds to ``dtype``.
        options: keywords of both functions.
    """
    cotangents = dy(reference(**tensors, **options))
    actual = forward_backward(function, tensors, cotangents, **options)
    plain = forward_backward(reference, tensors, cotangents, **options)
    oracle = exact(reference, tensors, dtype, cotangents, unrounded=unrounded, **options)
    assert_within(actual, plain, oracle, dtype, scales and scales(tensors, cotangents))
    return actual
