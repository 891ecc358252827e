"""A low-rank linear layer over DTensors: what each process computes of it, and how the parts make the whole.

In each dimension of the mesh the placement of the weight, and of x where the weight is whole, says it all:

    weight      x           lora_a      lora_b      bias       y           summed over processes
    Shard(0)    Replicate   Replicate   Shard(0)    Shard(0)   Shard(-1)   dx, dA
    Shard(1)    Shard(-1)   Shard(1)    Replicate   of one     Partial     y, dB, dbias
    Replicate   Shard(d)    Replicate   Replicate   Replicate  Shard(d)    dA, dB, dW, dbias
    Replicate   Replicate   Replicate   Replicate   Replicate  Replicate   nothing

What comes with another placement is redistributed, and its gradient goes back to the placement it came with. Operators
see local tensors alone, so that backends and plans go by the sizes that a process has. This module is imported where a
DTensor comes, for it imports torch.distributed.tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

# Placements of x, weight, lora_a, lora_b and bias.
_Five = tuple[Placement, Placement, Placement, Placement, Placement]


def on_shards(
    caller: str,
    call: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
) -> DTensor:
    """y (..., N) as a DTensor, from DTensors of one mesh: ``call`` of what this process has of each.

    Args:
        caller: in whose name errors are raised.
        call: of local x, weight, lora_a, lora_b and bias -> local y, the operator without dropout.

    Raises:
        TypeError: one of the tensors is no DTensor.
        ValueError: their meshes differ, the weight's placement is none of the above, or a process has nothing of it.
    """
    if not isinstance(weight, DTensor):
        raise TypeError(f"{caller}: weight must be a DTensor, got a {type(weight).__name__}")
    mesh, last = weight.device_mesh, x.dim() - 1
    named = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "bias": bias}
    given = {name: _on_mesh(caller, name, tensor, mesh) for name, tensor in named.items() if tensor is not None}
    along = [_along(caller, *placed, last) for placed in zip(weight.placements, given["x"].placements, strict=True)]
    local: dict[str, Tensor | None] = {"bias": None}
    for number, (name, tensor) in enumerate(given.items()):
        moved = tensor.redistribute(placements=[arguments[number] for arguments, _, _ in along])
        local[name] = moved.to_local(grad_placements=[gradients[number] for _, gradients, _ in along])
    here = mesh.get_coordinate()
    for dim, placement in enumerate(weight.placements):
        if isinstance(placement, Shard):
            _refuse_empty(caller, weight.shape[placement.dim], mesh.size(dim), placement)
            if placement.dim == 1 and local["bias"] is not None and here is not None and here[dim] > 0:
                # In the sum over processes it stands once; all have it in their graph, so that none waits in backward.
                local["bias"] = local["bias"] * 0
    y = call(*(local[name] for name in named))
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    stride = y.new_empty(shape, device="meta").stride()
    placements = [placement for _, _, placement in along]
    return DTensor.from_local(y, mesh, placements, run_check=False, shape=shape, stride=stride)


def _on_mesh(caller: str, name: str, tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    if not isinstance(tensor, DTensor):
        raise TypeError(
            f"{caller}: {name} must be a DTensor like weight, got a {type(tensor).__name__}; put LoRA into the model "
            "first, and give parallelize_module the model with LoRA"
        )
    if tensor.device_mesh != mesh:
        raise ValueError(f"{caller}: {name} must be on weight's {mesh}, got {tensor.device_mesh}")
    return tensor


def _along(caller: str, weight: Placement, x: Placement, last: int) -> tuple[_Five, _Five, Placement]:
    """In one dimension of the mesh: the placements of the arguments, of their gradients, and of y."""
    whole, summed, rows, columns, channels = Replicate(), Partial(), Shard(0), Shard(1), Shard(last)
    if weight == rows:
        return (whole, rows, whole, rows, rows), (summed, rows, summed, rows, rows), channels
    if weight == columns:
        return (channels, columns, columns, whole, whole), (channels, columns, columns, summed, summed), summed
    if weight != whole:
        raise ValueError(f"{caller}: weight must be placed by Shard(0), Shard(1) or Replicate(), got {weight}")
    if isinstance(x, Shard) and x.dim != last:
        return (x, whole, whole, whole, whole), (x, summed, summed, summed, summed), x
    return (whole,) * 5, (whole,) * 5, whole


def _refuse_empty(caller: str, size: int, processes: int, placement: Shard) -> None:
    # By torch.chunk, which gives the last ones less, or nothing.
    if -(-size // processes) * (processes - 1) >= size:
        raise ValueError(
            f"{caller}: weight must give each of {processes} processes a part of dimension {placement.dim}, got "
            f"{size} there"
        )
