"""timm's FastViT with adapters: systems.md, section 1, on timm's own blocks, and whole models."""

from __future__ import annotations

import copy
import io
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from models_setup import fastvit, fastvit_block, small_vit
from oracle import assert_within, randn
from torch import nn

pytest.importorskip("timm", reason="timm is not installed")

from timm.layers import DropPath
from timm.models.fastvit import AttentionBlock, FastVitStage, RepMixerBlock

from pyfused import explain
from pyfused.models import AttentionBlockAdapter, ConvLoRAStage, RepMixerBlockAdapter, add_adapters
from pyfused.modules import BottleneckAdapter, ConvLoRA

KINDS = {"RepMixerBlock": RepMixerBlockAdapter, "AttentionBlock": AttentionBlockAdapter}
# The sites of each block: the branch's modules, then its adapter, layer-scale and drop-path.
SITES = {
    "RepMixerBlock": [("mlp", "adapter", "layer_scale", "drop_path")],
    "AttentionBlock": [
        ("norm token_mixer", "adapter_1", "layer_scale_1", "drop_path1"),
        ("mlp", "adapter_2", "layer_scale_2", "drop_path2"),
    ],
}
both = pytest.mark.parametrize("kind", KINDS)


def adapted_block(kind: str, channels: int = 32, drop_path: float = 0.0, **settings) -> nn.Module:
    """An adapted block whose adapters act, every parameter of which trains."""
    block = KINDS[kind].from_block(fastvit_block(kind, channels, drop_path), freeze=False, **settings)
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, BottleneckAdapter):
                for parameter in module.parameters():
                    parameter.copy_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
    return block


def adapter_by_convolutions(adapter: BottleneckAdapter, f: torch.Tensor, phi=F.gelu) -> torch.Tensor:
    down = F.conv2d(f, adapter.down_weight[:, :, None, None], adapter.down_bias)
    return adapter.skip * f + F.conv2d(phi(down), adapter.up_weight[:, :, None, None], adapter.up_bias)


def eager(block: nn.Module, x: torch.Tensor, broken: bool = False, phi=F.gelu) -> torch.Tensor:
    """The block by timm's own modules and torch's convolutions, in the right order or the broken one."""
    kind = block.base_class.__name__
    if kind == "RepMixerBlock":
        x = block.token_mixer(x)
    for path, *names in SITES[kind]:
        adapter, scale, drop = (block.get_submodule(name) for name in names)
        f = x
        for name in path.split():
            f = block.get_submodule(name)(f)
        branch = (
            adapter_by_convolutions(adapter, scale(f)) if broken else scale(adapter_by_convolutions(adapter, f, phi))
        )
        x = x + drop(branch)
    return x


def run(block: nn.Module, function, x: torch.Tensor, seed: int = 3) -> dict[str, torch.Tensor]:
    """y, dx, df of every frozen branch and the gradients of gamma, D, d, U and u, under one drop-path mask."""
    branches = {}
    handles = [
        block.get_submodule(path.split()[-1]).register_forward_hook(
            lambda _, __, f, name=f"df_{names[0]}": branches.__setitem__(name, f)
        )
        for path, *names in SITES[block.base_class.__name__]
    ]
    parameters = {
        f"d{name}": p for name, p in block.named_parameters() if "adapter" in name or name.startswith("layer_scale")
    }
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    y = function(x)
    for handle in handles:
        handle.remove()
    wanted = {"dx": x} | branches | parameters
    gradients = torch.autograd.grad(y, list(wanted.values()), randn(*y.shape, dtype=y.dtype, seed=9))
    return {"y": y.detach()} | dict(zip(wanted, gradients, strict=True))


class TestBlock:
    @both
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("drop_path", [0.0, 0.5])
    @pytest.mark.parametrize("skip", [True, False])
    def test_parity_of_output_and_every_gradient(self, kind, dtype, drop_path, skip):
        block = adapted_block(kind, 32, drop_path, skip=skip).to(dtype).train()
        x = randn(6, 32, 7, 7, dtype=dtype)
        if drop_path:
            torch.manual_seed(3)
            mask = DropPath(drop_path)(torch.ones(6, 1))
            assert 0 < (mask == 0).sum() < 6
        actual, plain = run(block, block, x), run(block, lambda x: eager(block, x), x)
        exact_block = copy.deepcopy(block).double()
        oracle = run(exact_block, lambda x: eager(exact_block, x), x.double())
        sites = SITES[kind]
        assert len(actual) == 2 + 6 * len(sites)
        assert all(value.abs().max() > 0 for value in oracle.values())
        assert_within(actual, plain, oracle, dtype)

    @both
    @pytest.mark.parametrize(("channels", "size"), [(48, 7), (76, 5), (80, 4), (32, 1)])
    def test_odd_channels_and_sizes(self, kind, channels, size):
        if kind == "AttentionBlock" and channels % 32:
            channels = 32 * (channels // 32)
        block = adapted_block(kind, channels, hidden=8).double()
        x = randn(2, channels, size, size, dtype=torch.float64)
        for layout in (torch.contiguous_format, torch.channels_last):
            actual = run(block, block, x.to(memory_format=layout))
            for name, expected in run(block, lambda x: eager(block, x), x).items():
                torch.testing.assert_close(actual[name], expected, rtol=1e-9, atol=1e-9)

    @both
    def test_the_branch_is_linear_in_gamma(self, kind):
        block = adapted_block(kind).double().eval()
        name = SITES[kind][-1][2]
        gamma = block.get_submodule(name).gamma
        x = randn(2, 32, 7, 7, dtype=torch.float64)
        streams = {}
        with torch.no_grad():
            # The stream that enters the last branch is what the block gives without it.
            for factor in (0.0, 1.0, 2.0):
                saved = gamma.clone()
                gamma.mul_(factor)
                streams[factor] = block(x)
                gamma.copy_(saved)
            single, double = streams[1.0] - streams[0.0], streams[2.0] - streams[0.0]
            torch.testing.assert_close(double, 2 * single, rtol=1e-12, atol=1e-12)
            assert single.abs().max() > 0.1
            broken = eager(block, x, broken=True)
        assert (broken - streams[1.0]).abs().max() > 1e-2

    def test_gamma_zero_gives_the_residual(self):
        block = adapted_block("RepMixerBlock")
        nn.init.zeros_(block.layer_scale.gamma)
        x = randn(2, 32, 7, 7)
        with torch.no_grad():
            assert torch.equal(block(x), block.token_mixer(x))
        block = adapted_block("AttentionBlock")
        for scale in (block.layer_scale_1, block.layer_scale_2):
            nn.init.zeros_(scale.gamma)
        with torch.no_grad():
            assert torch.equal(block(x), x)

    @both
    @pytest.mark.parametrize("layer_scale", [None, 1e-5, 1e-6, 0.5])
    def test_a_fresh_adapter_reproduces_timms_block(self, kind, layer_scale):
        options = {} if layer_scale == 0.5 else {"layer_scale_init_value": layer_scale}
        block = fastvit_block(kind, 64, 0.3, **options)
        adapted = KINDS[kind].from_block(block)
        x = randn(5, 64, 7, 7)
        with torch.no_grad():
            expected, y = block(x), adapted(x)
            assert (y - expected).norm() <= 1e-6 * expected.norm()
            # Under one mask in training too: the draws are timm's.
            block.train()
            torch.manual_seed(11)
            expected = block(x)
            torch.manual_seed(11)
            y = adapted.train()(x)
        assert (y - expected).norm() <= 1e-6 * expected.norm()
        without = KINDS[kind].from_block(fastvit_block(kind, 64), skip=False)
        assert (without(x) - fastvit_block(kind, 64)(x)).norm() > 1e-2

    @both
    def test_eval_ignores_the_mask(self, kind):
        block = adapted_block(kind, drop_path=0.9)
        x = randn(4, 32, 5, 5)
        with torch.no_grad():
            assert torch.equal(block(x), block(x))
            state = torch.get_rng_state()
            torch.testing.assert_close(block(x), eager(block, x), rtol=1e-4, atol=1e-4)
            assert torch.equal(torch.get_rng_state(), state)
            dropped = [block.train()(x) for _ in range(4)]
        assert any(not torch.equal(y, dropped[0]) for y in dropped)

    def test_erf_and_tanh_gelu_are_told_apart(self):
        block, tanh = adapted_block("RepMixerBlock").double(), lambda h: F.gelu(h, approximate="tanh")
        x = randn(2, 32, 7, 7, dtype=torch.float64)
        with torch.no_grad():
            erf = block(x)
            block.adapter.activation = "gelu_tanh"
            approximate = block(x)
            torch.testing.assert_close(erf, eager(block, x), rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(approximate, eager(block, x, phi=tanh), rtol=1e-10, atol=1e-10)
            assert (erf - approximate).abs().max() > 1e-5

    @both
    @pytest.mark.parametrize("adapter_half", [False, True])
    def test_gamma_of_1e_6_survives_float16(self, kind, adapter_half):
        block = adapted_block(kind)
        with torch.no_grad():
            for _, _, scale, _ in SITES[kind]:
                block.get_submodule(scale).gamma.fill_(1e-6)
        exact_block = copy.deepcopy(block).double()
        x = randn(8, 32, 7, 7, dtype=torch.float16)
        oracle = run(exact_block, lambda x: eager(exact_block, x), x.double())
        block.half()
        for _, adapter, scale, _ in SITES[kind]:
            gamma = block.get_submodule(scale).gamma
            assert gamma.dtype == torch.float32
            assert (gamma == 1e-6).all()
            if not adapter_half:
                block.get_submodule(adapter).float()
        actual = run(block, block, x)
        for _, adapter, scale, _ in SITES[kind]:
            for name in (f"d{adapter}.down_weight", f"d{adapter}.up_weight", f"d{adapter}.up_bias", f"d{scale}.gamma"):
                assert actual[name].abs().max() > 0, name
                # A float16 gradient of 1e-6 keeps four bits.
                bound = 0.1 if adapter_half and "gamma" not in name else 0.02
                error = (actual[name].double() - oracle[name]).norm() / oracle[name].norm()
                assert error < bound, name

    @both
    def test_keys_stay_and_old_checkpoints_load(self, kind):
        block = fastvit_block(kind, 32, 0.1)
        adapted = KINDS[kind].from_block(block)
        added = {f"{site[1]}.{name}" for site in SITES[kind] for name in BottleneckAdapter(32).state_dict()}
        assert set(adapted.state_dict()) == set(block.state_dict()) | added
        assert {name for name, _ in adapted.named_children()} >= {name for name, _ in block.named_children()}
        other = fastvit_block(kind, 32, 0.1)
        missing, unexpected = adapted.load_state_dict(other.state_dict(), strict=False)
        assert (set(missing), unexpected) == (added, [])
        x = randn(2, 32, 7, 7)
        torch.testing.assert_close(adapted(x), other(x), rtol=1e-5, atol=1e-5)

    @both
    def test_copies_and_pickles(self, kind):
        block = adapted_block(kind, drop_path=0.2)
        frozen = KINDS[kind].from_block(fastvit_block(kind))
        x = randn(2, 32, 5, 5)
        for module in (block, frozen):
            buffer = io.BytesIO()
            torch.save(module, buffer)
            buffer.seek(0)
            for twin in (
                copy.deepcopy(module),
                pickle.loads(pickle.dumps(module)),
                torch.load(buffer, weights_only=False),
            ):
                assert torch.equal(twin(x), module(x))
                assert type(twin) is type(module)
                twin.train()
                norms = [m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]
                assert {m.training for m in norms} == {module is block}
                assert all(m not in set(module.modules()) for m in norms)

    @both
    def test_freezing(self, kind):
        block = fastvit_block(kind)
        adapted = KINDS[kind].from_block(block)
        assert isinstance(adapted, (RepMixerBlock, AttentionBlock))
        assert adapted.mlp is block.mlp
        assert {n for n, p in adapted.named_parameters() if p.requires_grad} == {
            n for n, _ in adapted.named_parameters() if "adapter" in n
        }
        buffers = copy.deepcopy(dict(adapted.named_buffers()))
        adapted.train()(randn(2, 32, 5, 5)).sum().backward()
        assert all(torch.equal(b, buffers[n]) for n, b in adapted.named_buffers())
        moving = KINDS[kind].from_block(fastvit_block(kind), freeze_batchnorm=False).train()
        before = copy.deepcopy(dict(moving.named_buffers()))
        moving(randn(2, 32, 5, 5))
        assert all(not torch.equal(b, before[n]) for n, b in moving.named_buffers())

    @both
    def test_compiles_whole(self, kind):
        block = adapted_block(kind, drop_path=0.5)
        x = randn(2, 32, 5, 5)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-4)

    def test_interpreted_kernel_in_a_block(self):
        from pyfused.choice.backends import TRITON_INTERPRETED, TRITON_REFUSAL
        from pyfused.modules import adapter as module

        if TRITON_REFUSAL is not None or not TRITON_INTERPRETED:
            pytest.skip("needs Triton's interpreter")
        block = adapted_block("RepMixerBlock", 32, 0.5, hidden=8).train()
        x = randn(3, 32, 3, 3)
        portable, original = run(block, block, x), module.adapter_residual
        try:
            module.adapter_residual = lambda *args, **kwargs: original(*args, **kwargs, backend="triton")
            interpreted = run(block, block, x)
        finally:
            module.adapter_residual = original
        for name, expected in portable.items():
            torch.testing.assert_close(interpreted[name], expected, rtol=1e-3, atol=1e-3)


class TestBlockRefusals:
    @pytest.mark.parametrize("other", [nn.Linear(4, 4), "AttentionBlock", object()])
    def test_another_class(self, other):
        other = fastvit_block(other) if isinstance(other, str) else other
        with pytest.raises(TypeError, match=rf"from_block: expected timm's RepMixerBlock, got {type(other).__name__}$"):
            RepMixerBlockAdapter.from_block(other)

    def test_already_adapted_and_replaced_parts(self):
        adapted = RepMixerBlockAdapter.from_block(fastvit_block("RepMixerBlock"))
        with pytest.raises(ValueError, match="got a RepMixerBlockAdapter: already adapted"):
            RepMixerBlockAdapter.from_block(adapted)
        with pytest.raises(TypeError, match="is made from a block"):
            RepMixerBlockAdapter(32)
        with pytest.raises(TypeError, match="is made from a block"):
            AttentionBlockAdapter(32)

        class Mine(RepMixerBlock):
            def forward(self, x):
                return x

        with pytest.raises(TypeError, match="with timm's forward, got Mine"):
            RepMixerBlockAdapter.from_block(Mine(32))
        block = fastvit_block("AttentionBlock")
        block.layer_scale_2 = nn.BatchNorm2d(32)
        with pytest.raises(
            TypeError, match=r"layer_scale_2 must be timm's LayerScale2d or nn\.Identity, got BatchNorm2d"
        ):
            AttentionBlockAdapter.from_block(block)
        block = fastvit_block("AttentionBlock")
        block.drop_path1 = nn.Dropout(0.1)
        with pytest.raises(TypeError, match=r"drop_path1 must be timm's DropPath or nn\.Identity, got Dropout"):
            AttentionBlockAdapter.from_block(block)

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"reduction": -1}, ValueError, "reduction must be positive"),
            ({"skip": "yes"}, TypeError, "skip must be a Python number"),
            ({"hidden": 1.5}, TypeError, "hidden must be an int"),
            ({"activation": "tanh"}, ValueError, "activation must be one of"),
            ({"dropout": 2}, ValueError, "dropout must be in"),
            ({"adapter_dtype": torch.int64}, TypeError, "dtype must be one of"),
        ],
    )
    def test_settings(self, settings, error, message):
        block = fastvit_block("RepMixerBlock")
        with pytest.raises(error, match=rf"RepMixerBlockAdapter\.from_block: {message}"):
            RepMixerBlockAdapter.from_block(block, **settings)
        assert all(p.requires_grad for p in block.parameters())

    def test_wrong_input_channels(self):
        adapted = RepMixerBlockAdapter.from_block(fastvit_block("RepMixerBlock"))
        with pytest.raises(RuntimeError):
            adapted(torch.randn(1, 31, 5, 5))


@pytest.fixture(scope="module")
def sa12() -> nn.Module:
    torch.manual_seed(0)
    return fastvit("fastvit_sa12", drop_path_rate=0.2)


class TestModel:
    @pytest.mark.parametrize("conv_lora_rank", [None, 8])
    def test_fresh_adapters_change_nothing(self, sa12, conv_lora_rank):
        model = copy.deepcopy(sa12)
        x = randn(2, 3, 64, 64)
        with torch.no_grad():
            expected = model(x)
            report = add_adapters(model, conv_lora_rank=conv_lora_rank)
            y = model(x)
        assert (y - expected).norm() <= 1e-6 * expected.norm()
        assert (report.total, report.repmixer_blocks, report.attention_blocks) == (12, 10, 2)
        assert report.stages == (4 if conv_lora_rank else 0)
        assert all(isinstance(stage, ConvLoRAStage) == (conv_lora_rank == 8) for stage in model.stages)

    def test_stages_are_drawn_before_blocks(self, sa12):
        """One seed gives the numbers that it gave before."""
        models = [copy.deepcopy(sa12) for _ in range(2)]
        for model, exclude in zip(models, ((), tuple(f"stages.{i}.blocks" for i in range(4))), strict=True):
            torch.manual_seed(0)
            add_adapters(model, conv_lora_rank=2, exclude=exclude)
        drawn = [dict(model.named_parameters()) for model in models]
        names = [name for name in drawn[1] if "lora_a" in name]
        assert len(names) == 4
        assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in names)

    def test_the_original_form_starts_without_the_frozen_branches(self):
        model = fastvit("fastvit_t8", layer_scale_init_value=1.0)
        without = copy.deepcopy(model)
        add_adapters(without, skip=False)
        for stage in model.stages:
            for block in stage.blocks:
                nn.init.zeros_(block.layer_scale.gamma)
        x = randn(2, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(without(x), model(x))

    def test_report(self, sa12):
        model = copy.deepcopy(sa12)
        before = sum(p.numel() for p in model.parameters())
        report = add_adapters(model, conv_lora_rank=8, train=["head"])
        adapters = {(64, 2), (128, 2), (256, 6), (512, 4)}
        expected = sum(n * (2 * c * (c // 2) + c // 2 + c) for c, n in adapters)
        convolutions = sum(8 * c * 9 + 8 * c for c in (64, 128, 256, 512))
        assert report.adapter_parameters == expected + convolutions
        head = sum(p.numel() for p in model.head.parameters())
        assert report.trainable_parameters == report.adapter_parameters + head
        assert report.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert report.total_parameters == before + report.adapter_parameters
        assert report.trainable_percent == pytest.approx(100 * report.trainable_parameters / report.total_parameters)
        assert [(row.hidden, row.channels) for row in report.rows if row.path == "stages.2.blocks.5.adapter"] == [
            (128, 256)
        ]
        lines = str(report).splitlines()
        assert ["stages.3.blocks.*.adapter_1", "AttentionBlock", "512", "256", "2", "525,824"] in map(str.split, lines)
        assert "adapted blocks        12 = 10 RepMixer + 2 attention, and 4 stages with ConvLoRA" in lines
        assert any(line.startswith("note: ") and "BatchNorm" in line for line in lines)

    def test_frozen_batchnorms_do_not_move(self):
        x = randn(2, 3, 64, 64)
        plain = fastvit("fastvit_t8").requires_grad_(False)
        model = copy.deepcopy(plain)
        before = copy.deepcopy(dict(plain.named_buffers()))
        plain.train()(x)
        # The reason for the default: a frozen backbone in training mode is not left as it was.
        assert sum(not torch.equal(b, before[name]) for name, b in plain.named_buffers()) == 210
        add_adapters(model)
        model.train()(x).sum().backward()
        assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
        assert sum(p.grad is not None for p in model.parameters()) == 4 * 10
        moving = fastvit("fastvit_t8")
        report = add_adapters(moving, freeze_batchnorm=False)
        assert report.notes == ()
        before = copy.deepcopy(dict(moving.named_buffers()))
        moving.train()(x)
        assert sum(not torch.equal(b, before[name]) for name, b in moving.named_buffers()) == 210

    def test_training_moves_the_adapters_alone(self):
        # float64 shows a step however small: at random weights the branches hardly act.
        model = fastvit("fastvit_t8", drop_path_rate=0.2, layer_scale_init_value=1.0).double()
        add_adapters(model, train=["head"], conv_lora_rank=4)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.05)
        x, labels = randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
        losses = []
        model.train()
        for _ in range(3):
            loss = F.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        expected = {n for n in before if "adapter" in n or "conv_lora" in n or n.startswith("head.")}
        assert moved == expected

    def test_train_and_exclude_paths(self):
        model = fastvit("fastvit_t8")
        report = add_adapters(
            model, train=["stages.3", "stages.1.blocks.0.layer_scale.gamma"], exclude=["stages.0"], conv_lora_rank=2,
            train_layer_scale=False,
        )  # fmt: skip
        assert report.total == 6
        assert {row.path.split(".")[1] for row in report.rows} == {"1", "2"}
        assert all(p.requires_grad for p in model.stages[3].parameters())
        norms = [m for m in model.train().modules() if isinstance(m, nn.BatchNorm2d)]
        in_stage = {id(m) for m in model.stages[3].modules()}
        assert all(m.training == (id(m) in in_stage) for m in norms)
        assert type(model.stages[3]) is type(model.stages[0]) is FastVitStage
        gammas = [n for n, p in model.named_parameters() if n.endswith("gamma") and p.requires_grad]
        assert [n for n in gammas if not n.startswith("stages.3")] == ["stages.1.blocks.0.layer_scale.gamma"]

    def test_layer_scales_train_on_request(self):
        model = fastvit("fastvit_t8")
        add_adapters(model, train_layer_scale=True)
        gammas = {n for n, p in model.named_parameters() if n.endswith("gamma") and p.requires_grad}
        assert gammas == {
            f"stages.{i}.blocks.{j}.layer_scale.gamma" for i, n in enumerate((2, 2, 4, 2)) for j in range(n)
        }
        unfrozen = fastvit("fastvit_t8")
        add_adapters(unfrozen, freeze=False)
        assert all(p.requires_grad for p in unfrozen.parameters())

    def test_nested_in_a_model(self):
        tower = nn.Module()
        tower.trunk, tower.logit_scale = fastvit("fastvit_mci0"), nn.Parameter(torch.ones(()))
        model = nn.Module()
        model.visual = tower
        report = add_adapters(model, reduction=4, train=["visual.logit_scale"])
        assert report.attention_blocks > 0
        assert report.repmixer_blocks > 0
        assert all(row.path.startswith("visual.trunk.stages.") for row in report.rows)
        assert all(row.hidden == max(row.channels // 4, 8) for row in report.rows)
        assert tower.logit_scale.requires_grad
        with torch.no_grad():
            assert model.visual.trunk(randn(1, 3, 64, 64)).isfinite().all()

    def test_reparameterised(self, sa12):
        from timm.utils import reparameterize_model

        x = randn(2, 3, 64, 64)
        with torch.no_grad():
            expected = sa12(x)
            fused = reparameterize_model(sa12)
            report = add_adapters(fused)
            assert report.total == 12
            torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-4)
            # And an adapted model can be fused afterwards.
            model = copy.deepcopy(sa12)
            add_adapters(model)
            torch.testing.assert_close(reparameterize_model(model)(x), expected, rtol=1e-3, atol=1e-4)

    def test_state_dict_both_ways(self):
        torch.manual_seed(1)
        plain = fastvit("fastvit_t8")
        state = plain.state_dict()
        model = fastvit("fastvit_t8")
        add_adapters(model, conv_lora_rank=2)
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert unexpected == []
        assert all("adapter" in name or "conv_lora" in name for name in missing)
        assert set(model.state_dict()) == set(state) | set(missing)
        x = randn(1, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-6)
            for module in model.modules():
                if isinstance(module, BottleneckAdapter | ConvLoRA):
                    for parameter in module.parameters():
                        parameter.normal_()
            other = fastvit("fastvit_t8")
            add_adapters(other, conv_lora_rank=2)
            other.load_state_dict(model.state_dict())
            assert torch.equal(other(x), model(x))
            twin = pickle.loads(pickle.dumps(model))
            assert torch.equal(twin(x), model(x))
            assert not any(m.training for m in twin.train().modules() if isinstance(m, nn.BatchNorm2d))

    def test_gradient_checkpointing_gives_the_same_gradients(self):
        model = fastvit("fastvit_t8", drop_path_rate=0.5, layer_scale_init_value=1.0)
        add_adapters(model, conv_lora_rank=2)
        x = randn(2, 3, 64, 64)
        gradients = []
        for checkpointing in (False, True):
            model.set_grad_checkpointing(checkpointing)
            model.zero_grad()
            torch.manual_seed(5)
            model.train()(x).square().sum().backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, expected in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], expected)

    def test_explain_names_every_adapter(self):
        model = fastvit("fastvit_t8")
        report = add_adapters(model)
        calls = explain(model, randn(1, 3, 64, 64)).calls
        assert [call.module for call in calls] == [row.path for row in report.rows]
        assert [dict(call.shapes)["h"] for call in calls] == [row.hidden for row in report.rows]


class TestModelRefusals:
    def test_no_block_lists_near_class_names(self):
        model = small_vit()
        names = {name for name, _ in model.named_parameters()}
        with pytest.raises(ValueError, match=r"got a VisionTransformer with none; near class names: .*AttentionBlock"):
            add_adapters(model)
        assert {name for name, _ in model.named_parameters()} == names
        with pytest.raises(ValueError, match="near class names: none of Linear"):
            add_adapters(nn.Linear(3, 3))

    def test_twice(self):
        model = fastvit("fastvit_t8")
        add_adapters(model)
        with pytest.raises(ValueError, match=r"with none \(10 blocks carry adapters already\)"):
            add_adapters(model)

    def test_a_block_itself(self):
        with pytest.raises(ValueError, match=r"got a RepMixerBlock itself; use RepMixerBlockAdapter\.from_block"):
            add_adapters(fastvit_block("RepMixerBlock"))

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            (
                {"train": ["haed"]},
                ValueError,
                "train must hold dotted paths inside the model, got 'haed'; near names: head",
            ),
            ({"exclude": "stages.7"}, ValueError, r"exclude must hold dotted paths inside the model, got 'stages\.7'"),
            ({"train": [3]}, TypeError, "train must be a name or a sequence of names"),
            ({"reduction": 0}, ValueError, "reduction must be positive"),
            ({"conv_lora_rank": 0}, ValueError, "rank must be in"),
            ({"conv_lora_rank": 2, "conv_lora_kernel": 4}, ValueError, "kernel_size must be odd"),
            ({"activation": "swish"}, ValueError, "activation must be one of"),
            ({"exclude": ["stages"]}, ValueError, "outside train and exclude"),
        ],
    )
    def test_settings_leave_the_model_alone(self, settings, error, message):
        model = fastvit("fastvit_t8")
        with pytest.raises(error, match=message):
            add_adapters(model, **settings)
        assert all(p.requires_grad for p in model.parameters())
        assert {type(m) for m in model.modules()} == {type(m) for m in fastvit("fastvit_t8").modules()}

    def test_late_refusal_leaves_the_model_alone(self):
        model = fastvit("fastvit_t8")
        model.stages[3].blocks[1].drop_path = nn.Dropout()
        with pytest.raises(TypeError, match=r"add_adapters: stages\.3\.blocks\.1: drop_path must be timm's DropPath"):
            add_adapters(model, conv_lora_rank=2)
        assert not any(isinstance(m, BottleneckAdapter | ConvLoRA) for m in model.modules())

    def test_not_a_module(self):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
            add_adapters("fastvit_sa12")

    def test_stage(self):
        with pytest.raises(TypeError, match="expected timm's FastVitStage, got Linear"):
            ConvLoRAStage.from_stage(nn.Linear(2, 2))
        stage = ConvLoRAStage.from_stage(fastvit("fastvit_t8").stages[1], rank=2)
        assert {n for n, p in stage.named_parameters() if p.requires_grad} == {"conv_lora.lora_a", "conv_lora.lora_b"}
        with pytest.raises(ValueError, match="already adapted"):
            ConvLoRAStage.from_stage(stage)
        with pytest.raises(TypeError, match="is made from a stage"):
            ConvLoRAStage()

    def test_without_timm(self, monkeypatch):
        import pyfused.models

        for name in [name for name in sys.modules if name == "timm" or name.startswith("timm.")]:
            monkeypatch.setitem(sys.modules, name, None)
        for name in ("fastvit", "fastvit_blocks"):
            monkeypatch.delitem(sys.modules, f"pyfused.models.{name}")
            monkeypatch.delattr(pyfused.models, name)
        with pytest.raises(ImportError, match=r"pyfused\.models needs timm, 1\.0 or later"):
            pyfused.models.add_adapters  # noqa: B018
        with pytest.raises(AttributeError, match="has no attribute 'novel'"):
            pyfused.models.novel  # noqa: B018
