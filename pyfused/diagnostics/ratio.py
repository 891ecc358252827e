"""What a cross-attention does to the gradient of an adapter beside it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyfused.modules import ScaledCrossAttention
from pyfused.surgery.refusals import check_module
from pyfused.surgery.report import table

# A ratio between these is no change worth a word.
UNCHANGED = (0.8, 1.25)
NOT_REPRODUCIBLE = """\
The ratios 0.37 and 0.96 that were published cannot be reproduced. They compare different set-ups: without
cross-attention, where w plays no part, their two norms are 1.4675 and 0.4559. And nothing absorbs a gradient:
the cross-attention stands before adapter 0, so that backward reaches the adapter first, and only activations
that the cross-attention changed move the ratio. It depends on data, weights and loss."""


@dataclass(frozen=True)
class GradientRatio:
    """What `gradient_ratio` found.

    Attributes:
        adapter: dotted path of the adapter.
        crossed: Euclidean norm of the adapter's gradient with cross-attention.
        plain: the same with w = 0.
    """

    adapter: str
    crossed: float
    plain: float

    @property
    def ratio(self) -> float:
        """crossed / plain."""
        return self.crossed / self.plain

    @property
    def verdict(self) -> str:
        """ "unchanged" where 0.8 < ratio < 1.25, "smaller", "larger", or "not finite" where a norm is NaN or inf."""
        if not math.isfinite(self.crossed) or not math.isfinite(self.plain):
            return "not finite"
        low, high = UNCHANGED
        return "smaller" if self.ratio <= low else "larger" if self.ratio >= high else "unchanged"

    def __str__(self) -> str:
        return (
            f"|grad {self.adapter}| {self.crossed:.4e} with cross-attention, {self.plain:.4e} with w = 0: "
            f"ratio {self.ratio:.6f}, {self.verdict}"
        )


@dataclass(frozen=True)
class GradientRatioTable:
    """Ratios side by side, such as one for each loop of a training. ``print`` it.

    Attributes:
        rows: what each was measured at, such as "loop 1", -> its `GradientRatio`.
    """

    rows: Mapping[str, GradientRatio]

    def __str__(self) -> str:
        lines = [("", "adapter", "|grad| with", "|grad| w = 0", "ratio", "verdict")]
        lines += [
            (name, row.adapter, f"{row.crossed:.4e}", f"{row.plain:.4e}", f"{row.ratio:.4f}", row.verdict)
            for name, row in self.rows.items()
        ]
        return "\n".join([*table(lines, "<<>>><"), NOT_REPRODUCIBLE])


def gradient_ratio(
    model: nn.Module, loss: Callable[[Any], Tensor], adapter: str = "image_adapters.0", seed: int = 0
) -> GradientRatio:
    """How much smaller or larger an adapter's gradient is for the cross-attention in ``model``.

    The norm of the gradient of ``loss(model)`` by the adapter's parameters, twice under one seed: as the model is, and
    with w = 0 in every `ScaledCrossAttention`. Where w is 0 anyway the ratio is exactly 1. Parameters, their ``.grad``,
    the mode and torch's generators are left as they were.

    A cross-attention does not absorb the gradient of an adapter that stands after it, as in `AdaptedCLIP`: backward
    reaches the adapter first, and only the activations, which the cross-attention has changed, move the ratio. So a
    ratio away from 1 tells how much they changed, not that a gradient was lost; it depends on data, weights and loss,
    and need neither fall as w grows nor leave the band at w = 1.

    Args:
        model: any module with `ScaledCrossAttention` in it, in the mode to be looked at.
        loss: a function of the model that returns a scalar tensor, such as
            ``lambda model: (model.encode_image(images, text_context).detection - target).square().mean()``.
        adapter: dotted path, from ``model``, of the module whose gradient is taken. Default: `AdaptedCLIP`'s first.
        seed: of torch's generators in both runs, for dropout. Default 0.

    Returns:
        A `GradientRatio`; ``print`` it, or several of them as a `GradientRatioTable`.

    Raises:
        TypeError: an argument has the wrong type, or the loss is no tensor.
        ValueError: there is no cross-attention in the model or no such adapter, nothing in it trains, the loss is not a
            scalar, or no gradient reaches the adapter with w = 0.
    """
    check_module("gradient_ratio", model)
    modules = dict(model.named_modules())
    crossings = [module for module in modules.values() if isinstance(module, ScaledCrossAttention)]
    if not crossings:
        raise ValueError(
            f"gradient_ratio: model must contain a ScaledCrossAttention, got a {type(model).__name__} with none"
        )
    if adapter not in modules:
        raise ValueError(f"gradient_ratio: adapter must be the dotted path of a module in the model, got {adapter!r}")
    parameters = [parameter for parameter in modules[adapter].parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(f"gradient_ratio: adapter must have parameters that train, got {adapter!r} with none")

    def gradient_norm() -> float:
        torch.manual_seed(seed)
        value = loss(model)
        if not isinstance(value, Tensor):
            raise TypeError(f"gradient_ratio: loss must return a torch.Tensor, got {type(value).__name__}")
        if value.numel() != 1:
            raise ValueError(f"gradient_ratio: loss must return a scalar, got shape {tuple(value.shape)}")
        gradients = torch.autograd.grad(value, parameters, allow_unused=True) if value.requires_grad else ()
        return math.sqrt(sum(g.double().square().sum().item() for g in gradients if g is not None))

    with torch.random.fork_rng(range(torch.cuda.device_count())), torch.enable_grad():
        crossed = gradient_norm()
        with _without_weight(crossings):
            plain = gradient_norm()
    if plain == 0.0:
        raise ValueError(f"gradient_ratio: loss must reach adapter {adapter!r} with w = 0, got no gradient there")
    return GradientRatio(adapter, crossed, plain)


@contextlib.contextmanager
def _without_weight(crossings: list[ScaledCrossAttention]) -> Iterator[None]:
    before = [(module, module.weight, module.gate) for module in crossings]
    try:
        for module in crossings:
            module.weight, module.gate = 0.0, None
        yield
    finally:
        for module, weight, gate in before:
            module.weight, module.gate = weight, gate
