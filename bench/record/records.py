"""Committed runs read back: their rows, the limits of their machine, and what changed from one run to another."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyfused.bench.record.rows import Row, read_rows

# A share of its time or memory that a row may gain before that counts as a regression.
LOSS = 0.05
# A row with the types that its fields must have.
_PATTERN = Row("", "", "")
_NUMBERS = ("seconds", "ratios", "peak_bytes", "saved_bytes", "load")
_QUARTILES = ("quartiles", "ratio_quartiles")
# Kind of row -> the facts that the page needs of it.
_FACTS = {"machine": ("flops", "bytes"), "traffic": ("read_bytes", "written_bytes", "bytes", "kernels")}
# Of a time in seconds, and of a ratio: beyond it no figure has an axis.
_LONGEST = 1e12


class Unreadable(ValueError):
    """No record lies at a path; says what was expected there and what was found."""


@dataclass(frozen=True)
class Limits:
    """What a machine reached in the same run.

    Attributes:
        flops: dtype -> floating-point operations a second of a large matrix product, by the fastest library there.
        bandwidth: bytes a second of a large copy, read plus written.
    """

    flops: Mapping[str, float]
    bandwidth: float


@dataclass(frozen=True)
class Record:
    """One run, in the order it was measured; ``rows`` is not empty."""

    path: Path
    rows: list[Row]

    @property
    def provenance(self) -> dict[str, Any]:
        """The last row's: a run has one, but for the date."""
        return self.rows[-1].provenance

    @property
    def name(self) -> str:
        """Device and directory, which is named by the date."""
        return f"{self.provenance.get('device', 'unknown device')}, {self.path.parent.name}"

    def of(self, *kinds: str) -> list[Row]:
        return [row for row in self.rows if row.kind in kinds]

    def limits(self) -> Limits | None:
        """None where the record has no machine rows."""
        machine = [row for row in self.of("machine") if row.seconds]
        speed = {
            str(row.facts.get("dtype")): row.facts["flops"] / min(row.seconds.values())
            for row in machine
            if row.measured == "matrix product"
        }
        copies = [row.facts["bytes"] / min(row.seconds.values()) for row in machine if row.measured == "copy"]
        return Limits(speed, max(copies)) if speed and copies else None


def load(path: Path) -> Record:
    """The record in a directory that `pyfused bench` made, or of the rows.json there.

    Raises:
        Unreadable: there is none, or it does not hold rows.
    """
    file = path / "rows.json" if path.is_dir() else path
    if not file.is_file():
        raise Unreadable(f"{path}: expected a directory with rows.json in it, or that file; there is none")
    try:
        rows = read_rows(file)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        found = f"no JSON: {error}" if isinstance(error, json.JSONDecodeError | RecursionError) else error
        raise Unreadable(f"{file}: expected the rows of a run of `pyfused bench`, got {found}") from None
    if not rows:
        raise Unreadable(f"{file}: expected the rows of a run of `pyfused bench`, got none")
    for index, row in enumerate(rows):
        _check(file, index, row)
    return Record(file, rows)


def _check(file: Path, index: int, row: Row) -> None:
    """Every field has the type that a new row gives it."""
    for field in dataclasses.fields(Row):
        value, pattern = getattr(row, field.name), getattr(_PATTERN, field.name)
        if not isinstance(value, type(pattern)):
            wanted = type(pattern).__name__
            raise Unreadable(f"{file}: row {index}: expected {field.name} to be {wanted}, got {value!r}")

    def refuse(what: str, wanted: str, value: object) -> None:
        raise Unreadable(f"{file}: row {index}: expected {what} to be {wanted}, got {value!r}")

    for name in ("name", "kind", "measured", "mode", "subject"):
        if not getattr(row, name).isprintable():
            refuse(name, "printable text", getattr(row, name))
    for name in _NUMBERS:
        for contender, value in getattr(row, name).items():
            if not _is_amount(value):
                refuse(f"{name}[{contender!r}]", "a number from 0 on", value)
    for name in _QUARTILES:
        for contender, value in getattr(row, name).items():
            if not isinstance(value, list) or len(value) != 2 or not all(map(_is_amount, value)):
                refuse(f"{name}[{contender!r}]", "two numbers from 0 on", value)
    for name in _FACTS.get(row.kind, ()):
        value = row.facts.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            refuse(f"facts[{name!r}]", "a number", value)
    # What is no time is shown as none, and said.
    for name in ("seconds", "ratios"):
        numbers = getattr(row, name)
        for contender, value in list(numbers.items()):
            if not 0 < value < _LONGEST:
                del numbers[contender]
                row.unavailable[contender] = f"its {name} were recorded as {value}"


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not value < 0


@dataclass(frozen=True)
class Pair:
    """One row in two records."""

    old: Row
    new: Row

    def change(self, field: str) -> dict[str, float]:
        """Contender -> new / old of a field that has a number for each; those of both records only."""
        old, new = getattr(self.old, field), getattr(self.new, field)
        return {name: new[name] / old[name] for name in new if old.get(name)}


@dataclass(frozen=True)
class Comparison:
    """Two records, row by row, paired by name, by what was measured and by mode.

    Attributes:
        old, new: the records.
        pairs: rows in both, in the new record's order.
        only_old, only_new: the others.
    """

    old: Record
    new: Record
    pairs: list[Pair]
    only_old: list[Row]
    only_new: list[Row]

    @property
    def differences(self) -> dict[str, tuple[object, object]]:
        """What about the machine differs, so that a difference in time says nothing of the code: name -> old, new."""
        found = {}
        for name in ("device", "threads"):
            old, new = self.old.provenance.get(name), self.new.provenance.get(name)
            if old != new:
                found[name] = old, new
        return found

    def judge(self, change: float) -> str:
        """ "worse", "better" or "" for new / old of a cost; always "" between machines that differ."""
        if self.differences:
            return ""
        # Rounding may put a loss of exactly 5 % on either side.
        if change >= (1 + LOSS) * (1 - 1e-9):
            return "worse"
        return "better" if change <= (1 + 1e-9) / (1 + LOSS) else ""


def compare(old: Record, new: Record) -> Comparison:
    """Machine rows take part: they say how far the machine itself was another."""
    before, after = _keyed(old.rows), _keyed(new.rows)
    return Comparison(
        old,
        new,
        [Pair(before[key], row) for key, row in after.items() if key in before],
        [row for key, row in before.items() if key not in after],
        [row for key, row in after.items() if key not in before],
    )


def _keyed(rows: Iterable[Row]) -> dict[tuple[str, str, str, int], Row]:
    """Rows of one name, a user's perhaps, are told apart by their order."""
    seen: Counter[tuple[str, ...]] = Counter()
    found = {}
    for row in rows:
        found[row.name, row.measured, row.mode, seen[row.key]] = row
        seen[row.key] += 1
    return found
