"""The figures in README.md, and its plot, from the newest committed records: `make document`.

Everything between the two markers is written here; no figure stands outside them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from pyfused import files
from pyfused.bench import ROOT
from pyfused.bench.cases.cross_attention_residual import SDPA
from pyfused.bench.record.rows import Row, read_rows
from pyfused.bench.show.terminal import time_text

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


def block(records: Sequence[Path], root: Path = ROOT) -> str:
    """The text between the markers, from the last GPU record and the last CPU record of ``records``."""
    on_cpu, on_gpu = _by_kind(records)
    return "\n\n".join(
        [
            _section(on_gpu[-1], root) if on_gpu else "On a GPU: not yet measured.",
            _section(on_cpu[-1], root) if on_cpu else "On a CPU: not yet measured.",
            _EXPLANATION,
        ]
    )


def plot(records: Sequence[Path], root: Path = ROOT) -> str:
    """An SVG of the rows that `block` shows of the last GPU record, or where there is none, of the last CPU record.

    Its title is that record's directory.
    """
    from pyfused.bench.show import figures

    on_cpu, on_gpu = _by_kind(records)
    record = (on_gpu or on_cpu)[-1]
    picture = figures.summary([row for row in read_rows(record) if _shown(row)])
    if picture is None:
        raise ValueError(f"no row of {record} has a baseline")
    return picture.svg(letters=True, Title=record.parent.relative_to(root).as_posix())


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


def _section(record: Path, root: Path) -> str:
    """Where a record was made, and a table for each operator and for the models."""
    timed = [row for row in read_rows(record) if _shown(row)]
    if not timed:
        raise ValueError(f"no row of {record} that passed parity has times")
    facts = timed[0].provenance
    where = record.parent.relative_to(root).as_posix()
    how = f"{facts['threads']} threads" if timed[0].mode == "wall clock" else timed[0].mode
    made = f"torch {facts['torch']}, {str(facts['date'])[:10]}, commit {str(facts['commit'])[:9]}"
    parts = [f"On {facts['device']}, {how}, {made}{' with changes' * bool(facts['dirty'])} ([record]({where})):"]
    operators = [row for row in timed if row.kind == "operator"]
    for operator in dict.fromkeys(row.name.partition(" ")[0] for row in operators):
        rows = {name: row for row in operators for head, _, name in [row.name.partition(" ")] if head == operator}
        parts.append(_table(f"`{operator}`", rows))
    models = {row.name: row for row in timed if row.kind == "model"}
    return "\n\n".join(parts + ([_table("model", models)] if models else []))


def _shown(row: Row) -> bool:
    """Of an operator the launches themselves, not what the host adds on a GPU."""
    if not (row.passed and row.ratios and row.subject in row.seconds):
        return False
    if row.kind == "operator":
        return row.measured == "forward+backward" and row.mode in ("wall clock", "graph replay")
    return row.kind == "model"


def _table(title: str, rows: dict[str, Row]) -> str:
    """One line for each row; columns that none fills are left out."""
    lines = {name: _cells(row) for name, row in rows.items()}
    columns = [column for column in ("time", *_BASELINES, "memory") if any(column in cells for cells in lines.values())]
    return "\n".join(
        [
            _line([title, *columns]),
            _line(["---"] + ["---:"] * len(columns)),
            *(_line([name, *(cells.get(column, "") for column in columns)]) for name, cells in lines.items()),
        ]
    )


def _cells(row: Row) -> dict[str, str]:
    cells = {"time": time_text(row.seconds[row.subject])}
    for column, contenders in _BASELINES.items():
        found = [name for name in contenders if name in row.ratios]
        if found:
            cells[column] = f"{row.ratios[found[0]]:.2f}x"
    plain = [name for name in _BASELINES["plain PyTorch"] if name in row.peak_bytes]
    if plain and row.subject in row.peak_bytes:
        cells["memory"] = f"{row.peak_bytes[row.subject] / row.peak_bytes[plain[0]]:.2f}x"
    return cells


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Writes README.md and its plot anew; 1 when that cannot be done."""
    readme, target = ROOT / "README.md", ROOT / PLOT
    try:
        records = committed_records()
        text, drawn = inserted(readme.read_text(), block(records)), plot(records)
        target.parent.mkdir(exist_ok=True)
        for path, content in ((readme, text), (target, drawn)):
            with files.replacing(path) as partial:
                partial.write_text(content)
    except ValueError as error:
        print(f"pyfused.bench.show.document: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
