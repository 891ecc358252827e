"""Device functions that the kernel families share."""

import triton
import triton.language as tl
from triton import knobs

from pyfused.kernels import interpreter

if knobs.runtime.interpret:
    interpreter.mend()


@triton.jit
def dropout_keep_mask(seed, rows, column_start, threshold, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The elements dropout keeps: rows [BLOCK_ROWS] int64, columns from column_start, a multiple of 4.

    Philox-4x32-10, counter (column // 4, row low, row high, 0), lane column % 4: one call serves four columns.
    """
    quads = column_start // 4 + tl.arange(0, BLOCK_COLUMNS // 4)
    zero = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS // 4), dtype=tl.int32)
    quad = zero + quads.to(tl.int32)[None, :]
    row_low = zero + (rows & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)[:, None]
    row_high = zero + (rows >> 32).to(tl.int32)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, quad, row_low, row_high, zero)
    even = tl.join(w0 >= threshold, w2 >= threshold)
    odd = tl.join(w1 >= threshold, w3 >= threshold)
    # The last two dimensions are (lane // 2, lane % 2), so that the reshape puts the lanes in order.
    return tl.reshape(tl.join(even, odd), (BLOCK_ROWS, BLOCK_COLUMNS))


@triton.jit
def known_multiple(value, OF: tl.constexpr):
    """``value``, a multiple of OF, in a form that tells the compiler so: else it loads by single elements."""
    return value // OF * OF


@triton.jit
def swizzle(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile (m, n) of program ``pid``: GROUP_M rows of tiles go together, so that their operands stay in L2."""
    per_group = GROUP_M * tiles_n
    first = (pid // per_group) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + (pid % per_group) % height, (pid % per_group) // height


@triton.jit
def inverse_or_zero(x):
    """1 / x; 0 at 0."""
    return tl.where(x == 0.0, 0.0, 1.0 / x)


@triton.jit
def activation(h, KIND: tl.constexpr):
    """phi(h) in float32; phi(0) = 0 for every kind, so that padded columns stay 0."""
    if KIND == "identity":
        return h
    elif KIND == "relu":
        # Not tl.maximum: on a GPU it makes 0 of NaN.
        return tl.where(h < 0.0, 0.0, h)
    elif KIND == "leaky_relu":
        return tl.where(h > 0.0, h, 0.01 * h)
    elif KIND == "gelu":
        return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    else:
        return h * tl.sigmoid(_sigmoid_argument(h, KIND))


@triton.jit
def activation_slope(h, KIND: tl.constexpr):
    """phi'(h) in float32; at 0 as torch has it."""
    if KIND == "identity":
        return tl.full(h.shape, 1.0, tl.float32)
    elif KIND == "relu":
        return tl.where(h > 0.0, 1.0, 0.0)
    elif KIND == "leaky_relu":
        return tl.where(h > 0.0, 1.0, 0.01)
    elif KIND == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * h * h)
        return 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * density
    else:
        s = tl.sigmoid(_sigmoid_argument(h, KIND))
        return s + h * s * (1.0 - s) * _sigmoid_argument_slope(h, KIND)


@triton.jit
def _sigmoid_argument(h, KIND: tl.constexpr):
    """q in phi(h) = h sigmoid(q(h)); gelu_tanh is one of these because (1 + tanh u) / 2 = sigmoid(2 u)."""
    if KIND == "silu":
        return h
    elif KIND == "quick_gelu":
        return 1.702 * h
    else:
        tl.static_assert(KIND == "gelu_tanh")
        return 1.5957691216057308 * (h + 0.044715 * h * h * h)


@triton.jit
def _sigmoid_argument_slope(h, KIND: tl.constexpr):
    if KIND == "silu":
        return 1.0
    elif KIND == "quick_gelu":
        return 1.702
    else:
        return 1.5957691216057308 * (1.0 + 0.134145 * h * h)
