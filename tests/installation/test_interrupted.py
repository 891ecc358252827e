"""What is killed at any moment leaves no broken files: Triton's cache, a benchmark's rows, a build's objects."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tree import ROOT

from pyfused.bench.record.rows import read_rows

pytestmark = pytest.mark.host


# ---- Triton's cache, killed and shared


def _compile(cache: Path, report: Path, start: object = None) -> None:
    """Writes the digest of every kernel of `projection_residual` at its smallest, compiled for sm_80 or loaded."""
    from pyfused.kernels import audit

    os.environ["TRITON_CACHE_DIR"] = str(cache)
    digests = []
    if start is not None:
        start.wait()
    for case in audit.cases(audit.TARGETS[:1], False, "projection size 1"):
        compiled = audit.specialisation(case.launch, case.target).compile()
        digests.append((case.launch.kernel.__name__, hashlib.sha256(compiled.asm["cubin"]).hexdigest()))
    report.write_text(json.dumps(digests))


@pytest.fixture
def processes(monkeypatch):
    """Starts processes that have imported the compiler, but compiled nothing."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pyfused.kernels.audit", __name__])
    return context


def _compiled(processes, cache: Path, together: int = 1) -> list[list]:
    """The digests by each of some processes that start together."""
    start = processes.Barrier(together)
    reports = [cache.with_name(f"{cache.name}-{number}.json") for number in range(together)]
    started = [processes.Process(target=_compile, args=(cache, report, start)) for report in reports]
    for process in started:
        process.start()
    for process in started:
        process.join()
        assert process.exitcode == 0
    digests = [json.loads(report.read_text()) for report in reports]
    assert all(len(found) == 3 for found in digests)
    return digests


def _files(cache: Path) -> dict[Path, int]:
    """What was written when; nothing half-written is under its name."""
    found = {}
    for folder, _, names in os.walk(cache):
        for path in (Path(folder, name) for name in names):
            # A compiler at work renames its files.
            with contextlib.suppress(FileNotFoundError):
                found[path] = path.stat().st_mtime_ns
    return found


def _wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_killed_compilation_leaves_a_cache_that_serves(processes, tmp_path):
    (expected,) = _compiled(processes, tmp_path / "whole")
    total = len(_files(tmp_path / "whole"))
    cache, draw = tmp_path / "killed", random.Random(0)
    for files in sorted(draw.sample(range(1, total - 4), 3)):
        process = processes.Process(target=_compile, args=(cache, tmp_path / "none.json"))
        process.start()
        _wait_until(lambda files=files: len(_files(cache)) >= files)
        time.sleep(draw.uniform(0.0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert _compiled(processes, cache) == [expected]
    assert {path.relative_to(cache) for path in _files(cache) if "tmp.pid" not in str(path)} == {
        path.relative_to(tmp_path / "whole") for path in _files(tmp_path / "whole")
    }


def test_processes_share_a_cache(processes, tmp_path):
    cache = tmp_path / "shared"
    first, second = _compiled(processes, cache, together=2)
    assert first == second
    written = _files(cache)
    assert not [path for path in cache.rglob("*") if path.name.startswith("tmp.")]
    assert _compiled(processes, cache) == [first]
    assert _files(cache) == written, "the third compiled anew"


# ---- benchmarks and builds, killed

ROWS = """
import pytest
from pyfused.bench.run.plugin import *

@pytest.mark.parametrize("number", range(10_000))
def test_killed(compare, number):
    call = lambda: None
    compare(f"row {number}", {"pyfused": [call], "eager": [call]}, rounds=1, facts={"note": "x" * 100_000})
"""


def test_a_killed_benchmark_leaves_its_rows(tmp_path):
    (tmp_path / "test_rows.py").write_text(ROWS)
    command = [sys.executable, "-m", "pyfused.cli", "bench", "test_rows.py", "-k", "test_killed", "--output", "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    try:
        _wait_until(lambda: any(tmp_path.glob("out/*/*/rows.json")))
        (path,) = tmp_path.glob("out/*/*/rows.json")
        names, least = [], random.Random(0).randint(20, 40)
        while len(names) < least:
            assert process.poll() is None
            # As a reader at any moment finds it.
            names = [row.name for row in read_rows(path)]
            assert names == [f"row {number}" for number in range(len(names))]
    finally:
        process.kill()
        process.wait()
    left = [row.name for row in read_rows(path)]
    assert left[:least] == names[:least]
    assert left == [f"row {number}" for number in range(len(left))]


# Stands in for nvcc and the C++ compiler: writes its inputs and its targets, in two halves with a pause between them.
COMPILER = """#!{python} -SI
import os, pathlib, sys, time
arguments = sys.argv[1:]
if "--version" in arguments:
    sys.exit(print("release 12.4, V12.4.131"))
target = pathlib.Path(arguments[arguments.index("-o") + 1])
made = arguments[arguments.index("-MT") + 1] if "-MT" in arguments else str(target)
inputs = [item for item in arguments if item.endswith((".cu", ".cu.o")) and item != made]
text = "".join(pathlib.Path(item).read_text() for item in inputs)
text += "".join(f"{{item}}\\n" for item in arguments if "sm_" in item)
with target.open("w") as file:
    file.write(text[: len(text) // 2])
    file.flush()
    if "PAUSE" in os.environ:
        pathlib.Path("half.so" if "_C.so" in target.name else "half.o").touch()
        time.sleep(float(os.environ["PAUSE"]))
    file.write(text[len(text) // 2 :])
if "-MF" in arguments:
    pathlib.Path(arguments[arguments.index("-MF") + 1]).write_text(f"{{target}}: {{inputs[0]}}\\n")
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout whose nvcc is the one above."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "pyfused/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    for folder in ("bin", "csrc"):
        (tmp_path / folder).mkdir()
    (tmp_path / "bin" / "nvcc").write_text(COMPILER.format(python=sys.executable))
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    return tmp_path


def _start_build(checkout: Path, **variables: str) -> subprocess.Popen:
    """In a process group of its own, numbered as the process."""
    variables = {
        "CUDA_HOME": str(checkout), "PYFUSED_CUDA": "1", "PYFUSED_CPU": "0", "PYFUSED_CUDA_ARCHS": "80",
        "MAX_JOBS": "2", **variables,
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=checkout, env=os.environ | variables,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def _build(checkout: Path, **variables: str) -> int:
    """How many sources it compiled."""
    with _start_build(checkout, **variables) as build:
        printed, _ = build.communicate(timeout=60)
    assert build.returncode == 0, printed
    return printed.count("compiling csrc/")


def _write_sources(checkout: Path, version: str) -> str:
    """What a library of them must be."""
    texts = {f"{name}.cu": f"{name} {version}\n" * 100 for name in "abc"}
    for name, text in texts.items():
        (checkout / "csrc" / name).write_text(text)
    return "".join(f"{text}arch=compute_80,code=sm_80\n" for text in texts.values())


@pytest.mark.skipif(sys.platform != "linux", reason="the kernels are built on Linux")
@pytest.mark.parametrize("kind", ["first build", "new sources", "other targets", "linking"])
@pytest.mark.parametrize("killed", ["compilers", "ninja and compilers", "the whole build"])
def test_a_killed_build_leaves_nothing_that_passes_for_built(checkout, kind, killed):
    expected = _write_sources(checkout, "old")
    if kind != "first build":
        assert _build(checkout) == 3
    if kind == "new sources":
        expected = _write_sources(checkout, "new")
    elif kind == "linking":
        # The log of ninja knows the library from the build before.
        os.remove(checkout / "build" / "cuda" / "_C.so")
    with _start_build(checkout, PAUSE="2", PYFUSED_CUDA_ARCHS="90" if kind == "other targets" else "80") as build:
        _wait_until((checkout / ("half.so" if kind == "linking" else "half.o")).exists)
        (ninja,) = psutil.Process(build.pid).children()
        assert ninja.name() == "ninja"
        compilers = ninja.children(recursive=True)
        assert compilers
        if killed == "the whole build":
            build.kill()
        for member in [*([ninja] if killed != "compilers" else []), *compilers]:
            # A shell ends with its compiler.
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        build.communicate(timeout=60)
    assert build.returncode != 0
    # Of three sources two are compiled at once: the third may have been compiled after the first two were killed.
    again = 0 if kind == "linking" else 2 if killed == "compilers" and kind != "other targets" else 3
    assert _build(checkout) == again
    library = checkout / "pyfused" / "_C.abi3.so"
    assert library.read_text() == expected
    assert _build(checkout) == 0
    assert library.read_text() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="the kernels are built on Linux")
@pytest.mark.parametrize("given", ["0", "-1", "all"])
def test_jobs_that_are_no_number_of_compilers(checkout, given):
    _write_sources(checkout, "old")
    with _start_build(checkout, MAX_JOBS=given) as build:
        printed, _ = build.communicate(timeout=60)
    assert build.returncode != 0
    assert f"pyfused: MAX_JOBS must be a number from 1 on, got {given!r}" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="the kernels are built on Linux")
def test_a_source_edited_while_it_compiles_is_compiled_again(checkout):
    _write_sources(checkout, "old")
    with _start_build(checkout, PAUSE="1.5") as build:
        _wait_until((checkout / "half.o").exists)
        expected = _write_sources(checkout, "new")
        build.communicate(timeout=60)
    assert build.returncode == 0
    assert _build(checkout) >= 2
    assert (checkout / "pyfused" / "_C.abi3.so").read_text() == expected
