"""Bytes that a call of each operator moves through a GPU's DRAM, by Nsight Compute, beside those it must move.

``python -m pyfused.bench.gpu.programs.traffic --record DIRECTORY`` runs itself again under ``ncu`` and adds rows to the
record.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import pyfused
from pyfused.bench.cases.case import Case
from pyfused.bench.cases.operators import OPERATORS
from pyfused.bench.record import rows
from pyfused.bench.show.terminal import traffic_text
from pyfused.tuner import clocks

READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
_UNITS = {"byte": 1, "Kbyte": 10**3, "Mbyte": 10**6, "Gbyte": 10**9}


@dataclass(frozen=True)
class Kernel:
    """One launch, and the bytes that DRAM gave and took meanwhile."""

    name: str
    read: int
    written: int


def kernels_of(output: str) -> list[Kernel]:
    """The launches that ``ncu --csv --page raw`` printed: names of columns, a row of units, a row for each launch.

    Raises:
        ValueError: there is no such table, a unit is unknown, or a launch has no number.
    """
    # Messages of ncu and of the program stand in between; every line of the table starts with a quotation mark.
    table = list(csv.reader(line for line in output.splitlines() if line.startswith('"')))
    if len(table) < 3 or not {"Kernel Name", READ, WRITTEN} <= set(table[0]):
        raise ValueError(f"ncu printed no table of {READ} and {WRITTEN}")
    names, units, *launches = table
    unit = dict(zip(names, units, strict=True))

    def count(launch: Mapping[str, str], metric: str) -> int:
        if unit[metric] not in _UNITS:
            raise ValueError(f"{metric} must be in one of {tuple(_UNITS)}, got {unit[metric]!r}")
        return round(float(launch[metric].replace(",", "")) * _UNITS[unit[metric]])

    found = (dict(zip(names, launch, strict=True)) for launch in launches)
    return [Kernel(launch["Kernel Name"], count(launch, READ), count(launch, WRITTEN)) for launch in found]


def by_call(kernels: Sequence[Kernel], calls: int) -> list[dict[str, int]]:
    """What each call that `_profiled` made took: its "kernels", "read_bytes" and "written_bytes".

    Each stands between two flushes of the cache. To the second one's launch belongs what the call had written no
    further than the cache.

    Raises:
        ValueError: the flushes, launches named as the first, are not two for each call.
    """
    flushes = [place for place, kernel in enumerate(kernels) if kernel.name == kernels[0].name]
    if len(flushes) != 2 * calls:
        raise ValueError(f"expected two flushes for each of {calls} calls, got {len(flushes)} launches of their kernel")
    found = []
    for before, after in zip(flushes[::2], flushes[1::2], strict=True):
        own = kernels[before + 1 : after]
        found.append(
            {
                "kernels": len(own),
                "read_bytes": sum(kernel.read for kernel in own),
                "written_bytes": sum(kernel.written for kernel in own) + kernels[after].written,
            }
        )
    return found


def steps(case: Case, tensors: Mapping[str, Tensor]) -> dict[str, Callable[[], Mapping[str, Tensor]]]:
    """Calls that return y and the gradients: "forward", without autograd, and "forward+backward"."""
    leaves = {name: tensors[name].detach().requires_grad_() for name in (*case.inputs, *case.trained)}
    call = functools.partial(case.call, getattr(pyfused, case.operator), {**tensors, **leaves})

    def forward() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"y": call()}

    def both() -> dict[str, Tensor]:
        y = call()
        gradients = torch.autograd.grad(y, list(leaves.values()), tensors["dy"])
        return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}

    return {"forward": forward, "forward+backward": both}


def measured_cases(device: torch.device, cache: int) -> list[Case]:
    """For each operator the first timed case whose tensors do not fit into so large a cache, else the largest."""

    def size(case: Case) -> int:
        with FakeTensorMode():
            return sum(tensor.nbytes for tensor in case.tensors(torch.device("cpu")).values())

    timed = [module.timed_cases(device) for module in OPERATORS.values()]
    return [next((case for case in cases if size(case) > cache), max(cases, key=size)) for cases in timed]


def _profiled(listing: Path) -> None:
    """The program that runs under ncu: writes what it calls to ``listing``, and calls it."""
    device = torch.device("cuda")
    flush = clocks.cache_flush(device)
    calls = []
    for case in measured_cases(device, torch.cuda.get_device_properties(device).L2_cache_size):
        tensors = case.tensors(device)
        work = case.work()
        for measured, step in steps(case, tensors).items():
            facts = case.facts() | {"bytes": work[measured].nbytes}
            calls.append({"name": case.name, "measured": measured, "facts": facts})
            for each in (step, flush):
                each()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            for each in (flush, step, flush):
                each()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
    listing.write_text(json.dumps(calls))


def _command(ncu: str, listing: Path) -> list[str]:
    # The cache stays as the calls leave it, and the clocks as the card has them.
    return [
        ncu, "--csv", "--page", "raw", "--print-units", "base", "--print-kernel-base", "demangled",
        "--metrics", f"{READ},{WRITTEN}", "--cache-control", "none", "--clock-control", "none",
        "--profile-from-start", "off",
        sys.executable, "-m", "pyfused.bench.gpu.programs.traffic", "--calls", str(listing),
    ]  # fmt: skip


def measure(ncu: str, record: Path, commit: str | None) -> int:
    """Adds two rows for each operator to the rows.json in ``record`` and prints them; the exit status."""
    with tempfile.TemporaryDirectory() as scratch:
        listing = Path(scratch, "calls.json")
        # In the C locale a number's point is a point.
        command, environment = _command(ncu, listing), os.environ | {"LC_ALL": "C"}
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        try:
            if done.returncode:
                raise ValueError(f"exit status {done.returncode} of {shlex.join(command)}")
            calls = json.loads(listing.read_text())
            found = by_call(kernels_of(done.stdout), len(calls))
        except (OSError, ValueError) as error:
            print(done.stdout, error, sep="\n")
            return 1
    file, where = rows.RowFile(record), rows.provenance(torch.device("cuda"), commit)
    for call, counts in zip(calls, found, strict=True):
        facts = call["facts"] | counts
        row = rows.Row(
            call["name"], "traffic", call["measured"], mode="hardware counters", facts=facts, provenance=where
        )  # fmt: skip
        file.append(row)
        print(f"{row.name}, {row.measured}: {traffic_text(row)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyfused.bench.gpu.programs.traffic", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", type=Path, metavar="DIRECTORY", help="whose rows.json gets the rows")
    what.add_argument("--calls", type=Path, metavar="FILE", help="make the calls that ncu is to count")
    parser.add_argument("--ncu", default="ncu", help="Nsight Compute's command line")
    parser.add_argument("--commit", metavar="HASH", help="the commit to record where the checkout has no .git")
    arguments = parser.parse_args(argv)
    if arguments.record is not None:
        return measure(arguments.ncu, arguments.record, arguments.commit)
    _profiled(arguments.calls)
    return 0


if __name__ == "__main__":
    sys.exit(main())
