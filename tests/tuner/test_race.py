"""Who wins a race: whatever the times, nothing that is slower than the library's own choice."""

from __future__ import annotations

import itertools
import random

import pytest

hypothesis = pytest.importorskip("hypothesis")
from pyfused.tuner.race import LEAST_GAIN, race, taken, winner  # noqa: E402

given, st = hypothesis.given, hypothesis.strategies
PLANS = ("library", "a", "b")
DIRECTIONS = ("forward", "backward")
CLOCKS = ("cold", "warm")
# Every pair of plans, the library's first.
CONTENDERS = {
    pair: {(plan, direction): often for plan, direction, often in zip(pair, DIRECTIONS, (3, 2), strict=True)}
    for pair in itertools.product(PLANS, PLANS)
}
PARTS = list(itertools.product(PLANS, DIRECTIONS))
LIBRARY = ("library", "library")
seconds = st.floats(1e-7, 10.0)
every_time = st.fixed_dictionaries({clock: st.fixed_dictionaries(dict.fromkeys(PARTS, seconds)) for clock in CLOCKS})


class FakeClock:
    """Tells times that were given, with noise; notes what it was asked for."""

    mode = "fake"

    def __init__(self, times, noise=0.0, seed=0):
        self.times, self.noise, self.rounds = times, noise, []
        self.random = random.Random(seed)

    def round(self, calls):
        self.rounds.append(list(calls))
        return {part: self.times[part] * (1 + self.noise * self.random.random()) for part in calls}


@given(every_time)
def test_the_winner_is_never_slower_than_the_library(times):
    best, gain = winner(CONTENDERS, times)
    own = {clock: taken(CONTENDERS[LIBRARY], each) for clock, each in times.items()}
    mine = {clock: taken(CONTENDERS[best], each) for clock, each in times.items()}
    assert all(mine[clock] <= own[clock] for clock in CLOCKS)
    if best == LIBRARY:
        assert gain == 1.0
    else:
        assert gain == pytest.approx(sum(own.values()) / sum(mine.values()))
        assert gain >= LEAST_GAIN
    # And it is the best of those that may win.
    for other, parts in CONTENDERS.items():
        taken_by = {clock: taken(parts, each) for clock, each in times.items()}
        allowed = all(taken_by[clock] <= own[clock] for clock in CLOCKS)
        if allowed and sum(own.values()) >= LEAST_GAIN * sum(taken_by.values()):
            assert sum(mine.values()) <= sum(taken_by.values()), other


@given(every_time, st.integers(0, 3))
def test_a_race_ends_with_its_winner(times, noisy):
    clocks = {name: FakeClock(each, 0.2 * noisy, seed) for seed, (name, each) in enumerate(times.items())}
    calls = {part: lambda: None for part in PARTS}
    outcome = race(CONTENDERS, calls, clocks)
    assert LIBRARY in outcome.seconds
    assert outcome.seconds[outcome.winner] <= outcome.seconds[LIBRARY]
    if outcome.winner != LIBRARY:
        assert outcome.seconds[LIBRARY] >= LEAST_GAIN * outcome.seconds[outcome.winner] * (1 - 1e-12)
    if not noisy:
        assert outcome.winner == winner(CONTENDERS, times)[0]


def test_a_gain_below_the_least_is_noise():
    for gain, expected in ((1.02, "library"), (1.029, "library"), (1.031, "a"), (2.0, "a")):
        times = {clock: {"library": gain, "a": 1.0} for clock in CLOCKS}
        assert winner({"library": {"library": 1}, "a": {"a": 1}}, times)[0] == expected


def test_what_one_clock_finds_slower_does_not_win():
    contenders = {"library": {"library": 1}, "a": {"a": 1}}
    assert winner(contenders, {"cold": {"library": 4.0, "a": 1.0}, "warm": {"library": 1.0, "a": 1.01}})[0] == "library"
    assert winner(contenders, {"cold": {"library": 4.0, "a": 1.0}, "warm": {"library": 1.0, "a": 1.0}})[0] == "a"


def test_directions_and_how_often_they_run_count():
    contenders = {"library": {"lf": 1, "lb": 3}, "a": {"af": 1, "ab": 3}}
    times = {"cold": {"lf": 2.0, "lb": 1.0, "af": 1.0, "ab": 1.1}}
    assert winner(contenders, times)[0] == "a"
    assert winner({"library": {"lf": 1, "lb": 30}, "a": {"af": 1, "ab": 30}}, times)[0] == "library"


def test_calls_run_three_times_before_any_time_counts():
    """A kernel is compiled by the first, and its program is there from the third on."""
    log = []

    class Clock(FakeClock):
        def round(self, calls):
            log.append("timed")
            return super().round(calls)

    calls = {name: lambda name=name: log.append(name) for name in ("library", "a")}
    race({name: {name: 1} for name in calls}, calls, {"cold": Clock({"library": 1.0, "a": 1.0})})
    assert log[:7] == ["library"] * 3 + ["a"] * 3 + ["timed"]


def test_rounds_are_interleaved_and_end_early():
    """All parts in each round, in an order of chance that is the same again, and no more rounds than it takes."""
    contenders = {name: {name: 1} for name in ("library", "a", "b")}
    calls = dict.fromkeys(contenders, lambda: None)
    seen = []
    for _ in range(2):
        clock = FakeClock({"library": 1.0, "a": 1.01, "b": 9.0}, noise=0.001)
        outcome = race(contenders, calls, {"cold": clock})
        seen.append(clock.rounds)
        assert outcome.rounds == 5
        assert all(sorted(each) == ["a", "b", "library"] for each in clock.rounds)
        assert len({tuple(each) for each in clock.rounds}) > 1
        assert "b" not in outcome.seconds, "given up"
    assert seen[0] == seen[1]
    # Where noise hides which is faster there are more rounds, until the time is over; what is hopeless is in none.
    clock = FakeClock({"library": 1.03, "a": 1.0, "b": 9.0}, noise=0.2)
    outcome = race(contenders, calls, {"cold": clock})
    assert outcome.rounds > 5
    assert all("b" not in each for each in clock.rounds[5:])
    late = race(contenders, calls, {"cold": FakeClock({"library": 1.03, "a": 1.0, "b": 9.0}, noise=0.2)}, lambda: True)
    assert late.rounds == 5
