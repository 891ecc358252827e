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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyfused import files
from pyfused.bench.signals import signals_held

# Seconds between asking a command to stop and the next, harsher request.
# xdist waits ten seconds for its workers before it sums up.
_AFTER_INTERRUPT, _AFTER_TERMINATE = 14.0, 2.0
_TAIL = 4000
# Of the seconds that a step is expected to take: a model's figure.
_SLACK = 1.5
# Lines of all that is said at the end about what failed, and characters of one.
_REASONS, _WIDTH = 30, 200


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
        needs: seconds that it is expected to take. It gets half as many again, even where its share is less, and does
            not start where fewer are left.
        whole: its share is in seconds: it gets all of them, where so many are left, before others share the rest; the
            last step gets what is left.
    """

    name: str
    share: float
    command: Callable[[float], Sequence[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    absent: str | None = None
    refusals: Sequence[str] = ()
    shown: bool = False
    needs: float = 0.0
    whole: bool = False


def usable(budget: float) -> float:
    """Seconds of a budget that steps get; the rest is for stopping the last of them."""
    return max(0.0, budget - _AFTER_INTERRUPT - _AFTER_TERMINATE)


def limit(step: Step, later: Sequence[Step], left: float) -> float | None:
    """Seconds that ``step`` gets of those that are left for it and the later ones; None when they are too few."""
    if left < max(step.needs, 1.0):
        return None
    others = [each for each in later if each.absent is None]
    if step.whole:
        # What nobody comes after to take would be lost.
        return min(step.share, left) if others else left
    rest = sum(each.share for each in (step, *others) if not each.whole)
    return min(left, max(left * step.share / rest, _SLACK * step.needs))


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

    Where steps.json is there, it is added to: a step that passed in it does not run again.

    Args:
        directory: made if it is not there.
        budget: seconds for all steps together.
        facts: what steps.json says beside the steps.
        cwd: where the commands start.
        environment: what every command's environment has besides this process's own.
        lost: asked after a step that did not pass: why no later one can, or None.
    """

    def __init__(
        self,
        directory: Path,
        budget: float,
        facts: Mapping[str, object],
        cwd: Path,
        environment: Mapping[str, str],
        lost: Callable[[], str | None] = lambda: None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.record, self.log = directory / "steps.json", directory / "output.log"
        self.outcomes = read_outcomes(directory) if self.record.exists() else []
        self._deadline = time.monotonic() + budget
        self._facts, self._cwd, self._environment, self._lost = {"budget": budget, **facts}, cwd, environment, lost

    def run(self, steps: Sequence[Step]) -> bool:
        """Whether every step passed or was skipped. An exception in between, `Terminated` too, ends the command."""
        chosen = {step.name: step for step in steps}
        for outcome in self.outcomes:
            if outcome.name in chosen and outcome.status == "passed":
                print(f"{outcome.name}: passed before", flush=True)
                del chosen[outcome.name]
        self.outcomes = [item for item in self.outcomes if item.name not in chosen]
        waiting = [(step, Outcome(step.name)) for step in chosen.values()]
        self.outcomes += [outcome for _, outcome in waiting]
        self._write()
        gone = None
        for place, (step, outcome) in enumerate(waiting):
            left = usable(self._deadline - time.monotonic())
            if step.absent is not None:
                outcome.status, outcome.reason = "skipped", step.absent
            elif gone is not None:
                outcome.status, outcome.reason = "not run", gone
            elif (seconds := limit(step, [later for later, _ in waiting[place + 1 :]], left)) is None:
                outcome.status = "not run"
                outcome.reason = f"it needs about {max(step.needs, 1.0):.0f} s, {left:.0f} s were left"
            else:
                self._run(step, outcome, seconds)
                gone = None if outcome.good else self._lost()
            self._write()
            self._tell(step, outcome)
        return all(outcome.good for _, outcome in waiting)

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
        overran, process = False, None
        try:
            with self.log.open("ab") as log, signals_held():
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=self._cwd,
                    env={**os.environ, **self._environment, **step.environment}, start_new_session=True,
                    preexec_fn=_interruptible,
                )  # fmt: skip
            process.wait(limit)
        except subprocess.TimeoutExpired:
            # Only `wait` raises it.
            assert process is not None
            overran = True
            # As by Ctrl-C, on which pytest and the benchmark sum up what they have.
            _ask(process, signal.SIGINT, _AFTER_INTERRUPT)
        except OSError as error:
            if process is not None:
                raise
            with self.log.open("ab") as log:
                log.write(f"{error}\n".encode())
            return "failed", 127
        finally:
            if process is not None:
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
        lines: list[tuple[str, ...]] = [("step", "outcome", "seconds", "limit", "")]
        for item in self.outcomes:
            times = ("" if value is None else f"{value:.0f}" for value in (item.seconds, item.limit))
            why = item.reason or (f"exit status {item.exit_status}" if item.exit_status else "")
            lines.append((item.name, item.status, *times, why))
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        return "\n".join(
            f"{name:{widths[0]}}  {status:{widths[1]}}  {took:>{widths[2]}}  {limit:>{widths[3]}}  {why}".rstrip()
            for name, status, took, limit, why in lines
        )

    def failures(self) -> str:
        """Of each step that is not good, why: the end of its output, in so few lines that all stand together."""
        bad = [item for item in self.outcomes if not item.good]
        each = max(1, _REASONS // max(len(bad), 1) - 1)
        lines = []
        for item in bad:
            said = [line for line in item.tail.splitlines() if line.strip()][-each:]
            lines += [f"{item.name} {item.status}{f': {item.reason}' if item.reason else ''}"]
            lines += [f"    {line[:_WIDTH]}" for line in said]
        return "\n".join(lines[:_REASONS])


def read_outcomes(directory: Path) -> list[Outcome]:
    """What the steps.json there says of each step.

    Raises:
        OSError: there is none to read.
        ValueError: it is something else.
    """
    try:
        return [Outcome(**item) for item in json.loads((directory / "steps.json").read_text())["steps"]]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{directory / 'steps.json'} is no record of steps: {error}") from error


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
