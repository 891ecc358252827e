"""Overhead rows: what the host needs for one eager call of each operator, and for a call and its backward, where there
is next to nothing to compute."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pyfused
from pyfused.bench.cases import operators
from pyfused.bench.cases.baselines import BASE
from pyfused.bench.cases.case import Case, refusal
from pyfused.bench.measure import parity, timing
from pyfused.bench.record.rows import Title
from pyfused.bench.run.plugin import SESSION, Compare
from pyfused.bench.run.session import Session
from pyfused.choice import backends

_MEASURED = {"test_one_call": "forward", "test_one_step": "forward+backward"}


def row_title(test: str, device: torch.device, case: Case, backend: str) -> Title:
    return Title(f"overhead {case.name}, {backend}", _MEASURED[test], timing.HostClock.mode)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = metafunc.config.stash[SESSION].settings.device
    names = ("portable", "cpu") if device.type == "cpu" else ("portable", "triton", "cuda")
    rows = [
        pytest.param(case, name, id=f"{case.operator}-{name}")
        for case in operators.tiny_cases(device)
        for name in names
        # Of what has no kernels for CPUs there is no row, not even one that is skipped. Not `refusal`, which makes fake
        # tensors: what they import takes longer than to find all rows.
        if name != "cpu" or backends.refusal(name, device, case.dtype, case.operator) is None
    ]
    metafunc.parametrize(("case", "backend"), rows)


def test_one_call(case: Case, backend: str, compare: Compare, bench_session: Session) -> None:
    device = bench_session.settings.device
    _skip_where_refused(case, backend, device)
    name, measured, _ = row_title("test_one_call", device, case, backend)
    ours = functools.partial(getattr(pyfused, case.operator), backend=backend)
    eager = getattr(operators.OPERATORS[case.operator], f"eager_{case.operator}")
    compare(
        name,
        {"pyfused": [_call(case, device, ours)], "eager": [_call(case, device, eager)]},
        kind="overhead",
        measured=measured,
        clock=timing.HostClock(device),
        deviations=[item for item in parity.check(case, device, backend=backend) if item.tensor == "y"],
        facts=case.facts() | {"backend": backend},
    )


def test_one_step(case: Case, backend: str, compare: Compare, bench_session: Session) -> None:
    """Forward and backward, beside all that users may have without this package but what a compiler makes."""
    device = bench_session.settings.device
    _skip_where_refused(case, backend, device)
    name, measured, _ = row_title("test_one_step", device, case, backend)
    tensors = case.tensors(device)
    inputs = [tensors[name] for name in case.inputs]
    named = case.contenders(tensors, [backend]).named
    taken = {"pyfused": named[f"pyfused {backend}"]}
    other = {"torch.compile", BASE}
    taken |= {name: each for name, each in named.items() if not name.startswith("pyfused") and name not in other}
    compare(
        name,
        {name: [each.call(inputs, tensors["dy"], backward=True)] for name, each in taken.items()},
        kind="overhead",
        measured=measured,
        clock=timing.HostClock(device),
        deviations=parity.check(case, device, backend=backend),
        facts=case.facts() | {"backend": backend},
    )


def _skip_where_refused(case: Case, backend: str, device: torch.device) -> None:
    reason = refusal(case, device, backend)
    if reason is not None:
        pytest.skip(reason)


def _call(case: Case, device: torch.device, function: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """``function`` bound to the case's arguments, which require grad as in training: the call and nothing around it."""
    tensors = case.tensors(device)
    for name in (*case.inputs, *case.trained):
        tensors[name].requires_grad_()
    return case.call(functools.partial(functools.partial, function), tensors)
