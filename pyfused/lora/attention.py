"""``LoRAMultiheadAttention``: an ``nn.MultiheadAttention`` with low-rank updates on its projections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfused.lora.base import LoRAModule
from pyfused.lora.called_attention import CalledAttention, projection
from pyfused.lora.linear import LoRALinear
from pyfused.lora.pairs import DEFAULT, LoRASettings
from pyfused.ops.contract import checks

if TYPE_CHECKING:
    from typing_extensions import Self


class LoRAProjections(LoRAModule):
    """What LoRA attentions share: pairs on a packed in_proj, or on q, k and v each, and a `LoRALinear` as out_proj."""

    embed_dim: int
    kdim: Any
    vdim: Any
    _qkv_same_embed_dim: bool
    in_proj_weight: Any
    in_proj_bias: Any
    out_proj: Any
    qkv: str | None
    in_proj_lora_a: nn.Parameter
    in_proj_lora_b: nn.Parameter

    @classmethod
    def _adapt(
        cls, caller: str, mha: nn.Module, settings: LoRASettings, qkv: str, in_proj: bool, out_proj: bool, freeze: bool
    ) -> Self:
        checks.one_of(caller, "qkv", qkv, ("joint", "split"))
        checks.flag(caller, "in_proj", in_proj)
        checks.flag(caller, "out_proj", out_proj)
        if not (in_proj or out_proj):
            raise ValueError(f"{caller}: in_proj or out_proj must be True, got neither")
        module = cls._adopt(caller, mha, settings, freeze)
        module.qkv = qkv if in_proj else None
        if in_proj:
            module._check_joint(caller)
            module._add_pairs(DEFAULT, settings)
        if out_proj:
            module.register_module("out_proj", LoRALinear.from_linear(module.out_proj, *settings, freeze=False))
        if freeze:
            module._freeze_base()
        return module

    def _pair_widths(self) -> dict[str, tuple[int, int]]:
        width = self.embed_dim
        if self.qkv == "split":
            return {"q_proj_": (width, width), "k_proj_": (width, self.kdim), "v_proj_": (width, self.vdim)}
        return {} if self.qkv is None else {"in_proj_": (3 * width, width)}

    def lora_settings(self, adapter: str | None = None) -> dict[str, Any]:
        """As `LoRAModule.lora_settings`, with ``qkv``."""
        one, out = self._adapter if adapter is None else adapter, self.out_proj
        if one not in self.adapters and isinstance(out, LoRALinear):
            return out.lora_settings(adapter) | {"qkv": None}
        return super().lora_settings(one) | {"qkv": self.qkv}

    def _check_joint(self, caller: str) -> None:
        if self.qkv == "joint" and not self._qkv_same_embed_dim:
            raise ValueError(
                f"{caller}: qkv must be 'split' for separate projections (embed_dim {self.embed_dim}, kdim "
                f"{self.kdim}, vdim {self.vdim}), got 'joint'"
            )

    @staticmethod
    def _weight_names(base: Any) -> tuple[str, ...]:
        # open_clip's own attention has one width alone.
        if getattr(base, "_qkv_same_embed_dim", True):
            return ("in_proj_weight",)
        return "q_proj_weight", "k_proj_weight", "v_proj_weight"

    def _deltas(self) -> dict[str, Tensor]:
        if self.qkv is None:
            return {}
        if self.qkv == "joint":
            return {"in_proj_weight": self._delta("in_proj_")}
        deltas = [self._delta(prefix) for prefix in self._pair_widths()]
        if self._qkv_same_embed_dim:
            return {"in_proj_weight": torch.cat(deltas)}
        return dict(zip(self._weight_names(self), deltas, strict=True))

    @property
    def merged(self) -> bool:
        """Whether the low-rank terms that act now are part of their weights, one of them at least."""
        return self._is_base() and any(part._base_weights for part in self._parts())

    def _parts(self) -> list[LoRAModule]:
        return [self, self.out_proj] if isinstance(self.out_proj, LoRALinear) else [self]

    def to_base(self, merge: bool = True) -> nn.Module:
        """A plain attention; see `LoRAModule.to_base`."""
        module = super().to_base(merge)
        del module.qkv
        if isinstance(module.out_proj, LoRALinear):
            module.out_proj = module.out_proj.to_base(merge)
        return module

    def _project(self, x: Tensor, first: int, last: int) -> Tensor:
        """Projections ``first`` to ``last`` of (q, k, v): (..., K) -> (..., (last - first) * E)."""
        weight, bias = projection(self, first, last)
        if self.qkv is None or self._base_weights or self._chosen == ():
            self._begin_merged()
            return F.linear(x, weight, bias)
        if self._index is not None and x.dim() == 2:
            raise ValueError(
                f"{type(self).__name__}: inside {self._inside} an attention's input must have a batch, got shape "
                f"{tuple(x.shape)}"
            )
        if self.qkv == "split":
            return self._lora_linear(x, weight, bias, f"{'qkv'[first]}_proj_")
        return self._lora_linear(x, weight, bias, "in_proj_", slice(first * self.embed_dim, last * self.embed_dim))

    def _is_base(self) -> bool:
        """Whether nothing acts here or in out_proj that is not part of a weight."""
        if self.qkv is not None and self._chosen != () and not self._base_weights:
            return False
        out = self.out_proj
        return not isinstance(out, LoRALinear) or out._chosen == () or bool(out._base_weights)


class LoRAMultiheadAttention(LoRAProjections, CalledAttention):
    """``nn.MultiheadAttention`` whose in_proj and out_proj carry LoRA. Made by `from_mha`.

    Forward takes and returns what nn.MultiheadAttention's does, with the same parameter names (``in_proj_weight``,
    ``in_proj_bias``, ``out_proj.weight``, ...): its state dicts load with ``strict=False``, since they lack the LoRA
    parameters, and only those. Beside them, with E the embedding width:

    - joint: ``in_proj_lora_a`` (R, E), ``in_proj_lora_b`` (3E, R): one pair for q, k and v together;
    - split: ``q_proj_lora_a`` (R, E), ``q_proj_lora_b`` (E, R), and the same for k and v;
    - ``out_proj`` is a `LoRALinear`.

    ``nn.TransformerEncoderLayer`` never takes its inference fast path, which would read the weights and bypass this
    module. Nested tensors are refused: `inject_lora` makes an enclosing nn.TransformerEncoder go without them.

    Attributes:
        qkv: "joint", "split", or None where in_proj is not adapted.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
    """

    base_class = nn.MultiheadAttention

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("LoRAMultiheadAttention is made from an attention: from_mha(mha, rank, alpha, ...)")

    @classmethod
    def from_mha(
        cls,
        mha: nn.MultiheadAttention,
        rank: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        qkv: str = "joint",
        use_rslora: bool = False,
        lora_dtype: torch.dtype | None = None,
        in_proj: bool = True,
        out_proj: bool = True,
        freeze: bool = True,
    ) -> LoRAMultiheadAttention:
        """A LoRAMultiheadAttention on ``mha``'s own parameters, shared and, with ``freeze``, set not to train.

        Args:
            mha: any nn.MultiheadAttention.
            rank: R, 1 to 256, of each pair. Default 16.
            alpha: each low-rank term is scaled by alpha / R. Default 32.
            dropout: probability of zeroing an element of a low-rank term's input, in [0, 1). Default 0. The dropout of
                the attention weights stays mha's.
            qkv: "joint" (the default) or "split"; an mha with kdim or vdim of its own needs "split".
            use_rslora: scale by alpha / sqrt(R) instead. Default False.
            lora_dtype: of the LoRA parameters. Default: float32 for a float16 or bfloat16 mha, else mha's dtype.
            in_proj: whether q, k and v are adapted. Default True.
            out_proj: whether the output projection is adapted. Default True.
            freeze: whether mha's parameters stop training. Default True.

        Raises:
            TypeError: not an nn.MultiheadAttention, a subclass with a forward or other members of its own, or a
                ``lora_dtype`` that is neither mha's dtype nor float32 over 16 bits.
            ValueError: already a LoRA module, qkv="joint" on separate projections, nothing to adapt, or a setting out
                of range.
        """
        settings = LoRASettings(rank, alpha, dropout, use_rslora, lora_dtype)
        return cls._adapt("LoRAMultiheadAttention.from_mha", mha, settings, qkv, in_proj, out_proj, freeze)

    def _packed(self) -> bool:
        return super()._packed() and self.qkv != "split"

    def _as_torch(self) -> bool:
        base = self._is_base()
        if base:
            for part in self._parts():
                part._begin_merged()
        return base
