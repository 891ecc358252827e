"""The operators, one file each: contract, autograd, limits, plans and the public function."""

OPERATORS = ("adapter_residual", "cross_attention_residual", "lora_linear", "projection_residual")
