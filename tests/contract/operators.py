"""The table of operators: every promise in this folder is asked of each of its rows, on every backend and plan."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import adapter_residual_cases
import cross_attention_cases
import lora_linear_cases
import pytest
import torch
from adapter_residual_cases import sample_scale
from cross_attention_cases import ABSORBED, padding
from operator_cases import DEVICE, FAST, RawCalls, leaves_of, plain_dtype, serving, skips
from oracle import Tensors, cotangent
from torch import Tensor

import pyfused
from pyfused import reference
from pyfused.ops import OPERATORS as ALL
from pyfused.ops.adapter_residual import PLANS as ADAPTER_PLANS
from pyfused.ops.lora_linear import MIXED_PLANS
from pyfused.ops.lora_linear import PLANS as LORA_PLANS


@dataclass(frozen=True)
class Operator:
    """One row: an operator, in one of the ways it works.

    Attributes:
        name: of the public function.
        draw: dtype -> tensors of a small call.
        plans: backend -> its plans.
        options: of every call.
        variants: label -> (function of a dtype that draws tensors, options), other forms of the call.
        rows: a number of rows and dtype -> tensors of a call with so many, else alike.
        floats: float setting -> two values of it.
        linear: with dropout, the tensor that y less y without it is linear in; None where there is no dropout.
        unrounded: the tensors that are never rounded to the dtype of the products.
        check: holds a call to the float64 oracle.
    """

    name: str
    draw: Callable[[torch.dtype], dict[str, Tensor | None]]
    plans: Mapping[str, Sequence[str]]
    options: Mapping[str, object]
    variants: Mapping[str, tuple[Callable[[torch.dtype], dict[str, Tensor | None]], Mapping[str, object]]]
    rows: Callable[[int, torch.dtype], dict[str, Tensor | None]]
    floats: Mapping[str, tuple[float, float]]
    check: Callable[..., dict[str, Tensor]]
    linear: str | None = None
    unrounded: Sequence[str] = field(default=())

    @property
    def reference(self) -> Callable[..., Tensor]:
        return functools.partial(getattr(reference, self.name), **self.options)


def _lora(*shape: int, n: int = 7, rank: int = 3, **drawn):
    return lambda dtype: lora_linear_cases.draw(shape, n, rank, dtype, **drawn)


def _index(*values: int, ones: int = 0) -> Tensor:
    """An adapter for each number along one dimension of the rows, with ``ones`` of them after it."""
    return torch.tensor(values, device=DEVICE).reshape(-1, *(1 for _ in range(ones)))


def _adapter(*shape: int, **drawn):
    return lambda dtype: adapter_residual_cases.draw(shape, 5, dtype, **drawn)


def _cross(*sizes: int, **drawn):
    return lambda dtype: cross_attention_cases.draw(*sizes, dtype, **drawn)


def _projection(*shape: int, **drawn):
    return lambda dtype: cross_attention_cases.draw_projection(shape, 5, dtype, **drawn)


OPERATORS = {
    "lora_linear": Operator(
        name="lora_linear",
        draw=_lora(2, 3, 6),
        plans=LORA_PLANS,
        options={"scaling": 0.5},
        variants={
            "no bias, dropout": (_lora(2, 4, 6, bias=False), {"dropout_p": 0.3, "seed": 5}),
            "NCHW, dropout": (_lora(2, 6, 2, 2, channel_dim=1), {"dropout_p": 0.3, "seed": 5, "channel_dim": 1}),
            "float32 adapters": (_lora(2, 4, 6, adapters=torch.float32), {}),
            # As many rows, each at a multiple of 16 bytes, as Triton loads by tensor descriptors.
            "tma, dropout": (_lora(2, 65, 8, n=8, rank=8), {"dropout_p": 0.3, "seed": 5}),
        },
        rows=lambda rows, dtype: _lora(rows, 6)(dtype),
        floats={"scaling": (0.5, 2.0), "dropout_p": (0.1, 0.4)},
        check=lora_linear_cases.check,
        linear="lora_b",
    ),
    "lora_linear mixed": Operator(
        name="lora_linear",
        draw=_lora(2, 3, 6, mixed=2),
        plans={backend: plans for backend, plans in MIXED_PLANS.items() if backend != "cuda"},
        options={"scaling": 0.5, "adapter_index": _index(1, -1, 0)},
        variants={
            "NCHW, no bias, dropout": (
                _lora(2, 6, 2, 2, channel_dim=1, bias=False, mixed=3),
                {"dropout_p": 0.3, "seed": 5, "channel_dim": 1, "adapter_index": _index(2, 0, ones=2)},
            ),
            "float32 adapters": (
                _lora(2, 4, 6, adapters=torch.float32, mixed=2),
                {"adapter_index": _index(0, 7, 1, -3)},
            ),
        },
        rows=lambda rows, dtype: _lora(rows, 3, 6, mixed=2)(dtype),
        floats={"scaling": (0.5, 2.0), "dropout_p": (0.1, 0.4)},
        check=lora_linear_cases.check,
        linear="lora_b",
    ),
    "adapter_residual": Operator(
        name="adapter_residual",
        draw=_adapter(2, 3, 6, residual=torch.float32),
        plans=dict.fromkeys(serving("adapter_residual"), ADAPTER_PLANS),
        options={"skip": 0.5},
        variants={
            "z alone": (_adapter(2, 4, 6, bias=False, layer_scale=None), {}),
            "all": (
                _adapter(2, 4, 6, residual=torch.float32),
                {"dropout_p": 0.3, "seed": 5, "sample_scale": lambda: sample_scale(2, "some")},
            ),
            "NCHW": (
                _adapter(2, 6, 2, 2, residual=torch.bfloat16, layer_scale="scalar", channel_dim=1),
                {"channel_dim": 1, "sample_scale": lambda: sample_scale(2, "kept")},
            ),
            "float32 adapters": (_adapter(2, 4, 6, adapters=torch.float32), {}),
        },
        rows=lambda rows, dtype: _adapter(rows, 6)(dtype),
        floats={"skip": (0.5, -1.0), "dropout_p": (0.1, 0.4)},
        check=adapter_residual_cases.check,
        linear="up_weight",
        unrounded=adapter_residual_cases.UNROUNDED,
    ),
    "cross_attention_residual absorbed": Operator(
        name="cross_attention_residual",
        draw=_cross(2, 3, 4, 6, 2, 5),
        plans=dict.fromkeys(serving("cross_attention_residual"), ABSORBED),
        options={"num_heads": 2},
        variants={
            "no bias": (_cross(2, 3, 4, 6, 2, 5, absent=("q_bias", "out_bias"), weight=None), {}),
            "all": (
                _cross(2, 3, 4, 6, 2, 5),
                {"norm_match": True, "dropout_p": 0.3, "seed": 5, "key_padding_mask": lambda: padding(2, 4)},
            ),
            "shared context": (_cross(2, 3, 4, 6, 2, 5, context_batch=1, weight="scalar"), {"norm_match": True}),
            "shared context, masks": (
                _cross(2, 3, 4, 6, 2, 5, context_batch=1),
                {"key_padding_mask": lambda: padding(2, 4)},
            ),
        },
        rows=lambda rows, dtype: _cross(2, 8 * rows, 3, 20, 2, 24, context_batch=1)(dtype),
        floats={"weight": (0.1, 0.7), "eps": (1e-6, 1e-2), "dropout_p": (0.1, 0.4)},
        check=cross_attention_cases.check,
        linear="v_weight",
        unrounded=("weight",),
    ),
    "cross_attention_residual standard": Operator(
        name="cross_attention_residual",
        draw=_cross(2, 3, 4, 6, 2, 5),
        plans={"portable": ("standard",), "triton": ("standard",)},
        options={"num_heads": 2},
        variants={"all": (_cross(2, 3, 4, 6, 2, 5), {"norm_match": True, "key_padding_mask": lambda: padding(2, 4)})},
        rows=lambda rows, dtype: _cross(2, 8 * rows, 3, 20, 2, 24, context_batch=1)(dtype),
        floats={"weight": (0.1, 0.7), "eps": (1e-6, 1e-2), "dropout_p": (0.1, 0.4)},
        check=cross_attention_cases.check,
        unrounded=("weight",),
    ),
    "projection_residual": Operator(
        name="projection_residual",
        draw=_projection(2, 3, 6),
        plans={"portable": ("",), "triton": ("",)},
        options={"skip": 0.5},
        variants={
            "no bias": (_projection(2, 4, 6, bias=False, gate=None), {}),
            "all": (_projection(2, 4, 6), {"activation": "gelu", "norm_match": True}),
            "float32 residual": (_projection(2, 4, 6, residual=torch.float32, gate="scalar"), {}),
        },
        rows=lambda rows, dtype: _projection(rows, 6)(dtype),
        floats={"gate": (0.1, 0.7), "skip": (0.5, 1.0), "eps": (1e-6, 1e-2)},
        check=lambda tensors, backend, plan="", **options: cross_attention_cases.check_projection(
            tensors, backend, **options
        ),
        unrounded=("residual", "gate"),
    ),
}
assert {row.name for row in OPERATORS.values()} == set(ALL)
every_operator = pytest.mark.parametrize("operator", OPERATORS)


def _calls(chosen: Callable[[Operator, str], Sequence[str]]) -> list:
    return [
        pytest.param(name, backend, plan, marks=skips(backend), id="-".join(filter(None, (name, backend, plan))))
        for name, row in OPERATORS.items()
        for backend in row.plans
        for plan in chosen(row, backend)
    ]


def _parametrize(calls: list) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("operator", "backend", "plan"), calls)


def _with_variants(calls: list, takes: Callable[[str, int], bool]) -> pytest.MarkDecorator:
    """The variants i of each call's operator that ``takes(backend, i)``."""
    found = [
        pytest.param(*call.values, variant, marks=call.marks, id=f"{call.id}-{variant}")
        for call in calls
        for i, variant in enumerate(OPERATORS[call.values[0]].variants)
        if takes(call.values[1], i)
    ]
    return pytest.mark.parametrize(("operator", "backend", "plan", "variant"), found)


_ALL = _calls(lambda row, backend: row.plans[backend])
_FIRST = _calls(lambda row, backend: row.plans[backend][:1])
# On every backend in each of its plans; in one of them; on the portable backend, for what has no kernels in it.
every_call, every_backend_of_it = _parametrize(_ALL), _parametrize(_FIRST)
every_portable_call = _parametrize([call for call in _FIRST if call.values[1] == "portable"])
every_variant = _with_variants(_ALL, lambda backend, i: True)
# Every variant on backends that are fast anywhere, one on each of the others.
some_variants = _with_variants(_FIRST, lambda backend, i: backend in FAST or i == 0)


def function_of(operator: str, backend: str, plan: str, **options) -> Callable[..., Tensor]:
    row = OPERATORS[operator]
    settings = {**row.options, **options} | ({"plan": plan} if plan else {})
    made = {name: value() if callable(value) else value for name, value in settings.items()}
    return functools.partial(getattr(pyfused, row.name), backend=backend, **made)


def call(operator: str, backend: str, plan: str, **options) -> tuple[Callable[..., Tensor], dict[str, Tensor | None]]:
    """The operator with everything but its tensors, and those."""
    return function_of(operator, backend, plan, **options), OPERATORS[operator].draw(plain_dtype(backend))


def variant_of(
    operator: str, backend: str, plan: str, variant: str
) -> tuple[Callable[..., Tensor], dict[str, Tensor | None]]:
    draw, options = OPERATORS[operator].variants[variant]
    dtype = plain_dtype(backend)
    if variant == "float32 adapters" and dtype == torch.float32:
        dtype = torch.bfloat16
    return function_of(operator, backend, plan, **options), draw(dtype)


def raw(operator: str, backend: str, direction: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops, f"pyfused_{backend}"), f"{operator}_{direction}").default


def raw_calls(function: Callable[..., Tensor], tensors: Tensors) -> list[tuple[torch._ops.OpOverload, list]]:
    """The raw operators of one step, forward then backward, with the detached arguments they were called with."""
    with RawCalls() as recorded:
        y = function(**leaves_of(tensors))
        y.backward(cotangent(y))
    return [
        (op, [value.detach() if isinstance(value, Tensor) else value for value in arguments.values()])
        for op, arguments in recorded.raw
    ]


def given(leaves: Tensors) -> list[Tensor]:
    return [leaf for leaf in leaves.values() if leaf is not None]


def close(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-4, "atol": 1e-5} if dtype.itemsize > 2 else {"rtol": 2e-2, "atol": 2e-2}
