"""How a launch fills a multiprocessor of 9.0, by its registers, shared memory and tiles: rules of the audit.

- A block of 4 warps leaves room for a second one, unless one is all that a multiprocessor gets, and so does every block
  of the shrink pass, of which the configuration starts two for each multiprocessor.
- A kernel that memory's rate bounds has `FLIGHT` bytes of its rows under way, all blocks of a multiprocessor together.
- A tile of a product asks the second-level cache for at most `CACHE` bytes in a cycle of the tensor cores.

`left_out` says of which launches the last two do not hold, and why.
"""

from __future__ import annotations

from pyfused.kernels.lora_linear_config import PRODUCTS
from pyfused.kernels.recording import Launch, Target

# Bytes under way that hide the memory's latency, on each multiprocessor of 9.0: its rate times 0.8 us.
FLIGHT = 32 * 1024
# Bytes in a cycle: 128x256 in 16 bits takes 48, of which an H100's cache gives 44 where it serves all multiprocessors.
CACHE = 50
# Of a multiprocessor: registers, which a warp takes 256 at a time, and blocks; warps by capability, of all others the
# last. Bytes of shared memory that the system has in each block.
_REGISTERS, _MOST_BLOCKS, _RESERVED = 65536, 32, 1024
_WARPS, _MOST_WARPS = {(8, 6): 48, (8, 9): 48, (12, 0): 48}, 64


def blocks_per_multiprocessor(registers: int, shared: int, warps: int, target: Target) -> int:
    """How many blocks fit at once.

    Args:
        registers: of a thread.
        shared: bytes of a block.
        warps: of a block.
        target: the GPU; its multiprocessors have what a block may have of shared memory, and one reserve more.
    """
    of_block = warps * 256 * -(-32 * registers // 256)
    memory = (target.shared_memory + _RESERVED) // (shared + _RESERVED)
    most = _WARPS.get(target.capability, _MOST_WARPS) // warps
    return min(_REGISTERS // of_block, memory, most, _MOST_BLOCKS)


def faults(launch: Launch, target: Target, registers: int, shared: int) -> list[str]:
    """What is wrong with how a launch in 16 bits fills a multiprocessor of 9.0."""
    found = []
    blocks = blocks_per_multiprocessor(registers, shared, launch.num_warps, target)
    name = launch.kernel.__name__
    twice = (launch.num_warps == 4 and name != "_lora_tma_kernel") or name == "_lora_shrink_kernel"
    if twice and blocks < 2:
        found.append(f"{blocks} blocks per multiprocessor, 2 expected")
    if left_out(launch, target):
        return found
    size = launch.arguments
    if _is_product(launch):
        narrow = size["BLOCK_R"] if size.get("OWN_P") else 0
        columns = size["BLOCK_N"] + narrow
        asked = 2 * (size["BLOCK_M"] + columns) * PRODUCTS[target.capability] / (size["BLOCK_M"] * columns)
        if asked > CACHE:
            found.append(f"a tile asks the second-level cache for {asked:.0f} bytes a cycle, {CACHE} allowed")
        return found
    # Of rows alone: weights come out of the cache. Sums of an adapter read dy and z.
    rows = 2 if "a_ptr" in size and "steps" in size else 1
    width = size["BLOCK_C"] if "BLOCK_C" in size else size["BLOCK_K"]
    flight = blocks * (launch.num_stages - 1) * rows * 2 * size["BLOCK_M"] * width
    if flight < FLIGHT:
        found.append(f"{flight} bytes under way on a multiprocessor, {FLIGHT} expected")
    return found


def left_out(launch: Launch, target: Target) -> str:
    """Why a launch need not keep the rules of bytes; "" where it must."""
    size = launch.arguments
    if _is_product(launch):
        area = size["tiles_m"] * size["tiles_n"] * size["BLOCK_M"] * size["BLOCK_N"]
        if launch.kernel.__name__ == "_lora_gemm_kernel" and (size["DROP_X"] or size["DROP_P"]):
            return "drawing a mask, or a second accumulator, takes the registers of a wider tile"
        if launch.kernel.__name__ == "_lora_tma_kernel" and size["DROP_P"] and size["OWN_P"] and size["BLOCK_R"] > 32:
            return "drawing a mask beside P of 64 columns takes the registers of a wider tile"
        if size["n"] <= 128 or area < 128 * 256 * target.multiprocessors:
            return "tiles of 128x256 would leave multiprocessors idle, or columns empty"
        return ""
    narrow = max(size.get("BLOCK_R", 0), size.get("BLOCK_H", 0) * size.get("BLOCK_T", 1))
    if narrow > 128:
        return "tiles of weights fill shared memory: their bytes out of the cache set the time, not the rows'"
    if size.get("DROP") or size.get("sample_ptr") is not None:
        return "a mask, or the factors of samples, take the registers of a second block"
    if narrow == 64 and "BLOCK_T" in size:
        return "64 columns of logits beside a tile of rows take 8 warps, and the registers of a second block"
    return ""


def _is_product(launch: Launch) -> bool:
    return {"BLOCK_M", "BLOCK_N", "BLOCK_K"} <= launch.arguments.keys()
