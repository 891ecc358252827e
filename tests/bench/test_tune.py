"""`pyfused tune` without a GPU: what it tries, what it leaves out, and that what it times is what it records."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from pyfused.bench.cases import operators
from pyfused.bench.cases.adapter_residual import AdapterCase
from pyfused.bench.cases.cross_attention_residual import CrossAttentionCase
from pyfused.bench.cases.lora_linear import LoRACase
from pyfused.bench.tune import command, search
from pyfused.choice import backends, measured
from pyfused.choice.measured import Table
from pyfused.kernels import recording
from pyfused.kernels.bottleneck_config import RowsConfig
from pyfused.kernels.recording import SHARED_MEMORY, LaunchWork, Target

H200 = Target((9, 0), 132, SHARED_MEMORY[9, 0], "NVIDIA H200")
PEAKS = search.Peaks(790e12, 1.98e9)
ADAPTER = AdapterCase((1, 640, 256), 16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _empty_table(monkeypatch):
    monkeypatch.setattr(measured, "TABLE", Table())
    measured.changed()
    yield
    measured.changed()


def direction(case, name):
    return next(item for item in search.directions(case, H200) if item.name.endswith(name))


@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        (ADAPTER, ["_adapter_fwd_kernel", "_adapter_bwd_rows_kernel", "_adapter_bwd_weights_kernel"]),
        (
            LoRACase(64, 96, 80, dtype=torch.bfloat16),
            ["_lora_gemm_kernel", "_lora_wgrad_kernel", "_lora_gemm_kernel", "_lora_wgrad_kernel"],
        ),
        (
            CrossAttentionCase(1, 64, 64, 4, 2, dtype=torch.bfloat16),
            ["_cross_attention_fwd_kernel", "_cross_attention_bwd_rows_kernel", "_cross_attention_bwd_weights_kernel"],
        ),
    ],
    ids=lambda value: getattr(value, "operator", ""),
)
def test_every_choice_of_an_operator_is_found(case, kernels):
    found = search.directions(case, H200)
    operator, sizes = search.kernels_and_sizes(case, case.tensors(torch.device("meta")))
    assert [item.name for item in found] == [f"{case.operator}_fwd", f"{case.operator}_bwd"]
    chosen = [one for item in found for one in search.chosen_by(item, H200)]
    assert sorted(one.kernel for one in chosen) == sorted(kernels)
    assert operator == case.operator
    assert sizes["M"] == 64 or case is ADAPTER
    for one in chosen:
        work = search.least_work(one, one.config())
        assert work.programs >= 1
        assert min(work.flops, work.nbytes) > 0


def test_arguments_on_a_device_are_like_the_calls_own():
    forward = direction(ADAPTER, "_fwd")
    made = forward.on(torch.device("cpu"))
    for own, new in zip(forward.arguments, made, strict=True):
        if isinstance(own, torch.Tensor):
            assert (own.shape, own.stride(), own.dtype) == (new.shape, new.stride(), new.dtype)
            assert own.is_meta
            assert not new.is_meta
            assert new.isfinite().all()
        else:
            assert own is new or own == new


def test_neighbours_differ_in_one_or_two_fields_and_stay_in_bounds():
    own = RowsConfig(16, 64, num_warps=4, num_stages=2)
    found = list(search.neighbours(own))
    assert len(found) == len(set(found))
    assert own not in found
    differences = [sum(getattr(own, name) != value for name, value in vars(config).items()) for config in found]
    assert set(differences) == {1, 2}
    assert {config.block_m for config in found} == {16, 32}
    assert {config.num_stages for config in found} == {2, 3}
    assert {config.num_warps for config in found} == {4, 8}


def test_least_seconds_are_those_of_the_busiest_multiprocessor():
    peaks, target = search.Peaks(flops=100.0, clock=2.0), Target((9, 0), 10, 0)
    # Two rounds of programs; a multiprocessor makes 10 FLOP/s and reads 128 bytes/s.
    assert peaks.least_seconds(LaunchWork(11, 50.0, 128.0), target) == pytest.approx(10.0)
    assert peaks.least_seconds(LaunchWork(10, 50.0, 1280.0), target) == pytest.approx(10.0)


def test_what_cannot_be_faster_is_not_compiled(monkeypatch):
    forward = direction(ADAPTER, "_fwd")
    (chosen,) = search.chosen_by(forward, H200)
    compiled = []

    def compile_case(case):
        compiled.append(case.launch)
        return type("Finding", (), {"faults": ("spills",) if case.launch.num_warps == 8 else ()})

    monkeypatch.setattr(search.audit, "compile_case", compile_case)
    least = {
        config: PEAKS.least_seconds(search.least_work(chosen, config), H200)
        for config in search.neighbours(chosen.config())
    }
    middle = sorted(least.values())[len(least) // 2]
    found = search.sound(forward, chosen, H200, PEAKS, middle)
    assert set(found) == {config for config in least if least[config] < middle}
    assert 0 < len(found) < len(least)
    assert len(compiled) == len(found)
    for config, item in zip(found, compiled, strict=True):
        assert (item.num_warps, item.num_stages) == (config.num_warps, config.num_stages)
        assert item.arguments["BLOCK_M"] == config.block_m
        assert bool(found[config]) == (config.num_warps == 8)


@pytest.fixture
def tuner(monkeypatch):
    """A tuner whose clock reads the launches: with these stages a kernel takes so many seconds."""
    monkeypatch.setattr(
        search, "sound", lambda direction, chosen, *_: dict.fromkeys(search.neighbours(chosen.config()), ())
    )
    seconds = {}

    def measure(calls):
        times = {}
        for name, call in calls.items():
            with recording.record(H200) as launches:
                call()
            times[name] = sum(seconds.get((item.kernel.__name__, item.num_stages), 1.0) for item in launches)
        return times

    def make(budget=1000.0, **stages):
        seconds.update({tuple(name.rsplit("_", 1)): value for name, value in stages.items()})
        seconds.update({(name, int(count)): value for (name, count), value in list(seconds.items())})
        return command.Tuner(torch.device("cpu"), H200, PEAKS, measure, seconds=budget)

    monkeypatch.setattr(command.Tuner, "_compare_backends", lambda *_: None)
    return make


def test_the_fastest_configuration_becomes_a_row(tuner, monkeypatch):
    found = tuner(_adapter_fwd_kernel_3=0.5, _adapter_fwd_kernel_5=0.4, _adapter_bwd_rows_kernel_3=0.99)
    found.tune(ADAPTER)
    (row,) = found.rows
    assert (row.gpu, row.subject, row.dtype, row.rows) == ("NVIDIA H200", "_adapter_fwd_kernel", "bfloat16", 640)
    assert row.found == {"num_stages": 5}
    assert row.source["gain"] == 2.5
    assert row.source["of"] == "adapter_residual_fwd"
    assert {"date", "torch", "commit"} <= row.source.keys()
    # And the kernel starts in it, on that GPU and no other.
    forward = direction(ADAPTER, "_fwd")
    assert measured.TABLE.rows == [row]
    for target, stages in ((H200, 5), (replace(H200, name="NVIDIA H100"), 4)):
        with recording.record(target) as launches:
            forward()
        assert [item.num_stages for item in launches] == [stages]


def test_the_same_is_tuned_once_and_no_new_work_begins_after_the_budget(tuner):
    found = tuner(_adapter_fwd_kernel_3=0.5)
    steps = []
    found.on_step = steps.append
    found.tune(ADAPTER)
    first = len(steps)
    found.tune(replace(ADAPTER, adapter_dtype=torch.float32))
    assert len(found.rows) == 1
    assert len(steps) == first + 1, "only its backends"
    late = tuner(budget=-1.0, _adapter_fwd_kernel_3=0.5)
    late.tune(ADAPTER)
    assert late.rows == []
    assert late.out_of_time


@pytest.mark.parametrize("name", operators.OPERATORS)
def test_backends_become_a_row_the_fastest_first(name):
    case = replace(operators.OPERATORS[name].TINY, dtype=torch.bfloat16)
    times = {"portable": 3e-6, "triton": 1e-6, "cuda": 2e-6, "cpu": 2.5e-6}

    def measure(calls):
        # Each computes.
        assert all(gradient.isfinite().all() for call in calls.values() for gradient in call())
        return {name: times[name] for name in calls}

    found = command.Tuner(torch.device("cpu"), H200, PEAKS, measure, seconds=1.0)
    operator, sizes = search.kernels_and_sizes(case, case.tensors(torch.device("cpu")))
    found._compare_backends(case)
    (row,) = found.rows
    assert row.subject == operator
    assert list(row.found) == [name for name in ("triton", "cuda", "cpu", "portable") if name in row.found]
    assert row.found["portable"] == 3.0
    assert row.sizes == {name: size for name, size in sizes.items() if name != "M"}
    assert row.capability == (9, 0)


def test_a_row_has_the_sizes_of_a_call_on_its_gpu(monkeypatch):
    monkeypatch.setattr(backends, "shared_memory", lambda device: 0 if device.type == "cpu" else 232_448)
    case = replace(operators.OPERATORS["adapter_residual"].TINY, dtype=torch.bfloat16)
    found = command.Tuner(torch.device("cpu"), H200, PEAKS, lambda calls: dict.fromkeys(calls, 1e-6), seconds=1.0)
    found._compare_backends(case)
    assert found.rows[0].sizes["cuda_rows"] == 0


def test_new_rows_take_the_place_of_those_for_the_same():
    row = measured.Row("G", (9, 0), "k", "bfloat16", 8, {"C": 1, "h": 2}, {"num_stages": 3}, {})
    other, newer = replace(row, rows=9), replace(row, sizes={"h": 2, "C": 1}, found={"num_stages": 4})
    assert measured.merged([row, other], [newer]) == [newer, other]


def test_show_needs_no_gpu():
    code = """
import sys, torch
from pyfused.bench.cases import operators
from pyfused.bench.tune import command, search
from pyfused.bench.cases.adapter_residual import AdapterCase
operators.timed_cases = lambda device: [AdapterCase((1, 64, 64), 16, torch.bfloat16)]
directions = search.directions
search.directions = lambda case, target: directions(case, target)[:1]
search.neighbours = lambda config: [config]
sys.exit(command.show((9, 0), "adapter_residual"))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("adapter_residual")]
    assert len(lines) == 1
    assert lines[0].endswith("; 1 of 1 neighbours are sound")


def test_what_is_tuned_has_a_row_of_its_own_to_be_found_by():
    found = command._cases(torch.device("cuda"), "")
    assert {case.operator for case in found} == set(operators.OPERATORS)
    rows = [repr(search.kernels_and_sizes(case, case.tensors(torch.device("meta")))) for case in found]
    assert len(rows) == len(set(rows))
    named = command._cases(torch.device("cuda"), "6304x768->3072")
    both = [torch.bfloat16, torch.float32]
    assert [(case.dropout_p, case.parameter_dtype) for case in named] == [(p, d) for p in (0.0, 0.1) for d in both]


def test_a_name_that_no_case_has(capsys):
    assert command.show((9, 0), "nothing") == 2
    assert "-k must be part of a case's name, got 'nothing'" in capsys.readouterr().err
