"""What the compiler makes of kernels, as JSON: a program, since where kernels are interpreted none is compiled."""

from __future__ import annotations

import dataclasses
import json
import re

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource

from pyfused.kernels import adapter_residual, audit, lora_linear
from pyfused.kernels.bottleneck_config import RowsConfig
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


def _barriers() -> dict[str, int]:
    """Kernel of backward, and what it computes again -> its barriers."""
    gpu, found = _target(9, 0), {}
    for save in (True, False):
        with record(gpu) as launches:
            audit._adapter_residual_call((1, 64, 64), 16, torch.bfloat16, save=save)()
            audit._cross_attention_residual_call((1, 64, 64), 8, 2, torch.bfloat16, save=save)()
        for launch in launches:
            name = launch.kernel.__name__
            if "_bwd_" in name:
                ttir = audit.specialisation(launch, gpu).compile().asm["ttir"]
                again = " again" * launch.arguments.get("RECOMPUTE", False)
                found[f"{name}{again}"] = len(re.findall(r"\b(?:ttg|gpu)\.barrier\b", ttir))
    return found


def _audited(*capabilities: tuple[int, int]) -> list[tuple[int, int]]:
    """The capability of each case, of calls whose sizes are all 1."""
    targets = tuple(_target(*capability) for capability in capabilities)
    return [case.target.capability for case in audit.cases(targets, False, "size 1")]


@triton.jit
def _sums_and_products(t_ptr, p_ptr, f_ptr, q_ptr, g_ptr, steps, Q_FIRST: tl.constexpr):
    """g = t^T p and q = t f in one pass over t, in either order: what `_lora_wgrad_kernel` does."""
    rows, columns, narrow = tl.arange(0, 64), tl.arange(0, 128), tl.arange(0, 16)
    f = tl.load(f_ptr + columns[:, None] * 16 + narrow[None, :])
    g = tl.zeros((128, 16), dtype=tl.float32)
    for step in range(steps):
        t = tl.load(t_ptr + (step * 64 + rows[:, None]) * 128 + columns[None, :])
        p = tl.load(p_ptr + (step * 64 + rows[:, None]) * 16 + narrow[None, :])
        if not Q_FIRST:
            g = tl.dot(tl.trans(t), p, g)
        q = tl.dot(t, f)
        tl.store(q_ptr + (step * 64 + rows[:, None]) * 16 + narrow[None, :], q.to(tl.bfloat16))
        if Q_FIRST:
            g = tl.dot(tl.trans(t), p, g)
    tl.store(g_ptr + columns[:, None] * 16 + narrow[None, :], g)


def _waiting(q_first: bool) -> str:
    """What the audit says of how the products of these sums wait on 9.0."""
    types = dict.fromkeys(("t_ptr", "p_ptr", "f_ptr", "q_ptr"), "*bf16")
    signature = types | {"g_ptr": "*fp32", "steps": "i32", "Q_FIRST": "constexpr"}
    aligned = {(number,): [["tt.divisibility", 16]] for number in range(5)}
    source = ASTSource(_sums_and_products, signature, {(6,): q_first}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3})
    return audit.serialised(audit._cuobjdump("-sass", made.asm["cubin"]))


@triton.jit
def _product(x_ptr, w_ptr, y_ptr, k):
    """y = x w^T, w in its own dtype: what the kernels did to weights that are wider than the rows."""
    rows, columns, offs_k = tl.arange(0, 64), tl.arange(0, 64), tl.arange(0, 64)
    y = tl.zeros((64, 64), dtype=tl.float32)
    for start in range(0, k, 64):
        x = tl.load(x_ptr + rows[:, None] * k + start + offs_k[None, :])
        w = tl.load(w_ptr + columns[None, :] * k + start + offs_k[:, None])
        y = tl.dot(x, w.to(x.dtype), y)
    tl.store(y_ptr + rows[:, None] * 64 + columns[None, :], y)


def _step_faults(weight: str, most: int = 200, tma: bool = False) -> list[str]:
    """What the audit says of the loop of a product with a weight of this type on 9.0."""
    signature = {"x_ptr": "*bf16", "w_ptr": f"*{weight}", "y_ptr": "*fp32", "k": "i32"}
    aligned = {(number,): [["tt.divisibility", 16]] for number in range(4)}
    source = ASTSource(_product, signature, {}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3})
    return audit.step_faults(audit._cuobjdump("-sass", made.asm["cubin"]), audit.Step(most, tma=tma))


def _faults(
    block_m: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
    capability: tuple[int, int] = (8, 6),
    ships: bool = True,
) -> tuple[str, ...]:
    """What the audit finds in a GEMM of this configuration, which ships or is to be timed."""
    own = lora_linear.gemm_config
    lora_linear.gemm_config = lambda *_, **__: GemmConfig(
        block_m, block_n, 64, num_warps=num_warps, num_stages=num_stages
    )
    try:
        # Of a rank that the kernel with tensor descriptors leaves to this one.
        cases = audit.cases((_target(*capability),), False, "shrink_expand 8192x4096->4096 r256 p0.0")
    finally:
        lora_linear.gemm_config = own
    case = next(c for c in cases if c.launch.kernel.__name__ == "_lora_gemm_kernel")
    return audit.compile_case(dataclasses.replace(case, ships=ships)).faults


def _narrow(block_c: int) -> str:
    """What the audit says of the widths of an adapter's products on 9.0, h = 256, with so many channels a step."""
    gpu, own = _target(9, 0), adapter_residual.rows_config
    adapter_residual.rows_config = lambda *_, **__: RowsConfig(64, block_c, num_warps=8, num_stages=2)
    try:
        with record(gpu) as launches:
            audit._adapter_residual_call((1, 6304, 768), 256, torch.bfloat16)()
    finally:
        adapter_residual.rows_config = own
    launch = next(launch for launch in launches if launch.kernel.__name__ == "_adapter_fwd_kernel")
    made = audit.specialisation(launch, gpu).compile()
    return audit.narrow(audit._cuobjdump("-sass", made.asm["cubin"]), launch)


if __name__ == "__main__":
    images = audit._adapter_residual_call((8, 3136, 64), 64, torch.bfloat16)
    # As many rows as the kernel with tensor descriptors takes, and fewer.
    many, few = (
        audit._lora_linear_call(1, rows, 768, 768, 4, torch.bfloat16, 0.0, "shrink_expand", False)
        for rows in (1576, 100)
    )
    relu = audit._adapter_residual_call((1, 64, 64), 16, torch.bfloat16, activation="relu")
    print(
        json.dumps(
            {
                "audited": [_audited((8, 6), (8, 9)), _audited((8, 9)), _audited((8, 0), (8, 6))],
                "too large": _faults(128, 256, num_warps=4, num_stages=4),
                "sound": _faults(64, 64, num_warps=8, num_stages=3),
                "in step": [_faults(128, 256, 8, stages, (9, 0)) for stages in (1, 3)],
                "starved": _faults(128, 128, 8, 3, (9, 0)),
                "barriers": _barriers(),
                "timed": _faults(128, 128, 8, 1, (9, 0), ships=False),
                "steps": [
                    _step_faults("bf16"),
                    _step_faults("fp32"),
                    _step_faults("bf16", most=20),
                    _step_faults("bf16", tma=True),
                ],
                "narrow": [_narrow(32), _narrow(64)],
                "one by one": [_waiting(q_first) for q_first in (True, False)],
                "vectors": [
                    _ptx(images, "_adapter_fwd_kernel"),
                    _ptx(few, "_lora_gemm_kernel"),
                    _ptx(many, "_lora_tma_kernel"),
                ],
                "relu": _ptx(relu, "_adapter_fwd_kernel"),
            }
        )
    )
