"""`pyfused convert`: what another package computes with its file, pyfused computes with the converted one, and back."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from models_setup import small_vit, wake
from torch import nn

from pyfused import BottleneckAdapter, inject_lora, load_lora, load_tuned, save_lora, save_tuned
from pyfused.integrations.formats import convert

safetensors_torch = pytest.importorskip("safetensors.torch")


def tensors(path):
    if path.suffix == ".safetensors":
        return safetensors_torch.load_file(path)
    return torch.load(path, weights_only=True)


def equal(one, two):
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def draw(module, std=0.3):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module


class TestPeft:
    def test_both_ways(self, tmp_path):
        base = small_vit()
        model = copy.deepcopy(base)
        inject_lora(model, "all-linear", rank={"in_proj": 2, "out_proj": 2, "c_fc": 3}, alpha={"c_fc": 5.5})
        wake(model)
        save_lora(model, tmp_path / "peft")
        notes = convert(tmp_path / "peft", tmp_path / "ours", "peft", "pyfused")
        assert notes == [
            "PEFT adds out_proj's term of an nn.MultiheadAttention twice, so that B was doubled, in 2 attentions: the "
            "outputs are equal"
        ]
        x = torch.randn(2, 3, 16, 16)
        for known in (False, True):
            other = copy.deepcopy(base)
            if known:
                inject_lora(other, "all-linear", rank={"in_proj": 2, "out_proj": 2, "c_fc": 3}, alpha={"c_fc": 5.5})
            load_tuned(other, tmp_path / "ours")
            assert torch.equal(other(x), model(x))
        save_tuned(model, tmp_path / "saved")
        equal(*(tensors(tmp_path / folder / "tuned.safetensors") for folder in ("saved", "ours")))
        (note,) = convert(tmp_path / "saved", tmp_path / "back", "pyfused", "peft")
        assert "B was halved, in 2 attentions" in note
        equal(*(tensors(tmp_path / folder / "adapter_model.safetensors") for folder in ("peft", "back")))
        one, two = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("peft", "back"))
        assert one == two
        other = copy.deepcopy(base)
        load_lora(other, tmp_path / "back")
        assert torch.equal(other(x), model(x))

    @pytest.mark.parametrize(
        ("names", "settings", "message"),
        [
            ("attention", {"qkv": "split"}, "PEFT has no form for '.*attn': LoRA on q, k and v apart"),
            ("conv1", {}, None),
        ],
    )
    def test_what_peft_has_no_form_for(self, names, settings, message, tmp_path):
        model = small_vit()
        inject_lora(model, names, **settings)
        save_tuned(model, tmp_path / "ours")
        if message is None:
            assert convert(tmp_path / "ours", tmp_path / "peft", "pyfused", "peft") == []
            return
        with pytest.raises(ValueError, match=f"convert: {message}"):
            convert(tmp_path / "ours", tmp_path / "peft", "pyfused", "peft")
        assert not (tmp_path / "peft").exists()


class HubAdapter(nn.Module):
    """AdapterHub's bottleneck by its published formula, the residual around it included."""

    def __init__(self, channels, hidden, act, scaling):
        super().__init__()
        self.adapter_down = nn.Sequential(nn.Linear(channels, hidden), nn.Identity())
        self.adapter_up = nn.Linear(hidden, channels)
        self.act = act
        if isinstance(scaling, str):
            self.scaling = nn.Parameter(torch.ones(1 if scaling == "learned" else channels))
        else:
            self.scaling = scaling

    def forward(self, x, residual):
        return self.adapter_up(self.act(self.adapter_down(x))) * self.scaling + residual


def hub_folder(folder, adapter, pickled=False, **config):
    folder.mkdir(parents=True)
    config = {
        "mh_adapter": False, "output_adapter": True, "reduction_factor": 4, "non_linearity": "relu",
        "original_ln_before": True, "ln_before": False, "scaling": 1.0, "dropout": 0.0, "inv_adapter": None,
        "is_parallel": False, "phm_layer": False, "use_gating": False, "phm_dim": 4, "stochastic_depth": 0.0,
    } | config  # fmt: skip
    whole = {"name": "task", "config": config, "version": "adapters.1.3.0", "model_type": "bert"}
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    state = {f"{HUB}.{name}": p.detach() for name, p in adapter.named_parameters()}
    if pickled:
        torch.save(state, folder / "pytorch_adapter.bin")
    else:
        safetensors_torch.save_file(state, folder / "adapter.safetensors")


HUB = "bert.encoder.layer.0.output.adapters.task"


def host(adapter):
    model = nn.Module()
    inside = model
    *parents, last = HUB.split(".")
    for name in parents:
        inside.add_module(name, nn.Module())
        inside = getattr(inside, name)
    inside.add_module(last, adapter)
    return model


class TestAdapterHub:
    @pytest.mark.parametrize(
        ("ours", "act", "config"),
        [
            (lambda: BottleneckAdapter.pfeiffer(16, 4), torch.relu, {}),
            (lambda: BottleneckAdapter.houlsby(16, 4), F.silu, {"non_linearity": "swish", "mh_adapter": True}),
            (lambda: BottleneckAdapter.parallel(16, 4), torch.relu, {"scaling": 4.0, "is_parallel": True}),
            (
                lambda: BottleneckAdapter.parallel(16, 4, "gelu", learned=True),
                F.gelu,
                {"scaling": "learned", "non_linearity": "gelu"},
            ),
            (
                lambda: BottleneckAdapter(16, 2, activation="gelu_tanh", skip=False, layer_scale=1.0, drop_path=0.1),
                lambda x: F.gelu(x, approximate="tanh"),
                {"scaling": "channel", "non_linearity": "gelu_new", "stochastic_depth": 0.1},
            ),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("pickled", [False, True])
    def test_both_ways(self, ours, act, config, pickled, tmp_path):
        adapter = ours()
        theirs = draw(HubAdapter(16, adapter.hidden, act, config.get("scaling", 1.0)))
        hub_folder(tmp_path / "hub", theirs, pickled, **config)
        assert convert(tmp_path / "hub", tmp_path / "ours", "adapterhub", "pyfused") == []
        model = host(adapter)
        load_tuned(model, tmp_path / "ours")
        x, residual = torch.randn(2, 3, 5, 16)
        torch.testing.assert_close(adapter.eval()(x, residual), theirs(x, residual), rtol=1e-5, atol=1e-6)
        save_tuned(model, tmp_path / "saved")
        for source in ("ours", "saved"):
            notes = convert(tmp_path / source, tmp_path / f"{source} back", "pyfused", "adapterhub", tmp_path / "hub")
            assert notes == [f"configuration as in {tmp_path / 'hub'}: where the adapters stand in the host is not in "
                             "pyfused's file"]  # fmt: skip
            back = tensors(tmp_path / f"{source} back" / "adapter.safetensors")
            equal(back, {f"{HUB}.{name}": p.detach() for name, p in theirs.named_parameters()})
            one, two = (
                json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("hub", f"{source} back")
            )
            assert one == two

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"ln_before": True}, "ln_before of adapter_config.json has no form here"),
            ({"dropout": 0.1}, "dropout of adapter_config.json has no form here, got 0.1"),
            ({"phm_layer": True}, "phm_layer"),
            ({"use_gating": True}, "use_gating"),
            ({"inv_adapter": "nice"}, "inv_adapter"),
            ({"architecture": "lora"}, "must be of a bottleneck adapter, got one of 'lora'"),
            ({"non_linearity": "mish"}, "non_linearity of adapter_config.json must be one of relu"),
            ({"scaling": "learned"}, "must have a tensor of its scaling"),
            ({"scaling": None}, "scaling of adapter_config.json must be a number"),
            ({"is_parallel": True, "stochastic_depth": 0.1}, "stochastic_depth"),
        ],
    )
    def test_what_has_no_form_here(self, config, message, tmp_path):
        hub_folder(tmp_path / "hub", HubAdapter(16, 4, torch.relu, 1.0), **config)
        with pytest.raises(ValueError, match=f"convert: .*{message}"):
            convert(tmp_path / "hub", tmp_path / "ours", "adapterhub", "pyfused")
        assert not (tmp_path / "ours").exists()

    def test_names_and_what_the_other_folder_says(self, tmp_path):
        theirs = HubAdapter(16, 4, torch.relu, 1.0)
        hub_folder(tmp_path / "hub", theirs)
        path = tmp_path / "hub/adapter.safetensors"
        whole = tensors(path)
        for change, message in (
            (whole | {"bert.adapter_fusion.weight": torch.ones(1)}, "'bert.adapter_fusion.weight' .* has no form here"),
            ({n: t for n, t in whole.items() if "up.bias" not in n}, r"the whole adapter .* got no \['up_bias'\]"),
        ):
            safetensors_torch.save_file(change, path)
            with pytest.raises(ValueError, match=message):
                convert(tmp_path / "hub", tmp_path / "ours", "adapterhub", "pyfused")
        safetensors_torch.save_file(whole, path)
        (tmp_path / "hub/pytorch_model_head.bin").touch()
        (note,) = convert(tmp_path / "hub", tmp_path / "ours", "adapterhub", "pyfused")
        assert note == "left out: the prediction head beside the adapter, pytorch_model_head.bin"
        convert(tmp_path / "hub", tmp_path / "ours", "adapterhub", "pyfused")
        hub_folder(tmp_path / "other", theirs, non_linearity="gelu", scaling=2.0)
        with pytest.raises(ValueError, match="activation 'relu', there 'gelu'"):
            convert(tmp_path / "ours", tmp_path / "back", "pyfused", "adapterhub", tmp_path / "other")
        hub_folder(tmp_path / "scaled", theirs, scaling=2.0)
        with pytest.raises(ValueError, match=r"gamma of .* must be the scaling 2.0 .* got none"):
            convert(tmp_path / "ours", tmp_path / "back", "pyfused", "adapterhub", tmp_path / "scaled")
        model = small_vit()
        inject_lora(model, "mlp")
        save_tuned(model, tmp_path / "lora")
        with pytest.raises(ValueError, match=r"AdapterHub has no form for .*a LoRALinear"):
            convert(tmp_path / "lora", tmp_path / "back", "pyfused", "adapterhub", tmp_path / "hub")
        assert not (tmp_path / "back").exists()


def original_aa_clip(model, relu):
    """The state dicts of AA-CLIP's own modules for an `AdaptedCLIP` of this shape."""

    def proj(layer, relu):
        linear = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=False)
        return nn.ModuleDict({"fc": nn.Sequential(linear, nn.LeakyReLU()) if relu else linear})

    def blend(layer):
        linear = nn.Linear(layer.channels, layer.channels, bias=False)
        return nn.ModuleDict({"fc": nn.Sequential(linear, nn.LeakyReLU())})

    def cross(module):
        inner = module.num_heads * module.head_dim
        sizes = {"q": (module.query_dim, inner), "k": (module.context_dim, inner), "v": (module.context_dim, inner)}
        sizes["out"] = (inner, module.query_dim)
        return nn.ModuleDict({f"{name}_proj": nn.Linear(*size) for name, size in sizes.items()})

    image = nn.ModuleDict(
        {
            "layer_adapters": nn.ModuleList(blend(layer) for layer in model.image_adapters),
            "seg_proj": nn.ModuleList(proj(layer, relu) for layer in model.projections),
            "det_proj": proj(model.detection_projection, relu),
        }
    )
    text = nn.ModuleList([*(blend(layer) for layer in model.text_adapters), proj(model.text_projection, True)])
    return {
        "text_adapter": draw(text), "image_adapter": draw(image, 0.2),
        "text_cross_attn": draw(cross(model.text_cross_attention)),
        "image_cross_attn": draw(cross(model.image_cross_attention)),
    }  # fmt: skip


class TestAAClip:
    @pytest.mark.parametrize("relu", [False, True])
    def test_both_ways(self, relu, tmp_path):
        pytest.importorskip("open_clip")
        from aa_clip_cases import adapted

        model = adapted(relu=relu)
        theirs = original_aa_clip(model, relu)
        file = {name: module.state_dict() for name, module in theirs.items()} | {"epoch": 3, "text_optimizer": {}}
        torch.save(file, tmp_path / "theirs.pth")
        (note,) = convert(tmp_path / "theirs.pth", tmp_path / "ours", "aa-clip", "pyfused")
        assert note.startswith("not in AA-CLIP's files, and as the model has them: weights of blending")
        load_tuned(model, tmp_path / "ours")
        x = torch.randn(2, 5, 64)
        a = theirs["image_adapter"]["layer_adapters"][1]["fc"](x)
        blended = 0.1 * a * x.norm(dim=-1, keepdim=True) / a.norm(dim=-1, keepdim=True) + 0.9 * x
        torch.testing.assert_close(model.image_adapters[1](x), blended, rtol=1e-5, atol=1e-5)
        for k, own in enumerate(model.projections):
            torch.testing.assert_close(own(x), theirs["image_adapter"]["seg_proj"][k]["fc"](x))
        torch.testing.assert_close(model.detection_projection(x), theirs["image_adapter"]["det_proj"]["fc"](x))
        y = torch.randn(3, 4, 48)
        torch.testing.assert_close(model.text_projection(y), theirs["text_adapter"][-1]["fc"](y))
        own, cross = model.image_cross_attention, theirs["image_cross_attn"]
        context = F.normalize(torch.randn(2, 6, 48), dim=-1)
        q, k, v = (
            cross[f"{name}_proj"](z).unflatten(-1, (2, -1)).transpose(1, 2)
            for name, z in (("q", x), ("k", context), ("v", context))
        )
        c = cross["out_proj"]((q @ k.mT * 24**-0.5).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
        expected = x + 0.1 * c * x.norm(dim=-1, keepdim=True) / (c.norm(dim=-1, keepdim=True) + 1e-6)
        torch.testing.assert_close(own(x, context), expected, rtol=1e-5, atol=1e-5)
        save_tuned(model, tmp_path / "saved")
        for source in ("ours", "saved"):
            convert(tmp_path / source, tmp_path / f"{source}.pth", "pyfused", "aa-clip")
            back = tensors(tmp_path / f"{source}.pth")
            assert back.keys() == theirs.keys()
            for part, state in back.items():
                equal(state, file[part])

    def test_one_stage_leaves_the_other_alone(self, tmp_path):
        pytest.importorskip("open_clip")
        from aa_clip_cases import adapted

        model = adapted()
        state = original_aa_clip(model, False)["text_adapter"].state_dict()
        torch.save({"epoch": 1, "text_adapter": state}, tmp_path / "text_adapter.pth")
        convert(tmp_path / "text_adapter.pth", tmp_path / "ours", "aa-clip", "pyfused")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        load_tuned(model, tmp_path / "ours")
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed == {f"text_adapters.{i}.adapter_weight" for i in range(3)} | {"text_projection.weight"}
        other = adapted(text_layers=2)
        with pytest.raises(ValueError, match=r"without the AdapterBlend 'text_adapters.2'"):
            load_tuned(other, tmp_path / "ours")
        other = adapted(relu=True)
        torch.save({"image_adapter": {"det_proj.fc.weight": torch.zeros(48, 64)}}, tmp_path / "image.pth")
        convert(tmp_path / "image.pth", tmp_path / "image", "aa-clip", "pyfused")
        with pytest.raises(ValueError, match="detection_projection: relu False in the file, True in the model"):
            load_tuned(other, tmp_path / "image")

    @pytest.mark.parametrize(
        ("file", "message"),
        [
            ({"std_head": {"weight": torch.ones(1)}}, "'std_head' of .* has no form here"),
            ({"image_adapter": {"seg_proj.0.fc.bias": torch.ones(1)}}, "'seg_proj.0.fc.bias' in 'image_adapter'"),
            ({"text_adapter": {"0.fc.0.weight": 3}}, "'0.fc.0.weight' in 'text_adapter'"),
            ({"epoch": 3}, "must hold an adapter of AA-CLIP"),
            ([3], "must hold a dictionary, got list"),
        ],
    )
    def test_another_file(self, file, message, tmp_path):
        torch.save(file, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "a.pth", tmp_path / "ours", "aa-clip", "pyfused")


# Place in network -> channels, and the kinds of its blocks.
PLACES = {0: (16, ["RepMixerBlock", "RepMixerBlock"]), 2: (32, ["AttentionBlock"])}


def fork_state():
    """A checkpoint of the fork's, with layers in it that are no blocks."""
    generator = torch.Generator().manual_seed(2)

    def randn(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    state = {"patch_embed.0.weight": randn(3), "projector.fc1.weight": randn(4, 4)}
    for n, (channels, kinds) in PLACES.items():
        state[f"network.{n + 1}.proj.0.weight"] = randn(3)
        for b, kind in enumerate(kinds):
            state[f"network.{n}.{b}.convffn.fc1.weight"] = randn(3)
            for which in (1, 2) if kind == "AttentionBlock" else (1,):
                name = f"network.{n}.{b}.adapter{which}"
                state[f"{name}.0.weight"], state[f"{name}.0.bias"] = randn(8, channels, 1, 1), randn(8)
                state[f"{name}.2.weight"], state[f"{name}.2.bias"] = randn(channels, 8, 1, 1), randn(channels)
    return state


def tower(skip=False):
    """Adapted blocks of timm's under the names that they have in its FastViT."""
    from models_setup import fastvit_block

    from pyfused.models import AttentionBlockAdapter, RepMixerBlockAdapter

    wrap = {"RepMixerBlock": RepMixerBlockAdapter, "AttentionBlock": AttentionBlockAdapter}
    model = nn.ModuleDict({"stages": nn.ModuleList()})
    for channels, kinds in PLACES.values():
        made = [wrap[kind].from_block(fastvit_block(kind, channels), hidden=8, skip=skip) for kind in kinds]
        model["stages"].append(nn.ModuleDict({"blocks": nn.ModuleList(made)}))
    return model.eval()


class TestFastVitFork:
    def test_both_ways(self, tmp_path):
        pytest.importorskip("timm")
        state = fork_state()
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "theirs.pth")
        notes = convert(tmp_path / "theirs.pth", tmp_path / "ours", "fastvit-fork", "pyfused", order="right")
        assert [note[:20] for note in notes] == ["left out: projector,", "the base's weights a"]
        model = tower()
        load_tuned(model, tmp_path / "ours")

        def theirs(name, f):
            down, up = (F.conv2d, F.conv2d)
            h = F.gelu(down(f, state[f"{name}.0.weight"], state[f"{name}.0.bias"]))
            return up(h, state[f"{name}.2.weight"], state[f"{name}.2.bias"])

        block, x = model["stages"][0]["blocks"][1], torch.randn(2, 16, 6, 6)
        z = block.token_mixer(x)
        expected = z + block.layer_scale.gamma * theirs("network.0.1.adapter1", block.mlp(z))
        torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)
        block, x = model["stages"][1]["blocks"][0], torch.randn(2, 32, 4, 4)
        z = x + block.layer_scale_1.gamma * theirs("network.2.0.adapter1", block.token_mixer(block.norm(x)))
        expected = z + block.layer_scale_2.gamma * theirs("network.2.0.adapter2", block.mlp(z))
        torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)
        save_tuned(model, tmp_path / "saved")
        blank = {name: torch.zeros_like(t) if "adapter" in name else t for name, t in state.items()}
        torch.save(blank, tmp_path / "like.pth")
        for source in ("ours", "saved"):
            convert(tmp_path / source, tmp_path / "back.pth", "pyfused", "fastvit-fork", tmp_path / "like.pth")
            equal(tensors(tmp_path / "back.pth"), state)
        with pytest.raises(ValueError, match=r"skip 0.0 in the file, 1.0 in the model"):
            load_tuned(tower(skip=True), tmp_path / "ours")

    def test_conv_lora(self, tmp_path):
        from pyfused import ConvLoRA

        lora_a, lora_b = torch.randn(2, 16, 1, 1), torch.randn(16, 2, 1, 1)
        state = {"patch_embed.weight": torch.ones(1), "network.0.0.fc.weight": torch.ones(1)}
        state |= {"lora1.lora_A.weight": lora_a, "lora1.lora_B.weight": lora_b}
        torch.save(state, tmp_path / "theirs.pth")
        (note,) = convert(tmp_path / "theirs.pth", tmp_path / "ours", "fastvit-fork", "pyfused")
        assert note == "not in the fork's files, and as the model has it: alpha of ConvLoRA"
        model = nn.ModuleDict({"stages": nn.ModuleList([nn.ModuleDict({"conv_lora": ConvLoRA(16, 2, 6, 1)})])})
        load_tuned(model, tmp_path / "ours")
        x = torch.randn(2, 16, 5, 5)
        expected = x + 3.0 * F.conv2d(F.conv2d(x, lora_a), lora_b)
        torch.testing.assert_close(model["stages"][0]["conv_lora"](x), expected, rtol=1e-5, atol=1e-5)
        convert(tmp_path / "ours", tmp_path / "back.pth", "pyfused", "fastvit-fork", tmp_path / "theirs.pth")
        equal(tensors(tmp_path / "back.pth"), state)

    def test_what_has_no_form(self, tmp_path):
        state = fork_state()
        for change, order, message in (
            ({}, None, "order must be 'right', .* got None: the file does not say"),
            ({}, "broken", "order must be 'right', .* got 'broken'"),
            (
                {"network.0.0.convffn.fc2.lora_A.weight": torch.ones(1)},
                "right",
                "fc2.lora_A.weight' .* has no form here",
            ),
            ({"a": 3}, "right", "must hold a model's state dict"),
        ):
            torch.save(state | change, tmp_path / "theirs.pth")
            with pytest.raises(ValueError, match=f"convert: .*{message}"):
                convert(tmp_path / "theirs.pth", tmp_path / "ours", "fastvit-fork", "pyfused", order=order)
        torch.save({"patch_embed.weight": torch.ones(1)}, tmp_path / "theirs.pth")
        with pytest.raises(ValueError, match="must hold the fork's adapters, got none"):
            convert(tmp_path / "theirs.pth", tmp_path / "ours", "fastvit-fork", "pyfused", order="right")
        torch.save(state, tmp_path / "theirs.pth")
        convert(tmp_path / "theirs.pth", tmp_path / "ours", "fastvit-fork", "pyfused", order="right")
        fewer = {name: tensor for name, tensor in state.items() if not name.startswith("network.0.1")}
        torch.save(fewer, tmp_path / "like.pth")
        with pytest.raises(ValueError, match=r"must have places of the same shapes .* got \['network.0.1.adapter1"):
            convert(tmp_path / "ours", tmp_path / "back.pth", "pyfused", "fastvit-fork", tmp_path / "like.pth")
        assert not (tmp_path / "back.pth").exists()


class TestArguments:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"from_format": "onnx"}, "from_format must be one of .*'peft'.* got 'onnx'"),
            ({"to_format": "Peft"}, "to_format must be one of"),
            ({"to_format": "pyfused"}, "to_format must be another format than from_format, got 'pyfused' twice"),
            ({"source": "none"}, "source must be there, got nothing at"),
            ({"target": "here"}, "target must be another place than source"),
            ({"like": "here"}, "like must be None for 'peft', got 'here'"),
            ({"to_format": "adapterhub"}, "like must be given for 'adapterhub', got None"),
            ({"order": "right"}, "order must be None but for 'fastvit-fork', got 'right'"),
            ({}, "folder must hold tuned.safetensors"),
        ],
    )
    def test_refusals(self, change, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "here").mkdir()
        call = {"source": "here", "target": "there", "from_format": "pyfused", "to_format": "peft"} | change
        with pytest.raises(ValueError, match=f"convert: {message}"):
            convert(**call)
        assert [path.name for path in tmp_path.iterdir()] == ["here"]

    @pytest.mark.parametrize("kind", ["aa-clip", "fastvit-fork", "peft", "adapterhub"])
    def test_no_pickle_is_run(self, kind, tmp_path):
        class Trap:
            def __reduce__(self):
                return (print, ("run",))

        source = tmp_path / "source"
        if kind in ("peft", "adapterhub"):
            source.mkdir()
            config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": "a"}
            config |= {"name": "task", "config": {"non_linearity": "relu"}, "version": "adapters.1.3.0"}
            (source / "adapter_config.json").write_text(json.dumps(config))
            file = source / {"peft": "adapter_model.bin", "adapterhub": "pytorch_adapter.bin"}[kind]
        else:
            file = source
        torch.save({"a": Trap()}, file)
        with pytest.raises(ValueError, match=r"must be tensors that torch.save wrote, got UnpicklingError"):
            convert(source, tmp_path / "ours", kind, "pyfused")
