"""Which of several ways to serve a call is the fastest: rounds in which each is timed beside the others.

The first contender is pyfused's own choice, and wins unless another takes less time by `LEAST_GAIN`. To the one that
leaves the products to the library it loses by any difference: that one is no risk. What a contender takes is a sum over
parts, each timed once for all contenders that share it.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pyfused.tuner.clocks import Call, Clock

Contender = TypeVar("Contender", bound=Hashable)
Part = TypeVar("Part", bound=Hashable)
# Clock -> part -> seconds.
Seconds = Mapping[str, Mapping[Part, float]]

# What is so many times as fast as pyfused's own choice takes its place: less is noise.
LEAST_GAIN = 1.03
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 60
# Calls before any time counts: a kernel is compiled by the first, its program is there from the third on.
_WARM_UP = 3
# What takes so many times as long as who would win now, by all clocks together, is timed no further.
_HOPELESS = 1.25


@dataclass(frozen=True)
class Outcome(Generic[Contender]):
    """How a race ended.

    Attributes:
        winner: the first contender, or one that gained over it.
        gain: the first contender's time over the winner's, the sum of all clocks.
        seconds: contender -> seconds, the mean of all clocks; of those that were not given up.
        rounds: how many there were.
    """

    winner: Contender
    gain: float
    seconds: Mapping[Contender, float]
    rounds: int


def taken(parts: Mapping[Part, int], seconds: Mapping[Part, float]) -> float:
    """What a contender takes: the sum of its parts, each as often as it is there."""
    return sum(often * seconds[part] for part, often in parts.items())


def winner(
    contenders: Mapping[Contender, Mapping[Part, int]], seconds: Seconds, library: Contender | None = None
) -> tuple[Contender, float]:
    """(the contender to take, what it gains): the first, unless another gains `LEAST_GAIN` and loses by no clock, or
    the library's takes less time."""
    first = next(iter(contenders))
    times = {name: [taken(parts, each) for each in seconds.values()] for name, parts in contenders.items()}
    best, most = first, 1.0
    for name, own in times.items():
        gain = sum(times[first]) / max(sum(own), 1e-12)
        loses = any(mine > firsts for mine, firsts in zip(own, times[first], strict=True))
        if gain > most and (name == library or (gain >= LEAST_GAIN and not loses)):
            best, most = name, gain
    return best, most


def race(
    contenders: Mapping[Contender, Mapping[Part, int]],
    calls: Mapping[Part, Call],
    clocks: Mapping[str, Clock],
    out_of_time: Callable[[], bool] = lambda: False,
    library: Contender | None = None,
) -> Outcome[Contender]:
    """Times all contenders in rounds, each in a random order that is the same in every run.

    It ends as soon as more rounds would not change who wins, or the time is out.

    Args:
        contenders: name -> part -> how often it is there; pyfused's own choice first.
        calls: part -> what is timed.
        clocks: name -> clock; each times every part in every round.
        out_of_time: whether to end, after the least number of rounds.
        library: the contender that leaves the products to the library; None (the default) where none does.
    """
    for call in calls.values():
        for _ in range(_WARM_UP):
            call()
    order = random.Random(0)
    first = next(iter(contenders))
    alive = dict(contenders)
    rounds: dict[str, dict[Part, list[float]]] = {name: {part: [] for part in calls} for name in clocks}
    count = 0
    while True:
        wanted = [part for part in calls if any(part in parts for parts in alive.values())]
        for name, clock in clocks.items():
            shuffled = order.sample(wanted, len(wanted))
            for part, seconds in clock.round({part: calls[part] for part in shuffled}).items():
                rounds[name][part].append(seconds)
        count += 1
        if count < _LEAST_ROUNDS:
            continue
        medians = {name: {part: statistics.median(each[part]) for part in wanted} for name, each in rounds.items()}
        alive = _hopeful(alive, medians, library)
        if count >= _MOST_ROUNDS or out_of_time() or _decided(alive, first, rounds, library):
            break
    best, gain = winner(alive, medians, library)
    mean = {name: sum(taken(parts, each) for each in medians.values()) / len(clocks) for name, parts in alive.items()}
    return Outcome(best, gain, mean, count)


def _hopeful(
    alive: Mapping[Contender, Mapping[Part, int]], medians: Seconds, library: Contender | None
) -> dict[Contender, Mapping[Part, int]]:
    """Without those that are far behind who would win now; the first always stays.

    Not behind the best by each clock: that one may lose by another clock, and never win.
    """
    total = {name: sum(taken(parts, each) for each in medians.values()) for name, parts in alive.items()}
    first, (best, _) = next(iter(alive)), winner(alive, medians, library)
    return {name: parts for name, parts in alive.items() if name == first or total[name] <= _HOPELESS * total[best]}


def _decided(
    alive: Mapping[Contender, Mapping[Part, int]],
    first: Contender,
    rounds: Mapping[str, Mapping[Part, Sequence[float]]],
    library: Contender | None,
) -> bool:
    """Whether the middle half of the rounds agrees on each contender: it gains enough, or it does not."""

    def each_round(parts: Mapping[Part, int]) -> list[float]:
        count = min(len(times) for by_part in rounds.values() for part, times in by_part.items() if part in parts)
        return [
            sum(often * by_part[part][index] for by_part in rounds.values() for part, often in parts.items())
            for index in range(count)
        ]

    own = each_round(alive[first])
    for contender, parts in alive.items():
        if contender == first:
            continue
        gains = sorted(mine / max(other, 1e-12) for mine, other in zip(own, each_round(parts), strict=False))
        low, high = gains[len(gains) // 4], gains[-1 - len(gains) // 4]
        if low < (1.0 if contender == library else LEAST_GAIN) <= high:
            return False
    return True
