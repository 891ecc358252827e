"""What `pyfused tune` tries: configurations near the one that ships, which the GPU's peaks and the audit leave over."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyfused
from pyfused.bench.cases.case import Case, decided
from pyfused.kernels import audit, bottleneck_config, lora_linear_config, recording
from pyfused.kernels.recording import Chosen, LaunchWork, Target, neighbours
from pyfused.ops.lora_linear import triton_plan

# Function of a configuration -> what a launch in it does at least.
_WORK: dict[Callable[..., Any], Callable[..., LaunchWork]] = {
    lora_linear_config.gemm_config: lora_linear_config.gemm_work,
    lora_linear_config.tma_config: lora_linear_config.gemm_work,
    lora_linear_config.shrink_config: lora_linear_config.shrink_work,
    lora_linear_config.wgrad_config: lora_linear_config.wgrad_work,
    bottleneck_config.rows_config: bottleneck_config.rows_work,
    bottleneck_config.weights_config: bottleneck_config.weights_work,
}
# What the L2 cache gives a multiprocessor of any GPU from compute capability 8.0 on in one cycle, at most, in bytes.
L2_BYTES_PER_CYCLE = 64


@dataclass(frozen=True)
class Peaks:
    """What a GPU can do at most: FLOP/s of its matrix products and cycles a second."""

    flops: float
    clock: float

    def least_seconds(self, work: LaunchWork, target: Target) -> float:
        """The least time of the busiest multiprocessor."""
        programs = -(-work.programs // target.multiprocessors)
        flops = work.flops * target.multiprocessors / self.flops
        return programs * max(flops, work.nbytes / (L2_BYTES_PER_CYCLE * self.clock))


@dataclass(frozen=True)
class Direction:
    """A raw operator's Triton launcher with the arguments that a call of the public operator hands it, on meta."""

    name: str
    arguments: tuple[object, ...]

    def __call__(self, arguments: Iterable[object] | None = None) -> object:
        home = importlib.import_module(f"pyfused.kernels.{self.name.rpartition('_')[0]}")
        return getattr(home, self.name)(*(self.arguments if arguments is None else arguments))

    def on(self, device: torch.device) -> tuple[object, ...]:
        """The arguments with tensors of the same shape, type and strides on a device, full of random numbers."""
        return tuple(_like(value, device) if isinstance(value, Tensor) else value for value in self.arguments)


def _like(tensor: Tensor, device: torch.device) -> Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return made.normal_() if made.is_floating_point() else made.zero_()


class _RawCalls(TorchDispatchMode):
    """Notes the arguments of the raw operators inside, with the plan that Triton's kernels have on such a GPU."""

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self._capability = capability
        self.found: list[Direction] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pyfused_portable":
            name, given = func._schema.name.rpartition("::")[2], dict(zip(_names(func), args, strict=True))
            if "plan" in given:
                given["plan"] = triton_plan(name, given, self._capability)
            self.found.append(Direction(name, tuple(given.values())))
        return func(*args, **(kwargs or {}))


def _names(func: torch._ops.OpOverload) -> list[str]:
    return [argument.name for argument in func._schema.arguments]


def directions(case: Case, target: Target) -> list[Direction]:
    """Forward and backward of the case's kernels, as they would be on such a GPU."""
    tensors = case.tensors(torch.device("meta"))
    for name in (*case.inputs, *case.trained):
        tensors[name].requires_grad_()
    with _RawCalls(target.capability) as calls:
        y = case.call(functools.partial(getattr(pyfused, case.operator), backend="portable"), tensors)
        leaves = [tensors[name] for name in (*case.inputs, *case.trained)]
        torch.autograd.grad(y, leaves, torch.empty_like(y))
    return calls.found


def kernels_and_sizes(case: Case, tensors: Mapping[str, Tensor]) -> tuple[str, Mapping[str, float]]:
    """(the operator whose kernels serve the case, `order.choose`'s sizes), which depend on where ``tensors`` are."""
    made = decided(case, getattr(pyfused, case.operator), tensors)
    return made.kernels, made.sizes


def least_work(chosen: Chosen, config: Any) -> LaunchWork:
    """Of the launch that ``chosen`` is for, in this configuration."""
    function = _WORK[chosen.function]
    known = chosen.arguments
    return function(config, **{name: known[name] for name in list(inspect.signature(function).parameters)[1:]})


def chosen_by(direction: Direction, target: Target) -> list[Chosen]:
    """What a direction chooses on such a GPU."""
    with recording.record(target), recording.forced({}) as found:
        direction()
    return list(dict.fromkeys(found))


def sound(
    direction: Direction, chosen: Chosen, target: Target, peaks: Peaks, seconds: float, jobs: int = 1
) -> dict[Any, tuple[str, ...]]:
    """Neighbour of the configuration that ships -> what the audit finds wrong with it.

    Only those that could take less than ``seconds``; those that could take the least come first.
    """
    least = {config: peaks.least_seconds(least_work(chosen, config), target) for config in neighbours(chosen.config())}
    hopeful = sorted((config for config in least if least[config] < seconds), key=least.__getitem__)
    cases = [
        [audit.Case(target, chosen.kernel, item, ships=False) for item in _launches(direction, chosen, config, target)]
        for config in hopeful
    ]
    with ThreadPoolExecutor(jobs) as pool:
        findings = pool.map(lambda each: [audit.compile_case(case) for case in each], cases)
        return {
            config: tuple(fault for finding in each for fault in finding.faults)
            for config, each in zip(hopeful, findings, strict=True)
        }


def _launches(direction: Direction, chosen: Chosen, config: Any, target: Target) -> list[recording.Launch]:
    """Those of the kernel that ``chosen`` is for, in this configuration."""
    with recording.record(target) as launches, recording.forced({chosen: config}):
        direction()
    return [item for item in launches if item.kernel.__name__ == chosen.kernel]
