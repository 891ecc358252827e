"""The work of an operator in each backend and plan, and of the eager formula, by sizes: a model, in microseconds.

Every tensor as large as x or y costs its bytes at the memory's rate each time that a kernel reads or writes it; what is
as narrow as the rank is left out where something wide stands beside it. Products cost their multiply-adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pyfused.choice.rates import CALL, LAUNCH, MASK, OWN_LAUNCH, TORCH_OPERATION, Gpu, band, gpu


class Work(NamedTuple):
    """One direction of a call.

    Attributes:
        fixed: microseconds of the GPU in the library's products and in passes over memory.
        own: microseconds of the GPU that one kernel of pyfused would take at an efficiency of 1.
        kernel: which, by its name in the table of bands; None where ``own`` is 0.
        launches, operations: of pyfused's kernels, and of torch's.
        call: microseconds of the host beside them.
    """

    fixed: float
    own: float = 0.0
    kernel: str | None = None
    launches: int = 0
    operations: int = 0
    call: float = CALL

    def on_gpu(self, efficiency: float) -> float:
        """Microseconds where nobody waits for the host, as in the replay of a CUDA graph."""
        return self.fixed + self.own / efficiency + LAUNCH * (self.launches + self.operations)

    def microseconds(self, efficiency: float) -> float:
        """The GPU's time or the host's, whichever is longer."""
        return max(self.on_gpu(efficiency), self.call + OWN_LAUNCH * self.launches + TORCH_OPERATION * self.operations)


# Forward and backward.
Directions = tuple[Work, Work]
# (backend, plan) -> its work; an operator whose plans differ in memory alone has the plan "" here.
Plans = dict[tuple[str, str], Directions]

# The plans that make the products by the library, as the eager formula does, and less of everything else.
LIBRARY = {("portable", "blas"), ("triton", "blas"), ("portable", ""), ("portable", "standard")}

# What the portable backend's mask moves for each element, in bytes, and its operations: Philox in 64-bit integers.
_MASK_BYTES, _MASK_OPERATIONS = 1200, 350
# An eager dropout reads and writes an element of 2 bytes and writes a byte of mask: in passes over such a tensor.
EAGER_DROPOUT = 2.5
# Instructions of a warp for 64 rows, 64 channels and 64 of h in Triton's sums over rows; read from the machine code for
# 9.0. A multiprocessor issues for 128 lanes.
_ISSUED, _LANES = 753 / 64**3, 128


def works(
    operator: str, capability: tuple[int, int], itemsize: int, sizes: Mapping[str, float]
) -> tuple[Directions, Plans]:
    """(the eager formula, backend and plan -> work).

    Args:
        operator: whose kernels serve the call.
        capability: of the GPU.
        itemsize: bytes of an element of what is multiplied.
        sizes: as `order.choose` has them.
    """
    there = gpu(capability)
    if operator in ("lora_linear", "mixed_lora_linear"):
        return _lora_linear(capability, there, itemsize, sizes)
    if operator == "projection_residual":
        return _projection(capability, there, itemsize, sizes)
    if operator == "adapter_residual":
        return _adapter(capability, there, itemsize, sizes)
    return _attention(capability, there, itemsize, sizes)


def _rate(there: Gpu, itemsize: int) -> float:
    return there.narrow if itemsize == 2 else there.wide


Tile = tuple[int, int]
_SMALL_TILES = ((128, 128), (64, 128), (64, 64))
_TILES = ((128, 256), *_SMALL_TILES)
# Major compute capability -> tiles of the GEMM that loads by tensor descriptors; its fewest rows and largest rank.
_TMA_TILES = {9: ((128, 256), (128, 128), (64, 128)), 10: ((128, 128),)}
_TMA_ROWS, _TMA_RANK = 128, 64


class _Gemm(NamedTuple):
    """y (M, N) = x (M, K) W^T: its three sizes and the bytes of an element, on a GPU."""

    there: Gpu
    itemsize: int
    m: float
    n: float
    k: float

    @property
    def products(self) -> float:
        return self.m * self.n * self.k / _rate(self.there, self.itemsize)

    @property
    def memory(self) -> float:
        return (self.m * self.k + self.m * self.n + self.n * self.k) * self.itemsize / self.there.memory

    def library(self) -> float:
        """Microseconds: the library cuts tiles, and K, so that every multiprocessor works."""
        return max(self.products, self.memory)

    def own(self, tiles: Sequence[Tile], beside: float = 0.0, best: Sequence[Tile] | None = None) -> float:
        """Microseconds of the busiest multiprocessor in the tile that suits best, where the efficiency is that of large
        products in full waves.

        A tile takes the products, or as long as its operands take from the second-level cache: small ones starve.

        Args:
            tiles: (rows, columns) of each.
            beside: columns that each tile makes beside its own.
            best: those that large products are made in; None (the default) where they are the same.
        """
        operands = 2 * self.there.narrow / self.there.cache

        def taken(tile: Tile, more: float) -> float:
            return max(tile[0] * (tile[1] + more), operands * sum(tile))

        def busiest(tile: Tile) -> float:
            waves = -(-(-(-self.m // tile[0]) * -(-self.n // tile[1])) // self.there.multiprocessors)
            return waves * self.there.multiprocessors * taken(tile, beside)

        full = min(taken(tile, 0.0) / (tile[0] * tile[1]) for tile in best or tiles)
        return max(self.products * min(map(busiest, tiles)) / (self.m * self.n * full), self.memory)


def _lora_linear(
    capability: tuple[int, int], there: Gpu, itemsize: int, sizes: Mapping[str, float]
) -> tuple[Directions, Plans]:
    m, n, k, drops = sizes["M"], sizes["N"], sizes["K"], bool(sizes["dropout_p"])
    rank = max(16, sizes["R"])
    x, y = m * k * itemsize / there.memory, m * n * itemsize / there.memory
    forward, backward = _Gemm(there, itemsize, m, n, k), _Gemm(there, itemsize, m, k, n)
    gemm = forward.library()
    converts, adapters = sizes["weight_bytes"] > itemsize, int(sizes["adapter_bytes"] > itemsize)
    cast = converts * n * k * (sizes["weight_bytes"] + itemsize) / there.memory
    mask = drops * MASK * m * k / there.wide
    masking = drops * _MASK_BYTES * m * k / there.memory
    dropped = EAGER_DROPOUT * x * drops
    eager = (
        Work(gemm + cast + x + 6 * y + dropped, operations=5 + drops + converts + 2 * adapters, call=0.0),
        Work(gemm + 4 * y + 5 * x + dropped, operations=7 + drops + 2 * adapters, call=0.0),
    )
    operations = converts + 2 * adapters + _MASK_OPERATIONS * drops
    portable = (
        Work(gemm + cast + x + 2 * y + masking, operations=3 + operations),
        Work(gemm + cast + 2 * y + 3 * x + 2 * masking, operations=5 + operations + _MASK_OPERATIONS * drops),
    )
    # Both of dy's products from one pass, which writes parts of Q for each tile of 128 columns; or a pass for each.
    sums = x + y + mask + (8 * rank * m * n / 128 / there.memory if rank <= 16 else y)
    blas = (
        Work(gemm + cast + x + mask + 2 * y, launches=2 + adapters, operations=2 + converts),
        Work(gemm + cast + sums + 2 * x + mask, launches=5 + drops + adapters, operations=2 + converts),
    )
    by_pointers = "triton gemm" if itemsize == 2 else "triton gemm, float32"
    tma = _loads_by_descriptors(capability, itemsize, sizes)
    kernel = "triton gemm, tma" if tma else by_pointers
    # mma.sync has its operands in registers too, which leaves a thread fewer for a tile. So does a masked term in dx,
    # unless it is made by parts and no wide P beside it.
    tiles: tuple[Tile, ...] = _TILES if capability[0] == 9 else _SMALL_TILES
    dx_tiles = _SMALL_TILES if drops else tiles
    own_dx_tiles = dx_tiles
    if tma:
        tiles = dx_tiles = own_dx_tiles = _TMA_TILES[capability[0]]
        if drops and rank > 32:
            own_dx_tiles = tuple([tile for tile in tiles if tile[1] <= 128])
    shrink_expand = (
        Work(cast + x + mask, forward.own(tiles), kernel, 3 + adapters, converts),
        Work(cast + sums + mask, backward.own(dx_tiles, best=tiles), kernel, 6 + adapters, converts),
    )

    def one_launch(
        tiles: Sequence[Tile], dx_tiles: Sequence[Tile], best: Sequence[Tile], kernels: tuple[str, str], *launches: int
    ) -> Directions:
        own = forward.own(tiles, rank, best), backward.own(dx_tiles, rank, best)
        return (
            # Every column of tiles draws the mask anew.
            Work(cast, own[0] + mask * -(-n // tiles[0][1]), kernels[0], launches[0], converts),
            Work(cast + x + y + 2 * mask, own[1], kernels[1], launches[1], converts),
        )

    # A tile of x is dropped on its way to the product.
    kernels = by_pointers if drops else kernel, kernel
    cuda_tiles = _TILES if rank <= 16 else _SMALL_TILES
    return eager, {
        ("portable", "blas"): portable,
        ("triton", "blas"): blas,
        ("triton", "shrink_expand"): shrink_expand,
        ("triton", "one_launch"): one_launch(tiles, own_dx_tiles, tiles, kernels, 1 + adapters, 5 + adapters),
        ("cuda", "one_launch"): one_launch(cuda_tiles, cuda_tiles, _TILES, ("cuda gemm", "cuda gemm"), 1, 3),
    }


def _loads_by_descriptors(capability: tuple[int, int], itemsize: int, sizes: Mapping[str, float]) -> bool:
    """Whether Triton's GEMM is the one that has tensor descriptors."""
    fits = sizes["tma"] and sizes["M"] >= _TMA_ROWS and sizes["R"] <= _TMA_RANK
    return bool(capability[0] in _TMA_TILES and itemsize == 2 and fits)


def _adapter(
    capability: tuple[int, int], there: Gpu, itemsize: int, sizes: Mapping[str, float]
) -> tuple[Directions, Plans]:
    m, channels, width, drops = sizes["M"], sizes["C"], sizes["h"], bool(sizes["dropout_p"])
    row, middle = m * channels * itemsize / there.memory, m * width * itemsize / there.memory
    product, dropped = m * channels * width, EAGER_DROPOUT * middle * drops
    rate = _rate(there, itemsize)
    eager = (
        Work(max(9 * row + 4 * middle + dropped, 2 * product / rate), operations=7 + drops, call=0.0),
        Work(max(15 * row + 8 * middle + dropped, 4 * product / rate), operations=14 + drops, call=0.0),
    )
    # Float32 throughout: bytes of each element of z, then of h.
    masking = drops * _MASK_BYTES * m * width
    widened = m * channels * 6 * (itemsize == 2)
    portable = (
        Work(
            (40 * m * channels + widened + 32 * m * width + masking) / there.memory + 2 * product / there.wide,
            operations=14 + _MASK_OPERATIONS * drops,
        ),
        Work(
            (72 * m * channels + 3 * widened + 60 * m * width + masking) / there.memory + 5 * product / there.wide,
            operations=25 + _MASK_OPERATIONS * drops,
        ),
    )
    mask = drops * MASK * m * width / there.wide
    weight_bytes = sizes["weight_bytes"]
    # Triton's weights are converted before, and backward's multiplied by the layer's scale.
    launches = 1 + (weight_bytes != itemsize), 3
    fused = _bottleneck(capability, there, itemsize, sizes, width, (2, 5), launches, weight_bytes, 5, mask)
    return eager, {("portable", ""): portable, **fused}


def _attention(
    capability: tuple[int, int], there: Gpu, itemsize: int, sizes: Mapping[str, float]
) -> tuple[Directions, Plans]:
    """The core of the absorbed plans."""
    m, channels, width, drops = sizes["M"], sizes["C"], sizes["J"], bool(sizes["dropout_p"])
    norms = int(sizes["norm_match"])
    row, middle = m * channels * itemsize / there.memory, m * width * itemsize / there.memory
    product, dropped = m * channels * width, EAGER_DROPOUT * middle * drops
    rate = _rate(there, itemsize)
    eager = (
        Work(
            max((7 + 6 * norms) * row + 5 * middle + dropped, 2 * product / rate),
            operations=9 + 5 * norms + drops,
            call=0.0,
        ),
        Work(
            max((9 + 12 * norms) * row + 8 * middle + dropped, 4 * product / rate),
            operations=14 + 8 * norms + drops,
            call=0.0,
        ),
    )
    masking = drops * _MASK_BYTES * m * width
    widened = m * channels * 6 * (itemsize == 2)
    portable = (
        Work(
            ((16 + 40 * norms) * m * channels + 2 * widened + 24 * m * width + masking) / there.memory
            + 2 * product / there.wide,
            operations=10 + 5 * norms + _MASK_OPERATIONS * drops,
        ),
        Work(
            ((20 + 60 * norms) * m * channels + 3 * widened + 44 * m * width + masking) / there.memory
            + (4 + norms) * product / there.wide,
            operations=20 + 10 * norms + _MASK_OPERATIONS * drops,
        ),
    )
    mask = drops * MASK * m * width / there.wide
    fused = _bottleneck(
        capability, there, itemsize, sizes, width, (2 + norms, 4 + 2 * norms), (1, 2), itemsize, 4, mask
    )
    return eager, {("portable", ""): portable, **fused}


def _bottleneck(
    capability: tuple[int, int],
    there: Gpu,
    itemsize: int,
    sizes: Mapping[str, float],
    width: float,
    products: tuple[int, int],
    launches: tuple[int, int],
    weight_bytes: float,
    middles: int,
    mask: float,
) -> Plans:
    """Each tile of rows reads both weights whole; Triton's kernels read the rows themselves twice, cuda's once.

    Args:
        width: of the narrow middle.
        products: of the rows, the channels and the middle, forward and backward.
        launches: of Triton's kernels.
        weight_bytes: that the CUDA C++ kernels read of each element of a weight.
        middles: tensors of the middle's size that backward reads or writes, each time that it does.
        mask: microseconds that drawing the middle's takes.
    """
    m, channels, cuda_rows = sizes["M"], sizes["C"], sizes["cuda_rows"]
    narrow = max(16, width)
    row, middle = m * channels * itemsize / there.memory, m * width * itemsize / there.memory
    product = m * channels * narrow / _rate(there, itemsize)
    triton_rows = max(64 if capability[0] == 9 else 32, min(128, 8192 // max(64, narrow)))
    sums = itemsize * m * (2 * channels * max(1, width / 64) + 2 * width * max(1, channels / 64)) / there.cache

    def directions(
        kernel: str, streams: int, rows: float, read: float, slower: float, issued: float, launches: tuple[int, int]
    ) -> Directions:
        moved = m * channels * (streams * itemsize + 2 * read * width / rows) / there.cache
        # Forward: z, the residual, y. Backward: dy and dz in one pass, dy and z in the other.
        forward = max(3 * row + middle, moved, products[0] * product / slower) + mask
        backward = max(4 * row + middles * middle, moved + sums, products[1] * product / slower, issued) + mask
        return Work(0.0, forward, kernel, launches[0]), Work(0.0, backward, kernel, launches[1])

    issued = _ISSUED * m * channels * width / (there.wide / _LANES)
    kernel = "triton bottleneck" if itemsize == 2 else "triton bottleneck, float32"
    found: Plans = {("triton", ""): directions(kernel, 4, triton_rows, itemsize, 1.0, issued, launches)}
    if cuda_rows:
        # Its products are made by the instruction that its GEMM has.
        _, best = band(capability, "cuda gemm")
        found["cuda", ""] = directions("cuda bottleneck", 3, cuda_rows, weight_bytes, best, 0.0, (1, 3))
    return found


def _projection(
    capability: tuple[int, int], there: Gpu, itemsize: int, sizes: Mapping[str, float]
) -> tuple[Directions, Plans]:
    m, k, channels, norms = sizes["M"], sizes["K"], sizes["C"], int(sizes["norm_match"])
    product = _Gemm(there, itemsize, m, channels, k)
    gemm = product.library()
    row, elements = m * channels * itemsize / there.memory, m * channels / there.memory
    widened = 12 * (itemsize == 2)
    eager = (
        Work(gemm + (7 + 6 * norms) * row, operations=5 + 5 * norms, call=0.0),
        Work(2 * gemm + (8 + 12 * norms) * row, operations=9 + 8 * norms, call=0.0),
    )
    portable = (
        Work(gemm + (34 + widened + 24 * norms) * elements, operations=9 + 5 * norms),
        Work(2 * gemm + (40 + widened + 60 * norms) * elements, operations=12 + 10 * norms),
    )
    kernel = "triton gemm" if itemsize == 2 else "triton gemm, float32"
    triton = (
        # With norms a second pass reads what the first has written.
        Work(
            (1 + 2 * norms) * row,
            product.own(_TILES if capability[0] == 9 else _SMALL_TILES),
            kernel,
            launches=1 + norms,
        ),
        Work(2 * gemm, 5 * row, "triton rows", launches=1, operations=6),
    )
    return eager, {("portable", ""): portable, ("triton", ""): triton}
