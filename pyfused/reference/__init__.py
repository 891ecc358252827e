"""The obvious PyTorch of every operator: what each backend must equal. Never optimised."""

from pyfused.reference.adapter import adapter_residual
from pyfused.reference.cross_attention import cross_attention_residual, projection_residual
from pyfused.reference.linear import lora_linear
from pyfused.reference.philox import dropout_keep_mask

__all__ = [
    "adapter_residual",
    "cross_attention_residual",
    "dropout_keep_mask",
    "lora_linear",
    "projection_residual",
]
