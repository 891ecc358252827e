"""AA-CLIP on open_clip's models: systems.md, section 2, counts and formulas, both stages and the loop between them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from models_setup import fastvit
from oracle import randn
from torch import nn

from pyfused import inject_lora
from pyfused.bench.training import reference_operators
from pyfused.models import AdaptedCLIP, AdapterBlend, ImageCrossAttention, SimpleProj, TextCrossAttention
from pyfused.modules import ScaledCrossAttention

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")

IMAGE_COUNT, TEXT_COUNT = 2_755_840, 2_362_368


def small_clip(kind: str = "CLIP", vision: dict | None = None, text: dict | None = None) -> nn.Module:
    """4 layers of width 64 for images of 48x48 (9 patches), 3 of width 48 for 8 tokens; nothing at a start value."""
    vision = {"image_size": 48, "layers": 4, "width": 64, "head_width": 32, "patch_size": 16} | (vision or {})
    text = {"context_length": 8, "vocab_size": 50, "width": 48, "heads": 2, "layers": 3, "eos_id": 49} | (text or {})
    model = getattr(open_clip, kind)(embed_dim=32, vision_cfg=vision, text_cfg=text)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def adapted(clip: nn.Module | None = None, **settings) -> AdaptedCLIP:
    """An `AdaptedCLIP` in eval mode whose biases are not zero and whose attention is not uniform."""
    model = AdaptedCLIP(small_clip() if clip is None else clip, **({"num_heads": 2, "head_dim": 24} | settings))
    with torch.no_grad():
        for cross in (model.image_cross_attention, model.text_cross_attention):
            for name, parameter in cross.named_parameters():
                if name in ("q_weight", "k_weight"):
                    parameter.mul_(3.0)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.3)
    return model.eval()


def inputs(dtype: torch.dtype = torch.float32, images: int = 3, prompts: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(1, 49, (prompts, 8), generator=torch.Generator().manual_seed(1))
    tokens[:, 5] = 49
    return randn(images, 3, 48, 48, dtype=dtype), tokens


def grads(output, model: nn.Module) -> dict[str, torch.Tensor | None]:
    """The gradient of every parameter of ``model`` that trains, for fixed cotangents of all tensors in ``output``."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    flat = [tensor for part in output for tensor in (part if isinstance(part, list) else [part])]
    total = sum((value * randn(*value.shape, dtype=value.dtype, seed=7)).sum() for value in flat)
    return dict(zip(named, torch.autograd.grad(total, list(named.values()), allow_unused=True), strict=True))


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
            "SimpleProj": 4 * 1024 * 768,
            "ImageCrossAttention": IMAGE_COUNT,
            "TextCrossAttention": TEXT_COUNT,
        }
        assert model.report().trainable_parameters == sum(counts.values()) == 16_324_864
        assert model.report().total_parameters == total + 16_324_864
        levels, image, text = model(torch.empty(2, 3, 518, 518, device="meta"), torch.zeros(16, 77).long().to("meta"))
        assert [level.shape for level in levels] == [(2, 1369, 768)] * 4
        assert (image.shape, text.shape) == ((2, 768), (16, 768))

    def test_report_prints_a_row_for_each_module(self):
        model = adapted()
        lines = str(model.report()).splitlines()
        assert len(lines) == 2 + 4 + 3 + 4 + 2 + 1
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


class TestOriginal:
    @pytest.mark.parametrize("name", CLIPS)
    @torch.no_grad()
    def test_without_weight_and_context_it_is_the_original(self, name):
        clip = small_clip(**CLIPS[name]).eval()
        images, tokens = inputs()
        image, text = clip.encode_image(images), clip.encode_text(tokens)
        model = adapted(clip, image_weight=0.0, text_weight=0.0).train()
        assert torch.equal(model.encode_image(images).pooled, image)
        assert torch.equal(model.encode_text(tokens).pooled, text)
        model = adapted(clip)
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


class TestStages:
    def by_hand(self, model: AdaptedCLIP, x, blocks, mask, cross, adapters, context) -> list[torch.Tensor]:
        """What leaves each layer, by plain torch and the cross-attention module."""
        streams = []
        for index, block in enumerate(blocks):
            x = block(x, attn_mask=mask)
            if index == 0:
                x = cross(x, context)
            if index < len(adapters):
                a = F.leaky_relu(x @ adapters[index].adapter_weight.T)
                w = adapters[index].weight
                x = (1 - w) * x + w * a * (x.norm(dim=-1) / a.norm(dim=-1))[..., None]
            streams.append(x)
        return streams

    def test_image_stage(self):
        model, (images, _) = adapted(image_layers=2).double(), inputs(torch.float64)
        context = randn(1, 11, 48, dtype=torch.float64)
        visual = model.clip.visual
        streams = self.by_hand(
            model, visual._embeds(images), visual.transformer.resblocks, None, model.image_cross_attention,
            model.image_adapters, context,
        )  # fmt: skip
        expected = (
            visual.ln_post(streams[-1])[:, 0] @ visual.proj,
            [
                (visual.ln_post(stream) @ projection.weight.T)[:, 1:]
                for stream, projection in zip(streams, model.projections, strict=True)
            ],
        )
        actual = tuple(model.encode_image(images, context))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        found, wanted = grads(actual, model), grads(expected, model)
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-9, msg=name)

    def test_text_stage(self):
        model, (_, tokens) = adapted(text_layers=2).double(), inputs(torch.float64)
        context = randn(4, 9, 48, dtype=torch.float64)
        clip = model.clip
        x = clip.token_embedding(tokens) + clip.positional_embedding
        *_, last = self.by_hand(
            model, x, clip.transformer.resblocks, clip.attn_mask, model.text_cross_attention, model.text_adapters,
            context.mean(0, keepdim=True),
        )  # fmt: skip
        features, hidden = model.encode_text(tokens, context)
        torch.testing.assert_close(hidden, clip.ln_final(last), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(features, hidden[:, 5] @ clip.text_projection, rtol=1e-10, atol=1e-10)

    def test_order(self):
        model, (images, tokens) = adapted(image_layers=2, text_layers=1), inputs()
        calls: list[str] = []
        for name, module in model.named_modules():
            if isinstance(module, AdapterBlend | ScaledCrossAttention) or name.split(".")[-2:-1] == ["resblocks"]:
                module.register_forward_hook(lambda *_, name=name: calls.append(name))
        model.encode_image(images, randn(1, 2, 48))
        blocks = [f"clip.visual.transformer.resblocks.{index}" for index in range(4)]
        first = [blocks[0], "image_cross_attention", "image_adapters.0", blocks[1], "image_adapters.1", *blocks[2:]]
        assert calls == first
        calls.clear()
        model.encode_text(tokens, randn(1, 2, 48))
        blocks = [f"clip.transformer.resblocks.{index}" for index in range(3)]
        assert calls == [blocks[0], "text_cross_attention", "text_adapters.0", *blocks[1:]]
        calls.clear()
        model.encode_image(images)
        model.encode_text(tokens)
        assert not any("cross" in name for name in calls)

    def test_gradients_of_each_stage(self):
        model, (images, tokens) = adapted().train(), inputs()
        image_side = ("image_adapters.", "projections.", "image_cross_attention.")
        found = grads(model.encode_image(images, randn(1, 11, 48)), model)
        assert {name for name, grad in found.items() if grad is not None} == {
            name for name in found if name.startswith(image_side)
        }
        found = grads(model.encode_text(tokens, randn(2, 9, 48)), model)
        assert {name for name, grad in found.items() if grad is not None} == {
            name for name in found if name.startswith("text_")
        }

    def test_feedback_reaches_all_that_trains_and_nothing_frozen(self):
        model, (images, tokens) = adapted().train().double(), inputs(torch.float64)
        levels, image, text = model(images, tokens)
        (sum(level.square().sum() for level in levels) + (image @ text.T).square().sum()).backward()
        for name, parameter in model.named_parameters():
            if name.startswith("clip."):
                assert parameter.grad is None, name
            elif name.endswith("k_bias"):
                # Softmax is blind to a shift of all logits.
                assert parameter.grad.abs().max() < 1e-9, name
            else:
                assert parameter.grad.abs().max() > 1e-6, name

    def test_feedback_is_its_steps(self):
        model, (images, tokens) = adapted(), inputs()
        levels = model.encode_image(images).levels
        for rounds in (1, 2):
            text, hidden = model.encode_text(tokens, sum(levels) / len(levels))
            image, levels = model.encode_image(images, hidden.reshape(1, 40, 48))
            found = model.feedback(images, tokens, rounds)
            assert [level.shape for level in found.levels] == [(3, 9, 48)] * 4
            assert (found.image.shape, found.text.shape) == ((3, 32), (5, 32))
            torch.testing.assert_close([*found.levels, *found[1:]], [*levels, image, text])
        once = model.feedback(images, tokens)
        assert (once.text - text).abs().max() > 1e-6
        assert (once.image - image).abs().max() > 1e-6

    @pytest.mark.parametrize("settings", [{}, {"learnable_weight": True, "per_channel": True}])
    def test_fused_equals_reference(self, settings):
        model, (images, tokens) = adapted(cross_weight=0.4, **settings).double(), inputs(torch.float64)
        actual = model(images, tokens, rounds=2)
        with reference_operators():
            expected = model(images, tokens, rounds=2)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        found, wanted = grads(actual, model), grads(expected, model)
        assert len(found) == 4 + 3 + 4 + 2 * (8 + len(settings) // 2)
        for name, gradient in wanted.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-9 * max(scale, 1.0), msg=name)

    def test_dropout_acts_in_training_and_only_there(self):
        model, (images, tokens) = adapted(dropout=0.5), inputs()
        first = model(images, tokens).image
        assert torch.equal(first, model(images, tokens).image)
        model.train()
        assert not torch.equal(model(images, tokens).image, model(images, tokens).image)

    def test_checkpointing_gives_the_same_gradients(self):
        model, (images, tokens) = adapted(), inputs()
        expected = grads(model(images, tokens), model)
        model.clip.set_grad_checkpointing(True)
        for name, gradient in grads(model(images, tokens), model).items():
            torch.testing.assert_close(gradient, expected[name], msg=name)

    def test_compiles_in_one_graph(self):
        model, (images, tokens) = adapted(), inputs()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images, tokens)
        expected = model(images, tokens)
        torch.testing.assert_close([*compiled.levels, *compiled[1:]], [*expected.levels, *expected[1:]])
        wanted = grads(expected, model)
        for name, gradient in grads(compiled, model).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-4, msg=name)

    @pytest.mark.parametrize("way", ["cast", "autocast"])
    def test_16_bits(self, way):
        clip = small_clip()
        model, (images, tokens) = adapted(copy.deepcopy(clip)), inputs()
        expected = model(images, tokens)
        narrow = AdaptedCLIP(clip.bfloat16() if way == "cast" else clip, num_heads=2, head_dim=24).eval()
        narrow.load_adapter_state_dict(model.adapter_state_dict())
        assert narrow.image_adapters[0].adapter_weight.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            found = narrow(images.bfloat16() if way == "cast" else images, tokens)
        assert found.image.dtype == found.levels[0].dtype == torch.bfloat16
        for value, exact in zip((*found.levels, *found[1:]), (*expected.levels, *expected[1:]), strict=True):
            assert (value.float() - exact).norm() < 0.05 * exact.norm()
        assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads(found, narrow).values())


class TestState:
    def test_round_trip_of_what_trains(self):
        clip = small_clip()
        first, second = adapted(clip), adapted(clip)
        state = first.adapter_state_dict()
        trained = {name for name, p in first.named_parameters() if p.requires_grad}
        assert state.keys() == trained | {"adapter_settings"}
        images, tokens = inputs()
        expected = first(images, tokens)
        assert not torch.equal(second(images, tokens).image, expected.image)
        second.load_adapter_state_dict(state)
        assert torch.equal(second(images, tokens).image, expected.image)
        for other in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
            assert torch.equal(other(images, tokens).image, expected.image)

    def test_refusals_leave_it_alone(self):
        model = adapted()
        state = model.adapter_state_dict()
        state |= {name: torch.zeros_like(value) for name, value in state.items() if name != "adapter_settings"}
        missing = {name: value for name, value in state.items() if name != "projections.1.weight"}
        with pytest.raises(ValueError, match=r"got 1 missing \['projections\.1\.weight'\] and 1 unknown \['other'\]"):
            model.load_adapter_state_dict(missing | {"other": torch.zeros(1)})
        with pytest.raises(ValueError, match=r"projections\.1\.weight expected \(48, 64\), got \(2,\)"):
            model.load_adapter_state_dict(state | {"projections.1.weight": torch.zeros(2)})
        with pytest.raises(TypeError, match=r"projections\.1\.weight.* must have dtype"):
            model.load_adapter_state_dict(state | {"projections.1.weight": torch.zeros(48, 64, dtype=torch.int8)})
        del state["adapter_settings"]
        with pytest.raises(ValueError, match="must hold the settings of its modules as 'adapter_settings'"):
            model.load_adapter_state_dict(state)
        assert model.image_adapters[0].adapter_weight.abs().max() > 0

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"image_weight": 0.2}, "image_adapters.0: weight 0.1 in the state, 0.2 in the model"),
            ({"relu": True}, "projections.0: relu False in the state, True in the model"),
            ({"num_heads": 4, "head_dim": 12}, "image_cross_attention: num_heads 2 in the state, 4 in the model"),
            ({"feature_levels": (1, 2, 3)}, r"the model: feature_levels \[1, 2, 3, 4\] in the state, \[1, 2, 3\]"),
        ],
    )
    def test_settings_are_kept_and_compared(self, settings, message):
        state, other = adapted().adapter_state_dict(), adapted(**settings)
        state = (
            {name: value for name, value in state.items() if not name.startswith("projections.3")}
            if ("feature_levels" in settings)
            else state
        )
        with pytest.raises(ValueError, match=message):
            other.load_adapter_state_dict(state)

    def test_what_an_earlier_injection_trains_goes_on_training(self):
        clip = small_clip()
        inject_lora(clip.visual, "mlp", rank=2)
        model = AdaptedCLIP(clip, num_heads=2, head_dim=24)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert (
            {name for name in trained if name.startswith("clip.")}
            == {name for name, _ in model.named_parameters() if "lora_" in name}
            != set()
        )


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
        for rounds, error in ((0, ValueError), (1.0, TypeError)):
            with pytest.raises(error, match="feedback: rounds must be"):
                model(images, tokens, rounds)
