from __future__ import annotations

import contextlib
import re

import pytest
import torch
from cross_attention_cases import draw, draw_projection
from operator_cases import leaves_of
from torch import nn
from torch._subclasses import FakeTensorMode

import pyfused
from pyfused.choice import backends
from pyfused.explanation import Explanation, _bytes, _call, explain
from pyfused.ops import decision
from pyfused.ops.cross_attention_residual import PLANS as CROSS_ATTENTION_PLANS
from pyfused.ops.cross_attention_residual import choose_plan as choose_cross_attention_plan
from pyfused.ops.cross_attention_residual import most_columns
from pyfused.ops.lora_linear import _decided


class Layer(nn.Module):
    def __init__(self, k: int, n: int, rank: int, **options):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, k), requires_grad=False)
        self.lora_a = nn.Parameter(torch.randn(rank, k))
        self.lora_b = nn.Parameter(torch.randn(n, rank))
        self.options = options

    def forward(self, x):
        return pyfused.lora_linear(
            x, self.weight, self.lora_a, self.lora_b, training=self.training, backend="portable", **self.options
        )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Layer(16, 32, 4, dropout_p=0.25)
        self.norm = nn.BatchNorm1d(32)
        self.rest = nn.Sequential(nn.GELU(), Layer(32, 8, 3))

    def forward(self, x):
        return self.rest(self.norm(self.first(x)))

    def encode(self, x):
        return self.first(x)


class Adapter(nn.Module):
    def __init__(self, channels: int, hidden: int, **options):
        super().__init__()
        self.down_weight = nn.Parameter(torch.randn(hidden, channels))
        self.up_weight = nn.Parameter(torch.randn(channels, hidden))
        self.layer_scale = nn.Parameter(torch.full((channels,), 0.1))
        self.options = {"backend": "portable"} | options

    def forward(self, z):
        return pyfused.adapter_residual(
            z, self.down_weight, None, self.up_weight, None, layer_scale=self.layer_scale, **self.options
        )


def test_every_call_is_listed_with_its_module_sizes_backend_and_plan():
    calls = explain(Net(), torch.randn(5, 16)).calls
    assert [(call.module, call.operator, call.shapes, call.plan, call.backend) for call in calls] == [
        ("first", "lora_linear", (("M", 5), ("K", 16), ("N", 32), ("R", 4)), "blas", "portable"),
        ("rest.1", "lora_linear", (("M", 5), ("K", 32), ("N", 8), ("R", 3)), "blas", "portable"),
    ]
    assert {call.dtype for call in calls} == {torch.float32}


def test_saved_bytes_are_what_autograd_saves_beyond_the_inputs():
    layer, x = Layer(16, 32, 4), torch.randn(3, 5, 16, requires_grad=True)
    own = {x.data_ptr(), *(parameter.data_ptr() for parameter in layer.parameters())}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert explain(layer, x).saved_bytes == sum(saved.values()) == 15 * 4 * 4


@pytest.mark.parametrize(
    ("hidden", "options", "plan", "saved_bytes", "why"),
    [
        (8, {}, "save", 2 * 63 * 8 * 4, "h = 8 <= C / 2"),
        (9, {}, "recompute", 0, "h = 9 > C / 2 = 8: it is computed again from z"),
        (9, {"plan": "save"}, "save", 2 * 63 * 9 * 4, "plan asked for by name"),
        (8, {"plan": "recompute"}, "recompute", 0, "plan asked for by name"),
    ],
)
def test_what_an_adapter_saves_is_what_autograd_saves(hidden, options, plan, saved_bytes, why):
    adapter = Adapter(16, hidden, channel_dim=1, **options)
    z = torch.randn(2, 16, 7, 9, requires_grad=True)
    own = {z.data_ptr(), *(parameter.data_ptr() for parameter in adapter.parameters())}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapter(z)
    (call,) = explain(adapter, z).calls
    assert (call.operator, call.plan, call.backend) == ("adapter_residual", plan, "portable")
    assert call.shapes == (("M", 126), ("C", 16), ("h", hidden))
    assert call.saved_bytes == sum(saved.values()) == saved_bytes
    assert call.why[0].startswith(why)


def _saved_beyond(inputs, function) -> int:
    """Bytes that autograd keeps for the backward of ``function()``, beyond the inputs."""
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # What is kept dies with the output, and its addresses with it.
        output = function()
    assert output.requires_grad
    return sum(saved.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("context_batch", [1, 2])
@pytest.mark.parametrize(("weight", "norm_match"), [("channels", False), (None, False), (None, True)])
@pytest.mark.parametrize("plan", CROSS_ATTENTION_PLANS)
def test_what_cross_attention_saves_is_what_autograd_saves(plan, weight, norm_match, context_batch, dtype):
    drawn = draw(2, 13, 3, 24, 2, 5, dtype, context_channels=7, context_batch=context_batch, weight=weight)
    leaves = leaves_of(drawn)
    options = {"num_heads": 2, "norm_match": norm_match, "plan": plan, "backend": "portable"}

    def call():
        return pyfused.cross_attention_residual(**leaves, **options)

    (described,) = explain(call).calls
    assert (described.operator, described.plan, described.backend) == ("cross_attention_residual", plan, "portable")
    assert described.shapes == (("M", 26), ("C", 24), ("H", 2), ("d", 5), ("T", 3))
    assert described.why[0] == "plan asked for by name"
    saved = _saved_beyond(leaves.values(), call)
    assert described.saved_bytes == saved


def test_cross_attention_explains_the_plan_that_auto_takes():
    for tokens, length, plan, why in (
        (2, 3000, "absorbed", "absorbing costs less with H T = 4 columns for H d = 48 and C = 64; p is kept"),
        (2, 300, "standard", "absorbing costs more with H T = 4 columns for H d = 48 and C = 64, at so few rows"),
        (30, 300, "standard", "absorbing costs more with H T = 60 columns for H d = 48 and C = 64"),
    ):
        tensors = draw(1, length, tokens, 64, 2, 24, device="cpu")
        (call,) = explain(
            lambda t=tensors: pyfused.cross_attention_residual(**t, num_heads=2, backend="portable")
        ).calls
        assert call.plan == plan
        assert call.why[0].startswith(why)
    (call,) = explain(
        lambda: pyfused.cross_attention_residual(**tensors, num_heads=2, dropout_p=0.1, seed=3, backend="portable")
    ).calls
    assert (call.plan, call.why[0]) == ("absorbed", "dropout has a seed, which plan 'standard' cannot honour")


def test_cross_attention_under_autocast_saves_in_its_dtype():
    tensors = draw(1, 300, 2, 64, 2, 24, device="cpu")
    calls = {}
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (calls[enabled],) = explain(lambda: pyfused.cross_attention_residual(**tensors, num_heads=2)).calls
    assert (calls[True].dtype, calls[False].dtype) == (torch.bfloat16, torch.float32)
    assert calls[True].saved_bytes < 0.6 * calls[False].saved_bytes


# One image of AA-CLIP: 1370 rows of 1024, 16 heads of 64, and a context for each image.
AA_CLIP = {"heads": 16, "head_dim": 64, "channels": 1024, "norm_match": False, "dtype": torch.float32}


@pytest.mark.parametrize(
    ("rows", "tokens", "plan"),
    [(1370, 1, "absorbed"), (1370, 2, "absorbed"), (1370, 12, "absorbed"), (1370, 77, "standard"),
     (None, 2, "absorbed"), (None, 12, "absorbed"), (None, 77, "standard"),
     (1, 1, "standard"), (1, 2, "standard"), (1, 77, "standard"), (0, 2, "standard")],
)  # fmt: skip
def test_the_plan_of_cross_attention_on_a_cpu(rows, tokens, plan):
    chosen, reason = choose_cross_attention_plan(rows=rows, tokens=tokens, device_type="cpu", **AA_CLIP)
    assert chosen == plan
    assert f"H T = {16 * tokens} columns for H d = 1024" in reason
    assert ("costs more" in reason) == (plan == "standard")
    assert (chosen, reason) == choose_cross_attention_plan(rows=rows, tokens=tokens, device_type="cpu", **AA_CLIP)


def test_what_decides_the_plan_of_cross_attention():
    def plan(tokens, **changes):
        sizes = {"rows": 1370, "device_type": "cpu"} | AA_CLIP | changes
        return choose_cross_attention_plan(tokens=tokens, **sizes)

    plans = [plan(tokens)[0] for tokens in range(1, 100)]
    switches = [i for i in range(1, 99) if plans[i].startswith("absorbed") != plans[i - 1].startswith("absorbed")]
    assert len(switches) == 1, "absorbed up to one T, standard from there on"
    matched = [plan(tokens, norm_match=True)[0] for tokens in range(1, 100)]
    assert matched.index("standard") < plans.index("standard"), "the norm costs more with every column"
    # p is made again where it is more than half as wide as x.
    assert plan(32)[0] == "absorbed"
    assert plan(33)[0] == "absorbed_recompute"
    # On a GPU what is beyond the kernels' columns is not absorbed, however cheap.
    widest = most_columns(torch.float32, False)
    assert plan(widest // 16, device_type="cuda")[0] == "absorbed"
    beyond, reason = plan(widest // 16 + 1, device_type="cuda")
    assert (beyond, f"over the {widest} columns" in reason) == ("standard", True)


@pytest.mark.parametrize(
    ("activation", "norm_match", "gate", "keeps"),
    [("identity", False, None, False), ("identity", False, "channels", True), ("identity", True, None, True),
     ("leaky_relu", False, None, True)],
)  # fmt: skip
def test_what_a_projection_saves_is_what_autograd_saves(activation, norm_match, gate, keeps):
    leaves = leaves_of(draw_projection((2, 13, 7), 5, gate=gate))

    def call():
        return pyfused.projection_residual(
            **leaves, activation=activation, norm_match=norm_match, backend="portable"
        )  # fmt: skip

    (described,) = explain(call).calls
    assert (described.operator, described.plan) == ("projection_residual", "save" if keeps else "-")
    assert described.shapes == (("M", 26), ("K", 7), ("C", 5))
    assert ("needs the projection" in described.why[0]) == keeps
    saved = _saved_beyond(leaves.values(), call)
    assert described.saved_bytes == saved == keeps * 26 * 5 * 4


def test_a_limit_of_a_backend_is_among_the_reasons(monkeypatch):
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", True)
    monkeypatch.setattr(backends, "TRITON_REFUSAL", None)
    (call,) = explain(Adapter(16, 513, backend="auto"), torch.randn(5, 16, dtype=torch.float32)).calls
    assert call.backend != "triton"
    assert call.why[-1].startswith("not triton: adapter_residual: down_weight (h, C) must have h <= ")
    assert call.why[-1].endswith("got h = 513")
    (call,) = explain(Adapter(16, 8), torch.randn(5, 16)).calls
    assert call.why[-1] == "not triton: on a CPU it is interpreted, and used only by name"


def test_an_adapter_under_autocast_saves_in_its_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        (call,) = explain(Adapter(16, 8), torch.randn(5, 16)).calls
    assert (call.dtype, call.saved_bytes) == (torch.bfloat16, 5 * (8 + 16) * 2), "h, and z as autocast made it"


@pytest.mark.parametrize("training", [True, False])
def test_model_buffers_hooks_mode_and_generator_are_left_as_they_were(training):
    net = Net().train(training)
    with torch.no_grad():
        net.norm.running_mean.fill_(7.0)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    versions = {name: buffer._version for name, buffer in net.named_buffers()}
    generator = torch.get_rng_state()

    explain(net, torch.randn(5, 16, generator=torch.Generator().manual_seed(1)))

    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert versions == {name: buffer._version for name, buffer in net.named_buffers()}
    assert all(module.training is training for module in net.modules())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert decision.observers == []


def test_a_failing_call_raises_its_own_error_and_leaves_nothing_behind():
    net = Net()
    with pytest.raises(ValueError, match="lora_linear: x must have"):
        explain(net, torch.randn(5, 17))
    assert decision.observers == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert len(explain(net, torch.randn(5, 16)).calls) == 2


def test_bound_method_and_plain_function():
    net, x = Net(), torch.randn(5, 16)
    assert [call.module for call in explain(net.encode, x).calls] == ["first"]
    layer = net.first
    calls = explain(lambda x, scaling: layer.forward(x) * scaling, x, scaling=2.0).calls
    assert [call.module for call in calls] == [""]


def test_compiled_model_is_explained_without_being_compiled():
    net, x = Net(), torch.randn(5, 16)

    def never(graph, inputs):
        raise AssertionError("compiled")

    calls = explain(torch.compile(net, backend=never), x).calls
    assert [call.module for call in calls] == ["first", "rest.1"]


def test_autocast_dtype_is_reported():
    with torch.autocast("cpu", torch.bfloat16):
        (call,) = explain(Layer(16, 32, 4), torch.randn(5, 16)).calls
    assert call.dtype == torch.bfloat16
    # P, and x as autocast made it.
    assert call.saved_bytes == 5 * (4 + 16) * 2


def test_why_names_each_refused_backend(monkeypatch):
    layer, x = Layer(16, 32, 4), torch.randn(5, 16)
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", False)
    (call,) = explain(layer, x).calls
    assert call.why == (
        "the only plan of backend 'portable'",
        f"not cuda: {backends.refusal('cuda', x.device, x.dtype)}",
        f"not cpu: {backends.refusal('cpu', x.device, x.dtype, 'lora_linear')}",
        f"not triton: {backends.refusal('triton', x.device, x.dtype)}",
    )
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", True)
    monkeypatch.setattr(backends, "TRITON_REFUSAL", None)
    (call,) = explain(layer, x).calls
    assert call.why[-1] == "not triton: on a CPU it is interpreted, and used only by name"


def test_plan_asked_for_by_name():
    (call,) = explain(Layer(16, 32, 4, plan="blas"), torch.randn(5, 16)).calls
    assert call.plan == "blas"
    assert call.why[0] == "plan asked for by name"


def test_the_plans_of_both_directions_are_named():
    x = torch.empty(5, 768, dtype=torch.bfloat16)
    sizes = {"M": 5, "N": 14336, "K": 768, "R": 16}
    call = _call("up", _decided(x, x.dtype, sizes, "triton", "auto", "shrink_expand", "one_launch", {}, "lora_linear"))
    assert (call.plan, call.backward_plan) == ("shrink_expand", "one_launch")
    assert "shrink_expand / one_launch" in str(Explanation([call]))


def test_times_are_explained_on_a_gpu(monkeypatch):
    """Whoever serves the call, and the runner-up, in both directions."""
    monkeypatch.setattr(backends, "_absence", lambda device: None)
    monkeypatch.setattr(backends, "_gpu_refusal", lambda *where: None)
    monkeypatch.setattr(backends, "TRITON_REFUSAL", None)
    monkeypatch.setattr(backends, "CUDA_OPERATORS", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    sizes = {
        "M": 8192, "K": 4096, "N": 4096, "R": 16, "dropout_p": 0.0, "weight_bytes": 2, "adapter_bytes": 4, "tma": 1,
    }  # fmt: skip
    with FakeTensorMode():
        x = torch.empty(8192, 4096, dtype=torch.bfloat16, device="cuda")
    call = _call("up", _decided(x, x.dtype, sizes, "triton", "auto", "blas", "blas", {}, "lora_linear"))
    assert re.fullmatch(
        r"forward takes triton blas \d+\.\d us, portable blas \d+\.\d us, eager \d+\.\d us \(model\)", call.why[1]
    )
    assert call.why[2].startswith("backward takes triton blas ")
    assert call.why[3].startswith("not cuda: ")
    (note,) = [line for line in str(Explanation([call])).splitlines() if line.startswith("[1]")]
    assert call.why[1] in note


def test_empty_input_and_no_operator():
    (call,) = explain(Layer(16, 32, 4), torch.randn(0, 16)).calls
    assert (call.shapes[0], call.saved_bytes) == (("M", 0), 0)
    assert str(explain(nn.Linear(3, 4), torch.randn(2, 3))) == "no operator of pyfused was called"


def test_table_lists_calls_and_each_reason_once():
    lines = str(explain(Net(), torch.randn(5, 16))).splitlines()
    assert lines[0].split() == ["module", "operator", "calls", "shapes", "dtype", "backend", "plan", "saved", "why"]
    assert " ".join(lines[2].split()) == "first lora_linear 1 M=5 K=16 N=32 R=4 float32 portable blas 80 B [1]"
    assert " ".join(lines[3].split()) == "rest.1 lora_linear 1 M=5 K=32 N=8 R=3 float32 portable blas 60 B [1]"
    assert lines[5] == "2 calls; a training step saves 140 B beyond their inputs"
    assert [line for line in lines if line.startswith("[")] == [lines[6]]


def test_table_folds_alike_calls_of_numbered_modules():
    net = nn.Sequential(*(Layer(16, 16, 4) for _ in range(12)), Layer(16, 8, 4))
    lines = str(explain(net, torch.randn(5, 16))).splitlines()
    assert " ".join(lines[2].split()) == "* lora_linear 12 M=5 K=16 N=16 R=4 float32 portable blas 960 B [1]"
    assert lines[3].split()[:3] == ["12", "lora_linear", "1"]


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB")])
def test_byte_units(count, text):
    assert _bytes(count) == text


def test_not_callable():
    with pytest.raises(TypeError, match="explain: model_or_function must be a module or a callable, got int"):
        explain(3)


@pytest.mark.parametrize("mixed", [False, True])
def test_convolutions_that_stay_torchs_are_named(mixed):
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 1))
    pyfused.inject_lora(model, ["0", "1"], rank=2)
    model.append(pyfused.ConvLoRA(8, rank=2))
    images = torch.randn(2, 4, 5, 5)
    with pyfused.adapter_batch(model, ["default", None]) if mixed else contextlib.nullcontext():
        explanation = explain(model, images)
    assert [call.module for call in explanation.calls] == ["1"]
    assert [(part.module, part.what) for part in explanation.plain] == [("0", "LoRAConv2d"), ("2", "ConvLoRA")]


@pytest.mark.parametrize(
    ("module", "inputs", "named"),
    [
        (nn.Linear(4, 4), [(3, 4)], ["LoRALinear"]),
        (nn.Conv2d(4, 4, 1), [(2, 4, 5, 5)], ["LoRAConv2d"]),
        (nn.Conv2d(4, 4, 3), [(2, 4, 5, 5)], ["LoRAConv2d"]),
        (nn.MultiheadAttention(4, 2, batch_first=True), [(2, 3, 4)] * 3, ["LoRAMultiheadAttention", "LoRALinear"]),
    ],
    ids=["linear", "conv 1x1", "conv 3x3", "attention"],
)
def test_merged_modules_are_named(module, inputs, named):
    model = nn.ModuleDict({"layer": module})
    pyfused.inject_lora(model, ["layer"], rank=2)
    model["layer"].merge()
    explanation = explain(model["layer"], *(torch.randn(shape) for shape in inputs))
    assert explanation.calls == []
    assert [part.what for part in explanation.plain] == named
    assert {part.why for part in explanation.plain} == {"it is merged, and so a plain layer"}
