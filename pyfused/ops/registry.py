"""One schema per direction of an operator, one ``torch.library`` namespace per backend that implements it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from pyfused.backend import BACKENDS

# Where a backend keeps its implementations: module of the same name as the operator, function named as the schema.
# The compiled library of "cuda" registers its own.
_HOMES = {"portable": "pyfused.portable", "triton": "pyfused.kernels"}
# What must not act inside an implementation: view tracking (backends build y from views of it, and what follows could
# not change it in place) and autocast (products of float32 gradients stay float32).
_EXCLUDED = (
    torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
)
# What is left of the dispatch keys below autograd when nothing stands between it and a backend's implementation: no
# fake tensors, no mode, no trace.
_PLAIN = [torch._C.DispatchKeySet(key).raw_repr() for key in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)]
_libraries = {backend: torch.library.Library(f"pyfused_{backend}", "DEF") for backend in BACKENDS}


def define(operator: str, direction: str, schema: str, fake: Callable) -> dict[str, torch._ops.OpOverload]:
    """Register ``<operator>_<direction><schema>`` in every backend's namespace; returns backend -> raw operator.

    Implementations are imported at the first call, so that importing pyfused needs torch alone.
    """
    name = f"{operator}_{direction}"
    overloads = {}
    for backend, library in _libraries.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        implementation = None
        if backend in _HOMES:
            implementation = _lazy(f"{_HOMES[backend]}.{operator}", name)
            library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pyfused_{backend}::{name}", fake, lib=library)
        overload = getattr(getattr(torch.ops, f"pyfused_{backend}"), name).default
        kernel = functools.partial(_refuse_gradient, overload, implementation)
        library.impl(name, kernel, "Autograd", with_keyset=True)
        overloads[backend] = overload
    return overloads


def _lazy(module: str, name: str) -> Callable:
    home = None

    def implementation(*args, **kwargs):
        nonlocal home
        if home is None:
            # Not out of sys.modules, where another thread's import may not have ended.
            home = importlib.import_module(module)
        return getattr(home, name)(*args, **kwargs)

    return implementation


def _refuse_gradient(overload, implementation, keyset, *args, **kwargs):
    # Without this kernel torch would run the raw operator and drop the gradient without a word.
    if forward_ad._current_level >= 0:
        for argument, value in zip(overload._schema.arguments, args, strict=False):
            if isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
                raise RuntimeError(
                    f"{overload}: {argument.name} has a tangent, but there is no forward-mode derivative"
                )
    if torch.is_grad_enabled():
        for argument, value in zip(overload._schema.arguments, args, strict=False):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                raise RuntimeError(
                    f"{overload}: {argument.name} requires grad, but a raw operator has no derivative; "
                    "call the public function of pyfused, or run under torch.no_grad()"
                )
    remaining = keyset & torch._C._after_autograd_keyset
    with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_EXCLUDED):
        if implementation is not None and remaining.raw_repr() in _PLAIN:
            # Where the dispatcher would come to by way of C++, which costs as much as a small product.
            return implementation(*args, **kwargs)
        return overload.redispatch(remaining, *args, **kwargs)
