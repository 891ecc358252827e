"""What the steps of `make gpu` would do on an H200, counted and held against their budgets, and those against time."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu import selection
from tree import ROOT

from pyfused.bench.cases import operators
from pyfused.bench.gpu import budget, schedule
from pyfused.bench.gpu.budget import COST, Work
from pyfused.bench.gpu.programs import traffic
from pyfused.bench.gpu.schedule import AT_MOST, STEPS, TESTS, Machine

pytestmark = pytest.mark.host

H200 = Machine("NVIDIA H200", "90", 132, frozenset(schedule.WANTED), 16, "compute-sanitizer", "ncu")
# Kernels are specialised where nothing interprets them, and meta tensors do not launch them.
_COUNT = """
import dataclasses, importlib, json, sys
from pyfused.kernels.recording import Target
target = Target((9, 0), 132, 232448, "NVIDIA H200")
module = importlib.import_module(f"pyfused.bench.gpu.programs.{sys.argv[1]}")
print(json.dumps(dataclasses.asdict(module.work(target))))
"""
# For a run that has not collected every test itself.
_SELECT = """
import json, sys
import pytest

class Selecting:
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        from gpu import selection
        print("\\nSELECTED " + json.dumps(selection.by_step(items)))
        items.clear()

sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests"], plugins=[Selecting()]))
"""


def _run(code: str, argument: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, argument], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment,
    )  # fmt: skip
    assert done.returncode in (0, 5), done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def selected(request) -> dict:
    """As `selection.by_step` has it."""
    if selection.is_every_test(request.config):
        return selection.by_step(request.session.items)
    (line,) = (line for line in _run(_SELECT, "").splitlines() if line.startswith("SELECTED "))
    return json.loads(line.removeprefix("SELECTED "))


def _within(work: Work, most: Work) -> None:
    for field in dataclasses.fields(Work):
        assert getattr(work, field.name) <= getattr(most, field.name), f"{field.name}: {work} is more than {most}"


@pytest.mark.parametrize("step", ["truth", "questions", "speed"])
def test_a_step_does_no_more_than_its_budget_says(step):
    work = Work(**json.loads(_run(_COUNT, step)))
    _within(work, AT_MOST[step])
    # A budget that is far above what is done says nothing of the time.
    assert work.compilations > 0.6 * AT_MOST[step].compilations
    assert work.rows + work.cases > 0.5 * (AT_MOST[step].rows + AT_MOST[step].cases)


def test_truth_compiles_at_most_130_kernels():
    assert AT_MOST["truth"].compilations <= 130


@pytest.mark.parametrize("step", TESTS)
def test_a_step_selects_no_more_tests_than_its_budget_says(step, selected):
    assert selected[""] <= schedule.COLLECTED
    chosen = selected[step]
    of_triton = sum("triton" in name for name in chosen)
    compilations = schedule.compilations_of(of_triton)
    most = AT_MOST[step]
    assert 0.5 * most.cases < len(chosen) <= most.cases
    assert compilations <= most.compilations
    if step == "others":
        assert sum("compile" in name for name in chosen) <= most.compiled
    else:
        assert most.compilations == 0 or compilations > 0.5 * most.compilations


@pytest.mark.parametrize("step", ["small", "alone"])
def test_a_step_of_marked_tests_imports_their_files_alone(step):
    """An instrumented Python would else import every test three times."""
    every = len(list((ROOT / "tests").rglob("test_*.py")))
    assert 1 <= len(TESTS[step].paths) < every / 4


def test_the_three_steps_of_tests_have_each_test_once(selected):
    parts = [selected[name] for name in ("tests", "triton", "others")]
    assert len(set().union(*parts)) == sum(map(len, parts))
    assert set().union(*parts) == set(selected["all"])


def test_the_sanitizers_tests_are_of_every_operator_and_both_backends(selected):
    names = selected["small"]
    for operator in operators.OPERATORS:
        assert any(f"test_{operator}.py" in name and "[triton-" in name for name in names)
    for operator in ("lora_linear", "adapter_residual"):
        assert any(f"test_{operator}.py" in name and "[cuda-" in name for name in names)
    assert {AT_MOST[name].cases for name in ("small", "memcheck", "racecheck", "initcheck")} == {AT_MOST["small"].cases}


def test_ncu_is_given_two_calls_of_each_operator():
    cases = traffic.measured_cases(torch.device("cpu"), 1 << 20)
    assert 2 * len(cases) == AT_MOST["bytes"].cases


@pytest.mark.parametrize("step", STEPS)
def test_a_step_fits_its_share(step):
    (made,) = schedule.steps(H200, Path("RECORD"), None, [step])
    assert made.needs == schedule.predicted(step, H200) > 0
    assert made.needs <= made.share, f"{step} needs {made.needs:.0f} s"
    assert made.needs <= 0.9 * 565


def test_seconds_follow_from_the_counts():
    assert budget.seconds(Work()) == COST.start
    assert budget.seconds(Work(compilations=160), compilers=16) == pytest.approx(COST.start + 10 * COST.compilation)
    assert budget.seconds(Work(numbers=10**9)) == pytest.approx(COST.start + 16.0)
    assert budget.seconds(Work(cases=100, rows=10), runners=4) == pytest.approx(
        COST.start + 25 * COST.case + 10 * COST.row
    )
    # What made the first plan of these steps overrun: 1,501 compilations in 100 s, and 3.13e9 numbers in 140 s.
    assert budget.seconds(Work(compilations=1501), compilers=16) > 100.0
    assert budget.seconds(Work(compilations=108)) > 100.0
    bare = dataclasses.replace(H200, modules=frozenset())
    assert schedule.predicted("tests", bare) > schedule.predicted("tests", H200)
