"""One run of the benchmarks: what it was asked for, the rows it makes, and what it leaves behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pyfused.bench.measure import timing
from pyfused.bench.record import rows as row_format
from pyfused.bench.record.rows import Row, Title

# Seconds for which the GPU's clocks and power are not asked for again: asking takes as long as many a row.
_STATE_SECONDS = 2.0


@dataclass(frozen=True)
class Settings:
    """What a run is asked for.

    Attributes:
        device: where to measure; a GPU if there is one.
        output: directory for the results; None means bench/results in a checkout, else ./pyfused-results.
        threads: CPU threads that torch may use, pinned for the run; None keeps torch's own number.
        seconds_per_row: how long the counted rounds of one row may take.
        commit: recorded where the checkout has no .git to ask.
        record: the very directory for the results, in place of a new one below ``output``. Rows that it has are not
            measured again, but for those that failed.
        attempts: how often a noisy row is measured at most.
        targets: whether the table is followed by the project's numbers to reach.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    output: Path | None = None
    threads: int | None = None
    seconds_per_row: float = 5.0
    commit: str | None = None
    record: Path | None = None
    attempts: int = 2
    targets: bool = False


class Session:
    """Rows as they come, written at once.

    Attributes:
        unwritten: what kept a row from being written; the run ends there.
        spoiled: which capture failed and why; the run ends with its row.
        continued: how many rows the record had.
        on_row: called with each finished row.
        on_round: called between rounds, never while a clock runs, with (what is measured, round, rounds).

    Raises:
        ValueError: ``settings.record`` has rows that cannot be read, or of another device.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        # "cuda" without a number is the current device, which `set_device` does not take.
        if settings.device.type == "cuda" and settings.device.index is not None:
            torch.cuda.set_device(settings.device)
        output = settings.output or row_format.default_output()
        self.directory = settings.record or row_format.run_directory(output, settings.device)
        self.file = row_format.RowFile(self.directory)
        self._earlier = {row.key: row for row in self.file.rows}
        self.continued = len(self._earlier)
        self._check_device()
        self._state: tuple[float, dict[str, str] | None] | None = None
        self.unwritten: OSError | None = None
        self.spoiled: str | None = None
        self.on_row: Callable[[Row], None] = lambda row: None
        self.on_round: Callable[[str, int, int], None] = lambda name, number, total: None

    @property
    def rows(self) -> list[Row]:
        return self.file.rows

    def _check_device(self) -> None:
        """A record is of one device: what it lacks cannot be measured on another."""
        here = row_format.device_name(self.settings.device)
        others = {str(row.provenance.get("device")) for row in self.rows} - {here}
        if others:
            found = ", ".join(sorted(others))
            raise ValueError(f"{self.file.path}: a record to continue must be of {here}, got rows of {found}")

    def recorded(self, name: str, measured: str, mode: str) -> bool:
        """Whether the record had this row when the run began, and it was good."""
        earlier = self._earlier.get(Title(name, measured, mode))
        return earlier is not None and earlier.good

    def gpu_state(self) -> dict[str, str] | None:
        """`timing.gpu_state` of the device, at most some seconds old."""
        now = time.monotonic()
        if self._state is None or now - self._state[0] > _STATE_SECONDS:
            self._state = now, timing.gpu_state(self.settings.device)
        return self._state[1]

    def add(self, row: Row) -> None:
        """Stamps the row with its provenance and writes it; one that failed in an earlier run gives way to it."""
        row.provenance = row_format.provenance(self.settings.device, self.settings.commit)
        try:
            self.file.append(row, instead_of=self._earlier.pop(row.key, None))
        except OSError as error:
            self.unwritten = error
            raise
        self.on_row(row)
