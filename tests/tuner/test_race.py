"""Who wins a race: whatever the times, nothing slower than pyfused's own choice, nor than the library's plan."""

from __future__ import annotations

import itertools
import random

import pytest

hypothesis = pytest.importorskip("hypothesis")
from pyfused.tuner.race import LEAST_GAIN, race, taken, winner  # noqa: E402

given, st = hypothesis.given, hypothesis.strategies
PLANS = ("own", "blas", "a")
DIRECTIONS = ("forward", "backward")
CLOCKS = ("cold", "warm")
# Every pair of plans, pyfused's own first.
CONTENDERS = {
    pair: {(plan, direction): often for plan, direction, often in zip(pair, DIRECTIONS, (3, 2), strict=True)}
    for pair in itertools.product(PLANS, PLANS)
}
PARTS = list(itertools.product(PLANS, DIRECTIONS))
OWN, LIBRARY = ("own", "own"), ("blas", "blas")
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
def test_the_winner_is_never_slower_than_pyfuseds_own_choice(times):
    best, gain = winner(CONTENDERS, times)
    own = {clock: taken(CONTENDERS[OWN], each) for clock, each in times.items()}
    mine = {clock: taken(CONTENDERS[best], each) for clock, each in times.items()}
    assert all(mine[clock] <= own[clock] for clock in CLOCKS)
    if best == OWN:
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


@given(every_time)
def test_the_winner_is_never_slower_than_the_librarys_plan(times):
    """Nor than pyfused's own choice, both clocks together; and it is the library's where no other gains enough."""
    best, gain = winner(CONTENDERS, times, LIBRARY)
    total = {name: sum(taken(parts, each) for each in times.values()) for name, parts in CONTENDERS.items()}
    assert total[best] <= min(total[OWN], total[LIBRARY]) * (1 + 1e-12)
    assert gain == pytest.approx(total[OWN] / total[best])
    without, _ = winner(CONTENDERS, times)
    expected = LIBRARY if total[LIBRARY] < total[without] else without
    assert total[best] == pytest.approx(total[expected], rel=1e-12)


# Each clock has another best, which loses by the other one: who wins is far behind both.
@hypothesis.example(
    {
        clock: dict(zip(PARTS, each, strict=True))
        for clock, each in (("cold", (1.0, 4.0, 1.0, 1.0, 1.0, 2.0)), ("warm", (2.0, 1.0, 1.0, 3.0, 1.0, 2.0)))
    },
    0,
    None,
)
@given(every_time, st.integers(0, 3), st.sampled_from([None, LIBRARY]))
def test_a_race_ends_with_its_winner(times, noisy, library):
    clocks = {name: FakeClock(each, 0.2 * noisy, seed) for seed, (name, each) in enumerate(times.items())}
    calls = {part: lambda: None for part in PARTS}
    outcome = race(CONTENDERS, calls, clocks, library=library)
    assert OWN in outcome.seconds
    least = {LIBRARY: 1.0}.get(outcome.winner, LEAST_GAIN) if library else LEAST_GAIN
    if outcome.winner != OWN:
        assert outcome.seconds[OWN] >= least * outcome.seconds[outcome.winner] * (1 - 1e-12)
    # Those that are not there were given up as far slower.
    if library in outcome.seconds:
        assert outcome.seconds[outcome.winner] <= outcome.seconds[library] * (1 + 1e-12)
    if not noisy:
        assert outcome.winner == winner(CONTENDERS, times, library)[0]


def test_the_librarys_plan_needs_no_gain():
    contenders = {name: {name: 1} for name in ("own", "blas", "a")}

    def best(**seconds):
        times = dict.fromkeys(CLOCKS, seconds)
        found = race(contenders, dict.fromkeys(contenders, lambda: None), {"cold": FakeClock(seconds)}, library="blas")
        assert found.winner == winner(contenders, times, "blas")[0]
        return found.winner

    assert best(own=1.0, blas=1.0, a=1.0) == "own"
    assert best(own=1.0, blas=0.999, a=0.98) == "blas"
    assert best(own=1.0, blas=0.999, a=0.96) == "a"
    assert best(own=1.0, blas=0.95, a=0.96) == "blas"
    assert best(own=1.0, blas=1.001, a=0.98) == "own"
    # A difference that noise hides takes more rounds, where less than the least gain of another's is told at once.
    clocks = {"cold": FakeClock({"own": 1.0, "blas": 1.0, "a": 1.0}, noise=0.01)}
    assert race(contenders, dict.fromkeys(contenders, lambda: None), clocks).rounds == 5
    assert race(contenders, dict.fromkeys(contenders, lambda: None), clocks, library="blas").rounds > 5
    # By the sum of the clocks alone.
    times = {"cold": {"own": 4.0, "blas": 1.0}, "warm": {"own": 1.0, "blas": 1.01}}
    assert winner({name: {name: 1} for name in ("own", "blas")}, times, "blas")[0] == "blas"


def test_a_gain_below_the_least_is_noise():
    for gain, expected in ((1.02, "own"), (1.029, "own"), (1.031, "a"), (2.0, "a")):
        times = {clock: {"own": gain, "a": 1.0} for clock in CLOCKS}
        assert winner({"own": {"own": 1}, "a": {"a": 1}}, times)[0] == expected


def test_what_one_clock_finds_slower_does_not_win():
    contenders = {"own": {"own": 1}, "a": {"a": 1}}
    assert winner(contenders, {"cold": {"own": 4.0, "a": 1.0}, "warm": {"own": 1.0, "a": 1.01}})[0] == "own"
    assert winner(contenders, {"cold": {"own": 4.0, "a": 1.0}, "warm": {"own": 1.0, "a": 1.0}})[0] == "a"


def test_directions_and_how_often_they_run_count():
    contenders = {"own": {"lf": 1, "lb": 3}, "a": {"af": 1, "ab": 3}}
    times = {"cold": {"lf": 2.0, "lb": 1.0, "af": 1.0, "ab": 1.1}}
    assert winner(contenders, times)[0] == "a"
    assert winner({"own": {"lf": 1, "lb": 30}, "a": {"af": 1, "ab": 30}}, times)[0] == "own"


def test_calls_run_three_times_before_any_time_counts():
    """A kernel is compiled by the first, and its program is there from the third on."""
    log = []

    class Clock(FakeClock):
        def round(self, calls):
            log.append("timed")
            return super().round(calls)

    calls = {name: lambda name=name: log.append(name) for name in ("own", "a")}
    race({name: {name: 1} for name in calls}, calls, {"cold": Clock({"own": 1.0, "a": 1.0})})
    assert log[:7] == ["own"] * 3 + ["a"] * 3 + ["timed"]


def test_rounds_are_interleaved_and_end_early():
    """All parts in each round, in an order of chance that is the same again, and no more rounds than it takes."""
    contenders = {name: {name: 1} for name in ("own", "a", "b")}
    calls = dict.fromkeys(contenders, lambda: None)
    seen = []
    for _ in range(2):
        clock = FakeClock({"own": 1.0, "a": 1.01, "b": 9.0}, noise=0.001)
        outcome = race(contenders, calls, {"cold": clock})
        seen.append(clock.rounds)
        assert outcome.rounds == 5
        assert all(sorted(each) == ["a", "b", "own"] for each in clock.rounds)
        assert len({tuple(each) for each in clock.rounds}) > 1
        assert "b" not in outcome.seconds, "given up"
    assert seen[0] == seen[1]
    # Where noise hides which is faster there are more rounds, until the time is over; what is hopeless is in none.
    clock = FakeClock({"own": 1.03, "a": 1.0, "b": 9.0}, noise=0.2)
    outcome = race(contenders, calls, {"cold": clock})
    assert outcome.rounds > 5
    assert all("b" not in each for each in clock.rounds[5:])
    late = race(contenders, calls, {"cold": FakeClock({"own": 1.03, "a": 1.0, "b": 9.0}, noise=0.2)}, lambda: True)
    assert late.rounds == 5
