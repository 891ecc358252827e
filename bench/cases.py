"""The shapes that `lora_linear` is measured at, their inputs, and the least time that a GPU could need."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Measured on an NVIDIA H200: bf16 matrix product in FLOP/s, device copy in bytes/s (read plus written).
H200_FLOPS = 790e12
H200_BANDWIDTH = 4.3e12

# (in features, out features) of in_proj, out_proj, c_fc and c_proj in CLIP's ViT-B.
CLIP_LAYERS = ((768, 2304), (768, 768), (768, 3072), (3072, 768))
# Batch 8 of ViT-B/32 (50 tokens) and of ViT-B/16 (197 tokens).
CLIP_ROWS = (8 * 50, 8 * 197)
GPU_SHAPES = (
    (8192, 4096, 4096),
    (8192, 4096, 14336),
    (6304, 768, 3072),
    (6304, 3072, 768),
    (2740, 1024, 1024),
)


@dataclass(frozen=True)
class LoRACase:
    """One shape of ``lora_linear``: x (M, K), weight (N, K), rank R.

    Attributes:
        rows, in_features, out_features, rank: M, K, N, R.
        dtype: of x, weight, bias.
        adapter_dtype: of lora_a and lora_b; None (the default) means ``dtype``.
        dropout_p: on the low-rank term's input, default 0.
        scaling: alpha / R, default 2 (alpha 32 at R 16).
    """

    rows: int
    in_features: int
    out_features: int
    rank: int = 16
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    dropout_p: float = 0.0
    scaling: float = 2.0

    @property
    def name(self) -> str:
        parts = [f"lora_linear {self.rows}x{self.in_features}->{self.out_features} r{self.rank}", _short(self.dtype)]
        if self.adapter_dtype not in (None, self.dtype):
            parts.append(f"adapters {_short(self.adapter_dtype)}")
        if self.dropout_p:
            parts.append(f"dropout {self.dropout_p:g}")
        return " ".join(parts)

    def facts(self) -> dict[str, object]:
        return {
            "rows": self.rows,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "dtype": _short(self.dtype),
            "adapter_dtype": _short(self.adapter_dtype or self.dtype),
            "dropout_p": self.dropout_p,
        }

    def tensors(self, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """x, weight, lora_a, lora_b, bias and dy, the same numbers on every device.

        lora_b is not zero, and the low-rank term is as large as the base product, so that neither hides the other.
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

        m, k, n, r = self.rows, self.in_features, self.out_features, self.rank
        adapter = self.adapter_dtype or self.dtype
        return {
            "x": draw((m, k), 1.0, self.dtype),
            "weight": draw((n, k), k**-0.5, self.dtype),
            "lora_a": draw((r, k), k**-0.5, adapter),
            "lora_b": draw((n, r), r**-0.5 / self.scaling, adapter),
            "bias": draw((n,), 0.1, self.dtype),
            "dy": draw((m, n), 1.0, self.dtype),
        }

    def floor_seconds(self) -> dict[str, float]:
        """The least time on an H200: max(FLOPs / peak, compulsory bytes / bandwidth), cold memory, no launch cost."""
        m, k, n, r = self.rows, self.in_features, self.out_features, self.rank
        size = self.dtype.itemsize
        base, narrow = 2 * m * n * k, 2 * m * r * (n + k)
        parameters = n * k + r * (n + k)
        # Forward reads x and writes y and P; backward reads dy, x and P and writes dx and both gradients.
        forward = max((base + narrow) / H200_FLOPS, size * (m * (k + n + r) + parameters) / H200_BANDWIDTH)
        backward_bytes = size * (m * (n + 2 * k + r) + parameters + r * (n + k))
        backward = max((base + 2 * narrow) / H200_FLOPS, backward_bytes / H200_BANDWIDTH)
        return {"forward": forward, "forward+backward": forward + backward}


def timed_cases(device: torch.device) -> list[LoRACase]:
    """CLIP's layers in float32 on a CPU; on a GPU the shapes of ViTs and language models in bfloat16."""
    if device.type == "cpu":
        return [LoRACase(m, k, n) for m, (k, n) in itertools.product(CLIP_ROWS, CLIP_LAYERS)]
    return [
        LoRACase(m, k, n, dtype=torch.bfloat16, dropout_p=p)
        for p, (m, k, n) in itertools.product((0.0, 0.1), GPU_SHAPES)
    ]


def parity_cases(device: torch.device) -> Iterator[LoRACase]:
    """The timed shapes, then dropout and mixed dtypes at CLIP's smaller ones."""
    yield from timed_cases(device)
    for k, n in CLIP_LAYERS:
        small = LoRACase(CLIP_ROWS[0], k, n, dropout_p=0.1)
        yield small
        yield replace(small, dtype=torch.bfloat16, adapter_dtype=torch.float32)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
