"""What "auto" takes at the sizes that the project's targets name, GPU by GPU: expected.txt holds it.

``python tests/choice/expected.py`` prints the table anew.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from pyfused.choice import backends, order
from pyfused.ops.contract.cuda_limits import cuda_shared_memory
from pyfused.ops.cross_attention_residual import padded_columns
from pyfused.ops.lora_linear import candidates

FILE = Path(__file__).with_name("expected.txt")
# Capability -> shared memory of a block, of an A100, an RTX 4090, an H200, a B200, an RTX 5090, and of a GPU that no
# table knows.
GPUS = {
    (8, 0): 166_912, (8, 9): 101_376, (9, 0): 232_448, (10, 0): 232_448, (12, 0): 101_376, (11, 0): 232_448,
}  # fmt: skip
LORA = ((8192, 4096, 4096), (8192, 4096, 14336), (6304, 768, 3072), (6304, 3072, 768), (2740, 1024, 1024))
ADAPTERS = (
    (6304, 768, 64), (6304, 768, 192), (21920, 1024, 256),
    (262144, 64, 32), (65536, 128, 64), (16384, 256, 128), (4096, 512, 256),
)  # fmt: skip
# B, L, C, H, T.
ATTENTION = ((16, 1370, 1024, 16, 2), (16, 1370, 1024, 16, 16), (2, 1370, 1024, 16, 2))
PROJECTIONS = ((21920, 1024, 1024, False), (21920, 1024, 1024, True), (2740, 768, 1024, True))

Row = tuple[str, str, dict[str, float], Mapping[str, tuple[str, ...]]]


def rows(shared_memory: int) -> Iterator[Row]:
    """(name, operator, sizes, backend -> plans) in bfloat16; where the CUDA C++ kernels take the call they are among
    the backends."""
    for (m, k, n), (weight, adapters), p in itertools.product(LORA, ((2, 2), (2, 4), (4, 4)), (0.0, 0.1)):
        sizes = {
            "M": m, "N": n, "K": k, "R": 16, "dropout_p": p, "weight_bytes": weight, "adapter_bytes": adapters,
            "tma": 1,
        }  # fmt: skip
        plans = dict(candidates("auto", 16))
        if weight == 4:
            del plans["cuda"]
        wide = ", weight float32" if weight == 4 else ", adapters float32" if adapters == 4 else ""
        yield f"lora_linear {m}x{k}->{n}{wide}{', dropout' * bool(p)}", "lora_linear", sizes, plans
    for (m, c, h), weight in itertools.product(ADAPTERS, (2, 4)):
        sizes = {"M": m, "C": c, "h": h, "dropout_p": 0.0, "weight_bytes": weight}
        wide = ", weights float32" * (weight == 4)
        yield _narrow(f"adapter_residual {m}x{c} h{h}{wide}", "adapter_residual", sizes, h, (64, 32), shared_memory)
    for b, length, c, heads, tokens in ATTENTION:
        sizes = {"M": b * length, "C": c, "J": heads * tokens, "dropout_p": 0.0, "norm_match": False}
        name = f"cross_attention_residual {b}x{length}x{c} H{heads} T{tokens}"
        columns = padded_columns(heads, tokens)
        tiles = (64, 32, 16) if columns <= 128 else (32, 16)
        yield _narrow(name, "cross_attention_residual", sizes, columns, tiles, shared_memory)
    for m, k, c, norms in PROJECTIONS:
        sizes = {"M": m, "K": k, "C": c, "norm_match": norms}
        plans = {"triton": ("",), "portable": ("",)}
        yield f"projection_residual {m}x{k}->{c}{', norms' * norms}", "projection_residual", sizes, plans


def _narrow(
    name: str, operator: str, sizes: dict[str, float], width: int, tiles: tuple[int, ...], shared_memory: int
) -> Row:
    floats = operator == "cross_attention_residual"
    needed = {rows: cuda_shared_memory(width, int(sizes["C"]), rows=rows, float_middle=floats) for rows in tiles}
    fitting = next((rows for rows in tiles if needed[rows] <= shared_memory), 0)
    plans = {name: each for name, each in backends.NO_PLANS.items() if name != "cpu"}
    if not fitting:
        del plans["cuda"]
    return name, operator, sizes | {"cuda_rows": fitting}, plans


@functools.cache
def table(without: str = "") -> dict[str, list[str]]:
    """Row -> what serves it on each GPU, as "backend forward/backward"; ``without`` leaves a backend out."""
    found: dict[str, list[str]] = {}
    for capability, shared_memory in GPUS.items():
        for name, operator, sizes, plans in rows(shared_memory):
            there = {backend: plans[backend] for backend in ("cuda", "triton", "portable") if backend in plans}
            there.pop(without, None)
            backend, *both = order.by_times(operator, capability, torch.bfloat16, sizes, there)
            found.setdefault(name, []).append(f"{backend} {'/'.join(dict.fromkeys(both))}".strip())
    return found


def text() -> str:
    heads = ["unknown" if gpu == (11, 0) else f"{gpu[0]}.{gpu[1]}" for gpu in GPUS]
    parts = []
    for title, without in (("every backend", ""), ("without Triton", "triton")):
        made = table(without)
        lines = [(title, heads), *made.items()]
        widths = [max(len(cells[i]) for _, cells in lines) for i in range(len(heads))]
        left = max(len(name) for name, _ in lines)
        parts += [
            "  ".join([name.ljust(left), *(cell.ljust(w) for cell, w in zip(cells, widths, strict=True))]).rstrip()
            for name, cells in lines
        ]
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    print(text(), end="")
