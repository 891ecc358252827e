"""What the benchmarks know of an operator: its shapes, their inputs, and the least work and time that they need."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import pyfused
from pyfused import backend as backends
from pyfused.bench.baselines import Contenders

# Measured on an NVIDIA H200: bf16 matrix product in FLOP/s, device copy in bytes/s (read plus written).
H200_FLOPS = 790e12
H200_BANDWIDTH = 4.3e12


@dataclass(frozen=True)
class Work:
    """The least that has to be computed and moved.

    Attributes:
        flops: floating-point operations of the matrix products, an addition and a multiplication counting two.
        nbytes: bytes that memory must give or take once, however large the caches.
    """

    flops: int
    nbytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.nbytes + other.nbytes)

    def least_seconds(self) -> float:
        """On an H200, with cold memory and without the launch."""
        return max(self.flops / H200_FLOPS, self.nbytes / H200_BANDWIDTH)


class Case(abc.ABC):
    """One shape of one operator; a frozen dataclass for each operator.

    Attributes:
        operator: its name in `pyfused` and in `pyfused.reference`.
        inputs: the tensors that change from call to call and get a gradient.
        trained: the parameters that get one.
        dtype: that the products are made in.
        dropout_p: of the operator's own dropout.
    """

    operator: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]
    trained: ClassVar[tuple[str, ...]]
    dtype: torch.dtype
    dropout_p: float

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The operator's name, then the shape."""

    @abc.abstractmethod
    def facts(self) -> dict[str, object]:
        """Shape and settings, for the record."""

    @abc.abstractmethod
    def tensors(self, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """Every tensor by name, and dy: the same numbers on every device; no gradient is zero."""

    @abc.abstractmethod
    def call(self, function: Callable[..., Tensor], tensors: Mapping[str, Tensor], **options) -> Tensor:
        """y of ``function``, the operator or one with its signature."""

    @abc.abstractmethod
    def passes(self) -> tuple[Work, Work]:
        """The least work of forward and of backward."""

    @abc.abstractmethod
    def contenders(self, tensors: Mapping[str, Tensor], by_name: Iterable[str] = ()) -> Contenders:
        """Who is timed at this case; ``by_name``: the backends that are timed beside "auto"."""

    @abc.abstractmethod
    def plans(self, backend: str) -> tuple[str, ...]:
        """The plans that ``backend`` has; `refusal` says which of them take this case."""

    def work(self) -> dict[str, Work]:
        """The least work of "forward" and of "forward+backward"."""
        forward, backward = self.passes()
        return {"forward": forward, "forward+backward": forward + backward}

    def floor_seconds(self) -> dict[str, float]:
        """The least time of "forward" and of "forward+backward" on an H200: each direction by its own limit."""
        forward, backward = (work.least_seconds() for work in self.passes())
        return {"forward": forward, "forward+backward": forward + backward}

    def ours(self, by_name: Iterable[str] = ()) -> dict[str, Callable[..., Tensor]]:
        """The operator as "pyfused", and as "pyfused <backend>" bound to each of these backends."""
        operator = getattr(pyfused, self.operator)
        bound = {f"pyfused {name}": functools.partial(operator, backend=name) for name in by_name}
        return {"pyfused": operator, **bound}

    def gated_too(self) -> Mapping[str, Case]:
        """Further cases whose parity the row depends on, by what their tensors are called in it."""
        return {}


def refusal(case: Case, device: torch.device, backend: str, plan: str = "auto") -> str | None:
    """Why ``backend`` cannot compute ``case`` on ``device`` in this plan, in its own words; None when it can."""
    if backend == "portable":
        return None
    reason = backends.refusal(backend, device, case.dtype, case.operator)
    if reason is not None:
        return reason
    # Limits of size are the operator's own to know: on fake tensors it checks, chooses, and computes nothing.
    with FakeTensorMode():
        try:
            case.call(getattr(pyfused, case.operator), case.tensors(device), backend=backend, plan=plan)
        except (RuntimeError, ValueError) as error:
            # Any other error is a fault of the case or of the operator, and no refusal.
            if not str(error).startswith(f"backend {backend!r} cannot serve"):
                raise
            return str(error)
    return None


def normal(device: torch.device, seed: int) -> Callable[..., Tensor]:
    """``draw(shape, scale, dtype)``: numbers from N(0, scale^2), the same on every device."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    return draw


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
