"""Models with adapters, built from the modules; one that wraps a library's model imports it when it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pyfused.models.report import AdapterReport, AdapterRow

if TYPE_CHECKING:
    from pyfused.models.aa_clip import AdaptedCLIP, AdaptedCLIPReport, AdaptedFeatures, ImageFeatures, TextFeatures
    from pyfused.models.aa_clip_maps import (
        anomaly_logits,
        anomaly_map,
        detection_score,
        dice_loss,
        focal_loss,
        image_score,
        image_stage_loss,
        segmentation_loss,
        text_stage_loss,
    )
    from pyfused.models.aa_clip_parts import AdapterBlend, ImageCrossAttention, SimpleProj, TextCrossAttention
    from pyfused.models.aa_clip_prompts import anomaly_prompts
    from pyfused.models.fastvit import add_adapters, remove_adapters
    from pyfused.models.fastvit_blocks import AttentionBlockAdapter, ConvLoRAStage, RepMixerBlockAdapter
    from pyfused.models.latent_wire import LatentWire, LatentWireAdapter, latent_wire_loss, left_padded_labels
    from pyfused.models.pca import PCACompressor

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
    "LatentWire",
    "LatentWireAdapter",
    "PCACompressor",
    "RepMixerBlockAdapter",
    "SimpleProj",
    "TextCrossAttention",
    "TextFeatures",
    "add_adapters",
    "anomaly_logits",
    "anomaly_map",
    "anomaly_prompts",
    "detection_score",
    "dice_loss",
    "focal_loss",
    "image_score",
    "image_stage_loss",
    "latent_wire_loss",
    "left_padded_labels",
    "remove_adapters",
    "segmentation_loss",
    "text_stage_loss",
]
# Module -> its names; those of no other are in aa_clip.
_HOMES = {
    "aa_clip_maps": (
        "anomaly_logits",
        "anomaly_map",
        "detection_score",
        "dice_loss",
        "focal_loss",
        "image_score",
        "image_stage_loss",
        "segmentation_loss",
        "text_stage_loss",
    ),
    "aa_clip_prompts": ("anomaly_prompts",),
    "fastvit": ("add_adapters", "remove_adapters"),
    "fastvit_blocks": ("AttentionBlockAdapter", "ConvLoRAStage", "RepMixerBlockAdapter"),
    "latent_wire": ("LatentWire", "LatentWireAdapter", "latent_wire_loss", "left_padded_labels"),
    "pca": ("PCACompressor",),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = next((home for home, names in _HOMES.items() if name in names), "aa_clip")
    return getattr(importlib.import_module(f"pyfused.models.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
