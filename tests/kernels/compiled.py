"""What the compiler makes of kernels, as JSON: a program, since where kernels are interpreted none is compiled."""

from __future__ import annotations

import json

import torch

from pyfused.kernels import audit, lora_linear
from pyfused.kernels.lora_linear_config import GemmConfig
from pyfused.kernels.recording import record


def _target(*capability: int):
    return next(target for target in audit.TARGETS if target.capability == capability)


def _ptx(call, kernel: str) -> str:
    gpu = _target(9, 0)
    with record(gpu) as launches:
        call()
    launch = next(launch for launch in launches if launch.kernel.__name__ == kernel)
    return audit.specialisation(launch, gpu).compile().asm["ptx"]


def _audited(*capabilities: tuple[int, int]) -> list[tuple[int, int]]:
    """The capability of each case, of calls whose sizes are all 1."""
    targets = tuple(_target(*capability) for capability in capabilities)
    return [case.target.capability for case in audit.cases(targets, False, "size 1")]


def _faults(block_m: int, block_n: int, num_warps: int, num_stages: int) -> tuple[str, ...]:
    """What the audit finds in a GEMM of this configuration."""
    own = lora_linear.gemm_config
    lora_linear.gemm_config = lambda *_, **__: GemmConfig(
        block_m, block_n, 64, num_warps=num_warps, num_stages=num_stages
    )
    try:
        cases = audit.cases((_target(8, 6),), False, "shrink_expand 8192x4096->4096 r16 p0.0")
    finally:
        lora_linear.gemm_config = own
    return audit.compile_case(next(c for c in cases if c.launch.kernel.__name__ == "_lora_gemm_kernel")).faults


if __name__ == "__main__":
    images = audit._adapter_residual_call((8, 3136, 64), 64, torch.bfloat16)
    rank_4 = audit._lora_linear_call(1, 1576, 768, 768, 4, torch.bfloat16, 0.0, "shrink_expand", False)
    relu = audit._adapter_residual_call((1, 64, 64), 16, torch.bfloat16, activation="relu")
    print(
        json.dumps(
            {
                "audited": [_audited((8, 6), (8, 9)), _audited((8, 9)), _audited((8, 0), (8, 6))],
                "too large": _faults(128, 256, num_warps=4, num_stages=4),
                "sound": _faults(64, 64, num_warps=8, num_stages=3),
                "vectors": [_ptx(images, "_adapter_fwd_kernel"), _ptx(rank_4, "_lora_gemm_kernel")],
                "relu": _ptx(relu, "_adapter_fwd_kernel"),
            }
        )
    )
