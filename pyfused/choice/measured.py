"""What `pyfused tune` has measured on GPUs: the backend, and the launch configuration, that was fastest where.

The rows lie in kernels/measured.json, one a line, to be read and reviewed like code. Where none is for the GPU and the
sizes of a call, arithmetic decides.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyfused import files

PATH = Path(__file__).parent.parent / "kernels" / "measured.json"


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        gpu: the device's name, as torch gives it.
        capability: its compute capability.
        subject: an operator, or a Triton kernel by its function's name.
        dtype: what the kernels compute in, such as "bfloat16".
        rows: M.
        sizes: all else that the answer depends on.
        found: of an operator, backend -> microseconds of forward and backward, the fastest first; of a kernel, the
            fields of its launch configuration.
        source: date, torch, triton, commit, and for a configuration what it gained over the formula's.
    """

    gpu: str
    capability: tuple[int, int]
    subject: str
    dtype: str
    rows: int
    sizes: dict[str, Any]
    found: dict[str, float]
    source: dict[str, object]


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


def read(path: Path = PATH) -> list[Row]:
    """The rows of a file; none where there is no file.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        items = json.loads(path.read_text())
        rows = [Row(**item | {"capability": tuple(item["capability"])}) for item in items]
        # Also what a table makes of them.
        Table(rows)
        for row in rows:
            if not isinstance(row.rows, int) or row.rows < 1:
                raise ValueError(f"rows must be a whole number from 1 on, got {row.rows!r}")
            if not row.found or not all(0 < value < float("inf") for value in row.found.values()):
                raise ValueError(f"found must hold positive numbers, got {row.found!r}")
        return rows
    except FileNotFoundError:
        return []
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        wrong = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path} must hold a list of rows with the fields of pyfused.choice.measured.Row, got {wrong}"
        ) from None


def write(rows: Iterable[Row], path: Path = PATH) -> None:
    """Writes a file that is whole at every moment, one row a line, in an order of its own."""
    lines = sorted(json.dumps(asdict(row)) for row in rows)
    with files.replacing(path) as partial:
        partial.write_text("[" + ",".join(f"\n {line}" for line in lines) + "\n]\n")


def load(path: Path = PATH) -> Table:
    """The table of a file's rows; of none, with a warning, where the file is damaged: arithmetic decides then."""
    try:
        return Table(read(path))
    except (OSError, ValueError) as error:
        warnings.warn(f"pyfused: what `pyfused tune` measured is left out: {error}", stacklevel=2)
        return Table()


# Read once: traced code must see a constant.
TABLE = load()
# How often what choices depend on has changed: what was chosen before holds no more.
generation = 0


def changed() -> None:
    """To be called after `TABLE`, or which kernels there are, has changed."""
    global generation
    generation += 1
