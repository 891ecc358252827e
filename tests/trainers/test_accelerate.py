"""accelerate: its loop in one process equals the plain loop, and its checkpoints hold what was added."""

from __future__ import annotations

import pytest
import torch
import trained

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

import pyfused  # noqa: E402

every_kind = pytest.mark.parametrize("kind", ["everything", "peft"])


@pytest.fixture
def accelerator():
    """Makes an accelerator; there is one state of theirs for the whole process."""

    def make(**options):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
        return accelerate.Accelerator(cpu=True, **options)

    yield make
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def prepared(accelerator, kind: str, **options):
    model = trained.made(kind, **options)
    return accelerator.prepare(model, trained.sgd(trained.trainable(model).values()))


def step(accelerator, model, optimizer, batch, clip: float | None = None) -> None:
    with accelerator.accumulate(model):
        with accelerator.autocast():
            loss = trained.loss_of(model, *batch)
        accelerator.backward(loss)
        if clip is not None and accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


@every_kind
def test_float32(accelerator, kind):
    alone = trained.made(kind)
    trained.train(alone, *trained.data())
    one = accelerator()
    model, optimizer = prepared(one, kind)
    for _ in range(2):
        step(one, model, optimizer, trained.data())
    trained.assert_equal(trained.trainable(one.unwrap_model(model)), trained.trainable(alone))


@every_kind
def test_bfloat16_is_autocast(accelerator, kind):
    alone = trained.made(kind)
    optimizer = trained.sgd(trained.trainable(alone).values())
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = trained.loss_of(alone, *trained.data())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    one = accelerator(mixed_precision="bf16")
    model, optimizer = prepared(one, kind)
    for _ in range(2):
        step(one, model, optimizer, trained.data())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    trained.assert_equal(trained.trainable(model), trained.trainable(alone))


@every_kind
def test_accumulated_and_clipped(accelerator, kind):
    clip = 0.1
    alone = trained.made(kind)
    named = trained.trainable(alone)
    optimizer = trained.sgd(named.values())
    for _ in range(2):
        trained.loss_of(alone, *trained.data()).backward()
        assert torch.nn.utils.clip_grad_norm_(named.values(), clip) > clip
        optimizer.step()
        optimizer.zero_grad()
    one = accelerator(gradient_accumulation_steps=2)
    model, optimizer = prepared(one, kind)
    halves = list(zip(*(part.chunk(2) for part in trained.data()), strict=True))
    for half in halves * 2:
        step(one, model, optimizer, half, clip)
    trained.assert_equal(trained.trainable(model), trained.trainable(alone))


@every_kind
def test_saved_states_go_on(accelerator, kind, tmp_path):
    one = accelerator()
    model, optimizer = prepared(one, kind)
    step(one, model, optimizer, trained.data())
    one.save_state(tmp_path)
    step(one, model, optimizer, trained.data())
    other = accelerator()
    again, optimizer = prepared(other, kind, seed=9)
    other.load_state(tmp_path)
    step(other, again, optimizer, trained.data())
    trained.assert_equal(trained.trainable(again), trained.trainable(model), 0.0)


@every_kind
def test_offloaded_weights_come_for_each_call(kind):
    images, _ = trained.data()
    model = trained.made(kind).eval()
    with torch.no_grad():
        expected = model(images)
        # An attention reads its out_proj without a call of it, which a plain one cannot do either.
        whole = ["MultiheadAttention"]
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"), preload_module_classes=whole)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        torch.testing.assert_close(model(images), expected)
        if kind == "everything":
            with pytest.raises(
                RuntimeError, match=r"accelerate\.hooks\.remove_hook_from_module takes accelerate's out"
            ):
                pyfused.remove_lora(model)
        accelerate.hooks.remove_hook_from_submodules(model)
        torch.testing.assert_close(model(images), expected)


def test_layers_that_are_offloaded_already_are_left_alone():
    tower = trained.Tower()
    accelerate.cpu_offload(tower.blocks, execution_device=torch.device("cpu"))
    report = pyfused.inject_lora(tower, "all-linear", train="head")
    left = {path: row.why for row in report.left for path in row.paths}
    assert "with a forward that replaces it" in left["blocks.0.0"]
    trained.train(tower, *trained.data())
