"""LoRA in small models of many families: nothing dead, nothing silent, merged equals unmerged."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import Tensor, nn

from pyfused import LoRAModule, inject_lora, remove_lora
from pyfused.lora import third_party

# What has convolutions instead of linear layers.
CONVOLUTIONS = {
    "convnext_atto", "convnextv2_atto", "fastvit_t8", "resnet18", "test_efficientnet", "test_byobnet", "poolformer_s12",
    "efficientvit_b0", "efficientvit_m0", "mobilenetv4_hybrid_medium", "mobilevitv2_050",
}  # fmt: skip


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Every floating tensor that a call gives, in order."""
    found: list[Tensor] = []

    def collect(value: object) -> None:
        if isinstance(value, Tensor):
            found.extend([value] if value.is_floating_point() else [])
        elif isinstance(value, dict):
            collect(list(value.values()))
        elif isinstance(value, list | tuple):
            for part in value:
                collect(part)

    collect(model(**inputs))
    return found


def distance(got: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm().clamp_min(1e-30))
        for a, b in zip(got, expected, strict=True)
    )


def adapt(model: nn.Module, target: str) -> object:
    report = inject_lora(model, target, rank=2)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.05)
    return report


def check_family(model: nn.Module, inputs: dict[str, Tensor], target: str) -> None:
    model.eval()
    layers = {
        path: type(module).__name__
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.MultiheadAttention)
        or type(module).__name__ == "Conv1D"
        or third_party.is_packed_attention(module)
        or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1)
    }
    inside = {path for path, kind in layers.items() if any(path.startswith(f"{other}.") for other in layers)}
    experts = {path for path, p in model.named_parameters() if "experts." in path and p.dim() == 3}
    with torch.no_grad():
        before = outputs(model, inputs)
    report = adapt(model, target)
    # Nothing is silent: every layer of these kinds is adapted or left alone with a reason.
    told = {row.path.removesuffix(".in_proj").removesuffix(".out_proj") for row in report.rows}
    told |= {row.path for row in report.rows}
    left = {path for row in report.left for path in row.paths}
    tied = {alias for alias in layers if any(alias in note for note in report.notes)}
    assert set(layers) - inside - told - left - tied == set()
    assert experts <= left
    assert all(row.why for row in report.left)
    # Nothing is dead: one backward reaches every pair.
    adapted = outputs(model, inputs)
    assert distance(adapted, before) > 0
    sum(tensor.square().mean() for tensor in adapted if tensor.requires_grad).backward()
    dead = [name for name, p in model.named_parameters() if "lora_" in name and p.grad is None]
    assert dead == []
    # Merged equals unmerged, and taking LoRA out gives the model back.
    loras = [module for module in model.modules() if isinstance(module, LoRAModule)]
    with torch.no_grad():
        for module in loras:
            module.merge()
        assert distance(outputs(model, inputs), adapted) <= 1e-5
        for module in loras:
            module.unmerge()
        remove_lora(model, merge=False)
        assert distance(outputs(model, inputs), before) <= 1e-6
    assert not any(isinstance(module, third_party.CallingPool | third_party.CallingQKV) for module in model.modules())


@pytest.mark.parametrize("name", zoo.TIMM)
def test_timm(name):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    check_family(*zoo.timm_model(name), "conv1x1" if name in CONVOLUTIONS else "all-linear")


@pytest.mark.parametrize("name", zoo.TRANSFORMERS)
def test_transformers(name):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    check_family(*zoo.transformers_model(name), "all-linear")


@pytest.mark.parametrize("name", zoo.OPEN_CLIP)
def test_open_clip(name):
    pytest.importorskip("open_clip")
    torch.manual_seed(0)
    check_family(*zoo.open_clip_model(name), "all-linear")
