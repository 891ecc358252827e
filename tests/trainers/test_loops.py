"""Loops that people write themselves: one process, each equal to the plain loop of `trained.train`."""

from __future__ import annotations

import copy

import pytest
import torch
import trained
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

every_kind = pytest.mark.parametrize("kind", trained.KINDS)


@pytest.fixture(autouse=True)
def _peft_where_it_is(request):
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("kind") == "peft":
        pytest.importorskip("peft", reason="peft is not installed")


class Lightning(nn.Module):
    """A module in the manner of PyTorch Lightning: it has its steps and its optimizer with it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def configure_optimizers(self):
        optimizer = trained.sgd(parameter for parameter in self.parameters() if parameter.requires_grad)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def training_step(self, batch):
        return trained.loss_of(self.model, *batch)

    def validation_step(self, batch):
        return trained.loss_of(self.model, *batch)


@every_kind
def test_a_loop_that_validates_under_inference_mode_between_its_steps(kind):
    batch = trained.data()
    alone = trained.made(kind)
    expected = trained.train(alone, *batch)
    module = Lightning(trained.made(kind))
    optimizer, schedule = module.configure_optimizers()
    gradients, losses = [], []
    for _ in range(2):
        # As Lightning's trainer: a check of validation comes first, and modes are set around it.
        modes = {inside: inside.training for inside in module.modules()}
        module.eval()
        with torch.inference_mode():
            losses.append(float(module.validation_step(batch)))
        for inside, mode in modes.items():
            inside.training = mode
        module.training_step(batch).backward()
        gradients.append({name: p.grad.clone() for name, p in trained.trainable(module.model).items()})
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=False)
    assert losses[1] < losses[0]
    trained.assert_trained_alike(module.model, gradients, alone, expected)
    saved = {"state_dict": copy.deepcopy(module.state_dict()), "optimizer": optimizer.state_dict()}
    other = Lightning(trained.made(kind, seed=9))
    assert other.load_state_dict(saved["state_dict"]).missing_keys == []
    other.configure_optimizers()[0].load_state_dict(saved["optimizer"])
    trained.assert_equal(trained.trainable(other), trained.trainable(module), 0.0)


@every_kind
def test_grad_scaler_on_a_cpu_in_float16(kind):
    images, classes = trained.data()

    def step(scaled: bool, factor: float = 1.0):
        model = trained.made(kind)
        named = trained.trainable(model)
        optimizer = trained.sgd(named.values())
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=256.0)
        with torch.autocast("cpu", torch.float16):
            loss = trained.loss_of(model, images, classes) * factor
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients = {name: parameter.grad.clone() for name, parameter in named.items()}
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
        before = {name: parameter.detach().clone() for name, parameter in named.items()}
        scaler.step(optimizer)
        scaler.update()
        return gradients, before, named, scaler

    (expected,) = trained.train(trained.made(kind), images, classes, steps=1)
    gradients, before, named, scaler = step(True)
    trained.assert_equal(gradients, expected, tolerance=5e-2)
    assert scaler.get_scale() == 256.0
    assert any(not torch.equal(before[name], parameter) for name, parameter in named.items())
    # What overflows is seen, and its step is left out.
    gradients, before, named, scaler = step(True, factor=1e30)
    assert scaler.get_scale() == 128.0
    assert all(torch.equal(before[name], parameter) for name, parameter in named.items())


@pytest.mark.parametrize("averaged", ["AveragedModel", "ModelEmaV3"])
@every_kind
def test_moving_averages(kind, averaged):
    model = trained.made(kind)
    if averaged == "AveragedModel":
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        update = ema.update_parameters
        # The first update copies.
        update(model)
    else:
        timm_utils = pytest.importorskip("timm.utils", reason="timm is not installed")
        ema = timm_utils.ModelEmaV3(model, decay=0.5)
        update = ema.update
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(2):
        trained.train(model, *trained.data(), steps=1)
        update(model)
        for name, parameter in model.named_parameters():
            expected[name] += 0.5 * (parameter.detach() - expected[name])
    trained.assert_equal(dict(ema.module.named_parameters()), expected, 1e-6)
    moved = trained.trainable(model)
    assert any(not torch.equal(expected[name], parameter) for name, parameter in moved.items())
    # The average is a model of the same kind, which computes what its numbers say.
    assert [type(inside) for inside in ema.module.modules()] == [type(inside) for inside in model.modules()]
    images, _ = trained.data()
    loaded = trained.made(kind, seed=9).eval()
    loaded.load_state_dict(ema.module.state_dict())
    torch.testing.assert_close(ema.module.eval()(images), loaded(images))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", ["lora", "everything", "peft"])
def test_activation_checkpointing_draws_the_same_dropout(kind, use_reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = trained.made(kind, dropout=0.3)
        if checkpointed:
            trained.checkpoint_blocks(model, use_reentrant)
        torch.manual_seed(1)
        gradients += trained.train(model, *trained.data(), steps=1)
    # Where a tensor has several uses, the order in which their gradients are added may differ.
    trained.assert_equal(gradients[1], gradients[0], 1e-6)
    torch.manual_seed(2)
    (others,) = trained.train(trained.made(kind, dropout=0.3), *trained.data(), steps=1)
    with pytest.raises(AssertionError, match="differs by"):
        trained.assert_equal(others, gradients[0])


@pytest.mark.parametrize("kind", ["everything", "peft"])
def test_compiled_whole(kind):
    torch._dynamo.reset()
    model, alone = trained.made(kind), trained.made(kind)
    expected = trained.train(alone, *trained.data())
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = trained.train(whole, *trained.data())
    trained.assert_trained_alike(whole, gradients, alone, expected)
