"""`pyfused check`: the parity rows alone, on every backend and plan that this machine has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from pyfused.bench.cases.case import Case, refusal
from pyfused.bench.cases.operators import parity_cases
from pyfused.bench.measure import parity
from pyfused.choice import backends


def run(
    device: torch.device,
    threads: int | None = None,
    cases: Iterable[Case] | None = None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> int:
    """Prints one line for each case, backend and plan: the verdict, or why that backend cannot compute it.

    Args:
        device: where to compute.
        threads: CPU threads for torch; None keeps its own number.
        cases: what to compare; None (the default): `parity_cases`.
        on_row: called with `named` and `judged` of each result.

    Returns:
        The exit status: 1 when a result is further from float64 than its limit, else 0.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    failures = count = 0
    present = []
    for name in backends.BACKENDS:
        reason = absence(name, device)
        if reason is None:
            present.append(name)
        else:
            print(f"skipped {name}: {reason}")
    lacking: set[tuple[str, str]] = set()
    for case in parity_cases(device) if cases is None else cases:
        for name in present:
            lacks = backends.refusal(name, device, torch.float16, case.operator)
            if lacks is not None:
                if (case.operator, name) not in lacking:
                    print(f"skipped {case.operator}, {name}: {lacks}", flush=True)
                lacking.add((case.operator, name))
                continue
            for plan in case.plans(name):
                reason = refusal(case, device, name, plan)
                if reason is not None:
                    print(f"skipped {case.name}, {name} {plan}: {reason}", flush=True)
                    continue
                start = time.perf_counter()
                found = parity.check(case, device, backend=name, plan=plan)
                broken = [item for item in found if not item.passed]
                nearest = max(found, key=parity.strain)
                verdict = "FAILED" if broken else "ok"
                seconds = time.perf_counter() - start
                print(f"{verdict:7s}{case.name}, {name} {plan}: nearest {nearest} [{seconds:.1f} s]", flush=True)
                for item in broken:
                    print(f"       {item}")
                on_row(named(case, name, plan) | judged(found))
                failures += bool(broken)
                count += 1
    print(f"{count - failures} of {count} as close to float64 as plain torch")
    return 1 if failures else 0


def named(case: Case, backend: str, plan: str) -> dict[str, Any]:
    """What was compared, in values that JSON has."""
    return {"case": case.name, "operator": case.operator, "backend": backend, "plan": plan}


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
