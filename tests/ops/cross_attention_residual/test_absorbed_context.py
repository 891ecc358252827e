"""E, c and F, and their derivative by hand, against the formula that autograd differentiates."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from oracle import randn
from torch import Tensor

from pyfused.ops.absorbed_context import absorb

HEADS, WIDTH, CHANNELS, CONTEXT = 3, 4, 10, 7
randn = functools.partial(randn, dtype=torch.float64)
NAMES = ("q_weight", "q_bias", "k_weight", "k_bias", "v_weight", "v_bias", "out_weight")
SHAPES = dict(
    zip(NAMES, ((12, 10), (12,), (12, 7), (12,), (12, 7), (12,), (10, 12)), strict=True)
)  # fmt: skip


def drawn(batch: int, tokens: int, without: tuple[str, ...] = ()) -> dict[str, Tensor | None]:
    tensors = {name: randn(*shape, seed=seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    return {"context": randn(batch, tokens, CONTEXT, seed=9)} | {
        name: None if name in without else tensor for name, tensor in tensors.items()
    }


def formula(context, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, out_weight):
    k, v = (
        torch.nn.functional.linear(context, weight, bias).unflatten(-1, (HEADS, WIDTH))
        for weight, bias in ((k_weight, k_bias), (v_weight, v_bias))
    )
    q, out = q_weight.unflatten(0, (HEADS, WIDTH)), out_weight.unflatten(1, (HEADS, WIDTH))
    e = torch.einsum("bthd,hdc->bhtc", k, q) / WIDTH**0.5
    c = None if q_bias is None else torch.einsum("bthd,hd->bht", k, q_bias.view(HEADS, WIDTH)) / WIDTH**0.5
    return e, c, torch.einsum("bthd,chd->bhtc", v, out)


def absorbed(tensors: dict[str, Tensor | None], directly: bool):
    projections = {name: tensors[name] for name in NAMES}
    return absorb("an operator", tensors["context"], projections, HEADS, directly)


@pytest.mark.parametrize("directly", [True, False])
@pytest.mark.parametrize(
    ("batch", "tokens", "without"),
    [(1, 2, ()), (3, 2, ()), (2, 1, NAMES[1:6:2]), (1, 5, ("q_bias",)), (2, 3, ("k_bias",)), (0, 2, ())],
)  # fmt: skip
def test_every_choice_of_what_trains_has_the_gradients_of_the_formula(batch, tokens, without, directly):
    tensors = drawn(batch, tokens, without)
    there = [name for name, tensor in tensors.items() if tensor is not None]
    for number in range(1, len(there) + 1):
        for trained in itertools.combinations(there, number):
            for name in there:
                tensors[name].requires_grad_(name in trained)
            outputs, expected = absorbed(tensors, directly), formula(**tensors)
            pairs = [(y, z) for y, z in zip(outputs, expected, strict=True) if z is not None]
            assert [y.requires_grad for y, _ in pairs] == [z.requires_grad for _, z in pairs]
            live = [pair for pair in pairs if pair[1].requires_grad]
            upstream = [randn(*y.shape, seed=20 + at) for at, (y, _) in enumerate(live)]
            leaves = [tensors[name] for name in trained]
            found, wanted = (
                torch.autograd.grad([pair[at] for pair in live], leaves, upstream, allow_unused=True) for at in (0, 1)
            )
            for actual, correct in zip(
                (*(y for y, _ in pairs), *found), (*(z for _, z in pairs), *wanted), strict=True
            ):
                torch.testing.assert_close(actual, correct, rtol=1e-12, atol=1e-12)


def test_half_precision_keeps_keys_and_values_as_the_rows_meet_them():
    tensors = {name: None if tensor is None else tensor.float() for name, tensor in drawn(2, 3).items()}
    for name in ("context", "v_bias", "out_weight"):
        tensors[name] = tensors[name].bfloat16()
    for tensor in tensors.values():
        tensor.requires_grad_()
    e, c, f = absorbed(tensors, False)
    assert {y.dtype for y in (e, c, f)} == {torch.float32}
    double = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    expected = formula(**double)
    upstream = [torch.ones_like(y) for y in (e, c, f)]
    found = torch.autograd.grad((e, c, f), list(tensors.values()), upstream)
    wanted = torch.autograd.grad(expected, list(double.values()), [grad.double() for grad in upstream])
    assert [gradient.dtype for gradient in found] == [tensor.dtype for tensor in tensors.values()]
    for actual, correct in zip((e, c, f, *found), (*expected, *wanted), strict=True):
        torch.testing.assert_close(actual.double(), correct, rtol=2e-2, atol=2e-2 * float(correct.detach().abs().max()))


def test_a_packed_weight_is_read_where_it_lies():
    tensors = drawn(2, 3)
    packed = randn(12, 24, seed=3)
    tensors["q_weight"], tensors["q_bias"] = packed[:, ::2][:, :10], randn(24, seed=4)[::2]
    tensors["out_weight"] = randn(12, 10, seed=5).t()
    for actual, correct in zip(absorbed(tensors, False), formula(**tensors), strict=True):
        torch.testing.assert_close(actual, correct, rtol=1e-12, atol=1e-12)


def test_a_second_derivative_is_refused():
    tensors = drawn(1, 2)
    tensors["context"].requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(absorbed(tensors, False)[0].sum(), tensors["context"], create_graph=True)
