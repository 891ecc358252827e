"""The launches and operations of each direction of a case, on meta tensors, and what each finds in the cache."""

from __future__ import annotations

import functools
import math
import unittest.mock
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import pyfused
from pyfused.bench.cases.case import Case
from pyfused.bench.gpu.programs.ahead import launching
from pyfused.bench.predict.model import Work
from pyfused.kernels.recording import Launch, Target, record

# What a kernel reads and writes in place: the second is bytes even where the first comes out of the cache.
_IN_PLACE = {"_lora_expand_kernel": ("y",)}
# Steps of a loop that brings no operands, beside one that does: the masked term comes by quarters of a tile's columns.
_INNER = {"_lora_tma_kernel": 4}
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear")


@dataclass(frozen=True)
class Operation:
    """One of torch's own: what it reads and writes; of a product (batch, M, N, K), of attention its multiply-adds."""

    name: str
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]
    product: tuple[int, int, int, int] | None = None
    attention: float = 0.0


Event = Launch | Operation


class _Trace(TorchDispatchMode):
    """Notes torch's operations that move elements, behind the launches that came before."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self._launches = launches
        self._taken = 0
        self.found: list[Event] = []

    def flush(self) -> None:
        self.found += self._launches[self._taken :]
        self._taken = len(self._launches)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            self.flush()
            made_by = operation(func, (args, kwargs), made)
            self.found += [] if made_by is None else [made_by]
        return made


def operation(func: torch._ops.OpOverload, arguments: tuple[tuple, dict | None], made: object) -> Operation | None:
    """Of a call of torch's; None of a view, and of memory that is only taken."""
    name = func.overloadpacket.__name__
    reads, writes = (
        tuple([leaf for leaf in tree_leaves(each) if isinstance(leaf, Tensor) and leaf.numel()])
        for each in (arguments, made)
    )
    seen = {_storage(tensor) for tensor in reads} >= {_storage(tensor) for tensor in writes}
    if "empty" in name or (seen and not func._schema.is_mutable):
        return None
    product = None
    if name.rstrip("_") in _PRODUCTS:
        batch, m, n = math.prod(writes[0].shape[:-2]), *writes[0].shape[-2:]
        # Where something is added to a product it comes first. A linear layer's rows are one matrix.
        k = reads[1 if "add" in name else 0].shape[-1]
        product = (1, batch * m, n, k) if name == "linear" else (batch, m, n, k)
    attention = 0.0
    if "attention" in name:
        attention = flop_registry[func.overloadpacket](*arguments[0], **(arguments[1] or {}), out_val=made) / 2
    return Operation(name, reads, writes, product, attention)


def _flash(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """Attention as a GPU has it: on meta tensors torch would make its products one by one."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0]


def directions(case: Case, plan: str, target: Target) -> tuple[list[Event], list[Event]]:
    """Forward and backward of Triton's kernels in this plan, or "auto", on such a GPU."""
    tensors = case.tensors(torch.device("meta"))
    leaves = [tensors[name].requires_grad_() for name in (*case.inputs, *case.trained)]
    operator = functools.partial(getattr(pyfused, case.operator), backend="portable")
    own = plan if plan in case.plans("portable") else "auto"
    halves: list[int] = []

    flash = unittest.mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _flash)
    with record(target) as launches, _Trace(launches) as trace, flash:

        def both() -> None:
            y = case.call(operator, tensors, plan=own)
            trace.flush()
            halves.append(len(trace.found))
            torch.autograd.grad(y, leaves, tensors["dy"])

        launching(both, plan)()
        trace.flush()
    return trace.found[: halves[0]], trace.found[halves[0] :]


class Cache:
    """The second-level cache of a GPU, cold at first: which tensors the last bytes that passed belong to."""

    def __init__(self, nbytes: float) -> None:
        self._nbytes = nbytes
        self._kept: OrderedDict[int, int] = OrderedDict()

    def moved(self, reads: Iterable[Tensor], writes: Iterable[Tensor] = ()) -> int:
        """Bytes that memory gives and takes: what is read and not here, and all that is written."""
        found = sum(_size(tensor) for tensor in reads if not self._touch(tensor))
        for tensor in writes:
            self._touch(tensor)
            found += _size(tensor)
        return found

    def _touch(self, tensor: Tensor) -> bool:
        """Whether it was here; it is from now on, and what does not fit beside it is not."""
        key = _storage(tensor)
        there = self._kept.pop(key, None) is not None
        self._kept[key] = _size(tensor)
        while sum(self._kept.values()) > self._nbytes:
            self._kept.popitem(last=False)
        return there


def _size(tensor: Tensor) -> int:
    """Of the elements that it has: what is expanded is there once."""
    once = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return once * tensor.element_size()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def work_of(launch: Launch, cache: Cache) -> Work:
    """What a launch has to do, by its grid and arguments."""
    given = launch.arguments
    programs = math.prod(launch.grid)
    tensors = {_storage(tensor): tensor for tensor in sorted(launch.tensors, key=_size) if tensor.numel()}
    in_place = [given[name].ptr for name in _IN_PLACE.get(launch.kernel.__name__, ())]
    moved = cache.moved(tensors.values()) + sum(map(_size, in_place))
    # A persistent kernel's programs take one tile after another.
    tiles = given["tiles_m"] * given["tiles_n"] if "tiles_m" in given and "tiles_n" in given else programs
    size = {name: given.get(f"BLOCK_{name}", 0) for name in "MNKR"}
    operands = size["M"] + size["N"] + (size["R"] if given.get("OWN_P") else 0)
    through = sum(map(_size, tensors.values())) + sum(map(_size, in_place))
    inner = _INNER.get(launch.kernel.__name__, 0)
    return Work(programs, tiles, _steps(given), moved, through, 2 * operands * size["K"], inner)


def _steps(given: dict) -> int:
    """Of each loop that has products, as all of a kernel have; 0 where the arguments do not tell."""
    if "steps" in given:
        return given["steps"]
    for length, block in (("k", "BLOCK_K"), ("channels", "BLOCK_C"), ("rank", "BLOCK_R")):
        if length in given and block in given:
            return triton.cdiv(given[length], given[block])
    return 0
