"""Commands one after another in a given time, each with its share of it; what became of each is on disk at once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyfused import files

# Seconds between asking a command to stop and the next, harsher request.
# xdist waits ten seconds for its workers before it sums up.
_AFTER_INTERRUPT, _AFTER_TERMINATE = 14.0, 2.0
_TAIL = 4000


class Terminated(BaseException):
    """One of the signals of `terminable` arrived; its name."""


@dataclass(frozen=True)
class Step:
    """One command of a run.

    Attributes:
        name: what the record and the table call it.
        share: of the time that is left for this step and those after it, in proportion to their shares.
        command: seconds the step may take -> the command.
        environment: what the command's environment has besides this process's own.
        absent: why the step cannot start here; None (the default) when it can.
        refusals: patterns of output by which a command that failed says that it cannot be done here, and why (the first
            group); such a step counts as skipped.
        shown: whether all output is printed; else, and only when the step did not pass, its end.
    """

    name: str
    share: float
    command: Callable[[float], Sequence[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    absent: str | None = None
    refusals: Sequence[str] = ()
    shown: bool = False


@dataclass
class Outcome:
    """What became of a step.

    Attributes:
        name, command: the step's.
        status: "waiting", "running", "passed", "failed", "skipped", "overran" (it was stopped at its limit),
            "interrupted" (the whole run was) or "not run" (no time was left).
        limit: seconds it may take.
        seconds: it took.
        exit_status: the command's; negative for a signal.
        reason: why it was skipped or not run.
        tail: the end of its output.
    """

    name: str
    command: list[str] = field(default_factory=list)
    status: str = "waiting"
    limit: float | None = None
    seconds: float | None = None
    exit_status: int | None = None
    reason: str | None = None
    tail: str = ""

    @property
    def good(self) -> bool:
        return self.status in ("passed", "skipped")


class Runner:
    """Runs steps and keeps steps.json, whole and valid at any moment, and output.log in one directory.

    Args:
        directory: made if it is not there.
        budget: seconds for all steps together.
        facts: what steps.json says beside the steps.
        cwd: where the commands start.
        environment: what every command's environment has besides this process's own.
    """

    def __init__(
        self, directory: Path, budget: float, facts: Mapping[str, object], cwd: Path, environment: Mapping[str, str]
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.record, self.log = directory / "steps.json", directory / "output.log"
        self.outcomes: list[Outcome] = []
        self._deadline = time.monotonic() + budget
        self._facts, self._cwd, self._environment = {"budget": budget, **facts}, cwd, environment

    def run(self, steps: Sequence[Step]) -> bool:
        """Whether every step passed or was skipped. An exception in between, `Terminated` too, ends the command."""
        self.outcomes = [Outcome(step.name) for step in steps]
        self._write()
        for place, (step, outcome) in enumerate(zip(steps, self.outcomes, strict=True)):
            rest = sum(later.share for later in steps[place:] if later.absent is None)
            left = self._deadline - time.monotonic() - _AFTER_INTERRUPT - _AFTER_TERMINATE
            if step.absent is not None:
                outcome.status, outcome.reason = "skipped", step.absent
            elif left < 1.0:
                outcome.status, outcome.reason = "not run", "no time was left"
            else:
                self._run(step, outcome, left * step.share / rest)
            self._write()
            self._tell(step, outcome)
        return all(outcome.good for outcome in self.outcomes)

    def _run(self, step: Step, outcome: Outcome, limit: float) -> None:
        outcome.command, outcome.limit, outcome.status = list(step.command(limit)), round(limit, 1), "running"
        self._write()
        print(f"{step.name}: at most {limit:.0f} s", flush=True)
        with self.log.open("ab") as log:
            log.write(f"==== {step.name}\n".encode())
            start = log.tell()
        began = time.monotonic()
        try:
            outcome.status, outcome.exit_status = self._wait(step, outcome.command, limit)
        except BaseException:
            outcome.status = "interrupted"
            raise
        finally:
            outcome.seconds = round(time.monotonic() - began, 3)
            self._read(step, outcome, start)
            self._write()

    def _wait(self, step: Step, command: list[str], limit: float) -> tuple[str, int]:
        """(status, exit status), once nothing of the command runs any more."""
        with self.log.open("ab") as log:
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=self._cwd,
                    env=os.environ | self._environment | step.environment, start_new_session=True,
                    preexec_fn=_interruptible,
                )  # fmt: skip
            except OSError as error:
                log.write(f"{error}\n".encode())
                return "failed", 127
        overran = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            overran = True
            # As by Ctrl-C, on which pytest and the benchmark sum up what they have.
            _ask(process, signal.SIGINT, _AFTER_INTERRUPT)
        finally:
            if process.poll() is None:
                _ask(process, signal.SIGTERM, _AFTER_TERMINATE)
            # Also what the command has left behind: it would disturb the next one.
            _ask(process, signal.SIGKILL, None)
        status = "overran" if overran else "failed" if process.returncode else "passed"
        return status, process.returncode

    def _read(self, step: Step, outcome: Outcome, start: int) -> None:
        output = self.log.read_bytes()[start:].decode(errors="replace")
        outcome.tail = output[-_TAIL:]
        if outcome.status == "failed":
            found = next(filter(None, (re.search(pattern, output) for pattern in step.refusals)), None)
            if found is not None:
                outcome.status, outcome.reason = "skipped", found[1].strip()
        if step.shown:
            print(output, end="", flush=True)
        elif not outcome.good:
            print(outcome.tail, flush=True)

    def _tell(self, step: Step, outcome: Outcome) -> None:
        took = "" if outcome.seconds is None else f" after {outcome.seconds:.0f} s"
        print(f"{step.name}: {outcome.status}{took}{f': {outcome.reason}' if outcome.reason else ''}", flush=True)

    def _write(self) -> None:
        text = json.dumps(self._facts | {"steps": [dataclasses.asdict(item) for item in self.outcomes]}, indent=1)
        with files.replacing(self.record) as partial:
            partial.write_text(text + "\n")

    def table(self) -> str:
        """A line for each step."""
        lines = [("step", "outcome", "seconds", "limit", "")]
        for item in self.outcomes:
            times = ("" if value is None else f"{value:.0f}" for value in (item.seconds, item.limit))
            why = item.reason or (f"exit status {item.exit_status}" if item.exit_status else "")
            lines.append((item.name, item.status, *times, why))
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        return "\n".join(
            f"{name:{widths[0]}}  {status:{widths[1]}}  {took:>{widths[2]}}  {limit:>{widths[3]}}  {why}".rstrip()
            for name, status, took, limit, why in lines
        )


def _interruptible() -> None:
    """A shell's job in the background ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _ask(process: subprocess.Popen, number: signal.Signals, seconds: float | None) -> None:
    """Sends a signal to the command and its children, and waits for the command's end, as long as given."""
    # Nothing is left of the group of a command that has ended cleanly.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP raise `Terminated`, once: the clean-up that follows is not disturbed."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def handler(number: int, frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Terminated(signal.Signals(number).name)

    # SIGINT also because commands inherit it when it is ignored, as in what a shell has put into the background.
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
