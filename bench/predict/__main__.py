"""``python -m pyfused.bench.predict``: the time of each row of the targets by the model, from the compiled kernels.

Every number is the model's: no GPU has measured one. Columns: microseconds, the share of the floor, and the time over
that of the library's product, forward and backward; how many times faster than the eager formula's model, forward and
backward together, or forward alone (fwd); what sets most of the time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from pyfused.bench.predict import rows
from pyfused.bench.predict.model import CHIPS
from pyfused.bench.predict.rows import Direction, Row
from pyfused.kernels.audit import TARGETS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyfused.bench.predict", description=__doc__)
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows whose name contains this text")
    parser.add_argument("--target", type=int, default=90, help="a compute capability, default 90")
    parser.add_argument("--launches", action="store_true", help="show each launch and operation too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what the model says, of every plan")
    parser.add_argument("--against", type=Path, metavar="FILE", help="show the change from what --json wrote before")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at work at once")
    options = parser.parse_args(arguments)
    by_name = {10 * t.capability[0] + t.capability[1]: t for t in TARGETS if t.capability in CHIPS}
    if options.target not in by_name:
        parser.error(f"--target must be one of {sorted(by_name)}, got {options.target}")
    before = None if options.against is None else _read(parser, options.against)
    found = rows.predict(rows.cases(options.rows), by_name[options.target], options.jobs)
    if not found:
        parser.error(f"--rows must be part of the name of a row, got {options.rows!r}")
    print(f"model, no measurement: capability {options.target}, microseconds")
    print("\n".join(table(found, options.launches)))
    if before is not None:
        print("\n".join(("", f"model, from {options.against} to now", *changes(before, found))))
    if options.json is not None:
        options.json.write_text(json.dumps({row.name: saved(row) for row in found}, indent=1) + "\n")
    return 0


def saved(row: Row) -> dict[str, object]:
    """What `changes` reads, with the launches of every plan."""
    forward, backward = row.auto
    return {"forward": forward.microseconds, "backward": backward.microseconds, "model": dataclasses.asdict(row)}


def _read(parser: argparse.ArgumentParser, path: Path) -> dict[str, dict]:
    try:
        found = json.loads(path.read_text())
        for row in found.values():
            row["forward"] + row["backward"]
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        parser.error(f"--against must be a file that --json wrote, got {path}: {error}")


_HEAD = (
    "row", "plan", "fwd", "floor", "cuBLAS", "bwd", "floor", "cuBLAS", "eager", "best plan", "limit fwd, bwd",
)  # fmt: skip


def table(found: list[Row], launches: bool = False) -> list[str]:
    """A line for each row, under a head."""
    lines = [_HEAD, *map(_cells, found)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if not launches:
        return text
    shown = [text[0]]
    for line, row in zip(text[1:], found, strict=True):
        shown.append(line)
        for direction in row.auto:
            shown += [f"    {name:30} {time:8.1f}  {limit}" for name, time, limit in direction.launches]
    return shown


def _cells(row: Row) -> tuple[str, ...]:
    forward, backward = row.auto
    ratio = row.against_eager()
    alone = " fwd" if row.eager is not None and len(row.eager) == 1 else ""
    best = "" if row.best == row.chosen else "/".join(row.best)
    if best and row.eager is not None:
        best += f" {row.against_eager(row.best):.2f}x"
    return (
        row.name,
        "/".join(dict.fromkeys(row.chosen)),
        *_direction(forward, row.floor and row.floor[0], row.library and row.library[0]),
        *_direction(backward, row.floor and row.floor[1], row.library and row.library[1]),
        "" if ratio is None else f"{ratio:.2f}x{alone}",
        best,
        f"{forward.limit}, {backward.limit}",
    )


def _direction(direction: Direction, floor: float | None, library: float | None) -> tuple[str, str, str]:
    time = direction.microseconds
    share, times = "" if floor is None else f"{floor / time:.0%}", "" if library is None else f"{time / library:.2f}x"
    return f"{time:.1f}", share, times


def changes(before: dict[str, dict], found: list[Row]) -> list[str]:
    """A line for each row that is there now, with the ratio of now to before; then those that are gone."""
    lines = []
    for row in found:
        was = before.get(row.name)
        if was is None:
            lines.append(f"{row.name}: new")
            continue
        parts = [
            f"{name} {was[name]:.1f} -> {now.microseconds:.1f} ({now.microseconds / was[name]:.2f}x)"
            for name, now in zip(("forward", "backward"), row.auto, strict=True)
        ]
        lines.append(f"{row.name}: {', '.join(parts)}")
    return lines + [f"{name}: gone" for name in before if name not in {row.name for row in found}]


if __name__ == "__main__":
    sys.exit(main())
