"""Clocks, and rounds in which every contender runs once, in one process."""

from __future__ import annotations

import contextlib
import random
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence

import torch

from pyfused.tuner.clocks import Call, Clock, CudaClock, Label, WallClock

_subject_seconds = 0.0


def subject_clock() -> float:
    """A clock for pytest-benchmark that advances by the subject's time alone, although all contenders share a round."""
    return _subject_seconds


class HostClock:
    """Times what the host needs for a call, not what a GPU then does: the mean of calls one after another.

    Args:
        device: where the calls compute.
        calls: how many; a GPU queues the launches of so many without making the host wait.
    """

    mode = "host time"

    def __init__(self, device: torch.device, calls: int = 50) -> None:
        self._device, self._calls = device, calls

    def round(self, calls: Mapping[Label, Call]) -> dict[Label, float]:
        """Seconds of one call of each, in the order given."""
        seconds = {}
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(self._calls):
                call()
            seconds[name] = (time.perf_counter() - start) / self._calls
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        return seconds


class CaptureError(RuntimeError):
    """A call cannot be captured as a CUDA graph. torch's allocator may then take the capture for under way until the
    process ends: nothing more should be captured in it."""


def mode_of(device: torch.device, graph: bool = False) -> str:
    """The mode of `clock_for`'s clock."""
    return CudaClock.MODES[graph] if device.type == "cuda" else WallClock.mode


def clock_for(device: torch.device, graph: bool = False) -> Clock:
    return CudaClock(device, graph) if device.type == "cuda" else WallClock()


def captured(call: Call) -> Call:
    """``call`` as a CUDA graph, captured after three runs on a side stream; calling it replays the graph.

    Raises:
        CaptureError: it cannot be captured.
    """
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    # Not `torch.cuda.graph`, which gives all free memory back first, to be asked for anew, and where a capture fails
    # leaves its own stream the current one.
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
        side.synchronize()
        graph.capture_begin()
        try:
            kept = call()
        except Exception as error:
            # What ends a broken capture has nothing to say but that it was broken.
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            raise CaptureError(f"{type(error).__name__}: {error}".partition("\n")[0]) from error
        try:
            graph.capture_end()
        except RuntimeError as error:
            raise CaptureError(str(error).partition("\n")[0]) from error
    torch.cuda.current_stream().wait_stream(side)

    def replay() -> object:
        graph.replay()
        # Held, so that the memory the graph writes to stays its own.
        return kept

    return replay


class Interleaved:
    """Rounds of all contenders, each round in a random order that is the same in every run.

    In a fixed order a contender would always inherit the cache and the freed memory of the same neighbour, which was
    seen to move ratios by several percent on a CPU.

    Args:
        contenders: name -> one call per input set; round i uses set i modulo their number.
        subject: the contender that the others are compared with.
        clock: takes the time of a round.
    """

    def __init__(self, contenders: Mapping[str, Sequence[Call]], subject: str, clock: Clock) -> None:
        if subject not in contenders:
            raise ValueError(f"subject must be one of {tuple(contenders)}, got {subject!r}")
        self.contenders, self.subject, self.clock = contenders, subject, clock
        self.seconds: dict[str, list[float]] = {name: [] for name in contenders}
        self._count = 0
        self._random = random.Random(0)

    def _round(self) -> dict[str, float]:
        calls = {}
        for name in self._random.sample(list(self.contenders), len(self.contenders)):
            sets = self.contenders[name]
            calls[name] = sets[self._count % len(sets)]
        self._count += 1
        return self.clock.round(calls)

    def warm_up(self, rounds: int = 2) -> float:
        """Runs rounds that are not counted; the wall-clock seconds of the last one."""
        elapsed = 0.0
        for _ in range(rounds):
            start = time.perf_counter()
            self._round()
            elapsed = time.perf_counter() - start
        return elapsed

    def __call__(self) -> None:
        """One counted round."""
        global _subject_seconds
        for name, seconds in self._round().items():
            self.seconds[name].append(seconds)
        _subject_seconds += self.seconds[self.subject][-1]

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.seconds.items()}

    def quartiles(self) -> dict[str, list[float]]:
        """The lower and the upper quartile of each contender's seconds."""
        return {name: _quartiles(values) for name, values in self.seconds.items()}

    def ratios(self) -> dict[str, float]:
        """Median over the rounds of (contender's time / subject's time); above 1 the subject is faster."""
        return {name: statistics.median(values) for name, values in self._paired().items()}

    def ratio_quartiles(self) -> dict[str, list[float]]:
        """The lower and the upper quartile of what `ratios` has the medians of."""
        return {name: _quartiles(values) for name, values in self._paired().items()}

    def _paired(self) -> dict[str, list[float]]:
        own = self.seconds[self.subject]
        return {
            name: [other / mine for other, mine in zip(values, own, strict=True)]
            for name, values in self.seconds.items()
            if name != self.subject
        }


def _quartiles(values: Sequence[float]) -> list[float]:
    if len(values) == 1:
        return [values[0], values[0]]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return [lower, upper]


def rounds_within(budget_seconds: float, seconds_per_round: float, least: int = 7, most: int = 200) -> int:
    return max(least, min(most, int(budget_seconds / max(seconds_per_round, 1e-6))))


def gpu_state(device: torch.device) -> dict[str, str] | None:
    """Clocks, power and temperature of a GPU as nvidia-smi reports them now; None on a CPU or without nvidia-smi."""
    if device.type != "cuda":
        return None
    fields = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    index = torch.cuda.current_device() if device.index is None else device.index
    identifier = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    command = ["nvidia-smi", f"--id={identifier}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, (value.strip() for value in output.split(",")), strict=False))
