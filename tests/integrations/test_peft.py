"""`fuse`: PEFT's layers, run by `lora_linear` where it computes what PEFT would, and by PEFT where not."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from tree import ROOT

import pyfused
from pyfused import explain, fuse, unfuse
from pyfused.integrations.peft import FusedLayer

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft import PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora import layer as made  # noqa: E402
from peft_models import (  # noqa: E402
    ALL,
    WORDS,
    Net,
    Pair,
    X,
    assert_same,
    check_16_bits,
    check_parity,
    config,
    fill,
    gpt2,
    layers,
    llama,
    pair,
    results,
    told,
    two_adapters,
)


@pytest.fixture
def any_device(monkeypatch):
    """Dropout is served on a CPU too, as it is elsewhere."""
    monkeypatch.setattr("pyfused.integrations.peft_linear._SLOW_MASKS", ())


# ---- numbers


def test_gpt2_with_conv1d_equals_peft():
    check_parity(gpt2(), WORDS, served=8)


def test_a_tied_llama_equals_peft():
    check_parity(llama(**ALL), WORDS, served=14)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "orthogonal"},
        {"rank_pattern": {"2": 2}, "alpha_pattern": {"0": 3}},
        {"lora_dropout": 0.0},
    ],
    ids=str,
)
def test_settings_of_peft_are_honoured(settings):
    check_parity(pair(**settings), X, served=2, tolerance=1e-5)


def test_lora_bias_over_a_base_without_bias():
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="has no bias"):
        model = fill(get_peft_model(Pair(bias=False), config("0", lora_bias=True)))
    check_parity(model, X, served=1)


def test_a_base_that_trains_and_modules_to_save():
    model = pair(modules_to_save=["2"], target_modules=["0"])
    model.base_model.model[0].base_layer.weight.requires_grad_()
    check_parity(model, X, served=1)
    assert type(model.base_model.model[2]).__name__ == "ModulesToSaveWrapper"


def test_a_1x1_convolution_is_served_and_a_wider_one_is_not():
    torch.manual_seed(0)
    model = fill(get_peft_model(Net(), config("point", "wide", "stem", "first", "second")))
    images, words = torch.randn(2, 3, 9, 9), torch.randint(7, (2, 3))
    check_parity(model, images, words, served=3, tolerance=1e-5)
    report = fuse(model)
    assert {row.kind for row in report.rows} == {"Linear", "Conv2d"}
    assert [(row.kind, row.count, row.why) for row in report.left] == [
        ("PEFT's Conv2d", 2, "its convolution is no 1x1 without stride, padding and groups")
    ]


@pytest.mark.parametrize(
    ("settings", "served"),
    [({}, 1), ({"padding": "same"}, 1), ({"stride": 2}, 0), ({"padding": 1}, 0), ({"groups": 2}, 0)],
    ids=str,
)
def test_1x1_convolutions_of_every_kind(settings, served):
    torch.manual_seed(0)
    model = fill(get_peft_model(nn.Sequential(nn.Conv2d(6, 4, 1, **settings)), config("0")))
    check_parity(model, torch.randn(2, 6, 5, 4), served=served)
    assert fuse(model).total == served


def test_channels_last_and_a_batch_of_nothing():
    torch.manual_seed(0)
    model = fill(get_peft_model(nn.Sequential(nn.Conv2d(6, 4, 1)), config("0")))
    check_parity(model, torch.randn(2, 6, 5, 3).to(memory_format=torch.channels_last), served=1)
    fuse(model)
    assert model(torch.randn(0, 6, 5, 3)).shape == (0, 4, 5, 3)


def test_a_scaled_layer_follows_its_scale():
    model = pair()
    fuse(model)
    for layer in layers(model):
        layer.set_scale("default", 5.0)
    ours = results(model, X)
    unfuse(model)
    assert_same(ours, results(model, X))


def test_several_active_adapters_are_one_call():
    model = two_adapters()
    assert len(results(model, X)) == 2 + 8
    check_parity(model, X, served=2)
    model.set_adapter("other")
    check_parity(model, X, served=2)


def test_16_bits_err_as_lora_linear_says():
    """Over bfloat16 weights PEFT computes the term in float32: both stand near float64, neither on the other."""
    model = pair().to(torch.bfloat16)
    for layer in layers(model):
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    check_16_bits(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = pair()
    with torch.autocast("cpu", dtype=dtype):
        theirs = results(model, X)
        fuse(model)
        assert told(model, X) == (2, [])
        ours = results(model, X)
    assert ours["output"].dtype == theirs["output"].dtype == dtype
    assert_same(ours, theirs, 0.03)


def test_float64():
    check_parity(pair().double(), X.double(), served=2, tolerance=1e-13)


def test_dropout_acts_in_training_alone_and_is_fair(any_device):
    model = pair(lora_dropout=0.5)
    model.eval()
    check_parity(model, X, served=2)
    fuse(model)
    model.train()
    assert told(model, X) == (2, [])
    torch.manual_seed(4)
    first = model(X)
    torch.manual_seed(4)
    assert torch.equal(model(X), first)
    assert not torch.equal(model(X), first)
    # The mean over masks is the term without dropout.
    layer = model.base_model.model[0]
    with torch.no_grad():
        mean = torch.stack([layer(X) for _ in range(600)]).mean(0)
        assert (mean - layer.eval()(X)).abs().max() < 0.35
        assert (mean - layer.base_layer(X)).abs().max() > 1.0
    # PEFT asks the dropout's own mode, not the layer's.
    layer.train()
    layer.lora_dropout.eval()
    with torch.no_grad():
        assert torch.equal(layer(X), layer.eval()(X))


def test_checkpointing_draws_the_same_mask_again(any_device):
    model = pair(lora_dropout=0.5)
    fuse(model)
    model.train()

    def run(checkpointed):
        torch.manual_seed(7)
        model.zero_grad()
        x = X.clone().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        y.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


# ---- what stays PEFT's


class Quantised(nn.Linear):
    """As bitsandbytes' and GPTQ's: a linear layer with a forward of its own."""

    def forward(self, x):
        return super().forward(x) * 2


class Subclassed(torch.Tensor):
    """As torchao's and DTensor: a weight that is no plain tensor."""


def _merged(model):
    model.merge_adapter()


def _disabled(model):
    model.base_model.disable_adapter_layers()


def _none_active(model):
    for layer in layers(model):
        layer._active_adapter = ["elsewhere"]


def _hook(module):
    module.register_forward_hook(lambda *_: None)


def _subclass(model):
    for layer in layers(model):
        base = layer.base_layer
        base.weight = nn.Parameter(base.weight.detach().as_subclass(Subclassed), requires_grad=False)


def _each(change):
    return lambda model: [change(layer) for layer in layers(model)]


def _put(attribute, module):
    return _each(lambda layer: getattr(layer, attribute).update({"default": module}))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_merged, "its adapters are merged"),
        (_disabled, "its adapters are disabled"),
        (_none_active, "none of its adapters is active"),
        (_each(lambda layer: _hook(layer.base_layer)), "its base has hooks"),
        (_each(lambda layer: _hook(layer.lora_A["default"])), "A, B or dropout has hooks"),
        (_each(lambda layer: _hook(layer.lora_dropout["default"])), "A, B or dropout has hooks"),
        (_each(lambda layer: layer.base_layer.__setattr__("forward", layer.base_layer.forward)), "forward of its own"),
        (_subclass, "its base's weight is a Subclassed"),
        (_put("lora_dropout", nn.AlphaDropout(0.1).eval()), "dropout by AlphaDropout"),
        (_each(lambda layer: layer.scaling.update(default=torch.tensor(2.0))), "scaling is a Tensor"),
    ],
)
def test_a_state_that_is_pefts(change, why):
    model = pair().eval()
    fuse(model)
    assert told(model, X) == (2, [])
    change(model)
    served, left = told(model, X)
    assert served == 0
    assert len(left) == 2
    assert all(why in reason for reason in left)
    report = fuse(model)
    assert report.rows == ()
    assert sum(row.count for row in report.left) == 2
    ours = model(X)
    unfuse(model)
    assert torch.equal(ours, model(X))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"alora_invocation_tokens": [1]}, "variant ALoraLinearVariant"),
        ({"r": 300}, "rank 300 > 256"),
    ],
    ids=str,
)
def test_an_adapter_that_is_pefts(settings, why):
    model = pair(**settings)
    theirs = results(model, X)
    report = fuse(model)
    assert (report.total, [(row.why, row.count) for row in report.left]) == (0, [(why, 2)])
    assert told(model, X) == (0, [why, why])
    ours = results(model, X)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_layer_that_is_half_dora_serves_the_other_adapter():
    model = pair(use_dora=True)
    model.add_adapter("plain", config("0", "2"))
    fill(model)
    fuse(model)
    assert told(model, X) == (2, [])
    model.set_adapter("plain")
    assert told(model, X) == (2, [])
    model.base_model.set_adapter(["plain", "default"])
    assert told(model, X)[0] == 0


def test_several_adapters_with_dropout_are_pefts_in_training():
    model = two_adapters(lora_dropout=0.5)
    fuse(model)
    assert told(model.eval(), X) == (2, [])
    assert told(model.train(), X) == (0, ["several active adapters with dropout, each with its own mask"] * 2)
    torch.manual_seed(1)
    ours = model(X)
    unfuse(model)
    torch.manual_seed(1)
    assert torch.equal(ours, model(X))


def test_dropout_on_a_cpu_is_pefts():
    model = pair(lora_dropout=0.5)
    fuse(model)
    assert told(model.eval(), X) == (2, [])
    why = "dropout on a CPU, where the operator's mask takes longer than PEFT's"
    assert told(model.train(), X) == (0, [why] * 2)
    torch.manual_seed(1)
    ours = model(X)
    unfuse(model)
    torch.manual_seed(1)
    assert torch.equal(ours, model(X))


def test_a_mixed_batch_is_pefts():
    model = two_adapters().eval()
    names = ["default", "other", "__base__", "other", "default"]
    theirs = model(X, adapter_names=names)
    fuse(model)
    assert torch.equal(model(X, adapter_names=names), theirs)
    assert told(model, X, adapter_names=names) == (0, ["called with adapter_names"] * 2)


def test_a_quantised_base_is_left_alone():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(Quantised(16, 8), nn.Linear(8, 4)), config("0", "1"))
    report = fuse(model)
    assert [type(layer) is made.Linear for layer in layers(model)] == [True, False]
    assert "its base is a Quantised, with a forward of its own" in str(report)


def test_a_layer_whose_forward_was_replaced_is_left_alone():
    model = pair()
    layer = layers(model)[0]
    calls = []
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    assert fuse(model).total == 1
    model(X)
    assert calls == [1]


def test_dtypes_that_do_not_fit_are_pefts():
    model = pair()
    for layer in layers(model):
        layer.lora_A.bfloat16()
        layer.lora_B.bfloat16()
    theirs = results(model, X)
    fuse(model)
    assert told(model, X) == (0, ["A is torch.bfloat16 and B torch.bfloat16 over a weight of torch.float32"] * 2)
    ours = results(model, X)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_inputs_that_are_not_cast_are_pefts():
    model = pair().bfloat16()
    layer = layers(model)[0]
    layer.lora_A.float(), layer.lora_B.float()
    fuse(model)
    assert told(layer, X.bfloat16())[0] == 1
    with peft.helpers.disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        layer(X.bfloat16())


def test_errors_of_wrong_inputs_are_torchs_own():
    model = pair()
    fuse(model)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model(torch.randn(3, 15))
    with pytest.raises(RuntimeError, match="dtype"):
        model(X.double())


def test_torch_func_is_pefts():
    model = pair()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    theirs = torch.func.vmap(torch.func.grad(lambda x: model(x).square().sum()))(X)
    tangent = torch.func.jvp(model, (X,), (torch.ones_like(X),))[1]
    fuse(model)
    assert torch.equal(torch.func.vmap(torch.func.grad(lambda x: model(x).square().sum()))(X), theirs)
    assert torch.equal(torch.func.jvp(model, (X,), (torch.ones_like(X),))[1], tangent)


def test_forward_mode_is_pefts():
    model = pair()
    fuse(model)
    with torch.autograd.forward_ad.dual_level():
        y = model(torch.autograd.forward_ad.make_dual(X, torch.ones_like(X)))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    unfuse(model)
    assert (tangent - torch.func.jvp(model, (X,), (torch.ones_like(X),))[1]).abs().max() <= 1e-5


def test_hooks_of_every_module_see_pefts():
    model = pair()
    fuse(model)
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        assert told(model, X) == (0, ["every module has a hook"] * 2)
    finally:
        handle.remove()
    assert model.base_model.model[0].lora_A["default"] in seen
    assert told(model, X) == (2, [])


def test_a_second_derivative_raises():
    model = pair()
    fuse(model)
    x = X.clone().requires_grad_()
    y = model(x).square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y, x, create_graph=True)


def attention_net():
    torch.manual_seed(0)
    return fill(get_peft_model(Net(), config("attention", "first", "table")))


def test_an_attention_stays_pefts_and_is_reported():
    model = attention_net()
    images, words = torch.randn(2, 3, 9, 9), torch.randint(7, (2, 3))
    theirs = model(images, words)
    report = fuse(model)
    kinds = {row.kind: row for row in report.left}
    assert kinds["PEFT's MultiheadAttention"].why == "an attention, which is fused where attention=True asks for it"
    assert kinds["PEFT's MultiheadAttention"].paths == ["base_model.model.attention"]
    assert kinds["PEFT's Embedding"].count == 1
    assert len(report.left) == 2
    assert report.total == 1
    assert sum(isinstance(module, FusedLayer) for module in model.modules()) == 1
    assert (model(images, words) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_out_proj_alone_is_left_alone():
    torch.manual_seed(0)
    report = fuse(get_peft_model(Net(), config("out_proj", "first")))
    assert [row.why for row in report.left] == ["nn.MultiheadAttention reads its weight and does not call it"]


# ---- explain and the report


def test_explain_shows_fused_calls_and_what_is_pefts():
    model = attention_net()
    inputs = torch.randn(2, 3, 9, 9), torch.randint(7, (2, 3))
    before = explain(model, *inputs)
    assert before.calls == []
    assert {(part.module.rpartition(".")[2], part.why) for part in before.plain} == {
        ("first", "not fused: see pyfused.fuse"),
        ("attention", "not fused: see pyfused.fuse"),
        ("table", "no linear layer, no 1x1 convolution and no attention of PEFT's own"),
    }
    assert "plain torch: base_model.model.first: PEFT's Linear: not fused" in str(before)
    fuse(model)
    after = explain(model, *inputs)
    assert [call.module for call in after.calls] == ["base_model.model.first"]
    assert {part.module.rpartition(".")[2] for part in after.plain} == {"attention", "table"}
    with model.disable_adapter():
        disabled = explain(model, *inputs)
    assert ("base_model.model.first", "its adapters are disabled") in {
        (part.module, part.why) for part in disabled.plain
    }


def test_alike_parts_share_a_line():
    text = str(explain(llama(**ALL), WORDS))
    assert "model.layers.*.self_attn.q_proj (2 calls): PEFT's Linear: not fused" in text


def test_the_report_counts():
    model = gpt2()
    report = fuse(model)
    assert report.total == 8
    assert report.rows[0].kind == "Conv1D"
    assert report.rows[0].shape == (96, 32)
    assert report.rows[0].adapters == (("default", 4),)
    assert sum(row.parameters for row in report.rows) == report.trainable_parameters
    text = str(report)
    assert "PEFT's LoRA layers    8 fused\n" in text
    assert "h.*.attn.c_attn" in text


def test_the_report_of_several_adapters():
    report = fuse(two_adapters())
    assert report.rows[0].adapters == (("default", 4), ("other", 3))
    assert "default r4, other r3" in str(report)


# ---- fuse, unfuse


def test_fuse_is_idempotent_and_unfuse_gives_the_classes_back():
    model = pair()
    classes = [type(module) for module in model.modules()]
    dictionaries = [dict(module.__dict__) for module in model.modules()]
    fuse(model)
    once = [type(module) for module in model.modules()]
    report = fuse(model)
    assert [type(module) for module in model.modules()] == once != classes
    assert report.total == 2
    assert report.notes == ("2 layers were fused before",)
    unfuse(model)
    unfuse(model)
    assert [type(module) for module in model.modules()] == classes
    assert [dict(module.__dict__) for module in model.modules()] == dictionaries


def test_layers_that_come_later_are_fused_by_another_call():
    model = pair(target_modules=["0"])
    fuse(model)
    model.add_adapter("wider", config("0", "2"))
    model.set_adapter("wider")
    fill(model)
    assert told(model, X)[0] == 1
    assert [part.why for part in explain(model, X).plain] == ["not fused: see pyfused.fuse"]
    assert fuse(model).total == 2
    assert told(model, X) == (2, [])
    unfuse(model)
    assert all(type(layer) is made.Linear for layer in layers(model))


def test_a_layer_unfused_by_hand_is_named():
    model = pair()
    fuse(model)
    unfuse(model.base_model.model[2])
    explained = explain(model, X)
    assert [call.module for call in explained.calls] == ["base_model.model.0"]
    assert [(part.module, part.why) for part in explained.plain] == [
        ("base_model.model.2", "not fused: see pyfused.fuse")
    ]
    assert fuse(model).notes == ("1 layers were fused before",)
    assert told(model, X) == (2, [])


def test_fuse_a_part_a_layer_and_injected_adapters():
    model = pair()
    fuse(model.base_model.model[0])
    assert told(model, X)[0] == 1
    assert fuse(model).notes == ("1 layers were fused before",)
    bare = peft.inject_adapter_in_model(config("0"), Pair())
    assert fuse(bare).total == 1


def test_all_or_nothing(monkeypatch):
    model = pair()
    rows = iter([lambda: None, lambda: 1 / 0])
    monkeypatch.setattr("pyfused.integrations.peft._row", lambda *_: next(rows)())
    with pytest.raises(ZeroDivisionError):
        fuse(model)
    assert all(type(layer) is made.Linear for layer in layers(model))


def test_unfuse_refuses_a_class_on_top_and_changes_nothing():
    model = pair()
    fuse(model)
    fused = [type(layer) for layer in layers(model)]
    top = layers(model)[1]
    top.__class__ = type("Sharded", (type(top),), {})
    with pytest.raises(RuntimeError, match="got one on top of it"):
        unfuse(model)
    assert type(layers(model)[0]) is fused[0]


@pytest.mark.parametrize("function", [fuse, unfuse])
def test_models_without_pefts_lora(function):
    with pytest.raises(ValueError, match=r"got a Sequential without one; .* there is inject_lora"):
        function(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match="LoRA layers of PEFT's"):
        function(get_peft_model(Pair(), peft.IA3Config(target_modules=["0"], feedforward_modules=[])))
    with pytest.raises(TypeError, match=f"{function.__name__}: model must be an nn.Module, got dict"):
        function({})


def test_inject_lora_still_refuses_a_fused_model():
    model = pair()
    fuse(model)
    with pytest.raises(ValueError, match="must not be PEFT's"):
        pyfused.inject_lora(model)


def test_nothing_is_copied_and_nothing_renamed():
    model = pair()
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    text = repr(model)
    fuse(model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert repr(model) == text
    assert all(isinstance(layer, made.Linear) for layer in layers(model))


def test_peft_is_not_imported_by_pyfused():
    code = """
import sys, torch, pyfused
try:
    pyfused.fuse(torch.nn.Linear(3, 4))
except ValueError as error:
    print(error)
pyfused.explain(torch.nn.Linear(3, 4), torch.randn(2, 3))
assert not [name for name in sys.modules if name.partition(".")[0] in ("peft", "transformers")]
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "there is inject_lora" in run.stdout


# ---- PEFT's own ways, on a fused model


def test_copies_and_pickles_stay_fused():
    model = pair().eval()
    fuse(model)
    y = model(X)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ):
        assert told(other, X) == (2, [])
        assert torch.equal(other(X), y)
        unfuse(other)
        assert all(type(layer) is made.Linear for layer in layers(other))
    assert told(model, X) == (2, [])


def test_a_saved_adapter_is_pefts_bit_for_bit(tmp_path):
    model = pair()
    model.save_pretrained(tmp_path / "plain")
    fuse(model)
    model.save_pretrained(tmp_path / "fused")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "fused" / name).read_bytes()
    torch.manual_seed(0)
    other = PeftModel.from_pretrained(Pair(), tmp_path / "fused")
    assert all(type(layer) is made.Linear for layer in layers(other))
    fuse(other)
    assert torch.equal(other(X), model(X))


def test_an_adapter_loaded_into_a_fused_model(tmp_path):
    model = pair()
    model.save_pretrained(tmp_path)
    expected = model(X)
    other = pair()
    fuse(other)
    other.load_adapter(tmp_path, "loaded")
    other.set_adapter("loaded")
    assert told(other, X) == (2, [])
    assert (other(X) - expected).abs().max() <= 3e-6 * expected.abs().max()


def test_merge_and_unload_and_unmerge():
    model = pair().eval()
    expected, weight = model(X), model.base_model.model[0].base_layer.weight.clone()
    fuse(model)
    model.merge_adapter()
    assert (model(X) - expected).abs().max() <= 1e-5
    model.unmerge_adapter()
    assert (model.base_model.model[0].base_layer.weight - weight).abs().max() <= 1e-6
    assert told(model, X) == (2, [])
    plain = copy.deepcopy(model).merge_and_unload()
    assert [type(module) for module in plain] == [nn.Linear, nn.GELU, nn.Linear]
    assert (plain(X) - expected).abs().max() <= 1e-5
    unloaded = model.unload()
    assert [type(module) for module in unloaded] == [nn.Linear, nn.GELU, nn.Linear]


def test_disable_adapter():
    model = pair().eval()
    fuse(model)
    torch.manual_seed(0)
    base, adapted = Pair()(X), model(X)
    with model.disable_adapter():
        assert torch.equal(model(X), base)
    assert torch.equal(model(X), adapted)


def test_add_weighted_adapter_and_delete():
    plain = two_adapters().eval()
    fused = copy.deepcopy(plain)
    fuse(fused)
    for model in (plain, fused):
        model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "sum", combination_type="cat")
        model.set_adapter("sum")
        model.delete_adapter("other")
    assert told(fused, X) == (2, [])
    assert_same(results(fused, X), results(plain, X))


def test_training_moves_fused_and_plain_alike():
    plain = pair(use_rslora=True)
    fused = copy.deepcopy(plain)
    fuse(fused)
    for model in (plain, fused):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(4):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
    start = pair(use_rslora=True).state_dict()
    moved = {name for name, tensor in plain.state_dict().items() if not torch.equal(tensor, start[name])}
    assert len(moved) == 4
    for a, b in zip(fused.state_dict().values(), plain.state_dict().values(), strict=True):
        assert (a - b).abs().max() <= 1e-5


@pytest.mark.parametrize("several", [False, True])
def test_compiled_without_a_break(several):
    model = two_adapters() if several else pair(lora_bias=True)
    fuse(model)
    eager = results(model, X)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(X)
    assert_same({"output": y.detach()}, {"output": eager["output"]})
    model.zero_grad()
    y.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_same(grads, {name: eager[name] for name in grads})


def test_fusing_what_is_compiled():
    model = pair().eval()
    compiled = torch.compile(model, backend="aot_eager")
    theirs = compiled(X)
    fuse(model)
    assert [call.operator for call in explain(model, X).calls] == ["lora_linear"] * 2
    assert (compiled(X) - theirs).abs().max() <= 1e-5
