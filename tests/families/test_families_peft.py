"""`fuse` in small models of many families: PEFT's numbers, every served layer called, every other one named."""

from __future__ import annotations

import pytest
import torch
import zoo
from test_families import distance, outputs
from torch import nn

from pyfused import explain, fuse
from pyfused.lora.targets import layers_of

peft = pytest.importorskip("peft")

# One of each kind of host: what calls its layers, what reads them, what is no nn.Linear.
TIMM = ("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256", "convnext_atto", "fastvit_mci0")
TRANSFORMERS = ("llama, tied", "gpt2", "mixtral", "bert", "t5", "clip", "siglip")
# PEFT adapts no attention whose keys have another width, and none of open_clip's own; SigLIP's text tower multiplies by
# its projection, which PEFT's layer cannot stand for.
WITHOUT = ("attentional pool", "SigLIP", "block_type custom")
OPEN_CLIP = tuple(name for name in zoo.OPEN_CLIP if name not in WITHOUT)


def adapted(model: nn.Module) -> nn.Module:
    """``model`` with PEFT's LoRA in what `inject_lora` has a form for."""
    names = [
        layer.path for layer in layers_of(model, "test") if layer.kind != "conv2d" and layer.kind != "attention"
    ] + [path for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=4, target_modules=names), model)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


def gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    model.zero_grad()
    found = outputs(model, inputs)
    generator = torch.Generator().manual_seed(2)
    # Not a sum of squares: some models give features of length one.
    slopes = [torch.randn(tensor.shape, generator=generator) for tensor in found]
    pairs = [(tensor, slope) for tensor, slope in zip(found, slopes, strict=True) if tensor.requires_grad]
    torch.autograd.backward([tensor for tensor, _ in pairs], [slope for _, slope in pairs])
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if "lora_" in name and p.grad is not None}
    return found, grads


def check(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    model = adapted(model)
    theirs, slopes = gradients(model, inputs)
    report = fuse(model, attention=True)
    ours, own = gradients(model, inputs)
    assert distance(ours, theirs) <= 1e-5
    assert own.keys() == slopes.keys()
    scale = max(float(slope.norm()) for slope in slopes.values())
    for name, slope in slopes.items():
        assert float((own[name] - slope).norm()) <= 1e-4 * max(float(slope.norm()), 1e-2 * scale), name
    # What is said to be served is called, and what is not is said.
    served = {row.path for row in report.rows}
    called = {call.module for call in explain(model, **inputs).calls}
    assert called == served
    layers = {
        path
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer) and not path.endswith("base_layer.out_proj")
    }
    assert layers == served | {path for row in report.left for path in row.paths}
    assert served


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    torch.manual_seed(0)
    check(*zoo.timm_model(name))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    check(*zoo.transformers_model(name))


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip(name):
    pytest.importorskip("open_clip")
    torch.manual_seed(0)
    check(*zoo.open_clip_model(name))
