"""Compiles the stub driver with the host's C compiler."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent.parent / "build" / "stub_driver"
COMPILER = os.environ.get("CC", "gcc")


@functools.cache
def include() -> Path | None:
    """The folder with CUDA's headers; None where there is none."""
    nvcc, triton = shutil.which("nvcc"), importlib.util.find_spec("triton")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    folders = [Path(home) / "include" for home in homes if home]
    folders += [
        Path(path) / "backends/nvidia/include" for path in (triton.submodule_search_locations if triton else ())
    ]
    return next((folder for folder in folders if (folder / "cuda.h").exists()), None)


def _refusal() -> str | None:
    if torch.cuda.is_available():
        return "stands in for a GPU where there is none; here is one"
    if importlib.util.find_spec("triton") is None:
        return "needs triton, which is not installed"
    if shutil.which(COMPILER) is None:
        return f"needs a C compiler: {COMPILER} is not on PATH"
    if include() is None:
        return "needs CUDA's header cuda.h: not in CUDA_HOME, beside nvcc or in triton's wheel"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "needs Python.h, with which triton compiles its launcher"
    return None


# Why nothing can be built here; None when it can.
REFUSAL = _refusal()


def library() -> Path:
    """The folder that holds the driver, libcuda.so.1, built anew if anything has changed.

    Raises:
        RuntimeError: with the compiler's message.
    """
    source = HERE / "libcuda.c"
    command = [COMPILER, "-std=c11", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    command += ["-isystem", str(include()), str(source)]
    key = hashlib.sha256(source.read_bytes() + " ".join(command).encode()).hexdigest()[:16]
    folder = CACHE / key
    target = folder / "libcuda.so.1"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Of several test processes each may be the first.
        unfinished = folder / f"{os.getpid()}.so"
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        unfinished.replace(target)
    return folder
