"""DistributedDataParallel: gradients and weights of two processes equal those of one."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import trained
from pair import WORLD
from torch.nn.parallel import DistributedDataParallel

MODES: dict[str, dict] = {
    "static_graph": {"static_graph": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
}


def equals_one_process(kind: str, options: dict, compiled: bool, rank: int, folder: Path) -> None:
    images, classes = trained.data()
    alone = trained.made(kind)
    expected = trained.train(alone, images, classes)
    model = DistributedDataParallel(trained.made(kind), **options)
    if compiled:
        model = torch.compile(model, backend="aot_eager")
    gradients = trained.train(model, *(part.chunk(WORLD)[rank] for part in (images, classes)))
    trained.assert_trained_alike(model, gradients, alone, expected)


CASES = (
    {kind: functools.partial(equals_one_process, kind, {}, False) for kind in trained.KINDS}
    | {
        f"{kind} {mode}": functools.partial(equals_one_process, kind, options, False)
        for kind in ("everything", "peft")
        for mode, options in MODES.items()
    }
    | {"lora compiled": functools.partial(equals_one_process, "lora", {}, True)}
)


@pytest.mark.parametrize("case", CASES)
def test_ddp(case, outcomes):
    assert not outcomes[case], outcomes[case]
