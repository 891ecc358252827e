"""Two processes that run the cases of a test file together, over gloo: started once per file, each case reported alone.

A case is a function of (rank, folder) that raises where something is wrong. Each has a process group of its own, so
that a case that fails in one process does not take the others with it.
"""

from __future__ import annotations

import datetime
import fcntl
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tree import ROOT, TESTS

WORLD = 2
HERE = Path(__file__).resolve().parent


def together(module: str, folder: Path) -> dict[str, str]:
    """Case -> what the two processes raised in it, "" where they did not."""
    paths = [str(path) for path in (TESTS, HERE, ROOT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST"):
        environment.pop(name, None)
    # What tests/conftest.py sets up comes before torch is used.
    command = [sys.executable, "-c", "import conftest, pair; pair.work()", module, str(folder)]
    logs = [folder / f"{rank}.log" for rank in range(WORLD)]
    started = []
    for rank, log in enumerate(logs):
        with log.open("w") as out:
            started.append(subprocess.Popen([*command, str(rank)], env=environment, stdout=out, stderr=out))
    try:
        for process in started:
            process.wait(timeout=400)
    finally:
        for process in started:
            process.kill()
            process.wait()
    found = [folder / f"{rank}.json" for rank in range(WORLD)]
    if not all(path.exists() for path in found):
        raise RuntimeError("\n".join(log.read_text()[-3000:] for log in logs))
    ranks = [json.loads(path.read_text()) for path in found]
    return {
        name: "\n".join(f"rank {rank}: {raised[name]}" for rank, raised in enumerate(ranks) if raised[name])
        for name in ranks[0]
    }


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory) -> Path:
    """Where the two processes of a test file leave what they write; one folder for all workers of xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / request.module.__name__
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def outcomes(request, folder) -> dict[str, str]:
    """What `together` gives for the cases of a test file: of several workers of xdist one asks, and the others wait."""
    if not torch.distributed.is_available():
        pytest.skip("torch has no torch.distributed")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        report = folder / "outcomes.json"
        if not report.exists():
            report.write_text(json.dumps(together(request.module.__name__, folder)))
    return json.loads(report.read_text())


def work() -> None:
    """One of the two processes: its arguments are the test file's module, the folder and its rank."""
    import torch.distributed as dist

    module, folder, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    cases: dict[str, Callable[[int, Path], None]] = importlib.import_module(module).CASES
    raised = {}
    for number, (name, case) in enumerate(cases.items()):
        store = dist.FileStore(str(folder / f"store{number}"), WORLD)
        limit = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=limit)
        torch.manual_seed(0)
        try:
            case(rank, folder)
            raised[name] = ""
        except Exception:
            raised[name] = traceback.format_exc()
        finally:
            dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(raised))
