"""`make gpu` without a GPU: the steps it takes, what they run and what it refuses; a script stands for nvidia-smi."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import is_running, python, script, wait_for
from tree import ROOT

from pyfused.bench.cases import operators
from pyfused.bench.gpu import library, run, schedule
from pyfused.bench.gpu.schedule import STEPS, Machine
from pyfused.bench.gpu.steps import Step
from pyfused.bench.record import rows
from pyfused.bench.run import plugin
from pyfused.bench.run.session import Session, Settings

pytestmark = pytest.mark.host

CPU = torch.device("cpu")


def _recorded(directory: Path) -> dict:
    return json.loads((directory / "steps.json").read_text())


# ---- what `make gpu` runs

EVERYTHING = Machine("NVIDIA H200", "90", 132, frozenset(schedule.WANTED), 6, "/cuda/compute-sanitizer", "/cuda/ncu")
BARE = Machine("NVIDIA A100", "80", 108, frozenset({"pytest"}), 6, None, None)


def _planned(machine: Machine, *names: str, commit: str | None = None) -> list[Step]:
    return schedule.steps(machine, Path("/record"), commit, names or tuple(STEPS))


def _commands(machine: Machine, seconds: float = 165.0) -> dict[str, str]:
    return {step.name: " ".join(step.command(seconds)) for step in _planned(machine, commit="abc")}


def test_steps_come_in_the_order_of_their_worth_whatever_the_order_they_are_named_in():
    assert [step.name for step in _planned(EVERYTHING)] == list(STEPS)
    assert list(STEPS)[:4] == ["build", "truth", "questions", "speed"]
    assert [step.name for step in _planned(EVERYTHING, "stress", "speed", "truth")] == ["truth", "speed", "stress"]
    whole = {step.name: step.share for step in _planned(EVERYTHING) if step.whole}
    assert whole == {"build": 120, "truth": 90, "questions": 90, "speed": 180}


def test_commands_use_what_is_there():
    full, bare = _commands(EVERYTHING), _commands(BARE)
    for name in ("tests", "memcheck"):
        assert ("--timeout 120" in full[name], "--timeout" in bare[name]) == (True, False)
        assert ("--benchmark-disable" in full[name], "--benchmark-disable" in bare[name]) == (True, False)
    for name in ("small", "tests", "triton", "others"):
        assert ("-n 6" in full[name], "-n " in bare[name]) == (True, False)
    # These have the device for themselves.
    assert not any("-n " in full[name] for name in ("alone", "stress", "memcheck"))
    absent = {step.name: step.absent for step in _planned(BARE) if step.absent}
    assert absent == {
        "bytes": "ncu was not found",
        **dict.fromkeys(("memcheck", "racecheck", "initcheck"), "compute-sanitizer was not found"),
    }
    assert not any(step.absent for step in _planned(EVERYTHING))


def test_the_build_is_for_this_gpu_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("PYFUSED_CUDA_ARCHS", raising=False)
    assert _planned(BARE)[0].environment == {"PYFUSED_CUDA": "1", "PYFUSED_CUDA_ARCHS": "80"}
    monkeypatch.setenv("PYFUSED_CUDA_ARCHS", "80;90")
    assert _planned(BARE)[0].environment["PYFUSED_CUDA_ARCHS"] == "80;90"


def test_steps_that_measure_are_told_their_time_and_their_record():
    commands = _commands(EVERYTHING, 100.0)
    for name in ("truth", "questions", "speed"):
        assert f"-m pyfused.bench.gpu.programs.{name} --record /record --seconds 90 --workers 6" in commands[name]
    for name, select in (("models", "test_models"), ("training", "test_training")):
        options = f"--record /record -k {select} --commit abc --attempts 1 --seconds 1"
        assert f"bench --targets --device cuda {options}" in commands[name]
    assert {name for name, command in commands.items() if "--commit abc" in command} == {
        "truth", "questions", "speed", "models", "training", "bytes",
    }  # fmt: skip


def test_the_sanitizer_runs_on_the_marked_tests_and_initcheck_without_poison():
    commands = _commands(EVERYTHING)
    for name in ("memcheck", "racecheck", "initcheck"):
        command = commands[name].split()
        assert command[:3] == ["/cuda/compute-sanitizer", "--tool", name]
        files = {Path(word).name for word in command if word.startswith("tests/")}
        assert {f"test_{operator}.py" for operator in operators.OPERATORS} <= files
        assert "test_house.py" not in files
        assert ("--unpoisoned" in command) == (name == "initcheck")
        # A tool that must know what was written has to see every kernel.
        assert ("--kernel-name" in command) == (name != "initcheck")
        assert not [word for word in command[command.index("pytest") :] if word.startswith("kns=")]


def test_the_sanitizer_knows_our_kernels_by_their_names():
    text = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    names = re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)
    assert len(names) > 10
    assert [name for name in names if not any(part in name for part in schedule.OWN_KERNELS)] == []
    for path in (ROOT / "csrc").glob("*.cu*"):
        assert "__global__" not in path.read_text() or "namespace pyfused" in path.read_text(), path


def _reason(name: str, output: str) -> str | None:
    """Why the step would count as skipped, had its command failed with this output."""
    (step,) = _planned(EVERYTHING, name)
    found = (re.search(pattern, output) for pattern in step.refusals)
    return next((match[1] for match in found if match), None)


def test_refusals_of_the_tools_are_told_from_failures():
    assert _reason("build", "pyfused: PYFUSED_CUDA=1, but nvcc was not found (looked in PATH)\n").startswith("nvcc was")
    assert _reason("build", "csrc/launch.cu does not compile") is None
    denied = "==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access counters\n"
    assert "ERR_NVGPUCTRPERM" in _reason("bytes", denied)
    lacking = "==ERROR== Failed to initialize the profiler: LibraryNotLoaded"
    assert _reason("bytes", lacking) == "Failed to initialize the profiler: LibraryNotLoaded"
    assert _reason("bytes", "==ERROR== The application returned an error code (1).") is None
    assert "not supported" in _reason("racecheck", "========= Error: Device not supported. Please refer to ...")
    assert _reason("racecheck", "========= ERROR SUMMARY: 3 errors") is None


_SMI = """
import sys, time
if "-lms" not in sys.argv:
    sys.exit(print("580.00"))
assert "--id=GPU-some-uuid" in sys.argv and "--format=csv" in sys.argv, sys.argv
print("timestamp, clocks.current.sm [MHz]\\nnow, 1980 MHz", flush=True)
open(sys.argv[0] + ".pid", "w").write(str(__import__("os").getpid()))
time.sleep(60)
"""


@pytest.fixture
def card(monkeypatch):
    """torch.cuda says that there is one."""
    properties = SimpleNamespace(uuid="some-uuid", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    rows._fixed_provenance.cache_clear()
    monkeypatch.setattr(run, "device_lost", lambda: None)
    yield
    rows._fixed_provenance.cache_clear()


def test_a_whole_run_has_one_directory(tmp_path, monkeypatch, capsys, card):
    smi = script(tmp_path / "nvidia-smi", _SMI)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    find = run.importlib.util.find_spec
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if name == "open_clip" else find(name))
    given = []

    def planned(*arguments):
        given.append(arguments)
        logging = f"import pathlib, time\nwhile not pathlib.Path({str(smi)!r} + '.pid').exists(): time.sleep(0.02)"
        return [Step("wait", 1, python(logging)), Step("bad", 1, python("print('what broke'); exit(1)"))]

    monkeypatch.setattr(schedule, "steps", planned)
    arguments = ["--output", str(tmp_path / "out"), "--commit", "abc", "--budget", "60", "--workers", "3"]
    assert run.main([*arguments, "--steps", "speed,truth"]) == 1
    ((machine, record, commit, chosen),) = given
    sanitizer = schedule.tool("compute-sanitizer")
    assert machine == Machine("NVIDIA H200", "90", 132, machine.modules, 3, sanitizer, machine.ncu)
    assert (commit, chosen) == ("abc", ["speed", "truth"])
    assert "open_clip" not in machine.modules
    assert "pytest" in machine.modules
    assert record.parent == tmp_path / "out" / "nvidia-h200"
    assert {path.name for path in record.iterdir()} == {"steps.json", "output.log", "clocks.csv"}
    assert "1980 MHz" in (record / "clocks.csv").read_text()
    wait_for(lambda: not is_running(int(Path(f"{smi}.pid").read_text())), 5.0)
    facts = _recorded(record)
    assert facts["missing"]["open_clip"] == "rows and tests of CLIP models are skipped"
    assert facts["provenance"]["driver"] == "580.00"
    assert facts["provenance"]["commit"]
    assert [item["status"] for item in facts["steps"]] == ["passed", "failed"]
    printed = capsys.readouterr().out
    assert "not found: open_clip: rows and tests of CLIP models are skipped" in printed
    assert printed.endswith(f"record: {record}\nbad failed\n    what broke\n")

    # The same record again: what passed does not run, and what failed does.
    monkeypatch.setattr(
        schedule, "steps", lambda *given: [Step("wait", 1, python("exit(1)")), Step("bad", 1, python(""))]
    )
    assert run.main(["--resume", str(record), "--commit", "abc"]) == 0
    assert [item["status"] for item in _recorded(record)["steps"]] == ["passed", "passed"]
    assert (record / "clocks.csv").read_text().count("1980 MHz") >= 1

    # A copy of it elsewhere, as where only one folder comes back.
    monkeypatch.setattr(schedule, "steps", lambda *given: [Step("more", 1, python(""))])
    back = tmp_path / "back"
    assert run.main(["--resume", str(record), "--output", str(back), "--commit", "abc"]) == 0
    copy = back / "nvidia-h200" / record.name
    assert [item["name"] for item in _recorded(copy)["steps"]] == ["wait", "bad", "more"]
    assert [item["name"] for item in _recorded(record)["steps"]] == ["wait", "bad"]
    # Where it is there already it goes on; another one is not written over.
    assert run.main(["--resume", str(copy), "--output", str(back), "--commit", "abc"]) == 0
    capsys.readouterr()
    assert run.main(["--resume", str(record), "--output", str(back), "--commit", "abc"]) == 1
    assert f"{copy} is there already" in capsys.readouterr().err


def test_the_answers_stand_once_more_before_the_table(tmp_path, monkeypatch, capsys):
    said = "\n".join(f"line {number}" for number in range(40))
    step = Step("questions", 1, python(f"print({said!r})"), shown=True)
    after = Step("speed", 1, python("print('long')"), shown=True)
    monkeypatch.setattr(run, "device_lost", lambda: None)
    monkeypatch.setattr(run, "clocks_logged", lambda file: contextlib.nullcontext())
    assert run._run([step, after], tmp_path, 60.0, {}) == 0
    end = capsys.readouterr().out.partition("long\n")[2]
    assert "line 33" not in end
    assert end.index("line 34\n") < end.index("line 39\n") < end.index("step ")


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (None, "is no record: No such file or directory"),
        ("no JSON", "steps.json is no record of steps"),
        ({"steps": [], "provenance": {"device": "NVIDIA B200"}}, "is of device NVIDIA B200, this is NVIDIA H200"),
        ({"steps": [], "provenance": {"commit": "feed"}}, "is of commit feed, this is "),
    ],
)
def test_what_cannot_be_resumed_is_refused(tmp_path, monkeypatch, capsys, card, before, message):
    monkeypatch.setattr(rows, "provenance", lambda device, commit: {"device": "NVIDIA H200", "commit": "beef"})
    monkeypatch.setattr(run, "_run", lambda *given: pytest.fail("it ran"))
    if before is not None:
        (tmp_path / "steps.json").write_text(before if isinstance(before, str) else json.dumps(before))
    assert run.main(["--resume", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"make gpu: --resume: {tmp_path}")
    assert message in error
    assert {path.name for path in tmp_path.iterdir()} <= {"steps.json"}


def test_a_record_that_cannot_be_written_is_named(tmp_path, monkeypatch, capsys, card):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(run, "_run", lambda *given: pytest.fail("it ran"))
    assert run.main(["--output", str(tmp_path / "file" / "below")]) == 1
    assert re.fullmatch(rf"make gpu: {tmp_path}/file/\S*: Not a directory\n", capsys.readouterr().err)


def test_a_record_that_cannot_be_written_any_more_ends_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "clocks_logged", lambda file: run.contextlib.nullcontext())
    # steps.json's new text cannot take its place, as on a full disk.
    spoil = f"import os; os.mkdir({str(tmp_path / 'steps.json.partial')!r})"
    chosen = [Step("fine", 1, python("")), Step("full", 1, python(spoil)), Step("never", 1, python("print('ran')"))]
    assert run._run(chosen, tmp_path, 60.0, {}) == 1
    assert capsys.readouterr().err == f"make gpu: {tmp_path / 'steps.json'}: Is a directory\n"
    assert [item["status"] for item in _recorded(tmp_path)["steps"]] == ["passed", "running", "waiting"]
    assert "ran" not in (tmp_path / "output.log").read_text()


def test_a_device_that_vanishes_ends_the_run_and_leaves_the_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "clocks_logged", lambda file: run.contextlib.nullcontext())
    monkeypatch.setattr(run, "_ASK", "raise RuntimeError('CUDA error: device-side fault')")
    chosen = [Step("fine", 1, python("")), Step("bad", 1, python("exit(1)")), Step("later", 1, python("print('ran')"))]
    assert run._run(chosen, tmp_path, 60.0, {}) == 1
    said = "the device is gone: RuntimeError: CUDA error: device-side fault"
    assert [(item["status"], item["reason"]) for item in _recorded(tmp_path)["steps"]] == [
        ("passed", None), ("failed", None), ("not run", said),
    ]  # fmt: skip
    assert capsys.readouterr().out.endswith(f"later not run: {said}\n")


def test_whether_a_device_answers(monkeypatch):
    monkeypatch.setattr(run, "_ASK", "")
    assert run.device_lost() is None
    monkeypatch.setattr(run, "_ASK", "raise SystemExit(3)")
    assert run.device_lost() == "the device is gone: exit status 3"


def test_a_dry_run_needs_no_gpu_and_says_what_fits(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--dry-run", "--workers", "16"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("NVIDIA H200, compute capability 9.0, 132 multiprocessors, 16 processes\n")
    lines = {line.split()[0]: line for line in printed.splitlines()[2:-1]}
    assert list(lines) == [name for name in STEPS if name not in schedule.NAMED_ONLY]
    assert re.search(r"^truth +130 +200 +90 +\d+$", lines["truth"])
    total, budget = re.search(r"^(\d+) s predicted of (\d+), .* a model, measured on no GPU$", printed, re.M).groups()
    assert int(total) <= int(budget) < 600
    assert run.main(["--dry-run", "--workers", "16", "--budget", "71", "--steps", "truth,tests"]) == 0
    assert "not in this call: 10 s are left; --resume" in capsys.readouterr().out
    # One core compiles too slowly for the most that truth may take.
    assert run.main(["--dry-run", "--workers", "1", "--steps", "truth,tests"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_a_library_takes_the_place_of_the_build(tmp_path, monkeypatch, capsys, card):
    done, chosen = [], []
    monkeypatch.setattr(library, "check", lambda path, capability: done.append(("check", path.name, capability)))
    monkeypatch.setattr(library, "place", lambda path: done.append(("place", path.name)))
    monkeypatch.setattr(schedule, "steps", lambda *given: chosen.extend(given[3]) or [])
    monkeypatch.setattr(run, "clocks_logged", lambda file: run.contextlib.nullcontext())
    assert run.main(["--output", str(tmp_path), "--library", "_C.abi3.so"]) == 0
    assert done == [("check", "_C.abi3.so", "90"), ("place", "_C.abi3.so")]
    assert chosen == [name for name in STEPS if name not in ("build", *schedule.NAMED_ONLY)]

    def unfit(path, capability):
        raise library.Unfit("it holds nothing")

    monkeypatch.setattr(library, "check", unfit)
    monkeypatch.setattr(run, "_run", lambda *given: pytest.fail("it ran"))
    assert run.main(["--output", str(tmp_path / "other"), "--library", "_C.abi3.so"]) == 1
    assert capsys.readouterr().err == "make gpu: --library: it holds nothing\n"
    assert len(done) == 2
    assert not (tmp_path / "other").exists()


def test_without_a_gpu_it_stops_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run, "_run", lambda *given: pytest.fail("it ran"))
    assert run.main(["--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "make gpu: torch sees no CUDA device\n"
    assert not (tmp_path / "out").exists()


def test_an_installed_package_is_no_checkout(tmp_path, monkeypatch, capsys, card):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert run.main([]) == 1
    assert capsys.readouterr().err == f"make gpu: needs a checkout, {tmp_path} is none\n"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--budget", "0"], "--budget must be a positive number of seconds up to 590, got 0"),
        (["--budget", "nan"], "--budget must be"),
        (["--budget", "601"], "--budget must be"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--steps", "truth,spead,"], "unknown steps 'spead', ''; known: build, truth, questions, speed, "),
        (["--steps", "build", "--library", "_C.abi3.so"], "--library takes the place of the step build"),
    ],
)
def test_wrong_arguments_are_named(wrong, message, capsys):
    with pytest.raises(SystemExit) as refused:
        run.main(wrong)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_help_lists_the_steps(capsys):
    with pytest.raises(SystemExit):
        run.main(["--help"])
    printed = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +{re.escape(what)}", printed, re.MULTILINE) for name, what in STEPS.items())


# ---- the record of the benchmark


def test_a_session_writes_where_it_is_told(tmp_path):
    session = Session(Settings(CPU, tmp_path / "output", record=tmp_path / "record"))
    session.add(rows.Row("first", "operator", "forward"))
    assert session.file.path == tmp_path / "record" / "rows.json"
    later = rows.RowFile(tmp_path / "record")
    later.append(rows.Row("second", "traffic", "forward"))
    assert [row.name for row in rows.read_rows(session.file.path)] == ["first", "second"]


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_session_takes_a_gpu_with_and_without_its_number(tmp_path, monkeypatch, name):
    chosen = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(rows, "device_name", lambda device: "NVIDIA H200")
    Session(Settings(torch.device(name), record=tmp_path))
    assert chosen == ([1] if name == "cuda:1" else [])


def test_short_rows_are_measured_before_operators_and_whole_models():
    files = ("test_training", "test_mine", "test_models", "test_operators", "test_overhead", "test_operators")
    items = [SimpleNamespace(path=Path(f"{name}.py"), number=number) for number, name in enumerate(files)]
    plugin.pytest_collection_modifyitems(items)
    assert [item.number for item in items] == [4, 3, 5, 2, 0, 1]
