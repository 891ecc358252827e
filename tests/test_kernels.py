"""What the kernels stand on: the mended interpreter, the pure functions of configuration, and the audit itself."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")

from pyfused.kernels import lora_linear_plan as plan  # noqa: E402
from pyfused.kernels.launch import INTERPRETER, SHARED_MEMORY, Target, offset_type, record, target  # noqa: E402

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
            if own_p and rank > plan.ONE_LAUNCH_MAX_RANK:
                continue
            tile = plan.gemm_config(
                1, length, n, rank, dtype, device,
                weight_bytes=4, vectorised=n != 76, own_p=own_p, drop_x=drop and own_p, drop_p=drop,
            )  # fmt: skip
            row = tile.block_m * dtype.itemsize + 4 * (tile.block_n + (plan.block_rank(rank) if own_p else 0))
            assert row * tile.block_k * tile.num_stages <= device.shared_memory
        shrink = plan.shrink_config(1, length, n, rank, dtype, device)
        wgrad = plan.wgrad_config(1, length, n, rank, dtype, device, vectorised=True)
        assert shrink.splits >= 1
        assert 1 <= wgrad.splits <= max(1, -(-length // wgrad.block_m))


def test_padded_ranks():
    padded = {1: 16, 16: 16, 17: 32, 64: 64, 100: 128, 256: 256}
    assert {rank: plan.block_rank(rank) for rank in padded} == padded


@pytest.mark.parametrize(
    ("n", "rank", "p", "dtype", "expected"),
    [
        (768, 16, 0.0, torch.bfloat16, "one_launch"),
        (14336, 16, 0.0, torch.bfloat16, "shrink_expand"),
        (768, 16, 0.1, torch.bfloat16, "shrink_expand"),
        (768, 100, 0.0, torch.bfloat16, "shrink_expand"),
        (768, 16, 0.0, torch.float32, "blas"),
    ],
)
def test_plan_for_a_gpu(n, rank, p, dtype, expected):
    chosen, reason = plan.choose_plan(6304, n, 768, rank, p, dtype, TARGETS[3])
    assert chosen == expected
    assert reason


def test_offsets_are_64_bit_only_where_they_must_be():
    small = torch.empty((1, 1 << 15, 1 << 15), device="meta")
    large = torch.empty((1, 1 << 16, 1 << 15), device="meta")
    assert str(offset_type(small)) == "int32"
    assert str(offset_type(small, large)) == "int32", "the last offset is 2^31 - 1"
    assert str(offset_type(torch.empty((1, (1 << 16) + 1, 1 << 15), device="meta"))) == "int64"
    assert str(offset_type(torch.empty_strided((2, 3), (1 << 31, 1), device="meta"))) == "int64"


def test_recording_replaces_the_target_and_ends():
    device = torch.device("cpu")
    with record(TARGETS[0]) as launches:
        assert target(device) == TARGETS[0]
        with pytest.raises(RuntimeError, match="does not nest"), record(TARGETS[0]):
            pass
    assert launches == []
    assert target(device) == INTERPRETER


_AUDIT = """
import sys
from pyfused.kernels import audit, lora_linear
from pyfused.kernels.lora_linear_plan import GemmConfig
broken = GemmConfig({block_m}, {block_n}, 64, num_warps={warps}, num_stages={stages})
lora_linear.gemm_config = lambda *args, **kwargs: broken
gpu = next(t for t in audit.TARGETS if t.capability == (8, 6))
case = next(c for c in audit.cases((gpu,), False, "shrink_expand 8192x4096->4096 r16 p0.0")
            if c.launch.kernel.__name__ == "_lora_gemm_kernel")
print(audit.compile_case(case).faults)
"""


def _audit(**settings) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _AUDIT.format(**settings)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def test_audit_reports_spills_and_shared_memory():
    faults = _audit(block_m=128, block_n=256, warps=4, stages=4)
    assert "spills" in faults
    assert "shared memory" in faults


def test_audit_passes_a_sound_configuration():
    assert _audit(block_m=64, block_n=64, warps=8, stages=3).strip() == "()"
