"""Habits of a command: JSON beside words, help that is whole, exit statuses, colours, bars, and `pyfused doctor`."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import torch
from tree import ROOT

import pyfused
from pyfused import cli, installation, progress
from pyfused.bench.cases.lora_linear import LoRACase
from pyfused.bench.measure import parity
from pyfused.choice import backends, cache

COMMANDS = ("info", "doctor", "check", "bench", "tune", "report", "convert", "completion")


class Terminal(io.StringIO):
    """What says that it is one."""

    def isatty(self) -> bool:
        return True


# ---- JSON


def test_the_words_of_info_are_made_from_its_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pyfused"]["version"] == pyfused.__version__
    assert found["backends"] == pyfused.available_backends()
    assert found["packages"]["tqdm"].keys() == {"version", "minimum"}
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out == "\n".join([*installation.told(found), ""])


class TestCheck:
    @pytest.fixture(autouse=True)
    def _one_case(self, monkeypatch):
        monkeypatch.setattr("pyfused.bench.run.check.parity_cases", lambda device: [LoRACase(5, 16, 8, rank=2)])

    def test_rows_are_alone_on_stdout(self, capsys):
        assert cli.main(["check", "--device", "cpu", "--json"]) == 0
        printed = capsys.readouterr()
        (row,) = json.loads(printed.out)["rows"]
        assert row["case"] == LoRACase(5, 16, 8, rank=2).name
        assert (row["operator"], row["backend"], row["plan"], row["passed"]) == (
            "lora_linear",
            "portable",
            "blas",
            True,
        )
        assert 0 <= row["error"] <= row["limit"]
        assert "1 of 1 as close to float64" in printed.err

    def test_what_is_not_finite_fails_and_is_null(self, capsys, monkeypatch):
        broken = [
            parity.Deviation("y", "maximum", 1e-9, 1e-9, 1e-6),
            parity.Deviation("dx", "maximum", float("nan"), 1e-9, 1e-6),
        ]
        monkeypatch.setattr(parity, "check", lambda *given, **options: broken)
        assert cli.main(["check", "--device", "cpu", "--json"]) == 1
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        assert (row["passed"], row["tensor"], row["error"]) == (False, "dx", None)


def test_gradient_ratio_has_a_row_for_each_ratio(capsys):
    pytest.importorskip("open_clip", reason="open_clip is not installed")
    assert cli.main(["check", "gradient-ratio", "--device", "cpu", "--json"]) == 0
    rows = {row["of"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == ["fused", "reference", "fused, w = 0", "loop 1", "loop 2", "loop 3"]
    assert rows["fused, w = 0"]["ratio"] == 1.0
    assert rows["fused"]["ratio"] == rows["fused"]["crossed"] / rows["fused"]["plain"]


class TestTuneList:
    @pytest.fixture(autouse=True)
    def _empty(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PYFUSED_CACHE", str(tmp_path))

    def test_json_has_the_rows_of_the_file(self, capsys):
        assert cli.main(["tune", "--list", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"path": str(cache.path()), "sections": []}
        row = {"gpu": "A CPU", "capability": [0, 0], "subject": "lora_linear", "dtype": "float32", "rows": 24}
        row |= {"sizes": {"C": 32}, "found": {"portable": 12.5}, "source": {}}
        key = {"driver": "", "torch": "1.0", "triton": "", "pyfused": "0", "source": ""}
        cache.path().write_text(json.dumps([{"key": key, "rows": [row]}]))
        assert cli.main(["tune", "--list", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["sections"] == [{"key": key, "read": False, "rows": [row]}]

    def test_json_alone_is_refused(self, capsys):
        assert cli.main(["tune", "--json"]) == 2
        assert capsys.readouterr().err == "pyfused tune: --json must come with --list, got it alone\n"


# ---- help


def _help(capsys, *command: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=lambda command: " ".join(command))
def test_help_fits_in_80_columns_and_has_the_statuses(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    told = _help(capsys, *command)
    assert [line for line in told.splitlines() if len(line) > 80] == []
    statuses = [int(found) for found in re.findall(r"^  (\d)  ", told.partition("exit status:")[2], re.MULTILINE)]
    own = [cli.OWN_STATUSES.get(name, {}) for name in (command or COMMANDS)]
    assert statuses == sorted([*cli.STATUSES, *(status for each in own for status in each)])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_a_help_are_commands(command, capsys):
    told = _help(capsys, command)
    assert re.search(r"^takes: \w+", told, re.MULTILINE)
    examples = re.findall(rf"^  (pyfused {command}.*)$", told.partition("examples:")[2], re.MULTILINE)
    assert examples == list(cli.EXAMPLES[command])
    for example in examples:
        given = shlex.split(example.partition(" > ")[0])[1:]
        assert isinstance(cli._parser().parse_args(given), argparse.Namespace)


def test_bench_tells_its_statuses():
    pytest.importorskip("pytest_benchmark")
    from pyfused.bench.run import command

    told = {pytest.ExitCode.TESTS_FAILED, command.SPOILED}
    assert cli.OWN_STATUSES["bench"].keys() == {int(status) for status in told}


# ---- completion


def test_completion_names_its_extra(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["completion", "bash"]) == 2
    expected = 'pyfused completion needs shtab; pip install "pyfused[cli]" brings all it uses\n'
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("shell", cli._SHELLS)
def test_completion_knows_every_command(shell, capsys):
    pytest.importorskip("shtab")
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert [name for name in COMMANDS if name not in script] == []


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("pyfused co", ["convert", "completion"]),
        ("pyfused doctor --j", ["--json"]),
        ("pyfused convert --from ", ["pyfused", "peft", "adapterhub", "aa-clip", "fastvit-fork"]),
        ("pyfused report rec", ["record"]),
    ],
)
def test_bash_completes(typed, expected, capsys, tmp_path):
    pytest.importorskip("shtab")
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    assert cli.main(["completion", "bash"]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "record").mkdir()
    words = typed.split(" ")
    ask = f'source ./script; COMP_WORDS=({" ".join(words[:-1])} "{words[-1]}"); COMP_CWORD={len(words) - 1}; '
    ask += '_shtab_pyfused; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run([bash, "-c", ask], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=True)
    assert done.stdout.split() == expected


# ---- pipes and terminals


def _environment(**more: str) -> dict[str, str]:
    left = ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "PYTHONUNBUFFERED")
    own = {name: value for name, value in os.environ.items() if name not in left}
    return own | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "100"} | more


def test_colours_are_for_terminals():
    """A row that failed is red in the table; the bar of `pyfused tune` is there."""
    pytest.importorskip("rich")
    pytest.importorskip("triton")
    script = """
import os, pty, sys
from pyfused.bench.record.rows import Row
from pyfused.bench.show.terminal import print_table
from pyfused.bench.tune import command

def show():
    print_table([Row("lora_linear", "operator", "forward", passed=False)], sys.stdout)
    with command._progress() as progress:
        progress.add_task("a case", total=1)

sys.stderr = sys.stdout
show()
print("END OF PIPE", flush=True)
for variable in (None, "NO_COLOR"):
    if variable:
        os.environ[variable] = "1"
    ours, theirs = pty.openpty()
    if os.fork() == 0:
        sys.stdout = sys.stderr = os.fdopen(theirs, "w")
        show()
        sys.stdout.flush()
        os._exit(0)
    os.close(theirs)
    seen = b""
    try:
        while more := os.read(ours, 4096):
            seen += more
    except OSError:
        pass
    print(seen.decode().replace("\\x1b", "ESC"), "END OF TERMINAL", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120, env=_environment())
    piped, _, rest = done.stdout.decode().partition("END OF PIPE")
    coloured, plain, _ = rest.split("END OF TERMINAL")
    assert "lora_linear" in piped, done.stderr
    assert "a case" not in piped
    assert "\x1b" not in piped
    red = r"ESC\[(?:\d+;)*31m"
    assert re.search(red, coloured)
    assert "a case" in coloured
    assert "lora_linear" in plain
    assert not re.search(r"ESC\[(?:\d+;)*[34]\d(?:;\d+)*m", plain)


def test_a_reader_that_goes_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pyfused.cli", "tune", "--list"],
            stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, env=_environment(),
        )  # fmt: skip
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (2, "")


class TestBar:
    def test_on_a_terminal(self, monkeypatch):
        pytest.importorskip("tqdm")
        threads = []
        monkeypatch.setattr("tqdm.std.TMonitor", lambda *given: threads.append(given))
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        seen = []
        for item in progress.bar([1, 2], "counting"):
            seen.append(item)
            # What is quicker than a tenth of a second is not drawn.
            time.sleep(0.12)
        assert seen == [1, 2]
        assert "counting:  50%" in stream.getvalue()
        assert threads == [], "none draws beside a clock"

    @pytest.mark.parametrize("stream", [io.StringIO(), None])
    def test_nowhere_else(self, stream, monkeypatch):
        monkeypatch.setattr(sys, "stderr", stream)
        items = [1, 2]
        assert progress.bar(items, "counting") is items

    def test_without_tqdm(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tqdm", None)
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(progress.bar([1, 2], "counting")) == [1, 2]
        assert stream.getvalue() == ""

    def test_tune_has_one(self, monkeypatch, tmp_path):
        pytest.importorskip("tqdm")
        monkeypatch.setenv("PYFUSED_CACHE", str(tmp_path))
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        pyfused.inject_lora(model, ["0"], rank=2)
        pyfused.tune(model, torch.randn(4, 8), seconds=1.0)
        assert "tune: calls" in stream.getvalue()
        assert "tune: comparing" in stream.getvalue()


# ---- doctor


class TestDoctor:
    @pytest.fixture(autouse=True)
    def _portable_alone(self, monkeypatch, tmp_path):
        # The whole of it is run beside torch alone, in test_cli.
        monkeypatch.setattr(backends, "BACKENDS", ("portable",))
        monkeypatch.setenv("PYFUSED_CACHE", str(tmp_path / "cache"))

    def _asked(self, capsys) -> tuple[int, dict]:
        status = cli.main(["doctor", "--json"])
        return status, json.loads(capsys.readouterr().out)

    def test_all_is_well(self, capsys, monkeypatch, tmp_path):
        monkeypatch.setenv("TRITON_SOME", "1")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES_OF_OTHERS", "secret")
        monkeypatch.setenv("SOME_TOKEN", "secret")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cli.main(["doctor"]) == 0
        printed = capsys.readouterr().out
        assert "\n  TRITON_SOME=1\n" in printed
        assert "\n  PYFUSED_CACHE=~/cache\n" in printed
        assert "\n  no rows in ~/cache/measured.json\n" in printed
        assert "secret" not in printed
        for operator in ("lora_linear", "adapter_residual", "cross_attention_residual", "projection_residual"):
            assert re.search(rf"^  {operator} +portable +(\d+) of \1 as close to float64", printed, re.MULTILINE)
        assert printed.endswith("\nverdict: nothing is wrong\n")
        assert not (tmp_path / "cache").exists(), "asking leaves nothing"

    def test_a_wrong_result_and_an_error_are_problems(self, capsys, monkeypatch):
        right = parity.check

        def check(case, device, **options):
            if case.operator == "lora_linear" and case.dtype == torch.float32:
                raise RuntimeError("no kernel image\nand more")
            found = right(case, device, **options)
            if case.operator == "projection_residual":
                found[0] = parity.Deviation("y", "maximum", float("nan"), 0.0, 1e-6)
            return found

        monkeypatch.setattr(parity, "check", check)
        status, found = self._asked(capsys)
        assert status == 1
        assert len(found["problems"]) == 3
        assert found["problems"][0].endswith("on cpu: RuntimeError: no kernel image")
        assert found["problems"][1].endswith("on cpu: y (maximum): error nan, limit 1.00e-06")
        assert cli.main(["doctor"]) == 1
        printed = capsys.readouterr().out
        assert "\n  lora_linear               portable  1 of 2 as close" in printed
        assert printed.endswith("\nverdict: 3 problems\n")

    def test_a_damaged_file_of_rows(self, capsys):
        cache.path().parent.mkdir()
        cache.path().write_text("x")
        status, found = self._asked(capsys)
        assert status == 1
        (problem,) = found["problems"]
        assert "must hold what pyfused.tune wrote" in problem

    def test_a_file_of_rows_that_cannot_be_written(self, capsys, monkeypatch, tmp_path):
        (tmp_path / "file").touch()
        monkeypatch.setenv("PYFUSED_CACHE", str(tmp_path / "file" / "below"))
        status, found = self._asked(capsys)
        assert status == 1
        assert found["measured_rows"]["unwritable"] == "Not a directory"

    def test_a_package_that_is_too_old(self, capsys, monkeypatch):
        wanted = ["torch>=99.1", 'scipy>=1.2; extra == "bench"', 'tqdm; extra == "cli"']
        monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
        status, found = self._asked(capsys)
        assert status == 1
        assert found["problems"] == [f"torch {torch.__version__} is older than 99.1"]

    @pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
    def test_a_gpu_that_nothing_serves(self):
        found = installation.examined()
        found["devices"] = {"cuda:0": {"name": "Some", "capability": "7.5", "memory_bytes": 0}}
        (problem,) = installation._problems(found)
        assert problem.startswith("no kernels run on cuda:0: cuda: ")

    def test_a_library_that_does_not_load(self, monkeypatch, tmp_path):
        found = installation.examined()
        monkeypatch.setattr(pyfused, "__file__", str(tmp_path / "__init__.py"))
        monkeypatch.setattr(backends, "CPU_REFUSAL", "its compiled kernels (pyfused._cpu) do not load: no symbol")
        (tmp_path / "_cpu.absent").touch()
        assert list(installation._problems(found)) == [], "one that was not built is no fault"
        (tmp_path / "_cpu.abi3.so").touch()
        assert list(installation._problems(found)) == [backends.CPU_REFUSAL]


def test_home_is_not_told(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/ann")
    given = {"a": ["/home/ann/x, /home/anna/x, /home/ann", 1, None], "b": {"c": "/mnt/home/ann/x"}}
    told = {"a": ["~/x, /home/anna/x, ~", 1, None], "b": {"c": "/mnt/home/ann/x"}}
    assert installation.without_home(given) == told


def test_a_report_of_a_fault_asks_for_doctor():
    assert "`pyfused doctor`" in (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.md").read_text()
