"""``group=True`` of ``inject_lora``: layers that read one x share a call, and equal what they compute one by one."""

from __future__ import annotations

import contextlib
import copy
import io

import models_setup  # noqa: F401
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyfused
from pyfused.lora.linear import LoRALinear
from pyfused.ops import decision

transformers = pytest.importorskip("transformers")


def unchanged(x):
    return x


class Reader(nn.Module):
    """q, k and v of several widths read x, and out reads what they make."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(20, 24, bias=bias), nn.Linear(20, 16, bias=bias)
        self.v, self.out = nn.Linear(20, 24, bias=bias), nn.Linear(24, 20, bias=bias)
        self.between = unchanged

    def forward(self, x):
        q = self.q(x)
        q.mul_(0.5)  # as an output of its own could be changed
        x = self.between(x)
        return x + self.out(q * self.k(x).mean(-1, keepdim=True).tanh() + self.v(x))


class Blocks(nn.Sequential):
    """Two of them, and one read by itself."""

    def __init__(self, bias: bool = True) -> None:
        torch.manual_seed(0)
        super().__init__(Reader(bias), Reader(bias), nn.Linear(20, 5))


def inputs(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*(shape or (3, 7, 20)), generator=torch.Generator().manual_seed(seed)).to(dtype)


SETTINGS = {"rank": {"q": 4, "k": 8, "v": 3}, "alpha": {"q": 8, "k": 4, "v": 9}}


def pair(make, example, dtype=torch.float32, **settings):
    """One model with LoRA, and its like with group=True; B is drawn."""
    made = []
    for group in (False, True):
        model = make().to(dtype)
        torch.manual_seed(2)
        report = pyfused.inject_lora(model, example_inputs=example, group=group, **settings)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_b"):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        made.append((model, report))
    (plain, _), (grouped, report) = made
    return plain, grouped, report


def calls(model: nn.Module, *args, **kwargs) -> int:
    """Calls of lora_linear in a forward without gradients."""
    told: list = []
    with decision.observed(told.append), torch.no_grad():
        model(*args, **kwargs)
    return sum(isinstance(one, decision.Decision) for one in told)


def step(model: nn.Module, x: torch.Tensor, run=None):
    x = x.clone().requires_grad_()
    y = (run or model)(x)
    wanted = {"x": x} | {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in wanted.values():
        parameter.grad = None
    y.double().square().mean().backward()
    return y.detach(), {name: parameter.grad for name, parameter in wanted.items()}


def assert_alike(plain, grouped, x, run=lambda model: None, tolerance=1e-5):
    (y, expected), (z, found) = (step(model, x, run(model)) for model in (plain, grouped))
    for name, one, other in [("y", y, z), *((name, expected[name], found[name]) for name in expected)]:
        error = (one.double() - other.double()).norm() / one.double().norm()
        assert error <= tolerance, (name, error)
        assert one.dtype == other.dtype


@pytest.mark.parametrize("bias", [True, False])
def test_one_call_equals_three(bias):
    plain, grouped, report = pair(lambda: Blocks(bias), inputs(), **SETTINGS)
    assert report.notes[-1] == "*: q, k, v read one x: one call for all (2 times)"
    assert (calls(plain, inputs()), calls(grouped, inputs())) == (8 + 1, 4 + 1)
    assert plain.state_dict().keys() == grouped.state_dict().keys()
    for shape in ((3, 7, 20), (20,), (1, 20), (0, 20), (2, 5, 3, 20)):
        if 0 not in shape:
            assert_alike(plain, grouped, inputs(*shape))
        with torch.inference_mode():
            torch.testing.assert_close(grouped(inputs(*shape)), plain(inputs(*shape)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    plain, grouped, _ = pair(Blocks, inputs(dtype=dtype), dtype=dtype, **SETTINGS)
    assert calls(grouped, inputs(dtype=dtype)) == 5
    # Of 16 bits: the scalings of A's rows go into B, which rounds once more.
    assert_alike(plain, grouped, inputs(dtype=dtype), tolerance=1e-12 if dtype == torch.float64 else 2e-2)


def test_autocast():
    plain, grouped, _ = pair(Blocks, inputs(), **SETTINGS)

    def run(model):
        def call(x):
            with torch.autocast("cpu", torch.bfloat16):
                return model(x)

        return call

    assert_alike(plain, grouped, inputs(), run, tolerance=4e-2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    plain, grouped, _ = pair(Blocks, inputs(), **SETTINGS)
    assert_alike(plain, grouped, inputs(), lambda model: lambda x: checkpoint(model, x, use_reentrant=reentrant))
    _, grouped, _ = pair(Blocks, inputs(), dropout=0.5, **SETTINGS)
    torch.manual_seed(4)
    straight = step(grouped, inputs())[1]
    torch.manual_seed(4)
    again = step(grouped, inputs(), lambda x: checkpoint(grouped, x, use_reentrant=reentrant))[1]
    assert all(torch.equal(straight[name], again[name]) for name in straight)


def test_dropout_has_one_mask():
    _, grouped, _ = pair(Blocks, inputs(), dropout=0.5, **SETTINGS)
    reader = grouped[0].train()
    with torch.no_grad():
        for layer in (reader.q, reader.k):
            layer.weight.zero_()
            layer.bias.zero_()
            layer.lora_a.fill_(1.0)
            layer.lora_b.fill_(1.0)
        x = torch.rand(50, 20) + 1.0
        q, k = reader.q(x), reader.k(x)
    terms = [part[:, 0] / (layer.scaling * layer.rank) for layer, part in ((reader.q, q), (reader.k, k))]
    torch.testing.assert_close(*terms)
    assert (terms[0] - x.sum(1)).abs().max() > 0.1
    # Without training nothing is dropped.
    torch.testing.assert_close(reader.eval().q(x)[:, 0] / (reader.q.scaling * reader.q.rank), x.sum(1))


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=50, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    return transformers.ViTModel(config)


TOKENS = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(5))
# Calls of lora_linear: each by itself, and with those of one x together.
FAMILIES = {
    # q k v o gate up down, of 2 layers
    "llama": (llama, {"input_ids": TOKENS}, 14, 8, "logits"),
    # Encoder: q k v o wi_0 wi_1 wo. Decoder: also q o, and k v of what the encoder made.
    "t5": (t5, {"input_ids": TOKENS, "labels": TOKENS}, 2 * 7 + 2 * 11, 2 * 4 + 2 * 7, "logits"),
    # q k v out fc1 fc2, and the pooler
    "vit": (vit, {"pixel_values": inputs(2, 3, 16, 16)}, 2 * 6 + 1, 2 * 4 + 1, "last_hidden_state"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    make, example, alone, together, output = FAMILIES[family]
    example = {name: value.double() if value.is_floating_point() else value for name, value in example.items()}
    plain, grouped, _ = pair(make, example, torch.float64, rank=4)
    assert (calls(plain, **example), calls(grouped, **example)) == (alone, together)
    found = []
    for model in (plain, grouped):
        y = getattr(model.eval()(**example), output)
        wanted = [p for p in model.parameters() if p.requires_grad]
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(6), dtype=y.dtype)
        gradients = torch.autograd.grad((y * weights).sum(), wanted, allow_unused=True)
        found.append([y.detach(), *(gradient for gradient in gradients if gradient is not None)])
    assert len(found[0]) == len(found[1]) > 2 * alone - 2
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-12 * one.norm()
    if family != "vit":
        # With a cache of keys: of what the encoder made they are computed in the first step alone.
        tokens = [model.generate(TOKENS, max_new_tokens=5, do_sample=False) for model in (plain, grouped)]
        assert torch.equal(*tokens)


def test_copies_and_casts_share_again():
    plain, grouped, _ = pair(Blocks, inputs(), **SETTINGS)
    file = io.BytesIO()
    torch.save(grouped, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for model in (copy.deepcopy(grouped), loaded, copy.deepcopy(grouped).double().float()):
        assert model[0].q.weight.data_ptr() != grouped[0].q.weight.data_ptr()
        assert calls(model, inputs()) == 5
        assert_alike(plain, model, inputs())
        with torch.no_grad():
            model[0].k.weight.zero_()
        assert not torch.equal(model(inputs()), grouped(inputs()))
    grouped.load_state_dict({name: value * 1.5 for name, value in plain.state_dict().items()})
    plain.load_state_dict({name: value * 1.5 for name, value in plain.state_dict().items()})
    assert calls(grouped, inputs()) == 5
    assert_alike(plain, grouped, inputs())


def test_several_adapters():
    plain, grouped, _ = pair(Blocks, inputs(), **SETTINGS)
    for model in (plain, grouped):
        torch.manual_seed(5)
        pyfused.inject_lora(model, rank=5, adapter="b")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("adapter_b_lora_b"):
                    parameter.fill_(0.1)
    assert calls(grouped, inputs()) == 5

    def results(model):
        with torch.no_grad():
            yield model(inputs())
            for names in (["default", None, "default"], ["b", "default", None], [None, None, None]):
                with pyfused.adapter_batch(model, names):
                    yield model(inputs())
            with pyfused.adapters_off(model):
                yield model(inputs())
            for names in ("b", ["default", "b"], "default"):
                pyfused.set_adapter(model, names)
                yield model(inputs())

    found = [list(results(model)) for model in (plain, grouped)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one)
    assert not torch.allclose(found[0][0], found[0][1])
    assert calls(grouped, inputs()) == 5


def test_a_cast_model_shares_again():
    plain, grouped, _ = pair(Blocks, inputs(), **SETTINGS)
    assert calls(grouped, inputs()) == 5
    assert calls(grouped.double().float(), inputs()) == 5
    assert_alike(plain, grouped, inputs())


def test_layers_of_several_modules_share_nothing():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Sequential(nn.Linear(20, 8)), nn.Sequential(nn.Linear(20, 8))

        def forward(self, x):
            return self.left(x) + self.right(x)

    report = pyfused.inject_lora(Beside(), rank=2, example_inputs=inputs(), group=True)
    assert report.notes == ("group: no two adapted linear layers of one module read one x",)


def test_a_parameter_stays_the_one_that_others_hold():
    model = Blocks()
    held = dict(model.named_parameters())
    before = {name: parameter.clone() for name, parameter in held.items()}
    pyfused.inject_lora(model, rank=2, example_inputs=inputs(), group=True)
    for name, parameter in held.items():
        assert model.get_parameter(name) is parameter
        assert torch.equal(parameter, before[name])
    weights = [layer.weight for layer in (model[0].q, model[0].k, model[0].v)]
    assert weights[1].data_ptr() == weights[0].data_ptr() + 4 * 24 * 20
    assert weights[2].data_ptr() == weights[1].data_ptr() + 4 * 16 * 20


def test_removed_lora_leaves_nothing(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    plain, grouped, _ = pair(Blocks, inputs(), **SETTINGS)
    with torch.no_grad():
        expected = plain(inputs())
    pyfused.remove_lora(grouped)
    assert type(grouped[0].q) is nn.Linear
    assert "_shared_input" not in vars(grouped[0].q)
    torch.testing.assert_close(grouped(inputs()), expected)
    unmerged = pair(Blocks, inputs(), **SETTINGS)[1]
    pyfused.remove_lora(unmerged, merge=False)
    # The weights lie in one piece of memory; files hold each once.
    safetensors.save_file(unmerged.state_dict(), tmp_path / "w.safetensors")
    read = safetensors.load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(read[name], value) for name, value in Blocks().state_dict().items())


# ---- where each computes for itself


def other_memory(model):
    model[0].k.weight.data = model[0].k.weight.data.clone()


def assigned(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def training_apart(model):
    model[0].k.eval()
    model[1].v.eval()


ALONE = {
    "LoRA is merged": lambda model: (model.eval(), model[0].k.merge()),
    "not the first adapter alone acts": lambda model: model[0].v._choose(()),
    "a weight trains": lambda model: model[0].v.weight.requires_grad_(),
    "somebody has put weights into other memory": other_memory,
    "layers differ in mode or dropout": training_apart,
    "some have a bias": lambda model: model[0].k.register_parameter("bias", None),
    "a weight is sharded, or of another kind": lambda model: setattr(
        model[0].q, "weight", type("Other", (nn.Parameter,), {})(model[0].q.weight.data, requires_grad=False)
    ),
}


@pytest.mark.parametrize("why", ALONE)
def test_each_computes_for_itself(why):
    plain, grouped, _ = pair(Blocks, inputs(), **SETTINGS)
    for model in (plain, grouped):
        ALONE[why](model)
    told = pyfused.explain(grouped, inputs())
    assert [one.why for one in told.shared if one.module == "0.q"] == [why]
    assert "a call each for q, k, v: *.q" in str(told)
    assert f": {why}\n" in f"{told}\n"
    with torch.no_grad():
        torch.testing.assert_close(grouped(inputs()), plain(inputs()))
    if why not in ("LoRA is merged", "not the first adapter alone acts"):
        assert_alike(plain, grouped, inputs())


@pytest.mark.parametrize("narrow", ["weight", "LoRA"])
def test_several_dtypes_under_autocast(narrow):
    plain, grouped, _ = pair(Blocks, inputs(), **SETTINGS)
    for model in (plain, grouped):
        layer = model[0].k
        for parameter in (layer.weight, layer.bias) if narrow == "weight" else (layer.lora_a, layer.lora_b):
            parameter.data = parameter.data.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        (why, _) = [one.why for one in pyfused.explain(grouped, inputs()).shared]
        assert why.startswith("weights differ" if narrow == "weight" else "LoRA parameters differ")
        torch.testing.assert_close(grouped(inputs()), plain(inputs()), rtol=0.0, atol=0.05)


def test_assigned_weights_are_not_moved_again():
    plain, grouped, _ = pair(Blocks, inputs(), **SETTINGS)
    assigned(grouped)
    addresses = [parameter.data_ptr() for parameter in grouped.parameters()]
    assert calls(grouped, inputs()) == 9
    assert addresses == [parameter.data_ptr() for parameter in grouped.parameters()]
    assert_alike(plain, grouped, inputs())


def changed_x(x):
    return x * 1.5


def changed_in_place(x):
    with torch.no_grad():
        return x.mul_(1.5)


@pytest.mark.parametrize("between", [changed_x, changed_in_place], ids=["another x", "x changed in place"])
def test_another_x_for_the_others(between):
    plain, grouped, _ = pair(Blocks, inputs(), **SETTINGS)
    for model in (plain, grouped):
        model[0].between = model[1].between = between
    with torch.no_grad():
        torch.testing.assert_close(grouped(inputs()), plain(inputs()))


def test_what_changed_since_the_call_is_computed_anew():
    plain, grouped, _ = pair(Blocks, inputs(), **SETTINGS)
    x = inputs()

    def both(change):
        parts = []
        for model in (plain, grouped):
            with torch.no_grad():
                model[0].q(x)
            with change(model[0].k):
                parts.append(model[0].k(x))
        torch.testing.assert_close(*parts)
        return parts[1]

    @contextlib.contextmanager
    def trained(layer):
        with torch.no_grad():
            layer.lora_b.add_(1.0)
        yield

    assert both(trained).requires_grad
    assert both(lambda layer: torch.enable_grad()).requires_grad
    assert both(lambda layer: torch.autocast("cpu", torch.bfloat16)).dtype == torch.bfloat16
    with torch.no_grad():
        # In the same state of torch.
        both(trained)
        both(lambda layer: contextlib.nullcontext(layer.merge()))
        for model in (plain, grouped):
            model[0].k.unmerge()
            model[0].q(x)
    # Nothing is held longer than until the next call.
    assert grouped[0].q._shared_input._held is not None
    with torch.no_grad():
        grouped(inputs(seed=9))
    assert grouped[0].q._shared_input._held is None


def test_compiled_code_computes_one_by_one():
    plain, grouped, _ = pair(Blocks, inputs(), **SETTINGS)
    torch._dynamo.reset()
    compiled = torch.compile(grouped, backend="aot_eager", fullgraph=True)
    assert_alike(plain, grouped, inputs(), lambda model: compiled if model is grouped else model)


def test_what_cannot_share_is_said():
    wide = Blocks()
    report = pyfused.inject_lora(wide, rank=90, target_modules=["q", "k", "v"], example_inputs=inputs(), group=True)
    ranks = "their ranks are 270 together, and 256 is the most"
    assert report.notes == (f"*: q, k, v read one x, but each has a call of its own: {ranks} (2 times)",)
    assert calls(wide, inputs()) == 6
    training = Blocks()
    report = pyfused.inject_lora(training, rank=2, freeze=False, example_inputs=inputs(), group=True)
    assert report.notes[-1].startswith("*: q, k, v read one x, but each has a call of its own: a weight trains")
    single = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    report = pyfused.inject_lora(single, example_inputs=inputs(), group=True)
    assert report.notes == ("group: no two adapted linear layers of one module read one x",)


def test_bad_input():
    model = Blocks()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"group=True needs example_inputs, .* got None"):
        pyfused.inject_lora(model, group=True)
    with pytest.raises(TypeError, match="group must be a bool"):
        pyfused.inject_lora(model, example_inputs=inputs(), group=1)
    with pytest.raises(ValueError, match="x must have weight's K = 20"):
        pyfused.inject_lora(model, example_inputs=inputs(3, 21), group=True)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
