"""save_tuned and load_tuned: every method's parameters and settings come back, or nothing of the model changes."""

from __future__ import annotations

import copy
import errno
import json

import pytest
import torch
from models_setup import fastvit, small_vit
from torch import nn

from pyfused import (
    BottleneckAdapter,
    ConvLoRA,
    PrefixTuning,
    ScaledCrossAttention,
    bitfit,
    files,
    inject_lora,
    load_lora,
    load_tuned,
    remove_lora,
    save_lora,
    save_tuned,
)
from pyfused.modules import LoRAModule

safetensors_torch = pytest.importorskip("safetensors.torch")


class Mixed(nn.Module):
    """Layers that LoRA has a form for here and PEFT has none, a norm with statistics, a single parameter."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, kdim=8, vdim=8, batch_first=True)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x):
        x = self.norm(self.grouped(x)).flatten(2).transpose(1, 2) + self.token
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Held(nn.Module):
    """Modules of this package, as somebody puts them into a model of his own."""

    def __init__(self, activation="relu", gate=True):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3).requires_grad_(False)
        self.low = ConvLoRA(16, rank=2)
        self.adapter = BottleneckAdapter.parallel(16, activation=activation)
        self.cross = ScaledCrossAttention(16, 8, 4, learnable_weight=gate, norm_match=True)

    def forward(self, x):
        x = self.low(self.stem(x)).flatten(2).transpose(1, 2)
        x = self.adapter(x, residual=x)
        return self.cross(x, x[:, :3, :8].contiguous())


def mixed(*calls):
    def change(model):
        for call in calls:
            call(model)

    return change


def tokens(**settings):
    return lambda model: PrefixTuning(model, **{"num_virtual_tokens": 3} | settings)


def lora(*names, **settings):
    return lambda model: inject_lora(model, list(names) or "all-linear", **{"rank": 2} | settings)


def fast(model):
    from pyfused.models import add_adapters

    add_adapters(model, skip=False, conv_lora_rank=2, train_layer_scale=True, train=["head"])


VIT, FAST = (3, 16, 16), (3, 64, 64)
# How a base is made, the shape of an image, what tunes it, and whether loading does that by itself.
CASES = {
    "lora": (small_vit, VIT, lora(), True),
    "lora apart": (small_vit, VIT, lora("attention", "c_fc", qkv="split", alpha=3, use_rslora=True), True),
    "lora in_proj": (small_vit, VIT, lora("in_proj"), True),
    "lora out_proj": (small_vit, VIT, lora("out_proj", dropout=0.1), True),
    "lora ranks": (small_vit, VIT, lora("attn", "mlp", rank={"in_proj": 3, "1.attn": 4}, alpha={"c_fc": 5}), True),
    "lora twice": (small_vit, VIT, mixed(lora("attn"), lora("c_fc", rank=3, dropout=0.2, use_rslora=True)), True),
    "lora groups": (Mixed, (4, 5, 5), lora("grouped", "attention", train=["head", "token"]), True),
    "bitfit": (small_vit, VIT, bitfit, True),
    "bitfit norms": (Mixed, (4, 5, 5), lambda model: bitfit(model, train=["head"], exclude=["attention"]), True),
    "lora and bitfit": (Mixed, (4, 5, 5), mixed(lora("grouped"), bitfit), True),
    "tokens": (small_vit, VIT, tokens(), True),
    "tokens projected": (small_vit, VIT, tokens(prefix_projection=True, exclude=["transformer.resblocks.1"]), True),
    "tokens shallow": (small_vit, VIT, tokens(deep=False, dropout=0.1), True),
    "all of them": (small_vit, VIT, mixed(lora("attention"), bitfit, tokens()), True),
    "fastvit": (fastvit, FAST, fast, False),
    "modules": (Held, (3, 6, 6), lambda model: None, False),
}


def tune(model, change):
    """``model`` tuned, with other numbers in all that trains."""
    change(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d) and module.weight.requires_grad:
            module.running_mean.add_(0.3)
    return model.eval()


def same(a, b):
    one, two = a.state_dict(), b.state_dict()
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    looks = [
        # Whoever set a parameter to train, it trains.
        [(n, type(m), m.training, m.__dict__.keys() - {"_told_to_train"}) for n, m in model.named_modules()]
        for model in (a, b)
    ]
    assert looks[0] == looks[1]
    trains = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (a, b)]
    assert trains[0] == trains[1]


def look(model):
    return (
        [(path, type(module), module.training, sorted(module.__dict__)) for path, module in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )


def unchanged(model, before):
    after = look(model)
    assert after[:2] == before[:2]
    assert all(torch.equal(tensor, before[2][name]) for name, tensor in after[2].items())


@pytest.fixture
def made(request):
    make, shape, change, _ = CASES[request.param]
    torch.manual_seed(0)
    base = make().eval()
    return base, torch.randn(2, *shape), change


class TestEveryMethod:
    @pytest.mark.parametrize(("made", "name"), [(name, name) for name in CASES], indirect=["made"], ids=CASES)
    def test_comes_back(self, made, name, tmp_path):
        base, x, change = made
        model = tune(copy.deepcopy(base), change)
        save_tuned(model, tmp_path / "new")
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["tuned.safetensors"]
        known = copy.deepcopy(base)
        change(known)
        load_tuned(known.eval(), tmp_path / "new")
        same(known, model)
        if name != "fastvit":
            assert torch.equal(known(x), model(x))
        fresh = copy.deepcopy(base)
        if CASES[name][3]:
            load_tuned(fresh, tmp_path / "new")
            same(fresh, model)
            assert torch.equal(fresh(x), model(x))
            # And a second save is the first one.
            save_tuned(fresh, tmp_path / "again")
            one, two = ((tmp_path / f / "tuned.safetensors").read_bytes() for f in ("new", "again"))
            assert one == two
        elif name == "fastvit":
            before = look(fresh)
            with pytest.raises(ValueError, match="modules that cannot be put into it here, got one without the"):
                load_tuned(fresh, tmp_path / "new")
            unchanged(fresh, before)

    def test_the_base_is_not_in_it(self, tmp_path):
        model = tune(small_vit(), lora("attention"))
        save_tuned(model, tmp_path)
        names = safetensors_torch.load_file(tmp_path / "tuned.safetensors")
        assert {name for name in model.state_dict() if "lora" in name} == set(names)

    def test_aa_clip(self, tmp_path):
        pytest.importorskip("open_clip")
        from aa_clip_cases import adapted, inputs, small_clip

        clip = small_clip()
        model, other = adapted(copy.deepcopy(clip)), adapted(copy.deepcopy(clip))
        save_tuned(model, tmp_path)
        load_tuned(other, tmp_path)
        same(other, model)
        assert torch.equal(other(*inputs()).text, model(*inputs()).text)
        for settings, message in (
            ({"image_weight": 0.2}, "image_adapters.0: weight 0.1 in the file, 0.2 in the model"),
            ({"num_heads": 4, "head_dim": 12}, "num_heads 2 in the file, 4 in the model"),
            ({"feature_levels": [1, 2]}, "without the SimpleProj 'projections.2'; near names: projections"),
        ):
            another = adapted(copy.deepcopy(clip), **settings)
            before = look(another)
            with pytest.raises(ValueError, match=f"load_tuned: .*{message}"):
                load_tuned(another, tmp_path)
            unchanged(another, before)
        with pytest.raises(ValueError, match=r"without the AdaptedCLIP '?'"):
            load_tuned(copy.deepcopy(clip), tmp_path)

    def test_lora_in_a_wider_model_after_removal(self, tmp_path):
        model = tune(small_vit(), lora())
        save_tuned(model, tmp_path)
        again = copy.deepcopy(model)
        remove_lora(again, merge=False)
        load_tuned(again, tmp_path)
        same(again, model)

    def test_what_somebody_else_set_to_train_is_in_it(self, tmp_path):
        base = small_vit()
        model = copy.deepcopy(base)
        inject_lora(model, "mlp", rank=2)
        model.ln_post.requires_grad_(True)
        tune(model, lambda model: None)
        save_tuned(model, tmp_path)
        fresh = copy.deepcopy(base)
        load_tuned(fresh, tmp_path)
        same(fresh.eval(), model)
        open_base = copy.deepcopy(base)
        inject_lora(open_base, "mlp", rank=2, freeze=False)
        tune(open_base, lambda model: None)
        save_tuned(open_base, tmp_path)
        fresh = copy.deepcopy(base)
        load_tuned(fresh, tmp_path)
        same(fresh.eval(), open_base)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtypes(self, dtype, tmp_path):
        base = Held().to(dtype).eval()
        model = tune(copy.deepcopy(base), lambda model: None)
        save_tuned(model, tmp_path)
        load_tuned(base, tmp_path)
        same(base.eval(), model)

    def test_what_was_merged_is_merged_anew(self, tmp_path):
        model = tune(small_vit(), lora("mlp"))
        save_tuned(model, tmp_path)
        other = small_vit()
        other.load_state_dict(model.state_dict(), strict=False)
        inject_lora(other, "mlp", rank=2)
        layers = [module for module in other.modules() if isinstance(module, LoRAModule)]
        for layer in layers:
            layer.merge()
        load_tuned(other, tmp_path)
        assert all(layer.merged for layer in layers)
        x = torch.randn(2, *VIT)
        torch.testing.assert_close(other.eval()(x), model(x), rtol=1e-4, atol=1e-4)


def rewrite(folder, change):
    """The file with another header, and other tensors."""
    path = folder / "tuned.safetensors"
    tensors, notes = files.read_tensors("test", path)
    header = json.loads(notes["pyfused"])
    change(header, tensors)
    files.write_tensors("test", path, tensors, {"pyfused": json.dumps(header)})


FIRST = "transformer.resblocks.0.mlp.c_fc.lora_a"
DAMAGE = {
    "missing": (lambda h, t: t.pop(FIRST), "1 missing .*c_fc.lora_a"),
    "unknown": (lambda h, t: t.update({FIRST + "x": t[FIRST]}), "unknown .*lora_ax.*near names: .*c_fc.lora_a"),
    "stray": (lambda h, t: t.update(stray=torch.ones(1)), "must hold the tensors of its modules, got 'stray'"),
    "shape": (lambda h, t: t.update({FIRST: torch.ones(2, 5)}), r"c_fc.lora_a expected \(2, 32\), got \(2, 5\)"),
    "dtype": (lambda h, t: t.update({FIRST: t[FIRST].int()}), "c_fc.lora_a of the file must have dtype torch.float32"),
    "alpha": (lambda h, t: h["modules"][FIRST[:-7]].update(alpha=64.0), "alpha 64.0 in the file, 32.0 in the model"),
    "version": (lambda h, t: h.update(version=2), "version 2, this pyfused reads 1"),
    "no modules": (lambda h, t: h.pop("modules"), "must hold the settings that save_tuned wrote"),
    "kinds": (lambda h, t: h["modules"].update(a=3), "must hold the settings that save_tuned wrote"),
    "empty": (lambda h, t: t.clear(), "must hold the tensors of its modules, got none"),
}


class TestBadInput:
    @pytest.mark.parametrize("fresh", [False, True])
    @pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
    def test_a_damaged_file_changes_nothing(self, damage, message, fresh, tmp_path):
        save_tuned(tune(small_vit(), mixed(lora("mlp"), tokens())), tmp_path)
        rewrite(tmp_path, damage)
        model = small_vit()
        if not fresh:
            mixed(lora("mlp"), tokens())(model)
        elif "in the model" in message:
            # There is nothing yet that it could differ from.
            return
        before = look(model)
        with pytest.raises((ValueError, TypeError), match=f"load_tuned: .*{message}"):
            load_tuned(model, tmp_path)
        unchanged(model, before)

    @pytest.mark.parametrize("cut", [3, 60, -5])
    def test_truncated(self, cut, tmp_path):
        save_tuned(tune(small_vit(), bitfit), tmp_path)
        path = tmp_path / "tuned.safetensors"
        path.write_bytes(path.read_bytes()[:cut])
        model = small_vit()
        before = look(model)
        with pytest.raises(ValueError, match=r"load_tuned: .*tuned.safetensors' must be a whole safetensors file"):
            load_tuned(model, tmp_path)
        unchanged(model, before)

    @pytest.mark.parametrize(
        ("saved", "loaded", "message"),
        [
            (lora("mlp"), lora("attention"), "missing .*in_proj.* unknown .*c_fc"),
            (lora("mlp"), tokens(), "missing .*virtual_tokens"),
            (tokens(), tokens(num_virtual_tokens=4), r"expected \(2, 4, 32\), got \(2, 3, 32\)"),
            (tokens(), tokens(dropout=0.5), "dropout 0.0 in the file, 0.5 in the model"),
            (bitfit, mixed(bitfit, lora("mlp")), "missing .*lora"),
            (lora("mlp"), lora("mlp", train=["ln_post"]), "missing .*ln_post"),
        ],
    )
    def test_another_method(self, saved, loaded, message, tmp_path):
        save_tuned(tune(small_vit(), saved), tmp_path)
        model = small_vit()
        loaded(model)
        before = look(model)
        with pytest.raises(ValueError, match=f"load_tuned: .*{message}"):
            load_tuned(model, tmp_path)
        unchanged(model, before)

    def test_another_architecture_and_other_modules(self, tmp_path):
        for change, message in (
            (lora("mlp"), "must have the layers that the file adapts"),
            (bitfit, "unknown"),
            (tokens(), "must have attentions"),
        ):
            save_tuned(tune(small_vit(), change), tmp_path)
            model = nn.Sequential(nn.Linear(3, 3))
            before = look(model)
            with pytest.raises(ValueError, match=message):
                load_tuned(model, tmp_path)
            unchanged(model, before)
        save_tuned(Held(), tmp_path)
        for model, message in (
            (Held("gelu"), "adapter: activation 'relu' in the file, 'gelu' in the model"),
            (Held(gate=False), "1 unknown .*cross.gate"),
        ):
            before = look(model)
            with pytest.raises(ValueError, match=message):
                load_tuned(model, tmp_path)
            unchanged(model, before)

    def test_folders_and_models(self, tmp_path):
        model = small_vit()
        with pytest.raises(ValueError, match="save_tuned: model must have something tuned in it, got a VisionTransf"):
            save_tuned(model, tmp_path / "a")
        assert not (tmp_path / "a").exists()
        with pytest.raises(ValueError, match=r"folder must hold tuned.safetensors, got .* with nothing"):
            load_tuned(model, tmp_path)
        with pytest.raises(ValueError, match="must be a folder, got nothing at"):
            load_tuned(model, tmp_path / "a")
        for call in (save_tuned, load_tuned):
            with pytest.raises(TypeError, match=r"model must be an nn.Module, got int"):
                call(3, tmp_path)
        bitfit(model)
        wrapped = nn.Module()
        wrapped.inner = object.__new__(nn.parallel.DistributedDataParallel)
        nn.Module.__init__(wrapped.inner)
        wrapped.inner.module = model
        with pytest.raises(ValueError, match=r"must not be in DistributedDataParallel, got 'inner'; give its .module"):
            save_tuned(wrapped, tmp_path / "a")
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="save_tuned: folder must be a folder, got the file"):
            save_tuned(model, tmp_path / "file")

    def test_a_fitted_compressor_is_refused(self, tmp_path):
        from pyfused.models import LatentWireAdapter, PCACompressor

        model = nn.ModuleDict({"adapter": LatentWireAdapter(4, 8, 6), "compressor": PCACompressor(4)})
        save_tuned(model, tmp_path)
        model["compressor"].fit(torch.randn(20, 6))
        with pytest.raises(ValueError, match=r"got the PCACompressor 'compressor' with the buffers"):
            save_tuned(model, tmp_path)

    def test_a_full_disk_leaves_the_old_file(self, tmp_path, monkeypatch):
        model = tune(small_vit(), bitfit)
        save_tuned(model, tmp_path)
        before = (tmp_path / "tuned.safetensors").read_bytes()

        def full(tensors, path, **others):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(safetensors_torch, "save_file", full)
        with pytest.raises(OSError, match="full"):
            save_tuned(model, tmp_path)
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def test_a_model_saved_both_ways(tmp_path):
    """What PEFT's files hold of a model is what is here."""
    pytest.importorskip("peft")
    base = small_vit()
    model = tune(copy.deepcopy(base), lora(train=["ln_post"]))
    save_lora(model, tmp_path / "peft")
    save_tuned(model, tmp_path / "ours")
    one, two = copy.deepcopy(base), copy.deepcopy(base)
    load_lora(one, tmp_path / "peft")
    load_tuned(two, tmp_path / "ours")
    same(one.eval(), model)
    same(two.eval(), model)
    PrefixTuning(model)
    with pytest.raises(ValueError, match=r"PEFT has no form for .*virtual_tokens': a VirtualTokens; save_tuned keeps"):
        save_lora(model, tmp_path / "peft")
