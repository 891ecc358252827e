"""The tables of the report's page: every row of a record, and what changed from one record to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyfused.bench.record.records import Comparison, Pair
from pyfused.bench.record.rows import Row
from pyfused.bench.show import style
from pyfused.bench.show.terminal import floor_text, margin, ratio_text, time_text

# Field of `Row` -> what a change of it is called.
_COSTS = {"seconds": "time", "peak_bytes": "peak memory", "saved_bytes": "saved memory"}


@dataclass(frozen=True)
class Cell:
    """One value; ``verdict`` is "worse", "better", "failed" or nothing."""

    text: str
    verdict: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose columns stand in groups.

    Attributes:
        title: of the table.
        groups: (title, columns) in order, after the columns "row" and "measured"; none is empty.
        lines: for each row its name, what was measured, and a cell for each column.
    """

    title: str
    groups: list[tuple[str, list[str]]]
    lines: list[tuple[str, str, list[Cell]]]


def of_rows(title: str, rows: Sequence[Row]) -> Table:
    """Every number of these rows."""
    timed, ratios, peaks, saved, losses = (
        list(dict.fromkeys(map(style.spoken, style.contenders(rows, field))))
        for field in ("seconds", "ratios", "peak_bytes", "saved_bytes", "loss")
    )
    groups = [
        ("", ["parity", "rounds", *(["spread"] if any(row.quartiles for row in rows) else [])]),
        ("median time", timed),
        ("time / pyfused's", ratios),
        ("", ["% of floor"] if any(map(floor_text, rows)) else []),
        ("peak memory, MiB", peaks),
        ("saved for backward, MiB", saved),
        ("last loss", losses),
    ]
    lines = []
    for row in rows:
        parity = Cell("FAILED", "failed") if not row.passed else Cell(f"{margin(row):.2f}" if row.parity else "")
        cells = [parity, Cell(str(row.rounds or ""))]
        if "spread" in groups[0][1]:
            cells.append(Cell(f"{row.spread:.0%}" if row.quartiles else "", "worse" if row.noisy else ""))
        cells += [Cell(time_text(value)) for value in _columns(row.seconds, timed)]
        cells += [Cell(ratio_text(value)) for value in _columns(row.ratios, ratios)]
        cells += [Cell(floor_text(row))] if groups[3][1] else []
        cells += map(_mebibytes, _columns(row.peak_bytes, peaks))
        cells += map(_mebibytes, _columns(row.saved_bytes, saved))
        cells += map(_loss, _columns(row.loss, losses))
        lines.append((style.short_name(row), row.measured_how, cells))
    return Table(title, [group for group in groups if group[1]], lines)


def of_parity(title: str, rows: Sequence[Row]) -> Table:
    """Of each row the error that is the largest share of its limit."""
    lines = []
    for row in rows:
        if row.parity:
            worst = max(row.parity, key=lambda item: float(item["error"]) / float(item["limit"]))
            numbers = [Cell(f"{float(worst[name]):.2g}") for name in ("error", "plain", "limit")]
            cells = [Cell(worst["tensor"]), Cell(worst["norm"]), *numbers]
            cells.append(Cell(f"{margin(row):.2f}", "" if row.passed else "failed"))
            lines.append((style.short_name(row), row.measured_how, cells))
    return Table(title, [("", ["tensor", "norm", "error", "plain PyTorch's", "limit", "error / limit"])], lines)


def _columns(numbers: Mapping[str, Any], columns: Sequence[str]) -> list[Any]:
    """The number of each column, whose title is what a contender is called; None where there is none."""
    called = {style.spoken(name): value for name, value in numbers.items()}
    return [called.get(column) for column in columns]


def of_pairs(title: str, pairs: Sequence[Pair], comparison: Comparison) -> Table:
    """New / old of every number that both records have."""
    rows = [pair.new for pair in pairs]
    columns = {
        field: [name for name in style.contenders(rows, field) if any(name in pair.change(field) for pair in pairs)]
        for field in ("seconds", "ratios", "peak_bytes", "saved_bytes")
    }
    titles = {
        "seconds": "time, new / old",
        "ratios": "pyfused's lead, new / old",
        "peak_bytes": "peak memory, new / old",
        "saved_bytes": "saved memory, new / old",
    }
    lines = []
    for pair in pairs:
        cells = [_change(pair, field, name, comparison) for field, names in columns.items() for name in names]
        lines.append((style.short_name(pair.new), pair.new.measured_how, cells))
    return Table(
        title, [(titles[field], [*map(style.spoken, names)]) for field, names in columns.items() if names], lines
    )


def judged(comparison: Comparison, verdict: str) -> list[tuple[str, str, str, str]]:
    """(row, measured, what, new / old) of every number with this verdict, the largest change first."""
    found = []
    for pair in comparison.pairs:
        for field in (*_COSTS, "ratios"):
            for name, change in pair.change(field).items():
                if _verdict(pair, field, name, change, comparison) == verdict:
                    what = (
                        f"lead over {style.spoken(name)}"
                        if field == "ratios"
                        else f"{_COSTS[field]} of {style.spoken(name)}"
                    )
                    found.append(
                        (max(change, 1 / change), (pair.new.name, pair.new.measured_how, what, f"{change:.3f}"))
                    )
    return [line for _, line in sorted(found, key=lambda item: -item[0])]


def broken(row: Row) -> list[str]:
    """The parity figures of a row that are over their limit."""
    return [
        f"{item['tensor']}, {item['norm']}: error {float(item['error']):.2g}, limit {float(item['limit']):.2g}"
        for item in row.parity
        if not float(item["error"]) <= float(item["limit"])
    ]


def _verdict(pair: Pair, field: str, name: str, change: float, comparison: Comparison) -> str:
    """Of pyfused's own costs and of its lead over others: what those cost is the machine's and torch's affair."""
    own = name.startswith(pair.new.subject)
    if pair.new.kind == "machine" or own == (field == "ratios"):
        return ""
    return comparison.judge(change if own else 1 / change)


def _change(pair: Pair, field: str, name: str, comparison: Comparison) -> Cell:
    change = pair.change(field).get(name)
    if change is None:
        return Cell("")
    return Cell(f"{change:.3f}", _verdict(pair, field, name, change, comparison))


def _mebibytes(value: int | None) -> Cell:
    return Cell("" if value is None else f"{value / 2**20:.1f}")


def _loss(value: object) -> Cell:
    last = value[-1] if isinstance(value, list) and value else value
    return Cell(f"{last:.6f}" if isinstance(last, float) else "")
