"""What a model calls: each different call once, and how often forward and backward of it ran."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyfused.ops.decision import Decision, Like, Told
from pyfused.tuner.replay import Recorded


@dataclass
class Count:
    """How often a call was made.

    Attributes:
        told: what the operator decided about it the first time.
        forward: of all.
        wanted: of those that were prepared for backward, outside of one.
        again: of those that were prepared for backward in one, as activation checkpointing makes them again.
    """

    told: Decision
    forward: int = 0
    wanted: int = 0
    again: int = 0

    @property
    def backward(self) -> int:
        """Without checkpointing a call has a backward of its own; with it one of the two that were prepared has."""
        return max(self.wanted, self.again)


class Recorder:
    """An observer of decisions; see `pyfused.ops.decision`.

    Attributes:
        calls: those that can be made again.
        prepared: how many calls had a context that was prepared before, whose plan stays.
    """

    def __init__(self) -> None:
        self.calls: dict[Recorded, Count] = {}
        self.prepared = 0

    def __call__(self, told: Told) -> None:
        if not isinstance(told, Decision):
            return
        if not told.arguments:
            self.prepared += 1
            return
        tensors = [value for _, value in told.arguments if isinstance(value, Like)]
        gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        kind = told.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        recorded = Recorded(told.operator, told.arguments, cast, gradient)
        count = self.calls.setdefault(recorded, Count(told))
        count.forward += 1
        if gradient and torch._C._current_graph_task_id() == -1:
            count.wanted += 1
        elif gradient:
            count.again += 1
