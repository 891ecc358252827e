"""Every public call: operators by plans, dtypes, layouts, dropout, absent tensors and frozen parts, on meta tensors.

What decides which kernels run stands in each operator's product; sizes and the rest are drawn for each call, the same
on every run.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import operators as contract
import torch
from stub_driver import inside
from stub_driver.inside import DEVICE
from torch import Tensor

import pyfused
from pyfused.ops.adapter_residual import ACTIVATIONS
from pyfused.ops.adapter_residual import PLANS as ADAPTER_PLANS
from pyfused.ops.cross_attention_residual import PLANS as ATTENTION_PLANS
from pyfused.ops.cross_attention_residual import most_columns, padded_columns
from pyfused.ops.lora_linear import MAX_RANK_ONE_LAUNCH
from pyfused.ops.lora_linear import PLANS as LORA_PLANS
from pyfused.ops.prepared_context import PROJECTIONS

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# Of the activations, of the adapters beside them, and of autocast where it is on.
DTYPES = (
    (BF16, F32, None), (F16, F16, None), (F32, F32, None), (F32, F32, BF16), (BF16, BF16, None), (F16, F32, None),
)  # fmt: skip
DROPOUT = (0.0, 0.1, 0.6)
LAYOUTS = ("rows", "NCHW", "channels_last", "NCL", "strided")


@dataclass(frozen=True)
class Call:
    """A public call.

    Attributes:
        operator: its name.
        settings: where it stands in its operator's product; "trained" names the tensors that require grad, None calls
            under ``torch.no_grad``.
        function: the operator with everything but its tensors.
        tensors: those.
        small: whether sizes are small and odd.
    """

    operator: str
    settings: Mapping[str, object]
    function: Callable[..., Tensor]
    tensors: Mapping[str, Tensor | None]
    small: bool = field(default=True)

    @property
    def label(self) -> str:
        return f"{self.operator} {dict(self.settings)}"

    def __call__(self) -> None:
        """Forward, and backward where anything is trained."""
        trained = self.settings["trained"]
        leaves = {
            name: None if value is None else value.detach().requires_grad_(name in (trained or ()))
            for name, value in self.tensors.items()
        }
        _, _, autocast = self.settings["dtypes"]
        with torch.set_grad_enabled(trained is not None), inside.autocast(autocast):
            y = self.function(**leaves)
        if trained is not None:
            y.backward(torch.empty_like(y))


def every_call() -> Iterator[Call]:
    """The calls of the tests' contract, then each operator's own."""
    return itertools.chain(contract_calls(), lora_calls(), adapter_calls(), attention_calls(), projection_calls())


def compiled_calls(turn: int) -> list[Call]:
    """Calls that start every kernel; each turn meets it in other dtypes, layouts and plans."""

    def of(values: Sequence, ahead: int = 0) -> object:
        return values[(turn + ahead) % len(values)]

    wanted = (
        (lora_calls, {"plan": "one_launch", "dtypes": of(DTYPES), "layout": of(LAYOUTS), "p": of(DROPOUT)}),
        (lora_calls, {"plan": "shrink_expand", "dtypes": of(DTYPES, 1), "layout": of(LAYOUTS, 2), "p": of(DROPOUT, 1)}),
        # Of the plan before it this one has one kernel more, which draws the mask.
        (lora_calls, {"plan": "blas", "dtypes": of(DTYPES, 1), "layout": of(LAYOUTS, 2), "p": of(DROPOUT[1:])}),
        (
            adapter_calls,
            {"plan": of(ADAPTER_PLANS), "dtypes": of(DTYPES, 2), "layout": of(LAYOUTS, 1), "p": of(DROPOUT)},
        ),
        (
            attention_calls,
            {"plan": of(ATTENTION_PLANS[:2]), "dtypes": of(DTYPES, 3), "p": of(DROPOUT), "norm_match": turn % 4 > 1},
        ),
        (projection_calls, {"dtypes": of(DTYPES, 4), "activation": of(ACTIVATIONS), "norm_match": True}),
    )
    found = []
    for calls, settings in wanted:
        # The first in a product trains the most.
        settings["trained"] = next(calls()).settings["trained"]
        fitting = [call for call in calls() if settings.items() <= call.settings.items()]
        found.append(min(fitting, key=lambda call: call.small))
    # Its sizes are such as tensor descriptors take in both directions.
    narrow = of([dtypes for dtypes in DTYPES if dtypes[0] != F32])
    described = {"plan": "one_launch", "layout": "rows", "dtypes": narrow, "p": of(DROPOUT)}
    found.append(
        next(
            call
            for call in lora_calls()
            if described.items() <= call.settings.items() and not call.small and len(call.tensors["lora_a"]) >= 8
        )
    )
    return found


def on_gpu(x: object) -> object:
    """A tensor's shape, strides and offset; anything else as it is."""
    if not isinstance(x, Tensor):
        return x
    memory = torch.empty(x.untyped_storage().nbytes() // x.itemsize, dtype=x.dtype, device=DEVICE)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def empty(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def product(**axes: Sequence) -> Iterator[tuple[dict[str, object], random.Random]]:
    """Every choice of a value of each axis, and what draws the rest of such a call."""
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        yield settings, random.Random(str(settings))


def contract_calls() -> Iterator[Call]:
    """Every form of every operator in the contract's table, in each plan of backend "triton" and each dtype."""
    for name, row in contract.OPERATORS.items():
        forms = {"": (row.draw, {}), **row.variants}
        for plan, form, dtype in itertools.product(row.plans["triton"], forms, (BF16, F16, F32)):
            draw, options = forms[form]
            function = contract.function_of(name, "triton", plan, **options)
            keywords = {key: on_gpu(value) for key, value in function.keywords.items()}
            tensors = {key: on_gpu(value) for key, value in draw(dtype).items()}
            settings = {"plan": plan, "form": form, "dtypes": (dtype, dtype, None), "trained": tuple(tensors)}
            yield Call(name, settings, functools.partial(function.func, **keywords), tensors)


def laid_out(layout: str, channels: int, dtype: torch.dtype, small: bool) -> tuple[Tensor, int]:
    """Activations in one of `LAYOUTS`, and their channel_dim."""
    batch, side = (3, 7) if small else (8, 28)
    if layout == "rows":
        return empty(batch, side * side, channels, dtype=dtype), -1
    if layout == "strided":
        # Every other column, from an element on where no vector starts.
        return empty(batch, side * side + 1, 2 * channels + 1, dtype=dtype)[:, 1:, 1::2], -1
    if layout == "NCL":
        return empty(batch, channels, side * side, dtype=dtype), 1
    image = empty(batch, channels, side, side, dtype=dtype)
    return image.to(memory_format=torch.channels_last) if layout == "channels_last" else image, 1


def lora_calls() -> Iterator[Call]:
    trained = (
        ("x", "lora_a", "lora_b"), ("lora_a", "lora_b"), ("lora_b",), ("x", "weight", "lora_a", "bias"), None,
    )  # fmt: skip
    for settings, draw in product(plan=LORA_PLANS["triton"], layout=LAYOUTS, dtypes=DTYPES, p=DROPOUT, trained=trained):
        plan, layout, (dtype, adapters, _), p, _ = settings.values()
        small = draw.random() < 0.3
        k, n = draw.choice([(77, 76), (6, 7)] if small else [(768, 2304), (3072, 768), (64, 128)])
        widest = MAX_RANK_ONE_LAUNCH if plan == "one_launch" else 256
        rank = draw.choice([rank for rank in (1, 4, 8, 16, 64, 100, 256) if rank <= widest])
        x, channel_dim = laid_out(layout, k, dtype, small)
        tensors = {
            "x": x, "weight": empty(n, k, dtype=dtype), "lora_a": empty(rank, k, dtype=adapters),
            "lora_b": empty(n, rank, dtype=adapters), "bias": draw.choice((None, empty(n, dtype=dtype))),
        }  # fmt: skip
        function = functools.partial(
            pyfused.lora_linear, backend="triton", plan=plan, dropout_p=p, channel_dim=channel_dim, scaling=2.0
        )
        yield Call("lora_linear", settings, function, tensors, small)


def adapter_calls() -> Iterator[Call]:
    weights = ("down_weight", "down_bias", "up_weight", "up_bias")
    trained = (("z", *weights, "layer_scale"), weights, ("z",), ("down_weight",), ("up_weight", "residual"), None)
    # An image's residual may lie in memory in another way.
    others = {"NCHW": "channels_last", "channels_last": "NCHW", "rows": "strided", "strided": "rows"}
    for settings, draw in product(plan=ADAPTER_PLANS, layout=LAYOUTS, dtypes=DTYPES, p=DROPOUT, trained=trained):
        plan, layout, (dtype, adapters, autocast), p, _ = settings.values()
        small = draw.random() < 0.3
        channels = draw.choice((6, 77) if small else (64, 768, 1024))
        hidden = draw.choice((1, 16, 33, 64, 128) if (autocast or dtype) == F32 else (1, 16, 33, 64, 192, 512))
        z, channel_dim = laid_out(layout, channels, dtype, small)
        stream = draw.choice((layout, others.get(layout, layout)))
        residual = laid_out(stream, channels, draw.choice((dtype, F32)), small)[0]
        biases = draw.choice((True, False))
        tensors = {
            "z": z, "down_weight": empty(hidden, channels, dtype=adapters),
            "down_bias": empty(hidden, dtype=adapters) if biases else None,
            "up_weight": empty(channels, hidden, dtype=adapters),
            "up_bias": empty(channels, dtype=adapters) if biases else None,
            "residual": draw.choice((None, residual)),
            "layer_scale": draw.choice((None, empty(1), empty(channels))),
        }  # fmt: skip
        options = {
            "plan": plan, "dropout_p": p, "channel_dim": channel_dim, "activation": draw.choice(ACTIVATIONS),
            "skip": draw.choice((0.0, 1.0)), "sample_scale": draw.choice((None, empty(z.shape[0]))),
        }  # fmt: skip
        function = functools.partial(pyfused.adapter_residual, backend="triton", **options)
        yield Call("adapter_residual", settings, function, tensors, small)


def attention_calls() -> Iterator[Call]:
    biases = tuple(name for name in PROJECTIONS if name.endswith("bias"))
    trained = (
        ("x", "context", *PROJECTIONS, "weight"), PROJECTIONS, ("x",), ("context", "weight"), ("out_weight",), None,
    )  # fmt: skip
    for settings, draw in product(
        plan=ATTENTION_PLANS, dtypes=DTYPES, p=DROPOUT, norm_match=(False, True), trained=trained
    ):
        plan, (dtype, projections, autocast), p, norm_match, _ = settings.values()
        small = draw.random() < 0.3
        batch, length, c, cc = (3, 7, 77, 20) if small else draw.choice([(8, 197, 768, 512), (4, 50, 1024, 1024)])
        widest = 1024 if plan == "standard" else most_columns(autocast or dtype, norm_match)
        heads, tokens = draw.choice([s for s in ((16, 2), (8, 3), (1, 1), (12, 16)) if padded_columns(*s) <= widest])
        inner = heads * draw.choice((5, 64))
        contexts, mask = draw.choice((1, batch)), draw.choice((None, 1, batch))
        absent = draw.choice(((), biases, ("q_bias", "out_bias")))
        shapes = {f"{part}_weight": (inner, width) for part, width in (("q", c), ("k", cc), ("v", cc))}
        shapes |= {f"{part}_bias": (inner,) for part in "qkv"} | {"out_weight": (c, inner), "out_bias": (c,)}
        x = draw.choice((
            empty(batch, length, c, dtype=dtype), empty(length, batch, c, dtype=dtype).transpose(0, 1),
            empty(batch, length, 2 * c + 1, dtype=dtype)[..., 1::2],
        ))  # fmt: skip
        tensors = {"x": x, "context": empty(contexts, tokens, cc, dtype=dtype)}
        for name in PROJECTIONS:
            tensors[name] = None if name in absent else empty(*shapes[name], dtype=projections)
        gate = draw.choice((None, empty(1), empty(c)))
        if gate is not None:
            tensors["weight"] = gate
        options = {
            "num_heads": heads, "norm_match": norm_match, "dropout_p": p, "plan": plan,
            "normalize_context": draw.choice((False, True)),
            "key_padding_mask": None if mask is None else empty(mask, tokens, dtype=torch.bool),
        }  # fmt: skip
        function = functools.partial(pyfused.cross_attention_residual, backend="triton", **options)
        yield Call("cross_attention_residual", settings, function, tensors, small)


def projection_calls() -> Iterator[Call]:
    trained = (("o", "weight", "bias", "residual", "gate"), ("weight", "bias"), ("o",), ("residual",), ("gate",), None)
    for settings, draw in product(dtypes=DTYPES, activation=ACTIVATIONS, norm_match=(False, True), trained=trained):
        (dtype, weights, _), activation, norm_match, names = settings.values()
        small = draw.random() < 0.3
        k, channels = draw.choice([(77, 76), (6, 7)] if small else [(768, 1024), (64, 64)])
        tensors = {
            "o": laid_out(draw.choice(("rows", "strided")), k, dtype, small)[0],
            "weight": empty(channels, k, dtype=weights), "bias": draw.choice((None, empty(channels, dtype=weights))),
            "residual": laid_out(draw.choice(("rows", "strided")), channels, draw.choice((dtype, F32)), small)[0],
        }  # fmt: skip
        gate = draw.choice((empty(1), empty(channels), *([] if names == ("gate",) else [None])))
        if gate is not None:
            tensors["gate"] = gate
        options = {"activation": activation, "norm_match": norm_match, "skip": draw.choice((0.0, 1.0))}
        function = functools.partial(pyfused.projection_residual, backend="triton", **options)
        yield Call("projection_residual", settings, function, tensors, small)
