"""Real input that ships inside scikit-learn: two photographs, and 1,797 handwritten digits."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfused.bench import thirdparty

# Mean and standard deviation of the images that CLIP was trained on (Radford et al., 2021, published code).
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_WINDOW = 320
# Windows that `photographs` gives.
PHOTOGRAPHS = 8


def photographs(size: int) -> tuple[Tensor, Tensor]:
    """Four overlapping windows of each of the two photographs, as CLIP's preprocessing gives them.

    Args:
        size: height and width wanted, in pixels.

    Returns:
        float32 images (8, 3, size, size), and int64 labels (8,): which photograph each window is from.

    Raises:
        thirdparty.Unavailable: scikit-learn or pillow is missing.
    """
    thirdparty.load("PIL")
    pictures = thirdparty.load("sklearn.datasets").load_sample_images().images
    windows, labels = [], []
    for label, picture in enumerate(pictures):
        pixels = torch.tensor(picture).permute(2, 0, 1).float() / 255
        _, height, width = pixels.shape
        for top, left in itertools.product((0, height - _WINDOW), (0, width - _WINDOW)):
            windows.append(pixels[:, top : top + _WINDOW, left : left + _WINDOW])
            labels.append(label)
    batch = F.interpolate(torch.stack(windows), size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (_CLIP_MEAN, _CLIP_STD))
    return (batch - mean) / std, torch.tensor(labels)


def digits(size: int) -> tuple[Tensor, Tensor]:
    """The 8x8 digits resized, in a fixed random order.

    Args:
        size: height and width wanted, in pixels.

    Returns:
        float32 images (1797, 3, size, size) with values in about [-1, 1], and int64 labels (1797,) in 0..9.

    Raises:
        thirdparty.Unavailable: scikit-learn is missing.
    """
    bundle = thirdparty.load("sklearn.datasets").load_digits()
    images = torch.tensor(bundle.images).float()[:, None] / 8 - 1
    images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order].contiguous(), torch.tensor(bundle.target)[order]
