"""Models with each kind of module that this package puts into one, and the training that every trainer must equal."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyfused

# Of a gradient or a weight, relative to the largest of its tensor: float32, summed in another order.
TOLERANCE = 2e-5


class Tower(nn.Module):
    """(B, 3, 8, 8) -> (B, 5) through convolutions, a BatchNorm, attentions and linear layers.

    Args:
        adapters: whether a bottleneck adapter joins each block, and a cross-attention follows them.
    """

    def __init__(self, adapters: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 16, 1)
        self.joint = nn.MultiheadAttention(16, 4, batch_first=True)
        self.split = nn.MultiheadAttention(16, 4, batch_first=True)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
        self.adapters = nn.ModuleList(
            pyfused.BottleneckAdapter(16, hidden=4, init_std=0.3) for _ in range(2 * adapters)
        )
        self.cross = pyfused.ScaledCrossAttention(16, 6, 4, learnable_weight=True) if adapters else None
        self.register_buffer("context", torch.randn(1, 3, 6) if adapters else None)
        self.head = nn.Linear(16, 5)

    def prepare_context(self) -> object:
        return self.cross.prepare(self.context)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(F.relu(self.norm(self.stem(x)))).flatten(2).transpose(1, 2)
        for attention in (self.joint, self.split):
            x = x + attention(x, x, x, need_weights=False)[0]
        for number, block in enumerate(self.blocks):
            x = self.adapters[number](block(x), residual=x) if self.adapters else x + block(x)
        if self.cross is not None:
            x = self.cross(x, self.context)
        return self.head(x.mean(1))


def _lora(tower: Tower, dropout: float = 0.0) -> nn.Module:
    settings = {"rank": 4, "alpha": 8, "dropout": dropout}
    pyfused.inject_lora(tower, ["stem", "mix", "joint", "blocks.0.0", "blocks.0.2"], train="head", **settings)
    pyfused.inject_lora(tower, ["split", "blocks.1.0", "blocks.1.2"], qkv="split", **settings)
    return tower


def lora(dropout: float = 0.0) -> nn.Module:
    """LoRA in each of its forms, and a head that trains whole."""
    return _lora(Tower(), dropout)


def adapters() -> nn.Module:
    """Adapters and cross-attention beside a frozen tower."""
    tower = Tower(adapters=True)
    for path, parameter in tower.named_parameters():
        parameter.requires_grad_(path.startswith(("adapters", "cross")))
    return tower.train()


def prefix() -> nn.Module:
    """Learned keys and values."""
    tower = Tower()
    pyfused.PrefixTuning(tower, num_virtual_tokens=3)
    return tower


def bitfit() -> nn.Module:
    """Biases, which share a module, and a group of a sharded model, with what is frozen."""
    tower = Tower()
    pyfused.bitfit(tower)
    return tower


def everything(dropout: float = 0.0) -> nn.Module:
    """All of them together."""
    tower = Tower(adapters=True)
    pyfused.PrefixTuning(tower, num_virtual_tokens=3)
    pyfused.bitfit(tower)
    return _lora(tower, dropout)


def peft(dropout: float = 0.0) -> nn.Module:
    """PEFT's LoRA, run by `pyfused.fuse`."""
    from peft import LoraConfig, get_peft_model

    targets = ["mix", "blocks.0.0", "blocks.0.2", "blocks.1.0", "head"]
    model = get_peft_model(Tower(), LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets))
    pyfused.fuse(model)
    return model


KINDS = {made.__name__: made for made in (lora, adapters, prefix, bitfit, everything, peft)}


def made(kind: str, dtype: torch.dtype = torch.float32, seed: int = 3, **options) -> nn.Module:
    """The same model at each call with a seed, in training mode, with nothing left at zero."""
    torch.manual_seed(seed)
    model = KINDS[kind](**options).to(dtype).train()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Each process has the statistics of its own batch alone.
            module.eval()
    return model


def data(batch: int = 4) -> tuple[Tensor, Tensor]:
    """Images and their classes."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, 3, 8, 8, generator=generator), torch.randint(5, (batch,), generator=generator)


def checkpoint_blocks(model: nn.Module, use_reentrant: bool) -> None:
    """Let each block, and the attention over heads that are adapted apart, forget its activations."""
    tower = next(module for module in model.modules() if isinstance(module, Tower))
    for module in (*tower.blocks, tower.split):
        module.forward = functools.partial(_checkpointed, module.forward, use_reentrant)


def _checkpointed(forward: Callable, use_reentrant: bool, *args: Tensor, **kwargs: object) -> Any:
    # Reentrant checkpointing takes no keywords.
    return checkpoint(functools.partial(forward, **kwargs), *args, use_reentrant=use_reentrant)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer that makes no more of a rounding error than it is."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def loss_of(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(model(images.to(next(model.parameters()).dtype)).float(), classes)


def train(model: nn.Module, images: Tensor, classes: Tensor, steps: int = 2) -> list[dict[str, Tensor]]:
    """Train, and give the gradients of each step by name."""
    named = trainable(model)
    optimizer = sgd(named.values())
    gradients = []
    for _ in range(steps):
        loss_of(model, images, classes).backward()
        gradients.append({name: parameter.grad.detach().clone() for name, parameter in named.items()})
        optimizer.step()
        optimizer.zero_grad()
    return gradients


def whole(tensor: Tensor) -> Tensor:
    """``tensor``, gathered where it is sharded."""
    gather = getattr(tensor, "full_tensor", None)
    return (tensor if gather is None else gather()).detach().float()


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Tensors by name are the same to rounding; names may have the prefixes of wrappers."""
    plain = {_plain(name): tensor for name, tensor in got.items()}
    assert plain.keys() == {_plain(name) for name in expected}
    wanted = {name: whole(tensor) for name, tensor in expected.items()}
    # A gradient that is zero but for rounding, as that of a key's bias, has the size of what cancelled in it.
    least = 1e-3 * max(float(tensor.abs().max()) for tensor in wanted.values())
    for name, tensor in wanted.items():
        error = float((whole(plain[_plain(name)]) - tensor).abs().max()) / max(float(tensor.abs().max()), least)
        assert error <= tolerance, f"{name} differs by {error:.1e} of its largest"


def assert_trained_alike(model: nn.Module, gradients: list, alone: nn.Module, expected: list, **options) -> None:
    for mine, theirs in zip(gradients, expected, strict=True):
        assert_equal(mine, theirs, **options)
    assert_equal(trainable(model), trainable(alone), **options)


def _plain(name: str) -> str:
    wrappers = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
    return ".".join(part for part in name.split(".") if part not in wrappers)
