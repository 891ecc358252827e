"""Cases of DistributedDataParallel: gradients and weights of two processes equal those of one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
import trained
from pair import WORLD
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pyfused

MODES: dict[str, dict] = {
    "static_graph": {"static_graph": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
}


def equals_one_process(made: Callable[[], nn.Module], options: dict, compiled: bool, rank: int, folder: Path) -> None:
    images, classes = trained.data()
    alone = made()
    expected = trained.train(alone, images, classes)
    model = DistributedDataParallel(made(), **options)
    if compiled:
        model = torch.compile(model, backend="aot_eager")
    gradients = trained.train(model, *(part.chunk(WORLD)[rank] for part in (images, classes)))
    trained.assert_trained_alike(model, gradients, alone, expected)


def layers() -> nn.Module:
    """Less than a tower, which takes longer to compile."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.GELU(), nn.Linear(8, 5))
    pyfused.inject_lora(model, ["1", "3"], rank=4)
    for parameter in trained.trainable(model).values():
        nn.init.normal_(parameter, std=0.1)
    return model


CASES = (
    {
        kind: functools.partial(equals_one_process, functools.partial(trained.made, kind), {}, False)
        for kind in trained.KINDS
    }
    | {
        f"{kind} {mode}": functools.partial(equals_one_process, functools.partial(trained.made, kind), options, False)
        for kind in ("everything", "peft")
        for mode, options in MODES.items()
    }
    | {"compiled": functools.partial(equals_one_process, layers, {}, True)}
)
