"""Ctrl-C, SIGTERM and SIGHUP, and the processes that a program has started when one of them comes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_T = TypeVar("_T")


class Terminated(BaseException):
    """One of the signals of `terminable` arrived; its name."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP raise `Terminated`, once: the clean-up that follows is not disturbed."""

    def handler(number: int, frame: object) -> None:
        for each in NUMBERS:
            signal.signal(each, signal.SIG_IGN)
        raise Terminated(signal.Signals(number).name)

    # SIGINT also because commands inherit it when it is ignored, as in what a shell has put into the background.
    before = {number: signal.signal(number, handler) for number in NUMBERS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP wait; the first that came is delivered at the end.

    Around every `subprocess.Popen`, in the block whose clean-up ends the process: an exception that a handler raises
    between the fork and Popen's return would leave a process that nobody knows.
    """
    # Handlers run in the main thread alone: in another one nothing can come between.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def note(number: int, frame: object) -> None:
        arrived.append(number)

    before: dict[signal.Signals, Any] = {}
    # The mask, which a child would inherit, is for the moments in which some handlers are the one and some the other.
    with _blocked():
        for number in NUMBERS:
            # What is ignored stays so, in the child as well. None: a handler that was not set from Python.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
    try:
        yield
    finally:
        with _blocked():
            for number, previous in before.items():
                signal.signal(number, previous)
        if arrived:
            signal.raise_signal(arrived[0])


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def enter(stack: contextlib.ExitStack, make: Callable[[], contextlib.AbstractContextManager[_T]]) -> _T:
    """``stack.enter_context(make())`` with no moment in which what was made is known to nobody."""
    with signals_held():
        return stack.enter_context(make())


def run_to_the_end(command: list[str], **options: Any) -> None:
    """`subprocess.run` with a check, for a command that starts processes of its own: cut short, none of them is left.

    Raises:
        subprocess.CalledProcessError: its exit status is not 0.
    """
    process: subprocess.Popen | None = None
    try:
        with signals_held():
            process = subprocess.Popen(command, start_new_session=True, **options)
        process.wait()
    except BaseException:
        if process is not None:
            _kill_group(process)
        raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def _kill_group(process: subprocess.Popen) -> None:
    """Until the last of the group has gone."""
    deadline = time.monotonic() + 5.0
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, signal.SIGKILL)
            process.poll()
            time.sleep(0.01)
