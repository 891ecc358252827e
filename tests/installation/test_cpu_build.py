"""The build of `pyfused._cpu`: from a C++ compiler alone, again only what changed, and what it says where it cannot."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import processes
import pytest
from tree import ROOT

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH"),
]
SERVES = """
import json, pyfused, torch
from pyfused.choice import backends
y = pyfused.adapter_residual(torch.ones(2, 3), torch.ones(1, 3), None, torch.ones(3, 1), None, backend="cpu")
print(json.dumps([backends.cpu_build_info(), y.isfinite().all().item()]))
"""


run = functools.partial(processes.run, PYFUSED_CUDA="0")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("cpu") / "checkout"
    skip = shutil.ignore_patterns(
        ".git", ".venv", ".peft", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "results", "tests", "_C.*",
        "_cpu.*",
    )  # fmt: skip
    shutil.copytree(ROOT, copy, symlinks=True, ignore=skip)
    return copy


def build(checkout: Path, *, fails: bool = False, **variables: str) -> str:
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    return run(*command, cwd=checkout, fails=fails, PYFUSED_CPU="1", **variables)


def test_it_is_built_by_a_compiler_alone_and_serves(checkout):
    # No nvcc, and no Python.h, is asked for.
    printed = build(checkout, CUDA_HOME="/nowhere")
    assert "\npyfused._cpu, the C++ kernels for CPUs, is built (PYFUSED_CPU=0 leaves it out)\n" in printed
    built, finite = json.loads(run(sys.executable, "-c", SERVES, cwd=checkout))
    assert finite
    assert "baseline" in built["sets"]
    assert "g++" in built["compiler"]
    # The linker takes one copy of a weak function, of whatever instruction set, for all that call it.
    objects = list((checkout / "build" / "cpu").glob("*_kernels.*.o"))
    sources = list((checkout / "csrc" / "cpu").glob("*_kernels.cpp"))
    assert len(objects) == len(sources) * len(built["sets"])
    for file in objects:
        symbols = run("nm", file, cwd=checkout)
        assert [line for line in symbols.splitlines() if line.split()[-2] in "vVwWu"] == []


def test_only_what_changed_is_compiled_again(checkout):
    build(checkout)
    assert "compiling" not in build(checkout)
    os.utime(checkout / "csrc" / "cpu" / "parallel.h")
    assert set(re.findall(r"compiling csrc/cpu/(\S+)", build(checkout))) == {"adapter_residual.cpp", "low_rank.cpp"}


def test_the_compilers_message_is_shown(checkout):
    build(checkout)
    source = checkout / "csrc" / "cpu" / "kernels.cpp"
    right = source.read_text()
    try:
        source.write_text(right.replace("taken = widest();", "taken = widset();"))
        printed = build(checkout, fails=True)
    finally:
        source.write_text(right)
    assert re.search(r"csrc/cpu/kernels\.cpp:\d+:\d+: error: .widset. was not declared", printed)
    assert "PYFUSED_CPU=0 installs pyfused without the C++ kernels for CPUs" in printed
    assert "Traceback" not in printed


def test_the_wheel_holds_it(checkout, tmp_path):
    build(checkout)
    run(
        sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", tmp_path,
        checkout, cwd=tmp_path,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "pyfused/_cpu.abi3.so" in names
    assert "pyfused/_C.absent" in names
    assert "pyfused/_cpu.absent" not in names


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"PYFUSED_CPU": "1", "CXX": "/no/compiler"},
            "PYFUSED_CPU=1, but the C++ compiler '/no/compiler' was not found",
        ),
        ({"PYFUSED_CPU": "yes"}, "PYFUSED_CPU must be 0 or 1, got 'yes'"),
    ],
)
def test_a_build_that_cannot_be_done(checkout, variables, message):
    assert f"pyfused: {message}" in run(sys.executable, "setup.py", "--name", cwd=checkout, fails=True, **variables)
