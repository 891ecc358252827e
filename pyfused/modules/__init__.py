"""``nn.Module``s that hold parameters and call an operator, LoRA's among them."""

from pyfused.lora.attention import LoRAMultiheadAttention
from pyfused.lora.base import LoRAModule
from pyfused.lora.conv import LoRAConv2d
from pyfused.lora.linear import LoRALinear
from pyfused.modules.adapter import BottleneckAdapter
from pyfused.modules.conv_lora import ConvLoRA
from pyfused.modules.cross_attention import ScaledCrossAttention

__all__ = [
    "BottleneckAdapter",
    "ConvLoRA",
    "LoRAConv2d",
    "LoRALinear",
    "LoRAModule",
    "LoRAMultiheadAttention",
    "ScaledCrossAttention",
]
