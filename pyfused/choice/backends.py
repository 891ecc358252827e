"""Which backends exist here, and which one serves a call.

A backend is a namespace of raw operators: ``portable`` (plain torch), ``triton``, and ``cuda`` and ``cpu``, a compiled
library each.
``auto`` asks `order` which of those that do not refuse a call is to serve it; a backend named explicitly is used or the
call is an error.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pyfused.choice import cache, measured, order
from pyfused.choice.order import Candidates, Choice

BACKENDS = ("portable", "triton", "cuda", "cpu")
MIN_TRITON = (3, 6)
MIN_CAPABILITY = (8, 0)
# What kernels compute in, and the same in words.
KERNEL_DTYPES = {
    "triton": (torch.float32, torch.float16, torch.bfloat16),
    "cuda": (torch.float16, torch.bfloat16),
    "cpu": (torch.float32, torch.float16, torch.bfloat16),
}
_TAKEN = {
    "triton": "float32, float16 and bfloat16",
    "cuda": "float16 and bfloat16",
    "cpu": "float32, float16 and bfloat16",
}


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
        library = importlib.import_module("pyfused._C")
    except ModuleNotFoundError:
        return _not_built("_C")
    except ImportError as error:
        return f"its compiled kernels (pyfused._C) do not load: {error}"
    if not hasattr(library, "probe"):
        return "its compiled kernels (pyfused._C) are older than this version: they have to be built again"
    return None


def _cpu_refusal() -> str | None:
    # No Python module: its operators are all that there is to it.
    path = next(Path(__file__).parent.parent.glob("_cpu.*so"), None)
    if path is None:
        return _not_built("_cpu")
    try:
        load_cpu(path)
    except OSError as error:
        return f"its compiled kernels (pyfused._cpu) do not load: {error.__cause__ or error}"
    except AttributeError:
        return "its compiled kernels (pyfused._cpu) are of another version: they have to be built again"
    return None


def load_cpu(path: str | os.PathLike[str]) -> None:
    """Take kernels for CPUs from a shared library.

    Raises:
        OSError: it cannot be loaded.
        AttributeError: it is of another version of pyfused.
    """
    global CPU_LIBRARY
    torch.ops.load_library(os.fspath(path))
    library = ctypes.CDLL(os.fspath(path))
    for function in (library.pyfused_cpu_instruction_set, library.pyfused_cpu_build_info):
        function.restype = ctypes.c_char_p
    CPU_LIBRARY = library


def cpu_instruction_set() -> str:
    """The one whose kernels the library takes on this machine: "avx512", "avx2" or "baseline"; "" without a library."""
    return CPU_LIBRARY.pyfused_cpu_instruction_set().decode() if CPU_LIBRARY is not None else ""


def cpu_build_info() -> dict[str, Any]:
    """What the library was built with: compiler, instruction sets, torch."""
    return json.loads(CPU_LIBRARY.pyfused_cpu_build_info()) if CPU_LIBRARY is not None else {}


def _not_built(library: str) -> str:
    # The build leaves word of why it made no library; a bare checkout has neither.
    record = Path(__file__).parent.with_name(f"{library}.absent")
    why = f": {record.read_text().strip()}" if record.exists() else ""
    return f"this installation has no compiled kernels (pyfused.{library}){why}"


def load_cuda(library: str | os.PathLike[str]) -> None:
    """Take kernels from a shared library beside `pyfused._C`, such as one built for an emulator.

    Raises:
        OSError: it cannot be loaded.
    """
    global CUDA_REFUSAL
    torch.ops.load_library(os.fspath(library))
    CUDA_REFUSAL = None
    CUDA_OPERATORS.update(_registered("cuda"))
    measured.changed()


def _registered(backend: str) -> dict[str, frozenset[str]]:
    """Device type -> operators that a backend's library has registered for it, in both directions."""
    found, namespace = {}, f"pyfused_{backend}::"
    for key in ("CPU", "CUDA"):
        names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
        own = {name.removeprefix(namespace) for name in names if name.startswith(namespace)}
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
CPU_LIBRARY: ctypes.CDLL | None = None
CPU_REFUSAL = _cpu_refusal()
# Why "auto" leaves the C++ kernels for CPUs alone; "" where it does not. With narrow vectors they were never measured.
CPU_BY_NAME = (
    "" if cpu_instruction_set() != "baseline" else "on a CPU without AVX2 it is plain code, and used only by name"
)
# Device type -> the operators that have CUDA C++ kernels there.
CUDA_OPERATORS = _registered("cuda")
# Those that have C++ kernels for CPUs: of a mixed batch's `lora_linear` for the low-rank terms.
CPU_OPERATORS = frozenset({"low_rank": "mixed_lora_linear"}.get(name, name) for name in _registered("cpu")["cpu"])
DEFAULT_BACKEND = _default_backend()
measured.use(cache.rows())
# Index of a GPU -> why `pyfused._C` does not run there; those that it has been launched on.
_PROBED: dict[int, str | None] = {}


def refusal(backend: str, device: torch.device, dtype: torch.dtype, operator: str | None = None) -> str | None:
    """Why ``backend`` cannot serve tensors of this device and dtype; None when it can.

    Not every operator has kernels in a compiled library: without ``operator`` the answer is for those that have.
    """
    if backend == "portable":
        return None
    missing = {"triton": TRITON_REFUSAL, "cuda": CUDA_REFUSAL, "cpu": CPU_REFUSAL}[backend]
    if missing is not None:
        return missing
    if dtype not in KERNEL_DTYPES[backend]:
        return f"its kernels take {_TAKEN[backend]}, not {dtype}"
    if backend == "triton" and device.type == "cpu":
        return None if TRITON_INTERPRETED else "a CPU tensor needs TRITON_INTERPRET=1, set before Python starts"
    if backend == "triton":
        served = device.type == "cuda"
    else:
        operators = _operators(backend, device)
        served = bool(operators)
    if not served:
        return f"it has no kernels for device type {device.type!r}"
    if backend != "triton" and operator is not None and operator not in operators:
        return f"it has no kernels for {operator}"
    return _gpu_refusal(backend, device) if device.type == "cuda" else None


def _operators(backend: str, device: torch.device) -> frozenset[str]:
    """Those that a backend's library has kernels for."""
    if backend == "cpu":
        return CPU_OPERATORS if device.type == "cpu" else frozenset()
    return CUDA_OPERATORS.get(device.type, frozenset())


def _absence(device: torch.device) -> str | None:
    """Why torch has no such GPU."""
    if torch.cuda.is_initialized() and (device.index or 0) < torch.cuda.device_count():
        return None
    try:
        torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError) as error:
        # A torch without CUDA, no driver or one too old for torch, no such index.
        return f"torch has no {device} here: {str(error).partition('. ')[0].rstrip('.')}"
    return None


def _gpu_refusal(backend: str, device: torch.device) -> str | None:
    """Why none of the backend's kernels run on this GPU; None where they do."""
    absent = _absence(device)
    if absent is not None:
        return absent
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"it needs compute capability {MIN_CAPABILITY}, {device} has {capability}"
    # What `load_cuda` took is no Python module, and not asked.
    if backend != "cuda" or "pyfused._C" not in sys.modules:
        return None
    return _unfit(capability) or _launch_refusal(device)


# Traced code takes their answers for constants. This is all that torch.compiler.assume_constant_result does, but that
# loads the compiler.
for _function in (_absence, _gpu_refusal):
    vars(_function)["_dynamo_marked_constant"] = True


def code_for(capability: tuple[int, int], targets: Sequence[str]) -> str | None:
    """Which of ``targets`` a GPU of this compute capability runs; None where there is none for it.

    Machine code (``sm_XX``) of the same major and at most the same minor number, or else PTX (``compute_XX``) of any
    capability up to this one, which the driver compiles.
    """
    found = {target: divmod(int(target.partition("_")[2]), 10) for target in targets}
    machine = [
        name for name, (major, minor) in found.items()
        if name.startswith("sm_") and major == capability[0] and minor <= capability[1]
    ]  # fmt: skip
    ptx = [name for name, least in found.items() if name.startswith("compute_") and least <= capability]
    return max(machine or ptx, key=found.__getitem__, default=None)


@functools.cache
def _unfit(capability: tuple[int, int]) -> str | None:
    """Why the driver here, or a GPU of this compute capability, cannot run what `pyfused._C` was built for."""
    library = sys.modules["pyfused._C"]
    driver, runtime = library.versions()
    if driver == 0:
        return "there is no CUDA driver here"
    # Any minor version of the same major one serves.
    if driver // 1000 < runtime // 1000:
        old, new = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, runtime))
        return f"the CUDA driver {old} is older than the runtime {new} that its library was built with"
    targets = json.loads(library.build_info())["targets"]
    if code_for(capability, targets) is None:
        given = ".".join(map(str, capability))
        return f"its library has no code for this GPU: it was built for {', '.join(targets)}; the device has {given}"
    return None


def _launch_refusal(device: torch.device) -> str | None:
    """Why an empty kernel of `pyfused._C` does not run on this GPU; launched once for each.

    A launch and not only a look at the kernel's attributes: that loads the code, and would miss a GPU that takes no
    work. While the current stream is being captured the answer is not sought, for the graph's sake: what the library
    was built for has to do until the next call.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _PROBED:
        if torch.cuda.is_current_stream_capturing():
            return None
        with torch.cuda.device(index):
            message = sys.modules["pyfused._C"].probe()
        reason = None if message is None else f"an empty kernel of its library failed there: {message}"
        if reason is not None and "cudaErrorMemoryAllocation" in reason:
            # A GPU that is full now may not be later.
            return reason
        _PROBED[index] = reason
    return _PROBED[index]


def has_cuda_kernels(operator: str, device: torch.device) -> bool:
    """Whether a library has CUDA C++ kernels of ``operator`` for tensors there, on a GPU or emulated."""
    return operator in CUDA_OPERATORS.get(device.type, ())


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block can have; where there is no GPU, what an H100 or H200 has."""
    if device.type != "cuda" or _absence(device) is not None:
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
    plans: Candidates | None = None,
    first: str = "",
) -> Choice:
    """The backend that serves this call, and the plan of each direction.

    ``sizes`` are `order.choose`'s, and ``limits`` says for each backend that the call itself is beyond, why. ``plans``:
    backend -> the plans that may serve the call there, none where it lacks the one asked for; None (the default) for an
    operator whose plans do not differ in time. ``first``: what "auto" takes where it can serve the call, by a row that
    was measured for more than these sizes; "" (the default) for none.

    Raises ``ValueError`` for an unknown name or one in ``limits``, and ``RuntimeError``, listing each backend's reason,
    when an explicitly named one cannot serve such tensors: a request never falls back.
    """
    if requested not in BACKENDS and requested != "auto":
        raise ValueError(f"backend must be one of {(*BACKENDS, 'auto')}, got {requested!r}")
    limits = limits or {}
    wanted = DEFAULT_BACKEND if requested == "auto" else requested
    if wanted != "auto":
        if refusal(wanted, device, dtype, operator) is not None:
            reasons = _refusals(device, dtype, operator)
            # Where it serves such tensors, it is the operator that it lacks: the call may know of a way out.
            if wanted in limits and refusal(wanted, device, dtype) is None:
                reasons += f"; {limits[wanted]}"
            raise RuntimeError(f"backend {wanted!r} cannot serve {dtype} tensors on {device}: {reasons}")
        if wanted in limits:
            raise ValueError(f"backend {wanted!r} cannot serve this call: {limits[wanted]}")
        candidates: Candidates = {wanted: (plans or NO_PLANS)[wanted]}
    else:
        candidates = available(device, dtype, operator, limits, plans)
        if first in candidates:
            candidates = {first: candidates[first]}
    return planned(operator, device, dtype, sizes, candidates)


def planned(
    operator: str, device: torch.device, dtype: torch.dtype, sizes: Mapping[str, float], candidates: Candidates
) -> Choice:
    """Of the backends that can serve a call, and their plans, what does; arguments as `order.choose` has them."""
    first, *more = candidates
    given = candidates[first] or ("",)
    if not more and (device.type == "cpu" or len(given) == 1):
        # Nothing to choose; or interpreted, where the plan that is given first is the cheapest to interpret.
        return Choice(first, given[0], given[0])
    if device.type != "cpu":
        return order.choose(operator, device, dtype, sizes, candidates)
    found, left = order.by_row(operator, device, dtype, sizes, candidates)
    if "cpu" in left and len(left) > 1 and order.slow_on_a_cpu(sizes):
        left = {name: each for name, each in left.items() if name != "cpu"}
    first, given = next(iter(left.items()))
    return found or Choice(first, given[0], given[0])


def measured_plan(
    requested: str, operator: str, device: torch.device, dtype: torch.dtype, sizes: Mapping[str, float]
) -> tuple[Choice, measured.Row] | None:
    """As `order.measured_plan`; ``requested`` is the call's backend."""
    # Fake tensors can be on a GPU where there is none.
    if not measured.TABLE.rows or device.type not in ("cpu", "cuda") or (device.type == "cuda" and _absence(device)):
        return None
    wanted = DEFAULT_BACKEND if requested == "auto" else requested
    return order.measured_plan(operator, device, dtype, sizes, wanted)


# Of an operator whose plans do not differ in time.
NO_PLANS: Candidates = dict.fromkeys(BACKENDS, ("",))


def available(
    device: torch.device,
    dtype: torch.dtype,
    operator: str,
    limits: Mapping[str, str],
    plans: Candidates | None = None,
) -> Candidates:
    """The backends that "auto" chooses from for this call, and their plans; arguments as `choose` has them."""
    plans = plans or NO_PLANS
    # The interpreter and the emulator are for tests: they serve CPU tensors only when they are asked by name. Fake
    # tensors can be on a GPU where there is none.
    if not CPU_BY_NAME and "cpu" not in limits and refusal("cpu", device, dtype, operator) is None:
        return {"cpu": plans["cpu"], "portable": plans["portable"]}
    if device.type != "cuda" or _absence(device) is not None:
        return {"portable": plans["portable"]}
    found = {
        name: plans[name] for name in ("cuda", "triton", "portable")
        if plans[name] and name not in limits and refusal(name, device, dtype, operator) is None
    }  # fmt: skip
    # Where no backend has the plan asked for, the operator says so of the one that refuses no other.
    return found or {"portable": plans["portable"]}


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
    return {name: refusal(name, torch.device("cpu") if name == "cpu" else device, torch.float16) for name in BACKENDS}
