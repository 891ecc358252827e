"""Settings that a document recommends, by the difficulty of the task, and each method's learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pyfused.ops.contract import checks
from pyfused.surgery.paths import near

# Of Adam's kind. LoRA, BitFit and prefix as the document on CLIP has them, adapters as AA-CLIP's of images; what trains
# whole beside them takes LoRA's, the document having one rate for all.
RATES = MappingProxyType({"lora": 2e-4, "bitfit": 1e-3, "prefix": 5e-4, "adapter": 5e-4, "whole": 2e-4})


@dataclass(frozen=True)
class Preset:
    """Settings of LoRA for one kind of task; ``inject_lora(model, **preset.lora)``.

    Attributes:
        name: "simple", "medium", "complex" or "very-complex".
        rank: R. alpha: numerator of the scaling.
        target_modules: what is adapted.
        lr: the learning rate, for Adam: ``param_groups(model, {"lora": preset.lr})``.
    """

    name: str
    rank: int
    alpha: float
    target_modules: str
    lr: float

    @property
    def lora(self) -> dict[str, Any]:
        """Arguments of `pyfused.inject_lora`."""
        return {"rank": self.rank, "alpha": self.alpha, "target_modules": self.target_modules}


PRESETS = {
    made.name: made
    for made in (
        Preset("simple", 8, 16.0, "attention", 2e-4),
        Preset("medium", 16, 32.0, "all-linear", 2e-4),
        Preset("complex", 32, 64.0, "all-linear", 1e-4),
        Preset("very-complex", 64, 128.0, "all-linear", 5e-5),
    )
}
# The most classes of a task for which a preset is proposed; ours, the document names none.
_CLASSES = {"simple": 10, "medium": 100, "complex": 500}


def preset(name: str) -> Preset:
    """The `Preset` of that name: "simple", "medium", "complex" or "very-complex".

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: there is none of that name; the names are listed.

    Source: the settings that the document on LoRA, BitFit and prefix tuning of CLIP recommends.
    """
    if not isinstance(name, str):
        raise TypeError(f"preset: name must be a string, got {type(name).__name__}")
    if name not in PRESETS:
        raise ValueError(f"preset: name must be one of {', '.join(PRESETS)}, got {name!r}; {near(name, PRESETS)}")
    return PRESETS[name]


def preset_for(num_classes: int) -> Preset:
    """The `Preset` for a task of that many classes: up to 10 simple, 100 medium, 500 complex, else very complex.

    Raises:
        TypeError: ``num_classes`` is not an int.
        ValueError: it is less than 2.
    """
    checks.integer("preset_for", "num_classes", num_classes, 2)
    fitting = (name for name, most in _CLASSES.items() if num_classes <= most)
    return preset(next(fitting, "very-complex"))
