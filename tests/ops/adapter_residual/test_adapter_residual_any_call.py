"""``adapter_residual`` at calls that hypothesis draws: shapes, strides, dtypes and options."""

from __future__ import annotations

import pytest
import torch
from adapter_residual_cases import check, draw, every_backend, sample_scale
from operator_cases import plain_dtype, seed, strided

from pyfused.ops.adapter_residual import ACTIVATIONS, PLANS

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
st = pytest.importorskip("hypothesis.strategies")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def _calls(draw_from):
    channel_dim = draw_from(st.sampled_from((-1, 1)))
    shape = draw_from(st.lists(st.integers(0, 5), min_size=2 if channel_dim == -1 else 3, max_size=4))
    shape[channel_dim] = draw_from(st.integers(1, 40))
    lies = {
        name: {
            "order": draw_from(st.permutations(range(len(shape)))),
            "steps": draw_from(st.lists(st.sampled_from((1, 1, 2, 3)), min_size=len(shape), max_size=len(shape))),
            "expanded": draw_from(st.sampled_from((None, *range(len(shape))))),
            "dtype": draw_from(st.sampled_from(DTYPES)),
        }
        for name in draw_from(st.sampled_from((("z",), ("z", "residual"))))
    }
    return {
        "shape": tuple(shape),
        "channel_dim": channel_dim,
        "lies": lies,
        "hidden": draw_from(st.integers(1, 40)),
        "float32_adapters": draw_from(st.booleans()),
        "bias": draw_from(st.booleans()),
        "layer_scale": draw_from(st.sampled_from(("channels", "scalar", None))),
        "drop": draw_from(st.sampled_from((None, "some", "kept", "all"))),
        "skip": draw_from(st.sampled_from((1.0, 0.0, -0.5))),
        "activation": draw_from(st.sampled_from(ACTIVATIONS)),
        "plan": draw_from(st.sampled_from(PLANS)),
        "p": draw_from(st.sampled_from((0.0, 0.1, 0.9))),
    }


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None)
@hypothesis.given(call=_calls())
@every_backend
def test_any_call(backend, call):
    shape, channel_dim, dtype = call["shape"], call["channel_dim"], plain_dtype(backend, call["lies"]["z"]["dtype"])
    tensors = draw(
        shape, call["hidden"], dtype, bias=call["bias"], adapters=torch.float32 if call["float32_adapters"] else None,
        layer_scale=call["layer_scale"], channel_dim=channel_dim,
    )  # fmt: skip
    call["lies"]["z"]["dtype"] = dtype
    tensors |= {name: strided(shape, **lies) for name, lies in call["lies"].items()}
    check(
        tensors, backend, call["plan"], skip=call["skip"], activation=call["activation"], channel_dim=channel_dim,
        sample_scale=sample_scale(shape[0], call["drop"]), dropout_p=call["p"], seed=seed(),
    )  # fmt: skip
