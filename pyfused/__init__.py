"""Fused Triton and CUDA kernels for parameter-efficient fine-tuning, as drop-in PyTorch modules."""

# ruff: noqa: E402 - a torch that is too old is named before anything else is asked of it.

import torch as _torch

# Before the imports, of which one reads it.
__version__ = "0.2.0"
# As pyproject.toml and setup.py have it.
_MIN_TORCH = (2, 10)

if tuple(int(part) for part in _torch.__version__.split(".")[:2]) < _MIN_TORCH:
    raise ImportError(f"pyfused needs torch {'.'.join(map(str, _MIN_TORCH))} or later, found {_torch.__version__}")

from pyfused import diagnostics, models
from pyfused.choice.backends import available_backends
from pyfused.explanation import explain
from pyfused.integrations.lora_files import load_lora, save_lora
from pyfused.integrations.peft import FuseReport, fuse, unfuse
from pyfused.lora.adapters import adapter_batch, adapters_off, merge_adapters, remove_adapter, set_adapter
from pyfused.lora.inject import inject_lora, remove_lora
from pyfused.lora.report import LoRAReport
from pyfused.lora.state import load_lora_state_dict, lora_state_dict
from pyfused.methods import BitFitReport, PrefixReport, PrefixTuning, Preset, bitfit, param_groups, preset, preset_for
from pyfused.methods.files import load_tuned, save_tuned
from pyfused.modules import (
    BottleneckAdapter,
    ConvLoRA,
    LoRAConv2d,
    LoRALinear,
    LoRAModule,
    LoRAMultiheadAttention,
    ScaledCrossAttention,
)
from pyfused.ops.adapter_residual import adapter_residual
from pyfused.ops.cross_attention_residual import cross_attention_residual
from pyfused.ops.lora_linear import lora_linear
from pyfused.ops.projection_residual import projection_residual
from pyfused.tuner.report import TuningReport
from pyfused.tuner.tune import tune, tuning

__all__ = [
    "BitFitReport",
    "BottleneckAdapter",
    "ConvLoRA",
    "FuseReport",
    "LoRAConv2d",
    "LoRALinear",
    "LoRAModule",
    "LoRAMultiheadAttention",
    "LoRAReport",
    "PrefixReport",
    "PrefixTuning",
    "Preset",
    "ScaledCrossAttention",
    "TuningReport",
    "__version__",
    "adapter_batch",
    "adapter_residual",
    "adapters_off",
    "available_backends",
    "bitfit",
    "cross_attention_residual",
    "diagnostics",
    "explain",
    "fuse",
    "inject_lora",
    "load_lora",
    "load_lora_state_dict",
    "load_tuned",
    "lora_linear",
    "lora_state_dict",
    "merge_adapters",
    "models",
    "param_groups",
    "preset",
    "preset_for",
    "projection_residual",
    "remove_adapter",
    "remove_lora",
    "save_lora",
    "save_tuned",
    "set_adapter",
    "tune",
    "tuning",
    "unfuse",
]
