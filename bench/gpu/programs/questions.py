"""*Questions*: the five that decide what is built next, each answered by a line with the numbers behind it.

Whether our GEMM keeps up with the library, by pointers or by tensor descriptors; what float32 parameters cost; whether
plan "auto" beats plan "blas"; whether the order of two products matters to wgrad; what the host needs for a call.
Contenders take turns, in CUDA graphs; what gives other numbers prints no time. questions.json grows answer by answer.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyfused.bench.gpu.budget import Work
from pyfused.bench.gpu.programs import ahead
from pyfused.bench.gpu.programs.contests import Contest, Question, every_call, questions, scratch
from pyfused.bench.gpu.programs.outcomes import FAILED, PASSED, RUNNING, Outcomes, answers, arguments_of, go_on
from pyfused.bench.measure import timing
from pyfused.bench.record import rows
from pyfused.kernels import launch
from pyfused.kernels.recording import Target

# Of the time, what compiling ahead may take.
_AHEAD_SHARE = 0.4
# Of a result's norm: two roundings to 16 bits, of P and of the result, in either of two contenders.
_LARGEST_DIFFERENCE = 4 * torch.finfo(torch.bfloat16).eps
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 50
_CHARACTERS = 600


def work(target: Target) -> Work:
    """What the step does on such a GPU."""
    with scratch() as folder:
        found = questions(folder)
        contests = [contest for question in found for contest in question.contests(torch.device("meta"), target)]
        calls = (call for contest in contests for call in contest.calls.values())
        return Work(compilations=len(ahead.specialisations(calls, target)), rows=len(contests))


def difference(one: object, other: object) -> float:
    """The largest Frobenius norm of a difference between tensors in the same place, in units of the other's."""
    found = 0.0
    for mine, theirs in zip(_tensors(one), _tensors(other), strict=True):
        scale = torch.linalg.vector_norm(theirs, dtype=torch.float64).item() or 1.0
        apart = torch.linalg.vector_norm(mine.float() - theirs.float(), dtype=torch.float64).item() / scale
        # NaN is larger than any.
        found = max(found, apart if apart == apart else float("inf"))
    return found


def _tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [item for item in results if item is not None]


def measure(contest: Contest, device: torch.device, seconds: float, host: bool) -> dict[str, float]:
    """Contender -> seconds, medians over rounds that take about so long.

    Raises:
        ValueError: one gives other numbers than it must.
    """
    first, *others = contest.calls
    if contest.alike:
        # Kept apart from what the calls write, which may be the same memory in every call.
        expected = [tensor.clone() for tensor in _tensors((contest.expected or contest.calls[first])())]
        for name in others:
            apart = difference(contest.calls[name](), expected)
            if not apart <= _LARGEST_DIFFERENCE:
                raise ValueError(f"{name} is off by {apart:.2g} of the result, more than {_LARGEST_DIFFERENCE:.2g}")
        del expected
    graph = device.type == "cuda" and not host
    calls = {name: timing.captured(call) if graph else call for name, call in contest.calls.items()}
    clock = timing.HostClock(device, 50 if device.type == "cuda" else 2) if host else timing.clock_for(device, graph)
    rounds = timing.Interleaved({name: [call] for name, call in calls.items()}, first, clock)
    each = rounds.warm_up()
    for _ in range(timing.rounds_within(seconds, each, _LEAST_ROUNDS, _MOST_ROUNDS)):
        rounds()
    return rounds.medians()


def summary(numbers: Mapping[str, Mapping[str, float]]) -> str:
    """Of label -> contender -> seconds: what each contender takes in units of the first."""
    parts = []
    first, *others = next(iter(numbers.values()))
    for name in others:
        ratios = {label: seconds[name] / seconds[first] for label, seconds in numbers.items() if name in seconds}
        low, high = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
        range_ = f"{ratios[low]:.2f} ({low}) to {ratios[high]:.2f} ({high})" if low != high else f"{ratios[low]:.2f}"
        parts.append(f"{name}/{first} {range_}, median {statistics.median(ratios.values()):.2f}")
    return "; ".join(parts)


def host_summary(numbers: Mapping[str, Mapping[str, float]]) -> str:
    """Of operator -> eager and module -> seconds: both, and their ratio."""
    parts = []
    for seconds in numbers.values():
        (_, eager), (name, ours) = seconds.items()
        parts.append(f"{name} {1e6 * ours:.0f} us, eager {1e6 * eager:.0f} us ({ours / eager:.2f})")
    return "; ".join(parts)


def ask(question: Question, device: torch.device, target: Target, deadline: float, outcomes: Outcomes) -> bool:
    """Puts the answer into the record; False when the rest needs another process."""
    numbers: dict[str, dict[str, float]] = {}
    faults: list[str] = []
    usable = True
    began = time.monotonic()
    outcomes.put(question.name, RUNNING)
    count = sum(1 for _ in question.contests(torch.device("meta"), target))
    found, reached = question.contests(device, target), 0
    try:
        for reached in range(count):
            left = deadline - time.monotonic()
            if left <= 0:
                faults.append(f"no time was left for {count - reached} of {count}")
                break
            contest, label = None, f"number {reached + 1} of {count}"
            try:
                contest = next(found)
                label = contest.label
                # A third: the rest is capture, and setting up the next.
                numbers[label] = measure(contest, device, left / (count - reached) / 3, question.host)
            except Exception as error:
                faults.append(f"{label}: " + " ".join(f"{type(error).__name__}: {error}".split()))
                # Nothing more is captured in a process in which a capture failed.
                usable = not isinstance(error, timing.CaptureError) and answers(device)
                if contest is None or not usable:
                    break
    finally:
        found.close()
    told = (host_summary if question.host else summary)(numbers) if numbers else "not answered"
    status = FAILED if faults else PASSED
    outcomes.put(
        question.name, status, question=question.text, answer=told, faults=faults, seconds=numbers,
        mode="host time" if question.host else "graph replay" if device.type == "cuda" else "wall clock",
        took=round(time.monotonic() - began, 1), gpu=timing.gpu_state(device),
    )  # fmt: skip
    return usable


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every question is answered, else 1."""
    arguments = arguments_of("questions", __doc__, argv)
    device = torch.device(arguments.device)
    deadline = time.monotonic() + arguments.seconds
    try:
        made = rows.provenance(device, arguments.commit)
        outcomes = Outcomes(arguments.record / "questions.json", {"provenance": made})
    except (OSError, ValueError) as error:
        print(f"questions: {error}", file=sys.stderr)
        return 1
    target = launch.target(device)
    done = (PASSED, FAILED) if arguments.continued else (PASSED,)
    with scratch() as folder:
        found = questions(folder)
        left = [question for question in found if outcomes.status(question.name) not in done]
        if device.type == "cuda" and not arguments.continued:
            compiled = ahead.compile_ahead(
                ahead.specialisations(every_call(left, target), target), target, arguments.workers,
                _AHEAD_SHARE * arguments.seconds,
            )  # fmt: skip
            outcomes.tell(ahead=str(compiled))
            print(compiled, flush=True)
        with ahead.compilations() as late:
            for place, question in enumerate(left):
                now = time.monotonic()
                mine = now + (deadline - now) / (len(left) - place)
                if not ask(question, device, target, mine, outcomes):
                    break
            else:
                place = len(left)
        if device.type == "cuda":
            outcomes.tell(compiled_late=late)
        if place < len(left):
            rest = ["--seconds", f"{max(1.0, deadline - time.monotonic()):.1f}", "--device", arguments.device]
            rest += ["--commit", arguments.commit] if arguments.commit else []
            go_on("questions", ["--record", str(arguments.record), "--continued", *rest])
    return tell(found, outcomes, device)


def tell(found: Sequence[Question], outcomes: Outcomes, device: torch.device) -> int:
    """Prints a line for each question; the exit status."""
    print(f"questions, measured on {rows.device_name(device)}:")
    for number, question in enumerate(found, 1):
        item = outcomes.items.get(question.name, {})
        faults = item.get("faults", [])
        told = [f"{number}. {question.text} ({item.get('mode', 'not measured')}): {item.get('answer', 'not reached')}"]
        told += [f"FAILED {len(faults)}: {faults[0]}"] if faults else []
        print(". ".join(told)[:_CHARACTERS])
    return 0 if all(outcomes.status(question.name) == PASSED for question in found) else 1


if __name__ == "__main__":
    sys.exit(main())
