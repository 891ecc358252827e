"""What is compared for a call, where there are kernels: on a GPU that is not there, by decisions and times alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pyfused.choice import backends, order
from pyfused.choice.order import Choice
from pyfused.ops.decision import Decision
from pyfused.ops.lora_linear import candidates
from pyfused.tuner import session, ways
from pyfused.tuner.race import taken, winner
from pyfused.tuner.recorder import Count
from pyfused.tuner.replay import Recorded

GPU = torch.device("cuda", 0)
SIZES = {"M": 64, "N": 48, "K": 32, "R": 4, "dropout_p": 0.0, "weight_bytes": 2, "adapter_bytes": 2, "tma": 1}
ASKED = (("plan", "auto"), ("backend", "auto"))
LORA = Decision(
    "lora_linear", "lora_linear", (), SIZES, torch.bfloat16, GPU, "triton", "blas", "one_launch", (), 0,
    {"cuda": "no"}, candidates("auto", 4), ASKED,
)  # fmt: skip
CROSS = Decision(
    "cross_attention_residual", "cross_attention_residual", (), {"M": 64, "C": 32, "J": 6}, torch.bfloat16, GPU,
    "portable", "absorbed", "absorbed", (), 0, {}, arguments=ASKED, rivals=("absorbed", "standard"),
    call_sizes={"M": 64, "T": 3},
)  # fmt: skip


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """What could serve a call there, by plan of cross-attention."""

    def available(device, dtype, kernels, limits, plans):
        every = ("triton", "portable") if kernels == "projection_residual" else ("cuda", "triton", "portable")
        return {name: plans[name] for name in every if name not in limits}

    monkeypatch.setattr(backends, "available", available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(order, "device_name", lambda device: "A GPU")


class Told:
    """A replay that decides as it is told."""

    def decided(self, plan):
        assert plan == "standard"
        return replace(CROSS, kernels="projection_residual", plan=plan, backward_plan=plan)


def test_every_pair_of_plans_of_a_backend_pyfuseds_own_first():
    found = list(ways.choices(LORA, Told()))
    plans = ("one_launch", "shrink_expand", "blas")
    assert found[0] == Choice("triton", "blas", "one_launch")
    assert sorted(found) == sorted(
        [Choice("triton", a, b) for a in plans for b in plans] + [Choice("portable", "blas", "blas")]
    )


def test_a_plan_before_a_backend_has_the_backends_that_serve_it():
    found = list(ways.choices(CROSS, Told()))
    assert found == [
        Choice("portable", "absorbed", "absorbed"),
        Choice("cuda", "absorbed", "absorbed"),
        Choice("triton", "absorbed", "absorbed"),
        Choice("triton", "standard", "standard"),
        Choice("portable", "standard", "standard"),
    ]


def test_the_librarys_plan_is_that_of_the_chosen_backend():
    """The one that leaves the products to it; where that was dropped another backend's, or none."""
    found = list(ways.choices(LORA, Told()))
    assert ways.library_choice(found) == Choice("triton", "blas", "blas")
    found.remove(Choice("triton", "blas", "blas"))
    assert ways.library_choice(found) == Choice("portable", "blas", "blas")
    found.remove(Choice("portable", "blas", "blas"))
    assert ways.library_choice(found) is None
    assert ways.library_choice(list(ways.choices(CROSS, Told()))) == Choice("portable", "standard", "standard")
    adapter = replace(LORA, plan="save", backward_plan="save", plans=backends.NO_PLANS)
    assert ways.library_choice(list(ways.choices(adapter, Told()))) == Choice("portable", "", "")


def test_what_auto_means_is_all_that_is_compared(monkeypatch):
    monkeypatch.setattr(backends, "DEFAULT_BACKEND", "triton")
    assert {choice.backend for choice in ways.choices(LORA, Told())} == {"triton"}
    assert [choice.backend for choice in ways.choices(CROSS, Told())] == ["portable", "triton", "triton"]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({}, ""),
        ({"backend": "triton"}, "backend asked for by name"),
        ({"plan": "blas"}, "plan asked for by name"),
    ],
)
def test_what_is_asked_for_by_name_is_not_compared(asked, why):
    assert ways.nothing_to_compare(replace(LORA, arguments=tuple((dict(ASKED) | asked).items()))) == why


def test_no_rows_are_not_compared():
    elsewhere = replace(LORA, device=torch.device("mps"))
    assert ways.nothing_to_compare(elsewhere) == "no clock for device type 'mps'"
    assert ways.nothing_to_compare(replace(LORA, sizes=SIZES | {"M": 0})) == "no rows"
    assert ways.nothing_to_compare(CROSS) == ""


def test_plans_that_differ_in_memory_alone_are_one():
    adapter = replace(LORA, plan="save", backward_plan="save", plans=backends.NO_PLANS)
    assert ways.chosen_by(adapter) == Choice("triton", "", "")
    assert list(ways.choices(adapter, Told())) == [Choice("triton", "", ""), Choice("portable", "", "")]
    assert ways.by_name(Choice("triton", "", "")) == {"backend": "triton"}


def test_directions_are_timed_once_and_weighed_by_how_often_they_run():
    count = Count(LORA, forward=5, wanted=3)
    parts = ways.parts_of(1, Choice("triton", "blas", "one_launch"), count)
    assert parts == {(1, "triton", "blas", "forward"): 5, (1, "triton", "one_launch", "backward"): 3}
    assert ways.parts_of(0, Choice("portable", "blas", "blas"), Count(LORA, forward=2)) == {
        (0, "portable", "blas", "forward"): 2
    }


def test_a_row_names_the_winner_first_and_the_best_of_each_backend():
    recorded = Recorded("lora_linear", ASKED, None, True)
    group = session.Group(LORA, [(recorded, Count(LORA, forward=2, wanted=2))])
    count = group.calls[0][1]
    contenders = {choice: ways.parts_of(0, choice, count) for choice in ways.choices(LORA, Told())}
    seconds = {}
    for parts in contenders.values():
        for part in parts:
            fast = part.plan == ("one_launch" if part.direction == "forward" else "shrink_expand")
            seconds[part] = 1e-6 if fast else 3e-6
    best, gain = winner(contenders, {"warm": seconds})
    assert best == Choice("triton", "one_launch", "shrink_expand"), "each direction has its own"
    assert gain == pytest.approx(3.0)
    times = {choice: taken(parts, seconds) for choice, parts in contenders.items()}
    row = session._row(group, best, gain, times)
    assert (row.gpu, row.capability, row.subject, row.rows) == ("A GPU", (9, 0), "lora_linear", 64)
    assert row.sizes == order.others(SIZES)
    assert list(row.found.items()) == [("triton", pytest.approx(2.0)), ("portable", pytest.approx(6.0))]
    assert row.plans == {"triton": ("one_launch", "shrink_expand"), "portable": ("blas", "blas")}
    assert row.source["untuned"] == "triton blas / one_launch"
    # Where pyfused's own choice stays, it is the one to take, whatever else was faster by less than counts.
    times[group.own] *= 0.34
    kept = session._row(group, group.own, 1.0, times)
    assert (next(iter(kept.found)), kept.plans["triton"]) == ("triton", ("blas", "one_launch"))
    slower = session._row(replace(group, untuned=replace(LORA, backend="portable", plan="blas", backward_plan="blas")),
                          Choice("portable", "blas", "blas"), 1.0, times)  # fmt: skip
    assert list(slower.found) == ["portable", "triton"]
