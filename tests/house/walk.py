"""Counts the way of a tensor through the package: Python calls, moves between rooms, and rooms, forward and backward.

    python tests/house/walk.py lora_linear triton

A room is a file of the package. A call of a Python function is a move if the call before it was in another room; the
first call enters a room, which is a move too. Kernels are interpreted, and nothing below a launch is counted, only the
part of the host. The first calls of a process fill caches, so a later one is counted.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent.parent
BACKENDS = ("triton", "portable")


@dataclass(frozen=True)
class Walk:
    """The calls of one direction in their order, each with its room."""

    calls: tuple[tuple[str, str], ...]

    @property
    def stays(self) -> list[tuple[str, list[str]]]:
        """Each stay in a room: the room, and the functions called there."""
        return [
            (room, [function for _, function in calls]) for room, calls in itertools.groupby(self.calls, lambda c: c[0])
        ]

    @property
    def moves(self) -> int:
        return len(self.stays)

    @property
    def rooms(self) -> list[str]:
        return list(dict.fromkeys(room for room, _ in self.calls))


def watched(call: Callable[[], object], room_of: Callable[[str], str | None], beyond: str | None = None) -> Walk:
    """The walk of ``call``: ``room_of`` gives the room of a file, and nothing below a file under ``beyond`` counts."""
    calls: list[tuple[str, str]] = []
    launch: FrameType | None = None

    def hook(frame: FrameType, event: str, _: object) -> None:
        nonlocal launch
        if launch is not None:
            if event == "return" and frame is launch:
                launch = None
        elif event == "call":
            file = frame.f_code.co_filename
            if beyond is not None and file.startswith(beyond):
                launch = frame
            elif (room := room_of(file)) is not None:
                calls.append((room, frame.f_code.co_name))

    sys.setprofile(hook)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Walk(tuple(calls))


@functools.cache
def room_of(file: str) -> str | None:
    """The file's path in the package, as a user imports it; None for a file of another package."""
    path = Path(file).resolve()
    for folder, name in (("pyfused", ""), ("kernels", "kernels/"), ("bench", "bench/")):
        if path.is_relative_to(ROOT / folder):
            return name + path.relative_to(ROOT / folder).as_posix()
    return None


def _steps() -> dict[str, Callable[[], Callable[[], object]]]:
    """Operator -> what makes one forward of its module; the result of a call of it goes backward."""
    import torch

    import pyfused

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, requires_grad=True)

    def cross_attention() -> Callable[[], object]:
        module, x, context = pyfused.ScaledCrossAttention(32, 24, num_heads=2), leaf(2, 5, 32), leaf(2, 3, 24)
        return lambda: module(x, context)

    def projection() -> Callable[[], object]:
        o, weight, residual = leaf(2, 5, 16), leaf(32, 16), leaf(2, 5, 32)
        return lambda: pyfused.projection_residual(o, weight, residual=residual)

    def of(module: torch.nn.Module) -> Callable[[], object]:
        x = leaf(2, 5, 32)
        return lambda: module(x)

    return {
        "lora_linear": lambda: of(pyfused.LoRALinear(32, 48, rank=4)),
        "adapter_residual": lambda: of(pyfused.BottleneckAdapter(32)),
        "cross_attention_residual": cross_attention,
        "projection_residual": projection,
    }


def _here(operator: str) -> dict[str, Walk]:
    """The walks on the backend that this process takes by default."""
    forward = _steps()[operator]()
    for _ in range(2):
        forward().sum().backward()
    spec = importlib.util.find_spec("triton")
    beyond = None if spec is None or spec.origin is None else str(Path(spec.origin).parent)
    results: list = []
    walks = {"forward": watched(lambda: results.append(forward()), room_of, beyond)}
    loss = results[0].sum()
    walks["backward"] = watched(lambda: loss.backward(), room_of, beyond)
    return walks


def walks(operator: str, backend: str) -> dict[str, Walk]:
    """Direction -> the walk of an operator's module, in a fresh process.

    Backend "portable" is what "auto" takes on a CPU; "triton" is asked for by PYFUSED_BACKEND.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYFUSED_BACKEND"}
    if backend == "triton":
        environment |= {"PYFUSED_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__, operator, backend, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return {way: Walk(tuple(map(tuple, calls))) for way, calls in json.loads(done.stdout).items()}


def table(found: dict[str, Walk]) -> str:
    """Markdown: a line for each key of ``found``."""
    lines = ["| | Python calls | moves | rooms |", "|---|--:|--:|--:|"]
    lines += [f"| {name} | {len(walk.calls)} | {walk.moves} | {len(walk.rooms)} |" for name, walk in found.items()]
    return "\n".join(lines)


def _names(functions: list[str]) -> str:
    """``a, b x3, a``: what is called several times in a row stands once."""
    groups = [(name, len(list(group))) for name, group in itertools.groupby(functions)]
    return ", ".join(name if number == 1 else f"{name} x{number}" for name, number in groups)


def main() -> None:
    operators = ("lora_linear", "adapter_residual", "cross_attention_residual", "projection_residual")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operator", nargs="?", choices=operators, default="lora_linear", help="default: lora_linear")
    parser.add_argument("backend", nargs="?", choices=BACKENDS, help="default: each of them")
    parser.add_argument("--json", action="store_true", help="the calls of this process as JSON, on its own backend")
    given = parser.parse_args()
    if given.json:
        sys.path.insert(0, str(ROOT))
        print(json.dumps({way: walk.calls for way, walk in _here(given.operator).items()}))
        return
    found = {
        f"{way}, {backend}": walk
        for backend in ([given.backend] if given.backend else BACKENDS)
        for way, walk in walks(given.operator, backend).items()
    }
    print(table(found))
    for name, walk in found.items():
        print(f"\n{given.operator}, {name}")
        for number, (room, functions) in enumerate(walk.stays, 1):
            print(f"{number:4} {room}: {_names(functions)}")


if __name__ == "__main__":
    main()
