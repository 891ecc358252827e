"""Signals that come while a process or a directory is being made: nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile

import pytest
import torch
from processes import is_running, wait_for

from pyfused.bench import signals
from pyfused.bench.gate import trees
from pyfused.bench.signals import NUMBERS, Terminated, run_to_the_end, signals_held, terminable

pytestmark = pytest.mark.host

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture(params=NUMBERS, ids=lambda number: number.name)
def interrupted(request, monkeypatch):
    """A signal arrives right after each fork, before Popen's constructor has returned; the children's ids."""
    started = []
    fork = subprocess.Popen._execute_child

    def execute(self, *arguments):
        fork(self, *arguments)
        started.append(self.pid)
        # The handler runs at once, so that its exception would leave the constructor.
        signal.raise_signal(request.param)

    monkeypatch.setattr(subprocess.Popen, "_execute_child", execute)
    yield started
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _gone(pids: list[int]) -> None:
    assert pids
    wait_for(lambda: not any(is_running(pid) for pid in pids), 5.0)


def test_a_command_that_is_interrupted_as_it_starts_is_ended(interrupted):
    with pytest.raises(Terminated), terminable():
        run_to_the_end(SLEEP)
    _gone(interrupted)


def test_a_trees_process_that_is_interrupted_as_it_starts_is_ended(interrupted, tmp_path):
    with pytest.raises(Terminated), terminable(), trees.Tree("base", tmp_path, torch.device("cpu"), 1):
        pytest.fail("the signal was lost")
    _gone(interrupted)


def test_a_directory_that_is_made_when_a_signal_comes_is_removed(tmp_path, monkeypatch):
    make = tempfile.mkdtemp

    def made(*arguments):
        path = make(*arguments)
        signal.raise_signal(signal.SIGTERM)
        return path

    monkeypatch.setattr(tempfile, "mkdtemp", made)
    with pytest.raises(Terminated), terminable(), contextlib.ExitStack() as stack:
        signals.enter(stack, lambda: tempfile.TemporaryDirectory(dir=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_first_signal_is_delivered_once_and_at_the_end():
    seen = []
    before = {number: signal.signal(number, lambda number, frame: seen.append(number)) for number in NUMBERS}
    try:
        with signals_held():
            signal.raise_signal(signal.SIGTERM)
            with signals_held():
                signal.raise_signal(signal.SIGINT)
            assert seen == []
        assert seen == [signal.SIGTERM]
        signal.raise_signal(signal.SIGHUP)
        assert seen == [signal.SIGTERM, signal.SIGHUP]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_what_is_ignored_stays_so_in_the_child_too():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_held():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            asks = "import signal; print(signal.getsignal(signal.SIGHUP), signal.pthread_sigmask(0, []))"
            said = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True, check=True).stdout
        assert said == f"{signal.SIG_IGN} set()\n"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_command_that_fails_is_an_error():
    with pytest.raises(subprocess.CalledProcessError, match="status 3"):
        run_to_the_end([sys.executable, "-c", "raise SystemExit(3)"])
