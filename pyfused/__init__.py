"""Fused Triton and CUDA kernels for parameter-efficient fine-tuning, as drop-in PyTorch modules."""

from pyfused.backend import available_backends
from pyfused.ops import lora_linear

__version__ = "0.1.0"

__all__ = ["__version__", "available_backends", "lora_linear"]
