"""The table that a run prints."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from pyfused.bench.cases.baselines import BASE, LOOP
from pyfused.bench.record.rows import NOISY, Row

# Before the time of a noisy row.
_NOISY = "~"


def has_targets() -> bool:
    return importlib.util.find_spec("pyfused.bench.targets") is not None


def verdicts(rows: Sequence[Row]) -> list[Any]:
    """The project's numbers to reach, held against these rows; none in an installed package, which lacks them."""
    if not has_targets():
        return []
    from pyfused.bench.targets import numbers

    return numbers.verdicts(rows)


def print_table(rows: Sequence[Row], stream: TextIO, targets: bool = False) -> None:
    """The table, what its columns mean, the losses, and which rows are noisy.

    Args:
        rows: of one run.
        stream: a terminal that is too narrow for the spreads of the times gets none.
        targets: whether each of the project's numbers to reach follows, as met or not met.
    """
    console = Console(file=stream)
    shown = [row for row in rows if row.kind not in ("machine", "traffic")]
    lines = table(shown, spread=True)
    if console.is_terminal and console.width < _width(lines):
        lines = table(shown, spread=False)
    # A table wider than the terminal is still easier to read than one whose columns are folded.
    console = Console(file=stream, width=max(console.width, _width(lines)))
    console.print(lines)
    notes = [
        "Ratios: median over interleaved rounds of (baseline's time / pyfused's); above 1 pyfused is faster. "
        "vs triton, vs cuda: against that backend, asked for by name; fastest by name: the backend or plan that took "
        'least, below 1x where "auto" took a slower one. '
        "x GEMM: pyfused's time over that of the frozen layer alone; below 1x on a CPU where the portable backend "
        "takes oneDNN's float32 product and torch takes MKL's.",
        "vs loop: against a call for each adapter of a mixed batch. "
        "parity: largest error against float64 as a share of its limit; a row that fails has no times.",
        "Times: medians; ±: half the distance between their quartiles, where the terminal has room for it.",
    ]
    notes += [f"machine: {row.name}: {machine_text(row)}." for row in rows if row.kind == "machine" and row.seconds]
    notes += [f"DRAM: {row.name}, {row.measured}: {traffic_text(row)}." for row in rows if row.kind == "traffic"]
    variants = dict.fromkeys(tuple(_peft(row)) for row in rows)
    notes += [f"vs PEFT, in order: {', '.join(names)}." for names in variants if len(names) > 1]
    for row in rows:
        last = {name: value[-1] if isinstance(value, list) else value for name, value in row.loss.items()}
        if last:
            losses = ", ".join(f"{name} {value:.6f}" for name, value in last.items())
            notes.append(f"{row.name}: loss after {row.facts.get('steps')} steps: {losses}.")
        how = row.facts.get("how")
        notes += [f"  {name}: {text}." for name, text in how.items()] if isinstance(how, dict) else []
    notes += sorted({f"not measured: {name}: {reason}" for row in rows for name, reason in row.unavailable.items()})
    for note in notes:
        console.print(note, style="dim", markup=False, highlight=False)
    noise = noise_text(rows)
    if noise:
        console.print(noise, style="yellow", markup=False, highlight=False)
    if not targets:
        return
    if not has_targets():
        console.print("The project's numbers to reach are in a checkout; an installed package has none.", style="dim")
    for verdict in verdicts(rows):
        console.print(str(verdict), style="green" if verdict.met else "red", markup=False, highlight=False)


def noise_text(rows: Sequence[Row]) -> str:
    """Which rows are noisy; empty where none is."""
    noisy = [str(row.key) for row in rows if row.noisy]
    if not noisy:
        return ""
    return (
        f"{len(noisy)} of {len(rows)} rows are noisy ({_NOISY}): between the quartiles of their rounds a ratio, or a "
        f"time where nothing is compared, varies by more than {NOISY:.0%}: {'; '.join(noisy)}."
    )


def _width(lines: Table) -> int:
    return Console(width=10_000).measure(lines).maximum


def table(rows: Sequence[Row], spread: bool = False) -> Table:
    """One line for each row; columns that no row fills are left out, and without ``spread`` how times vary."""
    lines = [_cells(row, spread) for row in rows]
    filled = {name for cells in lines for name, value in cells.items() if value}
    names = [name for name in _cells(Row("", "", ""), spread) if name in filled]
    result = Table(title=_title(rows), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in names:
        text = name in ("row", "measured")
        result.add_column(
            name, justify="left" if text else "right", no_wrap=not text, min_width=40 if name == "row" else None
        )
    for row, cells in zip(rows, lines, strict=True):
        result.add_row(*(cells[name] for name in names), style=None if row.passed else "bold red")
    return result


def _title(rows: Sequence[Row]) -> str:
    if not rows:
        return "pyfused: no rows"
    facts = rows[0].provenance
    commit = str(facts.get("commit") or "")[:9] + (" (with changes)" if facts.get("dirty") else "")
    return (
        f"pyfused {facts.get('pyfused')} {commit} on {facts.get('device')}, {facts.get('threads')} threads, "
        f"torch {facts.get('torch')}, {facts.get('date')}"
    )


def _cells(row: Row, spread: bool) -> dict[str, str]:
    loss = row.loss.get(row.subject)
    return {
        "row": row.name,
        "measured": row.measured_how,
        "parity": ("FAILED" if not row.passed else f"{margin(row):.2f}" if row.parity else ""),
        "pyfused": _own_time(row, spread),
        "vs eager": ratio_text(row.ratios.get("eager", row.ratios.get("reference"))),
        "vs compile": ratio_text(row.ratios.get("torch.compile")),
        "vs triton": ratio_text(row.ratios.get("pyfused triton")),
        "vs cuda": ratio_text(row.ratios.get("pyfused cuda")),
        "fastest by name": _fastest(row),
        "vs SDPA": ratio_text(row.ratios.get("projections + SDPA")),
        "vs loop": ratio_text(row.ratios.get(LOOP)),
        "vs PEFT": " / ".join(ratio_text(row.ratios[name]) for name in _peft(row)),
        "x GEMM": ratio_text(1 / row.ratios[BASE] if BASE in row.ratios else None),
        "% floor": floor_text(row),
        "peak MiB\n/ eager / PEFT": _memory(row.peak_bytes, row.subject),
        "loss": "" if loss is None else f"{loss[-1] if isinstance(loss, list) else loss:.4f}",
    }


def _fastest(row: Row) -> str:
    """The backend or plan that took the least time of those asked for by name; below 1 "auto" should have taken it."""
    named = [name for name in row.ratios if row.kind == "operator" and name.startswith("pyfused ")]
    best = min(named, key=row.ratios.__getitem__, default=None)
    return "" if best is None else f"{best.removeprefix('pyfused ')} {ratio_text(row.ratios[best])}"


def _peft(row: Row) -> list[str]:
    return [name for name in row.ratios if name.startswith("PEFT")]


def margin(row: Row) -> float:
    """The largest error in units of its limit; `Row.parity` is not empty."""
    return max(float(item["error"]) / float(item["limit"]) for item in row.parity)


def floor_text(row: Row) -> str:
    """The speed as a share of the floor's; empty where the machine has none."""
    floor, own = row.facts.get("floor_seconds"), row.seconds.get(row.subject)
    return f"{100 * floor / own:.0f}" if isinstance(floor, float) and own else ""


def machine_text(row: Row) -> str:
    """How fast the machine itself was, by each of the row's contenders."""
    amount, unit = (row.facts["bytes"], "GB/s") if row.measured == "copy" else (row.facts["flops"], "GFLOP/s")
    return ", ".join(f"{amount / seconds * 1e-9:.1f} {unit} by {name}" for name, seconds in row.seconds.items())


def traffic_text(row: Row) -> str:
    """What a call moved through DRAM, beside the least that it must."""
    read, written, least = (row.facts[name] / 1e6 for name in ("read_bytes", "written_bytes", "bytes"))
    return (
        f"{(read + written) / least:.2f} times the {least:.1f} MB that it must move: {read:.1f} MB read, "
        f"{written:.1f} MB written, {row.facts['kernels']} kernels"
    )


def _own_time(row: Row, spread: bool) -> str:
    own, quartiles = row.seconds.get(row.subject), row.quartiles.get(row.subject)
    text = own_time_text(row)
    if own is None or quartiles is None or not spread:
        return text
    (in_a_second, _, digits), (lower, upper) = _unit(own), quartiles
    return f"{text} ±{(upper - lower) / 2 * in_a_second:.{digits}f}"


def own_time_text(row: Row) -> str:
    """The time of pyfused, marked where the row is noisy; empty where it has none."""
    return _NOISY * row.noisy + time_text(row.seconds.get(row.subject))


def time_text(seconds: float | None) -> str:
    """In the unit that leaves few digits; empty for None."""
    if seconds is None:
        return ""
    in_a_second, unit, digits = _unit(seconds)
    return f"{seconds * in_a_second:.{digits}f} {unit}"


def _unit(seconds: float) -> tuple[float, str, int]:
    """How many of it are a second, its name, and decimals."""
    if seconds < 1e-3:
        return 1e6, "us", 1
    return (1e3, "ms", 1) if seconds < 1 else (1.0, "s", 2)


def ratio_text(value: float | None) -> str:
    """With two decimals; empty for None."""
    return "" if value is None else f"{value:.2f}x"


def _memory(found: dict[str, int], subject: str) -> str:
    if subject not in found:
        return ""
    beside = (found[subject], found.get("eager", found.get("reference")), found.get("PEFT"))
    return " / ".join("-" if value is None else f"{value / 2**20:.1f}" for value in beside)
