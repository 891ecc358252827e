"""Models with adapters, built from the modules; one that wraps a library's model imports it when it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pyfused.models.report import AdapterReport, AdapterRow

if TYPE_CHECKING:
    from pyfused.models.aa_clip import (
        AdaptedCLIP,
        AdaptedCLIPReport,
        AdaptedFeatures,
        ImageFeatures,
        TextFeatures,
    )
    from pyfused.models.aa_clip_parts import AdapterBlend, ImageCrossAttention, SimpleProj, TextCrossAttention
    from pyfused.models.fastvit import (
        AttentionBlockAdapter,
        ConvLoRAStage,
        RepMixerBlockAdapter,
        add_adapters,
        remove_adapters,
    )

__all__ = [
    "AdaptedCLIP",
    "AdaptedCLIPReport",
    "AdaptedFeatures",
    "AdapterBlend",
    "AdapterReport",
    "AdapterRow",
    "AttentionBlockAdapter",
    "ConvLoRAStage",
    "ImageCrossAttention",
    "ImageFeatures",
    "RepMixerBlockAdapter",
    "SimpleProj",
    "TextCrossAttention",
    "TextFeatures",
    "add_adapters",
    "remove_adapters",
]
_FASTVIT = ("AttentionBlockAdapter", "ConvLoRAStage", "RepMixerBlockAdapter", "add_adapters", "remove_adapters")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "fastvit" if name in _FASTVIT else "aa_clip"
    return getattr(importlib.import_module(f"pyfused.models.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
