"""One schema per direction of an operator, one ``torch.library`` namespace per backend that implements it.

Every operator keeps its promises to torch here: gradients, forward mode, autocast, tracing.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyfused.choice.backends import BACKENDS
from pyfused.ops.contract import known

_Output = TypeVar("_Output")

# Where a backend keeps its implementations: module of the same name as the operator, function named as the schema.
# Compiled libraries register their own.
HOMES = {"portable": "pyfused.portable", "triton": "pyfused.kernels"}
_AUTOCAST = [name for name in torch._C.DispatchKey.__members__ if name.startswith("Autocast")]
_AUTOCAST_KEYS = functools.reduce(
    lambda keys, name: keys | torch._C.DispatchKeySet(torch._C.DispatchKey.__members__[name]),
    _AUTOCAST,
    torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined),
)
# View tracking must not act inside an implementation: backends build y from views of it, and what follows could not
# change it in place.
_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
# What the dispatcher comes by before a backend: autograd, of strided tensors, too.
_BELOW = _VIEWS | _AUTOCAST_KEYS | torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
# What is left of the dispatch keys below autograd when nothing stands between it and a backend's implementation: no
# fake tensors, no mode, no trace.
_PLAIN = [torch._C.DispatchKeySet(key).raw_repr() for key in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)]
_libraries = {backend: torch.library.Library(f"pyfused_{backend}", "DEF") for backend in BACKENDS}
# Raw forward operator -> what makes its outputs with a derivative.
_derived: dict[Callable[..., Any], Callable[..., tuple[Tensor, Tensor]]] = {}

# A backend's implementation, reached without the dispatcher: where nothing stands between, see `known`.
DIRECTLY = {backend: f"{backend}, directly" for backend in BACKENDS}
_BY_DISPATCH = {way: backend for backend, way in DIRECTLY.items()}
# Backend, or one of `DIRECTLY` -> what runs it.
Raw = dict[str, Callable[..., Any]]
# Raw operator -> the operator in whose files its implementations are, by name.
homes: dict[str, str] = {}


def define(
    operator: str,
    direction: str,
    schema: str,
    fake: Callable,
    served_by: str | None = None,
    implemented: Mapping[str, str] = HOMES,
) -> Raw:
    """Register ``<operator>_<direction><schema>`` in every backend's namespace; returns backend -> raw operator.

    Implementations are imported at the first call, so that importing pyfused needs torch alone. ``served_by`` names
    another operator whose implementations serve this one too: its schema goes on where theirs ends. ``implemented``:
    backend -> the package that has an implementation in Python.
    """
    name, home = f"{operator}_{direction}", served_by or operator
    homes[name] = home
    overloads: Raw = {}
    for backend, library in _libraries.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        implementation = None
        if backend in implemented:
            implementation = _lazy(f"{implemented[backend]}.{home}", f"{home}_{direction}")
            library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pyfused_{backend}::{name}", fake, lib=library)
        overload = getattr(getattr(torch.ops, f"pyfused_{backend}"), name).default
        # Under inference_mode nothing comes by "Autograd": what holds in every grad mode has a key of its own.
        for key in _AUTOCAST:
            library.impl(name, functools.partial(_without_autocast, overload), key)
        library.impl(name, functools.partial(_with_autograd, overload, implementation), "Autograd", with_keyset=True)
        overloads[backend] = overload
        overloads[DIRECTLY[backend]] = functools.partial(_directly, implementation or overload)
    return overloads


def way_there(backend: str, directly: bool) -> str:
    """How forward reaches a backend; ``directly``: nothing stands between a call and its tensors."""
    return DIRECTLY[backend] if directly else backend


def way_back(way: str, *tensors: Tensor | None) -> str:
    """How backward reaches the backend that forward reached by ``way``; ``tensors`` are what it will give it."""
    if way in _BY_DISPATCH and not (known.undisturbed() and known.plain(tensors)):
        return _BY_DISPATCH[way]
    return way


def derive(forward: Raw, apply: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Give the raw forward operators a derivative: ``apply(backend, *arguments)`` returns their outputs with it.

    So that an exported or traced program, which holds raw operators alone, has its gradients.
    """
    for backend in BACKENDS:
        _derived[forward[backend]] = functools.partial(apply, backend)


def run(
    name: str,
    function: type[torch.autograd.Function],
    raw: Callable[..., tuple[_Output, ...]],
    tensors: Sequence[Tensor | None],
    constants: Sequence[object],
    choices: Sequence[object],
    directly: bool = False,
) -> _Output:
    """y, with a derivative where grad mode is on and one of ``tensors`` requires grad.

    ``function`` takes tensors, constants and choices, ``raw`` tensors, constants and whether to save for backward; of
    what it returns y is the first.
    ``directly``: nothing stands between the call and its tensors.

    Raises:
        RuntimeError: inside an export to ONNX, or where a transform of torch.func wants a gradient.
    """
    wanted = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if directly:
        if not wanted:
            return raw(*tensors, *constants, False)[0]
        # What torch puts before it looks for wrapped tensors, and there are none.
        return super(torch.autograd.Function, function).apply(*tensors, *constants, *choices)  # type: ignore[misc]
    if torch.compiler.is_exporting() or (not torch.compiler.is_compiling() and torch.jit.is_tracing()):
        if torch.onnx.is_in_onnx_export():
            raise RuntimeError(
                f"{name}: ONNX has no such operator; of a model with LoRA export what remove_lora(model) leaves"
            )
        # The program holds the raw operator, which has its own derivative: see `derive`.
        wanted = False
    if not wanted:
        return raw(*tensors, *constants, False)[0]
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{name}: torch.func's grad, vjp, jvp, jacrev and jacfwd have no derivative of it, nor has vmap where "
            "something requires grad; use torch.autograd, or vmap under torch.no_grad()"
        )
    if torch.compiler.is_compiling():
        tensors = _apart(tensors)
    return function.apply(*tensors, *constants, *choices)


def _apart(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors, views of those that are there twice: dynamo refuses an object that a Function gets two times."""
    found: list[Tensor | None] = []
    for tensor in tensors:
        twice = tensor is not None and any(tensor is other for other in found)
        found.append(tensor.view_as(tensor) if twice and tensor is not None else tensor)
    return found


def refuse_tangents(name: str, arguments: Mapping[str, object]) -> None:
    """Raise where forward-mode differentiation is on and one of the arguments, by name, has a tangent."""
    if forward_ad._current_level < 0:
        return
    for argument, value in arguments.items():
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(f"{name}: {argument} has a tangent, but there is no forward-mode derivative")


def differentiable_once(backward: Callable) -> Callable:
    """Decorates ``backward(ctx, *dy)`` of a Function: it raises where its gradients are to be differentiated again.

    At once, and not when that happens: torch runs no node that lies on no way to what a gradient is asked for, so
    `torch.autograd.grad` of a loss with a penalty, or a Hessian, would go without the operator's part.
    """

    @functools.wraps(backward)
    def once(ctx, *dy):
        # Grad mode is on in a backward with create_graph=True alone. Compiled code has no second derivative anyway.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            operator = type(ctx).__name__.removeprefix("_").removesuffix("Backward")
            raise RuntimeError(
                f"{operator} of pyfused has no second derivative, which create_graph=True is for; retain_graph=True "
                "alone keeps the graph for another backward"
            )
        return backward(ctx, *dy)

    return once


def _lazy(module: str, name: str) -> Callable:
    home = None

    def implementation(*args, **kwargs):
        nonlocal home
        if home is None:
            # Not out of sys.modules, where another thread's import may not have ended.
            home = importlib.import_module(module)
        return getattr(home, name)(*args, **kwargs)

    return implementation


def _directly(implementation, *arguments):
    with torch._C._ExcludeDispatchKeyGuard(_BELOW):
        return implementation(*arguments)


def _without_autocast(overload, *args, **kwargs):
    # Products inside an implementation stay in the dtypes that the contract gives them.
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        return overload(*args, **kwargs)


def _with_autograd(overload, implementation, keyset, *args, **kwargs):
    # Without this kernel torch would run the raw operator and drop the gradient without a word.
    if forward_ad._current_level >= 0:
        names = (argument.name for argument in overload._schema.arguments)
        refuse_tangents(str(overload), dict(zip(names, args, strict=False)))
    if torch.is_grad_enabled():
        for argument, value in zip(overload._schema.arguments, args, strict=False):
            if isinstance(value, Tensor) and value.requires_grad:
                if overload in _derived:
                    return _derived[overload](*args, **kwargs)
                raise RuntimeError(
                    f"{overload}: {argument.name} requires grad, but a raw backward operator has no derivative"
                )
    remaining = keyset & torch._C._after_autograd_keyset
    with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_VIEWS):
        if implementation is not None and remaining.raw_repr() in _PLAIN:
            # Where the dispatcher would come to by way of C++, which costs as much as a small product.
            return implementation(*args, **kwargs)
        return overload.redispatch(remaining, *args, **kwargs)
