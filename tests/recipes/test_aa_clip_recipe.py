"""examples/aa_clip.py: layouts of data, bad input, and the recipe in its small form, both stages and both arms."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from aa_clip_cases import open_clip
from PIL import Image
from tree import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import aa_clip
import aa_clip_data
import recipe

from pyfused import models

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
assert open_clip

# A 4x4 grid of patches, one loop of few steps.
QUICK = ("--image-size", "32", "--feedback-loops", "1", "--epochs", "2", "--device", "cpu", "--pictures", "1")


def picture(path: Path, size: tuple[int, int] = (20, 10), value: int | tuple = (90, 120, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB" if isinstance(value, tuple) else "L", size, value).save(path)
    return path


def mvtec(root: Path, mask: str = "{}_mask.png") -> Path:
    """Two classes with two images of each kind."""
    for category in ("bottle", "wood"):
        for kind in ("train/good", "test/good", "test/hole"):
            for name in ("000", "001"):
                picture(root / category / kind / f"{name}.png")
        for name in ("000", "001"):
            picture(root / category / "ground_truth" / "hole" / mask.format(name), value=255)
    return root


def visa(root: Path, split: bool) -> Path:
    """One class as it is published, a mask that numbers its defects."""
    rows = []
    for number, (part, label) in enumerate([("train", "normal"), ("test", "normal"), ("test", "anomaly")]):
        kind = "Normal" if label == "normal" else "Anomaly"
        image = picture(root / "candle" / "Data" / "Images" / kind / f"{number:03d}.JPG").relative_to(root)
        mask = ""
        if label == "anomaly":
            path = root / "candle" / "Data" / "Masks" / "Anomaly" / f"{number:03d}.png"
            path.parent.mkdir(parents=True)
            numbers = np.zeros((10, 20), np.uint8)
            numbers[:, :5], numbers[:, 5:10] = 1, 3
            Image.fromarray(numbers).save(path)
            mask = path.relative_to(root)
        rows.append(("candle", part, label, image, mask) if split else (image, label.replace("anomaly", "melt"), mask))
    table = root / "split_csv" / "1cls.csv" if split else root / "candle" / "image_anno.csv"
    table.parent.mkdir(exist_ok=True)
    head = ("object", "split", "label", "image", "mask") if split else ("image", "label", "mask")
    table.write_text("\ufeff" + "\n".join(",".join(map(str, row)) for row in (head, *rows)) + "\n")
    return root


class TestData:
    @pytest.mark.parametrize("mask", ["{}_mask.png", "{}.png"])
    def test_mvtec(self, tmp_path, mask):
        train, test = aa_clip_data.read(mvtec(tmp_path, mask))
        assert [(s.category, s.defect, s.image.stem, s.mask) for s in train] == [
            (category, "good", name, None) for category in ("bottle", "wood") for name in ("000", "001")
        ]
        assert len(test) == 8
        for sample in test:
            if sample.defect == "good":
                assert sample.mask is None
            else:
                truth = tmp_path / sample.category / "ground_truth" / sample.defect
                assert sample.mask == truth / mask.format(sample.image.stem)

    def test_visa_by_its_split(self, tmp_path):
        train, test = aa_clip_data.read(visa(tmp_path, split=True))
        assert [s.image.name for s in train] == ["000.JPG"]
        assert [(s.category, s.defect, s.image.name) for s in test] == [
            ("candle", "good", "001.JPG"), ("candle", "anomaly", "002.JPG"),
        ]  # fmt: skip
        data = aa_clip_data.Anomalies(test, ["candle"], lambda image: torch.zeros(3, 8, 8), 8)
        _, masks, labels, classes = data[torch.tensor([1, 0])]
        assert (labels.tolist(), classes.tolist()) == ([1, 0], [0, 0])
        # Squashed from 20x10 to 8x8, whatever the number of the defect.
        assert masks[0].all(0).tolist() == [True] * 4 + [False] * 4
        assert masks.any(-1).any(-1).tolist() == [True, False]

    def test_visa_by_annotations(self, tmp_path):
        train, test = aa_clip_data.read(visa(tmp_path, split=False))
        assert (train, [s.defect for s in test]) == ([], ["good", "good", "melt"])
        assert {s.category for s in test} == {"candle"}

    def test_a_folder_without_classes(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"must be a folder, or synthetic, got .*none"):
            aa_clip_data.read(tmp_path / "none")
        picture(tmp_path / "images" / "a.png")
        with pytest.raises(ValueError, match=r"a folder for each class, .* got .*images with 1 images and no class$"):
            aa_clip_data.read(tmp_path / "images")
        root = mvtec(tmp_path / "mvtec")
        with pytest.raises(ValueError, match="no class; it is a class itself: give the folder above it"):
            aa_clip_data.read(root / "wood")

    def test_masks_that_do_not_match_are_named(self, tmp_path):
        root = mvtec(tmp_path)
        truth = root / "wood" / "ground_truth" / "hole"
        picture(truth / "007_mask.png", value=255)
        with pytest.raises(
            ValueError, match=r"wood/ground_truth/hole lacks none of .*hole, and has 007 without an image"
        ):
            aa_clip_data.read(root)
        (truth / "001_mask.png").unlink()
        with pytest.raises(
            ValueError, match=r"wood/ground_truth/hole lacks 001 of .*hole, and has 007 without an image"
        ):
            aa_clip_data.read(root)
        for path in truth.iterdir():
            path.unlink()
        truth.rmdir()
        with pytest.raises(ValueError, match=r"wood/ground_truth/hole lacks 000, 001 of .*, and has none without"):
            aa_clip_data.read(root)

    def test_a_mask_of_another_size(self, tmp_path):
        root = mvtec(tmp_path)
        picture(root / "wood" / "ground_truth" / "hole" / "000_mask.png", (10, 10), 255)
        sample = next(s for s in aa_clip_data.read(root).test if s.mask and s.category == "wood")
        data = aa_clip_data.Anomalies([sample], ["wood"], lambda image: torch.zeros(3, 4, 4), 4)
        with pytest.raises(ValueError, match=r"000_mask\.png must have its image's size \(20, 10\), got \(10, 10\)"):
            data[torch.tensor([0])]

    @pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "LA", "P", "I;16"])
    def test_masks_of_every_mode(self, tmp_path, mode):
        root = mvtec(tmp_path)
        wanted = np.zeros((10, 20), np.uint8)
        wanted[2:5, 3:9] = 255
        path = root / "wood" / "ground_truth" / "hole" / "000_mask.png"
        if mode == "I;16":
            Image.fromarray(wanted.astype(np.uint16) * 257).save(path)
        elif mode == "P":
            # White is the palette's first colour.
            mask = Image.fromarray((wanted == 0).astype(np.uint8), "P")
            mask.putpalette([255, 255, 255, 0, 0, 0])
            mask.save(path)
        else:
            Image.fromarray(wanted).convert(mode).save(path)
        samples = [s for s in aa_clip_data.read(root).test if s.mask == path]
        data = aa_clip_data.Anomalies(samples, ["wood"], lambda image: torch.zeros(3, 20, 20), 20)
        _, masks, _, _ = data[torch.tensor([0])]
        assert masks[0].sum() == 2 * 3 * 6
        assert masks[0, 4:10, 3:9].all()

    def test_masks_and_images_that_say_nothing(self, tmp_path):
        black = mvtec(tmp_path / "black")
        picture(black / "wood" / "ground_truth" / "hole" / "000_mask.png", value=0)
        sample = next(s for s in aa_clip_data.read(black).test if s.category == "wood" and s.mask is not None)
        data = aa_clip_data.Anomalies([sample], ["wood"], lambda image: torch.zeros(3, 8, 8), 8)
        with pytest.raises(ValueError, match=r"000_mask.png must mark a defect, got black alone"):
            data[torch.tensor([0])]
        extra = mvtec(tmp_path / "extra")
        picture(extra / "wood" / "ground_truth" / "dent" / "000_mask.png", value=255)
        with pytest.raises(ValueError, match="ground_truth has dent without a folder in test"):
            aa_clip_data.read(extra)
        half = mvtec(tmp_path / "half")
        picture(half / "cable" / "train" / "good" / "000.png")
        with pytest.raises(ValueError, match=r"a folder test beside each train, .* has none in cable"):
            aa_clip_data.read(half)
        with pytest.raises(ValueError, match="for testing must be at least one good image"):
            aa_clip_data.check_kinds("the images for testing", [], classes=True)

    def test_tables_that_are_wrong(self, tmp_path):
        root = visa(tmp_path, split=True)
        table = root / "split_csv" / "1cls.csv"
        whole = table.read_text()
        table.write_text(whole.replace("object,split", "class,split"))
        with pytest.raises(ValueError, match=r"1cls\.csv must have columns .* got none of \['object'\]"):
            aa_clip_data.read(root)
        table.write_text(whole.replace(",candle/Data/Masks/Anomaly/002.png", ","))
        with pytest.raises(ValueError, match=r"1cls\.csv must have a mask for each image with a defect, got none for"):
            aa_clip_data.read(root)
        table.write_text(whole)
        (root / "candle" / "Data" / "Images" / "Normal" / "000.JPG").unlink()
        with pytest.raises(ValueError, match=r"must have the files that .*1cls\.csv names, .* lacks .*Normal/000\.JPG"):
            aa_clip_data.read(root)

    def test_halves_are_of_each_kind(self, tmp_path):
        test = aa_clip_data.read(mvtec(tmp_path)).test
        first, second = aa_clip_data.halves(test)
        assert {s.image.stem for s in first} == {"000"}
        assert {s.image.stem for s in second} == {"001"}
        assert len(first) == len(second) == 4
        aa_clip_data.check_kinds("the test", first, classes=True)
        bottles_good = [s for s in first if s.category == "wood" or s.defect == "good"]
        aa_clip_data.check_kinds("the test", bottles_good, classes=False)
        with pytest.raises(ValueError, match=r"the test must have .*, got 1 good and 0 with a defect in bottle"):
            aa_clip_data.check_kinds("the test", bottles_good, classes=True)
        with pytest.raises(ValueError, match="got 2 good and 0 with a defect in all classes"):
            aa_clip_data.check_kinds("it", [s for s in first if s.defect == "good"], classes=False)

    def test_names(self, tmp_path):
        categories = ["metal_nut", "wood"]
        assert aa_clip_data.names_of(None, categories) == ["metal nut", "wood"]
        path = tmp_path / "names.json"
        path.write_text(json.dumps({"wood": "wood surface"}))
        assert aa_clip_data.names_of(path, categories) == ["metal nut", "wood surface"]
        path.write_text(json.dumps({"glass": "glass"}))
        with pytest.raises(
            ValueError, match=r"--names must be words for some of the classes \['metal_nut', 'wood'\], got"
        ):
            aa_clip_data.names_of(path, categories)
        path.write_text("{")
        for wrong in (path, tmp_path / "none.json"):
            with pytest.raises(ValueError, match=rf"--names must be a file of JSON, got .*{wrong.name}"):
                aa_clip_data.names_of(wrong, categories)

    def test_synthetic(self, tmp_path):
        """MVTec's layout, the same for one seed; a defect is where its mask is and nowhere else."""
        one, same, other = (
            aa_clip_data.synthesize(tmp_path / name, seed, 64, 2) for name, seed in (("a", 0), ("b", 0), ("c", 1))
        )
        train, test = aa_clip_data.read(one)
        assert (len(train), len(test)) == (4, 12)
        assert {(s.category, s.defect) for s in test} == {
            (category, kind) for category in ("striped_fabric", "grainy_stone") for kind in ("good", "scratch", "stain")
        }
        for sample in train + test:
            place = sample.image.relative_to(one)
            pixels = np.asarray(Image.open(sample.image)).astype(int)
            assert pixels.shape == (64, 64, 3)
            assert (pixels == np.asarray(Image.open(same / place))).all()
            assert (pixels != np.asarray(Image.open(other / place))).any()
            if sample.mask is not None:
                mask = np.asarray(Image.open(sample.mask)) == 255
                assert 20 < mask.sum() < 1000
                assert len(np.unique(pixels[mask], axis=0)) == 1
                assert not (pixels[~mask] == pixels[mask][0]).all(-1).any()


def options(tmp_path: Path, *given: str) -> list[str]:
    return [*QUICK, "--output", str(tmp_path / "runs"), *given]


def arms(argv: list[str]) -> dict[str, aa_clip.Arm]:
    args = aa_clip.filled(aa_clip.options().parse_args(argv))
    return aa_clip.train(args, torch.device("cpu"))


def refused(capsys, *argv: str) -> str:
    """What the program says before it ends with status 2."""
    with pytest.raises(SystemExit) as ended:
        aa_clip.main(list(argv))
    assert ended.value.code == 2
    return capsys.readouterr().err


class TestRecipe:
    def test_small_form(self, tmp_path, capsys):
        """Both arms through three loops: image losses fall in every loop, rates halve, everything is written."""
        output = tmp_path / "runs"
        found = arms(["--output", str(output), "--device", "cpu", "--pictures", "2"])
        assert found.keys() == {"base", "feedback"}
        for arm in found.values():
            assert arm.trainings.keys() == {(loop, stage) for loop in (1, 2, 3) for stage in (1, 2)}
            for (loop, stage), training in arm.trainings.items():
                first, last = aa_clip.epoch_losses(training)
                if stage == 2:
                    assert last < first, (arm.name, loop)
                small = aa_clip.SETTINGS["small"]
                rate = small["text_lr"] if stage == 1 else small["image_lr"] / 4
                assert training.optimizer.param_groups[0]["lr"] == pytest.approx(rate / 2 ** (loop - 1))
                assert training.optimizer.defaults["betas"] == (0.5, 0.999)
                assert training.clip == math.inf
                assert training.epoch == aa_clip.epochs_of(arm.args, loop, stage)
                assert len(training.losses) == training.epoch * (len(arm.data) // arm.batch_size(stage))
                assert (output / f"{arm.name}-loop{loop}-stage{stage}.pt").is_file()
            assert not arm.model.training
            assert not any(p.grad is not None for p in arm.model.clip.parameters())
            # Textures and defects that a random tower tells apart; which state is which counts.
            assert arm.results.keys() == {"striped_fabric", "grainy_stone"}
            assert min(values[0] for values in arm.results.values()) > 80
        first, last = (
            aa_clip.epoch_losses(found["feedback"].trainings[at])[end] for at, end in (((1, 2), 0), ((3, 2), 1))
        )
        assert last < 0.5 * first
        printed = capsys.readouterr().out
        for loop in (1, 2, 3):
            for stage, adapter in ((1, "text_adapters.0"), (2, "image_adapters.0")):
                ratio = found["feedback"].ratios[f"loop {loop}, stage {stage}"]
                assert ratio.adapter == adapter
                assert f"{ratio.crossed:.4e}" in printed
                assert f"{ratio.ratio:.4f}" in printed
        assert found["base"].ratios == {}
        # Where nothing has been trained yet, cross-attention changes little.
        assert 0.8 < found["feedback"].ratios["loop 1, stage 2"].ratio < 1.25
        for word in ("mean |grad|", "0.37 and 0.96", "pixel AUROC", "image AP", "striped_fabric", "mean"):
            assert word in printed
        kept = {name: torch.load(output / f"{name}.pt", weights_only=True) for name in found}
        assert any("cross_attention" in name for name in kept["feedback"])
        assert not any("cross_attention" in name for name in kept["base"])
        for arm in found:
            strips = list((output / "maps" / arm).iterdir())
            assert len(strips) == 4
            assert {Image.open(path).size for path in strips} == {(3 * 64, 64)}
        for stage in (1, 2):
            assert Image.open(output / f"stage{stage}.png").size[0] > 500

    @pytest.mark.parametrize("name", ["base", "feedback"])
    def test_losses_are_those_of_the_stages(self, tmp_path, name):
        """One batch of each loss by the model's own parts; the feedback is in stage 1's images."""
        arm = arms(options(tmp_path))[name]
        model, crossed = arm.model, name == "feedback"
        for loop, stage in ((1, 1), (2, 1), (1, 2)):
            batch = next(iter(arm.batches(loop, stage, 0)))
            images, masks, labels, classes = batch
            found = arm.training(loop, stage).loss_of(batch)
            if stage == 1:
                levels = model.image_context(images, adapted=loop == 2)
                text = torch.stack(
                    [model.encode_class(*tokens, levels[0] if crossed else None) for tokens in arm.prompts]
                )
                assert classes.unique().tolist() == [0, 1]
                expected = models.text_stage_loss(levels, text, masks, classes)
            else:
                text = torch.stack([model.encode_class(*arm.prompts[number]) for number in classes])
                contexts = [model.text_context(torch.cat(arm.prompts[number])) for number in classes]
                levels, detection, _ = model.encode_image(images, torch.cat(contexts) if crossed else None)
                expected = models.image_stage_loss(levels, detection, text, masks, labels)
            torch.testing.assert_close(found, expected)

    def test_the_epochs_of_the_original(self):
        args = aa_clip.filled(aa_clip.options().parse_args(["--model", "ViT-L-14-336"]))
        assert [[aa_clip.epochs_of(args, loop, stage) for stage in (1, 2)] for loop in (1, 2, 3)] == [
            [5, 20], [3, 10], [2, 5],
        ]  # fmt: skip
        assert (args.text_batch_size, args.batch_size, args.text_lr, args.image_lr) == (16, 2, 1e-5, 5e-4)
        assert (args.image_size, args.cross_weight, args.feedback_loops) == (518, 0.1, 3)

    def test_one_stage_alone_from_a_base_model(self, tmp_path):
        """Stage 1, then stage 2 from its adapters, with each w."""
        first = arms(options(tmp_path, "--stage", "1", "--text-w", "learnable", "--original-context"))
        assert [*first["base"].trainings] == [*first["feedback"].trainings] == [(1, 1)]
        crossing = first["feedback"].model.text_cross_attention
        assert crossing.gate.item() != pytest.approx(0.1, abs=1e-6)
        assert crossing.context_reduce == "mean_if_batches_differ"
        base = tmp_path / "runs" / "base.pt"
        second = arms(
            [*QUICK, "--output", str(tmp_path / "more"), "--stage", "2", "--image-w", "zero-init", "--base", str(base),
             "--no-compare"]
        )  # fmt: skip
        assert second.keys() == {"feedback"}
        model = second["feedback"].model
        assert torch.equal(model.text_projection.weight, first["base"].model.text_projection.weight)
        assert not torch.equal(model.projections[0].weight, first["base"].model.projections[0].weight)
        assert not model.image_cross_attention.norm_match
        assert model.image_cross_attention.out_weight.abs().max() > 0
        # Its output starts at 0.
        assert second["feedback"].ratios["loop 1, stage 2"].ratio == 1.0

    def test_real_layouts_names_and_another_folder_for_testing(self, tmp_path, capsys):
        root, other = mvtec(tmp_path / "mvtec"), visa(tmp_path / "visa", split=True)
        names = tmp_path / "names.json"
        names.write_text(json.dumps({"candle": "wax candle"}))
        given = options(tmp_path, "--data", str(root), "--test-data", str(other), "--names", str(names), "--medical")
        # A blur of 9 patches needs a larger grid than 4x4.
        given[1] = "48"
        found = arms([*given, "--no-compare"])["feedback"]
        assert len(found.data) == 12
        assert len(found.prompts) == 3
        printed = capsys.readouterr().out
        assert "losses on 12 images" in printed
        assert "test on 2 images" in printed
        assert "candle" in printed
        assert "wood" not in printed

    def test_an_interrupted_run_goes_on_as_if_it_had_not_been(self, tmp_path, monkeypatch):
        whole = arms([*QUICK, "--epochs", "4", "--output", str(tmp_path / "whole"), "--no-compare"])["feedback"]
        saved, save = [], recipe.Training.save

        def interrupted(training):
            save(training)
            saved.append(training.epoch)
            if len(saved) == 3:
                raise KeyboardInterrupt

        argv = [*QUICK, "--epochs", "4", "--output", str(tmp_path / "part"), "--no-compare"]
        with monkeypatch.context() as patch:
            patch.setattr(recipe.Training, "save", interrupted)
            with pytest.raises(KeyboardInterrupt):
                arms(argv)
        assert saved == [1, 1, 2]
        part = arms([*argv, "--resume"])["feedback"]
        assert part.trainings[1, 2].losses == whole.trainings[1, 2].losses
        state, expected = (arm.model.adapter_state_dict() for arm in (part, whole))
        assert all(torch.equal(value, expected[name]) for name, value in state.items())
        assert part.ratios == whole.ratios

    def test_a_loss_that_is_not_finite_stops_it(self, tmp_path, capsys):
        assert aa_clip.main(options(tmp_path, "--image-lr", "1e38", "--no-compare")) == 1
        error = capsys.readouterr().err
        assert "stopped: " in error
        assert "at step 2, learning rate 1e+38; the first bad tensor is the" in error
        assert (tmp_path / "runs" / "feedback-loop1-stage1.pt").is_file()
        assert not (tmp_path / "runs" / "feedback-loop1-stage2.pt").exists()

    def test_bad_input(self, tmp_path, capsys):
        run = str(tmp_path / "runs")
        picture(tmp_path / "images" / "a.png")
        say = refused(capsys, *options(tmp_path, "--data", str(tmp_path / "images")))
        assert "with 1 images and no class" in say
        say = refused(capsys, *options(tmp_path, "--resume"))
        assert f"--resume must find a checkpoint in --output, got {run}, which holds none" in say
        say = refused(capsys, *options(tmp_path, "--base", str(tmp_path / "base.pt")))
        assert "--base must be a file, got" in say
        for other in ({"lora_a": torch.zeros(1)}, "words"):
            torch.save(other, tmp_path / "base.pt")
            say = refused(capsys, *options(tmp_path, "--base", str(tmp_path / "base.pt")))
            assert "--base must be a base model's adapters, got" in say
        for damaged in (b"no checkpoint", b""):
            (tmp_path / "base.pt").write_bytes(damaged)
            say = refused(capsys, *options(tmp_path, "--base", str(tmp_path / "base.pt"))).splitlines()[-1]
            assert "--base must be a base model's adapters, got" in say
        say = refused(capsys, *options(tmp_path, "--model", "ViT-Z-99"))
        assert "--model and --pretrained must be open_clip's, got" in say
        assert "ViT-Z-99" in say
        say = refused(capsys, *options(tmp_path, "--pretrained", "openai"))
        assert "--pretrained needs a --model of open_clip, got openai" in say
        if not torch.cuda.is_available():
            say = refused(capsys, *options(tmp_path, "--device", "cuda"))
            assert "--device must be a device of this machine, got 'cuda'" in say
        say = refused(capsys, *options(tmp_path, "--image-size", "24"))
        assert "--image-size must give more than 3 patches a side for the blur of maps, got (3, 3)" in say
        assert "--image-lr: expected a positive number, got 'nan'" in refused(
            capsys, *options(tmp_path, "--image-lr", "nan")
        )
        assert "invalid choice: '3'" in refused(capsys, *options(tmp_path, "--stage", "3"))
        assert "expected a whole number of at least 1, got '0'" in refused(
            capsys, *options(tmp_path, "--feedback-loops", "0")
        )

    def test_a_checkpoint_of_other_settings(self, tmp_path, capsys):
        assert aa_clip.main(options(tmp_path, "--stage", "1", "--no-compare")) == 0
        say = refused(capsys, *options(tmp_path, "--stage", "1", "--no-compare", "--resume", "--text-lr", "0.5"))
        assert "feedback-loop1-stage1.pt must be of this run's method and settings, got text_lr 0.001" in say

    def test_a_base_model_of_other_settings(self, tmp_path, capsys):
        assert aa_clip.main(options(tmp_path, "--stage", "1")) == 0
        base = str(tmp_path / "runs" / "base.pt")
        say = refused(capsys, *options(tmp_path, "--base", base, "--relu"))
        assert "projections.0: relu False in the state, True in the model" in say

    def test_metrics(self):
        maps, masks = torch.tensor([[[0.1, 0.2]], [[0.9, 0.3]]]), torch.tensor([[[0, 0]], [[1, 0]]]).bool()
        found = aa_clip.metrics(maps, masks, torch.tensor([0.6, 0.5]), torch.tensor([0, 1]))
        assert found == pytest.approx((100, 100, 0, 50))
        assert all(math.isfinite(value) for value in found)


def test_help_is_complete():
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "aa_clip.py"), "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for action in aa_clip.options()._actions:
        assert action.help
        assert all(name in done.stdout for name in action.option_strings)
    for value in ("--image-size 518", "--epochs 20", "--text-lr 1e-05", "--batch-size 2"):
        assert value in " ".join(done.stdout.split())
