"""Watching a model at work: which operators it calls and how, and which modules run, without leaving a trace in it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Each is told which backend and plan an operator call gets. Empty in normal running.
observers: list[Callable[..., None]] = []


def notify(operator: str, **facts: Any) -> None:
    """Tell the observers."""
    for observer in observers:
        observer(operator, **facts)


def module_of(function: Callable) -> nn.Module | None:
    """The module that ``function`` is, or is a method of; None where there is none."""
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    # What torch.compile returns is a wrapper that users do not count as part of the path.
    owner = getattr(owner, "_orig_mod", owner)
    return owner if isinstance(owner, nn.Module) else None


def undisturbed(function: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``function(*args, **kwargs)``, after which its module is as it was.

    Its buffers (a BatchNorm's running statistics in train mode) are copies during the call, and torch's random
    generators are put back. What was compiled with `torch.compile` runs eagerly.
    """
    runner = _Runner(function)
    buffers = {name: buffer.clone() for name, buffer in runner.named_buffers()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_random_state_kept(runner, args, kwargs))
        # Compiled code would run without calling observers; nothing is compiled before Dynamo is imported.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        return torch.func.functional_call(runner, buffers, tuple(args), dict(kwargs))


def never_called(
    function: Callable, wanted: Callable[[nn.Module], bool], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[str]:
    """The paths of the ``wanted`` modules that do not run in one call without gradients."""
    model = module_of(function)
    with torch.no_grad(), calls_watched(model, wanted) as waiting:
        undisturbed(function, args, kwargs)
    return list(waiting.values())


@contextlib.contextmanager
def calls_watched(model: nn.Module | None, wanted: Callable[[nn.Module], bool]) -> Iterator[dict[nn.Module, str]]:
    """Gives the ``wanted`` modules of ``model`` with their paths, from which each goes as soon as it runs."""
    modules = {} if model is None else {module: path for path, module in model.named_modules() if wanted(module)}
    handles = [module.register_forward_pre_hook(lambda module, _: _forget(modules, module)) for module in modules]
    try:
        yield modules
    finally:
        for handle in handles:
            handle.remove()


def _forget(modules: dict[nn.Module, str], module: nn.Module) -> None:
    # What a hook returns would replace the module's input.
    modules.pop(module, None)


class _Runner(nn.Module):
    """A callable together with the module it belongs to, so that its buffers can be replaced for one call."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.target = module_of(function)
        # A list hides a module from nn.Module's registration: it is already here as ``target``.
        self._function = [function]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._function[0](*args, **kwargs)


@contextlib.contextmanager
def _random_state_kept(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    tensors = [*model.parameters(), *(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))]
    devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
    with torch.random.fork_rng(devices=devices):
        yield
