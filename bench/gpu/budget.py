"""What each step of `make gpu` costs, by counting what it does: a model, which no clock of a GPU has confirmed.

`AT_MOST` is what a step may do. tests/gpu/test_gpu_budget.py counts what it would do, by the keys that Triton
specialises kernels for, the numbers drawn, the tests selected and the rows timed, and fails where that is more, or
where the seconds that follow are more than the step's share.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What a step does.

    Attributes:
        compilations: of Triton kernels, distinct by what they are specialised for.
        numbers: random numbers that one CPU thread draws; those drawn on the device cost nothing beside them.
        cases: tests, or calls that are compared.
        rows: timed.
        compiled: programs that torch.compile makes.
        models: trained or timed as a whole.
    """

    compilations: int = 0
    numbers: int = 0
    cases: int = 0
    rows: int = 0
    compiled: int = 0
    models: int = 0


@dataclass(frozen=True)
class Cost:
    """Seconds of each.

    Attributes:
        start: of Python, torch and what the step imports, once for a step.
        collected: one test that pytest finds, whether it is selected or not.
        compilation: a core's, with a cold cache and the C launcher that Triton 3.6 compiles for each signature.
        number: of N(0, 1), drawn by one CPU thread.
        case, sanitized: a test or a compared call; the same under compute-sanitizer.
        row: what a timed row takes besides its rounds: capture, warm-up, memory, file.
        compiled: a program of torch.compile, forward and backward.
        model: setting up a whole model, its gate and what it is compared with.
    """

    start: float = 10.0
    collected: float = 0.0015
    # triton 3.6.0 on one core of an AMD EPYC, CPU time, eleven kernels of LoRA and adapter, 2026-11-28.
    compilation: float = 1.8
    # torch 2.13 on one core of an AMD EPYC, at best, 2026-11-28.
    number: float = 16e-9
    case: float = 0.1
    sanitized: float = 0.5
    row: float = 0.4
    compiled: float = 4.0
    model: float = 8.0


COST = Cost()
# Distinct compilations for a test of Triton's backend: 1,501 in the 601 of the four operators' own files (counted by
# specialisation key for compute capability 9.0, 2026-11-28).
COMPILATIONS_PER_TEST = 2.5


def seconds(work: Work, compilers: int = 1, runners: int = 1, cost: Cost = COST) -> float:
    """What a step takes, by the model.

    Args:
        work: of the step.
        compilers: processes that compile at once.
        runners: processes that run its cases at once.
        cost: of each piece of work.
    """
    one_after_another = work.numbers * cost.number + work.rows * cost.row + work.models * cost.model
    together = work.compilations * cost.compilation / compilers + work.compiled * cost.compiled / runners
    return cost.start + one_after_another + together + work.cases * cost.case / runners
