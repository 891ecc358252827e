"""`pyfused tune`: which launch configuration and which backend are fastest on the GPU at hand.

Around each configuration that ships it tries those that differ in one or two fields. What could not be faster even at
the GPU's limits is left out, and what makes the compiler spill or takes too much shared memory; the rest is timed. Rows
go to kernels/measured.json, for somebody to review.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib
import inspect
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyfused
from pyfused.bench import operators, timing
from pyfused.bench import rows as row_format
from pyfused.bench.cases import Case, decided, refusal
from pyfused.choice import backends, measured
from pyfused.choice import order as preference
from pyfused.kernels import audit, bottleneck_config, lora_linear_config, recording
from pyfused.kernels.recording import Chosen, LaunchWork, Target
from pyfused.ops.lora_linear import choose_plan

# Function of a configuration -> what a launch in it does at least.
_WORK = {
    lora_linear_config.gemm_config: lora_linear_config.gemm_work,
    lora_linear_config.shrink_config: lora_linear_config.shrink_work,
    lora_linear_config.wgrad_config: lora_linear_config.wgrad_work,
    bottleneck_config.rows_config: bottleneck_config.rows_work,
    bottleneck_config.weights_config: bottleneck_config.weights_work,
}
# What the L2 cache gives a multiprocessor of any GPU from compute capability 8.0 on in one cycle, at most, in bytes.
_L2_BYTES_PER_CYCLE = 64
# A configuration is recorded where it is this much faster than the one that ships: less is noise.
LEAST_GAIN = 1.03

# Label -> call, timed beside each other: label -> seconds, medians.
Measure = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]]


@dataclass(frozen=True)
class Limits:
    """What a GPU can do at most: FLOP/s of its matrix products and cycles a second."""

    flops: float
    clock: float

    def least_seconds(self, work: LaunchWork, target: Target) -> float:
        """The least time of the busiest multiprocessor."""
        programs = -(-work.programs // target.multiprocessors)
        flops = work.flops * target.multiprocessors / self.flops
        return programs * max(flops, work.nbytes / (_L2_BYTES_PER_CYCLE * self.clock))


@dataclass(frozen=True)
class Direction:
    """A raw operator's Triton launcher with the arguments that a call of the public operator hands it, on meta."""

    name: str
    arguments: tuple[object, ...]

    def __call__(self, arguments: Iterable[object] | None = None) -> object:
        home = importlib.import_module(f"pyfused.kernels.{self.name.rpartition('_')[0]}")
        return getattr(home, self.name)(*(self.arguments if arguments is None else arguments))

    def on(self, device: torch.device) -> tuple[object, ...]:
        """The arguments with tensors of the same shape, type and strides on a device, full of random numbers."""
        return tuple(_like(value, device) if isinstance(value, Tensor) else value for value in self.arguments)


def _like(tensor: Tensor, device: torch.device) -> Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return made.normal_() if made.is_floating_point() else made.zero_()


class _RawCalls(TorchDispatchMode):
    """Notes the arguments of the raw operators inside, with the plan that Triton's kernels have on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Direction] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pyfused_portable":
            name, given = func._schema.name.rpartition("::")[2], dict(zip(_names(func), args, strict=True))
            if "plan" in given:
                rank, k = given["lora_a"].shape
                width = k if name.endswith("_bwd") else given["weight"].shape[0]
                given["plan"], _ = choose_plan(width, rank, given["dropout_p"], args[0].dtype, "cuda")
            self.found.append(Direction(name, tuple(given.values())))
        return func(*args, **(kwargs or {}))


def _names(func: torch._ops.OpOverload) -> list[str]:
    return [argument.name for argument in func._schema.arguments]


def directions(case: Case) -> list[Direction]:
    """Forward and backward of the case's kernels."""
    tensors = case.tensors(torch.device("meta"))
    for name in (*case.inputs, *case.trained):
        tensors[name].requires_grad_()
    with _RawCalls() as calls:
        y = case.call(functools.partial(getattr(pyfused, case.operator), backend="portable"), tensors)
        leaves = [tensors[name] for name in (*case.inputs, *case.trained)]
        torch.autograd.grad(y, leaves, torch.empty_like(y))
    return calls.found


def kernels_and_sizes(case: Case, tensors: Mapping[str, Tensor]) -> tuple[str, Mapping[str, float]]:
    """(the operator whose kernels serve the case, `preference`'s sizes), which depend on where ``tensors`` are."""
    made = decided(case, getattr(pyfused, case.operator), tensors)
    return made.kernels, made.sizes


def neighbours(config: object) -> Iterator[object]:
    """Configurations that differ from ``config`` in one or two fields: a tile's side, warps, stages, splits."""
    fields = dataclasses.asdict(config)
    single = [[{name: other} for other in _others(name, value)] for name, value in fields.items()]
    for changes in itertools.chain(*single, *(itertools.product(*pair) for pair in itertools.combinations(single, 2))):
        merged = changes if isinstance(changes, dict) else changes[0] | changes[1]
        yield dataclasses.replace(config, **merged)


def _others(name: str, value: int) -> Iterator[int]:
    if name.startswith("block_"):
        yield from (side for side in (value // 2, 2 * value) if 16 <= side <= 256)
    elif name == "num_warps":
        yield from ({4, 8} - {value})
    elif name == "num_stages":
        yield from (stages for stages in (value - 1, value + 1) if 2 <= stages <= 5)
    elif name == "splits":
        yield from (splits for splits in (value // 2, 2 * value) if splits >= 1)


def least_work(chosen: Chosen, config: object) -> LaunchWork:
    """Of the launch that ``chosen`` is for, in this configuration."""
    function = _WORK[chosen.function]
    known = chosen.arguments
    return function(config, **{name: known[name] for name in list(inspect.signature(function).parameters)[1:]})


def chosen_by(direction: Direction, target: Target) -> list[Chosen]:
    """What a direction chooses on such a GPU."""
    with recording.record(target), recording.forced({}) as found:
        direction()
    return list(dict.fromkeys(found))


def sound(
    direction: Direction, chosen: Chosen, target: Target, limits: Limits, seconds: float, jobs: int = 1
) -> dict[object, tuple[str, ...]]:
    """Neighbour of the configuration that ships -> what the audit finds wrong with it.

    Only those that could take less than ``seconds``; those that could take the least come first.
    """
    least = {config: limits.least_seconds(least_work(chosen, config), target) for config in neighbours(chosen.config())}
    hopeful = sorted((config for config in least if least[config] < seconds), key=least.__getitem__)
    cases = [
        [audit.Case(target, chosen.kernel, item) for item in _launches(direction, chosen, config, target)]
        for config in hopeful
    ]
    with ThreadPoolExecutor(jobs) as pool:
        findings = pool.map(lambda each: [audit.compile_case(case) for case in each], cases)
        return {
            config: tuple(fault for finding in each for fault in finding.faults)
            for config, each in zip(hopeful, findings, strict=True)
        }


def _launches(direction: Direction, chosen: Chosen, config: object, target: Target) -> list[recording.Launch]:
    """Those of the kernel that ``chosen`` is for, in this configuration."""
    with recording.record(target) as launches, recording.forced({chosen: config}):
        direction()
    return [item for item in launches if item.kernel.__name__ == chosen.kernel]


class Tuner:
    """One run on one GPU.

    Args:
        device, target: the GPU.
        limits: of the GPU.
        measure: times calls beside each other.
        seconds: after so many nothing new is begun.
        jobs: compilers at work at once.
        commit: recorded where the checkout has no .git to ask.
        on_step: told what is about to be done.

    Attributes:
        rows: found so far.
    """

    def __init__(
        self,
        device: torch.device,
        target: Target,
        limits: Limits,
        measure: Measure,
        *,
        seconds: float,
        jobs: int = 1,
        commit: str | None = None,
        on_step: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.device, self.target, self.limits, self.measure = device, target, limits, measure
        self.jobs, self.on_step = jobs, on_step
        self.rows: list[measured.Row] = []
        self._done: set[str] = set()
        self._end = time.monotonic() + seconds
        facts = row_format.provenance(device, commit)
        self._source = {name: facts[name] for name in ("torch", "triton", "commit")}

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self._end

    def tune(self, case: Case) -> None:
        """Rows for the kernels of one case, then for its backends."""
        for direction in directions(case) if refusal(case, self.device, "triton") is None else ():
            for chosen in chosen_by(direction, self.target):
                if self.out_of_time:
                    return
                # Two cases may ask for the same.
                if self._is_new(chosen.kernel, *recording.measured_for(chosen.arguments)):
                    self.on_step(f"{case.name}: {chosen.kernel}")
                    self._tune_kernel(case, direction, chosen)
        if not self.out_of_time:
            # In the configurations that will be used.
            measured.TABLE = measured.Table(merged(measured.TABLE.rows, self.rows))
            recording.forget()
            self.on_step(f"{case.name}: backends")
            self._compare_backends(case)

    def _is_new(self, *what: object) -> bool:
        key = repr(what)
        known = key in self._done
        self._done.add(key)
        return not known

    def _tune_kernel(self, case: Case, direction: Direction, chosen: Chosen) -> None:
        arguments = direction.on(self.device)

        def call(config: object) -> Callable[[], object]:
            def run() -> object:
                with recording.forced({chosen: config}):
                    return direction(arguments)

            return run

        own = chosen.config()
        seconds = self.measure({"own": call(own)})["own"]
        times = {own: seconds}
        for config, faults in sound(direction, chosen, self.target, self.limits, seconds, self.jobs).items():
            if faults:
                continue
            if self.out_of_time:
                break
            self.on_step(f"{case.name}: {chosen.kernel}: {_fields(own, config)}")
            times[config] = self.measure({"config": call(config)})["config"]
        best = min(times, key=times.__getitem__)
        if best == own:
            return
        # Once more beside each other: the first times lie minutes apart.
        again = self.measure({"own": call(own), "best": call(best)})
        gain = again["own"] / again["best"]
        if gain >= LEAST_GAIN:
            _, dtype, rows, others = recording.measured_for(chosen.arguments)
            self._add(chosen.kernel, dtype, rows, others, _fields(own, best), gain=round(gain, 3), of=direction.name)

    def _compare_backends(self, case: Case) -> None:
        names = [name for name in backends.BACKENDS if refusal(case, self.device, name) is None]
        tensors = case.tensors(self.device)
        operator, sizes = kernels_and_sizes(case, tensors)
        contenders = case.contenders(tensors, names).named
        inputs = [tensors[name] for name in case.inputs]
        calls = {name: contenders[f"pyfused {name}"].call(inputs, tensors["dy"], backward=True) for name in names}
        seconds = self.measure(calls)
        found = {name: round(1e6 * seconds[name], 2) for name in sorted(names, key=seconds.__getitem__)}
        dtype = str(case.dtype).removeprefix("torch.")
        self._add(operator, dtype, int(sizes["M"]), preference.others(sizes), found)

    def _add(self, subject, dtype, rows, sizes, found, **source) -> None:
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        source = {"date": today} | self._source | source
        gpu, capability = self.target.name, self.target.capability
        self.rows.append(measured.Row(gpu, capability, subject, dtype, rows, sizes, found, source))


def _fields(own: object, config: object) -> dict[str, int]:
    """The fields in which a configuration differs from the one that ships."""
    ships = dataclasses.asdict(own)
    return {name: value for name, value in dataclasses.asdict(config).items() if value != ships[name]}


def by_graph_replay(device: torch.device, rounds: int = 30) -> Measure:
    """Calls captured as CUDA graphs, replayed in interleaved rounds with an empty cache."""
    clock = timing.CudaClock(device, graph=True)

    def measure(calls: Mapping[str, Callable[[], object]]) -> Mapping[str, float]:
        first = next(iter(calls))
        interleaved = timing.Interleaved({name: [timing.captured(call)] for name, call in calls.items()}, first, clock)
        interleaved.warm_up()
        for _ in range(rounds):
            interleaved()
        return interleaved.medians()

    return measure


def limits_of(device: torch.device, measure: Measure) -> Limits:
    """Measured: the largest matrix product; by the driver: the highest clock."""
    side = 8192
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = measure({"product": lambda: a @ b})["product"]
    return Limits(2 * side**3 / seconds, 1e3 * torch.cuda.get_device_properties(device).clock_rate)


def merged(known: Iterable[measured.Row], new: Iterable[measured.Row]) -> list[measured.Row]:
    """``known`` with the rows in ``new`` in the place of those measured for the same."""

    def what(row: measured.Row) -> str:
        return repr((row.gpu, row.subject, row.dtype, row.rows, sorted(row.sizes.items())))

    return list(({what(row): row for row in known} | {what(row): row for row in new}).values())


def run(device: torch.device, seconds: float, select: str, output: Path, commit: str | None = None) -> int:
    """Tunes the benchmark's cases whose names contain ``select`` and writes the rows, those of each case at once.

    Returns:
        The exit status: 0, or 2 when no case has such a name.
    """
    cases = _cases(device, select)
    if not cases:
        return _no_case(select)
    known = measured.read(output)
    measure = by_graph_replay(device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("the GPU's limits", total=len(cases))
        limits = limits_of(device, measure)
        tuner = Tuner(
            device, recording.target(device), limits, measure, seconds=seconds, jobs=os.cpu_count() or 1, commit=commit,
            on_step=lambda text: progress.update(task, description=text),
        )  # fmt: skip
        for case in cases:
            tuner.tune(case)
            measured.write(merged(known, tuner.rows), output)
            progress.advance(task)
            torch.cuda.empty_cache()
    print(*summary(tuner.rows), sep="\n")
    print(f"{len(tuner.rows)} rows, written: {output}" + (", before all was tried" if tuner.out_of_time else ""))
    return 0


def _cases(device: torch.device, select: str) -> list[Case]:
    """With adapters of the products' dtype: a measured row is found without that of the adapters."""
    found = operators.timed_cases(device)
    return [case for case in found if case.parameter_dtype == case.dtype and select in case.name]


def summary(rows: list[measured.Row]) -> Iterator[str]:
    """A line for each row."""
    for row in rows:
        yield f"{row.subject}, M = {row.rows}, {row.sizes}: {row.found}"


def show(capability: tuple[int, int], select: str) -> int:
    """Prints what would be tried on such a GPU and what the audit finds in it: no GPU is needed, nothing is timed.

    Returns:
        The exit status: 0, or 2 when no case has such a name.
    """
    target = next(target for target in audit.TARGETS if target.capability == capability)
    # At infinitely many FLOP/s and bytes a second nothing is too slow to be tried.
    limits, jobs = Limits(float("inf"), float("inf")), os.cpu_count() or 1
    cases = _cases(torch.device("cuda"), select)
    for case in cases:
        for direction in directions(case):
            for chosen in chosen_by(direction, target):
                own = chosen.config()
                found = sound(direction, chosen, target, limits, float("inf"), jobs)
                good = sum(not faults for faults in found.values())
                print(f"{case.name}: {chosen.kernel}: ships {own}; {good} of {len(found)} neighbours are sound")
                for config, faults in found.items():
                    print(f"    {_fields(own, config)}: {'; '.join(faults) or 'sound'}", flush=True)
    return 0 if cases else _no_case(select)


def _no_case(select: str) -> int:
    print(f"pyfused tune: -k must be part of a case's name, got {select!r}", file=sys.stderr)
    return 2
