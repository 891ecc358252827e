"""What ``pyfused.lora_linear`` computes, in the plainest PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pyfused.reference.philox import dropout_keep_mask


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: torch.Tensor | None = None,
    channel_dim: int = -1,
    adapter_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x W^T + b + scaling (drop(x) A^T) B^T`` (Hu et al., "LoRA", 2021).

    Shapes and dtypes as in `pyfused.lora_linear`; adapter parameters are cast to x's dtype. ``seed`` is required when
    dropout acts, and gives the mask that every backend draws.
    """
    if channel_dim == 1:
        rows = x.movedim(1, -1)
        y = lora_linear(
            rows, weight, lora_a, lora_b, bias, scaling=scaling, dropout_p=dropout_p, training=training, seed=seed,
            adapter_index=adapter_index,
        )  # fmt: skip
        return y.movedim(-1, 1)
    dropped = x
    if training and dropout_p > 0.0:
        assert seed is not None
        keep = dropout_keep_mask(seed, x.shape[:-1].numel(), x.shape[-1], dropout_p)
        dropped = x * keep.reshape(x.shape) / (1.0 - dropout_p)
    lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    if adapter_index is None:
        low_rank = F.linear(F.linear(dropped, lora_a), lora_b)
    else:
        low_rank = torch.zeros((), dtype=x.dtype, device=x.device)
        for i, (a, b) in enumerate(zip(lora_a, lora_b.unbind(1), strict=True)):
            low_rank = low_rank + F.linear(F.linear(dropped, a), b) * (adapter_index == i).unsqueeze(-1)
    return F.linear(x, weight, bias) + scaling * low_rank
