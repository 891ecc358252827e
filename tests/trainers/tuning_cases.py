"""Cases of tuning in a distributed job: rank 0 times, and all ranks take what it found."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
import tuned
from torch.nn.parallel import DistributedDataParallel

import pyfused
from pyfused.choice import cache, measured
from pyfused.ops import cross_attention_residual
from pyfused.tuner import tune as module

FASTER = {"standard_forward": 0.5, "standard_backward": 0.5}
SLOWER = {"standard_forward": 2.0, "standard_backward": 2.0}


def _set_up(rank: int, folder: Path, name: str) -> None:
    """A cache of its own for each rank, and clocks that tell each something else; "absorbed" is the library's."""
    measured.use(())
    cross_attention_residual.ABSORBED_STEPS.clear()
    os.environ["PYFUSED_CACHE"] = str(folder / f"{name}{rank}")
    clocks = {"warm": tuned.FakeClock(SLOWER if rank else FASTER)}
    module.cold_and_warm = lambda device: clocks


def ranks_agree(rank: int, folder: Path) -> None:
    _set_up(rank, folder, "agree")
    model, given = tuned.Towers(), tuned.inputs()
    report = pyfused.tune(model, *given)
    assert tuned.plans(model, *given) == ["standard", "standard"]
    assert report.notes == ("timed by rank 0",)
    assert report.calls[0].gain == 2.0
    assert report.path == folder / f"agree{rank}" / "measured.json", "each may be on a machine of its own"
    assert cache.rows() == measured.own
    assert len(measured.own) == 1
    # And inside a step.
    measured.use(())
    with pyfused.tuning() as found:
        model(*given).sum().backward()
    assert tuned.plans(model, *given) == ["standard", "standard"]
    assert found.report.notes == ("timed by rank 0",)


def one_that_fails_fails_all(rank: int, folder: Path) -> None:
    _set_up(rank, folder, "fails")
    session = module.Session
    if rank == 0:
        module.Session = lambda *arguments: 1 // 0
    try:
        pyfused.tune(tuned.Towers(), *tuned.inputs())
    except ZeroDivisionError:
        assert rank == 0
    except RuntimeError as error:
        assert rank == 1
        assert "tune: rank 0 could not tune: ZeroDivisionError" in str(error)  # noqa: PT017
    else:
        raise AssertionError("nothing was raised")
    finally:
        module.Session = session
    assert measured.own == cache.rows() == []


def another_version_is_not_kept(rank: int, folder: Path) -> None:
    """What one version measured serves the job, and is not taken for another's afterwards."""
    _set_up(rank, folder, "version")
    own = cache.key
    if rank == 1:
        cache.key = lambda: replace(own(), driver="another")
    try:
        model, given = tuned.Towers(), tuned.inputs()
        report = pyfused.tune(model, *given)
        assert tuned.plans(model, *given) == ["standard", "standard"]
        assert (report.path is None) == (rank == 1)
        assert ("it holds in this process alone here" in report.notes) == (rank == 1)
        assert len(cache.rows()) == (rank == 0)
    finally:
        cache.key = own


def a_wrapped_model_trains_on(rank: int, folder: Path) -> None:
    """A forward that waits for the other ranks' gradients would not come back."""
    _set_up(rank, folder, "ddp")
    model, (x, context) = DistributedDataParallel(tuned.Towers()), tuned.inputs()
    pyfused.tune(model, x, context)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert tuned.plans(model.module, x, context) == ["standard", "standard"]
    for _ in range(2):
        model(x + rank, context).square().sum().backward()
    gradient = model.module.linear.lora_b.grad
    other = [torch.empty_like(gradient) for _ in range(2)]
    torch.distributed.all_gather(other, gradient)
    assert torch.equal(*other)


CASES = {
    "ranks_agree": ranks_agree,
    "one_that_fails_fails_all": one_that_fails_fails_all,
    "another_version_is_not_kept": another_version_is_not_kept,
    "a_wrapped_model_trains_on": a_wrapped_model_trains_on,
}
