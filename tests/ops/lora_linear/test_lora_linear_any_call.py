"""``lora_linear`` at calls that hypothesis draws: shapes, strides and dtypes."""

from __future__ import annotations

import pytest
import torch
from lora_linear_cases import check, draw
from operator_cases import every_backend, plain_dtype, seed, strided

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
st = pytest.importorskip("hypothesis.strategies")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def _calls(draw_from):
    channel_dim = draw_from(st.sampled_from((-1, 1)))
    least = 1 if channel_dim == -1 else 3
    shape = draw_from(st.lists(st.integers(0, 5), min_size=least, max_size=4))
    shape[channel_dim] = draw_from(st.integers(1, 40))
    order = draw_from(st.permutations(range(len(shape))))
    steps = draw_from(st.lists(st.sampled_from((1, 1, 2, 3)), min_size=len(shape), max_size=len(shape)))
    expanded = draw_from(st.sampled_from((None, *range(len(shape)))))
    return {
        "shape": tuple(shape),
        "channel_dim": channel_dim,
        "order": order,
        "steps": steps,
        "expanded": expanded,
        "n": draw_from(st.integers(1, 40)),
        "r": draw_from(st.integers(1, 20)),
        "dtype": draw_from(st.sampled_from(DTYPES)),
        "float32_adapters": draw_from(st.booleans()),
        "bias": draw_from(st.booleans()),
        "p": draw_from(st.sampled_from((0.0, 0.1, 0.9))),
    }


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
@hypothesis.given(call=_calls())
@every_backend
def test_any_call(backend, call):
    shape, channel_dim = call["shape"], call["channel_dim"]
    dtype = plain_dtype(backend) if call["dtype"] == torch.float32 else call["dtype"]
    adapters = torch.float32 if call["float32_adapters"] else None
    tensors = draw(shape, call["n"], call["r"], dtype, bias=call["bias"], adapters=adapters, channel_dim=channel_dim)
    tensors["x"] = strided(shape, call["order"], call["steps"], call["expanded"], dtype)
    check(tensors, backend, channel_dim=channel_dim, dropout_p=call["p"], seed=seed())
