"""`pyfused report`: one HTML page on one record or more, and its figures as PNG files."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from pyfused import files
from pyfused.bench.record.records import LOSS, Comparison, Record, compare
from pyfused.bench.record.rows import Row
from pyfused.bench.show import figures, rates, tables
from pyfused.bench.show.style import Picture
from pyfused.bench.show.tables import Table
from pyfused.bench.show.terminal import machine_text, traffic_text, verdicts

_KINDS = {"model": "Models", "training": "Training runs", "overhead": "Host overhead", "machine": "Machine",
          "traffic": "DRAM traffic"}  # fmt: skip
_PROVENANCE = ("device", "capability", "driver", "threads", "torch", "triton", "cuda", "pyfused", "commit", "dirty",
               "python", "platform", "peft", "open_clip", "date")  # fmt: skip


@dataclass
class Section:
    """A heading of the page with its figures.

    Attributes:
        title: of one operator, or of one kind of rows.
        figures: (picture, caption) in order.
        notes: what cannot be shown, and why.
        how: (contender, what it is), where rows say so.
    """

    title: str
    figures: list[tuple[Picture, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    how: list[tuple[str, str]] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return slug(self.title)

    def show(self, picture: Picture | None, caption: str) -> None:
        if picture is not None:
            self.figures.append((picture, caption))


def write(records: Sequence[Record], directory: Path) -> list[Path]:
    """Writes index.html and a PNG of each figure; the files written, the page first.

    Args:
        records: the last one is shown in full, and compared with each of the others.
        directory: made if it is not there.
    """
    sections = [
        section for title, rows in groups(records[-1].rows).items() if (section := _section(title, rows, records[-1]))
    ]
    overview = Section("Overview")
    overview.show(
        figures.overview(records[-1].rows),
        "A baseline's time over pyfused's, median over interleaved rounds: right of 1x pyfused is faster.",
    )
    text = render(records, overview, sections)
    directory.mkdir(parents=True, exist_ok=True)
    saved = [picture.save(directory) for part in (overview, *sections) for picture, _ in part.figures]
    page = directory / "index.html"
    with files.replacing(page) as partial:
        partial.write_text(text, encoding="utf-8")
    return [page, *saved]


def render(records: Sequence[Record], overview: Section, sections: Sequence[Section]) -> str:
    """The page's HTML."""
    newest = records[-1]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html.jinja").render(
        records=records,
        provenance=[(name, _facts(records, name)) for name in _PROVENANCE if any(_facts(records, name))],
        machine=_machine(records),
        count=len(newest.rows),
        failed=[(row, tables.broken(row)) for row in newest.rows if not row.passed],
        unavailable=_unavailable(newest.rows),
        verdicts=verdicts(newest.rows),
        overview=overview,
        sections=sections,
        comparisons=[_compared(old, newest) for old in records[:-1]],
        rows=[tables.of_rows(title, rows) for title, rows in groups(newest.rows).items()],
    )


def groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by operator, then models, training runs, host overhead, the machine and DRAM traffic: title -> rows."""
    found: dict[str, list[Row]] = {}
    kinds: dict[str, list[Row]] = {title: [] for title in _KINDS.values()}
    for row in rows:
        if row.kind in _KINDS:
            kinds[_KINDS[row.kind]].append(row)
        else:
            found.setdefault(row.name.partition(" ")[0], []).append(row)
    return found | {title: own for title, own in kinds.items() if own}


def slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _section(title: str, rows: list[Row], record: Record) -> Section | None:
    found, name = Section(title), slug(title)
    if title == _KINDS["machine"]:
        return None
    if title == _KINDS["traffic"]:
        found.notes = [f"{row.name}, {row.measured}: {traffic_text(row)}." for row in rows]
        return found
    if any(row.kind == "operator" for row in rows):
        _work(found, rows, record)
    found.show(
        figures.bars(rows, f"{name}-ratios"),
        "A baseline's time over pyfused's, median over interleaved rounds: right of 1x pyfused is faster.",
    )
    found.show(
        figures.memory(rows, f"{name}-memory"),
        "The most memory that a call holds at once beyond what was held before, and what it keeps for its backward "
        "beyond inputs and parameters.",
    )
    found.show(figures.curves(rows), "The training loss of each contender from the same seed, and how far they part.")
    how = {pair for row in rows for pair in (row.facts.get("how") or {}).items()}
    found.how = sorted(how)
    if not found.figures:
        found.notes.append("No row of this section has a time.")
    return found


def _work(section: Section, rows: list[Row], record: Record) -> None:
    """The two figures that need to know how much a row computes."""
    limits = record.limits()
    reason = rates.missing(rows, limits)
    if limits is None or reason is not None:
        section.notes.append(f"No roofline, and no figure of time against size: {reason}.")
        return
    section.show(
        rates.roofline(rows, limits, f"{section.anchor}-roofline"),
        "The same work divided by each one's time: the floating-point operations that the cheapest plan needs, so that "
        "a contender who computes more lies lower. The lines are this machine's own matrix product and copy, from the "
        "same run; a point above the slanted one found tensors in a cache.",
    )
    section.show(
        rates.scaling(rows, limits, f"{section.anchor}-scaling"),
        "Median time of a call against its size: the time that the machine's own matrix product and then its copy need "
        "for the same work. Below the black line a call does both at once, or less.",
    )


def _facts(records: Sequence[Record], name: str) -> list[str]:
    """One provenance fact of each record; empty strings where it is not known."""
    values = [record.provenance.get(name) for record in records]
    if name == "dirty":
        return ["with changes" if value else "" for value in values]
    return ["" if value is None else str(value) for value in values]


def _machine(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """(name of a machine row, how fast it was in each record)."""
    found = [{row.name: machine_text(row) for row in record.of("machine") if row.seconds} for record in records]
    return [(name, [texts.get(name, "") for texts in found]) for name in dict.fromkeys(itertools.chain(*found))]


def _unavailable(rows: Iterable[Row]) -> list[tuple[str, str, int]]:
    """(contender, why it did not run, in how many rows)."""
    found = Counter(pair for row in rows for pair in row.unavailable.items())
    return [(name, reason, count) for (name, reason), count in sorted(found.items())]


@dataclass(frozen=True)
class Compared:
    """What the page says of two records.

    Attributes:
        comparison: the records and their pairs.
        tables: the changes of each group.
        worse, better: (row, measured, what changed, new / old) of rows that changed by more than the limit.
        limit: that, in percent.
    """

    comparison: Comparison
    tables: list[Table]
    worse: list[tuple[str, str, str, str]]
    better: list[tuple[str, str, str, str]]
    limit: float = 100 * LOSS


def _compared(old: Record, new: Record) -> Compared:
    comparison = compare(old, new)
    found = []
    for title, rows in groups(pair.new for pair in comparison.pairs).items():
        own = {id(row) for row in rows}
        found.append(tables.of_pairs(title, [pair for pair in comparison.pairs if id(pair.new) in own], comparison))
    return Compared(comparison, found, tables.judged(comparison, "worse"), tables.judged(comparison, "better"))
