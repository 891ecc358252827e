"""Which backend "auto" takes for a call, and which plan each direction has: measured, or else by bounded regret.

The choice is a pure function of the operator, the GPU, dtypes and sizes: the same call gets the same plan. Sizes meet
in buckets, so that traced code compiles again only where the choice changes.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from pyfused.choice import measured, rule
from pyfused.choice.costs import LIBRARY, works
from pyfused.choice.rates import band
from pyfused.choice.rule import Times


class Choice(NamedTuple):
    """A backend, and the plan of each direction there; "" where the operator's plans do not differ in time."""

    backend: str
    forward: str
    backward: str


# Backend -> the plans that may serve the call there, of the backends that can.
Candidates = Mapping[str, Sequence[str]]
# The same, and sizes, as constants that a cache takes.
_Plans = tuple[tuple[str, tuple[str, ...]], ...]
_Sizes = tuple[tuple[str, float], ...]

# Sizes that kernels pad to powers of two from 16 on, and those that they cut into tiles.
_PADDED = ("R", "h", "J")
_WIDE = ("N", "K", "C")
# The widest middle with which the C++ kernels for CPUs were measured to be no slower than products of the library.
_WIDEST_ON_A_CPU = 512
# Rows are told apart up to here; a program that is exported for any number of rows is planned for `_EXPORTED`.
_MOST_ROWS, _EXPORTED = 1 << 31, 1 << 13


def choose(
    operator: str, device: torch.device, dtype: torch.dtype, sizes: Mapping[str, float], candidates: Candidates
) -> Choice:
    """What serves a call on a GPU: by a measured row, or else by the times that arithmetic gives.

    Args:
        operator: whose kernels serve the call.
        device, dtype: of the tensors.
        sizes: M, and all else that the choice depends on: N, K, R, dropout_p, weight_bytes, adapter_bytes, tma of
            "lora_linear" and "mixed_lora_linear"; C, h, dropout_p, weight_bytes, cuda_rows of "adapter_residual"; C, J,
            dropout_p, norm_match, cuda_rows of "cross_attention_residual"; K, C, norm_match of "projection_residual".
            ``cuda_rows`` is `cuda_limits.cuda_rows`; ``weight_bytes`` and ``adapter_bytes`` are of one element of the
            weight, or of a parameter that is trained, as the call has it: a wider one is converted; ``tma`` is 1 where
            x, the weight and y lie in rows as tensor descriptors ask.
        candidates: the backends that can serve the call, and their plans.
    """
    found, left = by_row(operator, device, dtype, sizes, candidates)
    return found or by_times(operator, torch.cuda.get_device_capability(device), dtype, sizes, left)


def by_row(
    operator: str, device: torch.device, dtype: torch.dtype, sizes: Mapping[str, float], candidates: Candidates
) -> tuple[Choice | None, Candidates]:
    """What a row measured on this machine for such sizes decides: all of the choice, or the candidates that it leaves.

    It decides between the backends, and between the plans where it names them; arguments as `choose` has them.
    """
    row = measured_row(operator, device, dtype, sizes)
    if row is not None:
        name = next((name for name in row.found if name in candidates), None)
        if name is not None and name not in row.plans:
            return None, {name: candidates[name]}
        if name is not None and all(plan in candidates[name] for plan in row.plans[name]):
            return Choice(name, *row.plans[name]), candidates
        # Else a plan was asked for by name, and the row knows others.
    return None, candidates


def slow_on_a_cpu(sizes: Mapping[str, float]) -> str:
    """Why "auto" leaves a call of such sizes to portable on a CPU; "" where the kernels for CPUs are the faster."""
    if sizes.get("h", 0) <= _WIDEST_ON_A_CPU:
        return ""
    return f"beyond h = {_WIDEST_ON_A_CPU} the library's products are faster"


def by_times(
    operator: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    sizes: Mapping[str, float],
    candidates: Candidates,
) -> Choice:
    """What serves a call on a GPU of this capability, by arithmetic; arguments as `choose` has them."""
    rows = _EXPORTED if torch.compiler.is_exporting() else sizes["M"]
    plans = tuple([(name, tuple(each)) for name, each in candidates.items()])
    if not torch.compiler.is_compiling():
        return _decided(operator, capability, dtype.itemsize, _bucketed(sizes), _stands_for(rows), plans)
    for most, choice in _choices(operator, capability, dtype.itemsize, _bucketed(sizes), plans):
        if rows <= most:
            return choice
    raise AssertionError("the last choice holds for any number of rows")


def measured_row(
    operator: str, device: torch.device, dtype: torch.dtype, sizes: Mapping[str, float]
) -> measured.Row | None:
    """The row that decides between the backends of such a call."""
    if not measured.TABLE.rows:
        return None
    name, kind = device_name(device), str(dtype).removeprefix("torch.")
    return measured.TABLE.nearest(name, operator, kind, sizes["M"], others(sizes))


def measured_plan(
    operator: str, device: torch.device, dtype: torch.dtype, sizes: Mapping[str, float], backend: str
) -> tuple[Choice, measured.Row] | None:
    """What serves a call by a measured row, and the row, of an operator that has its plan before its backend; None
    where no row knows.

    Args:
        operator, device, dtype: as `choose` has them.
        sizes: M, and all else that the choice between the plans depends on.
        backend: the one that was asked for, or "auto".
    """
    row = measured_row(operator, device, dtype, sizes)
    if row is None:
        return None
    for name in row.found:
        if backend in (name, "auto") and name in row.plans:
            return Choice(name, *row.plans[name]), row
    return None


def device_name(device: torch.device) -> str:
    """By which rows measured there are found."""
    if device.type == "cpu":
        return _cpu_name()
    return torch.cuda.get_device_properties(device).name


def _cpu_name() -> str:
    threads = torch.get_num_threads()
    return f"{cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"


# A constant to traced code; see `_choices`.
vars(_cpu_name)["_dynamo_marked_constant"] = True


@functools.cache
def cpu_model() -> str:
    """The processor's name, and the vectors that torch uses there: one name may stand for several generations."""
    name = platform.processor() or platform.machine() or "CPU"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            field, _, value = line.partition(":")
            if field.strip() == "model name":
                name = value.strip()
                break
    vectors = torch.backends.cpu.get_cpu_capability()
    return name if vectors in ("DEFAULT", "NO AVX") else f"{name} ({vectors})"


def told_row(row: measured.Row) -> str:
    """What a row of an operator says, in words."""
    times = []
    for name, time in row.found.items():
        plans = " / ".join(dict.fromkeys(row.plans.get(name, ())))
        times.append(f"{name}{f' {plans}' if plans else ''} {time:.1f} us")
    return f"measured at M = {row.rows}: {', '.join(times)}"


def others(sizes: Mapping[str, float]) -> dict[str, object]:
    """By which of these sizes, besides M, a measured row is found."""
    return {name: value for name, value in sizes.items() if name != "M"}


def _bucketed(sizes: Mapping[str, float]) -> _Sizes:
    """All but M, so that sizes near each other are one: not by bits, which a traced size has not."""
    return tuple([(name, _bucket(name, value)) for name, value in sizes.items() if name != "M"])


def _bucket(name: str, size: float) -> float:
    """A wide size rounded up to a sixteenth of a power of two, any other to a power of two, as kernels pad narrow ones;
    dropout as acting or not."""
    if size <= 0:
        return 0.0
    if name == "dropout_p":
        return 1.0
    power = 16 if name in _PADDED else 1
    while power < size:
        power *= 2
    if name in _WIDE and power >= 16:
        for part in range(9, 16):
            if 16 * size <= part * power:
                return float(part * power // 16)
    return float(power)


def _choices(
    operator: str, capability: tuple[int, int], itemsize: int, sizes: _Sizes, candidates: _Plans
) -> tuple[tuple[int, Choice], ...]:
    """(the most rows, the choice up to there), in order; a power of two each, and the last for all rows beyond."""
    found: list[tuple[int, Choice]] = []
    most = 1
    while most <= _MOST_ROWS:
        choice = _decided(operator, capability, itemsize, sizes, _stands_for(most), candidates)
        if found and found[-1][1] == choice:
            found.pop()
        found.append((most, choice))
        most *= 2
    found[-1] = sys.maxsize, found[-1][1]
    return tuple(found)


# A constant to traced code, which computes none of it and is guarded by its bounds alone. This is all that
# torch.compiler.assume_constant_result does, but that loads the compiler.
vars(_choices)["_dynamo_marked_constant"] = True


def _stands_for(rows: float) -> float:
    """The middle of the numbers of rows between two powers of two."""
    power = 1
    while power < rows and power < _MOST_ROWS:
        power *= 2
    return 0.75 * power if power > 1 else 1.0


@functools.lru_cache(4096)
def _decided(
    operator: str, capability: tuple[int, int], itemsize: int, sizes: _Sizes, rows: float, given: _Plans
) -> Choice:
    """First the plan of each direction in each backend, then the backend: what forward saves is the backend's own."""
    candidates = dict(given)
    found = times(operator, capability, itemsize, dict(sizes) | {"M": rows}, candidates)
    chosen: dict[str, tuple[str, str]] = {}
    both: dict[str, Times] = {}
    bounded = set(candidates)
    for backend, plans in candidates.items():
        picked = []
        for direction in found:
            own = {plan: direction.candidates[backend, plan] for plan in plans}
            allowed = {plan for plan in plans if (backend, plan) in direction.feasible}
            best = rule.ranked(own, allowed, together=True)[0]
            if best not in allowed:
                bounded.discard(backend)
            picked.append(best)
        chosen[backend] = picked[0], picked[1]
        each = [direction.candidates[backend, plan] for direction, plan in zip(found, picked, strict=True)]
        both[backend] = Times(sum(one.slow for one in each), sum(one.fast for one in each))
    best = rule.ranked(both, bounded, together=False)[0]
    return Choice(best, *chosen[best])


class Direction(NamedTuple):
    """The times of one direction of a call, in microseconds.

    Attributes:
        eager: of the eager formula.
        candidates: (backend, plan) -> times.
        feasible: those that the rule may take.
    """

    eager: float
    candidates: dict[tuple[str, str], Times]
    feasible: set[tuple[str, str]]


def times(
    operator: str, capability: tuple[int, int], itemsize: int, sizes: Mapping[str, float], candidates: Candidates
) -> tuple[Direction, Direction]:
    """Forward's and backward's, by the model."""
    eager, plans = works(operator, capability, itemsize, sizes)
    wanted = {(backend, plan): plans[backend, plan] for backend, each in candidates.items() for plan in each}

    def direction(index: int) -> Direction:
        known: dict[tuple[str, str], Times] = {}
        on_gpu: dict[tuple[str, str], Times] = {}
        for name, both in wanted.items():
            work = both[index]
            low, high = band(capability, work.kernel)
            known[name] = Times(work.microseconds(low), work.microseconds(high))
            on_gpu[name] = Times(work.on_gpu(low), work.on_gpu(high))
        formula = eager[index]
        least = formula.microseconds(1.0)
        library: set[tuple[str, str]] = LIBRARY & known.keys()
        # Not slower where the host is waited for, nor where a graph is replayed.
        waiting = rule.feasible(known, least, library)
        replayed = rule.feasible(on_gpu, formula.on_gpu(1.0), library)
        return Direction(least, known, waiting & replayed)

    return direction(0), direction(1)


def reasons(
    operator: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Mapping[str, float],
    candidates: Candidates,
    chosen: Choice,
) -> Iterator[str]:
    """Why a call is served so: what was measured, then on a GPU for each direction the time of what serves it, of the
    runner-up and of the eager formula."""
    row = measured_row(operator, device, dtype, sizes)
    if row is not None:
        yield told_row(row)
    if device.type == "cpu":
        return
    capability = torch.cuda.get_device_capability(device)
    like = dict(_bucketed(sizes)) | {"M": _stands_for(sizes["M"])}
    # What was asked for by name is no candidate of "auto"'s.
    known = dict(candidates) | {
        chosen.backend: tuple(dict.fromkeys((*candidates.get(chosen.backend, ()), *chosen[1:])))
    }
    found = times(operator, capability, dtype.itemsize, like, known)
    for name, direction, plan in zip(("forward", "backward"), found, chosen[1:], strict=True):
        own = chosen.backend, plan
        told = [_told(own, direction.candidates[own])]
        rest = {other: each for other, each in direction.candidates.items() if other != own}
        told += [_told(other, rest[other]) for other in sorted(rest, key=rest.__getitem__)[:1]]
        yield f"{name} takes {', '.join(told)}, eager {direction.eager:.1f} us (model)"


def _told(name: tuple[str, str], times: Times) -> str:
    spread = f"{times.fast:.1f} to " if f"{times.fast:.1f}" != f"{times.slow:.1f}" else ""
    return f"{' '.join(name).strip()} {spread}{times.slow:.1f} us"
