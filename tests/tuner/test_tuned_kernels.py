"""`tune` where kernels serve calls: Triton's interpreter stands for a GPU on which "auto" chooses."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import pyfused
from pyfused.choice import backends, cache, measured, order
from pyfused.choice.order import Choice
from pyfused.kernels import recording
from pyfused.kernels.recording import Target

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter serves where no GPU is")
PLANS = ("one_launch", "shrink_expand", "blas")
# Forward, backward: each direction has another plan that is fastest, and neither is pyfused's own.
SECONDS = {("shrink_expand", "forward"): 0.4, ("blas", "backward"): 0.4}


class Clock:
    """Seconds of a plan in a direction by `SECONDS`, and of a configuration by its stages; what it timed."""

    mode = "fake"

    def __init__(self):
        self.parts, self.configurations = set(), set()

    def round(self, calls):
        seconds = {}
        for label in calls:
            if hasattr(label, "plan"):
                self.parts.add(label)
                own = 2.0 if label.backend == "portable" else 1.0
                seconds[label] = SECONDS.get((label.plan, label.direction), own) if label.backend == "triton" else own
            else:
                self.configurations.add(label)
                seconds[label] = 1.0 / label.num_stages
        return seconds


@pytest.fixture
def clock(monkeypatch):
    """A CPU that is taken for a GPU: "auto" chooses there between Triton and portable."""

    def available(device, dtype, kernels, limits, plans=None):
        plans = plans or backends.NO_PLANS
        return {name: plans[name] for name in ("triton", "portable") if plans[name] and name not in limits}

    monkeypatch.setattr(backends, "available", available)
    monkeypatch.setattr(backends, "planned", order.choose)
    monkeypatch.setattr(order, "device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    target = Target((0, 0), 4, 1 << 30, "A GPU")
    monkeypatch.setattr("pyfused.kernels.launch.INTERPRETER", target)
    found = Clock()
    monkeypatch.setattr("pyfused.tuner.tune.cold_and_warm", lambda device: {"warm": found})
    return found


def test_each_direction_gets_its_plan_and_its_kernels_their_configurations(clock):
    layer, x = pyfused.LoRALinear(32, 48, rank=4), torch.randn(40, 32, requires_grad=True)
    torch.nn.init.normal_(layer.lora_b)
    before = layer(x)
    (own,) = pyfused.explain(layer, x).calls
    report = pyfused.tune(layer, x)
    (call,) = report.calls
    assert (call.before.backend, call.before.forward, call.before.backward) == (
        own.backend, own.plan, own.backward_plan,
    )  # fmt: skip
    assert call.now == Choice("triton", "shrink_expand", "blas")
    assert call.dropped == ()
    ways = (own.plan, "forward"), (own.backward_plan, "backward")
    taken = 4.0 if own.backend == "portable" else sum(SECONDS.get(way, 1.0) for way in ways)
    assert call.gain == pytest.approx(taken / 0.8)
    assert {(part.backend, part.plan) for part in clock.parts} == {
        ("portable", "blas"), *(("triton", plan) for plan in PLANS)
    }  # fmt: skip
    (now,) = pyfused.explain(layer, x).calls
    assert (now.backend, now.plan, now.backward_plan) == call.now
    torch.testing.assert_close(layer(x), before)
    # The kernels of these two plans, and of no other, were tried in other configurations.
    rows = {row.subject: row for row in cache.rows()}
    assert rows.pop("lora_linear").plans["triton"] == ("shrink_expand", "blas")
    assert rows
    assert clock.configurations
    for row in rows.values():
        assert (row.gpu, row.source["of"]) in {("A GPU", "forward"), ("A GPU", "backward")}
        assert row.found["num_stages"] > 2
    assert {row.subject for row in measured.TABLE.rows} == {"lora_linear", *rows}


def test_the_rows_of_configurations_are_taken(clock):
    layer, x = pyfused.LoRALinear(32, 48, rank=4), torch.randn(40, 32, requires_grad=True)
    pyfused.tune(layer, x)
    rows = [row for row in cache.rows() if row.subject != "lora_linear"]
    with recording.forced({}) as found:
        # Not of a sum, whose gradient has no strides to load vectors by.
        layer(x).square().sum().backward()
    for chosen in dict.fromkeys(found):
        gpu, dtype, m, sizes = recording.measured_for(chosen.arguments)
        row = measured.TABLE.nearest(gpu, chosen.kernel, dtype, m, sizes)
        if row in rows:
            own, now = chosen.config(), recording.measured_or_own(chosen)
            assert recording.differing(own, now) == row.found
            rows.remove(row)
    assert rows == []


def test_a_plan_before_a_backend_gets_both(clock, monkeypatch):
    """Cross-attention: a row names the plan and the backend, and both are taken."""
    attention = pyfused.ScaledCrossAttention(32, 24, 2)
    given = torch.randn(1, 40, 32), torch.randn(1, 3, 24)
    monkeypatch.setitem(SECONDS, ("standard", "forward"), 0.1)
    monkeypatch.setitem(SECONDS, ("standard", "backward"), 0.1)
    report = pyfused.tune(attention, *given)
    (call,) = report.calls
    assert call.dropped == ()
    assert call.now == Choice("triton", "standard", "standard")
    (now,) = pyfused.explain(attention, *given).calls
    assert (now.backend, now.plan) == ("triton", "standard")
    assert now.why[0].startswith("measured at M = 40: triton standard ")
    assert "not triton" not in " ".join(now.why)


def test_where_a_lucky_winner_loses_the_librarys_plan_may_win(clock, monkeypatch):
    """The second race is between pyfused's own choice, the library's plan and the winner of the first."""
    layer, x = pyfused.LoRALinear(32, 48, rank=4), torch.randn(40, 32, requires_grad=True)
    (own,) = pyfused.explain(layer, x).calls
    assert (own.backend, own.plan, own.backward_plan) == ("triton", "one_launch", "blas")
    monkeypatch.setitem(SECONDS, ("blas", "forward"), 0.99)
    timed, rounds = clock.round, []

    def lucky(calls):
        rounds.append(set(calls))
        # The first is about shares; a race has five rounds where the times agree.
        monkeypatch.setitem(SECONDS, ("shrink_expand", "forward"), 0.4 if len(rounds) <= 6 else 1.2)
        return timed(calls)

    monkeypatch.setattr(clock, "round", lucky)
    (call,) = pyfused.tune(layer, x).calls
    assert call.now == Choice("triton", "blas", "blas")
    assert call.gain == pytest.approx((1.0 + 0.4) / (0.99 + 0.4))
