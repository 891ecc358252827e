"""What an operator decided about one call, for whoever watches: `explain`, the benchmark, the tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from pyfused.choice.backends import NO_PLANS
from pyfused.choice.order import Candidates, Choice

# Empty in normal running: operators make a record only for a reader.
from pyfused.ops.contract.known import observers


@dataclass(frozen=True)
class Decision:
    """One call of an operator, as the operator decided it.

    Attributes:
        operator, shapes, dtype, device, backend, plan, backward_plan, saved_bytes: as `explain` shows them, see
            `pyfused.explanation.OperatorCall`.
        kernels: the operator whose kernels serve the call: "projection_residual" for attention in plan "standard".
        sizes: letters and sizes by which the backend is chosen, see `pyfused.choice.order.choose`.
        reasons: why these plans.
        limits: backend -> why its kernels do not take this call.
        plans: backend -> the plans between which times decide, see `pyfused.choice.backends.choose`.
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
    plans: Candidates = field(default_factory=lambda: NO_PLANS)

    @property
    def choice(self) -> Choice:
        """As `pyfused.choice` has it, to which plans that differ in memory alone are one."""
        known = self.plans[self.backend]
        forward, backward = (plan if plan in known else "" for plan in (self.plan, self.backward_plan))
        return Choice(self.backend, forward, backward)


@dataclass(frozen=True)
class LeftToTorch:
    """A part of a module that no operator serves: what it is, in words, and why none serves it."""

    what: str
    why: str


@dataclass(frozen=True)
class OneCall:
    """Layers of one module that may share a call: their names there, and why they do not now; None where they do."""

    names: tuple[str, ...]
    why: str | None


Told = Decision | LeftToTorch | OneCall
Observer = Callable[[Told], None]


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Inside, ``observer`` is told what every operator decides."""
    observers.append(observer)
    try:
        yield
    finally:
        observers.remove(observer)


def notify(told: Told) -> None:
    """Tell the observers."""
    for observer in observers:
        observer(told)
