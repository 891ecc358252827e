"""The rule by which a plan is taken where nothing was measured: bounded regret.

A candidate takes between its fast and its slow time; which, nobody knows. Its regret is what it may lose to another
candidate, as a share of the other's time. Of those that cannot lose to the eager formula, by more than `BOUND`, the one
of least regret at its worst is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from typing import NamedTuple, TypeVar

_Name = TypeVar("_Name", bound=Hashable)

# How much of the eager formula's time a plan may take at its worst.
BOUND = 1.03


class Times(NamedTuple):
    """Of a candidate, in any one unit: at the least and at the greatest efficiency of its kernels."""

    slow: float
    fast: float


def regret(name: _Name, candidates: Mapping[_Name, Times], *, together: bool) -> float:
    """The most that ``name`` may lose to another, as a share of the other's time; 0 where it loses to none.

    Args:
        name: one of ``candidates``.
        candidates: name -> times.
        together: their kernels are efficient or not at the same time, as variants of one kernel are; otherwise one may
            be slow while another is fast.
    """
    own = candidates[name]

    def lost(other: Times) -> float:
        if together:
            return max(own.slow / other.slow, own.fast / other.fast)
        return own.slow / other.fast

    return max(0.0, *(lost(times) - 1.0 for other, times in candidates.items() if other != name), 0.0)


def feasible(candidates: Mapping[_Name, Times], eager: float, library: Collection[_Name]) -> set[_Name]:
    """Those that are bounded against the eager formula, and the library's plans: always.

    A plan that is no slower than the library's is no risk beside it, even where that is slower than eager.
    """
    bound = BOUND * max(eager, min((candidates[name].slow for name in candidates if name in library), default=0.0))
    return {name for name, times in candidates.items() if times.slow <= bound or name in library}


def ranked(candidates: Mapping[_Name, Times], allowed: Collection[_Name], *, together: bool) -> list[_Name]:
    """The best first: those allowed before all others, then by regret; of equals the one that is given first."""
    return sorted(
        candidates,
        key=lambda name: (name not in allowed, regret(name, candidates, together=together)),
    )
