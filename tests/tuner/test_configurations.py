"""Launch configurations of the calls that Triton serves, in its interpreter, by a clock that reads them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import pyfused
from pyfused.choice import measured
from pyfused.kernels import recording
from pyfused.ops import decision
from pyfused.tuner import configurations
from pyfused.tuner.recorder import Recorder
from pyfused.tuner.replay import Replay
from pyfused.tuner.ways import Part

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter serves where no GPU is")
FORWARD, BACKWARD = (Part(0, "triton", "", direction) for direction in ("forward", "backward"))


class ConfigClock:
    """Seconds by the number of stages; those that were timed."""

    mode = "fake"

    def __init__(self, **seconds):
        self.seconds, self.seen = seconds, set()

    def round(self, calls):
        self.seen |= set(calls)
        return {config: self.seconds.get(f"stages_{config.num_stages}", 1.0) for config in calls}


@pytest.fixture
def replay():
    recorder = Recorder()
    weights = torch.randn(16, 32, requires_grad=True), None, torch.randn(32, 16, requires_grad=True), None
    with decision.observed(recorder):
        pyfused.adapter_residual(torch.randn(40, 32), *weights)
    (recorded,) = recorder.calls
    return Replay(recorded, torch.device("cpu"))


def found_for(replay, part, clock, left=lambda: 100.0, known=None):
    known = set() if known is None else known
    return list(configurations.faster(replay, part, {"warm": clock}, left, known, "2026-01-01"))


def launched(replay):
    """Kernel -> configuration of a call as it is now."""
    with pytest.MonkeyPatch.context() as patch:
        seen = {}
        chosen_as = recording.measured_or_own

        def noted(chosen):
            seen[chosen.kernel] = config = chosen_as(chosen)
            return config

        patch.setattr(recording, "measured_or_own", noted)
        measured.changed()
        replay.results(backend="triton")
    return seen


def test_the_fastest_becomes_a_row_and_is_launched(replay):
    ships = launched(replay)
    own = ships["_adapter_fwd_kernel"]
    stages = own.num_stages + 1
    clock = ConfigClock(**{f"stages_{stages}": 0.5})
    (row,) = found_for(replay, FORWARD, clock)
    assert (row.subject, row.rows, row.dtype) == ("_adapter_fwd_kernel", 40, "float32")
    assert row.found == {"num_stages": stages}
    assert row.source == {"date": "2026-01-01", "gain": 2.0, "of": "forward"}
    assert own in clock.seen
    assert {len(recording.differing(own, config)) for config in clock.seen} == {0, 1}
    measured.use([row])
    assert launched(replay)["_adapter_fwd_kernel"] == replace(own, num_stages=stages)
    measured.use(())
    assert launched(replay) == ships


def test_each_direction_has_its_own_kernels(replay):
    stages = launched(replay)["_adapter_bwd_rows_kernel"].num_stages + 1
    rows = found_for(replay, BACKWARD, ConfigClock(**{f"stages_{stages}": 0.5}))
    assert {row.subject for row in rows} <= {"_adapter_bwd_rows_kernel", "_adapter_bwd_weights_kernel"}
    assert "_adapter_bwd_rows_kernel" in {row.subject for row in rows}


def test_less_than_the_least_gain_is_no_row(replay):
    stages = launched(replay)["_adapter_fwd_kernel"].num_stages + 1
    assert found_for(replay, FORWARD, ConfigClock(**{f"stages_{stages}": 0.98})) == []


def test_a_configuration_is_compared_once_and_in_time(replay):
    known, clock = set(), ConfigClock()
    found_for(replay, FORWARD, clock, known=known)
    assert len(known) == 1
    again = ConfigClock()
    found_for(replay, FORWARD, again, known=known)
    assert again.seen == set()
    late = ConfigClock()
    found_for(replay, FORWARD, late, left=lambda: -1.0)
    assert late.seen == set()


def test_what_fails_or_gives_other_results_is_not_timed(replay, monkeypatch):
    own = launched(replay)["_adapter_fwd_kernel"]
    results = Replay.results

    def broken(self, **changed):
        ((_, config),) = recording.forcing[0].items()
        if config.num_stages != own.num_stages:
            raise RuntimeError("out of resources")
        found = results(self, **changed)
        return found if config == own else {name: 1.01 * value for name, value in found.items()}

    monkeypatch.setattr(Replay, "results", broken)
    clock = ConfigClock()
    assert found_for(replay, FORWARD, clock) == []
    assert clock.seen == set(), "alone, pyfused's own has nothing to be compared with"
