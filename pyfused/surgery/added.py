"""Parameters that are added to a model: how they are drawn, and that casts of the model leave them in float32."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from pyfused.ops.contract.checks import is_dtensor

if TYPE_CHECKING:
    from typing_extensions import Self

# As nn.Linear draws its weight.
kaiming = functools.partial(nn.init.kaiming_uniform_, a=math.sqrt(5))


@torch.no_grad()
def draw(parameter: Tensor, fill: Callable[[Tensor], object]) -> None:
    """What ``fill`` makes of zeros on the CPU, in float32: a seed gives the same on every device and in every dtype.

    A parameter that is sharded over processes gets its shard of what the first of them has drawn.
    """
    drawn = torch.zeros(parameter.shape, dtype=torch.float32, device="cpu")
    fill(drawn)
    if is_dtensor(parameter):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = parameter
        drawn = distribute_tensor(drawn.to(parameter.device), sharded.device_mesh, sharded.placements)
    parameter.copy_(drawn)


@contextlib.contextmanager
def kept_wide(places: list[tuple[nn.Module, str]]) -> Iterator[None]:
    """While modules are cast: the parameters at ``places``, (module, name), are not narrowed below float32.

    A layer-scale of 1e-6 is subnormal in float16; a young adapter and its optimiser's state are below what 16 bits
    resolve, and GradScaler unscales no float16 gradient.
    """
    before = [(module, name, module.get_parameter(name)) for module, name in places]
    # Aliases: a cast rebinds what the parameter and its gradient hold.
    values = [(p.data, None if p.grad is None else p.grad.data) for _, _, p in before]
    yield
    for (module, name, _), (value, grad) in zip(before, values, strict=True):
        parameter = module.get_parameter(name)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        if parameter.dtype != wide and value.dtype.itemsize >= wide.itemsize:
            parameter.grad = None
            parameter.data = value.to(parameter.device, wide)
            parameter.grad = None if grad is None else grad.to(parameter.device, wide)


class KeepsWide(nn.Module):
    """A module whose float32 parameters, all or those that it names, stay float32 under ``half()`` and the like."""

    def _wide_names(self) -> Iterable[str]:
        """The names of those parameters."""
        return [name for name, parameter in self._parameters.items() if parameter is not None]

    def __prepare_scriptable__(self) -> NoReturn:
        """Asked for by `torch.jit.script`, whose language has no words for what an operator call does."""
        raise RuntimeError(
            f"{type(self).__name__}: torch.jit.script cannot compile it; use torch.export or torch.jit.trace, or "
            "script what remove_lora(model) leaves"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with kept_wide([(self, name) for name in self._wide_names()]):
            return super()._apply(fn, recurse)


def added_names(module: nn.Module) -> list[str]:
    """The names of `added_parameters`."""
    return list(module._wide_names()) if isinstance(module, KeepsWide) else []


def added_parameters(module: nn.Module) -> list[nn.Parameter]:
    """What this package has added to a model as parameters of ``module`` itself."""
    return [module.get_parameter(name) for name in added_names(module)]
