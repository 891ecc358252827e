"""The speed rows in a given time: compiles their kernels on all cores first, then measures, most wanted first.

``python -m pyfused.bench.gpu.programs.speed --record DIRECTORY --seconds S`` adds rows to the record's rows.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from pyfused.bench.cases import operators
from pyfused.bench.cases.case import triton_calls
from pyfused.bench.gpu.budget import Work
from pyfused.bench.gpu.programs import ahead
from pyfused.bench.gpu.programs.outcomes import go_on
from pyfused.bench.record.rows import RowFile
from pyfused.bench.run.session import Settings
from pyfused.kernels.launch import target
from pyfused.kernels.recording import Target

_SELECT = ("test_machine", "test_operators", "test_overhead", "test_compiled")
# Rows beside four of each case: of the machine and of host time. What compiling ahead and the rounds may take of the
# time; the rest is for tensors, gates, captures and what is compared with.
_OTHERS, _AHEAD, _ROUNDS = 15, 0.3, 0.35
# Seconds of one row's rounds, however many are left.
_LONGEST = 4.0


def calls(device: torch.device) -> Iterator[Callable[[], object]]:
    """Those of every timed case and plan, on meta tensors, for `ahead.specialisations`."""
    for case in (*operators.timed_cases(device), *operators.tiny_cases(device)):
        for plan, call in triton_calls(case):
            yield ahead.launching(call, plan)


def work(target: Target) -> Work:
    """What the step does on such a GPU; its data are drawn there."""
    device = torch.device("cuda")
    compiled = len(operators.compiled_cases(device))
    rows = 4 * len(operators.timed_cases(device)) + compiled + _OTHERS
    return Work(compilations=len(ahead.specialisations(calls(device), target)), rows=rows, compiled=compiled)


def main(argv: Sequence[str] | None = None) -> int:
    """`pyfused bench`'s exit status."""
    parser = argparse.ArgumentParser(prog="python -m pyfused.bench.gpu.programs.speed", description=__doc__)
    parser.add_argument("--record", type=Path, required=True, metavar="DIRECTORY", help="whose rows.json gets the rows")
    parser.add_argument("--seconds", type=float, required=True, help="for all of it")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that compile")
    parser.add_argument("--restarts", type=int, default=3, help="in a new process, after a capture that failed")
    parser.add_argument("--commit", metavar="HASH", help="the commit to record where the checkout has no .git")
    arguments = parser.parse_args(argv)
    began, device = time.monotonic(), torch.device("cuda")
    here = target(device)
    launches = ahead.specialisations(calls(device), here)
    print(ahead.compile_ahead(launches, here, arguments.workers, _AHEAD * arguments.seconds), flush=True)

    from pyfused.bench.run.command import SPOILED, run

    left = arguments.seconds - (time.monotonic() - began)
    measured = len(RowFile(arguments.record).rows)
    rows = max(1, 4 * len(operators.timed_cases(device)) + _OTHERS - measured)
    settings = Settings(
        device, seconds_per_row=min(_LONGEST, max(0.1, _ROUNDS * left / rows)), commit=arguments.commit,
        record=arguments.record, attempts=1, targets=True,
    )  # fmt: skip
    status = run(settings, _SELECT)
    if status != SPOILED or arguments.restarts < 1:
        return status
    rest = ["--record", str(arguments.record), "--workers", str(arguments.workers)]
    rest += ["--seconds", f"{max(1.0, arguments.seconds - (time.monotonic() - began)):.1f}"]
    rest += ["--restarts", str(arguments.restarts - 1), *(["--commit", arguments.commit] if arguments.commit else [])]
    go_on("speed", rest)


if __name__ == "__main__":
    sys.exit(main())
