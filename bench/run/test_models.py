"""Model rows: a training step of a whole image tower on real photographs."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor

from pyfused.bench import thirdparty
from pyfused.bench.cases import data
from pyfused.bench.cases.adapter_residual import eager_adapter_residual
from pyfused.bench.cases.baselines import compile_refusal
from pyfused.bench.measure import memory, parity, timing
from pyfused.bench.models import aa_clip, fastvit, towers, training
from pyfused.bench.models.training import TrainingStep, reference_operators
from pyfused.bench.record.rows import Row, Title
from pyfused.bench.run.plugin import Compare
from pyfused.bench.run.session import Session

_LORA = {
    "pyfused": "inject_lora: in_proj, out_proj, c_fc and c_proj of 12 blocks",
    "reference": "the same modules on plain torch's formula",
    "PEFT": "nn.MultiheadAttention adapted whole, in_proj and out_proj merged for every forward, out_proj's term twice "
    "(PEFT's pull request 3774), hence another loss; c_fc and c_proj are ordinary LoRA layers",
    "PEFT (nn.Linear attention)": "the attention rewritten with nn.Linear projections; 48 ordinary LoRA layers",
}
_ADAPTERS = {
    "pyfused": "add_adapters: one adapter in each of 10 RepMixer blocks, two in each of 2 attention blocks",
    "eager": "the same modules on 1x1 convolutions, GELU, a product with gamma and sums",
}
_STAGE_2 = {
    "pyfused": "AdaptedCLIP.encode_image: 6 adapters, 4 projections, cross-attention to 16 prompts of 77 tokens",
    "reference": "the same model on plain torch's formulas",
}


def row_title(test: str, device: torch.device) -> Title:
    size, batch = data.PHOTOGRAPHS, data.PHOTOGRAPHS * _fastvit_copies(device)
    tower, pixels = _aa_clip_tower(device)
    names = {
        "test_clip_vit_b32_training_step": f"open_clip ViT-B-32 visual, batch {size}, 48 LoRA r16",
        "test_fastvit_sa12_training_step": f"timm fastvit_sa12, batch {batch}, 14 adapters h = C/2",
        "test_aa_clip_stage_2_training_step": f"AdaptedCLIP stage 2, open_clip {tower} at {pixels} px, batch {size}",
    }
    return Title(names[test], "training step", timing.mode_of(device))


def _fastvit_copies(device: torch.device) -> int:
    return 1 if device.type == "cpu" else 8


def _aa_clip_tower(device: torch.device) -> tuple[str, int]:
    return ("ViT-B-32", 224) if device.type == "cpu" else ("ViT-L-14", 518)


def _batch(device: torch.device, dtype: torch.dtype, copies: int = 1, size: int = 224) -> tuple[Tensor, Tensor]:
    images, labels = data.photographs(size)
    return images.repeat(copies, 1, 1, 1).to(device, dtype), labels.repeat(copies).to(device)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _row(
    compare: Compare,
    title: Title,
    deviations: list[parity.Deviation],
    batch: tuple[Tensor, Tensor],
    steps: dict[str, TrainingStep],
    baseline: str,
    facts: dict[str, object],
    unavailable: dict[str, str],
) -> None:
    """Parity first, then the steps' time, memory and loss; ``baseline`` is to reach pyfused's loss."""
    images, _ = batch
    dtype = _dtype(images.device)

    def losses(row: Row) -> None:
        row.facts["steps"] = _before_repeats(len(steps["pyfused"].losses), row)
        row.loss = {name: step.losses[row.facts["steps"] - 1] for name, step in steps.items()}

    row = compare(
        title.name,
        {name: [step] for name, step in steps.items()},
        kind="model",
        measured=title.measured,
        deviations=deviations,
        facts={"dtype": str(dtype), "batch": len(images), **facts},
        peak_bytes={name: memory.peak_bytes(step, images.device) for name, step in steps.items()},
        saved_bytes={
            name: memory.saved_bytes(step.forward, [images, *step.model.parameters()]) for name, step in steps.items()
        },
        unavailable=unavailable,
        complete=losses,
    )
    # Rounding differences grow from step to step; a wrong gradient shows at once.
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    assert row.loss["pyfused"] == pytest.approx(row.loss[baseline], rel=tolerance, abs=tolerance)


def _before_repeats(steps: int, row: Row) -> int:
    """Of the steps that were made those until the end of the first attempt: a noisy row has no more to part in."""
    return steps - row.rounds * (row.attempts - 1)


def test_clip_vit_b32_training_step(compare: Compare, bench_session: Session) -> None:
    device = bench_session.settings.device
    unavailable = {}
    try:
        base = towers.clip_vit_b32(classes=2).to(device, _dtype(device))
        batch = _batch(device, _dtype(device))
    except thirdparty.Unavailable as error:
        pytest.skip(str(error))
    model = towers.with_pyfused(base)
    count = sum(parameter.numel() for parameter in towers.lora_parameters(model).values())
    assert count == towers.CLIP_LORA_PARAMETERS, count

    steps = {
        "pyfused": TrainingStep(copy.deepcopy(model), [batch]),
        "reference": TrainingStep(copy.deepcopy(model), [batch], training.reference_operators),
    }
    try:
        steps["PEFT"] = TrainingStep(towers.with_peft(base, model), [batch])
        linear = towers.with_peft(base, model, linear_attention=True)
        steps["PEFT (nn.Linear attention)"] = TrainingStep(linear, [batch])
    except thirdparty.Unavailable as error:
        unavailable["PEFT"] = str(error)
    facts = {"lora_parameters": count, "how": _LORA}
    title = row_title("test_clip_vit_b32_training_step", device)
    _row(compare, title, training.deviations(model, *batch), batch, steps, "reference", facts, unavailable)


def test_fastvit_sa12_training_step(compare: Compare, bench_session: Session) -> None:
    device = bench_session.settings.device
    unavailable = {}
    try:
        base = fastvit.classifier("fastvit_sa12", 2, data.photographs(size=224)[0]).to(device, _dtype(device))
        batch = _batch(device, _dtype(device), copies=_fastvit_copies(device))
    except thirdparty.Unavailable as error:
        pytest.skip(str(error))
    model = fastvit.with_adapters(base)
    count = sum(parameter.numel() for parameter in model.visual.parameters() if parameter.requires_grad)
    assert count == fastvit.SA12_ADAPTER_PARAMETERS, count

    eager = functools.partial(training.replaced, {"adapter_residual": eager_adapter_residual})
    steps = {
        "pyfused": TrainingStep(copy.deepcopy(model), [batch]),
        "eager": TrainingStep(copy.deepcopy(model), [batch], eager),
    }
    refusal = compile_refusal(device) if device.type == "cuda" else fastvit.COMPILE_REFUSAL
    if refusal is None:
        steps["torch.compile"] = TrainingStep(copy.deepcopy(model), [batch], eager, compiled=True)
    else:
        unavailable["torch.compile of FastViT"] = refusal
    facts = {"adapter_parameters": count, "how": _ADAPTERS}
    title = row_title("test_fastvit_sa12_training_step", device)
    _row(compare, title, training.deviations(model, *batch), batch, steps, "eager", facts, unavailable)


def test_aa_clip_stage_2_training_step(compare: Compare, bench_session: Session) -> None:
    device = bench_session.settings.device
    dtype = _dtype(device)
    tower, size = _aa_clip_tower(device)
    try:
        model = aa_clip.second_stage(tower, size, classes=2).to(device, dtype)
        batch = _batch(device, dtype, size=size)
    except thirdparty.Unavailable as error:
        pytest.skip(str(error))
    steps = {
        "pyfused": TrainingStep(copy.deepcopy(model), [batch]),
        "reference": TrainingStep(copy.deepcopy(model), [batch], reference_operators),
    }
    facts = {"trained_parameters": sum(p.numel() for p in model.trained().values()), "how": _STAGE_2}
    title = row_title("test_aa_clip_stage_2_training_step", device)
    # One window of each photograph is enough for the gate.
    found = aa_clip.deviations(model, *(tensor[::4] for tensor in batch))
    _row(compare, title, found, batch, steps, "reference", facts, {})
