"""In processes of their own: torch and Triton believe in one GPU, whose driver is the stub.

Triton's JIT, binder and C launcher are the real ones. Meta tensors stand for those on the GPU: they have shapes,
strides and offsets, no memory, and cost nothing at any size. Only these processes have anything replaced.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import copy
import ctypes
import dataclasses
import functools
import importlib
import json
import os
import pkgutil
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

DEVICE = "meta"


@dataclass(frozen=True)
class Specialisation:
    """One compilation.

    Attributes:
        kernel: its name.
        key: what Triton tells it from the kernel's other compilations by.
        arguments: the same in words, by argument: types, what is known of its value, and the options.
    """

    kernel: str
    key: str
    arguments: dict[str, str]

    def difference(self, others: Iterable[Specialisation]) -> list[str]:
        """ "argument: there -> here" of each argument in which the most similar of ``others`` is another; of a kernel's
        first compilation nothing."""
        found = [
            [f"{name}: {other.arguments.get(name)} -> {value}" for name, value in self.arguments.items()
             if other.arguments.get(name) != value]
            for other in others if other.kernel == self.kernel
        ]  # fmt: skip
        return min(found, key=len, default=[])


@dataclass
class Watched:
    """What happened inside `watch`: kernels started, in order; compilations; launches that a driver would refuse."""

    launches: list[str] = field(default_factory=list)
    compiled: list[Specialisation] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


# Of the whole process; `watch` hands out what was added. "entered": launches that Triton's launcher was asked for.
_all = Watched()
_entered: list[str] = []


@contextlib.contextmanager
def watch() -> Iterator[Watched]:
    """What kernels do inside."""
    seen = Watched()
    before = {name: len(getattr(_all, name)) for name in ("launches", "compiled", "faults")}
    asked = len(_entered)
    try:
        yield seen
    finally:
        for name, start in before.items():
            getattr(seen, name).extend(getattr(_all, name)[start:])
        # Triton's launcher starts nothing, without a word, where the grid's size overflows an int.
        lost = collections.Counter(_entered[asked:]) - collections.Counter(seen.launches)
        seen.faults += [f"{kernel}: {count} launches never reached the driver" for kernel, count in lost.items()]


def compiled_by(function: Callable[[], object]) -> list[Specialisation]:
    """The compilations that ``function`` asks for in a process that has compiled nothing."""
    forget()
    with watch() as seen:
        function()
    return seen.compiled


def forget() -> None:
    """Every kernel is compiled anew when it next starts; no program of one is left."""
    importlib.import_module("pyfused.choice.measured").changed()
    for kernel in kernels():
        kernel.device_caches.clear()


def kernels() -> list:
    """Every kernel of pyfused, as Triton's ``JITFunction``."""
    from triton.runtime.jit import JITFunction

    import pyfused.kernels

    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.iter_modules(pyfused.kernels.__path__, "pyfused.kernels.")
    ]
    found = {
        id(value): value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)
    }
    return [kernel for kernel in found.values() if kernel.__name__.endswith("_kernel")]


def start(libcuda: str, compiling: bool) -> None:
    """Put the stub in a GPU's place, whose facts the environment holds; not ``compiling``, every kernel's machine code
    is that of one which does nothing."""
    driver = ctypes.CDLL(libcuda, mode=ctypes.RTLD_GLOBAL)
    driver.stub_report_to(_report)
    # torchvision registers shapes for compiled operators that it lacks beside a CPU build of torch.
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    capability = int(os.environ["STUB_CAPABILITY"])
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    import triton
    from triton import knobs
    from triton.backends.nvidia.driver import CudaDriver

    triton.runtime.driver.set_active(CudaDriver())
    knobs.runtime.launch_enter_hook.add(lambda launch: _entered.append(launch.get()["name"]))
    knobs.runtime.jit_post_compile_hook = _compiled
    if not compiling:
        # Before the first kernel takes Triton's own.
        importlib.import_module("triton.compiler").compile = _StandIn(capability)
    _serve_meta_tensors()


def _serve_meta_tensors() -> None:
    """Backend "triton" takes meta tensors for a GPU's."""
    from pyfused.choice import backends
    from pyfused.ops.contract import checks, registry

    backends.refusal = lambda name, *_: "not over the stub driver" if name == "cuda" else None
    # Otherwise the dispatcher would answer with the operator's fake.
    registry._PLAIN.append(torch._C.DispatchKeySet(torch._C.DispatchKey.Meta).raw_repr())
    launch = importlib.import_module("pyfused.kernels.launch")
    known = {name for name in sys.modules if name.startswith("pyfused.kernels.")} - {"pyfused.kernels.launch"}
    assert not any(hasattr(sys.modules[name], "target") for name in known), "kernels have taken the real target"
    found = launch.Target(
        divmod(int(os.environ["STUB_CAPABILITY"]), 10), int(os.environ["STUB_MULTIPROCESSORS"]),
        int(os.environ["STUB_SHARED_MEMORY"]),
    )  # fmt: skip
    launch.target = lambda device: found
    # torch has no autocast for meta tensors.
    checks.autocast_dtype = lambda x: None if x.dtype == torch.float64 else _autocast
    torch.autocast = _Autocast


_autocast: torch.dtype | None = None


@contextlib.contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """The operators take autocast to be on inside; None: off."""
    global _autocast
    _autocast = dtype
    try:
        yield
    finally:
        _autocast = None


class _Autocast(torch.autocast):
    """Where an operator turns it off."""

    def __init__(self, device_type: str, *arguments, **options) -> None:
        super().__init__("cpu" if device_type == DEVICE else device_type, *arguments, **options)


@ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)
def _report(kernel: bytes, fault: bytes | None) -> None:
    _all.launches.append(kernel.decode())
    if fault is not None:
        _all.faults.append(fault.decode())


def _compiled(*, fn, compile, **_) -> None:
    names = [parameter.name for parameter in fn.jit_function.params]
    known = dict.fromkeys(names, "")
    (attributes,) = compile["configs"]
    for values in (compile["constants"], attributes):
        for path, value in values.items():
            known[names[path[0]]] += f" {value}"
    arguments = {name: f"{kind}{known[name]}" for name, kind in compile["signature"].items()}
    arguments |= {name: str(compile[name]) for name in ("num_warps", "num_stages")}
    _all.compiled.append(Specialisation(fn.jit_function.__name__, str(compile["key"]), arguments))


class _StandIn:
    """Takes the place of ``triton.compiler.compile``: compiled kernels whose machine code is one that does nothing."""

    def __init__(self, capability: int) -> None:
        from stub_driver.nothing import compiled

        kernel = compiled(capability)
        self.metadata = {**kernel.metadata._asdict(), "target": vars(kernel.metadata.target)}
        self.folder = Path(tempfile.mkdtemp(prefix="stub"))
        atexit.register(shutil.rmtree, self.folder)
        self.code = self.folder / "kernel.cubin"
        self.code.write_bytes(kernel.asm["cubin"])
        self.made = functools.cache(self._made)

    def __call__(self, src, target=None, options=None, _env_vars=None):
        kernel = copy.copy(self.made(src.name, options["num_warps"]))
        # Of which, at its first launch, Triton makes the launcher.
        kernel.src = src
        return kernel

    def _made(self, name: str, num_warps: int):
        from triton.compiler import CompiledKernel

        path = self.folder / f"{name}.{num_warps}.json"
        path.write_text(json.dumps(self.metadata | {"name": name, "num_warps": num_warps}, default=vars))
        return CompiledKernel(None, {"kernel.json": str(path), "kernel.cubin": str(self.code)}, "")


@dataclass(frozen=True)
class Question:
    """What `serve` is asked.

    Attributes:
        folder: where the process leaves what the function returned, as JSON, in "answer", and what was printed in
            "said". environment: the GPU's facts. path: folders that modules are in.
        compiling: as of `start`. module, function, arguments: what is called.
    """

    folder: str
    environment: dict[str, str]
    path: list[str]
    compiling: bool
    module: str
    function: str
    arguments: list


def serve(libcuda: str) -> None:
    """Answer each question, a line of JSON, in a process that is forked for it, and print the process's exit code."""
    importlib.import_module("triton")
    importlib.import_module("pyfused")
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            # It ends as any does, behind its last line.
            return _answer(libcuda, Question(**json.loads(line)))
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _answer(libcuda: str, asked: Question) -> None:
    said = os.open(Path(asked.folder, "said"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for file in (1, 2):
        os.dup2(said, file)
    os.environ |= asked.environment
    sys.path[:0] = asked.path
    start(libcuda, asked.compiling)
    function = functools.reduce(getattr, asked.function.split("."), importlib.import_module(asked.module))
    Path(asked.folder, "answer").write_text(json.dumps(function(*asked.arguments), default=dataclasses.asdict))


if __name__ == "__main__":
    # Under the name by which functions import it.
    importlib.import_module("stub_driver.inside").serve(sys.argv[1])
