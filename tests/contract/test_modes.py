"""Modes are a product: grad mode x autocast x eager or compiled x two values of every float setting.

Asked of every public function and module. The numbers are the same bits in all three grad modes, and compiled as in
eager mode; a second value of every setting, which makes torch.compile take them for symbols, breaks no graph. Compiled,
what is no new code path (a mode without grad beside another, a second value under autocast) is left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch
from models_setup import fastvit_block
from operator_cases import DEVICE, leaves_of
from operators import OPERATORS, function_of
from oracle import randn
from torch import nn

import pyfused
from pyfused import models

AUTOCASTS = {"no autocast": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Called:
    """A public function or module: ``make(**settings)`` returns what is called with no arguments."""

    make: Callable[..., Callable]
    floats: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def _function(operator: str) -> Called:
    row = OPERATORS[operator]
    tensors = leaves_of(row.draw(torch.float32))

    def make(**settings):
        function = function_of(operator, "portable", row.plans["portable"][0], **settings)
        # A tensor in the place of a number is not what is asked here.
        return lambda: function(**{name: value for name, value in tensors.items() if name not in settings})

    return Called(make, row.floats)


def _module(build: Callable[..., nn.Module], *shapes: tuple[int, ...], **floats: tuple[float, float]) -> Called:
    inputs = [randn(*shape, seed=i, device=DEVICE) for i, shape in enumerate(shapes)]

    def make(**settings):
        torch.manual_seed(1)
        module = build(**settings).to(DEVICE)
        with torch.no_grad():
            for parameter in module.parameters():
                # Nothing is left at zero, where it would hide what follows it.
                parameter.add_(0.1 * torch.randn(parameter.shape).to(DEVICE))
        return lambda: module(*inputs)

    return Called(make, floats)


def _conv(**convolution):
    return lambda **settings: pyfused.LoRAConv2d.from_conv(nn.Conv2d(6, 8, **convolution), rank=3, **settings)


def _attention(**attention):
    def build(**settings):
        mha = nn.MultiheadAttention(12, 3, batch_first=True)
        return _SelfAttention(pyfused.LoRAMultiheadAttention.from_mha(mha, rank=3, **settings), **attention)

    return build


def _attention_block(**settings):
    return models.AttentionBlockAdapter.from_block(fastvit_block("AttentionBlock"), **settings).train()


class _SelfAttention(nn.Module):
    def __init__(self, attention, need_weights=False):
        super().__init__()
        self.attention, self.need_weights = attention, need_weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


CALLED = {operator: _function(operator) for operator in OPERATORS} | {
    "LoRALinear": _module(
        lambda **s: pyfused.LoRALinear(12, 10, rank=3, **s), (2, 5, 12), alpha=(8.0, 16.0), dropout=(0.1, 0.4)
    ),
    "LoRAConv2d 1x1": _module(_conv(kernel_size=1), (2, 6, 5, 5), alpha=(8.0, 16.0), dropout=(0.1, 0.4)),
    "LoRAConv2d 3x3": _module(
        _conv(kernel_size=3, padding=1, stride=2), (2, 6, 5, 5), alpha=(8.0, 16.0), dropout=(0.1, 0.4)
    ),
    "LoRAMultiheadAttention": _module(_attention(), (2, 5, 12), alpha=(8.0, 16.0), dropout=(0.1, 0.4)),
    "LoRAMultiheadAttention, weights": _module(_attention(need_weights=True), (2, 5, 12), alpha=(8.0, 16.0)),
    "ConvLoRA": _module(lambda **s: pyfused.ConvLoRA(6, rank=3, **s), (2, 6, 5, 5), alpha=(8.0, 16.0)),
    "BottleneckAdapter": _module(
        lambda **s: pyfused.BottleneckAdapter(12, **s),
        (3, 5, 12),
        skip=(1.0, 0.5),
        dropout=(0.1, 0.4),
        drop_path=(0.1, 0.4),
        layer_scale=(1e-5, 0.5),
    ),
    "BottleneckAdapter NCHW": _module(
        lambda **s: pyfused.BottleneckAdapter(12, channel_dim=1, **s), (3, 12, 5, 5), (3, 12, 5, 5), skip=(1.0, 0.5)
    ),
    "ScaledCrossAttention": _module(
        lambda **s: pyfused.ScaledCrossAttention(32, 24, 4, **s),
        (2, 50, 32),
        (2, 3, 24),
        weight=(0.1, 0.7),
        dropout=(0.1, 0.4),
    ),
    "ScaledCrossAttention, norms matched": _module(
        lambda **s: pyfused.ScaledCrossAttention(32, 24, 4, norm_match=True, learnable_weight=True, **s),
        (2, 50, 32),
        (1, 3, 24),
        eps=(1e-6, 1e-2),
    ),
    "ScaledCrossAttention, long context": _module(
        lambda **s: pyfused.ScaledCrossAttention(32, 24, 4, **s), (2, 9, 32), (2, 40, 24), weight=(0.1, 0.7)
    ),
    "ImageCrossAttention": _module(
        lambda **s: models.ImageCrossAttention(32, 24, 4, 8, **s), (2, 50, 32), (2, 3, 24), weight=(0.1, 0.7)
    ),
    "TextCrossAttention": _module(
        lambda **s: models.TextCrossAttention(32, 24, 4, 8, **s), (2, 50, 32), (3, 3, 24), weight=(0.1, 0.7)
    ),
    "AdapterBlend": _module(lambda **s: models.AdapterBlend(12, **s), (2, 5, 12), weight=(0.1, 0.7)),
    "SimpleProj": _module(lambda **s: models.SimpleProj(12, 10, relu=True, **s), (2, 5, 12)),
    # Of the two kinds of blocks the one that has the branch of both.
    "AttentionBlockAdapter": _module(_attention_block, (2, 32, 3, 3), skip=(1.0, 0.5)),
    "LatentWireAdapter": _module(lambda **s: models.LatentWireAdapter(6, 12, 10, **s), (2, 5, 6), dropout=(0.1, 0.4)),
}


@pytest.mark.parametrize("autocast", AUTOCASTS)
@pytest.mark.parametrize("name", CALLED)
def test_every_mode(name, autocast):
    called, dtype = CALLED[name], AUTOCASTS[autocast]
    # To a compiler one autocast is like the other.
    compiling = dtype != torch.float16

    def under(mode, function):
        region = contextlib.nullcontext() if dtype is None else torch.autocast(DEVICE, dtype)
        torch.manual_seed(2)
        with mode(), region:
            return function().detach().clone()

    def in_eager_mode(**settings):
        function = called.make(**settings)
        result = under(torch.enable_grad, function)
        assert result.isfinite().all()
        for mode in (torch.no_grad, torch.inference_mode):
            assert torch.equal(under(mode, function), result), (settings, mode)
        return function, result

    for setting, values in called.floats.items():
        _, first = in_eager_mode(**{setting: values[0]})
        if compiling:
            _, second = in_eager_mode(**{setting: values[1]})
            assert setting == "eps" or not torch.equal(first, second), setting
    # One process meets both values of all settings; a graph that takes the first for a constant
    # would break at the second, or stay what it was.
    torch._dynamo.reset()
    for turn in range(2 if called.floats and dtype is None else 1):
        function, result = in_eager_mode(**{setting: values[turn] for setting, values in called.floats.items()})
        # To a compiler one mode without grad is like the other.
        for mode in (torch.enable_grad, torch.inference_mode)[: 2 - turn] if compiling else ():
            compiled = torch.compile(function, fullgraph=True, backend="eager")
            assert torch.equal(under(mode, compiled), result), (turn, mode, "compiled")
