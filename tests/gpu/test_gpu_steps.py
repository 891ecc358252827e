"""Steps in a given time, with small programs for commands: what they leave on disk, and what they leave running."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import is_running, python, wait_for
from tree import ROOT

from pyfused.bench import signals
from pyfused.bench.gpu import steps
from pyfused.bench.gpu.steps import Runner, Step

pytestmark = pytest.mark.host


def _runner(directory: Path, budget: float = 100.0) -> Runner:
    return Runner(directory, budget, {"commit": "abc"}, directory, {"BASE": "base"})


def _recorded(directory: Path) -> dict:
    return json.loads((directory / "steps.json").read_text())


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
                "fine", 1, python("import os; print('all', os.environ['BASE'], os.environ['MORE'])"), {"MORE": "more"}
            ),
            Step("loud", 1, python("print('a table')"), refusals=("a (table)",), shown=True),
            Step("broken", 1, python("print('what broke'); raise SystemExit(3)")),
            Step("no tool", 1, python("raise SystemExit(1)"), absent="the tool was not found"),
            Step("refused", 1, python("print('E: not here. '); raise SystemExit(1)"), refusals=("never", "E: (.*)")),
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
    assert runner.run([Step("fine", 1, python("")), Step("no tool", 1, python(""), absent="it was not found")])


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
    assert not runner.run([Step("slow", 1, python(_PARENT)), Step("next", 9, python(""))])
    slow, following = runner.outcomes
    assert (slow.status, following.status) == ("overran", "passed")
    assert slow.limit == pytest.approx(3.0, abs=0.1)
    assert slow.limit <= slow.seconds < slow.limit + 10.0
    pid, _, rest = slow.tail.partition("\n")
    assert rest == "summed up\n"
    wait_for(lambda: not is_running(int(pid)), 5.0)


def test_a_step_that_ignores_every_request_is_killed(tmp_path, impatient):
    code = "import signal, time\nfor n in (2, 15): signal.signal(n, signal.SIG_IGN)\nprint('deaf', flush=True)\n"
    runner = _runner(tmp_path, 2.5)
    runner.run([Step("deaf", 1, python(code + "time.sleep(60)"))])
    (deaf,) = runner.outcomes
    assert (deaf.status, deaf.exit_status, deaf.tail) == ("overran", -signal.SIGKILL, "deaf\n")
    assert deaf.seconds < 5.0


def test_what_a_step_leaves_behind_is_stopped(tmp_path):
    code = "import subprocess, sys\nprint(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    runner = _runner(tmp_path)
    assert runner.run([Step("forgetful", 1, python(code))])
    wait_for(lambda: not is_running(int(runner.outcomes[0].tail)), 5.0)


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


def test_steps_for_which_too_little_time_is_left_are_not_run(tmp_path):
    runner = _runner(tmp_path, 36.0)
    assert not runner.run([Step("large", 1, python(""), needs=30.0), Step("small", 1, python(""), needs=2.0)])
    large, small = runner.outcomes
    assert (large.status, small.status) == ("not run", "passed")
    assert re.fullmatch("it needs about 30 s, (20|19) s were left", large.reason)
    assert "not run" in runner.table()


def test_what_a_step_gets():
    whole, shares = Step("whole", 90, python(""), needs=5.0, whole=True), Step("shares", 1, python(""), needs=40.0)
    other, absent = Step("other", 3, python("")), Step("absent", 100, python(""), absent="not here")
    assert steps.limit(whole, [shares, other], 500.0) == 90.0
    assert steps.limit(whole, [shares, other], 30.0) == 30.0
    assert steps.limit(whole, [shares, other], 4.0) is None
    # The last one has everything.
    assert steps.limit(whole, [], 500.0) == steps.limit(whole, [absent], 500.0) == 500.0
    # A quarter of what is left, where that is more than half as much again as it needs.
    assert steps.limit(shares, [other, absent, whole], 400.0) == 100.0
    assert steps.limit(other, [whole, shares], 400.0) == 300.0
    assert steps.limit(shares, [other, absent], 100.0) == 60.0
    assert steps.limit(shares, [other, absent], 50.0) == 50.0
    assert steps.limit(shares, [other, absent], 39.0) is None


def test_a_record_is_added_to(tmp_path, capsys):
    first = _runner(tmp_path)
    counts = "open('ran', 'a').write('{}')"
    chosen = [Step("good", 1, python(counts.format("g"))), Step("bad", 1, python(counts.format("b") + "\nexit(1)"))]
    assert not first.run([*chosen, Step("late", 1, python(""), needs=1000.0)])
    second = _runner(tmp_path)
    more = [*chosen[:1], Step("bad", 1, python(counts.format("B"))), Step("more", 1, python(counts.format("m")))]
    assert second.run(more)
    assert (tmp_path / "ran").read_text() == "gbBm"
    found = {item["name"]: item["status"] for item in _recorded(tmp_path)["steps"]}
    assert found == {"good": "passed", "late": "not run", "bad": "passed", "more": "passed"}
    assert "good: passed before" in capsys.readouterr().out


def test_where_the_device_is_gone_nothing_more_runs(tmp_path):
    asked = []

    def lost():
        asked.append(1)
        return "the device is gone: CUDA error" if len(asked) == 2 else None

    runner = Runner(tmp_path, 100.0, {}, tmp_path, {}, lost)
    bad = python("exit(1)")
    chosen = [Step("fine", 1, python("")), Step("bad", 1, bad), Step("gone", 1, bad), Step("later", 1, python(""))]
    assert not runner.run([*chosen, Step("last", 1, python(""), absent="not here")])
    assert len(asked) == 2
    outcomes = [(item["status"], item["reason"]) for item in _recorded(tmp_path)["steps"]]
    assert outcomes[3:] == [("not run", "the device is gone: CUDA error"), ("skipped", "not here")]


@pytest.mark.parametrize("broken", [1, 2, 20])
def test_what_failed_is_said_in_the_last_lines(tmp_path, broken):
    runner = _runner(tmp_path)
    runner.outcomes = [
        steps.Outcome(f"bad {n}", status="failed", tail="line\n\n" * 50 + "FAILED " + "x" * 500 + "\n")
        for n in range(broken)
    ]
    runner.outcomes += [steps.Outcome("fine", status="passed"), steps.Outcome("late", status="not run", reason="why")]
    lines = runner.failures().splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) < 210
    for n in range(min(broken, 14)):
        place = lines.index(f"bad {n} failed")
        after = [line for line in lines[place + 1 : place + 31] if line.startswith("    FAILED x")]
        assert after, "the end of its output follows"
    assert not any("fine" in line for line in lines)
    if broken < 20:
        assert lines[-1] == "late not run: why"


@pytest.mark.parametrize("text", ["", "[]", '{"budget": 1}', '{"steps": [{"nome": 1}]}'])
def test_what_is_no_record_is_refused(tmp_path, text):
    (tmp_path / "steps.json").write_text(text)
    with pytest.raises(ValueError, match=r"steps.json is no record of steps"):
        _runner(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_step_that_is_interrupted_as_it_starts_is_ended(tmp_path, monkeypatch, number):
    started = []
    fork = subprocess.Popen._execute_child

    def execute(self, *arguments):
        fork(self, *arguments)
        started.append(self.pid)
        signal.raise_signal(number)

    monkeypatch.setattr(subprocess.Popen, "_execute_child", execute)
    runner = _runner(tmp_path)
    with pytest.raises(signals.Terminated), signals.terminable():
        runner.run([Step("slow", 1, python("import time; time.sleep(60)"))])
    wait_for(lambda: not is_running(started[0]), 5.0)
    assert _recorded(tmp_path)["steps"][0]["status"] == "interrupted"


_RUN = """
import sys
from pathlib import Path
from pyfused.bench import signals
from pyfused.bench.gpu import run
from pyfused.bench.gpu.steps import Step
hang = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
chosen = [Step(name, 1, lambda _, code=code: [sys.executable, "-c", code])
          for name, code in (("first", "print('done')"), ("second", hang), ("third", ""))]
run.clocks_logged = lambda file: run.contextlib.nullcontext()
with signals.terminable():
    sys.exit(run._run(chosen, Path(sys.argv[1]), 100.0, {"commit": "abc"}))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_a_valid_record_and_nothing_running(tmp_path, number):
    run = subprocess.Popen(
        [sys.executable, "-c", _RUN, str(tmp_path / "record")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    log = tmp_path / "record" / "output.log"
    try:
        wait_for(lambda: log.exists() and re.search(r"==== second\n\d+\n", log.read_text()), 60.0)
        assert [item["status"] for item in _recorded(log.parent)["steps"]] == ["passed", "running", "waiting"]
        run.send_signal(number)
        printed, _ = run.communicate(timeout=30)
    finally:
        run.kill()
    assert run.returncode == 1
    first, second, third = _recorded(log.parent)["steps"]
    assert (first["status"], second["status"], third["status"]) == ("passed", "interrupted", "waiting")
    assert second["seconds"] is not None
    wait_for(lambda: not is_running(int(second["tail"])), 5.0)
    assert f"make gpu: stopped by {number.name}" in printed
    assert re.search(r"^second +interrupted", printed, re.MULTILINE)
