"""What one measurement is recorded as, where it was made, and the file that grows row by row."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
import os
import platform
import re
import subprocess
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

import pyfused
from pyfused import files
from pyfused.bench import ROOT
from pyfused.choice import order


class Title(NamedTuple):
    """By which a row is known, in a table and in the record of one device: the fields of `Row`."""

    name: str
    measured: str
    mode: str = "wall clock"

    @property
    def measured_how(self) -> str:
        """What was measured, and how where that is not by the wall clock."""
        return self.measured if self.mode == "wall clock" else f"{self.measured}, {self.mode}"

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.name, self.measured_how)))


# A row whose ratios vary by more than this share of themselves between their quartiles is noisy. docs/decisions.md says
# why this share.
NOISY = 0.15


@dataclass
class Row:
    """One line of the table and one object of rows.json.

    Attributes:
        name: what was measured, with its shape.
        kind: "operator", "overhead", "model", "training", "machine" or "traffic" (DRAM bytes, by
            `bench/gpu/programs/traffic.py`).
        measured: "forward", "forward+backward", "training step" or "training run"; of a machine "matrix product" or
            "copy".
        mode: "wall clock" on a CPU; "eager launches" or "graph replay" on a GPU; "host time" of a call on either;
            "hardware counters".
        subject: the contender that the ratios compare with.
        facts: shape, dtype and other settings; of an operator and of a machine the floating-point operations
            ("flops") and the least memory traffic ("bytes").
        parity: one entry for each tensor and norm: error, plain torch's error and limit, relative to the tensor's norm.
        passed: whether parity holds; when False the row has no times.
        seconds: contender -> median.
        ratios: contender -> median over the rounds of its time / the subject's; above 1 the subject is faster.
        quartiles, ratio_quartiles: contender -> the lower and the upper quartile of the same; empty in records of
            before.
        rounds: how many rounds the medians are over.
        attempts: how often all rounds were measured: again where they were noisy. The least noisy ones are recorded.
        noisy: whether those have a `spread` of more than `NOISY`.
        load: the machine's mean number of waiting processes in the last minute, "before" and "after" the rounds.
        peak_bytes: contender -> the most memory held at once during the call, beyond what was held before.
        saved_bytes: contender -> what autograd keeps for backward beyond parameters and inputs.
        loss: contender -> loss, or the losses of a run.
        unavailable: contender -> why it did not run.
        wrong: those of them that should have run, and crashed or were further from float64 than their limit.
        gpu: clocks and power before and after, as nvidia-smi gives them, each at most seconds old.
        provenance: device, versions, commit, date, threads.
    """

    name: str
    kind: str
    measured: str
    mode: str = "wall clock"
    subject: str = "pyfused"
    facts: dict[str, Any] = field(default_factory=dict)
    parity: list[dict[str, Any]] = field(default_factory=list)
    passed: bool = True
    seconds: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    quartiles: dict[str, list[float]] = field(default_factory=dict)
    ratio_quartiles: dict[str, list[float]] = field(default_factory=dict)
    rounds: int = 0
    attempts: int = 0
    noisy: bool = False
    load: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    saved_bytes: dict[str, int] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    gpu: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether everything that was to be timed computes what it should."""
        return self.passed and not self.wrong

    @property
    def spread(self) -> float:
        """The widest range between the quartiles of a ratio, of seconds where nothing is compared.

        It is the logarithm of upper over lower: a share where it is small, and the same for a ratio and its inverse.
        """
        quartiles = self.ratio_quartiles if self.ratios else self.quartiles
        ranges = (math.log(upper / lower) if lower > 0 else math.inf for lower, upper in quartiles.values())
        return max(ranges, default=0.0)

    @property
    def key(self) -> Title:
        return Title(self.name, self.measured, self.mode)

    @property
    def measured_how(self) -> str:
        return self.key.measured_how


class RowFile:
    """rows.json in a directory that is made with the first row; whole and valid after every row, and continued when it
    is there.

    NaN and infinities, which JSON does not know, stand there as strings.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "rows.json"
        self.rows: list[Row] = read_rows(self.path) if self.path.exists() else []
        # Each row's lines are made once: a long record would take longer to write anew than its next row to measure.
        self._texts = [_text(row) for row in self.rows]

    def append(self, row: Row, instead_of: Row | None = None) -> None:
        """Writes the row behind all others, and without one of them."""
        if instead_of is not None:
            place = next(place for place, known in enumerate(self.rows) if known is instead_of)
            del self.rows[place], self._texts[place]
        self.rows.append(row)
        self._texts.append(_text(row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(self.path) as partial:
            partial.write_text("[\n" + ",\n".join(self._texts) + "\n]\n")


def _text(row: Row) -> str:
    return textwrap.indent(json.dumps(_each(dataclasses.asdict(row), _named), indent=1, allow_nan=False), " ")


def read_rows(path: Path) -> list[Row]:
    """The rows of a rows.json."""
    items = _each(json.loads(path.read_text()), _number)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError("something else than a list of objects")
    return [Row(**item) for item in items]


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change`` made to everything in it that is no container."""
    if isinstance(value, dict):
        return {key: _each(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_each(item, change) for item in value]
    return change(value)


def _named(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


def provenance(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Where and with what a row is measured: device, driver, torch, triton, commit, date, threads.

    Args:
        device: where the row was measured.
        commit: taken where there is no .git that knows it.
    """
    facts = _fixed_provenance(device)
    return facts | {
        "commit": facts["commit"] or commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return order.cpu_model()


def default_output() -> Path:
    """bench/results of the checkout that this file lies in; for an installed package ./pyfused-results."""
    return ROOT / "bench" / "results" if _in_checkout() else Path.cwd() / "pyfused-results"


def run_directory(output: Path, device: torch.device) -> Path:
    """``output``/<device>/<date>, the date to the second so that no run overwrites another."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    prefix = "" if device.type == "cuda" else f"cpu-{os.cpu_count()}x-"
    return output / f"{prefix}{slug}" / datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d-%H%M%S")


def _in_checkout() -> bool:
    return (ROOT / "pyproject.toml").is_file() and (ROOT / "bench").is_dir()


@functools.cache
def _fixed_provenance(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device": device_name(device),
        "driver": None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peft": _version("peft"),
        "open_clip": _version("open_clip_torch"),
        "pyfused": pyfused.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **_commit(),
    }
    if device.type == "cuda":
        facts["driver"] = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        facts["cuda"] = torch.version.cuda
        facts["capability"] = ".".join(str(part) for part in torch.cuda.get_device_capability(device))
    return facts


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    """The checkout's commit, and whether files beside earlier results differ from it."""
    # Without the second test git would answer for a repository further up.
    if not (_in_checkout() and (ROOT / ".git").exists()):
        return {"commit": None, "dirty": None}
    commit = _run("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = _run("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!bench/results")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
