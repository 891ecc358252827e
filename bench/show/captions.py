"""What stands below each figure and table of the page: what it shows, of this record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pyfused.bench.record.rows import Row
from pyfused.bench.show import style
from pyfused.bench.show.terminal import margin, time_text


def of_ratios(title: str, rows: Sequence[Row]) -> str:
    found = [(ratio, name, row) for row in rows for name, ratio in style.baselines(row).items()]
    ends = [
        f"{ratio:.2f}x ({style.spoken(name)}, {_row(row)})"
        for ratio, name, row in (edge(found, key=lambda each: each[0]) for edge in (min, max))
    ]
    return (
        f"{title}, from {ends[0]} to {ends[1]}. A bar ends at the baseline's time over pyfused's, the median over "
        "rounds: right of 1x pyfused is faster."
    )


def of_table(title: str, rows: Sequence[Row]) -> str:
    spread = (
        " Spread is the widest range between the quartiles of a ratio." if any(row.quartiles for row in rows) else ""
    )
    return (
        f"Every number of {title}, {_rounds(rows)}. Times are medians. Parity is the largest error against float64 as "
        f"a share of its limit.{spread}"
    )


def of_memory(title: str, rows: Sequence[Row]) -> str:
    ends = ""
    own = [(row.peak_bytes[row.subject], row) for row in rows if row.subject in row.peak_bytes]
    if own:
        least, most = (edge(own, key=lambda each: each[0]) for edge in (min, max))
        ends = f" With pyfused the peak is from {_mebibytes(*least)} to {_mebibytes(*most)}."
    return (
        f"Memory of {title}: the most that is held at once beyond what was held before (peak), and what is kept for "
        f"backward beyond inputs and parameters (saved).{ends}"
    )


def of_losses(title: str, rows: Sequence[Row]) -> str:
    steps = sum(len(row.loss.get(row.subject, ())) for row in rows)
    return f"{title}: the loss of each contender from the same seed, {steps} steps in all, and below how far they part."


def of_roofline(title: str, shares: Mapping[str, tuple[float, float]]) -> str:
    reached = " and ".join(
        f"{style.spoken(name)} {100 * least:.0f} % to {100 * most:.0f} %" for name, (least, most) in shares.items()
    )
    return (
        f"Of the lines, which are this machine's own matrix product and copy in the same run, {title} reaches with "
        f"{reached}. A rate is the work of the cheapest plan over a contender's time, so that one who computes more "
        "lies lower. A point above the slanted line found tensors in a cache."
    )


def of_scaling(title: str, rows: Sequence[Row]) -> str:
    own = [(row.seconds[row.subject], row) for row in rows if row.subject in row.seconds]
    ends = [
        f"{time_text(value)} ({_row(row)})"
        for value, row in (edge(own, key=lambda each: each[0]) for edge in (min, max))
    ]
    return (
        f"Median times of {title} against size, with pyfused from {ends[0]} to {ends[1]}. Size is the time that the "
        "machine's own matrix product and then its copy need for the same work. Below the straight line a call does "
        "both at once, or less."
    )


def of_parity(title: str, rows: Sequence[Row]) -> str:
    nearest = max((row for row in rows if row.parity), key=margin)
    return (
        f"Of each row of {title} the error against float64 that is nearest to its limit, relative to the norm of its "
        f"tensor. The nearest of all is {margin(nearest):.2f} of its limit ({_row(nearest)})."
    )


def _row(row: Row) -> str:
    return f"{style.short_name(row)}, {row.measured_how}"


def _rounds(rows: Sequence[Row]) -> str:
    rounds = [row.rounds for row in rows if row.seconds]
    ends = " to ".join(dict.fromkeys(str(edge(rounds, default=0)) for edge in (min, max)))
    return f"{len(rows)} row{'s' * (len(rows) != 1)} of {ends} rounds"


def _mebibytes(value: int, row: Row) -> str:
    return f"{style.number(value / 2**20)} MiB ({style.short_name(row)})"
