"""Two processes that run cases together, over gloo: forked once from one that has imported what they need, and each
case reported alone.

A case is a function of (rank, folder) that raises where something is wrong; a module has them by name in ``CASES``.
Each has a process group of its own, so that one that fails in one process does not take the others with it.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tree import ROOT, TESTS

WORLD = 2
HERE = Path(__file__).resolve().parent


def together(modules: Sequence[str], folder: Path) -> dict[str, str]:
    """ "module: case" -> what the two processes raised in it, "" where they did not."""
    paths = [str(path) for path in (TESTS, HERE, ROOT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST"):
        environment.pop(name, None)
    # What tests/conftest.py sets up comes before torch is used.
    command = [sys.executable, "-c", "import conftest, pair; pair.work()", str(folder), *modules]
    log = folder / "log"
    with log.open("w") as out:
        started = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        started.wait(timeout=500)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    found = [folder / f"{rank}.json" for rank in range(WORLD)]
    if not all(path.exists() for path in found):
        raise RuntimeError(log.read_text()[-6000:])
    ranks = [json.loads(path.read_text()) for path in found]
    return {
        name: "\n".join(f"rank {rank}: {raised[name]}" for rank, raised in enumerate(ranks) if raised[name])
        for name in ranks[0]
    }


def work() -> None:
    """Of the process that the two are forked from: its arguments are the folder and the modules."""
    folder, modules = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    cases = {
        f"{module}: {name}": case for module in modules for name, case in importlib.import_module(module).CASES.items()
    }
    processes = []
    for rank in range(WORLD):
        processes.append(os.fork())
        if processes[-1] == 0:
            return _run(cases, rank, folder)
    for process in processes:
        os.waitpid(process, 0)


def _run(cases: dict[str, Callable[[int, Path], None]], rank: int, folder: Path) -> None:
    import torch.distributed as dist

    raised = {}
    for number, (name, case) in enumerate(cases.items()):
        store = dist.FileStore(str(folder / f"store{number}"), WORLD)
        # One may still import what the other has imported.
        limit = datetime.timedelta(seconds=240)
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
