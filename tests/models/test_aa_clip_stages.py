"""AA-CLIP's two stages by plain formulas, the loop between them, contexts, and checkpoints."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from aa_clip_cases import adapted, grads, inputs, small_clip, unit
from oracle import randn

from pyfused import inject_lora
from pyfused.bench.models.training import reference_operators
from pyfused.models import AdaptedCLIP, AdapterBlend
from pyfused.modules import ScaledCrossAttention


class TestStages:
    def by_hand(self, model: AdaptedCLIP, x, blocks, mask, cross, adapters, context) -> list[torch.Tensor]:
        """What leaves each layer, by plain torch and the cross-attention module."""
        streams = []
        for index, block in enumerate(blocks):
            x = block(x, attn_mask=mask)
            if index == 0 and context is not None:
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
        levels = [
            unit((visual.ln_post(stream) @ projection.weight.T)[:, 1:])
            for stream, projection in zip(streams, model.projections, strict=True)
        ]
        last = visual.ln_post(streams[-1])
        detection = unit(last[:, 1:] @ model.detection_projection.weight.T).mean(1)
        expected = levels, detection, last[:, 0] @ visual.proj
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
        hidden = clip.ln_final(last)
        expected = F.leaky_relu(hidden[:, 5] @ model.text_projection.weight.T, 0.01), hidden
        actual = model.encode_text(tokens, context)
        torch.testing.assert_close(tuple(actual), expected, rtol=1e-10, atol=1e-10)
        assert actual.pooled.min() < 0
        found, wanted = grads(actual, model), grads(expected, model)
        assert {name for name, gradient in wanted.items() if gradient is not None} == {
            name for name in wanted if name.startswith("text_")
        }
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-9, msg=name)

    def test_text_context_is_layer_0_and_adapter_0_alone(self):
        model, (_, tokens) = adapted().double(), inputs(torch.float64)
        clip, adapter = model.clip, model.text_adapters[0]
        x = clip.transformer.resblocks[0](
            clip.token_embedding(tokens) + clip.positional_embedding, attn_mask=clip.attn_mask
        )
        a = F.leaky_relu(x @ adapter.adapter_weight.T)
        expected = 0.9 * x + 0.1 * a * x.norm(dim=-1, keepdim=True) / a.norm(dim=-1, keepdim=True)
        actual = model.encode_text_intermediate(tokens)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        assert torch.equal(model.text_context(tokens), actual.reshape(1, 40, 48))
        found, wanted = grads([actual], model), grads([expected], model)
        assert {name for name, gradient in wanted.items() if gradient is not None} == {"text_adapters.0.adapter_weight"}
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-9, msg=name)
        context = randn(1, 9, 48, dtype=torch.float64)
        crossed = model.text_cross_attention(x, context)
        torch.testing.assert_close(
            model.encode_text_intermediate(tokens, context), adapter(crossed), rtol=1e-10, atol=1e-10
        )
        bare = AdaptedCLIP(clip, num_heads=2, head_dim=24, text_layers=0)
        assert torch.equal(bare.encode_text_intermediate(tokens), x)

    @pytest.mark.parametrize("adapters", [False, True])
    def test_image_context(self, adapters):
        """From the frozen tower through its own projection, or through adapters and projections; whole image beside."""
        model, (images, _) = adapted(small_clip(embed_dim=48)).double(), inputs(torch.float64)
        visual = model.clip.visual
        frozen = self.by_hand(model, visual._embeds(images), visual.transformer.resblocks, None, None, [], None)
        whole = unit(visual.ln_post(frozen[-1])[:, :1] @ visual.proj)
        if adapters:
            patches = model.encode_image(images).levels
        else:
            patches = [unit(visual.ln_post(stream)[:, 1:] @ visual.proj) for stream in frozen]
        levels = model.image_context(images, adapters)
        assert [level.shape for level in levels] == [(3, 9, 48)] * 4
        assert not any(level.requires_grad for level in levels)
        torch.testing.assert_close(levels, [p + whole for p in patches], rtol=1e-10, atol=1e-10)

    def test_text_of_a_class(self):
        model, (_, tokens) = adapted().double(), inputs(torch.float64, prompts=8)
        context = randn(4, 9, 48, dtype=torch.float64)
        for given in (None, context):
            text = model.encode_class(tokens[:3], tokens[3:], given)
            pooled = unit(model.encode_text(tokens, given).pooled)
            expected = torch.stack([unit(pooled[:3].mean(0)), unit(pooled[3:].mean(0))], 1)
            torch.testing.assert_close(text, expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(text.norm(dim=0), torch.ones(2, dtype=torch.float64))

    def test_the_original_averages_the_context_only_where_batches_differ(self):
        original = adapted(text_cross={"context_reduce": "mean_if_batches_differ"}).double()
        ours, tokens = copy.deepcopy(original), inputs(torch.float64)[1]
        ours.text_cross_attention.context_reduce = "mean"
        assert original.image_cross_attention.context_reduce is None
        context = randn(5, 9, 48, dtype=torch.float64)
        for given in (context[:3], context[:1]):
            torch.testing.assert_close(original.encode_text(tokens, given), ours.encode_text(tokens, given))
        paired = torch.cat([ours.encode_text(tokens[i : i + 1], context[i : i + 1]).pooled for i in range(5)])
        torch.testing.assert_close(original.encode_text(tokens, context).pooled, paired, rtol=1e-10, atol=1e-10)
        assert (original.encode_text(tokens, context).pooled - ours.encode_text(tokens, context).pooled).abs().max() > 0

    @torch.no_grad()
    def test_prepared_contexts_are_the_contexts(self):
        model, (images, tokens) = adapted().double(), inputs(torch.float64)
        for encode, cross, given, context in (
            (model.encode_image, model.image_cross_attention, images, randn(1, 40, 48, dtype=torch.float64)),
            (model.encode_text, model.text_cross_attention, tokens, randn(3, 9, 48, dtype=torch.float64)),
        ):
            actual, expected = encode(given, cross.prepare(context)), encode(given, context)
            torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-10, atol=1e-10)

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
        image_side = ("image_adapters.", "projections.", "detection_projection.", "image_cross_attention.")
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
        (sum((level @ text.T).square().sum() for level in levels) + (image @ text.T).square().sum()).backward()
        for name, parameter in model.named_parameters():
            if name.startswith("clip."):
                assert parameter.grad is None, name
            elif name.endswith("k_bias"):
                # Softmax is blind to a shift of all logits.
                assert parameter.grad.abs().max() < 1e-9, name
            else:
                assert parameter.grad.abs().max() > 1e-6, name

    def test_feedback_is_its_steps(self):
        model, (images, tokens) = adapted().double(), inputs(torch.float64)

        def by_steps(rounds):
            levels = model.encode_image(images).levels
            for _ in range(rounds):
                text = model.encode_text(tokens, levels[0]).pooled
                context = model.encode_text_intermediate(tokens, levels[0]).reshape(1, 40, 48)
                levels, detection, _ = model.encode_image(images, context)
            return levels, detection, text

        for rounds in (1, 2):
            found, expected = model.feedback(images, tokens, rounds), by_steps(rounds)
            assert [level.shape for level in found.levels] == [(3, 9, 48)] * 4
            assert (found.detection.shape, found.text.shape) == ((3, 48), (5, 48))
            torch.testing.assert_close(tuple(found), expected)
            actual, wanted = grads(found, model), grads(expected, model)
            for name, gradient in wanted.items():
                torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-9, msg=name)
        # The images get a gradient from the text that they were given to, too.
        once = model.feedback(images, tokens)
        (through,) = torch.autograd.grad(once.text.sum(), model.image_adapters[0].adapter_weight)
        assert through.abs().max() > 1e-6
        assert (once.text - found.text).abs().max() > 1e-6
        assert (once.detection - found.detection).abs().max() > 1e-7

    @pytest.mark.parametrize("settings", [{}, {"learnable_weight": True, "per_channel": True}])
    def test_fused_equals_reference(self, settings):
        model, (images, tokens) = adapted(weight=0.4, **settings).double(), inputs(torch.float64)
        actual = model(images, tokens, rounds=2)
        with reference_operators():
            expected = model(images, tokens, rounds=2)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        found, wanted = grads(actual, model), grads(expected, model)
        assert len(found) == 4 + 3 + 4 + 2 + 2 * (8 + len(settings) // 2)
        for name, gradient in wanted.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-9 * max(scale, 1.0), msg=name)

    def test_dropout_acts_in_training_and_only_there(self):
        model, (images, tokens) = adapted(dropout=0.5), inputs()
        first = model(images, tokens).detection
        assert torch.equal(first, model(images, tokens).detection)
        model.train()
        assert not torch.equal(model(images, tokens).detection, model(images, tokens).detection)

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
        assert found.detection.dtype == found.levels[0].dtype == torch.bfloat16
        for value, exact in zip((*found.levels, *found[1:]), (*expected.levels, *expected[1:]), strict=True):
            assert (value.float() - exact).norm() < 0.05 * exact.norm()
        assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads(found, narrow).values())


CROSS = "image_cross_attention", "text_cross_attention"
PARTS = {
    1: ("text_adapters", "text_projection", "text_cross_attention"),
    2: ("image_adapters", "projections", "detection_projection", "image_cross_attention"),
}


class TestState:
    def test_round_trip_of_what_trains(self):
        clip = small_clip()
        first, second = adapted(clip), adapted(clip)
        state = first.adapter_state_dict()
        trained = {name for name, p in first.named_parameters() if p.requires_grad}
        assert state.keys() == trained | {"adapter_settings"}
        images, tokens = inputs()
        expected = first(images, tokens)
        assert not torch.equal(second(images, tokens).detection, expected.detection)
        second.load_adapter_state_dict(state)
        assert torch.equal(second(images, tokens).detection, expected.detection)
        for other in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
            assert torch.equal(other(images, tokens).detection, expected.detection)

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
            ({"feature_levels": (1, 2, 3)}, r"projections: feature_levels \[1, 2, 3, 4\] in the state, \[1, 2, 3\]"),
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

    @pytest.mark.parametrize(
        ("own", "key"),
        [
            ({"image_cross": {"weight": 0.2}}, "image_cross_attention: weight 0.1 in the state, 0.2 in the model"),
            ({"text_cross": {"weight": 0.3}}, "text_cross_attention: weight 0.1 in the state, 0.3 in the model"),
            (
                {"text_cross": {"context_reduce": None}},
                "text_cross_attention: context_reduce 'mean' in the state, None",
            ),
            ({"image_cross": {"learnable_weight": True}}, r"1 missing \['image_cross_attention\.gate'\]"),
        ],
    )
    def test_each_direction_has_a_weight_of_its_own(self, own, key):
        """... fixed or learnable, which checkpoints tell apart, and which a base model does not have."""
        model, plain = adapted(**own), adapted()
        with pytest.raises(ValueError, match=key):
            model.load_adapter_state_dict(plain.adapter_state_dict())
        model.load_adapter_state_dict(plain.adapter_state_dict(), cross_attention=False)
        assert torch.equal(model.projections[0].weight, plain.projections[0].weight)

    def test_learnable_weights(self):
        both = adapted(learnable_weight=True, image_cross={"weight": 0.3}, text_cross={"weight": 0.7})
        gates = both.image_cross_attention.gate, both.text_cross_attention.gate
        assert [gate.item() for gate in gates] == pytest.approx([0.3, 0.7])
        only = adapted(text_cross={"learnable_weight": True, "zero_init": True, "norm_match": False})
        assert only.image_cross_attention.gate is None
        assert only.text_cross_attention.gate.requires_grad
        tokens = inputs()[1]
        assert not torch.equal(only.encode_text(tokens, randn(2, 3, 48)).tokens, only.encode_text(tokens).tokens)
        with torch.no_grad():
            only.text_cross_attention.reset_parameters()
        assert torch.equal(only.encode_text(tokens, randn(2, 3, 48)).tokens, only.encode_text(tokens).tokens)

    @pytest.mark.parametrize("stages", [(1,), (2,), (1, 2)])
    @pytest.mark.parametrize("crossed", [True, False])
    @pytest.mark.parametrize("whole", [True, False])
    def test_a_stage_is_loaded_from_a_file_with_and_without_the_rest(self, stages, crossed, whole):
        first, second = adapted(), adapted()
        parts = [part for stage in stages for part in PARTS[stage] if crossed or part not in CROSS]
        state = first.adapter_state_dict() if whole else first.adapter_state_dict(stages, crossed)
        if not whole:
            assert {name.partition(".")[0] for name in state} == {*parts, "adapter_settings"}
        before = {name: value.clone() for name, value in second.adapter_state_dict().items()}
        second.load_adapter_state_dict(state, stages=stages, cross_attention=crossed)
        source = first.adapter_state_dict()
        for name, value in second.adapter_state_dict().items():
            expected = source if name.partition(".")[0] in parts else before
            assert torch.equal(value, expected[name]), name
        moved = [name for name, value in before.items() if not torch.equal(value, second.adapter_state_dict()[name])]
        assert {name.partition(".")[0] for name in moved} == set(parts)

    def test_a_part_that_is_asked_for_must_be_there(self):
        model = adapted()
        before = {name: value.clone() for name, value in model.adapter_state_dict().items()}
        base = adapted().adapter_state_dict(cross_attention=False)
        with pytest.raises(ValueError, match=r"got 16 missing \['image_cross_attention.k_bias', .* and 0 unknown"):
            model.load_adapter_state_dict(base)
        with pytest.raises(ValueError, match=r"got 0 missing \[\] and 1 unknown \['lora_a'\]"):
            model.load_adapter_state_dict(base | {"lora_a": torch.zeros(1)}, cross_attention=False)
        other = adapted(image_weight=0.3).adapter_state_dict()
        with pytest.raises(ValueError, match=r"image_adapters\.0: weight 0\.3 in the state, 0.1 in the model"):
            model.load_adapter_state_dict(other, stages=(2,))
        with pytest.raises(TypeError, match="state must be a mapping of names to tensors, got list"):
            model.load_adapter_state_dict([], cross_attention=False)
        with pytest.raises(ValueError, match="must be the settings that pyfused wrote, got not a tensor of bytes"):
            model.load_adapter_state_dict(base | {"adapter_settings": torch.zeros(3)}, cross_attention=False)
        with pytest.raises(ValueError, match=r"load_adapter_state_dict: stage must be one of \(1, 2\), got 3"):
            model.load_adapter_state_dict(base, stages=(3,))
        with pytest.raises(TypeError, match="cross_attention must be a bool, got 'no'"):
            model.load_adapter_state_dict(base, cross_attention="no")
        assert all(torch.equal(value, before[name]) for name, value in model.adapter_state_dict().items())
        model.load_adapter_state_dict(other, stages=(1,))
        assert torch.equal(model.text_adapters[0].adapter_weight, other["text_adapters.0.adapter_weight"])

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
