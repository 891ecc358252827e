"""The product that loads by tensor descriptors: its numbers in the interpreter, what it takes, and Triton's memory."""

from __future__ import annotations

import contextvars
import os
import threading

import pytest

triton = pytest.importorskip("triton")

import torch  # noqa: E402
from triton.runtime import _allocation  # noqa: E402

from pyfused.choice import costs  # noqa: E402
from pyfused.choice.costs import works  # noqa: E402
from pyfused.kernels import lora_linear, lora_linear_tma  # noqa: E402
from pyfused.kernels.launch import with_scratch  # noqa: E402
from pyfused.kernels.lora_linear_config import TMA_TILES, tma_config  # noqa: E402
from pyfused.kernels.recording import SHARED_MEMORY, Target, record  # noqa: E402
from pyfused.ops.lora_linear import sizes_of  # noqa: E402
from pyfused.portable import lora_linear as portable  # noqa: E402

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="about Triton's interpreter")
HOPPER = Target((9, 0), 132, SHARED_MEMORY[9, 0])
# Rows, K, N, R: tails of tiles of 32 in each, as many tiles as programs, and more than three times as many.
SHAPES = [(128, 32, 32, 16), (130, 96, 80, 8), (161, 40, 72, 3), (200, 72, 136, 40), (129, 64, 48, 64)]


def _case(shape, dtype, columns=False, seed=0):
    m, k, n, r = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator)

    weight = (draw(n, k) / k**0.5).to(dtype)
    if columns:
        weight = weight.t().contiguous().t()
    x, dy = draw(1, m, k).to(dtype), draw(1, m, n).to(dtype)
    return x, dy, weight, draw(r, k) / k**0.5, draw(n, r), draw(n).to(dtype)


def _both(home, x, dy, weight, lora_a, lora_b, bias, plan, p=0.0, mixed=()):
    """y, P and all gradients by an implementation; dropout by a seed."""
    seed = torch.tensor([7], device=x.device) if p else None
    y, saved = home.lora_linear_fwd(x, weight, lora_a, lora_b, bias, seed, 2.0, p, False, plan, True, *mixed)
    gradients = home.lora_linear_bwd(
        dy, x, weight, lora_a, lora_b, saved, seed, 2.0, p, False, plan, True, True, True, *mixed
    )
    return y, saved, *gradients


def _agree(made, case, dtype, p=0.0, mixed=()):
    wide = [None if tensor is None else tensor.double() for tensor in case]
    wanted = _both(portable, *wide, plan="blas", p=p, mixed=mixed)
    for name, one, other in zip(("y", "P", "dx", "dA", "dB"), made, wanted, strict=True):
        error = ((one.double() - other).norm() / other.norm()).item()
        assert error < 2 * torch.finfo(dtype).eps, name


@pytest.fixture
def tma_launches(monkeypatch):
    """Of each product that loads by descriptors whether it makes its own P, and whether it masks the term."""
    seen, make = [], lora_linear.tma_gemm
    monkeypatch.setattr(
        lora_linear,
        "tma_gemm",
        lambda *given, **settings: (
            seen.append((settings["own_p"], settings["drop_p"])),
            make(*given, **settings),
        )[1],
    )
    return seen


@interpreted
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("plan", ["one_launch", "shrink_expand"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_the_formula_in_float64(shape, dtype, plan, columns, tma_launches):
    case = _case(shape, dtype, columns)
    made = _both(lora_linear, *case, plan=plan)
    own = plan == "one_launch"
    # dx makes its own P of B, whose rows of 4 numbers descriptors do not take.
    assert tma_launches == [(own, False)] * (1 if own and shape[3] < 8 else 2)
    _agree(made, case, dtype)


@interpreted
@pytest.mark.parametrize("plan", ["one_launch", "shrink_expand"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_masked_term_is_masked_as_the_portable_backend_has_it(shape, plan, tma_launches):
    case = _case(shape, torch.bfloat16)
    made = _both(lora_linear, *case, plan=plan, p=0.4)
    own = plan == "one_launch"
    assert tma_launches[-1:] == ([] if own and shape[3] < 8 else [(own, True)])
    _agree(made, case, torch.bfloat16, p=0.4)


@interpreted
def test_without_a_bias(tma_launches):
    *case, _ = _case(SHAPES[1], torch.float16)
    made = _both(lora_linear, *case, None, plan="shrink_expand")
    assert len(tma_launches) == 2
    _agree(made, [*case, None], torch.float16)


@interpreted
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_each_row_of_a_mixed_batch_has_its_adapter(p, tma_launches):
    case = _case((130, 64, 72, 16), torch.bfloat16)
    mixed = torch.arange(130) % 3 - 1, 2
    made = _both(lora_linear, *case, plan="one_launch", p=p, mixed=mixed)
    assert tma_launches
    _agree(made, case, torch.bfloat16, p, mixed)


@interpreted
def test_rows_that_lie_apart_and_images_in_rows(tma_launches):
    x, dy, *others = _case((260, 64, 48, 16), torch.bfloat16)
    apart = torch.empty(1, 260, 96, dtype=torch.bfloat16)[:, :, 16:80].copy_(x)
    for rows, given in (
        (apart, dy),
        (x.view(2, 130, 64), dy.view(2, 130, 48)),
        (x.view(260, 1, 64), dy.view(260, 1, 48)),
    ):
        tma_launches.clear()
        made = _both(lora_linear, rows, given, *others, plan="one_launch")
        assert len(tma_launches) == 2
        flat = [made[0].reshape(1, 260, -1), made[1], made[2].reshape(1, 260, -1), *made[3:]]
        _agree(flat, [x, dy, *others], torch.bfloat16)


def _tensor(*size):
    return torch.empty(size, dtype=torch.bfloat16)


def _unfit():
    """(what is wrong, the arguments of `tma_fits`)."""
    x, y, weight, a = _tensor(1, 256, 64), _tensor(1, 256, 48), _tensor(48, 64), _tensor(8, 64)
    short, channels = _tensor(1, 256, 60), _tensor(1, 64, 256).transpose(1, 2)
    return [
        ("", (x, weight, y, a, 8)),
        ("", (x, weight, y, None, 64)),
        ("an address", (_tensor(1, 256, 72)[:, :, 1:65], weight, y, a, 8)),
        ("rows apart", (_tensor(1, 256, 68)[:, :, :64], weight, y, a, 8)),
        ("K", (short, _tensor(48, 60), y, _tensor(8, 60), 8)),
        ("N", (x, weight[:44], _tensor(1, 256, 44), a, 8)),
        ("every other column", (_tensor(1, 256, 128)[:, :, ::2], weight, y, a, 8)),
        ("half of each image", (_tensor(2, 256, 64)[:, :128], weight, y.view(2, 128, 48), a, 8)),
        ("channels first", (channels, weight, y, a, 8)),
        ("repeated rows", (x[:, :1].expand(1, 256, 64), weight, y, a, 8)),
        ("W in steps", (x, _tensor(48, 128)[:, ::2], y, a, 8)),
        ("dtypes", (x, weight.half(), y, a, 8)),
        ("float32", (x.float(), weight.float(), y.float(), a.float(), 8)),
        ("few rows", (x[:, :127], weight, y[:, :127], a, 8)),
        ("A", (x, weight, y, _tensor(64, 4), 4)),
        ("the rank", (x, weight, y, None, 65)),
        ("one number a row", (_tensor(1, 256, 8)[:, :, :1], _tensor(8, 48).t()[:, :1], y, None, 8)),
    ]


@interpreted
@pytest.mark.parametrize(("rows", "fits"), [(2**31 - 2**8, True), (2**31 - 2**8 + 1, False)])
def test_offsets_behind_the_last_row_have_32_bits(rows, fits):
    x, y, weight = (
        torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((1, rows, 8), (1, rows, 8), (8, 8))
    )
    assert lora_linear_tma.tma_fits(x, weight, y, None, 8) is fits


@interpreted
@pytest.mark.parametrize(("wrong", "given"), _unfit(), ids=lambda value: value if isinstance(value, str) else "")
def test_what_descriptors_do_not_take_is_left_to_pointers(wrong, given):
    assert lora_linear_tma.tma_fits(*given) is not bool(wrong)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_which_gpus_have_it(capability):
    sizes = (1, 256, 64), (1, 256, 64), (64, 64), (8, 64), (64, 8), (64,)
    with record(Target(capability, 100, SHARED_MEMORY[capability])) as launches:
        _both(lora_linear, *(_tensor(*size).to("meta") for size in sizes), plan="one_launch")
    found = [
        name for launch in launches if (name := launch.kernel.__name__) in ("_lora_gemm_kernel", "_lora_tma_kernel")
    ]
    assert found == ["_lora_tma_kernel" if capability in ((9, 0), (10, 0)) else "_lora_gemm_kernel"] * 2


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("plan", ["one_launch", "shrink_expand"])
@pytest.mark.parametrize("rank", [4, 8, 12, 64, 65])
@pytest.mark.parametrize(("m", "k", "n"), [(128, 64, 64), (127, 64, 64), (128, 60, 64), (128, 64, 60)])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_the_choice_by_times_knows_where_it_serves(capability, k, n, rank, m, plan, p):
    """The work of the plans names the kernel that the launcher starts."""
    if plan == "one_launch" and rank > 64:
        pytest.skip("the operator refuses it")
    case = [_tensor(*size).to("meta") for size in ((1, m, k), (1, m, n), (n, k), (rank, k), (n, rank), (n,))]
    with record(Target(capability, 100, SHARED_MEMORY[capability])) as launches:
        _both(lora_linear, *case, plan=plan, p=p)
    started = [
        name for launch in launches if (name := launch.kernel.__name__) in ("_lora_gemm_kernel", "_lora_tma_kernel")
    ]
    sizes = sizes_of(m, case[2], case[3], case[4], p, True)
    _, plans = works("lora_linear", capability, 2, sizes)
    wanted = [
        "_lora_tma_kernel" if work.kernel == "triton gemm, tma" else "_lora_gemm_kernel"
        for work in plans["triton", plan]
    ]
    if rank in (4, 12):
        # Of these it expects less: forward is the one that loads by descriptors.
        assert set(wanted) == {"_lora_gemm_kernel"}
    else:
        assert started == wanted


def test_the_choice_by_times_counts_the_tiles_that_there_are():
    sides = {major: tuple((tile.block_m, tile.block_n) for tile in tiles) for major, tiles in TMA_TILES.items()}
    assert sides == costs._TMA_TILES


@pytest.mark.parametrize("rank", [16, 32, 64])
def test_the_choice_by_times_counts_narrower_tiles_where_the_launcher_takes_them(rank):
    """Of dx, where a mask does not fit beside P that the tile makes."""

    def own(p: float) -> float:
        sizes = {
            "M": 8192, "N": 4096, "K": 4096, "R": rank, "dropout_p": p, "weight_bytes": 2, "adapter_bytes": 2, "tma": 1,
        }  # fmt: skip
        return works("lora_linear", (9, 0), 2, sizes)[1]["triton", "one_launch"][1].own

    def columns(drop_p: bool) -> int:
        return tma_config(1, 8192, 4096, 4096, rank, torch.bfloat16, HOPPER, own_p=True, drop_p=drop_p).block_n

    assert (own(0.1) > own(0.0)) == (columns(True) < columns(False)) == (rank == 64)


@pytest.mark.parametrize("drop_p", [False, True])
@pytest.mark.parametrize("own_p", [False, True])
@pytest.mark.parametrize("rank", [1, 16, 17, 64])
@pytest.mark.parametrize("major", TMA_TILES)
def test_stages_fit_into_shared_memory(major, rank, own_p, drop_p):
    there = Target((major, 0), 132, SHARED_MEMORY[major, 0])
    tile = tma_config(1, 8192, 4096, 4096, rank, torch.bfloat16, there, own_p=own_p, drop_p=drop_p)
    padded = max(16, triton.next_power_of_2(rank))
    stage = (tile.block_m + tile.block_n + padded * own_p) * tile.block_k
    at_the_end = tile.block_m * tile.block_n // (4 if drop_p else 1)
    assert tile.num_stages >= 2
    assert 2 * (stage * tile.num_stages + at_the_end) < there.shared_memory


def test_wide_tiles_where_they_fill_the_gpu_and_small_ones_where_not():
    def tile(m, n, k):
        found = tma_config(1, m, n, k, 16, torch.bfloat16, HOPPER, own_p=False, drop_p=False)
        return found.block_m, found.block_n

    assert tile(8192, 4096, 4096) == (128, 256)
    assert tile(200, 768, 768) == (64, 128)


@pytest.mark.parametrize(("rank", "drop_p", "block_n"), [(32, True, 256), (64, False, 256), (64, True, 128)])
def test_p_of_64_columns_and_a_masked_term_do_not_fit_beside_the_widest_sum(rank, drop_p, block_n):
    found = tma_config(1, 8192, 4096, 4096, rank, torch.bfloat16, HOPPER, own_p=True, drop_p=drop_p)
    assert (found.block_m, found.block_n) == (128, block_n)


class _Memory:
    def __init__(self):
        self.asked = []

    def __call__(self, size, alignment, stream):
        self.asked.append(size)
        return torch.empty(size, dtype=torch.int8)


def _needs_scratch(found):
    found.append(_allocation._allocator.get()(384, 128, None))


def test_a_thread_that_has_no_allocator_gets_memory_where_the_tensors_are():
    found: list = []
    thread = threading.Thread(target=with_scratch, args=(torch.device("meta"), _needs_scratch, found))
    thread.start()
    thread.join()
    assert [(memory.device.type, memory.nbytes) for memory in found] == [("meta", 384)]


def test_the_users_allocator_stays():
    def inside():
        mine, found = _Memory(), []
        triton.set_allocator(mine)
        with_scratch(torch.device("cpu"), _needs_scratch, found)
        assert not mine.asked
        assert _allocation._allocator.get() is mine
        return found

    assert contextvars.copy_context().run(inside)


def test_an_error_of_the_launch_is_the_callers():
    def broken():
        raise RuntimeError("no driver")

    before = _allocation._allocator.get()
    with pytest.raises(RuntimeError, match="no driver"):
        with_scratch(torch.device("cpu"), broken)
    assert _allocation._allocator.get() is before
