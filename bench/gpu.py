"""`make gpu`: everything that only a machine with a GPU can show, in a given time, in one record.

Builds the kernels in place, runs the tests, measures every row against its baselines, counts DRAM bytes and looks for
bad memory accesses and races. Needs no network and changes no setting of the card. What a step found is on disk before
the next one starts.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pyfused.bench import operators, rows, steps
from pyfused.bench.steps import Step

ROOT = Path(__file__).resolve().parent.parent
# Module -> what the run does without it.
WANTED = {
    "pytest": "no tests and no benchmark",
    "pytest_benchmark": "no benchmark",
    "rich": "no benchmark",
    "matplotlib": "no benchmark",
    "xdist": "the tests run one after another",
    "pytest_timeout": "a test that hangs takes its step's whole time",
    "hypothesis": "tests of random calls are skipped",
    "peft": "no comparison with PEFT",
    "timm": "rows and tests of FastViT are skipped",
    "open_clip": "rows and tests of CLIP models are skipped",
    "sklearn": "rows of models, which take their images from it, are skipped",
}
# What the names of our kernels, as compiled, have in them, and no other's.
OWN_KERNELS = ("pyfused", "_lora_", "_adapter_", "_cross_attention_", "_projection_", "_sum_partials_")
# Rows of the benchmark besides four for each timed case of an operator, and what a row needs besides its rounds.
_OTHER_ROWS, _ROUNDS_SHARE = 20, 0.35


@dataclass(frozen=True)
class Machine:
    """What the steps are chosen by.

    Attributes:
        capability: of the GPU, such as "90".
        modules: those of `WANTED` that are there.
        workers: processes that the tests run in.
        compute_sanitizer, ncu: paths of the tools; None where there is none.
    """

    capability: str
    modules: frozenset[str]
    workers: int
    compute_sanitizer: str | None
    ncu: str | None


def tool(name: str) -> str | None:
    """The path of one of CUDA's programs."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def plan(machine: Machine, record: Path, commit: str | None) -> list[Step]:
    """The steps, in the order of what is worth most if time runs out.

    Kernels first, then whether they are right, then how fast they are; bytes, races and reads of what was never written
    explain or confirm what these have shown. Shares are seconds of the default budget.
    """
    named = ["--commit", commit] if commit else []
    parallel = _pytest(machine, "-n", str(machine.workers)) if "xdist" in machine.modules else _pytest(machine)

    def bench(seconds: float) -> list[str]:
        timed = len(operators.timed_cases(torch.device("cuda")))
        each = max(0.1, _ROUNDS_SHARE * seconds / (4 * timed + _OTHER_ROWS))
        command = [sys.executable, "-m", "pyfused.cli", "bench", "--device", "cuda"]
        return [*command, "--record", str(record), "--seconds", f"{each:.2f}", *named]

    traffic = [sys.executable, "-m", "pyfused.bench.traffic", "--record", str(record), *named]
    traffic += ["--ncu", str(machine.ncu)]
    return [
        Step(
            "build", 120, lambda _: [sys.executable, "setup.py", "build_ext", "--inplace"],
            {"PYFUSED_CUDA": "1", "PYFUSED_CUDA_ARCHS": os.environ.get("PYFUSED_CUDA_ARCHS", machine.capability)},
            refusals=(r"pyfused: PYFUSED_CUDA=1, but (.*)",),
        ),
        Step("tests", 95, lambda _: [*parallel, "tests", "-m", "not host and not gpu"]),
        Step("tests that need the GPU alone", 30, lambda _: [*_pytest(machine), "tests", "-m", "gpu"]),
        Step("benchmark", 140, bench, shown=True),
        Step(
            "DRAM bytes", 20, lambda _: traffic, absent=None if machine.ncu else "ncu was not found", shown=True,
            # Not readable here, or any other fault of ncu's own: not one of the program that it ran.
            refusals=(r"(.*ERR_NVGPUCTRPERM.*)", r"==ERROR== (?!The application returned)(.*)"),
        ),
        *(_sanitize(machine, name, share) for name, share in (("memcheck", 30), ("racecheck", 25), ("initcheck", 20))),
    ]  # fmt: skip


def _pytest(machine: Machine, *arguments: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    command += ["--timeout", "120"] if "pytest_timeout" in machine.modules else []
    return [*command, "--benchmark-disable"] if "pytest_benchmark" in machine.modules else command


def _sanitize(machine: Machine, name: str, share: float) -> Step:
    # Every file that need not be imported saves seconds of an instrumented Python.
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    files = [str(path.relative_to(ROOT)) for path in tests if "mark.sanitize" in path.read_text()]
    # torch asks the driver for functions that it may lack, and takes no for an answer: no error.
    command = [str(machine.compute_sanitizer), "--tool", name, "--error-exitcode", "99", "--report-api-errors", "no"]
    command += ["--target-processes", "application-only"]
    tested = [*_pytest(machine), *files, "-m", "sanitize", "-k"]
    if name == "initcheck":
        # It must see torch's kernels write, which costs it the time for most of the tests, and memory without poison.
        command += [*tested, "not portable and (smallest_shapes or odd_sizes)", "--unpoisoned"]
    else:
        command += [word for part in OWN_KERNELS for word in ("--kernel-name", f"kns={part}")]
        command += [*tested, "not portable"]
    return Step(
        name, share, lambda _: command,
        # A block out of torch's cache has neighbours that hide an access beyond it, and has been written before.
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        absent=None if machine.compute_sanitizer else "compute-sanitizer was not found",
        refusals=(r"(.*[Dd]evice not supported.*)",),
    )  # fmt: skip


@contextlib.contextmanager
def clocks_logged(file: Path) -> Iterator[None]:
    """Inside, nvidia-smi, if it is there, writes the GPU's clocks, power and temperature to ``file``."""
    fields = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu"
    identifier = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    command = ["nvidia-smi", f"--id={identifier}", f"--query-gpu={fields}", "--format=csv", "-lms", "500"]
    if shutil.which(command[0]) is None:
        yield
        return
    with file.open("wb") as stream:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=480.0, metavar="SECONDS", help="for all steps (default 480)")
    parser.add_argument("--output", type=Path, metavar="DIRECTORY", help="where <gpu>/<date>/ is made")
    parser.add_argument("--commit", metavar="HASH", help="the commit to record where the tree has no .git")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="processes for the tests (default: one for a core)")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.budget < float("inf"):
        parser.error(f"--budget must be a positive number of seconds, got {arguments.budget:g}")
    if arguments.workers < 1:
        parser.error(f"--workers must be at least 1, got {arguments.workers}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every step passed or was skipped with a reason, else 1."""
    arguments = _arguments(argv)
    if not (ROOT / "setup.py").is_file():
        print(f"make gpu: needs a checkout, {ROOT} is none", file=sys.stderr)
        return 1
    if not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA device", file=sys.stderr)
        return 1
    device = torch.device("cuda", 0)
    record = rows.run_directory((arguments.output or rows.default_output()).resolve(), device)
    missing = {name: why for name, why in WANTED.items() if importlib.util.find_spec(name) is None}
    if shutil.which("nvidia-smi") is None:
        missing["nvidia-smi"] = "clocks and power are not logged"
    major, minor = torch.cuda.get_device_capability(device)
    machine = Machine(
        f"{major}{minor}", frozenset(WANTED.keys() - missing), arguments.workers, tool("compute-sanitizer"), tool("ncu")
    )  # fmt: skip
    print(f"record: {record}")
    for name, why in missing.items():
        print(f"not found: {name}: {why}")
    facts = {"missing": missing, "provenance": rows.provenance(device, arguments.commit)}
    with steps.terminable():
        return _run(plan(machine, record, arguments.commit), record, arguments.budget, facts)


def _run(chosen: Sequence[Step], record: Path, budget: float, facts: dict[str, object]) -> int:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    runner = steps.Runner(record, budget, facts, ROOT, {"PYTHONPATH": os.pathsep.join(paths)})
    good = False
    try:
        with clocks_logged(record / "clocks.csv"):
            good = runner.run(chosen)
    except steps.Terminated as signal_name:
        print(f"make gpu: stopped by {signal_name}", file=sys.stderr)
    print(f"\n{runner.table()}\nrecord: {record}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
