"""Watching a model at work: which modules run, without leaving a trace in it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def check_callable(caller: str, function: Any) -> None:
    """Raises TypeError where ``model_or_function``, an argument of ``caller``, cannot be called."""
    if not callable(function):
        raise TypeError(f"{caller}: model_or_function must be a module or a callable, got {type(function).__name__}")


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Inside, what was compiled with `torch.compile` runs eagerly: it would run without calling observers."""
    # Nothing is compiled before Dynamo is imported.
    with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext():
        yield


def module_of(function: Callable) -> nn.Module | None:
    """The module that ``function`` is, or is a method of; None where there is none."""
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    # What torch.compile returns is a wrapper that users do not count as part of the path.
    owner = getattr(owner, "_orig_mod", owner)
    return owner if isinstance(owner, nn.Module) else None


def undisturbed(function: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``function(*args, **kwargs)``, after which its module is as it was; see `state_kept`."""
    with state_kept(module_of(function), args, kwargs):
        return function(*args, **kwargs)


@contextlib.contextmanager
def state_kept(model: nn.Module | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Afterwards the buffers of ``model`` (a BatchNorm's running statistics) and torch's generators are as before.

    What was compiled with `torch.compile` runs eagerly meanwhile.
    """
    modules = [] if model is None else list(model.modules())
    held = [(module, name, b) for module in modules for name, b in module._buffers.items() if b is not None]
    tensors = [*args, *kwargs.values(), *([] if model is None else model.parameters())]
    devices = sorted({tensor.device.index for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_cuda})
    with torch.random.fork_rng(devices=devices), eagerly():
        # Copies take the writes: what a graph in progress has saved of the buffers must not change.
        copies = {id(buffer): buffer.clone() for _, _, buffer in held}
        try:
            for module, name, buffer in held:
                module._buffers[name] = copies[id(buffer)]
            yield
        finally:
            for module, name, buffer in held:
                module._buffers[name] = buffer


def never_called(
    function: Callable, wanted: Callable[[nn.Module], bool], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[str]:
    """The paths of the ``wanted`` modules that do not run in one call without gradients."""
    with torch.no_grad(), calls_watched(module_of(function), wanted) as waiting:
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
