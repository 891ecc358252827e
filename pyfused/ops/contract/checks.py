"""Argument checks shared by the operators.

Each names the argument, what was expected and what came. None reads a tensor's values: that would synchronise the
device and break graph capture; only Python numbers are checked for range.
"""

from __future__ import annotations

import contextlib
import numbers

import torch

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NARROW = FLOATING[1:]
_LARGEST = torch.finfo(torch.float32).max


def tensor(operator: str, name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{operator}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        kind = f"one of layout {value.layout}"
        if value.is_nested:
            kind = "a nested one; on an nn.TransformerEncoder set use_nested_tensor = False, as inject_lora does"
        raise TypeError(f"{operator}: {name} must be a dense tensor, of layout torch.strided, got {kind}")
    # Not by `is_dtensor`: each call of an operator comes here many times.
    if type(value).__name__ == "DTensor":
        placements = getattr(value, "placements", None)
        raise TypeError(
            f"{operator}: {name} must be a whole tensor, got a DTensor placed by {placements}; gather it by "
            "full_tensor(), or call what fully_shard gathers for: forward, and what register_fsdp_forward_method names"
        )


def is_dtensor(value: torch.Tensor) -> bool:
    """Whether ``value`` is sharded over processes, or could be. By name: torch.distributed may not be there."""
    return type(value).__name__ == "DTensor"


def integer(operator: str, name: str, value: object, least: int | None = None) -> None:
    """A Python int, of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{operator}: {name} must be an int, got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{operator}: {name} must be at least {least}, got {value}")


def shape(operator: str, name: str, value: torch.Tensor, expected: tuple[int, ...], letters: str) -> None:
    if value.shape != expected:
        raise ValueError(f"{operator}: {name} must have shape {letters} = {expected}, got {tuple(value.shape)}")


def dtype(operator: str, name: str, value: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if value.dtype not in allowed:
        expected = " or ".join(str(item) for item in allowed)
        raise TypeError(f"{operator}: {name} must have dtype {expected}, got {value.dtype}")


def same_device(operator: str, name: str, value: torch.Tensor, device: torch.device, like: str = "x") -> None:
    if value.device != device:
        raise ValueError(f"{operator}: {name} must be on {device} like {like}, got {value.device}")


def argument(
    operator: str,
    name: str,
    value: torch.Tensor,
    expected: tuple[int, ...],
    letters: str,
    allowed: tuple[torch.dtype, ...],
    device: torch.device,
    like: str = "x",
) -> None:
    """`tensor`, `shape`, `dtype` and `same_device`: where nothing is wrong, in one step."""
    if (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and not value.is_nested
        and value.shape == expected
        and value.dtype in allowed
        and value.device == device
        and type(value).__name__ != "DTensor"
    ):
        return
    tensor(operator, name, value)
    shape(operator, name, value, expected, letters)
    dtype(operator, name, value, allowed)
    same_device(operator, name, value, device, like)


def finite(operator: str, name: str, value: float) -> None:
    # First what it nearly always is: to ask an abstract class takes as long as all other checks.
    if type(value) is not float and not isinstance(value, numbers.Real):
        raise TypeError(f"{operator}: {name} must be a Python number, got {type(value).__name__}")
    # Compared, not asked by a function: torch.compile may have made a symbol of it.
    if not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{operator}: {name} must be finite, also in float32, got {value}")


def probability(operator: str, name: str, value: float) -> None:
    finite(operator, name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{operator}: {name} must be in [0, 1), got {value}")


def one_of(operator: str, name: str, value: object, allowed: tuple) -> None:
    # Of its type too: True and 1.0 are equal to 1.
    if value not in allowed or type(value) not in map(type, allowed):
        raise ValueError(f"{operator}: {name} must be one of {allowed}, got {value!r}")


def flag(operator: str, name: str, value: object) -> None:
    if value is not True and value is not False:
        raise TypeError(f"{operator}: {name} must be a bool, got {value!r}")


def seed(operator: str, value: torch.Tensor | int | None, device: torch.device) -> torch.Tensor:
    """The dropout key as a one-element int64 tensor on ``device``; drawing it there needs no synchronisation."""
    if value is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if type(value) is int:
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{operator}: seed must fit a signed 64-bit integer, got {value}")
        return torch.full((1,), value, dtype=torch.int64, device=device)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{operator}: seed must be an int or a torch.Tensor, got {type(value).__name__}")
    dtype(operator, "seed", value, (torch.int64,))
    if value.numel() != 1:
        raise ValueError(f"{operator}: seed must have one element, got shape {tuple(value.shape)}")
    same_device(operator, "seed", value, device)
    return value.reshape(1)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What autocast turns x into; None when it is off or leaves x alone, as it does float64."""
    kind = x.device.type
    # Where there is no autocast torch refuses to say whether it is on; on these there always is.
    available = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)
    if x.dtype == torch.float64 or not available or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Inside, autocast leaves x alone."""
    kind = x.device.type
    # torch.autocast refuses devices that have none.
    return contextlib.nullcontext() if autocast_dtype(x) is None else torch.autocast(kind, enabled=False)


def parameter_dtypes(x: torch.Tensor) -> tuple[torch.dtype, ...]:
    """What a parameter beside x may have: x's dtype or float32; under autocast anything up to float32."""
    if autocast_dtype(x) is not None:
        return NARROW
    return (x.dtype,) if x.dtype in (torch.float64, torch.float32) else (x.dtype, torch.float32)
