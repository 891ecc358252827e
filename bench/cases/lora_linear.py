"""`lora_linear`: its shapes, and plain torch, torch.compile, PEFT and the frozen layer alone beside it."""

from __future__ import annotations

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfused.bench import thirdparty
from pyfused.bench.cases.baselines import BASE, LOOP, Contender, Contenders, narrowed
from pyfused.bench.cases.case import Case, Result, Work, normal, short, with_both_adapters
from pyfused.ops.lora_linear import MIXED_PLANS, PLANS, lora_linear

# (in features, out features) of in_proj, out_proj, c_fc and c_proj in CLIP's ViT-B.
CLIP_LAYERS = ((768, 2304), (768, 768), (768, 3072), (3072, 768))
# Batch 8 of ViT-B/32 (50 tokens) and of ViT-B/16 (197 tokens).
CLIP_ROWS = (8 * 50, 8 * 197)
GPU_SHAPES = (
    (8192, 4096, 4096),
    (8192, 4096, 14336),
    (6304, 768, 3072),
    (6304, 3072, 768),
    (2740, 1024, 1024),
)


@dataclass(frozen=True)
class LoRACase(Case):
    """One shape of ``lora_linear``: x (M, K), weight (N, K), rank R.

    Attributes:
        rows, in_features, out_features, rank: M, K, N, R.
        dtype: of x, weight, bias.
        adapter_dtype: of lora_a and lora_b; None (the default) means ``dtype``.
        dropout_p: on the low-rank term's input, default 0.
        scaling: alpha / R, default 2 (alpha 32 at R 16).
    """

    operator = "lora_linear"
    inputs = ("x",)
    trained = ("lora_a", "lora_b")

    rows: int
    in_features: int
    out_features: int
    rank: int = 16
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    dropout_p: float = 0.0
    scaling: float = 2.0

    @property
    def name(self) -> str:
        parts = [f"lora_linear {self.rows}x{self.in_features}->{self.out_features} r{self.rank}", short(self.dtype)]
        if self.adapter_dtype not in (None, self.dtype):
            parts.append(f"adapters {short(self.adapter_dtype)}")
        if self.dropout_p:
            parts.append(f"dropout {self.dropout_p:g}")
        return " ".join(parts)

    def facts(self) -> dict[str, object]:
        return {
            "rows": self.rows,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "dtype": short(self.dtype),
            "adapter_dtype": short(self.parameter_dtype),
            "dropout_p": self.dropout_p,
        }

    def tensors(self, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """x, weight, lora_a, lora_b, bias and dy.

        lora_b is not zero, and the low-rank term is as large as the base product, so that neither hides the other.
        """
        draw = normal(device, seed)
        m, k, n, r = self.rows, self.in_features, self.out_features, self.rank
        adapter = self.parameter_dtype
        return {
            "x": draw((m, k), 1.0, self.dtype),
            "weight": draw((n, k), k**-0.5, self.dtype),
            "lora_a": draw((r, k), k**-0.5, adapter),
            "lora_b": draw((n, r), r**-0.5 / self.scaling, adapter),
            "bias": draw((n,), 0.1, self.dtype),
            "dy": draw((m, n), 1.0, self.dtype),
        }

    def call(self, function: Callable[..., Result], tensors: Mapping[str, Tensor], **options) -> Result:
        arguments = (tensors[name] for name in ("x", "weight", "lora_a", "lora_b", "bias"))
        return function(*arguments, scaling=self.scaling, dropout_p=self.dropout_p, **options)

    def passes(self) -> tuple[Work, Work]:
        m, k, n, r = self.rows, self.in_features, self.out_features, self.rank
        size = self.dtype.itemsize
        base, narrow = 2 * m * n * k, 2 * m * r * (n + k)
        weight, adapters = size * n * k, self.parameter_dtype.itemsize * r * (n + k)
        # Forward reads x and writes y and P; backward reads dy, x and P and writes dx and both gradients.
        forward = Work(base + narrow, size * m * (k + n + r) + weight + adapters)
        backward = Work(base + 2 * narrow, size * m * (n + 2 * k + r) + weight + 2 * adapters)
        return forward, backward

    def plain(self) -> dict[str, Callable[..., Tensor]]:
        def eager(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor, **options) -> Tensor:
            a, b = narrowed((lora_a, lora_b), x.dtype)
            return eager_lora_linear(x, weight, a, b, bias, **options)

        return {"eager": eager}

    def contenders(self, tensors: Mapping[str, Tensor], by_name: Iterable[str] = ()) -> Contenders:
        found = super().contenders(tensors, by_name)
        try:
            # Its adapters are float32 over any base, unless it is told otherwise.
            if self.parameter_dtype != torch.float32:
                found.named["PEFT (autocast_adapter_dtype=False)"] = _peft(self, tensors, float32_adapters=False)
            else:
                found.named["PEFT"] = _peft(self, tensors)
                if self.dtype != torch.float32:
                    found.named["PEFT (autocast)"] = _peft(self, tensors, autocast=True)
        except thirdparty.Unavailable as error:
            found.unavailable["PEFT"] = str(error)
        found.named[BASE] = _base(tensors)
        return found

    def plans(self, backend: str) -> tuple[str, ...]:
        return PLANS.get(backend, ())


@dataclass(frozen=True)
class MixedLoRACase(LoRACase):
    """A mixed batch: as many rows, one after the other, for each of ``adapters`` adapters."""

    adapters: int = 8

    @property
    def name(self) -> str:
        return f"{super().name} {self.adapters} adapters"

    def facts(self) -> dict[str, object]:
        return {**super().facts(), "adapters": self.adapters}

    def tensors(self, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        draw = normal(device, seed)
        k, n, r, of_adapter = self.in_features, self.out_features, self.rank, self.parameter_dtype
        return super().tensors(device, seed) | {
            "lora_a": draw((self.adapters, r, k), k**-0.5, of_adapter),
            "lora_b": draw((n, self.adapters, r), r**-0.5 / self.scaling, of_adapter),
        }

    def call(self, function: Callable[..., Result], tensors: Mapping[str, Tensor], **options) -> Result:
        index = torch.arange(self.rows, device=tensors["x"].device) // (self.rows // self.adapters)
        return super().call(function, tensors, adapter_index=index, **options)

    def passes(self) -> tuple[Work, Work]:
        others = (self.adapters - 1) * self.rank * (self.in_features + self.out_features)
        size = self.parameter_dtype.itemsize
        forward, backward = super().passes()
        return forward + Work(0, size * others), backward + Work(0, 2 * size * others)

    def plain(self) -> dict[str, Callable[..., Tensor]]:
        return {name: _by_adapter(function) for name, function in super().plain().items()}

    def ours(self, by_name: Iterable[str] = ()) -> dict[str, Callable[..., Tensor]]:
        return super().ours(by_name) | {LOOP: _by_adapter(lora_linear)}

    def contenders(self, tensors: Mapping[str, Tensor], by_name: Iterable[str] = ()) -> Contenders:
        found = Case.contenders(self, tensors, by_name)
        found.named[BASE] = _base(tensors)
        return found

    def plans(self, backend: str) -> tuple[str, ...]:
        return MIXED_PLANS.get(backend, ())


def _base(tensors: Mapping[str, Tensor]) -> Contender:
    return Contender(lambda x: F.linear(x, tensors["weight"], tensors["bias"]), ())


def _by_adapter(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A call of ``function`` for the rows of each adapter."""

    def loop(
        x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor, adapter_index: Tensor, **options
    ) -> Tensor:
        rows, adapters = x.chunk(lora_a.shape[0]), zip(lora_a.unbind(0), lora_b.unbind(1), strict=True)
        return torch.cat([function(x, weight, a, b, bias, **options) for x, (a, b) in zip(rows, adapters, strict=True)])

    return loop


# Next to no arithmetic.
TINY = LoRACase(16, 64, 64)


def timed_cases(device: torch.device) -> list[LoRACase]:
    """CLIP's layers in float32 on a CPU, and 8 rows for each of 8 adapters; on a GPU the shapes of ViTs and language
    models in bfloat16, each without and with dropout."""
    if device.type == "cpu":
        mixed = [MixedLoRACase(64, 768, n) for n in (768, 3072)]
        return [*(LoRACase(m, k, n) for m, (k, n) in itertools.product(CLIP_ROWS, CLIP_LAYERS)), *mixed]
    shapes = itertools.product((0.0, 0.1), GPU_SHAPES)
    return list(with_both_adapters(LoRACase(m, k, n, dtype=torch.bfloat16, dropout_p=p) for p, (m, k, n) in shapes))


def parity_cases(device: torch.device) -> Iterator[LoRACase]:
    """The timed shapes, then dropout and mixed dtypes at CLIP's smaller ones."""
    yield from timed_cases(device)
    for k, n in CLIP_LAYERS:
        small = LoRACase(CLIP_ROWS[0], k, n, dropout_p=0.1)
        yield small
        yield replace(small, dtype=torch.bfloat16, adapter_dtype=torch.float32)


def eager_lora_linear(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor, scaling: float, dropout_p: float
) -> Tensor:
    """The formula as people write it, with torch's own dropout."""
    low_rank = F.linear(F.linear(F.dropout(x, dropout_p) if dropout_p else x, lora_a), lora_b)
    return F.linear(x, weight, bias) + scaling * low_rank


def _peft(
    case: LoRACase, tensors: Mapping[str, Tensor], *, float32_adapters: bool = True, autocast: bool = False
) -> Contender:
    """PEFT's LoRA on an nn.Linear; its adapters are float32 over any base unless ``float32_adapters`` is False."""
    peft = thirdparty.load("peft")
    layer = nn.Linear(case.in_features, case.out_features, device="meta")
    layer.weight = nn.Parameter(tensors["weight"].detach(), requires_grad=False)
    layer.bias = nn.Parameter(tensors["bias"].detach(), requires_grad=False)
    config = peft.LoraConfig(
        r=case.rank,
        lora_alpha=case.scaling * case.rank,
        lora_dropout=case.dropout_p,
        target_modules=["layer"],
    )
    model = peft.get_peft_model(
        nn.Sequential(OrderedDict(layer=layer)), config, autocast_adapter_dtype=float32_adapters
    )  # fmt: skip
    model.train()
    adapted = model.base_model.model.layer
    trained = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    with torch.no_grad():
        trained[0].copy_(tensors["lora_a"])
        trained[1].copy_(tensors["lora_b"])

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=x.dtype) if autocast else contextlib.nullcontext():
            return adapted(x)

    return Contender(forward, trained)
