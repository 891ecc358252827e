"""Operator rows: each operator against plain torch, torch.compile, its backends, and whoever else does the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyfused import backend as backends
from pyfused.bench import memory, operators, parity
from pyfused.bench.cases import Case, refusal
from pyfused.bench.plugin import SESSION, Compare
from pyfused.bench.session import Session

# On a GPU the input sets take turns, so that no contender finds its input in the cache.
_GPU_INPUT_SETS = 3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = metafunc.config.stash[SESSION].settings.device
    cases = operators.timed_cases(device)
    metafunc.parametrize(
        "case", cases, ids=[case.name.replace("->", "to").replace(" ", "-") for case in cases], scope="module"
    )
    modes = {"eager": False} if device.type == "cpu" else {"eager": False, "graph": True}
    metafunc.parametrize("graph", modes.values(), ids=modes.keys())


class Prepared:
    """One case's tensors, parity and contenders, shared by its rows."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.tensors = case.tensors(device)
        first = [self.tensors[name] for name in case.inputs]
        others = 0 if device.type == "cpu" else _GPU_INPUT_SETS - 1
        self.inputs: list[list[Tensor]] = [first, *([torch.randn_like(x) for x in first] for _ in range(others))]
        kernels = _kernels(case, device)
        by_name = [name for name, reason in kernels.items() if reason is None]
        self.deviations = _deviations(case, device, by_name)
        self.contenders = case.contenders(self.tensors, by_name)
        self.contenders.unavailable |= {f"pyfused {name}": reason for name, reason in kernels.items() if reason}

    def calls(self, backward: bool) -> dict[str, list]:
        dy = self.tensors["dy"]
        return {
            name: [contender.call(inputs, dy, backward) for inputs in self.inputs]
            for name, contender in self.contenders.named.items()
        }

    def peak_bytes(self, backward: bool) -> dict[str, int]:
        return {name: memory.peak_bytes(calls[0], self.device) for name, calls in self.calls(backward).items()}

    def saved_bytes(self) -> dict[str, int]:
        dy = self.tensors["dy"]
        return {
            name: memory.saved_bytes(
                contender.call(self.inputs[0], dy, backward=False),
                held_anyway=[*self.tensors.values(), *contender.trained],
            )
            for name, contender in self.contenders.named.items()
        }


def _kernels(case: Case, device: torch.device) -> dict[str, str | None]:
    """Backend with kernels -> why it cannot compute the case; on a CPU, where kernels are slow stand-ins, none."""
    names = () if device.type == "cpu" else backends.BACKENDS
    return {name: refusal(case, device, name) for name in names if name != "portable"}


def _deviations(case: Case, device: torch.device, by_name: Sequence[str] = ()) -> list[parity.Deviation]:
    judge = parity.Judge(case, device)
    found = judge.check()
    further = {name: judge.check(backend=name) for name in by_name}
    further |= {label: parity.check(other, device) for label, other in case.gated_too().items()}
    for label, items in further.items():
        found += [replace(item, tensor=f"{item.tensor} ({label})") for item in items]
    return found


@pytest.fixture(scope="module")
def prepared(case: Case, bench_session: Session) -> Iterator[Prepared]:
    yield Prepared(case, bench_session.settings.device)
    if bench_session.settings.device.type == "cuda":
        torch.cuda.empty_cache()


def _row(prepared: Prepared, compare: Compare, graph: bool, measured: str) -> None:
    backward = measured != "forward"
    case = prepared.case
    work = case.work()[measured]
    compare(
        case.name,
        prepared.calls(backward),
        measured=measured,
        graph=graph,
        deviations=[item for item in prepared.deviations if backward or item.tensor.startswith("y")],
        facts={
            **case.facts(),
            "flops": work.flops,
            "bytes": work.nbytes,
            "floor_seconds": _floor(case, prepared.device, measured),
        },
        peak_bytes=prepared.peak_bytes(backward) if backward else {},
        saved_bytes=prepared.saved_bytes() if backward else {},
        unavailable=prepared.contenders.unavailable,
    )


def _floor(case: Case, device: torch.device, measured: str) -> float | None:
    """The floor is modelled for one GPU only."""
    known = device.type == "cuda" and "H200" in torch.cuda.get_device_name(device)
    return case.floor_seconds()[measured] if known else None


def test_forward(prepared: Prepared, graph: bool, compare: Compare) -> None:
    _row(prepared, compare, graph, "forward")


def test_forward_backward(prepared: Prepared, graph: bool, compare: Compare) -> None:
    _row(prepared, compare, graph, "forward+backward")
