"""What launches know of a GPU and of their configuration: recorded for the audit, forced for tuning."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from pyfused.choice import measured

_Config = TypeVar("_Config")

# Largest shared memory of one block in bytes, by compute capability (CUDA C++ Programming Guide, table of technical
# specifications per compute capability: the opt-in maximum per block).
SHARED_MEMORY = {(8, 0): 166_912, (8, 6): 101_376, (8, 9): 101_376, (9, 0): 232_448, (10, 0): 232_448, (12, 0): 101_376}


@dataclass(frozen=True)
class Target:
    """The GPU that a launch configuration is chosen for, with the name that rows measured on it carry.

    ``INTERPRETER`` stands for Triton's interpreter.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    name: str = ""


INTERPRETER = Target((0, 0), 4, 1 << 30)


@dataclass(frozen=True)
class LaunchWork:
    """What a launch does at least: its programs, and of each the FLOPs and the bytes to and from the L2 cache."""

    programs: int
    flops: float
    nbytes: float


@dataclass(frozen=True)
class Chosen:
    """A launch configuration as it was chosen: of which kernel, by which function, from which arguments."""

    kernel: str
    function: Callable[..., Any]
    sizes: tuple[object, ...]
    settings: tuple[tuple[str, object], ...]

    @property
    def arguments(self) -> dict[str, Any]:
        bound = inspect.signature(self.function).bind(*self.sizes, **dict(self.settings))
        bound.apply_defaults()
        return bound.arguments

    def config(self) -> Any:
        """What the function returns."""
        return self.function(*self.sizes, **dict(self.settings))


@dataclass(frozen=True)
class Launch:
    """One recorded launch: ``kernel[grid](**arguments, num_warps=..., num_stages=...)``."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    maxnreg: int | None

    @property
    def tensors(self) -> list[Tensor]:
        """Those among the arguments, alone or with their strides."""
        parts = (value if isinstance(value, tuple) else (value,) for value in self.arguments.values())
        return [part for each in parts for part in each if isinstance(part, Tensor)]


# Where `record` collects launches; None where they are made.
current: tuple[Target, list[Launch]] | None = None


class _Watches(threading.local):
    """What a thread tells of each launch that it makes; see `program`."""

    current: Any = None


watches = _Watches()


def measured_or_own(chosen: Chosen) -> Any:
    """The configuration of a row measured on this GPU, or else the function's own."""
    return _measured_or_own(chosen, measured.generation)


@functools.lru_cache(4096)
def _measured_or_own(chosen: Chosen, generation: int) -> Any:
    own = chosen.config()
    if not measured.TABLE.rows:
        return own
    gpu, dtype, rows, others = measured_for(chosen.arguments)
    row = measured.TABLE.nearest(gpu, chosen.kernel, dtype, rows, others)
    return own if row is None else dataclasses.replace(own, **row.found)


def measured_for(arguments: Mapping[str, Any]) -> tuple[str, str, int, dict[str, object]]:
    """(GPU, dtype, M, all other sizes) by which a row of a configuration is found."""
    others = dict(arguments)
    where, dtype = others.pop("target"), str(others.pop("dtype")).removeprefix("torch.")
    batch, length = others.pop("batch"), others.pop("length")
    # Images have a size of their own; a matrix has rows.
    return where.name, dtype, batch * length, others | ({"length": length} if batch > 1 else {})


# The configurations that `forced` was given, and where it collects what was chosen; None outside.
forcing: tuple[Mapping[Chosen, Any], list[Chosen]] | None = None


@contextlib.contextmanager
def forced(configs: Mapping[Chosen, Any]) -> Iterator[list[Chosen]]:
    """Inside, kernels start in these configurations, all others in their functions' own; collects what was chosen.

    One thread at a time: a tool for tuning, not for programs that train.
    """
    global forcing
    if forcing is not None:
        raise RuntimeError("forced() does not nest")
    found: list[Chosen] = []
    forcing = configs, found
    try:
        yield found
    finally:
        forcing = None


@contextlib.contextmanager
def record(for_target: Target) -> Iterator[list[Launch]]:
    """Collect the launches made inside, on meta tensors, instead of running them; configurations are ``for_target``'s.

    One thread at a time: a tool for the audit, not for programs that train.
    """
    global current
    if current is not None:
        raise RuntimeError("record() does not nest")
    launches: list[Launch] = []
    current = for_target, launches
    try:
        yield launches
    finally:
        current = None


def differing(own: Any, config: Any) -> dict[str, int]:
    """The fields in which a configuration differs from the one that ships."""
    ships = dataclasses.asdict(own)
    return {name: value for name, value in dataclasses.asdict(config).items() if value != ships[name]}


def neighbours(config: Any) -> Iterator[Any]:
    """Configurations that differ from ``config`` in one or two fields: a tile's side, warps, stages, splits."""
    fields = dataclasses.asdict(config)
    single = [[{name: other} for other in _others(name, value)] for name, value in fields.items()]
    pairs = (one | other for pair in itertools.combinations(single, 2) for one, other in itertools.product(*pair))
    for changes in itertools.chain(*single, pairs):
        yield dataclasses.replace(config, **changes)


def _others(name: str, value: int) -> Iterator[int]:
    if name.startswith("block_"):
        yield from (side for side in (value // 2, 2 * value) if 16 <= side <= 256)
    elif name == "num_warps":
        yield from ({4, 8} - {value})
    elif name == "num_stages":
        yield from (stages for stages in (value - 1, value + 1) if 2 <= stages <= 5)
    elif name == "splits":
        yield from (splits for splits in (value // 2, 2 * value) if splits >= 1)


def like_sizes(batch: int, length: int) -> list[tuple[int, int]]:
    """(B, L) of the sizes that share a configuration with this one: some between two powers of two.

    Of a matrix by its rows, of images by their number: these change with the batch, and every other configuration of a
    kernel is one more to compile.
    """
    number = length if batch == 1 else batch
    top = 1 << max(0, number - 1).bit_length()
    found = sorted({top // 2 + -(-top * part // 16) for part in range(1, 9)})
    return [(1, each) if batch == 1 else (each, length) for each in found]


def suits_best(
    configs: Sequence[_Config], cost: Callable[[_Config, int, int], float], batch: int, length: int
) -> _Config:
    """The one whose cost(config, B, L) over the least of any is lowest, in the mean of `like_sizes`."""
    sizes = like_sizes(batch, length)
    least = [min(cost(config, *size) for config in configs) for size in sizes]
    return min(configs, key=lambda config: sum(cost(config, *s) / best for s, best in zip(sizes, least, strict=True)))
