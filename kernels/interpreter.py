"""Mends faults of Triton's CPU interpreter, and acts only under it.

``tl.dot`` multiplies bfloat16 operands as the raw 16-bit integers that hold them, and the cast from float32 to
bfloat16 truncates where every GPU rounds to nearest even. The rest costs time: each call of a device function patches
the whole language anew, which the kernel's own start has already done, and each value makes its shape and the dtype of
its numbers anew. Without that a kernel takes about half the time.
"""

from __future__ import annotations

import inspect

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle


def _to_float32(bfloat16_bits: np.ndarray) -> np.ndarray:
    return (bfloat16_bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16_bits(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding up could carry a NaN's payload into infinity or beyond.
    return np.where(np.isnan(values), 0x7FC0 | (bits >> 16 & 0x8000), rounded).astype(np.uint16)


def mend() -> None:
    """Patch the interpreter; a second call changes nothing."""
    if getattr(InterpreterBuilder, "_pyfused_mended", False):
        return
    _mend_bfloat16()
    _patch_the_language_once_a_launch()
    _remember_shapes()
    _remember_dtypes()
    InterpreterBuilder._pyfused_mended = True


def _mend_bfloat16() -> None:
    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def mended_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16 and b.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(_to_float32(operand.data), tl.float32) for operand in (a, b))
        return create_dot(self, a, b, *rest)

    def mended_cast(self, source, destination):
        if source.dtype.scalar == tl.float32 and destination.scalar == tl.bfloat16:
            return TensorHandle(_to_bfloat16_bits(source.data).reshape(source.data.shape), tl.bfloat16)
        return cast_impl(self, source, destination)

    InterpreterBuilder.create_dot = mended_dot
    InterpreterBuilder.cast_impl = mended_cast


def _patch_the_language_once_a_launch() -> None:
    run, call = GridExecutor.__call__, InterpretedFunction.__call__
    running = 0
    builtins: dict[object, list[tuple[str, object]]] = {}

    def counted_run(self, *args, **kwargs):
        nonlocal running
        running += 1
        try:
            return run(self, *args, **kwargs)
        finally:
            running -= 1

    def mended_call(self, *args, **kwargs):
        if running and self.fn.__globals__.get("tl") is tl:
            return self.rewrite()(*args, **kwargs)
        return call(self, *args, **kwargs)

    def patch_builtin(owner, builder, scope):
        if owner not in builtins:
            builtins[owner] = [(name, m) for name, m in inspect.getmembers(owner) if core.is_builtin(m)]
        for name, member in builtins[owner]:
            interpreter._patch_attr(owner, name, member, builder, scope)

    GridExecutor.__call__ = counted_run
    InterpretedFunction.__call__ = mended_call
    interpreter._patch_builtin = patch_builtin


def _remember_shapes() -> None:
    """Tensors and types of one shape share what is made of it, which nothing changes."""
    make_tensor, make_type, broadcast = (
        core.tensor.__init__, core.block_type.__init__, TritonSemantic.broadcast_impl_value,
    )  # fmt: skip
    of_tensors: dict[tuple[int, ...], tuple] = {}
    of_types: dict[tuple[int, ...], tuple] = {}

    def init_tensor(self, handle, type):
        key = tuple(type.shape.values) if type.is_block() else ()
        if key in of_tensors:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = of_tensors[key]
        else:
            make_tensor(self, handle, type)
            of_tensors[key] = self.shape, self.numel

    def init_type(self, element_ty, shape):
        key = tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
        if key in of_types:
            self.element_ty = element_ty
            self.shape, self.numel = of_types[key]
            self.name = f"<{self.shape}, {element_ty}>"
        else:
            make_type(self, element_ty, shape)
            of_types[key] = self.shape, self.numel

    def broadcast_unless_alike(self, lhs, rhs):
        types = lhs.type, rhs.type
        if all(type.is_block() for type in types) and types[0].shape.values == types[1].shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    core.tensor.__init__ = init_tensor
    core.block_type.__init__ = init_type
    TritonSemantic.broadcast_impl_value = broadcast_unless_alike


def _remember_dtypes() -> None:
    find, known = interpreter._get_np_dtype, {}

    def numpy_dtype(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = find(dtype)
        return known[name]

    interpreter._get_np_dtype = numpy_dtype
