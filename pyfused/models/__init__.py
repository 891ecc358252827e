"""Models with adapters, built from the modules; one that wraps a library's model imports it when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyfused.models.report import AdapterReport, AdapterRow

if TYPE_CHECKING:
    from pyfused.models.fastvit import AttentionBlockAdapter, ConvLoRAStage, RepMixerBlockAdapter, add_adapters

__all__ = [
    "AdapterReport",
    "AdapterRow",
    "AttentionBlockAdapter",
    "ConvLoRAStage",
    "RepMixerBlockAdapter",
    "add_adapters",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pyfused.models import fastvit

    return getattr(fastvit, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
