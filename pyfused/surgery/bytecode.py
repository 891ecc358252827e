"""What the class of a module says of its forward: whose it is, and by its compiled code what it reads and calls.

No list of names keeps up with the packages whose models are changed here.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Iterator

from torch import nn

from pyfused.surgery.variants import plain_class


def is_one_of(module: nn.Module, *named: tuple[str, str]) -> bool:
    """Whether ``module`` is an instance of one of the classes, each (module, name)."""
    return any((base.__module__, base.__qualname__) in named for base in type(module).__mro__)


_LOADS = ("LOAD_ATTR", "LOAD_METHOD")
_WEIGHTS = ("weight", "in_proj_weight")
# What of a weight says nothing about its values.
_FACTS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_cuda", "is_meta", "itemsize"}


def reads_weight(host: nn.Module, name: str) -> bool:
    """Whether ``host`` takes the values of its layer's weight, in a way of its forward that does not call the layer.

    By its compiled code: each function that forward can reach is asked whether it reads without calling. A Mamba reads
    and calls in one function, where the machine decides which: for it, reading is enough. nn.TransformerEncoderLayer
    has a way that only reads, but it is barred while its layers have hooks.
    """
    if isinstance(host, nn.TransformerEncoderLayer):
        return False
    by_kernels = "mamba" in type(host).__name__.lower()
    codes: tuple[types.CodeType, ...] = reachable(plain_class(type(host))[0])  # type: ignore[arg-type]
    return any(_reads(code, name) and (by_kernels or not _calls(code, name)) for code in codes)


def _uses(code: types.CodeType, name: str) -> Iterator[tuple[dis.Instruction, dis.Instruction]]:
    """The two instructions after each that loads an attribute ``name``."""
    steps = [step for step in dis.get_instructions(code) if step.opname != "CACHE"]
    for layer, then, after in zip(steps, steps[1:], steps[2:], strict=False):
        if layer.opname in _LOADS and layer.argval == name:
            yield then, after


def _reads(code: types.CodeType, name: str) -> bool:
    for then, after in _uses(code, name):
        if then.opname not in _LOADS:
            continue
        fact = after.opname in _LOADS and after.argval in _FACTS
        if then.argval in _WEIGHTS and not fact:
            return True
        # An attention's own layer.
        if then.argval == "out_proj" and after.opname in _LOADS and after.argval == "weight":
            return True
    return False


def _calls(code: types.CodeType, name: str) -> bool:
    return any(then.opname not in _LOADS for then, _ in _uses(code, name))


@functools.cache
def reachable(cls: type[nn.Module]) -> tuple[types.CodeType, ...]:
    """The compiled code of ``forward`` and of the methods and properties that it names, and they in turn.

    Of a method that calls super(), the one that it overrides too.
    """
    found: dict[str, list[types.CodeType]] = {}
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        codes = found[name] = []
        for member in (vars(base)[name] for base in cls.__mro__ if name in vars(base) and base is not nn.Module):
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if not isinstance(function, types.FunctionType):
                break
            own = [inspect.unwrap(function).__code__]
            for code in own:
                own += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
                waiting += code.co_names
            codes += own
            if not any("super" in code.co_names for code in own):
                break
    return tuple(code for codes in found.values() for code in codes)
