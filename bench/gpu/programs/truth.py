"""*Truth*: does each kernel of each backend give the right numbers on this machine?

Each call of `truth_cases` is held to float64 by the rule of `measure.parity`, its memory poisoned with NaN, and made
twice, to the same bits. What Triton has to compile for that is compiled ahead, by all cores. truth.json grows call by
call; what passed is not done again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence

# Deterministic cuBLAS, which the poisoning switches on, wants a workspace of its own.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from torch import Tensor

from pyfused.bench.cases.case import normal
from pyfused.bench.gpu.budget import Work
from pyfused.bench.gpu.programs import ahead
from pyfused.bench.gpu.programs.outcomes import FAILED, PASSED, RUNNING, SKIPPED, Outcomes, answers, arguments_of, go_on
from pyfused.bench.gpu.programs.truth_cases import Call, calls, results
from pyfused.bench.measure import parity
from pyfused.bench.record import rows
from pyfused.choice import backends
from pyfused.kernels import launch
from pyfused.kernels.recording import Target

# Of the time, what compiling ahead may take.
_AHEAD_SHARE = 0.6
_CHARACTERS = 300


def compiled(call: Call) -> bool:
    """Whether Triton may have to compile for it: "auto" chooses by the GPU."""
    return call.backend in ("triton", "auto")


def specialisations(chosen: Sequence[Call], target: Target) -> dict[ahead.Key, ahead.Launch]:
    return ahead.specialisations([call.launches() for call in chosen if compiled(call)], target)


def work(target: Target) -> Work:
    """What the step does on such a GPU."""
    everything = calls()
    return Work(compilations=len(specialisations(everything, target)), cases=len(everything))


def judged(call: Call, device: torch.device) -> tuple[str | None, float]:
    """(why the call's numbers are wrong, None when they are right; the largest error in units of its limit)."""
    tensors, options = call.drawn(device)
    plainest = call.reference()
    drawn: Tensor | None = None

    def cotangent(y: Tensor) -> Tensor:
        nonlocal drawn
        if drawn is None:
            drawn = normal(device, 1)(tuple(y.shape), 1.0, y.dtype)
        if y.shape != drawn.shape:
            raise ValueError(f"y must have shape {tuple(drawn.shape)}, got {tuple(y.shape)}")
        return torch.empty_like(y).copy_(drawn)

    plain = results(plainest, tensors, options, cotangent)
    wide = {
        name: None if value is None else value.detach().double().requires_grad_(value.requires_grad)
        for name, value in tensors.items()
    }
    exact = results(plainest, wide, options, cotangent)
    first, second = (results(call.ours(), tensors, options, cotangent) for _ in range(2))
    wrong = [
        f"{name} has dtype {first[name].dtype}, not {value.dtype}"
        for name, value in plain.items()
        if first[name].dtype != value.dtype
    ]
    found = parity.deviations(first, plain, exact, call.dtype)
    wrong += [str(item) for item in found if not item.passed]
    wrong += [f"{name} has other bits the second time" for name in first if not _same_bits(first[name], second[name])]
    return "; ".join(wrong) or None, max(map(parity.strain, found))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory holds NaN until it is written."""
    enabled = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # Only the filling is wanted: an operator without a deterministic form may still run.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled[0], warn_only=enabled[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def refusal(call: Call, device: torch.device) -> str | None:
    """Why the call cannot be made here; None when it can."""
    if call.backend == "auto":
        return None
    return backends.refusal(call.backend, device, call.dtype, call.operator)


def run(chosen: Sequence[Call], outcomes: Outcomes, device: torch.device, deadline: float) -> bool:
    """Makes the calls; False as soon as the GPU no longer answers, as after an access beyond its memory."""
    with poisoned(), ahead.compilations() as late:
        # What an earlier run did not come back from waits until all else is done.
        for call in sorted(chosen, key=lambda call: outcomes.status(call.name) == RUNNING):
            if time.monotonic() > deadline:
                break
            outcomes.put(call.name, RUNNING)
            began, strain = time.monotonic(), None
            try:
                reason, strain = judged(call, device)
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
            took = {"seconds": round(time.monotonic() - began, 3), "error_by_limit": strain and f"{strain:.3g}"}
            if reason is None:
                outcomes.put(call.name, PASSED, **took)
            else:
                outcomes.put(call.name, FAILED, **took, reason=reason)
            if reason is not None and not answers(device):
                return False
        outcomes.tell(compiled_late=dict(collections.Counter(late)))
    return True


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    return arguments_of("truth", __doc__, argv, select="only calls whose names contain this")


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every call passed or was skipped with a reason, else 1."""
    arguments = _arguments(argv)
    began, device = time.monotonic(), torch.device(arguments.device)
    deadline = began + arguments.seconds
    chosen = [call for call in calls() if arguments.select in call.name]
    if not chosen:
        print(f"truth: no call's name contains {arguments.select!r}", file=sys.stderr)
        return 1
    try:
        outcomes = Outcomes(arguments.record / "truth.json", {"provenance": rows.provenance(device, arguments.commit)})
    except (OSError, ValueError) as error:
        print(f"truth: {error}", file=sys.stderr)
        return 1
    done = (PASSED, FAILED) if arguments.continued else (PASSED,)
    left = []
    for call in chosen:
        reason = refusal(call, device)
        if reason is not None:
            outcomes.put(call.name, SKIPPED, reason=reason)
        elif outcomes.status(call.name) not in done:
            left.append(call)
    if device.type == "cuda" and not arguments.continued:
        target = launch.target(device)
        found = ahead.compile_ahead(
            specialisations(left, target), target, arguments.workers, _AHEAD_SHARE * arguments.seconds
        )  # fmt: skip
        outcomes.tell(ahead=str(found))
        print(found, flush=True)
    if not run(left, outcomes, device, deadline):
        rest = ["--seconds", f"{max(1.0, deadline - time.monotonic()):.1f}", "--device", arguments.device]
        rest += ["--commit", arguments.commit] if arguments.commit else []
        go_on("truth", ["--record", str(arguments.record), "-k", arguments.select, "--continued", *rest])
    return tell(chosen, outcomes, device, time.monotonic() - began)


def tell(chosen: Sequence[Call], outcomes: Outcomes, device: torch.device, seconds: float) -> int:
    """Prints what became of the calls, what failed last; the exit status."""
    count = collections.Counter(outcomes.status(call.name) for call in chosen)
    skipped = {call.backend: outcomes.items[call.name]["reason"] for call in chosen
               if outcomes.status(call.name) == SKIPPED}  # fmt: skip
    failed = [call.name for call in chosen if outcomes.status(call.name) == FAILED]
    missing = len(chosen) - count[PASSED] - count[SKIPPED] - count[FAILED]
    late = outcomes.facts.get("compiled_late")
    if device.type == "cuda" and late:
        print(f"compiled in the run, not ahead: {late}")
    for backend, reason in skipped.items():
        print(f"skipped: {backend}: {reason}")
    print(
        f"truth on {rows.device_name(device)}: {count[PASSED]} of {len(chosen)} calls passed, "
        f"{count[SKIPPED]} skipped, {len(failed)} failed, {missing} not reached, in {seconds:.0f} s"
    )
    for name in failed:
        print(f"FAILED {name}: {outcomes.items[name]['reason']}"[:_CHARACTERS])
    return 1 if failed or missing else 0


if __name__ == "__main__":
    sys.exit(main())
