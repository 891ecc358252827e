"""The towers of open_clip's models as `AdaptedCLIP` walks through them, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from pyfused.modules.cross_attention import Prepared
from pyfused.ops.contract import checks
from pyfused.surgery.refusals import check_module


def towers(model: nn.Module) -> tuple[Any, Any]:
    """(image tower, text tower); open_clip's ``CLIP`` is its own text tower."""
    return getattr(model, "visual", None), getattr(model, "text", model)


def check_clip(model: nn.Module) -> None:
    """Refuses what is not open_clip's CLIP on two plain transformers."""
    check_module("AdaptedCLIP", model)
    visual, text = towers(model)
    for tower, needed in (
        (visual, ("class_embedding", "transformer", "_embeds", "_pool", "ln_post", "proj", "image_size")),
        (text, ("token_embedding", "transformer", "ln_final", "text_projection", "context_length")),
    ):
        missing = [name for name in needed if not hasattr(tower, name)]
        if missing:
            raise TypeError(
                "AdaptedCLIP: model must be open_clip's CLIP or CustomTextCLIP with a VisionTransformer and a "
                f"TextTransformer, got {type(model).__name__}, whose {type(tower).__name__} has no {', '.join(missing)}"
            )
    if visual.attn_pool is not None or getattr(text, "cls_emb", None) is not None:
        raise TypeError(
            "AdaptedCLIP: model must have neither attentional pooling nor a class token of text, got CoCa's"
        )
    checks.one_of("AdaptedCLIP", "the text pooling of model", _text_pooling(text), ("argmax", "eos", "first", "last"))


def check_levels(levels: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """The feature levels of an image tower of ``depth`` layers."""
    if levels is None:
        return tuple(sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3, 4)}))
    levels = tuple(levels)
    for level in levels:
        checks.integer("AdaptedCLIP", "feature_levels", level, 1)
    if not levels or max(levels) > depth or list(levels) != sorted(set(levels)):
        raise ValueError(
            f"AdaptedCLIP: feature_levels must be rising layer numbers from 1 to {depth}, at least one, got {levels}"
        )
    return levels


def embed_images(visual: Any, images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1 + patches, C), checked."""
    checks.tensor("AdaptedCLIP", "images", images)
    if images.dim() != 4 or images.shape[1:] != (3, *visual.image_size):
        height, across = visual.image_size
        raise ValueError(f"AdaptedCLIP: images must have shape (B, 3, {height}, {across}), got {tuple(images.shape)}")
    return visual._embeds(images)


def embed_tokens(text: Any, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """(P, L) -> ((P, L, width), attention mask), checked."""
    checks.tensor("AdaptedCLIP", "tokens", tokens)
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"AdaptedCLIP: tokens must have dtype torch.int64 or torch.int32, got {tokens.dtype}")
    if tokens.dim() != 2 or tokens.shape[1] != text.context_length:
        raise ValueError(f"AdaptedCLIP: tokens must have shape (P, {text.context_length}), got {tuple(tokens.shape)}")
    if hasattr(text, "_embeds"):
        return text._embeds(tokens)
    dtype = text.transformer.get_cast_dtype()
    return text.token_embedding(tokens).to(dtype) + text.positional_embedding.to(dtype), text.attn_mask


def pool_image(visual: Any, x: Tensor) -> Tensor:
    """The tower's own feature of what leaves its last layer, (B, embedding)."""
    pooled, _ = visual._pool(x)
    return pooled if visual.proj is None else pooled @ visual.proj


def _text_pooling(text: Any) -> str:
    return text.text_pool_type if hasattr(text, "text_pool_type") else text.pool_type


def ends(text: Any, tokens: Tensor) -> Tensor:
    """Which token stands for each prompt, (P,)."""
    kind = _text_pooling(text)
    if kind in ("first", "last"):
        return tokens.new_full((len(tokens),), 0 if kind == "first" else tokens.shape[1] - 1)
    if kind == "eos":
        tokens = (tokens == (text.text_eos_id if hasattr(text, "text_eos_id") else text.eos_id)).int()
    return tokens.argmax(-1)


def stream(
    transformer: Any,
    x: Tensor,
    mask: Tensor | None = None,
    context: Tensor | Prepared | None = None,
    cross_attention: nn.Module | None = None,
    adapters: Iterable[nn.Module] = (),
    levels: Sequence[int] = (),
    depth: int | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """x (B, L, C) through ``depth`` layers, all by default: what leaves the last, and what leaves those in ``levels``.

    Behind layer 0 stands the cross-attention, where there is a context, and behind the first layers an adapter each.
    """
    adapters, kept = list(adapters), []
    for index, block in enumerate(transformer.resblocks[:depth]):
        x = x if transformer.batch_first else x.transpose(0, 1)
        if transformer.grad_checkpointing:
            x = recompute(block, x, None, None, mask, use_reentrant=False)
        else:
            x = block(x, attn_mask=mask)
        x = x if transformer.batch_first else x.transpose(0, 1)
        if index == 0 and context is not None:
            assert cross_attention is not None
            given = {"prepared" if isinstance(context, Prepared) else "context": context}
            x = cross_attention(x, **given)
        if index < len(adapters):
            x = adapters[index](x)
        if index + 1 in levels:
            kept.append(x)
    return x, kept
