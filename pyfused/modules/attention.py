"""``LoRAMultiheadAttention``: an ``nn.MultiheadAttention`` with low-rank updates on its projections."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfused.modules.linear import LoRALinear
from pyfused.modules.lora import LoRAModule
from pyfused.ops import checks
from pyfused.ops.lora_linear import lora_linear

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
        cls,
        caller: str,
        attention: nn.Module,
        rank: int,
        alpha: float,
        dropout: float,
        qkv: str,
        use_rslora: bool,
        lora_dtype: torch.dtype | None,
        in_proj: bool,
        out_proj: bool,
        freeze: bool,
    ) -> Self:
        checks.one_of(caller, "qkv", qkv, ("joint", "split"))
        checks.flag(caller, "in_proj", in_proj)
        checks.flag(caller, "out_proj", out_proj)
        if not (in_proj or out_proj):
            raise ValueError(f"{caller}: in_proj or out_proj must be True, got neither")
        module = cls._adopt(caller, attention, rank, alpha, dropout, use_rslora, lora_dtype, freeze)
        module.qkv = qkv if in_proj else None
        if in_proj:
            module._add_in_proj(caller, lora_dtype)
        if out_proj:
            adapted = LoRALinear.from_linear(
                module.out_proj, rank, alpha, dropout, use_rslora, lora_dtype, freeze=False
            )
            module.register_module("out_proj", adapted)
        if freeze:
            module._freeze_base()
        return module

    def _pair_prefixes(self) -> tuple[str, ...]:
        if self.qkv == "split":
            return "q_proj_", "k_proj_", "v_proj_"
        return () if self.qkv is None else ("in_proj_",)

    def lora_settings(self) -> dict[str, Any]:
        """As `LoRAModule.lora_settings`, with ``qkv``."""
        return super().lora_settings() | {"qkv": self.qkv}

    def _add_in_proj(self, caller: str, lora_dtype: torch.dtype | None) -> None:
        width = self.embed_dim
        if self.qkv == "split":
            like = self.get_parameter(self._weight_names(self)[0])
            for letter, in_features in zip("qkv", (width, self.kdim, self.vdim), strict=True):
                self._add_pair(f"{letter}_proj_", width, in_features, like, lora_dtype)
        elif self._qkv_same_embed_dim:
            self._add_pair("in_proj_", 3 * width, width, self.in_proj_weight, lora_dtype)
        else:
            raise ValueError(
                f"{caller}: qkv must be 'split' for separate projections (embed_dim {width}, kdim {self.kdim}, "
                f"vdim {self.vdim}), got 'joint'"
            )
        self.reset_lora_parameters()

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
            return {"in_proj_weight": self._delta(self.in_proj_lora_a, self.in_proj_lora_b)}
        deltas = [
            self._delta(getattr(self, f"{letter}_proj_lora_a"), getattr(self, f"{letter}_proj_lora_b"))
            for letter in "qkv"
        ]
        if self._qkv_same_embed_dim:
            return {"in_proj_weight": torch.cat(deltas)}
        return dict(zip(self._weight_names(self), deltas, strict=True))

    @property
    def merged(self) -> bool:
        """Whether every low-rank term now is part of its weight."""
        own = self.qkv is None or bool(self._base_weights)
        return own and (not isinstance(self.out_proj, LoRALinear) or self.out_proj.merged)

    def refuse_replaced_forward(self, doing: str) -> None:
        """As `LoRAModule.refuse_replaced_forward`, of out_proj too."""
        super().refuse_replaced_forward(doing)
        if isinstance(self.out_proj, LoRALinear):
            self.out_proj.refuse_replaced_forward(doing)

    def refuse_computed(self, doing: str) -> None:
        """As `LoRAModule.refuse_computed`, of out_proj too."""
        super().refuse_computed(doing)
        if isinstance(self.out_proj, LoRALinear):
            self.out_proj.refuse_computed(doing)

    def merge(self) -> None:
        """Merge in_proj and out_proj; see `LoRAModule.merge`."""
        super().merge()
        if isinstance(self.out_proj, LoRALinear):
            self.out_proj.merge()

    def unmerge(self) -> None:
        """Put the base weights of in_proj and out_proj back, bit for bit."""
        super().unmerge()
        if isinstance(self.out_proj, LoRALinear):
            self.out_proj.unmerge()

    def to_base(self, merge: bool = True) -> nn.Module:
        """A plain attention; see `LoRAModule.to_base`."""
        module = super().to_base(merge)
        del module.qkv
        if isinstance(module.out_proj, LoRALinear):
            module.out_proj = module.out_proj.to_base(merge)
        return module

    def _project(self, x: Tensor, first: int, last: int) -> Tensor:
        """Projections ``first`` to ``last`` of (q, k, v): (..., K) -> (..., (last - first) * E)."""
        rows = slice(first * self.embed_dim, last * self.embed_dim)
        whole = last - first == 3
        letter = "qkv"[first]
        bias = self.in_proj_bias if whole or self.in_proj_bias is None else self.in_proj_bias[rows]
        if not self._qkv_same_embed_dim:
            weight = getattr(self, f"{letter}_proj_weight")
        else:
            weight = self.in_proj_weight if whole else self.in_proj_weight[rows]
        if self.qkv is None or self._base_weights:
            self._refuse_merged_training()
            return F.linear(x, weight, bias)
        if self.qkv == "joint":
            lora_a, lora_b = self.in_proj_lora_a, self.in_proj_lora_b if whole else self.in_proj_lora_b[rows]
        else:
            lora_a, lora_b = getattr(self, f"{letter}_proj_lora_a"), getattr(self, f"{letter}_proj_lora_b")
        return lora_linear(
            x,
            weight,
            lora_a,
            lora_b,
            bias,
            scaling=self.scaling,
            dropout_p=self.lora_dropout,
            training=self.training,
        )


class LoRAMultiheadAttention(LoRAProjections, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose in_proj and out_proj carry LoRA. Made by `from_mha`.

    Forward takes and returns what nn.MultiheadAttention's does, with the same parameter names (``in_proj_weight``,
    ``in_proj_bias``, ``out_proj.weight``, ...): its state dicts load with ``strict=False``, since they lack the LoRA
    parameters, and only those. Beside them, with E the embedding width:

    - joint: ``in_proj_lora_a`` (R, E), ``in_proj_lora_b`` (3E, R): one pair for q, k and v together;
    - split: ``q_proj_lora_a`` (R, E), ``q_proj_lora_b`` (E, R), and the same for k and v;
    - ``out_proj`` is a `LoRALinear`.

    ``nn.TransformerEncoderLayer`` never takes its inference fast path, which would read the weights and bypass this
    module. Nested tensors are refused: `inject_lora` sets ``use_nested_tensor = False`` on an enclosing
    nn.TransformerEncoder.

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
        return cls._adapt(
            "LoRAMultiheadAttention.from_mha",
            mha,
            rank,
            alpha,
            dropout,
            qkv,
            use_rslora,
            lora_dtype,
            in_proj,
            out_proj,
            freeze,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention, as `torch.nn.MultiheadAttention.forward` documents it.

        Args:
            query: (L, B, E), (B, L, E) when batch_first, or (L, E) without a batch.
            key: (S, B, kdim), (B, S, kdim) or (S, kdim).
            value: (S, B, vdim), (B, S, vdim) or (S, vdim).
            key_padding_mask: (B, S), or (S,) without a batch: bool with True = ignore, or floating and added.
            need_weights: whether the attention weights are returned. Default True; False is faster.
            attn_mask: (L, S) or (B * num_heads, L, S): bool with True = ignore, or floating and added.
            average_attn_weights: mean over heads of the returned weights. Default True.
            is_causal: a promise that attn_mask is causal. Default False.

        Returns:
            The output, of query's shape, and the weights (B, L, S), (B, num_heads, L, S) when not averaged, without B
            for unbatched input, or None.

        Raises:
            ValueError: shapes do not fit one another, or is_causal without attn_mask.
            TypeError: a mask neither bool nor floating, or a nested tensor.
            RuntimeError: merged, and asked to train.
        """
        if self.merged:
            self._refuse_merged_training()
            if isinstance(self.out_proj, LoRALinear):
                self.out_proj._refuse_merged_training()
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        self._check_inputs(query, key, value, key_padding_mask, attn_mask, is_causal)
        batched = query.dim() == 3
        q, k, v = self._in_project(query, key, value)
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        to_heads = (0, 2, 1, 3) if self.batch_first or not batched else (1, 2, 0, 3)
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).permute(to_heads) for t in (q, k, v))
        k, v = self._extend(k, self.bias_k), self._extend(v, self.bias_v)

        # Where nothing else masks, scaled_dot_product_attention knows the causal mask by itself.
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = self._additive_mask(None if is_causal else attn_mask, key_padding_mask, q)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout_p)
            attended = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)
        from_heads = (0, 2, 1, 3) if self.batch_first or not batched else (2, 0, 1, 3)
        attended = attended.permute(from_heads).flatten(2)
        if not batched:
            attended, weights = attended.squeeze(0), None if weights is None else weights.squeeze(0)
        return self.out_proj(attended), weights

    def _in_project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k and v, (..., E) each, with one product for inputs that are one tensor."""
        inputs = query, key, value
        spans = [(0, 1), (1, 2), (2, 3)]
        if self._qkv_same_embed_dim and self.qkv != "split" and key is value:
            spans = [(0, 3)] if query is key else [(0, 1), (1, 3)]
        projected: list[Tensor] = []
        for first, last in spans:
            projected += self._project(inputs[first], first, last).chunk(last - first, dim=-1)
        return projected

    def _extend(self, t: Tensor, bias: Tensor | None) -> Tensor:
        """(B, H, S, d) with the learned position bias_k or bias_v, and the zero one, after the last key."""
        if bias is not None:
            bias = bias.to(t.dtype).view(1, self.num_heads, 1, self.head_dim)
            t = torch.cat([t, bias.expand(t.shape[0], -1, -1, -1)], dim=2)
        return F.pad(t, (0, 0, 0, 1)) if self.add_zero_attn else t

    def _additive_mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """The sum of both masks in q's dtype, broadcastable to (B, H, L, S + added positions)."""
        masks = []
        if attn_mask is not None:
            masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, self.num_heads)))
        if key_padding_mask is not None:
            masks.append(key_padding_mask[:, None, None, :])
        added = (self.bias_k is not None) + self.add_zero_attn
        total = None
        for mask in masks:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
            mask = F.pad(mask.to(q.dtype), (0, added)) if added else mask.to(q.dtype)
            total = mask if total is None else total + mask
        return total

    def _check_inputs(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        name = "LoRAMultiheadAttention"
        for argument, tensor in (("query", query), ("key", key), ("value", value)):
            checks.tensor(name, argument, tensor)
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            raise ValueError(
                f"{name}: query, key and value must all have 3 dimensions, or 2 without a batch, got shapes "
                f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
            )
        for argument, tensor, width in (
            ("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim),
        ):  # fmt: skip
            if tensor.shape[-1] != width:
                raise ValueError(f"{name}: {argument} must have width {width}, got shape {tuple(tensor.shape)}")
        if query.dim() == 2:
            batch, length, source = None, query.shape[0], key.shape[0]
            same_batch = True
        else:
            of_batch, of_length = (0, 1) if self.batch_first else (1, 0)
            batch, length, source = query.shape[of_batch], query.shape[of_length], key.shape[of_length]
            same_batch = key.shape[of_batch] == batch
        if value.shape[:-1] != key.shape[:-1] or not same_batch:
            raise ValueError(
                f"{name}: key and value must have one length, and query's batch, got shapes {tuple(query.shape)}, "
                f"{tuple(key.shape)}, {tuple(value.shape)}"
            )
        if is_causal and attn_mask is None:
            raise ValueError(f"{name}: is_causal is a hint about attn_mask and needs one, got attn_mask=None")
        per_head = ((1 if batch is None else batch) * self.num_heads, length, source)
        _check_mask("attn_mask", attn_mask, (length, source), per_head)
        _check_mask("key_padding_mask", key_padding_mask, (source,) if batch is None else (batch, source))


def _check_mask(argument: str, mask: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if mask is None:
        return
    name = "LoRAMultiheadAttention"
    checks.tensor(name, argument, mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: {argument} must be bool or floating, got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{name}: {argument} must have shape {expected}, got {tuple(mask.shape)}")
