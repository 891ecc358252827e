"""CUDA graphs that cannot be captured, without a GPU: what is said, and that another process goes on."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from pyfused.bench.measure import timing
from pyfused.bench.record.rows import Row
from pyfused.bench.run import command, plugin
from pyfused.bench.run.session import Settings


class _Graph:
    """As torch's: what broke a capture is not what its end says."""

    broken = False

    def capture_begin(self):
        self.replays = 0

    def capture_end(self):
        if type(self).broken:
            raise RuntimeError("operation failed due to a previous error during capture\nmore")

    def replay(self):
        self.replays += 1


@pytest.fixture
def captures(monkeypatch):
    """torch.cuda's streams and graphs, without a GPU; the streams that were current, in order."""
    seen, current = [], ["own"]

    class Stream:
        def wait_stream(self, other):
            pass

        def synchronize(self):
            seen.append("synchronised")

    @contextlib.contextmanager
    def stream(side):
        current.append(side)
        try:
            yield
        finally:
            current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    yield seen
    assert current == ["own"]


def test_a_capture_runs_four_times_and_its_replays_never(captures):
    ran = []
    replay = timing.captured(lambda: ran.append(1) or "kept")
    assert len(ran) == 4
    assert [replay(), replay()] == ["kept", "kept"]
    assert len(ran) == 4
    assert captures == ["synchronised"]


def test_a_failed_capture_says_what_broke_it_and_leaves_the_stream(captures, monkeypatch):
    ran = []

    def call():
        ran.append(1)
        if len(ran) == 4:
            monkeypatch.setattr(_Graph, "broken", True)
            raise ValueError("it waits for the GPU\nas it may not")

    with pytest.raises(timing.CaptureError, match=r"^ValueError: it waits for the GPU$"):
        timing.captured(call)
    with pytest.raises(timing.CaptureError, match=r"^operation failed due to a previous error during capture$"):
        timing.captured(lambda: None)


def test_after_a_failed_capture_the_row_is_written_and_the_session_ends(monkeypatch):
    def captured(call):
        if call == "bad":
            raise timing.CaptureError("it waits")
        return f"graph of {call}"

    monkeypatch.setattr(timing, "captured", captured)
    session = SimpleNamespace(spoiled=None, unwritten=None)
    compare, row = plugin.Compare(None, session), Row("a row", "operator", "forward", unavailable={"PEFT": "not there"})
    graphs = compare._captured({"eager": ["e", "e2"], "PEFT": ["bad"], "pyfused": ["p"], "late": ["l"]}, row)
    assert graphs == {"eager": ["graph of e", "graph of e2"], "pyfused": ["graph of p"]}
    assert row.unavailable == {
        "PEFT": "not there",
        "PEFT as a CUDA graph": "PEFT in a row: it waits",
        "late as a CUDA graph": "PEFT in a row: it waits",
    }
    item = SimpleNamespace(config=SimpleNamespace(stash={plugin.SESSION: session}), session=SimpleNamespace())
    plugin.pytest_runtest_makereport(item)
    assert item.session.shouldstop == "a capture failed: PEFT in a row: it waits"

    session.spoiled = None
    with pytest.raises(timing.CaptureError):
        compare._captured({"eager": ["e"], "pyfused": ["bad"]}, row)
    assert session.spoiled == "pyfused in a row: it waits"


def test_what_failed_stands_in_the_last_lines(tmp_path, capfd, monkeypatch):
    (tmp_path / "test_mine.py").write_text(
        "import pytest\n\ndef test_raises():\n    assert 1 == 2, 'not equal'\n\n"
        "def test_says():\n    pytest.fail('off by one', pytrace=False)\n"
    )
    settings = Settings(torch.device("cpu"), record=tmp_path / "record")
    assert command.run(settings, ["mine"], [str(tmp_path)]) == 1
    assert capfd.readouterr().out.splitlines()[-2:] == [
        "FAILED test_raises: AssertionError: not equal", "FAILED test_says: off by one"
    ]  # fmt: skip

    def spoiled(self, settings, init=command.Session.__init__):
        init(self, settings)
        self.spoiled = "PEFT in a row: it waits"

    monkeypatch.setattr(command.Session, "__init__", spoiled)
    assert command.run(settings, ["mine"], [str(tmp_path)]) == command.SPOILED
    assert "a capture failed" in capfd.readouterr().err
