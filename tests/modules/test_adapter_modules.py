"""BottleneckAdapter, its presets and ConvLoRA: what they compute, how they start, and how they travel."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyfused.modules import BottleneckAdapter, ConvLoRA
from pyfused.modules.adapter import drop_path_scale


@torch.no_grad()
def filled(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.normal_()
    return module


def eager(adapter: BottleneckAdapter, z: torch.Tensor, residual=None, phi=F.gelu, keep=1.0) -> torch.Tensor:
    """The formula by torch's linear layers, the channels last."""
    gamma = 1.0 if adapter.gamma is None else adapter.gamma
    up = F.linear(phi(F.linear(z, adapter.down_weight, adapter.down_bias)), adapter.up_weight, adapter.up_bias)
    return (z if residual is None else residual) + keep * gamma * (adapter.skip * z + up)


class TestForward:
    def test_defaults_start_at_twice_z_and_shapes(self):
        adapter = BottleneckAdapter(48)
        shapes = {name: tuple(p.shape) for name, p in adapter.named_parameters()}
        assert shapes == {"down_weight": (24, 48), "down_bias": (24,), "up_weight": (48, 24), "up_bias": (48,)}
        assert all(p.dtype == torch.float32 and p.requires_grad for p in adapter.parameters())
        bound = math.sqrt(1 / 48)
        assert 0.9 * bound < adapter.down_weight.abs().max() <= bound
        assert not any(p.any() for p in (adapter.down_bias, adapter.up_weight, adapter.up_bias))
        z, residual = torch.randn(2, 5, 48), torch.randn(2, 5, 48)
        torch.testing.assert_close(adapter(z), 2 * z)
        torch.testing.assert_close(adapter(z, residual), residual + z)

    @pytest.mark.parametrize(
        ("channels", "settings", "hidden"),
        [(48, {}, 24), (76, {}, 38), (10, {}, 8), (64, {"reduction": 16}, 8), (64, {"hidden": 3}, 3),
         (64, {"reduction": 0.5}, 128), (65, {"reduction": 2.0}, 32)],
    )  # fmt: skip
    def test_hidden(self, channels, settings, hidden):
        adapter = BottleneckAdapter(channels, **settings)
        assert adapter.hidden == hidden
        assert type(adapter.hidden) is int
        assert sum(p.numel() for p in adapter.parameters()) == 2 * channels * hidden + hidden + channels

    @pytest.mark.parametrize("skip", [True, False, -0.7])
    @pytest.mark.parametrize(("layer_scale", "per_channel"), [(None, True), (0.3, True), (0.3, False)])
    def test_is_the_formula(self, skip, layer_scale, per_channel):
        adapter = filled(BottleneckAdapter(20, 2, skip=skip, layer_scale=layer_scale, per_channel=per_channel))
        assert adapter.gamma is None if layer_scale is None else adapter.gamma.shape == (20 if per_channel else 1,)
        z, residual = torch.randn(3, 7, 20, requires_grad=True), torch.randn(3, 7, 20, requires_grad=True)
        inputs = [z, residual, *adapter.parameters()]
        y, expected = adapter(z, residual), eager(adapter, z, residual)
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(y)
        for actual, wanted in zip(
            torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True
        ):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)

    def test_channels_first_and_no_bias(self):
        adapter = filled(BottleneckAdapter(20, channel_dim=1, bias=False, layer_scale=1e-3))
        assert dict(adapter.named_parameters()).keys() == {"down_weight", "up_weight", "gamma"}
        z = torch.randn(2, 20, 7, 7)
        expected = eager(adapter, z.movedim(1, -1)).movedim(-1, 1)
        torch.testing.assert_close(adapter(z), expected)
        y = adapter(z.to(memory_format=torch.channels_last))
        torch.testing.assert_close(y, expected)
        assert y.is_contiguous(memory_format=torch.channels_last)

    def test_a_callers_gamma_gets_its_gradient(self):
        adapter = filled(BottleneckAdapter(12))
        z, gamma = torch.randn(4, 12), torch.randn(12, requires_grad=True)
        keep = torch.tensor([0.0, 1.0, 2.0, 0.5])
        y = adapter(z, layer_scale=gamma, sample_scale=keep)
        branch = eager(adapter, z) - z
        torch.testing.assert_close(y, z + keep[:, None] * gamma * branch)
        (grad,) = torch.autograd.grad(y.sum(), gamma)
        torch.testing.assert_close(grad, (keep[:, None] * branch).sum(0))

    def test_erf_and_tanh_gelu_are_told_apart(self):
        erf, tanh = filled(BottleneckAdapter(8)), BottleneckAdapter(8, activation="gelu_tanh")
        tanh.load_state_dict(erf.state_dict())
        z = torch.randn(50, 8, dtype=torch.float64)
        a, b = erf.double()(z), tanh.double()(z)
        torch.testing.assert_close(a, eager(erf, z))
        torch.testing.assert_close(b, eager(tanh, z, phi=lambda h: F.gelu(h, approximate="tanh")))
        assert 1e-5 < (a - b).abs().max() < 1e-1

    def test_hidden_dropout_acts_in_training_alone(self):
        adapter = filled(BottleneckAdapter(16, hidden=64, dropout=0.5, skip=False))
        z = torch.randn(200, 16)
        base = adapter.eval()(z)
        torch.testing.assert_close(base, eager(adapter, z), rtol=1e-4, atol=1e-4)
        adapter.train()
        assert not torch.equal(adapter(z), adapter(z))
        torch.manual_seed(3)
        first = adapter(z)
        torch.manual_seed(3)
        assert torch.equal(adapter(z), first)
        mean = torch.stack([adapter(z) for _ in range(200)]).mean(0)
        assert (mean - base).abs().mean() < 0.2 * (base - z).abs().mean()


class TestDropPath:
    @pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_draws_what_timm_draws(self, rate, dtype):
        drop_path = pytest.importorskip("timm.layers").DropPath(rate)
        adapter = filled(BottleneckAdapter(6, drop_path=rate, channel_dim=1)).to(dtype)
        z, residual = torch.randn(2, 9, 6, 3, 3, dtype=dtype)
        torch.manual_seed(7)
        y, after = adapter(z, residual), torch.rand(1)
        torch.manual_seed(7)
        branch = adapter.eval()(z, residual) - residual
        torch.testing.assert_close(y, residual + drop_path(branch))
        # The generator stands where timm leaves it.
        assert torch.equal(torch.rand(1), after)
        dropped = [torch.equal(a, b) for a, b in zip(y, residual, strict=True)]
        assert all(dropped) if rate == 1.0 else 0 <= sum(dropped) < 9

    def test_eval_and_rate_zero_draw_nothing(self):
        z = torch.randn(5, 6)
        assert drop_path_scale(z, 0.0, True) is None
        assert drop_path_scale(z, 0.5, False) is None
        adapter = filled(BottleneckAdapter(6, drop_path=0.9)).eval()
        state = torch.get_rng_state()
        torch.testing.assert_close(adapter(z), eager(adapter, z))
        assert torch.equal(torch.get_rng_state(), state)

    def test_factors_are_not_rounded_to_16_bits(self):
        scale = drop_path_scale(torch.zeros(200, 4, dtype=torch.float16), 0.1, True)
        assert scale.dtype == torch.float32
        assert scale.unique().tolist() == pytest.approx([0.0, 1 / 0.9], rel=1e-6)
        assert drop_path_scale(torch.zeros(200, 4), 0.1, True, scale_by_keep=False).unique().tolist() == [0.0, 1.0]


class TestPresets:
    def test_pfeiffer(self):
        adapter = BottleneckAdapter.pfeiffer(768)
        assert (adapter.hidden, adapter.activation, adapter.skip, adapter.gamma) == (48, "relu", 0.0, None)
        assert adapter.down_weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert adapter.up_weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not adapter.down_bias.any()
        assert not adapter.up_bias.any()
        filled(adapter)
        f, x = torch.randn(2, 3, 768), torch.randn(2, 3, 768)
        norm = nn.LayerNorm(768)
        h = adapter(norm(f + x), residual=f)
        torch.testing.assert_close(h, eager(adapter, norm(f + x), f, F.relu), rtol=1e-4, atol=1e-3)

    def test_houlsby(self):
        adapter = BottleneckAdapter.houlsby(64, reduction=8, drop_path=0.1)
        assert (adapter.hidden, adapter.activation, adapter.skip, adapter.gamma) == (8, "silu", 0.0, None)
        assert adapter.drop_path == 0.1
        assert adapter.up_weight.std().item() == pytest.approx(0.02, rel=0.2)
        f = torch.randn(2, 3, 64)
        filled(adapter).eval()
        torch.testing.assert_close(adapter(f), eager(adapter, f, phi=F.silu), rtol=1e-4, atol=1e-4)
        assert BottleneckAdapter.houlsby(8).hidden == 1

    def test_parallel(self):
        adapter = BottleneckAdapter.parallel(64)
        assert (adapter.hidden, adapter.activation, adapter.skip) == (32, "relu", 0.0)
        assert adapter.gamma.tolist() == [4.0]
        assert not adapter.gamma.requires_grad
        x, f = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
        assert torch.equal(adapter(x, residual=f), f)
        with torch.no_grad():
            adapter.up_weight.normal_()
        torch.testing.assert_close(adapter(x, residual=f), eager(adapter, x, f, F.relu), rtol=1e-4, atol=1e-4)
        learned = BottleneckAdapter.parallel(64, scaling=1.0, learned=True)
        assert learned.gamma.tolist() == [1.0]
        assert learned.gamma.requires_grad

    def test_adaptformer(self):
        adapter = BottleneckAdapter.adaptformer(768)
        assert (adapter.hidden, adapter.activation, adapter.skip, adapter.dropout) == (64, "relu", 0.0, 0.1)
        assert adapter.gamma.tolist() == pytest.approx([0.1])
        assert not adapter.gamma.requires_grad
        assert sum(p.numel() for p in adapter.parameters() if p.requires_grad) == 2 * 768 * 64 + 768 + 64
        assert BottleneckAdapter.adaptformer(32, hidden=5, dropout=0.0, scaling=1.0).hidden == 5

    def test_the_original_start_underflows_in_float16(self):
        adapter = BottleneckAdapter(256, skip=False, init_std=1e-7)
        for weight in (adapter.down_weight, adapter.up_weight):
            assert weight.std().item() == pytest.approx(1e-7, rel=0.05)
        z, residual = torch.randn(4, 256), torch.randn(4, 256)
        torch.testing.assert_close(adapter(z, residual), residual, rtol=0, atol=1e-10)


class TestTravel:
    def module(self) -> BottleneckAdapter:
        return filled(BottleneckAdapter(16, layer_scale=1e-6, drop_path=0.5, dropout=0.1, channel_dim=1))

    def test_deepcopy_pickle_and_state_dict(self):
        adapter = self.module().eval()
        z = torch.randn(3, 16, 4, 4)
        other = BottleneckAdapter(16, layer_scale=1.0, channel_dim=1).eval()
        other.load_state_dict(adapter.state_dict())
        buffer = io.BytesIO()
        torch.save(adapter, buffer)
        buffer.seek(0)
        copies = [copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter)), other]
        for twin in [*copies, torch.load(buffer, weights_only=False)]:
            assert torch.equal(twin(z), adapter(z))
            assert twin.gamma is not adapter.gamma
        assert list(adapter.state_dict()) == ["down_weight", "up_weight", "down_bias", "up_bias", "gamma"]

    def test_one_seed_gives_one_adapter_in_every_dtype(self):
        weights = []
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            torch.manual_seed(1)
            weights.append(BottleneckAdapter(16, dtype=dtype).down_weight.bfloat16())
        assert all(torch.equal(weight, weights[0]) for weight in weights)

    @pytest.mark.parametrize(("cast", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
    def test_a_cast_leaves_what_trains_in_float32(self, cast, dtype):
        adapter = BottleneckAdapter(16, layer_scale=1e-6)
        adapter(torch.randn(2, 16)).sum().backward()
        grad = adapter.gamma.grad.clone()
        getattr(adapter, cast)()
        assert adapter.gamma.dtype == torch.float32
        assert (adapter.gamma == 1e-6).all()
        assert torch.equal(adapter.gamma.grad, grad)
        parameters = list(adapter.parameters())
        assert {p.dtype for p in parameters} == {p.grad.dtype for p in parameters} == {torch.float32}
        assert adapter(torch.randn(2, 16, dtype=dtype)).dtype == dtype
        adapter.double()
        assert adapter.gamma.dtype == torch.float64
        adapter.to(dtype=torch.float16)
        assert adapter.gamma.dtype == torch.float32

    def test_float32_parameters_serve_half_inputs(self):
        adapter = filled(BottleneckAdapter(16, layer_scale=0.1))
        z = torch.randn(5, 16).half()
        y = adapter(z)
        assert y.dtype == torch.float16
        torch.testing.assert_close(y.float(), eager(adapter, z.float()), rtol=2e-3, atol=2e-2)
        y.float().sum().backward()
        assert {p.grad.dtype for p in adapter.parameters()} == {torch.float32}

    def test_autocast_keeps_the_residual_stream(self):
        adapter = filled(BottleneckAdapter(16, layer_scale=0.1))
        z, residual = torch.randn(5, 16), torch.randn(5, 16)
        with torch.autocast("cpu", torch.bfloat16):
            y = adapter(z, residual)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, eager(adapter, z, residual), rtol=3e-2, atol=1e-1)
        dropped = adapter(z, residual, sample_scale=torch.zeros(5))
        assert torch.equal(dropped, residual)

    def test_meta_then_reset(self):
        with torch.device("meta"):
            adapter = BottleneckAdapter(16, layer_scale=0.25)
        adapter.to_empty(device="cpu")
        adapter.reset_parameters()
        assert (adapter.gamma == 0.25).all()
        z = torch.randn(2, 16)
        torch.testing.assert_close(adapter(z), 1.25 * z)

    def test_compiles_whole(self):
        adapter = self.module().eval()
        z = torch.randn(3, 16, 4, 4)
        compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(z), adapter(z))


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"channels": 4.0}, TypeError, "channels must be an int, got float"),
            ({"channels": 0}, ValueError, "channels must be at least 1, got 0"),
            ({"reduction": 0}, ValueError, "reduction must be positive, got 0"),
            ({"reduction": "2"}, TypeError, "reduction must be a Python number, got str"),
            ({"hidden": 0}, ValueError, "hidden must be at least 1, got 0"),
            ({"hidden": True}, TypeError, "hidden must be an int, got bool"),
            ({"activation": "gelu_erf"}, ValueError, "activation must be one of .*'gelu_tanh'.*, got 'gelu_erf'"),
            ({"skip": float("nan")}, ValueError, "skip must be finite, also in float32, got nan"),
            ({"skip": None}, TypeError, "skip must be a Python number, got NoneType"),
            ({"layer_scale": float("inf")}, ValueError, "layer_scale must be finite, also in float32, got inf"),
            ({"layer_scale": torch.ones(8)}, TypeError, "layer_scale must be a Python number, got Tensor"),
            ({"drop_path": 1.1}, ValueError, r"drop_path must be in \[0, 1\], got 1.1"),
            ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
            ({"channel_dim": 2}, ValueError, r"channel_dim must be one of \(-1, 1\), got 2"),
            ({"init_std": -1.0}, ValueError, "init_std must be at least 0, got -1.0"),
            ({"dtype": torch.int8}, TypeError, "dtype must be one of .*, got torch.int8"),
        ],
    )
    def test_settings(self, arguments, error, message):
        with pytest.raises(error, match=f"^BottleneckAdapter: {message}"):
            BottleneckAdapter(**{"channels": 8} | arguments)

    def test_presets_check_before_they_divide(self):
        with pytest.raises(ValueError, match="reduction must be positive"):
            BottleneckAdapter.pfeiffer(64, reduction=0)
        with pytest.raises(TypeError, match="channels must be an int"):
            BottleneckAdapter.houlsby("64")

    def test_inputs(self):
        adapter = BottleneckAdapter(8, layer_scale=1.0)
        with pytest.raises(TypeError, match=r"z must be a torch\.Tensor, got list"):
            adapter([1.0])
        with pytest.raises(ValueError, match="z must have down_weight's C = 8"):
            adapter(torch.randn(2, 9))
        with pytest.raises(TypeError, match="z must have dtype"):
            adapter(torch.ones(2, 8, dtype=torch.int32))
        with pytest.raises(ValueError, match="residual must have shape"):
            adapter(torch.randn(2, 8), torch.randn(3, 8))
        with pytest.raises(ValueError, match=r"layer_scale must be None .* gamma of its own, got a tensor of shape"):
            adapter(torch.randn(2, 8), layer_scale=torch.ones(8))
        plain = BottleneckAdapter(8)
        with pytest.raises(ValueError, match="layer_scale must have one element or shape"):
            plain(torch.randn(2, 8), layer_scale=torch.ones(7))
        with pytest.raises(ValueError, match="sample_scale must have shape"):
            plain(torch.randn(2, 8), sample_scale=torch.ones(3))
        with pytest.raises(ValueError, match="sample_scale must not require grad"):
            plain(torch.randn(2, 8), sample_scale=torch.ones(2, requires_grad=True))


class TestConvLoRA:
    @pytest.mark.parametrize("kernel_size", [1, 3, 5])
    def test_is_the_formula_and_starts_as_the_identity(self, kernel_size):
        module = ConvLoRA(12, kernel_size=kernel_size)
        assert module.lora_a.shape == (8, 12, kernel_size, kernel_size)
        assert module.lora_b.shape == (12, 8, 1, 1)
        assert module.scaling == 2.0
        x = torch.randn(2, 12, 7, 7)
        assert torch.equal(module(x), x)
        filled(module)
        a, b = nn.Conv2d(12, 8, kernel_size, padding="same", bias=False), nn.Conv2d(8, 12, 1, bias=False)
        with torch.no_grad():
            a.weight.copy_(module.lora_a)
            b.weight.copy_(module.lora_b)
        torch.testing.assert_close(module(x), x + 2.0 * b(a(x)), rtol=1e-4, atol=1e-4)

    def test_gradients_at_the_start(self):
        module = ConvLoRA(6, rank=2, alpha=3)
        module(torch.randn(2, 6, 5, 5)).square().sum().backward()
        assert not module.lora_a.grad.any()
        assert module.lora_b.grad.abs().max() > 0

    def test_dtypes(self):
        module = filled(ConvLoRA(6, rank=2))
        x = torch.randn(2, 6, 5, 5)
        assert module(x.bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, module(x), rtol=3e-2, atol=0.5)
        twin = pickle.loads(pickle.dumps(module))
        assert torch.equal(twin(x), module(x))

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"channels": 0}, ValueError, "channels must be at least 1, got 0"),
            ({"channels": "8"}, TypeError, "channels must be an int, got str"),
            ({"rank": 0}, ValueError, r"rank must be in 1\.\.256, got 0"),
            ({"alpha": -1}, ValueError, "alpha must be positive, got -1"),
            ({"kernel_size": 2}, ValueError, "kernel_size must be odd and positive, got 2"),
            ({"kernel_size": 3.0}, TypeError, "kernel_size must be an int, got float"),
        ],
    )
    def test_refusals(self, arguments, error, message):
        with pytest.raises(error, match=f"^ConvLoRA: {message}"):
            ConvLoRA(**{"channels": 8} | arguments)

    def test_wrong_input(self):
        with pytest.raises(ValueError, match=r"x must have shape \(B, 8, H, W\), got \(2, 9, 3, 3\)"):
            ConvLoRA(8)(torch.randn(2, 9, 3, 3))
