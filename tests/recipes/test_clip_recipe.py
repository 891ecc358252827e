"""examples/clip_finetune.py: the documents' counts, what learns on digits, and what a user may get wrong."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import models_setup
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tree import EXAMPLES

from pyfused import inject_lora, preset
from pyfused.bench.models.training import reference_operators

for package in ("open_clip", "rich", "tqdm", "matplotlib", "sklearn", "torchvision"):
    pytest.importorskip(package)
sys.path.insert(0, str(EXAMPLES))
import clip_finetune as recipe_of_clip  # noqa: E402

METHODS = recipe_of_clip.METHODS


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Checkpoints lie in a folder of the test."""
    monkeypatch.chdir(tmp_path)


def options(*given: str):
    return recipe_of_clip.options().parse_args(["--model", "tiny", *given])


def prepared(*given: str):
    args = options(*given)
    return args, *recipe_of_clip.prepare(args)


def train(method: str, *given: str):
    args, base, data, chosen = prepared(*given)
    return recipe_of_clip.train(args, method, base, data, chosen, torch.device("cpu"))


def refusal(capsys, *given: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        recipe_of_clip.main([*given])
    assert stopped.value.code == 2
    return capsys.readouterr().err


class TestCounts:
    """systems.md, section 3, on open_clip's ViT-B-32 with a head for 102 classes."""

    def report(self, method: str, chosen: str = "medium", *given: str):
        model = models_setup.vit_b_32("meta")
        made = recipe_of_clip.ClipClassifier(model.clip, model.head)
        return recipe_of_clip.adapt(made, method, preset(chosen), options(*given))

    def test_lora_prints_the_expected_summary(self):
        printed = str(self.report("lora"))
        assert "LoRA modules          48 = 24 attention + 24 MLP\n" in printed
        assert "LoRA parameters       2,359,296\n" in printed
        assert "trainable parameters  2,411,622 of 153,688,935 (1.57 %)" in printed
        rows = [line.split() for line in printed.splitlines() if "resblocks.*" in line]
        assert [row[0].rpartition(".")[2] for row in rows] == ["in_proj", "out_proj", "c_fc", "c_proj"]
        assert [row[5:7] for row in rows] == [["16", "32"]] * 4

    @pytest.mark.parametrize(
        ("method", "trainable"),
        [
            ("bitfit", 155_238),
            ("prefix", 12 * 2 * 10 * 768 + 52_326),
            ("adapter", 12 * (2 * 768 * 64 + 64 + 768) + 52_326),
            ("full", 87_849_216 + 52_326),
            ("head", 52_326),
        ],
    )
    def test_others(self, method, trainable):
        report = self.report(method)
        assert report.trainable_parameters == trainable
        assert f"{trainable:,} of " in str(report)

    def test_simple_is_the_attention_alone(self):
        report = self.report("lora", "simple")
        assert (report.attention, report.mlp) == (24, 0)
        assert {(row.rank, row.alpha) for row in report.rows} == {(8, 16.0)}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """--compare in its small form, as a user would run it."""
    folder = tmp_path_factory.mktemp("compared")
    command = [sys.executable, str(EXAMPLES / "clip_finetune.py"), "--model", "tiny", "--compare", "--epochs", "1"]
    made = subprocess.run([*command, "--output", str(folder)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    return folder, made.stdout


class TestCompare:
    def test_every_method_has_its_row_checkpoint_and_curve(self, compared):
        folder, printed = compared
        rows = {cells[1]: cells for line in printed.splitlines() if len(cells := line.replace("│", "|").split()) == 13}
        assert rows.keys() == set(METHODS)
        for method, cells in rows.items():
            trainable, percent, step, peak, accuracy = cells[3::2]
            state = torch.load(folder / f"{method}.pt", weights_only=True)
            assert state["epoch"] == 1
            assert state["identity"]["method"] == method
            assert int(trainable.replace(",", "")) > 0
            assert 0 < float(percent) < 100
            assert float(step) > 0
            assert float(peak) > 0
            assert 0.05 <= float(accuracy) <= 1
            assert f"{trainable} of " in printed
        # Rates that the recipe itself has raised are no warning.
        assert "warning" not in printed
        assert (folder / "losses.png").read_bytes().startswith(b"\x89PNG")

    def test_all_start_from_one_model(self, compared):
        losses = {method: torch.load(compared[0] / f"{method}.pt", weights_only=True)["losses"] for method in METHODS}
        # Prefix changes the output at once, by little.
        assert len({losses[method][0] for method in METHODS if method != "prefix"}) == 1
        assert losses["prefix"][0] == pytest.approx(losses["lora"][0], rel=1e-2)
        assert len({losses[method][-1] for method in METHODS}) == len(METHODS)


def test_each_method_beats_the_head_alone_on_digits():
    # From each of three seeds the least is above by 0.117.
    accuracies = {method: train(method, "--seed", "1").accuracy for method in METHODS if method != "full"}
    for method in ("lora", "bitfit", "prefix", "adapter"):
        assert accuracies[method] > accuracies["head"] + 0.05, accuracies


class TestTraining:
    @pytest.mark.parametrize("method", ["lora", "prefix", "full"])
    def test_goes_on_bit_for_bit(self, method):
        whole = train(method, "--epochs", "2", "--batch-size", "256", "--output", "whole")
        args, base, data, chosen = prepared("--epochs", "2", "--batch-size", "256", "--resume")
        made = recipe_of_clip.recipe.Training
        stop = pytest.MonkeyPatch()
        # Cut short after the first epoch.
        stop.setattr(made, "run", lambda self, batches, epochs, *rest, run=made.run: run(self, batches, 1, *rest))
        recipe_of_clip.train(args, method, base, data, chosen, torch.device("cpu"))
        stop.undo()
        again = recipe_of_clip.train(args, method, base, data, chosen, torch.device("cpu"))
        assert again.training.losses == whole.training.losses
        assert again.accuracy == whole.accuracy

    def test_goes_on_where_some_methods_are_done(self, capsys):
        given = ["--model", "tiny", "--compare", "--epochs", "1", "--batch-size", "512"]
        assert recipe_of_clip.main(given) == 0
        whole = capsys.readouterr().out
        Path("runs/clip/full.pt").unlink()
        assert recipe_of_clip.main([*given, "--resume"]) == 0
        again = capsys.readouterr().out
        for method in METHODS:
            # The accuracy, the last cell of its row.
            cells = [
                next(line.split()[-2] for line in text.splitlines() if line.startswith(f"│ {method} "))
                for text in (whole, again)
            ]
            assert cells[0] == cells[1]
        # A new run does not leave what an older one could be taken for.
        Path("runs/clip/lora.pt").write_bytes(b"old")
        assert recipe_of_clip.main([*given[:2], *given[3:], "--method", "head"]) == 0
        assert Path("runs/clip/lora.pt").read_bytes() == b"old"
        assert recipe_of_clip.main(given[:2] + given[3:]) == 0
        assert torch.load("runs/clip/lora.pt", weights_only=True)["epoch"] == 1

    @pytest.mark.parametrize("method", ["lora", "adapter"])
    def test_steps_equal_those_on_the_reference(self, method):
        given = ("--epochs", "1", "--batch-size", "64")
        ours = train(method, *given).training.losses[:20]
        with reference_operators():
            plain = train(method, *given).training.losses[:20]
        assert len(ours) == 20
        assert ours == pytest.approx(plain, rel=1e-4)
        assert ours[-1] < ours[0]

    def test_only_what_the_report_counts_moves(self):
        for method in ("lora", "bitfit", "prefix", "adapter", "head"):
            args, base, data, chosen = prepared("--epochs", "1", "--batch-size", "512")
            before = {name: value.clone() for name, value in base.state_dict().items()}
            made = recipe_of_clip.train(args, method, base, data, chosen, torch.device("cpu")).training.model
            after = {name.replace(".mlp.0.", ".mlp."): value for name, value in made.state_dict().items()}
            moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
            assert {name for name in moved if not name.startswith("head.")} == {
                name for name in before if method == "bitfit" and ".visual." in name and name.endswith("bias")
            }
            assert moved >= {"head.weight", "head.bias"}

    def test_rates_are_the_methods_and_the_heads(self):
        args, base, _, _ = prepared("--lr-factor", "1", "--lora-plus", "16")
        recipe_of_clip.adapt(base, "lora", preset("complex"), args)
        groups = {
            group["name"]: group["lr"] for group in recipe_of_clip.groups_of(base, "lora", preset("complex"), args)
        }
        assert groups == {"lora": 1e-4, "lora b": pytest.approx(16e-4), "whole": 1e-3, "whole, no decay": 1e-3}
        for method, rate in (("bitfit", 1e-3), ("prefix", 5e-4), ("adapter", 5e-4), ("full", 1e-5)):
            args, base, _, chosen = prepared("--lr-factor", "2")
            recipe_of_clip.adapt(base, method, chosen, args)
            assert {group["lr"] for group in recipe_of_clip.groups_of(base, method, chosen, args)} == {2 * rate, 2e-3}
        # What is given is what is used, whatever the weights are.
        args, base, _, chosen = prepared("--lr", "0.5", "--head-lr", "0.25")
        recipe_of_clip.adapt(base, "full", chosen, args)
        assert {group["lr"] for group in recipe_of_clip.groups_of(base, "full", chosen, args)} == {0.5, 0.25}

    def test_a_zero_shot_head_is_the_texts(self):
        args, base, data, chosen = prepared("--head", "zero-shot", "--epochs", "1", "--batch-size", "512")
        pictures, _ = data[1][torch.arange(6)]
        clip, names = base.clip.eval(), [str(digit) for digit in range(10)]
        import open_clip

        tokens = open_clip.SimpleTokenizer(context_length=16)
        texts = []
        with torch.no_grad():
            for name in names:
                prompts = tokens([template(name) for template in open_clip.SIMPLE_IMAGENET_TEMPLATES])
                texts.append(F.normalize(F.normalize(clip.encode_text(prompts), dim=-1).mean(0), dim=-1))
            features = F.normalize(clip.encode_image(pictures), dim=-1)
            expected = clip.logit_scale.exp() * features @ torch.stack(texts).T
            torch.testing.assert_close(base.eval()(pictures), expected, rtol=1e-4, atol=1e-4)
        made = recipe_of_clip.train(args, "lora", base, data, chosen, torch.device("cpu"))
        assert made.report.trainable_parameters == made.report.lora_parameters
        with pytest.raises(ValueError, match="--head must be linear for method head"):
            recipe_of_clip.train(args, "head", base, data, chosen, torch.device("cpu"))

    def test_under_torch_compile(self, monkeypatch):
        called = []
        compiled = functools.partial(torch.compile, backend="aot_eager")
        monkeypatch.setattr(torch, "compile", lambda model: called.append(model) or compiled(model))
        given = ("--epochs", "1", "--batch-size", "512")
        assert train("lora", *given, "--compile").training.losses == pytest.approx(
            train("lora", *given).training.losses, rel=1e-4
        )
        assert len(called) == 1

    def test_a_method_does_not_depend_on_what_ran_before(self):
        losses = []
        for drawn in (0, 7):
            args, base, data, chosen = prepared("--epochs", "1", "--batch-size", "512")
            torch.rand(drawn)
            made = recipe_of_clip.train(args, "lora", base, data, chosen, torch.device("cpu"))
            losses.append(made.training.losses)
        assert losses[0] == losses[1]

    def test_accuracy_is_measured_in_eval(self):
        model = nn.Sequential(nn.Identity(), nn.Dropout(0.999)).train()
        scores = torch.eye(8)
        assert recipe_of_clip.accuracy(model, [(scores, torch.arange(8))], torch.device("cpu")) == 1.0

    @pytest.mark.parametrize("precision", ["bfloat16", "float16"])
    def test_under_autocast(self, precision):
        losses = train("lora", "--epochs", "1", "--batch-size", "512", "--precision", precision).training.losses
        whole = train("lora", "--epochs", "1", "--batch-size", "512").training.losses
        assert losses == pytest.approx(whole, rel=3e-2)


class TestWarnings:
    def test_a_dead_module_stops_before_training(self, monkeypatch, capsys, tmp_path):
        def dead(model, *given, **settings):
            model.clip.visual.extra = nn.Linear(3, 3)
            return inject_lora(model, *given, **settings)

        monkeypatch.setattr(recipe_of_clip, "inject_lora", dead)
        given = ["--model", "tiny", "--preset", "medium", "--output", str(tmp_path)]
        assert recipe_of_clip.main(given) == 1
        told = capsys.readouterr().err
        assert "stopped: lora: the checklist failed before training" in told
        assert "clip.visual.extra" in told
        assert not (tmp_path / "lora.pt").exists()

    def test_a_violated_freeze_stops(self, monkeypatch, capsys, tmp_path):
        def thawed(model, *given, **settings):
            report = inject_lora(model, *given, **settings)
            model.clip.visual.requires_grad_(True)
            return report

        monkeypatch.setattr(recipe_of_clip, "inject_lora", thawed)
        assert recipe_of_clip.main(["--model", "tiny", "--output", str(tmp_path)]) == 1
        assert "weights train under their own LoRA" in capsys.readouterr().err

    def test_a_gradient_that_explodes_and_a_rate_far_off_are_told(self, monkeypatch, capsys, tmp_path):
        class Loud(nn.Linear):
            def forward(self, x):
                return super().forward(x) * 1e5

        monkeypatch.setattr(recipe_of_clip, "make_head", lambda *given: Loud(32, 10))
        given = ["--model", "tiny", "--epochs", "1", "--batch-size", "512", "--lr", "0.1"]
        given += ["--lr-factor", "1", "--output", str(tmp_path)]
        assert recipe_of_clip.main(given) == 0
        told = capsys.readouterr().out
        assert "warning: gradient norm:" in told
        assert "warning: learning rate:" in told

    def test_nan_stops_and_the_last_checkpoint_stays(self, monkeypatch, capsys, tmp_path):
        given = ["--model", "tiny", "--epochs", "2", "--batch-size", "512", "--output", str(tmp_path)]
        batches = recipe_of_clip.images.Images.batches

        def bad(self, size, epoch=None, workers=0):
            for pictures, labels in batches(self, size, epoch, workers):
                yield (pictures * float("nan") if epoch == 1 else pictures), labels

        class Loader(list):
            pass

        monkeypatch.setattr(recipe_of_clip.images.Images, "batches", lambda *given, **k: Loader(bad(*given, **k)))
        assert recipe_of_clip.main(given) == 1
        told = capsys.readouterr().err
        assert "stopped: the loss is nan at step 3, learning rate " in told
        assert "the first bad tensor is input 0 of the batch" in told
        assert torch.load(tmp_path / "lora.pt", weights_only=True)["epoch"] == 1


class TestBadInput:
    def test_names_are_listed(self, capsys):
        assert "invalid choice: 'lroa' (choose from" in refusal(capsys, "--method", "lroa")
        assert "'very-complex'" in refusal(capsys, "--preset", "hard").replace("very-complex", "'very-complex'")
        assert "ViT-B-32" in refusal(capsys, "--model", "ViT-B-33")

    def test_models_and_weights(self, capsys, tmp_path):
        assert "--pretrained must be left out with --model tiny" in refusal(
            capsys, "--model", "tiny", "--pretrained", "openai"
        )
        assert "--model must have a ViT as its image tower, got 'RN50'" in refusal(capsys, "--model", "RN50")
        assert "--pretrained must name weights of ViT-B-32, got 'none-such'" in refusal(
            capsys, "--pretrained", "none-such"
        )

    def test_data_devices_and_checkpoints(self, capsys, tmp_path):
        assert "no folder" in refusal(capsys, "--model", "tiny", "--data", str(tmp_path / "absent"))
        (tmp_path / "empty").mkdir()
        assert "must hold one folder of images for each class" in refusal(
            capsys, "--model", "tiny", "--data", str(tmp_path / "empty")
        )
        if not torch.cuda.is_available():
            assert "--device must be a device of this machine, got 'cuda'" in refusal(capsys, "--device", "cuda")
        out = ["--model", "tiny", "--epochs", "1", "--batch-size", "512", "--output", str(tmp_path)]
        assert "--resume must find a checkpoint in --output" in refusal(capsys, *out, "--resume")
        assert recipe_of_clip.main(out) == 0
        told = refusal(capsys, *out, "--resume", "--preset", "complex")
        assert "must be of this run's method and settings, got preset 'simple', this run has 'complex'" in told
        (tmp_path / "bitfit.pt").write_bytes((tmp_path / "lora.pt").read_bytes())
        assert "method 'lora', this run has 'bitfit'" in refusal(capsys, *out, "--resume", "--method", "bitfit")


def test_help_is_complete(capsys):
    with pytest.raises(SystemExit):
        recipe_of_clip.main(["--help"])
    printed = capsys.readouterr().out
    for action in recipe_of_clip.options()._actions:
        assert action.help, action.dest
        assert action.option_strings[0] in printed
    assert "fine-tune the image tower of a CLIP" in printed
