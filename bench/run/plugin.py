"""The pytest side: the `compare` fixture that makes a timed row, and the table at the end of `pytest bench`.

Rows of your own: put `from pyfused.bench.run.plugin import *` into a conftest.py beside them, and write

    def test_mine(compare):
        compare("my layer", {"pyfused": [fast], "eager": [slow]})

`pyfused bench --list` and -k know such a row by the name of its test, unless its module says what it will be called:

    def row_title(test, device, **parameters):
        return Title("my layer", "call")
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pyfused.bench.measure import parity, timing
from pyfused.bench.record.rows import NOISY, Row, Title
from pyfused.bench.run.session import Session, Settings

__all__ = [
    "Compare",
    "bench_session",
    "compare",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_ignore_collect",
    "pytest_runtest_makereport",
    "pytest_terminal_summary",
]

SESSION = pytest.StashKey[Session]()
_RECORDED_DEVIATIONS = 16

# What a run that is cut short should have measured comes first.
_ORDER = ("test_machine", "test_overhead", "test_operators", "test_models", "test_training", "test_compiled")

Contenders = Mapping[str, Sequence[Callable[[], object]]]


def pytest_configure(config: pytest.Config) -> None:
    # `pyfused bench` has put its own session there already.
    if SESSION not in config.stash:
        config.stash[SESSION] = Session(Settings())


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # Which has no rows on a CPU: no file is better there than one whose tests are all skipped.
    cpu = config.stash[SESSION].settings.device.type == "cpu"
    compiled = Path(__file__).resolve().with_name("test_compiled.py")
    return True if cpu and collection_path.resolve() == compiled else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "compare" in getattr(item, "fixturenames", ()) and item.get_closest_marker("benchmark") is None:
            item.add_marker(pytest.mark.benchmark(timer=timing.subject_clock))
    items.sort(key=lambda item: _ORDER.index(item.path.stem) if item.path.stem in _ORDER else len(_ORDER))


def pytest_runtest_makereport(item: pytest.Item) -> None:
    # The disk is full, say: no later row could be written either.
    session = item.config.stash[SESSION]
    if session.unwritten is not None:
        item.session.shouldstop = f"{session.unwritten.filename}: {session.unwritten.strerror}"
    elif session.spoiled is not None:
        item.session.shouldstop = f"a capture failed: {session.spoiled}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    if session.rows:
        from pyfused.bench.show.terminal import print_table

        terminalreporter.section("pyfused")
        print_table(session.rows, sys.stdout, session.settings.targets)
        terminalreporter.write_line(f"written: {session.file.path}")


@pytest.fixture(scope="session")
def bench_session(pytestconfig: pytest.Config) -> Session:
    """The run: its settings (device, time per row) and the rows so far."""
    return pytestconfig.stash[SESSION]


def title_of(item: pytest.Item) -> Title:
    """What the row of a test will be called: by ``row_title`` of the test's module, given the test's name, the device
    and its parameters. Of a module without, which names its rows as it measures them, the test's own name."""
    assert isinstance(item, pytest.Function)
    of_row = getattr(item.module, "row_title", None)
    if of_row is None:
        return Title(item.name, "")
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return of_row(item.originalname, item.config.stash[SESSION].settings.device, **parameters)


class Compare:
    """Times contenders in interleaved rounds under pytest-benchmark and records the row."""

    def __init__(self, benchmark: Any, session: Session) -> None:
        self._benchmark, self._session = benchmark, session

    def unless_recorded(self, name: str, measured: str, mode: str) -> None:
        """Skips the test whose row the record has from an earlier run; called before anything is made for the row."""
        if self._session.recorded(name, measured, mode):
            pytest.skip(f"{name}, {measured}, {mode}: the record has this row")

    def __call__(
        self,
        name: str,
        contenders: Contenders,
        *,
        subject: str = "pyfused",
        kind: str = "operator",
        measured: str = "call",
        deviations: Sequence[parity.Deviation] = (),
        graph: bool = False,
        clock: timing.Clock | None = None,
        rounds: int | None = None,
        complete: Callable[[Row], None] = lambda row: None,
        **row: Any,
    ) -> Row:
        """Gate on parity, time, record; a row that the record has from an earlier run is skipped.

        Args:
            name: what the table calls the row.
            contenders: name -> calls that take no argument, one for each input set (one is enough).
            subject: the contender that the ratios compare with.
            kind, measured: as in `Row`.
            deviations: the parity figures; if one fails, the row is recorded without times and the test fails.
            graph: on a GPU, capture each call as a CUDA graph and time its replay.
            clock: None (the default): `timing.clock_for` the device.
            rounds: how many; None (the default): as many as fit in the time per row, 7 at least, after two that are not
                counted; where they are noisy, as many again, up to the `attempts` of the settings. With a number, every
                round counts, and is run once.
            complete: fills in what is known only after the rounds, before the row is recorded.
            row: further fields of `Row`, such as facts and peak_bytes.

        Returns:
            The row as recorded.
        """
        device = self._session.settings.device
        clock = timing.clock_for(device, graph) if clock is None else clock
        self.unless_recorded(name, measured, clock.mode)
        # The gate is on all of them; a model has hundreds, of which the record keeps the ones nearest to their limit.
        nearest = sorted(deviations, key=parity.strain, reverse=True)[:_RECORDED_DEVIATIONS]
        figures = [dataclasses.asdict(item) for item in nearest]
        result = Row(name, kind, measured, mode=clock.mode, subject=subject, parity=figures, **row)
        broken = [str(item) for item in nearest if not item.passed]
        if broken:
            result.passed = False
            self._session.add(result)
            pytest.fail(f"{name} is not close enough to float64:\n" + "\n".join(broken), pytrace=False)
        if graph and device.type == "cuda":
            contenders = self._captured(contenders, result)

        interleaved = timing.Interleaved(contenders, subject, clock)
        most = 1 if rounds is not None else self._session.settings.attempts
        if rounds is None:
            rounds = timing.rounds_within(self._session.settings.seconds_per_row, interleaved.warm_up())
        before, load = self._session.gpu_state(), _load()

        def between_rounds(attempt: str = "") -> None:
            self._session.on_round(f"{name}, {measured}{attempt}", len(interleaved.seconds[subject]), rounds)

        self._benchmark.pedantic(interleaved, setup=between_rounds, rounds=rounds)
        found = [_filled(result, interleaved)]
        while found[-1].noisy and len(found) < most:
            interleaved = timing.Interleaved(contenders, subject, clock)
            # pytest-benchmark takes the rounds of a test once.
            for _ in range(rounds):
                between_rounds(", again for noise")
                interleaved()
            found.append(_filled(result, interleaved))
        result = min(found, key=lambda row: row.spread)
        result.attempts = len(found)
        result.gpu = {"before": before, "after": self._session.gpu_state()} if before else {}
        result.load = {"before": load, "after": _load()}
        self._benchmark.extra_info.update(medians=result.seconds, ratios=result.ratios)
        complete(result)
        self._session.add(result)
        return result

    def _captured(self, contenders: Contenders, row: Row) -> Contenders:
        """Every contender as CUDA graphs; the first that cannot be captured ends the session, and if it is a baseline,
        it and those after it are left out, and the row says why."""
        graphs: dict[str, Sequence[Callable[[], object]]] = {}
        # The subject first, without which there is no row.
        for name in sorted(contenders, key=lambda name: name != row.subject):
            if self._session.spoiled is None:
                try:
                    graphs[name] = [timing.captured(call) for call in contenders[name]]
                    continue
                except timing.CaptureError as error:
                    self._session.spoiled = f"{name} in {row.name}: {error}"
                    if name == row.subject:
                        raise
            row.unavailable = row.unavailable | {f"{name} as a CUDA graph": self._session.spoiled}
        return {name: graphs[name] for name in contenders if name in graphs}


def _filled(row: Row, rounds: timing.Interleaved) -> Row:
    """A copy of the row with what the rounds found."""
    found = dataclasses.replace(
        row, seconds=rounds.medians(), ratios=rounds.ratios(), rounds=len(rounds.seconds[rounds.subject]),
        quartiles=rounds.quartiles(), ratio_quartiles=rounds.ratio_quartiles(),
    )  # fmt: skip
    found.noisy = found.spread > NOISY
    return found


def _load() -> float:
    return os.getloadavg()[0]


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any, bench_session: Session) -> Compare:
    """``compare(name, {"pyfused": [call], "eager": [call]})`` times the calls and records a row."""
    made = Compare(benchmark, bench_session)
    # Before anything is made for the row.
    made.unless_recorded(*title_of(request.node))
    return made
