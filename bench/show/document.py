"""The figures in documents, and README.md's plot, from the newest committed records: `make document`.

Everything between the two markers is written here; no figure stands outside them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pyfused import files
from pyfused.bench import ROOT
from pyfused.bench.cases.cross_attention_residual import SDPA
from pyfused.bench.record.rows import Row, read_rows
from pyfused.bench.show.terminal import noise_text, own_time_text

PLOT = Path("docs", "measured.svg")
BEGIN, END = "<!-- record: begin -->", "<!-- record: end -->"
# Column -> the contenders that it may hold, the first that a row has.
_BASELINES = {
    "plain PyTorch": ("eager", "reference"),
    "`torch.compile`": ("torch.compile",),
    SDPA: (SDPA,),
    "PEFT": ("PEFT",),
    "PEFT (`nn.Linear` attention)": ("PEFT (nn.Linear attention)",),
}
# Those of README.md, where one line stands for all rows of an operator.
_IN_SUMMARY = ("plain PyTorch", "`torch.compile`", "PEFT")
_EXPLANATION = """\
Forward and backward together, or a training step. Under the name of a baseline: its time over that of pyfused, so that
above 1 pyfused is faster; memory: the peak of pyfused as a share of that of plain PyTorch."""


def committed_records(root: Path = ROOT) -> list[Path]:
    """Every rows.json that git tracks under ``root``/bench/results, oldest first.

    Raises:
        ValueError: ``root`` is no git checkout.
    """
    if not (root / ".git").exists():
        raise ValueError(f"committed records are known in a git checkout only, {root} is none")
    command = ["git", "-C", str(root), "ls-files", "-z", "bench/results/*/rows.json"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sorted((root / name for name in listed.split("\0") if name), key=lambda path: path.parent.name)


def summary(records: Sequence[Path], root: Path = ROOT) -> str:
    """A line for each operator and each model, from the last GPU record and the last CPU record of ``records``."""
    return _of_both(records, root, _summary)


def tables(records: Sequence[Path], root: Path = ROOT) -> str:
    """A table for each operator and one for models, from the records that `summary` takes."""
    return _of_both(records, root, _tables)


# What stands between the markers of each document.
GENERATED = {Path("README.md"): summary, Path("docs", "benchmarks.md"): tables}


def plot(records: Sequence[Path], root: Path = ROOT) -> str:
    """An SVG of the rows that `tables` shows of the last GPU record, or where there is none, of the last CPU record.

    Its title is that record's directory.
    """
    from pyfused.bench.show import figures

    on_cpu, on_gpu = _by_kind(records)
    record = (on_gpu or on_cpu)[-1]
    picture = figures.summary([row for row in read_rows(record) if _shown(row)])
    if picture is None:
        raise ValueError(f"no row of {record} has a baseline")
    return picture.svg(Title=record.parent.relative_to(root).as_posix())


def inserted(text: str, figures: str) -> str:
    """``text`` with ``figures`` between its markers.

    Raises:
        ValueError: the two markers do not stand there once each, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not (begin and end) or any(marker in part for marker in (BEGIN, END) for part in (before, old, after)):
        raise ValueError(f"the text must have {BEGIN} and {END} once each, in this order")
    return f"{before}{BEGIN}\n\n{figures}\n\n{END}{after}"


def _by_kind(records: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Those on a CPU, and those on a GPU."""
    on_cpu = [path for path in records if path.parent.parent.name.startswith("cpu-")]
    return on_cpu, [path for path in records if path not in on_cpu]


def _of_both(records: Sequence[Path], root: Path, written: Callable[[list[Row]], list[str]]) -> str:
    on_cpu, on_gpu = _by_kind(records)
    parts = []
    for kind, found in (("GPU", on_gpu), ("CPU", on_cpu)):
        if found:
            timed = [row for row in read_rows(found[-1]) if _shown(row)]
            if not timed:
                raise ValueError(f"no row of {found[-1]} that passed parity has times")
            parts += [_made(timed[0], found[-1].parent.relative_to(root).as_posix()), *written(timed)]
            parts += filter(None, [noise_text(timed)])
        else:
            parts.append(f"On a {kind}: not yet measured.")
    return "\n\n".join([*parts, _EXPLANATION])


def _made(row: Row, where: str) -> str:
    facts = row.provenance
    how = f"{facts['threads']} threads" if row.mode == "wall clock" else row.mode
    commit = f"commit {str(facts['commit'])[:9]}{' with changes' * bool(facts['dirty'])}"
    return f"On {facts['device']}, {how}, torch {facts['torch']}, {str(facts['date'])[:10]}, {commit}\n(`{where}`):"


def _by_operator(timed: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in timed:
        if row.kind == "operator":
            found.setdefault(row.name.partition(" ")[0], []).append(row)
    return found


def _summary(timed: list[Row]) -> list[str]:
    lines = {f"`{name}`, {_counted(rows)}": _ranges(rows) for name, rows in _by_operator(timed).items()}
    lines |= {row.name: _ranges([row]) for row in timed if row.kind == "model"}
    return [_table("forward and backward, a training step", lines, (*_IN_SUMMARY, "memory"))]


def _counted(rows: list[Row]) -> str:
    return f"{len(rows)} sizes" if len(rows) > 1 else "1 size"


def _ranges(rows: list[Row]) -> dict[str, str]:
    """Column -> from the least to the greatest of the rows that have it."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for column, value in _values(row).items():
            found.setdefault(column, []).append(value)
    ends = {column: dict.fromkeys((f"{min(values):.2f}x", f"{max(values):.2f}x")) for column, values in found.items()}
    return {column: " to ".join(values) for column, values in ends.items()}


def _tables(timed: list[Row]) -> list[str]:
    """A table for each operator, and one for the models."""
    groups = {
        f"`{name}`": {row.name.partition(" ")[2]: row for row in rows} for name, rows in _by_operator(timed).items()
    }
    groups["model"] = {row.name: row for row in timed if row.kind == "model"}
    columns = ("time", *_BASELINES, "memory")
    return [
        _table(title, {name: _cells(row) for name, row in rows.items()}, columns)
        for title, rows in groups.items()
        if rows
    ]


def _shown(row: Row) -> bool:
    """Of an operator the launches themselves, not what the host adds on a GPU."""
    if not (row.passed and row.ratios and row.subject in row.seconds):
        return False
    if row.kind == "operator":
        return row.measured == "forward+backward" and row.mode in ("wall clock", "graph replay")
    return row.kind == "model"


def _table(title: str, lines: dict[str, dict[str, str]], columns: Iterable[str]) -> str:
    """One line for each of ``lines``; columns that none fills are left out."""
    columns = [column for column in columns if any(column in cells for cells in lines.values())]
    return "\n".join(
        [
            _line([title, *columns]),
            _line(["---"] + ["---:"] * len(columns)),
            *(_line([name, *(cells.get(column, "") for column in columns)]) for name, cells in lines.items()),
        ]
    )


def _cells(row: Row) -> dict[str, str]:
    ratios = {column: f"{value:.2f}x" for column, value in _values(row).items()}
    return {"time": own_time_text(row)} | ratios


def _values(row: Row) -> dict[str, float]:
    """Column -> ratio."""
    found = {}
    for column, contenders in _BASELINES.items():
        there = [name for name in contenders if name in row.ratios]
        if there:
            found[column] = row.ratios[there[0]]
    plain = [name for name in _BASELINES["plain PyTorch"] if name in row.peak_bytes]
    if plain and row.subject in row.peak_bytes:
        found["memory"] = row.peak_bytes[row.subject] / row.peak_bytes[plain[0]]
    return found


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Writes the documents of `GENERATED` and the plot anew; 1 when that cannot be done."""
    try:
        records = committed_records()
        texts = {ROOT / name: inserted((ROOT / name).read_text(), made(records)) for name, made in GENERATED.items()}
        texts[ROOT / PLOT] = plot(records)
        for path, content in texts.items():
            with files.replacing(path) as partial:
                partial.write_text(content)
    except ValueError as error:
        print(f"pyfused.bench.show.document: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
