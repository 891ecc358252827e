"""What GPUs do in a microsecond, and how near a kernel comes to it: what the choice by arithmetic stands on.

No kernel of pyfused has been timed on a GPU. A band says between which two efficiencies a kernel is expected, and from
what; a measured row decides where there is one.
"""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """What a GPU sustains: multiply-adds in a microsecond in 16 bits and in exact float32, bytes in a microsecond from
    memory and from the second-level cache; and its multiprocessors."""

    narrow: float
    wide: float
    memory: float
    cache: float
    multiprocessors: int


def _gpu(narrow: float, wide: float, memory: float, multiprocessors: int, cache: float | None = None) -> Gpu:
    """Of a data sheet's TFLOP/s and TB/s. The shares that are sustained are an H200's, measured: 790 of 989 TFLOP/s,
    4.3 of 4.8 TB/s. Where nobody has published the rate of the second-level cache it is twice the memory's."""
    return Gpu(0.4e6 * narrow, 0.4e6 * wide, 0.9e6 * memory, 1e6 * (cache or 2 * memory), multiprocessors)


# Data sheets of an A100, a GeForce RTX 3090 and 4090, an H200, a B200 and a GeForce RTX 5090. The cache of the A100 is
# NVIDIA's figure of 5120 bytes a cycle, that of the H200 is the H100's (Luo et al., "Benchmarking and Dissecting the
# Nvidia Hopper GPU Architecture", 2024).
_GPUS = {
    (8, 0): _gpu(312, 19.5, 2.04, 108, 7.2),
    (8, 6): _gpu(71, 35.6, 0.936, 82),
    (8, 9): _gpu(165, 82.6, 1.008, 128),
    (9, 0): _gpu(989, 67, 4.8, 132, 9.0),
    (10, 0): _gpu(2250, 75, 8.0, 148),
    (12, 0): _gpu(210, 104.8, 1.79, 170),
}

# Of a launch: what it adds to the GPU's time, in microseconds, between kernels of one stream.
LAUNCH = 1.5
# Of the host, in microseconds: one operation of torch with its part of autograd, what every call of an operator costs
# beside its launches, and a launch of our own. The first is usual; the others have the ratios to it that a prototype
# had over a driver that runs nothing, with the arguments of every launch kept.
TORCH_OPERATION, CALL, OWN_LAUNCH = 6.0, 18.0, 1.5

# Multiply-adds in float32 whose time the dropout mask of one element takes: 20 integer instructions of Philox, half of
# which hide behind loads.
MASK = 10

_ANY = (0, 0)
# Capabilities whose kernels use the same instructions as another's, and are as near to their GPU's rates by this table.
_LIKE = {(8, 6): (8, 0), (8, 9): (8, 0)}
# Kernel -> capability -> (least, greatest) efficiency: for products against the library's GEMM, for the bottleneck
# family against the GPU's own rates. `_ANY` holds for capabilities that are not listed.
_BANDS: dict[str, dict[tuple[int, int], tuple[float, float]]] = {
    # 9.0: a GEMM that loads by pointers, public figures between 512 and 8192 of K. 8.0: 0.89 to 0.97, and 0.71 once.
    "triton gemm": {
        (8, 0): (0.85, 1.0),
        (9, 0): (0.70, 0.92),
        _ANY: (0.60, 1.02),
    },
    # 9.0: public figures of GEMMs of Triton that load by tensor descriptors and are persistent, at the same K.
    "triton gemm, tma": {(9, 0): (0.85, 1.02), _ANY: (0.60, 1.02)},
    # Without a matrix instruction.
    "triton gemm, float32": {_ANY: (0.40, 0.85)},
    # mma.sync has at best 0.62 of wgmma's rate (the paper above), and less of tcgen05's; elsewhere it is what there is.
    "cuda gemm": {
        (8, 0): (0.70, 0.95),
        (9, 0): (0.40, 0.62),
        (10, 0): (0.20, 0.50),
        _ANY: (0.40, 0.95),
    },
    # Bound by what moves through the second-level cache, of which loops that do not prefetch reach 0.6.
    "triton bottleneck": {(8, 0): (0.60, 0.90), (9, 0): (0.60, 0.90), _ANY: (0.50, 0.90)},
    "triton bottleneck, float32": {_ANY: (0.40, 0.85)},
    "cuda bottleneck": {(8, 0): (0.60, 0.90), (9, 0): (0.60, 0.90), _ANY: (0.50, 0.90)},
    # One narrow pass over rows beside the library's products.
    "triton rows": {_ANY: (0.60, 1.0)},
}


def gpu(capability: tuple[int, int]) -> Gpu:
    """By compute capability; of one that is not listed, the nearest below, or the oldest."""
    below = [known for known in _GPUS if known <= capability]
    return _GPUS[max(below, default=min(_GPUS))]


def band(capability: tuple[int, int], kernel: str | None) -> tuple[float, float]:
    """(least, greatest) efficiency of a kernel; (1, 1) of the library's, None."""
    if kernel is None:
        return 1.0, 1.0
    known = _BANDS[kernel]
    return known.get(_LIKE.get(capability, capability), known[_ANY])
