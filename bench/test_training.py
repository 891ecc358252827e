"""Training row: a small ViT learns scikit-learn's digits, on pyfused and on the reference from the same seed."""

from __future__ import annotations

import copy

import pytest

from pyfused.bench import data, thirdparty, towers
from pyfused.bench.plugin import Compare
from pyfused.bench.rows import Row
from pyfused.bench.session import Session
from pyfused.bench.towers import TrainingStep

STEPS = 150
_BATCH = 64
_HELD_OUT = 297
_IMAGE_SIZE = 32


def test_digits_training_run(compare: Compare, bench_session: Session) -> None:
    device = bench_session.settings.device
    try:
        base = towers.small_vit(_IMAGE_SIZE, classes=10)
        images, labels = data.digits(_IMAGE_SIZE)
    except thirdparty.Unavailable as error:
        pytest.skip(str(error))
    images, labels = images.to(device), labels.to(device)
    held_out = images[:_HELD_OUT], labels[:_HELD_OUT]
    # An epoch is 23 whole batches of the 1,500 other images.
    batches = list(zip(images[_HELD_OUT:].split(_BATCH)[:-1], labels[_HELD_OUT:].split(_BATCH)[:-1], strict=True))
    model = towers.with_pyfused(base, zero_b=True).to(device)
    steps = {
        "pyfused": TrainingStep(model, batches, learning_rate=1e-3),
        "reference": TrainingStep(copy.deepcopy(model), batches, towers.reference_operator, learning_rate=1e-3),
    }

    def curves(row: Row) -> None:
        row.loss = {name: step.losses for name, step in steps.items()}
        row.facts["held_out_accuracy"] = {name: step.accuracy(*held_out) for name, step in steps.items()}

    row = compare(
        f"digits, ViT 4x128 with 16 LoRA r16, batch {_BATCH}, {STEPS} steps",
        {name: [step] for name, step in steps.items()},
        kind="training",
        measured="training step",
        rounds=STEPS,
        facts={"dtype": "float32", "steps": STEPS, "images": len(images)},
        complete=curves,
    )
    ours, plain = row.loss["pyfused"], row.loss["reference"]
    gap = max(abs(a - b) for a, b in zip(ours, plain, strict=True))
    assert gap < 0.02 * plain[0], f"the loss curves part by {gap:.3g}"
    assert ours[-1] < 0.5 * ours[0], f"nothing was learnt: loss {ours[0]:.3f} -> {ours[-1]:.3f}"
