"""``nn.Module``s that hold parameters and call an operator."""

from pyfused.modules.adapter import BottleneckAdapter
from pyfused.modules.attention import LoRAMultiheadAttention
from pyfused.modules.conv import LoRAConv2d
from pyfused.modules.conv_lora import ConvLoRA
from pyfused.modules.cross_attention import ScaledCrossAttention
from pyfused.modules.linear import LoRALinear
from pyfused.modules.lora import LoRAModule

__all__ = [
    "BottleneckAdapter",
    "ConvLoRA",
    "LoRAConv2d",
    "LoRALinear",
    "LoRAModule",
    "LoRAMultiheadAttention",
    "ScaledCrossAttention",
]
