"""AA-CLIP: open_clip's ViT CLIP, frozen, with adapters, feature levels and cross-attention between its towers.

After frozen layer i of a tower, counted from 0, its stream goes through

    x <- CrossAttention(x, context)            i = 0, where a context is given:  x + w |x| / |c| c
    x <- (1 - w) x + w |x| / |a| a             the first layers:                 a = LeakyReLU(W x)

Stage 1 gives the patches to the text tower as context, stage 2 the prompts' tokens to the image tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from pyfused.models.aa_clip_parts import AdapterBlend, ImageCrossAttention, SimpleProj, TextCrossAttention, check_count
from pyfused.models.report import AdapterRow
from pyfused.modules import checkpoint, surgery
from pyfused.modules.cross_attention import ScaledCrossAttention
from pyfused.modules.table import table
from pyfused.ops import checks

# The entry of a checkpoint that holds the settings.
_SETTINGS = "adapter_settings"


class ImageFeatures(NamedTuple):
    """What `AdaptedCLIP.encode_image` gives.

    Attributes:
        pooled: image features, (B, embedding), not normalised.
        levels: patch features of each feature level, normalised by the tower's last norm and projected, each
            (B, patches, text width).
    """

    pooled: Tensor
    levels: list[Tensor]


class TextFeatures(NamedTuple):
    """What `AdaptedCLIP.encode_text` gives.

    Attributes:
        pooled: text features, (P, embedding), not normalised.
        tokens: the tokens' features after the tower's last norm, (P, L, text width).
    """

    pooled: Tensor
    tokens: Tensor


class AdaptedFeatures(NamedTuple):
    """What `AdaptedCLIP.feedback` gives.

    Attributes:
        levels: patch features of each feature level, (B, patches, text width).
        image: pooled image features, (B, embedding).
        text: text features, (P, embedding).
    """

    levels: list[Tensor]
    image: Tensor
    text: Tensor


@dataclass(frozen=True)
class AdaptedCLIPReport:
    """What an `AdaptedCLIP` trains.

    Attributes:
        rows: one `AdapterRow` per module; ``hidden`` is the output width of a blend and a projection, and H d of a
            cross-attention.
        trainable_parameters: elements of all parameters that train.
        total_parameters: elements of all parameters.
    """

    rows: tuple[AdapterRow, ...]
    trainable_parameters: int
    total_parameters: int

    @property
    def trainable_percent(self) -> float:
        """100 * trainable_parameters / total_parameters."""
        return 100.0 * self.trainable_parameters / max(self.total_parameters, 1)

    def __str__(self) -> str:
        rows = [("module", "kind", "C", "h", "parameters")]
        rows += [(row.path, row.kind, str(row.channels), str(row.hidden), f"{row.parameters:,}") for row in self.rows]
        counts = f"{self.trainable_parameters:,} of {self.total_parameters:,} ({self.trainable_percent:.2f} %)"
        return "\n".join([*table(rows, "<<>>>"), f"trainable parameters  {counts}"])


class AdaptedCLIP(nn.Module):
    """AA-CLIP on open_clip's ``model``, which it shares and freezes, and keeps in eval mode under ``train()``.

    What an earlier call of this package set to train in ``model`` (LoRA, say) goes on training.

    ``image_adapters`` and ``text_adapters`` (`AdapterBlend`) after the first layers of each tower, ``projections``
    (`SimpleProj`) from each feature level to the text width, ``image_cross_attention`` (`ImageCrossAttention`) and
    ``text_cross_attention`` (`TextCrossAttention`) after layer 0 and before adapter 0 train.

    Args:
        model: open_clip's ``CLIP`` or ``CustomTextCLIP`` with a ``VisionTransformer`` and a transformer of text, on any
            device.
        image_weight, text_weight: w of the adapters, Python numbers. Default 0.1.
        image_layers, text_layers: adapters in each tower, no more than it has layers. Default 6 and 3.
        feature_levels: layers of the image tower, counted from 1 and rising, whose patches are projected. Default
            None: four at the quarters of the depth, 6, 12, 18, 24 in a ViT-L/14.
        relu: whether the projections have a LeakyReLU. Default False.
        num_heads, head_dim: H and d of both cross-attentions. Default 8 and 96.
        cross_weight: w of both. Default 0.1.
        dtype: of the new parameters. Default: float32, for a float64 model float64.
        settings: further arguments of `ScaledCrossAttention`, for both: ``dropout`` (0.1), ``learnable_weight``, ...

    Raises:
        TypeError: a model of another kind, or an argument of the wrong type.
        ValueError: an argument is out of range.

    Source: Ma et al., "AA-CLIP: Enhancing Zero-shot Anomaly Detection via Anomaly-Aware CLIP", 2025. Its last text
    projection and its projection for whole images are not here: both features are pooled as CLIP's own.
    """

    def __init__(
        self,
        model: nn.Module,
        image_weight: float = 0.1,
        text_weight: float = 0.1,
        *,
        image_layers: int = 6,
        text_layers: int = 3,
        feature_levels: Sequence[int] | None = None,
        relu: bool = False,
        num_heads: int = 8,
        head_dim: int = 96,
        cross_weight: float = 0.1,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        _check_model(model)
        surgery.check_whole("AdaptedCLIP", model)
        visual, text = _towers(model)
        depth, channels = len(visual.transformer.resblocks), visual.class_embedding.shape[0]
        width = text.token_embedding.embedding_dim
        check_count("AdaptedCLIP", "image_layers", image_layers, 0)
        check_count("AdaptedCLIP", "text_layers", text_layers, 0)
        self.feature_levels = _check_levels(feature_levels, depth)
        weight = visual.class_embedding
        dtype = torch.promote_types(weight.dtype, torch.float32) if dtype is None else dtype
        where: dict[str, Any] = {"device": weight.device, "dtype": dtype}
        self.image_adapters = nn.ModuleList(
            AdapterBlend(channels, image_weight, **where) for _ in range(min(image_layers, depth))
        )
        self.text_adapters = nn.ModuleList(
            AdapterBlend(width, text_weight, **where) for _ in range(min(text_layers, len(text.transformer.resblocks)))
        )
        self.projections = nn.ModuleList(SimpleProj(channels, width, relu, **where) for _ in self.feature_levels)
        self.image_cross_attention = ImageCrossAttention(
            channels, width, num_heads, head_dim, cross_weight, **(settings | where)
        )
        self.text_cross_attention = TextCrossAttention(
            width, width, num_heads, head_dim, cross_weight, **(settings | where)
        )
        with surgery.all_or_nothing() as change:
            change.freeze(model, surgery.trained_before(model))
        self.clip = model.eval()

    def train(self, mode: bool = True) -> AdaptedCLIP:
        super().train(mode)
        self.clip.eval()
        return self

    def encode_image(self, images: Tensor, text_context: Tensor | None = None) -> ImageFeatures:
        """Stage 2.

        Args:
            images: (B, 3, H, W) of the size that the model has.
            text_context: (B or 1, T, text width), such as `encode_text`'s tokens of all prompts in one row,
                ``text.tokens.flatten(0, 1)[None]``. None (the default) leaves the cross-attention out.

        Returns:
            `ImageFeatures`.

        Raises:
            ValueError, TypeError: images or context of another shape, dtype or device.
        """
        visual, _ = _towers(self.clip)
        checks.tensor("AdaptedCLIP", "images", images)
        if images.dim() != 4 or images.shape[1:] != (3, *visual.image_size):
            height, across = visual.image_size
            raise ValueError(
                f"AdaptedCLIP: images must have shape (B, 3, {height}, {across}), got {tuple(images.shape)}"
            )
        x, levels = _stream(
            visual.transformer, visual._embeds(images), None, text_context, self.image_cross_attention,
            self.image_adapters, self.feature_levels,
        )  # fmt: skip
        patches = [
            project(visual.ln_post(level[:, 1:])) for project, level in zip(self.projections, levels, strict=True)
        ]
        pooled, _ = visual._pool(x)
        return ImageFeatures(pooled if visual.proj is None else pooled @ visual.proj, patches)

    def encode_text(self, tokens: Tensor, image_context: Tensor | None = None) -> TextFeatures:
        """Stage 1.

        Args:
            tokens: (P, L), token numbers of P prompts, L the model's context length.
            image_context: (any batch, T, text width), averaged over its batch, such as the mean of `encode_image`'s
                levels. None (the default) leaves the cross-attention out.

        Returns:
            `TextFeatures`.

        Raises:
            ValueError, TypeError: tokens or context of another shape, dtype or device.
        """
        _, text = _towers(self.clip)
        checks.tensor("AdaptedCLIP", "tokens", tokens)
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"AdaptedCLIP: tokens must have dtype torch.int64 or torch.int32, got {tokens.dtype}")
        if tokens.dim() != 2 or tokens.shape[1] != text.context_length:
            raise ValueError(
                f"AdaptedCLIP: tokens must have shape (P, {text.context_length}), got {tuple(tokens.shape)}"
            )
        if hasattr(text, "_embeds"):
            x, mask = text._embeds(tokens)
        else:
            dtype = text.transformer.get_cast_dtype()
            x, mask = text.token_embedding(tokens).to(dtype) + text.positional_embedding.to(dtype), text.attn_mask
        x, _ = _stream(text.transformer, x, mask, image_context, self.text_cross_attention, self.text_adapters)
        x = text.ln_final(x)
        pooled = x[torch.arange(len(x), device=x.device), _ends(text, tokens)]
        if isinstance(text.text_projection, nn.Linear):
            return TextFeatures(text.text_projection(pooled), x)
        return TextFeatures(pooled if text.text_projection is None else pooled @ text.text_projection, x)

    def feedback(self, images: Tensor, tokens: Tensor, rounds: int = 1) -> AdaptedFeatures:
        """Text given the images, then the images given that text, ``rounds`` times; gradients go through all of it.

        The first text sees the images as they are without a context. Text's context is the mean of the levels, the
        images' is the tokens of all prompts. To train one stage alone, call `encode_text` or `encode_image` with a
        context that is detached.

        Args:
            images: (B, 3, H, W).
            tokens: (P, L).
            rounds: at least 1, the default.

        Returns:
            `AdaptedFeatures` of the last round.

        Raises:
            ValueError, TypeError: images or tokens of another shape or dtype, or rounds out of range.
        """
        check_count("AdaptedCLIP.feedback", "rounds", rounds, 1)
        image = self.encode_image(images)
        for _ in range(rounds):
            text = self.encode_text(tokens, torch.stack(image.levels).mean(0))
            image = self.encode_image(images, text.tokens.flatten(0, 1)[None])
        return AdaptedFeatures(image.levels, image.pooled, text.pooled)

    def forward(self, images: Tensor, tokens: Tensor, rounds: int = 1) -> AdaptedFeatures:
        """`feedback`."""
        return self.feedback(images, tokens, rounds)

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """All parameters but the frozen model's, by their full names, and their settings: an adapter checkpoint.

        The tensors are detached and share memory with the model. "adapter_settings" is JSON in a tensor of bytes: the
        settings of each module, and the feature levels.
        """
        return {**self._own_parameters(), _SETTINGS: checkpoint.packed_settings(self._settings())}

    def load_adapter_state_dict(self, state: Mapping[str, Tensor], check_settings: bool = True) -> None:
        """Copy a checkpoint, as `adapter_state_dict` gives it, into this model.

        All or nothing: when this raises, the model is as it was.

        Args:
            state: the checkpoint.
            check_settings: whether the settings of the checkpoint must be there. Where they are there they must be the
                model's in either case. Default True.

        Raises:
            TypeError: a tensor is not a dense floating one.
            ValueError: names are missing or unknown, or shapes or settings differ, or settings are missing.
        """
        checkpoint.load(
            "load_adapter_state_dict", self, self._own_parameters(), self._settings(), _SETTINGS, state, check_settings
        )

    def _own_parameters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.named_parameters() if not name.startswith("clip.")}

    def _settings(self) -> dict[str, dict[str, Any]]:
        kinds = AdapterBlend | SimpleProj | ScaledCrossAttention
        settings = {
            path: module.settings()
            for path, module in self.named_modules()
            if not path.startswith("clip.") and isinstance(module, kinds)
        }
        return {"": {"feature_levels": list(self.feature_levels)}, **settings}

    def report(self) -> AdaptedCLIPReport:
        """What trains, counted; ``print`` it."""
        rows = []
        for path, module in self.named_modules():
            if isinstance(module, AdapterBlend):
                channels = hidden = module.channels
            elif isinstance(module, SimpleProj):
                channels, hidden = module.in_features, module.out_features
            elif isinstance(module, ScaledCrossAttention):
                hidden, channels = module.q_weight.shape
            else:
                continue
            rows.append(AdapterRow(path, type(module).__name__, channels, hidden, _size(module)))
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return AdaptedCLIPReport(tuple(rows), trained, _size(self))


# ---- the towers


def _towers(model: nn.Module) -> tuple[Any, Any]:
    """(image tower, text tower); open_clip's ``CLIP`` is its own text tower."""
    return getattr(model, "visual", None), getattr(model, "text", model)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"AdaptedCLIP: model must be an nn.Module, got {type(model).__name__}")
    visual, text = _towers(model)
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


def _text_pooling(text: Any) -> str:
    return text.text_pool_type if hasattr(text, "text_pool_type") else text.pool_type


def _ends(text: Any, tokens: Tensor) -> Tensor:
    """Which token stands for each prompt, (P,)."""
    kind = _text_pooling(text)
    if kind in ("first", "last"):
        return tokens.new_full((len(tokens),), 0 if kind == "first" else tokens.shape[1] - 1)
    if kind == "eos":
        tokens = (tokens == (text.text_eos_id if hasattr(text, "text_eos_id") else text.eos_id)).int()
    return tokens.argmax(-1)


def _stream(
    transformer: Any,
    x: Tensor,
    mask: Tensor | None,
    context: Tensor | None,
    cross_attention: nn.Module,
    adapters: nn.ModuleList,
    levels: Sequence[int] = (),
) -> tuple[Tensor, list[Tensor]]:
    """x (B, L, C) through a tower: what leaves its last layer, and what leaves the layers in ``levels``."""
    kept = []
    for index, block in enumerate(transformer.resblocks):
        x = x if transformer.batch_first else x.transpose(0, 1)
        if transformer.grad_checkpointing:
            x = recompute(block, x, None, None, mask, use_reentrant=False)
        else:
            x = block(x, attn_mask=mask)
        x = x if transformer.batch_first else x.transpose(0, 1)
        if index == 0 and context is not None:
            x = cross_attention(x, context)
        if index < len(adapters):
            x = adapters[index](x)
        if index + 1 in levels:
            kept.append(x)
    return x, kept


# ---- checks and helpers


def _check_levels(levels: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    if levels is None:
        return tuple(sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3, 4)}))
    levels = tuple(levels)
    for level in levels:
        check_count("AdaptedCLIP", "feature_levels", level, 1)
    if not levels or max(levels) > depth or list(levels) != sorted(set(levels)):
        raise ValueError(
            f"AdaptedCLIP: feature_levels must be rising layer numbers from 1 to {depth}, at least one, got {levels}"
        )
    return levels


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
