"""The calls that *truth* makes: every operator, backend, plan, dtype, layout and direction, and every option once.

On backend "triton" each call costs compilations, so that the calls are few: any two of plan, dtype, layout and options
meet in one of them, as in an orthogonal array, and not every product of all. The other backends have every product of
plan, dtype and layout.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import pyfused
from pyfused import reference
from pyfused.bench.cases.case import normal, short
from pyfused.bench.gpu.programs import ahead
from pyfused.choice import backends
from pyfused.ops.adapter_residual import PLANS as ADAPTER_PLANS
from pyfused.ops.cross_attention_residual import PLANS as ATTENTION_PLANS
from pyfused.ops.lora_linear import PLANS as LORA_PLANS
from pyfused.ops.prepared_context import PROJECTIONS

SEED = 20_240_607
ROWS, NCHW, CHANNELS_LAST, PERMUTED = "rows", "NCHW", "channels_last", "permuted"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)
# Directions of a call: with what is kept for backward, and without.
BOTH, FORWARD = "forward+backward", "forward"

Draw = Callable[[tuple[int, ...], float, torch.dtype], Tensor]
Drawn = tuple[dict[str, Tensor | None], dict[str, Any]]


def _laid_out(
    draw: Draw, layout: str, batch: int, height: int, width: int, channels: int, dtype: torch.dtype
) -> Tensor:
    """``batch`` images of ``height * width`` positions in a layout."""
    if layout == ROWS:
        return draw((batch, height * width, channels), 1.0, dtype)
    if layout == PERMUTED:
        return draw((height * width, batch, channels), 1.0, dtype).transpose(0, 1)
    images = draw((batch, channels, height, width), 1.0, dtype)
    return images.to(memory_format=torch.channels_last) if layout == CHANNELS_LAST else images


def _channel_dim(layout: str) -> dict[str, Any]:
    return {"channel_dim": 1 if layout in (NCHW, CHANNELS_LAST) else -1}


def _dropout(p: float, device: torch.device) -> dict[str, Any]:
    return {"dropout_p": p, "seed": torch.full((1,), SEED, device=device)} if p else {}


def _lora(
    draw: Draw, layout: str, dtype: torch.dtype, device: torch.device, *,
    rank: int = 16, adapters: torch.dtype | None = FP32, bias: bool = True, dropout_p: float = 0.0,
    size: tuple[int, int, int, int, int] = (2, 7, 29, 144, 208), mixed: int = 0,
) -> Drawn:  # fmt: skip
    """``mixed``: how many adapters of this rank the rows choose from, some of them none."""
    batch, height, width, k, n = size
    tensors = {
        "x": _laid_out(draw, layout, batch, height, width, k, dtype),
        "weight": draw((n, k), k**-0.5, dtype),
        "lora_a": draw((mixed, rank, k) if mixed else (rank, k), k**-0.5, adapters or dtype),
        "lora_b": draw((n, mixed, rank) if mixed else (n, rank), rank**-0.5, adapters or dtype),
        "bias": draw((n,), 0.5, dtype) if bias else None,
    }
    options: dict[str, Any] = {"scaling": -1.5, **_channel_dim(layout), **_dropout(dropout_p, device)}
    if mixed:
        positions = (height * width,) if layout == ROWS else (height, width)
        options["adapter_index"] = torch.arange(height * width, device=device).view(positions) % (mixed + 1) - 1
    return tensors, options


def _adapter(
    draw: Draw, layout: str, dtype: torch.dtype, device: torch.device, *,
    hidden: int = 48, adapters: torch.dtype | None = FP32, bias: bool = True, residual: torch.dtype | None = None,
    gamma: bool = True, dropped: bool = False, dropout_p: float = 0.0, activation: str = "gelu", skip: float = 1.0,
    size: tuple[int, int, int, int] = (3, 7, 29, 144),
) -> Drawn:  # fmt: skip
    """``residual``: its dtype; None for z itself. ``dropped``: the middle one of three samples."""
    batch, height, width, c = size
    adapters = adapters or dtype
    tensors = {
        "z": _laid_out(draw, layout, batch, height, width, c, dtype),
        "down_weight": draw((hidden, c), c**-0.5, adapters),
        "down_bias": draw((hidden,), 0.5, adapters) if bias else None,
        "up_weight": draw((c, hidden), 1.5 * hidden**-0.5, adapters),
        "up_bias": draw((c,), 0.5, adapters) if bias else None,
        "residual": None if residual is None else _laid_out(draw, layout, batch, height, width, c, residual),
        "layer_scale": draw((c,), 1.0, FP32) if gamma else None,
    }
    keep = torch.ones(batch, dtype=dtype, device=device).mul_(1.25)
    keep[1] = 0.0
    options: dict[str, Any] = {"sample_scale": keep} if dropped else {}
    options |= {"activation": activation, "skip": skip, **_channel_dim(layout), **_dropout(dropout_p, device)}
    return tensors, options


def _attention(
    draw: Draw, layout: str, dtype: torch.dtype, device: torch.device, *,
    heads: int = 4, tokens: int = 3, norm_match: bool = False, masked: bool = False, shared: bool = False,
    gate: bool = False, bias: bool = True, projections: torch.dtype | None = None, dropout_p: float = 0.0,
    size: tuple[int, int, int] = (3, 203, 144),
) -> Drawn:  # fmt: skip
    """``masked``: the last key of each image; ``shared``: one context for all images."""
    batch, length, c = size
    context, wide = 1 if shared else batch, projections or dtype
    tensors: dict[str, Tensor | None] = {
        "x": _laid_out(draw, layout, batch, 1, length, c, dtype),
        "context": draw((context, tokens, c), 1.0, dtype),
    }
    for name in PROJECTIONS:
        absent = not bias and name.endswith("bias")
        tensors[name] = None if absent else draw((c, c), c**-0.5, wide) if "weight" in name else draw((c,), 0.5, wide)
    if gate:
        tensors["weight"] = draw((c,), 1.0, FP32)
    options = {"num_heads": heads, "norm_match": norm_match, **_dropout(dropout_p, device)}
    options |= {} if gate else {"weight": 0.7}
    if masked:
        mask = torch.zeros((context, tokens), dtype=torch.bool, device=device)
        mask[:, -1] = True
        options["key_padding_mask"] = mask
    return tensors, options


def _projection(
    draw: Draw, layout: str, dtype: torch.dtype, device: torch.device, *,
    activation: str = "leaky_relu", norm_match: bool = True, gate: bool = False, bias: bool = True,
    residual: torch.dtype | None = None, weights: torch.dtype | None = None,
    size: tuple[int, int, int, int] = (2, 203, 144, 208),
) -> Drawn:  # fmt: skip
    """``residual``, ``weights``: their dtypes; None for o's."""
    batch, length, k, c = size
    tensors = {
        "o": _laid_out(draw, layout, batch, 1, length, k, dtype),
        "weight": draw((c, k), 1.5 * k**-0.5, weights or dtype),
        "bias": draw((c,), 0.5, weights or dtype) if bias else None,
        "residual": _laid_out(draw, layout, batch, 1, length, c, residual or dtype),
    }
    if gate:
        tensors["gate"] = draw((c,), 1.0, FP32)
    options: dict[str, Any] = {"activation": activation, "norm_match": norm_match, "skip": 0.6}
    return tensors, options | ({} if gate else {"gate": 0.4})


_DRAW: Mapping[str, Callable[..., Drawn]] = {
    "lora_linear": _lora,
    "adapter_residual": _adapter,
    "cross_attention_residual": _attention,
    "projection_residual": _projection,
}
# W's gradient is torch's own product. Softmax does not see k_bias, whose gradient is zero but for rounding.
_NEVER = {"lora_linear": ("weight",), "cross_attention_residual": ("k_bias",)}


@dataclass(frozen=True)
class Call:
    """One call of a public operator, small and with tails in every dimension.

    Attributes:
        operator, backend, plan, dtype: as the public function names them.
        layout: "rows", "NCHW", "channels_last", or "permuted", rows out of [L, B, C].
        direction: "forward+backward", or "forward" under no_grad.
        settings: what its tensors and options are besides.
        frozen: tensors that get no gradient.
    """

    operator: str
    backend: str
    plan: str
    dtype: torch.dtype
    layout: str
    direction: str = BOTH
    settings: Mapping[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        parts = [self.operator, self.backend, self.plan, short(self.dtype), self.layout]
        parts += [self.direction] if self.direction == FORWARD else []
        for key, value in self.settings.items():
            parts.append(f"{key}={short(value) if isinstance(value, torch.dtype) else value}".replace(" ", ""))
        parts += [f"{name} frozen" for name in self.frozen]
        return " ".join(parts)

    def drawn(self, device: torch.device, seed: int = 0) -> Drawn:
        """Tensors, those that require grad marked, and the options of the call."""
        tensors, options = _DRAW[self.operator](normal(device, seed), self.layout, self.dtype, device, **self.settings)
        for name, value in tensors.items():
            trained = self.direction == BOTH and name not in (*_NEVER.get(self.operator, ()), *self.frozen)
            if value is not None and trained:
                value.requires_grad_()
        return tensors, options

    def launches(self) -> Callable[[], object]:
        """Makes the launches of the call on backend "triton", for `ahead.specialisations`."""
        tensors, options = self.drawn(torch.device("meta"))
        plan = "auto" if self.operator == "lora_linear" else self.plan
        function = self.ours("portable", plan)
        return ahead.launching(lambda: results(function, tensors, options, torch.empty_like), self.plan)

    def ours(self, backend: str | None = None, plan: str | None = None) -> Callable[..., Tensor]:
        """The public operator bound to the backend and plan of the call, or to these."""
        bound = {"backend": backend or self.backend, "plan": plan or self.plan}
        if self.operator == "projection_residual":
            # It has one plan and takes no name of one.
            del bound["plan"]
        return functools.partial(getattr(pyfused, self.operator), **bound)

    def reference(self) -> Callable[..., Tensor]:
        return getattr(reference, self.operator)


def results(
    function: Callable[..., Tensor], tensors: Mapping[str, Tensor | None], options, dy=None
) -> dict[str, Tensor]:
    """y, and d<name> of each tensor that requires grad; ``dy(y)`` makes the cotangent."""
    leaves = {name: value for name, value in tensors.items() if value is not None and value.requires_grad}
    if not leaves:
        with torch.no_grad():
            return {"y": function(**tensors, **options)}
    y = function(**tensors, **options)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy(y))
    return {"y": y.detach()} | {f"d{name}": value for name, value in zip(leaves, gradients, strict=True)}


# Options that a call of each operator may have, in turn; without dropout where torch draws the mask.
_VARIANTS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "lora_linear": ({}, {"dropout_p": 0.3, "bias": False}, {"adapters": None, "rank": 24}),
    "adapter_residual": (
        {"residual": FP32, "dropped": True},
        {"dropout_p": 0.3, "activation": "silu", "gamma": False, "bias": False, "skip": 0.0},
        {"adapters": None, "activation": "relu", "residual": BF16},
    ),
    "cross_attention_residual": (
        {"norm_match": True, "gate": True},
        {"masked": True, "shared": True, "bias": False},
        {"tokens": 5, "dropout_p": 0.3, "projections": FP32},
    ),
    "projection_residual": (
        {},
        {"gate": True, "residual": FP32, "activation": "gelu", "norm_match": False},
        {"activation": "identity", "norm_match": False, "bias": False},
    ),
}
LAYOUTS = {
    "lora_linear": (ROWS, NCHW, CHANNELS_LAST),
    "adapter_residual": (ROWS, NCHW, CHANNELS_LAST),
    "cross_attention_residual": (ROWS, PERMUTED),
    "projection_residual": (ROWS, PERMUTED),
}
# Tiles as large as those of real shapes, which small sizes never get.
_LARGE = {"size": (1, 1, 4000, 1024, 1008)}


def plans(operator: str, backend: str) -> tuple[str, ...]:
    """Those that a call may ask for by name; of an operator with one plan "auto"."""
    absorbed = ATTENTION_PLANS[:2] if backend == "cuda" else ATTENTION_PLANS
    return {
        "lora_linear": LORA_PLANS[backend],
        "adapter_residual": ADAPTER_PLANS,
        "cross_attention_residual": absorbed,
        "projection_residual": () if backend == "cuda" else ("auto",),
    }[operator]


def _call(operator: str, backend: str, plan: str, dtype: torch.dtype, layout: str, variant: int, **rest) -> Call:
    settings = dict(_VARIANTS[operator][variant % 3])
    if plan == "standard":
        settings.pop("dropout_p", None)
    return Call(operator, backend, plan, dtype, layout, settings=settings, **rest)


def products(backend: str) -> Iterator[Call]:
    """Every product of plan, dtype and layout, the options in turn."""
    for operator, layouts in LAYOUTS.items():
        dtypes = [dtype for dtype in DTYPES if backend == "portable" or dtype in backends.KERNEL_DTYPES[backend]]
        triples = itertools.product(enumerate(plans(operator, backend)), enumerate(dtypes), enumerate(layouts))
        for (i, plan), (j, dtype), (k, layout) in triples:
            yield _call(operator, backend, plan, dtype, layout, i + j + k)


def pairs(backend: str) -> Iterator[Call]:
    """Any two of plan, dtype, layout and options together in one call, three values each: an L9 array.

    Of two layouts the first stands for a third one. An operator with one plan has every product of the others.
    """
    for operator, layouts in LAYOUTS.items():
        named = plans(operator, backend)
        if len(named) == 1:
            yield from (call for call in products(backend) if call.operator == operator)
            continue
        for i, j in itertools.product(range(3), repeat=2):
            plan = named[i] if i < len(named) else "auto"
            yield _call(operator, backend, plan, DTYPES[j], layouts[(i + j) % 3 % len(layouts)], i + 2 * j)


def further(backend: str) -> Iterator[Call]:
    """Without what backward needs, with parts frozen, and of the sizes that get the largest tiles."""
    plain = {"lora_linear": "one_launch", "projection_residual": "auto"}
    frozen = {
        "lora_linear": ("x", "bias", "lora_b"),
        "adapter_residual": ("z", "up_weight", "up_bias", "layer_scale"),
        "cross_attention_residual": ("context", *PROJECTIONS),
        "projection_residual": ("weight", "bias"),
    }
    for operator in LAYOUTS:
        if not plans(operator, backend):
            continue
        plan = plain.get(operator, plans(operator, backend)[0])
        yield _call(operator, backend, plan, BF16, ROWS, 0, direction=FORWARD)
        yield _call(operator, backend, plan, BF16, ROWS, 0, frozen=frozen[operator])
    for plan in plans("lora_linear", backend):
        if plan != "blas":
            yield Call("lora_linear", backend, plan, BF16, ROWS, settings=_LARGE)
        if backend != "cuda" and plan != "shrink_expand":
            yield Call("lora_linear", backend, plan, BF16, ROWS, settings={"mixed": 3, "rank": 5})


def calls() -> list[Call]:
    """All of them, backend "auto" last."""
    found = [*pairs("triton"), *further("triton"), *products("cuda"), *further("cuda"), *products("portable")]
    found += [_call(operator, "auto", "auto", BF16, ROWS, 0) for operator in LAYOUTS]
    return list({call.name: call for call in found}.values())
