"""Prefix tuning and BitFit in small models of many families: every attention or a reason, every token, every bias."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from test_families import distance, outputs
from torch import nn

from pyfused import PrefixTuning, bitfit, inject_lora, remove_lora
from pyfused.methods.virtual_tokens import VirtualTokens

# What has no attention that calls scaled_dot_product_attention here.
WITHOUT = {
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "convit_tiny", "convnext_atto", "convnextv2_atto",
    "fastvit_t8", "resnet18", "test_efficientnet", "test_byobnet", "mixer_s32_224", "resmlp_12_224", "gmlp_s16_224",
    "mobilevitv2_050", "poolformer_s12", "efficientvit_b0", "efficientvit_m0", "mobilenetv4_hybrid_medium", "gptj",
    "bloom", "mamba", "falcon_mamba", "swinv2", "convnext",
}  # fmt: skip
NO_BIAS = {"llama", "llama, tied", "mistral", "phi3", "gemma", "mixtral", "qwen3", "t5"}

FAMILIES: dict[str, tuple[str, Callable]] = {
    **dict.fromkeys(zoo.TIMM, ("timm", zoo.timm_model)),
    **dict.fromkeys(zoo.TRANSFORMERS, ("transformers", zoo.transformers_model)),
    **dict.fromkeys(zoo.OPEN_CLIP, ("open_clip", zoo.open_clip_model)),
}


def made(name: str) -> tuple[nn.Module, dict]:
    package, make = FAMILIES[name]
    pytest.importorskip(package)
    torch.manual_seed(0)
    model, inputs = make(name)
    return model.eval(), inputs


def loss(model: nn.Module, inputs: dict) -> torch.Tensor:
    return sum(tensor.square().mean() for tensor in outputs(model, inputs) if tensor.requires_grad)


@pytest.mark.parametrize("name", FAMILIES)
def test_prefix(name):
    model, inputs = made(name)
    if name in WITHOUT:
        with pytest.raises(ValueError, match="must have attentions outside exclude"):
            PrefixTuning(model)
        return
    with torch.no_grad():
        before = outputs(model, inputs)
    prefix = PrefixTuning(model, 2)
    tokens = [module for module in model.modules() if isinstance(module, VirtualTokens)]
    for module in tokens:
        nn.init.normal_(module.tokens)
    assert len(tokens) == len(prefix.report.rows) > 0
    changed = outputs(model, inputs)
    assert distance(changed, before) > 0
    loss(model, inputs).backward()
    assert all((module.tokens.grad.abs().amax(dim=-1) > 0).all() for module in tokens)
    # LoRA comes and goes around it.
    inject_lora(model, "attention", rank=2)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.05)
    with torch.no_grad():
        assert distance(outputs(model, inputs), changed) > 0
        remove_lora(model, merge=False)
        assert distance(outputs(model, inputs), changed) <= 1e-6
        prefix.remove()
        assert distance(outputs(model, inputs), before) <= 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_bitfit(name):
    model, inputs = made(name)
    if name in NO_BIAS:
        with pytest.raises(ValueError, match="must have biases"):
            bitfit(model)
        return
    report = bitfit(model)
    assert {row.path for row in report.rows} == {n for n, p in model.named_parameters() if p.requires_grad}
    loss(model, inputs).backward()
    # A dead bias belongs to what this call does not run.
    for path in (row.path for row in report.rows):
        owner = model.get_submodule(path.rpartition(".")[0])
        unused = all(p.grad is None for p in owner.parameters())
        assert model.get_parameter(path).grad is not None or unused, path
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
