"""AA-CLIP's losses, anomaly maps and scores: patches and whole images compared with a class's two states.

``text`` is everywhere the features of the two states, the normal one first, as `AdaptedCLIP.encode_class` gives them:
(text width, 2) for all images, or (B, text width, 2). ``levels`` are lists of (B, patches, text width), such as
`AdaptedCLIP.encode_image`'s or `AdaptedCLIP.image_context`'s. Maps, losses and scores are float32, or float64 of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfused.ops.contract import checks

# What a cosine is multiplied by before the softmax.
SCALE = 100.0


# ---- maps


def anomaly_logits(patches: Tensor, text: Tensor, size: tuple[int, int]) -> Tensor:
    """The map before its softmax: 100 * patches . text, bilinear to ``size`` with aligned corners, (B, 2, H, W).

    Args:
        patches: (B, patches, text width), row by row, of an image with the proportions of ``size``.
        text: (text width, 2) or (B, text width, 2).
        size: (H, W) of the map in pixels.

    Raises:
        ValueError: shapes do not fit, or no grid with the proportions of ``size`` has as many patches.
    """
    return _resized(_grid_of_logits("anomaly_logits", patches, text, size), size)


def anomaly_map(
    levels: Sequence[Tensor], text: Tensor, size: tuple[int, int], kernel: int = 7, sigma: float = 1.0
) -> Tensor:
    """How anomalous each pixel is, (B, H, W): (1 + abnormal - normal) / 2 of each level before the softmax, summed.

    Each level is blurred on its patches by a Gaussian, mirrored at the border, and then brought to ``size``.

    Args:
        levels: (B, patches, text width) each.
        text: (text width, 2) or (B, text width, 2).
        size: (H, W) of the map in pixels.
        kernel: width of the blur in patches, odd. Default 7; 9 for medical images.
        sigma: its standard deviation in patches, above 0. Default 1; 1.5 for medical images.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: as `anomaly_logits`, no level, a blur out of range, or one as wide as the grid of patches.
    """
    checks.integer("anomaly_map", "kernel", kernel, 1)
    checks.finite("anomaly_map", "sigma", sigma)
    if kernel % 2 == 0 or sigma <= 0:
        raise ValueError(f"anomaly_map: kernel must be odd and sigma above 0, got {kernel} and {sigma}")
    if not levels:
        raise ValueError("anomaly_map: levels must have at least one level, got none")
    total = None
    for patches in levels:
        normal, abnormal = _grid_of_logits("anomaly_map", patches, text, size).unbind(1)
        score = _resized(_blurred((1 + abnormal - normal)[:, None] / 2, kernel, sigma), size)[:, 0]
        total = score if total is None else total + score
    assert total is not None
    return total


def _grid_of_logits(caller: str, patches: Tensor, text: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 2, h, w)."""
    checks.tensor(caller, "patches", patches)
    if patches.dim() != 3:
        raise ValueError(f"{caller}: patches must have shape (B, patches, width), got {tuple(patches.shape)}")
    count = patches.shape[1]
    rows = round(math.sqrt(count * size[0] / size[1]))
    if rows < 1 or count % rows or abs(rows * size[1] - count // rows * size[0]) >= max(size):
        raise ValueError(f"{caller}: patches must form a grid with the proportions of size {size}, got {count}")
    scores = SCALE * _similarity(caller, patches, text)
    return scores.transpose(1, 2).unflatten(2, (rows, count // rows))


def _similarity(caller: str, features: Tensor, text: Tensor) -> Tensor:
    """features (B, N, width) . text -> (B, N, 2), in float32 at least: 16 bits resolve a cosine times 100 to 0.4."""
    checks.tensor(caller, "text", text)
    batch, _, width = features.shape
    if text.shape not in ((width, 2), (batch, width, 2)):
        raise ValueError(
            f"{caller}: text must have shape (width, 2) = ({width}, 2) or (B, width, 2) = ({batch}, {width}, 2), "
            f"got {tuple(text.shape)}"
        )
    wide = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        return features.to(wide) @ text.to(wide)


def _resized(grid: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(grid, size=tuple(size), mode="bilinear", align_corners=True)


def _blurred(grid: Tensor, kernel: int, sigma: float) -> Tensor:
    """grid (B, 1, h, w)."""
    half = kernel // 2
    if half >= min(grid.shape[2:]):
        raise ValueError(
            f"anomaly_map: kernel must reach less far than the grid of patches {tuple(grid.shape[2:])}, got {kernel}"
        )
    steps = torch.arange(-half, half + 1, dtype=grid.dtype, device=grid.device)
    weights = torch.softmax(-steps.square() / (2 * sigma**2), 0)
    grid = F.pad(grid, (half, half, half, half), mode="reflect")
    return F.conv2d(F.conv2d(grid, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


# ---- losses


def focal_loss(logits: Tensor, masks: Tensor, gamma: float = 2.0) -> Tensor:
    """The mean over all pixels of ``-(1 - p)^gamma log p``, p the softmax's share of the pixel's true state.

    Args:
        logits: (B, 2, H, W), such as `anomaly_logits`.
        masks: (B, H, W), 1 or True where the image is abnormal.
        gamma: 0, where it is the cross-entropy, or at least 1: between them the gradient at p = 1 is infinite.
            Default 2.

    Raises:
        TypeError, ValueError: masks of another shape, or gamma out of range.

    Source: Lin et al., "Focal loss for dense object detection", 2017. From the logits, so that no p is 0; the original
    adds 1e-5 to p.
    """
    checks.finite("focal_loss", "gamma", gamma)
    if gamma != 0 and gamma < 1:
        raise ValueError(f"focal_loss: gamma must be 0 or at least 1, got {gamma}")
    _check_masks("focal_loss", logits, masks)
    shares = torch.log_softmax(logits, 1)
    true = torch.where(masks.bool(), shares[:, 1], shares[:, 0])
    return -((-torch.expm1(true)) ** gamma * true).mean()


def dice_loss(shares: Tensor, masks: Tensor) -> Tensor:
    """The mean over images of ``1 - (2 sum(p m) + 1) / (sum(p) + sum(m) + 1)``, sums over an image's pixels.

    Args:
        shares: p, (B, H, W), in 0..1.
        masks: m, (B, H, W), 0 or 1.

    Source: Milletari et al., "V-Net", 2016, smoothed by 1.
    """
    masks = masks.to(shares.dtype)
    both, given, wanted = (part.flatten(1).sum(1) for part in (shares * masks, shares, masks))
    return (1 - (2 * both + 1) / (given + wanted + 1)).mean()


def segmentation_loss(levels: Sequence[Tensor], text: Tensor, masks: Tensor) -> Tensor:
    """Focal loss + dice(normal, 1 - mask) + dice(abnormal, mask) of each level's map at the masks' size, summed.

    Args:
        levels: (B, patches, text width) each.
        text: (text width, 2) or (B, text width, 2).
        masks: (B, H, W), 1 or True where the image is abnormal.

    Raises:
        TypeError, ValueError: shapes do not fit, or no level.
    """
    if not levels:
        raise ValueError("segmentation_loss: levels must have at least one level, got none")
    checks.tensor("segmentation_loss", "masks", masks)
    if masks.dim() != 3:
        raise ValueError(f"segmentation_loss: masks must have shape (B, H, W), got {tuple(masks.shape)}")
    abnormal = masks.bool()
    total = torch.zeros((), device=masks.device)
    for patches in levels:
        logits = anomaly_logits(patches, text, (masks.shape[1], masks.shape[2]))
        shares = torch.softmax(logits, 1)
        total = total + focal_loss(logits, abnormal)
        total = total + dice_loss(shares[:, 0], ~abnormal) + dice_loss(shares[:, 1], abnormal)
    return total


def text_stage_loss(
    levels: Sequence[Tensor], text: Tensor, masks: Tensor, classes: Tensor, weight: float = 0.1
) -> Tensor:
    """Stage 1's: `segmentation_loss` + weight * (mean over classes of normal . abnormal)^2, which parts the states.

    Args:
        levels: of the images, such as `AdaptedCLIP.image_context`'s, which get no gradient.
        text: of the classes, (classes, text width, 2), such as stacked `AdaptedCLIP.encode_class`.
        masks: (B, H, W).
        classes: (B,), int64, each image's place in ``text``.
        weight: of the second part. Default 0.1.

    Raises:
        TypeError, ValueError: shapes do not fit, or weight is not finite.
    """
    checks.finite("text_stage_loss", "weight", weight)
    checks.tensor("text_stage_loss", "text", text)
    if text.dim() != 3:
        raise ValueError(f"text_stage_loss: text must have shape (classes, width, 2), got {tuple(text.shape)}")
    together = (text[..., 0] * text[..., 1]).sum(1).mean() ** 2
    return segmentation_loss(levels, text[classes], masks) + weight * together


def image_stage_loss(
    levels: Sequence[Tensor], detection: Tensor, text: Tensor, masks: Tensor, labels: Tensor
) -> Tensor:
    """Stage 2's: `segmentation_loss` + cross-entropy of detection . text against the images' labels.

    Args:
        levels, detection: `AdaptedCLIP.encode_image`'s.
        text: (text width, 2) or (B, text width, 2).
        masks: (B, H, W).
        labels: (B,), int64, 1 for an abnormal image.

    Raises:
        TypeError, ValueError: shapes do not fit.
    """
    logits = _similarity("image_stage_loss", detection[:, None], text)[:, 0]
    return segmentation_loss(levels, text, masks) + F.cross_entropy(logits, labels)


def _check_masks(caller: str, logits: Tensor, masks: Tensor) -> None:
    checks.tensor(caller, "masks", masks)
    if logits.dim() != 4 or logits.shape[1] != 2:
        raise ValueError(f"{caller}: logits must have shape (B, 2, H, W), got {tuple(logits.shape)}")
    expected = (len(logits), *logits.shape[2:])
    checks.shape(caller, "masks", masks, expected, "(B, H, W)")


# ---- scores


def detection_score(detection: Tensor, text: Tensor) -> Tensor:
    """(1 + detection . abnormal) / 2, (B,).

    Args:
        detection: `AdaptedCLIP.encode_image`'s, (B, text width).
        text: (text width, 2) or (B, text width, 2).
    """
    return (1 + _similarity("detection_score", detection[:, None], text)[:, 0, 1]) / 2


def image_score(maps: Tensor, detections: Tensor) -> Tensor:
    """How anomalous each image is, (B,): half its map's maximum, half its detection score.

    Both are first brought to 0..1 over all pixels and all images given, which belong together: a class's test images.
    Otherwise the map, a sum over levels of cosines times 100, would leave nothing of the other half.

    Args:
        maps: `anomaly_map`'s, (B, H, W).
        detections: `detection_score`'s, (B,).
    """
    highest = _rescaled(maps).flatten(1).amax(1)
    return (highest + _rescaled(detections)) / 2


def _rescaled(values: Tensor) -> Tensor:
    """To 0..1; zeros where all are alike."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)
