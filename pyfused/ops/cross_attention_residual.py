"""``cross_attention_residual``: contract, autograd, plans and public function.

    y = x + w match(CrossAttention(x, context))        match(o) = o |x| / (|o| + eps), or o

Plan ``standard`` projects, attends with torch's `scaled_dot_product_attention`, and leaves the output projection and
what follows to `pyfused.projection_residual`. Plan ``absorbed`` moves the query projection onto the keys and the output
projection onto the values, head by head, which autograd differentiates,

    E[h, t] = k[h, t] W_q[h] / sqrt(d)      c[h, t] = k[h, t] . b_q[h] / sqrt(d)      F[h, t] = W_o[h] v[h, t]

so that rows meet H T columns instead of twice the inner width. Its core is a raw operator: with J = H T,

    p = softmax over T of (x E^T + c)       a = drop(p)       y = x + w rho (a F + b_o)

with o = a F + b_o and rho = |x| / (|o| + eps); without norm matching rho = 1 and kappa below is 0. Backward from dy,
with g = w dy:

    do = rho g - kappa o            kappa = (g . o) |x| / (|o| (|o| + eps)^2)            da = do F^T
    ds = p (dp - sum over T of p dp)                dx = dy + ds E + (g . o) / (|o| + eps) x / |x|
    dE = ds^T x     dc = sum ds     dF = a^T do     db_o = sum do     dw = sum rho dy o, per channel

and 1 / |o| is 0 at o = 0, 1 / |x| at x = 0. Backward keeps x, and p or nothing.

The raw operators see x (B, L, C) with any strides, row m = b L + l; E and F (B or 1, H, T, C), c (B or 1, H, T) with
-inf where a key is masked: a head with no key left attends to nothing, a = 0. x may be wider than E and F, whose dtype
the products have. Dropout's mask has row m and column h T' + t, T' the power of two from T on.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from pyfused.choice import backends, order
from pyfused.ops import decision
from pyfused.ops.contract import checks, known, layout, registry
from pyfused.ops.contract.cuda_limits import cuda_row_limit, cuda_rows, cuda_shared_memory
from pyfused.ops.prepared_context import (
    PROJECTIONS,
    PreparedContext,
    Projections,
    attend_standard,
    check_context,
    check_projections,
    prepare_context,
)
from pyfused.ops.projection_residual import check_eps, check_gate, keeps_projection, project_residual

_NAME = "cross_attention_residual"
PLANS = ("absorbed", "absorbed_recompute", "standard")
# The most columns, H and T each padded to a power of two, that stay on chip, by bytes of an element; half as many with
# norm matching, which has a tile of o beside them. The portable backend takes any.
MAX_KERNEL_COLUMNS = {2: 256, 4: 128}
# Backend "cuda": H T without padding, and with norm matching.
MAX_CUDA_COLUMNS, MAX_CUDA_COLUMNS_MATCHED = 256, 128
# A grid's second dimension, over which its sums over the rows of each context are spread.
MAX_CUDA_CONTEXTS = 2**16 - 1

# Time of a multiplication in the absorbed plan, softmax included, against one in the standard plan; measured on a CPU
# (docs/measured.md), a guess elsewhere.
ABSORBED_COST = {"cpu": 1.25, "cuda": 1.0}
# What making E, c and F costs beyond its multiplications, which are few, as so many multiplications: steps of torch
# that the standard plan has not. Measured on a CPU too; on a GPU the plans start about as many kernels.
ABSORBED_STEPS = {"cpu": 1e7}


def padded_columns(heads: int, tokens: int) -> int:
    """H and T each padded to a power of two, multiplied."""
    padded = 1
    for size in (heads, tokens):
        power = 1
        # Not by bits: a traced size has none.
        while power < size:
            power *= 2
        padded *= power
    return padded


def most_columns(dtype: torch.dtype, norm_match: bool) -> int | None:
    """The padded columns that the kernels take; None for a dtype they do not."""
    widest = MAX_KERNEL_COLUMNS.get(dtype.itemsize)
    return widest // 2 if widest is not None and norm_match else widest


def choose_plan(
    rows: int | None,
    heads: int,
    tokens: int,
    head_dim: int,
    channels: int,
    norm_match: bool,
    dtype: torch.dtype,
    device_type: str,
) -> tuple[str, str]:
    """(plan, reason) by what a context costs in multiplications, forward; backward costs in the same proportion,
    whichever tensors want gradients.

    Args:
        rows: of x for each context, B L / (the context's batch); None where the context is prepared beforehand.
        norm_match: |c|^2 costs two products of the columns with each other.
    """
    columns, padded, inner = heads * tokens, padded_columns(heads, tokens), heads * head_dim
    widest = most_columns(dtype, norm_match)
    if device_type == "cuda" and widest is not None and padded > widest:
        return "standard", f"H T = {columns}, padded to {padded}, is over the {widest} columns that stay on chip"
    absorbed = ABSORBED_COST.get(device_type, 1.0) * (2 * columns * channels + 2 * norm_match * columns**2)
    standard = 2 * inner * channels + 2 * tokens * inner
    # E and F are made of K and V, which both plans need.
    extra = 2 * tokens * inner * channels + ABSORBED_STEPS.get(device_type, 0.0)
    extra = 0.0 if rows is None else extra / max(1, rows)
    sizes = f"with H T = {columns} columns for H d = {inner} and C = {channels}"
    if absorbed + extra > standard:
        few = "" if absorbed > standard else ", at so few rows"
        return "standard", f"absorbing costs more {sizes}{few}"
    plan = _absorbed_plan(columns, channels)
    kept = "kept" if plan == "absorbed" else "made again"
    return plan, f"absorbing costs less {sizes}; p is {kept}"


def _absorbed_plan(columns: int, channels: int) -> str:
    """Keeping p for backward costs at most half of what x does, or else it is made again."""
    return "absorbed" if 2 * columns <= channels else "absorbed_recompute"


def _fake_fwd(x, e, c, f, bias, gate, seed, weight, norm_match, eps, dropout_p, save):
    columns = e.shape[1] * e.shape[2]
    return x.new_empty(x.shape), e.new_empty((x.shape[0], x.shape[1], columns) if save else 0)


def _fake_bwd(
    dy, x, e, c, f, bias, gate, p, seed, weight, norm_match, eps, dropout_p, need_dx, need_keys, need_values
):  # fmt: skip
    nothing = e.new_empty
    wide = torch.promote_types(e.dtype, torch.float32)
    return (
        dy.new_empty(dy.shape if need_dx else 0),
        nothing(e.shape if need_keys else 0, dtype=wide),
        nothing(0) if c is None or not need_keys else c.new_empty(c.shape),
        nothing(f.shape if need_values else 0, dtype=wide),
        nothing(f.shape[3] if need_values and bias is not None else 0),
        nothing(f.shape[3] if need_values else 0, dtype=wide),
    )


# w is ``gate``, (1,) or (C,), or without it the number ``weight``. ``save`` asks for p before dropout, B L H T elements
# whose order in the buffer and whose signs are the backend's own; without it backward computes p from x again.
_fwd = registry.define(
    _NAME,
    "fwd",
    "(Tensor x, Tensor e, Tensor? c, Tensor f, Tensor? bias, Tensor? gate, Tensor? seed, float weight, "
    "bool norm_match, float eps, float dropout_p, bool save) -> (Tensor y, Tensor p)",
    _fake_fwd,
)
# A gradient that is not needed comes back empty; need_keys asks for dE and dc, need_values for dF, db_o and dw, (C,).
# dE, dF and dw, sums over rows, are float32 or wider.
_bwd = registry.define(
    _NAME,
    "bwd",
    "(Tensor dy, Tensor? x, Tensor e, Tensor? c, Tensor f, Tensor? bias, Tensor? gate, Tensor? p, Tensor? seed, "
    "float weight, bool norm_match, float eps, float dropout_p, bool need_dx, bool need_keys, bool need_values) "
    "-> (Tensor dx, Tensor de, Tensor dc, Tensor df, Tensor d_bias, Tensor d_gate)",
    _fake_bwd,
)


def _through_rows(raw, dtype, x, e, c, f, bias, gate, *others):
    """y in x's shape, p, and the (B, L) of the rows that ``raw`` saw, in one image where one context serves all.

    E and F meet them in the dtype of the products.
    """
    together = len(e) == 1 and (c is None or len(c) == 1)
    (rows,) = layout.to_rows(x) if together else (x,)
    y, p = raw(rows, e.to(dtype), c, f.to(dtype), bias, layout.vector(gate), *others)
    return layout.from_rows(y, x), p, rows.shape[:2]


class _CrossAttentionResidual(torch.autograd.Function):
    """E and F may be wider than ``dtype``, that of the products: their gradients are."""

    @staticmethod
    def forward(ctx, x, e, c, f, bias, gate, seed, weight, norm_match, eps, dropout_p, plan, dtype, backend):
        _, need_e, need_c, need_f, need_bias, need_gate = ctx.needs_input_grad[:6]
        ctx.need_keys, ctx.need_values = need_e or need_c, need_f or need_bias or need_gate
        save = plan == "absorbed"
        settings = weight, norm_match, eps, dropout_p
        e, f = e.to(dtype), f.to(dtype)
        y, p, ctx.shape = _through_rows(_fwd[backend], dtype, x, e, c, f, bias, gate, seed, *settings, save)
        keep_x = not save or need_e or norm_match
        ctx.save_for_backward(x if keep_x else None, e, c, f, bias, gate, p if save else None, seed)
        ctx.settings = settings
        ctx.backend = backend
        return y

    @staticmethod
    @registry.differentiable_once
    def backward(ctx, dy):
        need_x, need_e, need_c, need_f, need_bias, need_gate = ctx.needs_input_grad[:6]
        # Read once: activation checkpointing hands them out once.
        saved = ctx.saved_tensors
        x, e, c, f, bias, gate, p, seed = saved
        rows, x = layout.rows_as(ctx.shape, dy, x)
        dx, de, dc, df, d_bias, d_gate = _bwd[registry.way_back(ctx.backend, dy, *saved)](
            rows, x, e, c, f, bias, layout.vector(gate), p, seed, *ctx.settings, need_x, ctx.need_keys, ctx.need_values
        )
        if need_gate:
            d_gate = (d_gate if gate.numel() > 1 else d_gate.sum()).reshape(gate.shape).to(gate.dtype)
        return (
            layout.from_rows(dx, dy) if need_x else None,
            de if need_e else None,
            dc if need_c else None,
            df if need_f else None,
            d_bias if need_bias else None,
            d_gate if need_gate else None,
            None, None, None, None, None, None, None, None,
        )  # fmt: skip


def _derived(backend, *arguments):
    x, e = arguments[:2]
    plan = _absorbed_plan(e.shape[1] * e.shape[2], x.shape[2])
    return _CrossAttentionResidual.apply(*arguments[:-1], plan, e.dtype, backend), e.new_empty(0)


registry.derive(_fwd, _derived)


class Asked(NamedTuple):
    """Of a public call: the backend that a measured row takes, "" without one; the rest as `decision.Decision`'s."""

    first: str = ""
    arguments: decision.Arguments = ()
    rivals: tuple[str, ...] = ()
    sizes: dict[str, float] | None = None


def choose_backend(
    x: Tensor,
    prepared: PreparedContext,
    projections: Projections,
    weight: float | Tensor,
    norm_match: bool,
    dropout_p: float,
    backend: str,
    asked: Asked | None = None,
) -> str:
    """Which backend serves a call that is checked; tells the observers. ``asked``: what they learn of a public call."""
    asked = asked or Asked()
    dtype, channels = prepared.dtype, x.shape[-1]
    rows = x.numel() // channels
    limits, tile_rows = _limits(prepared, projections, norm_match, rows)
    sizes: dict[str, float] = {"M": rows, "C": channels, "norm_match": norm_match}
    # Plan "standard" is torch's attention and projection_residual's kernels.
    if prepared.plan == "standard":
        operator, sizes = "projection_residual", sizes | {"K": projections.num_heads * projections.head_dim}
    else:
        columns = projections.num_heads * prepared.tokens
        operator, sizes = _NAME, sizes | {"J": columns, "dropout_p": dropout_p, "cuda_rows": tile_rows}
    chosen = backends.choose(backend, x.device, dtype, operator, sizes, limits, first=asked.first).backend
    if decision.observers:
        need_gate = isinstance(weight, Tensor) and weight.requires_grad
        saved = _saved_bytes(x, prepared, projections, norm_match, need_gate)
        decision.notify(_decided(x, prepared, projections, sizes, chosen, limits, operator, saved, asked))
    return chosen


def attend(
    x: Tensor,
    prepared: PreparedContext,
    projections: Projections,
    weight: float | Tensor,
    norm_match: bool,
    eps: float,
    dropout_p: float,
    seed: Tensor | int | None,
    backend: str,
    directly: bool = False,
) -> Tensor:
    """`cross_attention_residual` of checked tensors on one backend; ``directly`` as `registry.run`'s."""
    dtype = prepared.dtype
    gate, factor = (weight, 1.0) if isinstance(weight, Tensor) else (None, float(weight))
    out_bias = None if projections.out_bias is None else projections.out_bias.to(dtype)
    if prepared.plan == "standard":
        # torch's attention would be the first to meet a tangent, and refuse it in its own name.
        registry.refuse_tangents(_NAME, {"x": x, "context": prepared.keys})
        attended = attend_standard(x.to(dtype), prepared, projections, dropout_p)
        return project_residual(
            _NAME, attended, projections.out_weight.to(dtype), out_bias, x, weight, 1.0, "identity", norm_match, eps,
            backend, directly,
        )  # fmt: skip
    seed = checks.seed(_NAME, seed, x.device) if dropout_p > 0.0 else None
    way = registry.way_there(backend, directly)
    return registry.run(
        _NAME,
        _CrossAttentionResidual,
        functools.partial(_through_rows, _fwd[way], dtype),
        (x, prepared.keys, prepared.logits, prepared.values, out_bias, gate),
        (seed, factor, norm_match, eps, dropout_p),
        (prepared.plan, dtype, way),
        directly,
    )


def _decided(x, prepared, projections, sizes, backend, limits, kernels, saved, asked) -> decision.Decision:
    heads, width, plan = projections.num_heads, projections.head_dim, prepared.plan
    shapes = (("M", int(sizes["M"])), ("C", x.shape[2]), ("H", heads), ("d", width), ("T", prepared.tokens))
    return decision.Decision(
        _NAME, kernels, shapes, sizes, prepared.dtype, x.device, backend, plan, plan, (prepared.reason,), saved, limits,
        arguments=asked.arguments, rivals=asked.rivals, call_sizes=asked.sizes, measured_backend=asked.first,
    )  # fmt: skip


def _saved_bytes(x, prepared, projections, norm_match, need_gate) -> int:
    """What a training step keeps for backward beyond the call's own inputs, in bytes."""
    dtype, heads, tokens = prepared.dtype, projections.num_heads, prepared.tokens
    (batch, length, channels), inner, contexts = x.shape, heads * projections.head_dim, len(prepared.keys)
    m, wide = batch * length, torch.promote_types(dtype, torch.float32)
    if prepared.plan == "standard":
        # q, k, v, attention's output and the logarithm of its sums, and the projected output where backward needs it.
        projected = channels * keeps_projection("identity", norm_match, need_gate)
        kept = m * (2 * inner + projected) + 2 * contexts * tokens * inner
        return kept * dtype.itemsize + m * heads * wide.itemsize
    # E, c and F are inputs of the call's core, not of the call; K and V are what they are made of.
    saved = contexts * heads * tokens * (2 * channels * dtype.itemsize + wide.itemsize)
    saved += contexts * tokens * 2 * inner * dtype.itemsize
    return saved + m * heads * tokens * dtype.itemsize * (prepared.plan == "absorbed")


def _most_cuda_columns(norm_match: bool) -> int:
    return MAX_CUDA_COLUMNS_MATCHED if norm_match else MAX_CUDA_COLUMNS


def _without_cuda(prepared: PreparedContext, columns: int, norm_match: bool) -> dict[str, str]:
    """{"cuda": why plan "standard" has no kernels there, and what has}; empty where all kernels are absent, or none."""
    device = prepared.keys.device
    if not backends.has_cuda_kernels(_NAME, device) or backends.has_cuda_kernels("projection_residual", device):
        return {}
    why = f"{_NAME}: plan 'standard' ({prepared.reason}) ends in projection_residual, which has no kernels there"
    if columns > _most_cuda_columns(norm_match):
        return {"cuda": f"{why}; backend='auto' serves it"}
    return {"cuda": f"{why}; plan='absorbed' has, and backend='auto' serves plan 'standard' too"}


def _limits(
    prepared: PreparedContext, projections: Projections, norm_match: bool, rows: int
) -> tuple[dict[str, str], int]:
    """Backend -> why its kernels do not take these sizes, and the rows of a tile of the CUDA C++ kernels."""
    limits: dict[str, str] = {}
    if prepared.plan == "standard":
        limits |= _without_cuda(prepared, projections.num_heads * prepared.tokens, norm_match)
        return limits, 0
    dtype, case = prepared.dtype, " with norm_match" if norm_match else ""
    padded, widest = padded_columns(projections.num_heads, prepared.tokens), most_columns(dtype, norm_match)
    if widest is not None and padded > widest:
        limits["triton"] = (
            f"{_NAME}: plan {prepared.plan!r} takes at most {widest} columns H T there in {dtype}{case}, H and T each "
            f"padded to a power of two; got {padded}"
        )
    device = prepared.keys.device
    if not backends.has_cuda_kernels(_NAME, device):
        return limits, 0
    columns, contexts, channels = projections.num_heads * prepared.tokens, len(prepared.keys), prepared.keys.shape[3]
    widest = _most_cuda_columns(norm_match)
    limits |= cuda_row_limit(_NAME, rows)
    if contexts > MAX_CUDA_CONTEXTS:
        limits["cuda"] = (
            f"{_NAME}: plan {prepared.plan!r} takes at most {MAX_CUDA_CONTEXTS} contexts there, got {contexts}"
        )
    if columns > widest:
        limits["cuda"] = (
            f"{_NAME}: plan {prepared.plan!r} takes at most {widest} columns H T there{case}, got {columns}"
        )
    if "cuda" in limits:
        return limits, 0
    candidates = (64, 32, 16) if columns <= 128 else (32, 16)
    tile_rows = cuda_rows(columns, channels, device, rows=candidates, float_middle=True)
    if not tile_rows:
        limits["cuda"] = (
            f"{_NAME}: 16 rows of x with C = {channels} and tiles of E and F with H T = {columns} take "
            f"{cuda_shared_memory(columns, channels, rows=16, float_middle=True)} bytes of shared memory there, a "
            f"block has {backends.shared_memory(device)}"
        )
    return limits, tile_rows


def cross_attention_residual(
    x: Tensor,
    context: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    num_heads: int,
    weight: float | Tensor = 0.1,
    norm_match: bool = False,
    eps: float = 1e-6,
    normalize_context: bool = False,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | int | None = None,
    plan: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Multi-head cross-attention, its output scaled and added to the rows that asked, in one call:
    ``x + weight * match(CrossAttention(x, context))``.

    Args:
        x: (B, L, C); float32, float16, bfloat16, and float64 on the portable backend. Any strides.
        context: (B, T, Cc), or (1, T, Cc) for all of x; x's dtype, T at least 1. Its gradient is summed over the batch
            that shared it.
        q_weight: (H d, C); x's dtype or float32. In plan "standard" it is cast to x's dtype, as k_weight and v_weight
            are; the absorbed plans, which multiply q_weight and out_weight with the context alone, do that in float32.
        q_bias: (H d,) or None; dtypes of this and what follows as ``q_weight``.
        k_weight, v_weight: (H d, Cc).
        k_bias, v_bias: (H d,) or None.
        out_weight: (C, H d).
        out_bias: (C,) or None.
        num_heads: H, divides H d. The logits are scaled by d^-0.5.
        weight: w, a Python number, or a tensor of one element or (C,) of any floating dtype. Default 0.1.
        norm_match: scale the attention's output, row by row, to the norm of x, ``|x| / (|c| + eps)``; both norms are
            differentiated. Default False.
        eps: a Python number from 0 on. Default 1e-6.
        normalize_context: divide each token of the context by its norm, at least 1e-12, first. Default False.
        key_padding_mask: bool (B, T) or (1, T), True for tokens to ignore. A sample without any token left gets
            ``out_bias`` alone as its attention output.
        dropout_p: probability of zeroing an attention probability, in [0, 1). Default 0.
        training: dropout acts only when True (the default).
        seed: int, or int64 tensor of one element on x's device: the key of the dropout mask in the absorbed plans, the
            same mask on every backend; with dropout it makes ``plan="auto"`` take one of them. None (the default)
            draws one from torch's generator of that device. Plan "standard" draws from that generator itself and
            refuses a seed.
        plan: "absorbed" moves the query and output projections onto the context and keeps the probabilities for
            backward, "absorbed_recompute" makes them again, "standard" projects x and attends with torch's
            `scaled_dot_product_attention`. "auto" (the default) takes what costs least by H T, C, d and T. The Triton
            kernels take up to 256 columns H T in the absorbed plans, 128 in float32, half as many with ``norm_match``,
            H and T each padded to a power of two; the CUDA kernels 256 without padding, 128 with ``norm_match``; the
            portable backend takes any, with a matrix of H T x H T for ``norm_match``.
        backend: "auto" (the default), "portable", "triton", "cuda" or "cpu".

    Returns:
        (B, L, C) in x's dtype, contiguous. Under autocast everything but x's own part of the sum is cast to its dtype.
        Every tensor that requires grad gets its exact gradient; a backward with ``create_graph=True`` raises.

    Raises:
        ValueError: a shape, device, number, plan or backend name is wrong, or a plan is asked for beyond its limit.
        TypeError: a dtype or an argument's type is wrong.
        RuntimeError: the backend that was asked for cannot serve the call.

    Source: the cross-attention between the towers of AA-CLIP (Ma et al., 2025), attention as in Vaswani et al., 2017.
    """
    projections = Projections(
        q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, out_weight, out_bias, num_heads
    )  # fmt: skip
    gate = weight if isinstance(weight, Tensor) else None
    tensors = (
        context, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, out_weight, out_bias, gate, key_padding_mask,
    )  # fmt: skip
    settings = (
        num_heads, weight if gate is None else None, norm_match, eps, normalize_context, dropout_p, training,
        seed is None, plan, backend,
    )  # fmt: skip
    key = known.signature(x, tensors, settings)
    decided = _known.get(key)
    if decided is None:
        resolved = _resolve(
            x, context, projections, weight, norm_match, eps, normalize_context, key_padding_mask, dropout_p, training,
            seed, plan, backend,
        )  # fmt: skip
    else:
        resolved = decided.resolved
    prepared = prepare_context(
        _NAME, context.to(resolved.dtype), projections, key_padding_mask, normalize_context, resolved.plan,
        resolved.reason, key is not None,
    )  # fmt: skip
    if decided is None:
        asked = Asked(resolved.backend)
        if decision.observers:
            arguments = decision.asked(
                x=x, context=context, q_weight=q_weight, q_bias=q_bias, k_weight=k_weight, k_bias=k_bias,
                v_weight=v_weight, v_bias=v_bias, out_weight=out_weight, out_bias=out_bias, num_heads=num_heads,
                weight=weight, norm_match=norm_match, eps=eps, normalize_context=normalize_context,
                key_padding_mask=key_padding_mask, dropout_p=dropout_p, training=training,
                seed=None if seed is None else 0, plan=plan, backend=backend,
            )  # fmt: skip
            asked = asked._replace(arguments=arguments, rivals=resolved.rivals, sizes=resolved.sizes)
        chosen = choose_backend(x, prepared, projections, weight, norm_match, resolved.dropout_p, backend, asked)
        _known.keep(key, _Decided(resolved, chosen))
    else:
        chosen = decided.backend
    return attend(
        x, prepared, projections, weight, norm_match, float(eps), resolved.dropout_p, seed, chosen, key is not None
    )


class _Resolved(NamedTuple):
    """A checked call's plan and why, the dtype of the products, and the dropout that acts.

    The rest as `Asked`'s: ``backend`` is its ``first``.
    """

    plan: str
    reason: str
    dtype: torch.dtype
    dropout_p: float
    backend: str
    rivals: tuple[str, ...]
    sizes: dict[str, float]


class _Decided(NamedTuple):
    """What a call is, once it is checked."""

    resolved: _Resolved
    backend: str


_known: known.Known[_Decided] = known.Known()


def _resolve(
    x, context, projections, weight, norm_match, eps, normalize_context, key_padding_mask, dropout_p, training, seed,
    plan, backend,
) -> _Resolved:  # fmt: skip
    check_projections(_NAME, projections)
    _check_rows(x, projections)
    check_context(_NAME, context, key_padding_mask, projections, x)
    check_gate(_NAME, "weight", weight, x.shape[2], x.device)
    check_eps(_NAME, eps)
    checks.probability(_NAME, "dropout_p", dropout_p)
    checks.one_of(_NAME, "plan", plan, ("auto", *PLANS))
    for argument, value in (
        ("norm_match", norm_match), ("normalize_context", normalize_context), ("training", training)
    ):  # fmt: skip
        checks.flag(_NAME, argument, value)
    dtype = checks.autocast_dtype(x) or x.dtype
    dropout_p = float(dropout_p) if training else 0.0
    every, contexts, tokens = x.shape[0] * x.shape[1], max(1, context.shape[0]), context.shape[1]
    seeded = dropout_p > 0.0 and seed is not None
    heads, channels = projections.num_heads, x.shape[2]
    sizes: dict[str, float] = {
        "M": every, "C": channels, "H": heads, "d": projections.head_dim, "T": tokens,
        "rows_per_context": 0 if contexts == 1 else every // contexts, "norm_match": norm_match, "dropout_p": dropout_p,
    }  # fmt: skip
    rivals: tuple[str, ...] = ()
    if plan == "auto" and not seeded:
        rivals = _absorbed_plan(heads * tokens, channels), "standard"
        found = backends.measured_plan(backend, _NAME, x.device, dtype, sizes)
        if found is not None and found[0].forward in rivals:
            chosen, row = found
            # Traced code makes no text of numbers.
            reason = order.told_row(row) if decision.observers else "measured"
            return _Resolved(chosen.forward, reason, dtype, dropout_p, chosen.backend, rivals, sizes)
    plan, reason = resolve_plan(projections, every // contexts, tokens, norm_match, dtype, x.device, plan, seeded)
    return _Resolved(plan, reason, dtype, dropout_p, "", rivals, sizes)


def resolve_plan(
    projections: Projections,
    rows: int | None,
    tokens: int,
    norm_match: bool,
    dtype: torch.dtype,
    device: torch.device,
    plan: str,
    seeded: bool,
) -> tuple[str, str]:
    """(plan, reason): the plan asked for, or the one `choose_plan` takes; ``seeded``: dropout has a key."""
    if plan == "standard" and seeded:
        raise ValueError(f"{_NAME}: seed must be None in plan 'standard', whose dropout draws from torch's generator")
    if plan != "auto":
        return plan, "plan asked for by name"
    heads, channels = projections.num_heads, projections.q_weight.shape[1]
    plan, reason = choose_plan(
        rows, heads, tokens, projections.head_dim, channels, norm_match, dtype, device.type
    )  # fmt: skip
    if plan == "standard" and seeded:
        return "absorbed", "dropout has a seed, which plan 'standard' cannot honour"
    return plan, reason


def _check_rows(x: Tensor, projections: Projections) -> None:
    checks.tensor(_NAME, "x", x)
    checks.dtype(_NAME, "x", x, checks.FLOATING)
    channels = projections.q_weight.shape[1]
    if x.dim() != 3 or x.shape[2] != channels:
        raise ValueError(f"{_NAME}: x must have shape (B, L, C) with q_weight's C = {channels}, got {tuple(x.shape)}")
    allowed = checks.parameter_dtypes(x)
    for argument in PROJECTIONS:
        tensor = getattr(projections, argument)
        if tensor is not None:
            checks.dtype(_NAME, argument, tensor, allowed)
            checks.same_device(_NAME, argument, tensor, x.device)
