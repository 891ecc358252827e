"""What a call costs with the CUDA C++ and with the Triton kernels, by arithmetic.

Three things count: which instruction multiplies, what one backend computes twice, and how many bytes the kernels read
and write through the second-level cache. Each operator has its own unit: its two costs are compared with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

# The costs with cuda and with triton, infinite where there are no kernels, and a function that explains them: traced
# code cannot make text of sizes.
Costs = tuple[float, float, Callable[[], str]]

# Operators whose tiles of rows keep a narrow middle on chip -> what the middle's width is called in their sizes.
_NARROW = {"adapter_residual": "h", "cross_attention_residual": "J"}

# An A100: multiplications in one microsecond (312 TFLOP/s).
_PER_MICROSECOND = 156e6
# The time that one element of x takes, counted in multiplications. To load it from memory: 2 bytes at 1.7 TB/s beside
# 312 TFLOP/s, an A100; other GPUs take between 0.5 and 1.5 of it. To draw its dropout mask: a quarter of Philox's 80
# integer instructions, at 16 multiplications each.
_FROM_MEMORY, _MASK = 184, 320
# Triton's products use wgmma (9.x) or tcgen05 (10.x); mma.sync, cuda's, has about 0.62 of wgmma's rate (Luo et al.,
# "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", 2024).
_FASTER_PRODUCTS, _MMA_SYNC = (9, 10), 1.6


def costs(operator: str, capability: tuple[int, int], sizes: Mapping[str, float]) -> Costs:
    """Of forward; backward is alike. ``sizes`` as `preference`'s."""
    if operator in ("projection_residual", "mixed_lora_linear"):
        return float("inf"), 1.0, lambda: "no other backend has kernels for it"
    if operator == "lora_linear":
        return _lora_linear(capability, sizes)
    return _bottleneck(capability, sizes["C"], sizes[_NARROW[operator]], sizes["cuda_rows"])


def _lora_linear(capability: tuple[int, int], sizes: Mapping[str, float]) -> Costs:
    n, rank = sizes["N"], 16 * -(-sizes["R"] // 16)
    # The CUDA C++ kernels make P, and draw the mask, anew for each column of tiles.
    columns = n / (256 if rank == 16 else 128)
    cuda, triton = n + rank * columns, n + _FROM_MEMORY
    if capability[0] in _FASTER_PRODUCTS:
        cuda *= _MMA_SYNC
    if sizes["dropout_p"]:
        cuda, triton = cuda + _MASK * columns, triton + _MASK
    elif rank * columns < _FROM_MEMORY:
        # So do Triton's, rather than read x once more.
        triton = n + rank * columns

    def why() -> str:
        by_cuda, by_triton = (sizes["M"] * sizes["K"] * cost / _PER_MICROSECOND for cost in (cuda, triton))
        return f"forward takes {by_cuda:.1f} us with cuda, {by_triton:.1f} us with triton (model, an A100)"

    return cuda, triton, why


def _bottleneck(capability: tuple[int, int], channels: float, narrow: float, cuda_rows: float) -> Costs:
    """Each tile of rows reads both weights whole; triton reads the rows themselves twice, cuda once."""
    triton_rows = max(64 if capability[0] == 9 else 32, min(128, 8192 // max(64, narrow)))

    def bytes_moved(streams: int, rows: float) -> float:
        # Each weight has C x narrow elements; forward also reads the residual and writes y, all of 2 bytes.
        return 2 * channels * (streams + 2 * narrow / rows)

    triton = bytes_moved(4, triton_rows)
    if not cuda_rows:
        return float("inf"), triton, lambda: "a tile of rows does not fit beside cuda's weights on chip"
    cuda = bytes_moved(3, cuda_rows)
    return cuda, triton, lambda: f"forward moves {cuda:.0f} bytes a row on chip with cuda, {triton:.0f} with triton"
