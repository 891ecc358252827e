"""Several named LoRA adapters in one model: which act, whose each sample is, and how they come and go."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models_setup import small_vit, wake
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import pyfused
from pyfused import (
    adapter_batch,
    adapters_off,
    inject_lora,
    load_lora_state_dict,
    lora_state_dict,
    merge_adapters,
    remove_adapter,
    remove_lora,
    set_adapter,
)
from pyfused.modules import LoRAModule
from pyfused.ops import decision

# The settings of each adapter: ranks and scalings differ.
SETTINGS = {"a": {"rank": 4, "alpha": 8}, "b": {"rank": 2, "alpha": 6}, "c": {"rank": 3, "alpha": 3}}


class Holder(nn.Module):
    """One layer with a name, called on one input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.layer(x, x, x, need_weights=False)[0]
        return self.layer(x)


def _conv1d():
    return pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D(12, 8)


def _packed():
    return pytest.importorskip("open_clip.transformer", reason="open_clip is not installed").Attention(8, num_heads=2)


def _eva():
    eva = pytest.importorskip("timm.models.eva", reason="timm is not installed")
    return eva.EvaAttention(8, 2, norm_layer=nn.LayerNorm)


def _mha(**options):
    return lambda: nn.MultiheadAttention(8, 2, batch_first=True, **options)


ROWS, IMAGE = (6, 5, 8), (6, 8, 5, 4)
# Kind of layer -> what makes one, its input's shape, options of inject_lora.
KINDS = {
    "linear": (lambda: nn.Linear(8, 12), ROWS, {}),
    "linear, rows": (lambda: nn.Linear(8, 12, bias=False), (6, 8), {}),
    "conv 1x1": (lambda: nn.Conv2d(8, 10, 1), IMAGE, {}),
    "conv 1x1, strided": (lambda: nn.Conv2d(8, 10, 1, stride=2), IMAGE, {}),
    "conv 3x3": (lambda: nn.Conv2d(8, 10, 3, padding=1, padding_mode="reflect"), IMAGE, {}),
    "conv 3x3, groups": (lambda: nn.Conv2d(8, 10, 3, groups=2), IMAGE, {}),
    "conv1d": (_conv1d, ROWS, {}),
    "attention, joint": (_mha(), ROWS, {}),
    "attention, split": (_mha(), ROWS, {"qkv": "split"}),
    "attention, in_proj": (_mha(bias=False), ROWS, {"target_modules": "in_proj"}),
    "attention, out_proj": (_mha(), ROWS, {"target_modules": "out_proj"}),
    "packed attention": (_packed, ROWS, {}),
    "packed attention, split": (_packed, ROWS, {"qkv": "split"}),
    "timm, qkv bias apart": (_eva, ROWS, {"target_modules": ("qkv", "proj")}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def base_of(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    make, _, _ = KINDS[kind]
    torch.manual_seed(1)
    return Holder(make()).to(dtype).requires_grad_(False).eval()


def input_of(kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(KINDS[kind][1], generator=torch.Generator().manual_seed(2)).to(dtype)


def add(model: nn.Module, kind: str, name: str, **more) -> pyfused.LoRAReport:
    _, _, options = KINDS[kind]
    return inject_lora(model, **{"target_modules": "layer", **options, **SETTINGS[name], **more}, adapter=name)


def adapted(kind: str, names: str = "abc", dtype: torch.dtype = torch.float32, **more) -> nn.Module:
    model = base_of(kind, dtype)
    for name in names:
        add(model, kind, name, **more)
    return wake(model)


def loras(model: nn.Module) -> list[LoRAModule]:
    return [module for module in model.modules() if isinstance(module, LoRAModule)]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def alone(model: nn.Module, kind: str, name: str) -> nn.Module:
    """Another model that has this adapter alone, with the same numbers, under another name."""
    other = base_of(kind)
    add(other, kind, name, **SETTINGS[name])
    load_lora_state_dict(other, lora_state_dict(model, name))
    return other


def under(model: nn.Module, name: str | None, x: torch.Tensor) -> torch.Tensor:
    """What the model gives with one adapter, or without any."""
    if name is None:
        with adapters_off(model):
            return model(x)
    set_adapter(model, name)
    return model(x)


@every_kind
def test_one_of_several_is_what_it_is_alone(kind):
    model, x = adapted(kind), input_of(kind)
    assert {name for module in loras(model) for name in module.active_adapters} == {"a"}, "the first goes on acting"
    for name in "cab":
        set_adapter(model, name)
        other = alone(model, kind, name)
        y = model(x)
        assert torch.equal(y, other(x))
        assert not torch.equal(y, base_of(kind)(x))
        # It trains, and no other does; the gradients are its own.
        mine, theirs = trained(model), trained(other)
        assert len(mine) == len(theirs) > 0
        for gradient, expected in zip(
            torch.autograd.grad(y.square().sum(), list(mine.values())),
            torch.autograd.grad(other(x).square().sum(), list(theirs.values())),
            strict=True,
        ):
            assert torch.equal(gradient, expected)


@every_kind
def test_off_is_the_base_model(kind):
    model, base, x = adapted(kind), base_of(kind), input_of(kind)
    before, expected = model(x), base(x)
    assert not torch.equal(before, expected)
    with adapters_off(model):
        assert torch.equal(model(x), expected)
        with adapter_batch(model, ["b"] * len(x)):
            assert not torch.equal(model(x), expected)
            with adapters_off(model):
                assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), before)
    with pytest.raises(KeyError), adapters_off(model):
        raise KeyError
    assert torch.equal(model(x), before)


@every_kind
def test_off_and_batch_on_merged_weights(kind):
    model, base, x = adapted(kind), base_of(kind), input_of(kind)
    mixed = [None, "a", "b", "c", "a", None]
    with adapter_batch(model, mixed):
        expected = model(x)
    if "groups" in kind:
        with pytest.raises(RuntimeError, match="groups = 1"):
            loras(model)[0].merge()
        return
    loras(model)[0].merge()
    merged = model(x)
    with adapters_off(model):
        assert torch.equal(model(x), base(x))
    with adapter_batch(model, mixed):
        assert torch.equal(model(x), expected)
    assert loras(model)[0].merged
    assert torch.equal(model(x), merged)


class Pads(TorchDispatchMode):
    """Counts what is padded."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket is torch.ops.aten.constant_pad_nd
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("ranks", "padded"), [((4, 4), False), ((4, 2), True)])
def test_a_mixed_batch_pads_narrower_pairs_and_no_others(ranks, padded):
    model = nn.Sequential(nn.Linear(8, 8))
    for name, rank in zip("ab", ranks, strict=True):
        inject_lora(model, ["0"], rank=rank, adapter=name)
    with adapter_batch(model, ["a", "b"]), Pads() as pads:
        model(torch.randn(2, 8))
    assert bool(pads.count) is padded


def loop(model: nn.Module, names: list[str | None], x: torch.Tensor) -> torch.Tensor:
    """What `adapter_batch` is, sample by sample."""
    rows = []
    for sample, name in zip(x, names, strict=True):
        for module in loras(model):
            module._choose([] if name is None else [name])
        rows.append(model(sample[None]))
    return torch.cat(rows)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_mixed_batch_is_its_samples_one_by_one(kind, dtype):
    model, x = adapted(kind, dtype=dtype), input_of(kind, dtype).requires_grad_()
    # "b" before "a", one of them twice, one sample without.
    names = ["b", None, "a", "c", "a", "b"]
    set_adapter(model, ["a", "b", "c"])
    wanted = [x, *trained(model).values()]
    told: list = []
    with adapter_batch(model, names), decision.observed(told.append):
        y = model(x)
    calls = [made for made in told if isinstance(made, decision.Decision)]
    assert all(made.kernels == "mixed_lora_linear" for made in calls), "one call for all samples"
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = loop(model, names, x)
    close = {"rtol": 2e-5, "atol": 2e-6} if dtype != torch.bfloat16 else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(y, expected, **close)
    for gradient, right in zip(
        torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy), strict=True
    ):
        scale = right.abs().max()
        assert scale > 0, "every adapter of the batch gets its gradient"
        torch.testing.assert_close(gradient / scale, right / scale, **close)


@every_kind
def test_adapters_that_act_together_are_their_sum(kind):
    """By the sum of their changes of the weights."""
    if "groups" in kind:
        pytest.skip("no change of the weight")
    model, x = adapted(kind), input_of(kind)
    set_adapter(model, ["a", "c"])
    y = model(x)
    weights = {}
    for name in ("a", "c", "ac"):
        other = copy.deepcopy(model)
        set_adapter(other, list(name))
        remove_lora(other)
        weights[name] = dict(other.named_parameters())
        if name == "ac":
            torch.testing.assert_close(other(x), y, rtol=1e-5, atol=1e-5)
    for name, base in base_of(kind).named_parameters():
        a, c, ac = (weights[each][name] - base for each in ("a", "c", "ac"))
        torch.testing.assert_close(a + c, ac, rtol=1e-5, atol=1e-6)
    assert any((weights["a"][name] != weights["ac"][name]).any() for name in weights["a"])


@every_kind
def test_a_weighted_merge_is_exact(kind):
    model, x = adapted(kind), input_of(kind)
    weights = {"a": 0.7, "c": -0.3}
    report = merge_adapters(model, weights, "mix")
    merge_adapters(model, weights, "two", rank=2)
    assert report.adapter == "mix"
    assert {(row.rank, row.alpha) for row in report.rows} == {(7, 7.0)}
    for module in loras(model):
        for prefix in module._pair_widths():
            change = {
                name: module.settings_of(name).scaling * b.double() @ a.double()
                for name in ("a", "c", "mix", "two")
                for a, b in [module.pair_of(name, prefix)]
            }
            expected = 0.7 * change["a"] - 0.3 * change["c"]
            torch.testing.assert_close(change["mix"], expected, rtol=1e-5, atol=1e-7)
            # No matrix of rank 2 is nearer than by the singular values that are left out.
            left_out = torch.linalg.svdvals(expected)[2:].norm()
            torch.testing.assert_close((change["two"] - expected).norm(), left_out, rtol=1e-5, atol=1e-6)
            assert module.pair_of("two", prefix)[0].shape[0] == 2
    assert not [name for name in trained(model) if "mix" in name or "two" in name], "they wait for set_adapter"
    # A rank beyond what there is.
    merge_adapters(model, {"b": 1.0}, "more", rank=9)
    torch.testing.assert_close(under(model, "more", x), under(model, "b", x), rtol=1e-5, atol=1e-5)


@every_kind
@pytest.mark.parametrize("first", [True, False])
def test_removing_one_leaves_the_others(kind, first):
    model, x = adapted(kind), input_of(kind)
    expected = {name: under(model, name, x) for name in "abc"}
    set_adapter(model, "b")
    gone, left = ("a", "bc") if first else ("c", "ab")
    states = {name: lora_state_dict(model, name) for name in left}
    remove_adapter(model, gone)
    assert torch.equal(model(x), expected["b"]), "what acts goes on acting"
    assert {name for module in loras(model) for name in module.adapters} == set(left)
    assert any(name.endswith("lora_b") and "adapter_" not in name for name, _ in model.named_parameters())
    for name in left:
        assert torch.equal(under(model, name, x), expected[name])
        again = lora_state_dict(model, name)
        assert states[name].keys() == again.keys()
        assert all(torch.equal(states[name][key], again[key]) for key in again)
    with adapter_batch(model, [left[0], left[1], None, left[0], left[1], None]):
        torch.testing.assert_close(model(x)[1], expected[left[1]][1], rtol=1e-5, atol=1e-5)
    for name in left:
        remove_adapter(model, name)
    assert not loras(model)
    base = base_of(kind)
    assert torch.equal(model(x), base(x))
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in base.named_modules()
    } or "timm" in kind
    assert model.state_dict().keys() == base.state_dict().keys()


@every_kind
def test_copies_pickles_and_state_dicts(kind):
    model, x = adapted(kind), input_of(kind)
    set_adapter(model, ["b", "c"])
    y = model(x)
    twin = adapted(kind, "abc")
    twin.load_state_dict(model.state_dict())
    set_adapter(twin, ["b", "c"])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), twin):
        assert torch.equal(other(x), y)
        assert trained(other).keys() == trained(model).keys()
        set_adapter(other, "a")
        assert torch.equal(model(x), y), "they share nothing"
        assert not torch.equal(other(x), y)


@every_kind
def test_names_in_a_state_dict(kind):
    one, several = adapted(kind, "a").state_dict().keys(), adapted(kind, "ab").state_dict().keys()
    further = several - one
    assert one <= several, "the first adapter keeps its names"
    assert len(further) == len([name for name in one if "lora_" in name])
    assert all(name.rpartition(".")[2].startswith("adapter_b_") for name in further)


@every_kind
def test_a_cast_to_16_bits_leaves_every_adapter_in_float32(kind):
    model, x = adapted(kind, "ab").to(torch.bfloat16), input_of(kind, torch.bfloat16)
    kept = {name: parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name}
    assert set(kept.values()) == {torch.float32}
    with adapter_batch(model, ["a", "b", None, "a", "b", None]):
        assert model(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16), adapter_batch(model.float(), ["a", "b", None, "a", "b", None]):
        assert model(x.float()).isfinite().all()


# A class for each forward that asks what acts.
@pytest.mark.parametrize("kind", ["linear, rows", "conv 3x3", "conv1d", "attention, joint"])
def test_compiled_as_in_eager_mode(kind):
    """Which adapters act is read at every call; another batch of the same adapters compiles nothing."""
    model, x = adapted(kind), input_of(kind)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for name in ("a", "c", None):
        torch.testing.assert_close(under(compiled, name, x), under(model, name, x))
    counts = []
    for names in (["a", "b", None, "a", "b", "b"], ["b", "a", "a", None, "b", "a"]):
        with adapter_batch(model, names):
            torch.testing.assert_close(compiled(x), model(x))
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]
    set_adapter(model, ["a", "b"])
    torch.testing.assert_close(compiled(x), model(x))


def test_dropout_is_shared_or_refused():
    x = torch.randn(6, 5, 8)
    model = adapted("linear", "ab", dropout=0.5).train()
    set_adapter(model, ["a", "b"])
    torch.manual_seed(1)
    first = model(x)
    assert not torch.equal(first, model(x))
    with adapter_batch(model, ["a", "b", None, "a", "b", None]):
        ys = [model(x) for _ in range(2)]
        assert torch.equal(ys[0][2], ys[1][2]), "the base model has no dropout"
        assert not torch.equal(*ys)
    other = adapted("linear", "a", dropout=0.5)
    add(other, "linear", "b", dropout=0.25)
    set_adapter(other, ["a", "b"])
    other(x)  # in eval mode it does not matter
    with pytest.raises(RuntimeError, match=r"LoRALinear: adapters that act together .* one dropout, got a 0.5, b 0.25"):
        other.train()(x)
    assert merge_adapters(other, {"a": 1.0, "b": 1.0}).adapter == "merged"
    assert other.layer.settings_of("merged").dropout == 0.0
    merge_adapters(other, {"b": 1.0}, "like_b")
    assert other.layer.settings_of("like_b").dropout == 0.25


class Two(nn.Module):
    """Layers in which different adapters may stand."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize(
    ("a", "b"),
    [("up", "down"), ("up", ("up", "down")), ("in_proj", "out_proj"), ("out_proj", "attn"), ("attn", "in_proj")],
    ids=str,
)
def test_adapters_in_different_layers(a, b):
    torch.manual_seed(4)
    base, x = Two().requires_grad_(False).eval(), torch.randn(4, 5, 8)
    model = copy.deepcopy(base)
    inject_lora(model, a, rank=4, adapter="a")
    before = model(x)
    report = inject_lora(model, b, rank=2, alpha=6, adapter="b")
    assert torch.equal(model(x), before), "a further adapter does not act"
    assert {row.rank for row in report.rows} == {2}
    wake(model)
    outputs = {}
    for name, targets, settings in (("a", a, {"rank": 4}), ("b", b, {"rank": 2, "alpha": 6})):
        only = copy.deepcopy(base)
        inject_lora(only, targets, **settings)
        load_lora_state_dict(only, lora_state_dict(model, name))
        outputs[name] = under(model, name, x)
        assert torch.equal(outputs[name], only(x))
        assert len(trained(model)) == len(trained(only)) > 0
    with adapter_batch(model, ["b", "a", None, "b"]):
        expected = torch.stack([outputs["b"][0], outputs["a"][1], base(x)[2], outputs["b"][3]])
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    set_adapter(model, "b")
    remove_adapter(model, "a")
    assert torch.equal(model(x), outputs["b"])
    remove_adapter(model, "b")
    assert model.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(model(x), base(x))


def test_a_whole_vision_tower():
    torch.manual_seed(5)
    base = small_vit().requires_grad_(False).eval()
    x = torch.randn(4, 3, 16, 16)
    model = copy.deepcopy(base)
    for name in "ab":
        inject_lora(model, "all-linear", **SETTINGS[name], adapter=name)
    wake(model)
    outputs = {name: under(model, name, x) for name in ("a", "b", None)}
    assert torch.equal(outputs[None], base(x))
    with adapter_batch(model, ["a", None, "b", "a"]):
        y = model(x)
    for i, name in enumerate(("a", None, "b", "a")):
        torch.testing.assert_close(y[i], outputs[name][i], rtol=1e-4, atol=1e-5)
    merge_adapters(model, {"a": 0.5, "b": 0.5}, "half")
    set_adapter(model, "half")
    half = model(x)
    remove_lora(model)
    torch.testing.assert_close(model(x), half, rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == base.state_dict().keys()


def test_methods_and_diagnostics_see_what_trains():
    model, x = adapted("linear", "ab"), torch.randn(6, 5, 8)
    set_adapter(model, "b")
    groups = {group["name"]: group["params"] for group in pyfused.param_groups(model)}
    assert {name: [p.shape for p in params] for name, params in groups.items()} == {
        "lora": [(2, 8)], "lora b": [(12, 2)],
    }  # fmt: skip
    optimizer = torch.optim.AdamW(pyfused.param_groups(model, lr=1e-2))
    report = pyfused.diagnostics.check(model, x, loss_fn=lambda y: y.square().mean(), optimizer=optimizer)
    assert report.passed, report
    set_adapter(model, ["a", "b"])
    assert [len(group["params"]) for group in pyfused.param_groups(model)] == [2, 2]
    with adapter_batch(model, ["a", None, "b", "a", None, "b"]):
        optimizer = torch.optim.AdamW(pyfused.param_groups(model))
        assert pyfused.diagnostics.check(model, x, loss_fn=lambda y: y.square().mean(), optimizer=optimizer).passed
    with adapters_off(model):
        failed = {row.name for row in pyfused.diagnostics.check(model, x.requires_grad_(), loss_fn=torch.sum).failed}
    assert failed == {"gradients reach every adapter"}


def test_reports_say_what_acts():
    model = base_of("linear")
    assert not [note for note in add(model, "linear", "a").notes if "acts" in note]
    report = add(model, "linear", "b")
    assert "adapter 'b' neither acts nor trains yet: set_adapter(model, 'b')" in report.notes
    assert "adapters=('a', 'b'), active=('a',)" not in repr(adapted("linear", "a"))
    assert "adapters=('a', 'b'), active=('a',)" in repr(model)
    assert report.trainable_parameters == 4 * (8 + 12)
    assert (report.total, report.lora_parameters) == (1, 2 * (8 + 12))


def test_an_adapter_that_acts_goes_on_acting_in_further_layers():
    model = Two()
    inject_lora(model, "up", adapter="a")
    inject_lora(model, "attn", adapter="b")
    inject_lora(model, "down", adapter="a")
    assert [model.down.active_adapters, model.up.active_adapters, model.attn.active_adapters] == [("a",), ("a",), ()]


def _state(model: nn.Module) -> tuple:
    return (
        {name: (p, p.requires_grad) for name, p in model.named_parameters()},
        [(type(module), dict(module.__dict__.get("_further", {}))) for module in model.modules()],
        [module.active_adapters for module in loras(model)],
    )


# What is asked of a model with "a" and "b" in layer "up", and "b" in attn; error; what it says.
REFUSALS = {
    "the same adapter again": (
        lambda m: inject_lora(m, ("down", "up"), adapter="b"), ValueError, "up: .* already wrapped, with adapter 'b'",
    ),
    "a name with a dot": (lambda m: inject_lora(m, "down", adapter="x.y"), ValueError, "adapter must be a name of"),
    "no name": (lambda m: inject_lora(m, "down", adapter=""), ValueError, "adapter must be a name of letters"),
    "a number": (lambda m: inject_lora(m, "down", adapter=1), TypeError, "adapter must be a str, got int"),
    "PEFT's word": (lambda m: inject_lora(m, "down", adapter_name="x"), TypeError, "here it is adapter"),
    "a dtype that does not fit": (
        lambda m: inject_lora(m, ("up", "attn"), adapter="d", lora_dtype=torch.float16), TypeError, "lora_dtype must",
    ),
    "a trial that fails": (
        lambda m: inject_lora(m, ("up", "attn", "down"), adapter="d", example_inputs=torch.randn(2, 3)),
        AssertionError, "embedding dimension of 8",
    ),
    "set: unknown": (lambda m: set_adapter(m, "d"), ValueError, "set_adapter: adapter must name .*got 'd'; .*a, b"),
    "set: none": (lambda m: set_adapter(m, []), TypeError, "adapter must be a name or a sequence of names"),
    "set: not names": (lambda m: set_adapter(m, ["a", 1]), TypeError, "adapter must be the name of an .*, got int"),
    "batch: unknown": (lambda m: adapter_batch(m, ["d"]).__enter__(), ValueError, "adapters must name .*got 'd'"),
    "batch: one str": (lambda m: adapter_batch(m, "ab").__enter__(), TypeError, "adapters must be a sequence"),
    "batch: empty": (lambda m: adapter_batch(m, []).__enter__(), TypeError, "adapters must be a sequence"),
    "off: no module": (lambda m: adapters_off(1).__enter__(), TypeError, "adapters_off: model must be an nn.Module"),
    "off: no LoRA": (lambda m: adapters_off(nn.Linear(2, 2)).__enter__(), ValueError, "must contain LoRA modules"),
    "merge: unknown": (lambda m: merge_adapters(m, {"d": 1.0}), ValueError, "weights must name adapters .*got 'd'"),
    "merge: nothing": (lambda m: merge_adapters(m, {}), TypeError, "weights must be a mapping"),
    "merge: a list": (lambda m: merge_adapters(m, ["a"]), TypeError, "weights must be a mapping"),
    "merge: NaN": (lambda m: merge_adapters(m, {"a": float("nan")}), ValueError, r"weights\['a'\] must be finite"),
    "merge: a name that is taken": (lambda m: merge_adapters(m, {"a": 1.0}, "b"), ValueError, "must be a new name"),
    "merge: rank 0": (lambda m: merge_adapters(m, {"a": 1.0}, rank=0), ValueError, "rank must be at least 1"),
    "merge: rank 257": (lambda m: merge_adapters(m, {"a": 1.0}, rank=257), ValueError, "at most 256, got 257"),
    "remove: unknown": (lambda m: remove_adapter(m, "d"), ValueError, "remove_adapter: adapter must name"),
    "state: none named": (lambda m: lora_state_dict(m), ValueError, "adapter must name one of .*b, a, got None"),
    "state: unknown": (lambda m: lora_state_dict(m, "d"), ValueError, "adapter must name adapters of the model"),
    "load: none named": (lambda m: load_lora_state_dict(m, {}), ValueError, "adapter must name one of"),
    "load: another's": (
        lambda m: load_lora_state_dict(m, lora_state_dict(m, "a"), adapter="b"), ValueError, "missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_leave_the_model_as_it_was(case):
    ask, error, said = REFUSALS[case]
    torch.manual_seed(6)
    model = Two()
    inject_lora(model, "up", rank=4, adapter="a")
    inject_lora(model, ("up", "attn"), rank=2, adapter="b")
    before = _state(model)
    with pytest.raises(error, match=said):
        ask(model)
    after = _state(model)
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    assert all(before[0][name][0] is after[0][name][0] for name in before[0])
    assert {name: trains for name, (_, trains) in before[0].items()} == {n: t for n, (_, t) in after[0].items()}


@pytest.mark.parametrize("first", ["in_proj", "out_proj", "attn"])
def test_an_attention_that_fails_to_get_a_further_adapter_is_as_it_was(first):
    """Either part of it may be there, or not yet."""
    model = Two()
    inject_lora(model, first, rank=2, adapter="a")
    before, attention, out = _state(model), model.attn, model.attn.out_proj
    qkv, names = attention.qkv, list(model.state_dict())
    with pytest.raises(ValueError, match="width 8"):
        inject_lora(model, "attn", rank=3, adapter="b", example_inputs=torch.randn(2, 3, 5))
    assert _state(model)[1:] == before[1:]
    assert (model.attn, model.attn.out_proj, model.attn.qkv) == (attention, out, qkv)
    assert list(model.state_dict()) == names
    assert {name: trains for name, (_, trains) in _state(model)[0].items()} == {
        name: trains for name, (_, trains) in before[0].items()
    }


BUSY = {
    "inject_lora": lambda m: inject_lora(m, "down", adapter="d"),
    "set_adapter": lambda m: set_adapter(m, "a"),
    "merge_adapters": lambda m: merge_adapters(m, {"a": 1.0}),
    "remove_adapter": lambda m: remove_adapter(m, "a"),
}


@pytest.mark.parametrize("name", BUSY)
def test_changes_are_refused_inside_a_context_and_on_merged_weights(name):
    model = Two()
    inject_lora(model, "up", adapter="a")
    inject_lora(model, "up", adapter="b")
    with adapters_off(model), pytest.raises(ValueError, match=f"{name}: model must be outside adapters_off"):
        BUSY[name](model)
    with adapter_batch(model, ["a"]), pytest.raises(ValueError, match=f"{name}: model must be outside adapter_batch"):
        BUSY[name](model)
    model.up.merge()
    with pytest.raises(ValueError, match=rf"{name}: model must not be merged, .*LoRALinear; call its unmerge\(\)"):
        BUSY[name](model)
    model.up.unmerge()
    BUSY[name](model)


def test_merging_is_refused_inside_a_context():
    model = adapted("attention, joint", "ab")
    with adapters_off(model):
        for ask in (model.layer.merge, model.layer.to_base, lambda: remove_lora(model)):
            with pytest.raises(RuntimeError, match="needs the module outside adapters_off, got one inside it"):
                ask()
    remove_lora(model)


def test_inputs_that_hold_other_samples_are_refused():
    for kind in ("linear", "conv 3x3", "conv 1x1", "attention, joint"):
        model, x = adapted(kind, "ab"), input_of(kind)
        with (
            adapter_batch(model, ["a", "b"]),
            pytest.raises(ValueError, match=r"dimension 0 .* the 2 samples, got sha"),
        ):
            model(x)
    with adapter_batch(model, ["a"] * 5), pytest.raises(ValueError, match="input must have a batch"):
        model(x[0])
    sequence_first = Holder(nn.TransformerEncoderLayer(8, 2, 8))
    inject_lora(sequence_first)
    with pytest.raises(
        ValueError, match=r"samples in dimension 0, got the LoRAMultiheadAttention .* with batch_first=False"
    ):
        adapter_batch(sequence_first, ["default"]).__enter__()


def test_ranks_that_act_together_have_a_limit():
    model = base_of("linear")
    for i in range(3):
        inject_lora(model, "layer", rank=(100, 64, 100)[i], adapter=f"r{i}")
    with pytest.raises(ValueError, match=r"set_adapter: the ranks .* at most 256, got 264 in layer"):
        set_adapter(model, ["r0", "r1", "r2"])
    with pytest.raises(ValueError, match=r"adapter_batch: the ranks .* at most 256, got 300 in layer"):
        adapter_batch(model, ["r0", "r1", "r2"]).__enter__()
    with pytest.raises(ValueError, match=r"merge_adapters: the ranks .* got 264 in layer; give a rank"):
        merge_adapters(model, dict.fromkeys(("r0", "r1", "r2"), 1.0))
    merge_adapters(model, dict.fromkeys(("r0", "r1", "r2"), 1.0), rank=256)
    with adapter_batch(model, ["r0", "r1"]):
        assert model(torch.randn(2, 8)).shape == (2, 12)
