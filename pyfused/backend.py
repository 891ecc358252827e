"""Which backends exist here, and which one serves a call.

A backend is a namespace of raw operators: ``portable`` (plain torch), ``triton`` and ``cuda`` (a compiled library).
``auto`` takes the first one of `preference` that does not refuse; a backend named explicitly is used or the call is an
error.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from pyfused.preference import preference

BACKENDS = ("portable", "triton", "cuda")
MIN_TRITON = (3, 6)
MIN_CAPABILITY = (8, 0)
# What kernels compute in, and the same in words.
KERNEL_DTYPES = {"triton": (torch.float32, torch.float16, torch.bfloat16), "cuda": (torch.float16, torch.bfloat16)}
_TAKEN = {"triton": "float32, float16 and bfloat16", "cuda": "float16 and bfloat16"}


def _triton_refusal() -> str | None:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed"
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TRITON:
        return f"triton {version} is older than {MIN_TRITON[0]}.{MIN_TRITON[1]}"
    return None


def _cuda_refusal() -> str | None:
    try:
        importlib.import_module("pyfused._C")
    except ModuleNotFoundError:
        # The build leaves word of why it made no library; a bare checkout has neither.
        record = Path(__file__).with_name("_C.absent")
        why = f": {record.read_text().strip()}" if record.exists() else ""
        return f"this installation has no compiled kernels (pyfused._C){why}"
    except ImportError as error:
        return f"its compiled kernels (pyfused._C) do not load: {error}"
    return None


def load_cuda(library: str | os.PathLike[str]) -> None:
    """Take kernels from a shared library beside `pyfused._C`, such as one built for an emulator.

    Raises:
        OSError: it cannot be loaded.
    """
    global CUDA_REFUSAL
    torch.ops.load_library(os.fspath(library))
    CUDA_REFUSAL = None
    CUDA_OPERATORS.update(_registered())


def _registered() -> dict[str, frozenset[str]]:
    """Device type -> operators that a library has registered for it, in both directions."""
    found = {}
    for key in ("CPU", "CUDA"):
        names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
        own = {name.removeprefix("pyfused_cuda::") for name in names if name.startswith("pyfused_cuda::")}
        forward = {name.removesuffix("_fwd") for name in own if name.endswith("_fwd")}
        found[key.lower()] = frozenset(operator for operator in forward if f"{operator}_bwd" in own)
    return found


def _default_backend() -> str:
    # An empty variable is how many shells and job files unset one.
    name = os.environ.get("PYFUSED_BACKEND") or "auto"
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"PYFUSED_BACKEND must be one of {(*BACKENDS, 'auto')}, got {name!r}")
    return name


# Read once: none of these changes under a running program but by `load_cuda`, and traced code must see constants.
TRITON_REFUSAL = _triton_refusal()
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA_REFUSAL = _cuda_refusal()
# Device type -> the operators that have CUDA C++ kernels there.
CUDA_OPERATORS = _registered()
DEFAULT_BACKEND = _default_backend()


def refusal(backend: str, device: torch.device, dtype: torch.dtype, operator: str | None = None) -> str | None:
    """Why ``backend`` cannot serve tensors of this device and dtype; None when it can.

    Not every operator has CUDA C++ kernels: without ``operator`` the answer is for those that have.
    """
    if backend == "portable":
        return None
    missing = TRITON_REFUSAL if backend == "triton" else CUDA_REFUSAL
    if missing is not None:
        return missing
    if dtype not in KERNEL_DTYPES[backend]:
        return f"its kernels take {_TAKEN[backend]}, not {dtype}"
    if backend == "triton" and device.type == "cpu":
        return None if TRITON_INTERPRETED else "a CPU tensor needs TRITON_INTERPRET=1, set before Python starts"
    operators = CUDA_OPERATORS.get(device.type, frozenset())
    served = bool(operators) if backend == "cuda" else device.type == "cuda"
    if not served:
        return f"it has no kernels for device type {device.type!r}"
    if backend == "cuda" and operator is not None and operator not in operators:
        return f"it has no kernels for {operator}"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            return f"it needs compute capability {MIN_CAPABILITY}, {device} has {capability}"
    return None


def has_cuda_kernels(operator: str, device: torch.device) -> bool:
    """Whether a library has CUDA C++ kernels of ``operator`` for tensors there, on a GPU or emulated."""
    return operator in CUDA_OPERATORS.get(device.type, ())


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block can have; where there is no GPU, what an H100 or H200 has."""
    if device.type != "cuda":
        return 232_448
    # torch's type stubs lack it.
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def choose(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    operator: str,
    sizes: Mapping[str, float],
    limits: Mapping[str, str] | None = None,
) -> str:
    """The backend that serves this call; ``sizes`` are `preference`'s, and ``limits`` says for each backend that the
    call itself is beyond, why.

    Raises ``ValueError`` for an unknown name or one in ``limits``, and ``RuntimeError``, listing each backend's reason,
    when an explicitly named one cannot serve such tensors: a request never falls back.
    """
    if requested not in BACKENDS and requested != "auto":
        raise ValueError(f"backend must be one of {(*BACKENDS, 'auto')}, got {requested!r}")
    limits = limits or {}
    wanted = DEFAULT_BACKEND if requested == "auto" else requested
    if wanted != "auto":
        if refusal(wanted, device, dtype, operator) is not None:
            raise RuntimeError(
                f"backend {wanted!r} cannot serve {dtype} tensors on {device}: " + _refusals(device, dtype, operator)
            )
        if wanted in limits:
            raise ValueError(f"backend {wanted!r} cannot serve this call: {limits[wanted]}")
        return wanted
    # The interpreter and the emulator are for tests: they serve CPU tensors only when they are asked by name.
    if device.type != "cuda":
        return "portable"
    for backend in preference(operator, device, dtype, sizes)[0]:
        if backend not in limits and refusal(backend, device, dtype, operator) is None:
            return backend
    raise AssertionError("portable refuses nothing")


def _refusals(device: torch.device, dtype: torch.dtype, operator: str) -> str:
    reasons = ((name, refusal(name, device, dtype, operator)) for name in BACKENDS)
    return "; ".join(f"{name}: {reason or 'available'}" for name, reason in reasons)


def available_backends() -> dict[str, str | None]:
    """Backend name -> None when it can be used on this machine, else the reason why not.

    >>> available_backends()["portable"] is None
    True
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # In float16, which every backend takes.
    return {name: refusal(name, device, torch.float16) for name in BACKENDS}
