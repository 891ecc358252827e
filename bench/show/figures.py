"""The figures of what was measured alone: ratios, memory, loss curves. Those of work and time are in rates.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pyfused.bench.cases.baselines import BASE
from pyfused.bench.record.rows import Row
from pyfused.bench.show import style
from pyfused.bench.show.style import Picture, styled

# Inches.
_BAR, _GAP = 0.16, 0.14


@styled
def overview(rows: Sequence[Row]) -> Picture | None:
    """A dot for each baseline of each timed row; None when there is none."""
    timed = [row for row in rows if row.kind != "machine" and any(name != BASE for name in row.ratios)]
    if not timed:
        return None
    figure = Figure(figsize=(style.WIDTH, 1.4 + 0.24 * len(timed)), layout="constrained")
    axes = figure.subplots()
    for name in style.contenders(timed, "ratios"):
        if name == BASE:
            continue
        x, y = zip(*((row.ratios[name], at) for at, row in enumerate(timed) if name in row.ratios), strict=True)
        colour, marker = style.look(name)
        axes.scatter(x, y, s=34, color=colour, marker=marker, label=f"against {name}", zorder=4)
    axes.set_yticks(
        range(len(timed)), [style.fitting(f"{row.name}  {row.measured_how}") for row in timed], fontsize=7.5
    )
    axes.set_ylim(len(timed) - 0.4, -0.6)
    style.ratio_axis(axes, [ratio for row in timed for name, ratio in row.ratios.items() if name != BASE])
    axes.set_xlabel("baseline's time / pyfused's time (right of 1x: pyfused is faster)")
    style.clean(axes)
    figure.suptitle(_where(timed[0]), fontsize=9)
    figure.legend(loc="outside lower center", ncols=3)
    return Picture("ratios", figure, f"Ratios of {len(timed)} rows to their baselines; the table of all rows has them.")


@styled
def summary(rows: Sequence[Row]) -> Picture | None:
    """A line for each operator and for the models, with a dot for each of their rows and baselines; None when there is
    none."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.name.partition(" ")[0] if row.kind == "operator" else "whole models", []).append(row)
    names = [name for name in style.contenders(rows, "ratios") if name != BASE and not name.startswith("pyfused")]
    if not names:
        return None
    figure = Figure(figsize=(style.WIDTH, 1.3 + 0.42 * len(groups)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        found = [
            (row.ratios[name], at) for at, group in enumerate(groups.values()) for row in group if name in row.ratios
        ]
        x, y = zip(*found, strict=True)
        # Side by side, so that none hides another.
        shifted = [at + (place - (len(names) - 1) / 2) * 0.6 / len(names) for at in y]
        colour, marker = style.look(name)
        axes.scatter(x, shifted, s=22, color=colour, marker=marker, label=f"against {name}", zorder=4)
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    style.ratio_axis(axes, [ratio for row in rows for name, ratio in row.ratios.items() if name in names])
    axes.set_xlabel("baseline's time / pyfused's time (right of 1x: pyfused is faster)")
    style.clean(axes)
    figure.suptitle(_where(rows[0]), fontsize=9)
    figure.legend(loc="outside lower center", ncols=4)
    return Picture("measured", figure, f"Times of baselines over those of pyfused, {len(rows)} rows.")


@styled
def bars(rows: Sequence[Row], name: str) -> Picture | None:
    """Every ratio of these rows as a bar from 1x, by what was measured; None when there is none.

    Args:
        rows: of one operator, or of models.
        name: the picture's.
    """
    parts = style.panels([row for row in rows if row.ratios])
    if not parts:
        return None
    names = style.contenders(rows, "ratios")
    figure, grid = _grid(parts, len(names))
    for axes, (title, found) in zip(grid, parts.items(), strict=True):
        places = _bars(axes, found, names, "ratios", start=1.0)
        style.ratio_axis(axes, [ratio for row in found for ratio in row.ratios.values()])
        for place, value, _ in places:
            axes.annotate(
                f"{style.number(value)}x", (value, place), (3 if value >= 1 else -3, 0), textcoords="offset points",
                ha="left" if value >= 1 else "right", va="center", fontsize=6.5,
            )  # fmt: skip
        axes.set_title(title)
        axes.set_xlabel("baseline's time / pyfused's")
        style.clean(axes, "x")
    figure.legend(handles=_handles(names, prefix="against "), loc="outside lower center", ncols=3)
    lines = [
        f"{_title(row)}: " + ", ".join(f"{style.number(value)}x {name}" for name, value in row.ratios.items())
        for found in parts.values()
        for row in found
    ]
    return Picture(name, figure, "Baseline's time over pyfused's. " + "; ".join(lines) + ".")


@styled
def memory(rows: Sequence[Row], name: str) -> Picture | None:
    """Peak and saved memory of every contender; None when no row has them."""
    # Eager launches and graph replay of one call hold the same memory: the first of them is shown.
    once = {(row.name, row.measured): row for row in reversed(rows) if row.peak_bytes or row.saved_bytes}
    found = list(reversed(once.values()))
    fields = {"peak_bytes": "peak", "saved_bytes": "saved for backward"}
    parts = {label: (field, found) for field, label in fields.items() if any(getattr(row, field) for row in found)}
    if not parts:
        return None
    names = style.contenders(found, "peak_bytes")
    figure, grid = _grid({label: group for label, (_, group) in parts.items()}, len(names))
    lines = []
    for axes, (label, (field, group)) in zip(grid, parts.items(), strict=True):
        places = _bars(axes, group, names, field, scale=2.0**-20)
        for place, value, _ in places:
            axes.annotate(
                style.number(value), (value, place), (3, 0), textcoords="offset points", va="center", fontsize=6.5
            )
        axes.set_xlim(0, 1.14 * max(value for _, value, _ in places) or 1.0)
        axes.set_title(label)
        axes.set_xlabel("MiB")
        style.clean(axes, "x")
        lines += [f"{_title(row)}, {label}: {_mebibytes(getattr(row, field))}" for row in group]
    figure.legend(handles=_handles(names), loc="outside lower center", ncols=4)
    return Picture(name, figure, "Memory in MiB. " + "; ".join(lines) + ".")


@styled
def curves(rows: Sequence[Row], name: str = "curves") -> Picture | None:
    """The loss curves of the training runs, and how far apart they are; None when there is none."""
    runs = [row for row in rows if row.kind == "training" and row.loss]
    if not runs:
        return None
    figure = Figure(figsize=(style.WIDTH, 4.6 * math.ceil(len(runs) / 2)), layout="constrained")
    lines = []
    columns = min(2, len(runs))
    blocks = figure.subfigures(math.ceil(len(runs) / columns), columns, squeeze=False).flat
    for block, row in zip(blocks, runs, strict=False):
        above, below = block.subplots(2, 1, height_ratios=[3, 1.4])
        lines.append(_curves(row, above, below))
    figure.suptitle(_where(runs[0]), fontsize=9)
    return Picture(name, figure, "Training loss. " + "; ".join(lines) + ".")


def _curves(row: Row, above: Axes, below: Axes) -> str:
    losses = {name: list(values) for name, values in row.loss.items()}
    for index, (name, values) in enumerate(losses.items()):
        # The curves lie on one another: a wide line underneath and a dashed one above show both.
        line = {"linewidth": 4, "alpha": 0.5} if index == 0 else {"linewidth": 1.6, "linestyle": "--"}
        above.plot(range(1, len(values) + 1), values, label=name, color=style.look(name)[0], **line)
    above.set_title(style.fitting(row.name), fontsize=8.5)
    above.set_ylabel("training loss")
    above.legend()
    subject, said = losses[row.subject], []
    for name, values in losses.items():
        if name != row.subject:
            gaps = [abs(mine - other) for mine, other in zip(subject, values, strict=True)]
            below.plot(range(1, len(gaps) + 1), gaps, color=style.look(name)[0], linewidth=1)
            said.append(
                f"largest difference to {name}: {max(gaps):.1e}" if any(gaps) else f"equal to {name}, every bit"
            )
    below.set_title(", ".join(said), fontsize=8.5)
    below.set_ylim(bottom=0)
    below.set_ylabel("difference")
    below.set_xlabel("step")
    for axes in (above, below):
        style.clean(axes)
    return f"{row.name}: {subject[0]:.3f} to {subject[-1]:.3f} in {len(subject)} steps, {', '.join(said)}"


def _bars(
    axes: Axes, rows: Sequence[Row], names: Sequence[str], field: str, start: float = 0.0, scale: float = 1.0
) -> list[tuple[float, float, str]]:
    """A group of bars for each row, no room left for who is not in it; (place, value, contender) of each bar."""
    top, ticks, found = 0.0, [], []
    for row in rows:
        own = [name for name in names if name in getattr(row, field)]
        for index, name in enumerate(own):
            place, value = top + index * _BAR, scale * getattr(row, field)[name]
            axes.barh(place, value - start, 0.9 * _BAR, left=start, color=style.look(name)[0], zorder=2)
            found.append((place, value, name))
        ticks.append(top + (len(own) - 1) * _BAR / 2)
        top += len(own) * _BAR + _GAP
    axes.set_yticks(ticks, [style.shape_name(row) for row in rows], fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(top - _GAP - _BAR / 2 + 0.05, -_BAR / 2 - 0.05)
    return found


def _grid(parts: dict[str, list[Row]], bars_each: int) -> tuple[Figure, list[Axes]]:
    """Axes for groups of bars, two beside each other; the right ones without names where both have the same rows."""
    tallest = max(len(found) for found in parts.values())
    figure, grid = style.panes(len(parts), height=1.1 + tallest * (bars_each * _BAR + _GAP))
    names = [[row.name for row in found] for found in parts.values()]
    for left, right in zip(range(0, len(grid), 2), range(1, len(grid), 2), strict=False):
        if names[left] == names[right]:
            grid[right].tick_params(axis="y", labelleft=False)
    return figure, grid


def _handles(names: Sequence[str], prefix: str = "") -> list[Line2D]:
    found = []
    for name in names:
        label = f"{prefix}{name}" + (" alone, which does less" if name == BASE and prefix else "")
        found.append(Line2D([], [], color=style.look(name)[0], linewidth=6, label=label))
    return found


def _title(row: Row) -> str:
    return f"{style.shape_name(row)} {row.measured}"


def _mebibytes(found: dict[str, int]) -> str:
    return ", ".join(f"{name} {style.number(value / 2**20)}" for name, value in found.items())


def _where(row: Row) -> str:
    facts = row.provenance
    return f"{facts.get('device')}, {facts.get('threads')} threads, torch {facts.get('torch')}, {facts.get('date')}"
