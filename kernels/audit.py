"""Compiles every kernel ahead of time, for GPUs that are not there, in the configurations that ship.

``python -m pyfused.kernels.audit`` records the launches of representative calls on meta tensors, compiles each
distinct one for its target with Triton's own compiler, and reads what it made. It fails on a register spill, on shared
memory over the target's limit, on a 16-bit matrix kernel without tensor-core instructions, and on 9.0 on products that
wait for each other, or for operands that no asynchronous copy brings, on instructions narrower than their tiles, and on
tiles that leave a multiprocessor or the second-level cache behind (`occupancy`).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from pyfused.kernels import adapter_residual, cross_attention_residual, lora_linear, occupancy, projection_residual
from pyfused.kernels.launch import vectorised
from pyfused.kernels.recording import SHARED_MEMORY, Launch, Target, record

# Multiprocessors of a representative card: A100, RTX 3090, RTX 4090, H200, B200, RTX 5090.
TARGETS = tuple(
    Target(capability, multiprocessors, SHARED_MEMORY[capability])
    for capability, multiprocessors in (
        ((8, 0), 108), ((8, 6), 82), ((8, 9), 128), ((9, 0), 132), ((10, 0), 148), ((12, 0), 170),
    )
)  # fmt: skip

# Of a launch that both have Triton makes the same PTX for the two, and the assembler gives it the same registers and
# stack (203 of 203, docs/measured.md): it is audited for one.
_AUDITED_AS = {(8, 9): (8, 6)}


@dataclass(frozen=True)
class Step:
    """What is asked of a step of a kernel's first loop that has products, on 9.0.

    Attributes:
        most: instructions of a warp; a rise is a change that somebody decides on.
        beside: what it may have beside asynchronous copies, "LDG" or "STS".
        tma: its operands come by tensor descriptors alone, and so does the kernel's result go.
    """

    most: int
    beside: tuple[str, ...] = ()
    tma: bool = False


# Kernels whose products on 9.0 must not wait for each other, by what a launch has: their machine code is read always.
# Images whose channels no asynchronous copy of 16 bytes reads are left out.
_OVERLAPPING: dict[str, Callable[[dict[str, Any]], bool]] = {
    "_lora_gemm_kernel": lambda given: vectorised(given["x"].ptr, given["w"].ptr),
    "_lora_tma_kernel": lambda given: True,
    "_lora_shrink_kernel": lambda given: vectorised(given["x"].ptr),
    "_lora_wgrad_kernel": lambda given: True,
    "_adapter_fwd_kernel": lambda given: _dense_rows(given["z"].ptr),
    "_adapter_bwd_rows_kernel": lambda given: _dense_rows(given["dy"].ptr),
    "_adapter_bwd_weights_kernel": lambda given: vectorised(given["dy"].ptr),
    "_cross_attention_fwd_kernel": lambda given: vectorised(given["x"].ptr),
}
# Of these what a step must be; None where nothing is asked. Dropout stores an operand that it makes.
_STEP: dict[str, Callable[[dict[str, Any]], Step | None]] = {
    "_lora_gemm_kernel": lambda given: (
        Step(740, ("STS",)) if given["DROP_X"] else Step(215) if given["OWN_P"] else Step(170)
    ),
    "_lora_tma_kernel": lambda given: Step(125 if given["OWN_P"] else 82, tma=True),
    # One product a step, of a rank above 128, has nothing to be made beside.
    "_lora_shrink_kernel": lambda given: (
        Step(90) if not given["DROP_X"] else Step(640, ("STS",)) if given["BLOCK_R"] <= 128 else None
    ),
    # Q is whole before it is stored.
    "_lora_wgrad_kernel": lambda given: (
        None
        if given["f_ptr"] is not None or not vectorised(given["t"].ptr)
        else Step(1540, ("STS",))
        if given["DROP_T"]
        else Step(310)
    ),
    "_adapter_fwd_kernel": lambda given: Step(125),
    "_cross_attention_fwd_kernel": lambda given: Step(145),
    "_adapter_bwd_rows_kernel": lambda given: Step(145),
    # Sums of columns go through shared memory; the factor of each row's sample is found and loaded, for images by
    # every thread.
    "_adapter_bwd_weights_kernel": lambda given: (
        Step(760, ("STS",))
        if given["sample_ptr"] is None
        else Step(760, ("STS", "LDG"))
        if given["dy"].strides[2] == 1
        else None
    ),
}
# Of the same kernels: rows and columns of the tile of each product. Of channels, of which there are enough, 64 columns.
_PRODUCTS: dict[str, Callable[[dict[str, Any]], list[tuple[int, int]]]] = {
    "_lora_gemm_kernel": lambda given: [
        (given["BLOCK_M"], given["BLOCK_N"]),
        *[(given["BLOCK_M"], given["BLOCK_R"])] * given["OWN_P"],
    ],
    "_lora_tma_kernel": lambda given: [
        (given["BLOCK_M"], given["BLOCK_N"] // (4 if given["DROP_P"] else 1)),
        *[(given["BLOCK_M"], given["BLOCK_R"])] * given["OWN_P"],
    ],
    "_lora_shrink_kernel": lambda given: [(given["BLOCK_M"], given["BLOCK_R"])],
    "_lora_wgrad_kernel": lambda given: [
        (given["BLOCK_C"], given["BLOCK_R"]),
        *[(given["BLOCK_M"], given["BLOCK_R"])] * (given["f_ptr"] is not None),
    ],
    "_adapter_fwd_kernel": lambda given: [(given["BLOCK_M"], given["BLOCK_H"]), (given["BLOCK_M"], 64)],
    "_adapter_bwd_rows_kernel": lambda given: [(given["BLOCK_M"], given["BLOCK_H"]), (given["BLOCK_M"], 64)],
    "_adapter_bwd_weights_kernel": lambda given: [(given["BLOCK_C"], given["BLOCK_H"])],
    "_cross_attention_fwd_kernel": lambda given: [
        (given["BLOCK_M"], given["BLOCK_H"] * given["BLOCK_T"]),
        (given["BLOCK_M"], 64),
    ],
}
_WIDTH = re.compile(r"\bHGMMA\.64x(\d+)x")
_PRODUCT_OR_WAIT = re.compile(r"\b(HGMMA)\b|\bWARPGROUP\.DEPBAR\.LE gsb0, 0x(\w+)")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(.*?);", re.MULTILINE)
_JUMP = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")

# Tensor-core instructions: warp-level, warpgroup-level on Hopper, and tcgen05 on Blackwell; in SASS, and in PTX.
_TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA)\b")
_TENSOR_CORE_PTX = {"mma.sync": "HMMA", "wgmma.mma_async": "HGMMA", "tcgen05.mma": "UTCHMMA"}


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration for one target.

    ``disassembled``: its tensor-core instructions are read off the machine code, which takes as long as half the
    compilation; else off the PTX, which that is made of. ``ships``: what slows it is a fault too; of what is to be
    timed the clock tells.
    """

    target: Target
    label: str
    launch: Launch
    disassembled: bool = False
    ships: bool = True


@dataclass(frozen=True)
class Finding:
    case_label: str
    kernel: str
    capability: tuple[int, int]
    registers: int
    stack: int
    spills: int
    shared: int
    instructions: str
    faults: tuple[str, ...]


def representative_calls(full: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """(label, function that makes the launches) at the shapes and widths that pick each row of the configuration."""
    yield from _lora_linear_calls(full)
    yield from _adapter_residual_calls(full)
    yield from _cross_attention_residual_calls(full)
    yield from _projection_residual_calls(full)


def _lora_linear_calls(full: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    # Rank and dropout: the ranks that users take, and, of tiles for other shapes, those that ask most of one.
    hardest, dtypes = [(64, 0.0), (64, 0.1), (256, 0.1)], [torch.bfloat16]
    shapes = {
        (1, 8192, 4096, 4096): [*hardest, (16, 0.0), (100, 0.1), (256, 0.0)],
        (1, 2740, 1024, 1024): hardest,
        (32, 49, 80, 76): [*hardest, (16, 0.0)],
    }
    if full:
        more = [(1, 6304, 768, 3072), (1, 6304, 3072, 768), (1, 8192, 4096, 14336), (1, 50, 768, 768)]
        ranks = list(itertools.product((1, 8, 16, 32, 64, 100, 128, 256), (0.0, 0.1)))
        shapes, dtypes = dict.fromkeys([*shapes, *more], ranks), [torch.bfloat16, torch.float16]
    calls = [(shape, rank, dtype) for shape, ranks in shapes.items() for rank in ranks for dtype in dtypes]
    for (batch, length, k, n), (rank, p), dtype in calls:
        for plan in ("one_launch", "shrink_expand"):
            if plan == "one_launch" and rank > 64:
                # `pyfused.ops.lora_linear` refuses it.
                continue
            name = f"{plan} {batch * length}x{k}->{n} r{rank} p{p} {str(dtype)[6:]}"
            yield name, _lora_linear_call(batch, length, k, n, rank, dtype, p, plan, channels_first=batch > 1)
    # The corners: library GEMM with dropout, exact float32, everything of size 1, offsets beyond 32 bits.
    rows, images = (1, 2740), (32, 3136)
    for label, (batch, length), k, n, rank, dtype, p, plan in (
        ("blas", rows, 1024, 1024, 16, torch.bfloat16, 0.1, "blas"),
        ("float32 blas", rows, 1024, 1024, 16, torch.float32, 0.1, "blas"),
        ("float32", rows, 1024, 1024, 16, torch.float32, 0.0, "one_launch"),
        ("size 1", (1, 1), 1, 1, 1, torch.bfloat16, 0.6, "one_launch"),
        ("over 2^31 elements", (1, 1 << 20), 4096, 4096, 16, torch.bfloat16, 0.0, "one_launch"),
        ("K no multiple of 16,", rows, 776, 768, 16, torch.bfloat16, 0.0, "one_launch"),
        ("K no multiple of 8,", rows, 772, 768, 16, torch.bfloat16, 0.0, "one_launch"),
        ("few rows,", (1, 100), 768, 768, 16, torch.bfloat16, 0.0, "one_launch"),
        ("few rows,", (1, 100), 768, 768, 16, torch.bfloat16, 0.1, "shrink_expand"),
        ("56x56 images,", images, 64, 64, 16, torch.bfloat16, 0.0, "one_launch"),
        ("float32 weight,", rows, 1024, 512, 64, torch.bfloat16, 0.0, "one_launch"),
        ("4 adapters of rank 4,", rows, 1024, 1024, 16, torch.bfloat16, 0.0, "one_launch"),
        ("4 adapters,", rows, 1024, 1024, 64, torch.bfloat16, 0.1, "one_launch"),
        ("4 adapters,", rows, 1024, 1024, 256, torch.bfloat16, 0.1, "shrink_expand"),
    ):
        weight = torch.float32 if label.startswith("float32") else dtype
        adapters = 4 if label.startswith("4") else None
        call = _lora_linear_call(batch, length, k, n, rank, dtype, p, plan, batch > 1, weight, adapters)
        yield f"{label} {plan}", call


def _lora_linear_call(batch, length, k, n, rank, dtype, p, plan, channels_first, weight_dtype=None, adapters=None):
    def call() -> None:
        def rows(width):
            if channels_first:
                return torch.empty((batch, width, length), dtype=dtype, device="meta").transpose(1, 2)
            return torch.empty((batch, length, width), dtype=dtype, device="meta")

        def parameter(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        x, dy, weight = rows(k), rows(n), parameter(n, k, dtype=weight_dtype or dtype)
        lora_a, lora_b = parameter(rank, k, dtype=torch.float32), parameter(n, rank, dtype=torch.float32)
        seed = torch.empty(1, dtype=torch.int64, device="meta") if p > 0.0 else None
        mixed = () if adapters is None else (torch.empty(batch * length, dtype=torch.int64, device="meta"), adapters)
        _, saved = lora_linear.lora_linear_fwd(
            x, weight, lora_a, lora_b, parameter(n), seed, 2.0, p, channels_first, plan, True, *mixed
        )
        lora_linear.lora_linear_bwd(
            dy, x, weight, lora_a, lora_b, saved, seed, 2.0, p, channels_first, plan, True, True, True, *mixed
        )

    return call


def _adapter_residual_calls(full: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    # (B, L, C) with its widths; B > 1: images of L positions, NCHW.
    shapes = [
        ((1, 6304, 768), (8, 64)),
        ((1, 21920, 1024), (256, 512)),
        ((64, 4096, 64), (32,)),
        ((32, 49, 76), (128,)),
    ]
    dtypes = [torch.bfloat16]
    if full:
        shapes = [
            ((batch, length, channels), (8, 24, 64, 128, 192, 512))
            for channels in (64, 76, 152, 512, 640, 768, 1024)
            for batch, length in ((1, 6304), (32, 49), (32, 3136))
        ]
        dtypes = [torch.bfloat16, torch.float16]
    for (shape, widths), dtype in itertools.product(shapes, dtypes):
        for width in widths:
            label = "adapter " + "x".join(map(str, shape)) + f" h{width} {str(dtype)[6:]}"
            yield label, _adapter_residual_call(shape, width, dtype)
            yield f"{label} dropout", _adapter_residual_call(shape, width, dtype, p=0.1)
            label += " dropout, recompute, float32 residual"
            yield label, _adapter_residual_call(shape, width, dtype, torch.float32, p=0.1, save=False)
            if full:
                yield f"{label}, weights alike", _adapter_residual_call(shape, width, dtype, weight_dtype=dtype)
    # The corners: float32, float16 under float32, everything of size 1, offsets beyond 32 bits, the activation with the
    # longest derivative.
    rows, images = (1, 2740, 1024), (32, 49, 76)
    for shape in (rows, images):
        yield f"adapter float32 {shape}", _adapter_residual_call(shape, 128, torch.float32, p=0.1, save=False)
    yield "adapter float16", _adapter_residual_call(rows, 512, torch.float16, torch.float32, p=0.1)
    yield "adapter size 1", _adapter_residual_call((1, 1, 1), 1, torch.bfloat16, p=0.6)
    yield "adapter over 2^31 elements", _adapter_residual_call((1, 1 << 21, 1024), 64, torch.bfloat16)
    yield "adapter gelu_tanh", _adapter_residual_call(rows, 256, torch.bfloat16, activation="gelu_tanh")


def _adapter_residual_call(
    shape, width, dtype, stream_dtype=None, p=0.0, save=True, weight_dtype=torch.float32, activation="gelu"
):
    """With dropout also drop-path: ``p`` above 0 brings one factor per sample."""

    def call() -> None:
        batch, length, channels = shape

        def rows(dtype):
            if batch > 1:
                return torch.empty((batch, channels, length), dtype=dtype, device="meta").transpose(1, 2)
            return torch.empty(shape, dtype=dtype, device="meta")

        def parameter(*shape, dtype=weight_dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        weights = parameter(width, channels), parameter(width), parameter(channels, width), parameter(channels)
        gamma = parameter(channels, dtype=torch.float32)
        samples = parameter(batch, dtype=torch.float32) if p > 0.0 else None
        seed = parameter(1, dtype=torch.int64) if p > 0.0 else None
        z, residual, settings = rows(dtype), rows(stream_dtype or dtype), (0.5, activation, p, batch > 1)
        _, hidden = adapter_residual.adapter_residual_fwd(
            z, *weights, residual, gamma, samples, seed, *settings, batch > 1, save
        )
        dy, hidden = torch.empty_like(residual), hidden if save else None
        adapter_residual.adapter_residual_bwd(
            dy, z, *weights, gamma, samples, hidden, seed, *settings, False, True, True, True
        )

    return call


def _cross_attention_residual_calls(full: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    # (B, L, C) with the heads and tokens; the context is every image's own.
    rows = 16, 1370, 1024
    widths = [(rows, 16, 2), (rows, 8, 8), ((10, 77, 768), 12, 3), (rows, 16, 16)]
    dtypes = [torch.bfloat16]
    if full:
        widths += [(rows, heads, tokens) for heads in (1, 8, 12, 16) for tokens in (1, 2, 3, 4, 12, 16)]
        dtypes = [torch.bfloat16, torch.float16]
    for (shape, heads, tokens), dtype in itertools.product(widths, dtypes):
        label = "attention " + "x".join(map(str, shape)) + f" H{heads} T{tokens} {str(dtype)[6:]}"
        yield label, _cross_attention_residual_call(shape, heads, tokens, dtype)
        yield (
            f"{label} dropout, recompute",
            _cross_attention_residual_call(shape, heads, tokens, dtype, torch.float32, p=0.1, save=False),
        )
        # With the Gram matrix on chip, half as many columns: `pyfused.ops.cross_attention_residual`.
        if triton.next_power_of_2(heads) * triton.next_power_of_2(tokens) <= 128:
            yield f"{label} norm", _cross_attention_residual_call(shape, heads, tokens, dtype, norm_match=True)
            yield (
                f"{label} norm, dropout, recompute",
                _cross_attention_residual_call(shape, heads, tokens, dtype, p=0.1, save=False, norm_match=True),
            )
    yield "attention float32", _cross_attention_residual_call(rows, 16, 8, torch.float32, p=0.1, save=False)
    yield "attention float32 norm", _cross_attention_residual_call(rows, 16, 4, torch.float32, norm_match=True)
    yield "attention size 1", _cross_attention_residual_call((1, 1, 1), 1, 1, torch.bfloat16, p=0.6)
    yield "attention one context", _cross_attention_residual_call(rows, 16, 2, torch.bfloat16, contexts=1)


def _cross_attention_residual_call(
    shape, heads, tokens, dtype, stream_dtype=None, p=0.0, save=True, norm_match=False, contexts=None
):
    def call() -> None:
        batch, _, channels = shape

        def tensor(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        x = tensor(*shape, dtype=stream_dtype or dtype)
        e, f = (tensor(contexts or batch, heads, tokens, channels) for _ in range(2))
        core = e, tensor(contexts or batch, heads, tokens, dtype=torch.float32), f, tensor(channels)
        gate = tensor(channels, dtype=torch.float32) if p > 0.0 else None
        seed = tensor(1, dtype=torch.int64) if p > 0.0 else None
        settings = 0.1, norm_match, 1e-6, p
        _, saved = cross_attention_residual.cross_attention_residual_fwd(x, *core, gate, seed, *settings, save)
        cross_attention_residual.cross_attention_residual_bwd(
            torch.empty_like(x), x, *core, gate, saved if save else None, seed, *settings, True, True, True
        )

    return call


def _projection_residual_calls(full: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    # (M, K, C): AA-CLIP's attention and its adapters' blends.
    shapes = [(21920, 768, 1024), (21920, 1024, 1024), (1232, 768, 768)] if full else [(21920, 768, 1024)]
    for m, k, channels in shapes:
        label = f"projection {m}x{k}->{channels}"
        yield label, _projection_residual_call(m, k, channels, torch.bfloat16)
        yield (
            f"{label} leaky_relu norm",
            _projection_residual_call(m, k, channels, torch.bfloat16, activation="leaky_relu", norm_match=True),
        )
        yield (
            f"{label} gelu_tanh norm, float32 residual, w per channel",
            _projection_residual_call(
                m, k, channels, torch.bfloat16, torch.float32, activation="gelu_tanh", norm_match=True, per_channel=True
            ),
        )
    yield "projection float32", _projection_residual_call(2740, 768, 1024, torch.float32, norm_match=True)
    yield "projection K, C no multiple of 16", _projection_residual_call(2740, 77, 76, torch.bfloat16, norm_match=True)
    yield "projection size 1", _projection_residual_call(1, 1, 1, torch.bfloat16, norm_match=True)


def _projection_residual_call(
    m, k, channels, dtype, stream_dtype=None, activation="identity", norm_match=False, per_channel=False
):
    def call() -> None:
        def tensor(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        o, residual = tensor(1, m, k), tensor(1, m, channels, dtype=stream_dtype or dtype)
        weights = tensor(channels, k), tensor(channels)
        settings: dict[str, Any] = {
            "factor": 0.1, "skip": 0.9, "activation": activation, "norm_match": norm_match, "eps": 1e-6,
        }  # fmt: skip
        gate = tensor(channels, dtype=torch.float32) if per_channel else None
        _, pre = projection_residual.projection_residual_fwd(o, *weights, residual, gate, save=norm_match, **settings)
        dy, pre, x = torch.empty_like(residual), pre if norm_match else None, residual if norm_match else None
        projection_residual.projection_residual_bwd(
            dy, o, *weights, x, gate, pre, need_do=True, need_weight=True, need_residual=norm_match,
            need_gate=per_channel, **settings,
        )  # fmt: skip

    return call


def cases(targets: tuple[Target, ...], full: bool, text: str = "") -> list[Case]:
    """Every distinct compilation that the representative calls need; only those whose label contains ``text``."""
    found: dict[tuple, Case] = {}
    # One of each kernel's on each target.
    disassembled = set()
    for target in targets:
        for label, call in representative_calls(full):
            if text not in label:
                continue
            with record(target) as launches:
                call()
            for launch in launches:
                kernel = target.capability, launch.kernel.__name__
                case = Case(target, label, launch, disassembled=kernel not in disassembled)
                disassembled.add(kernel)
                audited = _AUDITED_AS.get(target.capability, target.capability)
                found.setdefault((audited, *specialisation(launch, target).key), case)
    return list(found.values())


@dataclass(frozen=True)
class Specialisation:
    """What Triton compiles for a launch: launches of equal ``key`` share one compilation."""

    gpu: GPUTarget
    source: ASTSource
    options: object
    key: tuple[str, ...]

    def compile(self) -> CompiledKernel:
        """As the launch itself would, cache on disk included; needs no GPU."""
        return triton.compile(self.source, target=self.gpu, options=self.options.__dict__)


def specialisation(launch: Launch, target: Target) -> Specialisation:
    """As Triton's launcher would have it on the target."""
    gpu = GPUTarget("cuda", target.capability[0] * 10 + target.capability[1], 32)
    backend = make_backend(gpu)
    function = launch.kernel
    options = {
        "num_warps": launch.num_warps, "num_stages": launch.num_stages, "maxnreg": launch.maxnreg,
        # Of the environment, as a launch adds them: they are part of what the cache is asked for.
        "debug": function.debug or triton.knobs.runtime.debug,
        "instrumentation_mode": triton.knobs.compilation.instrumentation_mode,
    }  # fmt: skip
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, specialized, extra = bind(**launch.arguments, **options)
    parsed, signature, constants, attributes = function._pack_args(backend, extra, bound, specialized, options)
    source = ASTSource(function, signature, constants, attributes)
    key = function.__module__, function.__name__, str(signature), str(constants), str(attributes), str(options)
    return Specialisation(gpu, source, parsed, key)


def compile_case(case: Case) -> Finding:
    faults: list[str] = []
    name = case.launch.kernel.__name__
    try:
        compiled = specialisation(case.launch, case.target).compile()
    except Exception as error:  # the compiler's own failure is a finding like any other
        return Finding(case.label, name, case.target.capability, 0, 0, 0, 0, "", (f"does not compile: {error}",))
    usage = _cuobjdump("-res-usage", compiled.asm["cubin"])
    registers, stack = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK"))
    # What is spilled lies in the stack.
    overlapping = must_overlap(case)
    sass = _cuobjdump("-sass", compiled.asm["cubin"]) if case.disassembled or stack or overlapping else ""
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    shared = compiled.metadata.shared
    if sass:
        instructions = sorted(set(_TENSOR_CORE.findall(sass)))
    else:
        instructions = sorted(name for ptx, name in _TENSOR_CORE_PTX.items() if ptx in compiled.asm["ptx"])
    if spills or stack:
        faults.append(f"spills: {spills} local accesses, {stack} bytes of stack")
    if shared > case.target.shared_memory:
        faults.append(f"shared memory {shared} > {case.target.shared_memory}")
    sixteen_bit = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in case.launch.tensors)
    if "tt.dot" in compiled.asm["ttir"] and sixteen_bit and not instructions:
        faults.append("no tensor-core instruction")
    gemms = "_lora_gemm_kernel", "_lora_tma_kernel"
    if case.target.capability == (9, 0) and name in gemms and sixteen_bit and "HGMMA" not in instructions:
        faults.append("the GEMM does not use wgmma")
    if overlapping:
        faults += filter(None, [serialised(sass), narrow(sass, case.launch)])
        asked = _STEP[name](case.launch.arguments)
        faults += [] if asked is None else step_faults(sass, asked)
        faults += occupancy.faults(case.launch, case.target, registers, shared)
    found = ",".join(instructions)
    return Finding(case.label, name, case.target.capability, registers, stack, spills, shared, found, tuple(faults))


def must_overlap(case: Case) -> bool:
    """Whether the products of this launch must not wait for each other."""
    held = _OVERLAPPING.get(case.launch.kernel.__name__)
    if case.target.capability != (9, 0) or held is None or not case.ships:
        return False
    # Rows in float32, also over weights in 16 bits, for which each step converts them: a stream under autocast.
    return case.launch.tensors[0].dtype != torch.float32 and held(case.launch.arguments)


def _dense_rows(rows: torch.Tensor) -> bool:
    return rows.stride(2) == 1 and vectorised(rows)


def serialised(sass: str) -> str:
    """What is wrong where the assembler has serialised products on 9.0, by a wait for none behind each; else "".

    A wait names how many groups of products may still be under way.
    """
    # Of a wait how many it leaves under way; None of a product.
    found = [None if product else int(left, 16) for product, left in _PRODUCT_OR_WAIT.findall(sass)]
    alone = longest = 0
    for before, after in itertools.pairwise(found):
        if before is None:
            alone = alone + 1 if after == 0 else 0
            longest = max(longest, alone)
    if longest >= 4:
        return f"{longest} products wait for each other, one by one"
    return ""


def narrow(sass: str, launch: Launch) -> str:
    """What is wrong where instructions of 9.0 have fewer columns than 64 and than the tiles of their products; else "".

    A warpgroup, of 4 warps, multiplies 64 rows. Those for which no rows are left share the columns.
    """
    given = {64}
    for rows, columns in _PRODUCTS[launch.kernel.__name__](launch.arguments):
        given.add(min(64, columns) // max(1, 16 * launch.num_warps // rows))
    found = [int(columns) for columns in _WIDTH.findall(sass)]
    cut = [columns for columns in found if columns < 64 and columns not in given]
    return f"{len(cut)} of {len(found)} products have {min(cut)} columns, {min(given)} or more expected" if cut else ""


def step_faults(sass: str, asked: Step) -> list[str]:
    """What is wrong with the first loop that has products of 9.0: it is to wait for the step before its own, and its
    operands for nothing but asynchronous copies."""
    step = next((loop for loop in _innermost_loops(sass) if any("HGMMA" in line for line in loop)), None)
    if step is None:
        return []
    text, faults = "\n".join(step), []
    waits = [int(left, 16) for _, left in _PRODUCT_OR_WAIT.findall(text) if left]
    if not waits or min(waits) == 0:
        faults.append("the loop waits for its own products")
    found = [name for name in ("LDG", "STS") if name not in asked.beside and re.search(rf"\b{name}\b", text)]
    faults += [f"the loop has {name}" for name in found]
    if asked.tma:
        found = [name for name in ("LDGSTS", "MEMBAR") if re.search(rf"\b{name}\b", text)]
        faults += [f"the loop has {name}" for name in found]
        faults += ["the loop has no UTMALDG"] * ("UTMALDG" not in text) + ["nothing has UTMASTG"] * (
            "UTMASTG" not in sass
        )
    if len(step) > asked.most:
        faults.append(f"a step has {len(step)} instructions, {asked.most} allowed")
    return faults


def _innermost_loops(sass: str) -> list[list[str]]:
    """The instructions of each loop that has none inside."""
    lines = [(int(address, 16), text) for address, text in _INSTRUCTION.findall(sass)]
    at = {address: number for number, (address, _) in enumerate(lines)}
    spans = [
        (at[int(jump[1], 16)], number)
        for number, (address, text) in enumerate(lines)
        if (jump := _JUMP.search(text)) and int(jump[1], 16) <= address and int(jump[1], 16) in at
    ]
    return [
        [text for _, text in lines[first : last + 1]]
        for first, last in spans
        if not any(first <= begin and end <= last for begin, end in spans if (begin, end) != (first, last))
    ]


def machine_code(compiled: CompiledKernel) -> tuple[int, list[str], list[list[str]]]:
    """(registers of a thread, the instructions, those of each innermost loop)."""
    sass, usage = (_cuobjdump(flag, compiled.asm["cubin"]) for flag in ("-sass", "-res-usage"))
    # Behind the last jump to itself there are only fillers.
    lines = [text for _, text in _INSTRUCTION.findall(sass) if text != "NOP"]
    return int(re.search(r"REG:(\d+)", usage)[1]), lines, _innermost_loops(sass)


def _cuobjdump(flag: str, cubin: bytes) -> str:
    """What the disassembler in Triton's wheel prints."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyfused.kernels.audit", description=__doc__)
    parser.add_argument("--full", action="store_true", help="sweep more shapes, ranks and dtypes")
    parser.add_argument("--call", default="", help="only calls whose description contains this text")
    parser.add_argument("--target", action="append", type=int, help="only this capability, for example 90; repeatable")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at work at once")
    options = parser.parse_args(arguments)
    targets = tuple(
        t for t in TARGETS if not options.target or t.capability[0] * 10 + t.capability[1] in options.target
    )
    if not targets:
        parser.error(f"--target must be one of {[t.capability[0] * 10 + t.capability[1] for t in TARGETS]}")
    selection = targets, options.full, options.call
    global _work
    # Processes that are forked have it from here.
    work = _work = cases(*selection)
    bad = 0
    print(f"{len(work)} compilations for {len(targets)} targets")
    print(f"{'sm':>4} {'kernel':26} {'regs':>4} {'stack':>5} {'spills':>6} {'shared':>7}  {'tensor cores':14} call")
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for finding in pool.map(_compile_index, itertools.repeat(selection), range(len(work))):
            sm = finding.capability[0] * 10 + finding.capability[1]
            print(
                f"{sm:>4} {finding.kernel:26} {finding.registers:>4} {finding.stack:>5} {finding.spills:>6} "
                f"{finding.shared:>7}  {finding.instructions:14} {finding.case_label}",
                flush=True,
            )
            for fault in finding.faults:
                print(f"     FAULT {fault}", flush=True)
            bad += bool(finding.faults)
    print(f"{len(work) - bad} passed, {bad} failed")
    return 1 if bad else 0


_work: list[Case] | None = None


def _compile_index(selection: tuple[tuple[Target, ...], bool, str], index: int) -> Finding:
    # Launches hold compiled functions and meta tensors, which do not travel between processes.
    global _work
    if _work is None:
        _work = cases(*selection)
    return compile_case(_work[index])


if __name__ == "__main__":
    sys.exit(main())
