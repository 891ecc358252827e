"""The operators: contract, autograd and public function, one file each."""

from pyfused.ops.lora_linear import lora_linear

__all__ = ["lora_linear"]
