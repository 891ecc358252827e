"""Compiles kernels, their launchers and the emulator with the host's compiler into one shared library."""

from __future__ import annotations

import concurrent.futures
import fcntl
import hashlib
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "emulator"
COMPILER = os.environ.get("CXX", "g++")
JOBS = 2
FLAGS = (
    "-std=c++17",
    "-O2",
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


def build(
    sources: Sequence[Path],
    name: str,
    *,
    defines: Sequence[str] = (),
    include: Sequence[Path | str] = (),
    link: Sequence[str] = (),
) -> Path:
    """The library ``name`` of ``sources`` (.cu or .cpp) and the emulator, out of the cache if nothing has changed.

    ``defines`` are ``NAME`` or ``NAME=value``, ``include`` folders of other headers, ``link`` options for the linker.
    Raises ``RuntimeError`` with the compiler's message.
    """
    flags = [*FLAGS, *(f"-D{define}" for define in defines), *(f"-isystem{folder}" for folder in include)]
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        # Of several test processes one compiles and the others wait.
        fcntl.flock(lock, fcntl.LOCK_EX)
        headers = _hash(*(path.read_bytes() for path in _headers()), _run(COMPILER, "--version"))
        with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
            paths = [*sources, *(HERE / source for source in EMULATOR)]
            objects = list(pool.map(lambda path: _compile(path, flags, headers), paths))
        options = ["-shared", *map(str, objects), *link]
        library = CACHE / f"{name}-{_hash(shlex.join(options))}.so"
        return _make(library, [*options, "-o"])


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
