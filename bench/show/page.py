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
from pyfused.bench.show import captions, figures, rates, sentences, style, tables
from pyfused.bench.show.sentences import KINDS, Finding
from pyfused.bench.show.style import Picture
from pyfused.bench.show.tables import Table
from pyfused.bench.show.terminal import machine_text, traffic_text, verdicts

_PROVENANCE = ("device", "capability", "driver", "threads", "torch", "triton", "cuda", "pyfused", "commit", "dirty",
               "python", "platform", "peft", "open_clip", "date")  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """A figure or a table.

    Attributes:
        title: of it.
        content: the figure, or the table.
        caption: what it shows of this record.
    """

    title: str
    content: Picture | Table
    caption: str


@dataclass
class Section:
    """A heading of the page with its plot, and behind it what a reader opens.

    Attributes:
        title: of one operator, or of one kind of rows.
        finding: what the page says of it at its beginning; None for rows of which there is nothing to compare.
        plot: the ratios, one figure.
        details: the rest, collapsed.
        notes: what cannot be shown, and why.
    """

    title: str
    finding: Finding | None = None
    plot: Shown | None = None
    details: list[Shown] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return slug(self.title)

    @property
    def pictures(self) -> list[Picture]:
        shown = [self.plot] if self.plot else []
        return [each.content for each in shown + self.details if isinstance(each.content, Picture)]


def write(records: Sequence[Record], directory: Path) -> list[Path]:
    """Writes index.html and a PNG of each figure; the files written, the page first.

    Args:
        records: the last one is shown in full, and compared with each of the others.
        directory: made if it is not there.
    """
    newest = records[-1]
    sections = [_section(title, rows, newest) for title, rows in _parts(newest.rows).items()]
    text = render(records, sections)
    directory.mkdir(parents=True, exist_ok=True)
    saved = [picture.save(directory) for section in sections for picture in section.pictures]
    page = directory / "index.html"
    with files.replacing(page) as partial:
        partial.write_text(text, encoding="utf-8")
    return [page, *saved]


def render(records: Sequence[Record], sections: Sequence[Section]) -> str:
    """The page's HTML."""
    newest = records[-1]
    compared = [_compared(old, newest) for old in records[:-1]]
    classes: dict[str, str] = {}
    drawn = {picture.name: picture.inline(classes) for section in sections for picture in section.pictures}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["spoken"] = style.spoken
    environment.tests["table"] = lambda content: isinstance(content, Table)
    return environment.get_template("page.html.jinja").render(
        records=records,
        scheme=style.scheme(),
        classes=classes,
        drawn=drawn,
        lead=sentences.lead(newest, [each.comparison for each in compared]),
        sections=sections,
        comparisons=compared,
        # What developers want to reach is of no use to others; nor is it known of what was installed.
        verdicts=verdicts(newest.rows) if newest.provenance.get("commit") else [],
        provenance=[(name, _facts(records, name)) for name in _PROVENANCE if any(_facts(records, name))],
        machine=_machine(records),
        unavailable=_unavailable(newest.rows),
        ran=[(row.name, how) for row in newest.rows if isinstance(how := row.facts.get("how"), dict)],
    )


def slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _parts(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The groups but the machine's, whose speeds are provenance."""
    found = sentences.groups(rows)
    found.pop(KINDS["machine"], None)
    return found


def _section(title: str, rows: list[Row], record: Record) -> Section:
    section, name = Section(title), slug(title)
    if title == KINDS["traffic"]:
        section.notes = [f"{row.name}, {row.measured}: {traffic_text(row)}." for row in rows]
        return section
    section.finding = sentences.finding(title, rows)
    plot = figures.bars(rows, f"{name}-ratios")
    if plot is not None:
        section.plot = Shown("Ratios", plot, captions.of_ratios(title, rows))
    section.details.append(Shown("All numbers", tables.of_rows(title, rows), captions.of_table(title, rows)))
    held = figures.memory(rows, f"{name}-memory")
    if held is not None:
        section.details.append(Shown("Memory", held, captions.of_memory(title, rows)))
    losses = figures.curves(rows)
    if losses is not None:
        section.details.append(Shown("Loss curves", losses, captions.of_losses(title, rows)))
    if any(row.kind == "operator" for row in rows):
        _work(section, rows, record)
    if any(row.parity for row in rows):
        section.details.append(Shown("Parity", tables.of_parity(title, rows), captions.of_parity(title, rows)))
    return section


def _work(section: Section, rows: list[Row], record: Record) -> None:
    """The two figures that need to know how much a row computes."""
    limits = record.limits()
    reason = rates.missing(rows, limits)
    if limits is None or reason is not None:
        section.notes.append(f"No roofline, and no figure of time against size: {reason}.")
        return
    roofline = rates.roofline(rows, limits, f"{section.anchor}-roofline")
    scaling = rates.scaling(rows, limits, f"{section.anchor}-scaling")
    section.details += [
        Shown("Roofline", roofline, captions.of_roofline(section.title, rates.shares(rows, limits))),
        Shown("Time against size", scaling, captions.of_scaling(section.title, rows)),
    ]


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
    for title, rows in sentences.groups(pair.new for pair in comparison.pairs).items():
        own = {id(row) for row in rows}
        found.append(tables.of_pairs(title, [pair for pair in comparison.pairs if id(pair.new) in own], comparison))
    return Compared(comparison, found, tables.judged(comparison, "worse"), tables.judged(comparison, "better"))
