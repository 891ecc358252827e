"""Small AdaptedCLIPs with random weights, and what they are given; for the tests of AA-CLIP."""

from __future__ import annotations

import pytest
import torch
from oracle import randn
from torch import nn

from pyfused.models import AdaptedCLIP

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")


def small_clip(
    kind: str = "CLIP", vision: dict | None = None, text: dict | None = None, embed_dim: int = 32
) -> nn.Module:
    """4 layers of width 64 for images of 48x48 (9 patches), 3 of width 48 for 8 tokens; nothing at a start value."""
    vision = {"image_size": 48, "layers": 4, "width": 64, "head_width": 32, "patch_size": 16} | (vision or {})
    text = {"context_length": 8, "vocab_size": 50, "width": 48, "heads": 2, "layers": 3, "eos_id": 49} | (text or {})
    model = getattr(open_clip, kind)(embed_dim=embed_dim, vision_cfg=vision, text_cfg=text)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def adapted(clip: nn.Module | None = None, **settings) -> AdaptedCLIP:
    """An `AdaptedCLIP` in eval mode whose biases are not zero and whose attention is not uniform."""
    model = AdaptedCLIP(small_clip() if clip is None else clip, **({"num_heads": 2, "head_dim": 24} | settings))
    with torch.no_grad():
        for cross in (model.image_cross_attention, model.text_cross_attention):
            for name, parameter in cross.named_parameters():
                if name in ("q_weight", "k_weight"):
                    parameter.mul_(3.0)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.3)
    return model.eval()


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def inputs(dtype: torch.dtype = torch.float32, images: int = 3, prompts: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(1, 49, (prompts, 8), generator=torch.Generator().manual_seed(1))
    tokens[:, 5] = 49
    return randn(images, 3, 48, 48, dtype=dtype), tokens


def grads(output, model: nn.Module) -> dict[str, torch.Tensor | None]:
    """The gradient of every parameter of ``model`` that trains, for fixed cotangents of all tensors in ``output``."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    flat = [tensor for part in output for tensor in (part if isinstance(part, list) else [part])]
    total = sum((value * randn(*value.shape, dtype=value.dtype, seed=7)).sum() for value in flat)
    return dict(zip(named, torch.autograd.grad(total, list(named.values()), allow_unused=True), strict=True))
