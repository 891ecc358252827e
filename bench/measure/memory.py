"""How much memory one call needs, counted from the allocator and not from the process's size."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_MEASURED = "pyfused.bench.measure.memory"


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory that ``call`` held at once beyond what was held before it; ``call`` runs twice.

    On a GPU from the caching allocator's own peak. On a CPU from the profiler's record of each allocation and release
    by torch's allocator: exact and the same from run to run; scratch memory inside a BLAS library is not seen.
    """
    # The first run makes what stays (optimizer state), and on a CPU what the second one frees and makes anew: the
    # profiler does not know the size of a block that is older than itself.
    if device.type == "cuda":
        call()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
        with torch.profiler.record_function(_MEASURED):
            call()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    start = next(event.start_ns() for event in events if event.name() == _MEASURED)
    held = peak = 0
    for event in events:
        if event.name() == "[memory]" and event.start_ns() >= start:
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def saved_bytes(forward: Callable[[], object], held_anyway: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps from ``forward`` for its backward: distinct storages, without ``held_anyway``'s own.

    Args:
        forward: runs the forward pass; its result is dropped afterwards.
        held_anyway: tensors that live regardless, such as parameters and inputs.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in held_anyway}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in known:
            saved.setdefault(pointer, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    # The result and every saved tensor live until here, so that no address counted once is used again.
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del result
    return total
