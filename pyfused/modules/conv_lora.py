"""``ConvLoRA``: a low-rank convolution around which the input passes unchanged."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfused.lora.pairs import check_lora_settings
from pyfused.ops.contract import checks
from pyfused.ops.decision import LeftToTorch, notify
from pyfused.surgery.added import KeepsWide, draw, kaiming

_LEFT_TO_TORCH = LeftToTorch("ConvLoRA", why="no operator has a convolution wider than 1x1")


class ConvLoRA(KeepsWide):
    """``y = x + (alpha / R) B(A(x))``: A a k x k convolution to R channels, B a 1x1 convolution back, neither biased.

    A module of its own, to be put after a stage of a frozen network; `LoRAConv2d` is the one that changes a
    convolution. Parameters: ``lora_a`` (R, C, k, k), Kaiming-uniform, and ``lora_b`` (C, R, 1, 1), zero, so that it
    starts as the identity. float32 by default, which serves x of any dtype, and which a cast to 16 bits leaves alone.

    Args:
        channels: C.
        rank: R, 1 to 256. Default 8.
        alpha: the low-rank term is scaled by alpha / R. Default 16.
        kernel_size: k, odd; A pads with zeros to keep H and W. Default 3.
        device: of both parameters. Default torch's.
        dtype: of both parameters. Default float32.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, as a residual convolution.
    """

    def __init__(
        self,
        channels: int,
        rank: int = 8,
        alpha: float = 16,
        kernel_size: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_lora_settings("ConvLoRA", rank, alpha, 0.0, dtype)
        checks.integer("ConvLoRA", "channels", channels, 1)
        checks.integer("ConvLoRA", "kernel_size", kernel_size)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"ConvLoRA: kernel_size must be odd and positive, got {kernel_size}")
        self.channels, self.rank, self.alpha, self.kernel_size = channels, rank, float(alpha), kernel_size
        self.scaling = self.alpha / rank
        shape = (rank, channels, kernel_size, kernel_size)
        self.lora_a = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.lora_b = nn.Parameter(torch.empty((channels, rank, 1, 1), device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A from the Kaiming-uniform distribution with a = sqrt(5), drawn on the CPU in float32; B zero."""
        draw(self.lora_a, kaiming)
        self.lora_b.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W) in x's dtype."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"ConvLoRA: x must have shape (B, {self.channels}, H, W), got {tuple(x.shape)}")
        notify(_LEFT_TO_TORCH)
        down = F.conv2d(x, self.lora_a.to(x.dtype), padding=self.kernel_size // 2)
        return torch.add(x, F.conv2d(down, self.lora_b.to(down.dtype)), alpha=self.scaling)

    def settings(self) -> dict[str, Any]:
        """What gives the parameters their meaning, by the names of the arguments."""
        return {"rank": self.rank, "alpha": self.alpha, "kernel_size": self.kernel_size}

    def extra_repr(self) -> str:
        return f"{self.channels}, rank={self.rank}, alpha={self.alpha:g}, kernel_size={self.kernel_size}"
