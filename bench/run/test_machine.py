"""Machine rows: the fastest matrix product and the fastest copy, the two limits that a roofline shows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyfused.bench.cases.case import short
from pyfused.bench.measure import timing
from pyfused.bench.record.rows import Title
from pyfused.bench.run.plugin import SESSION, Compare
from pyfused.bench.run.session import Session

# Device type -> side of the square matrices: large enough that their product is at the machine's best.
SIDE = {"cpu": 2048, "cuda": 8192}
# Device type -> bytes copied: several times any cache.
COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}


def row_title(test: str, device: torch.device, dtype: torch.dtype | None = None) -> Title:
    mode = timing.mode_of(device, graph=True)
    if dtype is None:
        return Title(f"copy {COPIED[device.type] >> 20} MiB", "copy", mode)
    side = SIDE[device.type]
    return Title(f"matrix product {side}x{side}x{side} {short(dtype)}", "matrix product", mode)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dtype" in metafunc.fixturenames:
        cpu = metafunc.config.stash[SESSION].settings.device.type == "cpu"
        metafunc.parametrize("dtype", (torch.float32,) if cpu else (torch.bfloat16, torch.float16), ids=short)


def test_matrix_product(dtype: torch.dtype, compare: Compare, bench_session: Session) -> None:
    device = bench_session.settings.device
    side = SIDE[device.type]
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    calls = {"torch.mm": [lambda: torch.mm(a, b.t(), out=out)]}
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        # Some CPUs are faster by oneDNN than by the library that torch.mm takes, and pyfused takes it there.
        calls["oneDNN"] = [lambda: _by_onednn(a, b)]
    name, measured, _ = row_title("test_matrix_product", device, dtype)
    compare(
        name,
        calls,
        subject="torch.mm",
        kind="machine",
        measured=measured,
        graph=True,
        facts={"dtype": short(dtype), "flops": 2 * side**3, "bytes": 3 * a.nbytes},
    )


def _by_onednn(a: Tensor, b: Tensor) -> Tensor:
    """a b^T, as torch.compile asks for it."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def test_copy(compare: Compare, bench_session: Session) -> None:
    device = bench_session.settings.device
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    name, measured, _ = row_title("test_copy", device)
    compare(
        name,
        {"Tensor.copy_": [lambda: target.copy_(source)]},
        subject="Tensor.copy_",
        kind="machine",
        measured=measured,
        graph=True,
        facts={"flops": 0, "bytes": 2 * source.nbytes},
    )
