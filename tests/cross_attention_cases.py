"""What the tests of ``cross_attention_residual`` and ``projection_residual`` share: plans, inputs, sizes of results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from operator_cases import DEVICE, planned
from oracle import Tensors, assert_as_accurate_as_torch, exact, floor, randn
from torch import Tensor

import pyfused
from pyfused import reference
from pyfused.ops.cross_attention_residual import PLANS
from pyfused.ops.prepared_context import PROJECTIONS
from pyfused.reference.adapter import ACTIVATIONS
from pyfused.reference.cross_attention import attention_probabilities

ABSORBED = PLANS[:2]
EVERY = {"portable": PLANS, "triton": PLANS}
EVERY_ABSORBED = {"portable": ABSORBED, "triton": ABSORBED}
every_plan, every_absorbed_plan = planned(EVERY), planned(EVERY_ABSORBED)
# For tests in a dtype that the backend takes: `plain_dtype`.
every_raw_plan = planned({"portable": ABSORBED, "triton": ABSORBED, "cuda": ABSORBED})
# Every argument that gets a gradient.
NAMES = ("x", "context", *PROJECTIONS, "weight")
PROJECTION_NAMES = ("o", "weight", "bias", "residual", "gate")


def draw(
    batch: int,
    length: int,
    tokens: int,
    channels: int,
    heads: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    context_channels: int | None = None,
    context_batch: int | None = None,
    projections: torch.dtype | None = None,
    absent: Collection[str] = (),
    weight: str | None = "channels",
    logits: float = 1.0,
    device: torch.device | str = DEVICE,
) -> dict[str, Tensor | None]:
    """Tensors whose attention weighs as much as x, with logits of about the size asked for.

    ``projections`` is the dtype of the eight tensors, those that ``absent`` names are None; ``weight`` is float32 (x's,
    where that is float64) and "channels", "scalar" or not among them.
    """
    inner, context_channels, projections = heads * width, context_channels or channels, projections or dtype
    drawn = {
        "x": randn(batch, length, channels, dtype=dtype, seed=1),
        "context": randn(context_batch or batch, tokens, context_channels, dtype=dtype, seed=2),
        "q_weight": logits * randn(inner, channels, seed=3) / channels**0.5,
        "q_bias": logits * randn(inner, seed=4) / 2,
        "k_weight": randn(inner, context_channels, seed=5) / context_channels**0.5,
        "k_bias": randn(inner, seed=6) / 2,
        "v_weight": randn(inner, context_channels, seed=7) / context_channels**0.5,
        "v_bias": randn(inner, seed=8) / 2,
        "out_weight": randn(channels, inner, seed=9) / inner**0.5,
        "out_bias": randn(channels, seed=10) / 2,
    }
    for name in PROJECTIONS:
        drawn[name] = None if name in absent else drawn[name].to(projections)
    if weight is not None:
        gate = torch.tensor(0.7) if weight == "scalar" else randn(channels, seed=11)
        drawn["weight"] = gate.to(torch.promote_types(dtype, torch.float32))
    return {name: None if value is None else value.to(device) for name, value in drawn.items()}


def padding(batch: int, tokens: int) -> Tensor:
    """A mask that leaves two thirds of the keys or fewer, one of them in every other sample, none in the last."""
    left = torch.tensor([1 + 2 * tokens // 3, 1]).repeat(batch)[:batch, None]
    mask = torch.arange(tokens) >= left
    # Some in the middle too, never the first.
    mask[:, 1:] |= randn(batch, tokens, seed=12)[:, 1:] > 1.0
    if batch > 1:
        mask[-1] = True
    return mask.to(DEVICE)


def draw_projection(
    shape: tuple[int, ...],
    channels: int,
    dtype: torch.dtype = torch.float32,
    *,
    residual: torch.dtype | None = None,
    weights: torch.dtype | None = None,
    bias: bool = True,
    gate: str | None = "channels",
    device: torch.device | str = DEVICE,
) -> dict[str, Tensor | None]:
    """Tensors for o of ``shape``; dtypes of residual and weights are o's unless given, ``gate`` as `draw`'s weight."""
    width = shape[-1]
    drawn = {
        "o": randn(*shape, dtype=dtype, seed=1),
        "weight": (2 * randn(channels, width, seed=2) / width**0.5).to(weights or dtype),
        "bias": randn(channels, seed=3).to(weights or dtype) if bias else None,
        "residual": randn(*shape[:-1], channels, dtype=residual or dtype, seed=4),
    }
    if gate is not None:
        value = torch.tensor(0.7) if gate == "scalar" else randn(channels, seed=5)
        drawn["gate"] = value.to(torch.promote_types(dtype, torch.float32))
    return {name: None if value is None else value.to(device) for name, value in drawn.items()}


# The sizes of results. Errors are judged by the root of the sum of the squares of a result's terms: the size that it
# has unless its terms cancel, as all of k_bias's gradient's do (a softmax does not see a shift), those of everything
# before the softmax where one key is left, and a scalar weight's. Products are linear in each factor: what they make of
# squares is the sum of the squares of the terms, forward and backward. Beside them stand the derivatives that are not.


def _sloped(value: Tensor, linear: Tensor) -> Tensor:
    """``value`` with the derivative of ``linear``."""
    return value + linear - linear.detach()


def _inverse(value: Tensor) -> Tensor:
    return 1.0 / value.masked_fill(value == 0, torch.inf)


def _matched(c: Tensor, c_squares: Tensor, x: Tensor, x_squares: Tensor, eps: float) -> Tensor:
    """Squares of the terms of ``c |x| / (|c| + eps)``."""
    norm, length = c.norm(dim=-1, keepdim=True), x.norm(dim=-1, keepdim=True)
    inverse, c, x = _inverse(norm + eps).square(), c.square(), x.square()
    rho = length.square() * inverse
    through_norm = c * _inverse(norm).square() * inverse * (c * c_squares).sum(-1, keepdim=True)
    through_length = c * inverse * _inverse(length).square() * (x * x_squares).sum(-1, keepdim=True)
    return _sloped(rho * c, rho * (c_squares + through_norm) + through_length)


def _attention_squares(
    values: Tensors,
    num_heads: int,
    weight: float | Tensor = 0.1,
    norm_match: bool = False,
    eps: float = 1e-6,
    normalize_context: bool = False,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    **squares: Tensor | None,
) -> Tensor:
    """Squares of the terms of `reference.cross_attention_residual`, of the tensors' values and their squares."""

    def heads(tensors: Tensors, tokens: Tensor, part: str) -> Tensor:
        projected = F.linear(tokens, tensors[f"{part}_weight"], tensors[f"{part}_bias"])
        return projected.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    context, context_squares = values["context"], squares["context"]
    if normalize_context:
        length = context.norm(dim=-1, keepdim=True)
        context = context / length
        direction = context.square()
        along = (direction * context_squares).sum(-1, keepdim=True)
        context_squares = _sloped(direction, (context_squares + direction * along) / length.square())
    q, k = heads(values, values["x"], "q"), heads(values, context, "k")
    p = attention_probabilities(q, k, key_padding_mask, 0.0, None)
    a = attention_probabilities(q, k, key_padding_mask, dropout_p, seed)
    p_squares = p.square()
    logits = heads(squares, squares["x"], "q") @ heads(squares, context_squares, "k").mT / q.shape[-1]
    shifted = logits + (p_squares * logits).sum(-1, keepdim=True)
    a_squares = _sloped(p_squares, p_squares * shifted) * (a * _inverse(p)).square()
    attended = (a @ heads(values, context, "v")).transpose(1, 2).flatten(2)
    attended_squares = (a_squares @ heads(squares, context_squares, "v")).transpose(1, 2).flatten(2)
    branch = F.linear(attended_squares, squares["out_weight"], squares["out_bias"])
    if norm_match:
        c = F.linear(attended, values["out_weight"], values["out_bias"])
        branch = _matched(c, branch, values["x"], squares["x"], eps)
    return squares["x"] + (weight if isinstance(weight, Tensor) else weight**2) * branch


def _projection_squares(
    values: Tensors,
    o: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gate: float | Tensor = 0.1,
    skip: float = 1.0,
    activation: str = "identity",
    norm_match: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Squares of the terms of `reference.projection_residual`; no activation exceeds its argument, no slope 1.13."""
    branch = F.linear(o, weight, bias)
    if norm_match:
        c = ACTIVATIONS[activation](F.linear(values["o"], values["weight"], values["bias"]))
        branch = _matched(c, branch, values["residual"], residual, eps)
    return skip**2 * residual + (gate if isinstance(gate, Tensor) else gate**2) * branch


def _sizes(squared_terms: Callable, options: dict, tensors: Tensors, dy: Tensor) -> dict[str, Tensor]:
    values = {name: None if value is None else value.double() for name, value in tensors.items()}
    squares = {name: None if value is None else value.square() for name, value in values.items()}
    function = functools.partial(squared_terms, values)
    sums = exact(function, squares, torch.float64, dy.double().square(), **options)
    return {name: value.sqrt() for name, value in sums.items()}


def _attention_sizes(options: dict, tensors: Tensors, dy: Tensor) -> dict[str, Tensor]:
    sizes = _sizes(_attention_squares, options, tensors, dy)
    tokens, dtype = tensors["context"].shape[1], tensors["x"].dtype
    if "dk_bias" in sizes:
        # A rounding of the mean that softmax's derivative subtracts is one for all tokens.
        sizes["dk_bias"] *= tokens**0.5
    # The floor has the roundings of a sum of a thousand terms; the absorbed plans' over all columns may be longer.
    longer = max(0.0, options["num_heads"] * tokens / 1000 - 1.0)
    factor = 1.0 + longer * (1.0 - torch.finfo(dtype).eps / floor(dtype))
    return {name: factor * value for name, value in sizes.items()}


def check(tensors: Tensors, backend: str, plan: str = "auto", *, dy=None, **options) -> dict[str, Tensor]:
    """Holds `cross_attention_residual` to the oracle. Returns its output and gradients."""
    return assert_as_accurate_as_torch(
        functools.partial(pyfused.cross_attention_residual, backend=backend, plan=plan),
        reference.cross_attention_residual,
        tensors,
        tensors["x"].dtype,
        scales=functools.partial(_attention_sizes, options),
        # The absorbed plans round fewer of them than plain torch does.
        unrounded=NAMES,
        **({} if dy is None else {"dy": dy}),
        **options,
    )


def check_projection(tensors: Tensors, backend: str, *, dy=None, **options) -> dict[str, Tensor]:
    """Holds `projection_residual` to the oracle. Returns its output and gradients."""
    return assert_as_accurate_as_torch(
        functools.partial(pyfused.projection_residual, backend=backend),
        reference.projection_residual,
        tensors,
        tensors["o"].dtype,
        scales=functools.partial(_sizes, _projection_squares, options),
        unrounded=("residual", "gate"),
        **({} if dy is None else {"dy": dy}),
        **options,
    )
