"""Launch configurations of the Triton kernels that serve a call: those near pyfused's own, timed beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pyfused.choice.measured import Row
from pyfused.choice.order import Choice
from pyfused.tuner.clocks import Call, Clock
from pyfused.tuner.race import race
from pyfused.tuner.replay import Replay, further
from pyfused.tuner.ways import Part, by_name, call_of, without_own_rows


def faster(
    replay: Replay, part: Part, clocks: Mapping[str, Clock], left: Callable[[], float], known: set[str], date: str
) -> Iterator[Row]:
    """A row for each kernel of one direction of a call that another configuration makes faster.

    Those that differ from pyfused's own in one field are tried: each is one more kernel to compile.

    Args:
        replay: the call.
        part: its direction, and the plan of backend "triton" that serves it.
        clocks: by which configurations are compared.
        left: how many seconds there are still.
        known: what was compared before, and grows by what is compared now.
        date: recorded in the rows.
    """
    from pyfused.kernels import recording

    call = call_of(replay, part)
    with recording.forced({}) as found:
        call()
    for chosen in dict.fromkeys(found):
        where = recording.measured_for(chosen.arguments)
        key = repr((chosen.kernel, where))
        if key in known or left() < 0:
            continue
        known.add(key)
        with without_own_rows():
            own = recording.measured_or_own(chosen)
        # Compiling takes the longest; some time stays for the races.
        usable = [own, *_sound(replay, part, chosen, own, left, until=0.4 * left())]
        best, gain = own, 1.0
        # The second race is between two; what won the first by chance alone loses it.
        for again in (False, True):
            among = list(dict.fromkeys((own, best))) if again else usable
            if len(among) > 1:
                calls = {config: _inside(call, chosen, config) for config in among}
                outcome = race({config: {config: 1} for config in among}, calls, clocks, lambda: left() < 0)
                best, gain = outcome.winner, outcome.gain
        changed: dict[str, float] = dict(recording.differing(chosen.config(), best))
        if best != own and changed:
            name, dtype, rows, sizes = where
            capability = chosen.arguments["target"].capability
            source = {"date": date, "gain": round(gain, 3), "of": part.direction}
            yield Row(name, capability, chosen.kernel, dtype, rows, sizes, changed, source)


def _sound(replay: Replay, part: Part, chosen: Any, own: Any, left: Callable[[], float], until: float) -> Iterator[Any]:
    """Configurations that differ from ``own`` in one field, compile, and give the results that ``own`` gives.

    As many as are made while more than ``until`` seconds are left.
    """
    from pyfused.kernels import recording

    asked = by_name(Choice(part.backend, part.plan, part.plan))
    with recording.forced({chosen: own}):
        wanted = replay.results(**asked)
    for config in recording.neighbours(own):
        if len(recording.differing(own, config)) > 1 or left() < until:
            return
        why: str | None = "it does not compile, or takes more shared memory than there is"
        with contextlib.suppress(Exception), recording.forced({chosen: config}):
            why = further(replay.results(**asked), wanted, replay.exact)
        if why is None:
            yield config


def _inside(call: Call, chosen: Any, config: Any) -> Call:
    from pyfused.kernels import recording

    def run() -> object:
        with recording.forced({chosen: config}):
            return call()

    return run
