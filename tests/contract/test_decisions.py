"""Every call makes one record of what was decided, and does what the record says."""

from __future__ import annotations

import pytest
import torch
from operator_cases import RawCalls, leaves_of
from operators import OPERATORS, call, every_call, raw_calls, variant_of

import pyfused
from pyfused.choice import backends
from pyfused.choice.order import Choice
from pyfused.ops import decision


@every_call
def test_one_record_a_call_and_no_auto_in_it(operator, backend, plan):
    function, tensors = call(operator, backend, plan)
    told = []
    with decision.observed(told.append):
        raw = raw_calls(function, tensors)
    (made,) = told
    x = next(iter(tensors.values()))
    assert (made.operator, made.backend, made.dtype, made.device) == (
        OPERATORS[operator].name, backend, x.dtype, x.device,
    )  # fmt: skip
    assert "auto" not in (made.plan, made.backward_plan)
    assert not plan or {made.plan, made.backward_plan} == {plan}
    assert all(isinstance(size, int) for _, size in made.shapes)
    assert dict(made.shapes).items() & made.sizes.items(), "the sizes of both speak of the same letters"
    assert made.reasons
    assert {op.name().partition("::")[2].removesuffix("_fwd").removesuffix("_bwd") for op, _ in raw} == {made.kernels}
    assert not any(isinstance(value, str) and value == "auto" for _, values in raw for value in values)


@pytest.mark.parametrize("operator", OPERATORS)
def test_auto_is_resolved_before_the_raw_operators(operator):
    function, tensors = call(operator, "portable", "")
    told = []
    with decision.observed(told.append):
        raw = raw_calls(function, tensors)
    (made,) = told
    assert "auto" not in (made.plan, made.backward_plan)
    assert not any(isinstance(value, str) and value == "auto" for _, values in raw for value in values)


@pytest.mark.parametrize(
    ("operator", "variant"), [(name, variant) for name, row in OPERATORS.items() for variant in row.variants]
)
def test_a_record_is_made_for_readers_alone(operator, variant, monkeypatch):
    """Nobody watching, a call makes none: it would cost the host time."""

    def never(*arguments, **named):
        raise AssertionError("a record without a reader")

    monkeypatch.setattr(decision, "Decision", never)
    function, tensors = variant_of(operator, "portable", "", variant)
    assert torch.isfinite(function(**tensors)).all()
    with pytest.raises(AssertionError, match="without a reader"), decision.observed(lambda told: None):
        function(**tensors)


def _drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
def test_a_choice_knows_what_dtypes_parameters_have(adapters, base):
    """A wider one is converted inside a kernel's loop, which costs time there."""
    told = []
    x, lora = _drawn(6, 32), (_drawn(4, 32, dtype=adapters), _drawn(48, 4, dtype=adapters))
    with decision.observed(told.append), torch.autocast("cpu", torch.bfloat16, enabled=base != torch.bfloat16):
        pyfused.lora_linear(x, _drawn(48, 32, dtype=base), *lora, dropout_p=0.25, seed=1)
        down, up = _drawn(4, 32, dtype=adapters), _drawn(32, 4, dtype=adapters)
        pyfused.adapter_residual(x, down, None, up, None, dropout_p=0.25, seed=1)
        # Of the two weights the wider one counts.
        pyfused.adapter_residual(x, down, None, up.float(), None)
        pyfused.lora_linear(x, _drawn(48, 32, dtype=base), lora[0], lora[1].float())
    linear, narrow, wider, wider_b = (made.sizes for made in told)
    sizes = {"M": 6, "N": 48, "K": 32, "R": 4, "dropout_p": 0.25}
    assert linear == sizes | {"weight_bytes": base.itemsize, "adapter_bytes": adapters.itemsize, "tma": 0}
    assert narrow == {
        "M": 6, "C": 32, "h": 4, "dropout_p": 0.25, "weight_bytes": adapters.itemsize, "cuda_rows": narrow["cuda_rows"],
    }  # fmt: skip
    assert (wider["weight_bytes"], wider_b["adapter_bytes"]) == (4, 4)


def test_a_choice_knows_whether_rows_lie_as_descriptors_ask():
    told = []
    images = _drawn(2, 32, 3, 3)
    with decision.observed(told.append):
        for x, channel_dim, k, n in (
            (_drawn(6, 32), -1, 32, 48),
            (_drawn(6, 28), -1, 28, 48),
            (_drawn(6, 32), -1, 32, 44),
            (_drawn(32, 6).t(), -1, 32, 48),
            (images, 1, 32, 48),
            (images.contiguous(memory_format=torch.channels_last), 1, 32, 48),
        ):
            pyfused.lora_linear(x, _drawn(n, k), _drawn(8, k), _drawn(n, 8), channel_dim=channel_dim)
    assert [made.sizes["tma"] for made in told] == [1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("operator", ["lora_linear", "lora_linear mixed"])
def test_each_direction_has_a_plan_of_its_own(operator, traced, monkeypatch):
    """Also where a program holds the raw operator alone, whose derivative is planned where it runs."""
    chosen = Choice("portable", "blas", "of backward")
    monkeypatch.setattr(backends, "choose", lambda *arguments: chosen)
    monkeypatch.setattr(backends, "planned", lambda *arguments: chosen)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: traced)
    function, tensors = call(operator, "portable", "")
    with RawCalls() as seen:
        function(**leaves_of(tensors)).sum().backward()
    assert {direction: arguments["plan"] for direction, arguments in seen.calls} == {
        "fwd": "blas", "bwd": "of backward",
    }  # fmt: skip
