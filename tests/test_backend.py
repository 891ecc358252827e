from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import pytest
import torch

from pyfused import backend as backends
from pyfused.backend import available_backends, choose, refusal

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def modern(monkeypatch):
    """A machine with a current triton and an H100, whatever this one has; no CUDA C++ kernels."""
    monkeypatch.setattr(backends, "TRITON_REFUSAL", None)
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", False)
    monkeypatch.setattr(backends, "CUDA_REFUSAL", "this build has no CUDA C++ kernels")
    monkeypatch.setattr(backends, "DEFAULT_BACKEND", "auto")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return monkeypatch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_auto_takes_the_first_backend_that_does_not_refuse(modern, dtype):
    assert choose("auto", GPU, dtype) == "triton"
    modern.setattr(backends, "CUDA_REFUSAL", None)
    assert choose("auto", GPU, dtype) == "cuda"
    modern.setattr(backends, "CUDA_REFUSAL", "no")
    modern.setattr(backends, "TRITON_REFUSAL", "no")
    assert choose("auto", GPU, dtype) == "portable"


def test_auto_serves_float64_old_gpus_and_other_devices_portably(modern):
    assert choose("auto", GPU, torch.float64) == "portable"
    assert choose("auto", torch.device("meta"), torch.float32) == "portable"
    modern.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert choose("auto", GPU, torch.float32) == "portable"
    assert refusal("triton", GPU, torch.float32) == "it needs compute capability (8, 0), cuda:0 has (7, 5)"


def test_interpreter_serves_cpu_tensors_only_by_name(modern):
    modern.setattr(backends, "TRITON_INTERPRETED", True)
    assert choose("auto", CPU, torch.float32) == "portable"
    assert choose("triton", CPU, torch.float32) == "triton"


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "reason"),
    [
        ("triton", CPU, torch.float32, "triton: a CPU tensor needs TRITON_INTERPRET=1, set before Python starts"),
        ("triton", GPU, torch.float64, "triton: its kernels take float32, float16 and bfloat16, not torch.float64"),
        ("triton", torch.device("meta"), torch.float32, "triton: it has no kernels for device type 'meta'"),
        ("cuda", GPU, torch.float32, "cuda: this build has no CUDA C\\+\\+ kernels"),
    ],
)
def test_explicit_request_never_falls_back(modern, requested, device, dtype, reason):
    with pytest.raises(RuntimeError, match=f"backend '{requested}' cannot serve") as error:
        choose(requested, device, dtype)
    assert error.match(reason)
    # Every backend is accounted for, the ones that could have served included.
    assert error.match("portable: available")
    assert all(f"{name}: " in str(error.value) for name in backends.BACKENDS)


def test_default_backend_never_falls_back_either(modern):
    modern.setattr(backends, "DEFAULT_BACKEND", "triton")
    assert choose("auto", GPU, torch.float32) == "triton"
    assert choose("portable", GPU, torch.float32) == "portable"
    with pytest.raises(RuntimeError, match="backend 'triton' cannot serve"):
        choose("auto", CPU, torch.float32)


def test_a_call_beyond_a_backends_limits_goes_to_the_next(modern):
    limits = {"triton": "operator: width must be <= 512 there, got 513"}
    assert choose("auto", GPU, torch.float32, limits) == "portable"
    assert choose("auto", GPU, torch.float32, {}) == "triton"
    assert choose("portable", GPU, torch.float32, limits) == "portable"
    modern.setattr(backends, "CUDA_REFUSAL", None)
    assert choose("auto", GPU, torch.float32, limits) == "cuda"
    assert choose("auto", GPU, torch.float32, limits | {"cuda": "no"}) == "portable"


@pytest.mark.parametrize("requested", ["triton", "auto"])
def test_a_backend_asked_for_is_an_error_beyond_its_limits(modern, requested):
    limits = {"triton": "operator: width must be <= 512 there, got 513"}
    modern.setattr(backends, "DEFAULT_BACKEND", "triton")
    with pytest.raises(
        ValueError, match=r"^backend 'triton' cannot serve this call: operator: .* <= 512 there, got 513$"
    ):
        choose(requested, GPU, torch.float32, limits)
    # What the backend cannot serve at all comes first: another size would not help.
    with pytest.raises(RuntimeError, match="its kernels take float32"):
        choose(requested, GPU, torch.float64, limits)


@pytest.mark.parametrize("name", ["Triton", "cpu", "", None])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match=r"backend must be one of \('portable', 'triton', 'cuda', 'auto'\), got"):
        choose(name, CPU, torch.float32)


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


def test_available_backends_agree_with_what_runs():
    reasons = available_backends()
    assert list(reasons) == list(backends.BACKENDS)
    assert reasons["portable"] is None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, reason in reasons.items():
        assert refusal(name, device, torch.float32) == reason
        if reason is None:
            assert choose(name, device, torch.float32) == name


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
print(choose("auto", torch.device("cuda"), torch.float32))
os.environ["PYFUSED_BACKEND"] = "triton"
print(choose("auto", cpu, torch.float32))
"""
    run = _fresh(code, PYFUSED_BACKEND="portable")
    assert run.stdout.split() == ["portable", "portable"], run.stderr


def test_environment_with_an_unknown_backend():
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
