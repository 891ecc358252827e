"""`pyfused.diagnostics.check`: every row passes on a sound model, and falls for its own fault."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyfused import BottleneckAdapter, LoRALinear, ScaledCrossAttention, inject_lora
from pyfused.diagnostics import CheckReport, check


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.norm(x)
        return x + self.mlp(x + self.attn(x, x, x, need_weights=False)[0])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(nn.functional.dropout(self.block(x), 0.1, self.training).mean(1))


def loss_of(y):
    return y.square().mean()


def adapted(target="all-linear", train=("head",)) -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor]:
    torch.manual_seed(0)
    model = Model()
    inject_lora(model, target, rank=2, train=train)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    return model, optimizer, torch.randn(2, 4, 8)


def verdict(report: CheckReport, name: str) -> str:
    return next(row.verdict for row in report.rows if row.name == name)


def finding(report: CheckReport, name: str) -> str:
    return next(row.finding for row in report.rows if row.name == name)


def test_a_sound_model_passes_every_row():
    model, optimizer, x = adapted()
    report = check(model, x, loss_fn=loss_of, optimizer=optimizer)
    assert [row.name for row in report.rows if row.verdict != "pass"] == []
    assert [row.name for row in report.rows] == [
        "adapters", "attention adapted", "backbone frozen", "trainable share", "head", "finite parameters", "called",
        "finite output", "finite loss", "gradients reach every adapter", "gradient norm", "optimizer holds what trains",
        "a step moves every adapter", "learning rate",
    ]  # fmt: skip
    assert report.passed
    assert finding(report, "called") == "4 of 4 ran"
    assert str(report).splitlines()[0].split() == ["verdict", "check", "finding"]


def test_a_forward_alone_leaves_out_what_needs_a_loss():
    model, _, x = adapted()
    report = check(model, x)
    assert report.rows[-1].name == "finite output"


def test_everything_is_as_it_was():
    model, optimizer, x = adapted()
    model.train()
    loss_of(model(x)).backward()
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    state = copy.deepcopy(optimizer.state_dict())
    generator = torch.get_rng_state()
    check(model, x, loss_fn=loss_of, optimizer=optimizer)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, p in model.named_parameters():
        assert (p.grad is None) == (grads[name] is None), name
        assert p.grad is None or torch.equal(p.grad, grads[name]), name
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    for key, held in state["state"].items():
        assert all(torch.equal(after["state"][key][name], value) for name, value in held.items())
    assert all(not module._forward_pre_hooks or module in loras(model) for module in model.modules())


def loras(model):
    return [module for module in model.modules() if hasattr(module, "lora_settings")]


def test_a_failing_forward_leaves_no_trace():
    model, optimizer, x = adapted()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises((RuntimeError, ValueError)):
        check(model, x[..., :5], loss_fn=loss_of, optimizer=optimizer)
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]


def test_no_adapters():
    report = check(nn.Linear(2, 2), torch.randn(1, 2))
    assert verdict(report, "adapters") == "fail"
    assert not report.passed


def test_a_module_that_is_never_called():
    model, _, x = adapted()
    model.spare = LoRALinear.from_linear(nn.Linear(8, 8), rank=2)
    report = check(model, x, loss_fn=loss_of)
    assert verdict(report, "called") == "fail"
    assert finding(report, "called") == "1 of 5 were never called, so they would never train: spare"
    assert "spare.lora_b" in finding(report, "gradients reach every adapter")


def test_a_module_that_is_frozen_need_not_run():
    model, _, x = adapted()
    model.spare = LoRALinear.from_linear(nn.Linear(8, 8), rank=2).requires_grad_(False)
    assert check(model, x).passed


def test_attention_left_out():
    model, _, x = adapted("mlp")
    report = check(model, x)
    assert verdict(report, "attention adapted") == "warn"
    assert finding(report, "attention adapted") == "0 of 1 attention layers carry LoRA"


def test_a_weight_that_trains_under_its_lora():
    model, _, x = adapted()
    model.block.mlp[0].weight.requires_grad_(True)
    report = check(model, x)
    assert verdict(report, "backbone frozen") == "fail"
    assert "block.mlp.0.weight" in finding(report, "backbone frozen")


def test_what_else_trains_is_named():
    model, _, x = adapted()
    assert "head.weight, head.bias" in finding(check(model, x), "backbone frozen")


def test_shares():
    model, _, x = adapted()
    assert verdict(check(model.requires_grad_(False), x), "trainable share") == "fail"
    assert verdict(check(model.requires_grad_(True), x), "trainable share") == "warn"


def test_a_frozen_head():
    model, _, x = adapted(train=())
    report = check(model, x)
    assert verdict(report, "head") == "warn"
    assert "train=('head',)" in finding(report, "head")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite(value):
    model, _, x = adapted()
    with torch.no_grad():
        model.head.weight[0, 0] = value
    report = check(model, x, loss_fn=loss_of)
    assert [row.name for row in report.failed] == [
        "finite parameters", "finite output", "finite loss", "gradient norm",
    ]  # fmt: skip
    assert "head.weight" in finding(report, "finite parameters")


def test_a_gradient_that_does_not_arrive():
    model, optimizer, x = adapted()
    model.block.mlp[0].register_forward_hook(lambda module, args, y: y.detach())
    report = check(model, x, loss_fn=loss_of, optimizer=optimizer)
    # What goes into the attention reaches the loss through this layer alone, too.
    assert finding(report, "gradients reach every adapter") == (
        "3 of 4 have none, or zeros alone: block.attn.in_proj_lora_b, block.attn.out_proj.lora_b, block.mlp.0.lora_b"
    )
    assert verdict(report, "a step moves every adapter") == "fail"


def test_a_gradient_of_zeros_is_none():
    model, _, x = adapted()
    model.block.mlp[2].register_forward_hook(lambda module, args, y: 0.0 * y)
    report = check(
        model, x, loss_fn=lambda y: loss_of(y) + y.sum(), optimizer=torch.optim.SGD(model.parameters(), 1e-2)
    )
    assert finding(report, "gradients reach every adapter").startswith("4 of 4 have none, or zeros alone")
    assert verdict(report, "a step moves every adapter") == "fail"


def test_a_loss_without_a_gradient():
    model, _, x = adapted()
    report = check(model, x, loss_fn=lambda y: y.detach().sum())
    assert verdict(report, "gradients reach every adapter") == "fail"
    assert verdict(report, "gradient norm") == "warn"


def test_a_large_gradient():
    model, _, x = adapted()
    assert verdict(check(model, x, loss_fn=lambda y: 1e6 * loss_of(y)), "gradient norm") == "warn"


def test_an_optimizer_without_some_parameters():
    model, _, x = adapted()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=1e-2)
    report = check(model, x, loss_fn=loss_of, optimizer=optimizer)
    assert verdict(report, "optimizer holds what trains") == "fail"
    assert verdict(report, "a step moves every adapter") == "fail"


def test_a_rate_of_zero_moves_nothing():
    model, _, x = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    assert verdict(check(model, x, loss_fn=loss_of, optimizer=optimizer), "a step moves every adapter") == "fail"


@pytest.mark.parametrize(
    ("kind", "rate", "expected"),
    [("AdamW", 2e-4, "pass"), ("AdamW", 1e-1, "warn"), ("Adam", 1e-6, "warn"), ("SGD", 1e-1, "pass")],
)
def test_rates(kind, rate, expected):
    model, _, x = adapted()
    optimizer = getattr(torch.optim, kind)([p for p in model.parameters() if p.requires_grad], lr=rate)
    assert verdict(check(model, x, loss_fn=loss_of, optimizer=optimizer), "learning rate") == expected


def test_layer_scale_too_small():
    model = nn.Sequential(BottleneckAdapter(8, layer_scale=1e-5))
    report = check(model, torch.randn(2, 8))
    assert verdict(report, "layer-scale") == "warn"
    assert "1 of 1 adapters stand behind a gamma below 0.0001" in finding(report, "layer-scale")
    assert finding(report, "layer-scale").endswith("start gamma larger")
    model[0].gamma.requires_grad_(False)
    assert finding(check(model, torch.randn(2, 8)), "layer-scale").endswith("start gamma larger, or let it train")
    nn.init.ones_(model[0].gamma)
    assert verdict(check(model, torch.randn(2, 8)), "layer-scale") == "pass"


def test_layer_scale_of_an_adapted_block():
    timm = pytest.importorskip("timm")
    from pyfused.models import add_adapters

    model = timm.create_model("fastvit_t8", num_classes=3)
    add_adapters(model)
    report = check(model.eval(), torch.randn(1, 3, 64, 64))
    assert verdict(report, "layer-scale") == "warn"


def test_other_adapters_are_asked_as_a_whole():
    torch.manual_seed(0)
    crossing = ScaledCrossAttention(8, 8, num_heads=2, head_dim=4)
    inputs = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    optimizer = torch.optim.SGD(crossing.parameters(), lr=1e-2)
    report = check(crossing, *inputs, loss_fn=loss_of, optimizer=optimizer)
    # k_proj's bias has a gradient of zero: softmax does not see it.
    assert report.passed
    assert finding(report, "gradients reach every adapter") == "1 of 1 B or adapters have one"


def test_a_method_and_keywords():
    model, _, x = adapted()
    assert check(model.forward, {"x": x}).passed


class TestBadInput:
    def test_model(self):
        with pytest.raises(TypeError, match=r"check: model must be an nn.Module or a method of one, got function"):
            check(lambda x: x, torch.randn(2))

    def test_optimizer(self):
        model, optimizer, x = adapted()
        with pytest.raises(ValueError, match="optimizer needs loss_fn"):
            check(model, x, optimizer=optimizer)
        with pytest.raises(ValueError, match="optimizer must step without a closure, got LBFGS"):
            check(model, x, loss_fn=loss_of, optimizer=torch.optim.LBFGS(model.head.parameters()))
        with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got str"):
            check(model, x, loss_fn=loss_of, optimizer="adam")

    def test_loss(self):
        model, _, x = adapted()
        with pytest.raises(TypeError, match=r"loss_fn must return a torch.Tensor, got float"):
            check(model, x, loss_fn=lambda y: 1.0)
        with pytest.raises(ValueError, match=r"loss_fn must return a scalar, got shape \(2, 3\)"):
            check(model, x, loss_fn=lambda y: y)


class TestNoTrace:
    """What a step could leave behind, besides the model's own parameters and gradients."""

    def test_recomputed_batchnorms(self):
        class Recomputed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm, self.proj = nn.BatchNorm1d(8), nn.Linear(8, 8)

            def forward(self, x):
                return checkpoint(lambda y: self.proj(self.norm(y)), x, use_reentrant=False)

        model = Recomputed().train()
        inject_lora(model, rank=2, freeze_batchnorm=False)
        before = copy.deepcopy(model.norm.state_dict())
        assert check(model, torch.randn(4, 8), loss_fn=loss_of).passed
        assert all(torch.equal(value, before[name]) for name, value in model.norm.state_dict().items())

    def test_a_buffer_that_is_replaced(self):
        class Counts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.proj = nn.Linear(8, 8)
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, x):
                self.calls = self.calls + 1
                return self.proj(x)

        model = Counts()
        inject_lora(model, rank=2)
        buffer = model.calls
        check(model, torch.randn(4, 8))
        assert model.calls is buffer
        assert buffer == 0

    def test_the_loss(self):
        model, _, x = adapted()
        criterion = nn.Linear(3, 3)
        optimizer = torch.optim.AdamW([*(p for p in model.parameters() if p.requires_grad), *criterion.parameters()])
        weight, generator = criterion.weight.detach().clone(), torch.get_rng_state()
        x.requires_grad_()

        def loss(y):
            return criterion(y + torch.randn_like(y)).square().mean()

        assert check(model, x, loss_fn=loss, optimizer=optimizer).passed
        assert torch.equal(torch.get_rng_state(), generator)
        assert criterion.weight.grad is None
        assert x.grad is None
        assert torch.equal(criterion.weight, weight)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_under_another_grad_mode(self, mode):
        model, optimizer, x = adapted()
        with mode():
            assert check(model, x, loss_fn=loss_of, optimizer=optimizer).passed


def test_odd_models():
    model, _, x = adapted()
    model.register_parameter("scale", nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False))
    assert check(model, x).passed
    nn.utils.parametrize.register_parametrization(model.block.mlp[0], "weight", nn.Identity())
    assert check(model, x).passed


def test_a_head_that_carries_lora_alone_is_frozen():
    torch.manual_seed(0)
    model = Model()
    inject_lora(model, ["mlp", "head"], rank=2)
    assert verdict(check(model, torch.randn(2, 4, 8)), "head") == "warn"
