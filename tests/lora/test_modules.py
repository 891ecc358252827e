"""LoRALinear and LoRAConv2d: parity with the formula, merging, state, and refusals."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from models_setup import wake
from torch import nn
from torch.nn.utils import parametrizations

from pyfused import reference
from pyfused.modules import LoRAConv2d, LoRALinear, LoRAModule
from pyfused.ops import decision


def adapted_linear(**settings) -> LoRALinear:
    settings = {"rank": 3, "alpha": 5, **settings}
    return wake(LoRALinear.from_linear(nn.Linear(7, 11), **settings))


def adapted_conv(conv: nn.Conv2d, **settings) -> LoRAConv2d:
    return wake(LoRAConv2d.from_conv(conv, **{"rank": 3, "alpha": 5, **settings}))


CONVS = {
    "1x1": {"kernel_size": 1},
    "1x1 no bias": {"kernel_size": 1, "bias": False},
    "1x1 strided": {"kernel_size": 1, "stride": 2},
    "1x1 grouped": {"kernel_size": 1, "groups": 2},
    "1x1 padded": {"kernel_size": 1, "padding": 1},
    "3x3": {"kernel_size": 3},
    "3x3 same dilated": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "3x2 strided": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    "3x3 reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "3x3 circular same": {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
    "5x5 depthwise": {"kernel_size": 5, "padding": 2, "groups": 4},
}


def conv_formula(conv: nn.Conv2d, module: LoRAConv2d, x: torch.Tensor) -> torch.Tensor:
    """The published form: a dense A with the base's geometry, then a 1x1 B, scaled."""
    dense = nn.Conv2d(
        conv.in_channels, module.rank, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        bias=False, padding_mode=conv.padding_mode,
    )  # fmt: skip
    low = dense._conv_forward(x, module.lora_a.view(dense.weight.shape), None)
    return conv(x) + module.alpha / module.rank * F.conv2d(low, module.lora_b[:, :, None, None])


class TestLoRALinear:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("use_rslora", [True, False])
    def test_equals_the_formula(self, bias, use_rslora):
        module = wake(LoRALinear(7, 11, rank=4, alpha=6, bias=bias, use_rslora=use_rslora))
        x = torch.randn(2, 5, 7)
        scaling = 6 / (2 if use_rslora else 4)
        expected = F.linear(x, module.weight, module.bias) + scaling * (x @ module.lora_a.T @ module.lora_b.T)
        torch.testing.assert_close(module(x), expected)

    def test_gradients_reach_the_low_rank_parameters_alone(self):
        module = adapted_linear()
        x = torch.randn(5, 7, requires_grad=True)
        module(x).square().sum().backward()
        assert module.weight.grad is None
        assert module.bias.grad is None
        assert all(p.grad.abs().sum() > 0 for p in (module.lora_a, module.lora_b, x))

    def test_starts_as_its_base(self):
        linear = nn.Linear(7, 11)
        module = LoRALinear.from_linear(linear)
        x = torch.randn(5, 7)
        torch.testing.assert_close(module(x), linear(x))
        module(x).sum().backward()
        assert module.lora_a.grad.abs().max() == 0
        assert module.lora_b.grad.abs().max() > 0
        assert module.lora_a.abs().max() <= 1 / math.sqrt(7)  # Kaiming-uniform, a = sqrt(5): bound 1 / sqrt(K)
        assert module.lora_a.std() > 0.4 / math.sqrt(7)

    def test_dropout_draws_the_operator_mask_in_training_alone(self):
        module = adapted_linear(dropout=0.5)
        x = torch.randn(6, 7)
        torch.manual_seed(3)
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64)
        args = x, module.weight, module.lora_a, module.lora_b, module.bias
        expected = reference.lora_linear(*args, scaling=module.scaling, dropout_p=0.5, seed=seed)
        torch.manual_seed(3)
        torch.testing.assert_close(module(x), expected)
        dense = reference.lora_linear(*args, scaling=module.scaling)
        assert (expected - dense).abs().max() > 0.01
        torch.testing.assert_close(module.eval()(x), dense)

    def test_from_linear_shares_parameters_hooks_mode_and_attributes(self):
        linear = nn.Linear(7, 11, dtype=torch.float64).eval()
        linear.int8_original_dtype = torch.float16
        seen = []
        linear.register_forward_hook(lambda module, args, output: seen.append(type(module)))
        module = LoRALinear.from_linear(linear, rank=2)
        assert module.weight is linear.weight
        assert module.bias is linear.bias
        assert not module.weight.requires_grad
        assert not module.bias.requires_grad
        assert not module.training
        assert module.int8_original_dtype == torch.float16
        assert module.lora_a.dtype == torch.float64
        module(torch.randn(2, 7, dtype=torch.float64))
        assert seen == [LoRALinear]
        assert "lora_a" not in dict(linear.named_parameters())
        assert len(linear._forward_pre_hooks) == 0
        assert isinstance(module, nn.Linear)

    def test_freeze_can_be_left_out(self):
        linear = nn.Linear(7, 11)
        assert LoRALinear.from_linear(linear, freeze=False).weight.requires_grad
        assert linear.weight.requires_grad

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_low_rank_parameters_of_16_bit_weights_are_float32_unless_asked(self, dtype):
        linear = nn.Linear(7, 11, dtype=dtype)
        assert LoRALinear.from_linear(linear).lora_a.dtype == torch.float32
        assert LoRALinear.from_linear(linear, lora_dtype=dtype).lora_b.dtype == dtype
        module = wake(LoRALinear.from_linear(linear))
        y = module(torch.randn(5, 7, dtype=dtype))
        y.float().sum().backward()
        assert y.dtype == dtype
        assert module.lora_a.grad.dtype == torch.float32

    @pytest.mark.parametrize(
        ("dtype", "lora_dtype", "expected"),
        [
            (torch.float32, torch.bfloat16, "torch.float32, as the weight"),
            (torch.float32, torch.float64, "torch.float32, as the weight"),
            (torch.float16, torch.bfloat16, "torch.float16, as the weight, or torch.float32"),
            (torch.float64, torch.float32, "torch.float64, as the weight"),
        ],
    )
    def test_low_rank_parameters_of_a_dtype_that_does_not_fit_are_refused(self, dtype, lora_dtype, expected):
        message = f"lora_dtype must be {expected}, got {lora_dtype}$"
        with pytest.raises(TypeError, match=f"LoRALinear: {message}"):
            LoRALinear(7, 11, dtype=dtype, lora_dtype=lora_dtype)
        with pytest.raises(TypeError, match=f"LoRALinear: {message}"):
            LoRALinear.from_linear(nn.Linear(7, 11, dtype=dtype), lora_dtype=lora_dtype)
        with pytest.raises(TypeError, match=f"LoRAConv2d: {message}"):
            LoRAConv2d.from_conv(nn.Conv2d(4, 4, 3, dtype=dtype), lora_dtype=lora_dtype)

    def test_one_seed_gives_one_adapter_in_every_dtype(self):
        base = nn.Linear(7, 11)
        torch.manual_seed(6)
        a = LoRALinear.from_linear(base, rank=4).lora_a
        torch.manual_seed(6)
        b = LoRALinear.from_linear(base.to(torch.bfloat16), rank=4).lora_a
        assert torch.equal(a, b)

    def test_deferred_initialisation(self):
        module = LoRALinear(7, 11, rank=2, device="meta").to_empty(device="cpu")
        module.reset_parameters()
        assert module.lora_b.abs().max() == 0
        assert 0 < module.lora_a.abs().max() <= 1 / math.sqrt(7)

    def test_compiles_without_a_graph_break(self):
        module = adapted_linear()
        x = torch.randn(5, 7)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        compiled(x).sum().backward()
        torch.testing.assert_close(compiled(x), module(x))
        assert module.lora_a.grad.abs().max() > 0

    @pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7)])
    def test_an_inplace_activation_may_follow(self, shape):
        module, x = adapted_linear(), torch.randn(shape)
        expected = torch.autograd.grad(torch.relu(module(x)).square().sum(), module.lora_a)
        assert torch.equal(torch.autograd.grad(torch.relu_(module(x)).square().sum(), module.lora_a)[0], expected[0])

    def test_nested_input_is_refused(self):
        nested = torch.nested.nested_tensor([torch.randn(2, 7), torch.randn(3, 7)])
        with pytest.raises(TypeError, match=r"x must be a dense tensor.*use_nested_tensor"):
            adapted_linear()(nested)


class TestMerge:
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 3e-2)]
    )
    def test_merged_equals_unmerged_and_unmerge_is_bit_exact(self, dtype, tolerance):
        module = adapted_linear().to(dtype).eval()
        x = torch.randn(5, 7, dtype=dtype)
        weight, expected = module.weight.clone(), module(x)
        parameter = module.weight
        module.merge()
        assert module.merged
        assert not torch.equal(module.weight, weight)
        torch.testing.assert_close(module(x), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
        module.merge()
        module.unmerge()
        assert not module.merged
        assert module.weight is parameter
        assert torch.equal(module.weight, weight)
        assert torch.equal(module(x), expected)
        module.unmerge()

    def test_merge_rounds_the_float32_sum_once(self):
        module = adapted_linear()
        wide = module.weight.double() + module.scaling * (module.lora_b.double() @ module.lora_a.double())
        module.merge()
        assert ((module.weight - wide).abs() <= 2 * torch.finfo(torch.float32).eps * wide.abs().clamp_min(1)).all()

    def test_a_merged_module_refuses_to_train(self):
        module = adapted_linear()
        module.merge()
        with pytest.raises(RuntimeError, match=r"merged.*unmerge\(\)"):
            module(torch.randn(5, 7))
        with torch.no_grad():
            module(torch.randn(5, 7))
        module.eval()(torch.randn(5, 7))
        module.train().unmerge()
        module(torch.randn(5, 7)).sum().backward()
        assert module.lora_b.grad is not None

    def test_a_merged_module_with_nothing_to_train_runs(self):
        module = adapted_linear().requires_grad_(False)
        module.merge()
        module(torch.randn(5, 7))

    @pytest.mark.parametrize("training", [True, False])
    def test_a_merged_module_whose_base_weight_trains_refuses_gradients_in_any_mode(self, training):
        module = LoRALinear.from_linear(nn.Linear(7, 11), freeze=False).train(training)
        module.merge()
        with pytest.raises(RuntimeError, match=r"merged.*base weight requires grad.*unmerge\(\)"):
            module(torch.randn(5, 7))
        with torch.no_grad():
            module(torch.randn(5, 7))

    @pytest.mark.parametrize("merge", [True, False])
    @pytest.mark.parametrize("merged", [True, False])
    @pytest.mark.parametrize("freeze", [True, False])
    def test_to_base_keeps_whether_the_weight_trains(self, freeze, merged, merge):
        module = LoRALinear.from_linear(nn.Linear(7, 11), freeze=freeze)
        if merged:
            module.merge()
        assert module.to_base(merge).weight.requires_grad is not freeze
        assert module.weight.requires_grad is (not freeze and not merged)
        module.unmerge()
        assert module.weight.requires_grad is not freeze

    def test_tied_weights_do_not_see_the_merge(self):
        embedding, linear = nn.Embedding(11, 7), nn.Linear(7, 11, bias=False)
        linear.weight = embedding.weight
        module = wake(LoRALinear.from_linear(linear))
        before = embedding.weight.clone()
        module.merge()
        assert torch.equal(embedding.weight, before)
        module.unmerge()
        assert module.weight is embedding.weight

    def test_state_dict_of_a_merged_module_is_the_unmerged_one(self):
        module = adapted_linear()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        module.merge()
        merged = module.state_dict()
        assert before.keys() == merged.keys()
        assert all(torch.equal(before[name], merged[name]) for name in before)

    def test_loading_into_a_merged_module_merges_what_was_loaded(self):
        source, target = adapted_linear(), adapted_linear()
        target.merge()
        target.load_state_dict(source.state_dict())
        assert target.merged
        x = torch.randn(5, 7)
        torch.testing.assert_close(target.eval()(x), source(x))
        target.unmerge()
        assert torch.equal(target.weight, source.weight)

    def test_moving_a_merged_module_moves_the_base_weight(self):
        module = adapted_linear()
        weight = module.weight.clone()
        module.merge()
        module.double()
        assert module.merged
        assert module.weight.dtype == torch.float64
        module.unmerge()
        assert torch.equal(module.weight, weight.double())

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    @pytest.mark.parametrize("merged", [True, False])
    def test_copies(self, clone, merged):
        module = adapted_linear().eval()
        if merged:
            module.merge()
        twin, x = clone(module), torch.randn(5, 7)
        assert twin.merged == merged
        assert torch.equal(twin(x), module(x))
        twin.unmerge()
        module.unmerge()
        assert torch.equal(twin.weight, module.weight)
        assert twin.weight is not module.weight
        wake(twin)
        assert not torch.equal(twin(x), module(x))

    @pytest.mark.parametrize("merged", [True, False])
    def test_to_base(self, merged):
        linear = nn.modules.linear.NonDynamicallyQuantizableLinear(7, 11)
        module = wake(LoRALinear.from_linear(linear)).eval()
        x = torch.randn(5, 7)
        expected = module(x)
        if merged:
            module.merge()
        plain, dropped = module.to_base(), module.to_base(merge=False)
        assert type(plain) is type(linear)
        assert plain.state_dict().keys() == linear.state_dict().keys()
        assert plain.__dict__.keys() == linear.__dict__.keys()
        assert len(plain._forward_pre_hooks) == 0
        torch.testing.assert_close(plain(x), expected)
        assert dropped.weight is linear.weight
        assert module.merged == merged
        torch.testing.assert_close(module(x), expected)


class TestState:
    def test_round_trip_and_loading_the_base_state_dict(self):
        module, other = adapted_linear(), adapted_linear()
        other.load_state_dict(module.state_dict())
        x = torch.randn(5, 7)
        assert torch.equal(other(x), module(x))
        result = module.load_state_dict(nn.Linear(7, 11).state_dict(), strict=False)
        assert result.unexpected_keys == []
        assert result.missing_keys == ["lora_a", "lora_b"]

    def test_repr_names_the_settings(self):
        text = repr(adapted_linear(dropout=0.25))
        assert "in_features=7, out_features=11, bias=True, rank=3, alpha=5, lora_dropout=0.25, merged=False" in text


class TestLoRAConv2d:
    @pytest.mark.parametrize("geometry", CONVS.values(), ids=CONVS)
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_equals_the_formula_with_its_gradients(self, geometry, channels_last):
        conv = nn.Conv2d(4, 6 if geometry.get("groups") == 2 else 8, **geometry)
        module = adapted_conv(conv)
        x = torch.randn(2, 4, 9, 8)
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        x.requires_grad_()
        wanted = conv_formula(conv, module, x)
        y = module(x)
        assert y.stride() == wanted.stride()
        torch.testing.assert_close(y, wanted)
        dy = torch.randn_like(y)
        y.backward(dy)
        dx, da, db = torch.autograd.grad(wanted, (x, module.lora_a, module.lora_b), dy)
        torch.testing.assert_close(x.grad, dx, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module.lora_a.grad, da, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module.lora_b.grad, db, rtol=1e-4, atol=1e-4)
        assert conv.weight.grad is None

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_an_inplace_activation_may_follow(self, memory_format):
        module, x = adapted_conv(nn.Conv2d(4, 8, 1)), torch.randn(2, 4, 9, 8).to(memory_format=memory_format)
        expected = torch.autograd.grad(torch.relu(module(x)).square().sum(), module.lora_a)
        assert torch.equal(torch.autograd.grad(torch.relu_(module(x)).square().sum(), module.lora_a)[0], expected[0])

    @pytest.mark.parametrize("geometry", [CONVS["1x1"], CONVS["3x3"]], ids=["1x1", "3x3"])
    def test_unbatched_input(self, geometry):
        module = adapted_conv(nn.Conv2d(4, 8, **geometry))
        x = torch.randn(4, 9, 8)
        torch.testing.assert_close(module(x), module(x[None])[0])

    def test_a_plain_1x1_goes_through_the_operator(self):
        told = []
        with decision.observed(told.append):
            for geometry in CONVS.values():
                adapted_conv(nn.Conv2d(4, 8, **geometry))(torch.randn(1, 4, 9, 8))
        calls = [each for each in told if isinstance(each, decision.Decision)]
        assert [call.operator for call in calls] == ["lora_linear"] * 2
        assert len(told) == len(CONVS)

    def test_the_scaling_acts(self):
        module = adapted_conv(nn.Conv2d(4, 8, 3))
        x = torch.randn(1, 4, 9, 8)
        once = module(x) - nn.Conv2d.forward(module, x)
        module.scaling *= 2
        torch.testing.assert_close(module(x) - nn.Conv2d.forward(module, x), 2 * once, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("geometry", [CONVS["1x1"], CONVS["3x3"]], ids=["1x1", "3x3"])
    def test_dropout_acts_in_training_on_the_low_rank_term_alone(self, geometry):
        conv = nn.Conv2d(4, 8, **geometry)
        module = adapted_conv(conv, dropout=0.5)
        x = torch.randn(2, 4, 9, 8)
        torch.manual_seed(1)
        first = module(x)
        torch.manual_seed(1)
        assert torch.equal(first, module(x))
        assert not torch.allclose(first, module(x))
        torch.testing.assert_close(module.eval()(x), conv_formula(conv, module, x))
        with torch.no_grad():
            module.train().lora_b.zero_()
        torch.testing.assert_close(module(x), conv(x))

    @pytest.mark.parametrize("name", [name for name, geometry in CONVS.items() if "groups" not in geometry])
    def test_merged_equals_unmerged(self, name):
        module = adapted_conv(nn.Conv2d(4, 8, **CONVS[name])).eval()
        x = torch.randn(2, 4, 9, 8)
        expected, weight = module(x), module.weight.clone()
        module.merge()
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
        plain = module.to_base()
        torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
        assert type(plain) is nn.Conv2d
        module.unmerge()
        assert torch.equal(module.weight, weight)

    @pytest.mark.parametrize("kernel", [1, 3])
    @pytest.mark.parametrize("shape", [(4, 5), (1, 2, 4, 5, 5), (4,)])
    def test_input_that_is_no_image_is_refused(self, kernel, shape):
        module = LoRAConv2d.from_conv(nn.Conv2d(4, 6, kernel))
        with pytest.raises(ValueError, match=r"LoRAConv2d: input must have shape .* got \(" + str(shape[0])):
            module(torch.randn(shape))

    def test_merging_groups_is_refused(self):
        module = adapted_conv(nn.Conv2d(4, 8, **CONVS["5x5 depthwise"]))
        for attempt in (module.merge, module.to_base):
            with pytest.raises(RuntimeError, match=r"groups = 1, got groups = 4"):
                attempt()
        assert not module.merged

    def test_autocast_and_half_precision_bases(self):
        x = torch.randn(2, 4, 9, 8)
        for geometry in (CONVS["1x1"], CONVS["3x3"]):
            module = adapted_conv(nn.Conv2d(4, 8, **geometry))
            with torch.autocast("cpu", torch.bfloat16):
                y = module(x)
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y.float(), module(x), rtol=5e-2, atol=5e-2)
            half = adapted_conv(nn.Conv2d(4, 8, **geometry).bfloat16())
            assert half.lora_a.dtype == torch.float32
            half(x.bfloat16()).float().sum().backward()
            assert half.lora_a.grad.dtype == torch.float32

    def test_is_made_from_a_convolution_alone(self):
        with pytest.raises(TypeError, match="from_conv"):
            LoRAConv2d(4, 8, 3)

    def test_copies(self):
        module = adapted_conv(nn.Conv2d(4, 8, 3))
        x = torch.randn(1, 4, 9, 8)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(x), module(x))


class OwnForward(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"rank": 0}, ValueError, r"rank must be in 1\.\.256, got 0"),
            ({"rank": -4}, ValueError, r"rank must be in 1\.\.256, got -4"),
            ({"rank": 257}, ValueError, r"rank must be in 1\.\.256, got 257"),
            ({"rank": 4.0}, TypeError, "rank must be an int, got float"),
            ({"rank": True}, TypeError, "rank must be an int, got bool"),
            ({"alpha": math.inf}, ValueError, "alpha must be finite, also in float32, got inf"),
            ({"alpha": math.nan}, ValueError, "alpha must be finite, also in float32, got nan"),
            ({"alpha": 0}, ValueError, "alpha must be positive, got 0"),
            ({"alpha": "32"}, TypeError, "alpha must be a Python number, got str"),
            ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
            ({"dropout": -0.1}, ValueError, r"dropout must be in \[0, 1\), got -0.1"),
            ({"lora_dtype": torch.int8}, TypeError, "lora_dtype must be None or one of"),
        ],
    )
    def test_settings(self, settings, error, message):
        linear, conv = nn.Linear(7, 11), nn.Conv2d(4, 8, 3)
        for make in (
            lambda: LoRALinear(7, 11, **settings),
            lambda: LoRALinear.from_linear(linear, **settings),
            lambda: LoRAConv2d.from_conv(conv, **settings),
        ):
            with pytest.raises(error, match=message):
                make()
        assert linear.weight.requires_grad

    def test_wrong_bases(self):
        with pytest.raises(TypeError, match=r"from_linear: expected an nn.Linear, got Conv2d"):
            LoRALinear.from_linear(nn.Conv2d(4, 8, 1))
        with pytest.raises(TypeError, match=r"from_conv: expected an nn.Conv2d, got Linear"):
            LoRAConv2d.from_conv(nn.Linear(4, 8))
        with pytest.raises(ValueError, match=r"got a LoRALinear: already wrapped"):
            LoRALinear.from_linear(LoRALinear(7, 11))
        with pytest.raises(ValueError, match=r"got a LoRALinear: already wrapped"):
            LoRAConv2d.from_conv(LoRALinear(7, 11))
        with pytest.raises(TypeError, match=r"got .*OwnForward with a forward that replaces it"):
            LoRALinear.from_linear(OwnForward(7, 11))
        patched = nn.Linear(7, 11)
        patched.forward = lambda x: x
        with pytest.raises(TypeError, match="with a forward that replaces it"):
            LoRALinear.from_linear(patched)
        with pytest.raises(ValueError, match="weight must be a parameter of the module"):
            LoRALinear.from_linear(parametrizations.weight_norm(nn.Linear(7, 11)))
        with pytest.raises(ValueError, match="got an uninitialized parameter; run one forward"):
            LoRALinear.from_linear(nn.LazyLinear(11))
        whole = nn.Linear(7, 11)
        whole.weight = nn.Parameter(torch.ones(11, 7, dtype=torch.int8), requires_grad=False)
        with pytest.raises(TypeError, match=r"weight must have dtype.*got torch.int8"):
            LoRALinear.from_linear(whole)

    def test_wrong_inputs(self):
        module = adapted_linear()
        with pytest.raises(ValueError, match="x must have weight's K = 7"):
            module(torch.randn(5, 6))
        with pytest.raises(TypeError, match=r"x must have dtype.*got torch.int64"):
            module(torch.ones(5, 7, dtype=torch.int64))
        with pytest.raises(TypeError, match=r"must have dtype torch.float64, got torch.float32"):
            module(torch.randn(5, 7, dtype=torch.float64))

    def test_base_class_finds_every_kind(self):
        modules = adapted_linear(), adapted_conv(nn.Conv2d(4, 8, 3))
        assert all(isinstance(module, LoRAModule) for module in modules)
