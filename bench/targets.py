"""The numbers to reach, held against the rows of a run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from pyfused.bench.baselines import BASE
from pyfused.bench.rows import Row

# Shape (M, K, N) -> (forward at most this many times the bare GEMM, forward+backward at least this many times faster
# than eager, the ratio that arithmetic allows at most). bfloat16, R 16, no dropout, CUDA-graph replay, H200.
H200_TARGETS = {
    (8192, 4096, 4096): (1.05, 1.22, 1.34),
    (8192, 4096, 14336): (1.04, 1.17, 1.25),
    (6304, 768, 3072): (1.15, 1.8, 2.3),
    (6304, 3072, 768): (1.15, 1.5, 1.9),
    (2740, 1024, 1024): (None, 1.8, 2.3),
}


@dataclass(frozen=True)
class Verdict:
    """One number to reach: what was wanted, what was measured, and whether that is enough."""

    name: str
    wanted: str
    measured: str
    met: bool

    def __str__(self) -> str:
        return f"{'met' if self.met else 'NOT MET':8s}{self.name}: wanted {self.wanted}, measured {self.measured}"


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """The numbers that these rows can answer; nothing for rows that were not measured."""
    timed = [row for row in rows if row.passed and row.ratios]
    return [*_cpu_operator(timed), *_cpu_model(timed), *_h200_operator(timed)]


def _cpu_operator(rows: list[Row]) -> Iterable[Verdict]:
    found = [
        row.ratios["eager"]
        for row in rows
        if row.kind == "operator"
        and row.mode == "wall clock"
        and row.measured == "forward+backward"
        and "eager" in row.ratios
        and row.name.startswith("lora_linear")
    ]
    if found:
        mean = statistics.geometric_mean(found)
        name = f"lora_linear forward+backward against eager, {len(found)} CLIP shapes"
        yield Verdict(f"{name}, geometric mean", ">= 1.05x", f"{mean:.3f}x", mean >= 1.05)
        yield Verdict(f"{name}, smallest", ">= 0.95x", f"{min(found):.3f}x", min(found) >= 0.95)


def _cpu_model(rows: list[Row]) -> Iterable[Verdict]:
    for row in rows:
        if row.kind != "model" or row.mode != "wall clock":
            continue
        for name, ratio in row.ratios.items():
            if not name.startswith("PEFT"):
                continue
            yield Verdict(f"{row.name}, step against {name}", ">= 1.02x", f"{ratio:.3f}x", ratio >= 1.02)
            if {name, row.subject} <= row.peak_bytes.keys():
                ours, theirs = row.peak_bytes[row.subject], row.peak_bytes[name]
                wanted, measured = f"<= {theirs / 2**20:.0f} MiB", f"{ours / 2**20:.0f} MiB"
                yield Verdict(f"{row.name}, peak memory against {name}", wanted, measured, ours <= theirs)


def _h200_operator(rows: list[Row]) -> Iterable[Verdict]:
    for row in rows:
        shape = tuple(row.facts.get(key) for key in ("rows", "in_features", "out_features"))
        if row.mode != "graph replay" or row.facts.get("dropout_p") or shape not in H200_TARGETS:
            continue
        if "H200" not in str(row.provenance.get("device")):
            continue
        base, eager, ceiling = H200_TARGETS[shape]
        if row.measured == "forward" and base is not None and BASE in row.ratios:
            factor = 1 / row.ratios[BASE]
            yield Verdict(f"{row.name}, forward", f"<= {base}x the bare GEMM", f"{factor:.3f}x", factor <= base)
        elif row.measured == "forward+backward" and "eager" in row.ratios:
            ratio = row.ratios["eager"]
            note = f" (above the ceiling of {ceiling}x: a measuring error)" if ratio > ceiling * 1.02 else ""
            wanted = f">= {eager}x eager"
            yield Verdict(f"{row.name}, forward+backward", wanted, f"{ratio:.3f}x{note}", ratio >= eager and not note)
