"""The FastViT recipe: what its methods train and learn, its two orders, resuming, stopping, and bad input."""

from __future__ import annotations

import copy
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models_setup import fastvit_block
from torch import nn
from tree import EXAMPLES

sys.path.insert(0, str(EXAMPLES))
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("PIL", reason="pillow is not installed")
pytest.importorskip("rich", reason="rich is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("tqdm", reason="tqdm is not installed")

import fastvit_adapters as recipe_of_fastvit
import images
import recipe
from PIL import Image
from timm.layers import DropPath
from timm.models import register_model
from timm.models.fastvit import LayerScale2d, fastvit_t8

from pyfused import models, reference
from pyfused.bench.models.training import Classifier, reference_operators
from pyfused.diagnostics import layer_scale_report
from pyfused.modules import BottleneckAdapter

SMALL = ("--epochs", "1", "--image-size", "16")
DEPTHS, CHANNELS = (2, 2, 4, 2), (48, 96, 192, 384)
HEAD = 768 * 10 + 10
# C^2 + C / 2 + C in an adapter with h = C / 2, and C in a layer-scale; 8 x 9 C + 8 C in a ConvLoRA.
TRAINABLE = {
    "adapters": sum(n * (c * c + c // 2 + c + c) for n, c in zip(DEPTHS, CHANNELS, strict=True)) + HEAD,
    "conv_lora": sum(80 * c for c in CHANNELS) + HEAD,
    "head": HEAD,
}


@register_model
def fastvit_small(pretrained: bool = False, **settings: object):
    """A tower of every kind of layer that fastvit_t8 has, for tests of what does not depend on a tower's size."""
    return fastvit_t8(pretrained, layers=(1, 2, 1, 1), embed_dims=(16, 32, 64, 128), **settings)


def arguments(*argv: object):
    return recipe_of_fastvit.options().parse_args([str(word) for word in argv])


def run(*argv: object) -> int:
    return recipe_of_fastvit.main([str(word) for word in argv])


def cells(table: str) -> dict[str, list[str]]:
    """The rows of the table of methods, by method."""
    rows = (re.split(r"\s*│\s*", line.strip(" │")) for line in table.splitlines())
    return {row[0]: row[1:] for row in rows if row[0] in TRAINABLE}


def checkpoint(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """40 training images of two classes, 8 of each to test with: noise that is brighter above or below."""
    path = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 20), ("val", 8)):
        for name in ("above", "below"):
            (path / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 160, (32, 32, 3), generator=generator)
                pixels[slice(0, 16) if name == "above" else slice(16, 32)] += 95
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(path / part / name / f"{number}.png")
    return path


@pytest.fixture
def small(folder):
    """Options of an epoch of 4 steps of a small tower, in which drop-path draws matter."""
    tower = ("--model", "fastvit_small", "--image-size", 16, "--drop-path", 0.5)
    return (*tower, "--data", folder, "--batch-size", 10, "--method", "adapters")


# ---- what the command does


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> tuple[Path, str]:
    """The small form from a shell: where it wrote, and what it said."""
    output = tmp_path_factory.mktemp("runs")
    words = [sys.executable, recipe_of_fastvit.__file__, *SMALL, "--output", output]
    done = subprocess.run(words, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_the_command(command):
    output, said = command
    rows = cells(said)
    assert rows.keys() == TRAINABLE.keys()
    for method, (trainable, percent, step, peak, accuracy) in rows.items():
        assert int(trainable.replace(",", "")) == TRAINABLE[method]
        # 3,257,232 parameters in the tower.
        added = TRAINABLE[method] - HEAD - (1824 if method == "adapters" else 0)
        assert float(percent) == pytest.approx(100 * TRAINABLE[method] / (3_257_232 + HEAD + added), abs=0.006)
        assert float(step) > 0
        assert float(peak) > 1
        assert float(accuracy) > 0.8
        state = checkpoint(output / f"{method}.pt")
        assert len(state["losses"]) == 44
        assert statistics.mean(state["losses"][-5:]) < 0.3 * state["losses"][0]
    # Training a tower takes more memory than a head on a frozen one.
    assert float(rows["adapters"][3]) > float(rows["conv_lora"][3]) > float(rows["head"][3])
    for picture in ("losses.png", "adapters-scales.png"):
        assert Image.open(output / picture).size[0] > 800
    assert "stages.3.blocks.1.layer_scale" in said


def test_adapters_beat_the_head_alone(command, tmp_path, capsys):
    tables = [command[1]]
    for seed in (1, 2):
        assert run(*SMALL, "--method", "adapters", "head", "--seed", seed, "--output", tmp_path) == 0
        tables.append(capsys.readouterr().out)
    accuracy = {
        name: statistics.mean(float(cells(table)[name][4]) for table in tables) for name in ("adapters", "head")
    }
    assert accuracy["adapters"] > accuracy["head"] + 0.01, accuracy


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        run("--help")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    options = recipe_of_fastvit.options()._actions
    assert all(option.help for option in options)
    for option in options:
        assert option.option_strings[-1] in said


# ---- the methods


@pytest.fixture(scope="module")
def base(folder):
    args = arguments("--data", folder, "--image-size", 32, "--drop-path", 0.3)
    return recipe_of_fastvit.prepare(args)


@pytest.mark.parametrize("method", TRAINABLE)
def test_what_trains(base, folder, method, tmp_path):
    start, data, _ = base
    args = arguments("--data", folder, "--epochs", 1, "--batch-size", 20, "--output", tmp_path, "--image-size", 32)
    result = recipe_of_fastvit.train(args, method, start, data, None, torch.device("cpu"))
    model = result.training.model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert result.report.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert result.report.total_parameters == sum(p.numel() for p in model.parameters())
    assert result.report.trainable_parameters == TRAINABLE[method] - HEAD + 768 * 2 + 2
    word = {"adapters": r"\.adapter\.|blocks\.\d\.layer_scale\.gamma", "conv_lora": r"\.conv_lora\.", "head": "none"}
    assert all(name.startswith("head.") or re.search(word[method], name) for name in trained)
    before, after = start.state_dict(), model.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    # Two steps move all that trains and was there before, and neither a frozen weight nor a BatchNorm.
    assert moved == trained & before.keys()
    assert {"head.weight", "head.bias"} <= moved


@pytest.mark.parametrize("method", ["adapters", "conv_lora"])
def test_a_method_does_not_know_what_ran_before_it(base, folder, method, tmp_path):
    args = arguments("--data", folder, "--epochs", 1, "--batch-size", 20, "--output", tmp_path)
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        result = recipe_of_fastvit.train(args, method, base[0], base[1], None, torch.device("cpu"))
        losses.append(result.training.losses)
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


def test_all_methods_start_alike(base):
    model, (train, _), _ = base
    pictures, _ = next(iter(train.batches(4, 0)))
    args = arguments("--order", "broken")
    outputs = []
    for method in TRAINABLE:
        adapted = copy.deepcopy(model)
        recipe_of_fastvit.adapt(adapted, args, method)
        with torch.no_grad():
            outputs.append(adapted.eval()(pictures))
    for output in outputs:
        torch.testing.assert_close(output, model(pictures), rtol=1e-4, atol=1e-5)


def test_drop_path_rates_are_linear(base):
    rates = [module.drop_prob for module in base[0].modules() if isinstance(module, DropPath)]
    # The first block's is 0.
    assert rates == pytest.approx([0.3 * place / 9 for place in range(1, 10)])


@torch.no_grad()
def test_a_random_tower_is_settled(base, folder):
    model, (train, _), _ = base
    assert all((module.gamma == 0.1).all() for module in model.modules() if isinstance(module, LayerScale2d))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(norm.training for norm in norms)
    assert {norm.momentum for norm in norms} == {0.1}
    outputs = {}
    hooks = [norm.register_forward_hook(lambda norm, _, y: outputs.__setitem__(norm, y)) for norm in norms]
    # All 40 images, of which the statistics are.
    pictures, _ = next(iter(train.batches(256, 0)))
    model(pictures)
    for hook in hooks:
        hook.remove()
    assert len(pictures) == 40
    for output in outputs.values():
        assert output.mean(dim=(0, 2, 3)).abs().max() < 0.1
        # A channel of next to no variance stays small: eps is added to it.
        assert 0.95 < output.std(dim=(0, 2, 3)).max() < 1.01


def test_weights_from_a_file(tmp_path, folder):
    timm = pytest.importorskip("timm")
    source = timm.create_model("fastvit_t8", layer_scale_init_value=0.37)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    args = arguments("--pretrained", tmp_path / "weights.pt", "--data", folder)
    model, (train, _), _ = recipe_of_fastvit.prepare(args)
    loaded = model.visual.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in source.state_dict().items() if name in loaded)
    assert len(loaded) > 400
    # The pictures are as timm says that this model wants them.
    pictures, _ = next(iter(train.batches(2, 0)))
    assert pictures.shape == (2, 3, 256, 256)
    config = timm.data.resolve_model_data_config(source)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    transform = timm.data.create_transform(**config)
    path, _ = train.pictures.samples[0]
    torch.testing.assert_close(train[torch.tensor([0])][0][0], transform(Image.open(path)), rtol=0, atol=2 / 255 / 0.22)
    assert (pictures * std + mean).min() >= -1e-6


# ---- the two orders


def orders(kind: str, gamma: float, zero_up: bool) -> dict[str, dict[str, torch.Tensor]]:
    """For both orders: output, and gradients of the adapters and layer-scales, by the recipe and by the formula."""
    torch.manual_seed(5)
    plain = Classifier(nn.Sequential(fastvit_block(kind, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 32, 3)
    x, found = torch.randn(4, 32, 6, 6, dtype=torch.float64), {}
    for order in ("right", "broken"):
        model = copy.deepcopy(plain)
        torch.manual_seed(6)
        recipe_of_fastvit.adapt(model, arguments("--order", order), "adapters")
        model.double().eval()
        block = model.visual[0]
        with torch.no_grad():
            for scale in (m for m in block.modules() if isinstance(m, LayerScale2d)):
                scale.gamma.fill_(gamma)
            for adapter in (m for m in block.modules() if isinstance(m, BottleneckAdapter)):
                if not zero_up:
                    for parameter in adapter.parameters():
                        parameter.normal_(std=0.5)
        trained = {name: p for name, p in block.named_parameters() if p.requires_grad}
        for source, function in (("recipe", block), ("formula", lambda x, b=block, o=order: formula(b, x, o))):
            y = function(x)
            gradients = torch.autograd.grad(y.square().sum(), list(trained.values()))
            found[f"{order} {source}"] = {"y": y.detach()} | dict(zip(trained, gradients, strict=True))
    return found


def formula(block: nn.Module, x: torch.Tensor, order: str) -> torch.Tensor:
    def adapter(a: BottleneckAdapter, f: torch.Tensor) -> torch.Tensor:
        down = F.gelu(F.conv2d(f, a.down_weight[:, :, None, None], a.down_bias))
        return f + F.conv2d(down, a.up_weight[:, :, None, None], a.up_bias)

    def branch(a: BottleneckAdapter, scale: nn.Module, f: torch.Tensor) -> torch.Tensor:
        return scale.gamma * adapter(a, f) if order == "right" else adapter(a, scale.gamma * f)

    if hasattr(block, "adapter"):
        x = block.token_mixer(x)
        return x + branch(block.adapter, block.layer_scale, block.mlp(x))
    x = x + branch(block.adapter_1, block.layer_scale_1, block.token_mixer(block.norm(x)))
    return x + branch(block.adapter_2, block.layer_scale_2, block.mlp(x))


@pytest.mark.parametrize("kind", ["RepMixerBlock", "AttentionBlock"])
def test_both_orders_are_their_formulas(kind):
    found = orders(kind, gamma=0.3, zero_up=False)
    assert len(found["right recipe"]) == (6 if kind == "RepMixerBlock" else 11)
    for order in ("right", "broken"):
        for name, value in found[f"{order} recipe"].items():
            torch.testing.assert_close(value, found[f"{order} formula"][name], rtol=1e-9, atol=1e-9)
    assert (found["right recipe"]["y"] - found["broken recipe"]["y"]).abs().max() > 0.1
    same = orders(kind, gamma=1.0, zero_up=False)
    for name, value in same["right recipe"].items():
        if "gamma" not in name:
            torch.testing.assert_close(value, same["broken recipe"][name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["RepMixerBlock", "AttentionBlock"])
def test_neither_order_enlarges_the_gradients_of_the_weights_at_the_start(kind):
    found = {gamma: orders(kind, gamma, zero_up=True) for gamma in (1e-3, 1e-4)}
    names = [name for name in found[1e-3]["right recipe"] if name.endswith("up_weight")]
    assert len(names) == (1 if kind == "RepMixerBlock" else 2)
    for name in names:
        size = {
            (order, gamma): tensors[f"{order} recipe"][name].norm().item()
            for gamma, tensors in found.items()
            for order in ("right", "broken")
        }
        # Of order gamma in both.
        for order in ("right", "broken"):
            assert size[order, 1e-3] / size[order, 1e-4] == pytest.approx(10, rel=0.05)
        assert 0.4 < size["right", 1e-3] / size["broken", 1e-3] < 2.5
        # D has no gradient while U is zero; gamma is on the bias's gradient in the right order alone.
        down = name.replace("up_weight", "down_weight")
        assert all(not tensors[down].any() for run in found.values() for tensors in run.values())
        bias = name.replace("up_weight", "up_bias")
        sizes = {g: [found[g][f"{o} recipe"][bias].norm().item() for o in ("right", "broken")] for g in found}
        assert sizes[1e-3][0] / sizes[1e-4][0] == pytest.approx(10, rel=0.05)
        assert sizes[1e-3][1] / sizes[1e-4][1] == pytest.approx(1, rel=0.05)


# ---- layer-scales over training


def test_scales_are_recorded_and_nothing_moves(base):
    model, (train, _), _ = base
    model = copy.deepcopy(model)
    recipe_of_fastvit.adapt(model, arguments(), "adapters")
    with torch.no_grad():
        for adapter in (m for m in model.modules() if isinstance(m, BottleneckAdapter)):
            # While U is zero, D has no gradient.
            adapter.up_weight.normal_(std=0.1)
    batch = next(iter(train.batches(8, 0)))

    def loss_of(batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    rows = recipe_of_fastvit.scales(model, loss_of, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert len(rows) == 10
    assert sum(recipe_of_fastvit.shares(rows)) == pytest.approx(1)
    loss_of(batch).backward()
    for row, share in zip(rows, recipe_of_fastvit.shares(rows), strict=True):
        adapter = model.get_submodule(row["path"].replace("layer_scale", "adapter"))
        squares = {name: p.grad.double().square().sum().item() for name, p in adapter.named_parameters()}
        assert row["adapter_grad"] ** 2 == pytest.approx(sum(squares.values()), rel=1e-5)
        assert row["adapter_weight_grad"] ** 2 == pytest.approx(squares["down_weight"] + squares["up_weight"], rel=1e-5)
        assert share == pytest.approx(row["adapter_grad"] ** 2 / sum(r["adapter_grad"] ** 2 for r in rows))
    assert all(row.adapter_weight_grad is None for row in layer_scale_report(base[0]).rows)


def test_the_history_of_a_run(command):
    output, said = command
    history = json.loads((output / "adapters-scales.json").read_text())
    assert history.keys() == {"0", "1"}
    state = checkpoint(output / "adapters.pt")["model"]
    for row in history["1"]:
        assert row["gamma_mean"] == pytest.approx(state[f"{row['path']}.gamma"].abs().mean().item(), rel=1e-5)
    assert all(row["gamma_mean"] == pytest.approx(0.1, rel=1e-6) for row in history["0"])
    # The layer-scales train, and grow where the last blocks learn.
    (line,) = (line for line in said.splitlines() if "stages.3.blocks.1.layer_scale" in line)
    growth = float(re.search(r"([\d.]+)x", line)[1])
    assert growth == pytest.approx(history["1"][-1]["gamma_mean"] / history["0"][-1]["gamma_mean"], abs=0.006)
    assert growth > 1.1


# ---- training


def test_equal_to_training_with_the_references(small, tmp_path, monkeypatch):
    calls = []
    plain = reference.adapter_residual
    monkeypatch.setattr(
        reference, "adapter_residual", lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs)
    )
    small = (*small, "--batch-size", 4, "--epochs", 2)
    assert run(*small, "--output", tmp_path / "pyfused") == 0
    assert not calls
    with reference_operators():
        assert run(*small, "--output", tmp_path / "reference") == 0
    assert len(calls) >= 20 * 5
    ours, theirs = (checkpoint(tmp_path / name / "adapters.pt")["losses"] for name in ("pyfused", "reference"))
    assert len(ours) == 20
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert abs(ours[-1] - ours[0]) > 0.1


def test_resuming_goes_on_with_the_same_bits(small, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*small, "--epochs", 2, "--output", whole) == 0
    save = recipe.Training.save

    def killed_after_the_first(training):
        save(training)
        if training.epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe.Training, "save", killed_after_the_first)
        assert run(*small, "--epochs", 2, "--output", parts) == 130
    assert len(checkpoint(parts / "adapters.pt")["losses"]) == 4
    saved = []
    monkeypatch.setattr(recipe.Training, "save", lambda training: saved.append(training.epoch) or save(training))
    assert run(*small, "--epochs", 2, "--output", parts, "--resume") == 0
    assert saved == [2]
    first, second = (checkpoint(path / "adapters.pt") for path in (whole, parts))
    assert len(first["losses"]) == 8
    for name in ("losses", "norms"):
        assert first[name] == second[name]
    assert first["model"].keys() == second["model"].keys()
    assert all(torch.equal(tensor, second["model"][name]) for name, tensor in first["model"].items())
    histories = [json.loads((path / "adapters-scales.json").read_text()) for path in (whole, parts)]
    assert histories[0] == histories[1]
    assert histories[0].keys() == {"0", "1", "2"}


def test_nan_stops_and_the_last_checkpoint_stays(small, tmp_path, monkeypatch, capsys):
    save = recipe.Training.save
    name = "visual.stages.1.blocks.0.adapter.down_weight"

    def poisoned(training):
        save(training)
        if training.epoch == 1:
            with torch.no_grad():
                training.model.get_parameter(name)[3, 2] = torch.nan

    with monkeypatch.context() as patch:
        patch.setattr(recipe.Training, "save", poisoned)
        assert run(*small, "--epochs", 2, "--output", tmp_path) == 1
    said = capsys.readouterr().err
    assert re.search(
        r"stopped: the loss is nan at step 5, learning rate [\d.e-]+; the first bad tensor is the parameter "
        + re.escape(name) + r"; .*adapters\.pt holds epoch 1", said
    )  # fmt: skip
    state = checkpoint(tmp_path / "adapters.pt")
    assert state["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert run(*small, "--epochs", 2, "--output", tmp_path, "--resume") == 0
    assert len(checkpoint(tmp_path / "adapters.pt")["losses"]) == 8


@pytest.mark.parametrize("order", ["right", "broken"])
def test_bfloat16(small, tmp_path, order):
    assert run(*small, "--precision", "bfloat16", "--output", tmp_path, "--order", order) == 0
    losses = checkpoint(tmp_path / "adapters.pt")["losses"]
    assert losses[-1] < losses[0]


# ---- a CLIP's tower


def test_zero_shot_of_a_clips_tower(folder, tmp_path, capsys, monkeypatch):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    made, create = [], open_clip.create_model
    monkeypatch.setattr(
        open_clip, "create_model", lambda *args, **kwargs: made.append(create(*args, **kwargs)) or made[0]
    )
    argv = ("--model", "MobileCLIP_s1", "--data", folder, "--image-size", 32, "--drop-path", 0.2, "--method", "head")
    assert run(*argv, "--output", tmp_path, "--epochs", 1, "--batch-size", 20) == 0
    row = cells(capsys.readouterr().out)["head"]
    assert row[0] == f"{512 * 2 + 2:,}"

    # CLIP's own way to ask the same tower, which the head left as it was.
    (clip,) = made
    assert max(m.drop_prob for m in clip.modules() if isinstance(m, DropPath)) == pytest.approx(0.2)
    config = clip.visual.preprocess_cfg
    _, test, names = images.load(folder, 32, config["mean"], config["std"], 0)
    tokenizer, templates = open_clip.get_tokenizer("MobileCLIP-S1"), open_clip.SIMPLE_IMAGENET_TEMPLATES
    right = 0
    with torch.no_grad():
        texts = [
            clip.encode_text(tokenizer([t(name) for t in templates]), normalize=True).mean(dim=0) for name in names
        ]
        for pictures, labels in test.batches(16):
            features = clip.encode_image(pictures, normalize=True)
            logits = torch.stack([features @ text / text.norm() for text in texts], dim=1)
            right += (logits.argmax(dim=1) == labels).sum().item()
    assert float(row[5]) == pytest.approx(right / 16, abs=6e-4)
    report = recipe_of_fastvit.adapt(Classifier(clip.visual, 512, 2), arguments(), "adapters")
    assert report.attention_blocks > 0
    assert all("visual.trunk.stages" in row.path for row in report.rows)


def test_accuracies():
    model = Classifier(nn.Identity(), 2, 2)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        model.head.bias.zero_()
    features = torch.tensor([[2.0, 1.0], [1.0, 3.0], [5.0, 1.0], [9.0, 1.0]])
    batches = [(features[:3], torch.tensor([1, 0, 1])), (features[3:], torch.tensor([0]))]
    found = recipe_of_fastvit.accuracies(model.train(), batches, torch.device("cpu"), torch.eye(2))
    # The head is right about the first three, the texts about the last.
    assert found == (0.75, 0.25)
    assert not model.training
    texts = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    assert recipe_of_fastvit.accuracies(model, batches, torch.device("cpu"), texts) == (0.75, 0.5)
    assert recipe_of_fastvit.accuracies(model, batches, torch.device("cpu"), None) == (0.75, None)


# ---- bad input


def refused(capsys, *argv: object) -> str:
    with pytest.raises(SystemExit) as ended:
        run(*argv)
    assert ended.value.code == 2
    # argparse breaks lines.
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method", "lora"], r"invalid choice: 'lora' \(choose from '?adapters'?, '?conv_lora'?, '?head'?\)"),
        (["--order", "wrong"], r"invalid choice: 'wrong' \(choose from '?right'?, '?broken'?\)"),
        (["--model", "resnet50"], r"--model must be one of fastvit_ma36, .*mobileclip_s1.*, got 'resnet50'"),
        (["--drop-path", "1"], r"--drop-path: expected a number in \[0, 1\), got '1'"),
        (["--data", "digit"], r"data must be digits, flowers102 or a folder of images, got 'digit'"),
        (["--pretrained", "none_such"], r"--pretrained must name weights of fastvit_t8, got 'none_such': "),
        (["--pretrained", "a", "--layer-scale", "1"], r"--layer-scale must be left out with --pretrained, got 1\.0"),
        (["--reduction", "-1"], r"--reduction: expected a positive number, got '-1'"),
        (["--rank", "300", "--method", "conv_lora"], r"rank must be in 1\.\.256, got 300"),
        (["--lr", "-1"], r"--lr: expected a positive number, got '-1'"),
        (["--resume"], r"--resume must find a checkpoint in --output, got .*, which holds none"),
    ],
)
def test_bad_arguments(argv, message, tmp_path, capsys):
    assert re.search(message, refused(capsys, "--output", tmp_path, *argv))


def test_a_folder_without_classes(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    said = refused(capsys, "--data", tmp_path, "--output", tmp_path)
    assert f"{tmp_path} must hold one folder of images for each class" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys):
    assert "--device must be a device of this machine, got 'cuda'" in refused(capsys, "--device", "cuda")


def test_a_checkpoint_of_another_method(small, tmp_path, capsys):
    assert run(*small, "--epochs", 1, "--batch-size", 40, "--output", tmp_path) == 0
    argv = (*small, "--epochs", 1, "--batch-size", 40, "--output", tmp_path, "--resume")
    said = refused(capsys, *argv, "--order", "broken")
    assert "must be of this run's method and settings, got order 'right', this run has 'broken'" in said
    (tmp_path / "adapters.pt").rename(tmp_path / "conv_lora.pt")
    assert "got method 'adapters', this run has 'conv_lora'" in refused(capsys, *argv, "--method", "conv_lora")


def test_conv_lora_alone(base):
    model = copy.deepcopy(base[0])
    blocks = [f"visual.stages.{place}.blocks" for place in range(4)]
    with pytest.raises(ValueError, match="model must contain timm's RepMixerBlock or AttentionBlock outside"):
        models.add_adapters(model, exclude=blocks)
    report = models.add_adapters(model, conv_lora_rank=4, exclude=blocks[:3])
    assert (report.stages, report.repmixer_blocks) == (4, 2)
    model = copy.deepcopy(base[0])
    report = models.add_adapters(model, conv_lora_rank=4, exclude=blocks)
    assert (report.stages, report.total, report.trainable_parameters) == (4, 0, 40 * sum(CHANNELS))
    models.remove_adapters(model)
    assert model.state_dict().keys() == base[0].state_dict().keys()
