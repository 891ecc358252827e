"""Bounded regret: what the rule promises of any times, and of any call on any GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyfused.choice import costs, order, rates, rule
from pyfused.choice.rule import BOUND, Times, feasible, ranked, regret
from pyfused.ops.lora_linear import candidates as lora_candidates

NAMES = "abcde"
times = st.tuples(st.floats(0.1, 1e4), st.floats(1.0, 10.0)).map(lambda pair: Times(pair[0] * pair[1], pair[0]))
# Name -> times; the first is the library's, which is as fast as it is.
several = st.lists(times, min_size=1, max_size=len(NAMES)).map(
    lambda found: dict(zip(NAMES, found, strict=False)) | {"a": Times(found[0].fast, found[0].fast)}
)


@given(several, st.floats(0.1, 1e4))
def test_only_the_library_may_be_slower_than_eager_and_it_always_may(candidates, eager):
    allowed = feasible(candidates, eager, {"a"})
    assert "a" in allowed
    for name, each in candidates.items():
        bounded = each.slow <= BOUND * max(eager, candidates["a"].slow)
        assert (name in allowed) == (bounded or name == "a")


@given(several, st.floats(0.1, 1e4))
def test_without_a_library_the_formula_alone_bounds(candidates, eager):
    assert feasible(candidates, eager, ()) == {n for n, each in candidates.items() if each.slow <= BOUND * eager}


@given(several, st.booleans())
def test_regret_is_what_is_lost_at_worst(candidates, together):
    for name, own in candidates.items():
        rest = [each for other, each in candidates.items() if other != name]
        ends = [(own.slow, [each.slow if together else each.fast for each in rest])]
        ends += [(own.fast, [each.fast for each in rest])]
        expected = max([0.0, *(mine / min(theirs) - 1 for mine, theirs in ends if theirs)])
        assert regret(name, candidates, together=together) == pytest.approx(expected)


@given(several, st.floats(0.1, 1e4), st.booleans())
def test_the_best_has_the_least_regret_of_those_allowed(candidates, eager, together):
    allowed = feasible(candidates, eager, {"a"})
    order_of = ranked(candidates, allowed, together=together)
    assert sorted(order_of) == sorted(candidates)
    best = order_of[0]
    assert best in allowed
    least = min(regret(name, candidates, together=together) for name in allowed)
    assert regret(best, candidates, together=together) == least


@given(several, st.floats(0.1, 1e4), st.floats(0.1, 1.0), st.floats(0.1, 1.0), st.data())
def test_a_more_efficient_kernel_stays_chosen(candidates, eager, slow, fast, data):
    """Monotone in both ends of its band."""
    best = ranked(candidates, feasible(candidates, eager, {"a"}), together=False)[0]
    name = data.draw(st.sampled_from(sorted(candidates)))
    own = candidates[name]
    faster = candidates | {name: Times(max(own.slow * slow, own.fast * min(slow, fast)), own.fast * min(slow, fast))}
    after = ranked(faster, feasible(faster, eager, {"a"}), together=False)[0]
    if name == best:
        assert after == name
    else:
        assert after in (best, name) or regret(after, faster, together=False) <= regret(best, faster, together=False)


@given(several, st.floats(0.1, 1e4), st.floats(0.01, 100.0))
def test_the_unit_of_time_does_not_matter(candidates, eager, factor):
    scaled = {name: Times(each.slow * 2.0**10, each.fast * 2.0**10) for name, each in candidates.items()}
    allowed = feasible(candidates, eager, {"a"})
    assert feasible(scaled, eager * 2.0**10, {"a"}) == allowed
    assert ranked(scaled, allowed, together=False) == ranked(candidates, allowed, together=False)


def test_variants_of_one_kernel_are_compared_at_the_same_efficiency():
    # b does one launch's work less than c: it can never lose to it, though their times overlap.
    candidates = {"c": Times(21.0, 11.0), "b": Times(20.0, 10.0)}
    assert regret("b", candidates, together=True) == 0.0
    assert regret("b", candidates, together=False) == pytest.approx(20 / 11 - 1)
    assert ranked(candidates, {"b", "c"}, together=True) == ["b", "c"]


def test_of_equals_the_first_is_taken():
    equal = Times(2.0, 1.0)
    assert ranked({"b": equal, "a": equal}, {"a", "b"}, together=False) == ["b", "a"]
    assert ranked({"b": equal, "a": equal}, {"a"}, together=False) == ["a", "b"]


# Calls.

_size = st.integers(1, 1 << 15)
_rows = st.integers(1, 1 << 20)
_bytes = st.sampled_from((2, 4))
_dropout = st.sampled_from((0.0, 0.1))
_tiles = st.sampled_from((16, 32, 64))
CALLS = {
    "lora_linear": st.fixed_dictionaries(
        {"M": _rows, "N": _size, "K": _size, "R": st.integers(1, 256), "dropout_p": _dropout, "weight_bytes": _bytes,
         "adapter_bytes": _bytes, "tma": st.sampled_from((0, 1))}
    ),
    "adapter_residual": st.fixed_dictionaries(
        {"M": _rows, "C": _size, "h": st.integers(1, 512), "dropout_p": _dropout, "weight_bytes": _bytes,
         "cuda_rows": _tiles}
    ),
    "cross_attention_residual": st.fixed_dictionaries(
        {"M": _rows, "C": _size, "J": st.integers(1, 256), "dropout_p": _dropout, "norm_match": st.booleans(),
         "cuda_rows": _tiles}
    ),
    "projection_residual": st.fixed_dictionaries(
        {"M": _rows, "C": _size, "K": _size, "norm_match": st.booleans()}
    ),
}  # fmt: skip
CALLS["mixed_lora_linear"] = CALLS["lora_linear"]
capabilities = st.sampled_from(((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (11, 0), (12, 0), (13, 1)))


@st.composite
def calls(draw):
    """(operator, capability, dtype, sizes, candidates)."""
    operator = draw(st.sampled_from(sorted(CALLS)))
    sizes, dtype = draw(CALLS[operator]), draw(st.sampled_from((torch.bfloat16, torch.float32)))
    if operator.endswith("lora_linear"):
        plans = dict(lora_candidates("auto", sizes["R"]))
    else:
        plans = dict.fromkeys(("portable", "triton", "cuda"), ("",))
    if operator in ("mixed_lora_linear", "projection_residual") or dtype == torch.float32:
        del plans["cuda"]
    if dtype == torch.float32:
        sizes |= {name: 4 for name in ("weight_bytes", "adapter_bytes") if name in sizes}
    present = draw(st.sets(st.sampled_from(sorted(plans)), min_size=1))
    return operator, draw(capabilities), dtype, sizes, {name: plans[name] for name in plans if name in present}


def _directions(operator, capability, dtype, sizes, candidates):
    like = dict(order._bucketed(sizes)) | {"M": order._stands_for(sizes["M"])}
    return order.times(operator, capability, dtype.itemsize, like, candidates)


@settings(max_examples=150, deadline=None)
@given(calls())
def test_what_is_chosen_is_bounded_in_both_directions(call):
    operator, capability, dtype, sizes, candidates = call
    chosen = order.by_times(operator, capability, dtype, sizes, candidates)
    assert chosen.backend in candidates
    for direction, plan in zip(_directions(*call), chosen[1:], strict=True):
        assert plan in candidates[chosen.backend]
        for slow, fast in direction.candidates.values():
            assert 0.0 < fast <= slow
        library = [each.slow for name, each in direction.candidates.items() if name in costs.LIBRARY]
        assert costs.LIBRARY & direction.candidates.keys() <= direction.feasible
        if library:
            slow = direction.candidates[chosen.backend, plan].slow
            assert slow <= BOUND * max(direction.eager, *library)


@settings(max_examples=60, deadline=None)
@given(calls(), st.integers(1, 1 << 20))
def test_rows_of_one_bucket_are_served_alike(call, rows):
    operator, capability, dtype, sizes, candidates = call
    last = 1 << (rows - 1).bit_length()
    both = [order.by_times(operator, capability, dtype, sizes | {"M": m}, candidates) for m in (rows, last)]
    assert both[0] == both[1]


LORA = {"M": 8192, "N": 4096, "K": 4096, "R": 16, "dropout_p": 0.0, "weight_bytes": 2, "adapter_bytes": 2, "tma": 1}


@pytest.mark.parametrize(("kernel", "tma"), [("triton gemm", 0), ("triton gemm, tma", 1)], ids=["pointers", "tma"])
@pytest.mark.parametrize("direction", [1, 2])
def test_the_plan_follows_the_band(monkeypatch, direction, kernel, tma):
    """From a band at which the library is taken to one at which the fused kernel is, and not back."""
    taken = []
    for percent in range(20, 131, 5):
        band = {capability: (percent / 100, max(1.0, percent / 100)) for capability in ((9, 0), rates._ANY)}
        monkeypatch.setitem(rates._BANDS, kernel, band)
        order._decided.cache_clear()
        taken.append(
            order.by_times("lora_linear", (9, 0), torch.bfloat16, LORA | {"tma": tma}, lora_candidates("auto", 16))[
                direction
            ]
        )
    monkeypatch.undo()
    order._decided.cache_clear()
    fused = [plan != "blas" for plan in taken]
    assert fused == sorted(fused)
    assert set(fused) == {False, True}


def test_the_table_of_bands_is_one_of_efficiencies():
    for kernel, known in rates._BANDS.items():
        assert rates._ANY in known, kernel
        for capability in known:
            low, high = rates.band(capability, kernel)
            assert 0.0 < low <= high <= 1.02
            # What is not known is not trusted more than what is.
            assert rates.band((99, 0), kernel)[0] <= low or capability == (10, 0)
    assert rates.band((9, 0), None) == (1.0, 1.0)
    assert rates.gpu((9, 0)) != rates.gpu((8, 0))
    assert rates.gpu((8, 7)) == rates.gpu((8, 6))
    assert rates.gpu((7, 5)) == rates.gpu((8, 0))


def test_every_kernel_in_the_costs_has_a_band():
    used = set()
    for operator, sizes in (
        ("lora_linear", LORA),
        ("adapter_residual", {"M": 8, "C": 64, "h": 16, "dropout_p": 0.0, "weight_bytes": 2, "cuda_rows": 64}),
        ("projection_residual", {"M": 8, "C": 64, "K": 16, "norm_match": True}),
    ):  # fmt: skip
        for itemsize in (2, 4):
            _, plans = costs.works(operator, (9, 0), itemsize, sizes)
            used |= {work.kernel for both in plans.values() for work in both}
    assert used - {None} == set(rates._BANDS)
    assert rule.BOUND == 1.03
