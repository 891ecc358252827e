"""Every call makes one record of what was decided, and does what the record says."""

from __future__ import annotations

import pytest
import torch
from operators import OPERATORS, call, every_call, raw_calls, variant_of

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
