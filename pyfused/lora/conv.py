"""``LoRAConv2d``: an ``nn.Conv2d`` with a low-rank update."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfused.lora.base import LoRAModule
from pyfused.lora.pairs import LoRASettings
from pyfused.ops.decision import LeftToTorch, notify

_LEFT_TO_TORCH = LeftToTorch("LoRAConv2d", why="its convolution is no 1x1 without stride, padding and groups")


class LoRAConv2d(LoRAModule, nn.Conv2d):
    """``y = conv(x) + s B(A(drop(x)))``: a frozen convolution plus a trained low-rank one. Made by `from_conv`.

    A is a dense convolution to R channels with the base's kernel, stride, padding and dilation, whatever the base's
    groups; B is 1x1. They are kept as ``lora_a`` (R, C_in * kh * kw), Kaiming-uniform, and ``lora_b`` (C_out, R), zero.
    A 1x1 convolution without stride, padding or groups is a linear layer over channels and goes through
    `pyfused.lora_linear` without permuting.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, and its published code.
    """

    base_class = nn.Conv2d
    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("LoRAConv2d is made from a convolution: LoRAConv2d.from_conv(conv, rank, alpha, ...)")

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        rank: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        use_rslora: bool = False,
        lora_dtype: torch.dtype | None = None,
        freeze: bool = True,
    ) -> LoRAConv2d:
        """A LoRAConv2d on ``conv``'s own parameters, which it shares and, with ``freeze``, sets not to train.

        Args:
            conv: any nn.Conv2d: kernel, stride, padding (numbers or "same"), padding_mode, dilation, groups.
            rank: R, 1 to 256. Default 16.
            alpha: the low-rank term is scaled by alpha / R. Default 32.
            dropout: probability of zeroing an element of the low-rank term's input, in [0, 1). Default 0.
            use_rslora: scale by alpha / sqrt(R) instead. Default False.
            lora_dtype: of A and B. Default: float32 for a float16 or bfloat16 weight, else the weight's. No other
                pairs than the weight's dtype, or float32 over 16 bits, are taken.
            freeze: whether conv's parameters stop training. Default True.

        Raises:
            TypeError: not an nn.Conv2d, a subclass with a forward or other members of its own, or a ``lora_dtype``
                that does not fit.
            ValueError: already a LoRA module, a weight that is parametrized or without elements, or a setting out of
                range.
        """
        settings = LoRASettings(rank, alpha, dropout, use_rslora, lora_dtype)
        return cls._adopt_with_pair("LoRAConv2d.from_conv", conv, settings, freeze)

    def _pair_widths(self) -> dict[str, tuple[int, int]]:
        height, width = self.kernel_size
        return {"": (self.out_channels, self.in_channels * height * width)}

    def _deltas(self) -> dict[str, Tensor]:
        if self.groups != 1:
            raise RuntimeError(
                f"LoRAConv2d: merging needs groups = 1, got groups = {self.groups}: the low-rank term mixes channels "
                "across groups, which the grouped weight cannot hold"
            )
        return {"weight": self._delta()}

    def reset_parameters(self) -> None:
        """Draw the base's parameters and A and B anew, as deferred initialisation asks of every module."""
        super().reset_parameters()
        self.reset_lora_parameters()

    def _is_linear(self) -> bool:
        padded = self.padding not in ((0, 0), "valid", "same")
        return self.kernel_size == (1, 1) and self.stride == (1, 1) and self.groups == 1 and not padded

    def forward(self, input: Tensor) -> Tensor:
        """(B, C_in, H, W) or (C_in, H, W) -> the same with C_out and the convolution's output size."""
        if input.dim() not in (3, 4):
            raise ValueError(
                f"LoRAConv2d: input must have shape (B, C_in, H, W) or (C_in, H, W), got {tuple(input.shape)}"
            )
        if self._base_weights:
            self._begin_merged()
            return super().forward(input)
        if self._chosen == ():
            return super().forward(input)
        x = input if input.dim() == 4 else input.unsqueeze(0)
        if self._is_linear():
            y = self._lora_linear(x, self.weight.flatten(1), self.bias, channel_dim=1)
        elif self._chosen is None:
            notify(_LEFT_TO_TORCH)
            low_rank = self._low_rank(x, self.lora_a, self.lora_b, self.lora_dropout)
            y = torch.add(super().forward(x), low_rank, alpha=self.scaling)
        else:
            notify(_LEFT_TO_TORCH)
            lora_a, lora_b, scaling, dropout, of_sample = self._acting(x)
            low_rank = self._low_rank(x, lora_a, lora_b, dropout, of_sample)
            y = torch.add(super().forward(x), low_rank, alpha=scaling)
        return y if input.dim() == 4 else y.squeeze(0)

    def _low_rank(
        self, x: Tensor, lora_a: Tensor, lora_b: Tensor, dropout: float, of_sample: Tensor | None = None
    ) -> Tensor:
        """B(A(drop(x))), not yet scaled, (B, C_out, ...); with ``of_sample`` by each sample's own A and B."""
        down = self._convolve(
            F.dropout(x, dropout, self.training), lora_a.view(-1, self.in_channels, *self.kernel_size).to(x.dtype)
        )
        if of_sample is not None:
            blocks = down.unflatten(1, (len(lora_a), -1))
            own = of_sample.view(-1, 1, 1, 1, 1) == torch.arange(len(lora_a), device=x.device).view(-1, 1, 1, 1)
            down = torch.where(own, blocks, 0.0).flatten(1, 2)
        return F.conv2d(down, lora_b.view(self.out_channels, -1, 1, 1).to(x.dtype))

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """An ungrouped convolution with the base's stride, padding and dilation."""
        if self.padding_mode == "zeros":
            return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation)
        padded = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return F.conv2d(padded, weight, None, self.stride, 0, self.dilation)
