"""inject_lora: what is matched, what is frozen, what is counted, and that a refusal leaves the model alone."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from models_setup import small_clip, small_vit, vit_b_32, wake
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import update_bn

from pyfused import inject_lora, load_lora_state_dict, lora_state_dict, remove_lora
from pyfused.modules import LoRAConv2d, LoRALinear, LoRAModule, LoRAMultiheadAttention

CLIP_TARGETS = ["in_proj", "out_proj", "c_fc", "c_proj"]


def snapshot(model: nn.Module) -> tuple:
    """Everything an injection could change, by identity."""
    return (
        [(path, id(module), type(module), module.training) for path, module in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
        [sorted(module.__dict__) for module in model.modules()],
    )


class TestClipTable:
    """systems.md, section 3, on open_clip's ViT-B-32 with a head for 102 classes."""

    @pytest.mark.parametrize(
        ("settings", "modules", "lora", "trainable", "total", "percent"),
        [
            ({"rank": 8, "target_modules": ["c_fc", "c_proj"]}, (24, 0, 24), 737_280, 789_606, 152_066_919, 0.52),
            ({"target_modules": CLIP_TARGETS}, (48, 24, 24), 2_359_296, 2_411_622, 153_688_935, 1.57),
            ({}, (48, 24, 24), 2_359_296, 2_411_622, 153_688_935, 1.57),
            ({"qkv": "split"}, (48, 24, 24), 2_654_208, 2_706_534, 153_983_847, 1.76),
        ],
    )
    def test_counts(self, settings, modules, lora, trainable, total, percent):
        model = vit_b_32("meta")
        visual = sum(p.numel() for p in model.clip.visual.parameters())
        # The temperature is the one beside the two towers.
        text = sum(p.numel() for name, p in model.clip.named_parameters() if not name.startswith("visual.")) - 1
        assert (visual, text, visual + text + model.clip.logit_scale.numel()) == (87_849_216, 63_428_096, 151_277_313)
        assert sum(p.numel() for p in model.head.parameters()) == 52_326
        report = inject_lora(model, exclude=["clip.transformer"], train=["head"], **settings)
        assert (report.total, report.attention, report.mlp) == modules
        assert report.lora_parameters == lora
        assert report.trainable_parameters == trainable
        assert report.total_parameters == total
        assert round(report.trainable_percent, 2) == percent
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
        assert sum(p.numel() for p in model.parameters()) == total

    def test_per_block(self):
        visual = vit_b_32("meta").clip.visual
        report = inject_lora(visual)
        block = {row.path.rpartition(".")[2]: row.parameters for row in report.rows if ".7." in row.path}
        assert block == {"in_proj": 49_152, "out_proj": 24_576, "c_fc": 61_440, "c_proj": 61_440}
        assert report.total_parameters == 87_849_216 + 2_359_296
        text = str(report)
        assert "48 = 24 attention + 24 MLP" in text
        assert "2,359,296 of 90,208,512 (2.62 %)" in text
        assert [line.split() for line in text.splitlines() if "in_proj" in line] == [
            ["transformer.resblocks.*.attn.in_proj", "in_proj", "2304", "x", "768", "16", "32", "12", "589,824"]
        ]

    def test_one_step_moves_every_b_and_every_parameter_acts(self):
        model = vit_b_32().eval()
        images, labels = torch.randn(1, 3, 224, 224), torch.tensor([3])
        with torch.no_grad():
            base = model(images)
        inject_lora(model, exclude=["clip.transformer"], train=["head"])
        lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
        assert len(lora) == 96
        trained = {name: p for name, p in model.named_parameters() if name in lora or name.startswith("head.")}
        before = {name: p.detach().clone() for name, p in model.clip.visual.named_parameters()}
        y = model.train()(images)
        torch.testing.assert_close(y, base, rtol=1e-4, atol=1e-5)
        nn.functional.cross_entropy(y, labels).backward()
        assert all((p.grad.abs().max() > 0) == name.endswith("lora_b") for name, p in lora.items())
        assert {name for name, p in model.named_parameters() if p.grad is not None} == trained.keys()
        torch.optim.SGD(trained.values(), lr=1.0).step()
        for name, p in model.clip.visual.named_parameters():
            assert torch.equal(p, before[name]) != name.endswith("lora_b"), name
        # B has left zero, so that A acts too: the output has a derivative in all 96.
        y = model(images)
        for name, grad in zip(lora, torch.autograd.grad(y.square().sum(), list(lora.values())), strict=True):
            assert grad.abs().max() > 0, name
        for module in model.modules():
            if isinstance(module, LoRAModule):
                module.merge()
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(images), y, rtol=1e-4, atol=1e-4)


class TestMatching:
    def test_names_match_whole_path_components(self):
        model = nn.ModuleDict(
            {
                "proj": nn.Linear(4, 4),
                "c_proj": nn.Linear(4, 4),
                "mlp": nn.ModuleDict({"proj": nn.Linear(4, 4), "fc": nn.Linear(4, 4)}),
                "attn": nn.ModuleDict({"proj": nn.Linear(4, 4)}),
            }
        )
        for target, expected in {
            "proj": ["proj", "mlp.proj", "attn.proj"],
            "c_proj": ["c_proj"],
            "mlp.proj": ["mlp.proj"],
        }.items():
            report = inject_lora(copy.deepcopy(model), target)
            assert [row.path for row in report.rows] == expected
        groups = {row.path: row.group for row in inject_lora(model).rows}
        assert groups == {
            "proj": "other", "c_proj": "mlp", "mlp.proj": "mlp", "mlp.fc": "mlp", "attn.proj": "attention",
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("target", "kinds"),
        [
            ("in_proj", ["in_proj"]),
            ("attn.out_proj", ["out_proj"]),
            (["out_proj", "in_proj"], ["in_proj", "out_proj"]),
            ("attn", ["in_proj", "out_proj"]),
        ],
    )
    def test_parts_of_an_attention(self, target, kinds):
        visual = small_vit(layers=1)
        report = inject_lora(visual, target)
        assert [row.kind for row in report.rows] == kinds
        attention = visual.transformer.resblocks[0].attn
        assert isinstance(attention, LoRAMultiheadAttention)
        assert (attention.qkv == "joint") == ("in_proj" in kinds)
        assert isinstance(attention.out_proj, LoRALinear) == ("out_proj" in kinds)
        assert not isinstance(visual.transformer.resblocks[0].mlp.c_fc, LoRALinear)

    def test_all_linear_takes_no_convolution_and_no_output_embedding(self):
        class Language(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.fc, self.lm_head = nn.Conv2d(3, 4, 1), nn.Linear(4, 4), nn.Linear(4, 9)

            def get_output_embeddings(self):
                return self.lm_head

        model = Language()
        assert [row.path for row in inject_lora(model).rows] == ["fc"]
        report = inject_lora(model, ["conv", "lm_head"])
        assert [row.path for row in report.rows] == ["conv", "fc", "lm_head"]
        assert isinstance(model.conv, LoRAConv2d)

    def test_exclude(self):
        clip = small_clip()
        left_out = "visual.transformer.resblocks.0.attn.out_proj"
        report = inject_lora(clip, CLIP_TARGETS, exclude=["transformer", left_out])
        paths = [row.path for row in report.rows]
        assert len(paths) == 7
        assert all(path.startswith("visual.") for path in paths)
        assert "visual.transformer.resblocks.0.attn.in_proj" in paths
        assert left_out not in paths

    def test_a_module_at_two_paths_is_adapted_once(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = self.second = nn.Linear(4, 4)
                self.other = nn.Linear(4, 4)

            def forward(self, x):
                return self.second(self.first(x))

        model = Tied()
        report = inject_lora(model, "second", rank=2)
        assert model.first is model.second
        assert report.total == 1
        assert report.lora_parameters == 16
        assert "first, second" in report.notes[0]
        assert not isinstance(model.other, LoRALinear)
        tied = Tied()
        before = snapshot(tied)
        with pytest.raises(ValueError, match="'second', which selects none"):
            inject_lora(tied, "second", exclude=["first"])
        assert snapshot(tied) == before

    def test_widths_of_their_own_are_split_with_a_note(self):
        model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2, kdim=6)})
        report = inject_lora(model)
        assert model["a"].qkv == "joint"
        assert model["b"].qkv == "split"
        assert report.total == 4
        assert any(note.startswith("b: q, k and v adapted separately") for note in report.notes)

    def test_transformers_conv1d_is_a_linear_layer(self):
        transformers = pytest.importorskip("transformers")
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0
            )
        )
        report = inject_lora(model, rank=2)
        assert [(row.path, row.kind, row.group, row.shape) for row in report.rows] == [
            ("transformer.h.0.attn.c_attn", "conv1d", "attention", (24, 8)),
            ("transformer.h.0.attn.c_proj", "conv1d", "attention", (8, 8)),
            ("transformer.h.0.mlp.c_fc", "conv1d", "mlp", (32, 8)),
            ("transformer.h.0.mlp.c_proj", "conv1d", "mlp", (8, 32)),
        ]
        assert isinstance(model.transformer.h[0].mlp.c_fc, transformers.pytorch_utils.Conv1D)
        assert {row.why for row in report.left if row.kind == "Linear"} == {"a language model's output embedding"}


class TestFreezing:
    def test_everything_but_lora_and_train(self):
        model = nn.ModuleDict({"visual": small_vit(), "head": nn.Linear(8, 3)})
        model["visual"].proj.requires_grad_(False)
        inject_lora(model, train=["head", "visual.proj", "visual.transformer.resblocks.1.mlp.c_fc.bias"])
        assert type(model["head"]) is nn.Linear
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trainable == {name for name, _ in model.named_parameters() if "lora_" in name} | {
            "head.weight", "head.bias", "visual.proj", "visual.transformer.resblocks.1.mlp.c_fc.bias",
        }  # fmt: skip

    def test_freeze_false_leaves_the_rest_alone(self):
        visual = small_vit()
        visual.ln_pre.weight.requires_grad_(False)
        before = {name: p.requires_grad for name, p in visual.named_parameters()}
        inject_lora(visual, freeze=False)
        for name, p in visual.named_parameters():
            assert p.requires_grad == before.get(name, True), name

    def test_works_on_the_module_given(self):
        clip = small_clip()
        inject_lora(clip.visual)
        assert clip.transformer.resblocks[0].mlp.c_fc.weight.requires_grad
        assert not clip.visual.conv1.weight.requires_grad

    def test_a_second_injection_keeps_the_first_one_training(self):
        visual = small_vit()
        inject_lora(visual, "attn", rank=2)
        report = inject_lora(visual, ["c_fc", "c_proj"], rank=4)
        assert (report.attention, report.mlp) == (4, 4)
        assert report.lora_parameters == report.trainable_parameters
        assert {row.rank for row in report.rows} == {2, 4}

    def test_what_was_told_to_train_goes_on_training_beside_its_lora(self):
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
        inject_lora(net, "0", rank=1, train=("0.bias",))
        inject_lora(net, "1", rank=1)
        assert net[0].bias.requires_grad
        assert not net[1].bias.requires_grad


def conv_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5), nn.BatchNorm1d(5))


class TestFrozenBatchNorm:
    def test_stays_in_eval_also_in_copies(self):
        model = conv_net().train()
        report = inject_lora(model)
        assert any("2 frozen BatchNorm stay in eval" in note for note in report.notes)
        assert not model[1].training
        for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            buffers = {name: b.clone() for name, b in twin.named_buffers()}
            assert twin.train() is twin
            assert twin.training
            assert twin[3].training
            assert not twin[1].training
            twin(torch.randn(4, 3, 8, 8))
            assert all(torch.equal(b, buffers[name]) for name, b in twin.named_buffers())
        twin = copy.deepcopy(model)
        twin[1].train()
        assert not twin[1].training

    def test_what_replaces_or_restarts_norms_leaves_it(self):
        model, x = conv_net().eval(), torch.randn(4, 3, 8, 8)
        inject_lora(model)
        before, y = {name: b.clone() for name, b in model.named_buffers()}, model(x)
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        update_bn([x], model)
        model.train()
        assert torch.equal(model(x), y)
        assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
        fused = fuse_conv_bn_eval(model[0].eval(), model[1])
        torch.testing.assert_close(fused(x), model[:2](x))

    def test_fastvit_moves_no_buffer(self):
        import timm

        model, x = timm.create_model("fastvit_t8", num_classes=3), torch.randn(2, 3, 64, 64)
        plain = copy.deepcopy(model)
        before = {name: b.clone() for name, b in model.named_buffers()}
        inject_lora(model, ["mlp.fc1", "mlp.fc2"], rank=2, train=["head.fc"])
        for network, moved in ((plain.train(), 210), (model.train(), 0)):
            network(x).sum().backward()
            assert sum(not torch.equal(b, before[name]) for name, b in network.named_buffers()) == moved

    def test_one_that_trains_is_left_alone(self):
        model = conv_net()
        model[4] = nn.BatchNorm1d(5, affine=False)
        inject_lora(model, train=["4", "1.bias"])
        assert model.train()[1].training
        assert model[4].training

    def test_opting_out(self):
        for settings in ({"freeze_batchnorm": False}, {"freeze": False}):
            model = conv_net()
            report = inject_lora(model, **settings)
            assert model.train()[1].training
            assert not any("BatchNorm" in note for note in report.notes)

    def test_remove_lora_lets_it_train_again(self):
        model = conv_net()
        inject_lora(model)
        remove_lora(model)
        assert model.train()[1].training


class TestModel:
    @pytest.mark.parametrize("qkv", ["joint", "split"])
    def test_after_one_step_changing_any_parameter_changes_the_output(self, qkv):
        visual, x = small_vit(), torch.randn(3, 3, 16, 16)
        inject_lora(visual, rank=2, qkv=qkv)
        lora = {name: p for name, p in visual.named_parameters() if p.requires_grad}
        assert len(lora) == (16 if qkv == "joint" else 24)
        visual(x).square().sum().backward()
        torch.optim.SGD(lora.values(), lr=0.1).step()
        with torch.no_grad():
            y = visual(x)
            for name, p in lora.items():
                kept = p.clone()
                p.add_(torch.randn_like(p))
                assert (visual(x) - y).abs().max() > 1e-5, name
                p.copy_(kept)

    def test_output_unchanged_at_start_and_merged_equals_unmerged(self):
        visual, x = small_vit(), torch.randn(3, 3, 16, 16)
        base = visual(x)
        inject_lora(visual, rank=4)
        torch.testing.assert_close(visual(x), base, rtol=1e-5, atol=1e-6)
        wake(visual).eval()
        woken = visual(x)
        assert not torch.allclose(woken, base, atol=1e-3)
        for module in visual.modules():
            if isinstance(module, LoRAModule):
                module.merge()
        torch.testing.assert_close(visual(x), woken, rtol=1e-4, atol=1e-5)

    def test_injecting_before_or_after_moving_is_the_same(self, device):
        first = small_vit()
        second = copy.deepcopy(first)
        torch.manual_seed(1)
        inject_lora(first, rank=4)
        first.to(device, torch.float64)
        second.to(device, torch.float64)
        torch.manual_seed(1)
        inject_lora(second, rank=4)
        for (name, a), (other, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
            assert name == other
            assert (a.device, a.dtype, a.requires_grad) == (b.device, b.dtype, b.requires_grad)
            assert torch.equal(a, b), name

    def test_text_tower_with_its_mask(self):
        clip = small_clip().eval()
        tokens = torch.randint(1, 50, (2, 7))
        base = clip.encode_text(tokens)
        inject_lora(clip, rank=2)
        torch.testing.assert_close(clip.encode_text(tokens), base, rtol=1e-4, atol=1e-5)
        wake(clip)
        woken = clip.encode_text(tokens)
        remove_lora(clip)
        assert not torch.allclose(woken, base, atol=1e-3)
        torch.testing.assert_close(clip.encode_text(tokens), woken, rtol=1e-4, atol=1e-5)

    def test_open_clip_casts_the_base_and_leaves_the_adapter_in_float32(self):
        open_clip_model = pytest.importorskip("open_clip.model", reason="open_clip is not installed")
        clip = small_clip()
        inject_lora(clip.visual)
        open_clip_model.convert_weights_to_lp(clip, torch.bfloat16)
        block = clip.visual.transformer.resblocks[0]
        assert block.attn.in_proj_weight.dtype == block.mlp.c_fc.weight.dtype == torch.bfloat16
        assert block.attn.out_proj.weight.dtype == torch.bfloat16
        assert block.attn.in_proj_lora_a.dtype == block.mlp.c_fc.lora_a.dtype == torch.float32

    def test_checkpointing_with_dropout_gives_the_same_gradients(self):
        visual, x = small_vit(), torch.randn(3, 3, 16, 16)
        inject_lora(visual, rank=2, dropout=0.3)
        wake(visual).train()
        grads = []
        for checkpointed in (False, True):
            visual.set_grad_checkpointing(checkpointed)
            visual.zero_grad()
            torch.manual_seed(4)
            visual(x).square().sum().backward()
            grads.append([p.grad.clone() for p in visual.parameters() if p.requires_grad])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    def test_encoder_uses_no_nested_tensors_and_no_fast_path(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer = nn.TransformerEncoderLayer(16, 4, dim_feedforward=24, batch_first=True)
            encoder = nn.TransformerEncoder(layer, 2).eval()
        x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
        padding[1:, -2:] = True
        report = inject_lora(encoder, rank=2)
        assert report.total == 8
        assert "1 nn.TransformerEncoder no longer use nested tensors" in report.notes
        wake(encoder)
        with torch.no_grad():
            y = encoder(x, src_key_padding_mask=padding)
            remove_lora(encoder)
            folded = encoder(x, src_key_padding_mask=padding)
        torch.testing.assert_close(y[~padding], folded[~padding], rtol=1e-4, atol=1e-5)

    def test_remove_lora_gives_back_the_model(self):
        visual = small_vit()
        before, keys = snapshot(visual)[2], visual.state_dict().keys()
        original = dict(visual.named_parameters())
        inject_lora(visual)
        wake(visual)
        remove_lora(visual, merge=False)
        assert snapshot(visual)[2] == before
        assert visual.state_dict().keys() == keys
        assert all(p is original[name] for name, p in visual.named_parameters())
        inject_lora(visual)


class TestStateDicts:
    def test_round_trip_of_everything(self):
        first, second = small_vit(), small_vit()
        inject_lora(first, rank=2)
        inject_lora(second, rank=2)
        second.load_state_dict(wake(first).state_dict())
        x = torch.randn(2, 3, 16, 16)
        assert torch.equal(first(x), second(x))

    def test_round_trip_of_the_adapter_alone(self):
        base = small_vit()
        first, second = copy.deepcopy(base), copy.deepcopy(base)
        inject_lora(first, rank=2, qkv="split")
        inject_lora(second, rank=2, qkv="split")
        state = lora_state_dict(wake(first))
        assert len(state) == 2 * (6 + 2 + 4) + 1
        assert set(state) == {name for name, _ in first.named_parameters() if "lora_" in name} | {"lora_settings"}
        load_lora_state_dict(second, pickle.loads(pickle.dumps(state)))
        x = torch.randn(2, 3, 16, 16)
        assert torch.equal(first(x), second(x))

    def test_names_must_agree(self):
        visual = small_vit()
        inject_lora(visual, rank=2)
        state = lora_state_dict(wake(visual))
        kept = {name: value.clone() for name, value in state.items()}
        changed = {name.replace("c_fc", "fc1"): torch.zeros_like(value) for name, value in state.items()}
        with pytest.raises(ValueError, match=r"16 parameters, got 4 missing .*c_fc.* and 4 unknown .*fc1"):
            load_lora_state_dict(visual, changed)
        assert all(torch.equal(value, kept[name]) for name, value in lora_state_dict(visual).items())

    def test_shapes_must_agree_before_anything_is_copied(self):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        inject_lora(net, rank=2)
        kept = {name: value.clone() for name, value in lora_state_dict(wake(net)).items()}
        changed = {name: torch.zeros_like(value) for name, value in kept.items() if name != "lora_settings"}
        changed["1.lora_a"] = torch.zeros(3, 4)
        changed["2.lora_b"] = torch.zeros(4, 3)
        message = r"1\.lora_a expected \(2, 4\), got \(3, 4\); 2\.lora_b expected \(4, 2\), got \(4, 3\)$"
        with pytest.raises(ValueError, match=message):
            load_lora_state_dict(net, changed)
        assert all(torch.equal(value, kept[name]) for name, value in lora_state_dict(net).items())


class OwnForward(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


class TestAllOrNothing:
    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"target_modules": "c_fcc"}, ValueError, r"got 'c_fcc', which selects none; near names: c_fc"),
            ({"target_modules": "fc"}, ValueError, r"got 'fc'.*near names: c_fc"),
            ({"target_modules": ["c_fc", "q_proj"]}, ValueError, r"got 'q_proj'.*near names: .*c_proj"),
            ({"target_modules": "zzz"}, ValueError, r"there are: attn, c_fc, c_proj"),
            ({"target_modules": []}, ValueError, "must hold at least one name"),
            ({"target_modules": [3]}, TypeError, r"target_modules must be a name or a sequence of names, got \[3\]"),
            ({"target_modules": "gelu"}, TypeError, r"got 'transformer.resblocks.0.mlp.gelu', which is a .*GELU"),
            ({"target_modules": ["c_fc", "ln_1"]}, TypeError, r"which is a .*\.LayerNorm"),
            ({"target_modules": "odd"}, TypeError, "inject_lora: odd: expected an nn.Linear with its own forward"),
            ({"train": ["head"]}, ValueError, r"train must hold dotted paths inside the model, got 'head'"),
            ({"train": ["projj"]}, ValueError, r"got 'projj'; near names: proj"),
            ({"train": ["whole"]}, TypeError, r"train must name floating parameters, got whole of dtype torch.int64"),
            ({"exclude": ["transformer.resblock"]}, ValueError, r"exclude must .*near names: transformer.resblocks"),
            ({"rank": 0}, ValueError, r"rank must be in 1\.\.256, got 0"),
            ({"rank": -1}, ValueError, r"rank must be in 1\.\.256, got -1"),
            ({"rank": 2.5}, TypeError, "rank must be an int"),
            ({"alpha": math.inf}, ValueError, "alpha must be finite"),
            ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\)"),
            ({"qkv": "all"}, ValueError, r"qkv must be one of \('joint', 'split'\), got 'all'"),
            ({"lora_dtype": torch.int32}, TypeError, "lora_dtype must be None or one of"),
        ],
    )
    def test_a_refusal_leaves_the_model_as_it_was(self, settings, error, message):
        visual = small_vit()
        visual.odd = OwnForward(4, 4)
        visual.whole = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
        visual.ln_post.weight.requires_grad_(False)
        before = snapshot(visual)
        with pytest.raises(error, match=message):
            inject_lora(visual, **settings)
        assert snapshot(visual) == before

    @pytest.mark.parametrize("target", ["all-linear", "c_fc", "attn", "out_proj", "in_proj"])
    def test_twice(self, target):
        visual = small_vit()
        inject_lora(visual)
        before = snapshot(visual)
        with pytest.raises(ValueError, match="already wrapped"):
            inject_lora(visual, target)
        assert snapshot(visual) == before

    def test_one_failure_among_many_modules_undoes_nothing_because_nothing_was_done(self):
        visual = small_vit()
        visual.transformer.resblocks[1].mlp.c_proj = nn.utils.parametrizations.weight_norm(
            visual.transformer.resblocks[1].mlp.c_proj
        )
        before = snapshot(visual)
        with pytest.raises(ValueError, match=r"transformer.resblocks.1.mlp.c_proj: weight must be a parameter"):
            inject_lora(visual)
        assert snapshot(visual) == before

    def test_the_module_itself(self):
        for module in (nn.Linear(4, 4), nn.MultiheadAttention(4, 2)):
            with pytest.raises(ValueError, match="model must contain the modules to adapt"):
                inject_lora(module)
        with pytest.raises(TypeError, match=r"model must be an nn.Module, got list"):
            inject_lora([nn.Linear(4, 4)])
        with pytest.raises(ValueError, match="to_base"):
            remove_lora(LoRALinear(4, 4))

    def test_all_linear_passes_over_quantised_layers_and_says_so(self):
        model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": OwnForward(4, 4)})
        report = inject_lora(model)
        assert [row.path for row in report.rows] == ["a"]
        (left,) = report.left
        assert (left.kind, left.count, left.parameters, left.paths) == ("OwnForward", 1, 20, ["b"])
        assert "with a forward that replaces it" in left.why

    def test_parameters_that_cannot_be_frozen_or_counted_are_refused_before_anything_is_replaced(self):
        with torch.inference_mode():
            made_inside = nn.LayerNorm(4)
        for odd, message in (
            (nn.LazyBatchNorm1d(), "the uninitialized 1.weight"),
            (made_inside, "got 1.weight, made under inference_mode"),
        ):
            net = nn.Sequential(nn.Linear(4, 4), odd)
            before = snapshot(net)
            with pytest.raises(ValueError, match=f"inject_lora: every parameter of model must .*{message}"):
                inject_lora(net)
            assert snapshot(net) == before

    def test_a_lora_dtype_that_fits_one_weight_alone(self):
        net = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4))
        before = snapshot(net)
        with pytest.raises(TypeError, match=r"lora_dtype must be torch.float32, as the weight, got torch.bfloat16"):
            inject_lora(net, lora_dtype=torch.bfloat16)
        assert snapshot(net) == before

    def test_removing_what_was_not_frozen_leaves_it_training(self):
        net = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Conv2d(4, 4, 3))
        inject_lora(net, ["0", "1", "2"], rank=2, freeze=False)
        remove_lora(net)
        assert not any(isinstance(module, LoRAModule) for module in net.modules())
        assert all(parameter.requires_grad for parameter in net.parameters())

    def test_removing_a_grouped_convolution_is_all_or_nothing(self):
        model = nn.ModuleDict({"fc": nn.Linear(4, 4), "conv": nn.Conv2d(4, 4, 3, groups=2)})
        inject_lora(model, ["fc", "conv"])
        with pytest.raises(RuntimeError, match="groups = 2"):
            remove_lora(model)
        assert isinstance(model["fc"], LoRALinear)
        assert not model["fc"].merged
        remove_lora(model, merge=False)
        assert type(model["conv"]) is nn.Conv2d
