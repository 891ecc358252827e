"""The command `pyfused`."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import types

import pytest
import torch
from tree import ROOT

import pyfused
from pyfused import cli
from pyfused.bench.cases import operators
from pyfused.bench.cases.adapter_residual import AdapterCase
from pyfused.bench.cases.lora_linear import LoRACase
from pyfused.choice import backends


def test_info_names_versions_and_every_backend_with_its_reason(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"pyfused       {pyfused.__version__}" in printed
    assert torch.__version__ in printed
    for name, reason in pyfused.available_backends().items():
        (line,) = [line for line in printed.splitlines() if line.startswith(f"  {name} ")]
        assert line.endswith("available" if reason is None else f"not available: {reason}")


def test_info_says_how_the_kernels_were_built(capsys, monkeypatch):
    library = types.SimpleNamespace(
        build_info=lambda: '{"nvcc": "13.0.88", "targets": ["sm_80", "compute_80"], "torch": "2.10.0"}',
        kernel_names=lambda: ["one_kernel", "other_kernel<64>"],
    )
    monkeypatch.setitem(sys.modules, "pyfused._C", library)
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "\npyfused._C    2 kernels by nvcc 13.0.88 for sm_80, compute_80, beside torch 2.10.0\n" in printed


def test_info_says_what_each_gpu_runs_of_the_kernels(capsys, monkeypatch):
    capabilities = [(9, 0), (12, 0), (8, 9), (9, 0)]
    current = []
    library = types.SimpleNamespace(
        build_info=lambda: '{"nvcc": "12.4.131", "targets": ["sm_90", "compute_90"], "torch": "2.10.0"}',
        kernel_names=lambda: ["one_kernel"],
        versions=lambda: (13000, 12040),
        probe=lambda: "out of memory (cudaErrorMemoryAllocation)" if current[-1] == 3 else None,
    )

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield

    def capability(device=None):
        return capabilities[device.index or 0]

    def properties(index):
        major, minor = capabilities[index]
        return types.SimpleNamespace(name="NVIDIA Some", major=major, minor=minor, total_memory=80 << 30)

    monkeypatch.setitem(sys.modules, "pyfused._C", library)
    for name, value in {
        "is_available": lambda: True, "device_count": lambda: len(capabilities), "device": device,
        "current_device": lambda: 0, "get_device_capability": capability, "get_device_properties": properties,
        "is_current_stream_capturing": lambda: False,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(backends, "CUDA_REFUSAL", None)
    monkeypatch.setattr(backends, "CUDA_OPERATORS", {"cuda": frozenset(["lora_linear"])})
    monkeypatch.setattr(backends, "_PROBED", {})
    backends._unfit.cache_clear()
    try:
        assert cli.main(["info"]) == 0
    finally:
        backends._unfit.cache_clear()
    printed = capsys.readouterr().out
    _, _, after = printed.partition("\npyfused._C    1 kernels by nvcc 12.4.131 for sm_90, compute_90")
    lines = after.splitlines()[1:5]
    assert lines[0] == "  cuda:0      runs sm_90"
    assert lines[1].startswith(
        "  cuda:1      runs what its driver compiles from compute_90: the first forward and the "
    )
    assert "up to about a minute each" in lines[1]
    assert lines[2] == (
        "  cuda:2      does not run: its library has no code for this GPU: it was built for sm_90, compute_90; "
        "the device has 8.9"
    )
    assert lines[3] == (
        "  cuda:3      does not run: an empty kernel of its library failed there: "
        "out of memory (cudaErrorMemoryAllocation)"
    )
    assert "\n  cuda      available\n" in printed, "on the current one"
    assert sorted(current) == [0, 1, 3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_tune_measures_on_a_gpu_alone(capsys):
    assert cli.main(["tune"]) == 2
    assert "torch sees no CUDA device to measure on; --show 9.0 compiles without one" in capsys.readouterr().err


def test_tune_names_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else object())
    assert cli.main(["tune"]) == 2
    expected = 'pyfused tune needs triton; pip install "pyfused[triton,bench]" brings all it uses'
    assert expected in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"pyfused {pyfused.__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required: command"),
        (["benchmark"], "invalid choice: 'benchmark'"),
        (["tune", "--show", "hopper"], "expected major.minor, such as 9.0, got 'hopper'"),
        (["bench", "--device", "tpu"], "expected cpu, cuda or cuda:N, got 'tpu'"),
        (["check", "--device", "mps"], "expected cpu, cuda or cuda:N, got 'mps'"),
        (["check", "--device", "cuda:99"], "'cuda:99' is not there"),
        (["check", "gradient"], "invalid choice: 'gradient'"),
        (["check", "--threads", "0"], "expected a whole number of at least 1, got '0'"),
        (["bench", "--seconds", "-1"], "expected a positive number of seconds, got '-1'"),
        (["bench", "--seconds", "nan"], "expected a positive number of seconds, got 'nan'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_tune_names_a_capability_that_it_does_not_know(capsys):
    pytest.importorskip("triton")
    assert cli.main(["tune", "--show", "7.5"]) == 2
    expected = "pyfused tune: --show must be one of 8.0, 8.6, 8.9, 9.0, 10.0, 12.0, got 7.5"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["tune", "--show", "9.0"], "triton"),
        (["tune"], "rich"),
        (["bench"], "pytest_benchmark"),
        (["report", "."], "matplotlib"),
    ],
)
def test_a_command_without_what_it_needs_says_so_in_one_sentence(arguments, missing, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == missing else found(name, *rest))
    # As where it is not installed.
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"pyfused {arguments[0]} needs {missing.replace('_', '-')}; pip install")


def test_bench_names_a_path_that_does_not_exist(capsys, tmp_path):
    missing = str(tmp_path / "test_mine.py")
    assert cli.main(["bench", missing]) == 2
    assert f"paths must exist, got {missing!r}" in capsys.readouterr().err


def test_bench_names_the_extra_that_is_missing(monkeypatch, capsys):
    find = importlib.util.find_spec
    gone = ("rich", "pytest_benchmark")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in gone else find(name, *rest))
    assert cli.main(["bench"]) == 2
    error = capsys.readouterr().err
    assert "needs pytest-benchmark, rich;" in error
    assert 'pip install "pyfused[bench]"' in error


def test_check_prints_a_line_for_each_case(monkeypatch, capsys):
    lora = [LoRACase(5, 16, 8, rank=2), LoRACase(5, 16, 8, rank=2, dropout_p=0.5)]
    adapter = [AdapterCase((2, 5, 16), 4), AdapterCase((2, 16, 3, 3), 4, drop_path=0.5)]
    monkeypatch.setattr("pyfused.bench.run.check.parity_cases", lambda device: [*lora, *adapter])
    threads = torch.get_num_threads()
    assert cli.main(["check", "--device", "cpu", "--threads", str(threads)]) == 0
    printed = capsys.readouterr().out
    for case in lora:
        assert f"ok     {case.name}, portable blas: nearest " in printed
    for case in adapter:
        assert f"ok     {case.name}, portable save: nearest " in printed
        assert f"ok     {case.name}, portable recompute: nearest " in printed
        assert (f"ok     {case.name}, cpu save: nearest " in printed) == (backends.CPU_REFUSAL is None)
    lines = printed.splitlines()
    assert "skipped triton: " in printed
    assert "skipped cuda: " in printed
    count = 6 if backends.CPU_REFUSAL is not None else 10
    assert f"{count} of {count} as close to float64 as plain torch" in printed
    (start,) = (place for place, line in enumerate(lines) if line == f"{count} comparisons on cpu")
    numbers = [line.split("ok     ")[0].strip() for line in lines[start + 1 : -1]]
    assert numbers == [f"{number} of {count}" for number in range(1, count + 1)]


def _checked(monkeypatch, capsys, *arguments):
    """(exit status, what it prints, what it complains of) of `pyfused check` on two small cases."""
    found = [LoRACase(5, 16, 8, rank=2), LoRACase(6, 16, 8, rank=2)]
    monkeypatch.setattr("pyfused.bench.run.check.parity_cases", lambda device: found)
    status = cli.main(["check", "--device", "cpu", *arguments])
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    ("select", "wanted"),
    [
        ([], ["5x16", "6x16"]),
        (["-k", "LoRA_linear 6X16->8"], ["6x16"]),
        (["-k", "5x16->8 r2 float32, portable blas"], ["5x16"]),
        (["-k", "5x16", "-k", "6x16"], ["5x16", "6x16"]),
    ],
)
def test_check_takes_the_names_that_it_prints(select, wanted, monkeypatch, capsys):
    names = [f"lora_linear {shape}->8 r2 float32, portable blas" for shape in wanted]
    assert _checked(monkeypatch, capsys, "--list", *select) == (0, "".join(f"{name}\n" for name in names), "")
    _, listed, _ = _checked(monkeypatch, capsys, "--list", "--json", *select)
    assert [f"{row['case']}, {row['backend']} {row['plan']}" for row in json.loads(listed)["rows"]] == names
    status, printed, _ = _checked(monkeypatch, capsys, *select)
    assert status == 0
    compared = [line for line in printed.splitlines() if "  ok  " in line]
    assert [line.partition("ok     ")[2].partition(":")[0] for line in compared] == names
    assert printed.endswith(f"\n{len(names)} of {len(names)} as close to float64 as plain torch\n")


def test_check_names_what_is_near(monkeypatch, capsys):
    status, printed, complaint = _checked(monkeypatch, capsys, "-k", "5x16", "-k", "lora_liner")
    assert (status, printed) == (2, "")
    wanted = "pyfused check: -k must be part of a printed name, got 'lora_liner'; near: 'lora_linear'\n"
    assert complaint == wanted
    for option in (["-k", "cross"], ["--list"]):
        status, _, complaint = _checked(monkeypatch, capsys, "gradient-ratio", *option)
        assert status == 2
        assert "gradient-ratio has none" in complaint


def test_check_covers_dropout_and_mixed_dtypes():
    found = list(operators.parity_cases(torch.device("cpu")))
    for kind in (LoRACase, AdapterCase):
        own = [case for case in found if isinstance(case, kind)]
        assert {case.dropout_p for case in own} == {0.0, 0.1}
        assert any(case.dtype == torch.bfloat16 and case.adapter_dtype == torch.float32 for case in own)
    adapter = [case for case in found if isinstance(case, AdapterCase)]
    assert {(len(case.shape), bool(case.drop_path)) for case in adapter} == {
        (3, False),
        (3, True),
        (4, False),
        (4, True),
    }


class TestGradientRatio:
    """`pyfused check gradient-ratio`."""

    def test_prints_both_ratios_and_the_verdict(self, capsys):
        pytest.importorskip("open_clip", reason="open_clip is not installed")
        threads = torch.get_num_threads()
        assert cli.main(["check", "gradient-ratio", "--device", "cpu", "--threads", str(threads)]) == 0
        printed = capsys.readouterr().out
        ratios = dict(
            re.findall(r"^(.*?) +\|grad image_adapters\.0\| .* ratio (\S+), unchanged$", printed, re.MULTILINE)
        )
        assert ratios.keys() == {"fused", "reference", "fused, w = 0"}
        assert float(ratios["fused"]) == pytest.approx(float(ratios["reference"]), abs=2e-6)
        assert ratios["fused"] != ratios["fused, w = 0"] == "1.000000"
        assert printed.count("\nok ") == 2

    def test_a_ratio_that_differs_from_the_reference_fails(self, capsys, monkeypatch):
        pytest.importorskip("open_clip", reason="open_clip is not installed")
        from pyfused import reference

        right = reference.cross_attention_residual
        monkeypatch.setattr(
            reference,
            "cross_attention_residual",
            lambda *given, **settings: right(*given, **settings | {"weight": 0.2}),
        )
        assert cli.main(["check", "gradient-ratio", "--device", "cpu"]) == 1
        assert "FAILED  fused and reference ratios differ by" in capsys.readouterr().out

    def test_without_open_clip(self, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "open_clip", None)
        assert cli.main(["check", "gradient-ratio", "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("pyfused check gradient-ratio: open_clip cannot be imported")
        assert 'pip install "pyfused[bench]"' in error


def test_info_doctor_and_check_need_torch_alone(tmp_path):
    script = """
import sys
others = "rich pytest matplotlib peft open_clip timm sklearn transformers typer tqdm shtab"
for name in others.split():
    sys.modules[name] = None
import torch
from pyfused import cli
from pyfused.bench.run import check
from pyfused.bench.cases.adapter_residual import AdapterCase
from pyfused.bench.cases.lora_linear import LoRACase
check.parity_cases = lambda device: [LoRACase(5, 16, 8, rank=2), AdapterCase((2, 5, 16), 4)]
sys.exit(cli.main(["info"]) or cli.main(["doctor"]) or cli.main(["check", "--device", "cpu"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{3 + 2 * (backends.CPU_REFUSAL is None)} of" in done.stdout


def test_a_selection_without_rows_is_an_error(tmp_path):
    pytest.importorskip("pytest_benchmark")
    # In a worker's environment pytest-benchmark would have a word to say of workers.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pyfused.cli", "bench", "-k", "nothing_like_it", "--output", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, env=own | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        "pyfused bench: -k must be part of a printed name, got 'nothing_like_it'; --list prints them\n"
    )
    assert not (tmp_path / "out").exists()


class TestConvert:
    def test_it_writes_and_says_what_is_to_be_said(self, capsys, tmp_path):
        pytest.importorskip("safetensors")
        model = torch.nn.TransformerEncoderLayer(8, 2, 16)
        pyfused.inject_lora(model, rank=2)
        pyfused.save_lora(model, tmp_path / "peft")
        command = ["convert", str(tmp_path / "peft"), str(tmp_path / "ours"), "--from", "peft", "--to", "pyfused"]
        assert cli.main(command) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(
            f"written: {tmp_path / 'ours'}\n         PEFT adds out_proj's term of an nn.Multihead"
        )
        pyfused.load_tuned(model, tmp_path / "ours")

    def test_what_cannot_be_done_is_one_sentence(self, capsys, tmp_path):
        command = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--from", "peft", "--to", "pyfused"]
        assert cli.main(command) == 2
        assert re.fullmatch(r"pyfused convert: SRC must be there, got nothing at '.*a'\n", capsys.readouterr().err)
        assert cli.main([*command[:3], "--from", "peft", "--to", "adapterhub"]) == 2
        assert capsys.readouterr().err == "pyfused convert: --like must be given for 'adapterhub', got None\n"
        with pytest.raises(SystemExit):
            cli.main([*command[:3], "--from", "onnx", "--to", "peft"])
        assert "invalid choice: 'onnx'" in capsys.readouterr().err
