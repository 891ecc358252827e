"""`pyfused check gradient-ratio`: the diagnostic on a small AA-CLIP with random weights, fused and by the reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfused.bench import thirdparty
from pyfused.bench.models.training import reference_operators
from pyfused.diagnostics import GradientRatio, GradientRatioTable, gradient_ratio
from pyfused.models import AdaptedCLIP

# How far apart the two ratios may be, relatively: sums of float32 in another order.
TOLERANCE = 1e-4
_WORD = {True: "ok      ", False: "FAILED  "}


def run(
    device: torch.device,
    threads: int | None = None,
    on_row: Callable[[str, GradientRatio], None] = lambda name, row: None,
) -> int:
    """Prints the ratio of the first image adapter in stage 2: fused, by the reference, with w = 0, and in three loops.

    Args:
        device: where to compute.
        threads: CPU threads for torch; None keeps its own number.
        on_row: called with each ratio and what it is of.

    Returns:
        The exit status: 1 when the two ways disagree, or the ratio with w = 0 is not exactly 1, else 0.

    Raises:
        Unavailable: open_clip is not installed.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    model, images, tokens = small_model(device)
    print("gradient of the first image adapter in stage 2: AdaptedCLIP of 4 layers, width 64, random weights")
    fused = measure(model, images, tokens)
    with reference_operators():
        plain = measure(model, images, tokens)
    weight, model.image_cross_attention.weight = model.image_cross_attention.weight, 0.0
    nothing = measure(model, images, tokens)
    model.image_cross_attention.weight = weight
    for name, found in (("fused", fused), ("reference", plain), ("fused, w = 0", nothing)):
        print(f"{name:14s}{found}")
        on_row(name, found)
    apart = abs(fused.ratio / plain.ratio - 1.0)
    agree, exact = apart <= TOLERANCE, nothing.ratio == 1.0
    print(f"{_WORD[agree]}fused and reference ratios differ by {apart:.1e}, {TOLERANCE:.0e} allowed")
    print(f"{_WORD[exact]}with w = 0 the ratio is 1 exactly")
    loops = over_loops(model, images, tokens)
    print(f"\nbefore each loop of a stage 2 with Adam, its rate halved from loop to loop:\n{loops}")
    for name, found in loops.rows.items():
        on_row(name, found)
    return 0 if agree and exact else 1


def small_model(device: torch.device) -> tuple[AdaptedCLIP, Tensor, Tensor]:
    """(model in eval mode, images, tokens), the same on every call."""
    open_clip = thirdparty.load("open_clip")
    vision = {"image_size": 48, "layers": 4, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 48, "heads": 2, "layers": 3}
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        clip = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)
        model = AdaptedCLIP(clip, num_heads=2, head_dim=24).to(device).eval()
        images, tokens = torch.randn(4, 3, 48, 48), torch.randint(1, 49, (6, 8))
    tokens[:, -1] = 49
    return model, images.to(device), tokens.to(device)


def measure(model: AdaptedCLIP, images: Tensor, tokens: Tensor) -> GradientRatio:
    """Patches are drawn towards random directions, with the prompts' tokens as their context."""
    return gradient_ratio(model, _loss(model, images, tokens))


def over_loops(
    model: AdaptedCLIP, images: Tensor, tokens: Tensor, loops: int = 3, steps: int = 10, rate: float = 1e-3
) -> GradientRatioTable:
    """`measure` at the start of each loop of any `AdaptedCLIP`'s stage 2, which is trained on the way.

    Args:
        model: trained in place, its image side with cross-attention.
        images: (B, 3, H, W) of the model's size.
        tokens: (P, L), the prompts.
        loops: how many. Default 3.
        steps: of Adam, anew in each loop, with betas 0.5 and 0.999. Default 10.
        rate: of the first loop, halved from loop to loop. Default 1e-3.
    """
    rows = {}
    trained = model.set_stage(2)
    loss = _loss(model, images, tokens)
    for loop in range(loops):
        rows[f"loop {loop + 1}"] = gradient_ratio(model, loss)
        optimizer = torch.optim.Adam(trained, lr=rate / 2**loop, betas=(0.5, 0.999))
        for _ in range(steps):
            loss(model).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return GradientRatioTable(rows)


@torch.no_grad()
def _loss(model: AdaptedCLIP, images: Tensor, tokens: Tensor) -> Callable[[AdaptedCLIP], Tensor]:
    context = model.text_context(tokens)

    def loss(model: AdaptedCLIP) -> Tensor:
        patches = torch.stack(model.encode_image(images, context).levels)
        target = torch.randn(patches.shape, generator=torch.Generator().manual_seed(1)).to(patches)
        return -F.cosine_similarity(patches, target, dim=-1).mean()

    return loss
