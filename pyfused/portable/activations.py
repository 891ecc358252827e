"""Each activation and its derivative: name -> (phi(h), (t, h) -> t phi'(h))."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten
# quick_gelu(x) = x sigmoid(s x) = silu(s x) / s
_QUICK = 1.702

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "identity": (torch.clone, lambda t, h: t),
    "relu": (F.relu, lambda t, h: _aten.threshold_backward(t, h, 0)),
    "leaky_relu": (F.leaky_relu, lambda t, h: _aten.leaky_relu_backward(t, h, 0.01, False)),
    "gelu": (F.gelu, lambda t, h: _aten.gelu_backward(t, h)),
    "gelu_tanh": (
        lambda h: F.gelu(h, approximate="tanh"),
        lambda t, h: _aten.gelu_backward(t, h, approximate="tanh"),
    ),
    "quick_gelu": (
        lambda h: F.silu(h * _QUICK).mul_(1 / _QUICK),
        lambda t, h: _aten.silu_backward(t, h * _QUICK),
    ),
    "silu": (F.silu, lambda t, h: _aten.silu_backward(t, h)),
}
