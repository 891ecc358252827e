"""A cache of its own for each test here, and a clock that tells what times it is given."""

from __future__ import annotations

import pytest
import torch
import tuned

from pyfused.choice import measured
from pyfused.ops import cross_attention_residual


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Where what is tuned is kept; nothing is at first."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("PYFUSED_CACHE", str(folder))
    measured.use(())
    yield folder / "measured.json"
    measured.use(())


@pytest.fixture(autouse=True)
def _absorbed_at_few_rows(monkeypatch):
    """What it costs to begin with left aside, pyfused's own choice is "absorbed", which the times given can change."""
    monkeypatch.setattr(cross_attention_residual, "ABSORBED_STEPS", {})


@pytest.fixture(autouse=True)
def _one_thread():
    """Several would wait for each other in each of many small calls, where others use the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def timed(monkeypatch):
    """Makes `pyfused.tune` believe these times; gives the clocks that it then has."""

    def believe(**seconds):
        clocks = {name: tuned.FakeClock(seconds) for name in ("cold", "warm")}
        monkeypatch.setattr("pyfused.tuner.tune.cold_and_warm", lambda device: clocks)
        return clocks

    return believe
