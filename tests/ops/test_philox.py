"""Philox-4x32-10 and the dropout masks made from it: known answers, and the same bits on every backend."""

from __future__ import annotations

import pytest
import torch
from lora_linear_cases import every_plan
from operator_cases import DEVICE
from oracle import randn

import pyfused
from pyfused import reference
from pyfused.portable.philox import dropout_
from pyfused.reference.philox import philox_4x32

# Random123's kat_vectors for philox4x32, 10 rounds: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SEEDS = (0, 1, -77, 2**63 - 1, -(2**63), 0x299F_31D0_A409_3822)


def _words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    assert philox_4x32(_words(counter), _words(key)) == _words(words)


def _expected_words(seed: int, row: int, columns: int) -> torch.Tensor:
    """The words of one row of a mask, from the block function and the layout of the counter alone."""
    key = (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32 & 0xFFFFFFFF))
    low, high = torch.tensor(row & 0xFFFFFFFF), torch.tensor(row >> 32)
    quads = [philox_4x32((torch.tensor(quad), low, high, torch.tensor(0)), key) for quad in range((columns + 3) // 4)]
    return torch.tensor([int(word) for quad in quads for word in quad][:columns])


@pytest.mark.parametrize("seed", SEEDS)
def test_reference_mask_is_the_words_against_the_threshold(seed):
    p = 0.37
    mask = reference.dropout_keep_mask(torch.tensor([seed]), 5, 11, p)
    for row in range(5):
        assert torch.equal(mask[row], _expected_words(seed, row, 11) >= int(p * 2**32))


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 1), (37, 19), (3, 4), (0, 5), (40_000, 3), (2, 131_077)],
    ids=lambda size: str(size),
)
@pytest.mark.parametrize("seed", [5, -77])
def test_portable_equals_reference(seed, rows, columns):
    """Also where the portable backend works by blocks: many rows, and rows longer than a block."""
    x = randn(rows, columns)
    key, p = torch.tensor([seed]), 0.4
    expected = x * reference.dropout_keep_mask(key, rows, columns, p) / (1 - p)
    torch.testing.assert_close(dropout_(x.clone(), key, p), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("first_row", [2**32 - 1, 2**32, 2**32 + 5, 3 * 2**32 + 2**31, 2**40 + 1])
def test_rows_beyond_32_bits(first_row):
    seed, p = 0x1234_5678_9ABC, 0.5
    mask = dropout_(torch.ones(3, 11), torch.tensor([seed]), p, first_row).bool()
    for row in range(3):
        assert torch.equal(mask[row], _expected_words(seed, first_row + row, 11) >= 2**31), row


def _masks(backend: str, plan: str, rows: int, columns: int, p: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """drop(1) as forward applies it, and the mask that backward applies to dx, both (rows, columns)."""
    # float16 would overflow at the most extreme p.
    dtype = torch.bfloat16 if backend == "cuda" else torch.float32
    eye = torch.eye(columns, dtype=dtype, device=DEVICE)
    x = torch.ones(rows, columns, dtype=dtype, device=DEVICE, requires_grad=True)
    y = pyfused.lora_linear(x, torch.zeros_like(eye), eye, eye, dropout_p=p, seed=seed, backend=backend, plan=plan)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), dx


def _assert_is(applied: torch.Tensor, keep: torch.Tensor, p: float) -> None:
    rtol = 3e-7 if applied.dtype == torch.float32 else torch.finfo(applied.dtype).eps
    torch.testing.assert_close(applied.float(), keep / (1 - p), rtol=rtol, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
@every_plan
def test_every_backend_draws_the_reference_mask(backend, plan, seed):
    rows, columns, p = 70, 50, 0.3
    keep = reference.dropout_keep_mask(torch.tensor([seed], device=DEVICE), rows, columns, p)
    for applied in _masks(backend, plan, rows, columns, p, seed):
        _assert_is(applied, keep, p)


@pytest.mark.parametrize("p", [2.0**-33, 2.0**-32, 0.5, 0.75, 1 - 2.0**-20])
@every_plan
def test_extreme_probabilities(backend, plan, p):
    """Thresholds 0 and 1, and those beyond the signed 32-bit range."""
    keep = reference.dropout_keep_mask(torch.tensor([3], device=DEVICE), 33, 18, p)
    for applied in _masks(backend, plan, 33, 18, p, 3):
        _assert_is(applied, keep, p)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_statistics(p):
    """Means and neighbours' correlations within five standard deviations of independent draws."""
    rows, columns = 400, 300
    keep = reference.dropout_keep_mask(torch.tensor([11]), rows, columns, p).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(keep.mean() - (1 - p)) < 5 * deviation / keep.numel() ** 0.5
    assert ((keep.mean(0) - (1 - p)).abs() < 5 * deviation / rows**0.5).all()
    assert ((keep.mean(1) - (1 - p)).abs() < 5 * deviation / columns**0.5).all()
    centred = (keep - (1 - p)) / deviation
    other = reference.dropout_keep_mask(torch.tensor([12]), rows, columns, p).double()
    neighbours = {
        "next column": (centred[:, 1:], centred[:, :-1]),
        "next quad": (centred[:, 4:], centred[:, :-4]),
        "next row": (centred[1:], centred[:-1]),
        "next seed": (centred, (other - (1 - p)) / deviation),
    }
    for name, (left, right) in neighbours.items():
        assert abs((left * right).mean()) < 5 / left.numel() ** 0.5, name


@pytest.mark.parametrize(("above", "kept"), [(-1, True), (0, True), (0.75, True), (1, False)])
@every_plan
def test_threshold_is_exact(backend, plan, above, kept):
    """The first word of seed 0 is 0x6627e8d5: kept at thresholds up to that one, which is floor(p * 2**32)."""
    p = (0x6627E8D5 + above) / 2**32
    assert reference.dropout_keep_mask(torch.tensor([0]), 1, 1, p).item() is kept
    assert [mask.bool().item() for mask in _masks(backend, plan, 1, 1, p, 0)] == [kept, kept]


@every_plan
def test_seeds(backend, plan):
    def mask(seed):
        return _masks(backend, plan, 20, 12, 0.5, seed)[0]

    assert torch.equal(mask(7), mask(torch.tensor([7], device=DEVICE)))
    assert torch.equal(mask(7), mask(torch.tensor(7, device=DEVICE)))
    assert not torch.equal(mask(7), mask(8))
    assert not torch.equal(mask(7), mask(7 + 2**32)), "the high word of the seed is lost"


@every_plan
def test_drawn_seed_follows_manual_seed(backend, plan):
    def draw(times):
        torch.manual_seed(5)
        return [_masks(backend, plan, 20, 12, 0.5, None) for _ in range(times)]

    (y, dx), (other, _) = draw(2)
    again, _ = draw(1)[0]
    assert torch.equal(y, again)
    assert torch.equal(y, dx), "backward regenerates forward's mask"
    assert not torch.equal(y, other), "each call draws a fresh mask"
