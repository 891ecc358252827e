"""What an operator decided about one call, for whoever watches: `explain`, the benchmark, the tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Decision:
    """One call of an operator, as the operator decided it.

    Attributes:
        operator: the operator's name.
        kernels: the operator whose kernels serve the call; another one for attention in plan "standard".
        shapes: letters and sizes that describe the call, such as ``(("M", 400), ("K", 768), ("N", 3072), ("R", 16))``.
        sizes: letters and sizes by which the order of the backends is chosen, see `preference`.
        dtype: dtype the call computes in.
        device: device of its input.
        backend: the backend that serves it.
        plan: the plan of forward, "auto" resolved.
        backward_plan: the plan of backward.
        reasons: why these plans.
        saved_bytes: what a training step keeps for backward, in bytes, beyond the call's own inputs.
        limits: backend -> why its kernels do not take this call.
    """

    operator: str
    kernels: str
    shapes: tuple[tuple[str, int], ...]
    sizes: Mapping[str, float]
    dtype: torch.dtype
    device: torch.device
    backend: str
    plan: str
    backward_plan: str
    reasons: tuple[str, ...]
    saved_bytes: int
    limits: Mapping[str, str]


@dataclass(frozen=True)
class LeftToTorch:
    """A part of a module that no operator serves.

    Attributes:
        what: the part, in words.
        why: why no operator serves it.
    """

    what: str
    why: str


Observer = Callable[[Decision | LeftToTorch], None]
# Empty in normal running: operators make a record only for a reader.
observers: list[Observer] = []


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Inside, ``observer`` is told what every operator decides."""
    observers.append(observer)
    try:
        yield
    finally:
        observers.remove(observer)


def notify(told: Decision | LeftToTorch) -> None:
    """Tell the observers."""
    for observer in observers:
        observer(told)
