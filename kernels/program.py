"""A program for each signature: what an implementation does with tensors of one kind, done again without its code.

The second call of a signature is watched: its launches, its calls of torch's library, what it allocates. Each tensor
among their arguments is known by the object that it is, never by its address. Later calls repeat the steps on their own
tensors, and form no argument again but pointers.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton import knobs
from triton.runtime import driver

from pyfused.choice import measured
from pyfused.kernels import recording
from pyfused.kernels.launch import Mat, with_scratch

# What a caching allocator aligns to, or less: kernels are compiled for pointers that 16 divides.
_ALIGNMENT = 256
_ALLOCATIONS = {
    getattr(packet, overload)
    for packet in (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like)
    for overload in packet.overloads()
} - {torch.ops.aten.empty.out}
_MOST = 1024

_Implementation = Callable[..., tuple[Tensor, ...]]
# Signature -> its program; None where it was met once, `_UNFIT` where no program can do what was seen.
_programs: dict[tuple, Program | object | None] = {}
_UNFIT = object()
_changing = threading.Lock()


def per_signature(implementation: _Implementation) -> _Implementation:
    """Decorates an implementation of a raw operator, which takes tensors, numbers and words by position."""
    name = implementation.__name__

    @functools.wraps(implementation)
    def run(*arguments, **named):
        # The dispatcher names no argument.
        if named or recording.current is not None or recording.forcing is not None:
            return implementation(*arguments, **named)
        key = (name, *_signature(arguments))
        program = _programs.get(key, _UNFIT)
        if program.__class__ is Program:
            return program(arguments)
        if program is None:
            return _watched(key, implementation, arguments)
        if key not in _programs:
            _keep(key, None)
        return implementation(*arguments)

    return run


def _signature(arguments: Sequence[object]) -> list[object]:
    """All that an implementation, and a compilation, can tell one call from another by."""
    found: list[object] = [measured.generation]
    objects: list[int] = []
    for argument in arguments:
        # First what it nearly always is.
        if argument.__class__ is Tensor or isinstance(argument, Tensor):
            found += (argument.shape, argument.stride(), argument.dtype, argument.data_ptr() & 15)
            objects.append(id(argument))
        else:
            found.append(argument)
    if len(set(objects)) < len(objects):
        # Watched, one object in two places could not be told from itself.
        found.append(tuple([objects.index(each) for each in objects]))
    first = arguments[0]
    assert isinstance(first, Tensor)
    found.append(first.device)
    if first.dtype == torch.float32:
        found.append(torch.backends.cuda.matmul.fp32_precision)
    return found


def _keep(key: tuple, program: Program | object | None) -> None:
    with _changing:
        if len(_programs) >= _MOST:
            # The oldest.
            del _programs[next(iter(_programs))]
        _programs[key] = program


def _watched(key: tuple, implementation: _Implementation, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    """What the implementation returns; keeps the program of it."""
    with _Watch(arguments) as watch:
        recording.watches.current = watch
        try:
            outputs = implementation(*arguments)
        finally:
            recording.watches.current = None
    _keep(key, watch.program(outputs, arguments[0].device))
    return outputs


class _Watch(TorchDispatchMode):
    """Notes the steps of what runs inside, in this thread.

    A value is a tensor by its number: the arguments, then what the steps make. Its place is the value whose memory it
    lies in, and how many bytes from that one's first.
    """

    def __init__(self, arguments: Sequence[object]) -> None:
        super().__init__()
        self.values: dict[int, int] = {}
        self.places: list[tuple[int, int]] = []
        # As long as it lives its id is its own.
        self.alive: list[object] = []
        self.steps: list[_Step] = []
        self.fit = True
        for argument in arguments:
            self._add(argument)

    def _add(self, tensor: object, place: tuple[int, int] | None = None) -> int:
        number = len(self.alive)
        self.values[id(tensor)] = number
        self.places.append(place or (number, 0))
        self.alive.append(tensor)
        return number

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        given = [part for part in pytree.tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
        made = list(out) if isinstance(out, (tuple, list)) else [out]
        # A number that was read of a tensor, or a tensor from elsewhere, is no part of a signature.
        if not all(isinstance(tensor, Tensor) for tensor in made) or not all(id(part) in self.values for part in given):
            self.fit = False
            return out
        views = [self._view_of(given, tensor) for tensor in made]
        numbers = [
            self.values[id(tensor)] if id(tensor) in self.values else self._add(tensor, place)
            for tensor, place in zip(made, views, strict=True)
        ]
        if function in _ALLOCATIONS:
            self.steps.append(_Allocation(made[0], numbers[0]))
        else:
            view = None not in views and not function._schema.is_mutable
            self.steps.append(_Call(function, args, kwargs, self.values, numbers, view))
        return out

    def _view_of(self, given: Sequence[Tensor], tensor: Tensor) -> tuple[int, int] | None:
        """The place of a tensor that shares memory with a given one."""
        for other in given:
            if other.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
                base, start = self.places[self.values[id(other)]]
                return base, start + _start(tensor) - _start(other)
        return None

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any]) -> None:
        """Launches the kernel, and notes it."""
        # What Triton's interpreter does to run it is no step.
        with _disable_current_modes():
            compiled = kernel[grid](**arguments, **options)
        pointers = {}
        for name, value in arguments.items():
            tensor = value.ptr if isinstance(value, Mat) else value
            if isinstance(tensor, Tensor):
                if id(tensor) not in self.values:
                    self.fit = False
                    return
                pointers[name] = _Pointer(tensor, *self.places[self.values[id(tensor)]])
        # Neither a step nor a program keeps a tensor alive.
        others = {
            name: value._replace(ptr=None) if isinstance(value, Mat) else value
            for name, value in arguments.items()
            if not isinstance(value, Tensor)
        }
        kind = _Interpreted if compiled is None else _Launch
        self.steps.append(kind(kernel, compiled, grid, others, pointers, options))

    def program(self, outputs: Sequence[Tensor], device: torch.device) -> Program | object:
        """`_UNFIT` where it would not do the same."""
        if not self.fit or not all(id(output) in self.values for output in outputs):
            return _UNFIT
        returned = [self.values[id(output)] for output in outputs]
        needed, bases = set(returned), set[int]()
        steps: list[_Step] = []
        for step in reversed(self.steps):
            if isinstance(step, _Launch):
                bases.update(pointer.value for pointer in step.pointers.values())
            elif isinstance(step, _Call):
                if step.view and not needed.intersection(step.made):
                    continue
                needed.update(step.given)
            elif step.number not in needed:
                # Memory that kernels alone see is a part of one piece, or of none.
                continue
            steps.append(step)
        held = {}
        size, scratch = 0, len(self.alive)
        for step in self.steps:
            if isinstance(step, _Allocation) and step.number in bases - needed:
                held[step.number] = size
                size += -(-step.nbytes // _ALIGNMENT) * _ALIGNMENT
        for step in steps:
            if isinstance(step, _Launch):
                for pointer in step.pointers.values():
                    pointer.move(held, scratch)
                step.settle(device)
        if held:
            # Of at least one byte: a pointer to no elements points somewhere too.
            steps.append(_Allocation(torch.empty(max(1, size), dtype=torch.uint8, device=device), scratch))
        return Program(steps[::-1], scratch + 1, returned, device)


class Program:
    """Steps that make the outputs of an implementation out of its arguments."""

    __slots__ = ("_device", "_index", "_launches", "_made", "_returned", "_steps")

    def __init__(self, steps: Sequence[_Step], values: int, returned: Sequence[int], device: torch.device) -> None:
        self._steps = [step.run for step in steps]
        self._made = values
        self._returned = returned
        self._device = device
        self._index = device.index if device.type == "cuda" else None
        self._launches = any(type(step) is _Launch for step in steps)

    def __call__(self, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        index = self._index
        if index is not None and torch._C._cuda_getDevice() != index:
            with torch.cuda.device(self._device):
                return self._run(arguments)
        return self._run(arguments)

    def _run(self, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        values: list[Any] = [*arguments, *[None] * (self._made - len(arguments))]
        stream = _current_stream() if self._launches else 0
        for step in self._steps:
            step(values, stream)
        return tuple([values[number] for number in self._returned])


def _current_stream() -> int:
    active = driver.active
    return active.get_current_stream(active.get_current_device())


class _Allocation:
    """Memory that a kernel fills."""

    def __init__(self, like: Tensor, number: int) -> None:
        self.number, self.nbytes = number, like.untyped_storage().nbytes()
        # A tensor's own method finds the dtype and the device sooner than arguments say them.
        self.empty, self.shape, self.strides = like.new_empty(0), tuple(like.shape), like.stride()

    def run(self, values: list[Any], stream: int) -> None:
        values[self.number] = self.empty.new_empty_strided(self.shape, self.strides)


class _Call:
    """A call of torch's library."""

    def __init__(self, function, args, kwargs, values: dict[int, int], made: Sequence[int], view: bool) -> None:
        leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.tensors = [(at, values[id(leaf)]) for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.function, self.made, self.view = function, made, view
        self.given = [number for _, number in self.tensors]
        # Nearly all: tensors and numbers by position.
        self.flat = not kwargs and len(made) == 1 and not any(isinstance(part, (list, tuple, dict)) for part in args)

    def run(self, values: list[Any], stream: int) -> None:
        leaves = self.leaves.copy()
        for at, number in self.tensors:
            leaves[at] = values[number]
        if self.flat:
            values[self.made[0]] = self.function(*leaves)
            return
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        out = self.function(*args, **kwargs)
        for number, tensor in zip(self.made, out if isinstance(out, (tuple, list)) else (out,), strict=True):
            values[number] = tensor


@dataclass
class _Pointer:
    """Where a launch's tensor lies: in which value, and how many bytes from its first element."""

    like: InitVar[Tensor]
    value: int
    start: int

    def __post_init__(self, like: Tensor) -> None:
        self.dtype, self.shape, self.strides = like.dtype, like.shape, like.stride()

    def move(self, held: Mapping[int, int], scratch: int) -> None:
        if self.value in held:
            self.value, self.start = scratch, held[self.value] + self.start


class _Launch:
    """A launch of a compiled kernel, as `JITFunction.run` makes it, with numbers in the place of tensors."""

    def __init__(self, kernel, compiled, grid, arguments, pointers: Mapping[str, _Pointer], options) -> None:
        self.kernel, self.compiled, self.options = kernel, compiled, options
        self.grid = (*grid, 1, 1)[:3]
        self.arguments, self.pointers = arguments, pointers

    def settle(self, device: torch.device) -> None:
        """What every run repeats."""
        names = [parameter.name for parameter in self.kernel.params]
        self.template = [self.arguments.get(name) for name in names]
        self.slots = [
            (at, self.pointers[name].value, self.pointers[name].start, self.template[at])
            for at, name in enumerate(names)
            if name in self.pointers
        ]
        compiled = self.compiled
        self.start, self.function, self.metadata = compiled.run, compiled.function, compiled.packed_metadata
        if compiled.metadata.global_scratch_size:
            self.start = functools.partial(with_scratch, device, compiled.run)

    def run(self, values: list[Any], stream: int) -> None:
        arguments = self.template.copy()
        for at, value, start, mat in self.slots:
            pointer = values[value].data_ptr() + start
            arguments[at] = pointer if mat is None else (pointer, mat.strides)
        facts, enter, leave = None, knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        if enter.calls or leave.calls:
            facts = self.compiled.launch_metadata(self.grid, stream, *arguments)
        else:
            enter = leave = None
        self.start(*self.grid, stream, self.function, self.metadata, facts, enter, leave, *arguments)


class _Interpreted(_Launch):
    """One by Triton's interpreter, which takes tensors."""

    def settle(self, device: torch.device) -> None:
        pass

    def run(self, values: list[Any], stream: int) -> None:
        arguments = dict(self.arguments)
        for name, pointer in self.pointers.items():
            memory = values[pointer.value]
            first = (_start(memory) + pointer.start) // pointer.dtype.itemsize
            tensor = torch.empty(0, dtype=pointer.dtype, device=memory.device)
            tensor.set_(memory.untyped_storage(), first, pointer.shape, pointer.strides)
            mat = arguments.get(name)
            arguments[name] = tensor if mat is None else mat._replace(ptr=tensor)
        self.kernel[self.grid](**arguments, **self.options)


_Step = _Allocation | _Call | _Launch


def _start(tensor: Tensor) -> int:
    """Of its first element, in bytes from the first of its storage."""
    return int(tensor.storage_offset()) * tensor.itemsize
