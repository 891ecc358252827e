"""What became of each of many things, in one file that is whole and valid at any moment."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from pyfused import files

# Of an outcome: what is under way when the file is written, so that a file left so names what hung or was cut off.
RUNNING, PASSED, FAILED, SKIPPED = "running", "passed", "failed", "skipped"


class Outcomes:
    """Name -> what became of it, a JSON object with a "status"; continued when the file is there.

    Args:
        path: its directory is made if it is not there.
        facts: what the file says besides.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: the file holds something else.
    """

    def __init__(self, path: Path, facts: Mapping[str, object]) -> None:
        self.path, self.facts = path, dict(facts)
        self.items: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                self.items = json.loads(path.read_text())["outcomes"]
                all(item["status"] for item in self.items.values())
            except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
                raise ValueError(f"{path} holds no outcomes: {error!r}") from error
        self._write()

    def status(self, name: str) -> str | None:
        return str(self.items[name]["status"]) if name in self.items else None

    def put(self, name: str, status: str, **details: object) -> None:
        self.items[name] = {"status": status, **details}
        self._write()

    def tell(self, **facts: object) -> None:
        """Adds to the facts."""
        self.facts |= facts
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(self.path) as partial:
            partial.write_text(json.dumps(self.facts | {"outcomes": self.items}, indent=1, default=str) + "\n")


def answers(device: torch.device) -> bool:
    """Whether the device still computes: after an access beyond its memory, a GPU does nothing more in this process."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True


def arguments_of(step: str, what: str, argv: Sequence[str] | None, select: str | None = None) -> argparse.Namespace:
    """Of a program of this room whose record is <step>.json, within their ranges; ``select``: what its -k selects."""
    made = argparse.ArgumentParser(prog=f"python -m pyfused.bench.gpu.programs.{step}", description=what)
    made.add_argument("--record", type=Path, required=True, metavar="DIRECTORY", help=f"where {step}.json grows")
    made.add_argument("--seconds", type=float, default=90.0, help="for all of it (default 90)")
    cores = len(os.sched_getaffinity(0))
    made.add_argument("--workers", type=int, default=cores, help="compilers at work at once (default: one for a core)")
    made.add_argument("--commit", metavar="HASH", help="the commit to record where the checkout has no .git")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--continued", action="store_true", help="leave what failed as it is, and compile nothing ahead")
    if select is not None:
        made.add_argument("-k", dest="select", default="", metavar="TEXT", help=select)
    arguments = made.parse_args(argv)
    if not 0 < arguments.seconds < float("inf"):
        made.error(f"--seconds must be a positive number, got {arguments.seconds:g}")
    if arguments.workers < 1:
        made.error(f"--workers must be at least 1, got {arguments.workers}")
    return arguments


def go_on(module: str, arguments: Sequence[str]) -> NoReturn:
    """Starts this module of this room again in place of this process, in which the GPU is of no more use."""
    print(f"{module}: going on in a new process", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", f"pyfused.bench.gpu.programs.{module}", *arguments])
