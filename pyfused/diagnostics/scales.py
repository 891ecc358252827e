"""How large layer-scales are and where the gradients went: read from a model, as rows and as a plot."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pyfused.modules import BottleneckAdapter
from pyfused.surgery.refusals import check_module
from pyfused.surgery.report import table


@dataclass(frozen=True)
class LayerScaleRow:
    """One layer-scale, or one adapter whose block has none.

    Attributes:
        path: dotted path of the layer-scale's module; of the adapter where there is none.
        block: class name of the module that the layer-scale and the branch it scales belong to.
        channels: elements of gamma; C of the adapter where there is none.
        gamma_mean, gamma_max: mean and maximum of the absolute gamma; None where there is none.
        gamma_grad: Euclidean norm of gamma's gradient; None where it has none.
        adapter_grad: the same over all parameters of the adapter that gamma scales; None where there is no adapter, or
            no gradient.
        adapter_weight_grad: the same over its D and U alone. With gamma before the adapter, A(gamma f), biases have
            gradients that know nothing of gamma, and they are most of ``adapter_grad`` where gamma is small.
        backbone_grad: the same over the block's parameters that belong to no adapter, gammas included; None where none
            of them has a gradient, as in a frozen block.
        adapted: whether there is an adapter.
    """

    path: str
    block: str
    channels: int
    gamma_mean: float | None
    gamma_max: float | None
    gamma_grad: float | None
    adapter_grad: float | None
    adapter_weight_grad: float | None
    backbone_grad: float | None
    adapted: bool


@dataclass(frozen=True)
class LayerScaleReport:
    """What `layer_scale_report` found: ``rows`` in the model's order. ``print`` it, or ``plot`` it."""

    rows: tuple[LayerScaleRow, ...]

    def __str__(self) -> str:
        def number(value: float | None) -> str:
            return "-" if value is None else f"{value:.2e}"

        rows: list[tuple[str, ...]] = []
        rows.append(("layer-scale", "block", "C", "mean |g|", "max |g|", "grad g", "grad adapter", "grad backbone"))
        for row in self.rows:
            values = (row.gamma_mean, row.gamma_max, row.gamma_grad, row.adapter_grad, row.backbone_grad)
            cells = [number(value) for value in values]
            if not row.adapted:
                cells[3] = "no adapter"
            rows.append((row.path, row.block, str(row.channels), *cells))
        return "\n".join(table(rows, "<<>>>>>>"))

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Two panels over depth, both logarithmic: the absolute gamma (mean and maximum), and the gradient norms.

        What is None or 0 is left out.

        Args:
            path: of a file to write, in the format of its suffix. None (the default) writes none.

        Returns:
            The ``matplotlib.figure.Figure``, which no window manager holds.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("LayerScaleReport.plot needs matplotlib (pip install matplotlib)") from error
        width = max(6.0, 0.22 * len(self.rows) + 2.0)
        figure = Figure(figsize=(width, 6.5), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        for axes, columns in (
            (above, {"mean |gamma|": "gamma_mean", "max |gamma|": "gamma_max"}),
            (below, {"gamma": "gamma_grad", "adapter": "adapter_grad", "backbone": "backbone_grad"}),
        ):
            for (label, column), marker in zip(columns.items(), "o^s", strict=False):
                points = {place: getattr(row, column) for place, row in enumerate(self.rows) if getattr(row, column)}
                if points:
                    axes.plot(points.keys(), points.values(), marker=marker, markersize=4, linewidth=1, label=label)
            if axes.lines:
                axes.set_yscale("log")
                axes.legend()
            axes.grid(alpha=0.3)
        above.set_ylabel("layer-scale")
        below.set_ylabel("gradient norm")
        below.set_xticks(range(len(self.rows)), [row.path for row in self.rows], rotation=90, fontsize=6)
        if path is not None:
            figure.savefig(path)
        return figure


def layer_scale_report(model: nn.Module) -> LayerScaleReport:
    """How large each layer-scale of ``model`` is, and after a backward, where the gradients went.

    A layer-scale is a module with a parameter ``gamma`` whose class name contains "LayerScale" (timm's FastViT and ViT
    blocks, DINOv2's), or a `BottleneckAdapter` with a gamma of its own. Adapted and plain models are both read, so that
    the two can be compared. Reads the values, which waits for the device.

    Args:
        model: any module. Gradient norms are of what ``.grad`` holds now.

    Returns:
        A `LayerScaleReport`.

    Raises:
        TypeError: ``model`` is not an nn.Module.
        ValueError: there is no layer-scale and no adapter in it.
    """
    check_module("layer_scale_report", model)
    modules = dict(model.named_modules())
    adapters = {path: module for path, module in modules.items() if isinstance(module, BottleneckAdapter)}
    scales = {
        path: module._parameters["gamma"]
        for path, module in modules.items()
        if "LayerScale" in type(module).__name__ and module._parameters.get("gamma") is not None
    }
    # Adapted blocks name an adapter after the layer-scale it stands under: adapter_1 and layer_scale_1.
    pairs = {path: path.replace("layer_scale", "adapter") for path in scales}
    pairs = {path: adapter for path, adapter in pairs.items() if adapter in adapters}
    rows = []
    for path, module in modules.items():
        block = modules[path.rpartition(".")[0]]
        if path in scales:
            rows.append(_row(path, block, scales[path], adapters.get(pairs.get(path, ""))))
        elif isinstance(module, BottleneckAdapter) and path not in pairs.values():
            rows.append(_row(path, block, module.gamma, module))
    if not rows:
        raise ValueError(
            "layer_scale_report: model must contain a layer-scale or an adapter, got a "
            f"{type(model).__name__} with none"
        )
    return LayerScaleReport(tuple(rows))


def _row(path: str, block: nn.Module, gamma: Tensor | None, adapter: BottleneckAdapter | None) -> LayerScaleRow:
    of_adapters = {id(p) for m in block.modules() if isinstance(m, BottleneckAdapter) for p in m.parameters()}
    size = None if gamma is None else gamma.detach().abs().double()
    channels = gamma.numel() if gamma is not None else adapter.channels if adapter is not None else 0
    return LayerScaleRow(
        path=path,
        block=type(block).__name__,
        channels=channels,
        gamma_mean=None if size is None else size.mean().item(),
        gamma_max=None if size is None else size.max().item(),
        gamma_grad=None if gamma is None else _norm([gamma]),
        adapter_grad=None if adapter is None else _norm(adapter.parameters()),
        adapter_weight_grad=None if adapter is None else _norm([adapter.down_weight, adapter.up_weight]),
        backbone_grad=_norm(p for p in block.parameters() if id(p) not in of_adapters),
        adapted=adapter is not None,
    )


def _norm(parameters: Iterable[Tensor]) -> float | None:
    """Euclidean norm of all their gradients; None where there is none."""
    squares = [p.grad.detach().double().square().sum().item() for p in parameters if p.grad is not None]
    return math.sqrt(sum(squares)) if squares else None
