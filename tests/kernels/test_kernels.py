"""What the kernels stand on: the mended interpreter, the pure functions of configuration, and the audit itself."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import pyfused  # noqa: E402
from pyfused import reference  # noqa: E402
from pyfused.kernels import (  # noqa: E402
    adapter_residual,
    audit,
    bottleneck_config,
    cross_attention_residual,
    lora_linear,
    projection_residual,
)
from pyfused.kernels import lora_linear_config as plan  # noqa: E402
from pyfused.kernels.launch import Mat, block_width, mat, offset_type, row_length, target  # noqa: E402
from pyfused.kernels.recording import (  # noqa: E402
    INTERPRETER,
    SHARED_MEMORY,
    Target,
    like_sizes,
    record,
    suits_best,
)
from pyfused.ops.adapter_residual import MAX_KERNEL_HIDDEN  # noqa: E402
from pyfused.ops.lora_linear import MAX_RANK_ONE_LAUNCH  # noqa: E402

TARGETS = [Target(capability, 100, limit) for capability, limit in SHARED_MEMORY.items()]
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="about Triton's interpreter")


def _bfloat16_bits(values: torch.Tensor):
    from pyfused.kernels import interpreter

    return torch.from_numpy(interpreter._to_bfloat16_bits(values.numpy()).astype("int32")).to(torch.uint16)


@interpreted
def test_interpreter_rounds_to_nearest_even():
    # Halfway cases on both sides of an even number, neighbours of infinity, subnormals and random numbers.
    halfway = torch.tensor([0x3F808000, 0x3F818000, 0x3F80FFFF, 0x7F7FFFFF, 0x00008001], dtype=torch.int32)
    values = torch.cat([halfway.view(torch.float32), -torch.tensor([1e-40]), torch.randn(1000)])
    expected = values.to(torch.bfloat16).view(torch.uint16)
    assert torch.equal(_bfloat16_bits(values), expected)


@interpreted
def test_interpreter_keeps_nan_and_infinity():
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7F800000, -0x800000], dtype=torch.int32)
    values = _bfloat16_bits(bits.view(torch.float32)).view(torch.bfloat16)
    assert values[:3].isnan().all()
    assert values[3:].tolist() == [float("inf"), -float("inf")]


@pytest.mark.parametrize("device", TARGETS, ids=lambda device: f"sm_{device.capability[0]}{device.capability[1]}")
def test_configurations_fit_every_target(device):
    sizes = itertools.product((1, 50, 6304, 8192), (1, 76, 768, 14336), (1, 16, 33, 64, 100, 256))
    for (length, n, rank), dtype in itertools.product(sizes, (torch.bfloat16, torch.float16, torch.float32)):
        for own_p, drop in ((False, False), (False, True), (True, False), (True, True)):
            if own_p and rank > MAX_RANK_ONE_LAUNCH:
                continue
            tile = plan.gemm_config(
                1, length, n, 768, rank, dtype, device,
                vectorised=n != 76, own_p=own_p, drop_x=drop and own_p, drop_p=drop,
            )  # fmt: skip
            row = tile.block_m + tile.block_n + (block_width(rank) if own_p else 0)
            assert row * dtype.itemsize * tile.block_k * tile.num_stages <= device.shared_memory
        shrink = plan.shrink_config(1, length, n, rank, dtype, device)
        wgrad = plan.wgrad_config(1, length, n, rank, dtype, device, vectorised=True)
        assert shrink.splits >= 1
        assert 1 <= wgrad.splits <= max(1, -(-length // wgrad.block_m))


def test_a_tile_costs_its_products_its_operands_and_what_stands_beside_the_loop():
    # 7 tiles on 4 multiprocessors: two, one after another. 128x256 with 16 columns of P, 2048 products a cycle.
    products = 128 * (256 + 16)
    assert plan.tile_cost(7, 4, 640, 128, 256, 16, 0, 2048) == 2 * (640 * products + 2048 * 4000)
    # 44 bytes a cycle: what 64x64 reads for each of k takes 2048 / 44 * 256, its products 64 * 64.
    assert plan.tile_cost(1, 4, 640, 64, 64, 0, 256, 2048) == pytest.approx(640 * 2048 / 44 * 256 + 2048 * 4000)
    assert plan.tile_cost(8, 4, 640, 64, 64, 0, 0, 512) == plan.tile_cost(5, 4, 640, 64, 64, 0, 0, 512)


@pytest.mark.parametrize(
    ("m", "k", "n"), [(6304, 768, 3072), (6304, 3072, 768), (2740, 1024, 1024), (8192, 4096, 4096)]
)
@pytest.mark.parametrize("own_p", [False, True])
def test_on_hopper_tiles_are_those_that_the_cache_can_feed(m, k, n, own_p):
    (hopper,) = (target for target in TARGETS if target.capability == (9, 0))

    def tile(**changes):
        sizes = {"length": m, "n": n, "k": k} | changes
        return plan.gemm_config(
            1, sizes["length"], sizes["n"], sizes["k"], 16, torch.bfloat16, hopper,
            vectorised=True, own_p=own_p, drop_x=False, drop_p=False,
        )  # fmt: skip

    assert (tile().block_m, tile().block_n) == (128, 256)
    assert tile(length=50, n=768) == tile(length=33, n=768)
    assert tile(length=50, n=768).block_m == 64, "few rows are spread over the multiprocessors"


def test_columns_of_p_count_in_a_tile():
    """A wide tile and a narrow one are near each other on an A100; 16 columns more, twice as often, decide."""
    (a100,) = (target for target in TARGETS if target.capability == (8, 0))

    def rows_of_a_tile(own_p):
        return plan.gemm_config(
            1, 6304, 768, 3072, 16, torch.bfloat16, a100,
            vectorised=True, own_p=own_p, drop_x=False, drop_p=False,
        ).block_m  # fmt: skip

    assert (rows_of_a_tile(False), rows_of_a_tile(True)) == (128, 64)


def test_a_longer_sum_wants_fuller_waves():
    """Two full tiles or three halves: what a tile takes beside its loop counts less in a longer sum."""

    def halves_win(k):
        whole = plan.tile_cost(200, 132, k, 128, 128, 0, 512, 512)
        return plan.tile_cost(390, 132, k, 64, 128, 0, 384, 512) < whole

    assert [halves_win(k) for k in (64, 192, 320, 4096)] == [False, False, True, True]


def test_padded_ranks():
    padded = {1: 16, 16: 16, 17: 32, 64: 64, 100: 128, 256: 256}
    assert {rank: block_width(rank) for rank in padded} == padded


def test_offsets_are_64_bit_only_where_they_must_be():
    small = torch.empty((1, 1 << 15, 1 << 15), device="meta")
    large = torch.empty((1, 1 << 16, 1 << 15), device="meta")
    assert str(offset_type(small)) == "int32"
    assert str(offset_type(small, large)) == "int32", "the last offset is 2^31 - 1"
    assert str(offset_type(torch.empty((1, (1 << 16) + 1, 1 << 15), device="meta"))) == "int64"
    assert str(offset_type(torch.empty_strided((2, 3), (1 << 31, 1), device="meta"))) == "int64"


def test_a_sum_of_one_part_is_no_launch_of_its_own():
    with record(TARGETS[0]) as launches:
        audit._lora_linear_call(1, 40, 64, 64, 16, torch.bfloat16, 0.1, "shrink_expand", False)()
        few = [launch.kernel.__name__ for launch in launches]
        audit._lora_linear_call(1, 2740, 768, 768, 16, torch.bfloat16, 0.1, "shrink_expand", False)()
    assert "_sum_partials_kernel" not in few
    assert "_sum_partials_kernel" in [launch.kernel.__name__ for launch in launches[len(few) :]]


def test_recording_replaces_the_target_and_ends():
    device = torch.device("cpu")
    with record(TARGETS[0]) as launches:
        assert target(device) == TARGETS[0]
        with pytest.raises(RuntimeError, match="does not nest"), record(TARGETS[0]):
            pass
    assert launches == []
    assert target(device) == INTERPRETER


@pytest.fixture(scope="module")
def compiled() -> dict:
    """What `compiled.py` prints: one process for all, as most of its time is the import of torch."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compiled.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_audit_reports_spills_and_shared_memory(compiled):
    faults = " ".join(compiled["too large"])
    assert "spills" in faults
    assert "shared memory" in faults


def test_audit_passes_a_sound_configuration(compiled):
    assert compiled["sound"] == []


def test_audit_finds_products_that_wait_for_each_other(compiled):
    waiting, overlapping = compiled["one by one"]
    assert waiting == "16 products wait for each other, one by one"
    assert overlapping == ""
    unstaged, staged = compiled["in step"]
    assert unstaged[0] == "the loop waits for its own products"
    assert staged == []
    assert compiled["timed"] == [], "what is to be timed is judged by the clock"


def test_audit_finds_tiles_that_the_cache_cannot_feed(compiled):
    assert compiled["starved"] == ["a tile asks the second-level cache for 64 bytes a cycle, 50 allowed"]


def test_what_other_threads_read_waits_at_a_barrier(compiled):
    """The interpreter runs a program in one thread, and misses none."""
    assert compiled["barriers"] == {
        # h before it is read, and read before dh takes its place.
        "_adapter_bwd_rows_kernel": 0,
        "_adapter_bwd_rows_kernel again": 2,
        "_cross_attention_bwd_rows_kernel": 0,
        "_cross_attention_bwd_rows_kernel again": 1,
        # Two arrivals, and sums before they are read: `sums_slots`.
        "_adapter_bwd_weights_kernel": 3,
        "_cross_attention_bwd_weights_kernel": 3,
    }


def test_audit_finds_steps_that_wait_for_their_operands(compiled):
    sound, converted, longer, by_pointers = compiled["steps"]
    assert sound == []
    assert converted == ["the loop waits for its own products", "the loop has STS"]
    assert len(longer) == 1
    assert longer[0].endswith(" instructions, 20 allowed")
    assert by_pointers == [
        "the loop has LDGSTS", "the loop has MEMBAR", "the loop has no UTMALDG", "nothing has UTMASTG",
    ]  # fmt: skip


def test_audit_finds_instructions_narrower_than_their_tiles(compiled):
    """Two warpgroups share the columns: of 64 channels each has 32, of 32 channels 16."""
    cut, whole = compiled["narrow"]
    assert cut.endswith("products have 16 columns, 32 or more expected")
    assert whole == ""


def test_audit_takes_one_of_two_targets_whose_code_is_alike(compiled):
    both, alone, unlike = compiled["audited"]
    assert both == [[8, 6]] * len(alone)
    assert alone == [[8, 9]] * len(alone) != []
    assert unlike == [[8, 0]] * len(alone) + [[8, 6]] * len(alone)


@pytest.mark.parametrize("device", TARGETS, ids=lambda device: f"sm_{device.capability[0]}{device.capability[1]}")
def test_bottleneck_configurations_fit_every_target(device):
    sizes = itertools.product(((1, 1), (1, 6304), (64, 49), (32, 3136)), (1, 76, 768, 4096), (1, 16, 33, 128, 256, 512))
    for ((batch, length), channels, width), dtype in itertools.product(sizes, (torch.bfloat16, torch.float32)):
        if width > MAX_KERNEL_HIDDEN[dtype.itemsize]:
            continue
        for vectorised, beside in itertools.product((False, True), range(4)):
            options = {"vectorised": vectorised, "beside": beside}
            size = batch, length, channels, width, dtype, device
            rows = bottleneck_config.rows_config(*size, **options)
            padded = block_width(width)
            stage = rows.block_c * (rows.block_m + padded) * dtype.itemsize
            assert rows.num_stages * stage <= device.shared_memory
            # The accumulator of the narrow product leaves half of a thread's registers to the rest.
            assert rows.block_m * padded <= 64 * 32 * rows.num_warps
            for groups in {1, batch}:
                sums = bottleneck_config.weights_config(*size, **options, groups=groups)
                assert 1 <= sums.splits <= batch // groups * -(-length // sums.block_m)
                assert sums.block_h <= padded


def _launches(call):
    """Launches of a forward and of a backward on meta tensors."""
    with record(Target((9, 0), 132, SHARED_MEMORY[9, 0])) as launches:
        call()
    return [launch.kernel.__name__ for launch in launches]


@pytest.mark.parametrize("options", [{}, {"save": False}, {"p": 0.1}], ids=str)
def test_one_launch_forward_and_two_backward(options):
    """And one before each that converts weights, or multiplies them by gamma."""
    shape, (fwd, *bwd) = (1, 6304, 768), (f"_adapter_{name}_kernel" for name in ("fwd", "bwd_rows", "bwd_weights"))
    for dtype, before in ((torch.float32, ["_prepare_kernel"]), (torch.bfloat16, [])):
        adapter = audit._adapter_residual_call(shape, 64, torch.bfloat16, weight_dtype=dtype, **options)
        assert _launches(adapter) == [*before, fwd, "_prepare_kernel", *bwd]
    for norm_match in (False, True):
        attention = audit._cross_attention_residual_call(
            (16, 1370, 1024), 16, 2, torch.bfloat16, norm_match=norm_match, **options
        )
        names = ("fwd", "bwd_rows", "bwd_weights")
        assert _launches(attention) == [f"_cross_attention_{name}_kernel" for name in names]


def test_projection_takes_a_second_launch_for_norms_alone():
    size = 2740, 768, 1024, torch.bfloat16
    assert _launches(audit._projection_residual_call(*size)) == ["_projection_fwd_kernel"]
    matched = _launches(audit._projection_residual_call(*size, norm_match=True))
    assert matched == [f"_projection_{name}_kernel" for name in ("fwd", "match", "bwd")]


def test_sizes_between_two_powers_of_two_share_a_configuration():
    assert like_sizes(1, 1) == [(1, 1)]
    assert like_sizes(1, 2) == [(1, 2)]
    assert like_sizes(1, 1379) == like_sizes(1, 2048) == [(1, 1024 + 128 * part) for part in range(1, 9)]
    assert like_sizes(1, 2049)[0] == (1, 2048 + 256)
    assert like_sizes(7, 49) == like_sizes(8, 49) == [(5, 49), (6, 49), (7, 49), (8, 49)]
    # The cheapest everywhere but at one size, where it costs four times the other, is not the best of all.
    costs = {"steep": lambda length: 1.0 if length < 1900 else 12.0, "flat": lambda length: 2.0}
    assert suits_best(["flat", "steep"], lambda name, batch, length: costs[name](length), 1, 1500) == "flat"
    assert suits_best(["flat", "steep"], lambda name, batch, length: costs[name](length), 1, 700) == "steep"


def _rows(batch, length, channels, side_by_side):
    shape = (batch, channels, length) if side_by_side else (batch, length, channels)
    made = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    return made.transpose(1, 2) if side_by_side else made


def _layouts(length):
    """(label, launches) of calls whose rows lie in memory in every combination of ways."""
    tensor = functools.partial(torch.empty, device="meta")
    seed = tensor(1, dtype=torch.int64)
    for batch, first, second, third in itertools.product((1, 8), *[(False, True)] * 3):
        x, y, dy = (_rows(batch, length, 64, order) for order in (first, second, third))
        label = f"{batch}, {first}, {second}, {third}"
        weights = tensor(16, 64), tensor(16), tensor(64, 16), tensor(64)
        for save, needed in itertools.product((False, True), (False, True)):
            with record(Target((9, 0), 132, SHARED_MEMORY[9, 0])) as launches:
                _, h = adapter_residual.adapter_residual_fwd(
                    x, *weights, y, None, None, None, 1.0, "gelu", 0.0, second, first, save
                )
                adapter_residual.adapter_residual_bwd(
                    dy, x, *weights, None, None, h if save else None, None, 1.0, "gelu", 0.0, first, False, needed,
                    needed, True,
                )  # fmt: skip
                for plan_name in ("one_launch", "shrink_expand"):
                    parameters = tensor(64, 64, dtype=torch.bfloat16), tensor(16, 64), tensor(64, 16)
                    _, p = lora_linear.lora_linear_fwd(x, *parameters, None, seed, 1.0, 0.1, second, plan_name, True)
                    lora_linear.lora_linear_bwd(
                        dy, x, *parameters, p, seed, 1.0, 0.1, first, plan_name, needed, True, True
                    )
                core = (
                    tensor(batch, 4, 2, 64, dtype=torch.bfloat16),
                    None,
                    tensor(batch, 4, 2, 64, dtype=torch.bfloat16),
                )
                settings = 0.1, save, 1e-6, 0.0
                _, kept = cross_attention_residual.cross_attention_residual_fwd(
                    x, *core, None, None, None, *settings, save
                )
                cross_attention_residual.cross_attention_residual_bwd(
                    dy, x, *core, None, None, kept if save else None, None, *settings, needed, needed, True
                )
                blend = tensor(64, 64, dtype=torch.bfloat16), None
                _, pre = projection_residual.projection_residual_fwd(
                    x, *blend, y, None, 0.1, 0.9, "identity", save, 1e-6, save
                )
                projection_residual.projection_residual_bwd(
                    dy, x, *blend, y if save else None, None, pre if save else None, 0.1, 0.9, "identity", save, 1e-6,
                    True, True, save, False,
                )  # fmt: skip
            yield from ((f"{label}: {launch.kernel.__name__}", launch) for launch in launches)


@pytest.mark.parametrize("length", [48, 49])
def test_kernels_are_told_a_length_where_positions_lie_side_by_side(length):
    told = set()
    for label, launch in _layouts(length):
        if "LENGTH_MULTIPLE_OF" in launch.arguments:
            rows = (value for value in launch.arguments.values() if isinstance(value, Mat) and value.ptr.dim() == 3)
            along = [value.strides[1] for value in rows]
            wanted = 16 if 1 in along and length % 16 == 0 else 1
            assert launch.arguments["LENGTH_MULTIPLE_OF"] == wanted, label
            told.add(launch.kernel.__name__)
    assert told == {name for name in told if name.endswith("_kernel")}
    assert len(told) >= 10


def test_what_a_kernel_is_told_of_a_length():
    rows, images = torch.empty(2, 48, 8), torch.empty(2, 8, 48).transpose(1, 2)
    assert row_length(48, rows, None) == {"length": 48, "LENGTH_MULTIPLE_OF": 1}
    assert row_length(48, rows, images) == {"length": 48, "LENGTH_MULTIPLE_OF": 16}
    assert row_length(49, torch.empty(2, 8, 49).transpose(1, 2)) == {"length": 49, "LENGTH_MULTIPLE_OF": 1}
    # The stride of a dimension with one element may be any number.
    odd = torch.empty(77).as_strided((1, 3, 16), (77, 16, 1))
    assert mat(odd).strides == (0, 16, 1)
    assert mat(None) is None


def _in_splits(monkeypatch, module, splits):
    """So many slots for the sums over rows, of which two are added up at a time."""
    monkeypatch.setattr(module, "SLOTS_PER_GROUP", 2)
    config = bottleneck_config.WeightsConfig(32, 32, 32, splits, num_warps=4, num_stages=1)
    monkeypatch.setattr(module, "weights_config", lambda *args, **kwargs: config)


def _assert_exact(function, oracle, tensors, dy, **options):
    """The gradients of all tensors, for the cotangent dy, against float64."""

    def gradients(function, dtype, **options):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        return torch.autograd.grad(function(leaves, **options), leaves, dy.to(dtype))

    ours, exact = gradients(function, torch.float32, **options), gradients(oracle, torch.float64)
    for value, expected in zip(ours, exact, strict=True):
        assert (value - expected).norm() < 1e-5 * expected.norm()


@interpreted
def test_sums_over_more_splits_than_one_group(monkeypatch):
    splits = 5
    _in_splits(monkeypatch, adapter_residual, splits)
    torch.manual_seed(0)
    z, dy = torch.randn(2, splits * 32 - 7, 40).unbind()
    # The width takes two tiles: two programs leave their parts in each slot.
    parameters = [torch.randn(size) / 6 for size in ((35, 40), (35,), (40, 35), (40,), (40,))]

    def call(function):
        return lambda leaves, **options: function(*leaves[:5], layer_scale=leaves[5], **options)

    ours, exact = call(pyfused.adapter_residual), call(reference.adapter_residual)
    _assert_exact(ours, exact, (z, *parameters), dy, backend="triton")


@interpreted
@pytest.mark.parametrize("contexts", [1, 2])
def test_sums_of_each_context_over_more_splits_than_one_group(monkeypatch, contexts):
    splits, heads, tokens = 5, 5, 6
    _in_splits(monkeypatch, cross_attention_residual, splits)
    torch.manual_seed(0)
    x, dy = torch.randn(2, 2, splits * 32 // (3 - contexts) - 7, 40).unbind()
    # 8 x 8 columns with the padding: two programs leave their parts in each slot.
    context = torch.randn(contexts, tokens, 20)
    weights = [torch.randn(size) / 5 for size in ((heads * 4, 40), (heads * 4, 20), (heads * 4, 20), (40, heads * 4))]

    def call(function):
        def run(leaves, **options):
            x, context, q, k, v, out = leaves
            return function(x, context, q, None, k, None, v, None, out, None, num_heads=heads, weight=1.0, **options)

        return run

    ours, exact = call(pyfused.cross_attention_residual), call(reference.cross_attention_residual)
    _assert_exact(ours, exact, (x, context, *weights), dy, backend="triton", plan="absorbed")


def test_a_length_that_16_divides_and_a_rank_that_4_does_make_vectors(compiled):
    """Of images whose positions lie side by side, and of P's rows."""
    # Of the kernel with tensor descriptors it is P and B alone: rows of 4 numbers.
    for ptx, widest in zip(compiled["vectors"], ("v4", "v4", "v2"), strict=True):
        assert ptx.count(".visible .entry") == 1
        assert f"global.{widest}.b32" in ptx
        # Single elements of 16 bits.
        assert not re.findall(r"\b(?:ld|st)\.global[\w.:]*\.b16", ptx)


def test_relu_keeps_nan_on_a_gpu(compiled):
    """The machine's maximum makes 0 of it; the interpreter, which would not, cannot show that."""
    assert "mma" in compiled["relu"]
    assert not re.search(r"\bmax\.(?!NaN)[.\w]*f32", compiled["relu"])
