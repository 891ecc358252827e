"""``lora_linear``: contract, autograd and public function.

    y = x W^T + b + s (drop(x) A^T) B^T         P  = drop(x) A^T        (M, R)
    dx = dy W + mask (Q A) / (1 - p)            Q  = s dy B             (M, R)
    dA = Q^T drop(x)                            dB = s dy^T P

The raw operators see x as (B, L, K) with any strides; row m of the mathematics is b * L + l. Backward saves x and P,
never drop(x) and never a mask: the mask is drawn again from the seed.

With an index of adapters, G of them lie side by side along the rank, and P and Q hold zeros in row m but in the columns
of m's own adapter. Nothing else changes: each product then sums over those columns, or rows, alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfused.choice import backends, order
from pyfused.ops import decision
from pyfused.ops.contract import checks, known, layout, registry
from pyfused.ops.contract.cuda_limits import cuda_row_limit

_NAME = "lora_linear"
# Its raw operators with an index of adapters, which backend "cuda" has no kernels for, and "cpu" alone.
_MIXED = "mixed_lora_linear"
MAX_RANK = 256
# Beyond it P of every tile does not fit beside the tile's accumulator.
MAX_RANK_ONE_LAUNCH = 64
PLANS = {"portable": ("blas",), "triton": ("one_launch", "shrink_expand", "blas"), "cuda": ("one_launch",)}
# With an index of adapters; backend "cuda" says of each call why it takes none.
MIXED_PLANS = PLANS | {"cpu": ("blas",)}


def candidates(plan: str, rank: int, mixed: bool = False) -> dict[str, tuple[str, ...]]:
    """Backend -> the plans that may serve a call of this rank, which asks for ``plan``; what is cheapest to interpret
    comes first. ``mixed``: with an index of adapters."""
    known_plans = MIXED_PLANS if mixed else PLANS
    if plan != "auto":
        return {backend: (plan,) if plan in plans else () for backend, plans in known_plans.items()}
    if rank <= MAX_RANK_ONE_LAUNCH:
        return known_plans
    return known_plans | {"triton": tuple(name for name in PLANS["triton"] if name != "one_launch")}


def sizes_of(
    rows: int, weight: Tensor, lora_a: Tensor, lora_b: Tensor, dropout_p: float, by_rows: bool
) -> dict[str, float]:
    """By which the backend and the plans are chosen, see `pyfused.choice.order.choose`; ``by_rows``: the channels of x
    lie together."""
    (n, rank), k = lora_b.shape, lora_a.shape[1]
    return {
        "M": rows, "N": n, "K": k, "R": rank, "dropout_p": dropout_p,
        "weight_bytes": weight.itemsize, "adapter_bytes": max(lora_a.itemsize, lora_b.itemsize),
        # Rows of A and of B, whose rank kernels pad to a multiple of 4, are loaded too where a tile makes P.
        "tma": int(by_rows and k % 8 == 0 and n % 8 == 0 and (rank > 16 or (rank + 3) // 4 % 2 == 0)),
    }  # fmt: skip


def triton_plan(raw: str, arguments: Mapping[str, Any], capability: tuple[int, int]) -> str:
    """The plan that a raw call, such as "lora_linear_bwd", has with Triton's kernels on a GPU of this capability."""
    first, lora_a, weight = next(iter(arguments.values())), arguments["lora_a"], arguments["weight"]
    rows = first.shape[0] * first.shape[1]
    # Backward has no weight where x needs no gradient.
    parameters = first if weight is None else weight, lora_a, arguments["lora_b"]
    sizes = sizes_of(rows, *parameters, arguments["dropout_p"], not arguments["channels_first"])
    plans = {"triton": candidates("auto", lora_a.shape[0])["triton"]}
    chosen = order.by_times(_NAME, capability, first.dtype, sizes, plans)
    return chosen.backward if raw.endswith("_bwd") else chosen.forward


def _fake_fwd(x, weight, lora_a, lora_b, bias, seed, scaling, dropout_p, channels_first, plan, save, *mixed):
    rows = x.shape[0] * x.shape[1] if save else 0
    return layout.rows_like(x, weight.shape[0], channels_first), x.new_empty((rows, lora_a.shape[0]))


def _fake_bwd(
    dy, x, weight, lora_a, lora_b, p, seed, scaling, dropout_p, channels_first, plan, need_dx, need_da, need_db, *mixed
):
    dx = layout.rows_like(dy, lora_a.shape[1], channels_first) if need_dx else dy.new_empty(0)
    da = torch.empty_like(lora_a, memory_format=torch.contiguous_format) if need_da else lora_a.new_empty(0)
    db = torch.empty_like(lora_b, memory_format=torch.contiguous_format) if need_db else lora_b.new_empty(0)
    return dx, da, db


# ``save`` asks for P, which is empty otherwise; a gradient that is not needed comes back empty. Mixed, A is (G R, K), B
# (N, G R), and there is an index for each row.
_FWD = (
    "(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? seed, float scaling, "
    "float dropout_p, bool channels_first, str plan, bool save{}) -> (Tensor y, Tensor p)"
)
_BWD = (
    "(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor? p, Tensor? seed, float scaling, "
    "float dropout_p, bool channels_first, str plan, bool need_dx, bool need_da, bool need_db{}) "
    "-> (Tensor dx, Tensor da, Tensor db)"
)
_INDEX = ", Tensor adapter_index, int adapters"
_MIXED_HOMES = registry.HOMES | {"cpu": "pyfused.cpu"}
_fwd = registry.define(_NAME, "fwd", _FWD.format(""), _fake_fwd)
_bwd = registry.define(_NAME, "bwd", _BWD.format(""), _fake_bwd)
_mixed_fwd = registry.define(_MIXED, "fwd", _FWD.format(_INDEX), _fake_fwd, _NAME, _MIXED_HOMES)
_mixed_bwd = registry.define(_MIXED, "bwd", _BWD.format(_INDEX), _fake_bwd, _NAME, _MIXED_HOMES)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, weight, lora_a, lora_b, bias, seed, scaling, dropout_p, channels_first, plan, plan_bwd, backend, *mixed
    ):  # fmt: skip
        need_x, need_weight, need_a, need_b = ctx.needs_input_grad[:4]
        raw = _mixed_fwd if mixed else _fwd
        (rows,) = layout.to_rows(x)
        y, p = raw[backend](
            rows, weight, lora_a, lora_b, bias, seed, scaling, dropout_p, channels_first, plan, need_b, *mixed
        )  # fmt: skip
        ctx.save_for_backward(
            x if need_a or need_weight else None,
            weight if need_x else None,
            lora_a,
            lora_b,
            p if need_b else None,
            seed,
            *mixed[:1],
        )
        ctx.adapters = mixed[1:]
        ctx.settings = scaling, dropout_p, channels_first, plan_bwd
        ctx.backend = backend
        ctx.shape = rows.shape[:2]
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return layout.from_rows(y, x)

    @staticmethod
    @registry.differentiable_once
    def backward(ctx, dy):
        # Read once: activation checkpointing hands them out once.
        saved = ctx.saved_tensors
        x, weight, lora_a, lora_b, p, seed, *index = saved
        need_x, need_weight, need_a, need_b, need_bias = ctx.needs_input_grad[:5]
        dx = da = db = dw = dbias = None
        rows, x_rows = layout.rows_as(ctx.shape, dy, x)
        if need_x or need_a or need_b:
            raw = _mixed_bwd if index else _bwd
            dx, da, db = raw[registry.way_back(ctx.backend, dy, *saved)](
                rows, x_rows, weight, lora_a, lora_b, p, seed, *ctx.settings, need_x, need_a, need_b, *index,
                *ctx.adapters,
            )  # fmt: skip
            if need_x:
                dx = layout.from_rows(dx, dy)
        if need_weight:
            with checks.without_autocast(dy):
                # Neither einsum nor flatten, which have no batching rule for is_grads_batched.
                left, right = (t.reshape(-1, t.shape[-1]) for t in (rows, x_rows))
                dw = torch.mm(left.t(), right).to(ctx.weight_dtype)
        if need_bias:
            dbias = rows.sum((0, 1), dtype=ctx.bias_dtype)
        return (
            dx if need_x else None, dw, da if need_a else None, db if need_b else None, dbias,
            None, None, None, None, None, None, None, *(None,) * (len(index) + len(ctx.adapters)),
        )  # fmt: skip


def _derived(backend, x, weight, lora_a, lora_b, bias, seed, scaling, dropout_p, channels_first, plan, save, *mixed):
    # Of a program that was traced for one direction, the other is planned where it runs.
    sizes = sizes_of(x.shape[0] * x.shape[1], weight, lora_a, lora_b, dropout_p, not channels_first)
    plans = {backend: candidates("auto", lora_a.shape[0], bool(mixed))[backend]}
    backward = backends.planned(_MIXED if mixed else _NAME, x.device, x.dtype, sizes, plans).backward
    y = _LoRALinear.apply(
        x, weight, lora_a, lora_b, bias, seed, scaling, dropout_p, channels_first, plan, backward, backend, *mixed
    )  # fmt: skip
    return y, x.new_empty((0, lora_a.shape[0]))


registry.derive(_fwd, _derived)
registry.derive(_mixed_fwd, _derived)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | int | None = None,
    channel_dim: int = -1,
    adapter_index: Tensor | None = None,
    plan: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """A linear layer with its low-rank update in one call: ``x W^T + b + scaling (drop(x) A^T) B^T``.

    Args:
        x: (..., K); with ``channel_dim=1`` (B, K, ...), as a 1x1 convolution sees it. float32, float16, bfloat16, and
            float64 on the portable backend. Any strides.
        weight: (N, K), x's dtype. Under autocast any floating dtype: each call casts it. Where it is a DTensor all
            tensors must be, on its mesh, and y is one: split by rows or columns, as RowwiseParallel and ColwiseParallel
            of torch do, or replicated. Then ``channel_dim`` is -1, and dropout is refused.
        lora_a: (R, K), 1 <= R <= 256; x's dtype or float32. A float32 parameter is cast to x's dtype for the products;
            its gradient is accumulated and returned in float32. (PEFT computes that branch in float32 instead; dA and
            dB then differ by about 2e-3 relative in bfloat16.)
        lora_b: (N, R), as ``lora_a``.
        bias: (N,) or None, weight's dtype.
        scaling: factor of the low-rank term, usually alpha / R. Default 1.
        dropout_p: probability of zeroing an element of x on its way into the low-rank term, in [0, 1). Default 0.
        training: dropout acts only when True (the default).
        seed: int, or int64 tensor of one element on x's device: the key of the dropout mask. None (the default) draws
            one from torch's generator of that device. The same seed gives the same mask on every backend.
        channel_dim: -1 (the default) or 1.
        adapter_index: which of G adapters acts on each row: int64, broadcast to x's shape without its channels, such
            as (B, 1) for one adapter a sample of x (B, L, K). Then ``lora_a`` is (G, R, K) and ``lora_b`` (N, G, R),
            with G R <= 256. -1, and any other number outside 0..G - 1, is no adapter: no value is read to check it.
            Parameters must be finite: rows of other adapters may be multiplied by zeros. Not on cuda. Default None.
        plan: "auto" (the default), "blas", and on triton also "one_launch" (R up to 64) or "shrink_expand"; on cuda
            only "one_launch".
        backend: "auto" (the default), "portable", "triton", "cuda", or with ``adapter_index`` "cpu".

    Returns:
        (..., N) in x's dtype (under autocast, in the autocast dtype); with ``channel_dim=1`` (B, N, ...), contiguous,
        or channels_last where a 4-D x is. Every argument that requires grad gets its exact gradient; a
        backward with ``create_graph=True`` raises.

    Raises:
        ValueError: a shape, device, number, plan or backend name is wrong.
        TypeError: a dtype or an argument's type is wrong.
        RuntimeError: the backend that was asked for cannot serve the call.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
    """
    name = _NAME
    # As `checks.is_dtensor`: the most frequent call has one step less.
    if type(weight).__name__ == "DTensor":
        settings = (scaling, dropout_p, training, channel_dim, adapter_index, plan, backend)
        return _on_shards(x, weight, lora_a, lora_b, bias, *settings)
    tensors = (weight, lora_a, lora_b, bias, adapter_index)
    options = (scaling, dropout_p, training, channel_dim, plan, backend)
    key = known.signature(x, tensors, options)
    decided = _known.get(key)
    if decided is None:
        decided = _decide(x, *tensors, *options)
        _known.keep(key, decided)
    way = registry.way_there(decided.backend, key is not None)
    raw: Callable[..., tuple[Tensor, Tensor]] = _fwd[way]
    mixed: tuple[Tensor, int] | tuple[()] = ()
    if adapter_index is not None:
        index, lora_a, lora_b = _flattened(x, lora_a, lora_b, channel_dim, adapter_index)
        mixed = index, decided.adapters
        raw = _with_index(way, *mixed)
    if decided.cast is not None:
        x = x.to(decided.cast)
    seed = checks.seed(name, seed, x.device) if decided.dropout_p > 0.0 else None
    rows, channels_first = x, False
    if channel_dim == 1:
        (rows,), (channels_first,) = layout.as_rows(1, x)
    y = registry.run(
        name,
        _LoRALinear,
        functools.partial(_without_gradient, raw),
        (rows, weight, lora_a, lora_b, bias),
        (seed, decided.scaling, decided.dropout_p, channels_first, decided.plan),
        (decided.backward_plan, way, *mixed),
        key is not None,
    )
    return y if channel_dim == -1 else layout.as_channels(y, x, channels_first)


class _Decided(NamedTuple):
    """What a call is, once it is checked; ``cast``: what autocast makes of x, None where it does nothing."""

    backend: str
    plan: str
    backward_plan: str
    cast: torch.dtype | None
    scaling: float
    dropout_p: float
    adapters: int


_known: known.Known[_Decided] = known.Known()


def _decide(
    x, weight, lora_a, lora_b, bias, adapter_index, scaling, dropout_p, training, channel_dim, plan, backend
) -> _Decided:  # fmt: skip
    name = _NAME
    adapters = 0
    asked: decision.Arguments = ()
    if decision.observers:
        asked = decision.asked(
            x=x, weight=weight, lora_a=lora_a, lora_b=lora_b, bias=bias, scaling=scaling, dropout_p=dropout_p,
            training=training, channel_dim=channel_dim, adapter_index=adapter_index, plan=plan, backend=backend,
        )  # fmt: skip
    if adapter_index is None:
        _check(name, x, weight, lora_a, lora_b, bias, scaling, dropout_p, channel_dim)
    else:
        others = (bias, scaling, dropout_p, channel_dim)
        adapters = _check_mixed(name, x, weight, lora_a, lora_b, others, adapter_index)
    checks.flag(name, "training", training)
    autocast = checks.autocast_dtype(x)
    dtype = x.dtype if autocast is None else autocast
    if autocast is None:
        checks.dtype(name, "weight", weight, (dtype,))
        if bias is not None:
            checks.dtype(name, "bias", bias, (dtype,))
    dropout_p = float(dropout_p) if training else 0.0
    if adapters:
        lora_a, lora_b = lora_a.flatten(0, 1), lora_b.flatten(1)
    rank = lora_a.shape[0]
    by_rows = x.stride(-1) == 1 if channel_dim == -1 else layout.runs_by_rows(x)
    sizes = sizes_of(x.numel() // weight.shape[1], weight, lora_a, lora_b, dropout_p, by_rows)
    plans = candidates(plan, rank, adapter_index is not None)
    limits = _limits(name, x, dtype, weight, lora_a, lora_b, bias, plan, sizes["M"])
    if adapter_index is None:
        kernels, limits["cpu"] = name, f"{name}: adapter_index must be given there"
    else:
        kernels, limits["cuda"] = _MIXED, f"{name}: adapter_index must be None there"
    chosen, forward, backward = backends.choose(backend, x.device, dtype, kernels, sizes, limits, plans)
    if plan not in ("auto", *MIXED_PLANS[chosen]):
        beyond = "".join(f"; {other}: {reason}" for other, reason in limits.items() if plan in MIXED_PLANS[other])
        raise ValueError(
            f"{name}: plan on backend {chosen!r} must be one of {('auto', *MIXED_PLANS[chosen])}, got {plan!r}{beyond}"
        )
    if decision.observers:
        decision.notify(_decided(x, dtype, sizes, chosen, plan, forward, backward, limits, kernels, asked))
    return _Decided(chosen, forward, backward, None if dtype == x.dtype else dtype, float(scaling), dropout_p, adapters)


def _without_gradient(raw, x, *arguments) -> tuple[Tensor, Tensor]:
    y, p = raw(*layout.to_rows(x), *arguments)
    return layout.from_rows(y, x), p


def _on_shards(
    x, weight, lora_a, lora_b, bias, scaling, dropout_p, training, channel_dim, adapter_index, plan, backend
) -> Tensor:  # fmt: skip
    # Not above: it imports torch.distributed.tensor, which is slow, and is there already where a DTensor is.
    from pyfused.ops.contract.tensor_parallel import on_shards

    if training and dropout_p > 0.0:
        raise ValueError(
            f"{_NAME}: dropout_p must be 0 over DTensors, got {dropout_p}: processes that share a layer would draw "
            "different masks"
        )
    if channel_dim != -1:
        raise ValueError(f"{_NAME}: channel_dim must be -1 over DTensors, got {channel_dim}")
    if adapter_index is not None:
        raise ValueError(f"{_NAME}: adapter_index must be None over DTensors, got a {type(adapter_index).__name__}")
    call = functools.partial(lora_linear, scaling=scaling, plan=plan, backend=backend)
    return on_shards(_NAME, call, x, weight, lora_a, lora_b, bias)


def _with_index(backend: str, adapter_index: Tensor, adapters: int) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda *arguments: _mixed_fwd[backend](*arguments, adapter_index, adapters)


def _decided(x, dtype, sizes, backend, plan, forward, backward, limits, kernels, asked=()) -> decision.Decision:
    plans = candidates(plan, sizes["R"], kernels == _MIXED)
    reason = "the plans of least regret by their modelled times"
    if plan != "auto":
        reason = "plan asked for by name"
    elif len(plans[backend]) == 1:
        reason = f"the only plan of backend {backend!r}"
    elif x.device.type == "cpu":
        reason = f"interpreter: {forward} is the cheapest to interpret"
    elif backend in getattr(order.measured_row(kernels, x.device, dtype, sizes), "plans", ()):
        reason = "the plans that were measured to be the fastest there"
    shapes = tuple((letter, int(sizes[letter])) for letter in "MKNR")
    # P, and what autocast made of x.
    saved = int(sizes["M"] * (sizes["R"] + sizes["K"] * (dtype != x.dtype))) * dtype.itemsize
    return decision.Decision(
        _NAME, kernels, shapes, sizes, dtype, x.device, backend, forward, backward, (reason,), saved, limits, plans,
        asked,
    )  # fmt: skip


def _limits(name, x, dtype, weight, lora_a, lora_b, bias, plan, rows) -> dict[str, str]:
    """Backend -> why its kernels do not take this call."""
    limits: dict[str, str] = {}
    rank = lora_a.shape[0]
    if backends.has_cuda_kernels(name, x.device):
        limits |= cuda_row_limit(name, rows)
        for parameter, value in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b), ("bias", bias)):
            allowed = (dtype,) if parameter == "weight" else (dtype, torch.float32)
            if value is not None and value.dtype not in allowed:
                expected = " or ".join(map(str, allowed))
                limits["cuda"] = f"{name}: {parameter} must have dtype {expected} there, got {value.dtype}"
    for backend in ("triton", "cuda"):
        if plan not in ("auto", *PLANS[backend]):
            limits[backend] = f"{name}: plan must be one of {('auto', *PLANS[backend])} there, got {plan!r}"
        elif rank > MAX_RANK_ONE_LAUNCH and (plan == "one_launch" or backend == "cuda"):
            limits[backend] = (
                f"{name}: plan 'one_launch' takes lora_a (R, K) with R <= {MAX_RANK_ONE_LAUNCH}, got R = {rank}"
            )
    return limits


def _check_mixed(
    name: str, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, others: tuple, adapter_index: Tensor
) -> int:
    """G; ``others`` are `_check`'s."""
    checks.tensor(name, "lora_a", lora_a)
    checks.tensor(name, "lora_b", lora_b)
    adapters, rank = lora_a.shape[:2] if lora_a.dim() == 3 else (0, 0)
    if not 1 <= adapters * rank <= MAX_RANK:
        raise ValueError(
            f"{name}: lora_a must have shape (G, R, K) with 1 <= G R <= {MAX_RANK} beside adapter_index, "
            f"got {tuple(lora_a.shape)}"
        )
    if lora_b.dim() != 3 or lora_b.shape[1:] != (adapters, rank):
        raise ValueError(
            f"{name}: lora_b must have shape (N, G, R) = (N, {adapters}, {rank}) beside adapter_index, "
            f"got {tuple(lora_b.shape)}"
        )
    _check(name, x, weight, lora_a[0], lora_b[:, 0], *others)
    checks.tensor(name, "adapter_index", adapter_index)
    checks.dtype(name, "adapter_index", adapter_index, (torch.int64,))
    checks.same_device(name, "adapter_index", adapter_index, x.device)
    rows, given = _leading(x, others[-1]), adapter_index.shape
    fits = all(size in (1, row) for size, row in zip(given[::-1], rows[::-1], strict=False))
    if not fits or len(given) > len(rows):
        raise ValueError(
            f"{name}: adapter_index must be broadcastable to x's shape without its channels, {tuple(rows)}, "
            f"got {tuple(given)}"
        )
    return adapters


def _leading(x: Tensor, channel_dim: int) -> tuple[int, ...]:
    """x's shape without its channels."""
    return x.shape[:-1] if channel_dim == -1 else (*x.shape[:1], *x.shape[2:])


def _flattened(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, channel_dim: int, adapter_index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """An index for each row (M,), A (G R, K) and B (N, G R)."""
    index = adapter_index.expand(_leading(x, channel_dim)).reshape(-1)
    return index, lora_a.flatten(0, 1), lora_b.flatten(1)


def _check(name, x, weight, lora_a, lora_b, bias, scaling, dropout_p, channel_dim) -> None:
    checks.tensor(name, "x", x)
    checks.one_of(name, "channel_dim", channel_dim, (-1, 1))
    checks.dtype(name, "x", x, checks.FLOATING)
    least = 1 if channel_dim == -1 else 3
    if x.dim() < least:
        raise ValueError(f"{name}: x must have at least {least} dimensions, got shape {tuple(x.shape)}")
    checks.tensor(name, "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"{name}: weight must have shape (N, K), got {tuple(weight.shape)}")
    n, k = weight.shape
    if k < 1 or n < 1 or x.shape[channel_dim] != k:
        raise ValueError(
            f"{name}: x must have weight's K = {k} in dimension {channel_dim}, got shape {tuple(x.shape)} "
            f"with weight (N, K) = {(n, k)}"
        )
    checks.tensor(name, "lora_a", lora_a)
    rank = lora_a.shape[0] if lora_a.dim() == 2 else 0
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"{name}: lora_a must have shape (R, K) with 1 <= R <= {MAX_RANK}, got {tuple(lora_a.shape)}")
    allowed = checks.parameter_dtypes(x)
    checks.argument(name, "lora_a", lora_a, (rank, k), "(R, K)", allowed, x.device)
    checks.argument(name, "lora_b", lora_b, (n, rank), "(N, R)", allowed, x.device)
    checks.argument(name, "weight", weight, (n, k), "(N, K)", checks.FLOATING, x.device)
    if bias is not None:
        checks.argument(name, "bias", bias, (n,), "(N,)", checks.FLOATING, x.device)
    checks.finite(name, "scaling", scaling)
    checks.probability(name, "dropout_p", dropout_p)
