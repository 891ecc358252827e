"""LoRA modules on layers of other packages, and hosts made to call the layers whose weights they read.

None of those packages is imported here: who holds one of their modules has imported it. A class on top of one of theirs
is made when it is first asked for, by its name in this module.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfused.lora.attention import LoRAProjections
from pyfused.lora.base import LoRAModule
from pyfused.lora.pairs import LoRASettings
from pyfused.surgery.bytecode import is_one_of, reads_weight
from pyfused.surgery.variants import Variant

if TYPE_CHECKING:
    from typing_extensions import Self

_CONV1D = "transformers.pytorch_utils", "Conv1D"
_PACKED_ATTENTION = "open_clip.transformer", "Attention"
# OpenAI's package and the one that took it over.
_ATTENTION_POOLS = (("open_clip.modified_resnet", "AttentionPool2d"), ("clip.model", "AttentionPool2d"))


def is_packed_attention(module: nn.Module) -> bool:
    """Whether ``module`` is open_clip's own attention, whose in_proj is a parameter of it."""
    return is_one_of(module, _PACKED_ATTENTION)


def wrapper(module: nn.Module) -> Any:
    """The LoRA class for a module of another package; None where there is none."""
    if is_one_of(module, _CONV1D):
        return __getattr__("LoRAConv1D")
    return __getattr__("LoRAPackedAttention") if is_packed_attention(module) else None


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _class(name)


@functools.cache
def _class(name: str) -> Any:
    mixin, (module, kind) = _CLASSES[name]
    base = getattr(sys.modules.get(module) or __import__(module, fromlist=[kind]), kind)
    # Pickles find it by its name here.
    members = {"base_class": base, "__module__": __name__, "__doc__": mixin.__doc__}
    return type(name, (mixin, base), members)


class _Conv1D(LoRAModule):
    """transformers' ``Conv1D``, a linear layer that holds W transposed, (K, N), with a low-rank update.

    ``lora_a`` is (R, K) and ``lora_b`` (N, R), as in `LoRALinear`. Made by `from_conv1d`.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    lora_a: nn.Parameter
    lora_b: nn.Parameter

    @classmethod
    def from_conv1d(
        cls,
        conv1d: nn.Module,
        rank: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        use_rslora: bool = False,
        lora_dtype: torch.dtype | None = None,
        freeze: bool = True,
    ) -> Self:
        """On ``conv1d``'s own parameters; settings and errors as those of `LoRALinear.from_linear`."""
        settings = LoRASettings(rank, alpha, dropout, use_rslora, lora_dtype)
        return cls._adopt_with_pair("LoRAConv1D.from_conv1d", conv1d, settings, freeze)

    def _pair_widths(self) -> dict[str, tuple[int, int]]:
        return {"": (self.weight.shape[1], self.weight.shape[0])}

    def _deltas(self) -> dict[str, Tensor]:
        return {"weight": self._delta().t()}

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if self._base_weights:
            self._begin_merged()
            return super().forward(x)
        return super().forward(x) if self._chosen == () else self._lora_linear(x, self.weight.t(), self.bias)


class _PackedAttention(LoRAProjections):
    """open_clip's own ``Attention`` (``block_type="custom"``) with low-rank updates on in_proj and out_proj.

    Names and shapes as in `LoRAMultiheadAttention`. Made by `from_attention`.
    """

    num_heads: int
    attn_drop: nn.Dropout
    ln_q: nn.Module
    ln_k: nn.Module
    ln_inner: nn.Module
    out_drop: nn.Module
    head_scale: Tensor | None

    @classmethod
    def from_attention(
        cls,
        attention: nn.Module,
        rank: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        qkv: str = "joint",
        use_rslora: bool = False,
        lora_dtype: torch.dtype | None = None,
        in_proj: bool = True,
        out_proj: bool = True,
        freeze: bool = True,
    ) -> Self:
        """On ``attention``'s own parameters; settings and errors as those of `LoRAMultiheadAttention.from_mha`.

        Raises:
            ValueError: also for ``scaled_cosine``, which open_clip's own forward cannot run.
        """
        caller = "LoRAPackedAttention.from_attention"
        if getattr(attention, "logit_scale", None) is not None:
            raise ValueError(f"{caller}: scaled_cosine must be False, got True")
        settings = LoRASettings(rank, alpha, dropout, use_rslora, lora_dtype)
        return cls._adapt(caller, attention, settings, qkv, in_proj, out_proj, freeze)

    @property
    def embed_dim(self) -> int:  # type: ignore[override]
        return int(self.in_proj_weight.shape[1])

    kdim = vdim = embed_dim
    _qkv_same_embed_dim = True

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(B, L, C) -> (B, L, C); ``attn_mask`` (L, L) or (B * num_heads, L, L), bool with True = ignore, or added."""
        if self._is_base():
            for part in self._parts():
                part._begin_merged()
            return super().forward(x, attn_mask)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self._project_packed(x))
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(attn_mask, float("-inf"))
            attn_mask = attn_mask.to(q.dtype)
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        dropout_p = self.attn_drop.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(self.ln_q(q), self.ln_k(k), v, attn_mask, dropout_p)
        if self.head_scale is not None:
            attended = attended * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(attended.transpose(1, 2).flatten(2))))

    def _project_packed(self, x: Tensor) -> list[Tensor]:
        if self.qkv == "split":
            return [self._project(x, part, part + 1) for part in range(3)]
        return list(self._project(x, 0, 3).chunk(3, dim=-1))


_CLASSES: dict[str, tuple[Any, tuple[str, str]]] = {
    "LoRAConv1D": (_Conv1D, _CONV1D),
    "LoRAPackedAttention": (_PackedAttention, _PACKED_ATTENTION),
}


# ---- hosts that read the weights of layers that they do not call


class CallingPool(Variant):
    """CLIP's ``AttentionPool2d`` with a forward that calls its four projections, whose weights the original reads."""

    _variant_prefix = "Calling"
    num_heads: int
    positional_embedding: nn.Parameter
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    c_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N): the attention of the mean over positions to all of them."""
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)
        tokens = tokens + self.positional_embedding.to(x.dtype)
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q_proj(tokens[:, :1]), self.k_proj(tokens), self.v_proj(tokens))
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.c_proj(attended.transpose(1, 2).flatten(1))


class CallingQKV(Variant):
    """timm's attention with its own switch on: qkv is called, and its bias added to what comes back."""

    _variant_prefix = "Calling"

    @property
    def qkv_bias_separate(self) -> bool:
        """timm's switch."""
        return True


def calling(host: nn.Module, name: str) -> type[Variant] | None:
    """What makes ``host`` call its layer ``name``, whose weight alone it may read; None where nothing is needed."""
    if is_one_of(host, *_ATTENTION_POOLS) and name in ("q_proj", "k_proj", "v_proj", "c_proj"):
        return CallingPool
    return CallingQKV if name == "qkv" and hasattr(host, "qkv_bias_separate") else None


def bypassed(host: nn.Module, name: str) -> str | None:
    """Why ``host``, as it is now, does not call its layer ``name``, whose weight alone it reads; None where it does."""
    if isinstance(host, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight and does not call it"
    # timm's attentions with a bias of their own read it, unless their switch says otherwise.
    switch = getattr(host, "qkv_bias_separate", None)
    own_bias = switch is False and name == "qkv" and getattr(host, "q_bias", None) is not None
    if own_bias or reads_weight(host, name):
        return f"{type(host).__name__} reads its weight and does not call it"
    return None
