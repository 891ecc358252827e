"""BitFit, presets and an optimizer's groups; the checklist on what trains without a module of this package."""

from __future__ import annotations

import copy

import models_setup
import pytest
import torch
from torch import nn

from pyfused import (
    BottleneckAdapter,
    ConvLoRA,
    PrefixTuning,
    ScaledCrossAttention,
    bitfit,
    inject_lora,
    param_groups,
    preset,
    preset_for,
    remove_lora,
)
from pyfused.diagnostics import check
from pyfused.methods import methods_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=False))

    def forward(self, x):
        x = self.norm(x)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.BatchNorm1d(4)
        self.block = Block()
        self.gate = nn.Parameter(torch.ones(()))
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.gate * self.gamma.flatten() * self.block(self.stem(x))
        return self.head(x.mean(1))


def model_of() -> Model:
    torch.manual_seed(0)
    return Model()


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


BIASES = {"stem.bias", "block.norm.bias", "block.attn.in_proj_bias", "block.attn.out_proj.bias", "block.mlp.0.bias"}


class TestBitFit:
    def test_biases_alone_train(self):
        model = model_of()
        report = bitfit(model, train=["head"])
        assert trained(model) == BIASES | {"head.weight", "head.bias"}
        assert {row.path for row in report.rows} == BIASES
        assert report.bias_parameters == 4 + 8 + 24 + 8 + 16
        assert report.trainable_parameters == report.bias_parameters + 27
        assert report.total_parameters == sum(p.numel() for p in model.parameters())
        assert "bias parameters       60 in 5 biases" in str(report)

    def test_one_step_moves_them_and_nothing_else(self):
        model, x = model_of(), torch.randn(5, 4, 8)
        bitfit(model)
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.AdamW(param_groups(model))
        model.train()(x).square().mean().backward()
        optimizer.step()
        # The frozen BatchNorm's statistics too stay where they were.
        assert {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])} == (
            BIASES | {"head.bias"}
        )

    def test_a_batchnorm_may_go_on(self):
        model = model_of()
        assert not bitfit(model, freeze_batchnorm=False).notes
        assert model.train().stem.training
        assert any("BatchNorm stay in eval" in note for note in bitfit(model_of()).notes)

    def test_exclude_and_earlier_training(self):
        model = model_of()
        inject_lora(model, rank=2, train=["gate"])
        report = bitfit(model, exclude=["block.attn", "head.bias"])
        assert {row.path for row in report.rows} == {"stem.bias", "block.norm.bias", "block.mlp.0.bias"}
        assert "gate" in trained(model)
        loras = {name for name in trained(model) if "lora_" in name}
        assert len(loras) == sum("lora_" in name for name, _ in model.named_parameters()) > 0
        # And the biases stay when LoRA comes later.
        later = model_of()
        bitfit(later)
        inject_lora(later, rank=2)
        assert trained(later) >= BIASES

    def test_a_shared_bias_is_left_where_one_of_its_places_is_excluded(self):
        model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
        model["b"].bias = model["a"].bias
        bitfit(model, exclude=["b"])
        assert trained(model) == {"c.bias"}

    def test_what_the_package_added_is_no_bias_of_the_models(self):
        model = model_of()
        PrefixTuning(model, prefix_projection=True)
        report = bitfit(model)
        assert {row.path for row in report.rows} == BIASES | {"head.bias"}
        assert {row.kind for row in report.rows} == {"BatchNorm1d", "LayerNorm", "MultiheadAttention", "Linear",
                                                     "NonDynamicallyQuantizableLinear"}  # fmt: skip

    def test_its_batchnorms_stay_when_another_method_leaves(self):
        for other in ("lora", "prefix"):
            model = model_of()
            if other == "lora":
                inject_lora(model, rank=2)
                bitfit(model)
                remove_lora(model)
            else:
                bitfit(model)
                PrefixTuning(model).remove()
            assert not model.train().stem.training

    def test_narrow_biases_are_noted(self):
        (note,) = bitfit(nn.Linear(3, 3, dtype=torch.float16)).notes
        assert "torch.float16" in note

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"model": "model"}, TypeError, "model must be an nn.Module, got str"),
            ({"model": nn.Linear(3, 3, bias=False)}, ValueError, "must have biases outside train and exclude"),
            ({"exclude": ["block", "stem", "head"]}, ValueError, "got a Model with none"),
            ({"exclude": ["blok"]}, ValueError, "near names: block"),
            ({"train": ["haed"]}, ValueError, "near names: head"),
            ({"freeze_batchnorm": 1}, TypeError, "freeze_batchnorm"),
        ],
    )
    def test_refusals_change_nothing(self, arguments, error, message):
        model = model_of()
        with pytest.raises(error, match=message):
            bitfit(**{"model": model, **arguments})
        assert trained(model) == {name for name, _ in model.named_parameters()}

    def test_a_language_model_has_none(self):
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        config = transformers.LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        with pytest.raises(ValueError, match="many language models have none at all: inject_lora adapts their weights"):
            bitfit(transformers.LlamaForCausalLM(config))

    def test_counts_of_vit_b_32(self):
        model = models_setup.vit_b_32("meta")
        text = [p for name, p in model.clip.named_parameters() if not name.startswith("visual.")]
        for parameter in text:
            parameter.requires_grad_(False)
        # The chosen tower, and the head beside it.
        assert bitfit(model.clip.visual).trainable_parameters == 102_912
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 155_238
        whole = models_setup.vit_b_32("meta")
        outside = [name for name, _ in whole.clip.named_parameters() if not name.startswith("visual.")]
        report = bitfit(whole, train=["head"], exclude=[f"clip.{name}" for name in outside])
        assert report.trainable_parameters == 155_238
        assert report.bias_parameters == 102_912


class TestCheck:
    @pytest.mark.parametrize("method", ["bitfit", "prefix"])
    def test_a_sound_model_passes(self, method):
        model, x = model_of(), torch.randn(2, 4, 8)
        if method == "bitfit":
            bitfit(model, train=["head"])
        else:
            PrefixTuning(model, train=["head"])
        optimizer = torch.optim.AdamW(param_groups(model))
        report = check(model, x, loss_fn=lambda y: y.square().mean(), optimizer=optimizer)
        assert {row.verdict for row in report.rows} == {"pass"}, str(report)
        names = [row.name for row in report.rows]
        assert "gradients reach every adapter" in names
        assert "learning rate" in names

    @pytest.mark.parametrize("method", ["bitfit", "prefix"])
    def test_a_rate_far_off_and_a_block_that_no_gradient_reaches(self, method):
        class Dead(Model):
            def forward(self, x):
                return self.head((self.block(x) * 0 + x).mean(1))

        model, x = Dead(), torch.randn(2, 4, 8)
        if method == "bitfit":
            bitfit(model)
        else:
            PrefixTuning(model, train=["head"])
        optimizer = torch.optim.AdamW(param_groups(model, lr=1.0))
        report = check(model, x, loss_fn=lambda y: y.square().mean(), optimizer=optimizer)
        rows = {row.name: row for row in report.rows}
        assert rows["learning rate"].verdict == "warn"
        assert f"1 for {method}; usual is" in rows["learning rate"].finding
        assert rows["gradients reach every adapter"].verdict == "fail"

    def test_a_head_whose_bias_alone_trains_is_frozen(self):
        model = model_of()
        bitfit(model)
        rows = {row.name: row for row in check(model, torch.randn(2, 4, 8)).rows}
        assert rows["head"].verdict == "warn"
        assert "train=('head',)" in rows["head"].finding

    def test_lora_plus_is_a_usual_rate(self):
        model, x = model_of(), torch.randn(2, 4, 8)
        inject_lora(model, rank=2, train=["head"])
        optimizer = torch.optim.AdamW(param_groups(model, lora_plus=16))
        report = check(model, x, loss_fn=lambda y: y.square().mean(), optimizer=optimizer)
        assert report.passed
        assert not report.warned, str(report)

    def test_what_trains_nothing_fails(self):
        model = model_of().requires_grad_(False)
        rows = {row.name: row for row in check(model, torch.randn(2, 4, 8)).rows}
        assert rows["adapters"].verdict == "fail"
        assert "no module of this package, and no biases train alone" in rows["adapters"].finding


class TestPresets:
    @pytest.mark.parametrize(
        ("name", "rank", "alpha", "targets", "lr"),
        [
            ("simple", 8, 16, "attention", 2e-4),
            ("medium", 16, 32, "all-linear", 2e-4),
            ("complex", 32, 64, "all-linear", 1e-4),
            ("very-complex", 64, 128, "all-linear", 5e-5),
        ],
    )
    def test_settings(self, name, rank, alpha, targets, lr):
        made = preset(name)
        assert (made.rank, made.alpha, made.target_modules, made.lr) == (rank, alpha, targets, lr)
        model = model_of()
        report = inject_lora(model, **made.lora)
        assert {row.rank for row in report.rows} == {rank}
        assert (report.mlp == 0) == (targets == "attention")

    def test_medium_is_the_documents_table(self):
        model = models_setup.vit_b_32("meta")
        report = inject_lora(model.clip.visual, **preset("medium").lora)
        assert (report.total, report.attention, report.mlp) == (48, 24, 24)
        assert report.lora_parameters == 2_359_296

    @pytest.mark.parametrize(
        ("classes", "name"),
        [(2, "simple"), (10, "simple"), (11, "medium"), (102, "complex"), (500, "complex"), (1000, "very-complex")],
    )
    def test_by_classes(self, classes, name):
        assert preset_for(classes).name == name

    @pytest.mark.parametrize(
        ("function", "value", "error", "message"),
        [
            (
                preset,
                "mediun",
                ValueError,
                "one of simple, medium, complex, very-complex, got 'mediun'; near names: med",
            ),
            (preset, 3, TypeError, "name must be a string, got int"),
            (preset_for, 1, ValueError, "num_classes must be at least 2, got 1"),
            (preset_for, 10.0, TypeError, "num_classes must be an int, got float"),
        ],
    )
    def test_refusals(self, function, value, error, message):
        with pytest.raises(error, match=message):
            function(value)


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.adapter = BottleneckAdapter(8, layer_scale=1e-5)
        self.cross = ScaledCrossAttention(8, 8, 2, learnable_weight=True)
        self.conv = ConvLoRA(4, rank=1)
        self.head = nn.Linear(8, 1)


def everything() -> nn.Module:
    torch.manual_seed(0)
    model = Everything()
    added = model.adapter, model.cross, model.conv
    inject_lora(model.block, "mlp", rank=1)
    PrefixTuning(model.block, 2, exclude=[])
    bitfit(model.block)
    for module in [*added, model.head]:
        module.requires_grad_(True)
    return model


class TestGroups:
    def test_each_parameter_once_with_its_methods_rate(self):
        model = everything()
        groups = param_groups(model)
        grouped = [id(p) for group in groups for p in group["params"]]
        assert len(grouped) == len(set(grouped))
        assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
        rates = {"lora": 2e-4, "bitfit": 1e-3, "prefix": 5e-4, "adapter": 5e-4, "whole": 2e-4}
        assert {group["name"].split()[0].rstrip(",") for group in groups} == rates.keys()
        for group in groups:
            assert group["lr"] == rates[group["name"].split()[0].rstrip(",")]
        torch.optim.AdamW(groups).step()

    def test_methods(self):
        methods = methods_of(everything())
        expected = {
            "block.norm.bias": "bitfit",
            "block.attn.in_proj_bias": "bitfit",
            "block.attn.virtual_tokens.tokens": "prefix",
            "block.mlp.0.lora_a": "lora",
            "block.mlp.0.bias": "bitfit",
            "adapter.gamma": "adapter",
            "cross.q_bias": "adapter",
            "conv.lora_a": "lora",
            "head.weight": "whole",
            "head.bias": "whole",
        }
        assert {name: methods.get(name) for name in expected} == expected

    def test_a_model_that_trains_whole_has_no_bitfit(self):
        """Biases that stand beside their layer, as in BEiT and EVA."""
        model = nn.Module()
        model.attn = nn.Module()
        model.attn.q_bias, model.attn.qkv = nn.Parameter(torch.zeros(3)), nn.Linear(3, 9, bias=False)
        assert methods_of(model) == {"attn.q_bias": "whole", "attn.qkv.weight": "whole"}
        bitfit(model)
        assert methods_of(model) == {"attn.q_bias": "bitfit"}

        # A module of a bias alone, and a bias of the whole model's.
        class Bias(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bias = nn.Parameter(torch.zeros(3))

        model = nn.Sequential(nn.Linear(3, 3), Bias())
        model.logit_bias = nn.Parameter(torch.zeros(()))
        assert set(methods_of(model).values()) == {"whole"}
        bitfit(model)
        assert set(methods_of(model).values()) == {"bitfit"}

    def test_vectors_and_numbers_do_not_decay(self):
        model = everything()
        names = {id(p): name for name, p in model.named_parameters()}
        decays = {names[id(p)]: group["weight_decay"] for group in param_groups(model) for p in group["params"]}
        for name in ("adapter.gamma", "cross.q_bias", "block.norm.bias", "head.bias", "adapter.down_bias"):
            assert decays[name] == 0.0, name
        # At rank 1, and with one class, a matrix has the shape of a vector and is none.
        for name in ("block.mlp.0.lora_a", "block.mlp.0.lora_b", "conv.lora_b", "head.weight", "adapter.down_weight"):
            assert decays[name] == 0.01, name
        # Affine of ResMLP, gain of NF-ResNet, a class token.
        other = nn.Module()
        for name, shape in (("alpha", (1, 1, 8)), ("gain", (8, 1, 1, 1)), ("cls_token", (1, 1, 8))):
            other.register_parameter(name, nn.Parameter(torch.ones(shape)))
        assert [group["name"] for group in param_groups(other)] == ["whole, no decay"]
        whole = {names_of: group for group in param_groups(model_of()) for names_of in [group["name"]]}
        # gate and gamma, norms and biases.
        assert len(whole["whole, no decay"]["params"]) == 2 + 2 + 2 + 2 + 1 + 1

    def test_rates_and_lora_plus(self):
        model = everything()
        by_name = {group["name"]: group for group in param_groups(model, {"lora": 1e-5, "whole": 3e-3}, 0.2, 16)}
        assert by_name["lora"]["lr"] == 1e-5
        assert by_name["lora b"]["lr"] == pytest.approx(16e-5)
        assert by_name["whole"]["lr"] == 3e-3
        assert by_name["prefix"]["lr"] == 5e-4
        assert by_name["lora"]["weight_decay"] == 0.2
        assert {group["lr"] for group in param_groups(model, 1e-2)} == {1e-2}

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"model": 3}, TypeError, "model must be an nn.Module, got int"),
            (
                {"lr": {"lroa": 1.0}},
                ValueError,
                "of lora, bitfit, prefix, adapter, whole, got 'lroa'; near names: lora",
            ),
            ({"lr": {"lora": "fast"}}, TypeError, "lr of lora"),
            ({"lr": -1.0}, ValueError, "lr must not be negative, got -1.0"),
            ({"lr": float("nan")}, ValueError, "lr"),
            ({"weight_decay": -0.1}, ValueError, "weight_decay must not be negative"),
            ({"lora_plus": float("inf")}, ValueError, "lora_plus"),
            ({"lora_plus": 0.0}, ValueError, "lora_plus must be positive, got 0"),
        ],
    )
    def test_refusals(self, arguments, error, message):
        with pytest.raises(error, match=message):
            param_groups(**{"model": everything(), **arguments})

    def test_a_frozen_model(self):
        with pytest.raises(ValueError, match="must have parameters that train, got a Linear without"):
            param_groups(nn.Linear(3, 3).requires_grad_(False))
