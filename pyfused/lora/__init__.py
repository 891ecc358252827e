"""LoRA: modules that are the module they adapt, and how a model gets, keeps and loses them."""
