"""What of a public call decides its checks and its choices, so that an equal call needs neither again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pyfused.choice import measured

_Decided = TypeVar("_Decided")

# Who is told what every call is decided to be, see `pyfused.ops.decision`: each is decided anew then.
observers: list[Callable[[Any], None]] = []
_MOST = 4096
_KINDS = (Tensor, nn.Parameter)
# Where a backend's implementation may be called without the dispatcher.
PLAIN_DEVICES = ["cpu", "cuda"]
_dispatch_keys = torch._C._dispatch_keys
_included = torch._C._dispatch_tls_local_include_set
_functions = torch._C._len_torch_function_stack
_profiling = torch.autograd._profiler_enabled
_compiling = torch.compiler.is_compiling


def _in_inference_mode() -> int:
    with torch.inference_mode():
        return _included().raw_repr()


with torch.inference_mode(False):
    # What the dispatcher does on its own account: any mode, trace or transform changes it.
    _UNDISTURBED = {_included().raw_repr(), _in_inference_mode()}


def undisturbed() -> bool:
    """Whether nothing stands between a call and its tensors: no mode, trace, transform, profiler or observer."""
    return (
        _included().raw_repr() in _UNDISTURBED
        and not _functions()
        and forward_ad._current_level < 0
        and not _profiling()
        and not observers
    )


# The dispatch keys of tensors that are nothing but tensors: not fake, wrapped, conjugated or sparse.
_plain_keys: set[int] = set()


def _learns(tensor: Tensor) -> bool:
    """Whether the keys of a tensor, the first of its kind, are those of a plain one on its device."""
    if type(tensor) not in _KINDS or tensor.device.type not in PLAIN_DEVICES:
        return False
    for mode in (False, True):
        with torch.inference_mode(mode):
            _plain_keys.add(_dispatch_keys(torch.empty(0, device=tensor.device)).raw_repr())
    return _dispatch_keys(tensor).raw_repr() in _plain_keys


# In both of these every step is asked of each tensor of each call, so none of them is a function of its own.
def plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether these are nothing but tensors."""
    for tensor in tensors:
        if (
            tensor is not None
            and not (type(tensor) in _KINDS and _dispatch_keys(tensor).raw_repr() in _plain_keys)
            and not _learns(tensor)
        ):
            return False
    return True


def signature(first: Tensor, others: Sequence[Tensor | None], settings: Sequence[object]) -> tuple | None:
    """What tells a call of these tensors from others that are decided otherwise; None where each is decided anew.

    No values, and no addresses: a wrapped tensor has none.
    """
    if _compiling() or not undisturbed():
        return None
    key: list[object] = [torch.is_grad_enabled(), measured.generation, *settings, *map(type, settings)]
    for tensor in (first, *others):
        if tensor is None:
            key.append(None)
        elif (type(tensor) in _KINDS and _dispatch_keys(tensor).raw_repr() in _plain_keys) or _learns(tensor):
            key += (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)
        else:
            return None
    kind = first.device.type
    key.append(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)
    return tuple(key)


class Known(Generic[_Decided]):
    """What an operator has decided, by signature."""

    def __init__(self) -> None:
        self._found: dict[tuple, _Decided] = {}
        self._changing = threading.Lock()

    def get(self, key: tuple | None) -> _Decided | None:
        """None where it is not known, and where the key holds what no setting may be."""
        if key is None:
            return None
        try:
            return self._found.get(key)
        except TypeError:
            return None

    def keep(self, key: tuple | None, decided: _Decided) -> None:
        if key is None:
            return
        with self._changing:
            if len(self._found) >= _MOST:
                # The oldest.
                del self._found[next(iter(self._found))]
            self._found[key] = decided
