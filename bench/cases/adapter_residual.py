"""`adapter_residual`: its shapes, and plain torch and torch.compile beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfused.bench.cases.baselines import narrowed
from pyfused.bench.cases.case import Case, Result, Work, normal, short, with_both_adapters
from pyfused.ops.adapter_residual import PLANS
from pyfused.reference.adapter import ACTIVATIONS

# (z's shape, h): 16 images of ViT-B/16 (197 tokens), and 2 of ViT-L/14 at 518 px (1370 tokens).
CPU_ROWS: tuple[tuple[tuple[int, int, int], int], ...] = (((16, 197, 768), 64), ((2, 1370, 1024), 256))
GPU_ROWS = (((32, 197, 768), 64), ((32, 197, 768), 192), ((16, 1370, 1024), 256))
# C and side of the feature map in the four stages of FastViT SA at 224 and at 256 px; h = C / 2.
FASTVIT_224 = ((64, 56), (128, 28), (256, 14), (512, 7))
FASTVIT_256 = ((64, 64), (128, 32), (256, 16), (512, 8))


@dataclass(frozen=True)
class AdapterCase(Case):
    """One shape of ``adapter_residual``, z and residual distinct, with layer-scale and both biases.

    Attributes:
        shape: of z: (B, L, C), or (B, C, H, W).
        hidden: h.
        dtype: of z, the residual and gamma.
        adapter_dtype: of D, d, U and u; None (the default) means ``dtype``.
        drop_path: the share of samples that are dropped, at least one if it is not 0 (the default).
        dropout_p: on the activated hidden, default 0.
    """

    operator = "adapter_residual"
    inputs = ("z", "residual")
    trained = ("down_weight", "down_bias", "up_weight", "up_bias", "layer_scale")

    shape: tuple[int, ...]
    hidden: int
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    drop_path: float = 0.0
    dropout_p: float = 0.0

    @property
    def channel_dim(self) -> int:
        return 1 if len(self.shape) == 4 else -1

    @property
    def channels(self) -> int:
        return self.shape[self.channel_dim]

    @property
    def rows(self) -> int:
        """M."""
        return math.prod(self.shape) // self.channels

    @property
    def dropped_samples(self) -> int:
        return max(1, round(self.drop_path * self.shape[0])) if self.drop_path else 0

    @property
    def name(self) -> str:
        shape = self.shape if self.channel_dim == 1 else (self.rows, self.channels)
        parts = [f"adapter_residual {'x'.join(map(str, shape))} h{self.hidden}", short(self.dtype)]
        if self.adapter_dtype not in (None, self.dtype):
            parts.append(f"adapters {short(self.adapter_dtype)}")
        parts += [f"drop-path {self.drop_path:g}"] if self.drop_path else []
        parts += [f"dropout {self.dropout_p:g}"] if self.dropout_p else []
        return " ".join(parts)

    def facts(self) -> dict[str, object]:
        return {
            "shape": list(self.shape),
            "rows": self.rows,
            "channels": self.channels,
            "hidden": self.hidden,
            "dtype": short(self.dtype),
            "adapter_dtype": short(self.parameter_dtype),
            "drop_path": self.drop_path,
            "dropout_p": self.dropout_p,
        }

    def tensors(self, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """z, residual, the parameters, with drop-path sample_scale, and dy; every term of y is about as large."""
        draw = normal(device, seed)
        c, h = self.channels, self.hidden
        adapter = self.parameter_dtype
        tensors = {
            "z": draw(self.shape, 1.0, self.dtype),
            "residual": draw(self.shape, 1.0, self.dtype),
            "down_weight": draw((h, c), c**-0.5, adapter),
            "down_bias": draw((h,), 0.1, adapter),
            "up_weight": draw((c, h), 1.5 * h**-0.5, adapter),
            "up_bias": draw((c,), 0.1, adapter),
            "layer_scale": draw((c,), 1.0, self.dtype),
            "dy": draw(self.shape, 1.0, self.dtype),
        }
        if self.drop_path:
            batch = self.shape[0]
            dropped = draw((batch,), 1.0, torch.float32).topk(self.dropped_samples, largest=False).indices
            scale = torch.full((batch,), 1 / (1 - self.drop_path), device=device)
            tensors["sample_scale"] = scale.index_fill(0, dropped, 0.0).to(self.dtype)
        return tensors

    def call(self, function: Callable[..., Result], tensors: Mapping[str, Tensor], **options) -> Result:
        return function(
            *(tensors[name] for name in ("z", "down_weight", "down_bias", "up_weight", "up_bias")),
            residual=tensors["residual"], layer_scale=tensors["layer_scale"], sample_scale=tensors.get("sample_scale"),
            dropout_p=self.dropout_p, channel_dim=self.channel_dim, **options,
        )  # fmt: skip

    def passes(self) -> tuple[Work, Work]:
        m, c, h = self.rows, self.channels, self.hidden
        dropped = m // self.shape[0] * self.dropped_samples
        size, live = self.dtype.itemsize, m - dropped
        product, parameters = 2 * live * c * h, self.parameter_dtype.itemsize * 2 * c * h
        # Forward reads z and the residual and writes y, backward reads dy and z, writes dz and the parameters'
        # gradients: with no more than these bytes h is computed again, a fifth product in backward. A dropped sample's
        # residual is copied, and its dz is zero.
        forward = Work(2 * product, size * (3 * live + 2 * dropped) * c + parameters)
        backward = Work(5 * product, size * (3 * live + dropped) * c + 2 * parameters)
        return forward, backward

    def plain(self) -> dict[str, Callable[..., Tensor]]:
        def eager(z: Tensor, *parameters: Tensor, **options) -> Tensor:
            return eager_adapter_residual(z, *narrowed(parameters, z.dtype), **options)

        return {"eager": eager}

    def plans(self, backend: str) -> tuple[str, ...]:
        return PLANS


# Next to no arithmetic.
TINY = AdapterCase((1, 16, 64), 16)


def timed_cases(device: torch.device) -> list[AdapterCase]:
    """Token rows and FastViT's feature maps: in float32 on a CPU, larger and in bfloat16 on a GPU."""
    if device.type == "cpu":
        rows, stages, batch, dtype = CPU_ROWS, FASTVIT_224, 8, torch.float32
    else:
        rows, stages, batch, dtype = GPU_ROWS, FASTVIT_256, 64, torch.bfloat16
    maps = [AdapterCase((batch, c, side, side), c // 2, dtype) for c, side in stages]
    found = [*(AdapterCase(shape, h, dtype) for shape, h in rows), *maps]
    if device.type != "cpu":
        found = list(with_both_adapters(found))
    return [*found, replace(maps[1], drop_path=0.25)]


def parity_cases(device: torch.device) -> Iterator[AdapterCase]:
    """The timed shapes, then dropout and mixed dtypes at small ones of both layouts."""
    yield from timed_cases(device)
    for shape, hidden in (((8, 50, 768), 64), ((8, 512, 7, 7), 256)):
        small = AdapterCase(shape, hidden, drop_path=0.25, dropout_p=0.1)
        yield small
        yield replace(small, dtype=torch.bfloat16, adapter_dtype=torch.float32)


def eager_adapter_residual(
    z: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    sample_scale: Tensor | None = None,
    skip: float = 1.0,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    training: bool = True,
    channel_dim: int = -1,
) -> Tensor:
    """The formula as people write it: linear layers, 1x1 convolutions for NCHW, torch's own dropout."""
    images = channel_dim == 1

    def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight[:, :, None, None], bias) if images else F.linear(x, weight, bias)

    hidden = ACTIVATIONS[activation](project(z, down_weight, down_bias))
    if dropout_p:
        hidden = F.dropout(hidden, dropout_p, training)
    branch = project(hidden, up_weight, up_bias)
    if skip:
        branch = branch + (z if skip == 1.0 else skip * z)
    if layer_scale is not None:
        branch = branch * (layer_scale[:, None, None] if images and layer_scale.dim() else layer_scale)
    if sample_scale is not None:
        branch = branch * sample_scale.view(-1, *[1] * (z.dim() - 1))
    return (z if residual is None else residual) + branch
