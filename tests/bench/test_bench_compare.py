"""The gate against slower code: its statistics on made-up rounds, its two trees, and runs on copies of the code."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tree import ROOT

from pyfused import reference
from pyfused.bench.cases import operators
from pyfused.bench.gate import compare, trees
from pyfused.bench.gate.compare import Trial
from pyfused.bench.measure import parity

pytestmark = pytest.mark.host

CPU = torch.device("cpu")
CASE = operators.tiny_cases(CPU)[0]


# ---- statistics


def _measured(factor: float, noise: float, rounds: int = 45, seed: int = 0) -> Trial:
    """A head ``factor`` times as slow; machine and noise change from round to round, the machine for both alike."""
    draw = random.Random(seed)
    found = []
    for _ in range(rounds):
        base = draw.uniform(0.5, 2.0)
        found.append((base * draw.lognormvariate(0, noise), base * factor * draw.lognormvariate(0, noise)))
    return Trial(CASE, backward=False, rounds=found)


def test_a_loss_of_a_tenth_is_found_in_small_noise():
    trial = _measured(1.10, 0.02)
    ratio, low, high = trial.interval()
    assert low < 1.10 < high
    assert low < ratio < high
    assert trial.verdict(0.05) == "lost"
    assert trial.verdict(0.15) == "ok"


def test_equal_trees_are_never_flagged():
    verdicts = [_measured(1.0, noise, seed=seed).verdict(0.05) for noise in (0.02, 0.1) for seed in range(25)]
    assert set(verdicts[:25]) == {"ok"}
    assert set(verdicts[25:]) <= {"ok", "inconclusive"}


def test_noise_is_inconclusive():
    assert {_measured(1.05, 0.1, seed=seed).verdict(0.05) for seed in range(10)} == {"inconclusive"}


def test_what_is_lost_on_the_average_but_not_in_the_middle_is_not_lost():
    """A third of the rounds met another process."""
    trial = _measured(1.0, 0.01)
    trial.rounds = [(base, head * (3 if index % 3 == 0 else 1)) for index, (base, head) in enumerate(trial.rounds)]
    assert trial.verdict(0.05) != "lost"


def test_the_interval_covers_the_truth_as_often_as_it_says():
    intervals = [_measured(1.2, 0.05, rounds=21, seed=seed).interval() for seed in range(200)]
    assert sum(not low <= 1.2 <= high for _, low, high in intervals) <= 8
    assert max(high - low for _, low, high in intervals) < 0.25


def test_trials_without_a_base_pass_and_wrong_numbers_do_not():
    trials = [
        Trial(CASE, backward=False, absent="AttributeError: new"),
        Trial(CASE, backward=True, fault="y is off"),
        _measured(1.0, 0.01),
        _measured(1.2, 0.01),
        _measured(1.05, 0.1),
    ]
    assert [trial.verdict(0.05) for trial in trials] == ["no base", "wrong", "ok", "lost", "inconclusive"]
    lines = compare.summary(trials, 0.05)
    assert lines[-1] == "5 trials: 1 ok, 1 inconclusive, 1 lost, 1 wrong, 1 no base"
    assert "99%" in lines[0]
    assert "above 1.05" in lines[0]
    assert lines[1].endswith("AttributeError: new")
    assert lines[2].endswith("y is off")
    assert compare.table(trials, 0.05).row_count == 5


# ---- trials


@pytest.mark.parametrize("device", [CPU, torch.device("cuda")])
def test_the_preset_trials_are_each_operators_extremes_and_the_calls_themselves(device):
    trials = compare.trials_of(device)
    for operator in operators.OPERATORS:
        timed = {trial.case.name for trial in trials if trial.case.operator == operator and not trial.overhead}
        work = {case.name: compare._work(case) for case in operators.timed_cases(device) if case.operator == operator}
        assert {min(work, key=work.get), max(work, key=work.get)} == timed
    assert {trial.case.operator for trial in trials if trial.overhead} == set(operators.OPERATORS)
    assert len(trials) == 2 * len({trial.case.name for trial in trials})


def test_selected_trials_come_from_every_timed_shape():
    assert {trial.case for trial in compare.trials_of(CPU, "r16")} == {
        case for case in (*operators.timed_cases(CPU), *operators.tiny_cases(CPU)) if "r16" in case.name
    }
    assert compare.trials_of(CPU, "nothing") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: BASE"),
        (["no-such-ref"], "BASE must name a commit of this repository, got 'no-such-ref'"),
        (["--", "--all"], "BASE must name a commit of this repository, got '--all'"),
        (["HEAD", "-k", "nothing"], "-k must be part of a case's name, got 'nothing'"),
        (["HEAD", "--loss", "0"], "expected a positive number, got '0'"),
        (["HEAD", "--seconds", "soon"], "expected a positive number, got 'soon'"),
        (["HEAD", "--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(package, capsys, arguments, message):
    with pytest.raises(SystemExit) as raised:
        compare.main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_make_asks_for_a_base():
    done = subprocess.run(["make", "-n", "bench-compare"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "make bench-compare needs BASE" in done.stderr


# ---- trees


def _git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def _repository(root: Path, *names: str) -> Path:
    """A repository with one commit of these folders of this one."""
    skip = shutil.ignore_patterns("__pycache__", "results", "_C.*")
    for name in names:
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=skip)
    _git(root, "init", "--quiet")
    _git(root, "add", ".")
    _git(root, "commit", "--quiet", "-m", "base")
    return root


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A repository with a package that can be compared."""
    root = _repository(tmp_path / "package", "pyfused", "bench", "kernels")
    monkeypatch.setattr(trees, "ROOT", root)
    return root


def test_the_base_is_the_commit_with_the_heads_bench(package):
    (package / "bench" / "novel.py").write_text("")
    (package / "pyfused" / "novel.py").write_text("")
    with trees.checkout(trees.resolve("HEAD")) as tree:
        assert (tree / "pyfused" / "cli.py").exists()
        assert not (tree / "pyfused" / "novel.py").exists()
        assert (tree / "pyfused" / "bench" / "novel.py").exists()
    assert not tree.parent.exists()
    assert (package / "bench" / "novel.py").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_base_goes_after_a_failure(package, error):
    with pytest.raises(error), trees.checkout(trees.resolve("HEAD")) as tree:
        raise error
    assert not tree.parent.exists()


def test_a_tree_without_git_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(trees, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="needs a git checkout"):
        trees.resolve("HEAD")


# ---- one tree beside another


class _Answers:
    """A tree's process that answers, or raises, the same to everything."""

    def __init__(self, answer):
        self.answer = answer

    def ask(self, request, **arguments):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_what_the_base_cannot_run_is_not_the_heads_fault():
    trial = Trial(CASE, backward=True)
    new = _Answers(trees.TreeError("TypeError: plan"))
    compare.load(trial, {"base": new, "head": _Answers("host time")}, Path("job"))
    assert trial.verdict(0.05) == "no base"
    assert trial.absent == "TypeError: plan"


def test_what_only_the_base_runs_is_the_heads_fault():
    trial = Trial(CASE, backward=True)
    lost = _Answers(trees.TreeError("TypeError: plan"))
    compare.load(trial, {"base": _Answers("host time"), "head": lost}, Path("job"))
    assert trial.verdict(0.05) == "wrong"
    assert trial.fault == "the base runs it, the head does not: TypeError: plan"


@pytest.mark.parametrize("case", operators.tiny_cases(CPU), ids=lambda case: case.operator)
@pytest.mark.parametrize("spoilt", [None, "base", "head"])
def test_the_head_must_be_as_close_to_float64_as_the_base(tmp_path, case, spoilt):
    plain = parity.results(case, getattr(reference, case.operator), case.tensors(CPU))
    last = list(plain)[-1]
    results = {name: tmp_path / f"{name}.pt" for name in ("base", "head")}
    for name, path in results.items():
        torch.save(plain | {last: plain[last] * 1.001} if name == spoilt else plain, path)
    fault = compare.check_parity(Trial(case, backward=True), results, CPU)
    if spoilt == "head":
        assert fault.startswith(f"{last} (")
        assert "the base's" in fault
    else:
        assert fault is None
    assert compare.check_parity(Trial(case, backward=False), results, CPU) is None


def test_another_shape_is_wrong(tmp_path):
    plain = parity.results(CASE, reference.lora_linear, CASE.tensors(CPU))
    results = {"base": tmp_path / "base.pt", "head": tmp_path / "head.pt"}
    torch.save(plain, results["base"])
    torch.save(plain | {"y": plain["y"][None]}, results["head"])
    assert "must have shape" in compare.check_parity(Trial(CASE, backward=False), results, CPU)


def test_a_process_that_imports_another_package_is_refused(package):
    (package / "elsewhere").mkdir()
    with trees.Tree("base", package, CPU, threads=1) as tree:
        tree.root = package / "elsewhere"
        with pytest.raises(trees.WorkerError, match=r"the base's process imported .*package/pyfused"):
            tree.wait()


def test_a_package_that_cannot_be_imported_is_an_error(package):
    (package / "pyfused" / "__init__.py").write_text("raise SystemExit(3)")
    refused = pytest.raises(trees.WorkerError, match="the head's process ended with status 3")
    with trees.Tree("head", package, CPU, threads=1) as tree, refused:
        tree.wait()


# ---- whole runs


# One thread: two that wait for each other beside the other tests' work make a call ten times as long.
OPTIONS = ["HEAD", "--device", "cpu", "--threads", "1", "--seconds", "0.1"]


@pytest.fixture
def main(package, monkeypatch):
    """The command line as the copy in ``package`` has it, with one pair of processes: each imports torch."""
    monkeypatch.setattr(compare, "ROOT", package)
    monkeypatch.setattr(compare, "PAIRS", 1)
    handler = signal.getsignal(signal.SIGTERM)
    yield lambda *arguments: compare.main([*OPTIONS, *arguments])
    signal.signal(signal.SIGTERM, handler)


def test_equal_trees_pass(main, monkeypatch, capfd):
    monkeypatch.setattr(compare, "PAIRS", 2)
    # A loss that no busy machine makes of nothing.
    status = main("-k", "lora_linear 16x64", "--loss", "0.5")
    output = capfd.readouterr().out
    assert status == 0, output
    assert "2 trials: " in output
    assert output.endswith("0 lost, 0 wrong, 0 no base\n")


def test_a_head_that_sleeps_has_lost_and_what_is_new_has_no_base(package, main, capfd):
    init = package / "pyfused" / "__init__.py"
    text = init.read_text()
    init.write_text(f"{text}\ndel projection_residual\n")
    _git(package, "commit", "--quiet", "-a", "-m", "no projection_residual yet")
    slow = "lambda *args, **options: time.sleep(3e-3) or quick(*args, **options)"
    init.write_text(f"{text}\nimport time\n\nquick, lora_linear = lora_linear, {slow}\n")
    status = main("-k", "16x64->64")
    output = capfd.readouterr().out
    assert status == 1, output
    assert "no attribute 'projection_residual'" in output
    assert output.endswith("4 trials: 0 ok, 0 inconclusive, 2 lost, 0 wrong, 2 no base\n")


def test_a_head_with_other_numbers_is_wrong(package, main, capfd):
    init = package / "pyfused" / "__init__.py"
    other = "lambda *args, **options: quick(*args, **options) * 1.001"
    init.write_text(f"{init.read_text()}\nquick, lora_linear = lora_linear, {other}\n")
    assert main("-k", "lora_linear 16x64") == 1
    assert capfd.readouterr().out.endswith("2 trials: 0 ok, 0 inconclusive, 0 lost, 2 wrong, 0 no base\n")


def _left(package: Path, prefix: str = "pyfused-") -> list[Path]:
    return list((package.parent / "scratch").glob(f"{prefix}*"))


@pytest.mark.parametrize("moment", ["pyfused-base-", "pyfused-compare-"])
def test_an_interrupted_run_leaves_nothing(package, moment):
    scratch = package.parent / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "pyfused.bench.gate.compare", "HEAD", "--device", "cpu", "-k", "lora_linear"]
    environment = os.environ | {"PYTHONPATH": str(package), "TMPDIR": str(scratch)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=package, env=environment, stdout=pipe, stderr=pipe, text=True) as run:
        while run.poll() is None and not _left(package, moment):
            time.sleep(0.02)
        run.terminate()
        # Until every process that holds the other end of the pipe has ended.
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 2, errors
    assert "interrupted" in errors
    assert _left(package) == []
    assert _git(package, "status", "--porcelain") == ""
