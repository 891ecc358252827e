"""Clocks: what a call takes on a device, with a cache that holds nothing of it or that it has just left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import torch

Call = Callable[[], object]
Label = TypeVar("Label")

# Bytes that a CPU reads and writes so that its caches hold nothing else.
_CPU_CACHES = 1 << 26


class Clock(Protocol):
    """What is asked for the time; ``mode`` says in a record what was timed."""

    mode: str

    def round(self, calls: Mapping[Label, Call]) -> dict[Label, float]:
        """Seconds of each call, in the order given."""


class WallClock:
    """Times each call by the wall, for work that is done when the call returns.

    Args:
        before: what is done before each call, and not timed; it is given the call. None (the default) for nothing.
    """

    mode = "wall clock"

    def __init__(self, before: Callable[[Call], object] | None = None) -> None:
        self._before = before

    def round(self, calls: Mapping[Label, Call]) -> dict[Label, float]:
        """Seconds of each call, in the order given."""
        seconds = {}
        for name, call in calls.items():
            if self._before is not None:
                self._before(call)
            start = time.perf_counter()
            result = call()
            seconds[name] = time.perf_counter() - start
            del result
        return seconds


def cache_flush(device: torch.device) -> Call:
    """One kernel that reads four times the L2 cache, which empties it of all else.

    A read, because a write would leave dirty lines, which the next kernel would have to wait for.
    """
    size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
    numbers = torch.zeros(size // torch.int32.itemsize, dtype=torch.int32, device=device)
    largest = torch.empty((), dtype=torch.int32, device=device)
    return lambda: torch.amax(numbers, dim=0, out=largest)


class CudaClock:
    """Times each call by CUDA events, after `cache_flush`.

    Args:
        device: where the calls run.
        graph: the calls replay CUDA graphs, and the host may run ahead of them. Eager calls (the default) start on an
            idle GPU instead, so that what the host needs to launch them counts in full.
        warm: a call follows another of itself at once, with what that left in the cache. Default False.
    """

    MODES = ("eager launches", "graph replay")

    def __init__(self, device: torch.device, graph: bool = False, warm: bool = False) -> None:
        self.mode = self.MODES[graph]
        self._device, self._graph, self._warm = device, graph, warm
        self._flush = None if warm else cache_flush(device)

    def round(self, calls: Mapping[Label, Call]) -> dict[Label, float]:
        """Seconds of each call from its first launch to its end on the GPU, in the order given."""
        events = {}
        for name, call in calls.items():
            if self._flush is None:
                call()
            else:
                self._flush()
            if not self._graph and not self._warm:
                torch.cuda.synchronize(self._device)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            events[name] = start, end
        torch.cuda.synchronize(self._device)
        return {name: start.elapsed_time(end) * 1e-3 for name, (start, end) in events.items()}


def cold_and_warm(device: torch.device) -> dict[str, Clock]:
    """The clocks by which tuning compares: in a model a call finds its caches somewhere between the two."""
    if device.type == "cuda":
        return {"cold": CudaClock(device), "warm": CudaClock(device, warm=True)}
    caches = torch.zeros(_CPU_CACHES // torch.float32.itemsize, device="cpu")
    return {"cold": WallClock(lambda call: caches.add_(1.0)), "warm": WallClock(lambda call: call())}
