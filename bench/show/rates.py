"""What an operator's rows reach, held against what their machine can: the roofline, and time against size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import EngFormatter
from matplotlib.transforms import Bbox

from pyfused.bench.record.records import Limits
from pyfused.bench.record.rows import Row
from pyfused.bench.show import style
from pyfused.bench.show.style import GRID, INK, Picture

_CONTENDERS = ("pyfused", "eager")
# Offsets of a label from its point that are tried in turn: angle in turns, distance in points.
_PLACES = [(turn, distance) for distance in (10, 16, 23, 31, 40) for turn in np.arange(0, 1, 1 / 12)]
# Rows that differ in one of these lie on lines of their own.
_SETTINGS = ("dropout_p", "drop_path", "norm_match")
_DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")


def missing(rows: Sequence[Row], limits: Limits | None) -> str | None:
    """Why neither figure can be drawn of an operator's rows; None when they can."""
    timed = [row for row in rows if _of(row)]
    if not timed:
        return "no row has a time of pyfused or of eager"
    if not all({"flops", "bytes"} <= row.facts.keys() for row in timed):
        return "this record's rows do not say how much they compute and move; those of a new run do"
    if limits is None:
        return "this record has no machine rows (matrix product, copy), which a run without -k makes"
    unknown = {str(row.facts.get("dtype")) for row in timed} - limits.flops.keys()
    if unknown:
        return f"this record's machine rows have no matrix product in {', '.join(sorted(unknown))}"
    return None


def shares(rows: Sequence[Row], limits: Limits) -> dict[str, tuple[float, float]]:
    """Contender -> the least and the greatest share of the limits that it reaches in any of these rows."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name in _of(row):
            limit = min(limits.flops[str(row.facts["dtype"])], _intensity(row) * limits.bandwidth)
            found.setdefault(name, []).append(_rate(row, name) / limit)
    return {name: (min(own), max(own)) for name, own in found.items()}


@style.styled
def roofline(rows: Sequence[Row], limits: Limits, name: str) -> Picture:
    """FLOP/s against arithmetic intensity, both of the least work that the row's call needs.

    Args:
        rows: of one operator; `missing` knows no reason against them.
        limits: of the same run.
        name: the picture's.
    """
    timed = [row for row in rows if _of(row)]
    parts = style.panels(timed)
    numbers = {name: index for index, name in enumerate(dict.fromkeys(map(style.shape_name, timed)), start=1)}
    figure, grid = style.panes(len(parts), height=4.2 + 0.1 * len(numbers))
    written = []
    for axes, (title, found) in zip(grid, parts.items(), strict=True):
        speeds = _points(axes, found)
        _roof(axes, found, limits, speeds)
        axes.set_title(title)
        axes.set_xlabel("arithmetic intensity, FLOP per byte of least traffic")
        axes.set_ylabel("FLOP/s of the least work")
        style.clean(axes)
        written.append([_number(axes, numbers[style.shape_name(row)], row) for row in found])
    figure.legend(handles=_marks(timed) + _limits(timed, limits), loc="outside upper center", ncols=4, fontsize=8)
    key = [_key(index, text) for text, index in numbers.items()]
    figure.legend(handles=key, loc="outside lower center", ncols=3, handlelength=0, handletextpad=0, fontsize=8)
    figure.draw_without_rendering()
    for axes, labels, found in zip(grid, written, parts.values(), strict=True):
        _spread(axes, labels, found)
    lines = [
        f"{style.shape_name(row)} {row.measured}: {_intensity(row):.3g} FLOP per byte, "
        + ", ".join(f"{style.spoken(name)} {_rate(row, name) / 1e9:.3g} GFLOP/s" for name in _of(row))
        for row in timed
    ]
    return Picture(name, figure, "Roofline. " + "; ".join(lines) + ".")


@style.styled
def scaling(rows: Sequence[Row], limits: Limits, name: str) -> Picture:
    """Time against size, which is the time of the row's work at the machine's limits; arguments as for `roofline`."""
    timed = [row for row in rows if _of(row)]
    parts = style.panels(timed)
    names = style.contenders(timed, "seconds")
    settings = list(dict.fromkeys(map(_setting, timed)))
    dashes = {setting: _DASHES[index % len(_DASHES)] for index, setting in enumerate(settings)}
    figure, grid = style.panes(len(parts), height=4.0)
    for axes, (title, found) in zip(grid, parts.items(), strict=True):
        for contender, setting in itertools.product(names, settings):
            points = sorted(
                (_size(row, limits), row.seconds[contender])
                for row in found
                if _setting(row) == setting and contender in row.seconds
            )
            if points:
                colour, marker = style.look(contender)
                axes.plot(
                    *zip(*points, strict=True), dashes[setting], color=colour, marker=marker, markersize=5,
                    linewidth=1.3, zorder=4 if contender == "pyfused" else 3,
                )  # fmt: skip
        axes.set(xscale="log", yscale="log")
        axes.margins(0.1)
        ends = np.array(axes.get_xlim())
        axes.plot(ends, ends, color=INK, linewidth=1.3, zorder=2)
        axes.set_xlim(*ends)
        style.logarithmic(axes.xaxis, "s")
        style.logarithmic(axes.yaxis, "s")
        axes.set_title(title)
        axes.set_xlabel("size: its products, then its traffic, at the measured limits")
        axes.set_ylabel("median time of a call")
        style.clean(axes)
    handles = [
        Line2D([], [], color=style.look(name)[0], marker=style.look(name)[1], markersize=5, label=style.spoken(name))
        for name in names
    ]
    handles.append(Line2D([], [], color=INK, label="as fast as the measured limits"))
    if len(settings) > 1:
        handles += [
            Line2D([], [], color=INK, linewidth=1, linestyle=line, label=setting or "rows, plain")
            for setting, line in dashes.items()
        ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    return Picture(name, figure, f"Time against size of {len(timed)} rows; the table of all rows has the times.")


def _of(row: Row) -> list[str]:
    return [name for name in _CONTENDERS if name in row.seconds]


def _intensity(row: Row) -> float:
    return row.facts["flops"] / row.facts["bytes"]


def _rate(row: Row, contender: str) -> float:
    return row.facts["flops"] / row.seconds[contender]


def _size(row: Row, limits: Limits) -> float:
    return row.facts["flops"] / limits.flops[str(row.facts["dtype"])] + row.facts["bytes"] / limits.bandwidth


def _setting(row: Row) -> str:
    """In words what is not size; empty for rows without any of it."""
    words = ["images"] if len(row.facts.get("shape") or ()) == 4 else []
    for key in _SETTINGS:
        value = row.facts.get(key)
        if value:
            word = key.removesuffix("_p").replace("_", "-")
            words.append(word if value is True else f"{word} {value:g}")
    return ", ".join(words)


def _dtypes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(str(row.facts["dtype"]) for row in rows))


def _points(axes: Axes, rows: Sequence[Row]) -> list[float]:
    speeds = []
    for row in rows:
        own = [_rate(row, name) for name in _of(row)]
        axes.plot([_intensity(row)] * len(own), own, color=GRID, linewidth=1.2, zorder=2)
        for name, speed in zip(_of(row), own, strict=True):
            colour, marker = style.look(name)
            axes.plot(_intensity(row), speed, marker, color=colour, markersize=6, zorder=5 if name == "pyfused" else 4)
        speeds += own
    return speeds


def _roof(axes: Axes, rows: Sequence[Row], limits: Limits, speeds: Sequence[float]) -> None:
    """The two limits, on axes that leave room for the points and for the corner where the limits meet."""
    tops = [limits.flops[dtype] for dtype in _dtypes(rows)]
    intensities = [*map(_intensity, rows), *(top / limits.bandwidth for top in tops)]
    low, high = min(intensities) / 2, max(intensities) * 2
    x = np.geomspace(low, high, 500)
    for dashes, top in zip(itertools.cycle(_DASHES), tops, strict=False):
        axes.plot(x, np.minimum(top, x * limits.bandwidth), dashes, color=INK, linewidth=1.3, zorder=3)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(speeds) / 1.8, max([*speeds, *tops]) * 1.5))
    style.logarithmic(axes.xaxis, "")
    style.logarithmic(axes.yaxis, "FLOP/s")


def _marks(rows: Sequence[Row]) -> list[Line2D]:
    return [
        Line2D([], [], color=style.look(name)[0], marker=style.look(name)[1], linestyle="", label=style.spoken(name))
        for name in _CONTENDERS
        if any(name in row.seconds for row in rows)
    ]


def _limits(rows: Sequence[Row], limits: Limits) -> list[Line2D]:
    bandwidth = EngFormatter("B/s", places=1).format_data(limits.bandwidth)
    found = []
    for dashes, dtype in zip(itertools.cycle(_DASHES), _dtypes(rows), strict=False):
        flops = EngFormatter("FLOP/s", places=0).format_data(limits.flops[dtype])
        label = f"measured limits: {dtype} product {flops}, copy {bandwidth}"
        found.append(Line2D([], [], color=INK, linestyle=dashes, label=label))
    return found


def _number(axes: Axes, number: int, row: Row) -> Annotation:
    at = _intensity(row), _rate(row, _of(row)[0])
    return axes.annotate(
        str(number), at, (0, 0), textcoords="offset points", ha="center", va="center", fontsize=8, zorder=6
    )


def _key(number: int, text: str) -> Line2D:
    return Line2D([], [], linestyle="", label=f"{number}: {style.fitting(text)}")


def _spread(axes: Axes, labels: Sequence[Annotation], rows: Sequence[Row]) -> None:
    """Moves each label to the nearest place beside its point where nothing else is."""
    unit = axes.figure.dpi / 72
    # Beside the markers the limits' own lines are in the way.
    taken = [
        Bbox.from_bounds(x - unit, y - unit, 2 * unit, 2 * unit)
        for line in axes.get_lines()
        if np.size(line.get_xdata()) > 2
        for x, y in axes.transData.transform(line.get_xydata())
    ]
    for row in rows:
        for name in _of(row):
            x, y = axes.transData.transform((_intensity(row), _rate(row, name)))
            taken.append(Bbox.from_bounds(x - 4 * unit, y - 4 * unit, 8 * unit, 8 * unit))
    inside = axes.get_window_extent()
    for label in labels:
        x, y = axes.transData.transform(label.xy)
        box = label.get_window_extent()
        for turn, distance in _PLACES:
            dx, dy = np.sin(2 * np.pi * turn) * distance, np.cos(2 * np.pi * turn) * distance
            width, height = box.width + unit, box.height + unit
            here = Bbox.from_bounds(x + dx * unit - width / 2, y + dy * unit - height / 2, width, height)
            within = inside.containsx(here.x0) and inside.containsx(here.x1) and inside.containsy(here.y1)
            if within and not here.count_overlaps(taken):
                break
        label.set_position((dx, dy))
        taken.append(here)
