"""Device functions on tiles: of rows (M, C), and of the bottleneck family's way to a narrow middle (M, J) and back.

Rows of a tile are reached by pointers to their first elements, weights by strides: a weight that differs between images
is the same call with another base pointer.
"""

import triton
import triton.language as tl


@triton.jit
def tile_rows(tile, tiles_l, length, OFFSET: tl.constexpr, BLOCK_M: tl.constexpr):
    """(image, offsets inside it, row m of each, which exist) for one tile of rows."""
    batch = (tile // tiles_l).to(tl.int64)
    offs_l = (tile % tiles_l).to(OFFSET) * BLOCK_M + tl.arange(0, BLOCK_M)
    return batch, offs_l, batch * length + offs_l, offs_l < length


@triton.jit
def row_pointers(x, batch, offs_l, OFFSET: tl.constexpr):
    """Pointers to the first elements of rows of x (B, L, C)."""
    return x.ptr + batch * x.strides[0] + offs_l.to(OFFSET) * x.strides[1]


@triton.jit
def load_vector(vector, offs, ok):
    """Elements of a vector, float32; 0 outside."""
    return tl.load(vector.ptr + offs * vector.strides[0], mask=ok, other=0.0).to(tl.float32)


@triton.jit
def dense_rows(ptr, batch, offs_l, length, width, OFFSET: tl.constexpr):
    """`row_pointers` of a dense (M, width)."""
    return ptr + batch * length * width + offs_l.to(OFFSET) * width


@triton.jit
def tile_pointers(rows_ptr, offs_c, stride_c, OFFSET: tl.constexpr):
    """[BLOCK_M, BLOCK_C]"""
    return rows_ptr[:, None] + offs_c.to(OFFSET)[None, :] * stride_c


@triton.jit
def weight_pointers(ptr, offs_i, offs_j, stride_i, stride_j, OFFSET: tl.constexpr):
    """[I, J]"""
    return ptr + offs_i.to(OFFSET)[:, None] * stride_i + offs_j.to(OFFSET)[None, :] * stride_j


@triton.jit
def sample_of_rows(scale_ptr, rows, ok_m, per_sample):
    """k of each row, float32; 0 in rows that do not exist."""
    return tl.load(scale_ptr + rows // per_sample, mask=ok_m, other=0.0).to(tl.float32)


@triton.jit
def load_tile(rows_ptr, offs_c, stride_c, ok_m, ok_c, OFFSET: tl.constexpr):
    """[BLOCK_M, BLOCK_C] of the rows; 0 outside."""
    ptrs = tile_pointers(rows_ptr, offs_c, stride_c, OFFSET)
    return tl.load(ptrs, mask=ok_m[:, None] & ok_c[None, :], other=0.0)


@triton.jit
def keep_own(p, index_ptr, rows, ok_m, offs_r, width):
    """p [BLOCK_M, BLOCK_R], with 0 where a column is not of its row's adapter, each of which has ``width`` columns."""
    index = tl.load(index_ptr + rows, mask=ok_m, other=-1)
    return tl.where(index[:, None] == (offs_r // width)[None, :], p, 0.0)


@triton.jit
def store_tile(rows_ptr, offs_c, stride_c, tile, ok_m, ok_c, OFFSET: tl.constexpr):
    """The tile, [BLOCK_M, BLOCK_C], to the rows, in their dtype."""
    ptrs = tile_pointers(rows_ptr, offs_c, stride_c, OFFSET)
    tl.store(ptrs, tile.to(rows_ptr.dtype.element_ty), mask=ok_m[:, None] & ok_c[None, :])


@triton.jit
def load_weight(ptr, offs_i, offs_j, stride_i, stride_j, ok_i, ok_j, OFFSET: tl.constexpr):
    """[I, J] of a weight; 0 outside."""
    ptrs = weight_pointers(ptr, offs_i, offs_j, stride_i, stride_j, OFFSET)
    return tl.load(ptrs, mask=ok_i[:, None] & ok_j[None, :], other=0.0)


@triton.jit
def narrow_product(
    rows_ptr, stride_c, ok_m, w_ptr, stride_wc, columns, ok_j, gate, root, channels,
    PRECISION: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """x W  [BLOCK_M, BLOCK_J] in float32: the rows' product with a weight (C, J), in its dtype, over all channels.

    columns [BLOCK_J] are the offsets of W's columns; those that are not ok_j count as 0. Rows that are wider than W are
    multiplied by ``root``. gate (C,), or None, multiplies the rows of W; over root, and over root once more for wider
    rows: x and gate share the root of the largest |gate|, because float16 holds neither a gate of 1e-6 nor, of a wider
    x, what a scaled loss sends back.
    """
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty
    WIDER: tl.constexpr = rows_ptr.dtype.element_ty != DTYPE
    acc = tl.zeros((BLOCK_M, BLOCK_J), dtype=tl.float32)
    for start in range(tl.cdiv(channels, BLOCK_C)):
        offs_c = start * BLOCK_C + tl.arange(0, BLOCK_C)
        ok_c = offs_c < channels
        x = load_tile(rows_ptr, offs_c, stride_c, ok_m, ok_c, OFFSET)  # [BLOCK_M, BLOCK_C]
        if WIDER:
            x = x.to(tl.float32) * root
        w = load_weight(w_ptr, offs_c, columns, stride_wc, 1, ok_c, ok_j, OFFSET)  # [BLOCK_C, BLOCK_J]
        if gate is not None:
            by_row = load_vector(gate, offs_c, ok_c) / root
            if WIDER:
                by_row = by_row / root
            w = (w.to(tl.float32) * by_row[:, None]).to(DTYPE)
        acc = tl.dot(x.to(DTYPE), w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def copy_rows(
    from_rows, stride_from, to_rows, stride_to, ok_m, ok_read, channels, OFFSET: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Rows from one place to another; 0 where they are not to be read."""
    for start in range(tl.cdiv(channels, BLOCK_C)):
        offs_c = start * BLOCK_C + tl.arange(0, BLOCK_C)
        ok_c = offs_c < channels
        x = load_tile(from_rows, offs_c, stride_from, ok_read, ok_c, OFFSET)
        store_tile(to_rows, offs_c, stride_to, x, ok_m, ok_c, OFFSET)


@triton.jit
def gate_root(gate, channels):
    """Square root of the largest |gate|; 1 where all are 0 or next to it."""
    BLOCK: tl.constexpr = 1024
    found = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(tl.cdiv(channels, BLOCK)):
        offs = start * BLOCK + tl.arange(0, BLOCK)
        found = tl.maximum(found, tl.abs(load_vector(gate, offs, offs < channels)))
    largest = tl.max(found)
    return tl.sqrt(tl.where(largest < 1e-30, 1.0, largest))
