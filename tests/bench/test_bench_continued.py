"""A benchmark that goes on with a record: what is there is not measured again, what failed is, and nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tree import ROOT

from pyfused.bench.measure import timing
from pyfused.bench.record import rows
from pyfused.bench.record.rows import Row
from pyfused.bench.run import session
from pyfused.bench.run.session import Session, Settings

CPU = torch.device("cpu")


def _row(name="a", measured="forward", mode="wall clock", passed=True, device=None, **changes):
    where = {"device": rows.device_name(CPU) if device is None else device}
    return Row(name, "operator", measured, mode=mode, passed=passed, provenance=where, **changes)


def _session(directory, *found):
    file = rows.RowFile(directory)
    for row in found:
        file.append(row)
    return Session(Settings(CPU, record=directory))


def test_a_row_is_found_by_name_what_was_measured_and_how(tmp_path):
    failed = _row("c", passed=False), _row("e", wrong=["pyfused triton blas"])
    continued = _session(tmp_path, _row(), _row("b", "forward+backward", "graph replay"), *failed)
    assert continued.continued == 4
    assert continued.recorded("a", "forward", "wall clock")
    assert continued.recorded("b", "forward+backward", "graph replay")
    for other in (
        ("a", "forward+backward", "wall clock"),
        ("a", "forward", "graph replay"),
        ("b", "forward", "graph replay"),
        ("d", "forward", "wall clock"),
        # Failed as a whole or in part: it is measured again.
        ("c", "forward", "wall clock"),
        ("e", "forward", "wall clock"),
    ):
        assert not continued.recorded(*other)


def test_a_new_record_has_nothing_and_what_a_run_adds_is_no_earlier_row(tmp_path):
    fresh = Session(Settings(CPU, tmp_path))
    assert fresh.continued == 0
    for _ in range(2):
        fresh.add(_row())
        assert not fresh.recorded("a", "forward", "wall clock")
    assert [row.name for row in rows.read_rows(fresh.file.path)] == ["a", "a"]


def test_a_row_that_failed_gives_way_to_its_new_measurement(tmp_path):
    continued = _session(tmp_path, _row("bad", passed=False), _row("good"))
    continued.add(_row("bad", seconds={"pyfused": 1.0}))
    continued.add(_row("new"))
    found = rows.read_rows(tmp_path / "rows.json")
    assert [(row.name, row.passed) for row in found] == [("good", True), ("bad", True), ("new", True)]
    assert found == continued.rows


def test_a_record_of_another_device_is_not_continued(tmp_path, capsys):
    from pyfused.bench.run import command

    with pytest.raises(ValueError, match=r"a record to continue must be of .*, got rows of NVIDIA H200"):
        _session(tmp_path, _row(device="NVIDIA H200"))
    assert command.run(Settings(CPU, record=tmp_path)) == 2
    assert f"{tmp_path} cannot be continued: " in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[", "{}", '[{"no": 1}]', "[1]"])
def test_what_is_no_record_is_not_continued(tmp_path, capsys, text):
    from pyfused.bench.run import command

    (tmp_path / "rows.json").write_text(text)
    assert command.run(Settings(CPU, record=tmp_path)) == 2
    assert f"{tmp_path} cannot be continued: " in capsys.readouterr().err
    assert (tmp_path / "rows.json").read_text() == text


def test_the_file_is_what_json_writes_of_all_rows(tmp_path):
    file = rows.RowFile(tmp_path)
    for count in range(3):
        file.append(
            _row(f"line\nof {count} ", facts={"empty": {}, "none": [], "text": '"\\u20ac €'}, loss={"x": [0.1]})
        )
        # Continued at each row, and not.
        file = rows.RowFile(tmp_path) if count == 1 else file
    whole = json.loads(file.path.read_text())
    assert len(whole) == 3
    assert file.path.read_text() == json.dumps(whole, indent=1) + "\n"


def test_the_gpus_state_is_asked_for_once_in_some_seconds(monkeypatch, tmp_path):
    now, asked = [0.0], []
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(timing, "gpu_state", lambda device: asked.append(now[0]) or {"clocks.sm": str(now[0])})
    found = Session(Settings(CPU, tmp_path))
    seen = []
    for now[0] in (0.0, 1.0, 1.9, 2.5, 4.0, 5.0):
        seen.append(found.gpu_state()["clocks.sm"])
    assert asked == [0.0, 2.5, 5.0]
    assert seen == ["0.0", "0.0", "0.0", "2.5", "2.5", "5.0"]


def test_compiled_rows_are_collected_on_a_gpu_alone():
    plugin = pytest.importorskip("pyfused.bench.run.plugin")

    def ignored(device, path):
        where = SimpleNamespace(settings=SimpleNamespace(device=torch.device(device)))
        return plugin.pytest_ignore_collect(Path(path), SimpleNamespace(stash={plugin.SESSION: where}))

    for folder in (ROOT / "bench" / "run", ROOT / "pyfused" / "bench" / "run"):
        assert ignored("cpu", folder / "test_compiled.py") is True
        assert ignored("cuda", folder / "test_compiled.py") is None
        assert ignored("cpu", folder / "test_operators.py") is None
    assert ignored("cpu", "/elsewhere/test_compiled.py") is None
    assert plugin._ORDER[-1] == "test_compiled"


_ROWS = """
import os
from pyfused.bench.measure.parity import Deviation

from pyfused.bench.record.rows import Title

def row_title(test, device):
    return Title(test.removeprefix("test_").replace("_", " "), "call")

def test_tiny_good(compare):
    print("measured good", file=open("log", "a"))
    compare("tiny good", {"pyfused": [lambda: 1], "eager": [lambda: 2]})

def test_tiny_bad(compare):
    print("measured bad", file=open("log", "a"))
    error = 0.0 if os.environ.get("MENDED") else 0.5
    compare("tiny bad", {"pyfused": [lambda: 1]}, deviations=[Deviation("y", "maximum", error, 1e-7, 1e-6)])

def test_tiny_plain(compare):
    compare("tiny plain", {"pyfused": [lambda: 1]})

def test_tiny_late(compare):
    compare("tiny late", {"pyfused": [lambda: 1]})
"""


def test_a_run_goes_on_where_another_stopped(tmp_path):
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "test_own.py").write_text(_ROWS)

    def run(*select, **environment):
        command = [sys.executable, "-m", "pyfused.cli", "bench", "test_own.py", "--device", "cpu"]
        command += [word for text in select for word in ("-k", text)]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        return subprocess.run(
            [*command, "--seconds", "0.01", "--record", "record"], capture_output=True, text=True, timeout=300,
            cwd=tmp_path, env=kept | {"PYTHONPATH": str(ROOT)} | environment,
        )  # fmt: skip

    def recorded():
        return [(row.name, row.passed, bool(row.seconds)) for row in rows.read_rows(tmp_path / "record" / "rows.json")]

    first = run("tiny good", "TINY BAD", "tiny plain, call")
    assert first.returncode == 1, first.stderr
    assert "not measured again" not in first.stdout
    good, plain, late = (("tiny " + name, True, True) for name in ("good", "plain", "late"))
    assert recorded() == [good, ("tiny bad", False, False), plain]
    before = (tmp_path / "record" / "rows.json").read_text()
    second = run("tiny", MENDED="1")
    assert second.returncode == 0, second.stderr
    assert "rows.json has 3 rows, which are not measured again unless they failed" in second.stdout
    assert "skipped tiny good, call: Skipped: tiny good, call, wall clock: the record has this row" in second.stderr
    assert recorded() == [good, plain, ("tiny bad", True, True), late]
    assert (tmp_path / "log").read_text().split("\n") == ["measured good", "measured bad", "measured bad", ""]
    first_row = before.index('"tiny bad"') - 20
    assert (tmp_path / "record" / "rows.json").read_text()[:first_row] == before[:first_row]
