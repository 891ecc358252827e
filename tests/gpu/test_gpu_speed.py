"""The speed step of `make gpu`: kernels first, then rows, in the time that is given."""

from __future__ import annotations

import pytest
import torch

from pyfused.bench.cases import operators
from pyfused.bench.gpu.programs import ahead, outcomes, speed
from pyfused.bench.run import command
from pyfused.kernels.recording import Target

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
    monkeypatch.setattr(command, "run", lambda settings, select: ran.append((settings, select)) or 7)
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
    assert settings.attempts == 1


def test_another_process_goes_on_after_a_capture_that_failed(tmp_path, monkeypatch):
    again = []

    def replaced(program, words):
        again.append(words)
        raise SystemExit

    monkeypatch.setattr(speed, "target", lambda device: H200)
    monkeypatch.setattr(ahead, "specialisations", lambda calls, target: {})
    monkeypatch.setattr(ahead, "compile_ahead", lambda *given: ahead.Ahead(compiled=0))
    monkeypatch.setattr(command, "run", lambda settings, select: command.SPOILED)
    monkeypatch.setattr(outcomes.os, "execv", replaced)
    arguments = ["--record", str(tmp_path), "--seconds", "150", "--commit", "abc"]
    with pytest.raises(SystemExit):
        speed.main([*arguments, "--restarts", "1"])
    ((_, _, module, *rest),) = again
    assert module == "pyfused.bench.gpu.programs.speed"
    assert rest[:2] == ["--record", str(tmp_path)]
    assert rest[-4:] == ["--restarts", "0", "--commit", "abc"]
    assert 100 < float(rest[rest.index("--seconds") + 1]) <= 150
    # Not for ever: a row whose own capture fails would be met again and again.
    assert speed.main(rest) == command.SPOILED
