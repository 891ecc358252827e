"""Sums of parts that many programs computed, in a fixed order: by a launch of its own, or within the same launch."""

import torch
import triton
import triton.language as tl

from pyfused.kernels.device import known_multiple
from pyfused.kernels.launch import launch, multiple

# Slots that one program adds up at a time, and then groups of slots.
SLOTS_PER_GROUP = 16


@triton.jit(do_not_specialize=["elements", "splits"])
def _sum_partials_kernel(
    partial_ptr, out_ptr, elements, splits, scaling,
    ELEMENTS_MULTIPLE_OF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """out = scaling * sum over splits, always in the same order."""
    elements = known_multiple(elements, ELEMENTS_MULTIPLE_OF)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = offs < elements
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(tl.cdiv(splits, BLOCK_SPLITS)):
        split = start * BLOCK_SPLITS + tl.arange(0, BLOCK_SPLITS)
        parts = tl.load(
            partial_ptr + split.to(tl.int64)[:, None] * elements + offs[None, :],
            mask=(split < splits)[:, None] & ok[None, :],
            other=0.0,
        )  # [BLOCK_SPLITS, BLOCK]
        total += tl.sum(parts, axis=0)
    tl.store(out_ptr + offs, (total * scaling).to(out_ptr.dtype.element_ty), mask=ok)


def sum_partials(parts: torch.Tensor, out: torch.Tensor, scaling: float) -> None:
    """out <- scaling parts.sum(0); both dense."""
    launch(
        _sum_partials_kernel, (triton.cdiv(out.numel(), 128),),
        partial_ptr=parts, out_ptr=out, elements=out.numel(), splits=parts.shape[0], scaling=scaling,
        ELEMENTS_MULTIPLE_OF=multiple(out.numel()), BLOCK=128, BLOCK_SPLITS=16, num_warps=4, num_stages=1,
    )  # fmt: skip


@triton.jit
def load_part(ptrs, ok):
    """A sum that another multiprocessor may have written during this launch: past the first-level cache."""
    return tl.load(ptrs, mask=ok, other=0.0, cache_modifier=".cg")


@triton.jit
def sums_slots(parts_ptr, slot_size, counter_ptr, split, splits, programs, GROUP: tl.constexpr):
    """Adds up the slots of all splits in the slot ``splits + groups``; whether that is done, and by this program.

    Called once by each program that wrote a part of its split's slot, ``programs`` per split. The last to arrive of
    each GROUP of splits adds up the group, in a fixed order, and the last group to arrive the groups: the same bits
    whoever is last. Counters, one per group and one more, start at 0.
    """
    group, groups = split // GROUP, tl.cdiv(splits, GROUP)
    in_group = tl.minimum(GROUP, splits - group * GROUP)
    done = False
    if _arrives_last(counter_ptr + group, in_group * programs):
        _add_slots(parts_ptr, slot_size, group * GROUP, in_group, splits + group)
        if _arrives_last(counter_ptr + groups, groups):
            _add_slots(parts_ptr, slot_size, splits, groups, splits + groups)
            tl.debug_barrier()
            done = True
    return done


@triton.jit
def _arrives_last(counter_ptr, expected):
    # Every thread's writes must be done before one of them counts.
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel") == expected - 1


@triton.jit
def _add_slots(parts_ptr, slot_size, first, count, to):
    BLOCK: tl.constexpr = 1024
    for start in range(tl.cdiv(slot_size, BLOCK)):
        offs = start * BLOCK + tl.arange(0, BLOCK)
        ok = offs < slot_size
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for slot in tl.range(0, count, loop_unroll_factor=4):
            total += load_part(parts_ptr + (first + slot).to(tl.int64) * slot_size + offs, ok)
        tl.store(parts_ptr + to.to(tl.int64) * slot_size + offs, total, mask=ok)
