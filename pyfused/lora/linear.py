"""``LoRALinear``: an ``nn.Linear`` with a low-rank update."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyfused.lora.base import LoRAModule
from pyfused.lora.pairs import DEFAULT, LoRASettings, check_lora_settings
from pyfused.ops.lora_linear import lora_linear


class LoRALinear(LoRAModule, nn.Linear):
    """``y = x W^T + b + s (drop(x) A^T) B^T`` with W (N, K) and b (N,) frozen, A (R, K) and B (N, R) trained.

    A starts Kaiming-uniform and B zero, so that the module starts as its base. It is an ``nn.Linear``, with parameters
    ``weight`` and ``bias`` under their names, beside ``lora_a`` and ``lora_b``.

    Args:
        in_features: K.
        out_features: N.
        rank: R, 1 to 256. Default 16.
        alpha: the low-rank term is scaled by alpha / R. Default 32.
        dropout: probability of zeroing an element of the low-rank term's input, in [0, 1). Default 0.
        bias: whether there is a b. Default True.
        use_rslora: scale by alpha / sqrt(R) instead (Kalajdzievski, "A Rank Stabilization Scaling Factor for
            Fine-Tuning with LoRA", 2023). Default False.
        device: of all parameters. Default torch's.
        dtype: of W and b. Default torch's.
        lora_dtype: of A and B. Default: float32 for a float16 or bfloat16 W, else W's.

    Raises:
        TypeError: a setting has the wrong type, or ``lora_dtype`` is neither W's dtype nor float32 over 16 bits.
        ValueError: a setting is out of range.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
    """

    base_class = nn.Linear
    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        lora_dtype: torch.dtype | None = None,
    ) -> None:
        check_lora_settings("LoRALinear", rank, alpha, dropout, lora_dtype, use_rslora=use_rslora, bias=bias)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        settings = LoRASettings(rank, alpha, dropout, use_rslora, lora_dtype)
        self._configure(settings, nn.Linear)
        self._add_pairs(DEFAULT, settings)
        self._freeze_base()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        use_rslora: bool = False,
        lora_dtype: torch.dtype | None = None,
        freeze: bool = True,
    ) -> LoRALinear:
        """A LoRALinear on ``linear``'s own parameters, which it shares and, with ``freeze``, sets not to train.

        Hooks, mode, device and any further attributes are those of ``linear``; settings as for the class.

        Raises:
            TypeError: not an nn.Linear, a subclass with a forward or other members of its own (a quantised one, say),
                or a ``lora_dtype`` that does not fit.
            ValueError: already a LoRA module, a weight that is parametrized or without elements, or a setting out of
                range.
        """
        settings = LoRASettings(rank, alpha, dropout, use_rslora, lora_dtype)
        return cls._adopt_with_pair("LoRALinear.from_linear", linear, settings, freeze)

    def _pair_widths(self) -> dict[str, tuple[int, int]]:
        return {"": (self.out_features, self.in_features)}

    def _deltas(self) -> dict[str, Tensor]:
        return {"weight": self._delta()}

    def reset_parameters(self) -> None:
        """Draw W, b, A and B anew, as deferred initialisation asks of every module."""
        super().reset_parameters()
        # nn.Linear's constructor calls this before A and B exist.
        if "lora_a" in self._parameters:
            self.reset_lora_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if self._base_weights:
            self._begin_merged()
            return super().forward(input)
        if self._shared_input is not None:
            y = self._shared_input.output(self, input)
            if y is not None:
                return y
        if self._chosen is not None:
            return self._lora_linear(input, self.weight, self.bias) if self._chosen else super().forward(input)
        # Not by the base class: the most frequent call has one step less.
        return lora_linear(
            input, self.weight, self.lora_a, self.lora_b, self.bias,
            scaling=self.scaling, dropout_p=self.lora_dropout, training=self.training,
        )  # fmt: skip
