"""The steps of `make gpu`: what each runs, its share of the time, and what it does at most."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyfused.bench import ROOT
from pyfused.bench.gpu import budget
from pyfused.bench.gpu.budget import COMPILATIONS_PER_TEST, Work
from pyfused.bench.gpu.steps import Step

# Module -> what the run does without it.
WANTED = {
    "pytest": "no tests and no benchmark",
    "pytest_benchmark": "no benchmark",
    "rich": "no benchmark",
    "matplotlib": "tests of what draws are skipped",
    "xdist": "the tests run one after another",
    "pytest_timeout": "a test that hangs takes its step's whole time",
    "hypothesis": "tests of random calls are skipped",
    "peft": "no comparison with PEFT",
    "timm": "rows and tests of FastViT are skipped",
    "open_clip": "rows and tests of CLIP models are skipped",
    "sklearn": "rows of models, which take their images from it, are skipped",
}
# What the names of our kernels, as compiled, have in them, and no other's.
OWN_KERNELS = ("pyfused", "_lora_", "_adapter_", "_cross_attention_", "_projection_", "_sum_partials_", "_prepare_")
# Of the tests marked `sanitize`, one activation: each other one costs a compilation of every kernel.
_SMALL = (
    "not portable and (every_activation and gelu or several_tiles_and_a_tail and not (identity or relu or gelu_tanh or "
    "quick_gelu or silu))"
)


@dataclass(frozen=True)
class Machine:
    """What the steps are chosen by.

    Attributes:
        name, capability: of the GPU, such as "NVIDIA H200" and "90".
        multiprocessors: it has.
        modules: those of `WANTED` that are there.
        workers: processes that compile, and that the tests run in.
        compute_sanitizer, ncu: paths of the tools; None where there is none.
    """

    name: str
    capability: str
    multiprocessors: int
    modules: frozenset[str]
    workers: int
    compute_sanitizer: str | None
    ncu: str | None


@dataclass(frozen=True)
class Tests:
    """The tests that a step runs.

    Attributes:
        marked: pytest's ``-m`` expression.
        named: its ``-k`` expression; "" for all.
        paths: files or folders below the root.
        parallel: whether they share the GPU.
    """

    marked: str
    named: str = ""
    paths: tuple[str, ...] = ("tests",)
    parallel: bool = False

    def arguments(self) -> list[str]:
        return [*self.paths, "-m", self.marked, *(["-k", self.named] if self.named else [])]


def _marked(mark: str) -> tuple[str, ...]:
    # Every file that need not be imported saves seconds of an instrumented Python.
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return tuple(str(path.relative_to(ROOT)) for path in files if f"mark.{mark}" in path.read_text())


_TESTS = "not host and not gpu"
# Step -> its tests. "tests", "triton" and "others" have each test once.
TESTS = {
    "small": Tests("sanitize", _SMALL, _marked("sanitize"), parallel=True),
    "tests": Tests(_TESTS, "(cuda or portable) and not triton and not compile", parallel=True),
    "alone": Tests("gpu", "not test_stress and (not triton or fresh_masks)", _marked("gpu")),
    "stress": Tests("not host", "not triton", ("tests/gpu/test_stress.py",)),
    "triton": Tests(_TESTS, "triton", parallel=True),
    "others": Tests(_TESTS, "not triton and (compile or not (cuda or portable))", parallel=True),
}

# Step -> what it is for; in the order of what is worth most if time runs out.
STEPS = {
    "build": "the CUDA C++ kernels, in place",
    "truth": "every kernel against float64",
    "questions": "five answers on which the next work depends",
    "speed": "operators and host time against their baselines, most wanted first",
    "small": "the tests that the sanitizer runs, without it; what they compile it then finds",
    "memcheck": "the sanitizer: accesses out of bounds",
    "racecheck": "the sanitizer: races in shared memory",
    "initcheck": "the sanitizer: reads of what was never written",
    "models": "training steps of whole models",
    "training": "training runs",
    "bytes": "DRAM bytes of each operator, by ncu",
    "tests": "tests of the backends that compile nothing, portable and cuda",
    "alone": "tests that need the GPU for themselves",
    "stress": "threads and streams, for long",
    "triton": "tests of backend triton",
    "others": "tests of modules, models and torch.compile",
}
# They take a call of their own: only when they are named.
NAMED_ONLY = ("triton", "others")

# What each does at most. Of the steps that test, compilations follow from the tests of Triton among them; of models,
# training runs and "others", which leave the backend to "auto", they are an estimate.
AT_MOST = {
    "truth": Work(compilations=130, cases=200),
    "questions": Work(compilations=60, rows=60),
    "speed": Work(compilations=170, rows=230, compiled=10),
    "small": Work(compilations=100, cases=50),
    "memcheck": Work(cases=50),
    "racecheck": Work(cases=50),
    "initcheck": Work(cases=50),
    "models": Work(compilations=40, models=3, rows=3, compiled=1),
    "training": Work(compilations=40, models=2, rows=2),
    "bytes": Work(cases=8),
    "tests": Work(cases=3000),
    "alone": Work(compilations=15, cases=75),
    "stress": Work(cases=15),
    "triton": Work(compilations=4155, cases=1662),
    "others": Work(compilations=3000, cases=4850, compiled=240),
}
# Tests that pytest finds in all.
COLLECTED = 11200
# Seconds that the C++ and CUDA compilers take for one architecture on 16 cores: a guess from the longest file's time.
_BUILD = 90.0


def tool(name: str) -> str | None:
    """The path of one of CUDA's programs."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def predicted(name: str, machine: Machine) -> float:
    """Seconds that the step takes, by the model of `budget`."""
    if name == "build":
        return _BUILD
    cost, work = budget.COST, AT_MOST[name]
    if name in ("memcheck", "racecheck", "initcheck"):
        # Python and torch start several times slower under it.
        return budget.seconds(work) + 2 * cost.start + work.cases * (cost.sanitized - cost.case)
    tests = TESTS.get(name)
    if tests is None:
        ahead = name in ("truth", "questions", "speed")
        return budget.seconds(work, compilers=machine.workers if ahead else 1)
    runners = machine.workers if tests.parallel and "xdist" in machine.modules else 1
    collected = COLLECTED * cost.collected if tests.paths == ("tests",) else 0.0
    return collected + budget.seconds(work, runners, runners)


def steps(machine: Machine, record: Path, commit: str | None, chosen: Sequence[str]) -> list[Step]:
    """The steps of these names, in the order of `STEPS`."""
    made = {step.name: step for step in _steps(machine, record, commit)}
    return [made[name] for name in STEPS if name in chosen]


def _steps(machine: Machine, record: Path, commit: str | None) -> list[Step]:
    named = ["--commit", commit] if commit else []
    into = ["--record", str(record)]

    def module(name: str) -> Callable[[float], list[str]]:
        # The rest of the limit is for what it prints at the end.
        return lambda seconds: [
            sys.executable, "-m", f"pyfused.bench.gpu.programs.{name}", *into, "--seconds", f"{0.9 * seconds:.0f}",
            "--workers", str(machine.workers), *named,
        ]  # fmt: skip

    def bench(select: str, rows: int) -> Callable[[float], list[str]]:
        command = [sys.executable, "-m", "pyfused.cli", "bench", "--targets", "--device", "cuda", *into, "-k", select]
        # Rows are many for the time: none is measured twice.
        command += [*named, "--attempts", "1"]
        return lambda seconds: [*command, "--seconds", f"{max(0.5, 0.3 * seconds / rows):.1f}"]

    def tests(name: str) -> Callable[[float], list[str]]:
        return lambda _: [*_pytest(machine, TESTS[name].parallel), *TESTS[name].arguments()]

    traffic = [sys.executable, "-m", "pyfused.bench.gpu.programs.traffic", *into, *named, "--ncu", str(machine.ncu)]
    needs = {name: predicted(name, machine) for name in STEPS}
    return [
        Step(
            "build", 120, lambda _: [sys.executable, "setup.py", "build_ext", "--inplace"],
            {"PYFUSED_CUDA": "1", "PYFUSED_CUDA_ARCHS": os.environ.get("PYFUSED_CUDA_ARCHS", machine.capability)},
            refusals=(r"pyfused: PYFUSED_CUDA=1, but (.*)",), needs=needs["build"], whole=True,
        ),
        Step("truth", 90, module("truth"), shown=True, needs=needs["truth"], whole=True),
        Step("questions", 90, module("questions"), shown=True, needs=needs["questions"], whole=True),
        Step("speed", 180, module("speed"), shown=True, needs=needs["speed"], whole=True),
        Step("small", 40, tests("small"), needs=needs["small"]),
        *(_sanitize(machine, name, 70, needs[name]) for name in ("memcheck", "racecheck", "initcheck")),
        Step("models", 120, bench("test_models", 3), shown=True, needs=needs["models"]),
        Step("training", 120, bench("test_training", 2), shown=True, needs=needs["training"]),
        Step(
            "bytes", 20, lambda _: traffic, absent=None if machine.ncu else "ncu was not found", shown=True,
            # Not readable here, or any other fault of ncu's own: not one of the program that it ran.
            refusals=(r"(.*ERR_NVGPUCTRPERM.*)", r"==ERROR== (?!The application returned)(.*)"), needs=needs["bytes"],
        ),
        *(Step(name, share, tests(name), needs=needs[name]) for name, share in (
            ("tests", 60), ("alone", 60), ("stress", 30), ("triton", 565), ("others", 565),
        )),
    ]  # fmt: skip


def _pytest(machine: Machine, parallel: bool = False) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-n", str(machine.workers)] if parallel and "xdist" in machine.modules else []
    command += ["--timeout", "120"] if "pytest_timeout" in machine.modules else []
    return [*command, "--benchmark-disable"] if "pytest_benchmark" in machine.modules else command


def _sanitize(machine: Machine, name: str, share: float, needs: float) -> Step:
    # torch asks the driver for functions that it may lack, and takes no for an answer: no error.
    command = [str(machine.compute_sanitizer), "--tool", name, "--error-exitcode", "99", "--report-api-errors", "no"]
    command += ["--target-processes", "application-only"]
    tested = [*_pytest(machine), *TESTS["small"].arguments()]
    if name == "initcheck":
        # It must see torch's kernels write, and memory without poison.
        command += [*tested, "--unpoisoned"]
    else:
        command += [word for part in OWN_KERNELS for word in ("--kernel-name", f"kns={part}")]
        command += tested
    return Step(
        name, share, lambda _: command,
        # A block out of torch's cache has neighbours that hide an access beyond it, and has been written before.
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        absent=None if machine.compute_sanitizer else "compute-sanitizer was not found",
        refusals=(r"(.*[Dd]evice not supported.*)",), needs=needs,
    )  # fmt: skip


def compilations_of(triton_tests: int) -> int:
    """What so many tests of Triton's backend compile, by what was counted once."""
    return round(triton_tests * COMPILATIONS_PER_TEST)
