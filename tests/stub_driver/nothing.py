"""A kernel that does nothing, and mistakes that one can make with it."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource
from triton.compiler.compiler import compile as real_compile


@triton.jit
def _nothing_kernel(x_ptr):
    pass


def compiled(capability: int):
    """For the GPU of that compute capability, in digits."""
    source = ASTSource(fn=_nothing_kernel, signature={"x_ptr": "*fp32"}, constexprs={})
    return real_compile(source, target=GPUTarget("cuda", capability, 32))


def _shared_memory(x) -> None:
    kernel = _nothing_kernel[(1,)](x, num_warps=8)
    num_warps, num_ctas, _ = kernel.packed_metadata
    kernel.packed_metadata = num_warps, num_ctas, 49153
    _nothing_kernel[(1,)](x, num_warps=8)


def _another_gpu(x) -> None:
    triton.runtime.driver.active.utils.load_binary("_nothing_kernel", compiled(80).asm["cubin"], 0, 0)


# Each is given a tensor.
MISTAKES = {
    "none": lambda x: _nothing_kernel[(1,)](x),
    "longest grid": lambda x: _nothing_kernel[(2**31 - 1, 1, 1)](x),
    "grid y": lambda x: _nothing_kernel[(1, 65536)](x),
    "grid z": lambda x: _nothing_kernel[(1, 1, 65536)](x),
    "shared memory": _shared_memory,
    "lost": lambda x: _nothing_kernel[(65536, 32768)](x),
    "threads": lambda x: _nothing_kernel[(1,)](x, num_warps=64),
    "another GPU": _another_gpu,
    "no such argument": lambda x: _nothing_kernel[(1,)](x, y_ptr=x),
    "too few arguments": lambda x: _nothing_kernel[(1,)](),
}
