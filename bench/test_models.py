"""Model row: a training step of open_clip's ViT-B-32 image tower with 48 LoRA modules, on real photographs."""

from __future__ import annotations

import copy

import pytest
import torch

from pyfused.bench import data, memory, thirdparty, towers
from pyfused.bench.plugin import Compare
from pyfused.bench.rows import Row
from pyfused.bench.session import Session
from pyfused.bench.towers import TrainingStep

_HOW = {
    "pyfused": "inject_lora: in_proj, out_proj, c_fc and c_proj of 12 blocks",
    "reference": "the same modules on plain torch's formula",
    "PEFT": "nn.MultiheadAttention adapted whole, in_proj and out_proj merged for every forward, out_proj's term twice "
    "(PEFT's pull request 3774), hence another loss; c_fc and c_proj are ordinary LoRA layers",
    "PEFT (nn.Linear attention)": "the attention rewritten with nn.Linear projections; 48 ordinary LoRA layers",
}


def test_clip_vit_b32_training_step(compare: Compare, bench_session: Session) -> None:
    device = bench_session.settings.device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    unavailable = {}
    try:
        base = towers.clip_vit_b32(classes=2).to(device, dtype)
        images, labels = data.photographs(size=224)
    except thirdparty.Unavailable as error:
        pytest.skip(str(error))
    images, labels = images.to(device, dtype), labels.to(device)
    model = towers.with_pyfused(base)
    count = sum(parameter.numel() for parameter in model.lora_parameters().values())
    assert count == towers.CLIP_LORA_PARAMETERS, count

    deviations = towers.tower_deviations(model, images, labels)
    batches = [(images, labels)]
    steps = {"reference": TrainingStep(copy.deepcopy(model), batches, towers.reference_operator)}
    try:
        steps["PEFT"] = TrainingStep(towers.with_peft(base, model), batches)
        linear = towers.with_peft(base, model, linear_attention=True)
        steps["PEFT (nn.Linear attention)"] = TrainingStep(linear, batches)
    except thirdparty.Unavailable as error:
        unavailable["PEFT"] = str(error)
    steps = {"pyfused": TrainingStep(model, batches), **steps}

    def losses(row: Row) -> None:
        row.facts["steps"] = len(steps["pyfused"].losses)
        row.loss = {name: step.losses[-1] for name, step in steps.items()}

    row = compare(
        "open_clip ViT-B-32 visual, batch 8, 48 LoRA r16",
        {name: [step] for name, step in steps.items()},
        kind="model",
        measured="training step",
        deviations=deviations,
        facts={"dtype": str(dtype), "lora_parameters": count, "batch": len(images), "how": _HOW},
        peak_bytes={name: memory.peak_bytes(step, device) for name, step in steps.items()},
        saved_bytes={
            name: memory.saved_bytes(step.forward, [images, *step.model.parameters()]) for name, step in steps.items()
        },
        unavailable=unavailable,
        complete=losses,
    )
    # Rounding differences grow from step to step; a wrong gradient shows at once.
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    assert row.loss["pyfused"] == pytest.approx(row.loss["reference"], rel=tolerance, abs=tolerance)
