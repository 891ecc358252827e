"""The two pictures of a run: ratios.png and curves.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyfused.bench.baselines import BASE
from pyfused.bench.rows import Row

_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377", "#66ccee", "#bbbbbb", "#ee8866", "#222222")


def draw_ratios(rows: Sequence[Row], path: Path) -> bool:
    """A dot for each baseline of each timed row; False, and no file, when there is none."""
    timed = [row for row in rows if any(name != BASE for name in row.ratios)]
    if not timed:
        return False
    names = list(dict.fromkeys(name for row in timed for name in row.ratios if name != BASE))
    figure = Figure(figsize=(10, 1.6 + 0.3 * len(timed)), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(names):
        points = [(row.ratios[name], place) for place, row in enumerate(timed) if name in row.ratios]
        x, y = zip(*points, strict=True)
        axes.scatter(x, y, s=42, color=_COLOURS[index % len(_COLOURS)], label=f"against {name}", zorder=3)
    axes.axvline(1.0, color="black", linewidth=1, zorder=2)
    labels = [f"{row.name}  {row.measured}" + ("" if row.mode == "wall clock" else f", {row.mode}") for row in timed]
    axes.set_yticks(range(len(timed)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("baseline's time / pyfused's time (right of 1: pyfused is faster)", fontsize=9)
    axes.grid(axis="both", color="0.9", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_where(timed[0]), fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)
    return True


def draw_curves(rows: Sequence[Row], path: Path) -> bool:
    """The loss curves of the training runs, and how far apart they are; False, and no file, when there is none."""
    runs = [row for row in rows if row.kind == "training" and row.loss]
    if not runs:
        return False
    figure = Figure(figsize=(8, 5.5 * len(runs)), layout="constrained")
    grid = figure.subplots(2 * len(runs), 1, squeeze=False, height_ratios=[3, 1.4] * len(runs))[:, 0]
    for index, row in enumerate(runs):
        _curves(row, grid[2 * index], grid[2 * index + 1])
    figure.suptitle(_where(runs[0]), fontsize=10)
    figure.savefig(path, dpi=150)
    return True


def _curves(row: Row, above: Axes, below: Axes) -> None:
    curves = {name: list(values) for name, values in row.loss.items()}
    for index, (name, values) in enumerate(curves.items()):
        # The curves lie on one another: a wide line underneath and a dashed one above show both.
        style = {"linewidth": 4, "alpha": 0.5} if index == 0 else {"linewidth": 1.6, "linestyle": "--"}
        above.plot(range(1, len(values) + 1), values, label=name, color=_COLOURS[index], **style)
    above.set_title(row.name, fontsize=10)
    above.set_ylabel("training loss")
    above.legend(frameon=False)
    subject = curves[row.subject]
    for name, values in curves.items():
        if name != row.subject:
            gaps = [abs(mine - other) for mine, other in zip(subject, values, strict=True)]
            below.plot(range(1, len(gaps) + 1), gaps, color="0.3", linewidth=1)
            below.set_ylabel(f"|{row.subject} - {name}|")
            below.set_title(
                f"largest difference: {max(gaps):.1e}" if any(gaps) else "equal to the last bit", fontsize=9
            )
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)


def _where(row: Row) -> str:
    facts = row.provenance
    return f"{facts.get('device')}, {facts.get('threads')} threads, torch {facts.get('torch')}, {facts.get('date')}"
