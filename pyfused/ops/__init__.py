"""The operators: contract, autograd and public function, one file each."""

from pyfused.ops.adapter_residual import adapter_residual
from pyfused.ops.lora_linear import lora_linear

__all__ = ["adapter_residual", "lora_linear"]
