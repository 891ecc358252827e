from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import pytest
import torch

from pyfused import backend as backends
from pyfused.backend import available_backends, refusal

CPU, GPU, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")
OPERATOR = "lora_linear"
SIZES = {
    "lora_linear": {"M": 6304, "N": 2304, "K": 768, "R": 16, "dropout_p": 0.0},
    "adapter_residual": {"M": 6304, "C": 768, "h": 64, "dropout_p": 0.0, "cuda_rows": 64},
}


def choose(requested, device, dtype, operator, limits=None):
    return backends.choose(requested, device, dtype, operator, SIZES.get(operator, {}), limits)


@pytest.fixture
def modern(monkeypatch):
    """A machine with a current triton and an H100, whatever this one has; no CUDA C++ kernels."""
    monkeypatch.setattr(backends, "TRITON_REFUSAL", None)
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", False)
    monkeypatch.setattr(backends, "CUDA_REFUSAL", "this installation has no compiled kernels (pyfused._C)")
    monkeypatch.setattr(backends, "CUDA_OPERATORS", {"cpu": frozenset(), "cuda": frozenset()})
    monkeypatch.setattr(backends, "DEFAULT_BACKEND", "auto")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return monkeypatch


@pytest.fixture
def compiled(modern):
    """The same with CUDA C++ kernels for one operator."""
    modern.setattr(backends, "CUDA_REFUSAL", None)
    modern.setitem(backends.CUDA_OPERATORS, "cuda", frozenset([OPERATOR]))
    return modern


@pytest.fixture
def ampere(compiled):
    """The same on a GPU of compute capability 8.0, where CUDA C++ kernels of that operator come first."""
    compiled.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    return compiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_auto_takes_triton_without_compiled_kernels(modern, dtype):
    assert choose("auto", GPU, dtype, OPERATOR) == "triton"
    modern.setattr(backends, "TRITON_REFUSAL", "no")
    assert choose("auto", GPU, dtype, OPERATOR) == "portable"


def test_auto_takes_compiled_kernels_first(ampere):
    assert choose("auto", GPU, torch.float16, OPERATOR) == "cuda"
    assert choose("auto", GPU, torch.bfloat16, OPERATOR) == "cuda"
    assert choose("auto", GPU, torch.float32, OPERATOR) == "triton"
    assert choose("auto", GPU, torch.float16, "adapter_residual") == "triton"
    assert choose("auto", CPU, torch.float16, OPERATOR) == "portable"


@pytest.mark.parametrize(
    ("device", "dtype", "operator", "reason"),
    [
        (GPU, torch.bfloat16, OPERATOR, None),
        (GPU, torch.bfloat16, None, None),
        (GPU, torch.float32, OPERATOR, "its kernels take float16 and bfloat16, not torch.float32"),
        (GPU, torch.float16, "adapter_residual", "it has no kernels for adapter_residual"),
        (CPU, torch.float16, OPERATOR, "it has no kernels for device type 'cpu'"),
        (META, torch.float16, OPERATOR, "it has no kernels for device type 'meta'"),
    ],
)
def test_what_compiled_kernels_serve(compiled, device, dtype, operator, reason):
    assert refusal("cuda", device, dtype, operator) == reason


def test_compiled_kernels_refuse_old_gpus(compiled):
    compiled.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert refusal("cuda", GPU, torch.float16) == "it needs compute capability (8, 0), cuda:0 has (7, 5)"


def test_emulated_kernels_serve_cpu_tensors_only_by_name(compiled):
    compiled.setitem(backends.CUDA_OPERATORS, "cpu", frozenset([OPERATOR]))
    assert choose("auto", CPU, torch.float16, OPERATOR) == "portable"
    assert choose("cuda", CPU, torch.float16, OPERATOR) == "cuda"
    assert available_backends()["cuda"] is None


def test_choice_is_traced_without_a_break(ampere):
    ampere.setitem(backends.CUDA_OPERATORS, "cpu", frozenset([OPERATOR]))
    chosen = []

    def call(x):
        chosen.extend(choose("auto", GPU, dtype, OPERATOR) for dtype in (torch.float16, torch.float32))
        chosen.append(choose("cuda", x.device, x.dtype, OPERATOR))
        return x + len(chosen)

    torch._dynamo.reset()
    x = torch.zeros(2, dtype=torch.float16)
    assert torch.compile(call, backend="eager", fullgraph=True)(x).tolist() == [3.0, 3.0]
    assert chosen == ["cuda", "triton", "cuda"]


def test_auto_serves_float64_old_gpus_and_other_devices_portably(modern):
    assert choose("auto", GPU, torch.float64, OPERATOR) == "portable"
    assert choose("auto", META, torch.float32, OPERATOR) == "portable"
    modern.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert choose("auto", GPU, torch.float32, OPERATOR) == "portable"
    assert refusal("triton", GPU, torch.float32) == "it needs compute capability (8, 0), cuda:0 has (7, 5)"


def test_interpreter_serves_cpu_tensors_only_by_name(modern):
    modern.setattr(backends, "TRITON_INTERPRETED", True)
    assert choose("auto", CPU, torch.float32, OPERATOR) == "portable"
    assert choose("triton", CPU, torch.float32, OPERATOR) == "triton"


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "reason"),
    [
        ("triton", CPU, torch.float32, "triton: a CPU tensor needs TRITON_INTERPRET=1, set before Python starts"),
        ("triton", GPU, torch.float64, "triton: its kernels take float32, float16 and bfloat16, not torch.float64"),
        ("triton", META, torch.float32, "triton: it has no kernels for device type 'meta'"),
        ("cuda", GPU, torch.float16, "cuda: this installation has no compiled kernels"),
    ],
)
def test_explicit_request_never_falls_back(modern, requested, device, dtype, reason):
    with pytest.raises(RuntimeError, match=f"backend '{requested}' cannot serve") as error:
        choose(requested, device, dtype, OPERATOR)
    assert error.match(reason)
    # Every backend is accounted for, the ones that could have served included.
    assert error.match("portable: available")
    assert all(f"{name}: " in str(error.value) for name in backends.BACKENDS)


def test_default_backend_never_falls_back_either(modern):
    modern.setattr(backends, "DEFAULT_BACKEND", "triton")
    assert choose("auto", GPU, torch.float32, OPERATOR) == "triton"
    assert choose("portable", GPU, torch.float32, OPERATOR) == "portable"
    with pytest.raises(RuntimeError, match="backend 'triton' cannot serve"):
        choose("auto", CPU, torch.float32, OPERATOR)


def test_a_call_beyond_a_backends_limits_goes_to_the_next(modern):
    limits = {"triton": "operator: width must be <= 512 there, got 513"}
    assert choose("auto", GPU, torch.float32, OPERATOR, limits) == "portable"
    assert choose("auto", GPU, torch.float32, OPERATOR, {}) == "triton"
    assert choose("portable", GPU, torch.float32, OPERATOR, limits) == "portable"
    modern.setattr(backends, "CUDA_REFUSAL", None)
    modern.setitem(backends.CUDA_OPERATORS, "cuda", frozenset([OPERATOR]))
    assert choose("auto", GPU, torch.float16, OPERATOR, limits) == "cuda"
    assert choose("auto", GPU, torch.float16, OPERATOR, limits | {"cuda": "no"}) == "portable"


@pytest.mark.parametrize("requested", ["triton", "auto"])
def test_a_backend_asked_for_is_an_error_beyond_its_limits(modern, requested):
    limits = {"triton": "operator: width must be <= 512 there, got 513"}
    modern.setattr(backends, "DEFAULT_BACKEND", "triton")
    with pytest.raises(
        ValueError, match=r"^backend 'triton' cannot serve this call: operator: .* <= 512 there, got 513$"
    ):
        choose(requested, GPU, torch.float32, OPERATOR, limits)
    # What the backend cannot serve at all comes first: another size would not help.
    with pytest.raises(RuntimeError, match="its kernels take float32"):
        choose(requested, GPU, torch.float64, OPERATOR, limits)


@pytest.mark.parametrize("name", ["Triton", "cpu", "", None])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match=r"backend must be one of \('portable', 'triton', 'cuda', 'auto'\), got"):
        choose(name, CPU, torch.float32, OPERATOR)


@pytest.mark.parametrize(
    ("version", "reason"),
    [("3.5.1", "triton 3.5.1 is older than 3.6"), ("3.6.0", None), ("3.10.0+git1234", None), ("4.0", None)],
)
def test_triton_version(monkeypatch, version, reason):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert backends._triton_refusal() == reason


def test_triton_missing(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert backends._triton_refusal() == "triton is not installed"


def _no_kernels(monkeypatch, tmp_path, error: ImportError) -> None:
    def fail(name):
        assert name == "pyfused._C"
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "backend.py"))


def test_missing_kernels_are_explained_by_the_build(monkeypatch, tmp_path):
    _no_kernels(monkeypatch, tmp_path, ModuleNotFoundError("No module named 'pyfused._C'"))
    assert backends._cuda_refusal() == "this installation has no compiled kernels (pyfused._C)"
    (tmp_path / "_C.absent").write_text("nvcc was away\n")
    assert backends._cuda_refusal() == "this installation has no compiled kernels (pyfused._C): nvcc was away"


def test_kernels_that_do_not_load_are_no_error_at_import(monkeypatch, tmp_path):
    _no_kernels(monkeypatch, tmp_path, ImportError("undefined symbol: torch_library_impl"))
    expected = "its compiled kernels (pyfused._C) do not load: undefined symbol: torch_library_impl"
    assert backends._cuda_refusal() == expected


def test_library_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="no_library"):
        backends.load_cuda(tmp_path / "no_library.so")


def test_available_backends_agree_with_what_runs():
    reasons = available_backends()
    assert list(reasons) == list(backends.BACKENDS)
    assert reasons["portable"] is None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, reason in reasons.items():
        assert refusal(name, device, torch.float16) == reason
        if reason is None:
            operators = backends.CUDA_OPERATORS[device.type] if name == "cuda" else [OPERATOR]
            assert {choose(name, device, torch.float16, operator) for operator in operators} == {name}


def _fresh(code: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYFUSED_BACKEND", *variables)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment | variables, capture_output=True, text=True, timeout=120
    )


def test_environment_is_read_once_at_import():
    code = """
import os, torch, pyfused
from pyfused.backend import choose
cpu = torch.device("cpu")
print(choose("auto", torch.device("cuda"), torch.float32, "lora_linear", {}))
os.environ["PYFUSED_BACKEND"] = "triton"
print(choose("auto", cpu, torch.float32, "lora_linear", {}))
"""
    run = _fresh(code, PYFUSED_BACKEND="portable")
    assert run.stdout.split() == ["portable", "portable"], run.stderr


def test_environment_with_an_unknown_backend():
    assert _fresh("import pyfused; print(pyfused.backend.DEFAULT_BACKEND)", PYFUSED_BACKEND="").stdout == "auto\n"
    run = _fresh("import pyfused", PYFUSED_BACKEND="fast")
    assert run.returncode != 0
    assert "ValueError: PYFUSED_BACKEND must be one of" in run.stderr
    assert "got 'fast'" in run.stderr


def test_triton_refuses_cpu_tensors_when_it_is_not_interpreted():
    code = """
import torch, pyfused
x = torch.randn(2, 16)
pyfused.lora_linear(x, torch.randn(8, 16), torch.randn(4, 16), torch.randn(8, 4), backend="triton")
"""
    run = _fresh(code, TRITON_INTERPRET="0")
    assert "RuntimeError: backend 'triton' cannot serve torch.float32 tensors on cpu" in run.stderr
