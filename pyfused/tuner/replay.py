"""A call of an operator made again: on tensors of the same shapes, strides and dtypes, by any backend and plan."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyfused.ops import decision
from pyfused.ops.decision import Arguments, Decision, Like
from pyfused.tuner.clocks import Call

# How far a result may be from that of pyfused's own choice, in parts of its norm: two roundings of a 16-bit result, and
# what sums in another order differ by in float32, with products in TF32.
_FURTHEST = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4, torch.float64: 1e-9}
_FURTHEST_TF32 = 5e-3
# How far from the exact result it may be where that is no more than rounding, in parts of the distance of pyfused's own
# choice.
_WORSE = 8.0


@dataclass(frozen=True)
class Recorded:
    """A public call as a model makes it, which others may equal.

    Attributes:
        operator: its name.
        arguments: what it was given, without values.
        autocast: the dtype of autocast; None where that was off.
        gradient: whether it was prepared for backward.
    """

    operator: str
    arguments: Arguments
    autocast: torch.dtype | None
    gradient: bool


class Replay:
    """One recorded call on tensors of its own, whose values are random but the same in every run."""

    def __init__(self, recorded: Recorded, device: torch.device) -> None:
        self.recorded, self.device = recorded, device
        self._function = getattr(importlib.import_module(f"pyfused.ops.{recorded.operator}"), recorded.operator)
        generator = torch.Generator(device).manual_seed(0)
        self.arguments: dict[str, object] = {}
        for name, value in recorded.arguments:
            if not isinstance(value, Like):
                self.arguments[name] = value
            elif value.same_as:
                self.arguments[name] = self.arguments[value.same_as]
            else:
                self.arguments[name] = _tensor(name, value, device, generator)
        self._leaves = {
            name: value
            for name, value in self.arguments.items()
            if recorded.gradient and isinstance(value, Tensor) and value.requires_grad
        }
        self._dy: Tensor | None = None

    def decided(self, **changed: object) -> Decision:
        """What the operator decides about the call, with some arguments ``changed``."""
        told: list[Decision] = []
        with decision.observed(lambda each: told.append(each) if isinstance(each, Decision) else None):
            try:
                self._run(changed)
            except Exception:
                # What fails later was decided all the same.
                if not told:
                    raise
        return told[0]

    def forward(self, backend: str, plan: str) -> Call:
        """Forward by this backend and plan; "" for an operator whose plans are not asked for."""
        return lambda: self._run(self._asked(backend, plan))

    def backward(self, backend: str, plan: str) -> Call:
        """Backward, of a forward that is made now."""
        with self._state():
            y = self._function(**self.arguments | self._asked(backend, plan))
            dy = self._upstream(y)
        leaves = list({id(leaf): leaf for leaf in self._leaves.values()}.values())
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True, allow_unused=True)

    def results(self, **changed: object) -> dict[str, Tensor]:
        """The output and all gradients, by name, without dropout: masks are a plan's own."""
        with self._state():
            return self._results(self.arguments | changed, lambda tensor: tensor)

    def exact(self) -> dict[str, Tensor]:
        """`results` in float64."""
        wide: dict[int, Tensor] = {}

        def widened(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            made = tensor.detach().to(torch.float64).requires_grad_(tensor.requires_grad)
            return wide.setdefault(id(tensor), made)

        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(self.recorded.gradient),
            torch.autocast(self.device.type, enabled=False),
        ):
            return self._results(self.arguments | {"backend": "portable"}, widened)

    def _results(self, arguments: dict[str, object], converted: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        if "dropout_p" in arguments:
            arguments["dropout_p"] = 0.0
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                arguments[name] = converted(value)
        y = self._function(**arguments)
        found = {"the output": y.detach()}
        leaves = {name: converted(leaf) for name, leaf in self._leaves.items()}
        if leaves:
            gradients = torch.autograd.grad(y, list(leaves.values()), self._upstream(y).to(y.dtype), allow_unused=True)
            named = zip(leaves, gradients, strict=True)
            found |= {f"the gradient of {name}": each for name, each in named if each is not None}
        return found

    def _asked(self, backend: str, plan: str) -> dict[str, object]:
        return {"backend": backend, **({"plan": plan} if plan else {})}

    def _run(self, changed: dict[str, object]) -> Tensor:
        with self._state():
            return self._function(**self.arguments | changed)

    def _upstream(self, y: Tensor) -> Tensor:
        if self._dy is None:
            generator = torch.Generator(self.device).manual_seed(1)
            self._dy = torch.empty_like(y.detach()).normal_(generator=generator)
        return self._dy

    @contextlib.contextmanager
    def _state(self) -> Iterator[None]:
        """Grad mode and autocast as the call had them."""
        cast = self.recorded.autocast
        kind = self.device.type
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(self.recorded.gradient),
            torch.autocast(kind, cast or torch.get_autocast_dtype(kind), enabled=cast is not None),
        ):
            yield


def further(given: dict[str, Tensor], wanted: dict[str, Tensor], exact: Callable[[], dict[str, Tensor]]) -> str | None:
    """Which of the results is further from the ``wanted`` one than rounding explains, and by how much; None if none.

    ``exact`` gives what both should be: of a gradient that is zero but for rounding, which is no part of its norm, the
    distance to that counts.
    """
    if given.keys() != wanted.keys():
        return f"it has {', '.join(given)} in place of {', '.join(wanted)}"
    right: dict[str, Tensor] = {}
    for name, like in wanted.items():
        own = given[name]
        if (own.shape, own.dtype) != (like.shape, like.dtype):
            return f"{name} is {tuple(own.shape)} {own.dtype}, not {tuple(like.shape)} {like.dtype}"
        allowed = _FURTHEST[like.dtype]
        if like.dtype == torch.float32 and like.is_cuda and torch.backends.cuda.matmul.fp32_precision != "ieee":
            allowed = _FURTHEST_TF32
        distance, norm = _distance(own, like), _distance(like)
        # Not a "greater": NaN is further than anything.
        if distance <= allowed * norm:
            continue
        right = right or exact()
        if not _distance(own, right[name]) <= _WORSE * _distance(like, right[name]):
            share = distance / norm if norm else distance
            return f"{name} is {share:.1e} of its norm from that of pyfused's own choice"
    return None


def _distance(tensor: Tensor, other: Tensor | None = None) -> float:
    """The norm of the difference, in float64; of the tensor itself without another."""
    wide = tensor.to(torch.float64)
    return torch.linalg.vector_norm(wide if other is None else wide - other.to(torch.float64)).item()


def _tensor(name: str, like: Like, device: torch.device, generator: torch.Generator) -> Tensor:
    """Random numbers, of the size that keeps sums near 1."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.strides, strict=True))
    extent = 0 if 0 in like.shape else extent
    if not like.dtype.is_floating_point:
        # A mask that hides nothing, and the first adapter for every row.
        memory = torch.zeros(extent, dtype=like.dtype, device=device)
    elif name == "sample_scale":
        # A sample that is dropped would take no time.
        memory = torch.ones(extent, dtype=like.dtype, device=device)
    else:
        wide = like.dtype if like.dtype == torch.float64 else torch.float32
        memory = torch.randn(extent, dtype=wide, device=device, generator=generator)
        if name.endswith("_weight") or name in ("weight", "lora_a", "lora_b"):
            memory.mul_(max(1, like.shape[-1] if like.shape else 1) ** -0.5)
        memory = memory.to(like.dtype)
    return memory.as_strided(like.shape, like.strides).requires_grad_(like.requires_grad)
