"""The process that `compare` starts in each tree: calls and times that tree's operators on request.

Requests come as lines of JSON on standard input, each is answered by one line on standard output. All that is asked of
the tree is the signature of its public functions.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import pyfused
from pyfused.bench.measure import timing


@dataclass
class Worker:
    """Holds one trial at a time."""

    device: torch.device
    job: dict[str, Any] = field(default_factory=dict)
    call: timing.Call = lambda: None
    clock: timing.Clock = field(default_factory=timing.WallClock)

    def load(self, path: str, backward: bool) -> str:
        """Takes up the trial that `compare.write_job` wrote, and warms it up; what will be timed, as `Row.mode`."""
        # What an earlier trial holds goes first.
        self.job, self.call = {}, lambda: None
        self.job = torch.load(path, map_location=self.device)
        if not backward:
            self.job["leaves"] = {}
        forward = self._forward()
        leaves = list(self.job["leaves"].values())
        call = (lambda: torch.autograd.grad(forward(), leaves, self.job["dy"])) if leaves else forward
        if self.job["overhead"]:
            self.call, self.clock = call, timing.HostClock(self.device)
        else:
            on_gpu = self.device.type == "cuda"
            self.clock = timing.clock_for(self.device, graph=on_gpu)
            self.call = timing.captured(call) if on_gpu else call
        self.time(2)
        return self.clock.mode

    def results(self, path: str) -> None:
        """Writes y and, where backward is timed, d<name> of every leaf."""
        leaves = self.job["leaves"]
        y = self._forward()()
        gradients = torch.autograd.grad(y, list(leaves.values()), self.job["dy"]) if leaves else ()
        found = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        torch.save({"y": y.detach(), **found}, path)

    def time(self, calls: int) -> float:
        """Median seconds of ``calls`` calls; one more before them is not counted: the other process had the caches."""
        times = [self.clock.round({"": self.call})[""] for _ in range(calls + 1)]
        return statistics.median(times[1:])

    def _forward(self) -> Callable[[], Tensor]:
        args, kwargs = self.job["arguments"]
        function = getattr(pyfused, self.job["operator"])
        return lambda: function(*args, **kwargs)


def main() -> None:
    # The replies have a descriptor of their own: whatever prints to standard output goes to standard error.
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        device, threads = torch.device(sys.argv[1]), int(sys.argv[2])
        torch.set_num_threads(threads)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        worker = Worker(device)
        print(json.dumps({"result": pyfused.__file__}), file=replies, flush=True)
        for line in sys.stdin:
            request, arguments = json.loads(line)
            try:
                reply = {"result": getattr(worker, request)(**arguments)}
            except Exception as error:
                reply = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
