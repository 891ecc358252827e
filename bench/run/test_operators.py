"""Operator rows: each operator against plain torch, its backends and their plans, and whoever else does the same."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyfused.bench.cases import operators
from pyfused.bench.cases.baselines import Contenders
from pyfused.bench.cases.case import Case, arguments_of, normal, refusals, row_facts, row_id
from pyfused.bench.measure import memory, parity, timing
from pyfused.bench.record.rows import Title
from pyfused.bench.run.plugin import SESSION, Compare
from pyfused.bench.run.session import Session

# On a GPU input sets take turns, so that no contender finds its input in the cache; each costs every contender a graph.
_GPU_INPUT_SETS = 2
_MEASURED = {"test_forward": "forward", "test_forward_backward": "forward+backward"}


def row_title(test: str, device: torch.device, case: Case, graph: bool) -> Title:
    return Title(case.name, _MEASURED[test], timing.mode_of(device, graph))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = metafunc.config.stash[SESSION].settings.device
    metafunc.parametrize("case", operators.timed_cases(device), ids=row_id, scope="module")
    modes = {"eager": False} if device.type == "cpu" else {"eager": False, "graph": True}
    metafunc.parametrize("graph", modes.values(), ids=modes.keys())


class Prepared:
    """One case's tensors, parity and contenders, shared by its rows; each is made where the first row asks for it."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        return self.case.tensors(self.device)

    @functools.cached_property
    def inputs(self) -> list[list[Tensor]]:
        """The sets of inputs; all of them are drawn from N(0, 1), as the case's own are."""
        own = [self.tensors[name] for name in self.case.inputs]
        others = 0 if self.device.type == "cpu" else _GPU_INPUT_SETS - 1
        draws = [normal(self.device, seed) for seed in range(1, 1 + others)]
        return [own, *([draw(x.shape, 1.0, x.dtype) for x in own] for draw in draws)]

    @property
    def deviations(self) -> list[parity.Deviation]:
        """Of backend "auto", and of each backend and plan that is as close to float64 as it must be."""
        return self._judged[0]

    @property
    def faults(self) -> dict[str, str]:
        """What is wrong with each other backend and plan, by the contender's name."""
        return self._judged[1]

    @functools.cached_property
    def _judged(self) -> tuple[list[parity.Deviation], dict[str, str]]:
        judge = parity.Judge(self.case, self.device, self.tensors)
        found, faults = judge.check(), {}
        for name, reason in self._refusals.items():
            if reason is not None:
                continue
            try:
                own = judge.check(**arguments_of(name))
            except Exception as error:
                # One plan that does not run must not cost the times of all others; the row still fails for it.
                faults[f"pyfused {name}"] = f"{type(error).__name__}: {error}"
                continue
            broken = [str(item) for item in own if not item.passed]
            if broken:
                faults[f"pyfused {name}"] = "not close enough to float64: " + "; ".join(broken)
            else:
                found += [replace(item, tensor=f"{item.tensor} ({name})") for item in own]
        return found, faults

    @functools.cached_property
    def contenders(self) -> Contenders:
        """Those without a fault."""
        sound = [name for name, reason in self._refusals.items() if not reason and f"pyfused {name}" not in self.faults]
        found = self.case.contenders(self.tensors, sound)
        found.unavailable |= {f"pyfused {name}": reason for name, reason in self._refusals.items() if reason}
        found.unavailable |= self.faults
        if self.device.type != "cpu" and found.named.pop("torch.compile", None) is not None:
            found.unavailable["torch.compile"] = "on a GPU it is timed in rows of its own, those of test_compiled"
        return found

    @functools.cached_property
    def _refusals(self) -> dict[str, str | None]:
        return _refusals(self.case, self.device)

    def calls(self, backward: bool) -> dict[str, list]:
        dy = self.tensors["dy"]
        return {
            name: [contender.call(inputs, dy, backward) for inputs in self.inputs]
            for name, contender in self.contenders.named.items()
        }

    @functools.cached_property
    def peak_bytes(self) -> dict[str, int]:
        """Of forward and backward."""
        return {name: memory.peak_bytes(calls[0], self.device) for name, calls in self.calls(backward=True).items()}

    @functools.cached_property
    def saved_bytes(self) -> dict[str, int]:
        dy = self.tensors["dy"]
        return {
            name: memory.saved_bytes(
                contender.call(self.inputs[0], dy, backward=False),
                held_anyway=[*self.tensors.values(), *contender.trained],
            )
            for name, contender in self.contenders.named.items()
        }


def _refusals(case: Case, device: torch.device) -> dict[str, str | None]:
    """What is timed beside "auto" -> why it cannot be; on a CPU, where kernels are slow stand-ins, nothing."""
    return {} if device.type == "cpu" else refusals(case, device)


@pytest.fixture(scope="module")
def prepared(case: Case, bench_session: Session) -> Iterator[Prepared]:
    yield Prepared(case, bench_session.settings.device)
    if bench_session.settings.device.type == "cuda":
        torch.cuda.empty_cache()


def _checked_row(prepared: Prepared, compare: Compare, graph: bool, measured: str) -> None:
    _row(prepared, compare, graph, measured, list(prepared.faults))
    if prepared.faults:
        lines = (f"{name}: {fault}" for name, fault in prepared.faults.items())
        pytest.fail(f"{prepared.case.name} was timed without\n" + "\n".join(lines), pytrace=False)


def _row(prepared: Prepared, compare: Compare, graph: bool, measured: str, wrong: Sequence[str] = ()) -> None:
    backward = measured != "forward"
    case = prepared.case
    compare(
        case.name,
        prepared.calls(backward),
        measured=measured,
        graph=graph,
        deviations=[item for item in prepared.deviations if backward or item.tensor.startswith("y")],
        facts=row_facts(case, prepared.device, measured),
        peak_bytes=prepared.peak_bytes if backward else {},
        saved_bytes=prepared.saved_bytes if backward else {},
        unavailable=prepared.contenders.unavailable,
        wrong=wrong,
    )


def test_forward(prepared: Prepared, graph: bool, compare: Compare) -> None:
    _checked_row(prepared, compare, graph, _MEASURED["test_forward"])


def test_forward_backward(prepared: Prepared, graph: bool, compare: Compare) -> None:
    _checked_row(prepared, compare, graph, _MEASURED["test_forward_backward"])
