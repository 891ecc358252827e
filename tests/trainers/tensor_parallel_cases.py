"""Cases of DTensors: `lora_linear` on shards, and LoRALinear under parallelize_module, equal one process."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import trained
from pair import WORLD
from torch import Tensor, nn

import pyfused

# N, K and R, of which each process has the same, or not; and whether there is a bias.
SIZES = ((8, 6, 4, True), (7, 5, 3, False), (7, 5, 3, True))


def _mesh(*shape: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape or (WORLD,))


def _leaves(n: int, k: int, rank: int, bias: bool = True) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"x": (2, 4, k), "weight": (n, k), "lora_a": (rank, k), "lora_b": (n, rank), "bias": (n,)}
    return {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items() if bias or name != "bias"}


def _sharded(leaves: dict[str, Tensor], mesh: Any, **placements: Any) -> dict[str, Any]:
    """``leaves`` as DTensors; what has no placement of its own is replicated."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    whole = [Replicate()] * mesh.ndim
    return {
        name: distribute_tensor(leaf.detach(), mesh, placements.get(name, whole)).requires_grad_()
        for name, leaf in leaves.items()
    }


def _check_call(leaves: dict[str, Tensor], shards: dict[str, Any]) -> Any:
    """y and the gradients of a call on DTensors are those of plain tensors, and lie as what they are gradients of."""
    expected = pyfused.lora_linear(**leaves, scaling=0.7)
    direction = torch.randn(expected.shape)
    expected.backward(direction)
    y = pyfused.lora_linear(**shards, scaling=0.7)
    (y.full_tensor() * direction).sum().backward()
    trained.assert_equal({"y": y}, {"y": expected})
    for name, leaf in leaves.items():
        assert shards[name].grad.placements == shards[name].placements, name
        trained.assert_equal({name: shards[name].grad}, {name: leaf.grad})
        leaf.grad = None
    return y


# ---- cases


def operator(weight: str, rank: int, folder: Path) -> None:
    """Weights by columns, by rows or whole, beside x and A placed in each way."""
    from torch.distributed.tensor import Replicate, Shard

    where = {"column": Shard(0), "row": Shard(1), "whole": Replicate()}[weight]
    y_where = {"column": "S(2)", "row": "P(sum)"}
    everywhere = [Replicate(), Shard(0), Shard(1)]
    for number, (x, a) in enumerate(itertools.product([*everywhere, Shard(2)], everywhere)):
        leaves = _leaves(*SIZES[number % len(SIZES)])
        along = Shard(0) if weight == "column" else Replicate()
        shards = _sharded(leaves, _mesh(), x=[x], weight=[where], lora_a=[a], lora_b=[along], bias=[along])
        y = _check_call(leaves, shards)
        assert str(y.placements[0]) == y_where.get(weight, "R" if x == Shard(2) else str(x))


def two_dimensions(rank: int, folder: Path) -> None:
    """A mesh of data and of tensor parallelism."""
    from torch.distributed.tensor import Replicate, Shard

    for shape, columns in itertools.product(((2, 1), (1, 2)), (True, False)):
        weight, along = (Shard(0), Shard(0)) if columns else (Shard(1), Replicate())
        leaves = _leaves(*SIZES[0])
        shards = _sharded(
            leaves, _mesh(*shape), x=[Shard(0), Replicate()],
            weight=[Replicate(), weight], lora_b=[Replicate(), along], bias=[Replicate(), along],
        )  # fmt: skip
        _check_call(leaves, shards)


def _mlp(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)).to(dtype)
    pyfused.inject_lora(model, ["0", "2"], rank=3, dropout=dropout)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter)
    return model


def _parallel(model: nn.Module, layout: str = "default") -> nn.Module:
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {
        "default": (ColwiseParallel(), RowwiseParallel()),
        "sequence": (ColwiseParallel(input_layouts=Shard(1)), RowwiseParallel(output_layouts=Shard(1))),
        "dtensors": (ColwiseParallel(use_local_output=False), RowwiseParallel(use_local_output=False)),
        "columns": (ColwiseParallel(), ColwiseParallel(input_layouts=Shard(-1))),
    }[layout]
    return parallelize_module(model, _mesh(), dict(zip(("0", "2"), plan, strict=True)))


def layers(layout: str, dtype: torch.dtype, rank: int, folder: Path) -> None:
    """Three clipped steps of AdamW."""
    x = torch.randn(2, 4, 6).to(dtype)
    alone, model = _mlp(dtype=dtype), _parallel(_mlp(dtype=dtype), layout)
    for each in (alone, model):
        optimizer = torch.optim.AdamW(trained.trainable(each).values(), lr=1e-2)
        mine = x.chunk(WORLD, 1)[rank] if each is model and layout == "sequence" else x
        for _ in range(3):
            y = each(mine)
            y = y.full_tensor() if layout == "dtensors" and each is model else y
            # What a process does not have is another's share of the loss.
            (y.float().square().sum() / x.numel()).backward()
            torch.nn.utils.clip_grad_norm_(trained.trainable(each).values(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    tolerance = trained.TOLERANCE if dtype == torch.float32 else 2e-2
    trained.assert_equal(trained.trainable(model), trained.trainable(alone), tolerance)


def compiled(rank: int, folder: Path) -> None:
    x, alone = torch.randn(5, 6), _mlp()
    model = torch.compile(_parallel(_mlp()), backend="aot_eager", fullgraph=True)
    for each in (alone, model):
        each(x).square().mean().backward()
    gradients = ({n: p.grad for n, p in trained.trainable(each).items()} for each in (model, alone))
    trained.assert_equal(*gradients)


def explained(rank: int, folder: Path) -> None:
    """Plans and backends go by what a process has."""
    calls = pyfused.explain(_parallel(_mlp()), torch.randn(5, 6)).calls
    assert [dict(call.shapes) for call in calls] == [
        {"M": 5, "K": 6, "N": 4, "R": 3}, {"M": 5, "K": 4, "N": 6, "R": 3},
    ]  # fmt: skip


def state(rank: int, folder: Path) -> None:
    """Settings stand beside the shards; a seed draws what it draws for one process."""
    alone, model = _mlp(), _parallel(_mlp())
    states = pyfused.lora_state_dict(model), pyfused.lora_state_dict(alone)
    trained.assert_equal(*({**each, "lora_settings": each["lora_settings"].float()} for each in states))
    for each in (alone, model):
        torch.manual_seed(7)
        each[0].reset_lora_parameters()
        each[2].reset_lora_parameters()
    trained.assert_equal(trained.trainable(model), trained.trainable(alone))
    assert model[2].lora_a.full_tensor().any()


def refused(rank: int, folder: Path) -> None:
    from torch.distributed.tensor import Shard

    model, x = _parallel(_mlp(dropout=0.1)), torch.randn(5, 6)
    with pytest.raises(ValueError, match=r"^lora_linear: dropout_p must be 0 over DTensors, got 0\.1"):
        model(x)
    model.eval()(x)
    for change in (model[0].merge, model[0].to_base, lambda: pyfused.remove_lora(model)):
        with pytest.raises(RuntimeError, match=r"needs whole parameters, got the DTensor 'weight'; gather them first"):
            change()
    with pytest.raises(ValueError, match=r"model must not be sharded, got the DTensor '0\.weight'; load before"):
        pyfused.load_lora_state_dict(model, pyfused.lora_state_dict(_mlp()))
    with pytest.raises(TypeError, match=r"state\['0\.lora_a'\] must be a whole tensor, got a DTensor placed by"):
        pyfused.load_lora_state_dict(_mlp(), pyfused.lora_state_dict(model))
    with pytest.raises(ValueError, match=r"^inject_lora: model must not be sharded"):
        pyfused.inject_lora(_parallel(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))))
    with pytest.raises(TypeError, match=r"^LoRALinear\.from_linear: weight must be a whole tensor, got a DTensor"):
        pyfused.LoRALinear.from_linear(_parallel(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)))[0])
    leaves = _leaves(8, 6, 4)
    shards = _sharded(leaves, _mesh(), weight=[Shard(0)], lora_b=[Shard(0)], bias=[Shard(0)])
    for name in leaves.keys() - {"weight"}:
        with pytest.raises(TypeError, match=rf"^lora_linear: {name} must be a DTensor like weight, got a Tensor"):
            pyfused.lora_linear(**shards | {name: leaves[name]})
        with pytest.raises(TypeError, match=rf"^lora_linear: {name} must be a whole tensor, got a DTensor placed by"):
            pyfused.lora_linear(**leaves | {name: shards[name]})
    other = _sharded(leaves, _mesh(1, 2), lora_a=[Shard(0), Shard(1)])
    with pytest.raises(ValueError, match=r"^lora_linear: lora_a must be on weight's DeviceMesh.*, got DeviceMesh"):
        pyfused.lora_linear(**shards | {"lora_a": other["lora_a"]})
    with pytest.raises(ValueError, match=r"^lora_linear: channel_dim must be -1 over DTensors, got 1"):
        pyfused.lora_linear(**shards, channel_dim=1)
    narrow = _leaves(1, 6, 4)
    with pytest.raises(ValueError, match=r"weight must give each of 2 processes a part of dimension 0, got 1 there"):
        pyfused.lora_linear(**_sharded(narrow, _mesh(), weight=[Shard(0)]))
    summed = pyfused.lora_linear(**_sharded(leaves, _mesh(), weight=[Shard(1)])).detach()[0].t()
    assert summed.placements[0].is_partial()
    square = _sharded(_leaves(8, 4, 3), _mesh())
    with pytest.raises(ValueError, match=r"weight must be placed by Shard\(0\), Shard\(1\) or Replicate\(\), got "):
        pyfused.lora_linear(**square | {"weight": summed})


_BF16 = torch.bfloat16
CASES = (
    {f"operator {weight}": functools.partial(operator, weight) for weight in ("column", "row", "whole")}
    | {
        f"layers {layout}": functools.partial(layers, layout, torch.float32)
        for layout in ("default", "sequence", "dtensors", "columns")
    }
    | {"layers bfloat16": functools.partial(layers, "default", _BF16)}
    | {case.__name__: case for case in (two_dimensions, compiled, explained, state, refused)}
)
