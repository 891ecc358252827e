"""The operators: contract, autograd and public function, one file each."""

from pyfused.ops.adapter_residual import adapter_residual
from pyfused.ops.cross_attention_residual import cross_attention_residual
from pyfused.ops.lora_linear import lora_linear
from pyfused.ops.projection_residual import projection_residual

__all__ = ["adapter_residual", "cross_attention_residual", "lora_linear", "projection_residual"]
