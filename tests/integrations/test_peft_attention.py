"""`fuse(attention=True)`: PEFT's attentions compute what PEFT computes, term for term, and stay PEFT's else."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from pyfused import explain, fuse, unfuse
from pyfused.integrations import peft_attention
from pyfused.integrations.peft_attention import FusedAttention

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora import layer as made  # noqa: E402
from peft_models import assert_same, check_parity, config, fill, results, told  # noqa: E402

WIDTH, HEADS = 12, 3


class Attends(nn.Module):
    """An attention between two linear layers, called as ``call`` says."""

    def __init__(self, cross=False, **settings):
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **settings})
        self.after, self.cross = nn.Linear(WIDTH, 5), cross

    def forward(self, x, context=None, **call):
        x = self.before(x)
        key = x if context is None else context
        y, weights = self.attention(x, key, key * 2 if self.cross else key, **{"need_weights": False, **call})
        y = self.after(y)
        return y if weights is None else torch.cat([y.flatten(), weights.to(y.dtype).flatten()])


def attends(cross=False, net=None, **settings):
    torch.manual_seed(0)
    peft_settings = {name: settings.pop(name) for name in list(settings) if name in CONFIG}
    model = get_peft_model(Attends(cross, **settings), config("attention", "before", **peft_settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return fill(model)


CONFIG = {"lora_dropout", "use_rslora", "bias", "r", "lora_alpha", "lora_bias", "fan_in_fan_out"}
X = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1))
CONTEXT = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[False] * 4 + [True] * 2, [False] * 5 + [True]])
CAUSAL = torch.full((6, 6), float("-inf")).triu(1)


def attention_of(model):
    return next(module for module in model.modules() if isinstance(module, made.MultiheadAttention))


# ---- numbers


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": "all"},
        {"use_rslora": True},
        {"r": 1, "lora_alpha": -3},
        {"batch_first": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"lora_dropout": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("weights", [False, True])
def test_self_attention_equals_peft(settings, weights):
    model = attends(**settings)
    if "add_bias_kv" in settings:
        attention_of(model).base_layer.bias_k.requires_grad_()
    # LoRA's dropout does not act in an attention of PEFT's; in the linear layer it would draw another mask.
    model.base_model.model.before.eval()
    check_parity(model, X, served=3, attention=True, need_weights=weights)


def test_an_attention_without_biases_equals_peft():
    torch.manual_seed(0)
    net = nn.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True)
    model = fill(get_peft_model(nn.ModuleDict({"a": net}), config("a")))

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model.base_model.model["a"](x, x, x, need_weights=False)[0]

    check_parity(Call(), X, served=2, attention=True)


@pytest.mark.parametrize(
    "call",
    [
        {"key_padding_mask": MASK},
        {"attn_mask": CAUSAL},
        {"attn_mask": CAUSAL, "is_causal": True},
        {"attn_mask": CAUSAL < 0, "key_padding_mask": MASK, "need_weights": True},
        {"attn_mask": CAUSAL.repeat(2 * HEADS, 1, 1), "need_weights": True, "average_attn_weights": False},
    ],
    ids=lambda call: "-".join(call),
)
def test_masks_equal_peft(call):
    check_parity(attends(), X, served=3, attention=True, **call)


@pytest.mark.parametrize(("cross", "served"), [(False, 4), (True, 5)])
def test_cross_attention_equals_peft(cross, served):
    model = attends(cross)
    check_parity(model, X, CONTEXT, served=served, attention=True)
    check_parity(model, X[0], CONTEXT[0], served=served, attention=True)


@pytest.mark.parametrize("weights", [False, True])
def test_dropout_of_the_attention_draws_as_torch_does(weights):
    model = attends(dropout=0.5)

    def seeded():
        torch.manual_seed(3)
        return results(model, X, need_weights=weights)

    theirs = seeded()
    fuse(model, attention=True)
    assert_same(seeded(), theirs)


def test_float64_and_eval_equal_peft():
    model = attends().double()
    check_parity(model, X.double(), served=3, attention=True, tolerance=1e-13)
    model.float().eval()
    with torch.no_grad():
        theirs = model(X)
        fuse(model, attention=True)
        assert (model(X) - theirs).abs().max() <= 3e-6 * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_returns_the_dtype_of_the_query(dtype):
    model = attends()
    with torch.autocast("cpu", dtype=dtype):
        theirs = results(model, X)
        fuse(model, attention=True)
        assert told(model, X) == (3, [])
        assert attention_of(model)(X, X, X)[0].dtype == torch.float32
        assert_same(results(model, X), theirs, 0.05)


def test_16_bits_err_no_more_than_twice_as_peft():
    model = attends().bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    exact = results(copy.deepcopy(model).double(), X.bfloat16().double())
    theirs = results(model, X.bfloat16())
    fuse(model, attention=True)
    ours = results(model, X.bfloat16())
    assert told(model, X.bfloat16()) == (3, [])
    for name, value in exact.items():
        assert ours[name].dtype == theirs[name].dtype
        error, limit = ((found[name].double() - value).norm() / value.norm() for found in (ours, theirs))
        assert error <= max(2 * limit, 0.012), name


@pytest.mark.parametrize("backward", [1.0, 2.0])
@pytest.mark.parametrize("forward", [1.0, 2.0])
def test_the_term_of_out_proj_is_as_often_as_it_is_said_to_be(monkeypatch, forward, backward):
    monkeypatch.setattr(peft_attention, "_out_term", lambda: (forward, backward))
    monkeypatch.setattr("pyfused.surgery.variants._variants", {})
    model = attends().double()
    layer = attention_of(model)
    out = layer.base_layer.out_proj
    a, b, weight = out.lora_A["default"].weight, out.lora_B["default"].weight, out.base_layer.weight
    attended = []
    monkeypatch.setattr(
        peft_attention, "_out_project", lambda *args, call=peft_attention._out_project: (
            attended.append(args[2]) or call(*args)
        )
    )  # fmt: skip
    fuse(model, attention=True)
    y = layer(X.double(), X.double(), X.double(), need_weights=False)[0]
    (rows,) = attended
    expected = rows @ (weight + forward * 2.0 * b @ a).t() + out.base_layer.bias
    assert (y - expected).abs().max() < 1e-12
    slope = torch.randn_like(y)
    da, db = torch.autograd.grad(y, (a, b), slope)
    dw = slope.flatten(0, 1).t() @ rows.detach().flatten(0, 1)
    assert (da - backward * 2.0 * b.t() @ dw).abs().max() < 1e-12
    assert (db - backward * 2.0 * dw @ a.t()).abs().max() < 1e-12


# ---- what stays PEFT's


def test_attentions_are_fused_where_asked_for_alone():
    model = attends()
    report = fuse(model)
    assert [(row.kind, row.why) for row in report.left] == [
        ("PEFT's MultiheadAttention", "an attention, which is fused where attention=True asks for it")
    ]
    assert not isinstance(attention_of(model), FusedAttention)
    report = fuse(model, attention=True)
    assert [row.kind for row in report.rows] == ["Linear", "MultiheadAttention"]
    assert report.rows[1].shape == (3 * WIDTH, WIDTH)
    assert sum(row.parameters for row in report.rows) == report.trainable_parameters
    assert report.notes == ("1 layers were fused before",)
    assert fuse(model).total == 2
    with pytest.raises(TypeError, match="fuse: attention must be"):
        fuse(model, attention="yes")


def test_explain_shows_an_attention_of_either_kind():
    model = attends()
    assert ("base_model.model.attention", "not fused: see pyfused.fuse") in {
        (part.module, part.why) for part in explain(model, X).plain
    }
    fuse(model, attention=True)
    explained = explain(model, X)
    assert [call.module for call in explained.calls] == [
        "base_model.model.before", "base_model.model.attention", "base_model.model.attention"
    ]  # fmt: skip
    assert explained.plain == []


def _hook(layer):
    layer.base_layer.register_forward_hook(lambda *_: None)


def _hook_a(layer):
    layer.lora_A["default"].register_forward_hook(lambda *_: None)


def _own_forward(layer):
    layer.base_layer.forward = layer.base_layer.forward


def _trains(layer):
    layer.base_layer.out_proj.base_layer.weight.requires_grad_()


def _merged(layer):
    layer.merge()


def _disabled(layer):
    layer.enable_adapters(False)


def _transposed(layer):
    layer.base_layer.out_proj.fan_in_fan_out = True


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_hook, "its base has hooks"),
        (_hook_a, "A, B or dropout has hooks"),
        (_own_forward, "its base is a MultiheadAttention, with a forward of its own"),
        (_trains, "its weights train, and PEFT gives them no gradient"),
        (_merged, "its adapters are merged"),
        (_disabled, "its adapters are disabled"),
        (_transposed, "its out_proj has other adapters or other settings"),
    ],
)
def test_a_state_that_is_pefts(change, why):
    model = attends().eval()
    fuse(model, attention=True)
    assert told(model, X) == (3, [])
    change(attention_of(model))
    assert told(model, X) == (1, [why])
    ours = model(X)
    unfuse(model)
    fuse(model)
    # Not the same bits: each call of PEFT's rounds the weights that it takes the adapters out of.
    assert (ours - model(X)).abs().max() <= 1e-5 * ours.abs().max()


def test_several_adapters_are_pefts():
    model = attends()
    model.add_adapter("other", config("attention", "before", r=2, lora_alpha=1))
    fill(model)
    model.base_model.set_adapter(["default", "other"])
    fuse(model, attention=True)
    why = "several active adapters, of which PEFT gives the last alone a gradient"
    assert told(model, X) == (1, [why])
    unfuse(model)
    model.set_adapter("other")
    check_parity(model, X, served=3, attention=True)


def test_a_bias_of_b_is_pefts():
    model = attends(lora_bias=True)
    assert fuse(model, attention=True).left[0].why == "B has a bias, to which PEFT gives no gradient"


def test_adapters_that_diverge_are_pefts_to_refuse():
    model = attends()
    fuse(model, attention=True)
    attention_of(model).base_layer.out_proj._active_adapter = ["other"]
    with pytest.raises(ValueError, match="out_proj"):
        model(X)


@pytest.mark.parametrize(
    ("inputs", "error"),
    [
        ((X[..., :5],) * 3, RuntimeError),
        ((X.long(),) * 3, RuntimeError),
        ((X, X[:1], X[:1]), RuntimeError),
        ((X, CONTEXT, X), AssertionError),
    ],
)
def test_errors_of_wrong_inputs_are_torchs_own(inputs, error):
    model = attends()
    with pytest.raises((RuntimeError, AssertionError)) as theirs:
        attention_of(model)(*inputs, need_weights=False)
    fuse(model, attention=True)
    with pytest.raises(type(theirs.value)):
        attention_of(model)(*inputs, need_weights=False)
    with pytest.raises(TypeError, match="mixed adapter batches"):
        attention_of(model)(X, X, X, adapter_names=["default", "default"])


def test_another_peft_is_left_alone(monkeypatch):
    monkeypatch.setattr(peft_attention, "_out_term", lambda: None)
    monkeypatch.setattr("pyfused.surgery.variants._variants", {})
    model = attends()
    report = fuse(model, attention=True)
    assert report.total == 1
    assert report.left[0].why == "this PEFT adds out_proj's term in another way than is known"
    assert told(model, X)[0] == 1


def test_what_peft_does_is_asked_without_a_trace():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    with torch.no_grad(), torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        term = peft_attention._out_term()
    with torch.inference_mode():
        assert peft_attention._out_term() == term
    assert torch.equal(torch.random.get_rng_state(), state)
    # A PEFT that adds it once, or gives all of its gradient, is known too; this is what the installed one does.
    attention = attention_of(attends())
    before = attention.base_layer.out_proj.base_layer.weight.clone()
    attention.merge()
    delta = attention.base_layer.out_proj.get_delta_weight("default")
    assert term is not None
    assert (attention.base_layer.out_proj.base_layer.weight - before - term[0] * delta).abs().max() < 1e-5


# ---- PEFT's own ways


def test_unfuse_gives_the_class_back():
    model = attends()
    classes = [type(module) for module in model.modules()]
    fuse(model, attention=True)
    unfuse(model)
    assert [type(module) for module in model.modules()] == classes


def test_copies_and_pickles_stay_fused(tmp_path):
    model = attends().eval()
    fuse(model, attention=True)
    y = model(X)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert told(other, X) == (3, [])
        assert torch.equal(other(X), y)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = attends().unload()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert (loaded(X) - y).abs().max() <= 1e-5 * y.abs().max()


def test_merging_gives_what_was_served():
    model = attends().eval()
    fuse(model, attention=True)
    expected = model(X)
    with model.disable_adapter():
        assert not torch.allclose(model(X), expected)
    model.merge_adapter()
    assert (model(X) - expected).abs().max() <= 1e-5 * expected.abs().max()
    model.unmerge_adapter()
    assert told(model, X) == (3, [])
    assert (model(X) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (model.merge_and_unload()(X) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_parameters_stay_the_same_objects():
    """PEFT puts new weights in place in each call; an optimizer or DDP holds the old ones."""
    model = attends()
    fuse(model, attention=True)
    base = attention_of(model).base_layer
    before = base.in_proj_weight, base.out_proj.base_layer.weight
    results_of = model(X)
    results_of.sum().backward()
    assert base.in_proj_weight is before[0]
    assert base.out_proj.base_layer.weight is before[1]


@pytest.mark.parametrize("weights", [False, True])
def test_compiled_without_a_break(weights):
    model = attends()
    fuse(model, attention=True)
    eager = results(model, X, need_weights=weights)
    model.zero_grad()
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(X, need_weights=weights)
    y.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_same({"output": y.detach()} | grads, {name: eager[name] for name in ["output", *grads]})
