"""*Truth*: its calls cover what there is, in as few compilations as they may cost, and find what is wrong."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import pyfused
from pyfused import kernels
from pyfused.bench.gpu.programs import outcomes as outcomes_format
from pyfused.bench.gpu.programs import truth, truth_cases
from pyfused.bench.gpu.programs.truth_cases import BOTH, FORWARD, Call
from pyfused.choice import backends
from pyfused.ops import OPERATORS
from pyfused.ops.adapter_residual import PLANS as ADAPTER_PLANS
from pyfused.ops.cross_attention_residual import PLANS as ATTENTION_PLANS
from pyfused.ops.lora_linear import PLANS as LORA_PLANS

# What the step may cost on an H200, and that with the questions.
MOST, MOST_WITH_QUESTIONS = 130, 190
PLANS = {
    ("lora_linear", "portable"): LORA_PLANS["portable"],
    ("lora_linear", "triton"): LORA_PLANS["triton"],
    ("lora_linear", "cuda"): LORA_PLANS["cuda"],
    **{("adapter_residual", backend): ADAPTER_PLANS for backend in ("portable", "triton", "cuda")},
    ("cross_attention_residual", "portable"): ATTENTION_PLANS,
    ("cross_attention_residual", "triton"): ATTENTION_PLANS,
    ("cross_attention_residual", "cuda"): ATTENTION_PLANS[:2],
    ("projection_residual", "portable"): ("auto",),
    ("projection_residual", "triton"): ("auto",),
}
IMAGES, SEQUENCES = ("rows", "NCHW", "channels_last"), ("rows", "permuted")
LAYOUTS = {
    "lora_linear": IMAGES, "adapter_residual": IMAGES,
    "cross_attention_residual": SEQUENCES, "projection_residual": SEQUENCES,
}  # fmt: skip
CALLS = truth_cases.calls()
SMALLEST = "projection_residual triton auto float32 rows activation=identity norm_match=False bias=False"


def _dtypes(backend: str) -> tuple[torch.dtype, ...]:
    every = (torch.bfloat16, torch.float16, torch.float32)
    return every if backend == "portable" else tuple(d for d in every if d in backends.KERNEL_DTYPES[backend])


@pytest.mark.parametrize(("operator", "backend"), PLANS)
def test_plans_dtypes_and_layouts_are_covered_in_both_directions(operator, backend):
    plans, dtypes, layouts = PLANS[operator, backend], _dtypes(backend), LAYOUTS[operator]
    found = {
        (call.plan, call.dtype, call.layout)
        for call in CALLS
        if (call.operator, call.backend, call.direction) == (operator, backend, BOTH) and not call.frozen
    }
    products = set(itertools.product(plans, dtypes, layouts))
    if backend != "triton":
        assert products <= found
        return
    # A call costs compilations there: any two of them meet, not all three.
    for pair in ((0, 1), (0, 2), (1, 2)):
        wanted = {tuple(product[i] for i in pair) for product in products}
        assert wanted <= {tuple(call[i] for i in pair) for call in found}, pair


def test_every_operator_and_backend_has_a_row():
    assert {operator for operator, _ in PLANS} == set(OPERATORS)
    # An operator that gets kernels in CUDA C++ gets calls of them.
    registered = backends._registered("cuda")
    library = registered["cuda"] | registered["cpu"]
    assert library <= {operator for operator, backend in PLANS if backend == "cuda"}


@pytest.mark.parametrize(("operator", "backend"), [key for key in PLANS if key[1] != "portable"])
def test_calls_without_gradients_and_with_frozen_parts(operator, backend):
    own = [call for call in CALLS if (call.operator, call.backend) == (operator, backend)]
    assert any(call.direction == FORWARD for call in own)
    assert any(call.frozen for call in own)


OPTIONS = {
    "lora_linear": {"dropout_p": 0.3, "adapters": None, "bias": False},
    "adapter_residual": {
        "dropout_p": 0.3, "adapters": None, "dropped": True, "residual": torch.float32, "gamma": False, "bias": False,
    },
    "cross_attention_residual": {
        "dropout_p": 0.3, "norm_match": True, "masked": True, "gate": True, "shared": True, "bias": False,
    },
    "projection_residual": {"norm_match": False, "gate": True, "bias": False, "residual": torch.float32},
}  # fmt: skip


@pytest.mark.parametrize(("operator", "backend"), PLANS)
def test_options_are_covered(operator, backend):
    own = [call for call in CALLS if (call.operator, call.backend) == (operator, backend)]
    for setting in OPTIONS[operator].items():
        assert any(setting in call.settings.items() for call in own), setting


def test_auto_is_asked_of_every_operator():
    assert {call.operator for call in CALLS if call.backend == "auto"} == set(OPERATORS)


def test_names_are_distinct():
    assert len({call.name for call in CALLS}) == len(CALLS)


_COUNT = """
import dataclasses, json, torch
from pyfused.bench.gpu.programs import ahead, contests, questions, truth, truth_cases
from pyfused.kernels.recording import SHARED_MEMORY, Target

H200 = Target((9, 0), 132, SHARED_MEMORY[9, 0], "NVIDIA H200")
found = truth.specialisations(truth_cases.calls(), H200)
with contests.scratch() as folder:
    asked = ahead.specialisations(contests.every_call(contests.questions(folder), H200), H200)
print(json.dumps({
    "kernels": sorted({launch.kernel.__name__ for launch in found.values()}),
    "truth": len(found), "work": dataclasses.asdict(truth.work(H200)), "questions": len(asked),
    "asked": dataclasses.asdict(questions.work(H200)), "together": len({*found, *asked}),
}))
"""


@pytest.fixture(scope="module")
def count() -> dict:
    """Counted where kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_compilations_are_few(count):
    assert 0 < count["truth"] <= MOST
    assert count["together"] <= MOST_WITH_QUESTIONS
    assert count["work"]["compilations"] == count["truth"]
    assert count["work"]["cases"] == len(CALLS)
    assert count["asked"]["compilations"] == count["questions"]


def _launched() -> set[str]:
    """The kernels that kernels/*.py hands to `launch`."""
    found = set()
    for path in Path(kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "launch"
                and node.args
            ):
                found.add(ast.unparse(node.args[0]))
    return found


def test_every_kernel_is_launched(count):
    assert len(_launched()) >= 12
    assert set(count["kernels"]) == _launched()


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the program on a CPU; (exit status, lines printed, the record's outcomes)."""

    def run(select: str, *arguments: str) -> tuple[int, list[str], dict]:
        status = truth.main(["--record", str(tmp_path / "record"), "--device", "cpu", "-k", select, *arguments])
        found = json.loads((tmp_path / "record" / "truth.json").read_text())
        return status, capsys.readouterr().out.splitlines(), found["outcomes"]

    return run


@pytest.fixture
def interpreted():
    reason = pyfused.available_backends()["triton"]
    if reason is not None:
        pytest.skip(f"triton: {reason}")


def test_a_call_is_made_and_judged_once(run, interpreted, monkeypatch):
    status, lines, found = run(SMALLEST)
    assert status == 0
    assert "1 of 1 calls passed" in lines[-1]
    assert found[SMALLEST]["status"] == "passed"
    assert 0.0 < float(found[SMALLEST]["error_by_limit"]) <= 1.0
    monkeypatch.setattr(truth, "judged", lambda *_: pytest.fail("made again"))
    assert run(SMALLEST)[0] == 0


def test_kernels_in_cuda_are_made_and_judged(run, emulator):
    status, lines, found = run("lora_linear cuda one_launch float16 rows")
    assert status == 0, lines
    assert {item["status"] for item in found.values()} == {"passed"}


PORTABLE = "projection_residual portable auto bfloat16"


def _broken(monkeypatch, change) -> None:
    whole = pyfused.projection_residual

    @functools.wraps(whole)
    def broken(o, *args, **kwargs):
        return change(whole(o, *args, **kwargs))

    monkeypatch.setattr(pyfused, "projection_residual", broken)


def test_wrong_numbers_fail_and_stop_nothing(run, monkeypatch):
    _broken(monkeypatch, lambda y: y * 1.02)
    status, lines, found = run("portable auto bfloat16 rows")
    names = [name for name in found if name.startswith("projection_residual")]
    assert status == 1
    assert all(found[name]["status"] == "failed" and "y (Frobenius): error" in found[name]["reason"] for name in names)
    assert lines[-1].startswith(f"FAILED {names[-1]}: y (Frobenius)")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y: y * torch.full_like(y, torch.nan), "error nan"),
        (lambda y: y * (1 + torch.finfo(y.dtype).eps * next(_TURN)), "other bits the second time"),
        (lambda y: y.double(), "y has dtype torch.float64, not torch.bfloat16"),
        (lambda y: y[0], "y must have shape (2, 203, 208), got (203, 208)"),
        (lambda y: y.nope, "AttributeError: 'Tensor' object has no attribute 'nope'"),
    ],
    ids=["NaN", "bits", "dtype", "shape", "raises"],
)
def test_every_fault_has_its_reason(run, monkeypatch, change, reason):
    _broken(monkeypatch, change)
    status, _, found = run(f"{PORTABLE} rows")
    (item,) = found.values()
    assert status == 1
    assert item["status"] == "failed"
    assert reason in item["reason"]


_TURN = itertools.cycle((0, 1))


def test_calls_are_made_in_poisoned_memory(run, monkeypatch):
    # The tests' own poison is off: it would hide that there is none here.
    torch.use_deterministic_algorithms(False)
    seen = []
    monkeypatch.setattr(truth, "judged", lambda *_: (seen.append(torch.empty(64).isnan().all().item()), 0.0))
    assert run(f"{PORTABLE} rows")[0] == 0
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_failed_is_tried_again_but_not_by_a_process_that_goes_on(run, monkeypatch):
    with monkeypatch.context() as patch:
        _broken(patch, lambda y: y * 1.02)
        assert run(f"{PORTABLE} rows")[0] == 1
    status, lines, _ = run(f"{PORTABLE} rows", "--continued")
    assert status == 1
    assert lines[-1].startswith("FAILED")
    assert run(f"{PORTABLE} rows")[0] == 0


def test_a_gpu_that_does_not_answer_is_left_to_another_process(run, monkeypatch):
    started = []
    monkeypatch.setattr(outcomes_format.os, "execv", lambda path, words: started.append(words) or sys.exit(77))
    monkeypatch.setattr(truth, "answers", lambda device: False)
    _broken(monkeypatch, lambda y: y * 1.02)
    with pytest.raises(SystemExit, match="77"):
        run(PORTABLE)
    (words,) = started
    assert words[1:3] == ["-m", "pyfused.bench.gpu.programs.truth"]
    arguments = truth._arguments(words[3:])
    assert arguments.continued
    assert arguments.select == PORTABLE
    assert arguments.device == "cpu"


def test_time_that_is_out_is_told(run, monkeypatch):
    clock = itertools.count(0.0, 1.0)
    monkeypatch.setattr(truth.time, "monotonic", lambda: next(clock))
    status, lines, found = run(PORTABLE, "--seconds", "3")
    assert status == 1
    assert len(found) == 1
    assert "1 of 2 calls passed" in lines[-1]
    assert "1 not reached" in lines[-1]


def test_what_hung_waits_for_the_rest(run, tmp_path, monkeypatch):
    names = [call.name for call in CALLS if call.name.startswith(PORTABLE)]
    made = []
    monkeypatch.setattr(truth, "judged", lambda call, device: (made.append(call.name), 0.0))
    outcomes_format.Outcomes(tmp_path / "record" / "truth.json", {}).put(names[0], "running")
    assert run(PORTABLE)[0] == 0
    assert made == [*names[1:], names[0]]


def test_a_backend_that_is_not_here_is_skipped_with_its_reason(run, monkeypatch):
    monkeypatch.setattr(truth.backends, "refusal", lambda backend, *_: "no such thing" if backend == "cuda" else None)
    status, lines, found = run("lora_linear cuda one_launch float16 rows")
    assert status == 0
    assert {item["status"] for item in found.values()} == {"skipped"}
    assert "skipped: cuda: no such thing" in lines


@pytest.mark.parametrize("text", ["{", "[]", '{"outcomes": {"a": 1}}'])
def test_a_record_of_something_else_is_refused(tmp_path, capsys, text):
    (tmp_path / "truth.json").write_text(text)
    assert truth.main(["--record", str(tmp_path), "--device", "cpu"]) == 1
    assert "truth.json holds no outcomes" in capsys.readouterr().err
    assert (tmp_path / "truth.json").read_text() == text


def test_a_record_that_cannot_be_written_is_an_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert truth.main(["--record", str(tmp_path / "file" / "record"), "--device", "cpu"]) == 1
    assert "truth: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--seconds", "0"], "--seconds must be a positive number"),
        (["--seconds", "nan"], "--seconds must be a positive number"),
        (["--workers", "0"], "--workers must be at least 1"),
    ],
)
def test_arguments_out_of_range(arguments, reason, capsys):
    with pytest.raises(SystemExit):
        truth.main(["--record", "nowhere", *arguments])
    assert reason in capsys.readouterr().err


def test_no_such_call(tmp_path, capsys):
    assert truth.main(["--record", str(tmp_path), "--device", "cpu", "-k", "nothing has this name"]) == 1
    assert "no call's name contains" in capsys.readouterr().err


def test_directions_are_what_they_say():
    call = Call("lora_linear", "portable", "blas", torch.float32, "rows", FORWARD)
    tensors, _ = call.drawn(torch.device("cpu"))
    assert not any(value.requires_grad for value in tensors.values() if value is not None)
    call = Call("lora_linear", "portable", "blas", torch.float32, "rows", BOTH, {}, ("bias",))
    tensors, _ = call.drawn(torch.device("cpu"))
    assert {name for name, value in tensors.items() if value.requires_grad} == {"x", "lora_a", "lora_b"}


@pytest.mark.parametrize("layout", IMAGES)
def test_layouts_are_what_they_say(layout):
    call = Call("lora_linear", "portable", "blas", torch.float32, layout)
    tensors, options = call.drawn(torch.device("cpu"))
    x = tensors["x"]
    assert options["channel_dim"] == (-1 if layout == "rows" else 1)
    assert x.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last") or x.dim() == 3
    assert x.is_contiguous() == (layout != "channels_last")
