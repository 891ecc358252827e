"""Which backends exist here, and which one serves a call.

A backend is a namespace of raw operators: ``portable`` (plain torch), ``triton`` and ``cuda``. ``auto`` takes the
first one in ``PREFERENCE`` that does not refuse; a backend named explicitly is used or the call is an error.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping

import torch

BACKENDS = ("portable", "triton", "cuda")
PREFERENCE = ("cuda", "triton", "portable")
MIN_TRITON = (3, 6)
MIN_CAPABILITY = (8, 0)
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _triton_refusal() -> str | None:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed"
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TRITON:
        return f"triton {version} is older than {MIN_TRITON[0]}.{MIN_TRITON[1]}"
    return None


def _default_backend() -> str:
    name = os.environ.get("PYFUSED_BACKEND", "auto")
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"PYFUSED_BACKEND must be one of {(*BACKENDS, 'auto')}, got {name!r}")
    return name


# Read once: none of these can change under a running program, and traced code must see constants.
TRITON_REFUSAL = _triton_refusal()
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA_REFUSAL: str | None = "this build has no CUDA C++ kernels"
DEFAULT_BACKEND = _default_backend()


def refusal(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot serve tensors of this device and dtype; None when it can."""
    if backend == "portable":
        return None
    missing = TRITON_REFUSAL if backend == "triton" else CUDA_REFUSAL
    if missing is not None:
        return missing
    if dtype not in KERNEL_DTYPES:
        return f"its kernels take float32, float16 and bfloat16, not {dtype}"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            return f"it needs compute capability {MIN_CAPABILITY}, {device} has {capability}"
        return None
    if backend == "triton" and device.type == "cpu":
        return None if TRITON_INTERPRETED else "a CPU tensor needs TRITON_INTERPRET=1, set before Python starts"
    return f"it has no kernels for device type {device.type!r}"


def choose(requested: str, device: torch.device, dtype: torch.dtype, limits: Mapping[str, str] | None = None) -> str:
    """The backend that serves this call; ``limits`` says for each backend that the call itself is beyond, why.

    Raises ``ValueError`` for an unknown name or one in ``limits``, and ``RuntimeError``, listing each backend's reason,
    when an explicitly named one cannot serve such tensors: a request never falls back.
    """
    if requested not in BACKENDS and requested != "auto":
        raise ValueError(f"backend must be one of {(*BACKENDS, 'auto')}, got {requested!r}")
    limits = limits or {}
    wanted = DEFAULT_BACKEND if requested == "auto" else requested
    if wanted != "auto":
        if refusal(wanted, device, dtype) is not None:
            raise RuntimeError(
                f"backend {wanted!r} cannot serve {dtype} tensors on {device}: " + _refusals(device, dtype)
            )
        if wanted in limits:
            raise ValueError(f"backend {wanted!r} cannot serve this call: {limits[wanted]}")
        return wanted
    # The interpreter is for tests: it serves CPU tensors only when it is asked by name.
    if device.type != "cuda":
        return "portable"
    for backend in PREFERENCE:
        if backend not in limits and refusal(backend, device, dtype) is None:
            return backend
    raise AssertionError("portable refuses nothing")


def _refusals(device: torch.device, dtype: torch.dtype) -> str:
    reasons = ((name, refusal(name, device, dtype)) for name in BACKENDS)
    return "; ".join(f"{name}: {reason or 'available'}" for name, reason in reasons)


def available_backends() -> dict[str, str | None]:
    """Backend name -> None when it can be used on this machine, else the reason why not.

    >>> available_backends()["portable"] is None
    True
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {name: refusal(name, device, torch.float32) for name in BACKENDS}
