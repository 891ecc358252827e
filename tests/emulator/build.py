"""Compiles kernels, their launchers and the emulator with the host's compiler into one library, a Python module."""

from __future__ import annotations

import concurrent.futures
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "emulator"
COMPILER = os.environ.get("CXX", "g++")
JOBS = 2
FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fno-semantic-interposition",
    # Several of these libraries live in one process: none may take another's kernels for its own.
    "-fno-gnu-unique",
    # Places in messages are relative to the repository.
    f"-fmacro-prefix-map={ROOT}/=",
    "-DPYFUSED_EMULATOR",
    f"-I{HERE}",
    f"-I{ROOT / 'csrc'}",
)
EMULATOR = ("emulator.cpp", "memory.cpp", "collectives.cpp", "fiber.cpp")
# What PYBIND11_MODULE calls each of them.
MODULE = "emulated"


def _refusal() -> str | None:
    if shutil.which(COMPILER) is None:
        return f"needs a C++ compiler: {COMPILER} is not on PATH"
    return None if importlib.util.find_spec("pybind11") else "needs pybind11, which is not installed"


# Why nothing can be built here; None when it can.
REFUSAL = _refusal()


def build(
    sources: Sequence[Path],
    name: str,
    *,
    defines: Sequence[str] = (),
    include: Sequence[Path | str] = (),
    link: Sequence[str] = (),
    emulator_defines: Sequence[str] = (),
) -> Path:
    """The library ``name`` of ``sources`` (.cu or .cpp) and the emulator, out of the cache if nothing has changed.

    ``defines`` are ``NAME`` or ``NAME=value``, ``include`` folders of other headers, both for ``sources`` alone;
    ``emulator_defines`` are for the emulator alone, ``link`` options for the linker. Raises ``RuntimeError`` with the
    compiler's message.
    """
    # Not above: where nothing is built it may be missing.
    import pybind11

    include = [pybind11.get_include(), sysconfig.get_path("include"), *include]
    flags = [*FLAGS, *(f"-D{define}" for define in defines), *(f"-isystem{folder}" for folder in include)]
    emulator_flags = [*FLAGS, *(f"-D{define}" for define in emulator_defines)]
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        # Of several test processes one compiles and the others wait.
        fcntl.flock(lock, fcntl.LOCK_EX)
        versions = (importlib.metadata.version(name) for name in ("pybind11", "torch"))
        headers = _hash(*(path.read_bytes() for path in _headers()), _run(COMPILER, "--version"), *versions)
        with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
            started = [pool.submit(_compile, source, flags, headers) for source in sources]
            started += [pool.submit(_compile, HERE / source, emulator_flags, headers) for source in EMULATOR]
            objects = [task.result() for task in started]
        options = ["-shared", *map(str, objects), *link]
        library = CACHE / f"{name}-{_hash(shlex.join(options))}.so"
        return _make(library, [*options, "-o"])


def load(library: Path) -> ModuleType:
    """Import a library; one that something else has loaded is the same one, with the same state."""
    # By a name that no other file has: pybind11 makes one module of each name.
    name = f"{library.stem}.{MODULE}"
    loader = ExtensionFileLoader(name, str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


def _compile(source: Path, flags: Sequence[str], headers: str) -> Path:
    key = _hash(str(source), source.read_bytes(), shlex.join(flags), headers)
    return _make(CACHE / f"{source.stem}-{key}.o", [*flags, "-x", "c++", "-c", str(source), "-o"])


def _make(target: Path, arguments: Sequence[str]) -> Path:
    if not target.exists():
        # Two libraries may be in want of the same object.
        unfinished = target.with_suffix(f".{os.getpid()}")
        _run(COMPILER, *arguments, str(unfinished))
        unfinished.replace(target)
    return target


def _headers() -> list[Path]:
    folders = (HERE, ROOT / "csrc")
    return sorted(path for folder in folders for path in folder.iterdir() if path.suffix in (".h", ".cuh"))


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
    return done.stdout
