"""`make gpu`: everything that only a machine with a GPU can show, in a given time, in one record.

Builds the kernels or takes built ones, holds every kernel against float64, answers the questions of the moment,
measures every row against its baselines, and then looks for races and runs models and tests, as far as time goes. Needs
no network and changes no setting of the card. What a step found is on disk before the next one starts.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from pyfused.bench import ROOT, signals
from pyfused.bench.gpu import library, schedule, steps
from pyfused.bench.gpu.schedule import NAMED_ONLY, STEPS, WANTED, Machine
from pyfused.bench.gpu.steps import Step
from pyfused.bench.record import rows

# Of ten minutes, in which Python and torch also start and wheels are installed.
BUDGET, LONGEST = 540.0, 590.0
# Where no GPU is, a dry run is for this one.
H200 = ("NVIDIA H200", "90", 132)
# Step -> lines of its end that stand once more before the table: other output may be long.
RECAP = {"truth": 4, "questions": 6}
# A tensor there and back; run apart, in a process that a driver in trouble may take along.
_ASK = "import torch; torch.zeros(1, device='cuda').add_(1).item()"


@contextlib.contextmanager
def clocks_logged(file: Path) -> Iterator[None]:
    """Inside, nvidia-smi, if it is there, adds the GPU's clocks, power and temperature to ``file``."""
    fields = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu"
    identifier = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    command = ["nvidia-smi", f"--id={identifier}", f"--query-gpu={fields}", "--format=csv", "-lms", "500"]
    if shutil.which(command[0]) is None:
        yield
        return
    process = None
    try:
        with file.open("ab") as stream, signals.signals_held():
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT)
        yield
    finally:
        if process is not None:
            process.terminate()
            process.wait()


def device_lost() -> str | None:
    """Why no step can compute on the GPU any more; None when one can."""
    try:
        asked = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "the device is gone: it does not answer"
    if asked.returncode == 0:
        return None
    said = asked.stderr.strip().splitlines() or [f"exit status {asked.returncode}"]
    return f"the device is gone: {next((line for line in reversed(said) if 'Error' in line), said[-1])}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    width = max(map(len, STEPS))
    listed = "\n".join(
        f"  {name:{width}}  {what}{' (only when it is named)' if name in NAMED_ONLY else ''}"
        for name, what in STEPS.items()
    )
    parser = argparse.ArgumentParser(
        prog="make gpu", description=__doc__, epilog=f"steps, in this order:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--steps", type=_steps, metavar="NAME,NAME", help="only these (default: all that fit one call)")
    parser.add_argument("--library", type=Path, metavar="FILE", help="a compiled _C.abi3.so, in place of the build")
    parser.add_argument("--output", type=Path, metavar="DIRECTORY", help="where <gpu>/<date>/ is made")
    parser.add_argument(
        "--resume", type=Path, metavar="RECORD",
        help="add to this record what it does not hold yet; with --output to a copy of it there",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, default=BUDGET, metavar="SECONDS",
        help=f"for all steps (default {BUDGET:g}, at most {LONGEST:g})",
    )  # fmt: skip
    parser.add_argument("--commit", metavar="HASH", help="the commit to record where the tree has no .git")
    parser.add_argument("--dry-run", action="store_true", help="print the steps and what they would take; needs no GPU")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers", type=int, metavar="N", help=f"processes that compile and test (default: one for a core, {cores})"
    )
    arguments = parser.parse_args(argv)
    if not 0 < arguments.budget <= LONGEST:
        parser.error(f"--budget must be a positive number of seconds up to {LONGEST:g}, got {arguments.budget:g}")
    if arguments.workers is not None and arguments.workers < 1:
        parser.error(f"--workers must be at least 1, got {arguments.workers}")
    if arguments.library is not None and "build" in (arguments.steps or ()):
        parser.error("--library takes the place of the step build: name one of them")
    arguments.steps = arguments.steps or [
        name for name in STEPS if name not in NAMED_ONLY and (name != "build" or arguments.library is None)
    ]
    # A dry run is of a machine with a GPU, which has more cores than a place without one.
    arguments.workers = arguments.workers or (max(cores, 16) if arguments.dry_run else cores)
    return arguments


def _steps(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown steps {', '.join(map(repr, unknown))}; known: {', '.join(STEPS)}")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every step passed or was skipped with a reason (in a dry run: fits), else 1; 2 for wrong arguments."""
    arguments = _arguments(argv)
    try:
        return _main(arguments)
    except library.Unfit as error:
        print(f"make gpu: --library: {error}", file=sys.stderr)
    except _Refused as error:
        print(f"make gpu: {error}", file=sys.stderr)
    except OSError as error:
        # A full disk, a folder that may not be written to.
        print(f"make gpu: {error.filename or 'the record'}: {error.strerror or error}", file=sys.stderr)
    return 1


class _Refused(Exception):
    """Why there is nothing to run."""


def _main(arguments: argparse.Namespace) -> int:
    if not (ROOT / "setup.py").is_file():
        raise _Refused(f"needs a checkout, {ROOT} is none")
    if not torch.cuda.is_available() and not arguments.dry_run:
        raise _Refused("torch sees no CUDA device")
    missing = {name: why for name, why in WANTED.items() if importlib.util.find_spec(name) is None}
    machine = _machine(arguments.workers, frozenset(WANTED.keys() - missing))
    if arguments.library is not None:
        library.check(arguments.library, machine.capability)
    elif "build" not in arguments.steps and not any((ROOT / "pyfused").glob("_C.*so")):
        missing["pyfused._C"] = "no rows and no tests of backend cuda"
    if arguments.dry_run:
        text, fits = dry_run(machine, arguments.steps, arguments.budget)
        print(text)
        return 0 if fits else 1
    if shutil.which("nvidia-smi") is None:
        missing["nvidia-smi"] = "clocks and power are not logged"
    device = torch.device("cuda", 0)
    where = rows.provenance(device, arguments.commit)
    if arguments.resume is not None:
        record = arguments.resume.resolve()
        _must_continue(record, where)
        if arguments.output is not None:
            record = _copied(record, arguments.output.resolve())
    else:
        record = rows.run_directory((arguments.output or rows.default_output()).resolve(), device)
    # The record first: nothing is changed where it cannot be written.
    record.mkdir(parents=True, exist_ok=True)
    if arguments.library is not None:
        library.place(arguments.library)
    print(f"record: {record}")
    for name, why in missing.items():
        print(f"not found: {name}: {why}")
    with signals.terminable():
        chosen = schedule.steps(machine, record, arguments.commit, arguments.steps)
        return _run(chosen, record, arguments.budget, {"missing": missing, "provenance": where})


def _machine(workers: int, modules: frozenset[str]) -> Machine:
    if not torch.cuda.is_available():
        return Machine(*H200, modules, workers, "compute-sanitizer", "ncu")
    device = torch.device("cuda", 0)
    major, minor = torch.cuda.get_device_capability(device)
    name, count = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).multi_processor_count
    tools = schedule.tool("compute-sanitizer"), schedule.tool("ncu")
    return Machine(name, f"{major}{minor}", count, modules, workers, *tools)


def _must_continue(record: Path, where: dict[str, object]) -> None:
    """Refuses to add to what is no record, or one of another GPU or commit."""
    try:
        steps.read_outcomes(record)
        before = json.loads((record / "steps.json").read_text()).get("provenance", {})
    except OSError as error:
        raise _Refused(f"--resume: {record} is no record: {error.strerror} ({error.filename})") from error
    except ValueError as error:
        raise _Refused(f"--resume: {error}") from error
    for fact in ("device", "commit"):
        was, now = before.get(fact), where.get(fact)
        if was and now and was != now:
            raise _Refused(f"--resume: {record} is of {fact} {was}, this is {now}")


def _copied(record: Path, output: Path) -> Path:
    """The record's copy as <gpu>/<date>/ below ``output``; itself where it lies there already."""
    copy = output / record.parent.name / record.name
    if copy == record:
        return record
    if copy.exists():
        raise _Refused(f"--resume: {copy} is there already")
    shutil.copytree(record, copy)
    return copy


def dry_run(machine: Machine, chosen: Sequence[str], budget: float) -> tuple[str, bool]:
    """A line for each step: what it does at most, the seconds that it would get, and those of the model; and whether
    each step that would run fits."""
    made = schedule.steps(machine, Path("RECORD"), None, chosen)
    lines: list[tuple[str, ...]] = [("step", "compilations", "numbers", "cases", "rows", "limit", "predicted", "")]
    left, total, fits = steps.usable(budget), 0.0, True
    for place, step in enumerate(made):
        work = asdict(schedule.AT_MOST.get(step.name, schedule.Work()))
        counts = [f"{work[name]:,}" if work[name] else "" for name in ("compilations", "numbers", "cases", "rows")]
        seconds = None if step.absent else steps.limit(step, made[place + 1 :], left)
        if seconds is None:
            why = step.absent or f"not in this call: {left:.0f} s are left; --resume in another one"
            lines.append((step.name, *counts, "", f"{step.needs:.0f}", why))
            continue
        fits &= step.needs <= seconds
        late = "" if step.needs <= seconds else "does not fit"
        lines.append((step.name, *counts, f"{seconds:.0f}", f"{step.needs:.0f}", late))
        taken = min(step.needs, seconds)
        left, total = left - taken, total + taken
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:7], widths[1:7], strict=True))])
        + f"  {line[7]}".rstrip()
        for line in lines
    )
    text = (
        f"{machine.name}, compute capability {machine.capability[:-1]}.{machine.capability[-1]}, "
        f"{machine.multiprocessors} multiprocessors, {machine.workers} processes\n{table}\n"
        f"{total:.0f} s predicted of {budget:.0f}, counted at most; the seconds are a model, measured on no GPU"
    )
    return text, fits


def _run(chosen: Sequence[Step], record: Path, budget: float, facts: dict[str, object]) -> int:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    runner = steps.Runner(record, budget, facts, ROOT, {"PYTHONPATH": os.pathsep.join(paths)}, device_lost)
    good, said = False, None
    try:
        with clocks_logged(record / "clocks.csv"):
            good = runner.run(chosen)
    except signals.Terminated as signal_name:
        said = f"stopped by {signal_name}"
    except OSError as error:
        said = f"{error.filename or 'the record'}: {error.strerror or error}"
    for outcome in runner.outcomes:
        lines = outcome.tail.splitlines()[-RECAP.get(outcome.name, 0) :] if outcome.name in RECAP else []
        print(*lines, sep="\n", end="\n" * bool(lines))
    print(f"\n{runner.table()}\nrecord: {record}")
    if not good:
        print(runner.failures())
    if said is not None:
        print(f"make gpu: {said}", file=sys.stderr)
    return 0 if good else 1
