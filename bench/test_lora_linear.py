"""Operator rows: `lora_linear` against plain torch, torch.compile, PEFT and the frozen layer alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyfused.bench import baselines, memory, parity
from pyfused.bench.cases import LoRACase, timed_cases
from pyfused.bench.plugin import SESSION, Compare
from pyfused.bench.session import Session

# On a GPU the input sets take turns, so that no contender finds its input in the cache.
_GPU_INPUT_SETS = 3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = metafunc.config.stash[SESSION].settings.device
    cases = timed_cases(device)
    metafunc.parametrize(
        "case", cases, ids=[case.name.replace("->", "to").replace(" ", "-") for case in cases], scope="module"
    )
    modes = {"eager": False} if device.type == "cpu" else {"eager": False, "graph": True}
    metafunc.parametrize("graph", modes.values(), ids=modes.keys())


class Prepared:
    """One case's tensors, parity and contenders, shared by its rows."""

    def __init__(self, case: LoRACase, device: torch.device) -> None:
        self.case, self.device = case, device
        sets = 1 if device.type == "cpu" else _GPU_INPUT_SETS
        self.tensors = case.tensors(device)
        self.inputs: list[Tensor] = [self.tensors["x"], *(torch.randn_like(self.tensors["x"]) for _ in range(sets - 1))]
        self.deviations = _deviations(case, device)
        self.contenders, self.unavailable = baselines.lora_contenders(case, self.tensors)

    def calls(self, backward: bool) -> dict[str, list]:
        dy = self.tensors["dy"]
        return {
            name: [contender.call(x, dy, backward) for x in self.inputs] for name, contender in self.contenders.items()
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
            for name, contender in self.contenders.items()
        }


def _deviations(case: LoRACase, device: torch.device) -> list[parity.Deviation]:
    """Over a 16-bit base those of the contender with float32 adapters too: its time stands in the same row."""
    found = parity.check_lora_linear(case, device)
    if case.dtype.itemsize == 2:
        wide = parity.check_lora_linear(replace(case, adapter_dtype=torch.float32), device)
        found += [replace(item, tensor=f"{item.tensor} (float32 adapters)") for item in wide]
    return found


@pytest.fixture(scope="module")
def prepared(case: LoRACase, bench_session: Session) -> Iterator[Prepared]:
    yield Prepared(case, bench_session.settings.device)
    if bench_session.settings.device.type == "cuda":
        torch.cuda.empty_cache()


def _row(prepared: Prepared, compare: Compare, graph: bool, measured: str) -> None:
    backward = measured != "forward"
    case = prepared.case
    compare(
        case.name,
        prepared.calls(backward),
        measured=measured,
        graph=graph,
        deviations=[item for item in prepared.deviations if backward or item.tensor.startswith("y")],
        facts=case.facts() | {"floor_seconds": _floor(case, prepared.device, measured)},
        peak_bytes=prepared.peak_bytes(backward) if backward else {},
        saved_bytes=prepared.saved_bytes() if backward else {},
        unavailable=prepared.unavailable,
    )


def _floor(case: LoRACase, device: torch.device, measured: str) -> float | None:
    """The floor is modelled for one GPU only."""
    known = device.type == "cuda" and "H200" in torch.cuda.get_device_name(device)
    return case.floor_seconds()[measured] if known else None


def test_forward(prepared: Prepared, graph: bool, compare: Compare) -> None:
    _row(prepared, compare, graph, "forward")


def test_forward_backward(prepared: Prepared, graph: bool, compare: Compare) -> None:
    _row(prepared, compare, graph, "forward+backward")
