"""Small models of many families, with random weights, each with inputs: what people put LoRA into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, dict[str, Any]]


def alive(model: nn.Module) -> nn.Module:
    """``model`` without a weight of zeros or a layer-scale that leaves nothing of its branch."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.05)
        elif "gamma" in name or "layer_scale" in name:
            nn.init.ones_(parameter)
    return model


def images(size: int, name: str = "x") -> dict[str, Tensor]:
    return {name: torch.randn(2, 3, size, size)}


# ---- timm: name -> arguments of create_model; "size" is that of the images.

_NARROW = {"depth": 2, "embed_dim": 48, "num_heads": 4}
_STAGES = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
_FASTVIT = {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128)}
TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
    "deit_tiny_distilled_patch16_224": {"img_size": 32, "depth": 2},
    "vit_base_patch16_siglip_224": {"img_size": 32, **_NARROW},
    "vit_relpos_small_patch16_224": {"img_size": 32, "depth": 2},
    "vit_base_patch16_dinov3": {"img_size": 32, **_NARROW},
    "samvit_base_patch16": {"img_size": 64, **_NARROW},
    "swin_tiny_patch4_window7_224": {"img_size": 56, **_STAGES},
    "swinv2_tiny_window8_256": {"img_size": 64, **_STAGES},
    "beit_base_patch16_224": {"img_size": 32, **_NARROW},
    "beitv2_base_patch16_224": {"img_size": 32, **_NARROW},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2},
    "eva02_base_patch14_224": {"img_size": 28, **_NARROW},
    "eva_giant_patch14_224": {"img_size": 28, **_NARROW},
    "cait_xxs24_224": {"img_size": 32, "depth": 2},
    "xcit_nano_12_p16_224": {"img_size": 32, "depth": 2},
    "convit_tiny": {"img_size": 32, "depth": 2},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "convnextv2_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "fastvit_t8": _FASTVIT,
    "fastvit_mci0": _FASTVIT,
    "resnet18": {"layers": (1, 1, 1, 1)},
    "test_efficientnet": {},
    "test_byobnet": {},
    "mixer_s32_224": {"img_size": 64},
    "resmlp_12_224": {"img_size": 64},
    "gmlp_s16_224": {"img_size": 64},
    "pit_ti_224": {"img_size": 64, "depth": (1, 1, 1)},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "mobilevit_xxs": {},
    "mobilevitv2_050": {},
    "poolformer_s12": {},
    "efficientvit_b0": {},
    "efficientvit_m0": {"size": 224},
    "mobilenetv4_hybrid_medium": {},
    "hiera_tiny_224": {"img_size": 64, "embed_dim": 24, "stages": (1, 1, 1, 1)},
    "twins_svt_small": {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128)},
}


def timm_model(name: str) -> Made:
    import timm

    settings = dict(TIMM[name])
    size = settings.pop("size", None) or settings.get("img_size", 64)
    return alive(timm.create_model(name, num_classes=5, **settings)), images(size)


# ---- transformers

_TEXT = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_IMAGE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_SEQUENCE = {
    "vocab_size": 100, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
}  # fmt: skip
_GPT = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
_CONV = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_labels": 5}
_SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4,
    "num_labels": 5,
}  # fmt: skip
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Name -> (model class, configuration class, settings, "tokens", or the size of the images).
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], str | int]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED, "tokens"),
    "llama, tied": ("LlamaForCausalLM", "LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}, "tokens"),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED, "tokens"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED, "tokens"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 8}, "tokens"),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**_GROUPED, "pad_token_id": 0}, "tokens"),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**_GROUPED, "head_dim": 8}, "tokens"),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4}, "tokens"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**_GPT, **_SPECIAL}, "tokens"),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**_GPT, **_SPECIAL, "rotary_dim": 4}, "tokens"),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT, "tokens"),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": 100,
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 32,
        },
        "tokens",
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "tokens",
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "tokens",
    ),
    "falcon_mamba": (
        "FalconMambaForCausalLM",
        "FalconMambaConfig",
        {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "tokens",
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            **_GROUPED,
            "use_mamba_kernels": False,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
        },
        "tokens",
    ),
    "bert": ("BertForSequenceClassification", "BertConfig", _TEXT, "tokens"),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**_TEXT, "pad_token_id": 1}, "tokens"),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 100, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
        "tokens",
    ),
    "modernbert": (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**_TEXT, **_SPECIAL, "cls_token_id": 1, "sep_token_id": 2},
        "tokens",
    ),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", {**_TEXT, "embedding_size": 16}, "tokens"),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 100,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "feed_forward_proj": "gated-gelu",
        },
        "tokens",
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**_SEQUENCE, "max_position_embeddings": 32}, "tokens"),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **_SEQUENCE,
            **_SPECIAL,
            "num_mel_bins": 16,
            "max_source_positions": 30,
            "max_target_positions": 20,
            "decoder_start_token_id": 1,
        },
        "tokens",
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**_IMAGE, "num_labels": 5}, 32),
    "beit": ("BeitForImageClassification", "BeitConfig", {**_IMAGE, "num_labels": 5}, 32),
    "dinov2": (
        "Dinov2Model",
        "Dinov2Config",
        {
            "hidden_size": 32,
            "mlp_ratio": 2,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
        },
        28,
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        _SWIN,
        32,
    ),
    "swinv2": (
        "Swinv2ForImageClassification",
        "Swinv2Config",
        _SWIN,
        32,
    ),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", _CONV, 32),
    "segformer": (
        "SegformerForImageClassification",
        "SegformerConfig",
        {**_CONV, "num_attention_heads": [1, 2, 2, 4]},
        64,
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**_TEXT, **_SPECIAL, "max_position_embeddings": 16},
            "vision_config": _IMAGE,
            "projection_dim": 16,
        },
        32,
    ),
    "siglip": (
        "SiglipModel",
        "SiglipConfig",
        {"text_config": {**_TEXT, "max_position_embeddings": 16, "projection_size": 32}, "vision_config": _IMAGE},
        32,
    ),
}


def transformers_model(name: str) -> Made:
    import transformers

    model, config, settings, kind = TRANSFORMERS[name]
    made = getattr(transformers, model)(getattr(transformers, config)(**settings))
    tokens = {"input_ids": torch.randint(3, 99, (2, 16))}
    if name == "whisper":
        tokens = {"input_features": torch.randn(2, 16, 60), "decoder_input_ids": tokens["input_ids"]}
    elif name == "t5":
        tokens["decoder_input_ids"] = tokens["input_ids"][:, :8]
    if isinstance(kind, str):
        return made, tokens
    return made, images(kind, "pixel_values") | (tokens if "text_config" in settings else {})


# ---- open_clip: every kind of tower that it builds

_OC_IMAGE = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
_OC_TEXT = {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 4, "layers": 2}
_ATTENTION = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True}


def _clip(custom: bool = False, text: dict[str, Any] | None = None, **vision: Any) -> nn.Module:
    import open_clip

    made = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    return made(32, {**_OC_IMAGE, **vision}, {**_OC_TEXT, **(text or {})})


def _timm_tower(name: str, size: int, pool: str, projection: str | None, width: int = 32, **text: Any) -> nn.Module:
    import open_clip

    vision = {
        "timm_model_name": name, "timm_model_pretrained": False, "timm_pool": pool, "timm_proj": projection,
        "image_size": size,
    }  # fmt: skip
    return open_clip.CustomTextCLIP(width, vision, {**_OC_TEXT, **text})


def _coca() -> nn.Module:
    from open_clip.coca_model import CoCa

    text = {**_OC_TEXT, "embed_cls": True, "output_tokens": True}
    image = {**_OC_IMAGE, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
    model = CoCa(embed_dim=64, multimodal_cfg=_OC_TEXT, text_cfg=text, vision_cfg=image)
    # open_clip leaves the memory of this one as it was.
    nn.init.normal_(model.text_decoder.text_projection, std=0.05)
    return model


OPEN_CLIP: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "ViT": (32, _clip),
    "custom text": (32, lambda: _clip(custom=True)),
    "attentional pool": (32, lambda: _clip(attentional_pool=True, attn_pooler_heads=4)),
    "block_type custom": (32, lambda: _clip(block_type="custom", **_ATTENTION)),
    "SigLIP": (
        160,
        lambda: _timm_tower("test_vit", 160, "avg", "none", 64, no_causal_mask=True, proj_bias=True, pool_type="last"),
    ),
    "EVA": (224, lambda: _timm_tower("eva02_tiny_patch14_224", 224, "token", None, 192)),
    "CoCa": (32, _coca),
    "ConvNeXt": (64, lambda: _timm_tower("convnext_atto", 64, "", "linear")),
    "MobileCLIP": (64, lambda: _timm_tower("fastvit_t8", 64, "avg", "linear", no_causal_mask=True)),
    "ModifiedResNet": (64, lambda: _clip(layers=[1, 1, 1, 1], width=16, image_size=64, patch_size=None)),
}


def open_clip_model(name: str) -> Made:
    size, make = OPEN_CLIP[name]
    tokens = torch.randint(1, 98, (2, 16))
    tokens[:, -1] = 99
    return make(), {**images(size, "image"), "text": tokens}
