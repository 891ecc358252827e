"""Ways to train a small part of a model beside LoRA and adapters, settings, and an optimizer's groups."""

from pyfused.methods.bias_tuning import BitFitReport, bitfit
from pyfused.methods.groups import methods_of, param_groups
from pyfused.methods.prefix import PrefixReport, PrefixTuning
from pyfused.methods.presets import Preset, preset, preset_for

__all__ = [
    "BitFitReport",
    "PrefixReport",
    "PrefixTuning",
    "Preset",
    "bitfit",
    "methods_of",
    "param_groups",
    "preset",
    "preset_for",
]
