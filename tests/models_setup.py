"""Models with random weights that several test files share; conftest.py makes open_clip importable beside CPU torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn


class Classifier(nn.Module):
    """A CLIP's image tower with a linear head on its features; the text tower is carried along."""

    def __init__(self, clip: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.clip = clip
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.clip.encode_image(images))


def vit_b_32(device: str = "cpu", classes: int = 102) -> Classifier:
    """open_clip's ViT-B-32, whole; on "meta" it is there to be counted."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")

    with torch.device(device):
        return Classifier(open_clip.create_model("ViT-B-32", pretrained=None, device=device), 512, classes)


def small_vit(width: int = 32, layers: int = 2) -> nn.Module:
    """open_clip's vision tower at 16x16 pixels: (B, 3, 16, 16) -> (B, 8)."""
    transformer = pytest.importorskip("open_clip.transformer", reason="open_clip is not installed")
    return transformer.VisionTransformer(
        image_size=16, patch_size=8, width=width, layers=layers, heads=4, mlp_ratio=2.0, output_dim=8
    )


def small_clip() -> nn.Module:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    vision = {"image_size": 16, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 7, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)


def fastvit(name: str = "fastvit_t8", **options) -> nn.Module:
    """timm's FastViT in eval mode, with random weights: (B, 3, H, W) -> (B, 10), H and W from 64 on.

    T8 has a third of its channels here: its depths, names and kinds of blocks are what tests are about.
    """
    timm = pytest.importorskip("timm", reason="timm is not installed")
    narrow = {"embed_dims": (16, 32, 64, 128)} if name == "fastvit_t8" else {}
    return timm.create_model(name, **{"num_classes": 10} | narrow | options).eval()


@torch.no_grad()
def fastvit_block(kind: str, channels: int = 32, drop_path: float = 0.0, **options) -> nn.Module:
    """timm's ``RepMixerBlock`` or ``AttentionBlock`` in eval mode, with nothing left at a start value."""
    module = pytest.importorskip("timm.models.fastvit", reason="timm is not installed")
    block = getattr(module, kind)(channels, drop_path=drop_path, **options)
    for name, tensor in block.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif tensor.dim() == 4 or name.endswith(("qkv.weight", "proj.weight")):
            tensor.copy_(torch.randn(tensor.shape) / tensor[0].numel() ** 0.5)
        elif not ("gamma" in name and "layer_scale_init_value" in options):
            tensor.normal_().mul_(0.5)
    return block.eval()


@torch.no_grad()
def wake(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """``module`` with B no longer zero, so that LoRA acts."""
    for name, parameter in module.named_parameters():
        if name.endswith("lora_b"):
            parameter.copy_(torch.randn(parameter.shape) * scale)
    return module
