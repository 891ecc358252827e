"""How long a launch takes by its compiled code: a model, in microseconds. No GPU has measured any of it.

Of each step of a loop the multiprocessor's resources take so many cycles: the tensor cores for its products, the
schedulers for its instructions, shared memory and the port to the second-level cache for its bytes. A step takes the
longest of these for all blocks of a multiprocessor together, and for one block no less than what it waits for in vain.
What stands outside of the loops is issued once for each tile, branches that are not taken too. The multiprocessor that
has the most tiles sets the time of a launch, or else the second-level cache or the memory does, which all share.
`rates` has what a GPU does in a microsecond.

Calibration. Fitted to public ratios of Triton's GEMM to the library's, in 16 bits on an H100, at 8192x8192xK: the share
of the tensor cores' rate that a loop reaches, and what a tile of the library takes beside its loop. `LATENCY`, the
memory's share and that of attention are assumed. The library's product of 8192x8192x8192 has the rate that was measured
on an H200. `calibration` has the public ratios; a test holds the model to `TOLERANCE` from each, and to this table:

    K      operands by      public                 model
    512    pointers         0.76                   0.78
    1024   pointers         0.86                   0.82
    4096   pointers         0.81 to 0.90           0.87
    512    descriptors      0.92                   0.91
    1024   descriptors      0.97                   0.93
    4096   descriptors      0.95 to 0.98           0.96

Sources: pull request 5726 of triton-lang/triton (512), pull request 1038 of facebookexperimental/triton (1024; its
pointers are warp-specialised), issue 3672 of triton-lang/triton (K of 2816 to 3072), and, of descriptors at 4096, what
the authors of LoRAFusion (EuroSys 2026) give for its two kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pyfused.bench.predict.code import Code, Loop
from pyfused.bench.tune.search import L2_BYTES_PER_CYCLE
from pyfused.choice.rates import LAUNCH, Gpu, gpu

# Cycles in a microsecond: of an H200 what makes its tensor cores' 2048 multiply-adds a cycle the rate that a long
# product has, of the others the boost clock of the data sheet of the cards in `rates`. Bytes of the second-level cache.
CHIPS = {
    (8, 0): (1410, 40e6), (8, 6): (1695, 6e6), (8, 9): (2520, 72e6), (9, 0): (1540, 50e6), (12, 0): (2407, 96e6),
}  # fmt: skip
# The library's products reach this share of what the tensor cores could do: `rates` has what it reaches.
_LIBRARY = 0.95
# Share of the tensor cores' rate that a loop reaches, by how its operands come.
_EFFICIENCY = {"async": 0.88, "tma": 0.96, "": 0.88}
# Share of the memory's rate that a pass reaches, and of the cache that keeps what a launch before has left there.
_MEMORY, _KEPT = 0.85, 0.8
# Share of the rate of a long product that torch's attention reaches: a guess.
ATTENTION = 0.6
# Microseconds from a load to its data: between those of an idle and of a busy memory.
LATENCY = 0.6
# Schedulers of a multiprocessor, and bytes that its shared memory gives in a cycle.
_SCHEDULERS, _SHARED = 4, 128


class Chip(NamedTuple):
    """A GPU: `rates`' own, its clock in cycles of a microsecond, and the bytes that its cache keeps."""

    rates: Gpu
    clock: float
    kept: float

    @property
    def products(self) -> float:
        """Multiply-adds of a multiprocessor in a cycle, in 16 bits."""
        return self.rates.narrow / _LIBRARY / self.rates.multiprocessors / self.clock

    @property
    def memory(self) -> float:
        """Bytes in a microsecond that a pass reaches."""
        return _MEMORY * self.rates.memory


def chip(capability: tuple[int, int]) -> Chip:
    """Of a compute capability.

    Raises:
        ValueError: the model does not know it.
    """
    if capability not in CHIPS:
        raise ValueError(f"capability must be one of {sorted(CHIPS)}, got {capability}")
    clock, cache = CHIPS[capability]
    return Chip(gpu(capability), clock, _KEPT * cache)


@dataclass(frozen=True)
class Work:
    """What a launch has to do.

    Attributes:
        programs: of its grid.
        tiles: that they work on, one or several each.
        steps: of each loop that brings operands, for a tile; 0 where nobody knows.
        nbytes: that memory gives or takes.
        through_cache: bytes of all tensors, each once.
        by_descriptor: bytes of a step that come by descriptors, which the machine code does not tell.
        inner: steps of a loop that brings nothing, beside one that does; 0 where nobody knows.
    """

    programs: int
    tiles: int
    steps: int
    nbytes: float
    through_cache: float
    by_descriptor: float = 0.0
    inner: int = 0

    def steps_of(self, loop: Loop, code: Code) -> int:
        """Of one of the kernel's loops."""
        return self.inner if not loop.copies and any(each.copies for each in code.loops) else self.steps


class Time(NamedTuple):
    """Microseconds of a launch, with what it adds between two, and what sets them."""

    microseconds: float
    limit: str


def launch_time(code: Code, work: Work, there: Chip) -> Time:
    """Of one launch whose operands are where ``work`` says.

    Raises:
        ValueError: the kernel has loops of which the work does not tell the steps, or what descriptors bring.
    """
    steps = [work.steps_of(loop, code) for loop in code.loops]
    if not all(steps) or any(loop.copies == "tma" and not work.by_descriptor for loop in code.loops):
        raise ValueError(f"work must have steps, and bytes by descriptor where loops have them, got {work}")
    active = min(work.programs, there.rates.multiprocessors)
    together = min(code.blocks, -(-work.programs // active))
    rounds, last = divmod(-(-work.tiles // active), together)
    spent: dict[str, float] = {}
    for blocks, times in ((together, rounds), (last, 1)):
        for limit, cycles in _round(code, work, there, blocks).items() if blocks and times else ():
            spent[limit] = spent.get(limit, 0.0) + times * cycles
    # Memory and its cache serve whom they can, behind the first that has come.
    of_tile = sum(times * _moved(work, loop) for times, loop in zip(steps, code.loops, strict=True))
    through = work.tiles * of_tile if code.loops else work.through_cache
    found = [
        Time(sum(spent.values()) / there.clock, max(spent, key=spent.__getitem__)),
        Time(LATENCY + through / there.rates.cache, "second-level cache"),
        Time(LATENCY + work.nbytes / there.memory, "memory"),
    ]
    longest = max(found)
    return longest._replace(microseconds=longest.microseconds + LAUNCH)


def _round(code: Code, work: Work, there: Chip, blocks: int) -> dict[str, float]:
    """Cycles, by what sets them, in which a multiprocessor makes a tile in each of so many blocks."""
    outside = max(code.outside * code.warps / _SCHEDULERS, code.moved / L2_BYTES_PER_CYCLE)
    found = {"start and end": LATENCY * there.clock + blocks * outside}
    for loop in code.loops:
        limit, cycles = _step(loop, code, work, there, blocks)
        found[limit] = found.get(limit, 0.0) + work.steps_of(loop, code) * cycles
    return found


def _moved(work: Work, loop: Loop) -> float:
    """Bytes of a step through the second-level cache."""
    return loop.moved + (work.by_descriptor if loop.copies == "tma" else 0.0)


def _step(loop: Loop, code: Code, work: Work, there: Chip, blocks: int) -> tuple[str, float]:
    """(what sets it, cycles) of a step of a loop in so many blocks of a multiprocessor."""
    moved = _moved(work, loop)
    products = loop.products / there.products / _EFFICIENCY[loop.copies]
    # The last stage is being read. What registers hold is asked for one step ahead.
    ahead = max(1, code.stages - 1) if loop.only_copies else 1
    cycles = {
        "tensor cores": blocks * products,
        "instructions": blocks * loop.instructions * code.warps / _SCHEDULERS,
        "shared memory": blocks * (loop.shared + moved) / _SHARED,
        "second-level cache": blocks * moved / L2_BYTES_PER_CYCLE,
        "latency": LATENCY * there.clock / ahead + (products if loop.drains else 0.0),
    }
    return max(cycles.items(), key=lambda each: each[1])


# Tiles of the library's kernels on 9.0, whose blocks share half of their operands in clusters of two; what they take
# beside their loops, and where they cut the last wave along K, in cycles.
_LIBRARY_TILES = ((128, 256), (256, 128), (128, 128), (128, 192), (64, 256))
_LIBRARY_BESIDE, _LIBRARY_CUT, _LIBRARY_EFFICIENCY = 1500, 3000, 0.965


def library_product(m: int, n: int, k: int, there: Chip, batch: int = 1) -> float:
    """Microseconds of ``batch`` (default 1) products (M, K) (K, N) of the library's, in 16 bits, by one launch."""
    processors, depth = there.rates.multiprocessors, -(-k // 64)
    cache = there.rates.cache / there.clock / processors

    def cycles(rows: int, columns: int, cut: bool) -> float:
        products = rows * columns * 64 / there.products / _LIBRARY_EFFICIENCY
        step = max(products, (rows + columns / 2) * 64 * 2 / cache)
        tiles = batch * -(-m // rows) * -(-n // columns)
        waves = -(-tiles // processors)
        if cut:
            return tiles * depth / processors * step + waves * _LIBRARY_BESIDE + _LIBRARY_CUT
        return waves * (depth * step + _LIBRARY_BESIDE)

    least = min(cycles(*tile, cut) for tile in _LIBRARY_TILES for cut in (False, True))
    return least / there.clock + LAUNCH


def pass_time(nbytes: float, there: Chip) -> float:
    """Microseconds of a launch that moves so many bytes of memory and does nothing else that takes long."""
    return nbytes / there.memory + LAUNCH


class Public(NamedTuple):
    """A published ratio of a GEMM of Triton's to the library's at 8192x8192xK: between two, and by the model."""

    k: int
    loads: str
    least: float
    most: float
    model: float


# How far the model may be from what was published.
TOLERANCE = 0.04
# Plain products of 128x256x64 in 8 warps and 3 stages, as Triton 3.7.1 compiles them for 9.0: a program for each tile,
# and a persistent grid of programs.
_GEMMS = {
    "async": Code(8, 3, 1, (Loop(133, 2097152, 81920, 49152, "async", False),), 795, 163840),
    "tma": Code(8, 3, 1, (Loop(81, 2097152, 81920, 0, "tma", False),), 753, 0),
}


def calibration() -> list[Public]:
    """The published ratios, and the model's."""
    there = chip((9, 0))
    tiles = 8192 // 128 * 8192 // 256

    def ratio(loads: str, k: int) -> float:
        programs = tiles if loads == "async" else there.rates.multiprocessors
        operands = 2 * (2 * 8192 * k + 8192 * 8192)
        work = Work(programs, tiles, k // 64, operands, operands, 64 * (128 + 256) * 2)
        return library_product(8192, 8192, k, there) / launch_time(_GEMMS[loads], work, there).microseconds

    return [Public(*row, ratio(row[1], row[0])) for row in _PUBLIC]


# K, how operands come, and the ratio, between two.
_PUBLIC = (
    (512, "async", 0.76, 0.76), (1024, "async", 0.86, 0.86), (4096, "async", 0.81, 0.90),
    (512, "tma", 0.92, 0.92), (1024, "tma", 0.97, 0.97), (4096, "tma", 0.95, 0.98),
)  # fmt: skip
