"""The file of a user's own rows: where it lies, by what its rows hold, and that it is whole whatever happens."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tuned
from tree import ROOT, TESTS

import pyfused
from pyfused import cli
from pyfused.choice import cache, measured
from pyfused.choice.measured import Row, Table

ROW = Row(
    "A CPU, 2 threads", (0, 0), "cross_attention_residual", "float32", 24, {"C": 32, "norm_match": False},
    {"portable": 12.5}, {"date": "2026-01-01", "untuned": "portable absorbed", "gain": 1.5},
    {"portable": ("standard", "standard")},
)  # fmt: skip
FASTER = {"standard_forward": 0.5, "standard_backward": 0.5}


def test_rows_survive_the_file(place):
    assert cache.rows() == []
    assert cache.keep([ROW]) == place
    assert cache.rows() == [ROW]
    newer = replace(ROW, found={"portable": 11.0})
    other = replace(ROW, rows=48)
    cache.keep([newer, other])
    assert cache.rows() == [newer, other]
    assert sorted(path.name for path in place.parent.iterdir()) == ["measured.json", "measured.json.lock"]
    assert len(place.read_text().splitlines()) == 6, "one row a line"


@pytest.mark.parametrize("field", ["driver", "torch", "triton", "pyfused", "source"])
def test_rows_hold_for_the_software_that_measured_them(place, monkeypatch, field):
    cache.keep([ROW])
    own = cache.key()
    monkeypatch.setattr(cache, "key", lambda: replace(own, **{field: "another"}))
    assert cache.rows() == []
    cache.keep([replace(ROW, rows=7)])
    assert [row.rows for row in cache.rows()] == [7]
    # And those of the other version are still there.
    monkeypatch.setattr(cache, "key", lambda: own)
    assert cache.rows() == [ROW]


def test_versions_are_forgotten_in_the_end(place, monkeypatch):
    own = cache.key()
    for number in range(20):
        monkeypatch.setattr(cache, "key", lambda number=number: replace(own, driver=str(number)))
        cache.keep([ROW])
    sections = cache.read(place)
    assert [section.key.driver for section in sections] == [str(number) for number in range(19, 10, -1)]


def test_the_key_names_what_computes(monkeypatch, tmp_path):
    key = cache.key()
    assert (key.torch, key.pyfused) == (torch.__version__, pyfused.__version__)
    assert len(key.source) == 12
    before = cache._source()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) + b"# changed" * (self.name == "philox.py"))
    assert cache._source() != before
    monkeypatch.undo()
    assert cache._source() == before
    read_text = Path.read_text
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue\n"
    monkeypatch.setattr(
        Path, "read_text",
        lambda self, *a, **k: text if str(self) == "/proc/driver/nvidia/version" else read_text(self, *a, **k),
    )  # fmt: skip
    assert cache._driver() == "550.54.15"
    assert "driver 550.54.15" in str(replace(key, driver=cache._driver()))


@pytest.mark.parametrize(
    "text",
    ["", "[", "{}x", "3", "null", '[{"key": {}}]', '[{"key": {"driver": ""}, "rows": []}]', "[" * 100_000, "[1]"],
)
def test_a_damaged_file_costs_a_warning(place, text):
    place.parent.mkdir()
    place.write_text(text)
    with pytest.warns(UserWarning, match=r"what pyfused\.tune measured is left out: .*measured\.json must hold"):
        assert cache.rows() == []
    with pytest.raises(ValueError, match=r"`pyfused tune --clear` removes it"):
        cache.read(place)
    # What is found next takes its place.
    cache.keep([ROW])
    assert cache.rows() == [ROW]


def test_a_file_that_is_no_file_costs_a_warning(place):
    place.mkdir(parents=True)
    with pytest.warns(UserWarning, match="is left out"):
        assert cache.rows() == []


def test_a_row_that_is_no_row_costs_the_file_alone(place):
    cache.keep([ROW])
    content = json.loads(place.read_text())
    for wrong in (
        {"found": {"portable": -1.0}},
        {"plans": {"portable": ["standard"]}},
        {"plans": {"portable": [1, 2]}},
    ):
        place.write_text(json.dumps([content[0] | {"rows": [content[0]["rows"][0] | wrong]}]))
        with pytest.warns(UserWarning, match="is left out"):
            assert cache.rows() == []


def test_without_a_file_nothing_is_hashed(monkeypatch):
    monkeypatch.setattr(cache, "key", None)
    assert cache.rows() == []


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="about the directories of Linux")
def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("PYFUSED_CACHE", "~/mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.path() == tmp_path / "mine" / "measured.json"
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("PYFUSED_CACHE")
        else:
            monkeypatch.setenv("PYFUSED_CACHE", unset)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        assert cache.directory() == tmp_path / ".cache" / "pyfused"
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        assert cache.directory() == tmp_path / ".cache" / "pyfused"
        monkeypatch.setenv("XDG_CACHE_HOME", "/x")
        assert cache.directory() == Path("/x/pyfused")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache.directory() == tmp_path / "Library" / "Caches" / "pyfused"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache.directory() == tmp_path / "local" / "pyfused" / "Cache"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert cache.path() is None
    assert cache.rows() == []
    with pytest.raises(OSError, match="there is no home directory, and PYFUSED_CACHE is not set"):
        cache.keep([ROW])


def _keep_many(folder: str, number: int) -> None:
    os.environ["PYFUSED_CACHE"] = folder
    for count in range(1, 11):
        cache.keep([replace(ROW, rows=100 * number + count)])


def test_processes_that_write_at_once_lose_nothing(place):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_keep_many, args=(str(place.parent), number)) for number in range(4)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        # Whole at every moment.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cache.rows()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(cache.rows()) == 40


def test_a_writer_waits_for_another_and_says_so_in_the_end(place, monkeypatch):
    cache.keep([ROW])
    with cache._locked(place):
        monkeypatch.setattr(cache, "_PATIENCE", 0.1)
        with pytest.raises(TimeoutError, match=r"another process has held it for 0\.1 s"):
            cache.keep([ROW])
        with pytest.raises(TimeoutError):
            cache.clear()
    cache.keep([ROW])


def test_a_process_that_died_holds_no_lock(place):
    cache.keep([ROW])
    code = "import os, sys\nfrom pathlib import Path\nfrom pyfused.choice import cache\n"
    code += "with cache._locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    input()\n"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(place)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    started = time.monotonic()
    holder.kill()
    holder.wait()
    cache.keep([replace(ROW, rows=9)])
    assert time.monotonic() - started < 10
    assert len(cache.rows()) == 2


def test_a_write_that_fails_leaves_the_file_as_it_was(place, monkeypatch):
    cache.keep([ROW])
    before = place.read_text()

    def full(self, text, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device"):
        cache.keep([replace(ROW, rows=9)])
    monkeypatch.undo()
    assert place.read_text() == before
    assert not list(place.parent.glob("*.partial"))


def test_where_nothing_can_be_kept_it_holds_in_this_process(timed, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("PYFUSED_CACHE", str(blocked / "below"))
    timed(**FASTER)
    model, given = tuned.Towers(), tuned.inputs()
    with pytest.warns(UserWarning, match=r"what was tuned cannot be kept, it holds in this process alone: .*below"):
        report = pyfused.tune(model, *given)
    assert report.path is None
    assert "note: it holds in this process alone" in str(report)
    assert tuned.plans(model, *given) == ["standard", "standard"]


def test_the_installation_is_only_read(timed):
    """Its files, and what ships, stay as they are."""

    def state():
        return {
            path: path.stat().st_mtime_ns for path in (ROOT / "pyfused").rglob("*") if "__pycache__" not in str(path)
        }

    before = state()
    timed(**FASTER)
    pyfused.tune(tuned.Towers(), *tuned.inputs())
    assert state() == before
    assert measured.SHIPPED.rows == measured.read()


def test_own_rows_come_before_those_that_ship(monkeypatch):
    shipped = replace(ROW, found={"portable": 20.0}, plans={"portable": ("absorbed", "absorbed")})
    monkeypatch.setattr(measured, "SHIPPED", Table([shipped, replace(shipped, rows=48)]))
    measured.use([ROW])
    assert measured.TABLE.rows == [ROW, replace(shipped, rows=48)]
    assert measured.own == [ROW]
    generation = measured.generation
    measured.use(())
    assert measured.TABLE.rows == [shipped, replace(shipped, rows=48)]
    assert measured.generation == generation + 1


def test_an_import_takes_what_is_kept(place, timed):
    timed(**FASTER)
    model, given = tuned.Towers(), tuned.inputs()
    pyfused.tune(model, *given)
    code = "import sys, torch\ntorch.set_num_threads(1)\nimport tuned\n"
    code += "print(tuned.plans(tuned.Towers(), *tuned.inputs()))\n"
    code += "assert not [name for name in sys.modules if name.startswith(('triton', 'pyfused.kernels'))]"
    paths = os.pathsep.join([str(ROOT), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": paths}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert run.stdout == "['standard', 'standard']\n", run.stderr
    assert run.stderr == ""


class TestCommand:
    def test_list_shows_what_is_kept(self, place, capsys, monkeypatch):
        assert cli.main(["tune", "--list"]) == 0
        assert capsys.readouterr().out == f"nothing is kept in {place}\n"
        own = cache.key()
        monkeypatch.setattr(cache, "key", lambda: replace(own, torch="1.0"))
        cache.keep([replace(ROW, source={})])
        monkeypatch.setattr(cache, "key", lambda: own)
        kernel = replace(ROW, subject="_adapter_fwd_kernel", found={"num_warps": 8}, source={"gain": 1.25}, plans={})
        cache.keep([ROW, kernel])
        assert cli.main(["tune", "--list"]) == 0
        assert capsys.readouterr().out.splitlines() == [
            str(place), "", str(own),
            "  A CPU, 2 threads: cross_attention_residual, float32, M = 24, C = 32, norm_match = False",
            "    measured at M = 24: portable standard 12.5 us; portable absorbed takes 1.5 times as long",
            "  A CPU, 2 threads: _adapter_fwd_kernel, float32, M = 24, C = 32, norm_match = False",
            "    launched with {'num_warps': 8}; the configuration that ships takes 1.25 times as long",
            "", f"{replace(own, torch='1.0')}: not read by what is installed here",
            "  A CPU, 2 threads: cross_attention_residual, float32, M = 24, C = 32, norm_match = False",
            "    measured at M = 24: portable standard 12.5 us; as without it",
        ]  # fmt: skip

    def test_clear_removes_it(self, place, capsys):
        assert cli.main(["tune", "--clear"]) == 0
        assert capsys.readouterr().out == f"nothing is kept in {place}\n"
        cache.keep([ROW])
        assert cli.main(["tune", "--clear"]) == 0
        assert capsys.readouterr().out == f"removed: {place}\n"
        assert not place.exists()

    def test_a_damaged_file_is_named_and_cleared(self, place, capsys):
        place.parent.mkdir()
        place.write_text("x")
        assert cli.main(["tune", "--list"]) == 2
        assert "must hold what pyfused.tune wrote" in capsys.readouterr().err
        assert cli.main(["tune", "--clear"]) == 0
        assert cache.rows() == []

    def test_one_of_the_two(self, capsys):
        with pytest.raises(SystemExit):
            cli.main(["tune", "--list", "--clear"])
        assert "not allowed with argument" in capsys.readouterr().err

    def test_neither_needs_more_than_torch(self, monkeypatch, capsys):
        import importlib.util

        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert cli.main(["tune", "--list"]) == 0
