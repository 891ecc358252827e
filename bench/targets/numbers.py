"""The numbers to reach, held against the rows of a run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pyfused.bench.cases.baselines import BASE
from pyfused.bench.cases.cross_attention_residual import SDPA
from pyfused.bench.record.rows import Row

# Shape (M, K, N) -> (forward at most this many times the bare GEMM, forward+backward at least this many times faster
# than eager, the ratio that arithmetic allows at most). bfloat16, R 16, no dropout, CUDA-graph replay, H200.
LORA_H200 = {
    (8192, 4096, 4096): (1.05, 1.22, 1.34),
    (8192, 4096, 14336): (1.04, 1.17, 1.25),
    (6304, 768, 3072): (1.15, 1.8, 2.3),
    (6304, 3072, 768): (1.15, 1.5, 1.9),
    (2740, 1024, 1024): (None, 1.8, 2.3),
}
# The same -> microseconds of the eager formula, forward and backward, by a model: with no launch, cold memory, and a
# product at the rate that was measured. Then (M, C, h) of an adapter -> those of its forward.
LORA_EAGER_MODEL = {
    (8192, 4096, 4096): (457, 488),
    (8192, 4096, 14336): (1561, 1514),
    (6304, 768, 3072): (94, 85),
    (6304, 3072, 768): (60, 92),
    (2740, 1024, 1024): (16, 19),
}
ADAPTER_EAGER_MODEL = {
    (6304, 768, 64): 21,
    (6304, 768, 192): 22,
    (21920, 1024, 256): 104,
    (262144, 64, 32): 70,
    (65536, 128, 64): 35,
    (16384, 256, 128): 18,
    (4096, 512, 256): 9,
}
# Shape (M, C, h) -> forward+backward at least this many times faster than eager, float32 on a CPU.
ADAPTER_CPU = {(3152, 768, 64): 1.4, (2740, 1024, 256): 1.15}
# Shape (M, C, h) -> (share of the floor that forward and backward reach at least, forward+backward at least this many
# times faster than eager and than torch.compile). bfloat16, no drop-path, CUDA-graph replay, H200.
ADAPTER_H200 = {
    (6304, 768, 64): (0.7, 0.5, 2.5, 1.5),
    (6304, 768, 192): (0.7, 0.5, 2.5, 1.5),
    (21920, 1024, 256): (0.6, 0.6, 2.0, 1.3),
    (262144, 64, 32): (0.6, None, None, None),
    (65536, 128, 64): (0.6, None, None, None),
    (16384, 256, 128): (0.6, None, None, None),
}
# T -> forward+backward at least this many times faster than projections and torch's attention, float32 on a CPU.
ATTENTION_CPU = {2: 7.0, 12: 2.5, 77: 0.97}
# (B, T, whether norms are matched) -> forward, then forward+backward at least this many times faster than that.
# bfloat16, CUDA-graph replay, H200.
ATTENTION_H200: dict[tuple[int, int, bool], tuple[float | None, float | None]] = {
    (16, 2, False): (4.0, 4.0),
    (16, 16, False): (2.5, 2.5),
    (16, 77, False): (None, 1.15),
    (16, 77, True): (None, 1.3),
    (2, 2, False): (2.5, 2.5),
    (2, 1232, True): (None, 1.3),
}
# Operator -> peak memory at most this share of the eager formula's; 1 for all others, and for models.
MEMORY = {"cross_attention_residual": 0.75}
# The same for a context of this many tokens, against projections and torch's attention, on a GPU.
LONG_CONTEXT_MEMORY = (1232, 0.7)


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
    lora, adapter, attention = (
        _of(timed, operator) for operator in ("lora_linear", "adapter_residual", "cross_attention_residual")
    )
    return [
        *_lora_cpu(lora),
        *_peft_models(timed),
        *_lora_h200(lora),
        *_adapter_cpu(adapter),
        *_adapter_h200(adapter),
        *_attention_speed(attention),
        *_memory(timed),
        *_long_context_memory(attention),
    ]


def _of(rows: list[Row], operator: str) -> list[Row]:
    return [row for row in rows if row.kind == "operator" and row.name.partition(" ")[0] == operator]


def _shape(row: Row, *keys: str) -> tuple[Any, ...]:
    return tuple(row.facts.get(key) for key in keys)


def _on_h200(row: Row) -> bool:
    return row.mode == "graph replay" and "H200" in str(row.provenance.get("device"))


def _faster(row: Row, baseline: str, wanted: float, name: str | None = None) -> Verdict:
    ratio = row.ratios[baseline]
    name = f"{row.name}, {row.measured} against {baseline}" if name is None else name
    return Verdict(name, f">= {wanted:g}x", f"{ratio:.3f}x", ratio >= wanted)


def _lora_cpu(rows: list[Row]) -> Iterable[Verdict]:
    found = [
        row.ratios["eager"]
        for row in rows
        if row.mode == "wall clock" and row.measured == "forward+backward" and "eager" in row.ratios
    ]
    if found:
        mean = statistics.geometric_mean(found)
        name = f"lora_linear forward+backward against eager, {len(found)} CLIP shapes"
        yield Verdict(f"{name}, geometric mean", ">= 1.05x", f"{mean:.3f}x", mean >= 1.05)
        yield Verdict(f"{name}, smallest", ">= 0.95x", f"{min(found):.3f}x", min(found) >= 0.95)


def _peft_models(rows: list[Row]) -> Iterable[Verdict]:
    for row in rows:
        if row.kind != "model" or row.mode != "wall clock":
            continue
        for name in row.ratios:
            if not name.startswith("PEFT"):
                continue
            yield _faster(row, name, 1.02, f"{row.name}, step against {name}")
            if {name, row.subject} <= row.peak_bytes.keys():
                ours, theirs = row.peak_bytes[row.subject], row.peak_bytes[name]
                wanted, measured = f"<= {theirs / 2**20:.0f} MiB", f"{ours / 2**20:.0f} MiB"
                yield Verdict(f"{row.name}, peak memory against {name}", wanted, measured, ours <= theirs)


def _lora_h200(rows: list[Row]) -> Iterable[Verdict]:
    for row in rows:
        shape = _shape(row, "rows", "in_features", "out_features")
        if not _on_h200(row) or row.facts.get("dropout_p") or shape not in LORA_H200:
            continue
        base, eager, ceiling = LORA_H200[shape]
        if row.measured == "forward" and base is not None and BASE in row.ratios:
            factor = 1 / row.ratios[BASE]
            yield Verdict(f"{row.name}, forward", f"<= {base}x the bare GEMM", f"{factor:.3f}x", factor <= base)
        elif row.measured == "forward+backward" and "eager" in row.ratios:
            ratio = row.ratios["eager"]
            note = f" (above the ceiling of {ceiling}x: a measuring error)" if ratio > ceiling * 1.02 else ""
            wanted = f">= {eager}x eager"
            yield Verdict(f"{row.name}, forward+backward", wanted, f"{ratio:.3f}x{note}", ratio >= eager and not note)


def _adapter_cpu(rows: list[Row]) -> Iterable[Verdict]:
    for row in rows:
        wanted = ADAPTER_CPU.get(_shape(row, "rows", "channels", "hidden"))
        if wanted and row.mode == "wall clock" and row.measured == "forward+backward" and "eager" in row.ratios:
            yield _faster(row, "eager", wanted)


def _adapter_h200(rows: list[Row]) -> Iterable[Verdict]:
    forwards = {row.name: row for row in rows if _on_h200(row) and row.measured == "forward"}
    for row in rows:
        shape = _shape(row, "rows", "channels", "hidden")
        if not _on_h200(row) or row.facts.get("drop_path") or shape not in ADAPTER_H200:
            continue
        forward, backward, *ratios = ADAPTER_H200[shape]
        seconds, floor = row.seconds[row.subject], row.facts["floor_seconds"]
        if row.measured == "forward":
            yield _near_floor(f"{row.name}, forward", forward, seconds, floor)
            continue
        if backward is not None and row.name in forwards:
            # What forward leaves in the cache helps backward here: the floor assumes none of it.
            first = forwards[row.name]
            seconds, floor = seconds - first.seconds[row.subject], floor - first.facts["floor_seconds"]
            yield _near_floor(f"{row.name}, backward (the difference of the two rows)", backward, seconds, floor)
        for baseline, wanted in zip(("eager", "torch.compile"), ratios, strict=True):
            if wanted is not None and baseline in row.ratios:
                yield _faster(row, baseline, wanted)


def _near_floor(name: str, wanted: float, seconds: float, floor: float) -> Verdict:
    share = floor / seconds
    return Verdict(name, f">= {wanted:.0%} of the floor's speed", f"{share:.0%}", share >= wanted)


def _attention_speed(rows: list[Row]) -> Iterable[Verdict]:
    for row in rows:
        tokens, matched = _shape(row, "tokens", "norm_match")
        forward = both = None
        if _on_h200(row):
            forward, both = ATTENTION_H200.get((row.facts["batch"], tokens, matched), (None, None))
        elif row.mode == "wall clock" and not matched:
            both = ATTENTION_CPU.get(tokens)
        wanted = forward if row.measured == "forward" else both
        if wanted is not None and SDPA in row.ratios:
            yield _faster(row, SDPA, wanted)


def _memory(rows: list[Row]) -> Iterable[Verdict]:
    """The largest share of the eager formula's among the shapes of an operator, and every model's."""
    shares: dict[str, list[float]] = {}
    for row in rows:
        if {"eager", row.subject} <= row.peak_bytes.keys():
            name = row.name.partition(" ")[0] if row.kind == "operator" else row.name
            shares.setdefault(name, []).append(row.peak_bytes[row.subject] / row.peak_bytes["eager"])
    for name, found in shares.items():
        label = f"{name}, peak memory against eager" + (f", largest of {len(found)}" if len(found) > 1 else "")
        yield _less_memory(label, MEMORY.get(name, 1.0), max(found))


def _long_context_memory(rows: list[Row]) -> Iterable[Verdict]:
    tokens, wanted = LONG_CONTEXT_MEMORY
    for row in rows:
        # Graphs replay the memory of the eager launches: one row is enough.
        if row.facts.get("tokens") == tokens and row.mode == "eager launches" and SDPA in row.peak_bytes:
            share = row.peak_bytes[row.subject] / row.peak_bytes[SDPA]
            yield _less_memory(f"{row.name}, peak memory against {SDPA}", wanted, share)


def _less_memory(name: str, wanted: float, share: float) -> Verdict:
    return Verdict(name, f"<= {wanted:g}x", f"{share:.3f}x", share <= wanted)
