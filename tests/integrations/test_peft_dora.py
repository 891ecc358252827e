"""`fuse` on DoRA: the formula against PEFT's own, and what stays PEFT's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyfused import fuse, unfuse

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import get_peft_model  # noqa: E402
from peft_models import (  # noqa: E402
    WORDS,
    Pair,
    X,
    assert_same,
    check_16_bits,
    check_parity,
    config,
    fill,
    gpt2,
    layers,
    pair,
    results,
    told,
    two_adapters,
)


def moved(model):
    """Magnitudes away from the norms that they start at, which would hide them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.0 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def dora(**settings):
    return moved(pair(use_dora=True, **settings))


def point(**settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(6, 8, 1, **settings), nn.GELU(), nn.Conv2d(8, 4, 1))
    return moved(fill(get_peft_model(net, config("0", "2", use_dora=True))))


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"lora_alpha": -3}, {"r": 1}, {"init_lora_weights": "pissa"}], ids=str
)
def test_linear_layers_equal_peft(settings):
    model = dora(**settings)
    assert sum("magnitude" in name for name in results(model, X)) == 2
    check_parity(model, X, served=2, tolerance=1e-6)


def test_conv1d_equals_peft():
    check_parity(moved(gpt2(use_dora=True)), WORDS, served=8, tolerance=2e-6)


@pytest.mark.parametrize("settings", [{}, {"bias": False}], ids=str)
def test_1x1_convolutions_equal_peft(settings):
    check_parity(point(**settings), torch.randn(2, 6, 5, 4), served=2, tolerance=1e-6)


def test_a_base_without_bias_and_one_that_trains():
    torch.manual_seed(0)
    model = moved(fill(get_peft_model(Pair(bias=False), config("0", "2", use_dora=True))))
    model.base_model.model[2].base_layer.weight.requires_grad_()
    model.base_model.model[2].base_layer.bias.requires_grad_()
    check_parity(model, X, served=2, tolerance=1e-6)


def test_float64_and_unbatched():
    model = dora().double()
    check_parity(model, X.double(), served=2, tolerance=1e-14)
    check_parity(model, X[0].double(), served=2, tolerance=1e-14)


@pytest.mark.parametrize("wide", [True, False])
def test_16_bits_err_as_peft_does(wide):
    model = dora().to(torch.bfloat16)
    for layer in layers(model):
        for name, parameter in layer.named_parameters():
            if "lora_" in name and wide:
                parameter.data = parameter.data.float()
    check_16_bits(model)


def test_autocast():
    model = dora()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = results(model, X)
        fuse(model)
        assert told(model, X) == (2, [])
        ours = results(model, X)
    assert ours["output"].dtype == theirs["output"].dtype
    assert_same(ours, theirs, 0.04)


def test_the_norm_is_held_constant():
    """As in PEFT: A's gradient has no part through it."""
    model = pair(use_dora=True, target_modules=["0"])
    layer, last = layers(model)[0], model.base_model.model[2]
    fuse(model)
    ours = results(model, X)
    w, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    whole = w + 2.0 * b @ a
    scale = layer.lora_magnitude_vector["default"].weight / whole.norm(dim=1)
    for factor, alike in ((scale.detach(), True), (scale, False)):
        middle = X @ (whole * factor[:, None]).t() + layer.base_layer.bias
        y = last(nn.functional.gelu(middle))
        (gradient,) = torch.autograd.grad(y.square().mean(), a, retain_graph=True)
        error = (gradient - ours["base_model.model.0.lora_A.default.weight"]).abs().max() / gradient.abs().max()
        assert (error < 1e-5) == alike


def test_what_has_not_trained_yet_is_the_base_bit_for_bit():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(1000, 64))
    x = torch.randn(10, 1000)
    expected = base(x)
    model = get_peft_model(base, config("0", use_dora=True))
    fuse(model)
    assert told(model, x) == (1, [])
    assert torch.equal(model(x), expected)


def test_dropout_is_pefts_where_it_acts():
    model = dora(lora_dropout=0.5)
    fuse(model)
    why = "DoRA with dropout, which PEFT applies to the base's input too"
    assert told(model.eval(), X) == (2, [])
    assert told(model.train(), X) == (0, [why, why])
    unfuse(model)
    for layer in layers(model):
        layer.lora_dropout.eval()
    check_parity(model, X, served=2, tolerance=1e-6)
    # PEFT asks the layer's mode first.
    model.eval()
    for layer in layers(model):
        layer.lora_dropout.train()
    check_parity(model, X, served=2, tolerance=1e-6)


def _hook(layer):
    layer.lora_magnitude_vector["default"].register_forward_hook(lambda *_: None)


def _transposed(layer):
    layer.lora_magnitude_vector["default"].fan_in_fan_out = True


def _another(layer):
    kind = type(layer.lora_magnitude_vector["default"])
    layer.lora_magnitude_vector["default"].__class__ = type("Own", (kind,), {})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_hook, "DoRA's magnitude has hooks"),
        (_transposed, "DoRA with a fan_in_fan_out that is not its base's"),
        (_another, "DoRA by Own"),
    ],
)
def test_a_magnitude_that_is_pefts(change, why):
    model = dora()
    fuse(model)
    assert told(model, X) == (2, [])
    change(layers(model)[1])
    assert fuse(model).left[0].why == why


def test_caching_is_pefts_in_eval():
    model = dora().eval()
    fuse(model)
    with peft.helpers.DoraCaching():
        assert told(model, X) == (0, ["DoRA whose norms PEFT keeps between calls"] * 2)
        assert told(model.train(), X) == (2, [])
    assert told(model.eval(), X) == (2, [])


@pytest.mark.parametrize("first", [True, False])
def test_several_adapters_are_pefts(first):
    model = two_adapters(use_dora=True)
    fuse(model)
    theirs = "several active adapters with DoRA, which scales those before it too"
    assert told(model, X) == (0, [theirs] * 2)
    unfuse(model)
    model.set_adapter("default" if first else "other")
    check_parity(model, X, served=2, tolerance=1e-6)


def test_peft_merges_what_is_served():
    model = dora().eval()
    fuse(model)
    expected = model(X)
    assert (model.merge_and_unload()(X) - expected).abs().max() <= 3e-6 * expected.abs().max()


def test_the_report_counts_the_magnitudes():
    report = fuse(dora())
    assert sum(row.parameters for row in report.rows) == report.trainable_parameters


def test_compiled_without_a_break():
    model = dora()
    fuse(model)
    eager = results(model, X)
    model.zero_grad()
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(X)
    y.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_same({"output": y.detach()} | grads, {name: eager[name] for name in ["output", *grads]})


def test_no_product_of_b_and_a_is_made():
    """The largest temporary has as many numbers as the weight."""
    torch.manual_seed(0)
    model = moved(fill(get_peft_model(nn.Sequential(nn.Linear(64, 48)), config("0", use_dora=True))))
    fuse(model)
    b_by_a = torch.Size((48, 64))
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            found = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)]
            made.extend(str(func) for t in found if t.shape == b_by_a and t._base is None and "detach" not in str(func))
            return out

    with Watch():
        model(torch.randn(3, 64))
    assert made == []
