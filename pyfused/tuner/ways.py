"""What may serve a call: pyfused's own choice, and the backends and plans that are compared with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pyfused.choice import backends, measured, order
from pyfused.choice.costs import LIBRARY
from pyfused.choice.order import Choice
from pyfused.ops.decision import Decision
from pyfused.tuner.clocks import Call
from pyfused.tuner.recorder import Count
from pyfused.tuner.replay import Replay, further
from pyfused.tuner.report import named


class Part(NamedTuple):
    """One direction of one call by one backend and plan."""

    call: int
    backend: str
    plan: str
    direction: str


@contextlib.contextmanager
def without_own_rows() -> Iterator[None]:
    """Inside, pyfused chooses as it does without the user's rows."""
    own = measured.own
    measured.use(())
    try:
        yield
    finally:
        measured.use(own)


def chosen_by(told: Decision) -> Choice:
    """What an operator chose, by the names that a row has for it."""
    return Choice(told.backend, told.plan, told.plan) if told.rivals else told.choice


def row_key(told: Decision) -> tuple[str, int, dict[str, object]]:
    """(subject, M, sizes) by which a measured row decides such a call."""
    if told.rivals and told.call_sizes is not None:
        return told.operator, int(told.call_sizes["M"]), order.others(told.call_sizes)
    return told.kernels, int(told.sizes["M"]), order.others(told.sizes)


def choices(untuned: Decision, replay: Replay) -> Iterator[Choice]:
    """What may serve a call, pyfused's own choice first."""
    own = chosen_by(untuned)
    yield own
    if untuned.rivals:
        for plan in untuned.rivals:
            told = untuned if plan == untuned.plan else replay.decided(plan=plan)
            for backend in _available(told):
                if (backend, plan) != own[:2]:
                    yield Choice(backend, plan, plan)
        return
    for backend, plans in _available(untuned).items():
        for forward in plans:
            for backward in plans:
                if (backend, forward, backward) != own:
                    yield Choice(backend, forward, backward)


def library_choice(usable: Sequence[Choice]) -> Choice | None:
    """The choice that leaves the products to the library, as the eager formula does; None where none does.

    Of several the one whose backend is that of the first, pyfused's own choice.
    """
    found = [choice for choice in usable if {(choice.backend, plan) for plan in choice[1:]} <= LIBRARY]
    return min(found, key=lambda choice: choice.backend != usable[0].backend, default=None)


def _available(told: Decision) -> order.Candidates:
    found = backends.available(told.device, told.dtype, told.kernels, told.limits, told.plans)
    return {name: plans for name, plans in found.items() if backends.DEFAULT_BACKEND in ("auto", name)}


def nothing_to_compare(told: Decision) -> str:
    """Why; "" where there is something."""
    asked = dict(told.arguments)
    if told.device.type not in ("cpu", "cuda"):
        return f"no clock for device type {told.device.type!r}"
    if asked["backend"] != "auto":
        return "backend asked for by name"
    if asked.get("plan", "auto") != "auto" and told.plans is not backends.NO_PLANS:
        return "plan asked for by name"
    if row_key(told)[1] < 1:
        return "no rows"
    if not told.rivals and sum(len(plans) ** 2 for plans in _available(told).values()) < 2:
        return "one plan serves it"
    return ""


def parts_of(index: int, choice: Choice, count: Count) -> dict[Part, int]:
    """What serving a call so is made of, and how often."""
    parts = {Part(index, choice.backend, choice.forward, "forward"): count.forward}
    if count.backward:
        parts[Part(index, choice.backend, choice.backward, "backward")] = count.backward
    return parts


def call_of(replay: Replay, part: Part) -> Call:
    make = replay.forward if part.direction == "forward" else replay.backward
    return make(part.backend, part.plan)


def alike(replays: Sequence[Replay], every: Sequence[Choice]) -> tuple[list[Choice], tuple[tuple[str, str], ...]]:
    """(those of the choices whose results are those of pyfused's own, the first; the others with why not)."""
    own = every[0]
    wanted = [replay.results(**by_name(own)) for replay in replays]
    wrong: dict[tuple[str, str], str] = {}
    ways = dict.fromkeys((choice.backend, plan) for choice in every for plan in choice[1:])
    for backend, plan in ways:
        if (backend, plan, plan) == own:
            continue
        try:
            for replay, right in zip(replays, wanted, strict=True):
                why = further(replay.results(**by_name(Choice(backend, plan, plan))), right, replay.exact)
                if why is not None:
                    wrong[backend, plan] = why
                    break
        except Exception as error:
            # Whatever a candidate raises, pyfused's own choice serves the call.
            wrong[backend, plan] = first_line(error)
    usable = [
        choice for choice in every if choice == own or not any((choice.backend, plan) in wrong for plan in choice[1:])
    ]
    return usable, tuple((named(Choice(*way, way[1])), why) for way, why in wrong.items())


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def by_name(choice: Choice) -> dict[str, object]:
    """The arguments that ask for a choice by name, as far as they can: both directions have one plan then."""
    return {"backend": choice.backend, **({"plan": choice.forward} if choice.forward else {})}
