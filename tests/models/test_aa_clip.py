"""AA-CLIP on open_clip's models: systems.md, section 2, parts by their formulas, counts, the original, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from aa_clip_cases import adapted, inputs, open_clip, small_clip
from models_setup import fastvit
from oracle import randn
from torch import nn

from pyfused.models import AdaptedCLIP, AdapterBlend, ImageCrossAttention, SimpleProj, TextCrossAttention

IMAGE_COUNT, TEXT_COUNT = 2_755_840, 2_362_368


class TestParts:
    def test_counts_of_the_cross_attentions(self):
        for module, count in ((ImageCrossAttention(device="meta"), IMAGE_COUNT), (TextCrossAttention(), TEXT_COUNT)):
            assert sum(p.numel() for p in module.parameters()) == count
            assert (module.num_heads, module.head_dim, module.weight, module.dropout) == (8, 96, 0.1, 0.1)
            assert module.norm_match
        assert ImageCrossAttention(device="meta").normalize_context
        assert not module.normalize_context
        assert module.context_reduce == "mean"

    def test_final_form_of_the_image_cross_attention(self):
        module = ImageCrossAttention(16, 12, 2, 6, dtype=torch.float64).eval()
        with torch.no_grad():
            module.q_weight.mul_(4.0)
            module.out_bias.normal_()
        x, context = randn(2, 5, 16, dtype=torch.float64), randn(1, 7, 12, dtype=torch.float64)
        ctx = context / context.norm(dim=-1, keepdim=True)
        heads = [
            F.linear(t, getattr(module, f"{n}_weight"), getattr(module, f"{n}_bias"))
            .unflatten(-1, (2, 6)).transpose(1, 2)
            for t, n in ((x, "q"), (ctx, "k"), (ctx, "v"))
        ]  # fmt: skip
        attended = F.scaled_dot_product_attention(heads[0], *(t.expand(2, -1, -1, -1) for t in heads[1:]))
        c = F.linear(attended.transpose(1, 2).flatten(2), module.out_weight, module.out_bias)
        matched = c * x.norm(dim=-1, keepdim=True) / (c.norm(dim=-1, keepdim=True) + 1e-6)
        torch.testing.assert_close(module(x, context), x + 0.1 * matched, rtol=1e-10, atol=1e-10)

    def test_from_module_gives_the_stage_of_an_attention(self):
        mha = nn.MultiheadAttention(16, 2, kdim=12, vdim=12, batch_first=True)
        x, context = randn(2, 5, 16), randn(2, 7, 12)
        module = ImageCrossAttention.from_module(mha)
        assert isinstance(module, ImageCrossAttention)
        torch.testing.assert_close(module(x, context), x + 0.1 * mha(x, context, context)[0], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("w", [0.1, 0.0, 1.0, -0.7])
    def test_blend_is_the_formula(self, w):
        blend = AdapterBlend(24, w, dtype=torch.float64)
        x = randn(2, 7, 24, dtype=torch.float64).requires_grad_()
        a = F.leaky_relu(F.linear(x, blend.adapter_weight), 0.01)
        expected = w * a * x.norm(dim=-1, keepdim=True) / a.norm(dim=-1, keepdim=True) + (1 - w) * x
        actual = blend(x)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        dy = randn(2, 7, 24, dtype=torch.float64, seed=5)
        for one, other in zip(
            torch.autograd.grad(actual, (x, blend.adapter_weight), dy),
            torch.autograd.grad(expected, (x, blend.adapter_weight), dy),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)

    def test_blend_of_a_row_without_a_direction(self):
        y = AdapterBlend(8)(torch.zeros(2, 8, requires_grad=True))
        assert (y == 0).all()

    def test_both_start_xavier_uniform_and_the_same_everywhere(self):
        for make, shape in (
            (lambda **settings: AdapterBlend(300, **settings).adapter_weight, (300, 300)),
            (lambda **settings: SimpleProj(300, 200, **settings).weight, (200, 300)),
        ):
            torch.manual_seed(3)
            weight = make()
            assert weight.shape == shape
            bound = (6 / sum(shape)) ** 0.5
            assert 0.99 * bound < weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
            torch.manual_seed(3)
            assert torch.equal(make(dtype=torch.bfloat16), weight.bfloat16())

    def test_projection(self):
        x = randn(3, 5, 12)
        plain = SimpleProj(12, 7)
        assert torch.equal(plain(x), F.linear(x, plain.weight))
        bent = SimpleProj(12, 7, relu=True)
        assert torch.equal(bent(x), F.leaky_relu(F.linear(x, bent.weight), 0.01))
        assert bent(x).min() < 0
        assert bent(x.bfloat16()).dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: AdapterBlend(0), ValueError, "AdapterBlend: channels must be at least 1, got 0"),
            (lambda: AdapterBlend(8.0), TypeError, "AdapterBlend: channels must be an int, got float"),
            (lambda: AdapterBlend(8, float("nan")), ValueError, "AdapterBlend: weight must be finite, also in float32"),
            (
                lambda: AdapterBlend(8, dtype=torch.int8),
                TypeError,
                r"AdapterBlend: dtype must be one of .* torch\.int8",
            ),
            (lambda: SimpleProj(4, 0), ValueError, "SimpleProj: out_features must be at least 1, got 0"),
            (lambda: ImageCrossAttention(zero_init=True), ValueError, "zero_init must be False with norm_match"),
        ],
    )
    def test_refusals(self, make, error, message):
        with pytest.raises(error, match=message):
            make()


class TestShapes:
    def test_vit_l_14_at_518(self):
        with torch.device("meta"):
            clip = open_clip.create_model("ViT-L-14", pretrained=None, device="meta", force_image_size=518)
            total = sum(p.numel() for p in clip.parameters())
            model = AdaptedCLIP(clip)
        assert clip.visual.positional_embedding.shape == (1370, 1024)
        assert model.feature_levels == (6, 12, 18, 24)
        counts = {}
        for row in model.report().rows:
            counts[row.kind] = counts.get(row.kind, 0) + row.parameters
        assert counts == {
            "AdapterBlend": 6 * 1024**2 + 3 * 768**2,
            "SimpleProj": 4 * 1024 * 768 + 1024 * 768 + 768 * 768,
            "ImageCrossAttention": IMAGE_COUNT,
            "TextCrossAttention": TEXT_COUNT,
        }
        assert model.report().trainable_parameters == sum(counts.values()) == 17_701_120
        assert model.report().total_parameters == total + 17_701_120
        images, tokens = torch.empty(2, 3, 518, 518, device="meta"), torch.zeros(16, 77).long().to("meta")
        levels, detection, text = model(images, tokens)
        assert [level.shape for level in levels] == [(2, 1369, 768)] * 4
        assert (detection.shape, text.shape) == ((2, 768), (16, 768))
        assert model.encode_text_intermediate(tokens).shape == (16, 77, 768)
        assert model.text_context(tokens).shape == (1, 1232, 768)
        assert model.encode_class(tokens[:6], tokens[6:]).shape == (768, 2)
        for behind in (False, True):
            assert [level.shape for level in model.image_context(images, behind)] == [(2, 1369, 768)] * 4
        assert [sum(p.numel() for p in model.set_stage(stage)) for stage in (1, 2)] == [4_721_664, 12_979_456]
        assert [sum(p.numel() for p in model.set_stage(stage, False)) for stage in (1, 2)] == [
            4 * 768**2, 6 * 1024**2 + 5 * 1024 * 768,
        ]  # fmt: skip

    def test_report_prints_a_row_for_each_module(self):
        model = adapted()
        lines = str(model.report()).splitlines()
        assert len(lines) == 2 + 4 + 3 + 4 + 2 + 2 + 1
        assert lines[2].split() == ["image_adapters.0", "AdapterBlend", "64", "64", "4,096"]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert lines[-1].startswith(f"trainable parameters  {trained:,} of ")

    @pytest.mark.parametrize(("depth", "levels"), [(4, (1, 2, 3, 4)), (3, (1, 2, 3)), (1, (1,)), (12, (3, 6, 9, 12))])
    def test_shallow_towers(self, depth, levels):
        clip = small_clip(vision={"layers": depth}, text={"layers": 2})
        model = adapted(clip)
        assert model.feature_levels == levels
        assert (len(model.image_adapters), len(model.text_adapters)) == (min(depth, 6), 2)
        assert len(model.encode_image(inputs()[0]).levels) == len(levels)

    def test_feature_levels_are_layers_counted_from_1(self):
        model = adapted(feature_levels=(2, 4)).double()
        seen = {}
        for index, adapter in enumerate(model.image_adapters):
            adapter.register_forward_hook(lambda *given, index=index: seen.__setitem__(index + 1, given[2]))
        levels = model.encode_image(inputs(torch.float64)[0]).levels
        for level, projection, patches in zip((2, 4), model.projections, levels, strict=True):
            expected = F.linear(model.clip.visual.ln_post(seen[level])[:, 1:], projection.weight)
            expected = expected / expected.norm(dim=-1, keepdim=True)
            torch.testing.assert_close(patches, expected, rtol=1e-12, atol=1e-12)


CLIPS = {
    "CLIP": {},
    "CustomTextCLIP": {"kind": "CustomTextCLIP"},
    "average pooling": {"vision": {"pool_type": "avg", "final_ln_after_pool": True}},
    "text by eos": {"text": {"pool_type": "eos"}},
    "text by eos, custom": {"kind": "CustomTextCLIP", "text": {"pool_type": "eos", "proj_bias": True}},
    "text by first": {"kind": "CustomTextCLIP", "text": {"pool_type": "first", "no_causal_mask": True}},
    "text by last": {"text": {"pool_type": "last", "proj_bias": True}},
    "text without a projection": {"kind": "CustomTextCLIP", "text": {"proj_type": "none"}},
    "custom blocks": {"vision": {"qk_norm": True, "scale_fc": True}, "text": {"qk_norm": True}},
    "patch dropout": {"vision": {"patch_dropout": 0.5}},
}  # fmt: skip


class OwnProjection(nn.Module):
    """The text tower's own projection, where AA-CLIP has another."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.projection = getattr(clip, "text", clip).text_projection

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.projection is None:
            return x
        return self.projection(x) if isinstance(self.projection, nn.Linear) else x @ self.projection


class TestOriginal:
    @pytest.mark.parametrize("name", CLIPS)
    @torch.no_grad()
    def test_without_weight_and_context_it_is_the_original(self, name):
        clip = small_clip(**CLIPS[name]).eval()
        images, tokens = inputs()
        image, text = clip.encode_image(images), clip.encode_text(tokens)
        model = adapted(clip, image_weight=0.0, text_weight=0.0).train()
        model.text_projection = OwnProjection(clip)
        assert torch.equal(model.encode_image(images).pooled, image)
        assert torch.equal(model.encode_text(tokens).pooled, text)
        model = adapted(clip)
        model.text_projection = OwnProjection(clip)
        assert (model.encode_image(images).pooled - image).abs().max() > 1e-3
        assert (model.encode_text(tokens).pooled - text).abs().max() > 1e-3

    @torch.no_grad()
    def test_transformers_with_the_length_first(self):
        clip = small_clip().eval()
        model, (images, tokens) = adapted(clip), inputs()
        expected = model(images, tokens)
        for transformer in (clip.visual.transformer, clip.transformer):
            transformer.batch_first = False
            for block in transformer.resblocks:
                block.attn.batch_first = False
        actual = model(images, tokens)
        torch.testing.assert_close([*actual.levels, *actual[1:]], [*expected.levels, *expected[1:]])

    def test_the_given_model_is_shared_and_frozen(self):
        clip = small_clip().train()
        names = {name for name, _ in clip.named_parameters()}
        model = adapted(clip).train()
        assert model.clip is clip
        assert model.image_cross_attention.training
        assert not any(module.training for module in clip.modules())
        assert {name for name, _ in clip.named_parameters()} == names
        assert not any(p.requires_grad for p in clip.parameters())


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"image_layers": -1}, ValueError, "image_layers must be at least 0, got -1"),
            ({"text_layers": 1.5}, TypeError, "text_layers must be an int, got float"),
            ({"feature_levels": (2, 5)}, ValueError, r"rising layer numbers from 1 to 4, at least one, got \(2, 5\)"),
            ({"feature_levels": (3, 2)}, ValueError, r"rising layer numbers from 1 to 4, at least one, got \(3, 2\)"),
            ({"feature_levels": ()}, ValueError, r"at least one, got \(\)"),
            ({"feature_levels": (0,)}, ValueError, "feature_levels must be at least 1, got 0"),
            ({"image_weight": float("inf")}, ValueError, "weight must be finite, also in float32, got inf"),
            ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
            ({"zero_init": True}, ValueError, "zero_init must be False with norm_match"),
            ({"text_cross": {"zero_init": True}}, ValueError, "zero_init must be False with norm_match"),
            ({"image_cross": {"w": 0.1}}, TypeError, "unexpected keyword argument 'w'"),
            ({"text_cross": {"weight": float("nan")}}, ValueError, "weight must be finite"),
        ],
    )
    def test_settings_leave_the_model_alone(self, settings, error, message):
        clip = small_clip().train()
        with pytest.raises(error, match=message):
            AdaptedCLIP(clip, **settings)
        assert clip.training
        assert all(p.requires_grad for p in clip.parameters())

    def test_models_of_another_kind(self):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
            AdaptedCLIP("ViT-L-14")
        with pytest.raises(
            TypeError, match="got VisionTransformer, whose NoneType has no class_embedding, transformer"
        ):
            AdaptedCLIP(small_clip().visual)
        clip = small_clip()
        clip.visual = fastvit()
        with pytest.raises(TypeError, match="got CLIP, whose FastVit has no class_embedding"):
            AdaptedCLIP(clip)
        with pytest.raises(TypeError, match="neither attentional pooling nor a class token of text"):
            AdaptedCLIP(small_clip(vision={"attentional_pool": True, "attn_pooler_heads": 2}))
        with pytest.raises(TypeError, match="neither attentional pooling nor a class token of text"):
            AdaptedCLIP(small_clip("CustomTextCLIP", text={"embed_cls": True}))
        with pytest.raises(ValueError, match=r"the text pooling of model must be one of .* got 'none'"):
            AdaptedCLIP(small_clip(text={"pool_type": "none"}))

    def test_inputs(self):
        model, (images, tokens) = adapted(), inputs()
        for wrong in (images[:, :, :32], images[0], images[:, :1]):
            with pytest.raises(ValueError, match=r"images must have shape \(B, 3, 48, 48\), got"):
                model.encode_image(wrong)
        with pytest.raises(ValueError, match=r"tokens must have shape \(P, 8\), got \(5, 7\)"):
            model.encode_text(tokens[:, :7])
        with pytest.raises(TypeError, match=r"tokens must have dtype torch\.int64 or torch\.int32, got torch\.float32"):
            model.encode_text(tokens.float())
        with pytest.raises(ValueError, match="context must have x's batch B = 3 or 1, got 2"):
            model.encode_image(images, randn(2, 11, 48))
        with pytest.raises(ValueError, match=r"context must have shape \(B, T, 48\), got \(1, 11, 64\)"):
            model.encode_text(tokens, randn(1, 11, 64))
        with pytest.raises(
            ValueError, match="an embedding as wide as its text tower, 48, for stage 1's context, got 32"
        ):
            model.image_context(images)
        with pytest.raises(TypeError, match="adapted must be a bool, got 1"):
            model.image_context(images, 1)
        for wrong in (0, 3, True):
            with pytest.raises(ValueError, match=rf"set_stage: stage must be one of \(1, 2\), got {wrong}"):
                model.set_stage(wrong)
        for rounds, error in ((0, ValueError), (1.0, TypeError)):
            with pytest.raises(error, match="feedback: rounds must be"):
                model(images, tokens, rounds)
