"""Parameters that casts leave in float32: what trains is not narrowed with the model around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


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


def added_parameters(module: nn.Module) -> list[nn.Parameter]:
    """What this package has added to a model as parameters of ``module`` itself."""
    return [module.get_parameter(name) for name in module._wide_names()] if isinstance(module, KeepsWide) else []
