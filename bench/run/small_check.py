"""What `pyfused doctor` checks: every operator at its smallest size, in seconds."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from pyfused.bench.cases import operators
from pyfused.bench.cases.case import refusal
from pyfused.bench.measure import parity
from pyfused.bench.run import check
from pyfused.choice import backends
from pyfused.progress import bar


def rows() -> list[dict[str, Any]]:
    """One for each operator, dtype, backend and plan that runs here, as `pyfused check --json` has them; with its
    device, and with what was raised where it was not computed."""
    dtypes: dict[torch.device, tuple[torch.dtype, ...]] = {torch.device("cpu"): (torch.float32, torch.bfloat16)}
    if torch.cuda.is_available():
        # In one dtype: Triton compiles each kernel anew for another.
        dtypes[torch.device("cuda")] = (torch.bfloat16,)
    asked = [
        (device, check.Comparison(case, name, plan))
        for device, each in dtypes.items()
        for dtype in each
        for case in (dataclasses.replace(module.TINY, dtype=dtype) for module in operators.OPERATORS.values())
        for name in backends.BACKENDS
        for plan in case.plans(name)
        if refusal(case, device, name, plan) is None
    ]
    found = []
    for device, each in bar(asked, "check"):
        row = {"device": str(device)} | check.named(each)
        try:
            compared = parity.check(each.case, device, backend=each.backend, plan=each.plan)
            found.append(row | check.judged(compared))
        except Exception as error:
            # Whatever a kernel or a driver does is what is asked for.
            found.append(row | {"passed": False, "raised": f"{type(error).__name__}: {error}".partition("\n")[0]})
    return found
