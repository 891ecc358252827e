"""`pyfused check`: the parity rows alone, on every backend and plan that this machine has."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from pyfused.bench.cases.case import Case, refusal
from pyfused.bench.cases.operators import parity_cases
from pyfused.bench.measure import parity
from pyfused.bench.run import selection
from pyfused.choice import backends


class Comparison(NamedTuple):
    """One case on one backend, in one plan."""

    case: Case
    backend: str
    plan: str

    def __str__(self) -> str:
        return f"{self.case.name}, {self.backend} {self.plan}"


def run(
    device: torch.device,
    threads: int | None = None,
    select: Sequence[str] = (),
    listing: bool = False,
    cases: Iterable[Case] | None = None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> int:
    """Prints how many comparisons there are, and one line for each: the verdict, or why its backend cannot compute it.

    Args:
        device: where to compute.
        threads: CPU threads for torch; None keeps its own number.
        select: texts of which a comparison has at least one in the name that is printed of it, in capitals or not.
            Empty (the default): all comparisons.
        listing: print the names, and compute nothing.
        cases: what to compare; None (the default): `parity_cases`.
        on_row: called with `named` and `judged` of each result, or with `named` of what is listed.

    Returns:
        The exit status: 1 when a result is further from float64 than its limit, 2 when a text of ``select`` names
        nothing, else 0.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    comparisons, absences = _comparisons(device, list(parity_cases(device) if cases is None else cases))
    try:
        chosen = selection.select(comparisons, select, lambda comparison: (str(comparison),))
    except selection.Unnamed as error:
        print(f"pyfused check: {error}", file=sys.stderr)
        return 2
    if listing:
        for each in chosen:
            print(each)
            on_row(named(each))
        return 0
    refusals = {each: refusal(each.case, device, each.backend, each.plan) for each in chosen}
    computed = [each for each, reason in refusals.items() if reason is None]
    skipped = [*absences, *(f"{each}: {reason}" for each, reason in refusals.items() if reason is not None)]
    print(*(f"skipped {line}" for line in skipped), f"{len(computed)} comparisons on {device}", sep="\n", flush=True)
    failures = 0
    for number, each in enumerate(computed, start=1):
        # Before it is computed, which may take seconds.
        print(f"{number:{len(str(len(computed)))}} of {len(computed)}  ", end="", flush=True)
        start = time.perf_counter()
        found = parity.check(each.case, device, backend=each.backend, plan=each.plan)
        broken = [item for item in found if not item.passed]
        nearest = max(found, key=parity.strain)
        seconds = time.perf_counter() - start
        print(f"{'FAILED' if broken else 'ok':7s}{each}: nearest {nearest} [{seconds:.1f} s]", flush=True)
        for item in broken:
            print(f"       {item}")
        on_row(named(each) | judged(found))
        failures += bool(broken)
    print(f"{len(computed) - failures} of {len(computed)} as close to float64 as plain torch")
    return 1 if failures else 0


def _comparisons(device: torch.device, cases: Sequence[Case]) -> tuple[list[Comparison], list[str]]:
    """What there is to compare, and which backends take no part, of all or of one operator, and why."""
    found, absences = [], {}
    for name in backends.BACKENDS:
        reason = absence(name, device)
        if reason is not None:
            absences[name] = reason
    for case in cases:
        for name in backends.BACKENDS:
            if name in absences:
                continue
            lacks = backends.refusal(name, device, torch.float16, case.operator)
            if lacks is None:
                found += [Comparison(case, name, plan) for plan in case.plans(name)]
            else:
                absences[f"{case.operator}, {name}"] = lacks
    return found, [f"{name}: {reason}" for name, reason in absences.items()]


def named(what: Comparison) -> dict[str, Any]:
    """What is compared, in values that JSON has."""
    return {"case": what.case.name, "operator": what.case.operator, "backend": what.backend, "plan": what.plan}


def judged(found: Sequence[parity.Deviation]) -> dict[str, Any]:
    """Whether all are within their limits, and the one that is nearest to its own."""
    return {"passed": all(item.passed for item in found)} | asdict(max(found, key=parity.strain))


def absence(backend: str, device: torch.device) -> str | None:
    """Why ``backend`` takes no part in a check on ``device``, whatever the case; None when it does."""
    # In float16, which every backend takes.
    reason = backends.refusal(backend, device, torch.float16)
    slow = {"triton": "interpreter", "cuda": "emulator"}
    if reason is None and device.type == "cpu" and backend in slow:
        return f"its {slow[backend]} is too slow for these shapes; the tests run it at small ones"
    return reason
