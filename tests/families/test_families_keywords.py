"""What the keywords select in small models of many families."""

from __future__ import annotations

import pytest
import torch
import zoo

from pyfused import inject_lora

MHA = {"attn.in_proj", "attn.out_proj"}
CLIP_MLP = {"mlp.c_fc", "mlp.c_proj"}
TIMM_ATTENTION = {"attn.qkv", "attn.proj"}
TIMM_MLP = {"mlp.fc1", "mlp.fc2"}
# Family -> the last two names of all layers that "attention" selects, and of those that "mlp" does.
EXPECTED = {
    "open_clip_model": {
        "ViT": (MHA, CLIP_MLP),
        "custom text": (MHA, CLIP_MLP),
        "block_type custom": (MHA, CLIP_MLP),
        "SigLIP": (MHA | TIMM_ATTENTION, CLIP_MLP | TIMM_MLP),
        "EVA": (MHA | TIMM_ATTENTION, CLIP_MLP | TIMM_MLP),
        "CoCa": (MHA, CLIP_MLP),
        "ConvNeXt": (MHA, CLIP_MLP | TIMM_MLP),
        "MobileCLIP": (MHA, CLIP_MLP | TIMM_MLP),
    },
    "timm_model": {
        # Its last stage alone has an attention, which is called after what it does.
        "fastvit_mci0": ({"token_mixer.qkv", "token_mixer.proj"}, TIMM_MLP),
        # Neither what makes the table of positions.
        "swinv2_tiny_window8_256": (TIMM_ATTENTION, TIMM_MLP),
        "vit_relpos_small_patch16_224": (TIMM_ATTENTION, TIMM_MLP),
        "vit_tiny_patch16_224": (TIMM_ATTENTION, TIMM_MLP),
    },
    "transformers_model": {
        "gpt2": ({"attn.c_attn", "attn.c_proj"}, CLIP_MLP),
        "llama": (
            {f"self_attn.{letter}_proj" for letter in "qkvo"}, {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
        ),
        "bert": ({"self.query", "self.key", "self.value", "output.dense"}, {"intermediate.dense", "output.dense"}),
        "t5": (
            {f"{kind}Attention.{letter}" for kind in ("Self", "EncDec") for letter in "qkvo"},
            {f"DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")},
        ),
        # Not the out_proj of its state-space layers.
        "jamba": (
            {f"self_attn.{letter}_proj" for letter in "qkvo"},
            {f"feed_forward.{name}_proj" for name in ("gate", "up", "down")},
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize("keyword", ["attention", "mlp"])
@pytest.mark.parametrize(("maker", "name"), [(maker, name) for maker, names in EXPECTED.items() for name in names])
def test_keywords(maker, name, keyword):
    pytest.importorskip(maker.removesuffix("_model"))
    torch.manual_seed(0)
    report = inject_lora(getattr(zoo, maker)(name)[0], keyword, rank=1)
    found = {".".join(row.path.split(".")[-2:]) for row in report.rows}
    assert found == EXPECTED[maker][name][keyword == "mlp"]


def test_a_model_without_attention_says_so():
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="got 'attention'"):
        inject_lora(zoo.transformers_model("mamba")[0], "attention", rank=1)
