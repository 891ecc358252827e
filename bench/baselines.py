"""What `pyfused.lora_linear` is measured against: plain torch, torch.compile, PEFT, and the frozen layer alone."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyfused
from pyfused.bench import thirdparty
from pyfused.bench.cases import LoRACase

BASE = "base GEMM"


@dataclass(frozen=True)
class Contender:
    """One way to compute the layer.

    Attributes:
        forward: x (M, K) -> y (M, N).
        trained: the adapter tensors that want a gradient; empty for the frozen layer alone.
    """

    forward: Callable[[Tensor], Tensor]
    trained: tuple[Tensor, ...]

    def call(self, x: Tensor, dy: Tensor, backward: bool) -> Callable[[], object]:
        """Forward as in training (what backward needs is kept), or forward and backward to x and the adapters."""
        x = x.detach().requires_grad_()
        if not backward:
            return lambda: self.forward(x)
        leaves = (x, *self.trained)
        return lambda: torch.autograd.grad(self.forward(x), leaves, dy)


def eager_lora_linear(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor, scaling: float, dropout_p: float
) -> Tensor:
    """The formula as people write it, with torch's own dropout."""
    low_rank = F.linear(F.linear(F.dropout(x, dropout_p) if dropout_p else x, lora_a), lora_b)
    return F.linear(x, weight, bias) + scaling * low_rank


def lora_contenders(case: LoRACase, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Contender], dict[str, str]]:
    """Contenders by name, "pyfused" first, and the reason for each one that cannot run here."""
    weight, bias = tensors["weight"], tensors["bias"]
    a, b = (tensors[name].detach().requires_grad_() for name in ("lora_a", "lora_b"))
    low = tensors["weight"].dtype != torch.float32

    def ours(lora_a: Tensor, lora_b: Tensor) -> Contender:
        return Contender(
            lambda x: pyfused.lora_linear(
                x, weight, lora_a, lora_b, bias, scaling=case.scaling, dropout_p=case.dropout_p
            ),
            (lora_a, lora_b),
        )

    def eager(x: Tensor) -> Tensor:
        return eager_lora_linear(x, weight, a, b, bias, case.scaling, case.dropout_p)

    contenders = {"pyfused": ours(a, b), "eager": Contender(eager, (a, b))}
    unavailable = {}
    reason = compile_refusal(weight.device)
    if reason is None:
        torch.compiler.reset()
        contenders["torch.compile"] = Contender(torch.compile(eager, dynamic=False, fullgraph=True), (a, b))
    else:
        unavailable["torch.compile"] = reason
    try:
        contenders["PEFT"] = _peft(case, tensors)
        if low:
            contenders["PEFT (autocast_adapter_dtype=False)"] = _peft(case, tensors, float32_adapters=False)
            contenders["PEFT (autocast)"] = _peft(case, tensors, autocast=True)
    except thirdparty.Unavailable as error:
        unavailable["PEFT"] = str(error)
    if low:
        # The fair counterpart of PEFT's default, which keeps its adapters in float32.
        a32, b32 = (tensors[name].detach().float().requires_grad_() for name in ("lora_a", "lora_b"))
        contenders["pyfused (float32 adapters)"] = ours(a32, b32)
    contenders[BASE] = Contender(lambda x: F.linear(x, weight, bias), ())
    return contenders, unavailable


def compile_refusal(device: torch.device) -> str | None:
    """Why torch.compile cannot run on ``device``; None when it can."""
    if device.type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler, {compiler} is not on PATH"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "torch.compile needs triton on a GPU"
    return None


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
