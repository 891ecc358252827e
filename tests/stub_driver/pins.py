"""The pinned numbers of tests/kernels/test_stub_driver.py: launches of a call, compilations of models and operators.

``python tests/stub_driver/pins.py`` measures them anew and prints them as that file's tables.
"""

from __future__ import annotations

import argparse
import importlib
import pprint
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from stub_driver import inside
from stub_driver.inside import DEVICE
from stub_driver.session import over_stub

import pyfused

BF16 = torch.bfloat16


def empty(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE, requires_grad=grad)


# The operators at a ViT-B/16's sizes, bfloat16 with float32 adapters, everything trained but LoRA's base.


def lora(
    plan: str, rows: int = 1576, rank: int = 16, p: float = 0.0, scaling: float = 2.0, mixed: int | None = None
) -> Tensor:
    x, weight, bias = empty(rows, 768, dtype=BF16, grad=True), empty(2304, 768, dtype=BF16), empty(2304, dtype=BF16)
    several = () if mixed is None else (mixed,)
    adapters = empty(*several, rank, 768, grad=True), empty(2304, *several, rank, grad=True)
    options = {"scaling": scaling, "dropout_p": p, "plan": plan, "backend": "triton"}
    index = None if mixed is None else empty(rows, dtype=torch.int64)
    return pyfused.lora_linear(x, weight, *adapters, bias, **options, adapter_index=index)


def adapter(plan: str, *shape: int, hidden: int = 64, p: float = 0.0) -> Tensor:
    shape, channel_dim = shape or (1576, 768), 1 if len(shape) == 4 else -1
    channels = shape[channel_dim]
    z, residual = (empty(*shape, dtype=BF16, grad=True) for _ in range(2))
    weights = [empty(*size, grad=True) for size in ((hidden, channels), (hidden,), (channels, hidden), (channels,))]
    options = {"dropout_p": p, "plan": plan, "channel_dim": channel_dim, "backend": "triton"}
    gamma, samples = empty(channels, grad=True), empty(shape[0])
    return pyfused.adapter_residual(
        z, *weights, residual=residual, layer_scale=gamma, sample_scale=samples, **options
    )  # fmt: skip


def attention(plan: str, batch: int = 8, length: int = 197, norm_match: bool = False, shared: bool = False) -> Tensor:
    x, context = empty(batch, length, 768, dtype=BF16, grad=True), empty(1 if shared else batch, 2, 512, dtype=BF16)
    parts = [empty(*size, grad=True) for width in (768, 512, 512) for size in ((768, width), (768,))]
    parts += [empty(768, 768, grad=True), empty(768, grad=True)]
    options = {"num_heads": 12, "weight": empty(1, grad=True), "norm_match": norm_match, "plan": plan}
    return pyfused.cross_attention_residual(x, context, *parts, backend="triton", **options)


def projection(rows: int = 1576, norm_match: bool = True) -> Tensor:
    o, residual = (empty(rows, 768, dtype=BF16, grad=True) for _ in range(2))
    options = {"residual": residual, "gate": empty(768, grad=True), "norm_match": norm_match, "activation": "gelu"}
    weight, bias = empty(768, 768, grad=True), empty(768, grad=True)
    return pyfused.projection_residual(o, weight, bias, backend="triton", **options)


CALLS: dict[str, tuple[Callable[..., Tensor], Sequence, dict]] = {
    **{f"lora_linear {plan}": (lora, (plan,), {}) for plan in ("one_launch", "shrink_expand", "blas")},
    "lora_linear blas, dropout": (lora, ("blas",), {"p": 0.1}),
    "lora_linear one_launch, mixed": (lora, ("one_launch",), {"mixed": 4}),
    "lora_linear shrink_expand, mixed": (lora, ("shrink_expand",), {"mixed": 8}),
    **{f"adapter_residual {plan}": (adapter, (plan,), {}) for plan in ("save", "recompute")},
    **{
        f"cross_attention_residual {plan}": (attention, (plan,), {})
        for plan in ("absorbed", "absorbed_recompute", "standard")
    },
    "cross_attention_residual absorbed, norms": (attention, ("absorbed",), {"norm_match": True}),
    "projection_residual": (projection, (), {"norm_match": False}),
    "projection_residual norms": (projection, (), {}),
}


class _TorchOperations(TorchDispatchMode):
    """Counts torch's own operators that start a kernel, also those that the Triton backend calls."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pyfused_triton":
            # The mixed operator's launchers are lora_linear's.
            name = func._schema.name.partition("::")[2].removeprefix("mixed_")
            home = importlib.import_module(f"pyfused.kernels.{name.rpartition('_')[0]}")
            with self:
                return getattr(home, name)(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        self.count += not (func.is_view or name.startswith(("empty", "new_empty", "_unsafe_view")))
        return func(*args, **(kwargs or {}))


def launches() -> dict[str, list[int]]:
    """Call -> Triton's launches forward and backward, then torch's own operators forward and backward."""
    found = {}
    for label, (function, arguments, options) in CALLS.items():
        row = []
        for count in (_launches, _operations):
            row += count(lambda: function(*arguments, **options))  # noqa: B023 (called at once)
        found[label] = [row[0], row[1], row[2], row[3]]
    return found


def _launches(call: Callable[[], Tensor]) -> list[int]:
    with inside.watch() as forward:
        y = call()
    with inside.watch() as backward:
        y.backward(torch.empty_like(y))
    _assert_sound(forward)
    _assert_sound(backward)
    return [len(forward.launches), len(backward.launches)]


def _operations(call: Callable[[], Tensor]) -> list[int]:
    with _TorchOperations() as forward:
        y = call()
    dy = torch.empty_like(y)
    with _TorchOperations() as backward:
        y.backward(dy)
    return [forward.count, backward.count]


def _assert_sound(seen: inside.Watched) -> None:
    if seen.faults:
        raise RuntimeError("; ".join(seen.faults))


# What varies from call to call -> the function, and its values in this order.
SERIES: dict[str, tuple[Callable[..., Tensor], Sequence]] = {
    "lora_linear one_launch, M": (
        lambda rows: lora("one_launch", rows), (1576, 1379, 197, 394, 788, 3152, 6304, 12608, 50, 100, 1000, 16, 3, 1),
    ),
    "lora_linear shrink_expand, M": (
        lambda rows: lora("shrink_expand", rows, p=0.1), (1576, 1379, 197, 394, 788, 3152, 6304, 12608, 50, 1000, 1),
    ),
    "lora_linear, p": (lambda p: lora("shrink_expand", p=p), (0.1, 0.5, 0.6)),
    "lora_linear, scaling": (lambda scaling: lora("one_launch", scaling=scaling), (2.0, 0.5, 1.0)),
    "lora_linear, R": (lambda rank: lora("one_launch", rank=rank), (16, 8, 4, 1, 13, 32, 20)),
    "lora_linear mixed, G": (lambda mixed: lora("shrink_expand", mixed=mixed), (8, 7, 4, 5)),
    "lora_linear mixed, R": (lambda rank: lora("shrink_expand", rank=rank, mixed=4), (16, 8, 12)),
    "adapter_residual, M": (lambda rows: adapter("save", rows, 768), (1576, 1379, 197, 394, 6304, 50, 1000, 16, 1)),
    "adapter_residual, p": (lambda p: adapter("save", p=p), (0.1, 0.5)),
    "adapter_residual NCHW, B": (lambda batch: adapter("save", batch, 64, 56, 56), (8, 64, 4, 2, 1, 63)),
    "adapter_residual NCHW, H": (lambda side: adapter("save", 8, 64, side, side), (56, 28, 14, 7)),
    "cross_attention_residual, B": (lambda batch: attention("absorbed", batch), (8, 7, 32, 2, 1)),
    "cross_attention_residual, L": (lambda length: attention("absorbed", 8, length), (197, 50, 1370, 16, 1)),
    "projection_residual, M": (projection, (1576, 1379, 197, 394, 6304, 12608, 50, 1000, 16, 1)),
}  # fmt: skip


def series() -> dict[str, list[tuple[object, int]]]:
    """What varies -> (value, the compilations that it adds to those of the values before it, forward and backward)."""
    found = {}
    for label, (function, values) in SERIES.items():
        inside.forget()
        found[label] = [(value, len(_compiled(label, function, value))) for value in values]
    return found


def _compiled(label: str, function: Callable[..., Tensor], value: object) -> list[inside.Specialisation]:
    with inside.watch() as seen:
        y = function(value)
        y.backward(torch.empty_like(y))
    _assert_sound(seen)
    _tell(f"{label} = {value}", seen.compiled)
    return seen.compiled


# All compilations by now.
_known: list[inside.Specialisation] = []


def _tell(what: str, compiled: list[inside.Specialisation]) -> None:
    """On stderr, by which argument each compilation is another than the most similar one before it."""
    for specialisation in compiled:
        difference = ", ".join(specialisation.difference(_known))
        print(f"{what}: {specialisation.kernel} {difference or '(the first)'}", file=sys.stderr)
        _known.append(specialisation)


# The models, whole, in bfloat16: name -> what makes one, and the side of its images.


def clip_with_lora() -> nn.Module:
    """open_clip's ViT-B-16, LoRA of rank 16 in its 48 linear layers."""
    open_clip = importlib.import_module("open_clip")
    with torch.device(DEVICE):
        visual = open_clip.create_model("ViT-B-16", pretrained=None, device=DEVICE).visual.to(BF16)
    pyfused.inject_lora(visual, target_modules=("in_proj", "out_proj", "c_fc", "c_proj"), rank=16, alpha=32)
    return visual


def fastvit_with_adapters() -> nn.Module:
    """timm's FastViT SA12 with an adapter in every block."""
    timm = importlib.import_module("timm")
    from pyfused import models

    with torch.device(DEVICE):
        visual = timm.create_model("fastvit_sa12", num_classes=0).to(BF16)
        models.add_adapters(visual, adapter_dtype=BF16)
    return visual


def adapted_clip() -> nn.Module:
    """AA-CLIP's second stage on open_clip's ViT-B-16, without dropout."""
    open_clip = importlib.import_module("open_clip")
    from pyfused.bench.models.aa_clip import SecondStage
    from pyfused.models import AdaptedCLIP

    with torch.device(DEVICE):
        clip = open_clip.create_model("ViT-B-16", pretrained=None, device=DEVICE)
        model = AdaptedCLIP(clip, dropout=0.0)
        return SecondStage(model, torch.empty(1, 16, 512)).to(BF16)


MODELS = {
    "CLIP ViT-B/16, LoRA": (clip_with_lora, 224),
    "FastViT SA12, adapters": (fastvit_with_adapters, 256),
    "AdaptedCLIP, stage 2": (adapted_clip, 224),
}
# In this order: (batch, whether it is trained; evaluated otherwise).
BATCHES = ((8, True), (7, True), (32, True), (8, False))


def model_steps(name: str) -> dict[str, list[int]]:
    """ "train 8" and so on -> launches of the step, and the compilations that it adds."""
    make, side = MODELS[name]
    model, found = make(), {}
    inside.forget()
    for batch, train in BATCHES:
        model.train(train)
        images = empty(batch, 3, side, side, dtype=BF16)
        with inside.watch() as seen, torch.set_grad_enabled(train):
            y = model(images)
            if train:
                y.backward(torch.empty_like(y))
        _assert_sound(seen)
        _tell(f"{name}, {'train' if train else 'eval'} {batch}", seen.compiled)
        found[f"{'train' if train else 'eval'} {batch}"] = [len(seen.launches), len(seen.compiled)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--why", action="store_true", help="also what makes each compilation another one, on stderr")
    why = parser.parse_args().why
    measured = {
        "LAUNCHES": over_stub(launches),
        "SERIES": {label: dict(pairs) for label, pairs in over_stub(series, quiet=not why).items()},
        "MODELS": {name: over_stub(model_steps, name, quiet=not why) for name in MODELS},
    }
    for name, table in measured.items():
        print(f"{name} = {pprint.pformat(table, width=118, sort_dicts=False)}")


if __name__ == "__main__":
    main()
