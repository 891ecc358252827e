"""Calls of the C++ kernels for CPUs as other machines have them: of another instruction set, on other threads."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import pytest
import torch

from pyfused.choice import backends

every_instruction_set = pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])


def take(name: str) -> bool:
    """False where this machine, or the library, has that instruction set not."""
    function = backends.CPU_LIBRARY.pyfused_cpu_take
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_bool
    return function(name.encode())


@contextlib.contextmanager
def taken(name: str) -> Iterator[None]:
    """Inside, kernels are those of an instruction set; skips the test where this machine has it not."""
    before = backends.cpu_instruction_set()
    if not take(name):
        pytest.skip(f"this machine has no {name}")
    try:
        assert backends.cpu_instruction_set() == name
        yield
    finally:
        assert take(before)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
