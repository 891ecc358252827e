"""The audit's rules of how a launch fills a multiprocessor: each holds where it should, and is broken on purpose."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from pyfused.kernels import occupancy
from pyfused.kernels.occupancy import blocks_per_multiprocessor
from pyfused.kernels.recording import SHARED_MEMORY, Launch, Target

pytestmark = pytest.mark.host

H200 = Target((9, 0), 132, SHARED_MEMORY[9, 0])


def _launch(name, warps, stages, **arguments):
    sample = {"sample_ptr": None} if "adapter" in name else {}
    return Launch(SimpleNamespace(__name__=name), (1,), sample | arguments, warps, stages, None)


GEMM = _launch(
    "_lora_gemm_kernel", 8, 3, BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, BLOCK_R=16, n=4096, tiles_m=64, tiles_n=16,
    OWN_P=False, DROP_X=False, DROP_P=False,
)  # fmt: skip
ADAPTER = _launch("_adapter_fwd_kernel", 4, 4, BLOCK_M=64, BLOCK_C=64, BLOCK_H=64, DROP=False)
SUMS = _launch("_adapter_bwd_weights_kernel", 4, 2, BLOCK_M=64, BLOCK_C=64, BLOCK_H=64, a_ptr=object(), steps=5)
SHRINK = _launch("_lora_shrink_kernel", 8, 3, BLOCK_M=64, BLOCK_K=32, BLOCK_R=64, steps=64)


def _with(launch, **arguments):
    return dataclasses.replace(launch, arguments=launch.arguments | arguments)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "capability", "blocks"),
    [
        # 65536 registers hold 14 warps of 139, in 144 each: not two blocks of 8.
        (139, 94_000, 8, (9, 0), 1),
        (128, 94_000, 8, (9, 0), 2),
        # 228 KB in all: each block has 1 KB of the system's.
        (32, 75_776, 4, (9, 0), 3),
        (32, 75_777 + 1024, 4, (9, 0), 2),
        (32, 0, 4, (9, 0), 16),
        (32, 0, 4, (8, 6), 12),
        (16, 0, 1, (8, 6), 32),
    ],
)
def test_blocks_by_registers_memory_and_warps(registers, shared, warps, capability, blocks):
    target = Target(capability, 132, SHARED_MEMORY[capability])
    assert blocks_per_multiprocessor(registers, shared, warps, target) == blocks


@pytest.mark.parametrize(
    ("launch", "registers", "shared"),
    [(GEMM, 230, 155_648), (ADAPTER, 204, 65_536), (SUMS, 235, 41_984), (SHRINK, 42, 24_576)],
)
def test_what_fills_a_multiprocessor_has_no_fault(launch, registers, shared):
    assert occupancy.left_out(launch, H200) == ""
    assert occupancy.faults(launch, H200, registers, shared) == []


@pytest.mark.parametrize(
    ("launch", "registers", "shared", "fault"),
    [
        (_with(GEMM, BLOCK_N=128, tiles_n=32), 200, 131_072, "a tile asks the second-level cache for 64 bytes a cycle"),
        (_with(GEMM, BLOCK_M=64, BLOCK_N=128, tiles_m=128, tiles_n=32), 130, 84_000, "96 bytes a cycle"),
        # The kernel with tensor descriptors has no second accumulator.
        (
            dataclasses.replace(
                _with(GEMM, BLOCK_N=128, tiles_n=32, DROP_P=True), kernel=SimpleNamespace(__name__="_lora_tma_kernel")
            ),
            200,
            131_072,
            "64 bytes a cycle",
        ),
        # With columns of P beside its own the same tile asks for less: it makes more of what it has read.
        (_with(GEMM, BLOCK_N=128, tiles_n=32, OWN_P=True, BLOCK_R=64), 200, 131_072, "53 bytes a cycle"),
        (ADAPTER, 200, 131_072, "1 blocks per multiprocessor, 2 expected"),
        (ADAPTER, 200, 131_072, "24576 bytes under way on a multiprocessor, 32768 expected"),
        (dataclasses.replace(ADAPTER, num_stages=2), 200, 65_536, "16384 bytes under way"),
        (_with(SUMS, BLOCK_C=32), 200, 65_536, "16384 bytes under way"),
        (SHRINK, 130, 24_576, "1 blocks per multiprocessor, 2 expected"),
    ],
)
def test_a_launch_made_to_break_a_rule_is_found(launch, registers, shared, fault):
    assert any(fault in found for found in occupancy.faults(launch, H200, registers, shared))


@pytest.mark.parametrize(
    ("launch", "reason"),
    [
        (_with(GEMM, BLOCK_N=128, DROP_P=True), "accumulator"),
        (_with(GEMM, BLOCK_N=128, tiles_m=16, tiles_n=8), "idle"),
        (_with(GEMM, BLOCK_N=128, n=64, tiles_m=784, tiles_n=1), "columns empty"),
        (_with(ADAPTER, BLOCK_H=256), "weights"),
        (_with(ADAPTER, DROP=True), "mask"),
        (_with(ADAPTER, sample_ptr=object()), "samples"),
        (_with(SHRINK, BLOCK_R=256), "weights"),
    ],
)
def test_what_is_left_out_has_its_reason(launch, reason):
    assert reason in occupancy.left_out(launch, H200)
    found = occupancy.faults(launch, H200, 64, 16_384)
    assert found == []


def test_a_launch_that_is_left_out_still_leaves_room_for_a_second_block():
    found = occupancy.faults(_with(ADAPTER, DROP=True), H200, 255, 200_000)
    assert found == ["1 blocks per multiprocessor, 2 expected"]
