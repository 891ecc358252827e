"""Small programs that stand for commands, and whether they still run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path


def python(code: str):
    """A step's command."""
    return lambda seconds: [sys.executable, "-c", code]


def script(path: Path, code: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{code}")
    path.chmod(0o755)
    return path


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        # A process that has ended and that nobody has waited for yet is a "Z".
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def run(*command: str | Path, cwd: Path, fails: bool = False, **variables: str) -> str:
    """Standard output and error of a command that must succeed, or fail; it inherits no setting of pyfused."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "PYFUSED"))}
    done = subprocess.run(command, cwd=cwd, env=environment | variables, capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) == fails, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr
