"""Cases of FSDP2 (`fully_shard`): a changed model is sharded, trains as in one process, and gives its checkpoints."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import trained
from pair import WORLD
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

import pyfused
from pyfused.diagnostics import check
from pyfused.surgery.added import KeepsWide, added_parameters

WHOLE = StateDictOptions(full_state_dict=True)


def sharded(model: nn.Module, **options) -> nn.Module:
    """Each attention, block, adapter and the head as a group of its own, and the rest as one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    tower = next(module for module in model.modules() if isinstance(module, trained.Tower))
    for module in (tower.joint, tower.split, *tower.blocks, *tower.adapters, tower.head):
        fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def mine(rank: int) -> list[Tensor]:
    return [part.chunk(WORLD)[rank] for part in trained.data()]


def one_process(model: nn.Module, steps: int = 2) -> list[dict[str, Tensor]]:
    """`trained.train` of the halves of a batch, one after the other, in the arithmetic that each process has."""
    named = trained.trainable(model)
    optimizer = trained.sgd(named.values())
    gradients = []
    for _ in range(steps):
        for half in zip(*(part.chunk(WORLD) for part in trained.data()), strict=True):
            (trained.loss_of(model, *half) / WORLD).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in named.items()})
        optimizer.step()
        optimizer.zero_grad()
    return gradients


def gathered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As docs/guides/several-gpus.md has it."""
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


# ---- cases


def equals_one_process(kind: str, rank: int, folder: Path) -> None:
    alone = trained.made(kind)
    expected = trained.train(alone, *trained.data())
    model = sharded(trained.made(kind))
    gradients = trained.train(model, *mine(rank))
    trained.assert_trained_alike(model, gradients, alone, expected)


def bf16_policy(rank: int, folder: Path) -> None:
    """Parameters and inputs in bfloat16 for the computation, weights and sums in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    alone = trained.made("everything")
    for parameter in alone.parameters():
        # Past what keeps added parameters wide, as the policy does.
        parameter.data = parameter.data.bfloat16()
    alone.register_forward_pre_hook(lambda module, args: tuple(arg.bfloat16() for arg in args))
    alone.context, alone.norm = alone.context.bfloat16(), alone.norm.bfloat16()
    (expected,) = one_process(alone, steps=1)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(trained.made("everything"), mp_policy=policy)
    for buffer in (model.context, *model.norm.buffers()):
        buffer.data = buffer.data.bfloat16() if buffer.is_floating_point() else buffer.data
    (gradients,) = trained.train(model, *mine(rank), steps=1)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    trained.assert_equal(gradients, expected, tolerance=1e-2)


def bf16_base(rank: int, folder: Path) -> None:
    """float32 adapters share their groups with a frozen bfloat16 base; a bfloat16 head that trains has its own."""
    alone = trained.made("lora", torch.bfloat16)
    expected = one_process(alone)
    model = sharded(trained.made("lora", torch.bfloat16))
    dtypes = {parameter.dtype for parameter in model.joint.parameters()}
    assert dtypes == {torch.float32, torch.bfloat16}
    gradients = trained.train(model, *mine(rank))
    trained.assert_trained_alike(model, gradients, alone, expected, tolerance=1e-2)


def one_group(rank: int, folder: Path) -> None:
    """FullyShardedDataParallel, whose parameters are no parameters in forward."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    alone = trained.made("everything")
    trained.train(alone, *trained.data())
    model = FullyShardedDataParallel(trained.made("everything"), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = trained.sgd(trained.trainable(model).values())
    for _ in range(2):
        trained.loss_of(model, *mine(rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with FullyShardedDataParallel.summon_full_params(model):
        trained.assert_equal(trained.trainable(model), trained.trainable(alone))


def checkpointed(use_reentrant: bool, rank: int, folder: Path) -> None:
    """Activation checkpointing inside the groups, with dropout: the gradients are those of the same masks."""
    gradients = []
    for keeps in (True, False):
        model = sharded(trained.made("lora", dropout=0.3))
        if not keeps:
            trained.checkpoint_blocks(model, use_reentrant)
        torch.manual_seed(rank)
        gradients += trained.train(model, *mine(rank), steps=1)
    trained.assert_equal(*gradients)


def drawn_after_sharding(rank: int, folder: Path) -> None:
    """A model that is made on device meta, sharded, and only then given memory and numbers."""

    def made(device: str) -> nn.Module:
        with torch.device(device):
            tower = trained.Tower(adapters=True)
            pyfused.PrefixTuning(tower, num_virtual_tokens=3, prefix_projection=True)
            pyfused.inject_lora(tower, ["stem", "mix", "joint", "split", "0", "2"], rank=4)
        return tower

    alone, model = made("cpu"), sharded(made("meta"))
    model.to_empty(device="cpu")
    for each in (alone, model):
        for module in each.modules():
            if isinstance(module, pyfused.LoRALinear | pyfused.LoRAConv2d):
                # What it adapts, and then what it adds.
                module.reset_parameters()
            if isinstance(module, pyfused.LoRAModule):
                torch.manual_seed(1)
                module.reset_lora_parameters()
            elif module is not each and isinstance(module, KeepsWide):
                torch.manual_seed(1)
                module.reset_parameters()
    adapters = {id(p) for module in alone.modules() for p in added_parameters(module)}
    names = [name for name, parameter in alone.named_parameters() if id(parameter) in adapters]
    got, expected = (dict(each.named_parameters()) for each in (model, alone))
    trained.assert_equal({name: got[name] for name in names}, {name: expected[name] for name in names}, 0.0)


def state_dicts(rank: int, folder: Path) -> None:
    """What is whole goes into what is sharded, and the other way round."""
    alone = trained.made("lora")
    trained.train(alone, *trained.data())
    model = sharded(trained.made("lora"))
    adapter = {name: tensor for name, tensor in pyfused.lora_state_dict(alone).items() if name != "lora_settings"}
    into = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(
        model, {**adapter, "head.weight": alone.head.weight, "head.bias": alone.head.bias}, options=into
    )
    trained.assert_equal(trained.trainable(model), trained.trainable(alone), 0.0)
    whole = get_model_state_dict(model, options=WHOLE)
    back = trained.made("lora")
    # torch gives the whole state to the first process alone.
    if rank == 0:
        back.load_state_dict(whole)
        trained.assert_equal(trained.trainable(back), trained.trainable(alone), 0.0)
    other = trained.made("lora")
    pyfused.load_lora_state_dict(other, gathered(pyfused.lora_state_dict(model)))
    trained.assert_equal(pyfused.lora_state_dict(other), pyfused.lora_state_dict(alone), 0.0)


def saved(rank: int, folder: Path) -> None:
    """A checkpoint in shards, after a step; two processes go on from it as if nothing had been."""
    model = sharded(trained.made("everything"))
    named = trained.trainable(model)
    optimizer = trained.sgd(named.values())

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        trained.loss_of(model, *mine(rank)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(model, optimizer)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "checkpoint")
    step(model, optimizer)

    other = sharded(trained.made("everything", seed=9))
    other_optimizer = trained.sgd(trained.trainable(other).values())
    model_state, optimizer_state = get_state_dict(other, other_optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "checkpoint")
    set_state_dict(other, other_optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    step(other, other_optimizer)
    trained.assert_equal(trained.trainable(other), trained.trainable(model), 0.0)


def fused_later(rank: int, folder: Path) -> None:
    """`fuse` and `unfuse` find PEFT's layers in a sharded model, but those that are a group of their own."""
    alone = trained.made("peft")
    expected = trained.train(alone, *trained.data())
    model = trained.made("peft")
    pyfused.unfuse(model)
    sharded(model)
    pyfused.fuse(model)
    gradients = trained.train(model, *mine(rank))
    trained.assert_trained_alike(model, gradients, alone, expected)
    told = pyfused.explain(model, mine(rank)[0])
    assert [call.operator for call in told.calls] == ["lora_linear"] * 4
    assert "head: PEFT's FSDPLinear: no linear layer, no 1x1 convolution and no attention of PEFT's own" in str(told)
    pyfused.unfuse(model)
    assert not any(call.operator for call in pyfused.explain(model, mine(rank)[0]).calls)


def refused(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import register_fsdp_forward_method

    plain = sharded(trained.Tower())
    for name, change in (
        ("inject_lora", lambda: pyfused.inject_lora(plain, "mix")),
        ("bitfit", lambda: pyfused.bitfit(plain)),
        ("PrefixTuning", lambda: pyfused.PrefixTuning(plain)),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: model must not be sharded, got the FSDPTower.*; inject first"):
            change()
    model = trained.Tower(adapters=True)
    prefix = pyfused.PrefixTuning(model, num_virtual_tokens=3)
    pyfused.inject_lora(model, ["mix", "joint"], rank=4)
    sharded(model)
    for change in (model.joint.merge, model.mix.merge, lambda: pyfused.remove_lora(model)):
        with pytest.raises(RuntimeError, match=r"needs whole parameters, got the .*; gather them first"):
            change()
    with pytest.raises(RuntimeError, match=r"expected the class that this package made, got one on top of it"):
        prefix.remove()
    with pytest.raises(ValueError, match=r"^load_lora_state_dict: model must not be sharded, got the FSDPTower"):
        pyfused.load_lora_state_dict(model, gathered(pyfused.lora_state_dict(model)))
    with pytest.raises(ValueError, match=r"^PrefixTuning\.load_state_dict: model must not be sharded"):
        prefix.load_state_dict(gathered(prefix.state_dict()))
    with pytest.raises(ValueError, match=r"^check: model must not be sharded, got the FSDPTower.*; check it before"):
        check(model, trained.data()[0])
    with pytest.raises(TypeError, match=r"must be a whole tensor, got a DTensor placed by .*register_fsdp_forward"):
        model.cross.prepare(model.context)
    register_fsdp_forward_method(model, "prepare_context")
    assert model.prepare_context() is not None


CASES: dict[str, Any] = (
    {kind: functools.partial(equals_one_process, kind) for kind in trained.KINDS}
    | {f"checkpointed, reentrant {how}": functools.partial(checkpointed, how) for how in (True, False)}
    | {
        case.__name__: case
        for case in (
            bf16_policy, bf16_base, one_group, drawn_after_sharding, state_dicts, saved, fused_later, refused,
        )
    }
)  # fmt: skip
