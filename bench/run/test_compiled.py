"""Rows against torch.compile on a GPU, after all that need no compilation of seconds; on a CPU the operators' own rows
have it."""

from __future__ import annotations

import pytest
import torch

from pyfused.bench.cases import operators
from pyfused.bench.cases.case import Case, row_facts, row_id
from pyfused.bench.measure import parity, timing
from pyfused.bench.record.rows import Title
from pyfused.bench.run.plugin import SESSION, Compare
from pyfused.bench.run.session import Session

_COMPILED = "torch.compile"


def row_title(test: str, device: torch.device, case: Case) -> Title:
    return Title(f"{case.name}, beside torch.compile", "forward+backward", timing.mode_of(device, graph=True))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = metafunc.config.stash[SESSION].settings.device
    metafunc.parametrize("case", operators.compiled_cases(device), ids=row_id)


def test_compiled_forward_backward(case: Case, compare: Compare, bench_session: Session) -> None:
    device = bench_session.settings.device
    name, measured, _ = row_title("test_compiled_forward_backward", device, case)
    tensors = case.tensors(device)
    contenders = case.contenders(tensors)
    if _COMPILED in contenders.unavailable:
        pytest.skip(contenders.unavailable[_COMPILED])
    inputs = [tensors[name] for name in case.inputs]
    compare(
        name,
        {key: [contenders.named[key].call(inputs, tensors["dy"], backward=True)] for key in ("pyfused", _COMPILED)},
        measured=measured,
        graph=True,
        deviations=parity.Judge(case, device, tensors).check(),
        facts=row_facts(case, device, measured),
    )
