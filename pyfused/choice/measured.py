"""What was measured: the backend, its plans and the launch configuration that were fastest, by device and sizes.

Rows that ship lie in kernels/measured.json, one a line, to be read and reviewed like code; `pyfused tune` writes them.
A user's own, which `pyfused.tune` measures, lie in `pyfused.choice.cache`'s file and come before these. Where no row is
for the device and the sizes of a call, arithmetic decides.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyfused import files

PATH = Path(__file__).parent.parent / "kernels" / "measured.json"


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        gpu: the device's name, as torch gives it; of a CPU its model and the number of threads.
        capability: its compute capability; (0, 0) of a CPU.
        subject: an operator, or a Triton kernel by its function's name.
        dtype: what the kernels compute in, such as "bfloat16".
        rows: M.
        sizes: all else that the answer depends on.
        found: of an operator, backend -> microseconds of forward and backward, the one to take first; of a kernel, the
            fields of its launch configuration.
        source: date, torch, triton, commit, and what was gained over the formula's configuration or choice.
        plans: backend -> the plans of forward and backward that were timed there; of a backend that is not in it the
            model decides between the plans.
    """

    gpu: str
    capability: tuple[int, int]
    subject: str
    dtype: str
    rows: int
    sizes: dict[str, Any]
    found: dict[str, float]
    source: dict[str, object]
    plans: dict[str, tuple[str, str]] = field(default_factory=dict)


class Table:
    """Rows, found by what they were measured for."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.rows = list(rows)
        self._found: dict[tuple[str, str, str], list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row.rows):
            self._found.setdefault((row.gpu, row.subject, row.dtype), []).append(row)

    def nearest(self, gpu: str, subject: str, dtype: str, rows: float, sizes: dict[str, object]) -> Row | None:
        """The row for these sizes with the least M from ``rows`` on, else the greatest; at most a factor of 2 away."""
        best = None
        for row in self._found.get((gpu, subject, dtype), ()):
            if row.sizes == sizes and rows <= 2 * row.rows and row.rows <= 2 * rows:
                best = row
                if rows <= row.rows:
                    break
        return best


def parse(items: Iterable[dict[str, Any]]) -> list[Row]:
    """Rows of what a file holds.

    Raises:
        AttributeError, LookupError, TypeError, ValueError: it is none.
    """
    rows = []
    for item in items:
        plans = {name: (forward, backward) for name, (forward, backward) in item.get("plans", {}).items()}
        rows.append(Row(**item | {"capability": tuple(item["capability"]), "plans": plans}))
    # Also what a table makes of them.
    Table(rows)
    for row in rows:
        if not isinstance(row.rows, int) or row.rows < 1:
            raise ValueError(f"rows must be a whole number from 1 on, got {row.rows!r}")
        if not row.found or not all(0 < value < float("inf") for value in row.found.values()):
            raise ValueError(f"found must hold positive numbers, got {row.found!r}")
        if not all(isinstance(plan, str) for pair in row.plans.values() for plan in pair):
            raise ValueError(f"plans must hold names of plans, got {row.plans!r}")
    return rows


def as_item(row: Row) -> dict[str, Any]:
    """What a file holds of a row."""
    item = asdict(row)
    if not row.plans:
        del item["plans"]
    return item


def merged(known: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """``known`` with the rows in ``new`` in the place of those measured for the same."""

    def what(row: Row) -> str:
        return repr((row.gpu, row.subject, row.dtype, row.rows, sorted(row.sizes.items())))

    return list(({what(row): row for row in known} | {what(row): row for row in new}).values())


# All that reading rows out of a file that holds something else may raise.
DAMAGE = (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError)


def read(path: Path = PATH) -> list[Row]:
    """The rows of a file; none where there is no file.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        return parse(json.loads(path.read_text()))
    except FileNotFoundError:
        return []
    except DAMAGE as error:
        wrong = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path} must hold a list of rows with the fields of pyfused.choice.measured.Row, got {wrong}"
        ) from None


def write(rows: Iterable[Row], path: Path = PATH) -> None:
    """Writes a file that is whole at every moment, one row a line, in an order of its own."""
    lines = sorted(json.dumps(as_item(row)) for row in rows)
    with files.replacing(path) as partial:
        partial.write_text("[" + ",".join(f"\n {line}" for line in lines) + "\n]\n")


def load(path: Path = PATH) -> Table:
    """The table of a file's rows; of none, with a warning, where the file is damaged: arithmetic decides then."""
    try:
        return Table(read(path))
    except (OSError, ValueError) as error:
        warnings.warn(f"pyfused: what `pyfused tune` measured is left out: {error}", stacklevel=2)
        return Table()


# Read once: traced code must see constants.
SHIPPED = load()
TABLE = SHIPPED
# The user's own rows in `TABLE`.
own: list[Row] = []
# How often what choices depend on has changed: what was chosen before holds no more.
generation = 0


def use(rows: Iterable[Row]) -> None:
    """Takes these for the user's own from now on: `TABLE` is what ships with them in its place."""
    global TABLE, own
    own = list(rows)
    TABLE = Table(merged(SHIPPED.rows, own)) if own else SHIPPED
    changed()


def changed() -> None:
    """To be called after `TABLE`, or which kernels there are, has changed."""
    global generation
    generation += 1
