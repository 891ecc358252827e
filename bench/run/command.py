"""`pyfused bench`: pytest on this package in this process, with a progress bar and the table at the end."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pyfused.bench.record.rows import Row, Title
from pyfused.bench.run import plugin, selection
from pyfused.bench.run.session import Session, Settings
from pyfused.bench.show.terminal import print_table

# The exit status of a run after whose last row nothing more can be measured in the process.
SPOILED = 6
_CHARACTERS = 200


class Watcher:
    """The pytest plugin of one run: hands the session in, selects, moves the bar, shows what failed or was skipped.

    Attributes:
        faults: of each row that failed, which and why.
        titles: of the rows that are measured, by the id of their test.
        files: file -> its rows among them.
        unnamed: what is wrong with the selection.
        uncollected: whether a file could not be collected, which is said.
    """

    def __init__(self, session: Session, select: Sequence[str], progress: Progress) -> None:
        self.session, self.progress, self._select = session, progress, select
        self.task = progress.add_task("collecting", total=None)
        self.faults: list[str] = []
        self.titles: dict[str, Title] = {}
        self.files: dict[str, list[Title]] = {}
        self.unnamed: selection.Unnamed | None = None
        self.uncollected = False
        session.on_round = self._on_round
        session.on_row = self._on_row

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[plugin.SESSION] = self.session

    # Once the rows have their order.
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        titles = {item.nodeid: plugin.title_of(item) for item in items}
        try:
            items[:] = selection.select(items, self._select, lambda item: (str(titles[item.nodeid]), item.path.stem))
        except selection.Unnamed as error:
            items[:], self.unnamed = [], error
        for item in items:
            self.titles[item.nodeid] = titles[item.nodeid]
            self.files.setdefault(item.path.stem, []).append(titles[item.nodeid])

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.progress.update(self.task, total=len(session.items), refresh=True)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.uncollected = True
            self._say(f"cannot collect {report.nodeid}:\n{report.longreprtext}", "red")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.progress.update(self.task, description=f"{self.titles[nodeid]}: preparing", refresh=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.session.unwritten is None:
            self._say(f"FAILED {report.nodeid}\n{report.longreprtext}", "red")
            self.faults.append(_in_a_line(self.titles[report.nodeid], report))
        elif report.skipped:
            # (file, line, reason).
            assert isinstance(report.longrepr, tuple)
            self._say(f"skipped {self.titles[report.nodeid]}: {report.longrepr[2]}", "yellow")
        if report.when == "teardown":
            self.progress.update(self.task, advance=1, refresh=True)

    def _on_round(self, name: str, number: int, total: int) -> None:
        # Redrawn between rounds only, so that drawing never runs beside a clock.
        self.progress.update(self.task, description=f"{name}: round {number + 1} of {total}", refresh=True)

    def _on_row(self, row: Row) -> None:
        if not self.progress.console.is_terminal:
            ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row.ratios.items())
            verdict = "measured" if row.passed else "parity FAILED"
            self._say(f"{row.key}: {ratios or verdict}{', noisy' * row.noisy}", "dim")

    def _say(self, text: str, style: str) -> None:
        self.progress.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _in_a_line(title: Title, report: pytest.TestReport) -> str:
    """Which row failed, and the line that says why."""
    lines = [line for line in report.longreprtext.splitlines() if line.strip()]
    # pytest marks what was raised with an E; a failure without a traceback ends with its reason.
    raised = [line[1:].strip() for line in lines if line.startswith("E ")]
    return f"{title}: {(raised or lines[-1:] or ['no reason given'])[0]}"[:_CHARACTERS]


def run(settings: Settings, select: Sequence[str] = (), paths: Sequence[str] = (), listing: bool = False) -> int:
    """Measures every row, or those that ``select`` names, and prints the table.

    Args:
        settings: device, output directory, threads, time per row.
        select: texts of which a row has at least one in what `listing` prints of it, or in the name of its file; in
            capitals or not. Empty (the default): all rows.
        paths: further files or directories with rows of your own.
        listing: print the names of the rows, and what is measured, and measure nothing.

    Returns:
        The exit status: 0 when every row was measured or skipped with a reason, 1 when a row failed parity or a
        contender crashed, 2 when interrupted, when the record cannot be continued or when a text of ``select`` names
        nothing, `SPOILED` when another process has to go on.

    Raises:
        OSError: a row could not be written; those before it are.
    """
    try:
        session = Session(settings)
    except (OSError, ValueError, TypeError) as error:
        print(f"pyfused bench: {settings.record} cannot be continued: {error}", file=sys.stderr)
        return 2
    if session.continued and not listing:
        print(f"{session.file.path} has {session.continued} rows, which are not measured again unless they failed")
    # pytest captures file descriptor 2 while a test runs; the bar goes to a copy that it does not know.
    descriptor = os.dup(sys.stderr.fileno())
    with open(descriptor, "w", encoding="utf-8") as stream, tempfile.TemporaryDirectory() as scratch:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(file=stream)
        with Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal) as progress:
            # Neither the user's own pytest settings nor its cache take part; the table below replaces pytest's, and
            # rows.json what pytest-benchmark would store.
            arguments = ["-c", os.devnull, f"--rootdir={Path(__file__).parent}", "-p", "no:cacheprovider"]
            arguments += ["-p", "no:terminal", f"--benchmark-storage=file://{scratch}"]
            arguments += ["--collect-only"] if listing else []
            watcher = Watcher(session, select, progress)
            status = pytest.main([*arguments, str(Path(__file__).parent), *paths], [watcher, plugin])
    if session.unwritten is not None:
        raise session.unwritten
    # What could not be collected may have the name.
    if watcher.unnamed is not None and not watcher.uncollected:
        print(f"pyfused bench: {watcher.unnamed}", file=sys.stderr)
        return 2
    if listing:
        for file, titles in watcher.files.items():
            print(file, *(f"  {title}" for title in titles), sep="\n")
        return int(status)
    if session.rows:
        print_table(session.rows, sys.stdout, settings.targets)
        print(f"written: {session.file.path}; `pyfused report {session.directory}` draws it")
    # Once more: a long table stands between them and the row.
    for fault in watcher.faults:
        print(f"FAILED {fault}")
    if session.spoiled is None:
        return int(status)
    print(f"pyfused bench: a capture failed, the next --record goes on: {session.spoiled}", file=sys.stderr)
    return SPOILED
