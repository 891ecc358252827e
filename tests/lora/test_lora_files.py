"""save_lora and load_lora: PEFT reads what is written, what PEFT wrote is read, what does not fit changes nothing."""

from __future__ import annotations

import copy
import errno
import json
import subprocess
import sys

import pytest
import torch
from models_setup import small_vit, wake
from torch import nn
from tree import ROOT

from pyfused import files, inject_lora, load_lora, load_lora_state_dict, save_lora, save_tuned, set_adapter
from pyfused.integrations import lora_files
from pyfused.modules import LoRALinear, LoRAModule

peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402


class Net(nn.Module):
    """Every layer that PEFT has a form for here, and a head with statistics of its own."""

    def __init__(self):
        super().__init__()
        self.wide, self.point = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 12, bias=False)
        self.head = nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 4))

    def forward(self, images):
        x = self.point(self.wide(images)).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.second(torch.tanh(self.first(x.mean(1)))))


ALL = ["wide", "point", "attention", "first", "second"]
X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Net().eval()


def adapted(base, names=ALL, **settings):
    model = copy.deepcopy(base)
    inject_lora(model, names, **{"rank": 4, "alpha": 8} | settings)
    return wake(model, 0.1)


def peft_of(base, names=ALL, **settings):
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(names)} | settings)
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def state_of(model):
    """Everything that loading could change."""
    return (
        [(path, type(module), module.training, sorted(module.__dict__)) for path, module in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )


def assert_unchanged(model, before):
    after = state_of(model)
    assert after[:2] == before[:2]
    assert after[2].keys() == before[2].keys()
    for name, tensor in after[2].items():
        torch.testing.assert_close(tensor, before[2][name], rtol=0, atol=0, equal_nan=True)


def close(ours, theirs, x=X, eps=1e-6):
    with torch.no_grad():
        a, b = ours(x), theirs(x)
    assert (a - b).abs().max() <= eps * max(1.0, b.abs().max().item())


SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank": {"wide": 3, "attention": 5}, "alpha": {"first": 5.5, "point": 1}},
    "dropout": {"dropout": 0.25},
    "one kind": {"names": ["first"]},
}


class TestSeveralAdapters:
    def two(self, base):
        """One adapter on all layers, another of other settings on some."""
        model = adapted(base)
        inject_lora(model, ["first", "second", "point"], rank=6, alpha=9, adapter="b", train=["head"])
        return wake(model, 0.1).eval()

    def test_each_is_a_file_of_its_own(self, base, tmp_path):
        model = self.two(base)
        for name in ("default", "b"):
            save_lora(model, tmp_path / name, adapter=name)
        set_adapter(model, "b")
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "b").eval()
        close(model, theirs)
        set_adapter(model, "default")
        close(model, PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "default").eval())
        assert {p.shape[0] for n, p in theirs.named_parameters() if "lora_A" in n} == {6}

    def test_one_is_added_beside_another(self, base, tmp_path):
        model = self.two(base)
        save_lora(model, tmp_path, adapter="b")
        other = adapted(base).eval()
        before = other(X)
        load_lora(other, tmp_path, adapter="b")
        close(other, lambda x: before)
        for one in (model, other):
            set_adapter(one, "b")
        close(other, model)
        # Once more, into the adapter that is there now.
        wake(other, 0.3)
        load_lora(other, tmp_path, adapter="b")
        close(other, model)
        fresh = copy.deepcopy(base).eval()
        load_lora(fresh, tmp_path, adapter="b")
        close(fresh, model)

    def test_which_must_be_said(self, base, tmp_path):
        model = self.two(base)
        before = state_of(model)
        with pytest.raises(ValueError, match="save_lora: model must have one LoRA adapter, got default, b"):
            save_lora(model, tmp_path)
        with pytest.raises(ValueError, match="save_lora: adapter must name adapters of the model, got 'c'"):
            save_lora(model, tmp_path, adapter="c")
        with pytest.raises(ValueError, match="save_tuned: model must have one LoRA adapter"):
            save_tuned(model, tmp_path)
        save_lora(adapted(base), tmp_path)
        with pytest.raises(ValueError, match="load_lora: model must have one LoRA adapter"):
            load_lora(model, tmp_path)
        # Settings of one are not those of the other.
        with pytest.raises(ValueError, match=r"load_lora: .*(must have the model's|settings)"):
            load_lora(model, tmp_path, adapter="b")
        assert_unchanged(model, before)


class TestRoundTrips:
    @pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
    def test_pyfused_peft_pyfused(self, base, settings, tmp_path):
        model = adapted(base, **settings).eval()
        save_lora(model, tmp_path / "a" / "b")
        assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == [
            "adapter_config.json", "adapter_model.safetensors",
        ]  # fmt: skip
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a/b").eval()
        close(model, theirs)
        theirs.save_pretrained(tmp_path / "back")
        again = copy.deepcopy(base)
        load_lora(again, tmp_path / "back")
        assert torch.equal(again(X), model(X))
        mine = {path: m.lora_settings() for path, m in model.named_modules() if isinstance(m, LoRAModule)}
        assert mine == {path: m.lora_settings() for path, m in again.named_modules() if isinstance(m, LoRAModule)}
        trains = [name for name, p in model.named_parameters() if p.requires_grad]
        assert [name for name, p in again.named_parameters() if p.requires_grad] == trains
        assert all("lora" in name for name in trains)

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"use_rslora": True},
            {"rank_pattern": {"first|second": 2}, "alpha_pattern": {"ide": 1, "^wide": 3, ".*nd": 7}},
            {"names": ["attention"]},
            {"modules_to_save": ["head"]},
        ],
    )
    def test_peft_pyfused_peft(self, base, settings, tmp_path):
        theirs = peft_of(base, **settings)
        theirs.save_pretrained(tmp_path / "theirs")
        model = copy.deepcopy(base)
        load_lora(model, tmp_path / "theirs")
        close(model, theirs)
        save_lora(model, tmp_path / "ours")
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
        close(again, theirs)
        one, two = (safetensors_torch.load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "ours"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("narrow", [False, True])
    def test_dtypes(self, base, dtype, narrow, tmp_path):
        base.to(dtype)
        model = adapted(base, lora_dtype=dtype if narrow else None)
        save_lora(model, tmp_path)
        again = copy.deepcopy(base)
        inject_lora(again, ALL, rank=4, alpha=8, lora_dtype=dtype if narrow else None)
        load_lora(again, tmp_path)
        x = X.to(dtype)
        assert torch.equal(model(x), again(x))
        # PEFT computes the term of float32 parameters in float32, and merges an attention's in 16 bits.
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        close(model, theirs, x, 1e-6 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_peft_pyfused_peft_in_16_bits(self, base, dtype, tmp_path):
        base.to(dtype)
        theirs = peft_of(base)
        for name, parameter in theirs.named_parameters():
            if "lora" in name:
                parameter.data = parameter.data.to(dtype)
        theirs.save_pretrained(tmp_path / "theirs")
        model = copy.deepcopy(base)
        load_lora(model, tmp_path / "theirs")
        assert model.first.lora_a.dtype == torch.float32
        close(model, theirs, X.to(dtype), 8 * torch.finfo(dtype).eps)
        save_lora(model, tmp_path / "ours")
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
        expected = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs").eval()
        assert torch.equal(again(X.to(dtype)), expected(X.to(dtype)))

    def test_conv1d(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20, n_positions=8)
        torch.manual_seed(0)
        base = transformers.GPT2Model(config).eval()
        model = copy.deepcopy(base)
        inject_lora(model, ["c_attn", "c_fc"], rank=2)
        wake(model)
        save_lora(model, tmp_path / "ours")
        assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["fan_in_fan_out"] is True
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
        words = torch.tensor([[1, 2, 3, 4]])
        close(lambda x: model(x)[0], lambda x: theirs(x)[0], words)
        theirs.save_pretrained(tmp_path / "theirs")
        again = copy.deepcopy(base)
        load_lora(again, tmp_path / "theirs")
        assert torch.equal(again(words)[0], model(words)[0])

    def test_what_trains_goes_along_with_its_buffers(self, base, tmp_path):
        model = adapted(base, ["first"], train=["head"])
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        model(X).square().mean().backward()
        optimizer.step()
        model.eval()
        assert not torch.equal(model.head[0].running_mean, base.head[0].running_mean)
        save_lora(model, tmp_path)
        close(model, PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval())
        again = copy.deepcopy(base)
        load_lora(again, tmp_path)
        assert torch.equal(again(X), model(X))
        assert again.head[0].num_batches_tracked == 1
        assert {name for name, p in again.named_parameters() if p.requires_grad} == {
            name for name, p in model.named_parameters() if p.requires_grad
        }
        save_lora(again, tmp_path / "again")
        assert "modules_to_save" in (tmp_path / "again/adapter_config.json").read_text()

    def test_into_a_model_with_lora_merged_or_compiled(self, base, tmp_path):
        model = adapted(base)
        save_lora(torch.compile(model, backend="eager"), tmp_path)
        merged = adapted(base)
        for module in merged.modules():
            if isinstance(module, LoRAModule) and "out_proj" not in str(module):
                module.merge()
        load_lora(merged, tmp_path)
        assert merged.first.merged
        close(merged, model, eps=1e-5)
        compiled = torch.compile(adapted(base), backend="eager")
        load_lora(compiled, tmp_path)
        assert torch.equal(compiled._orig_mod(X), model(X))

    def test_names_that_end_in_others(self, tmp_path):
        class Inner(nn.Module):
            def __init__(self):
                super().__init__()
                self.proj, self.inner = nn.Linear(6, 6), nn.ModuleDict({"proj": nn.Linear(6, 6)})

            def forward(self, x):
                return self.proj(self.inner["proj"](x))

        base = Inner()
        model = copy.deepcopy(base)
        inject_lora(model, ["proj"], exclude=["inner"], rank=2)
        wake(model)
        save_lora(model, tmp_path)
        x = torch.randn(3, 6)
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        close(theirs, model, x)
        assert type(theirs.base_model.model.inner["proj"]) is nn.Linear
        again = copy.deepcopy(base)
        load_lora(again, tmp_path)
        assert torch.equal(again(x), model(x))
        assert type(again.inner["proj"]) is nn.Linear
        both = copy.deepcopy(base)
        inject_lora(both, ["inner.proj", "proj"], rank={"inner.proj": 3, "proj": 2})
        save_lora(wake(both), tmp_path)
        again = copy.deepcopy(base)
        load_lora(again, tmp_path)
        assert (again.proj.rank, again.inner["proj"].rank) == (2, 3)
        # PEFT's own patterns may mean the end of a name.
        settings = {"rank_pattern": {"^proj": 2, "proj": 3}, "alpha_pattern": {"proj": 5}}
        theirs = peft_of(base, ["proj"], **settings)
        theirs.save_pretrained(tmp_path / "theirs")
        again = copy.deepcopy(base)
        load_lora(again, tmp_path / "theirs")
        assert [(m.rank, m.alpha) for m in (again.proj, again.inner["proj"])] == [(2, 5.0), (3, 5.0)]
        close(again, theirs, x)

    def test_a_pickle_of_peft_is_read_without_running_it(self, base, tmp_path):
        theirs = peft_of(base)
        theirs.save_pretrained(tmp_path, safe_serialization=False)
        assert not (tmp_path / "adapter_model.safetensors").exists()
        model = copy.deepcopy(base)
        load_lora(model, tmp_path)
        close(model, theirs)
        torch.save({"base_model.model.first.lora_A.weight": nn.Linear(2, 2)}, tmp_path / "adapter_model.bin")
        before = state_of(base)
        with pytest.raises(ValueError, match=r"adapter_model.bin' must be tensors that torch.save wrote"):
            load_lora(base, tmp_path)
        assert_unchanged(base, before)


class TestNoForm:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"qkv": "split"}, "no form for 'attention': LoRA on q, k and v apart"),
            ({"names": ["in_proj"]}, "no form for 'attention': LoRA on in_proj without out_proj"),
            ({"names": ["out_proj"]}, r"no form for 'attention.out_proj': LoRA on out_proj without in_proj"),
            ({"rank": {"in_proj": 2, "out_proj": 3}}, "rank or alpha of in_proj are not those of out_proj"),
            ({"train": ["head.0.weight"]}, r"no form for the single parameter 'head.0.weight'"),
            ({"names": ["head.1"], "train": ["head.0"]}, None),
        ],
    )
    def test_of_ours_in_pefts_files(self, base, settings, message, tmp_path):
        model = adapted(base, **settings)
        if message is None:
            save_lora(model, tmp_path)
            return
        with pytest.raises(ValueError, match=f"save_lora: PEFT has .*{message}"):
            save_lora(model, tmp_path / "folder")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("conv", "message"),
        [
            ({"groups": 2}, "groups = 2"),
            ({"dilation": 2}, r"dilation = \[2, 2\]"),
            ({"padding_mode": "circular", "padding": 1}, "padding_mode = 'circular'"),
        ],
    )
    def test_convolutions(self, conv, message, tmp_path):
        model = nn.Sequential(nn.Conv2d(4, 4, 3, **conv))
        inject_lora(model, ["0"], rank=2)
        with pytest.raises(ValueError, match=f"no form for '0': a convolution with {message}"):
            save_lora(model, tmp_path)
        theirs = get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3, **conv)), LoraConfig(r=2, target_modules=["0"]))
        theirs.save_pretrained(tmp_path)
        bare = nn.Sequential(nn.Conv2d(4, 4, 3, **conv))
        before = state_of(bare)
        with pytest.raises(ValueError, match=r"grouped in PEFT|must have the model's settings, got 0: (dil|padding)"):
            load_lora(bare, tmp_path)
        assert_unchanged(bare, before)

    def test_open_clips_own_attention_and_two_dropouts(self, base, tmp_path):
        transformer = pytest.importorskip("open_clip.transformer")
        model = nn.ModuleDict({"attn": transformer.Attention(8, 2)})
        inject_lora(model, ["attn"], rank=2)
        with pytest.raises(ValueError, match="no form for 'attn': a LoRAPackedAttention"):
            save_lora(model, tmp_path)
        model = adapted(base, ["first"], dropout=0.1)
        inject_lora(model, ["second"], rank=4, alpha=8, dropout=0.2)
        with pytest.raises(ValueError, match=r"one dropout for all layers, got \[0.1, 0.2\]"):
            save_lora(model, tmp_path)

    def test_a_layer_alone(self, tmp_path):
        with pytest.raises(ValueError, match="no form for 'the model': PEFT adapts layers inside a model"):
            save_lora(LoRALinear(4, 4), tmp_path)

    def test_modules_that_peft_would_take_too(self, tmp_path):
        def net():
            return nn.ModuleDict({name: nn.Linear(4, 4) for name in ("head", "aux_head", "fc")})

        model = net()
        inject_lora(model, ["fc"], rank=2, train=["head"])
        with pytest.raises(ValueError, match="'head', which trains whole, alone: it goes by the end of names"):
            save_lora(model, tmp_path)
        nested = nn.ModuleDict({"head": nn.Linear(4, 4), "block": nn.ModuleDict({"head": net()})})
        inject_lora(nested, ["block.head.fc"], rank=2, train=["head"])
        with pytest.raises(ValueError, match=r"would take 'block.head.fc' for a part of 'head'"):
            save_lora(nested, tmp_path)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"use_dora": True, "names": ["first"]},
                "lora_magnitude_vector|use_dora of adapter_config.json has no form",
            ),
            ({"lora_bias": True, "names": ["first"]}, "lora_bias of adapter_config.json has no form"),
            ({"bias": "all", "names": ["first"]}, "bias of adapter_config.json must be 'none', got 'all'"),
            ({"init_lora_weights": "pissa", "names": ["first"]}, "init_lora_weights .* got 'pissa'"),
        ],
    )
    def test_of_pefts_here(self, base, settings, message, tmp_path):
        peft_of(base, **settings).save_pretrained(tmp_path)
        before = state_of(base)
        with pytest.raises(ValueError, match=f"load_lora: ({message})"):
            load_lora(base, tmp_path)
        assert_unchanged(base, before)

    def test_an_embedding_and_a_later_release(self, base, tmp_path):
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
        get_peft_model(model, LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"'0.lora_embedding_A' of PEFT's file has no form here"):
            load_lora(model, tmp_path)
        peft_of(base).save_pretrained(tmp_path)
        edit(tmp_path, peft_version="0.22.0")
        with pytest.raises(ValueError, match=r"peft_version .* must be at most 0\.21 .* got 0\.22\.0"):
            load_lora(base, tmp_path)


def edit(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def retensor(folder, change):
    path = folder / "adapter_model.safetensors"
    state = safetensors_torch.load_file(path)
    change(state)
    safetensors_torch.save_file(state, path)


def _drop(state):
    del state["base_model.model.first.lora_B.weight"]


def _extra(state):
    state["base_model.model.firsst.weight"] = torch.zeros(2)


def _rename(state):
    for kind in "AB":
        state[f"base_model.model.frist.lora_{kind}.weight"] = state.pop(f"base_model.model.first.lora_{kind}.weight")


def _shape(state):
    state["base_model.model.first.lora_A.weight"] = torch.zeros(4, 9)


def _rank(state):
    state["base_model.model.first.lora_A.weight"] = torch.zeros(3, 8)


def _truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


# What is done to a folder, and what is then said.
DAMAGE = {
    "missing": (lambda f: retensor(f, _drop), "lora_A and lora_B of 'first', got one of them"),
    "extra": (lambda f: retensor(f, _extra), r"'firsst.weight' of PEFT's file must be LoRA or in modules_to_save"),
    "another name": (lambda f: retensor(f, _rename), r"without 'frist'; near names: first"),
    "shape": (lambda f: retensor(f, _shape), r"first.lora_a expected \(4, 8\), got \(4, 9\)"),
    "rank": (lambda f: retensor(f, _rank), r"of 'first' must be .* of the rank 4 that adapter_config.json says"),
    "no prefix": (lambda f: retensor(f, lambda s: s.update(a=torch.ones(1))), "must begin with 'base_model.model.'"),
    "truncated": (_truncate, "adapter_model.safetensors' must be a whole safetensors file"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "must hold adapter_model.safetensors or"),
    "no settings": (lambda f: (f / "adapter_config.json").unlink(), "must hold adapter_config.json, got"),
    "no json": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json' must hold a JSON object"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "must hold a JSON object, got list"),
    "method": (lambda f: edit(f, peft_type="IA3"), "peft_type of adapter_config.json must be 'LORA', got 'IA3'"),
    "no rank": (lambda f: edit(f, r=None), "adapter_config.json must hold r, got None"),
    "no number": (lambda f: edit(f, lora_dropout="x"), "adapter_config.json must hold lora_dropout, got 'x'"),
    "patterns": (lambda f: edit(f, rank_pattern=["first"]), "rank_pattern of .* must hold numbers by pattern"),
    "modules": (lambda f: edit(f, modules_to_save="head"), "modules_to_save of .* must be a list of names, got 'head'"),
    "unknown key": (lambda f: edit(f, use_novelty=True), "use_novelty of adapter_config.json has no form here"),
    "pattern": (lambda f: edit(f, alpha_pattern={"(": 3}), r"alpha_pattern .* must hold patterns, got"),
}


class TestBadInput:
    @pytest.mark.parametrize("with_lora", [False, True])
    @pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
    def test_a_damaged_folder_changes_nothing(self, base, damage, message, with_lora, tmp_path):
        save_lora(adapted(base, ["first", "attention"]), tmp_path)
        damage(tmp_path)
        model = adapted(base, ["first", "attention"]) if with_lora else base
        if with_lora and "frist" in message:
            message = r"missing \['first.lora_a', 'first.lora_b'\] and .* of frist.lora_a, near names: first.lora_a"
        before = state_of(model)
        with pytest.raises(ValueError, match=message):
            load_lora(model, tmp_path)
        assert_unchanged(model, before)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"alpha": 64}, "alpha 8.0 in the file, 64.0 in the model"),
            ({"rank": 5}, r"expected \(5, 8\), got \(4, 8\)"),
            ({"use_rslora": True}, "use_rslora False in the file, True in the model"),
            ({"dropout": 0.5}, "dropout 0.0 in the file, 0.5 in the model"),
            ({"names": ["first"]}, "2 unknown .*second"),
            ({"names": ["first", "second", "point"]}, "2 missing .*point"),
            ({"train": ["head"]}, "missing .*head"),
        ],
    )
    def test_another_lora(self, base, settings, message, tmp_path):
        save_lora(adapted(base, ["first", "second"]), tmp_path)
        model = adapted(base, **{"names": ["first", "second"]} | settings)
        before = state_of(model)
        with pytest.raises(ValueError, match=f"load_lora: .*{message}"):
            load_lora(model, tmp_path)
        assert_unchanged(model, before)

    def test_another_architecture(self, base, tmp_path):
        save_lora(adapted(base), tmp_path)
        model = small_vit()
        before = state_of(model)
        with pytest.raises(ValueError, match="must have the layers that the file adapts, got a VisionTransformer"):
            load_lora(model, tmp_path)
        assert_unchanged(model, before)

    def test_folders_and_models(self, base, tmp_path):
        (tmp_path / "file").write_text("here")
        model = adapted(base)
        with pytest.raises(ValueError, match="save_lora: folder must be a folder, got the file"):
            save_lora(model, tmp_path / "file")
        assert (tmp_path / "file").read_text() == "here"
        with pytest.raises(ValueError, match="load_lora: folder must be a folder, got the file"):
            load_lora(base, tmp_path / "file")
        with pytest.raises(ValueError, match="load_lora: folder must be a folder, got nothing at"):
            load_lora(base, tmp_path / "none")
        for call in (save_lora, load_lora):
            with pytest.raises(TypeError, match="folder must be a path, got int"):
                call(model, 3)
            with pytest.raises(TypeError, match=r"model must be an nn.Module, got str"):
                call("model", tmp_path)
        with pytest.raises(ValueError, match="save_lora: model must contain LoRA modules, got a Net with none"):
            save_lora(base, tmp_path / "empty")
        assert not (tmp_path / "empty").exists()

    def test_pefts_names_in_memory(self, base):
        model = adapted(base)
        state = peft.get_peft_model_state_dict(peft_of(base))
        with pytest.raises(ValueError, match=r"got PEFT's names; load_lora\(model, folder\) .* `pyfused convert"):
            load_lora_state_dict(model, state)

    def test_without_safetensors(self, base, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(
            ImportError, match=r"save_lora: .* need the package safetensors \(pip install safetensors\)"
        ):
            save_lora(adapted(base), tmp_path / "a")
        assert not (tmp_path / "a").exists()


class TestWriting:
    @pytest.mark.parametrize("failing", ["write_tensors", "json"])
    @pytest.mark.parametrize("there", [False, True])
    def test_nothing_half_written_remains(self, base, failing, there, tmp_path, monkeypatch):
        folder = tmp_path / "a" / "b"
        if there:
            save_lora(adapted(base, ["first"]), folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()} if there else None

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "full")

        if failing == "json":
            monkeypatch.setattr(lora_files.json, "dumps", full)
        else:
            monkeypatch.setattr(files, "write_tensors", full)
        # pyfused's own reading of settings uses json too.
        with pytest.raises(OSError, match="full"):
            lora_files.write("save_lora", folder, {}, {"a": torch.ones(1)})
        if there:
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        else:
            assert list(tmp_path.iterdir()) == []

    def test_shared_memory_is_written_twice(self, base, tmp_path):
        model = adapted(base, ["first", "second"])
        with torch.no_grad():
            model.second.lora_a = nn.Parameter(model.second.lora_a)
            model.second.lora_b = model.first.lora_b
        save_lora(model, tmp_path)
        again = adapted(base, ["first", "second"])
        load_lora(again, tmp_path)
        assert torch.equal(again.second.lora_b, model.first.lora_b)


# Two processes, each with its half of every parameter.
SHARDED = """
import sys, torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from pyfused import inject_lora, load_lora, save_lora, save_tuned
rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", store=distributed.FileStore(folder + "/store", 2), rank=rank, world_size=2)

def net(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5), nn.Linear(5, 3))
    inject_lora(model, ["0", "1"], rank=3, train=["2"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    fully_shard(model)
    return model, whole

model, whole = net(0)
other, _ = net(1)
save_lora(model, folder + "/ours")
save_tuned(model, folder + "/tuned")
load_lora(other, folder + "/ours")
for name, parameter in other.named_parameters():
    if parameter.requires_grad:
        assert torch.equal(parameter.full_tensor(), whole[name]), name
bare = nn.Linear(6, 7)
fully_shard(bare)
try:
    load_lora(nn.Sequential(bare), folder + "/ours")
except ValueError as error:
    assert "must not be sharded" in str(error), error
else:
    raise AssertionError("a sharded model was injected")
open(folder + "/file", "a").close()
try:
    save_lora(model, folder + "/file")
except (ValueError, RuntimeError) as error:
    expected = "folder must be a folder" if rank == 0 else "the first process could not write: ValueError"
    assert expected in str(error), error
else:
    raise AssertionError("it wrote into a file")
if rank == 0:
    torch.save(whole, folder + "/whole.pt")
distributed.barrier()
"""


def test_fsdp2_writes_whole_tensors_and_reads_them(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch has no gloo")
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, str(rank), str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for run in runs:
        _, error = run.communicate(timeout=300)
        assert run.returncode == 0, error
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    state = safetensors_torch.load_file(tmp_path / "ours/adapter_model.safetensors")
    assert torch.equal(state["base_model.model.0.lora_A.weight"], whole["0.lora_a"])
    assert torch.equal(state["base_model.model.2.weight"], whole["2.weight"])
    tuned = safetensors_torch.load_file(tmp_path / "tuned/tuned.safetensors")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tuned.items())
