"""The dropout mask of ``pyfused.reference.dropout_keep_mask``, drawn in place and by blocks that stay in cache."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 15
_WORD = 0xFFFFFFFF


def _multiply_(word: Tensor, constant: int, high: Tensor, scratch: Tensor) -> None:
    """word, high <- low and high 32 bits of ``constant * word``."""
    torch.bitwise_right_shift(word, 16, out=high)
    high.mul_(constant)
    word.bitwise_and_(0xFFFF).mul_(constant)
    high.add_(torch.bitwise_right_shift(word, 16, out=scratch))
    word.bitwise_and_(0xFFFF).bitwise_or_(torch.bitwise_left_shift(high, 16, out=scratch)).bitwise_and_(_WORD)
    high.bitwise_right_shift_(16)


def dropout_(x: Tensor, seed: Tensor, p: float, first_row: int = 0) -> Tensor:
    """Zero the dropped elements of a contiguous (rows, columns) tensor in place and scale the rest by 1 / (1 - p).

    Row i of x is row ``first_row + i`` of the mask.
    """
    rows, columns = x.shape
    quads = -(-columns // 4)
    step = max(1, _BLOCK // quads)
    for start in range(0, rows, step):
        block = x[start : start + step]
        keep = keep_mask(seed, first_row + start, block.shape[0], columns, p)
        block.mul_(keep).mul_(1.0 / (1.0 - p))
    return x


def keep_mask(seed: Tensor, first_row: int, rows: int, columns: int, p: float) -> Tensor:
    """Rows ``first_row`` and following of the mask, bool (rows, columns)."""
    quads = -(-columns // 4)
    row = torch.arange(first_row, first_row + rows, device=seed.device)[:, None]
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    words = torch.empty((4, rows, quads), dtype=torch.int64, device=seed.device)
    c0, c1, c2, c3 = words.unbind(0)
    c0.copy_(torch.arange(quads, device=seed.device).expand(rows, quads))
    c1.copy_((row & _WORD).expand(rows, quads))
    c2.copy_((row >> 32).expand(rows, quads))
    c3.zero_()
    high, scratch = torch.empty_like(c0), torch.empty_like(c0)
    for _ in range(10):
        # (c0, c1, c2, c3) <- (hi2 ^ c1 ^ k0, lo2, hi0 ^ c3 ^ k1, lo0), each new word in the buffer that is free.
        _multiply_(c2, 0xCD9E8D57, high, scratch)
        c1.bitwise_xor_(high).bitwise_xor_(k0)
        _multiply_(c0, 0xD2511F53, high, scratch)
        c3.bitwise_xor_(high).bitwise_xor_(k1)
        c0, c1, c2, c3 = c1, c2, c3, c0
        k0 = (k0 + 0x9E3779B9) & _WORD
        k1 = (k1 + 0xBB67AE85) & _WORD
    threshold = int(p * 2**32)
    keep = torch.stack((c0, c1, c2, c3), dim=-1).ge_(threshold)
    return keep.reshape(rows, 4 * quads)[:, :columns].to(torch.bool)
