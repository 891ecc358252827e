"""`pyfused tune`: which launch configuration and which backend are fastest on the GPU at hand.

Around each configuration that ships it tries those that differ in one or two fields. What could not be faster even at
the GPU's limits is left out, and what makes the compiler spill or takes too much shared memory; the rest is timed. Rows
go to kernels/measured.json, for somebody to review.
"""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pyfused.bench.cases import operators
from pyfused.bench.cases.case import Case, refusal
from pyfused.bench.measure import timing
from pyfused.bench.record import rows as row_format
from pyfused.bench.tune import search
from pyfused.bench.tune.search import Direction, Peaks
from pyfused.choice import backends, measured, order
from pyfused.kernels import audit, launch, recording
from pyfused.kernels.recording import Chosen, Target
from pyfused.tuner.race import LEAST_GAIN

# Label -> call, timed beside each other: label -> seconds, medians.
Measure = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]]


class Tuner:
    """One run on one GPU.

    Args:
        device, target: the GPU.
        peaks: of the GPU.
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
        peaks: Peaks,
        measure: Measure,
        *,
        seconds: float,
        jobs: int = 1,
        commit: str | None = None,
        on_step: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.device, self.target, self.peaks, self.measure = device, target, peaks, measure
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
        for direction in search.directions(case, self.target) if refusal(case, self.device, "triton") is None else ():
            for chosen in search.chosen_by(direction, self.target):
                if self.out_of_time:
                    return
                # Two cases may ask for the same.
                if self._is_new(chosen.kernel, *recording.measured_for(chosen.arguments)):
                    self.on_step(f"{case.name}: {chosen.kernel}")
                    self._tune_kernel(case, direction, chosen)
        if not self.out_of_time:
            # In the configurations that will be used.
            measured.TABLE = measured.Table(measured.merged(measured.TABLE.rows, self.rows))
            measured.changed()
            self.on_step(f"{case.name}: backends")
            self._compare_backends(case)

    def _is_new(self, *what: object) -> bool:
        key = repr(what)
        known = key in self._done
        self._done.add(key)
        return not known

    def _tune_kernel(self, case: Case, direction: Direction, chosen: Chosen) -> None:
        arguments = direction.on(self.device)

        def call(config: Any) -> Callable[[], object]:
            def run() -> object:
                with recording.forced({chosen: config}):
                    return direction(arguments)

            return run

        own = chosen.config()
        seconds = self.measure({"own": call(own)})["own"]
        times = {own: seconds}
        for config, faults in search.sound(direction, chosen, self.target, self.peaks, seconds, self.jobs).items():
            if faults:
                continue
            if self.out_of_time:
                break
            self.on_step(f"{case.name}: {chosen.kernel}: {recording.differing(own, config)}")
            times[config] = self.measure({"config": call(config)})["config"]
        best = min(times, key=times.__getitem__)
        if best == own:
            return
        # Once more beside each other: the first times lie minutes apart.
        again = self.measure({"own": call(own), "best": call(best)})
        gain = again["own"] / again["best"]
        if gain >= LEAST_GAIN:
            _, dtype, rows, others = recording.measured_for(chosen.arguments)
            found = recording.differing(own, best)
            self._add(chosen.kernel, dtype, rows, others, found, gain=round(gain, 3), of=direction.name)

    def _compare_backends(self, case: Case) -> None:
        names = [name for name in backends.BACKENDS if refusal(case, self.device, name) is None]
        tensors = case.tensors(self.device)
        operator, sizes = search.kernels_and_sizes(case, tensors)
        contenders = case.contenders(tensors, names).named
        inputs = [tensors[name] for name in case.inputs]
        calls = {name: contenders[f"pyfused {name}"].call(inputs, tensors["dy"], backward=True) for name in names}
        seconds = self.measure(calls)
        found = {name: round(1e6 * seconds[name], 2) for name in sorted(names, key=seconds.__getitem__)}
        dtype = str(case.dtype).removeprefix("torch.")
        self._add(operator, dtype, int(sizes["M"]), order.others(sizes), found)

    def _add(self, subject, dtype, rows, sizes, found, **source) -> None:
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        source = {"date": today} | self._source | source
        gpu, capability = self.target.name, self.target.capability
        self.rows.append(measured.Row(gpu, capability, subject, dtype, rows, sizes, found, source))


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


def peaks_of(device: torch.device, measure: Measure) -> Peaks:
    """Measured: the largest matrix product; by the driver: the highest clock."""
    side = 8192
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = measure({"product": lambda: a @ b})["product"]
    return Peaks(2 * side**3 / seconds, 1e3 * torch.cuda.get_device_properties(device).clock_rate)


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
    with _progress() as progress:
        task = progress.add_task("the GPU's limits", total=len(cases))
        peaks = peaks_of(device, measure)
        tuner = Tuner(
            device, launch.target(device), peaks, measure, seconds=seconds, jobs=os.cpu_count() or 1, commit=commit,
            on_step=lambda text: progress.update(task, description=text),
        )  # fmt: skip
        for case in cases:
            tuner.tune(case)
            measured.write(measured.merged(known, tuner.rows), output)
            progress.advance(task)
            torch.cuda.empty_cache()
    print(*summary(tuner.rows), sep="\n")
    print(f"{len(tuner.rows)} rows, written: {output}" + (", before all was tried" if tuner.out_of_time else ""))
    return 0


def _cases(device: torch.device, select: str) -> list[Case]:
    """One of those that the same row is found for: not every operator's kernels see what dtype the parameters have."""
    cases = [case for case in operators.timed_cases(device) if select in case.name]
    meta = torch.device("meta")
    return list({repr(search.kernels_and_sizes(case, case.tensors(meta))): case for case in cases[::-1]}.values())[::-1]


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
    peaks, jobs = Peaks(float("inf"), float("inf")), os.cpu_count() or 1
    cases = _cases(torch.device("cuda"), select)
    with _progress() as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            for direction in search.directions(case, target):
                for chosen in search.chosen_by(direction, target):
                    progress.update(task, description=f"{case.name}: {chosen.kernel}")
                    own = chosen.config()
                    found = search.sound(direction, chosen, target, peaks, float("inf"), jobs)
                    good = sum(not faults for faults in found.values())
                    print(f"{case.name}: {chosen.kernel}: ships {own}; {good} of {len(found)} neighbours are sound")
                    for config, faults in found.items():
                        print(f"    {recording.differing(own, config)}: {'; '.join(faults) or 'sound'}", flush=True)
            progress.advance(task)
    return 0 if cases else _no_case(select)


def _progress() -> Progress:
    """A bar of cases on stderr, on a terminal alone."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # What goes to a file or a pipe is to stay there, and not to come above the bar.
    return Progress(*columns, console=console, disable=not console.is_terminal, redirect_stdout=sys.stdout.isatty())


def _no_case(select: str) -> int:
    print(f"pyfused tune: -k must be part of a case's name, got {select!r}", file=sys.stderr)
    return 2
