"""What ``pyfused.adapter_residual`` computes, in the plainest PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from pyfused.reference.philox import dropout_keep_mask

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
}


def adapter_residual(
    z: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    *,
    residual: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
    sample_scale: torch.Tensor | None = None,
    skip: float = 1.0,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    training: bool = True,
    seed: torch.Tensor | None = None,
    channel_dim: int = -1,
) -> torch.Tensor:
    """``residual + sample_scale * layer_scale * (skip * z + U phi(D z + d) + u)``.

    Shapes and dtypes as in `pyfused.adapter_residual`; adapter weights are cast to z's dtype. ``seed`` is required when
    dropout acts, and gives the mask that every backend draws.
    """
    residual = z if residual is None else residual
    if channel_dim == 1:
        y = adapter_residual(
            z.movedim(1, -1), down_weight, down_bias, up_weight, up_bias, residual=residual.movedim(1, -1),
            layer_scale=layer_scale, sample_scale=sample_scale, skip=skip, activation=activation, dropout_p=dropout_p,
            training=training, seed=seed,
        )  # fmt: skip
        return y.movedim(-1, 1)
    down_weight, up_weight = down_weight.to(z.dtype), up_weight.to(z.dtype)
    down_bias, up_bias = (None if bias is None else bias.to(z.dtype) for bias in (down_bias, up_bias))
    hidden = ACTIVATIONS[activation](F.linear(z, down_weight, down_bias))
    if training and dropout_p > 0.0:
        assert seed is not None
        keep = dropout_keep_mask(seed, hidden.shape[:-1].numel(), hidden.shape[-1], dropout_p)
        hidden = hidden * keep.reshape(hidden.shape) / (1.0 - dropout_p)
    branch = skip * z + F.linear(hidden, up_weight, up_bias)
    if layer_scale is not None:
        branch = layer_scale * branch
    if sample_scale is not None:
        branch = sample_scale.reshape(-1, *[1] * (z.dim() - 1)) * branch
    return (residual + branch).to(residual.dtype)
