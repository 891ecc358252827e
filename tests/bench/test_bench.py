"""The benchmarks themselves: the interleaving, the counting of memory, the record and what is made of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from tree import ROOT

from pyfused.bench.cases import operators
from pyfused.bench.measure import memory, timing
from pyfused.bench.record import rows
from pyfused.bench.record.rows import Row
from pyfused.bench.targets import numbers

CPU = torch.device("cpu")


def _row(name: str = "lora_linear 400x768->2304", **changes) -> Row:
    fields = {
        "kind": "operator",
        "measured": "forward+backward",
        "seconds": {"pyfused": 0.010, "eager": 0.012, "PEFT": 0.015, "base GEMM": 0.008},
        "ratios": {"eager": 1.2, "PEFT": 1.5, "base GEMM": 0.8},
        "parity": [{"tensor": "y", "norm": "maximum", "error": 1e-7, "plain": 1e-7, "limit": 1e-6}],
        "provenance": {"device": "a CPU", "threads": 2, "torch": "2.13", "date": "2026-01-01", "pyfused": "0.1.0"},
        "rounds": 7,
    }
    return Row(name, **(fields | changes))


# ---- clocks


class _FakeClock:
    """Every call takes as long as it says, and the machine gets slower from round to round."""

    def __init__(self):
        self.rounds = []

    def round(self, calls):
        self.rounds.append(list(calls))
        return {name: call() * 2.0 ** len(self.rounds) for name, call in calls.items()}


def test_contenders_take_turns_and_ratios_are_paired():
    clock = _FakeClock()
    calls = {"pyfused": [lambda: 1.0], "eager": [lambda: 1.5], "slow": [lambda: 4.0]}
    interleaved = timing.Interleaved(calls, "pyfused", clock)
    before = timing.subject_clock()
    for _ in range(30):
        interleaved()
    assert all(sorted(order) == ["eager", "pyfused", "slow"] for order in clock.rounds)
    assert len({tuple(order) for order in clock.rounds}) == 6
    assert interleaved.ratios() == {"eager": 1.5, "slow": 4.0}
    assert timing.subject_clock() - before == pytest.approx(sum(interleaved.seconds["pyfused"]))


def test_input_sets_take_turns():
    seen = []
    interleaved = timing.Interleaved(
        {"pyfused": [lambda i=i: seen.append(i) for i in range(3)]}, "pyfused", timing.WallClock()
    )
    interleaved.warm_up(3)
    assert seen == [0, 1, 2]
    assert interleaved.seconds == {"pyfused": []}


def test_wall_clock_measures_the_call():
    import time

    assert timing.WallClock().round({"nap": lambda: time.sleep(0.02)})["nap"] >= 0.02


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_host_clock_takes_the_mean_of_calls_and_lets_a_gpu_finish_between_them(monkeypatch, device):
    from types import SimpleNamespace

    log = []
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: 3.0 * log.count("one")))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    clock = timing.HostClock(torch.device(device), calls=4)
    seconds = clock.round({"one": lambda: log.append("one"), "two": lambda: log.append("two")})
    assert seconds == {"one": 3.0, "two": 0.0}
    wait = ["wait"] if device == "cuda" else []
    assert log == ["one"] * 4 + wait + ["two"] * 4 + wait


@pytest.mark.parametrize("graph", [False, True])
def test_the_gpu_clock_empties_the_cache_and_waits_before_eager_calls_alone(monkeypatch, graph):
    """The order of what a CudaClock asks of the device, which this test plays."""
    from types import SimpleNamespace

    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 2.0

    largest = torch.amax
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=64))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "amax", lambda t, **options: (log.append(t.nbytes), largest(t, **options)))
    clock = timing.CudaClock(CPU, graph)
    assert clock.mode == ("graph replay" if graph else "eager launches")
    seconds = clock.round({"one": lambda: log.append("one"), "two": lambda: log.append("two")})
    assert seconds == {"one": 2e-3, "two": 2e-3}
    wait = [] if graph else ["wait"]
    assert log == [256, *wait, "event", "one", "event", 256, *wait, "event", "two", "event", "wait"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_eager_calls_on_a_gpu_are_charged_for_their_launches():
    device = torch.device("cuda")
    x = torch.zeros(1, device=device)

    def call():
        for _ in range(200):
            x.add_(1)

    launches, replay = timing.clock_for(device), timing.clock_for(device, graph=True)
    call()
    eager = min(launches.round({"call": call})["call"] for _ in range(5))
    replayed = timing.captured(call)
    assert eager > min(replay.round({"call": replayed})["call"] for _ in range(5)) > 0


def test_an_unknown_subject_is_refused():
    with pytest.raises(ValueError, match=r"subject must be one of \('eager',\), got 'pyfused'"):
        timing.Interleaved({"eager": [lambda: None]}, "pyfused", timing.WallClock())


def test_rounds_within_a_budget():
    assert timing.rounds_within(5.0, 0.1) == 50
    assert timing.rounds_within(5.0, 10.0) == 7
    assert timing.rounds_within(5.0, 1e-9) == 200


# ---- memory


def test_peak_bytes_counts_what_is_held_at_once():
    size = 1 << 20

    def call():
        first = torch.ones(size)
        second = first + 1
        del first
        return second + 1

    # Beside them torch makes the two ones that are added.
    assert memory.peak_bytes(call, CPU) == pytest.approx(8 * size, abs=64)


def test_peak_bytes_of_a_call_that_replaces_what_it_keeps():
    kept = {}

    def call():
        kept["tensor"] = torch.ones(1 << 20)

    call()
    assert memory.peak_bytes(call, CPU) == 4 << 20


# ---- the record


def test_rows_survive_one_by_one(tmp_path):
    file = rows.RowFile(tmp_path / "device" / "date")
    assert not file.path.parent.exists()
    for count, name in enumerate(("first", "second"), start=1):
        file.append(_row(name))
        assert [row.name for row in rows.read_rows(file.path)] == ["first", "second"][:count]
    assert rows.read_rows(file.path) == file.rows
    assert [path.name for path in file.path.parent.iterdir()] == ["rows.json"]


def test_rows_that_are_not_finite_are_still_json(tmp_path):
    file = rows.RowFile(tmp_path)
    odd = {"tensor": "y", "norm": "maximum", "error": float("inf"), "plain": float("-inf"), "limit": 1.0}
    file.append(_row(parity=[odd], passed=False, loss={"pyfused": [1.0, float("nan")]}))

    def refuse(constant):
        raise AssertionError(constant)

    (item,) = json.loads(file.path.read_text(), parse_constant=refuse)
    assert item["parity"] == [odd | {"error": "inf", "plain": "-inf"}]
    assert item["loss"] == {"pyfused": [1.0, "nan"]}
    (row,) = rows.read_rows(file.path)
    assert row.parity == [odd]
    assert str(row.loss["pyfused"]) == "[1.0, nan]"


@pytest.mark.parametrize("has_git", [True, False])
def test_the_given_commit_stands_where_there_is_no_git(monkeypatch, tmp_path, has_git):
    checkout = tmp_path / "checkout"
    for directory in ("bench", ".git") if has_git else ("bench",):
        (checkout / directory).mkdir(parents=True)
    (checkout / "pyproject.toml").touch()
    monkeypatch.setattr(rows, "ROOT", checkout)
    monkeypatch.setattr(rows, "_run", lambda *command: "known" if "rev-parse" in command else "")
    rows._fixed_provenance.cache_clear()
    try:
        assert rows.provenance(CPU, "given")["commit"] == ("known" if has_git else "given")
        assert rows.provenance(CPU)["commit"] == ("known" if has_git else None)
    finally:
        rows._fixed_provenance.cache_clear()


def test_the_commit_of_the_settings_reaches_the_rows(monkeypatch, tmp_path):
    from pyfused.bench.run.session import Session, Settings

    monkeypatch.setattr(rows, "_commit", lambda: {"commit": None, "dirty": None})
    rows._fixed_provenance.cache_clear()
    try:
        session = Session(Settings(CPU, tmp_path, commit="abc"))
        session.add(_row())
    finally:
        rows._fixed_provenance.cache_clear()
    (row,) = rows.read_rows(session.file.path)
    assert (row.provenance["commit"], row.provenance["dirty"]) == ("abc", None)


def test_provenance_names_what_a_figure_needs():
    facts = rows.provenance(CPU)
    assert {"device", "driver", "torch", "triton", "commit", "dirty", "date", "threads", "pyfused"} <= facts.keys()
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    json.dumps(facts)


def test_run_directory_is_device_and_date(tmp_path):
    directory = rows.run_directory(tmp_path, CPU)
    assert directory.parent.parent == tmp_path
    assert directory.parent.name.startswith(f"cpu-{os.cpu_count()}x-")
    assert directory.name[:2] == "20"


def _printed(found: list[Row]) -> str:
    import io

    from pyfused.bench.show.terminal import print_table

    stream = io.StringIO()
    print_table(found, stream)
    return stream.getvalue()


def test_the_table_shows_times_and_hides_those_of_a_failed_row():
    failed = _row("broken row", passed=False, seconds={}, ratios={}, rounds=0)
    text = _printed([_row(unavailable={"torch.compile": "no compiler"}), failed])
    line = next(line for line in text.splitlines() if "400x768->2304" in line)
    assert {"10.0", "ms", "1.20x", "1.50x", "1.25x"} <= set(line.split())
    line = next(line for line in text.splitlines() if "broken row" in line)
    assert "FAILED" in line
    assert "ms" not in line
    assert "not measured: torch.compile: no compiler" in text
    assert "vs compile" not in text


def test_the_table_has_a_column_for_each_backend_by_name():
    def columns(row):
        from pyfused.bench.show.terminal import table

        found = table([row])
        return {column.header: next(iter(column.cells)) for column in found.columns}

    beside = {"eager": 1.2, "pyfused triton": 1.31, "pyfused cuda": 0.98}
    found = columns(_row(ratios=beside))
    assert [found[f"vs {name}"] for name in ("eager", "triton", "cuda")] == ["1.20x", "1.31x", "0.98x"]
    assert not {"vs triton", "vs cuda", "fastest by name"} & columns(_row()).keys()
    plans = beside | {"pyfused triton blas": 0.91, "torch.compile": 0.5}
    assert columns(_row(ratios=plans))["fastest by name"] == "triton blas 0.91x"


def test_overhead_rows_answer_no_number_to_reach():
    rows_of = [
        _row(f"overhead {case.name}", kind="overhead", measured="forward", mode="host time", facts=case.facts())
        for case in operators.tiny_cases(CPU)
    ]
    assert numbers.verdicts(rows_of) == []
    assert "forward, host time" in _printed(rows_of)


def test_numbers_to_reach_on_a_cpu():
    slow = _row("lora_linear slow", ratios={"eager": 0.9})
    model = _row(
        "tower", kind="model", measured="training step", ratios={"PEFT": 1.01}, peak_bytes={"pyfused": 5, "PEFT": 6}
    )
    failed = _row("lora_linear failed", passed=False, ratios={})
    found = {item.name: item for item in numbers.verdicts([_row(), slow, model, failed])}
    assert [item.met for item in found.values()] == [False, False, False, True]
    mean, least, step, _ = found.values()
    assert mean.measured == f"{(1.2 * 0.9) ** 0.5:.3f}x"
    assert least.measured == "0.900x"
    assert str(step).startswith("NOT MET")


def test_numbers_to_reach_on_an_h200():
    def row(measured, ratios, **changes):
        facts = {"rows": 8192, "in_features": 4096, "out_features": 4096, "dropout_p": 0.0} | changes
        where = {"device": "NVIDIA H200"}
        return _row(measured=measured, mode="graph replay", ratios=ratios, facts=facts, provenance=where)

    found = numbers.verdicts(
        [
            row("forward", {"base GEMM": 1 / 1.04, "eager": 1.2}),
            row("forward+backward", {"base GEMM": 0.9, "eager": 1.25}),
            row("forward+backward", {"base GEMM": 0.9, "eager": 1.60}),
            row("forward+backward", {"base GEMM": 0.9, "eager": 1.10}, dropout_p=0.1),
            row("forward", {"eager": 1.2}),
            row("forward+backward", {"base GEMM": 0.9}),
        ]
    )
    assert [item.met for item in found] == [True, True, False]
    assert "measuring error" in found[2].measured


def _adapter_row(measured, ratios, shape=(3152, 768, 64), **changes):
    m, c, h = shape
    facts = {"rows": m, "channels": c, "hidden": h, "drop_path": 0.0} | changes.pop("facts", {})
    return _row(f"adapter_residual {m}x{c} h{h}", measured=measured, ratios=ratios, facts=facts, **changes)


def test_adapter_numbers_to_reach_on_a_cpu():
    both = "forward+backward"
    found = numbers.verdicts(
        [
            _adapter_row(both, {"eager": 1.5}, peak_bytes={"pyfused": 5, "eager": 6}),
            _adapter_row("forward", {"eager": 0.5}),
            _adapter_row(both, {"eager": 1.1}, (2740, 1024, 256), peak_bytes={"pyfused": 9, "eager": 6}),
            _adapter_row(both, {"eager": 0.5}, (25088, 64, 32)),
            _row("tower", kind="model", ratios={"eager": 1.1}, peak_bytes={"pyfused": 5, "eager": 5}),
            _adapter_row(both, {}, passed=False),
        ]
    )
    assert [(item.met, item.measured) for item in found] == [
        (True, "1.500x"),
        (False, "1.100x"),
        (False, "1.500x"),
        (True, "1.000x"),
    ]
    assert "adapter_residual, peak memory against eager, largest of 2" in str(found[2])
    assert "tower, peak memory against eager" in str(found[3])


def test_adapter_numbers_to_reach_on_an_h200():
    def rows_of(forward, both, shape, ratios, **changes):
        where = {"mode": "graph replay", "provenance": {"device": "NVIDIA H200"}}
        facts = {"floor_seconds": 10e-6} | changes
        first = _adapter_row("forward", {"eager": 9}, shape, seconds={"pyfused": forward}, facts=facts, **where)
        facts = {"floor_seconds": 30e-6} | changes
        return [first, _adapter_row("forward+backward", ratios, shape, seconds={"pyfused": both}, facts=facts, **where)]

    ratios = {"eager": 2.6, "torch.compile": 1.4}
    found = numbers.verdicts(rows_of(12.5e-6, 62.5e-6, (6304, 768, 64), ratios))
    assert [item.measured for item in found] == ["80%", "40%", "2.600x", "1.400x"]
    assert [item.met for item in found] == [True, False, True, False]
    found = numbers.verdicts(rows_of(20e-6, 60e-6, (262144, 64, 32), ratios))
    assert [(item.measured, item.met) for item in found] == [("50%", False)]
    assert numbers.verdicts(rows_of(12.5e-6, 62.5e-6, (6304, 768, 64), ratios, drop_path=0.25)) == []
    assert numbers.verdicts(rows_of(12.5e-6, 62.5e-6, (4096, 512, 256), ratios)) == []


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    from pyfused.bench.show import figures

    run = _row("run", kind="training", loss={"pyfused": [2.0, 1.0, 0.5], "reference": [2.0, 1.0, 0.6]})
    for picture in (figures.bars([_row(), run], "ratios"), figures.curves([_row(), run])):
        path = picture.save(tmp_path)
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000
    assert {path.name for path in tmp_path.iterdir()} == {"ratios.png", "curves.png"}
    assert figures.curves([_row()]) is None
    assert figures.bars([_row(ratios={})], "ratios") is None


# ---- the whole, on rows of a user's own


_OWN_ROWS = """
import torch
from pyfused.bench.measure.parity import Deviation

def test_tiny_good(compare):
    x = torch.ones(64, 64)
    compare("tiny good", {"pyfused": [lambda: x + 1], "eager": [lambda: x * 2 + 1]}, measured="forward")

def test_tiny_bad(compare):
    wrong = Deviation("y", "maximum", error=0.5, plain=1e-7, limit=1e-6)
    compare("tiny bad", {"pyfused": [lambda: None]}, deviations=[wrong])

def test_tiny_crash(compare):
    compare("tiny crash", {"pyfused": [lambda: 1 / 0]})
"""


def _environment() -> dict[str, str]:
    # pytest-benchmark does not measure in what it takes for a worker of pytest-xdist.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return kept | {"PYTHONPATH": str(ROOT)}


def test_a_run_from_end_to_end(tmp_path):
    pytest.importorskip("pytest_benchmark")
    own = tmp_path / "test_own.py"
    own.write_text(_OWN_ROWS)
    arguments = ["bench", str(own), "-k", "tiny", "--device", "cpu", "--threads", "1", "--seconds", "0.05"]
    arguments += ["--commit", "abc"]
    done = subprocess.run(
        [sys.executable, "-m", "pyfused.cli", *arguments, "--output", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env=_environment(),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (record,) = (tmp_path / "out").glob("*/*/rows.json")
    good, bad = rows.read_rows(record)
    assert (good.name, good.passed, good.mode) == ("tiny good", True, "wall clock")
    assert good.seconds.keys() == {"pyfused", "eager"}
    assert good.rounds >= 7
    assert good.quartiles.keys() == good.seconds.keys()
    assert good.ratio_quartiles["eager"][0] <= good.ratios["eager"] <= good.ratio_quartiles["eager"][1]
    assert good.load.keys() == {"before", "after"}
    assert "NOT MET" not in done.stdout
    assert good.provenance["threads"] == 1
    assert good.provenance["commit"]
    assert (bad.name, bad.passed, bad.seconds, bad.rounds) == ("tiny bad", False, {}, 0)
    assert "tiny bad is not close enough to float64" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert "tiny good" in done.stdout
    assert [path.name for path in record.parent.iterdir()] == ["rows.json"]
    assert {path.name for path in tmp_path.iterdir()} <= {"test_own.py", "out", "__pycache__"}


def test_the_package_rows_are_collected_from_both_names(tmp_path):
    """`pytest bench` in a checkout and `pytest --pyargs pyfused.bench` anywhere see the same rows."""
    pytest.importorskip("pytest_benchmark")
    collected = []
    for place, arguments in ((ROOT, ["bench"]), (tmp_path, ["--pyargs", "pyfused.bench"])):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments],
            capture_output=True, text=True, timeout=300, cwd=place, env=_environment(),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        collected.append({line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line})
    assert collected[0] == collected[1]
    wanted = {
        "test_clip_vit_b32_training_step",
        "test_fastvit_sa12_training_step",
        "test_aa_clip_stage_2_training_step",
    }
    assert wanted | {f"test_digits_training_run[{name}]" for name in ("vit", "fastvit")} < collected[0]
    shortest = "test_one_call[{}-portable]"
    assert {shortest.format(operator) for operator in operators.OPERATORS} < collected[0]
    timed = operators.timed_cases(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for operator in operators.OPERATORS:
        found = {name for name in collected[0] if name.startswith(f"test_forward_backward[{operator}")}
        modes = 2 if torch.cuda.is_available() else 1
        assert len(found) == modes * sum(case.operator == operator for case in timed) > 0
