"""One run of tuning: recorded calls in, measured rows and a report out."""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pyfused.choice import measured, order
from pyfused.choice.measured import Row
from pyfused.choice.order import Choice
from pyfused.ops.decision import Decision
from pyfused.progress import bar
from pyfused.tuner import configurations
from pyfused.tuner.clocks import Clock
from pyfused.tuner.race import Outcome, race
from pyfused.tuner.recorder import Count, Recorder
from pyfused.tuner.replay import Recorded, Replay, further
from pyfused.tuner.report import TunedCall, named
from pyfused.tuner.ways import (
    alike,
    call_of,
    choices,
    chosen_by,
    first_line,
    library_choice,
    nothing_to_compare,
    parts_of,
    row_key,
    without_own_rows,
)

Clocks = Callable[[torch.device], Mapping[str, Clock]]


@dataclass
class Group:
    """Calls that one measured row decides, and what pyfused decides about them without the user's rows."""

    untuned: Decision
    calls: list[tuple[Recorded, Count]]
    seconds: float = 0.0
    note: str = ""

    @property
    def own(self) -> Choice:
        """Pyfused's own choice."""
        return chosen_by(self.untuned)

    @property
    def served(self) -> Choice:
        """What served the calls when they were recorded."""
        return chosen_by(self.calls[0][1].told)


class Session:
    """Compares what may serve each recorded call, those that take most of the model's time first.

    Args:
        seconds: after so many nothing new is begun.
        clocks: device -> clocks, by their names.
        now: the time, in seconds.

    Attributes:
        rows: measured so far.
    """

    def __init__(self, seconds: float, clocks: Clocks, now: Callable[[], float] = time.monotonic) -> None:
        self._clocks_for, self._now = clocks, now
        self._began = now()
        self._end = self._began + seconds
        self._clocks: dict[torch.device, Mapping[str, Clock]] = {}
        self.rows: list[Row] = []
        self._configured: set[str] = set()

    @property
    def spent(self) -> float:
        """Seconds since it began."""
        return self._now() - self._began

    def tune(self, recorder: Recorder) -> list[TunedCall]:
        """Rows for all that was recorded; a line for each call."""
        groups = self._groups(recorder)
        groups.sort(key=lambda group: -group.seconds)
        total = sum(group.seconds for group in groups)
        found: list[TunedCall] = []
        left = total
        for group in bar(groups, "tune: comparing"):
            # What is left of the time goes to what is left, by its share.
            remaining = self._end - self._now()
            end = self._now() + remaining * group.seconds / max(left, 1e-12)
            left -= group.seconds
            verdict = self._compared(group, end)
            found += _lines(group, verdict, group.seconds / max(total, 1e-12))
        return found

    def _left(self, end: float) -> float:
        """Seconds until then."""
        return end - self._now()

    def clocks(self, device: torch.device) -> Mapping[str, Clock]:
        if device not in self._clocks:
            self._clocks[device] = self._clocks_for(device)
        return self._clocks[device]

    def _groups(self, recorder: Recorder) -> list[Group]:
        """By what a row is found by; each with what pyfused's own choice takes of the model's time."""
        groups: dict[str, Group] = {}
        for recorded, count in bar(recorder.calls.items(), "tune: calls"):
            untuned, seconds, note = count.told, 0.0, ""
            try:
                untuned, seconds = self._untuned(recorded, count)
            except Exception as error:
                # Memory that the model leaves may be too little; it stands in the report, untried.
                note = f"not made again: {first_line(error)}"
            why = note or nothing_to_compare(untuned)
            key = repr((untuned.device, untuned.dtype, *row_key(untuned), why))
            group = groups.setdefault(key, Group(untuned, [], note=why))
            group.calls.append((recorded, count))
            group.seconds += seconds
        return list(groups.values())

    def _untuned(self, recorded: Recorded, count: Count) -> tuple[Decision, float]:
        """What pyfused decides without the user's rows, and what that takes of the model's time."""
        replay = Replay(recorded, count.told.device)
        with without_own_rows():
            untuned = replay.decided()
        choice = chosen_by(untuned)
        parts = parts_of(0, choice, count)
        calls = {part: call_of(replay, part) for part in parts}
        for call in calls.values():
            call()
        # The last of them finds warm caches: what a call's neighbours do to them is not known here.
        clock = list(self.clocks(count.told.device).values())[-1]
        seconds = clock.round(calls)
        return untuned, sum(often * seconds[part] for part, often in parts.items())

    def _compared(self, group: Group, end: float) -> Verdict:
        if group.note or self._now() > self._end:
            return Verdict(group.served, note=group.note or "the time was over before it was tried")
        try:
            return self._raced(group, end)
        except Exception as error:
            # Memory that the model leaves may be too little; pyfused's own choice serves the call.
            return Verdict(group.served, note=f"not compared: {first_line(error)}")

    def _raced(self, group: Group, end: float) -> Verdict:
        device = group.untuned.device
        replays = [Replay(recorded, device) for recorded, _ in group.calls]
        usable, dropped = alike(replays, list(choices(group.untuned, replays[0])))
        contenders = {
            choice: {
                part: often
                for index, (_, count) in enumerate(group.calls)
                for part, often in parts_of(index, choice, count).items()
            }
            for choice in usable
        }

        def timed(among: Sequence[Choice], until: float) -> Outcome[Choice]:
            parts = {choice: contenders[choice] for choice in among}
            every = dict.fromkeys(part for each in parts.values() for part in each)
            calls = {part: call_of(replays[part.call], part) for part in every}
            return race(parts, calls, self.clocks(device), lambda: self._now() > until, library)

        library = library_choice(usable)
        outcome = timed(usable, self._now() + 0.7 * (end - self._now()))
        seconds = dict(outcome.seconds)
        winner, gain = outcome.winner, outcome.gain
        if winner != group.own:
            # Between few; what won the first race by chance alone loses this one.
            again = timed([choice for choice in usable if choice in (group.own, library, winner)], end)
            winner, gain = again.winner, again.gain
            seconds |= again.seconds
        row = _row(group, winner, gain, seconds)
        if winner != group.own:
            why = _unserved(replays, row, winner)
            if why:
                dropped = (*dropped, (named(winner), why))
                winner, gain = group.own, 1.0
                row = _row(group, winner, gain, seconds)
        self.rows.append(row)
        if winner.backend == "triton":
            for index, (_, count) in enumerate(group.calls):
                for part in parts_of(index, winner, count):
                    left = functools.partial(self._left, end)
                    self.rows += configurations.faster(
                        replays[index], part, self.clocks(device), left, self._configured, today()
                    )
        return Verdict(winner, gain, dropped)


class Verdict(NamedTuple):
    """What serves a group from now on."""

    now: Choice
    gain: float = 1.0
    dropped: tuple[tuple[str, str], ...] = ()
    note: str = ""


# ---- rows


def _row(group: Group, winner: Choice, gain: float, seconds: Mapping[Choice, float]) -> Row:
    """The winner's backend first, then the others by the time of the best choice there."""
    told = group.untuned
    best: dict[str, Choice] = {}
    for choice in sorted(seconds, key=seconds.__getitem__):
        best.setdefault(choice.backend, choice)
    best = {winner.backend: winner} | {name: choice for name, choice in best.items() if name != winner.backend}
    runs = sum(count.forward for _, count in group.calls)
    found = {name: round(max(1e6 * seconds[choice] / runs, 1e-3), 3) for name, choice in best.items()}
    plans = {name: (choice.forward, choice.backward) for name, choice in best.items() if choice.forward}
    subject, rows, sizes = row_key(told)
    capability = torch.cuda.get_device_capability(told.device) if told.device.type == "cuda" else (0, 0)
    source: dict[str, object] = {"date": today(), "untuned": named(group.own), "gain": round(gain, 3)}
    dtype = str(told.dtype).removeprefix("torch.")
    return Row(order.device_name(told.device), capability, subject, dtype, rows, sizes, found, source, plans)


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def _unserved(replays: Sequence[Replay], row: Row, winner: Choice) -> str:
    """Why the row does not make "auto" take the winner, or with other results; "" where it does."""
    with without_own_rows():
        wanted = [replay.results() for replay in replays]
        measured.use([row])
        for replay, right in zip(replays, wanted, strict=True):
            told = replay.decided()
            if chosen_by(told) != winner:
                return f"'auto' takes {named(chosen_by(told))} with its row"
            why = further(replay.results(), right, replay.exact)
            if why is not None:
                return why
    return ""


def _lines(group: Group, verdict: Verdict, share: float) -> Iterator[TunedCall]:
    total = sum(count.forward for _, count in group.calls)
    for _, count in group.calls:
        told = count.told
        yield TunedCall(
            told.operator, told.shapes, told.dtype, told.device, count.forward, share * count.forward / total,
            chosen_by(told), verdict.now, verdict.gain, verdict.dropped, verdict.note,
        )  # fmt: skip
