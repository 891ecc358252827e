"""open_clip's image towers with LoRA, by pyfused, by plain torch and by PEFT, with equal weights."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfused import inject_lora
from pyfused.bench import thirdparty
from pyfused.bench.models.training import Classifier

TARGETS = ("in_proj", "out_proj", "c_fc", "c_proj")
RANK, ALPHA = 16, 32
# 12 blocks x (in_proj 49,152 + out_proj 24,576 + c_fc 61,440 + c_proj 61,440).
CLIP_LORA_PARAMETERS = 2_359_296


def lora_parameters(model: Classifier) -> dict[str, nn.Parameter]:
    """By the names that pyfused gives them, whichever library made them."""
    return {_common(name): p for name, p in model.named_parameters() if re.search("lora_[abAB]", name)}


def clip_vit_b32(classes: int) -> Classifier:
    """open_clip's ViT-B-32 image tower with random weights and no LoRA yet, the same on every call."""
    open_clip = thirdparty.load("open_clip")
    torch.manual_seed(0)
    visual = open_clip.create_model("ViT-B-32", pretrained=None).visual
    return Classifier(visual, visual.output_dim, classes)


def small_vit(image_size: int, classes: int) -> Classifier:
    """A ViT of 4 blocks of width 128 from open_clip's own class, the same on every call."""
    transformer = thirdparty.load("open_clip.transformer")
    torch.manual_seed(0)
    visual = transformer.VisionTransformer(
        image_size=image_size, patch_size=image_size // 4, width=128, layers=4, heads=4, mlp_ratio=4.0, output_dim=64
    )
    return Classifier(visual, 64, classes)


def with_pyfused(model: Classifier, zero_b: bool = False) -> Classifier:
    """A copy of ``model`` with LoRA by `inject_lora`; B is random, so that no gradient is zero, or zero as in use."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    inject_lora(model.visual, target_modules=TARGETS, rank=RANK, alpha=ALPHA)
    if not zero_b:
        with torch.no_grad():
            for name, parameter in lora_parameters(model).items():
                if name.endswith("lora_b"):
                    parameter.normal_(std=0.02)
    return model


class LinearAttention(nn.Module):
    """An nn.MultiheadAttention, batch first and without masks, whose two projections are nn.Linear modules."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.in_proj = nn.Linear(attention.embed_dim, 3 * attention.embed_dim)
        self.in_proj.weight, self.in_proj.bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = nn.Linear(attention.embed_dim, attention.embed_dim)
        self.out_proj.weight, self.out_proj.bias = attention.out_proj.weight, attention.out_proj.bias

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **unused) -> tuple[Tensor, None]:
        heads = self.in_proj(query).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None


def with_peft(model: Classifier, weights_of: Classifier, linear_attention: bool = False) -> Classifier:
    """A copy of ``model`` with the same modules adapted by PEFT, and the LoRA weights of ``weights_of``.

    PEFT adapts an nn.MultiheadAttention as a whole: before every forward it merges ``s B A`` into in_proj's and
    out_proj's weights and takes it out afterwards. (Versions up to 0.21 merge out_proj's twice, so that its loss is
    another one: huggingface/peft pull request 3774.) c_fc and c_proj are ordinary LoRA layers.

    Args:
        linear_attention: give PEFT a `LinearAttention` instead, so that all 48 modules are ordinary LoRA layers: what
            a user gets only by rewriting the model, and PEFT at its best.

    Raises:
        thirdparty.Unavailable: PEFT is missing.
        RuntimeError: the adapted parameters are not the same ones.
    """
    peft = thirdparty.load("peft")
    model = copy.deepcopy(model)
    targets = ["attn", "c_fc", "c_proj"]
    if linear_attention:
        targets = list(TARGETS)
        visual: Any = model.visual
        for block in visual.transformer.resblocks:
            block.attn = LinearAttention(block.attn)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
    model.visual = peft.get_peft_model(model.visual, config)
    wanted, found = lora_parameters(weights_of), lora_parameters(model)
    if {name: p.shape for name, p in wanted.items()} != {name: p.shape for name, p in found.items()}:
        different = sorted(wanted.keys() ^ found.keys())
        raise RuntimeError(f"PEFT adapts other parameters than pyfused: {different[:4]}")
    with torch.no_grad():
        for name, parameter in found.items():
            parameter.copy_(wanted[name])
    return model


def _common(name: str) -> str:
    """PEFT's name of a LoRA parameter -> pyfused's; pyfused's stays."""
    name = re.sub(r"base_model\.model\.|base_layer\.|\.default\.weight$", "", name)
    name = name.replace("lora_A", "lora_a").replace("lora_B", "lora_b")
    return re.sub(r"\.attn\.(in_proj\.)?(lora_[ab])$", r".attn.in_proj_\2", name)
