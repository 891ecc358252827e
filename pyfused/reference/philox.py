"""Dropout masks from Philox-4x32-10, written for reading.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import torch

_WORD = 0xFFFFFFFF


def _multiply(constant: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of ``constant * word``; by 16-bit halves, because int64 holds no unsigned 64-bit product."""
    low = constant * (word & 0xFFFF)
    middle = constant * (word >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ten rounds on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + 0x9E3779B9) & _WORD
        k1 = (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def dropout_keep_mask(seed: torch.Tensor, rows: int, columns: int, p: float) -> torch.Tensor:
    """The elements that dropout keeps.

    Args:
        seed: int64 tensor of one element, the 64-bit key.
        rows, columns: shape of the matrix that is dropped from.
        p: probability of dropping an element, in [0, 1).

    Returns:
        bool (rows, columns), True where the element is kept. Element (m, k) depends on the seed, m and k alone:
        counter (k // 4, low word of m, high word of m, 0), lane k % 4, kept when the word is at least floor(p * 2**32).
    """
    device = seed.device
    quads = torch.arange(-(-columns // 4), device=device)[None, :]
    row = torch.arange(rows, device=device)[:, None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    key = (seed & _WORD, (seed >> 32) & _WORD)
    words = philox_4x32((quads, row & _WORD, row >> 32, zero), key)
    lanes = torch.stack([word.expand(rows, quads.shape[1]) for word in words], dim=-1)
    return lanes.flatten(1)[:, :columns] >= int(p * 2**32)
