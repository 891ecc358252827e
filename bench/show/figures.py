"""The figures of what was measured alone: ratios, memory, loss curves. Those of work and time are in rates.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyfused.bench.cases.baselines import BASE
from pyfused.bench.record.rows import Row
from pyfused.bench.show import style
from pyfused.bench.show.style import Picture, styled

# Inches.
_LANE = 0.15
# Characters of a row's name above its lanes, in axes alone and in axes beside others.
_LONGEST = (96, 56)


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
    # Of two names for plain PyTorch a row has one.
    called = list(dict.fromkeys(map(style.spoken, names)))
    for place, title in enumerate(called):
        same = [name for name in names if style.spoken(name) == title]
        found = [
            (row.ratios[name], at)
            for at, group in enumerate(groups.values())
            for row in group
            for name in same
            if name in row.ratios
        ]
        x, y = zip(*found, strict=True)
        # Side by side, so that none hides another.
        shifted = [at + (place - (len(called) - 1) / 2) * 0.6 / len(called) for at in y]
        colour, marker = style.look(same[0])
        axes.scatter(x, shifted, s=22, color=colour, marker=marker, label=f"against {title}", zorder=4)
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
    """The ratio to each baseline as a bar from 1x, by what was measured; None when there is none.

    Args:
        rows: of one operator, or of models.
        name: the picture's.
    """
    parts = {
        title: [(style.shape_name(row), style.baselines(row)) for row in found]
        for title, found in style.panels([row for row in rows if style.baselines(row)]).items()
    }
    if not parts:
        return None
    figure, grid = _lanes(parts)
    for axes, (title, found) in zip(grid, parts.items(), strict=True):
        for place, value, contender in _places(found):
            colour = style.look(contender)[0]
            # With an edge, by which a bar of no length is still seen.
            axes.barh(place, value - 1.0, 0.75, left=1.0, color=colour, edgecolor=colour, zorder=4, clip_on=False)
            side = 1 if value >= 1 else -1
            axes.annotate(
                f"{style.number(value)}x", (value, place), (4 * side, 0), textcoords="offset points",
                ha="left" if side > 0 else "right", va="center", fontsize=7,
            )  # fmt: skip
        # One axis for all parts, so that bars of one length are one ratio.
        style.ratio_axis(axes, [value for each in parts.values() for _, value, _ in _places(each)])
        axes.set_title(title)
        axes.set_xlabel("baseline's time / pyfused's")
        style.clean(axes, "x")
    alt = f"Bars of {sum(map(len, parts.values()))} rows: baseline's time over pyfused's. The table has the numbers."
    return Picture(name, figure, alt)


@styled
def memory(rows: Sequence[Row], name: str) -> Picture | None:
    """Peak and saved memory of every contender; None when no row has them."""
    # Eager launches and graph replay of one call hold the same memory: the first of them is shown.
    once = {(row.name, row.measured): row for row in reversed(rows) if row.peak_bytes or row.saved_bytes}
    found = list(reversed(once.values()))
    fields = {"peak_bytes": "peak", "saved_bytes": "saved for backward"}
    parts = {}
    for field, label in fields.items():
        own = [(row, getattr(row, field)) for row in found if getattr(row, field)]
        if own:
            names = style.contenders(found, field)
            parts[label] = [
                (style.shape_name(row), {name: held[name] / 2**20 for name in names if name in held})
                for row, held in own
            ]
    if not parts:
        return None
    figure, grid = _lanes(parts)
    for axes, (label, each) in zip(grid, parts.items(), strict=True):
        places = _places(each)
        for place, value, contender in places:
            axes.barh(place, value, 0.75, color=style.look(contender)[0], zorder=4, clip_on=False)
            axes.annotate(
                style.number(value), (value, place), (3, 0), textcoords="offset points", va="center", fontsize=7
            )
        axes.set_xlim(0, 1.14 * max(value for _, value, _ in places) or 1.0)
        axes.set_title(label)
        axes.set_xlabel("MiB")
        style.clean(axes, "x")
    alt = f"Bars of {len(found)} rows: memory of each contender in MiB. The table has the numbers."
    return Picture(name, figure, alt)


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


def loss_gaps(row: Row) -> dict[str, list[float]]:
    """Contender -> how far its loss is from the subject's, step by step."""
    subject = row.loss[row.subject]
    return {
        name: [abs(mine - other) for mine, other in zip(subject, losses, strict=True)]
        for name, losses in row.loss.items()
        if name != row.subject
    }


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
    for name, gaps in loss_gaps(row).items():
        below.plot(range(1, len(gaps) + 1), gaps, color=style.look(name)[0], linewidth=1)
        said.append(f"largest difference to {name}: {max(gaps):.1e}" if any(gaps) else f"equal to {name}, every bit")
    below.set_title(", ".join(said), fontsize=8.5)
    below.set_ylim(bottom=0)
    below.set_ylabel("difference")
    below.set_xlabel("step")
    for axes in (above, below):
        style.clean(axes)
    return f"{row.name}: {subject[0]:.3f} to {subject[-1]:.3f} in {len(subject)} steps, {', '.join(said)}"


# Rows of a part of a figure in order: (name, contender -> value).
_Rows = list[tuple[str, dict[str, float]]]


def _places(rows: _Rows) -> list[tuple[int, float, str]]:
    """(place, value, contender) of each value, below a place for the name of its row."""
    found, place = [], 0
    for _, values in rows:
        for contender, value in values.items():
            place += 1
            found.append((place, value, contender))
        place += 2
    return found


def _lanes(parts: dict[str, _Rows]) -> tuple[Figure, list[Axes]]:
    """Axes for each part, two beside each other, with a lane for each value.

    Every lane has its contender's name at its left, and every row its own above its lanes, so that no legend is needed.
    Right axes go without the names of lanes where the left ones have the same.
    """
    lanes = [[(row, contender) for row, values in found for contender in values] for found in parts.values()]
    tallest = max(len(own) + 2 * len(found) for own, found in zip(lanes, parts.values(), strict=True))
    figure, grid = style.panes(len(parts), height=0.7 + tallest * _LANE)
    for index, (axes, found) in enumerate(zip(grid, parts.values(), strict=True)):
        places = _places(found)
        axes.set_yticks([place for place, *_ in places], [style.spoken(name) for *_, name in places], fontsize=7)
        axes.tick_params(axis="y", length=0, labelleft=not (index % 2 and lanes[index] == lanes[index - 1]))
        axes.set_ylim(places[-1][0] + 0.7, -0.8)
        top = 0
        for row, values in found:
            # On a ground of its own: lines of the axes would run through it.
            axes.annotate(
                style.fitting(row, _LONGEST[len(parts) > 1]), (0, top), (2, 0), textcoords="offset points",
                xycoords=axes.get_yaxis_transform(), va="center", fontsize=7.5, fontweight="bold", clip_on=True,
                bbox={"facecolor": style.PAGE, "edgecolor": "none", "pad": 1}, zorder=5,
            )  # fmt: skip
            top += len(values) + 2
    return figure, grid


def _where(row: Row) -> str:
    facts = row.provenance
    day = str(facts.get("date"))[:10]
    return f"{facts.get('device')}, {facts.get('threads')} threads, torch {facts.get('torch')}, {day}"
