"""Training rows: small models learn scikit-learn's digits, on pyfused and on the reference from the same seed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pyfused.bench import thirdparty
from pyfused.bench.cases import data
from pyfused.bench.measure import timing
from pyfused.bench.models import fastvit, towers, training
from pyfused.bench.models.training import Classifier, TrainingStep
from pyfused.bench.record.rows import Row, Title
from pyfused.bench.run.plugin import Compare
from pyfused.bench.run.session import Session

_HELD_OUT = 297


@dataclass(frozen=True)
class Run:
    """One model, and how it is trained.

    Attributes:
        name: what the row calls it.
        model: makes it, adapted and as in use, from (images, classes).
        image_size: height and width in pixels.
        batch, steps, learning_rate: of the run, with AdamW.
        learnt: the last loss is less than this share of the first.
    """

    name: str
    model: Callable[[Tensor, int], Classifier]
    image_size: int
    batch: int
    steps: int
    learning_rate: float
    learnt: float


RUNS = {
    "vit": Run(
        "ViT 4x128 with 16 LoRA r16",
        lambda images, classes: towers.with_pyfused(towers.small_vit(images.shape[-1], classes), zero_b=True),
        image_size=32, batch=64, steps=150, learning_rate=1e-3, learnt=0.5,
    ),
    "fastvit": Run(
        "FastViT T8 with 10 adapters h = C/2",
        lambda images, classes: fastvit.with_adapters(fastvit.classifier("fastvit_t8", classes, images), zero_up=True),
        image_size=32, batch=32, steps=30, learning_rate=3e-3, learnt=0.5,
    ),
}  # fmt: skip


def row_title(test: str, device: torch.device, run: Run) -> Title:
    name = f"digits, {run.name}, batch {run.batch}, {run.steps} steps"
    return Title(name, "training step", timing.mode_of(device))


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_digits_training_run(run: Run, compare: Compare, bench_session: Session) -> None:
    device = bench_session.settings.device
    try:
        images, labels = data.digits(run.image_size)
        model = run.model(images[-run.batch :], 10).to(device)
    except thirdparty.Unavailable as error:
        pytest.skip(str(error))
    images, labels = images.to(device), labels.to(device)
    held_out = images[:_HELD_OUT], labels[:_HELD_OUT]
    # Whole batches of the 1,500 other images, again and again.
    whole = (len(images) - _HELD_OUT) // run.batch * run.batch + _HELD_OUT
    pairs = zip(images[_HELD_OUT:whole].split(run.batch), labels[_HELD_OUT:whole].split(run.batch), strict=True)
    batches = list(pairs)
    steps = {
        "pyfused": TrainingStep(model, batches, learning_rate=run.learning_rate),
        "reference": TrainingStep(
            copy.deepcopy(model), batches, training.reference_operators, learning_rate=run.learning_rate
        ),
    }

    def curves(row: Row) -> None:
        row.loss = {name: step.losses for name, step in steps.items()}
        row.facts["held_out_accuracy"] = {name: step.accuracy(*held_out) for name, step in steps.items()}

    name, measured, _ = row_title("test_digits_training_run", device, run)
    row = compare(
        name,
        {name: [step] for name, step in steps.items()},
        kind="training",
        measured=measured,
        rounds=run.steps,
        facts={"dtype": "float32", "steps": run.steps, "images": len(images)},
        complete=curves,
    )
    ours, plain = row.loss["pyfused"], row.loss["reference"]
    gap = max(abs(a - b) for a, b in zip(ours, plain, strict=True))
    assert gap < 0.02 * plain[0], f"the loss curves part by {gap:.3g}"
    assert ours[-1] < run.learnt * ours[0], f"nothing was learnt: loss {ours[0]:.3f} -> {ours[-1]:.3f}"
