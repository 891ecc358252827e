"""Changing a model in place: all or nothing, nothing dead, nothing silent, and what came before goes on."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyfused import (
    BottleneckAdapter,
    LoRAConv2d,
    LoRALinear,
    LoRAModule,
    LoRAMultiheadAttention,
    PrefixTuning,
    fuse,
    inject_lora,
    load_lora_state_dict,
    lora_state_dict,
    remove_lora,
    unfuse,
)
from pyfused.lora import third_party
from pyfused.lora.targets import group_of
from pyfused.surgery.change import all_or_nothing
from pyfused.surgery.guards import hold_batchnorms
from pyfused.surgery.paths import places


def wake(model: nn.Module) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)


def snapshot(model: nn.Module) -> tuple:
    """Everything an injection could change, by identity."""
    return (
        [(path, id(module), type(module), module.training) for path, module in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
        [sorted(module.__dict__) for module in model.modules()],
    )


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.conv = nn.Conv2d(1, 1, 1)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.attn(x, x, x, need_weights=False)[0]
        x = self.norm(self.mlp(x).transpose(1, 2)).transpose(1, 2)
        return self.head(self.conv(x[:, None])[:, 0].mean(1))


class TestTargets:
    @pytest.mark.parametrize(
        ("target", "expected"),
        [
            ("all-linear", {"attn.in_proj", "attn.out_proj", "mlp.0", "mlp.2"}),
            ("attention", {"attn.in_proj", "attn.out_proj"}),
            ("mlp", {"mlp.0", "mlp.2"}),
            ("conv1x1", {"conv"}),
            (("attention", "conv1x1"), {"attn.in_proj", "attn.out_proj", "conv"}),
            # A keyword leaves the head alone, its name does not.
            (("mlp", "head"), {"mlp.0", "mlp.2", "head"}),
        ],
    )
    def test_keywords(self, target, expected):
        report = inject_lora(Tower(), target, rank=2)
        assert {row.path for row in report.rows} == expected

    @pytest.mark.parametrize(
        ("path", "group"),
        [
            ("transformer.resblocks.0.attn.out_proj", "attention"),
            ("transformer.resblocks.0.mlp.c_proj", "mlp"),
            ("h.0.attn.c_proj", "attention"),
            ("encoder.layer.0.attention.output.dense", "attention"),
            ("encoder.layer.0.intermediate.dense", "mlp"),
            ("encoder.layer.0.output.dense", "mlp"),
            ("encoder.block.0.layer.0.SelfAttention.q", "attention"),
            ("encoder.block.0.layer.1.DenseReluDense.wi_0", "mlp"),
            ("layers.0.block_sparse_moe.experts.0.w1", "mlp"),
            ("stages.0.blocks.0.pwconv1", "mlp"),
            ("pooler.dense", "other"),
        ],
    )
    def test_groups(self, path, group):
        assert group_of(path) == group

    @pytest.mark.parametrize(
        ("path", "classes", "group"),
        [
            ("stages.0.token_mixer.proj", "S Attention", "attention"),
            ("stages.0.e_mhsa.k", "S EfficientAttention", "attention"),
            ("stages.0.xca.proj", "S CrossCovarianceAttn", "attention"),
            ("layers.0.self_attention.q_proj", "L LightGlueAttention", "attention"),
            ("encoder.visn_self_att.output.dense", "E LxmertSelfAttentionLayer LxmertAttentionOutput", "attention"),
            ("layer.0.lang_output.dense", "L LxmertOutput", "mlp"),
            ("layer.0.layout_intermediate.dense", "L LiltIntermediate", "mlp"),
            ("blocks.0.channel_mixer.conv1.c", "B RepVitMlp ConvNorm", "mlp"),
            # Not what a whole block or a head is called.
            ("resblocks.0.mlp.c_fc", "ResidualAttentionBlock Sequential", "mlp"),
            ("stages.0.conv1_1x1.conv", "SelfAttnBlock ConvNormAct", "other"),
            ("decoder.bbox_embed.layers.0", "D DetrMLPPredictionHead ModuleList", "other"),
            ("mask_decoder.iou_head.proj_in", "M Sam2FeedForward", "other"),
            ("layers.0.fc1", "MaskedAttentionDecoderLayer", "mlp"),
            # Weights of channels and tables of positions, wherever they stand.
            ("stages.0.se.fc1", "S SEModule", "other"),
            ("stages.0.attention.fc", "S EffectiveSEModule", "other"),
            ("layer.1.attention.0", "RegNetSELayer Sequential", "other"),
            ("blocks.0.conv.fc1", "B SplitAttn", "other"),
            ("blocks.0.attn.rel_pos.mlp.fc1", "B AttentionRel RelPosMlp Mlp", "other"),
            ("blocks.0.attn.cpb_mlp.fc1", "B WindowAttention Mlp", "other"),
            # A state-space layer and a short convolution have an out_proj too.
            ("layers.0.mixer.out_proj", "L NemotronHMamba2Mixer", "other"),
            ("layers.0.conv.out_proj", "L Lfm3ShortConv", "other"),
            ("layers.0.linear_attn.out_proj", "L Qwen3NextGatedDeltaNet", "attention"),
        ],
    )
    def test_groups_by_class(self, path, classes, group):
        names = classes.split()
        hosts = [nn.Module() for _ in path.split(".")[:-1]]
        for host, name in zip(hosts[len(hosts) - len(names) :], names, strict=True):
            host.__class__ = type(name, (nn.Module,), {})
        assert group_of(path, hosts) == group

    @pytest.mark.parametrize(
        ("given", "hint"),
        [
            ({"r": 8}, "no argument 'r'; here it is rank"),
            ({"lora_alpha": 8}, "no argument 'lora_alpha'; here it is alpha"),
            ({"lora_dropout": 0.1}, "no argument 'lora_dropout'; here it is dropout"),
            ({"modules_to_save": ["head"]}, "no argument 'modules_to_save'; here it is train"),
            ({"spoon": 1}, "no argument 'spoon'$"),
        ],
    )
    def test_names_of_peft_are_answered(self, given, hint):
        model = Tower()
        before = snapshot(model)
        with pytest.raises(TypeError, match=f"inject_lora: {hint}"):
            inject_lora(model, **given)
        assert snapshot(model) == before

    def test_rank_and_alpha_by_pattern(self):
        model = Tower()
        report = inject_lora(model, rank={"out_proj": 3, "attention": 5}, alpha={"mlp": 7})
        assert {row.path: row.rank for row in report.rows} == {
            "attn.in_proj": 5, "attn.out_proj": 3, "mlp.0": 16, "mlp.2": 16,
        }  # fmt: skip
        assert model.mlp[0].scaling == 7 / 16
        assert model.attn.scaling == 32 / 5
        assert model.attn.out_proj.scaling == 32 / 3
        wake(model)
        x = torch.randn(2, 4, 8)
        expected = model.eval()(x)
        remove_lora(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("setting", ["rank", "alpha"])
    def test_a_pattern_that_selects_nothing_is_refused(self, setting):
        model = Tower()
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"{setting} must name modules that are adapted, got 'qkv'"):
            inject_lora(model, **{setting: {"mlp": 4, "qkv": 4}})
        assert snapshot(model) == before

    @pytest.mark.parametrize("value", [{"mlp": 0}, {"mlp": 2.0}, {"mlp": True}])
    def test_each_rank_of_a_pattern_is_checked(self, value):
        with pytest.raises((TypeError, ValueError), match="rank must be"):
            inject_lora(Tower(), rank=value)


class TestNothingSilent:
    def test_what_is_left_alone_and_why(self):
        model = Tower()
        model.table = nn.Embedding(5, 8)
        model.experts = nn.Parameter(torch.randn(4, 8, 8))
        model.proj = nn.Parameter(torch.randn(8, 8))
        model.pos_embed = nn.Parameter(torch.randn(1, 4, 8))
        report = inject_lora(model, rank=2, exclude=["mlp.2"])
        left = {path: (row.kind, row.why) for row in report.left for path in row.paths}
        assert left == {
            "conv": ("Conv2d 1x1", 'a 1x1 convolution: target "conv1x1" adapts it'),
            "head": ("Linear", 'a classifier head; a fresh one trains whole: train=("head",)'),
            "mlp.2": ("Linear", "in exclude"),
            "table": ("Embedding", "an embedding"),
            "experts": ("Parameter", "experts stacked in one parameter"),
            "proj": ("Parameter", "a matrix that is in no layer"),
            "pos_embed": ("Parameter", "an embedding or a table"),
        }
        text = str(report)
        assert "left alone, and why" in text
        assert 'train=("head",)' in text
        assert {row.kind: row.parameters for row in report.left}["Embedding"] == 40

    def test_a_tied_weight_is_noted(self):
        model = nn.ModuleDict(
            {"embed": nn.Embedding(8, 8), "proj": nn.Linear(8, 8), "out": nn.Linear(8, 8, bias=False)}
        )
        model["out"].weight = model["embed"].weight
        report = inject_lora(model, rank=2)
        expected = "out shares its weight with embed, which gets no LoRA by that; merging gives it a weight of its own"
        assert report.notes == (expected,)
        assert inject_lora(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), rank=2).notes == ()

    def test_quantised_layers_are_listed(self):
        class Linear8bit(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.in_features, self.out_features = 8, 8
                self.register_buffer("weight", torch.zeros(8, 8, dtype=torch.int8))

        report = inject_lora(nn.Sequential(nn.Linear(8, 8), Linear8bit(), nn.Linear(8, 8)), rank=2)
        assert [(row.kind, row.count, row.parameters) for row in report.left] == [("Linear8bit", 1, 64)]

    def test_example_inputs_refuse_what_does_not_run(self):
        model = Tower()
        model.spare = nn.Linear(8, 8)
        before = snapshot(model)
        x = torch.randn(2, 4, 8)
        for given in (x, (x,), [x], {"x": x}):
            with pytest.raises(ValueError, match="got 1 that were never called: spare; leave them out by exclude"):
                inject_lora(model, ["mlp", "spare"], example_inputs=given)
            assert snapshot(model) == before
        report = inject_lora(model, rank=2, exclude=["spare"], example_inputs=x)
        assert report.total == 4

    def test_example_inputs_leave_no_trace(self):
        model = Tower().train()
        statistics = copy.deepcopy(model.norm.state_dict())
        generator = torch.get_rng_state()
        inject_lora(
            model, "mlp", rank=2, freeze_batchnorm=False, example_inputs=torch.randn(2, 4, 8, dtype=torch.float32)
        )
        assert all(torch.equal(value, model.norm.state_dict()[name]) for name, value in statistics.items())
        assert generator.shape == torch.get_rng_state().shape
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_a_failing_example_leaves_the_model_as_it_was(self):
        model = Tower()
        before = snapshot(model)
        with pytest.raises((RuntimeError, ValueError, AssertionError)):
            inject_lora(model, rank=2, example_inputs=torch.randn(2, 4, 5))
        assert snapshot(model) == before


class ReadsItself(nn.Module):
    """Like many attentions: the layer's weight is taken, the layer is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(F.linear(x, self.proj.weight, self.proj.bias))


class ReadsAttention(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.attn, self.fc, self.name = nn.MultiheadAttention(8, 2), nn.Linear(8, 8), name


class ReadsInProj(ReadsAttention):
    def forward(self, x):
        return self.fc(F.linear(x, self.attn.in_proj_weight)[..., :8])


class ReadsOutProj(ReadsAttention):
    def forward(self, x):
        return self.fc(F.linear(x, self.attn.out_proj.weight))


class TestNothingDead:
    @pytest.mark.parametrize("host", [ReadsInProj, ReadsOutProj])
    def test_an_attention_whose_weights_are_read(self, host):
        report = inject_lora(nn.Sequential(host("attn")), rank=2)
        assert [row.path for row in report.rows] == ["0.fc"]

    def test_a_layer_whose_weight_is_read_is_refused_by_name(self):
        model = nn.Sequential(ReadsItself())
        before = snapshot(model)
        with pytest.raises(TypeError, match=r"0\.proj: expected a layer that is called, got one whose weight ReadsI"):
            inject_lora(model, "proj")
        assert snapshot(model) == before

    def test_a_keyword_leaves_it_alone_with_a_note(self):
        report = inject_lora(nn.Sequential(ReadsItself()), rank=2)
        assert [row.path for row in report.rows] == ["0.fc"]
        assert "whose weight ReadsItself reads itself" in str(report)

    def test_facts_about_a_weight_are_no_reading(self):
        class AsksFirst(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.proj = nn.Linear(8, 8)

            def forward(self, x):
                if isinstance(self.proj.weight, torch.Tensor) and self.proj.weight.dtype != x.dtype:
                    x = x.to(self.proj.weight.dtype)
                return self.proj(x)

        assert inject_lora(nn.Sequential(AsksFirst()), rank=2).total == 1

    def test_timm_attention_calls_its_qkv(self):
        timm = pytest.importorskip("timm")
        torch.manual_seed(0)
        model = timm.create_model("beit_base_patch16_224", img_size=32, depth=1, embed_dim=48, num_heads=4).eval()
        x = torch.randn(2, 3, 32, 32)
        expected = model(x)
        inject_lora(model, "qkv", rank=2)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
        assert isinstance(model.blocks[0].attn, third_party.CallingQKV)
        wake(model)
        moved = model(x)
        assert (moved - expected).abs().max() > 1e-6
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(x), moved)
        remove_lora(model, merge=False)
        assert not isinstance(model.blocks[0].attn, third_party.CallingQKV)
        assert torch.equal(model(x), expected)

    def test_the_attention_pool_calls_its_projections(self):
        pytest.importorskip("open_clip")
        from open_clip.modified_resnet import AttentionPool2d

        torch.manual_seed(0)
        model = nn.Sequential(AttentionPool2d(4, 16, 4, 8)).double().eval()
        x = torch.randn(3, 16, 4, 4, dtype=torch.float64)
        expected = model(x)
        report = inject_lora(model, rank=2)
        assert {row.path for row in report.rows} == {f"0.{name}_proj" for name in "qkvc"}
        assert isinstance(model[0], third_party.CallingPool)
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
        wake(model)
        moved = model(x)
        moved.square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "lora_b" in name)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(x), moved)
        remove_lora(model)
        assert type(model[0]) is AttentionPool2d
        torch.testing.assert_close(model(x), moved, rtol=1e-9, atol=1e-11)


class TestConv1D:
    """transformers' linear layer with its weight transposed."""

    @staticmethod
    def made(**settings):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        model = nn.Sequential(transformers.pytorch_utils.Conv1D(6, 5))
        inject_lora(model, rank=3, alpha=6, **settings)
        wake(model)
        return model

    def test_against_the_formula(self):
        model = self.made().double()
        layer, x = model[0], torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
        y = model(x)
        expected = x @ layer.weight + layer.bias + 2.0 * (x @ layer.lora_a.double().T) @ layer.lora_b.double().T
        torch.testing.assert_close(y, expected)
        wanted = torch.autograd.grad(expected.square().sum(), [x, layer.lora_a, layer.lora_b])
        for found, want in zip(
            torch.autograd.grad(y.square().sum(), [x, layer.lora_a, layer.lora_b]), wanted, strict=True
        ):
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)

    def test_merge_and_back(self):
        model, x = self.made(), torch.randn(4, 5)
        y, weight = model(x), model[0].weight
        model[0].merge()
        torch.testing.assert_close(model.eval()(x), y)
        model[0].unmerge()
        assert model[0].weight is weight
        remove_lora(model)
        torch.testing.assert_close(model(x), y)
        assert type(model[0]).__name__ == "Conv1D"

    def test_copies(self):
        model, x = self.made(), torch.randn(4, 5)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other[0]) is type(model[0])
            assert torch.equal(other(x), model(x))
        assert type(model[0]).__name__ == "LoRAConv1D"


class TestPackedAttention:
    """open_clip's own attention, whose in_proj_weight is a parameter of it."""

    @staticmethod
    def made(qkv="joint", **settings):
        pytest.importorskip("open_clip")
        from open_clip.transformer import Attention

        torch.manual_seed(0)
        model = nn.Sequential(Attention(16, 4, **settings)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Scales of 1 and biases of 0 would hide what is done with them.
                parameter.add_(0.2 * torch.randn(parameter.shape))
        base = copy.deepcopy(model)
        inject_lora(model, rank=2, qkv=qkv)
        return model, base

    @pytest.mark.parametrize("qkv", ["joint", "split"])
    @pytest.mark.parametrize(
        "settings",
        [{}, {"qkv_bias": False}, {"scale_heads": True}, {"qk_norm": True, "inner_norm": True}],
        ids=str,
    )
    def test_against_open_clip_with_merged_weights(self, qkv, settings):
        pytest.importorskip("open_clip")
        import inspect

        from open_clip.transformer import Attention

        if not settings.keys() <= inspect.signature(Attention.__init__).parameters.keys():
            pytest.skip(f"this open_clip has no {settings}")
        model, base = self.made(qkv, **settings)
        x = torch.randn(3, 5, 16)
        masks = (
            None,
            torch.ones(5, 5).triu(1).bool(),
            torch.randn(5, 5),
            torch.ones(12, 5, 5).triu(1).bool(),
        )
        for mask in masks:
            torch.testing.assert_close(model[0](x, attn_mask=mask), base[0](x, attn_mask=mask), rtol=1e-5, atol=1e-6)
        wake(model)
        moved = [model[0](x, attn_mask=mask) for mask in masks]
        assert (moved[0] - base(x)).abs().max() > 1e-3
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), moved[0])
        remove_lora(model)
        assert type(model[0]) is Attention
        for mask, expected in zip(masks, moved, strict=True):
            torch.testing.assert_close(model[0](x, attn_mask=mask), expected, rtol=1e-4, atol=1e-5)

    def test_scaled_cosine_is_refused(self):
        pytest.importorskip("open_clip")
        from open_clip.transformer import Attention

        with pytest.raises(ValueError, match="scaled_cosine must be False"):
            inject_lora(nn.Sequential(Attention(16, 4, scaled_cosine=True)))


@pytest.mark.parametrize("made", [TestConv1D.made, lambda: TestPackedAttention.made()[0]], ids=["Conv1D", "packed"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_same_bits_in_every_mode(made, autocast):
    model = made()
    width = next(iter(model.parameters())).shape[-1] if isinstance(model[0], third_party.LoRAProjections) else 5
    x = torch.randn(2, 7, width)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    results = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for function in (model, compiled):
            with mode(), torch.autocast("cpu", autocast, enabled=autocast is not None):
                results.append(function(x).detach().clone())
    assert all(torch.equal(result, results[0]) for result in results)


class TestCasts:
    """A model that is cast after the injection computes as one that was cast before it, and trains the same way."""

    @staticmethod
    def made(cast, order):
        transformers = pytest.importorskip("transformers")
        attention = pytest.importorskip("open_clip.transformer").Attention
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Unflatten(1, (1, 8)),
            nn.Conv2d(1, 2, 3, padding=1),
            nn.Conv2d(2, 1, 1),
            nn.Flatten(1, 2),
            nn.Linear(8, 8),
            nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True),
            transformers.pytorch_utils.Conv1D(8, 8),
            attention(8, 2),
        )
        if order == "before":
            cast(model)
        torch.manual_seed(1)
        inject_lora(model, ("all-linear", "1", "2"), rank=2)
        wake(model)
        if order == "after":
            cast(model)
        return model

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("way", ["half() and the like", "to", "part by part"])
    def test_of_every_kind(self, dtype, way):
        def cast(model):
            for part in model.children() if way == "part by part" else [model]:
                part.to(dtype) if way == "to" else getattr(part, str(dtype).removeprefix("torch."), part.half)()

        before, after = (self.made(cast, order) for order in ("before", "after"))
        assert {type(m).__name__ for m in after.modules() if isinstance(m, LoRAModule)} == {
            "LoRALinear", "LoRAConv2d", "LoRAMultiheadAttention", "LoRAConv1D", "LoRAPackedAttention",
        }  # fmt: skip
        for name, parameter in after.named_parameters():
            assert parameter.dtype == (torch.float32 if "lora_" in name else dtype), name
            assert torch.equal(parameter, before.get_parameter(name)), name
        x = torch.randn(4, 8, 8, dtype=dtype)
        assert torch.equal(before(x), after(x))
        # Gradients of float16 parameters are what GradScaler refuses to unscale.
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        trained = {name: p for name, p in after.named_parameters() if p.requires_grad}
        start = {name: p.detach().clone() for name, p in trained.items()}
        optimizer = torch.optim.SGD(trained.values(), lr=0.1)
        scaler.scale(after(x).float().square().mean()).backward()
        after.to(dtype)
        assert {p.grad.dtype for p in trained.values()} == {torch.float32}
        scaler.step(optimizer)
        assert not [name for name, p in trained.items() if torch.equal(p, start[name])]

    def test_wider_casts_are_followed(self):
        model = self.made(nn.Module.double, "after")
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        assert {p.dtype for name, p in model.half().named_parameters() if "lora_" in name} == {torch.float32}


class TestBoundMethods:
    """A method that a layer keeps as an attribute belongs to the module that takes the layer's place."""

    @pytest.mark.parametrize(
        ("kind", "sizes"), [(nn.Linear, (8, 8)), (nn.Conv2d, (8, 8, 1)), (nn.MultiheadAttention, (8, 2))]
    )
    def test_there_and_back(self, kind, sizes):
        model = nn.ModuleList([kind(*sizes)])
        model[0].described = model[0].extra_repr
        model[0].names = types.MethodType(lambda module: type(module).__name__, model[0])
        inject_lora(model, "conv1x1" if kind is nn.Conv2d else "all-linear", rank=2)
        assert model[0].names() == type(model[0]).__name__ == f"LoRA{kind.__name__}"
        assert model[0].described.__self__ is model[0]
        remove_lora(model)
        assert model[0].names() == kind.__name__
        assert model[0].described.__self__ is model[0]

    def test_hooks_of_the_state_dict(self):
        model = nn.Sequential(nn.Linear(8, 8))
        seen = []
        model[0].register_load_state_dict_pre_hook(lambda module, *rest: seen.append(module))
        inject_lora(model, rank=2)
        gc.collect()
        model.load_state_dict(model.state_dict())
        assert seen == [model[0]]


class TestCompiled:
    """What was compiled goes on running what it was compiled of: nothing is put in its place without a word."""

    def test_a_layer_with_its_own_compile(self):
        model = Tower()
        model.mlp[0].compile(backend="eager")
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"expected a Linear that is not compiled.*compile it afterwards"):
            inject_lora(model, rank=2)
        assert snapshot(model) == before
        assert inject_lora(model, rank=2, exclude=["mlp.0"]).total == 3

    def test_taking_out_a_layer_with_its_own_compile(self):
        model = Tower()
        inject_lora(model, rank=2)
        model.mlp[0].compile(backend="eager")
        before = snapshot(model)
        with pytest.raises(ValueError, match="that is not compiled"):
            remove_lora(model)
        assert snapshot(model) == before

    def test_a_layer_in_torch_compile(self):
        model = Tower()
        model.mlp[0] = torch.compile(model.mlp[0], backend="eager")
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"torch.compile made a module of this Linear"):
            inject_lora(model, rank=2)
        assert snapshot(model) == before

    def test_blocks_of_fastvit(self):
        pytest.importorskip("timm")
        from models_setup import fastvit

        from pyfused.models import add_adapters, remove_adapters

        model = fastvit("fastvit_t8")
        block = model.stages[0].blocks[0]
        block.compile(backend="eager")
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"expected a RepMixerBlock that is not compiled"):
            add_adapters(model)
        assert snapshot(model) == before
        block._compiled_call_impl = None
        add_adapters(model)
        model.stages[0].blocks[0].compile(backend="eager")
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"that is not compiled"):
            remove_adapters(model)
        assert snapshot(model) == before

    def test_a_block_in_torch_compile_and_a_whole_model(self):
        model, x = Tower().eval(), torch.randn(2, 4, 8)
        model.mlp = torch.compile(model.mlp, backend="eager")
        compiled = torch.compile(model, backend="eager")
        expected = compiled(x)
        report = inject_lora(compiled, rank=2)
        assert {row.path for row in report.rows} == {
            f"_orig_mod.{name}" for name in ("attn.in_proj", "attn.out_proj", "mlp._orig_mod.0", "mlp._orig_mod.2")
        }
        torch.testing.assert_close(compiled(x), expected)
        wake(model)
        y = compiled(x)
        assert (y - expected).abs().max() > 1e-3
        y.sum().backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


class TestHeadsInside:
    def test_of_a_model_in_a_wrapper(self):
        transformers = pytest.importorskip("transformers")
        bert = transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
            )
        )
        wrapper = nn.Module()
        wrapper.lm = bert
        report = inject_lora(wrapper, rank=2)
        assert not any("classifier" in row.path for row in report.rows)
        assert any("lm.classifier" in row.paths for row in report.left)

    def test_of_a_language_model_in_a_wrapper(self):
        transformers = pytest.importorskip("transformers")
        wrapper = nn.Module()
        wrapper.lm = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
            )
        )
        report = inject_lora(wrapper, rank=2)
        assert not any("lm_head" in row.path for row in report.rows)


class TestTrainedWeights:
    @pytest.mark.parametrize("name", ["mlp.0.weight", "attn.in_proj_weight", "attn.out_proj.weight"])
    def test_a_weight_that_trains_whole_gets_no_lora(self, name):
        model = Tower()
        report = inject_lora(model, rank=2, train=[name])
        adapted = name.replace("_weight", "").replace(".weight", "")
        assert adapted not in {row.path for row in report.rows}
        assert report.total == 3
        assert model.get_parameter(name).requires_grad

    def test_a_bias_that_trains_does_not_matter(self):
        assert inject_lora(Tower(), rank=2, train=["mlp.0.bias"]).total == 4

    def test_a_tied_weight_that_trains(self):
        model = nn.ModuleDict({"embed": nn.Embedding(8, 8), "out": nn.Linear(8, 8), "proj": nn.Linear(8, 8)})
        model["out"].weight = model["embed"].weight
        report = inject_lora(model, rank=2, train=["embed"])
        assert [row.path for row in report.rows] == ["proj"]
        assert {row.why for row in report.left if "out" in row.paths} == {"trains whole: in train"}


@pytest.mark.parametrize("module", [LoRALinear(8, 8, rank=2), BottleneckAdapter(8)], ids=lambda m: type(m).__name__)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_is_refused_in_words(module):
    with pytest.raises(RuntimeError, match=f"{type(module).__name__}: torch.jit.script cannot compile it"):
        torch.jit.script(nn.Sequential(nn.Linear(8, 8), module))


def _with_lora(**settings):
    def put(model):
        inject_lora(model, ["all-linear", "conv1x1"], rank=2)
        return lambda: remove_lora(model, **settings)

    return Tower(), torch.randn(2, 5, 8), put


def _with_adapters():
    pytest.importorskip("timm")
    from models_setup import fastvit, fastvit_block

    from pyfused.models import add_adapters, remove_adapters

    def put(model):
        add_adapters(model, conv_lora_rank=2)
        return lambda: remove_adapters(model)

    stage = fastvit().stages[1]
    stage.blocks.add_module("attention", fastvit_block("AttentionBlock"))
    return nn.Sequential(stage), torch.randn(1, 16, 8, 8), put


def _with_tokens(deep):
    from models_setup import small_vit

    return small_vit(), torch.randn(2, 3, 16, 16), lambda model: PrefixTuning(model, 2, deep=deep).remove


def _with_fused():
    peft = pytest.importorskip("peft")

    def put(model):
        fuse(model, attention=True)
        return lambda: unfuse(model)

    config = peft.LoraConfig(target_modules=["attn", "mlp.0", "mlp.2", "conv"])
    return peft.get_peft_model(Tower(), config), torch.randn(2, 5, 8), put


class TestTakingOut:
    @pytest.mark.parametrize(
        "make",
        [
            _with_lora,
            lambda: _with_lora(merge=False),
            _with_adapters,
            lambda: _with_tokens(True),
            lambda: _with_tokens(False),
            _with_fused,
        ],
        ids=["LoRA", "LoRA unmerged", "adapters", "tokens", "shallow tokens", "fused"],
    )
    def test_a_forward_that_was_replaced_is_refused(self, make):
        """It calls that of the module or class as it was: what was taken out would go on running."""
        model, x, put = make()
        base = model.eval()(x)
        before = {path: type(module) for path, module in model.named_modules()}
        take_out = put(model)

        def replace(module):
            own = module.forward
            module.forward = lambda *args, **kwargs: own(*args, **kwargs)

        changed = [m for path, m in model.named_modules() if before.get(path, type(m)) is not type(m)]
        norms = [module for module in changed if "Norm" in type(module).__name__]
        for norm in norms:
            # They go on with the forward that they had.
            replace(norm)
        assert len(changed) > len(norms)
        for module in changed:
            if module in norms:
                continue
            replace(module)
            with pytest.raises(RuntimeError, match="needs the module's own forward, got one that replaces it"):
                take_out()
            del module.forward
        take_out()
        torch.testing.assert_close(model.eval()(x), base)
        assert all(type(module) is before[path] for path, module in model.named_modules())

    def test_norms_stay_held_while_another_adapter_is_there(self):
        pytest.importorskip("timm")
        from models_setup import fastvit

        from pyfused.models import add_adapters, remove_adapters

        for first, second in ((remove_lora, remove_adapters), (remove_adapters, remove_lora)):
            model = fastvit("fastvit_t8")
            add_adapters(model)
            inject_lora(model, "fc1", rank=2)
            norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
            first(model)
            assert not any(norm.training for norm in model.train().modules() if isinstance(norm, nn.BatchNorm2d))
            second(model)
            assert all(norm.training for norm in norms)

    def test_nested_tensors_come_back(self):
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
        assert encoder.use_nested_tensor
        inject_lora(encoder, rank=2)
        for other in (encoder, copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
            assert not other.use_nested_tensor
        remove_lora(encoder)
        assert encoder.use_nested_tensor
        assert type(encoder) is nn.TransformerEncoder

    @pytest.mark.parametrize("merge", [True, False])
    def test_under_inference_mode(self, merge):
        model = Tower()
        inject_lora(model, rank=2)
        with torch.inference_mode():
            remove_lora(model, merge=merge)
        assert not any(p.is_inference() for p in model.parameters())
        assert inject_lora(model, rank=2).total == 4


class TestAllOrNothing:
    def test_a_parent_that_refuses_the_new_module(self):
        class Picky(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

            def __setattr__(self, name, value):
                if name == "third" and isinstance(value, LoRALinear):
                    raise RuntimeError("not here")
                super().__setattr__(name, value)

        model = nn.Sequential(Picky(), nn.BatchNorm1d(4))
        before = snapshot(model)
        with pytest.raises(RuntimeError, match="not here"):
            inject_lora(model, rank=2)
        assert snapshot(model) == before

    def test_a_key_with_a_dot(self):
        model = nn.Module()
        model._modules["a.b"] = nn.Linear(4, 4)
        model.add_module("c", nn.Linear(4, 4))
        before = snapshot(model)
        try:
            inject_lora(model, rank=2)
        except (KeyError, ValueError, TypeError, RuntimeError):
            assert snapshot(model) == before

    def test_undone_in_reverse(self):
        model = Tower().train()
        before = snapshot(model)

        def interrupted():
            with all_or_nothing() as change:
                place = next(p for p in places(model, lambda module: False) if p.paths == ["mlp.0"])
                change.replace(place, LoRALinear.from_linear(place.module, rank=2, freeze=False))
                change.freeze(model)
                change.keep_training(model, [model.head.weight])
                hold_batchnorms(model, change)
                change.set(model, "training", False)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert snapshot(model) == before

    def test_what_was_done_inside_another_is_undone_with_it(self):
        model = Tower().train()
        before = snapshot(model)

        def around(error=None):
            with all_or_nothing() as change:
                change.set(model, "training", False)
                inject_lora(model, "attention", rank=2)
                inject_lora(model, "mlp", rank=2, train=["head"])
                with contextlib.suppress(ValueError):
                    inject_lora(model, "nowhere")
                if error:
                    raise error

        with pytest.raises(KeyboardInterrupt):
            around(KeyboardInterrupt())
        assert snapshot(model) == before
        around()
        after = snapshot(model)
        assert after != before
        # What has ended is nobody's part any more.
        with pytest.raises(KeyboardInterrupt), all_or_nothing():
            raise KeyboardInterrupt
        assert snapshot(model) == after


class TestSecondCall:
    @pytest.mark.parametrize("travel", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_what_the_first_set_to_train_goes_on(self, travel):
        model = Tower()
        inject_lora(model, "attention", rank=2, train=["head", "norm.weight"])
        model = travel(model)
        inject_lora(model, "mlp", rank=2)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {name for name in trained if "lora_" not in name} == {"head.weight", "head.bias", "norm.weight"}
        assert sum("attn" in name for name in trained) == 4
        assert sum("mlp" in name for name in trained) == 4

    def test_what_was_only_not_yet_frozen_is_frozen(self):
        model = nn.ModuleDict({"visual": Tower(), "text": Tower()})
        inject_lora(model["visual"], "mlp", rank=2)
        inject_lora(model, "attention", rank=2)
        assert {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name} == set()

    def test_what_was_frozen_since_stays_frozen(self):
        model = Tower()
        inject_lora(model, "attention", rank=2, train=["head"])
        model.head.requires_grad_(False)
        inject_lora(model, "mlp", rank=2)
        assert not model.head.weight.requires_grad

    def test_other_adapters_go_on(self):
        model = nn.Sequential(nn.Linear(8, 8), BottleneckAdapter(8))
        inject_lora(model, rank=2)
        assert all(p.requires_grad for p in model[1].parameters())


class TestRefusedModels:
    def test_peft(self):
        peft = pytest.importorskip("peft")
        model = Tower()
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["head"]))
        for given in (wrapped, model):
            with pytest.raises(ValueError, match=r"model must not be PEFT's, got .*merge_and_unload\(\)"):
                inject_lora(given)

    def test_sharded(self):
        class FSDPModule(nn.Module):
            pass

        model = nn.Sequential(Tower(), FSDPModule())
        with pytest.raises(ValueError, match=r"model must not be sharded, got the FSDPModule '1'; inject first"):
            inject_lora(model)

    def test_distributed_data_parallel(self):
        wrapper = nn.Sequential(nn.Linear(4, 4))
        wrapper.__class__ = type("DDP", (nn.Sequential, nn.parallel.DistributedDataParallel), {})
        with pytest.raises(ValueError, match=r"must not be in DistributedDataParallel yet.*inject first, and wrap"):
            inject_lora(wrapper)

    def test_dtensor(self):
        distributed = pytest.importorskip("torch.distributed")
        if not distributed.is_available():
            pytest.skip("torch has no torch.distributed")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, distribute_tensor
        from torch.testing._internal.distributed.fake_pg import FakeStore

        distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        try:
            mesh = init_device_mesh("cpu", (2,))
            model = Tower()
            model.mlp[0].weight = nn.Parameter(distribute_tensor(model.mlp[0].weight.data, mesh, [Replicate()]))
            with pytest.raises(ValueError, match=r"got the DTensor 'mlp\.0\.weight'; inject first"):
                inject_lora(model)
        finally:
            distributed.destroy_process_group()


def _linear_with(**members) -> nn.Module:
    return type("Mine", (nn.Linear,), members)(8, 8)


class TestRefusedBases:
    """A subclass is taken where an instance of another class lacks nothing of it."""

    @pytest.mark.parametrize(
        "member", ["__call__", "helper", "_load_from_state_dict", "weight_norm", "_save_to_state_dict", "train"]
    )
    def test_members_of_its_own(self, member):
        def method(self, *args, **kwargs):
            return getattr(nn.Linear, member)(self, *args, **kwargs)

        with pytest.raises(TypeError, match=f"a subclass without members of its own, got .*Mine with .*{member}"):
            inject_lora(nn.Sequential(_linear_with(**{member: method})), "0")
        report = inject_lora(nn.Sequential(_linear_with(**{member: method}), nn.Linear(8, 8)), rank=2)
        assert [row.path for row in report.rows] == ["1"]
        assert member in report.left[0].why

    def test_of_every_kind(self):
        for base, make in (
            (nn.Linear(4, 4), LoRALinear.from_linear),
            (nn.Conv2d(4, 4, 1), LoRAConv2d.from_conv),
            (nn.MultiheadAttention(4, 2), LoRAMultiheadAttention.from_mha),
        ):
            base.__class__ = type("Mine", (type(base),), {"mine": lambda self: 1})
            with pytest.raises(TypeError, match="with mine, which the adapted module would lack"):
                make(base)

    def test_what_an_instance_does_not_need(self):
        members = {"__init__": lambda self, k, n: nn.Linear.__init__(self, k, n), "reset_parameters": lambda self: None}
        assert inject_lora(nn.Sequential(_linear_with(**members)), rank=2).total == 1

    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_a_parametrized_parameter(self, name):
        layer = nn.Linear(8, 8)
        nn.utils.parametrize.register_parametrization(layer, name, nn.Tanh())
        model = nn.Sequential(layer)
        before = snapshot(model)
        with pytest.raises((TypeError, ValueError)):
            inject_lora(model, "0")
        assert snapshot(model) == before

    @pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
    def test_without_elements(self, shape):
        layer = nn.Linear(8, 8)
        layer.weight = nn.Parameter(torch.empty(shape))
        with pytest.raises(ValueError, match="weight must have elements"):
            LoRALinear.from_linear(layer)

    def test_sparse(self):
        layer = nn.Linear(8, 8)
        layer.weight = nn.Parameter(torch.eye(8).to_sparse())
        with pytest.raises((TypeError, ValueError), match=r"weight must be .*, got .*sparse"):
            LoRALinear.from_linear(layer)


class TestCheckpoints:
    @staticmethod
    def made(**settings):
        torch.manual_seed(0)
        model = Tower()
        inject_lora(model, **({"rank": 2, "alpha": 4} | settings))
        wake(model)
        return model

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"alpha": 8}, "alpha 4.0 in the state, 8.0 in the model"),
            ({"use_rslora": True}, "use_rslora False in the state, True in the model"),
            ({"dropout": 0.1}, "dropout 0.0 in the state, 0.1 in the model"),
        ],
    )
    def test_other_settings_are_refused(self, settings, message):
        state, other = lora_state_dict(self.made()), self.made(**settings)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=message):
            load_lora_state_dict(other, state)
        with pytest.raises(ValueError, match=message):
            load_lora_state_dict(other, state, check_settings=False)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())

    def test_another_qkv_is_refused(self):
        with pytest.raises(ValueError, match="missing"):
            load_lora_state_dict(self.made(qkv="split"), lora_state_dict(self.made()))

    def test_without_settings(self):
        model, state = self.made(), lora_state_dict(self.made())
        del state["lora_settings"]
        with pytest.raises(ValueError, match="check_settings=False takes them as they are"):
            load_lora_state_dict(model, state)
        load_lora_state_dict(model, state, check_settings=False)

    @pytest.mark.parametrize(
        "packed", [torch.zeros(3), torch.zeros(3, dtype=torch.uint8), torch.tensor([], dtype=torch.uint8)]
    )
    def test_damaged_settings(self, packed):
        with pytest.raises(ValueError, match="must be the settings that pyfused wrote"):
            load_lora_state_dict(self.made(), lora_state_dict(self.made()) | {"lora_settings": packed})

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
    def test_other_dtypes_are_refused(self, dtype):
        model, state = self.made(), lora_state_dict(self.made())
        name = next(iter(state))
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(TypeError, match="must have dtype"):
            load_lora_state_dict(model, state | {name: state[name].to(dtype)})
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_names_of_compiled_models(self):
        whole, part = self.made(), self.made()
        inside = self.made()
        inside.mlp = torch.compile(inside.mlp)
        state = lora_state_dict(torch.compile(whole))
        assert not any("_orig_mod" in name for name in state)
        assert lora_state_dict(inside).keys() == state.keys()
        zeros = {name: value if name == "lora_settings" else torch.zeros_like(value) for name, value in state.items()}
        for target in (torch.compile(part), inside, whole):
            load_lora_state_dict(target, zeros)
            assert not any(value.any() for name, value in lora_state_dict(target).items() if name != "lora_settings")

    def test_a_model_on_meta_is_refused(self):
        with torch.device("meta"):
            model = Tower()
        inject_lora(model, rank=2, alpha=4)
        with pytest.raises(ValueError, match=r"model must hold values, got .* on device meta; call to_empty\(\) first"):
            load_lora_state_dict(model, lora_state_dict(self.made()))

    def test_a_merged_model_merges_anew(self):
        model, other, x = self.made().eval(), self.made().eval(), torch.randn(2, 4, 8)
        state = {
            name: value if name == "lora_settings" else 2.0 * value for name, value in lora_state_dict(other).items()
        }
        for module in model.modules():
            if hasattr(module, "merge"):
                module.merge()
        before = model(x)
        load_lora_state_dict(model, state)
        load_lora_state_dict(other, state)
        assert (model(x) - before).abs().max() > 1e-4
        torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-5)

    def test_16_bit_copies_load(self):
        model, state = self.made(), lora_state_dict(self.made())
        half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in state.items()}
        load_lora_state_dict(model, half)
        assert model.mlp[0].lora_a.dtype == torch.float32

    @pytest.mark.parametrize("function", [lora_state_dict, remove_lora])
    def test_a_model_without_lora_is_an_error(self, function):
        with pytest.raises(ValueError, match="model must contain LoRA modules, got a Tower with none"):
            function(Tower())

    def test_loading_into_a_model_without_lora_is_an_error(self):
        with pytest.raises(ValueError, match="model must contain LoRA modules"):
            load_lora_state_dict(Tower(), {})


def test_importing_the_package_imports_no_package_of_models():
    code = "import sys, pyfused.lora.third_party; print({'transformers', 'open_clip', 'timm'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
