"""What the benchmarks know of an operator: its shapes, their inputs, and the least work and time that they need."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import pyfused
from pyfused.bench.cases.baselines import Contender, Contenders
from pyfused.choice import backends
from pyfused.ops import decision
from pyfused.ops.decision import Decision

# Measured on an NVIDIA H200: bf16 matrix product in FLOP/s, device copy in bytes/s (read plus written).
H200_FLOPS = 790e12
H200_BANDWIDTH = 4.3e12

_Case = TypeVar("_Case", bound="Case")
Result = TypeVar("Result")


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
        adapter_dtype: of the trained parameters; None means ``dtype``. The modules' default over 16 bits is float32.
        dropout_p: of the operator's own dropout.
    """

    operator: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]
    trained: ClassVar[tuple[str, ...]]
    dtype: torch.dtype
    adapter_dtype: torch.dtype | None
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
        """Every tensor by name, and dy, from `normal`; no gradient is zero."""

    @abc.abstractmethod
    def call(self, function: Callable[..., Result], tensors: Mapping[str, Tensor], **options) -> Result:
        """y of ``function``, the operator or one with its signature."""

    @abc.abstractmethod
    def passes(self) -> tuple[Work, Work]:
        """The least work of forward and of backward."""

    @abc.abstractmethod
    def plain(self) -> dict[str, Callable[..., Tensor]]:
        """The formula as people write it in plain torch, with the operator's arguments; the last is compiled too."""

    @abc.abstractmethod
    def plans(self, backend: str) -> tuple[str, ...]:
        """The plans that ``backend`` has; `refusal` says which of them take this case."""

    @property
    def parameter_dtype(self) -> torch.dtype:
        """Of the trained parameters."""
        return self.adapter_dtype or self.dtype

    def numbers(self) -> int:
        """How many random numbers `tensors` draws: one for each element."""
        return sum(tensor.numel() for tensor in self.tensors(torch.device("meta")).values())

    def work(self) -> dict[str, Work]:
        """The least work of "forward" and of "forward+backward"."""
        forward, backward = self.passes()
        return {"forward": forward, "forward+backward": forward + backward}

    def floor_seconds(self) -> dict[str, float]:
        """The least time of "forward" and of "forward+backward" on an H200: each direction by its own limit."""
        forward, backward = (work.least_seconds() for work in self.passes())
        return {"forward": forward, "forward+backward": forward + backward}

    def contenders(self, tensors: Mapping[str, Tensor], by_name: Iterable[str] = ()) -> Contenders:
        """Who is timed at this case; ``by_name``: what is timed beside "auto", as `ours` takes it."""
        parameters = {name: tensors[name].detach().requires_grad_() for name in self.trained}
        values, plain = {**tensors, **parameters}, self.plain()

        def contender(function: Callable[..., Tensor]) -> Contender:
            return Contender(
                lambda *inputs: self.call(function, values | dict(zip(self.inputs, inputs, strict=True))),
                tuple(parameters.values()),
            )

        found = Contenders({name: contender(function) for name, function in (self.ours(by_name) | plain).items()})
        found.add_compiled(found.named[list(plain)[-1]], tensors["dy"].device)
        return found

    def ours(self, by_name: Iterable[str] = ()) -> dict[str, Callable[..., Tensor]]:
        """The operator as "pyfused", and as "pyfused <name>" bound to each: a backend, or a backend and its plan."""
        operator = getattr(pyfused, self.operator)
        bound = {f"pyfused {name}": functools.partial(operator, **arguments_of(name)) for name in by_name}
        return {"pyfused": operator, **bound}


def arguments_of(name: str) -> dict[str, Any]:
    """The operator's arguments that "triton" or "triton blas" stands for."""
    backend, _, plan = name.partition(" ")
    return {"backend": backend, "plan": plan} if plan else {"backend": backend}


def refusals(case: Case, device: torch.device) -> dict[str, str | None]:
    """Each backend, and each plan of one that has several, by its name -> why it cannot compute ``case`` on ``device``;
    None when it can. A backend that serves no such tensors has no plans."""
    found: dict[str, str | None] = {}
    for backend in backends.BACKENDS:
        absent = backends.refusal(backend, device, case.dtype, case.operator)
        plans = case.plans(backend) if absent is None else ()
        found[backend] = absent or refusal(case, device, backend)
        if len(plans) > 1:
            found |= {f"{backend} {plan}": refusal(case, device, backend, plan) for plan in plans}
    return found


def refusal(case: Case, device: torch.device, backend: str, plan: str = "auto") -> str | None:
    """Why ``backend`` cannot compute ``case`` on ``device`` in this plan, in its own words; None when it can."""
    if backend == "portable":
        return None
    reason = backends.refusal(backend, device, case.dtype, case.operator)
    if reason is not None:
        return reason
    shapes = case.tensors(torch.device("meta"))
    # Limits of size are the operator's own to know: on fake tensors it checks, chooses, and computes nothing.
    with FakeTensorMode():
        try:
            tensors = {name: torch.empty(x.shape, dtype=x.dtype, device=device) for name, x in shapes.items()}
            case.call(getattr(pyfused, case.operator), tensors, backend=backend, plan=plan)
        except (RuntimeError, ValueError) as error:
            # Any other error is a fault of the case or of the operator, and no refusal.
            if not str(error).startswith(f"backend {backend!r} cannot serve"):
                raise
            return str(error)
    return None


def triton_calls(case: Case) -> Iterator[tuple[str, Callable[[], object]]]:
    """(plan, forward and backward of the public operator on meta tensors) for "auto", and for each plan of which
    Triton's kernels take these sizes.

    The calls are backend "portable"'s, which needs no GPU: whose raw operators answer is the caller's to decide.
    `lora_linear`, which has one plan there, leaves Triton's to the caller as well.
    """
    tensors = case.tensors(torch.device("meta"))
    leaves = [tensors[name].requires_grad_() for name in (*case.inputs, *case.trained)]
    operator = functools.partial(getattr(pyfused, case.operator), backend="portable")

    def both(plan: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(case.call(operator, tensors, plan=plan), leaves, tensors["dy"])

    for plan in dict.fromkeys(("auto", *case.plans("triton"))):
        own = plan if plan in case.plans("portable") else "auto"
        if "triton" not in decided(case, operator, tensors, plan=own).limits:
            yield plan, functools.partial(both, own)


def decided(case: Case, function: Callable[..., Tensor], tensors: Mapping[str, Tensor], **options) -> Decision:
    """What the operator decides about one call without gradients."""
    told: list[Any] = []
    with torch.no_grad(), decision.observed(told.append):
        case.call(function, tensors, **options)
    (made,) = told
    return made


def normal(device: torch.device, seed: int) -> Callable[..., Tensor]:
    """``draw(shape, scale, dtype)``: numbers from N(0, scale^2), for one device and seed the same in every run.

    The device draws them itself, in place; on device "meta" there are none. The sequences of a CPU and of a GPU differ.
    """
    # Meta tensors have no generator.
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def draw(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> Tensor:
        if device.type == "cpu":
            # In float32 whatever the dtype: the numbers that every record of a CPU was made with.
            return (torch.randn(shape, generator=generator) * scale).to(dtype)
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=scale, generator=generator)

    return draw


def with_both_adapters(cases: Iterable[_Case]) -> Iterator[_Case]:
    """Each 16-bit case with adapters of its own dtype, then with the float32 ones that are the modules' default."""
    for case in cases:
        yield case
        # Every case is a dataclass, but not the class of them all.
        yield replace(case, adapter_dtype=torch.float32)  # type: ignore[type-var]


def row_id(case: Case) -> str:
    """The name of the case's test, as pytest's ``-k`` finds it."""
    return case.name.replace("->", "to").replace(" ", "-")


def row_facts(case: Case, device: torch.device, measured: str) -> dict[str, object]:
    """The case's, with the least work, and the floor, which is modelled for one GPU only."""
    work = case.work()[measured]
    known = device.type == "cuda" and "H200" in torch.cuda.get_device_name(device)
    floor = case.floor_seconds()[measured] if known else None
    return {**case.facts(), "flops": work.flops, "bytes": work.nbytes, "floor_seconds": floor}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
