"""`tune` and `tuning` on a CPU: what is timed, what is kept, and that the model stays as it was."""

from __future__ import annotations

import copy
import itertools
import pickle
import random

import pytest
import torch
import tuned
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import pyfused
from pyfused.choice import backends, cache, measured, order
from pyfused.ops import cross_attention_residual as cross
from pyfused.tuner import session
from pyfused.tuner.recorder import Recorder

FASTER = {"standard_forward": 0.5, "standard_backward": 0.5}


def test_the_faster_plan_serves_from_then_on(timed, place):
    model, (x, context) = tuned.Towers(), tuned.inputs()
    assert tuned.plans(model, x, context) == ["absorbed", "absorbed"]
    before = model(x, context)
    timed(**FASTER)
    report = pyfused.tune(model, x, context)
    assert tuned.plans(model, x, context) == ["standard", "standard"]
    torch.testing.assert_close(model(x, context), before)
    # The first attention's x wants no gradient, the second's does: two calls, and one row for both.
    attention = [call for call in report.calls if call.operator == "cross_attention_residual"]
    assert [(call.count, call.gain) for call in attention] == [(1, 2.0), (1, 2.0)]
    assert {(call.before.forward, call.now.forward, call.note) for call in attention} == {("absorbed", "standard", "")}
    (linear,) = (call for call in report.calls if call.operator == "lora_linear")
    assert (linear.note, linear.gain, linear.now) == ("one plan serves it", 1.0, linear.before)
    assert sum(call.share for call in report.calls) == pytest.approx(1.0)
    assert report.path == place
    (row,) = cache.rows()
    assert row.found == {"portable": pytest.approx(1e6)}
    assert row.plans == {"portable": ("standard", "standard")}
    assert (row.source["untuned"], row.source["gain"]) == ("portable absorbed", 2.0)
    printed = str(report)
    assert "portable absorbed  portable standard  2.00x" in printed
    assert f"kept in {place}" in printed
    assert pickle.loads(pickle.dumps(report)) == report


def test_explain_says_that_it_was_measured(timed):
    model, given = tuned.Towers(), tuned.inputs()
    timed(**FASTER)
    pyfused.tune(model, *given)
    first = pyfused.explain(model, *given).calls[0]
    assert first.why[0] == "measured at M = 24: portable standard 1000000.0 us"


def test_it_is_kept_for_the_next_process(timed):
    model, given = tuned.Towers(), tuned.inputs()
    timed(**FASTER)
    pyfused.tune(model, *given)
    measured.use(())
    assert tuned.plans(model, *given) == ["absorbed", "absorbed"]
    # What an import does.
    measured.use(cache.rows())
    assert tuned.plans(model, *given) == ["standard", "standard"]


def test_whatever_the_times_the_choice_is_slower_than_no_other_plan(timed, monkeypatch):
    """The property that tuning stands on, through the public function and the choice that it leads to: beside pyfused's
    own choice, "absorbed", there is the library's, "standard"."""
    model, given, draw = tuned.Towers(), tuned.inputs(), random.Random(0)
    names = [f"{plan}_{direction}" for plan in ("absorbed", "standard") for direction in ("forward", "backward")]
    seen = set()
    for _ in range(12):
        seconds = {name: draw.uniform(0.98, 1.02) for name in names}
        measured.use(())
        timed(**seconds)
        report = pyfused.tune(model, *given)
        (plan,) = set(tuned.plans(model, *given))
        taken = {name: seconds[f"{name}_forward"] + seconds[f"{name}_backward"] for name in ("absorbed", "standard")}
        expected = min(taken, key=taken.__getitem__)
        assert plan == expected, seconds
        assert report.calls[0].gain == pytest.approx(taken["absorbed"] / taken[plan])
        seen.add(plan)
    assert seen == {"absorbed", "standard"}


def test_the_direction_that_runs_more_often_counts_more(timed):
    """Two forward for each backward: the plan that is faster forward is taken, by as little as it is."""
    model, given = tuned.Towers(), tuned.inputs()
    timed(standard_forward=0.8, standard_backward=1.3)
    assert all(call.now.forward == "absorbed" for call in pyfused.tune(model, *given).calls if call.note == "")
    with torch.no_grad():
        pyfused.tune(model, *given)
    assert tuned.plans(model, *given) == ["standard", "standard"]
    with pyfused.tuning() as found:
        for _ in range(3):
            model(*given).sum().backward()
    assert found.report.calls[0].count == 3
    assert tuned.plans(model, *given) == ["absorbed", "absorbed"], "tuned anew, beside pyfused's own choice"


def test_what_wins_one_race_by_chance_does_not_win(timed):
    model, given = tuned.Towers(), tuned.inputs()
    clocks = timed(**FASTER)

    class Lucky(tuned.FakeClock):
        def round(self, calls):
            # The first is about shares; a race has five rounds where the times agree.
            self.seconds = FASTER if self.rounds <= 6 else {}
            return super().round(calls)

    clocks |= {name: Lucky(FASTER) for name in clocks}
    report = pyfused.tune(model, *given)
    assert tuned.plans(model, *given) == ["absorbed", "absorbed"]
    assert {call.gain for call in report.calls} == {1.0}
    assert all(clock.rounds >= 10 for clock in clocks.values()), "there were two"


def test_the_same_times_give_the_same_rows(timed, place):
    model, given = tuned.Towers(), tuned.inputs()
    texts = []
    for _ in range(2):
        timed(**FASTER)
        pyfused.tune(model, *given)
        texts.append(place.read_text())
        measured.use(())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_was(timed, training, dropout):
    model, (x, context) = tuned.Towers(dropout).train(training), tuned.inputs()
    model.first.q_weight.grad = torch.ones_like(model.first.q_weight)
    stepped = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _: stepped.append(1))
    x.requires_grad_()
    before = copy.deepcopy(model.state_dict())
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    versions = [parameter._version for parameter in model.parameters()]
    state = torch.get_rng_state()
    timed(**FASTER)
    pyfused.tune(model, x, context, seconds=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        wanted = gradients[name]
        assert (parameter.grad is None) if wanted is None else torch.equal(parameter.grad, wanted)
    assert versions == [parameter._version for parameter in model.parameters()]
    assert (x.grad, stepped) == (None, [])
    assert all(module.training == training for module in model.modules())


def test_a_compiled_model_takes_the_plan(timed):
    model, given, graphs = tuned.Towers().eval(), tuned.inputs(), []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        before = compiled(*given)
    timed(**FASTER)
    report = pyfused.tune(compiled, *given)
    assert len(report.calls) == 3, "compiled code, too, shows what it calls"
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given), before)
    assert ["scaled_dot_product_attention" in code for code in graphs] == [False, True]


def test_traced_code_of_any_length_compiles_again_only_where_the_choice_changes(timed):
    model = tuned.Towers().first
    timed(**FASTER)
    pyfused.tune(model, *tuned.inputs(300))
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda x, context: model(x, context), backend=counter, fullgraph=True, dynamic=True)
    for length, plan in ((300, "standard"), (290, "standard"), (155, "standard"), (2000, "absorbed")):
        given = tuned.inputs(length)
        torch.testing.assert_close(compiled(*given), model(*given))
        assert tuned.plans(model, *given) == [plan]
    assert counter.frame_count == 2, "once inside the row's range, and once outside"


def test_nothing_is_tuned_in_a_step(timed):
    clocks = timed(**FASTER)
    model, given = tuned.Towers(), tuned.inputs()
    for _ in range(3):
        model(*given).sum().backward()
    assert all(clock.rounds == 0 for clock in clocks.values())
    with pyfused.tuning() as found:
        model(*given).sum().backward()
        assert found.report is None
        assert all(clock.rounds == 0 for clock in clocks.values())
        assert tuned.plans(model, *given) == ["absorbed", "absorbed"], "the step runs as it would"
    assert all(clock.rounds > 0 for clock in clocks.values())
    assert found.report is not None
    assert str(found) == str(found.report)


def test_a_step_gives_the_same_bits_while_it_is_watched():
    given = tuned.inputs()

    def step(watched):
        model = tuned.Towers()
        with pyfused.tuning(seconds=1e-9) if watched else pytest.MonkeyPatch.context():
            model(*given).square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    assert all(torch.equal(a, b) for a, b in zip(step(False), step(True), strict=True))


def test_a_block_that_raises_tunes_nothing(timed):
    clocks = timed(**FASTER)
    model, given = tuned.Towers(), tuned.inputs()
    with pytest.raises(ZeroDivisionError), pyfused.tuning():
        assert model(*given).sum() * (1 // 0)
    assert all(clock.rounds == 0 for clock in clocks.values())
    assert cache.rows() == []
    with pyfused.tuning(seconds=1e-9):
        pass


def test_one_at_a_time(timed):
    model, given = tuned.Towers(), tuned.inputs()
    timed()
    with pyfused.tuning(), pytest.raises(RuntimeError, match=r"tune: another tune\(\) or tuning\(\) of this process"):
        pyfused.tune(model, *given)


def test_calls_are_counted_in_both_directions():
    model, (x, _) = tuned.Towers(), tuned.inputs()

    def counts(step):
        recorder = Recorder()
        with session_observed(recorder):
            step()
        return [
            (count.forward, count.backward)
            for recorded, count in recorder.calls.items()
            if recorded.operator == "lora_linear"
        ]

    x.requires_grad_()
    linear = model.linear

    def with_no_grad():
        with torch.no_grad():
            linear(x)
        linear(x)

    assert counts(lambda: linear(x).sum().backward()) == [(1, 1)]
    assert counts(with_no_grad) == [(1, 0), (1, 1)]
    assert counts(lambda: checkpoint(linear, x, use_reentrant=False).sum().backward()) == [(2, 1)]
    assert counts(lambda: checkpoint(linear, x, use_reentrant=True).sum().backward()) == [(1, 0), (1, 1)]


def session_observed(recorder):
    from pyfused.ops import decision

    return decision.observed(recorder)


@pytest.mark.parametrize("autocast", [False, True])
def test_exact_calls_are_made_again(timed, autocast):
    """Strides, dtypes, which tensors are one, and autocast."""
    from pyfused.tuner.replay import Replay

    base = torch.randn(6, 5, 32)
    x = base.transpose(0, 1)
    weight = torch.randn(32, 32)
    recorder = Recorder()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), session_observed(recorder):
        pyfused.projection_residual(x, weight, residual=x)
        pyfused.adapter_residual(
            x.expand(2, 5, 6, 32), torch.randn(8, 32, requires_grad=True), None, torch.randn(32, 8), None,
            sample_scale=torch.tensor([0.0, 1.0]),
        )  # fmt: skip
    projection, adapter = (Replay(recorded, torch.device("cpu")) for recorded in recorder.calls)
    made = projection.arguments["o"]
    assert (made.shape, made.stride(), made.dtype) == (x.shape, x.stride(), x.dtype)
    assert made is projection.arguments["residual"]
    assert projection.recorded.autocast == (torch.bfloat16 if autocast else None)
    assert not projection.recorded.gradient
    expanded = adapter.arguments["z"]
    assert expanded.stride() == (0, 32, 160, 1)
    assert adapter.recorded.gradient
    assert adapter.arguments["sample_scale"].tolist() == [1.0, 1.0], "a dropped sample takes no time"
    told = adapter.decided()
    assert told.dtype == (torch.bfloat16 if autocast else torch.float32)
    results = adapter.results()
    assert set(results) == {"the output", "the gradient of down_weight"}


def test_a_plan_with_other_results_is_dropped_and_named(timed, monkeypatch):
    model, given = tuned.Towers(), tuned.inputs()
    attended = cross.attend_standard
    monkeypatch.setattr(cross, "attend_standard", lambda *arguments: 1.01 * attended(*arguments))
    clocks = timed(**FASTER)
    report = pyfused.tune(model, *given)
    call = next(call for call in report.calls if call.operator == "cross_attention_residual")
    ((name, why),) = call.dropped
    assert name == "portable standard"
    assert "of its norm from that of pyfused's own choice" in why
    assert tuned.plans(model, *given) == ["absorbed", "absorbed"]
    assert {part.plan for clock in clocks.values() for part in clock.parts} == {"absorbed", "blas"}, "no time counted"
    assert "dropped: cross_attention_residual M=24 C=32 H=2 d=16 T=3: portable standard: " in str(report)


def test_a_row_that_auto_does_not_follow_is_not_kept(timed, monkeypatch):
    model, given = tuned.Towers(), tuned.inputs()
    monkeypatch.setattr(backends, "measured_plan", lambda *arguments: None)
    timed(**FASTER)
    report = pyfused.tune(model, *given)
    assert {call.dropped for call in report.calls if not call.note} == {
        (("portable standard", "'auto' takes portable absorbed with its row"),)
    }
    assert {row.plans["portable"] for row in cache.rows()} == {("absorbed", "absorbed")}


def test_dropout_has_rows_of_its_own_and_a_seed_its_plan(timed):
    """Plan "standard" draws from torch's generator, and cannot honour a seed."""
    model, (x, context) = tuned.Towers(dropout=0.25), tuned.inputs()
    timed(**FASTER)
    report = pyfused.tune(model, x, context)
    assert {call.dropped for call in report.calls} == {()}
    assert tuned.plans(model, x, context) == ["standard", "standard"]
    assert tuned.plans(model.eval(), x, context) == ["absorbed", "absorbed"]
    weights = [getattr(model.first, name) for name in cross.PROJECTIONS]

    def seeded():
        return pyfused.cross_attention_residual(x, context, *weights, num_heads=2, dropout_p=0.25, seed=3)

    assert [call.plan for call in pyfused.explain(seeded).calls] == ["absorbed"]
    report = pyfused.tune(seeded)
    assert [call.note for call in report.calls] == ["one plan serves it"]


def test_a_plan_that_raises_is_dropped_and_named(timed, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no such kernel\nmore")

    model, given = tuned.Towers(), tuned.inputs()
    monkeypatch.setattr(cross, "attend_standard", broken)
    timed(**FASTER)
    report = pyfused.tune(model, *given)
    assert {call.dropped for call in report.calls if not call.note} == {
        (("portable standard", "RuntimeError: no such kernel"),)
    }


def test_what_was_asked_for_by_name_stays(timed):
    x, weight = torch.randn(6, 32), torch.randn(32, 32)
    lora = torch.randn(4, 32, requires_grad=True), torch.randn(32, 4)
    timed()

    def calls():
        pyfused.lora_linear(x, weight, *lora, backend="portable")
        return pyfused.lora_linear(x, weight, *lora, plan="blas")

    report = pyfused.tune(calls)
    assert sorted(call.note for call in report.calls) == ["backend asked for by name", "plan asked for by name"]
    assert report.path is None
    assert "nothing was kept" in str(report)


def test_a_prepared_context_is_noted(timed):
    model, (x, context) = tuned.Towers(), tuned.inputs()
    timed(**FASTER)
    with torch.no_grad():
        prepared = model.first.prepare(context)
        report = pyfused.tune(lambda: model.first(x, prepared=prepared))
    assert report.calls == []
    assert (
        str(report) == "no call of pyfused to tune\nnote: prepared contexts keep their plan: 1 calls were not compared"
    )


def test_the_time_goes_where_the_model_spends_it(timed, monkeypatch):
    """The calls that take most come first; after the time is over nothing is begun."""
    now = itertools.count()
    narrow, wide = tuned.inputs(6), tuned.inputs(48)
    model = tuned.Towers()

    recorder = Recorder()
    with session_observed(recorder):
        model.first(*wide)
        for _ in range(3):
            model.first(*narrow)
    clocks = {"warm": tuned.FakeClock(FASTER)}
    late = session.Session(5.0, lambda device: clocks, now=lambda: next(now))
    calls = late.tune(recorder)
    assert [dict(call.shapes)["M"] for call in calls] == [12, 96], "three calls take longer than one"
    assert calls[0].note == ""
    assert calls[1].note == "the time was over before it was tried"
    assert calls[1].now == calls[1].before


def test_a_call_that_cannot_be_made_again_is_noted(timed, monkeypatch):
    model, given = tuned.Towers(), tuned.inputs()
    timed()

    def full(*arguments):
        raise torch.OutOfMemoryError("of 2 GiB\n.")

    monkeypatch.setattr(session, "Replay", full)
    report = pyfused.tune(model, *given)
    assert {call.note for call in report.calls} == {"not made again: OutOfMemoryError: of 2 GiB"}


@pytest.mark.parametrize(
    ("arguments", "named", "error", "message"),
    [
        ((3,), {}, TypeError, "tune: model_or_function must be a module or a callable, got int"),
        ((len,), {"seconds": "60"}, TypeError, "tune: seconds must be a number, got str"),
        ((len,), {"seconds": True}, TypeError, "tune: seconds must be a number, got bool"),
        ((len,), {"seconds": 0}, ValueError, "tune: seconds must be positive and finite, got 0"),
        ((len,), {"seconds": float("nan")}, ValueError, "tune: seconds must be positive and finite, got nan"),
        ((len,), {"loss_fn": 3}, TypeError, "tune: loss_fn must be a callable or None, got int"),
        (
            (nn.Linear(2, 3), torch.ones(1, 2)), {"loss_fn": lambda y: y}, ValueError,
            r"tune: loss_fn must return a tensor of one element, got \(1, 3\)",
        ),
        (
            (nn.Linear(2, 3), torch.ones(1, 2)), {"loss_fn": lambda y: 1.0}, ValueError,
            "tune: loss_fn must return a tensor of one element, got float",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments, named, error, message):
    with pytest.raises(error, match=message):
        pyfused.tune(*arguments, **named)


def test_wrong_seconds_of_tuning_are_named():
    with pytest.raises(ValueError, match="tuning: seconds must be positive and finite, got -1"), pyfused.tuning(-1):
        pass


def test_reentrant_checkpoints_are_refused_with_the_way_out(timed):
    model, (x, _) = tuned.Towers(), tuned.inputs()
    timed()
    x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"tune: the model's checkpoints must be made with use_reentrant=False"):
        pyfused.tune(lambda: checkpoint(model.linear, x, use_reentrant=True))


def test_outputs_of_every_kind_give_a_loss(timed):
    model, (x, context) = tuned.Towers(), tuned.inputs()
    timed(**FASTER)
    for output in (lambda y: [y], lambda y: {"a": (y, 3, None)}, lambda y: torch.return_types.max((y, y.argmax(-1)))):
        recorder_report = pyfused.tune(lambda output=output: output(model.linear(x)))
        assert recorder_report.calls[0].count == 1
    with_loss = pyfused.tune(model, x, context, loss_fn=lambda y: y.square().mean())
    assert len(with_loss.calls) == 3


def test_a_real_run_on_this_machine(place):
    """Real clocks; what is taken is not much slower than pyfused's own choice, timed once more."""
    import time

    model = pyfused.ScaledCrossAttention(64, 48, 4)
    given = torch.randn(2, 200, 64), torch.randn(1, 12, 48)
    report = pyfused.tune(model, *given, seconds=4)
    (call,) = report.calls
    assert call.note == ""
    assert call.dropped == ()
    assert report.path == place
    assert call.gain >= 1.0
    assert tuned.plans(model, *given) == [call.now.forward]

    def best(plan):
        arguments = [getattr(model, name) for name in cross.PROJECTIONS]
        times = []
        for _ in range(20):
            start = time.perf_counter()
            pyfused.cross_attention_residual(*given, *arguments, num_heads=4, plan=plan).sum().backward()
            times.append(time.perf_counter() - start)
        return min(times)

    assert best(call.now.forward) < 2.0 * best("absorbed")


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_around_it(timed, mode):
    model, given = tuned.Towers(), tuned.inputs()
    timed(**FASTER)
    with mode():
        report = pyfused.tune(model, *given)
    assert {call.note for call in report.calls} == {"", "one plan serves it"}
    assert tuned.plans(model, *given) == ["standard", "standard"]


def test_a_plan_that_is_dropped_later_serves_no_more(timed, monkeypatch):
    """What was tuned before is compared anew, and pyfused's own choice is kept in its place."""
    model, given = tuned.Towers(), tuned.inputs()
    timed(**FASTER)
    pyfused.tune(model, *given)
    attended = cross.attend_standard
    monkeypatch.setattr(cross, "attend_standard", lambda *arguments: 1.01 * attended(*arguments))
    report = pyfused.tune(model, *given)
    assert [(call.before.forward, call.now.forward) for call in report.calls if call.dropped] == [
        ("standard", "absorbed")
    ] * 2
    assert tuned.plans(model, *given) == ["absorbed", "absorbed"]


def test_pyfuseds_own_choice_is_kept_against_a_neighbours_row(timed):
    """A row holds for M within a factor of two; where pyfused's own choice won, that is what holds."""
    model = tuned.Towers()
    timed(**FASTER)
    pyfused.tune(model, *tuned.inputs(12))
    assert tuned.plans(model, *tuned.inputs(10)) == ["standard", "standard"]
    timed()
    pyfused.tune(model, *tuned.inputs(10))
    assert tuned.plans(model, *tuned.inputs(10)) == ["absorbed", "absorbed"]
    assert tuned.plans(model, *tuned.inputs(12)) == ["standard", "standard"]


def test_rows_of_other_devices_are_not_taken(timed, monkeypatch):
    model, given = tuned.Towers(), tuned.inputs()
    timed(**FASTER)
    pyfused.tune(model, *given)
    monkeypatch.setattr(order, "cpu_model", lambda: "another CPU")
    measured.changed()
    assert tuned.plans(model, *given) == ["absorbed", "absorbed"]
