"""What the model takes from a compiled kernel: its registers, and what a step of each loop asks of a multiprocessor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pyfused.kernels import audit
from pyfused.kernels.occupancy import blocks_per_multiprocessor
from pyfused.kernels.recording import Launch, Target

# Of products of a warpgroup and of a warp: rows, columns, length; of the first, whether A lies in shared memory too.
_HGMMA = re.compile(r"\bHGMMA\.(\d+)x(\d+)x(\d+)\S* \w+, (gdesc)?")
_HMMA = re.compile(r"\bHMMA\.(\d\d)(\d)(\d+)\b")
# Bytes that a thread moves, by the instruction's suffix; a matrix of LDSM is 16 bytes of each thread of eight.
_WIDTHS = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}
_MATRICES = re.compile(r"\b(?:LDSM|STSM)\b.*?\.([124])\b")
_SHARED = re.compile(r"\b(?:LDS|STS)\b(\S*)")
_GLOBAL = re.compile(r"\b(?:LDG|STG|LDGSTS)\b(\S*)")
_LATE = re.compile(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x0\b")


@dataclass(frozen=True)
class Loop:
    """A step of one loop that has products, of one block.

    Attributes:
        instructions: of a warp.
        products: multiply-adds of the tensor cores.
        shared: bytes to and from shared memory, but for what asynchronous copies write there.
        moved: bytes of loads, stores and copies by all threads; 0 where a descriptor names them.
        copies: "tma", "async" or "", the way in which its operands come.
        drains: it waits for its own products.
        only_copies: nothing comes through registers.
    """

    instructions: int
    products: int
    shared: int
    moved: int
    copies: str
    drains: bool
    only_copies: bool = True


@dataclass(frozen=True)
class Code:
    """A kernel.

    Attributes:
        warps, stages: of its launch.
        blocks: how many fit on a multiprocessor.
        loops: those that have products.
        outside: instructions of a warp outside of them.
        moved: bytes of loads, stores and copies there, by all threads of a block.
    """

    warps: int
    stages: int
    blocks: int
    loops: tuple[Loop, ...]
    outside: int
    moved: int


def compiled(launch: Launch, target: Target) -> Code:
    """Of a launch, as Triton compiles it for the target; from its cache where it is there.

    Raises:
        ValueError: of tcgen05, whose products are no instructions of a known size.
    """
    made = audit.specialisation(launch, target).compile()
    registers, lines, loops = audit.machine_code(made)
    if any("UTCHMMA" in line for line in lines):
        raise ValueError(f"target must have its products in registers or wgmma, got {target.capability}")
    found = [read for loop in loops if (read := loop_of(loop, launch.num_warps)).products]
    whole = loop_of(lines, launch.num_warps)
    return Code(
        launch.num_warps, launch.num_stages,
        blocks_per_multiprocessor(registers, made.metadata.shared, launch.num_warps, target),
        tuple(found),
        whole.instructions - sum(loop.instructions for loop in found),
        whole.moved - sum(loop.moved for loop in found),
    )  # fmt: skip


def loop_of(lines: Sequence[str], warps: int) -> Loop:
    """Of the machine code of a loop."""
    # What the assembler pads waits with is predicated off.
    text = "\n".join(line for line in lines if not line.startswith("@!PT"))
    products = shared = 0
    for sizes in _HGMMA.findall(text):
        m, n, k = map(int, sizes[:3])
        products += m * n * k * warps // 4
        shared += (n + (m if sizes[3] else 0)) * k * 2 * warps // 4
    for sizes in _HMMA.findall(text):
        m, n, k = map(int, sizes)
        products += m * n * k * warps
    shared += 32 * warps * sum(map(_width, _SHARED.findall(text)))
    shared += 4 * 32 * warps * sum(map(int, _MATRICES.findall(text)))
    copies = "tma" if "UTMALDG" in text else "async" if "LDGSTS" in text else ""
    moved = 32 * warps * sum(map(_width, _GLOBAL.findall(text)))
    return Loop(
        len(lines), products, shared, moved, copies, bool(_LATE.search(text)), re.search(r"\bLDG\b", text) is None
    )


def _width(suffixes: str) -> int:
    return next((size for name, size in _WIDTHS.items() if name in suffixes), 4)
