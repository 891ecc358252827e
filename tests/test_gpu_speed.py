"""The speed step of `make gpu`: kernels first, then rows, in the time that is given."""

from __future__ import annotations

import pytest
import torch

from pyfused.bench import operators
from pyfused.bench import run as bench_run
from pyfused.bench.gpu import ahead, speed
from pyfused.kernels.launch import Target

H200 = Target((9, 0), 132, 232_448, "NVIDIA H200")
CUDA = torch.device("cuda")


def test_kernels_are_compiled_first_and_rows_get_what_is_left(tmp_path, monkeypatch):
    clock, compiled, ran = [100.0], [], []

    def compile_ahead(launches, target, workers, seconds):
        compiled.append((launches, target, workers, seconds))
        clock[0] += 30.0
        return ahead.Ahead(compiled=2)

    monkeypatch.setattr(speed, "target", lambda device: H200)
    monkeypatch.setattr(speed.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(ahead, "specialisations", lambda calls, target: {"calls": len(list(calls)), "on": target})
    monkeypatch.setattr(ahead, "compile_ahead", compile_ahead)
    monkeypatch.setattr(bench_run, "run", lambda settings, select: ran.append((settings, select)) or 7)
    arguments = ["--record", str(tmp_path), "--seconds", "150", "--workers", "3", "--commit", "abc"]
    assert speed.main(arguments) == 7
    ((launches, target, workers, seconds),) = compiled
    assert launches["calls"] >= len(operators.timed_cases(CUDA))
    assert (launches["on"], target, workers, seconds) == (H200, H200, 3, pytest.approx(45.0))
    ((settings, select),) = ran
    assert (settings.device, settings.record, settings.commit) == (CUDA, tmp_path, "abc")
    assert "test_operators" in select
    assert "test_models" not in select
    rows = 4 * len(operators.timed_cases(CUDA))
    # The rounds take a third of the 120 s that are left: the rest of a row costs more than they do.
    assert 0.2 * 120 < rows * settings.seconds_per_row < 0.4 * 120
