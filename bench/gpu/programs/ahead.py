"""Compiles the Triton kernels of many calls before the first of them runs, on all cores, without touching a GPU.

Triton compiles a kernel where it is first launched, in that process and while the GPU waits. Here the calls are made on
meta tensors, their launches recorded, and what Triton would compile for each is compiled in processes of their own,
into the cache on disk in which the launch then looks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyfused.kernels import audit, launch
from pyfused.kernels.launch import Mat
from pyfused.kernels.recording import Launch, Target, record
from pyfused.ops.contract import registry
from pyfused.ops.lora_linear import triton_plan

Key = tuple[str, ...]


class _Launching(TorchDispatchMode):
    """Answers the raw calls of backend "portable" by Triton's launchers; ``plan`` is that of `lora_linear`."""

    def __init__(self, plan: str) -> None:
        super().__init__()
        self._plan = plan

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "pyfused_portable":
            return func(*args, **(kwargs or {}))
        name = func._schema.name.rpartition("::")[2]
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=True))
        if "plan" in given:
            # The portable backend has one plan, and so tells nothing of Triton's.
            given["plan"] = self._plan
            if self._plan == "auto":
                given["plan"] = triton_plan(name, given, launch.target(args[0].device).capability)
        home = registry.homes[name]
        launcher = getattr(importlib.import_module(f"pyfused.kernels.{home}"), f"{home}_{name.rpartition('_')[2]}")
        return launcher(**given)


def launching(call: Callable[[], object], plan: str = "auto") -> Callable[[], object]:
    """``call`` with its kernels launched by Triton's launchers.

    Args:
        call: calls public operators, with ``backend="portable"`` and on meta tensors, and may differentiate.
        plan: of `lora_linear`, where the call leaves it to "auto".
    """

    def run() -> object:
        with _Launching(plan):
            return call()

    return run


def specialisations(calls: Iterable[Callable[[], object]], target: Target) -> dict[Key, Launch]:
    """What Triton compiles for these calls on such a GPU: a launch for each of its specialisations.

    Args:
        calls: each makes launches through `pyfused.kernels.launch`, on meta tensors.
        target: the GPU.

    Raises:
        RuntimeError: Triton interprets kernels in this process, and specialises nothing.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("with TRITON_INTERPRET=1 kernels are interpreted: nothing is compiled")
    found: dict[Key, Launch] = {}
    for call in calls:
        with record(target) as launches:
            call()
        for made in launches:
            found.setdefault(audit.specialisation(made, target).key, made)
    return found


@dataclass
class Ahead:
    """What became of compiling ahead.

    Attributes:
        compiled: specialisations that are in Triton's cache now.
        failed: (kernel, why one of its specialisations is not).
        unfinished: specialisations that there was no time for.
        seconds: it took.
    """

    compiled: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    unfinished: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        parts = [f"{self.compiled} kernels compiled ahead in {self.seconds:.1f} s"]
        parts += [f"{self.unfinished} not reached"] if self.unfinished else []
        return ", ".join([*parts, *(f"{kernel} does not compile: {why}" for kernel, why in self.failed)])


def compile_ahead(launches: Mapping[Key, Launch], target: Target, workers: int, seconds: float) -> Ahead:
    """Compiles each launch for ``target``, in ``workers`` processes and at most about ``seconds``.

    A compiler that fails, or dies, costs that kernel alone.
    """
    result, began = Ahead(), time.monotonic()
    deadline, lock = began + seconds, threading.Lock()
    items = iter(list(launches.values()))

    def work() -> None:
        with contextlib.ExitStack() as stack:
            worker = None
            while time.monotonic() < deadline:
                with lock:
                    launch = next(items, None)
                if launch is None:
                    return
                worker = worker or stack.enter_context(_Worker())
                reason = worker.compile(_packed(launch), target, deadline)
                with lock:
                    if reason is None:
                        result.compiled += 1
                    elif reason:
                        result.failed.append((_name(launch), reason))
                if not worker.alive:
                    worker = None

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(launches)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    result.unfinished = len(launches) - result.compiled - len(result.failed)
    result.seconds = time.monotonic() - began
    return result


def _name(launch: Launch) -> str:
    """The kernel, with what most often decides whether it compiles."""
    blocks = (f"{name}={value}" for name, value in launch.arguments.items() if name.startswith("BLOCK"))
    dtypes = {tensor.dtype: None for tensor in launch.tensors}
    shown = "+".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{launch.kernel.__name__} {shown} {' '.join(blocks)} {launch.num_warps} warps {launch.num_stages} stages"


class _Worker:
    """A process that compiles. It starts afresh and not as a copy: a copy would hold this one's CUDA context."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self.alive = True

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def compile(self, packed: _Packed, target: Target, deadline: float) -> str | None:
        """None when it is done, why it is not, or "" when time was out."""
        try:
            self._connection.send((packed, target))
            if self._connection.poll(max(0.0, deadline - time.monotonic())):
                return self._connection.recv()
            self.alive = False
            return ""
        except (EOFError, OSError):
            self.alive = False
            self._process.join()
            return f"the compiler ended with exit status {self._process.exitcode}"


@dataclass(frozen=True)
class _Pointer:
    """What Triton asks of a tensor that a kernel gets: all that a process that only compiles needs of it."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class _Packed:
    """A launch without what does not travel between processes: tensors and the compiled function."""

    module: str
    file: str
    launch: Launch


def _packed(launch: Launch) -> _Packed:
    def packed(value: Any) -> Any:
        if isinstance(value, Mat):
            return value._replace(ptr=packed(value.ptr))
        return _Pointer(value.dtype, value.data_ptr() % 16) if isinstance(value, Tensor) else value

    arguments = {name: packed(value) for name, value in launch.arguments.items()}
    module = sys.modules[launch.kernel.__module__]
    return _Packed(
        module.__name__, str(module.__file__),
        dataclasses.replace(launch, kernel=launch.kernel.__name__, arguments=arguments),
    )  # fmt: skip


def loaded(name: str, file: str) -> ModuleType:
    """The module of this name, out of ``file`` where Python's path does not have it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python module")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[name])
    except BaseException:
        del sys.modules[name]
        raise
    return sys.modules[name]


def _serve(connection: Connection) -> None:
    while True:
        try:
            packed, target = connection.recv()
        except EOFError:
            return
        connection.send(_compile(packed, target))


def _compile(packed: _Packed, target: Target) -> str | None:
    try:
        kernel = getattr(loaded(packed.module, packed.file), packed.launch.kernel)
        compiled = audit.specialisation(dataclasses.replace(packed.launch, kernel=kernel), target).compile()
        _make_launcher(compiled)
    except Exception as error:
        # The compiler's own failure is a finding like any other.
        return " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return None


def _make_launcher(compiled) -> None:
    """Up to Triton 3.6 each signature has a launcher in C, which gcc compiles into the same cache."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        driver.CudaLauncher(compiled.src, compiled.metadata)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects the kernels that Triton compiles inside, in this process: those that its cache does not have."""
    found: list[str] = []
    before = triton.knobs.compilation.listener

    def listener(*, src, metadata, metadata_group, times, cache_hit) -> None:
        if not cache_hit:
            found.append(src.name)
        if before is not None:
            before(src=src, metadata=metadata, metadata_group=metadata_group, times=times, cache_hit=cache_hit)

    triton.knobs.compilation.listener = listener
    try:
        yield found
    finally:
        triton.knobs.compilation.listener = before
