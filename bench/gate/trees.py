"""The two trees of a comparison: a commit's, checked out for a while, and this one; each runs in its own process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pyfused.bench import ROOT, signals
from pyfused.bench.signals import run_to_the_end


def resolve(ref: str) -> str:
    """The commit that ``ref`` names in the checkout.

    Raises:
        ValueError: it names none, or this is no checkout.
    """
    if not (ROOT / ".git").exists():
        raise ValueError(f"a comparison needs a git checkout, {ROOT} is none")
    found = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}"],
        capture_output=True, text=True,
    )  # fmt: skip
    if found.returncode:
        raise ValueError(f"BASE must name a commit of this repository, got {ref!r}")
    return found.stdout.strip()


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """``commit`` in a temporary directory that goes with the block, with this tree's bench/ in the place of its own."""
    with contextlib.ExitStack() as stack:
        scratch = signals.enter(stack, lambda: tempfile.TemporaryDirectory(prefix="pyfused-base-"))
        tree = Path(scratch, "tree")
        # Not `git worktree`: whenever the run is cut short, nothing of it may stay in this repository.
        run_to_the_end(["git", "clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(tree)])
        run_to_the_end(["git", "-C", str(tree), "checkout", "--quiet", "--detach", commit])
        bench = tree / "pyfused" / "bench"
        bench.unlink(missing_ok=True)
        bench.symlink_to(ROOT / "bench")
        yield tree


def build_kernels(tree: Path) -> None:
    """Compiles the tree's CUDA C++ kernels, if any, in place; setup.py leaves out what would not run."""
    if (tree / "setup.py").exists():
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        run_to_the_end(command, cwd=tree, stdout=sys.stderr)


class WorkerError(RuntimeError):
    """A tree's process cannot be worked with."""


class TreeError(RuntimeError):
    """What a tree's process raised, in its own words."""


class Tree:
    """A process that runs one tree's package; it ends with the block.

    Args:
        name: "base" or "head".
        root: of the tree.
        device, threads: where it computes, and on how many CPU threads.
    """

    def __init__(self, name: str, root: Path, device: torch.device, threads: int) -> None:
        self.name, self.root = name, root
        path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        self._environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        self._command = [sys.executable, "-m", "pyfused.bench.gate.compare_worker", str(device), str(threads)]
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Tree:
        try:
            with signals.signals_held():
                # A session of its own: an interruption is this process's to handle.
                self._process = subprocess.Popen(
                    self._command, cwd=self.root, env=self._environment, stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, text=True, start_new_session=True,
                )  # fmt: skip
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def wait(self) -> None:
        """Until it has imported the tree's package.

        Raises:
            WorkerError: it could not, or imported another.
        """
        package = Path(self._reply()).resolve()
        if not package.is_relative_to(self.root.resolve()):
            raise WorkerError(f"the {self.name}'s process imported {package}, which is not in {self.root}")

    def ask(self, request: str, **arguments: object) -> Any:
        """What the worker's method ``request`` returns.

        Raises:
            TreeError: it raised.
            WorkerError: its process has ended.
        """
        assert self._process is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps([request, arguments]), file=self._process.stdin, flush=True)
        return self._reply()

    def _reply(self) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"the {self.name}'s process ended with status {self._process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise TreeError(reply["error"])
        return reply["result"]
