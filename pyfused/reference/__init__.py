"""The obvious PyTorch of every operator: what each backend must equal. Never optimised."""

from pyfused.reference.adapter_residual import adapter_residual
from pyfused.reference.lora_linear import lora_linear
from pyfused.reference.philox import dropout_keep_mask

__all__ = ["adapter_residual", "dropout_keep_mask", "lora_linear"]
