"""Programs on Triton's real launcher, over the stub driver: what they start is what the implementation starts."""

from __future__ import annotations

import importlib
import itertools
import threading
from typing import Any

import pytest
import torch
from stub_driver.build import REFUSAL
from stub_driver.session import over_stub

pytestmark = [pytest.mark.host, pytest.mark.skipif(REFUSAL is not None, reason=f"the stub driver {REFUSAL}")]


def _steps() -> list[tuple[str, Any, dict]]:
    """(label, operator with its settings, tensors) of each plan, and of what changes its launches."""
    from operators import OPERATORS, function_of

    found = []
    for name, row in OPERATORS.items():
        for plan in row.plans["triton"]:
            for variant in ("", *row.variants):
                draw, options = row.variants.get(variant, (row.draw, {}))
                tensors = draw(torch.bfloat16)
                found.append((f"{name} {plan} {variant}", function_of(name, "triton", plan, **options), tensors))
    return found


def _step(function, tensors, dy=None):
    leaves = {
        name: None if value is None else value.detach().requires_grad_(value.is_floating_point())
        for name, value in tensors.items()
    }
    y = function(**leaves)
    dy = torch.ones_like(y) if dy is None else dy
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(y, list(given.values()), dy, allow_unused=True)
    made = {"y": y, **{f"d {name}": gradient for name, gradient in zip(given, gradients, strict=True)}}
    return {**{name: tensor for name, tensor in tensors.items() if tensor is not None}, "dy": dy, **made}


def _serve_cpu_tensors() -> None:
    """They have addresses, which those that the stub takes for a GPU's have not."""
    torch.autocast = torch.autocast.__mro__[1]


def _launches_of(function, tensors, dy) -> list:
    """Each launch's arguments: numbers as they are, tensors by name, or by the order in which their memory is met."""
    from triton.backends.nvidia.driver import CudaLauncher

    program = importlib.import_module("pyfused.kernels.program")
    seen, launched = [], CudaLauncher.__call__
    # All that the step makes, so that no address is two tensors'.
    kept, makers = [], {made: made.run for made in (program._Allocation, program._Call)}

    def noted(self, *arguments):
        seen.append(arguments)
        return launched(self, *arguments)

    def keeping(run):
        return lambda self, values, stream: (run(self, values, stream), kept.extend(values))

    CudaLauncher.__call__ = noted
    for maker, run in makers.items():
        maker.run = keeping(run)
    try:
        named = _step(function, tensors, dy)
    finally:
        CudaLauncher.__call__ = launched
        for maker, run in makers.items():
            maker.run = run
    addresses = {tensor.data_ptr(): name for name, tensor in named.items() if tensor is not None and tensor.numel()}
    others: dict[int, str] = {}

    def told(value: Any) -> str:
        if isinstance(value, tuple):
            return f"({', '.join(map(told, value))})"
        address = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if isinstance(address, int) and address > 1 << 30:
            return addresses.get(address) or others.setdefault(address, f"memory {len(others)}")
        # A pointer to no elements is one to nowhere.
        return "0" if isinstance(value, torch.Tensor) else repr(value)

    # Grid, stream, function, metadata; then the hooks, and what the kernel takes.
    return [[*map(str, launch[:4]), launch[4], *map(told, launch[9:])] for launch in seen]


def started() -> list[str]:
    """What is wrong, in words."""
    _serve_cpu_tensors()
    program = importlib.import_module("pyfused.kernels.program")
    wrong = []
    for label, function, tensors in _steps():
        dy = torch.ones_like(function(**tensors))
        importlib.import_module("pyfused.choice.measured").changed()
        slow = _launches_of(function, tensors, dy)
        _launches_of(function, tensors, dy)
        ran, run = [], program.Program.__call__
        program.Program.__call__ = lambda self, arguments, run=run, ran=ran: (ran.append(1), run(self, arguments))[1]
        fast = _launches_of(function, tensors, dy)
        program.Program.__call__ = run
        if len(ran) != 2:
            wrong.append(f"{label}: {len(ran)} programs")
        if not slow or slow != fast:
            pairs = [pair for one, other in zip(slow, fast, strict=False) for pair in zip(one, other, strict=False)
                     if pair[0] != pair[1]]  # fmt: skip
            wrong.append(f"{label}: {len(slow)} and {len(fast)} launches, {pairs[:4]}")
    return wrong


@pytest.mark.parametrize("gpu", [80, 90])
def test_programs_start_what_implementations_start(gpu):
    assert over_stub(started, gpu=gpu) == []


def together() -> list[str]:
    _serve_cpu_tensors()
    wanted = "lora_linear one_launch ", "lora_linear one_launch tma, dropout"
    steps = [step for step in _steps() if step[0] in wanted]
    failed = [] if len(steps) == len(wanted) else [f"{len(steps)} steps"]

    def work():
        try:
            for (_, function, tensors), _ in itertools.product(steps, range(20)):
                _step(function, tensors)
        except BaseException as error:
            failed.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


def test_threads_share_programs():
    """Also one whose kernel needs memory for its descriptors, which Triton gives to no new thread."""
    assert over_stub(together, gpu=90, compiling=True) == []
