"""``projection_residual``: contract, autograd and public function.

    y = skip x + w match(c)        c = phi(h),  h = o W^T + b  (M, C)        match(c) = rho c,  rho = |x| / (|c| + eps)

w is one number or one per channel; without norm matching rho = 1. Backward from dy, with g = w dy and gc = g . c:

    dc = rho g - gc |x| / (|c| (|c| + eps)^2) c        dh = dc phi'(h)        dx = skip dy + gc / (|c| + eps) x / |x|
    do = dh W        dW = dh^T o        db = sum dh        dw = sum rho dy c, per channel

1 / |c| is 0 at c = 0, 1 / |x| at x = 0, and match(c) = 0 where |c| + eps is 0. Backward keeps h where phi, the norm or
w's gradient needs it, and x for the norm alone; otherwise dh = g, and nothing of the size of y is kept.

The raw operators see o (B, L, K) and x (B, L, C) with any strides, W and b in o's dtype, in which the products are made
and h is kept. y has x's dtype.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from pyfused.choice import backends
from pyfused.ops import decision
from pyfused.ops.adapter_residual import ACTIVATIONS
from pyfused.ops.contract import checks, known, layout, registry

_NAME = "projection_residual"


def _fake_fwd(o, weight, bias, residual, gate, factor, skip, activation, norm_match, eps, save):
    return residual.new_empty(residual.shape), o.new_empty((*o.shape[:2], weight.shape[0]) if save else 0)


def _fake_bwd(
    dy, o, weight, bias, residual, gate, pre, factor, skip, activation, norm_match, eps, need_do, need_weight,
    need_residual, need_gate,
):  # fmt: skip
    channels, width = weight.shape
    nothing = weight.new_empty
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (
        nothing((*dy.shape[:2], width) if need_do else 0),
        nothing((channels, width) if need_weight else 0),
        nothing(channels if need_weight and bias is not None else 0),
        dy.new_empty(dy.shape if need_residual else 0),
        nothing(channels if need_gate else 0, dtype=wide),
    )


# w is ``gate``, (1,) or (C,), or without it the number ``factor``. ``save`` asks for h, (B, L, C).
_fwd = registry.define(
    _NAME,
    "fwd",
    "(Tensor o, Tensor weight, Tensor? bias, Tensor residual, Tensor? gate, float factor, float skip, str activation, "
    "bool norm_match, float eps, bool save) -> (Tensor y, Tensor pre)",
    _fake_fwd,
)
# A gradient that is not needed comes back empty; dx is asked for where the norm depends on x.
_bwd = registry.define(
    _NAME,
    "bwd",
    "(Tensor dy, Tensor? o, Tensor weight, Tensor? bias, Tensor? residual, Tensor? gate, Tensor? pre, float factor, "
    "float skip, str activation, bool norm_match, float eps, bool need_do, bool need_weight, bool need_residual, "
    "bool need_gate) -> (Tensor d_o, Tensor d_weight, Tensor d_bias, Tensor d_residual, Tensor d_gate)",
    _fake_bwd,
)


class _ProjectionResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o, weight, bias, residual, gate, factor, skip, activation, norm_match, eps, backend):
        need_o, need_weight, need_bias, need_residual, need_gate = ctx.needs_input_grad[:5]
        branch = need_o or need_weight or need_bias
        save = keeps_projection(activation, norm_match, need_gate) and (
            branch or need_gate or (need_residual and norm_match)
        )
        y, pre, ctx.shape = _through_rows(
            _fwd[backend], o, weight, bias, residual, gate, factor, skip, activation, norm_match, eps, save
        )
        ctx.save_for_backward(
            o if need_weight else None, weight, bias, residual if norm_match else None, gate, pre if save else None
        )
        ctx.settings = factor, skip, activation, norm_match, eps
        ctx.backend = backend
        return y

    @staticmethod
    @registry.differentiable_once
    def backward(ctx, dy):
        need_o, need_weight, need_bias, need_residual, need_gate = ctx.needs_input_grad[:5]
        # Read once: activation checkpointing hands them out once.
        saved = ctx.saved_tensors
        o, weight, bias, residual, gate, pre = saved
        _, skip, _, norm_match, _ = ctx.settings
        gradients = [None] * 5
        if need_o or need_weight or need_bias or need_gate or (need_residual and norm_match):
            rows, o, residual = layout.rows_as(ctx.shape, dy, o, residual)
            gradients = _bwd[registry.way_back(ctx.backend, dy, *saved)](
                rows, o, weight, bias, residual, layout.vector(gate), pre, *ctx.settings,
                need_o, need_weight or need_bias, need_residual and norm_match, need_gate,
            )  # fmt: skip
        d_o, d_weight, d_bias, d_residual, d_gate = gradients
        if need_residual and not norm_match:
            d_residual = dy if skip == 1.0 else dy * skip
        elif need_residual:
            d_residual = layout.from_rows(d_residual, dy)
        if need_gate:
            d_gate = (d_gate if gate.numel() > 1 else d_gate.sum()).reshape(gate.shape).to(gate.dtype)
        return (
            layout.from_rows(d_o, dy) if need_o else None,
            d_weight if need_weight else None,
            d_bias if need_bias else None,
            d_residual if need_residual else None,
            d_gate if need_gate else None,
            None, None, None, None, None, None,
        )  # fmt: skip


def _through_rows(raw, o, weight, bias, residual, gate, *others):
    """y in the residual's shape, h, and the (B, L) of the rows that ``raw`` saw."""
    rows, stream = layout.to_rows(o, residual)
    y, pre = raw(rows, weight, bias, stream, layout.vector(gate), *others)
    return layout.from_rows(y, residual), pre, rows.shape[:2]


def _derived(backend, *arguments):
    return _ProjectionResidual.apply(*arguments[:-1], backend), arguments[0].new_empty(0)


registry.derive(_fwd, _derived)


def keeps_projection(activation: str, norm_match: bool, need_gate: bool) -> bool:
    """Whether backward needs h."""
    return activation != "identity" or norm_match or need_gate


def projection_residual(
    o: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor,
    gate: float | Tensor = 0.1,
    skip: float = 1.0,
    activation: str = "identity",
    norm_match: bool = False,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """A linear layer, its activation, a norm matched to the residual's, a gate and the residual in one call:
    ``skip * residual + gate * match(phi(o weight^T + bias))``.

    Args:
        o: (..., K); float32, float16, bfloat16, and float64 on the portable backend. Any strides.
        weight: (C, K); o's dtype, or float32, which is cast to o's.
        bias: (C,) or None (the default); dtypes as ``weight``.
        residual: (..., C), leading dimensions as o's, any strides; any floating dtype, float64 only beside a float64 o.
        gate: a Python number, or a tensor of one element or (C,) of any floating dtype, never rounded to 16 bits.
            Default 0.1.
        skip: factor of the residual, a Python number. Default 1.
        activation: phi, one of "identity" (the default), "relu", "leaky_relu" (slope 0.01), "gelu" (by erf),
            "gelu_tanh", "quick_gelu", "silu".
        norm_match: scale each row of the branch to the norm of its row of ``residual``, ``|residual| / (|c| + eps)``;
            the norms are differentiated too, their gradients at 0 are 0, and so is the row where ``|c| + eps`` is 0.
            Default False.
        eps: a Python number from 0 on. Default 1e-6.
        backend: "auto" (the default), "portable", "triton", "cuda" or "cpu".

    Returns:
        (..., C) in the residual's dtype, contiguous. Under autocast o and weight are cast to its dtype, the residual
        keeps its own. Every tensor that requires grad gets its exact gradient; a backward with ``create_graph=True``
        raises.

    Raises:
        ValueError: a shape, device, number, activation or backend name is wrong.
        TypeError: a dtype or an argument's type is wrong.
        RuntimeError: the backend that was asked for cannot serve the call.

    Source: the adapters of AA-CLIP (Ma et al., 2025), ``(1 - w) x + w |x| / |a| a`` with ``a = LeakyReLU(W x)``, are
    ``projection_residual(x, W, residual=x, gate=w, skip=1 - w, activation="leaky_relu", norm_match=True, eps=0.0)``.
    """
    per_channel = gate if isinstance(gate, Tensor) else None
    settings = (gate if per_channel is None else None, skip, activation, norm_match, eps, backend)
    key = known.signature(o, (weight, bias, residual, per_channel), settings)
    decided = _known.get(key)
    if decided is None:
        decided = _decide(o, weight, bias, residual, gate, *settings[1:])
        _known.keep(key, decided)
    dtype = decided.dtype
    o, weight, bias = o.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return project_residual(
        _NAME, o, weight, bias, residual, gate, float(skip), activation, norm_match, float(eps), decided.backend,
        key is not None,
    )  # fmt: skip


class _Decided(NamedTuple):
    """What a call is, once it is checked; ``dtype``: of the product."""

    backend: str
    dtype: torch.dtype


_known: known.Known[_Decided] = known.Known()


def _decide(o, weight, bias, residual, gate, skip, activation, norm_match, eps, backend) -> _Decided:
    _check(o, weight, bias, residual)
    check_gate(_NAME, "gate", gate, weight.shape[0], o.device)
    checks.finite(_NAME, "skip", skip)
    checks.one_of(_NAME, "activation", activation, ACTIVATIONS)
    check_eps(_NAME, eps)
    checks.flag(_NAME, "norm_match", norm_match)
    dtype = checks.autocast_dtype(o) or o.dtype
    channels, k = weight.shape
    sizes = {"M": o.numel() // max(1, k), "K": k, "C": channels, "norm_match": norm_match}
    chosen = backends.choose(backend, o.device, dtype, _NAME, sizes).backend
    if decision.observers:
        keeps = keeps_projection(activation, norm_match, isinstance(gate, Tensor) and gate.requires_grad)
        asked = decision.asked(
            o=o, weight=weight, bias=bias, residual=residual, gate=gate, skip=skip, activation=activation,
            norm_match=norm_match, eps=eps, backend=backend,
        )  # fmt: skip
        decision.notify(_decided(o, dtype, sizes, chosen, keeps, asked))
    return _Decided(chosen, dtype)


def _decided(o, dtype, sizes, backend, keeps, asked) -> decision.Decision:
    shapes = tuple((letter, int(sizes[letter])) for letter in "MKC")
    plan, reason = ("save", "the projection") if keeps else ("-", "nothing of y's size")
    saved = int(sizes["M"] * sizes["C"]) * dtype.itemsize * keeps
    reasons = (f"backward needs {reason}",)
    return decision.Decision(
        _NAME, _NAME, shapes, sizes, dtype, o.device, backend, plan, plan, reasons, saved, {}, arguments=asked
    )


def project_residual(
    name: str,
    o: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gate: float | Tensor,
    skip: float,
    activation: str,
    norm_match: bool,
    eps: float,
    backend: str,
    directly: bool = False,
) -> Tensor:
    """`projection_residual` of checked tensors, weight and bias in o's dtype, on one backend; errors name ``name``.

    ``directly`` as `registry.run`'s.
    """
    factor, per_channel = (1.0, gate) if isinstance(gate, Tensor) else (float(gate), None)
    way = registry.way_there(backend, directly)
    return registry.run(
        name,
        _ProjectionResidual,
        functools.partial(_through_rows, _fwd[way]),
        (o, weight, bias, residual, per_channel),
        (factor, skip, activation, norm_match, eps),
        (way,),
        directly,
    )


def check_gate(name: str, argument: str, gate: float | Tensor, channels: int, device: torch.device) -> None:
    """A finite number, or a floating tensor of one element or (C,)."""
    if not isinstance(gate, Tensor):
        checks.finite(name, argument, gate)
        return
    checks.tensor(name, argument, gate)
    checks.dtype(name, argument, gate, checks.FLOATING)
    checks.same_device(name, argument, gate, device)
    if gate.shape != (channels,) and (gate.dim() > 1 or gate.numel() != 1):
        raise ValueError(
            f"{name}: {argument} must be a number, or have one element or shape (C,) = {(channels,)}, "
            f"got {tuple(gate.shape)}"
        )


def check_eps(name: str, eps: float) -> None:
    checks.finite(name, "eps", eps)
    if eps < 0:
        raise ValueError(f"{name}: eps must be at least 0, got {eps}")


def _check(o, weight, bias, residual) -> None:
    checks.tensor(_NAME, "o", o)
    checks.dtype(_NAME, "o", o, checks.FLOATING)
    if o.dim() < 1:
        raise ValueError(f"{_NAME}: o must have at least 1 dimension, got shape {tuple(o.shape)}")
    checks.tensor(_NAME, "weight", weight)
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] < 1:
        raise ValueError(f"{_NAME}: weight must have shape (C, K), got {tuple(weight.shape)}")
    channels, width = weight.shape
    checks.shape(_NAME, "o", o, (*o.shape[:-1], width), "(..., K)")
    # The sum is formed in float32, or with a float64 o in float64.
    stream = checks.FLOATING if o.dtype == torch.float64 else checks.NARROW
    checks.argument(_NAME, "residual", residual, (*o.shape[:-1], channels), "(..., C)", stream, o.device, "o")
    allowed = checks.parameter_dtypes(o)
    checks.argument(_NAME, "weight", weight, (channels, width), "(C, K)", allowed, o.device, "o")
    if bias is not None:
        checks.argument(_NAME, "bias", bias, (channels,), "(C,)", allowed, o.device, "o")
