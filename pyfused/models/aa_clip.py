"""AA-CLIP: open_clip's ViT CLIP, frozen, with adapters, feature levels and cross-attention between its towers.

After frozen layer i of a tower, counted from 0, its stream goes through

    x <- CrossAttention(x, context)            i = 0, where a context is given:  x + w |x| / |c| c
    x <- (1 - w) x + w |x| / |a| a             the first layers:                 a = LeakyReLU(W x)

Stage 1 gives the images' patches to the text tower as context (`AdaptedCLIP.image_context`), stage 2 the prompts'
tokens to the image tower (`AdaptedCLIP.text_context`). Losses, maps and scores are in `pyfused.models.aa_clip_maps`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfused.models.aa_clip_parts import AdapterBlend, ImageCrossAttention, SimpleProj, TextCrossAttention
from pyfused.models.aa_clip_results import AdaptedCLIPReport, AdaptedFeatures, ImageFeatures, TextFeatures
from pyfused.models.aa_clip_towers import (
    check_clip,
    check_levels,
    embed_images,
    embed_tokens,
    ends,
    pool_image,
    stream,
    towers,
)
from pyfused.modules.cross_attention import Prepared, ScaledCrossAttention
from pyfused.ops.contract import checks
from pyfused.surgery import checkpoint
from pyfused.surgery.change import all_or_nothing
from pyfused.surgery.refusals import check_model

# The entry of a checkpoint that holds the settings.
_SETTINGS = "adapter_settings"
# Stage -> its own modules; the cross-attention is apart, for the base model has none.
_ADAPTERS = {1: ("text_adapters", "text_projection"), 2: ("image_adapters", "projections", "detection_projection")}
_CROSS = {1: "text_cross_attention", 2: "image_cross_attention"}
_STAGES = (1, 2)


class AdaptedCLIP(nn.Module):
    """AA-CLIP on open_clip's ``model``, which it shares and freezes, and keeps in eval mode under ``train()``.

    What an earlier call of this package set to train in ``model`` (LoRA, say) goes on training.

    Of stage 1: ``text_adapters`` (`AdapterBlend`) after the first layers, ``text_projection`` (`SimpleProj` with its
    LeakyReLU) in place of the tower's own, ``text_cross_attention`` (`TextCrossAttention`) after layer 0 and before
    adapter 0. Of stage 2: ``image_adapters``, ``projections`` (`SimpleProj`) from each feature level to the text width,
    ``detection_projection`` beside the last of them, and ``image_cross_attention`` (`ImageCrossAttention`). All train;
    `set_stage` chooses. Without a context, and so without cross-attention, it is the base model.

    Args:
        model: open_clip's ``CLIP`` or ``CustomTextCLIP`` with a ``VisionTransformer`` and a transformer of text, on any
            device.
        image_weight, text_weight: w of the adapters, Python numbers. Default 0.1.
        image_layers, text_layers: adapters in each tower, no more than it has layers. Default 6 and 3.
        feature_levels: layers of the image tower, counted from 1 and rising, whose patches are projected. Default
            None: four at the quarters of the depth, 6, 12, 18, 24 in a ViT-L/14.
        relu: whether the image tower's projections have a LeakyReLU. Default False.
        num_heads, head_dim: H and d of both cross-attentions. Default 8 and 96.
        image_cross, text_cross: further arguments of one of them, by their names in `ScaledCrossAttention`: ``weight``
            (0.1), ``learnable_weight``, ``zero_init``, for text ``context_reduce``, ... Default None: as they are.
        dtype: of the new parameters. Default: float32, for a float64 model float64.
        settings: further arguments for both: ``dropout`` (0.1), ... Those of one go before.

    Raises:
        TypeError: a model of another kind, or an argument of the wrong type.
        ValueError: an argument is out of range.

    Source: Ma et al., "AA-CLIP: Enhancing Zero-shot Anomaly Detection via Anomaly-Aware CLIP", 2025, with
    cross-attention between its towers.
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
        image_cross: Mapping[str, Any] | None = None,
        text_cross: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        check_clip(model)
        check_model("AdaptedCLIP", model)
        visual, text = towers(model)
        depth, channels = len(visual.transformer.resblocks), visual.class_embedding.shape[0]
        width = text.token_embedding.embedding_dim
        checks.integer("AdaptedCLIP", "image_layers", image_layers, 0)
        checks.integer("AdaptedCLIP", "text_layers", text_layers, 0)
        self.feature_levels = check_levels(feature_levels, depth)
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
        self.detection_projection = SimpleProj(channels, width, relu, **where)
        self.text_projection = SimpleProj(width, width, relu=True, **where)
        heads = {"num_heads": num_heads, "head_dim": head_dim}
        self.image_cross_attention = ImageCrossAttention(
            channels, width, **(heads | settings | dict(image_cross or {}) | where)
        )
        self.text_cross_attention = TextCrossAttention(
            width, width, **(heads | settings | dict(text_cross or {}) | where)
        )
        with all_or_nothing() as change:
            change.freeze(model)
        self.clip = model.eval()

    def train(self, mode: bool = True) -> AdaptedCLIP:
        super().train(mode)
        self.clip.eval()
        return self

    def set_stage(self, stage: int, cross_attention: bool = True) -> list[nn.Parameter]:
        """Let the modules of one stage train and freeze those of the other.

        Args:
            stage: 1, text adapters and last text projection, or 2, image adapters and projections.
            cross_attention: whether the stage's cross-attention trains with them. Default True; False for the base
                model.

        Returns:
            What trains, for an optimizer. What ``model`` itself trains is left as it is and is not in it.

        Raises:
            TypeError, ValueError: an argument is wrong.
        """
        parts = _parts("set_stage", (stage,), cross_attention)
        own = [(name, parameter) for name, parameter in self.named_parameters() if not name.startswith("clip.")]
        for name, parameter in own:
            parameter.requires_grad_(_part(name) in parts)
        return [parameter for _, parameter in own if parameter.requires_grad]

    # ---- features

    def encode_image(self, images: Tensor, text_context: Tensor | Prepared | None = None) -> ImageFeatures:
        """Stage 2.

        Args:
            images: (B, 3, H, W) of the size that the model has.
            text_context: (B or 1, T, text width), such as `text_context` gives it, or what
                ``image_cross_attention.prepare`` made of it. None (the default) leaves the cross-attention out.

        Returns:
            `ImageFeatures`.

        Raises:
            ValueError, TypeError: images or context of another shape, dtype or device.
        """
        visual, _ = towers(self.clip)
        x, levels = stream(
            visual.transformer, embed_images(visual, images), None, text_context, self.image_cross_attention,
            self.image_adapters, self.feature_levels,
        )  # fmt: skip
        patches = [visual.ln_post(level[:, 1:]) for level in levels]
        projected = [
            F.normalize(project(level), dim=-1) for project, level in zip(self.projections, patches, strict=True)
        ]
        detection = F.normalize(self.detection_projection(patches[-1]), dim=-1).mean(1)
        return ImageFeatures(projected, detection, pool_image(visual, x))

    def encode_text(self, tokens: Tensor, image_context: Tensor | Prepared | None = None) -> TextFeatures:
        """Stage 1.

        Args:
            tokens: (P, L), token numbers of P prompts, L the model's context length.
            image_context: (any batch, T, text width), averaged over its batch unless ``context_reduce`` says otherwise,
                such as the first of `image_context`'s, or what ``text_cross_attention.prepare`` made of it. None (the
                default) leaves the cross-attention out.

        Returns:
            `TextFeatures`.

        Raises:
            ValueError, TypeError: tokens or context of another shape, dtype or device.
        """
        _, text = towers(self.clip)
        x, mask = embed_tokens(text, tokens)
        x, _ = stream(text.transformer, x, mask, image_context, self.text_cross_attention, self.text_adapters)
        x = text.ln_final(x)
        pooled = x[torch.arange(len(x), device=x.device), ends(text, tokens)]
        return TextFeatures(self.text_projection(pooled), x)

    def encode_text_intermediate(self, tokens: Tensor, image_context: Tensor | Prepared | None = None) -> Tensor:
        """The prompts' tokens behind layer 0 and text adapter 0, (P, L, text width).

        Args:
            tokens, image_context: as for `encode_text`. The original's stage 2 gives no context.
        """
        _, text = towers(self.clip)
        x, mask = embed_tokens(text, tokens)
        x, _ = stream(text.transformer, x, mask, image_context, self.text_cross_attention, self.text_adapters, depth=1)
        return x

    def encode_class(self, normal: Tensor, abnormal: Tensor, image_context: Tensor | None = None) -> Tensor:
        """What a class looks like in either state, (text width, 2), both columns of norm 1, the normal one first.

        Args:
            normal, abnormal: token numbers of the prompts for either state, as for `encode_text`, such as a tokenizer
                gives them of `anomaly_prompts`. Their features are normalised, averaged over the prompts of a state,
                and normalised again.
            image_context: as for `encode_text`, which is called for one state after the other, as in the original.
        """
        states = [
            F.normalize(self.encode_text(tokens, image_context).pooled, dim=-1).mean(0) for tokens in (normal, abnormal)
        ]
        return F.normalize(torch.stack(states, dim=-1), dim=0)

    def text_context(self, tokens: Tensor) -> Tensor:
        """Stage 2's context of a class, (1, P L, text width): all its prompts' `encode_text_intermediate` in one row.

        The cross-attention normalises it.

        Args:
            tokens: (P, L), all prompts of the class.
        """
        return self.encode_text_intermediate(tokens).flatten(0, 1)[None]

    @torch.no_grad()
    def image_context(self, images: Tensor, adapted: bool = False) -> list[Tensor]:
        """Stage 1's images: each feature level's patches, normalised, plus the whole image's normalised feature.

        Args:
            images: as for `encode_image`.
            adapted: False (the default) for the frozen tower and its own projection, as before the first stage 2; True
                for patches through the image adapters and projections as they are by now, without a context. The whole
                image's feature is the frozen tower's either way.

        Returns:
            Each (B, patches, text width), without gradient. The first is the prompts' context, all are what their
            features are compared with.

        Raises:
            ValueError: the towers' common embedding is not as wide as the text tower; images of another shape.
            TypeError: an argument has the wrong type.
        """
        checks.flag("AdaptedCLIP", "adapted", adapted)
        visual, text = towers(self.clip)
        width = text.token_embedding.embedding_dim
        embedding = visual.class_embedding.shape[0] if visual.proj is None else visual.proj.shape[1]
        if embedding != width:
            raise ValueError(
                f"AdaptedCLIP: model must have an embedding as wide as its text tower, {width}, for stage 1's context, "
                f"got {embedding}"
            )
        x, levels = stream(visual.transformer, embed_images(visual, images), levels=self.feature_levels)
        whole = F.normalize(pool_image(visual, x), dim=-1)[:, None]
        if adapted:
            return [level + whole for level in self.encode_image(images).levels]
        patches = [visual.ln_post(level[:, 1:]) for level in levels]
        return [F.normalize(p if visual.proj is None else p @ visual.proj, dim=-1) + whole for p in patches]

    def feedback(self, images: Tensor, tokens: Tensor, rounds: int = 1) -> AdaptedFeatures:
        """Text given the images, then the images given that text, ``rounds`` times; gradients go through all of it.

        The first text sees the images as they are without a context. Text's context is the first feature level, the
        images' is the tokens of all prompts behind layer 0, the cross-attention and adapter 0. The training of the
        original feeds back from stage to stage instead, without gradient: see `set_stage`, `image_context` and
        `text_context`.

        Args:
            images: (B, 3, H, W).
            tokens: (P, L).
            rounds: at least 1, the default.

        Returns:
            `AdaptedFeatures` of the last round.

        Raises:
            ValueError, TypeError: images or tokens of another shape or dtype, or rounds out of range.
        """
        checks.integer("AdaptedCLIP.feedback", "rounds", rounds, 1)
        image = self.encode_image(images)
        for _ in range(rounds):
            context = image.levels[0]
            text = self.encode_text(tokens, context)
            image = self.encode_image(images, self.encode_text_intermediate(tokens, context).flatten(0, 1)[None])
        return AdaptedFeatures(image.levels, image.detection, text.pooled)

    def forward(self, images: Tensor, tokens: Tensor, rounds: int = 1) -> AdaptedFeatures:
        """`feedback`."""
        return self.feedback(images, tokens, rounds)

    # ---- checkpoints

    def adapter_state_dict(self, stages: Sequence[int] = _STAGES, cross_attention: bool = True) -> dict[str, Tensor]:
        """All parameters but the frozen model's, by their full names, and their settings: an adapter checkpoint.

        The tensors are detached and share memory with the model. "adapter_settings" is JSON in a tensor of bytes: the
        settings of each module, and the feature levels.

        Args:
            stages: whose modules are in it. Default (1, 2).
            cross_attention: whether their cross-attentions are; False for the base model. Default True.
        """
        left_out = _left_out("adapter_state_dict", stages, cross_attention)
        return {
            **_without(self._own_parameters(), left_out),
            _SETTINGS: checkpoint.packed_settings(_without(self._settings(), left_out)),
        }

    def load_adapter_state_dict(
        self,
        state: Mapping[str, Tensor],
        check_settings: bool = True,
        *,
        stages: Sequence[int] = _STAGES,
        cross_attention: bool = True,
    ) -> None:
        """Copy a checkpoint, as `adapter_state_dict` gives it, into this model.

        All or nothing: when this raises, the model is as it was.

        Args:
            state: the checkpoint.
            check_settings: whether the settings of the checkpoint must be there. Where they are there they must be the
                model's in either case. Default True.
            stages: whose modules are loaded. Those of the other are left as they are, and may be in the checkpoint or
                not. Default (1, 2).
            cross_attention: the same of their cross-attentions. Default True; False loads a base model's checkpoint.

        Raises:
            TypeError: a tensor is not a dense floating one.
            ValueError: names are missing or unknown, or shapes or settings differ, or settings are missing.
        """
        caller = "load_adapter_state_dict"
        left_out = _left_out(caller, stages, cross_attention)
        own, settings = (_without(kept, left_out) for kept in (self._own_parameters(), self._settings()))
        if left_out and isinstance(state, Mapping) and all(isinstance(name, str) for name in state):
            state = _without(state, left_out)
            if _SETTINGS in state:
                given = checkpoint.read_settings(caller, _SETTINGS, state[_SETTINGS])
                state[_SETTINGS] = checkpoint.packed_settings(_without(given, left_out))
        checkpoint.load(caller, self, own, settings, _SETTINGS, state, check_settings)

    def _own_parameters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.named_parameters() if not name.startswith("clip.")}

    def _settings(self) -> dict[str, dict[str, Any]]:
        kinds = AdapterBlend | SimpleProj | ScaledCrossAttention
        settings = {
            path: module.settings()
            for path, module in self.named_modules()
            if not path.startswith("clip.") and isinstance(module, kinds)
        }
        return {"projections": self.settings(), **settings}

    def settings(self) -> dict[str, Any]:
        """What gives the parameters their meaning and is no setting of a module inside."""
        return {"feature_levels": list(self.feature_levels)}

    def report(self) -> AdaptedCLIPReport:
        """What trains, counted; ``print`` it."""
        return AdaptedCLIPReport.of(self)


# ---- parts of the model


def _part(name: str) -> str:
    """Of a parameter, or a module: the child of the model that it is in."""
    return checkpoint.plain_name(name).partition(".")[0]


def _parts(caller: str, stages: Sequence[int], cross_attention: bool) -> set[str]:
    checks.flag(caller, "cross_attention", cross_attention)
    for stage in stages:
        checks.one_of(caller, "stage", stage, _STAGES)
    parts = {part for stage in stages for part in _ADAPTERS[stage]}
    return parts | ({_CROSS[stage] for stage in stages} if cross_attention else set())


def _left_out(caller: str, stages: Sequence[int], cross_attention: bool) -> set[str]:
    return _parts(caller, _STAGES, True) - _parts(caller, stages, cross_attention)


def _without(named: Mapping[str, Any], parts: set[str]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if _part(name) not in parts}
