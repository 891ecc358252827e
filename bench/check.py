"""`pyfused check`: the parity rows alone, on every backend and plan that this machine has."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from pyfused import backend as backends
from pyfused.bench import parity
from pyfused.bench.cases import Case
from pyfused.bench.operators import parity_cases


def run(device: torch.device, threads: int | None = None, cases: Iterable[Case] | None = None) -> int:
    """Prints one line for each case, backend and plan.

    Args:
        device: where to compute.
        threads: CPU threads for torch; None keeps its own number.
        cases: what to compare; None (the default): `parity_cases`.

    Returns:
        The exit status: 1 when a result is further from float64 than its limit, else 0.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    failures = count = 0
    for name in backends.BACKENDS:
        reason = refusal(name, device)
        if reason is not None:
            print(f"skipped {name}: {reason}")
    for case in parity_cases(device) if cases is None else cases:
        for name in backends.BACKENDS:
            if refusal(name, device) is not None:
                continue
            for plan in case.plans(name):
                start = time.perf_counter()
                found = parity.check(case, device, backend=name, plan=plan)
                broken = [item for item in found if not item.passed]
                nearest = max(found, key=parity.strain)
                verdict = "FAILED" if broken else "ok"
                seconds = time.perf_counter() - start
                print(f"{verdict:7s}{case.name}, {name} {plan}: nearest {nearest} [{seconds:.1f} s]", flush=True)
                for item in broken:
                    print(f"       {item}")
                failures += bool(broken)
                count += 1
    print(f"{count - failures} of {count} as close to float64 as plain torch")
    return 1 if failures else 0


def refusal(backend: str, device: torch.device) -> str | None:
    """Why ``backend`` takes no part in a check on ``device``; None when it does."""
    if device.type == "cpu" and backend == "triton" and backends.TRITON_INTERPRETED:
        return "its interpreter is too slow for these shapes; the tests run it at small ones"
    return backends.refusal(backend, device, torch.float32)
