"""Runs a function of a test over the stub driver, in a process of its own that a server forks."""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from stub_driver import build, inside

TESTS = build.HERE.parent
# The compute capabilities, as digits, that everything is tried for.
GPUS = (80, 90, 100, 120)


def over_stub(
    function: Callable[..., object], *arguments: object, gpu: int = 90, compiling: bool = False, quiet: bool = True
) -> object:
    """What ``function(*arguments)`` returns over the driver of a GPU of that compute capability.

    Args:
        function: of a module that lies in tests/; what it does there it sees by `stub_driver.inside.watch`.
        arguments: JSON, as is what it returns; dataclasses come back as dictionaries.
        gpu: one of the compute capabilities that the audit compiles for, as digits.
        compiling: kernels are compiled really, 1 to 2 CPU seconds each; otherwise something that does nothing stands in
            for their machine code.
        quiet: what the process writes to stderr is shown where it fails alone.

    Raises:
        RuntimeError: with what the process wrote, where the function raises.
    """
    from pyfused.kernels.audit import TARGETS

    (target,) = (target for target in TARGETS if target.capability == divmod(gpu, 10))
    home = Path(sys.modules[function.__module__].__file__).with_suffix("")
    # A test file is no part of a package; the stub driver's own files are, also where one runs as a program.
    module = f"{home.parent.name}.{home.name}" if home.parent.name == "stub_driver" else home.name
    # Of each room whose tests run in this process pytest has put the folder there.
    rooms = [Path(folder) for folder in sys.path if Path(folder).is_relative_to(TESTS)]
    environment = {
        "STUB_CAPABILITY": str(gpu), "STUB_MULTIPROCESSORS": str(target.multiprocessors),
        "STUB_SHARED_MEMORY": str(target.shared_memory),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        question = inside.Question(
            folder, environment, list(map(str, rooms)), compiling, module, function.__qualname__, arguments
        )
        said = Path(folder, "said")
        said.touch()
        server = _server()
        print(json.dumps(vars(question)), file=server.stdin, flush=True)
        status = server.stdout.readline().strip()
        if not quiet:
            sys.stderr.write(said.read_text())
        if status != "0":
            raise RuntimeError(f"{function.__qualname__} over the stub driver, exit code {status}:\n{said.read_text()}")
        return json.loads(Path(folder, "answer").read_text())


@functools.cache
def _server() -> subprocess.Popen:
    """It has imported what every process over the stub driver would, which takes seconds, and ends with this one."""
    libcuda = build.library()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": _before("PYTHONPATH", TESTS, TESTS / "contract"), "PYFUSED_BACKEND": "triton",
        "OMP_NUM_THREADS": "1", "LD_LIBRARY_PATH": _before("LD_LIBRARY_PATH", libcuda),
        "TRITON_LIBCUDA_PATH": str(libcuda), "TRITON_CACHE_DIR": str(build.CACHE / "triton"),
    }  # fmt: skip
    command = [sys.executable, "-m", "stub_driver.inside", str(libcuda / "libcuda.so.1")]
    pipe = subprocess.PIPE
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=TESTS.parent)
    atexit.register(server.communicate)
    return server


def _before(variable: str, *folders: Path) -> str:
    """The environment's list of folders with these before its own."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get(variable)])])


def compilations(function: Callable[..., object], *arguments: object, gpu: int = 90) -> list[str]:
    """The distinct compilations that ``function(*arguments)`` asks for: each one's kernel and Triton's key for it."""
    found = over_stub(_compilations, function.__module__, function.__qualname__, arguments, gpu=gpu)
    return [f"{specialisation['kernel']} {specialisation['key']}" for specialisation in found]


def _compilations(module: str, name: str, arguments: list) -> list[inside.Specialisation]:
    function = getattr(importlib.import_module(module), name)
    return inside.compiled_by(lambda: function(*arguments))
