"""Set-up that every test shares; the top of this file runs before pyfused or triton is imported."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import sys
import tempfile
import types

# Two when there is one process, one in each of several workers, who inherit what is set here for the process that
# starts them: threads that wait for each other while other work has the cores take many times as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
# Deterministic cuBLAS, which the poisoning below switches on, wants a workspace of its own.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# What somebody has tuned on this machine is no part of a test.
os.environ["PYFUSED_CACHE"] = os.path.join(tempfile.gettempdir(), f"pyfused-tests-{os.getpid()}")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# torchvision registers shapes for compiled operators that it lacks beside a CPU build of torch; no test calls them.
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

from emulator import library  # noqa: E402
from emulator.build import REFUSAL  # noqa: E402
from tree import TESTS  # noqa: E402

import pyfused  # noqa: E402
from pyfused.choice import backends, measured  # noqa: E402

with contextlib.suppress(ImportError):
    import hypothesis

    # The same examples on every run; a first call that compiles or interprets a kernel has no useful deadline.
    hypothesis.settings.register_profile("pyfused", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("pyfused")


def pytest_addoption(parser):
    parser.addoption(
        "--unpoisoned", action="store_true", help="leave fresh memory as it is, for a tool that knows what was written"
    )


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        # Not by the keywords, which hold the names of folders too.
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    # What was imported and collected stays: the collector would look through its millions of objects again and again.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def emulator():
    """Kernels of backend "cuda" for CPU tensors."""
    if torch.cuda.is_available():
        pytest.skip("needs the emulator, which serves where no GPU is")
    if REFUSAL is not None:
        pytest.skip(f"cuda: the emulator {REFUSAL}")
    library.load()


@pytest.fixture
def emulate(emulator):
    """Sets the emulated device and the seed of the schedule, for one test."""
    yield library.emulate
    library.emulate()


@pytest.fixture(autouse=True)
def _cuda_kernels(request):
    """A test on backend "cuda" has its kernels, or is skipped where there are none for the operator it is named for."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or callspec.params.get("backend") != "cuda":
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        # Built where the first test needs it, not in runs without one.
        request.getfixturevalue("emulator")
    asked = callspec.params.get("operator", request.module.__name__.removeprefix("test_"))
    operator = next((name for name in pyfused.ops.OPERATORS if str(asked).startswith(name)), None)
    reason = backends.refusal("cuda", device, torch.float16, operator)
    if reason is None and operator and not any(TESTS.rglob(f"test_{operator}_cuda.py")):
        reason = f"its kernels for {operator} have no test_{operator}_cuda.py yet"
    if reason is not None:
        pytest.skip(f"cuda: {reason}")


def _check_overflow(check: bool) -> None:
    with contextlib.suppress(ImportError):
        from triton.runtime.interpreter import interpreter_builder as builder

        builder.options = dataclasses.replace(builder.options, sanitize_overflow=check)


# Holding each sum of integers against itself in 64 bits takes a third of an interpreted kernel's time.
_check_overflow(False)


@pytest.fixture
def overflow_checked():
    """Triton's interpreter refuses integers that overflow; for tests whose sizes could make one."""
    _check_overflow(True)
    yield
    _check_overflow(False)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _same_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_known():
    """Of other tests' calls, which may have been decided where something was replaced."""
    measured.changed()


@pytest.fixture(autouse=True)
def _poisoned_allocations(pytestconfig):
    """Uninitialised tensors hold NaN (integers: their largest value), so that reading one shows."""
    if pytestconfig.getoption("--unpoisoned"):
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # Only the filling is wanted here: an operator without a deterministic form may still run.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill
