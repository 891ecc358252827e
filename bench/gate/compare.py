"""Has the working tree become slower than a commit? `make bench-compare BASE=<ref>`.

Both trees run at the same time, each in a process of its own, and take turns in random order, so that one of them
computes at any moment and both meet the same machine. Each round gives one ratio, head's time over base's. A trial
has lost when the whole confidence interval of the median ratio lies above 1 + loss; where the interval reaches above
that but not wholly, the trial is inconclusive and passes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import scipy.stats
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pyfused import reference
from pyfused.bench import ROOT, signals
from pyfused.bench.cases import operators
from pyfused.bench.cases.case import Case
from pyfused.bench.gate.trees import Tree, TreeError, WorkerError, build_kernels, checkout, resolve
from pyfused.bench.measure import parity
from pyfused.bench.show.terminal import time_text

CONFIDENCE = 0.99
# Where a process's memory comes to lie moves its times by some percent for as long as it lives: fresh pairs of
# processes average over that.
PAIRS = 3
# Calls in one turn: as many as take this long, so that a turn is longer than what changing turns disturbs.
_TURN_SECONDS, _MOST_CALLS = 0.03, 20
# Of one pair of processes.
_LEAST_ROUNDS = 7


@dataclass
class Trial:
    """One call, timed in both trees.

    Attributes:
        case: the operator and its shape.
        backward: whether backward is timed too.
        overhead: whether the host's time for a call is timed instead of the call.
        rounds: (base's seconds, head's seconds).
        mode: what was timed, as `Row.mode`.
        absent: why the base cannot make the call.
        fault: what is wrong with the head, which has no times then.
    """

    case: Case
    backward: bool
    overhead: bool = False
    rounds: list[tuple[float, float]] = field(default_factory=list)
    mode: str = ""
    absent: str | None = None
    fault: str | None = None

    @property
    def name(self) -> str:
        return f"{self.case.name}, {'forward+backward' if self.backward else 'forward'}"

    @property
    def runs(self) -> bool:
        """Whether both trees make it, as far as known, and agree."""
        return self.absent is None and self.fault is None

    def seconds(self) -> tuple[float, float]:
        """Medians of base and head."""
        base, head = zip(*self.rounds, strict=True)
        return statistics.median(base), statistics.median(head)

    def interval(self) -> tuple[float, float, float]:
        """Median over the rounds of head's time / base's, and its confidence interval by bootstrap."""
        base, head = numpy.array(self.rounds).T
        ratios = head / base
        found = scipy.stats.bootstrap(
            (ratios,), numpy.median, confidence_level=CONFIDENCE, method="percentile", rng=numpy.random.default_rng(0)
        ).confidence_interval
        return float(numpy.median(ratios)), float(found.low), float(found.high)

    def verdict(self, loss: float) -> str:
        """ "lost", "wrong", "inconclusive", "no base" or "ok"."""
        if self.absent is not None:
            return "no base"
        if self.fault is not None:
            return "wrong"
        _, low, high = self.interval()
        if low > 1 + loss:
            return "lost"
        return "inconclusive" if high > 1 + loss else "ok"


def trials_of(device: torch.device, select: str | None = None) -> list[Trial]:
    """Forward and forward+backward of each operator's shapes of least and most work, and what a call costs the host;
    with ``select`` of all timed shapes whose names contain it."""
    timed = operators.timed_cases(device)
    if select is None:
        each = [module.timed_cases(device) for module in operators.OPERATORS.values()]
        timed = list(dict.fromkeys(extreme(found, key=_work) for found in each for extreme in (min, max)))
    found = [(case, False) for case in timed] + [(case, True) for case in operators.tiny_cases(device)]
    return [
        Trial(case, backward, overhead)
        for case, overhead in found
        if select is None or select in case.name
        for backward in (False, True)
    ]


def _work(case: Case) -> float:
    return case.floor_seconds()["forward+backward"]


# ---- trials


def write_job(trial: Trial, path: Path, device: torch.device) -> None:
    """Writes what both trees are to call: the arguments, not the case, so that a tree needs none of these modules."""
    case = trial.case
    # Where `check_parity` draws them too: another device has other numbers.
    tensors = case.tensors(device)
    leaves = {name: tensors[name].requires_grad_() for name in (*case.inputs, *case.trained)}
    seed = {"seed": torch.tensor([parity.SEED], device=device)} if case.dropout_p else {}
    job = {
        "operator": case.operator,
        "arguments": case.call(lambda *args, **kwargs: (args, kwargs), tensors, **seed),
        "leaves": leaves,
        "dy": tensors["dy"],
        "overhead": trial.overhead,
    }
    torch.save(job, path)


def check_parity(trial: Trial, results: Mapping[str, Path], device: torch.device) -> str | None:
    """What is wrong with the head's numbers; None when they are as close to float64 as the base's: twice as far
    at most, but for roundings."""
    case = trial.case
    tensors = case.tensors(device)
    seed = {"seed": torch.tensor([parity.SEED], device=device)} if case.dropout_p else {}
    exact = parity.results(case, getattr(reference, case.operator), tensors, double=True, **seed)
    if not trial.backward:
        exact = {"y": exact["y"]}
    base, head = (torch.load(results[name], map_location=device) for name in ("base", "head"))
    try:
        found = parity.deviations(head, base, exact, case.dtype)
    except ValueError as error:
        return str(error)
    worst = max(found, key=parity.strain)
    if worst.passed:
        return None
    figures = f"error {worst.error:.2e}, the base's {worst.plain:.2e}, limit {worst.limit:.2e}"
    return f"{worst.tensor} ({worst.norm}) is not as close to float64 as the base's: {figures}"


def load(trial: Trial, trees: Mapping[str, Tree], job: Path) -> None:
    """Has both trees take the call up; the trial says so when one cannot."""
    request = {"path": str(job), "backward": trial.backward}
    try:
        trial.mode = trees["base"].ask("load", **request)
    except TreeError as error:
        trial.absent = str(error)
        return
    try:
        trees["head"].ask("load", **request)
    except TreeError as error:
        trial.fault = f"the base runs it, the head does not: {error}"


def time_rounds(trial: Trial, trees: Mapping[str, Tree], budget_seconds: float, order: random.Random) -> None:
    """Adds rounds to a trial that both trees have loaded: as many as the time allows, seven at least."""
    one = max(tree.ask("time", calls=1) for tree in trees.values())
    # A turn of the host's clock is 50 calls already.
    calls = 1 if trial.overhead else max(1, min(_MOST_CALLS, math.ceil(_TURN_SECONDS / one)))

    until = time.perf_counter() + budget_seconds
    done = 0
    while done < _LEAST_ROUNDS or time.perf_counter() < until:
        seconds = {name: trees[name].ask("time", calls=calls) for name in order.sample(list(trees), 2)}
        trial.rounds.append((seconds["base"], seconds["head"]))
        done += 1


def measure(
    trials: Sequence[Trial],
    roots: Mapping[str, Path],
    device: torch.device,
    threads: int,
    seconds: float,
    on_trial: Callable[[Trial, int], None],
) -> None:
    """Fills the trials in.

    Args:
        trials: as `trials_of` makes them.
        roots: "base" and "head" -> the root of that tree.
        device, threads: where both compute, and on how many CPU threads.
        seconds: for the rounds of one trial.
        on_trial: called before a trial's rounds, with it and the number of the pair of processes.
    """
    order = random.Random(0)
    with contextlib.ExitStack() as held:
        scratch = signals.enter(held, lambda: tempfile.TemporaryDirectory(prefix="pyfused-compare-"))
        job = Path(scratch, "job.pt")
        results = {name: Path(scratch, f"{name}.pt") for name in roots}
        for pair in range(PAIRS):
            with contextlib.ExitStack() as stack:
                trees = {
                    name: signals.enter(stack, functools.partial(Tree, name, root, device, threads))
                    for name, root in roots.items()
                }
                for tree in trees.values():
                    tree.wait()
                for trial in trials:
                    on_trial(trial, pair)
                    if trial.runs:
                        write_job(trial, job, device)
                        load(trial, trees, job)
                    if trial.runs and pair == 0:
                        for name, tree in trees.items():
                            tree.ask("results", path=str(results[name]))
                        trial.fault = check_parity(trial, results, device)
                        if device.type == "cuda":
                            torch.cuda.empty_cache()
                    if trial.runs:
                        time_rounds(trial, trees, seconds / PAIRS, order)


# ---- what it says


def table(trials: Sequence[Trial], loss: float) -> Table:
    """One line for each trial."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    result.add_column("trial", min_width=40)
    for name in ("base", "head", "head / base", f"{CONFIDENCE:.0%} interval", "rounds"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("verdict")
    for trial in trials:
        verdict = trial.verdict(loss)
        style = {"lost": "bold red", "wrong": "bold red", "inconclusive": "yellow", "no base": "dim"}.get(verdict)
        name = trial.name if trial.mode in ("", "wall clock") else f"{trial.name}, {trial.mode}"
        cells = ["", "", "", "", ""]
        if trial.rounds:
            ratio, low, high = trial.interval()
            times = [time_text(seconds) for seconds in trial.seconds()]
            cells = [*times, f"{ratio:.3f}", f"{low:.3f} to {high:.3f}", str(len(trial.rounds))]
        result.add_row(name, *cells, verdict, style=style)
    return result


def summary(trials: Sequence[Trial], loss: float) -> list[str]:
    """The rule, each reason, and how many trials came out how."""
    found = [trial.verdict(loss) for trial in trials]
    lines = [
        f"lost: the {CONFIDENCE:.0%} interval of the median of head's time / base's, over the rounds of {PAIRS} pairs "
        f"of processes, lies wholly above {1 + loss:g}; inconclusive: it reaches above {1 + loss:g}, but not wholly."
    ]
    lines += [f"no base: {trial.name}: {trial.absent}" for trial in trials if trial.absent is not None]
    lines += [f"wrong: {trial.name}: {trial.fault}" for trial in trials if trial.fault is not None]
    counts = (f"{found.count(name)} {name}" for name in ("ok", "inconclusive", "lost", "wrong", "no base"))
    return [*lines, f"{len(trials)} trials: {', '.join(counts)}"]


def run(commit: str, trials: Sequence[Trial], device: torch.device, threads: int, seconds: float, loss: float) -> int:
    """Measures and prints; the exit status: 1 when a trial has lost or the head's numbers are wrong, else 0."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal) as progress,
        checkout(commit) as base,
    ):
        task = progress.add_task("preparing", total=PAIRS * len(trials))

        def on_trial(trial: Trial, pair: int) -> None:
            # Redrawn between trials only, so that drawing never runs beside a clock.
            done = progress.tasks[task].completed + 1
            progress.update(task, description=f"{trial.name} ({pair + 1} of {PAIRS})", completed=done, refresh=True)

        roots = {"base": base, "head": ROOT}
        if device.type == "cuda":
            for root in roots.values():
                build_kernels(root)
        measure(trials, roots, device, threads, seconds, on_trial)
    print(f"base {commit[:9]}, head {ROOT}, on {device}, {threads} threads, torch {torch.__version__}")
    output = Console(width=max(console.width, 132))
    output.print(table(trials, loss))
    print("\n".join(summary(trials, loss)))
    return int(any(trial.verdict(loss) in ("lost", "wrong") for trial in trials))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 2 for wrong arguments, an interruption, a base that cannot be built or a process that ends."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="make bench-compare", description=__doc__.partition("\n")[0])
    parser.add_argument("base", metavar="BASE", help="the commit, branch or tag that the working tree is held against")
    parser.add_argument("-k", dest="select", metavar="TEXT", help="all timed shapes whose names contain it")
    parser.add_argument(
        "--loss", type=_positive, default=0.05, help="the loss that fails (default 0.05: 5 %% more time)"
    )
    parser.add_argument("--seconds", type=_positive, default=5.0, help="how long each trial takes (default 5)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's own)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda") if on_gpu else ("cpu",), default="cuda" if on_gpu else "cpu"
    )
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    trials = trials_of(device, arguments.select)
    if not trials:
        parser.error(f"-k must be part of a case's name, got {arguments.select!r}")
    if arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    try:
        commit = resolve(arguments.base)
    except ValueError as error:
        parser.error(str(error))
    # As an interruption, so that the base's checkout goes too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_num_threads(arguments.threads)
    try:
        return run(commit, trials, device, arguments.threads, arguments.seconds, arguments.loss)
    except (TreeError, WorkerError, subprocess.CalledProcessError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
    return 2


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
