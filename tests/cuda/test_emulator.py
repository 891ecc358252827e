"""The emulator that runs CUDA kernels on a CPU: what it computes, and that it misses no mistake it is there to find."""

from __future__ import annotations

import itertools
import re
from types import ModuleType

import numpy as np
import pytest
import torch
from emulator import tests
from emulator.build import HERE, MODULE, REFUSAL, build, load
from emulator.tests import bits
from oracle import randn
from torch import Tensor

pytestmark = [pytest.mark.host, pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))]

DTYPES = (torch.bfloat16, torch.float16)
# As in gemm.cu.
NO_BARRIER, NO_WAIT, TAIL_READ, FRAGMENT_INDEX = 1, 2, 3, 4
SEEDS = range(8)


class Library:
    def __init__(self, module: ModuleType):
        self.module = module
        self.emulate = module.emulate
        self.emulate()

    def gemm(self, a: Tensor, b: Tensor, mistake: int = 0) -> Tensor:
        c = torch.full((a.shape[0], b.shape[1]), torch.nan)
        self.module.gemm(a.dtype == torch.bfloat16, *map(bits, (a, b, c)), mistake)
        return c

    def probe(self, name, given=None, words=8, *, grid=(1, 1, 1), threads=32, shared=1024) -> np.ndarray:
        """What the probe wrote into ``words`` words of zeros, after it was given (by default) 10 words of ones."""
        given = np.ones(10, np.uint32) if given is None else np.ascontiguousarray(given).view(np.uint32).ravel()
        # With room before and behind, and at a multiple of 16 bytes.
        memory = torch.zeros(given.size + 16, dtype=torch.int32)
        memory[8:-8] = torch.from_numpy(given.view(np.int32))
        out = torch.zeros(words + 8, dtype=torch.int32)[:words]
        found = out.numpy().view(np.uint32)
        self.module.probe(name, memory[8:-8].numpy().view(np.uint32), found, grid, threads, shared)
        return found


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return tests.module()


@pytest.fixture
def library(module) -> Library:
    return Library(module)


def place(file: str, pattern: str) -> str:
    """As in messages, of the one line of ``file`` that ``pattern`` finds."""
    lines = (HERE / file).read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if re.search(pattern, line))
    return f"tests/emulator/{file}:{number}"


def places(probe: str) -> dict[str, str]:
    """Those that the probe's source marks."""
    source = (HERE / "probes.cu").read_text()
    marks = [mark for mark in ("here", "there") if f"// {mark}: {probe}\n" in source]
    return {mark: place("probes.cu", f"// {mark}: {probe}$") for mark in marks}


def matrices(rows: int, columns: int, inner: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """a and b of the GEMM, their rows padded with NaN to multiples of 16 bytes."""
    found = []
    for seed, (height, width) in enumerate([(rows, inner), (inner, columns)]):
        # What lies behind is no other buffer.
        padded = torch.full((height + 64, (width + 7) // 8 * 8), torch.nan, dtype=dtype)[:height]
        padded[:, :width] = randn(height, width, dtype=dtype, seed=seed)
        found.append(padded[:, :width])
    return found[0], found[1]


def excess(c: Tensor, a: Tensor, b: Tensor) -> float:
    """The largest error, in roundings of the sum in float32."""
    scale = a.double().abs() @ b.double().abs()
    return ((c - a.double() @ b.double()).abs() / (scale * torch.finfo(torch.float32).eps)).max().item()


# ---- A kernel that uses everything


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (64, 64, 32), (63, 72, 31), (65, 40, 100), (130, 9, 257), (197, 128, 256)]
)
def test_gemm(library, shape, dtype):
    a, b = matrices(*shape, dtype)
    assert excess(library.gemm(a, b), a, b) < 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_under_every_schedule(library, dtype):
    a, b = matrices(130, 72, 100, dtype)
    expected = library.gemm(a, b)
    for seed in (1, 2, 3, 2**40, 2**64 - 1):
        library.emulate(seed=seed)
        assert torch.equal(library.gemm(a, b), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_removed_barrier_is_caught(library, seed):
    library.emulate(seed=seed)
    a, b = matrices(65, 40, 100, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"^gemm_kernel<bfloat16>: block \(0, \d, 0\), .* race: ") as error:
        library.gemm(a, b, NO_BARRIER)
    assert place("gemm.cu", r"cp_async_16\(") in str(error.value)
    assert place("gemm.cu", r"ldmatrix_x4\(a") in str(error.value) or place("gemm.cu", r"_trans\(b") in str(error.value)


@pytest.mark.parametrize("seed", SEEDS)
def test_removed_wait_is_caught(library, seed):
    library.emulate(seed=seed)
    a, b = matrices(65, 40, 100, torch.float16)
    message = r"^gemm_kernel<float16>: .* ldmatrix_x4: race: what it touches is still being copied by thread \d+ in "
    with pytest.raises(RuntimeError, match=message) as error:
        library.gemm(a, b, NO_WAIT)
    assert place("gemm.cu", r"ldmatrix_x4\(a") + ":" in str(error.value)
    assert f"cp_async_16 ({place('gemm.cu', 'cp_async_16')})" in str(error.value)


def test_tail_read_is_caught(library):
    a, b = matrices(65, 40, 100, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"^gemm_kernel<bfloat16>: block \(0, 1, 0\), thread \d+: ") as error:
        library.gemm(a, b, TAIL_READ)
    message = r"cp_async_16: out of bounds: reads (8|16) bytes that end \d+ bytes past the end of buffer 0 \(13512 "
    assert re.search(message, str(error.value))
    assert place("gemm.cu", r"cp_async_16\(") in str(error.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_fragment_index_shows(library, dtype):
    a, b = matrices(65, 40, 100, dtype)
    assert excess(library.gemm(a, b, FRAGMENT_INDEX), a, b) > 1e5


def test_a_launch_after_a_failed_one(library):
    a, b = matrices(65, 40, 100, torch.bfloat16)
    expected = library.gemm(a, b)
    for mistake in (NO_BARRIER, NO_WAIT, TAIL_READ):
        with pytest.raises(RuntimeError):
            library.gemm(a, b, mistake)
        assert torch.equal(library.gemm(a, b), expected)


# ---- What the instructions compute


@pytest.mark.parametrize("dtype", DTYPES)
def test_mma(library, dtype):
    """By the formulas of the PTX manual for the fragments of mma.m16n8k16; whole numbers, so that sums are exact."""
    lane, i = np.arange(32)[:, None], np.arange(8)
    group, pair = lane // 4, lane % 4 * 2
    a, b, c = (randn(*shape, seed=seed).mul(8).round() for seed, shape in enumerate([(16, 16), (16, 8), (16, 8)]))
    a_bits, b_bits = (matrix.to(dtype).view(torch.uint16).numpy() for matrix in (a, b))
    rows_a = np.where((i < 2) | ((i >= 4) & (i < 6)), group, group + 8)
    columns_a = np.where(i < 4, pair + i % 2, pair + i % 2 + 8)
    rows_b = np.where(i[:4] < 2, pair + i[:4] % 2, pair + i[:4] % 2 + 8)
    rows_c, columns_c = np.where(i[:4] < 2, group, group + 8), pair + i[:4] % 2
    fragments = (a_bits[rows_a, columns_a], b_bits[rows_b, group], c.numpy()[rows_c, columns_c])
    words = np.concatenate([fragment.view(np.uint32) for fragment in fragments], axis=1)
    found = library.probe(f"mma {str(dtype)[6:]}", words, 128).view(np.float32).reshape(32, 4)
    assert np.array_equal(found, (a @ b + c).numpy()[rows_c, columns_c])


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(library, transposed):
    """Lane i holds, of each 8x8 matrix or its transpose, elements 2 i and 2 i + 1, row by row."""
    numbers = np.random.default_rng(0).integers(0, 2**16, (4, 8, 8), np.uint16)
    found = library.probe("ldmatrix transposed" if transposed else "ldmatrix", numbers, 128)
    expected = numbers.transpose(0, 2, 1) if transposed else numbers
    assert np.array_equal(found.view(np.uint16).reshape(32, 4, 2), expected.reshape(4, 32, 2).transpose(1, 0, 2))


def test_shuffles(library):
    numbers = np.random.default_rng(0).integers(0, 2**32, 64, np.uint32)
    found = library.probe("shuffles", numbers, 128, threads=64)
    lanes = np.arange(64)
    assert np.array_equal(found[:64], numbers[lanes ^ 5])
    assert np.array_equal(found[64:], numbers[lanes // 32 * 32 + 7])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding(library, dtype):
    """All exponents and leading digits, with what follows them at, beside and far from the middle of two numbers."""
    leading = torch.arange(2**19, dtype=torch.int64)[:, None] << 13
    numbers = (
        (leading | torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF])).to(torch.int32).view(torch.float32).ravel()
    )
    expected = numbers.to(dtype)
    for way in (library.module.rounded, library.module.rounded_in_pair):
        found = torch.from_numpy(way(dtype == torch.bfloat16, numbers.numpy())).view(dtype)
        assert torch.equal(found.isnan(), numbers.isnan())
        number = ~numbers.isnan()
        assert torch.equal(found[number].view(torch.int16), expected[number].view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_widening(library, dtype):
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    found = torch.from_numpy(library.module.widened(dtype == torch.bfloat16, numbers.numpy()))
    expected = numbers.view(dtype).float()
    assert torch.equal(found.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(found[number].view(torch.int32), expected[number].view(torch.int32))


# ---- Memory and schedule


def test_uninitialised_shared_memory_is_nan(library):
    found = library.probe("uninitialised", words=128).view(np.float32).reshape(32, 4)
    assert np.isnan(found[:, :3]).all()


def test_copies_are_late(library):
    assert library.probe("late copies", words=16)[:4].tolist() == [10, 21, 12, 10]


def test_parts_of_copies(library):
    given = np.arange(1, 9, dtype=np.uint32) * 0x10001
    assert library.probe("parts of copies", given).tolist() == [0, 0, 0, 0, 0x10001, 2, 0, 0]


def test_copies_end_with_their_thread(library):
    library.probe("copy left behind", grid=(2, 1, 1))


def test_the_grid_is_covered(library):
    assert np.array_equal(
        library.probe("every place", words=2 * 3 * 5 * 64, grid=(2, 3, 5), threads=64), np.arange(1920)
    )


def test_order_is_random_by_seed(library):
    orders = []
    for seed in (0, 1, 0):
        library.emulate(seed=seed)
        found = library.probe("order of threads", words=513, grid=(8, 1, 1), threads=64)[1:]
        orders.append(found.reshape(8, 2, 32))
    assert np.array_equal(orders[0], orders[2])
    for order in orders:
        assert sorted(order.ravel()) == list(range(512))
        assert (np.diff(order // 32) == 0).all()
        assert (np.diff(order // 64, axis=1) == 0).all()
    # Lanes, warps and blocks each in another order.
    first, second = orders[:2]
    assert (first % 32 != second % 32).any(2).all()
    assert set(first[:, 0, 0] // 32 % 2) == {0, 1}
    assert (first[:, 0, 0] // 64 != second[:, 0, 0] // 64).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_ordered_is_no_race(library, seed):
    library.emulate(seed=seed)
    library.probe("barrier", threads=64)
    assert library.probe("exchange in a warp", words=32).tolist() == [i ^ 1 for i in range(32)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "name",
    [
        "read after write",
        "read after write in a warp",
        "shuffle between write and read",
        "mma between write and read",
        "ldmatrix after write in a warp",
        "write after ldmatrix in a warp",
        "write after read",
        "write after read in a warp",
        "copy seen by others",
    ],
)
def test_races_are_caught(library, name, seed):
    """Whichever of the two comes last: with the line of both."""
    library.emulate(seed=seed)
    with pytest.raises(RuntimeError, match=r"^probe_kernel: block \(0, 0, 0\), thread \d+: .*: race: ") as error:
        library.probe(name, threads=64)
    assert set(re.findall(r"[\w/]+\.cu:\d+", str(error.value))) == set(places(name).values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("write after write", r"thread (0|32): {here}: store_shared: race: .* was written by thread (0|32) in "),
        ("copy not waited for", r"thread 0: {here}: load_shared: race: .* is still being copied by .* \({there}\)"),
        ("copy not committed", r"thread 0: {here}: load_shared: race: .* is still being copied by .* \({there}\)"),
        ("copy of 17 bytes", r"{here}: cp_async_16: bytes: 0 to 16, got 17"),
        ("copy over the end", r"{here}: cp_async_16: out of bounds: reads 4 bytes that end 4 bytes past .* buffer 1 "),
        ("divergence", r"({here}: __shfl_sync|{there}: __syncwarp): divergence: .* in __s.* \(({there}|{here})\)"),
        ("divergence of lines", r"({here}|{there}): __syncwarp: divergence: .* in __syncwarp \(({there}|{here})\)"),
        ("a lane ended", r"deadlock: threads 3, 35 ended; 0-2, 4-34, 36-63 wait at __syncwarp \({here}\)$"),
        ("barrier not reached", r"deadlock: threads 32-39, 41-63 ended; 0-31, 40 wait at __syncthreads \({here}\)$"),
        ("two barriers", r"deadlock: threads 0-31 wait at .* \({there}\); 32-63 wait at __syncthreads \({here}\)$"),
        ("barrier against collective", r"; 0 wait at __syncthreads \({there}\); 1-31 wait at __syncwarp \({here}\)$"),
        ("part of a warp", r"{here}: __syncwarp: mask: all 32 lanes, got 65535$"),
        ("no such lane", r"{here}: __shfl_xor_sync: lane: 0 to 31, got \d+$"),
        ("misaligned global", r"{here}: load_global: misaligned: the address is 4 bytes past a multiple of 16$"),
        ("misaligned shared", r"{here}: load_shared: misaligned: the address is 8 bytes past a multiple of 16$"),
        ("misaligned copy", r"{here}: cp_async_16: misaligned: the address is 4 bytes past a multiple of 16$"),
        ("misaligned row", r"thread (9|41): {here}: ldmatrix_x4: misaligned: the address is 2 bytes past"),
        ("read-only", r"{here}: store_global: read-only: writes 4 bytes inside buffer 0 \(40 bytes, read-only\)$"),
        ("before a buffer", r"{here}: load_global: out of bounds: reads 4 bytes that begin 4 bytes before buffer 0 "),
        (
            "past a buffer",
            r"{here}: load_global: out of bounds: reads 2 bytes that end 2 bytes past the end of buffer ",
        ),
        (
            "over the end of a buffer",
            r"{here}: load_global: out of bounds: reads 16 bytes that end 8 bytes past the end ",
        ),
        ("past shared memory", r"{here}: store_shared: out of bounds: bytes 1024 to 1027 of 1024 bytes of shared"),
        ("before shared memory", r"{here}: load_shared: out of bounds: bytes -4 to -1 of 1024 bytes of shared memory$"),
    ],
)
def test_mistakes_are_caught(library, name, message):
    with pytest.raises(RuntimeError) as error:
        library.probe(name, threads=64)
    assert str(error.value).startswith("probe_kernel: block (0, 0, 0)")
    assert re.search(message.format(**places(name)), str(error.value)), str(error.value)
    # Nothing of it is left.
    assert library.probe("late copies", words=16)[:4].tolist() == [10, 21, 12, 10]


# ---- Launches and builds


def test_device(library):
    assert library.module.device() == (90, 4, 232448)
    library.emulate(86, 20, 101376)
    assert library.module.device() == (86, 20, 101376)
    library.probe("barrier", threads=64, shared=101376)
    with pytest.raises(RuntimeError, match=r"^probe_kernel: shared_bytes: 0 to the device's 101376, got 101392$"):
        library.probe("barrier", threads=64, shared=101392)


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ({"threads": 0}, "threads: a multiple of 32 up to 1024, got 0"),
        ({"threads": 48}, "threads: a multiple of 32 up to 1024, got 48"),
        ({"threads": 1056}, "threads: a multiple of 32 up to 1024, got 1056"),
        ({"shared": -16}, "shared_bytes: 0 to the device's 232448, got -16"),
        ({"grid": (1, 0, 1)}, r"grid: \(1, 1, 1\) to \(2147483647, 65535, 65535\), got \(1, 0, 1\)"),
        ({"grid": (1, 1, 65536)}, r"grid: \(1, 1, 1\) to \(2147483647, 65535, 65535\), got \(1, 1, 65536\)"),
    ],
)
def test_impossible_launches_are_refused(library, launch, message):
    with pytest.raises(RuntimeError, match=f"^probe_kernel: {message}$"):
        library.probe("barrier", **launch)


def test_fibers_without_assembly():
    library = Library(tests.module("tests_ucontext", emulator_defines=["PYFUSED_EMULATOR_UCONTEXT"]))
    a, b = matrices(65, 40, 100, torch.bfloat16)
    assert excess(library.gemm(a, b), a, b) < 16
    with pytest.raises(RuntimeError, match="race"):
        library.gemm(a, b, NO_BARRIER)


# A module by hand: pybind11's headers would take seconds.
ANSWER = f"""
#include <Python.h>
PyMODINIT_FUNC PyInit_{MODULE}() {{
  static PyModuleDef definition = {{PyModuleDef_HEAD_INIT, "{MODULE}"}};
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", ANSWER);
  return module;
}}
"""


def test_build(tmp_path, monkeypatch):
    monkeypatch.setattr("emulator.build.CACHE", tmp_path)
    monkeypatch.setattr("emulator.build.EMULATOR", ())
    source = tmp_path / "answer.cpp"
    source.write_text(ANSWER)
    with pytest.raises(RuntimeError, match=r"ANSWER.* was not declared"):
        build([source], "answer")
    libraries = [build([source], "answer", defines=[f"ANSWER={answer}"]) for answer in (41, 42, 41)]
    assert libraries[0] == libraries[2] != libraries[1]
    assert [load(path).answer for path in libraries] == [41, 42, 41]


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_a_tile_costs_what_it_costs_in_triton(module, capability):
    """One formula, whatever multiplies: the launchers' of csrc and that of kernels/lora_linear_config.py."""
    pytest.importorskip("triton")
    from pyfused.kernels.lora_linear_config import tile_cost

    products = module.products_of_mma_sync(capability)
    assert products in (512, 1024, 1270)
    for tiles, k, (block_m, block_n), narrow in itertools.product(
        (1, 99, 132, 133), (64, 768, 4096), ((128, 256), (128, 128), (64, 64)), (0, 16, 64)
    ):
        arguments = (tiles, 132, k, block_m, block_n, narrow, 2 * (block_m + block_n), products)
        assert module.gemm_cost(*arguments) == pytest.approx(tile_cost(*arguments), rel=1e-12), arguments
