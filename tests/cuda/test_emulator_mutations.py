"""The emulator and the comparison notice a mistake in csrc: one kernel of adapter_residual with one change each."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch
from emulator import build as emulator
from emulator import tests
from oracle import randn
from torch import Tensor

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(emulator.REFUSAL is not None, reason=str(emulator.REFUSAL)),
]
CSRC = emulator.ROOT / "csrc"
# Two tiles of rows, two chunks of channels and one of the middle, each with a tail.
ROWS, CHANNELS, WIDTH = 45, 84, 37
RACE = r"^adapter_fwd_kernel<.*>: block .*: race: "
OUTSIDE = r"^adapter_fwd_kernel<.*>: block .*: out of bounds: "

# File, what stands there once, what stands there instead, and what the kernel's failure says.
CAUGHT = {
    "a barrier of the pipeline": (
        "bottleneck.cuh", r"(overwritten\.\n *)__syncthreads\(\);", r"\1", RACE,
    ),
    "the barrier before the middle is stored": (
        "bottleneck.cuh", r"(void store_middle\(.*\n *)__syncthreads\(\);", r"\1", RACE,
    ),
    "a barrier between a warp's writes and reads": (
        "bottleneck.cuh", r"__syncwarp\(\);(\n *const bool down)", r"\1", RACE,
    ),
    "a wait for all but one copy too many": (
        "bottleneck.cuh", r"case 3: cp_async_wait<1>", "case 3: cp_async_wait<2>", RACE + ".* is still being copied by",
    ),
    "a copy of one number too many": (
        "tiles.cuh", r"min\(8, channels - c0 - column\)", "min(8, channels - c0 - column + 1)", OUTSIDE + "reads ",
    ),
    "a copy of one row too many": (
        "tiles.cuh", r"valid = row < tile\.count && live\(row\)", "valid = row <= tile.count", OUTSIDE + "reads ",
    ),
    "one number too many stored": (
        "bottleneck.cuh", r"down, min\(8, down \? rows : columns\)", "down, min(8, 1 + (down ? rows : columns))",
        OUTSIDE + "writes ",
    ),
}  # fmt: skip
# The same of changes that only the result shows.
WRONG = {
    "two halves of a fragment swapped": (
        "mma.cuh", r"sum\[i\], a, b\[0\], b\[1\]", "sum[i], a, b[1], b[0]",
    ),
    "the columns of two halves of a fragment swapped": (
        "mma.cuh", r"lane / 16 \* 8\) \* pitch \+ k \+ lane / 8 % 2 \* 8\);\n  }\n}", 
        "lane / 8 % 2 * 8) * pitch + k + lane / 16 * 8);\n  }\n}",
    ),
    "a row left out": (
        "bottleneck.cuh", r"first = block % tiles_l \* rows;", "first = block % tiles_l * rows + 1;",
    ),
    "a step of a chunk left out": (
        "bottleneck.cuh", r"if \(c0 \+ k >= channels\) break;", "if (c0 + k + 16 >= channels) break;",
    ),
}  # fmt: skip


def _changed(file: str, pattern: str, replacement: str) -> Path:
    """A copy of csrc's headers and of the kernel's launch, in a folder named by what they hold."""
    sources = {path.name: path.read_text() for path in (*CSRC.glob("*.h"), *CSRC.glob("*.cuh"))}
    sources[file], count = re.subn(pattern, replacement, sources[file])
    assert count == 1, f"{pattern!r} is {count} times in {file}"
    sources["adapter.cu"] = (emulator.HERE / "adapter.cu").read_text()
    folder = emulator.CACHE / f"changed-{hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in sources.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    return folder / "adapter.cu"


def _matrix(rows: int, columns: int, seed: int | None = None) -> Tensor:
    """Rows padded with NaN to multiples of 16 bytes, of random numbers or NaN throughout."""
    # What lies behind is no other buffer.
    matrix = torch.full((rows + 64, (columns + 7) // 8 * 8), torch.nan, dtype=torch.bfloat16)[:rows, :columns]
    return matrix if seed is None else matrix.copy_(randn(rows, columns, seed=seed))


def _error(source: Path, seed: int = 0) -> float:
    """How far the kernel's results are off, in roundings of the largest."""
    changed = tests.module("changed", adapter=source)
    changed.emulate(seed=seed)
    z, down, up = _matrix(ROWS, CHANNELS, 1), _matrix(WIDTH, CHANNELS, 2), _matrix(CHANNELS, WIDTH, 3)
    y, hidden = _matrix(ROWS, CHANNELS), _matrix(ROWS, WIDTH)
    changed.adapter_forward(*map(tests.bits, (z, down, up, y, hidden)), stages=3)
    exact_hidden = z.double() @ down.double().T
    exact = z.double() + exact_hidden.bfloat16().double() @ up.double().T
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in ((y, exact), (hidden, exact_hidden))]
    return max(errors, key=lambda error: (error != error, error)) / torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("seed", range(4))
def test_the_kernel_as_it_is(seed):
    assert _error(emulator.HERE / "adapter.cu", seed) <= 1


@pytest.mark.parametrize("mistake", CAUGHT)
def test_mistakes_are_caught(mistake):
    *change, message = CAUGHT[mistake]
    source = _changed(*change)
    for seed in range(3):
        with pytest.raises(RuntimeError, match=message) as error:
            _error(source, seed)
        assert ".cuh:" in str(error.value), "the place is named"


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_show(mistake):
    assert not _error(_changed(*WRONG[mistake])) <= 30
