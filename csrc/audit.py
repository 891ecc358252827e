"""Audits the compiled CUDA C++ kernels without a GPU: ``python csrc/audit.py [library]``, by default pyfused's own.

Reads registers, stack and machine code of every kernel for every architecture in the library, prints a line each, and
fails where one spills, has more than 64 bytes of stack, multiplies matrices without tensor cores or reaches global
memory in less than 16 bytes where it could take 16.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

MAX_STACK = 64
# Kernels that add up or weigh a few numbers each, or do nothing: no products, no tiles.
WITHOUT_TILES = ("gradients_kernel", "sum_kernel", "weigh_kernel", "empty_kernel")
# Machine code -> what it is counted as.
INSTRUCTIONS = {
    "HMMA": re.compile(r"\bHMMA\."),
    "to shared 16": re.compile(r"\bLDGSTS\S*\.128\b"),
    "load 16": re.compile(r"\bLDG\S*\.128\b"),
    "store 16": re.compile(r"\bSTG\S*\.128\b"),
    "spill": re.compile(r"\b(?:STL|LDL)\b"),
}
# What a line must have to be any of them: most have none.
COUNTED = re.compile(r"HMMA|\.128|STL|LDL")


@dataclass
class Kernel:
    """What one architecture's code of a kernel takes, and its instructions by kind."""

    name: str
    architecture: str
    registers: int
    stack: int
    instructions: Counter = field(default_factory=Counter)

    def faults(self) -> list[str]:
        count = self.instructions
        faults = [f"{count['spill']} accesses of local memory"] if count["spill"] else []
        if self.stack > MAX_STACK:
            faults.append(f"{self.stack} bytes of stack, more than {MAX_STACK}")
        if not self.name.split("<")[0].endswith(WITHOUT_TILES):
            faults += ["no tensor-core instruction"] if not count["HMMA"] else []
            faults += ["no asynchronous copy of 16 bytes"] if not count["to shared 16"] else []
            faults += ["no store of 16 bytes"] if not count["store 16"] and not self._sums else []
        return faults

    @property
    def _sums(self) -> bool:
        """Sums over rows leave parts in float32 as the fragments have them, two numbers at a time."""
        return "sums" in self.name or "wgrad" in self.name


def _cuobjdump() -> str:
    spec = importlib.util.find_spec("triton")
    places = [Path(spec.origin).parent / "backends/nvidia/bin"] if spec and spec.origin else []
    nvcc = shutil.which("nvcc")
    places += [Path(nvcc).resolve().parent] if nvcc else []
    tool = next((place / "cuobjdump" for place in places if (place / "cuobjdump").exists()), None)
    if tool is None:
        sys.exit("audit: no cuobjdump found, neither beside triton nor beside nvcc")
    return str(tool)


def _read(tool: str, library: Path, *flags: str) -> str:
    return subprocess.run([tool, *flags, library], capture_output=True, text=True, check=True).stdout


def _demangled(names: list[str]) -> dict[str, str]:
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = (re.sub(r"\(.*|pyfused::|^void ", "", name) for name in plain.splitlines())
    return dict(zip(names, short, strict=True))


def _instructions(tool: str, library: Path, architecture: str) -> dict[str, Counter]:
    """Instructions by kind of every kernel of one architecture."""
    found: dict[str, Counter] = {}
    command = [tool, "-sass", "-arch", architecture, library]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as disassembler:
        for line in disassembler.stdout:
            if "Function : " in line:
                counts = found[line.split()[-1]] = Counter()
            elif COUNTED.search(line):
                for kind, pattern in INSTRUCTIONS.items():
                    counts[kind] += bool(pattern.search(line))
    if disassembler.returncode != 0:
        raise subprocess.CalledProcessError(disassembler.returncode, command)
    return found


def kernels_of(library: Path) -> list[Kernel]:
    tool = _cuobjdump()
    found: dict[tuple[str, str], Kernel] = {}
    architecture = name = ""
    for line in _read(tool, library, "-res-usage").splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (\w+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            found[architecture, name] = Kernel(name, architecture, int(match[1]), int(match[2]))
    architectures = sorted({architecture for architecture, _ in found})
    # The disassembler works on one core.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        counted = pool.map(functools.partial(_instructions, tool, library), architectures)
        for architecture, instructions in zip(architectures, counted, strict=True):
            for name in instructions.keys() & {name for there, name in found if there == architecture}:
                found[architecture, name].instructions = instructions[name]
    names = _demangled(sorted({name for _, name in found}))
    for kernel in found.values():
        kernel.name = names[kernel.name]
    return sorted(found.values(), key=lambda kernel: (kernel.name, kernel.architecture))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", nargs="?", type=Path, help="default: the pyfused._C that Python would import")
    library = parser.parse_args(arguments).library
    if library is None:
        spec = importlib.util.find_spec("pyfused._C")
        if spec is None or spec.origin is None:
            print("audit: pyfused._C is not built here; `pyfused info` says why")
            return 1 if shutil.which("nvcc") else 0
        library = Path(spec.origin)
    kernels, failed = kernels_of(library), 0
    print(f"{'arch':6} {'registers':>9} {'stack':>5} " + " ".join(f"{kind:>12}" for kind in INSTRUCTIONS) + "  kernel")
    for kernel in kernels:
        faults = kernel.faults()
        failed += bool(faults)
        counts = " ".join(f"{kernel.instructions[kind]:12}" for kind in INSTRUCTIONS)
        print(f"{kernel.architecture:6} {kernel.registers:9} {kernel.stack:5} {counts}  {kernel.name}")
        for fault in faults:
            print(f"  FAILED: {fault}")
    print(f"{len(kernels) - failed} passed, {failed} failed")
    return int(failed > 0 or not kernels)


if __name__ == "__main__":
    raise SystemExit(main())
