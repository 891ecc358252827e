"""Each activation and its derivative: name -> (phi(h, out), t phi'(h) of (t, h, out)).

Both write to ``out``, which may be h or t itself, and return it: memory that is new at each block costs more than the
arithmetic. phi makes its own where ``out`` is None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
# Whose stubs lack the argument out.
_nn: Any = torch._C._nn
# quick_gelu(x) = x sigmoid(s x) = silu(s x) / s
_QUICK = 1.702

_gelu_backward, _silu_backward = _aten.gelu_backward.grad_input, _aten.silu_backward.grad_input
_threshold_backward, _leaky_backward = _aten.threshold_backward.grad_input, _aten.leaky_relu_backward.grad_input

Phi = Callable[[Tensor, Tensor | None], Tensor]
TimesDerivative = Callable[[Tensor, Tensor, Tensor], Tensor]

ACTIVATIONS: dict[str, tuple[Phi, TimesDerivative]] = {
    "identity": (lambda h, out: h.clone() if out is None else out.copy_(h), lambda t, h, out: out.copy_(t)),
    "relu": (
        lambda h, out: torch.clamp_min(h, 0, out=out),
        lambda t, h, out: _threshold_backward(t, h, 0, grad_input=out),
    ),
    "leaky_relu": (
        lambda h, out: _nn.leaky_relu(h, 0.01, out=out),
        lambda t, h, out: _leaky_backward(t, h, 0.01, False, grad_input=out),
    ),
    "gelu": (
        lambda h, out: _nn.gelu(h, out=out),
        lambda t, h, out: _gelu_backward(t, h, grad_input=out),
    ),
    "gelu_tanh": (
        lambda h, out: _nn.gelu(h, approximate="tanh", out=out),
        lambda t, h, out: _gelu_backward(t, h, approximate="tanh", grad_input=out),
    ),
    "quick_gelu": (
        lambda h, out: _nn.silu(torch.mul(h, _QUICK, out=out), out=out).mul_(1 / _QUICK),
        lambda t, h, out: _silu_backward(t, h * _QUICK, grad_input=out),
    ),
    "silu": (
        lambda h, out: _nn.silu(h, out=out),
        lambda t, h, out: _silu_backward(t, h, grad_input=out),
    ),
}
