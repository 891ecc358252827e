"""Two processes that run cases together, over gloo: started once, and each case reported alone.

A case is a function of (rank, folder) that raises where something is wrong; a module has them by name in ``CASES``.
Each has a process group of its own, so that one that fails in one process does not take the others with it.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
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
    command = [sys.executable, "-c", "import conftest, pair; pair.work()", str(folder)]
    logs = [folder / f"{rank}.log" for rank in range(WORLD)]
    started = []
    for rank, log in enumerate(logs):
        with log.open("w") as out:
            started.append(subprocess.Popen([*command, str(rank), *modules], env=environment, stdout=out, stderr=out))
    try:
        for process in started:
            process.wait(timeout=500)
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


def work() -> None:
    """One of the two processes: its arguments are the folder, its rank and the modules."""
    import torch.distributed as dist

    folder, rank, modules = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    cases = {
        f"{module}: {name}": case for module in modules for name, case in importlib.import_module(module).CASES.items()
    }
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
