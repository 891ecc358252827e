"""``adapter_residual``: contract, autograd and public function.

    y = residual + k gamma * (skip z + a U^T + u)     a = drop(phi(h)),  h = z D^T + d      (M, hidden)

k is one number per sample, gamma one per channel. Backward from dy, with g = k dy:

    t = (g gamma) U        dh = mask t phi'(h) / (1 - p)      dz = skip gamma g + dh D, plus dy if z is the residual
    dD = dh^T z            dd = sum dh
    G = g^T a              dU = gamma G    du = gamma sum g   dgamma = skip sum g z + rowsum(U G) + u sum g

so the branch is neither stored nor computed again. Backward keeps z, and h or nothing: `choose_plan`. Rows of samples
with k = 0 are the residual's, whatever z and dy hold there; where z is not the residual too it is not read there.

The raw operators see z as (B, L, C) with any strides; row m is b * L + l, and sample_scale (S,) gives every M / S rows
the same k. ``channels_first`` is about the memory of what is made: y, or dz; ``z_channels_first`` about z's.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from pyfused.choice import backends
from pyfused.ops import decision
from pyfused.ops.contract import checks, known, layout, registry
from pyfused.ops.contract.cuda_limits import cuda_row_limit, cuda_rows, cuda_shared_memory

_NAME = "adapter_residual"
ACTIVATIONS = ("identity", "relu", "leaky_relu", "gelu", "gelu_tanh", "quick_gelu", "silu")
PLANS = ("save", "recompute")
# The widest h whose tile stays on chip, in Triton by bytes of an element; the portable backend takes any.
MAX_KERNEL_HIDDEN = {2: 512, 4: 128}
MAX_CUDA_HIDDEN = 256


def choose_plan(hidden: int, channels: int) -> tuple[str, str]:
    """(plan, reason): whether forward saves h for backward."""
    if 2 * hidden <= channels:
        return "save", f"h = {hidden} <= C / 2: saving it costs at most half of what keeping z does"
    return "recompute", f"h = {hidden} > C / 2 = {channels / 2:g}: it is computed again from z"


def _limits(z: Tensor, dtype: torch.dtype, hidden: int, channels: int) -> tuple[dict[str, str], int]:
    """Backend -> why its kernels do not take these sizes, and the rows of a tile of the CUDA C++ kernels."""
    limits: dict[str, str] = {}
    rows, cuda = 0, backends.has_cuda_kernels(_NAME, z.device)
    if cuda:
        limits |= cuda_row_limit(_NAME, z.numel() // channels)
    for backend, most in (("triton", MAX_KERNEL_HIDDEN.get(dtype.itemsize, hidden)), ("cuda", MAX_CUDA_HIDDEN)):
        if hidden > most:
            limits[backend] = f"{_NAME}: down_weight (h, C) must have h <= {most} there for {dtype}, got h = {hidden}"
    if cuda and "cuda" not in limits:
        rows = cuda_rows(hidden, channels, z.device, rows=(64, 32), float_middle=False)
        if not rows:
            limits["cuda"] = (
                f"{_NAME}: 32 rows of z with C = {channels} and the weights' tiles with h = {hidden} take "
                f"{cuda_shared_memory(hidden, channels, rows=32)} bytes of shared memory there, a block has "
                f"{backends.shared_memory(z.device)}"
            )
    return limits, rows


def _fake_fwd(
    z, down_weight, down_bias, up_weight, up_bias, residual, layer_scale, sample_scale, seed, skip, activation,
    dropout_p, channels_first, z_channels_first, save,
):  # fmt: skip
    y = layout.rows_like(z if residual is None else residual, z.shape[2], channels_first)
    return y, z.new_empty((z.shape[0] * z.shape[1], down_weight.shape[0]) if save else 0)


def _fake_bwd(
    dy, z, down_weight, down_bias, up_weight, up_bias, layer_scale, sample_scale, hidden, seed, skip, activation,
    dropout_p, channels_first, z_is_residual, need_dz, need_down, need_up,
):  # fmt: skip
    like = hidden if z is None else z
    dz = layout.rows_like(dy, dy.shape[2], channels_first).to(like.dtype) if need_dz else like.new_empty(0)

    def gradient(parameter, needed):
        return up_weight.new_empty(0) if parameter is None or not needed else torch.empty_like(
            parameter, memory_format=torch.contiguous_format
        )  # fmt: skip

    scale_dtype = torch.promote_types(like.dtype, torch.float32)
    return (
        dz, gradient(down_weight, need_down), gradient(down_bias, need_down), gradient(up_weight, need_up),
        gradient(up_bias, need_up), up_weight.new_empty(dy.shape[2] if need_up else 0, dtype=scale_dtype),
    )  # fmt: skip


# ``save`` asks for h before the activation, M h elements whose order in the buffer is the backend's own; without it
# backward computes h from z again.
_fwd = registry.define(
    "adapter_residual",
    "fwd",
    "(Tensor z, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, Tensor? residual, "
    "Tensor? layer_scale, Tensor? sample_scale, Tensor? seed, float skip, str activation, float dropout_p, "
    "bool channels_first, bool z_channels_first, bool save) -> (Tensor y, Tensor hidden)",
    _fake_fwd,
)
# A gradient that is not needed comes back empty; need_up asks for dU, du and dgamma, which is (C,) in float32 or wider.
_bwd = registry.define(
    "adapter_residual",
    "bwd",
    "(Tensor dy, Tensor? z, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, "
    "Tensor? layer_scale, Tensor? sample_scale, Tensor? hidden, Tensor? seed, float skip, str activation, "
    "float dropout_p, bool channels_first, bool z_is_residual, bool need_dz, bool need_down, bool need_up) "
    "-> (Tensor dz, Tensor d_down_weight, Tensor d_down_bias, Tensor d_up_weight, Tensor d_up_bias, "
    "Tensor d_layer_scale)",
    _fake_bwd,
)


class _AdapterResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, z, down_weight, down_bias, up_weight, up_bias, residual, layer_scale, sample_scale, seed, skip,
        activation, dropout_p, channels_first, z_channels_first, plan, backend,
    ):  # fmt: skip
        need_z, need_d, need_d_bias, need_u, need_u_bias, _, need_scale = ctx.needs_input_grad[:7]
        ctx.need_down, ctx.need_up = need_d or need_d_bias, need_u or need_u_bias or need_scale
        needed = need_z or ctx.need_down or ctx.need_up
        y, hidden, ctx.shape = _through_rows(
            _fwd[backend], z, down_weight, down_bias, up_weight, up_bias, residual, layer_scale, sample_scale, seed,
            skip, activation, dropout_p, channels_first, z_channels_first, needed and plan == "save",
        )  # fmt: skip
        keep_z = plan == "recompute" or need_d or (need_scale and skip != 0.0)
        if needed:
            ctx.save_for_backward(
                z if keep_z else None, down_weight, down_bias, up_weight, up_bias, layer_scale, sample_scale,
                hidden if plan == "save" else None, seed,
            )  # fmt: skip
        ctx.needed = needed
        ctx.settings = skip, activation, dropout_p, z_channels_first, residual is None
        ctx.backend = backend
        return y

    @staticmethod
    @registry.differentiable_once
    def backward(ctx, dy):
        # Read once: activation checkpointing hands them out once.
        saved, z_is_residual = ctx.saved_tensors, ctx.settings[-1]
        need_z, need_d, need_d_bias, need_u, need_u_bias, need_residual, need_scale = ctx.needs_input_grad[:7]
        gradients = [None] * 6
        if ctx.needed:
            z, *parameters, layer_scale, sample_scale, hidden, seed = saved
            rows, z = layout.rows_as(ctx.shape, dy, z)
            gradients = _bwd[registry.way_back(ctx.backend, dy, *saved)](
                rows, z, *parameters, layout.vector(layer_scale), sample_scale, hidden, seed, *ctx.settings, need_z,
                ctx.need_down, ctx.need_up,
            )  # fmt: skip
        dz, d_down, d_down_bias, d_up, d_up_bias, d_scale = gradients
        if need_scale:
            layer_scale = saved[5]
            d_scale = (d_scale if layer_scale.numel() > 1 else d_scale.sum()).reshape(layer_scale.shape)
            d_scale = d_scale.to(layer_scale.dtype)
        return (
            layout.from_rows(dz, dy) if need_z else None,
            d_down if need_d else None,
            d_down_bias if need_d_bias else None,
            d_up if need_u else None,
            d_up_bias if need_u_bias else None,
            dy if need_residual and not z_is_residual else None,
            d_scale if need_scale else None,
            None, None, None, None, None, None, None, None, None,
        )  # fmt: skip


def _through_rows(raw, z, down_weight, down_bias, up_weight, up_bias, residual, layer_scale, *others):
    """y in z's shape, h, and the (B, L) of the rows that ``raw`` saw."""
    z_rows, *stream = layout.to_rows(*((z,) if residual is None else (z, residual)))
    y, hidden = raw(
        z_rows, down_weight, down_bias, up_weight, up_bias, *(stream or [None]), layout.vector(layer_scale), *others
    )
    return layout.from_rows(y, z), hidden, z_rows.shape[:2]


def _derived(backend, *arguments):
    z, down_weight = arguments[:2]
    y = _AdapterResidual.apply(*arguments[:-1], choose_plan(*down_weight.shape)[0], backend)
    return y, z.new_empty(0)


registry.derive(_fwd, _derived)


def adapter_residual(
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
    seed: Tensor | int | None = None,
    channel_dim: int = -1,
    plan: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """A bottleneck adapter with layer-scale, drop-path and residual in one call:
    ``residual + sample_scale * layer_scale * (skip * z + U phi(D z + d) + u)``.

    Args:
        z: (..., C); with ``channel_dim=1`` (B, C, ...), as a 1x1 convolution sees it. float32, float16, bfloat16, and
            float64 on the portable backend. Any strides.
        down_weight: D, (h, C); z's dtype or float32 (under autocast float32, float16 or bfloat16). A float32 parameter
            is cast to z's dtype for the products; its gradient is accumulated and returned in float32. The Triton
            kernels take h up to 512, in float32 up to 128, the CUDA C++ kernels up to 256 and a C that fits into shared
            memory beside it (2300 to 2700 where a block has 227 KB, 480 to 900 where it has 99 KB), the C++ kernels for
            CPUs and the portable backend any.
        down_bias: d, (h,) or None; dtypes as ``down_weight``.
        up_weight: U, (C, h); dtypes as ``down_weight``.
        up_bias: u, (C,) or None; dtypes as ``down_weight``.
        residual: z's shape, any strides; float32, float16 or bfloat16, with a float64 z also float64. None (the
            default) means z itself.
        layer_scale: gamma, of any floating dtype: a tensor of one element, or (C,). It is never rounded to 16 bits.
            None (the default) means 1.
        sample_scale: (B,) for z (B, ...), any floating dtype: the drop-path factor of each sample, 0 for a dropped one,
            whose rows of the output are the residual's, whatever z holds. It gets no gradient. None (the default)
            means 1.
        skip: factor of z inside the branch, a Python number. Default 1.
        activation: phi, one of "identity", "relu", "leaky_relu" (slope 0.01), "gelu" (the default, by erf),
            "gelu_tanh", "quick_gelu" (``x sigmoid(1.702 x)``), "silu".
        dropout_p: probability of zeroing an element of phi(h), in [0, 1). Default 0.
        training: dropout acts only when True (the default). ``sample_scale`` always acts.
        seed: int, or int64 tensor of one element on z's device: the key of the dropout mask. None (the default) draws
            one from torch's generator of that device. The same seed gives the same mask on every backend.
        channel_dim: -1 (the default) or 1.
        plan: "save" keeps h (M x h) for backward, "recompute" keeps nothing beyond z; "auto" (the default) saves up to
            h = C / 2.
        backend: "auto" (the default), "portable", "triton", "cuda" or "cpu".

    Returns:
        z's shape, in the dtype of the residual (z's without one). Under autocast z is cast to its dtype for the branch
        while the residual, z without one, keeps its own. With ``channel_dim=1`` contiguous, or channels_last where a
        4-D residual (z without one) is. Every argument but ``sample_scale`` that requires grad gets its exact gradient;
        a backward with ``create_graph=True`` raises.

    Raises:
        ValueError: a shape, device, number, activation, plan or backend name is wrong, ``sample_scale`` requires grad,
            or h is over what the backend asked for takes.
        TypeError: a dtype or an argument's type is wrong.
        RuntimeError: the backend that was asked for cannot serve the call.

    Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019 (adapter); Touvron et al., "Going
    deeper with Image Transformers", 2021 (layer-scale); Huang et al., "Deep Networks with Stochastic Depth", 2016.
    """
    tensors = (down_weight, down_bias, up_weight, up_bias, residual, layer_scale, sample_scale)
    settings = (skip, activation, dropout_p, training, channel_dim, plan, backend)
    key = known.signature(z, tensors, settings)
    decided = _known.get(key)
    if decided is None:
        decided = _decide(z, *tensors, *settings)
        _known.keep(key, decided)
    if decided.cast is not None:
        residual = z if residual is None else residual
        z = z.to(decided.cast)
    seed = checks.seed(_NAME, seed, z.device) if decided.dropout_p > 0.0 else None
    rows, stream, channels_first = z, residual, [False]
    if channel_dim == 1:
        # y is laid out as the residual stream, dz as z.
        (rows, *others), channels_first = layout.as_rows(1, *((z,) if residual is None else (z, residual)))
        stream = others[0] if others else None
    way = registry.way_there(decided.backend, key is not None)
    y = registry.run(
        _NAME,
        _AdapterResidual,
        functools.partial(_through_rows, _fwd[way]),
        (rows, down_weight, down_bias, up_weight, up_bias, stream, layer_scale),
        (sample_scale, seed, decided.skip, activation, decided.dropout_p, channels_first[-1], channels_first[0]),
        (decided.plan, way),
        key is not None,
    )
    return y if channel_dim == -1 else layout.as_channels(y, z, channels_first[-1])


class _Decided(NamedTuple):
    """What a call is, once it is checked; ``cast``: what autocast makes of z, None where it does nothing."""

    backend: str
    plan: str
    cast: torch.dtype | None
    skip: float
    dropout_p: float


_known: known.Known[_Decided] = known.Known()


def _decide(
    z, down_weight, down_bias, up_weight, up_bias, residual, layer_scale, sample_scale, skip, activation, dropout_p,
    training, channel_dim, plan, backend,
) -> _Decided:  # fmt: skip
    name = _NAME
    weights = {"down_weight": down_weight, "down_bias": down_bias, "up_weight": up_weight, "up_bias": up_bias}
    _check(name, z, weights, residual, layer_scale, sample_scale, channel_dim)
    checks.finite(name, "skip", skip)
    checks.probability(name, "dropout_p", dropout_p)
    checks.one_of(name, "activation", activation, ACTIVATIONS)
    checks.one_of(name, "plan", plan, ("auto", *PLANS))
    checks.flag(name, "training", training)
    autocast = checks.autocast_dtype(z)
    dtype = z.dtype if autocast is None else autocast
    hidden, channels = down_weight.shape
    dropout_p = float(dropout_p) if training else 0.0
    limits, tile_rows = _limits(z, dtype, hidden, channels)
    sizes = {
        "M": z.numel() // channels, "C": channels, "h": hidden, "dropout_p": dropout_p, "cuda_rows": tile_rows,
        "weight_bytes": max(down_weight.itemsize, up_weight.itemsize),
    }  # fmt: skip
    chosen = backends.choose(backend, z.device, dtype, name, sizes, limits).backend
    resolved, reason = choose_plan(hidden, channels) if plan == "auto" else (plan, "plan asked for by name")
    if decision.observers:
        asked = decision.asked(
            z=z, **weights, residual=residual, layer_scale=layer_scale, sample_scale=sample_scale, skip=skip,
            activation=activation, dropout_p=dropout_p, channel_dim=channel_dim, plan=plan, backend=backend,
        )  # fmt: skip
        decision.notify(_decided(z, dtype, sizes, chosen, resolved, reason, limits, asked))
    return _Decided(chosen, resolved, None if dtype == z.dtype else dtype, float(skip), dropout_p)


def _decided(z, dtype, sizes, backend, plan, reason, limits, asked) -> decision.Decision:
    shapes = tuple((letter, int(sizes[letter])) for letter in ("M", "C", "h"))
    m, channels, hidden = (size for _, size in shapes)
    # What autocast made of z is no input of the call, and kept too.
    saved = m * (hidden * (plan == "save") + channels * (dtype != z.dtype)) * dtype.itemsize
    return decision.Decision(
        _NAME, _NAME, shapes, sizes, dtype, z.device, backend, plan, plan, (reason,), saved, limits, arguments=asked
    )


def _check(name, z, weights, residual, layer_scale, sample_scale, channel_dim) -> None:
    checks.tensor(name, "z", z)
    checks.dtype(name, "z", z, checks.FLOATING)
    checks.one_of(name, "channel_dim", channel_dim, (-1, 1))
    least = 3 if channel_dim == 1 else 1 if sample_scale is None else 2
    if z.dim() < least:
        raise ValueError(f"{name}: z must have at least {least} dimensions, got shape {tuple(z.shape)}")
    down_weight = weights["down_weight"]
    checks.tensor(name, "down_weight", down_weight)
    if down_weight.dim() != 2 or down_weight.shape[0] < 1 or down_weight.shape[1] < 1:
        raise ValueError(f"{name}: down_weight must have shape (h, C), got {tuple(down_weight.shape)}")
    hidden, channels = down_weight.shape
    if z.shape[channel_dim] != channels:
        raise ValueError(
            f"{name}: z must have down_weight's C = {channels} in dimension {channel_dim}, got shape {tuple(z.shape)} "
            f"with down_weight (h, C) = {(hidden, channels)}"
        )
    shapes = {
        "down_weight": ((hidden, channels), "(h, C)"),
        "down_bias": ((hidden,), "(h,)"),
        "up_weight": ((channels, hidden), "(C, h)"),
        "up_bias": ((channels,), "(C,)"),
    }
    allowed = checks.parameter_dtypes(z)
    for parameter, value in weights.items():
        if value is not None or parameter.endswith("weight"):
            checks.argument(name, parameter, value, *shapes[parameter], allowed, z.device, "z")
    for argument, value in (("residual", residual), ("layer_scale", layer_scale), ("sample_scale", sample_scale)):
        if value is not None:
            checks.tensor(name, argument, value)
            checks.dtype(name, argument, value, checks.FLOATING)
            checks.same_device(name, argument, value, z.device, "z")
    if residual is not None:
        checks.shape(name, "residual", residual, tuple(z.shape), "of z")
        # Its sum with the branch is formed in float32, or with a float64 z in float64.
        checks.dtype(name, "residual", residual, checks.FLOATING if z.dtype == torch.float64 else checks.NARROW)
    # Not a tuple's ``in``: sizes may be symbols, which it does not compare.
    if (
        layer_scale is not None
        and layer_scale.shape != (channels,)
        and (layer_scale.dim() > 1 or layer_scale.numel() != 1)
    ):
        raise ValueError(
            f"{name}: layer_scale must have one element or shape (C,) = {(channels,)}, got {tuple(layer_scale.shape)}"
        )
    if sample_scale is not None:
        checks.shape(name, "sample_scale", sample_scale, (z.shape[0],), "(B,)")
        if sample_scale.requires_grad:
            raise ValueError(f"{name}: sample_scale must not require grad, it gets no gradient; pass it detached")
