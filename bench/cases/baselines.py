"""What operators are measured against: the parts that every comparison has."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

BASE = "base GEMM"
# A call of the operator for each of several adapters.
LOOP = "loop of calls"


@dataclass(frozen=True)
class Contender:
    """One way to compute an operator.

    Attributes:
        forward: the case's inputs -> y.
        trained: the parameters that want a gradient; may be empty.
    """

    forward: Callable[..., Tensor]
    trained: tuple[Tensor, ...]

    def call(self, inputs: Sequence[Tensor], dy: Tensor, backward: bool) -> Callable[[], object]:
        """Forward as in training (what backward needs is kept), or forward and backward to inputs and parameters."""
        inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
        if not backward:
            return lambda: self.forward(*inputs)
        leaves = (*inputs, *self.trained)
        return lambda: torch.autograd.grad(self.forward(*inputs), leaves, dy)


@dataclass
class Contenders:
    """The ways to compute one case, "pyfused" first, and the reason for each one that cannot run here."""

    named: dict[str, Contender]
    unavailable: dict[str, str] = field(default_factory=dict)

    def add_compiled(self, eager: Contender, device: torch.device) -> None:
        """``eager`` under torch.compile."""
        reason = compile_refusal(device)
        if reason is None:
            torch.compiler.reset()
            forward = torch.compile(eager.forward, dynamic=False, fullgraph=True)
            self.named["torch.compile"] = Contender(forward, eager.trained)
        else:
            self.unavailable["torch.compile"] = reason


def narrowed(parameters: Iterable[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Parameters cast, in each call, to the one dtype that a product has in plain torch."""
    return tuple(parameter.to(dtype) for parameter in parameters)


def compile_refusal(device: torch.device) -> str | None:
    """Why torch.compile cannot run on ``device``; None when it can."""
    if device.type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler, {compiler} is not on PATH"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "torch.compile needs triton on a GPU"
    return None
