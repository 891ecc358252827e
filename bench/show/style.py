"""What all figures have in common: a colour for each contender, names, axes, and the files they become."""

from __future__ import annotations

import base64
import functools
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from pyfused import files
from pyfused.bench.record.rows import Row

# Light to dark page: what is drawn in the first is shown in the second where the reader's scheme is dark.
INK, GRID = "#1f2329", "#d3d8de"
# Of every figure, in inches.
WIDTH = 9.6
# Characters of a name in a figure.
_LONGEST = 96
_DARK = {INK: "#e4e8ee", GRID: "#3a424c"}
_STYLE: dict[Any, Any] = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "pyfused",
    # A "$" in a row's name is one.
    "text.parse_math": False,
}
# Contender -> colour and marker, the same in every figure; readable on white and on black.
_CONTENDERS = {
    "pyfused": ("#2f7fd1", "o"),
    "pyfused triton": ("#4fb3e8", "h"),
    "pyfused cuda": ("#20a090", "H"),
    "pyfused portable": ("#7d8fd6", "8"),
    "pyfused triton one_launch": ("#5563c9", "p"),
    "pyfused triton shrink_expand": ("#2b4fa8", "<"),
    "pyfused triton blas": ("#1f7a8c", ">"),
    "pyfused triton save": ("#6f5bd0", "p"),
    "pyfused triton recompute": ("#3d6fb5", "<"),
    "pyfused triton absorbed": ("#4a8fd9", "p"),
    "pyfused triton absorbed_recompute": ("#2c6e9e", "<"),
    "pyfused triton standard": ("#38a3a5", ">"),
    "eager": ("#e2604a", "s"),
    "reference": ("#d072a5", "s"),
    "torch.compile": ("#3f9b4f", "^"),
    "projections + SDPA": ("#a05fb5", "D"),
    "PEFT": ("#d39a1e", "v"),
    "PEFT (nn.Linear attention)": ("#9c6b2f", "<"),
    "PEFT (autocast_adapter_dtype=False)": ("#b8a03c", ">"),
    "PEFT (autocast)": ("#8a7a1f", "P"),
    "base GEMM": ("#8b949e", "X"),
}
# For contenders of a user's own rows.
_SPARE = (("#c2508a", "*"), ("#6b8e23", "d"), ("#b5651d", "P"), ("#708090", "X"))


@dataclass(frozen=True)
class Picture:
    """A drawn figure.

    Attributes:
        name: of its file, without a suffix.
        figure: matplotlib's.
        alt: what it shows, in words.
    """

    name: str
    figure: Figure
    alt: str

    def save(self, directory: Path) -> Path:
        """Writes <name>.png, on white."""
        path = directory / f"{self.name}.png"
        with files.replacing(path) as partial:
            self.figure.savefig(partial, dpi=150, facecolor="white", format="png")
        return path

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in CSS pixels."""
        width, height = self.figure.get_size_inches() * 96
        return round(width), round(height)

    def svg(self, letters: bool = False, **metadata: str) -> str:
        """The figure as an SVG that follows the reader's colour scheme.

        Args:
            letters: text stays text, in the reader's own font, which is shorter; else (the default) it is drawn.
            metadata: what the SVG says of itself, such as Title.
        """
        stream = io.StringIO()
        with matplotlib.rc_context({**_STYLE, "svg.fonttype": "none" if letters else "path"}):
            self.figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, **metadata})
        drawn = stream.getvalue()
        names = {light: f"var(--c{index})" for index, light in enumerate(_DARK)}
        for light, variable in names.items():
            drawn = drawn.replace(light, variable)

        def scheme(colours: Sequence[str]) -> str:
            return ":root{" + "".join(f"--c{index}:{colour};" for index, colour in enumerate(colours)) + "}"

        both = f"{scheme(list(_DARK))}@media(prefers-color-scheme:dark){{{scheme(list(_DARK.values()))}}}"
        return drawn.replace("<defs>", f"<style>{both}</style><defs>", 1)

    def data_uri(self) -> str:
        """`svg` as an address."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg().encode()).decode()


def styled(draw: Callable[..., Picture | None]) -> Callable[..., Picture | None]:
    """``draw`` with the fonts and colours of all figures."""

    @functools.wraps(draw)
    def drawn(*arguments, **options) -> Picture | None:
        with matplotlib.rc_context(_STYLE):
            return draw(*arguments, **options)

    return drawn


def look(contender: str) -> tuple[str, str]:
    """Colour and marker."""
    known = _CONTENDERS.get(contender)
    # By the name itself, so that no other row of the record can change it.
    return known or _SPARE[sum(contender.encode()) % len(_SPARE)]


def contenders(rows: Sequence[Row], field: str) -> list[str]:
    """Who has a number in this field of any row: pyfused and the known ones first."""
    found = dict.fromkeys(name for row in rows for name in getattr(row, field))
    order = {name: index for index, name in enumerate(_CONTENDERS)}
    return sorted(found, key=lambda name: order.get(name, len(order)))


def panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by what was measured and, on a GPU, how; the title of each part first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.measured_how, []).append(row)
    return dict(sorted(found.items(), key=lambda item: ("graph" in item[0], len(item[0]))))


def short_name(row: Row) -> str:
    """An operator row's name without the operator."""
    return (row.name.partition(" ")[2] if row.kind == "operator" else "") or row.name


def shape_name(row: Row) -> str:
    """The same without the dtype, as long as a figure has room for."""
    words = [word for word in short_name(row).split() if word != row.facts.get("dtype")]
    return fitting(" ".join(words).replace("->", "→"))


def fitting(text: str) -> str:
    """``text``, its middle left out where it would push a figure's axes off the page."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}…{text[1 - _LONGEST // 2 :]}"


def panes(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """``count`` axes of this height in inches, two beside each other."""
    lines = math.ceil(count / 2)
    figure = Figure(figsize=(WIDTH, lines * height + 0.5), layout="constrained")
    grid = list(figure.subplots(lines, min(2, count), squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid[:count]


def clean(axes: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    axes.grid(axis=grid, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def logarithmic(axis: XAxis | YAxis, unit: str) -> None:
    """Powers of ten and, where there is room, halves of them, written with SI prefixes."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    steps = (1, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 1.6 else (1, 3) if decades < 2.5 else (1,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(EngFormatter(unit, sep=" ") if unit else EngFormatter(sep=""))


def ratio_axis(axes: Axes, ratios: Sequence[float]) -> None:
    """A logarithmic x axis around 1, on which twice as fast is as far from the middle as half as fast."""
    low, high = min(0.95, *ratios), max(1.05, *ratios)
    room = (high / low) ** 0.18
    axes.set_xscale("log")
    axes.set_xlim(low / room, high * room)
    steps = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 2, 3, 5, 7, 10, 20, 50, 100)
    ticks = [step for step in steps if low / room <= step <= high * room]
    # From 1 outwards, as many as fit.
    apart = math.log(high / low * room**2) / 8
    kept: list[float] = []
    for tick in sorted(ticks, key=lambda tick: abs(math.log(tick))):
        if all(abs(math.log(tick / other)) >= apart for other in kept):
            kept.append(tick)
    ticks = sorted(kept)
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1.0, color=INK, linewidth=1, zorder=3)


def number(value: float) -> str:
    return f"{value:.2f}" if value < 9.95 else f"{value:.1f}" if value < 99.5 else f"{value:.0f}"
