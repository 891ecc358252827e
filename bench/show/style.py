"""What all figures have in common: a colour for each contender, names, axes, and the files they become."""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar
from xml.sax.saxutils import quoteattr

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from pyfused import files
from pyfused.bench.cases.baselines import BASE, LOOP
from pyfused.bench.record.rows import Row

_Arguments = ParamSpec("_Arguments")
_Drawn = TypeVar("_Drawn")
# Light to dark page: what is drawn in the first is shown in the second where the reader's scheme is dark.
INK, GRID, PAGE = "#1f2329", "#d3d8de", "#ffffff"
# Of every figure, in inches.
WIDTH = 9.6
_DARK = {INK: "#e4e8ee", GRID: "#3a424c", PAGE: "#1c2027"}
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
    LOOP: ("#b05a3c", "*"),
    BASE: ("#8b949e", "X"),
}
# Contender -> what a reader calls it; the others have their own names.
_SPOKEN = {"eager": "plain PyTorch", "reference": "plain PyTorch", BASE: "frozen layer alone"}
# What an SVG of matplotlib's says at length -> the same, as short as a page needs it; then the same within a tag.
_SHORTER = (
    (r"<metadata>.*?</metadata>", ""),
    (r"<defs>\s*<style.*?</style>\s*</defs>", ""),
    (r">\s+<", "><"),
    (r"<g( id=\"[^\"]*\")?/>", ""),
)
_SHORTER_TAGS = (
    # Of groups: what is referred to is a path or a clip.
    (r"^<g id=\"[^\"]*\"", "<g"),
    (r" (?:xmlns(?::xlink)?|version)=\"[^\"]*\"", ""),
    (r" font-family: [^;]*;", ""),
    (r" transform=\"rotate\(-0 [^\"]*\"", ""),
    (r"xlink:href", "href"),
    (r"(\d\.\d)\d+", r"\1"),
    (r"\s*\n\s*", " "),
    (r"(?<=[;:MLz]) | (?=[LMz\"])", ""),
)
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

    def svg(self, **metadata: str) -> str:
        """The figure as an SVG of its own that follows the reader's colour scheme; its text is in the reader's font.

        Args:
            metadata: what the SVG says of itself, such as Title.
        """
        return self._drawn("pyfused", **metadata).replace("<defs>", f"<style>{scheme()}</style><defs>", 1)

    def inline(self, classes: dict[str, str]) -> str:
        """The figure as an element of a page that has `scheme` and a font for figures among its styles.

        It is a quarter of the size of `svg`: nothing is said twice, and nothing that a reader does not see.

        Args:
            classes: CSS of parts -> their class, of all figures of the page; what this one lacks is added.
        """
        drawn = self._drawn(self.name)
        drawn = drawn[drawn.index("<svg") :]
        for pattern, shorter in _SHORTER:
            drawn = re.sub(pattern, shorter, drawn, flags=re.DOTALL)
        for pattern, shorter in _SHORTER_TAGS:
            drawn = re.sub(r"<[^>]*>", lambda tag: re.sub(pattern, shorter, tag[0]), drawn)  # noqa: B023

        def classed(tag: re.Match[str]) -> str:
            return re.sub(
                r'style="([^"]*)"', lambda css: f'class="{classes.setdefault(css[1], f"c{len(classes)}")}"', tag[0]
            )

        drawn = re.sub(r"<[^>]*>", classed, drawn)
        return drawn.replace("<svg", f'<svg role="img" aria-label={quoteattr(self.alt)}', 1).strip()

    def _drawn(self, salt: str, **metadata: str) -> str:
        """``salt`` makes names in the SVG, by which its parts are found, differ from those of other figures."""
        stream = io.StringIO()
        with matplotlib.rc_context({**_STYLE, "svg.fonttype": "none", "svg.hashsalt": salt}):
            self.figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, **metadata})
        drawn = stream.getvalue()
        for index, light in enumerate(_DARK):
            drawn = drawn.replace(light, f"var(--c{index})")
        return drawn


def scheme() -> str:
    """CSS that gives ink (--c0), grid lines (--c1) and ground (--c2) the colours of the reader's scheme."""

    def root(colours: Sequence[str]) -> str:
        return ":root{" + "".join(f"--c{index}:{colour};" for index, colour in enumerate(colours)) + "}"

    return f"{root(list(_DARK))}@media(prefers-color-scheme:dark){{{root(list(_DARK.values()))}}}"


def styled(draw: Callable[_Arguments, _Drawn]) -> Callable[_Arguments, _Drawn]:
    """``draw`` with the fonts and colours of all figures."""

    @functools.wraps(draw)
    def drawn(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Drawn:
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


def baselines(row: Row) -> dict[str, float]:
    """The ratios to those who do the same without this package."""
    return {name: ratio for name, ratio in row.ratios.items() if name != BASE and not name.startswith("pyfused")}


def spoken(contender: str) -> str:
    """What a reader calls it."""
    return _SPOKEN.get(contender, contender)


def panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by what was measured and, on a GPU, how; the title of each part first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.measured_how, []).append(row)
    return dict(sorted(found.items(), key=lambda item: ("graph" in item[0], len(item[0]))))


def short_name(row: Row) -> str:
    """A row's name without what its section of the page is about."""
    return (row.name.partition(" ")[2] if row.kind in ("operator", "overhead") else "") or row.name


def shape_name(row: Row) -> str:
    """The same without the dtype."""
    words = [word for word in short_name(row).split() if word.rstrip(",") != row.facts.get("dtype")]
    return " ".join(words).replace("->", "→")


def fitting(text: str, longest: int = 96) -> str:
    """``text``, its middle left out where it would push a figure's axes off the page."""
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[1 - longest // 2 :]}"


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
