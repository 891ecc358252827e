"""What AA-CLIP puts into CLIP: blended adapters, projections, and cross-attention in its two stages."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfused.modules.cross_attention import ScaledCrossAttention
from pyfused.ops.contract import checks
from pyfused.ops.projection_residual import projection_residual
from pyfused.surgery.added import KeepsWide, draw


class AdapterBlend(KeepsWide):
    """``(1 - w) x + w |x| / |a| a`` with ``a = LeakyReLU(W x)``, slope 0.01, as one `pyfused.projection_residual`.

    Norms over the last dimension, both differentiated. Parameter, float32 by default, which serves x of any dtype and
    stays float32 under ``half()`` and the like: ``adapter_weight`` W (C, C), Xavier-uniform; no bias.

    Args:
        channels: C.
        weight: w, a Python number. Default 0.1.
        device: of W. Default torch's.
        dtype: of W. Default float32.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Source: Ma et al., "AA-CLIP", 2025: ``SimpleAdapter`` and how its output is blended.
    """

    def __init__(
        self,
        channels: int,
        weight: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        checks.integer("AdapterBlend", "channels", channels, 1)
        checks.finite("AdapterBlend", "weight", weight)
        self.channels, self.weight = channels, float(weight)
        self.adapter_weight = _weight("AdapterBlend", channels, channels, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W from the Xavier-uniform distribution, drawn on the CPU in float32."""
        draw(self.adapter_weight, nn.init.xavier_uniform_)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C) in x's dtype."""
        return projection_residual(
            x, self.adapter_weight, residual=x, gate=self.weight, skip=1.0 - self.weight, activation="leaky_relu",
            norm_match=True, eps=0.0,
        )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """What gives the parameter its meaning, by the names of the arguments."""
        return {"weight": self.weight}

    def extra_repr(self) -> str:
        return f"{self.channels}, weight={self.weight:g}"


class SimpleProj(KeepsWide):
    """``W x``, or ``LeakyReLU(W x)`` with slope 0.01.

    Parameter, float32 by default, which serves x of any dtype and stays float32 under ``half()`` and the like:
    ``weight`` W (N, K), Xavier-uniform; no bias.

    Args:
        in_features: K.
        out_features: N.
        relu: whether there is the LeakyReLU. Default False.
        device: of W. Default torch's.
        dtype: of W. Default float32.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a width is less than 1.

    Source: Ma et al., "AA-CLIP", 2025.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        relu: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        checks.integer("SimpleProj", "in_features", in_features, 1)
        checks.integer("SimpleProj", "out_features", out_features, 1)
        checks.flag("SimpleProj", "relu", relu)
        self.in_features, self.out_features, self.relu = in_features, out_features, relu
        self.weight = _weight("SimpleProj", out_features, in_features, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W from the Xavier-uniform distribution, drawn on the CPU in float32."""
        draw(self.weight, nn.init.xavier_uniform_)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) in x's dtype."""
        y = F.linear(x, self.weight.to(x.dtype))
        return F.leaky_relu(y) if self.relu else y

    def settings(self) -> dict[str, Any]:
        """What gives the parameter its meaning, by the names of the arguments."""
        return {"relu": self.relu}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, relu={self.relu}"


class ImageCrossAttention(ScaledCrossAttention):
    """Stage 2: the image tower's tokens ask the prompts', ``x + w |x| / (|c| + eps) c``, the context normalised.

    A `ScaledCrossAttention` with other defaults: 1024 channels ask a context of 768 with 8 heads of 96, with
    ``norm_match`` and ``normalize_context``, ``dropout`` 0.1. Arguments, parameters and errors are its.

    Source: AA-CLIP (Ma et al., 2025) with cross-attention from image to text.
    """

    def __init__(
        self,
        query_dim: int = 1024,
        context_dim: int = 768,
        num_heads: int = 8,
        head_dim: int | None = 96,
        weight: float = 0.1,
        learnable_weight: bool = False,
        norm_match: bool = True,
        normalize_context: bool = True,
        dropout: float = 0.1,
        zero_init: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(
            query_dim, context_dim, num_heads, head_dim, weight, learnable_weight, norm_match, normalize_context,
            dropout, zero_init, **settings,
        )  # fmt: skip


class TextCrossAttention(ScaledCrossAttention):
    """Stage 1: the prompts' tokens ask the images' patches, ``x + w |x| / (|c| + eps) c``.

    A `ScaledCrossAttention` with other defaults: 768 channels ask a context of 768 with 8 heads of 96, with
    ``norm_match``, ``dropout`` 0.1 and ``context_reduce="mean"``: every prompt sees the same mean image, however many
    prompts and images there are. The original averages only where the batch sizes differ, so that a batch of as many
    images as prompts pairs each prompt with one image by accident; ``context_reduce="mean_if_batches_differ"`` does as
    it does. Arguments, parameters and errors are its.

    Source: AA-CLIP (Ma et al., 2025) with cross-attention from text to image.
    """

    def __init__(
        self,
        query_dim: int = 768,
        context_dim: int = 768,
        num_heads: int = 8,
        head_dim: int | None = 96,
        weight: float = 0.1,
        learnable_weight: bool = False,
        norm_match: bool = True,
        normalize_context: bool = False,
        dropout: float = 0.1,
        zero_init: bool = False,
        *,
        context_reduce: str | None = "mean",
        **settings: Any,
    ) -> None:
        super().__init__(
            query_dim, context_dim, num_heads, head_dim, weight, learnable_weight, norm_match, normalize_context,
            dropout, zero_init, context_reduce=context_reduce, **settings,
        )  # fmt: skip


def _weight(
    caller: str, rows: int, columns: int, device: torch.device | str | None, dtype: torch.dtype
) -> nn.Parameter:
    if dtype not in checks.FLOATING:
        raise TypeError(f"{caller}: dtype must be one of {checks.FLOATING}, got {dtype!r}")
    return nn.Parameter(torch.empty((rows, columns), device=device, dtype=dtype))
