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
class Like:
    """A tensor of a call without its values: what another needs, to be one that the call takes as long for.

    Attributes:
        shape, strides, dtype, requires_grad: the tensor's.
        same_as: the argument before it that is the same tensor; "" where none is.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    same_as: str = ""


# The arguments of a public call by name: `Like`s and settings.
Arguments = tuple[tuple[str, object], ...]


def asked(**arguments: object) -> Arguments:
    """What a call was given, for `Decision.arguments`; nothing where nobody watches."""
    if not observers:
        return ()
    seen: dict[int, str] = {}
    found: list[tuple[str, object]] = []
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            same = seen.setdefault(id(value), name)
            value = Like(
                tuple(value.shape), value.stride(), value.dtype, value.requires_grad, "" if same == name else same
            )
        found.append((name, value))
    return tuple(found)


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
        arguments: of the public call; empty where it has no public call of its own.
        rivals: the plans between which the operator decided by their cost, before any backend; none where one was asked
            for by name, and in operators whose plans belong to a backend.
        call_sizes: where there are rivals, by what a measured row for the call is found; else `sizes` are.
        measured_backend: the backend of such a row; "" without one.
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
    arguments: Arguments = ()
    rivals: tuple[str, ...] = ()
    call_sizes: Mapping[str, float] | None = None
    measured_backend: str = ""

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
