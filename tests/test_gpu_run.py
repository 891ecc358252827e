"""`make gpu` without a GPU: its steps are small programs, and scripts stand for nvidia-smi and ncu."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pyfused.bench import gpu, operators, plugin, rows, steps, traffic
from pyfused.bench.session import Session, Settings
from pyfused.bench.steps import Runner, Step

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


def _python(code: str):
    return lambda seconds: [sys.executable, "-c", code]


def _runner(directory: Path, budget: float = 100.0) -> Runner:
    return Runner(directory, budget, {"commit": "abc"}, directory, {"BASE": "base"})


def _recorded(directory: Path) -> dict:
    return json.loads((directory / "steps.json").read_text())


def _script(path: Path, code: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{code}")
    path.chmod(0o755)
    return path


def _wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def _is_running(pid: int) -> bool:
    try:
        # A process that has ended and that nobody has waited for yet is a "Z".
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(steps, "_AFTER_INTERRUPT", 0.5)
    monkeypatch.setattr(steps, "_AFTER_TERMINATE", 0.3)


# ---- steps


def test_every_outcome_stands_in_the_record_and_in_the_table(tmp_path, capsys):
    runner = _runner(tmp_path)
    good = runner.run(
        [
            Step(
                "fine", 1, _python("import os; print('all', os.environ['BASE'], os.environ['MORE'])"), {"MORE": "more"}
            ),
            Step("loud", 1, _python("print('a table')"), refusals=("a (table)",), shown=True),
            Step("broken", 1, _python("print('what broke'); raise SystemExit(3)")),
            Step("no tool", 1, _python("raise SystemExit(1)"), absent="the tool was not found"),
            Step("refused", 1, _python("print('E: not here. '); raise SystemExit(1)"), refusals=("never", "E: (.*)")),
            Step("no such program", 1, lambda seconds: ["/nowhere/program"], refusals=("E: (.*)",)),
        ]
    )
    assert not good
    record = _recorded(tmp_path)
    assert (record["commit"], record["budget"]) == ("abc", 100.0)
    found = {item["name"]: item for item in record["steps"]}
    outcomes = {name: (item["status"], item["exit_status"], item["reason"]) for name, item in found.items()}
    assert outcomes == {
        "fine": ("passed", 0, None),
        "loud": ("passed", 0, None),
        "broken": ("failed", 3, None),
        "no tool": ("skipped", None, "the tool was not found"),
        "refused": ("skipped", 1, "not here."),
        "no such program": ("failed", 127, None),
    }
    assert found["fine"]["tail"] == "all base more\n"
    assert found["fine"]["command"][0] == sys.executable
    assert found["fine"]["seconds"] > 0
    assert "No such file" in found["no such program"]["tail"]
    assert "==== fine\nall base more\n==== loud\na table\n" in (tmp_path / "output.log").read_text()
    printed = capsys.readouterr().out
    # What passed is not repeated, unless it is worth reading.
    assert "all base more" not in printed
    assert "a table" in printed
    assert "what broke" in printed
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in runner.table().splitlines()[1:])
    assert re.fullmatch(r"failed +\d+ +\d+  exit status 3", lines["broken"])
    assert re.fullmatch(r"skipped +the tool was not found", lines["no tool"])
    assert {path.name for path in tmp_path.iterdir()} == {"steps.json", "output.log"}


def test_passed_and_skipped_steps_make_a_good_run(tmp_path):
    runner = _runner(tmp_path)
    assert runner.run([Step("fine", 1, _python("")), Step("no tool", 1, _python(""), absent="it was not found")])


_PARENT = """
import subprocess, sys, time
deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("summed up", flush=True)
"""


@pytest.fixture(params=[False, True], ids=["", "in the background"])
def background(request):
    """A shell's job in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if request.param else signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_step_that_overruns_is_stopped_with_its_children_and_the_next_begins(
    tmp_path, monkeypatch, impatient, background
):
    # Time enough to start, to sum up and for the next one on a machine that is busy.
    monkeypatch.setattr(steps, "_AFTER_INTERRUPT", 10.0)
    runner = _runner(tmp_path, 40.3)
    assert not runner.run([Step("slow", 1, _python(_PARENT)), Step("next", 9, _python(""))])
    slow, following = runner.outcomes
    assert (slow.status, following.status) == ("overran", "passed")
    assert slow.limit == pytest.approx(3.0, abs=0.1)
    assert slow.limit <= slow.seconds < slow.limit + 10.0
    pid, _, rest = slow.tail.partition("\n")
    assert rest == "summed up\n"
    _wait_for(lambda: not _is_running(int(pid)), 5.0)


def test_a_step_that_ignores_every_request_is_killed(tmp_path, impatient):
    code = "import signal, time\nfor n in (2, 15): signal.signal(n, signal.SIG_IGN)\nprint('deaf', flush=True)\n"
    runner = _runner(tmp_path, 2.5)
    runner.run([Step("deaf", 1, _python(code + "time.sleep(60)"))])
    (deaf,) = runner.outcomes
    assert (deaf.status, deaf.exit_status, deaf.tail) == ("overran", -signal.SIGKILL, "deaf\n")
    assert deaf.seconds < 5.0


def test_what_a_step_leaves_behind_is_stopped(tmp_path):
    code = "import subprocess, sys\nprint(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    runner = _runner(tmp_path)
    assert runner.run([Step("forgetful", 1, _python(code))])
    _wait_for(lambda: not _is_running(int(runner.outcomes[0].tail)), 5.0)


def test_time_that_is_left_goes_to_later_steps(tmp_path):
    seen = []

    def asks(seconds):
        seen.append(seconds)
        return [sys.executable, "-c", ""]

    runner = _runner(tmp_path, 100.0 + 16.0)
    chosen = [Step("first", 1, asks), Step("absent", 6, asks, absent="not here"), Step("second", 3, asks)]
    runner.run([*chosen, Step("third", 1, asks)])
    # 100 seconds by 1 : 3 : 1 (absent steps want nothing), then what is left of them by 3 : 1, and all for the last.
    assert seen == pytest.approx([20.0, 75.0, 100.0], abs=2.0)
    assert [item.limit for item in runner.outcomes if item.limit] == pytest.approx(seen, abs=0.1)


def test_steps_for_which_no_time_is_left_are_not_run(tmp_path, impatient):
    runner = _runner(tmp_path, 1.0)
    assert not runner.run([Step("late", 1, _python(""))])
    assert (runner.outcomes[0].status, runner.outcomes[0].reason) == ("not run", "no time was left")


_RUN = """
import sys
from pathlib import Path
from pyfused.bench import gpu
from pyfused.bench.steps import Step
hang = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
chosen = [Step(name, 1, lambda _, code=code: [sys.executable, "-c", code])
          for name, code in (("first", "print('done')"), ("second", hang), ("third", ""))]
gpu.plan = lambda *given: chosen
gpu.clocks_logged = lambda file: gpu.contextlib.nullcontext()
with gpu.steps.terminable():
    sys.exit(gpu._run(gpu.plan(), Path(sys.argv[1]), 100.0, {"commit": "abc"}))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_a_valid_record_and_nothing_running(tmp_path, number):
    run = subprocess.Popen(
        [sys.executable, "-c", _RUN, str(tmp_path / "record")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    log = tmp_path / "record" / "output.log"
    try:
        _wait_for(lambda: log.exists() and re.search(r"==== second\n\d+\n", log.read_text()), 60.0)
        assert [item["status"] for item in _recorded(log.parent)["steps"]] == ["passed", "running", "waiting"]
        run.send_signal(number)
        printed, _ = run.communicate(timeout=30)
    finally:
        run.kill()
    assert run.returncode == 1
    first, second, third = _recorded(log.parent)["steps"]
    assert (first["status"], second["status"], third["status"]) == ("passed", "interrupted", "waiting")
    assert second["seconds"] is not None
    _wait_for(lambda: not _is_running(int(second["tail"])), 5.0)
    assert f"make gpu: stopped by {number.name}" in printed
    assert re.search(r"^second +interrupted", printed, re.MULTILINE)


# ---- what `make gpu` runs

EVERYTHING = gpu.Machine("90", frozenset(gpu.WANTED), 6, "/cuda/compute-sanitizer", "/cuda/ncu")
BARE = gpu.Machine("80", frozenset({"pytest"}), 6, None, None)


def _commands(machine: gpu.Machine, seconds: float = 165.0) -> dict[str, str]:
    return {step.name: " ".join(step.command(seconds)) for step in gpu.plan(machine, Path("/record"), "abc")}


def test_steps_come_in_the_order_of_their_worth():
    names = [step.name for step in gpu.plan(EVERYTHING, Path("/record"), None)]
    assert names == [
        "build", "tests", "tests that need the GPU alone", "benchmark", "DRAM bytes", "memcheck", "racecheck",
        "initcheck",
    ]  # fmt: skip
    assert sum(step.share for step in gpu.plan(EVERYTHING, Path("/record"), None)) == 480


def test_commands_use_what_is_there():
    full, bare = _commands(EVERYTHING), _commands(BARE)
    for name in ("tests", "memcheck"):
        assert ("--timeout 120" in full[name], "--timeout" in bare[name]) == (True, False)
        assert ("--benchmark-disable" in full[name], "--benchmark-disable" in bare[name]) == (True, False)
    assert ("-n 6" in full["tests"], "-n " in bare["tests"]) == (True, False)
    # These have the device for themselves.
    assert not any("-n " in full[name] for name in ("tests that need the GPU alone", "memcheck"))
    absent = {step.name: step.absent for step in gpu.plan(BARE, Path("/record"), None) if step.absent}
    assert absent == {
        "DRAM bytes": "ncu was not found",
        **dict.fromkeys(("memcheck", "racecheck", "initcheck"), "compute-sanitizer was not found"),
    }
    assert not any(step.absent for step in gpu.plan(EVERYTHING, Path("/record"), None))


def test_the_build_is_for_this_gpu_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("PYFUSED_CUDA_ARCHS", raising=False)
    assert gpu.plan(BARE, Path("/record"), None)[0].environment == {"PYFUSED_CUDA": "1", "PYFUSED_CUDA_ARCHS": "80"}
    monkeypatch.setenv("PYFUSED_CUDA_ARCHS", "80;90")
    assert gpu.plan(BARE, Path("/record"), None)[0].environment["PYFUSED_CUDA_ARCHS"] == "80;90"


def test_the_benchmarks_time_per_row_follows_from_its_share():
    def seconds(share: float) -> float:
        return float(re.search(r"--seconds (\S+)", _commands(EVERYTHING, share)["benchmark"])[1])

    timed = 4 * len(operators.timed_cases(torch.device("cuda")))
    assert timed > 80
    assert 0.2 * 165 < (timed + 20) * seconds(165.0) < 0.4 * 165
    assert seconds(330.0) == pytest.approx(2 * seconds(165.0), abs=0.02)
    assert seconds(1.0) == 0.1
    for name in ("benchmark", "DRAM bytes"):
        assert "--record /record" in _commands(EVERYTHING)[name]
        assert _commands(EVERYTHING)[name].count("--commit abc") == 1


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
    assert [name for name in names if not any(part in name for part in gpu.OWN_KERNELS)] == []
    for path in (ROOT / "csrc").glob("*.cu*"):
        assert "__global__" not in path.read_text() or "namespace pyfused" in path.read_text(), path


def _reason(name: str, output: str) -> str | None:
    """Why the step would count as skipped, had its command failed with this output."""
    (step,) = (step for step in gpu.plan(EVERYTHING, Path("/record"), None) if step.name == name)
    found = (re.search(pattern, output) for pattern in step.refusals)
    return next((match[1] for match in found if match), None)


def test_refusals_of_the_tools_are_told_from_failures():
    assert _reason("build", "pyfused: PYFUSED_CUDA=1, but nvcc was not found (looked in PATH)\n").startswith("nvcc was")
    assert _reason("build", "csrc/launch.cu does not compile") is None
    denied = "==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access counters\n"
    assert "ERR_NVGPUCTRPERM" in _reason("DRAM bytes", denied)
    lacking = "==ERROR== Failed to initialize the profiler: LibraryNotLoaded"
    assert _reason("DRAM bytes", lacking) == "Failed to initialize the profiler: LibraryNotLoaded"
    assert _reason("DRAM bytes", "==ERROR== The application returned an error code (1).") is None
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
    properties = SimpleNamespace(uuid="some-uuid", L2_cache_size=1 << 20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    rows._fixed_provenance.cache_clear()
    yield
    rows._fixed_provenance.cache_clear()


def test_a_whole_run_has_one_directory(tmp_path, monkeypatch, capsys, card):
    smi = _script(tmp_path / "nvidia-smi", _SMI)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    find = gpu.importlib.util.find_spec
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name == "open_clip" else find(name))
    given = []

    def plan(*arguments):
        given.append(arguments)
        logging = f"import pathlib, time\nwhile not pathlib.Path({str(smi)!r} + '.pid').exists(): time.sleep(0.02)"
        return [Step("wait", 1, _python(logging)), Step("bad", 1, _python("raise SystemExit(1)"))]

    monkeypatch.setattr(gpu, "plan", plan)
    arguments = ["--output", str(tmp_path / "out"), "--commit", "abc", "--budget", "60", "--workers", "3"]
    assert gpu.main(arguments) == 1
    ((machine, record, commit),) = given
    assert (machine.capability, machine.workers, commit) == ("90", 3, "abc")
    assert "open_clip" not in machine.modules
    assert "pytest" in machine.modules
    assert record.parent == tmp_path / "out" / "nvidia-h200"
    assert {path.name for path in record.iterdir()} == {"steps.json", "output.log", "clocks.csv"}
    assert "1980 MHz" in (record / "clocks.csv").read_text()
    _wait_for(lambda: not _is_running(int(Path(f"{smi}.pid").read_text())), 5.0)
    facts = _recorded(record)
    assert facts["missing"]["open_clip"] == "rows and tests of CLIP models are skipped"
    assert facts["provenance"]["driver"] == "580.00"
    assert facts["provenance"]["commit"]
    assert [item["status"] for item in facts["steps"]] == ["passed", "failed"]
    printed = capsys.readouterr().out
    assert "not found: open_clip: rows and tests of CLIP models are skipped" in printed
    assert printed.endswith(f"record: {record}\n")
    monkeypatch.setattr(gpu, "plan", lambda *arguments: [])
    assert gpu.main(["--output", str(tmp_path / "other")]) == 0


def test_without_a_gpu_it_stops_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "make gpu: torch sees no CUDA device\n"
    assert not (tmp_path / "out").exists()


def test_an_installed_package_is_no_checkout(tmp_path, monkeypatch, capsys, card):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == f"make gpu: needs a checkout, {tmp_path} is none\n"


@pytest.mark.parametrize("wrong", [["--budget", "0"], ["--budget", "nan"], ["--workers", "0"]])
def test_wrong_arguments_are_named(wrong, capsys):
    with pytest.raises(SystemExit):
        gpu.main(wrong)
    assert f"{wrong[0]} must be" in capsys.readouterr().err


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
    Session(Settings(torch.device(name), record=tmp_path))
    assert chosen == ([1] if name == "cuda:1" else [])


def test_operators_are_measured_before_whole_models():
    files = ("test_training", "test_mine", "test_models", "test_operators", "test_overhead", "test_operators")
    items = [SimpleNamespace(path=Path(f"{name}.py"), number=number) for number, name in enumerate(files)]
    plugin.pytest_collection_modifyitems(items)
    assert [item.number for item in items] == [3, 5, 4, 2, 0, 1]


# ---- DRAM bytes

_HEAD = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
)
_HEAD += '"CC","dram__bytes_read.sum","dram__bytes_write.sum"'
_FLUSH = "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<int, at::native::MaxNanFunctor<int>>>(T3)"


def _table(*launches: tuple[str, str, str], units: tuple[str, str] = ("byte", "byte")) -> str:
    lines = ["==PROF== Connected to process 4242 (/usr/bin/python3.12)", _HEAD]
    lines.append('"","","","","","","","","","","","{}","{}"'.format(*units))
    for number, (name, read, written) in enumerate(launches):
        lines.append(
            f'"{number}","4242","python3.12","127.0.0.1","{name}","1","7","(512, 1, 1)","(264, 1, 1)","0","9.0",'
            f'"{read}","{written}"'
        )
    return "\n".join([*lines, "==PROF== Disconnected from process 4242", ""])


def test_the_table_of_ncu_is_read():
    text = _table(("_lora_gemm_kernel", "1,234,567", "89.00"), ("pyfused::rows_kernel<64, true>(Adapter)", "0", "5"))
    assert traffic.kernels_of(text) == [
        traffic.Kernel("_lora_gemm_kernel", 1_234_567, 89),
        traffic.Kernel("pyfused::rows_kernel<64, true>(Adapter)", 0, 5),
    ]
    (scaled,) = traffic.kernels_of(_table(("one", "1.50", "2,000.25"), units=("Mbyte", "Kbyte")))
    assert (scaled.read, scaled.written) == (1_500_000, 2_000_250)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("==WARNING== No kernels were profiled.\n", "ncu printed no table"),
        (_table(), "ncu printed no table"),
        (_table(("one", "1", "2")).replace("dram__bytes_write", "dram__sectors"), "ncu printed no table"),
        (_table(("one", "1", "2"), units=("byte", "sector")), "must be in one of .* got 'sector'"),
        (_table(("one", "n/a", "2")), "could not convert"),
    ],
)
def test_a_table_that_says_nothing_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        traffic.kernels_of(text)


def test_bytes_are_summed_over_the_kernels_of_each_call():
    launches = [(_FLUSH, 9000, 7), ("one", 100, 10), ("two", 200, 20), (_FLUSH, 9000, 5)]
    launches += [(_FLUSH, 9000, 0), ("three", 300, 30), (_FLUSH, 9000, 1)]
    kernels = [traffic.Kernel(*launch) for launch in launches]
    assert traffic.by_call(kernels, 2) == [
        {"kernels": 2, "read_bytes": 300, "written_bytes": 35},
        {"kernels": 1, "read_bytes": 300, "written_bytes": 31},
    ]
    with pytest.raises(ValueError, match="two flushes for each of 3 calls, got 4"):
        traffic.by_call(kernels, 3)


def test_one_case_of_each_operator_is_larger_than_the_cache():
    cases = traffic.measured_cases(CPU, 1 << 20)
    assert [case.operator for case in cases] == list(operators.OPERATORS)
    first = [module.timed_cases(CPU)[0] for module in operators.OPERATORS.values()]
    assert cases == first
    assert traffic.measured_cases(CPU, 1 << 40) != first


_NCU = """
import json, sys
assert sys.argv[sys.argv.index("--clock-control") + 1] == "none", sys.argv
calls = [{{"name": "a call", "measured": "forward", "facts": {{"dtype": "bfloat16", "bytes": 1000}}}}]
open(sys.argv[sys.argv.index("--calls") + 1], "w").write(json.dumps(calls))
print({table!r})
sys.exit({status})
"""


def test_rows_of_bytes_join_the_record(tmp_path, monkeypatch, capsys):
    table = _table((_FLUSH, "5", "5"), ("one", "1,100", "0"), (_FLUSH, "5", "150"))
    ncu = _script(tmp_path / "ncu", _NCU.format(table=table, status=0))
    monkeypatch.setattr(rows, "provenance", lambda device, commit: {"device": device.type, "commit": commit})
    rows.RowFile(tmp_path / "record").append(rows.Row("timed", "operator", "forward"))
    arguments = ["--record", str(tmp_path / "record"), "--ncu", str(ncu), "--commit", "abc"]
    assert traffic.main(arguments) == 0
    timed, row = rows.read_rows(tmp_path / "record" / "rows.json")
    assert (timed.name, row.name, row.kind, row.measured) == ("timed", "a call", "traffic", "forward")
    counts = {"kernels": 1, "read_bytes": 1100, "written_bytes": 150, "bytes": 1000}
    assert row.facts == {"dtype": "bfloat16"} | counts
    assert row.provenance == {"device": "cuda", "commit": "abc"}
    assert "a call, forward: 1.25 times the 0.0 MB that it must move" in capsys.readouterr().out


def test_counters_that_cannot_be_read_are_a_reason_to_skip(tmp_path, capsys):
    said = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access GPU Performance Counters."
    ncu = _script(tmp_path / "ncu", _NCU.format(table=said, status=1))
    assert traffic.main(["--record", str(tmp_path / "record"), "--ncu", str(ncu)]) == 1
    printed = capsys.readouterr().out
    assert f"exit status 1 of {ncu} --csv --page raw" in printed
    assert _reason("DRAM bytes", printed) == said
    assert not (tmp_path / "record").exists()
