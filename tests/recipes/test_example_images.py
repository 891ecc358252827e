"""The recipes' image data: what is loaded, how it is prepared, in which order it comes, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tree import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import images

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")
Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")

MEAN, STD = (0.5, 0.25, 0.125), (0.5, 0.25, 2.0)


def write(folder: Path, count: int, size: tuple[int, int] = (12, 10), shade: int = 0) -> None:
    """``count`` pictures of one colour each, no two alike."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", size, (shade, number, 255)).save(folder / f"{number}.png")


def gathered(split: images.Images) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and labels, in the split's own order."""
    parts = zip(*split.batches(7), strict=True)
    pictures, labels = (torch.cat(part) for part in parts)
    return pictures, labels


def numbers(split: images.Images) -> list[tuple[int, int]]:
    """(label, number of the picture) by the colours that `write` gave."""
    pictures, labels = gathered(split)
    found = (pictures[:, 1, 0, 0] * STD[1] + MEAN[1]) * 255
    return list(zip(labels.tolist(), found.round().int().tolist(), strict=True))


class TestDigits:
    def test_all_of_them_in_two_parts(self):
        from sklearn.datasets import load_digits

        train, test, names = images.load("digits", 8, MEAN, STD, seed=3)
        assert (len(train), len(test), names) == (1438, 359, [*"0123456789"])
        bundle = load_digits()
        wanted = sorted((label, *row) for label, row in zip(bundle.target.tolist(), bundle.data.tolist(), strict=True))
        found = []
        for split in (train, test):
            pictures, labels = gathered(split)
            assert pictures.dtype == torch.float32
            assert labels.dtype == torch.int64
            shades = pictures * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
            for channel in range(3):
                torch.testing.assert_close(shades[:, channel], shades[:, 0])
            rows = (shades[:, 0].flatten(1) * 16).round().tolist()
            found += [(label, *row) for label, row in zip(labels.tolist(), rows, strict=True)]
        assert sorted(found) == wanted

    def test_the_seed_decides_what_is_held_out(self):
        first, again, other = (images.load("digits", 4, MEAN, STD, seed)[1] for seed in (0, 0, 1))
        assert torch.equal(gathered(first)[0], gathered(again)[0])
        assert not torch.equal(gathered(first)[1], gathered(other)[1])

    def test_resized(self):
        small, _ = gathered(images.load("digits", 8, (0.0,) * 3, (1.0,) * 3, 0)[1])
        large, _ = gathered(images.load("digits", 20, (0.0,) * 3, (1.0,) * 3, 0)[1])
        assert large.shape == (359, 3, 20, 20)
        wanted = torch.nn.functional.interpolate(small, size=20, mode="bilinear", antialias=True)
        torch.testing.assert_close(large, wanted)


class TestBatches:
    def order(self, seed: int, epoch: int, **options) -> list[int]:
        train, _, _ = images.load("digits", 8, MEAN, STD, 0)
        train.seed = seed
        assert [len(labels) for _, labels in train.batches(100, epoch, **options)] == [100] * 14
        assert len(train.batches(100, epoch)) == 14
        pictures = torch.cat([pictures for pictures, _ in train.batches(100, epoch, **options)])
        rows = {tuple(row): place for place, row in enumerate(gathered(train)[0].flatten(1).tolist())}
        return [rows[tuple(row)] for row in pictures.flatten(1).tolist()]

    def test_an_order_of_its_own_for_each_seed_and_epoch(self):
        first = self.order(0, 0)
        # Two of the digits are the same picture; none else comes twice.
        assert len(set(first)) >= 1399
        assert first == self.order(0, 0)
        assert len({tuple(order) for order in (first, self.order(0, 1), self.order(1, 0), self.order(1, 1))}) == 4

    def test_decoded_by_other_processes(self):
        assert self.order(0, 0, workers=2) == self.order(0, 0)

    def test_torchs_generator_is_left_alone(self):
        train, test, _ = images.load("digits", 8, MEAN, STD, 0)
        state = torch.get_rng_state()
        for split in (train.batches(500, 3), test.batches(500), train.batches(2000, 0)):
            assert len(list(split)) > 0
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_rest_is_left_in_training_and_kept_in_a_test(self):
        train, test, _ = images.load("digits", 8, MEAN, STD, 0)
        assert [len(labels) for _, labels in test.batches(100)] == [100, 100, 100, 59]
        assert [len(labels) for _, labels in train.batches(1000, 0)] == [1000]
        # A set smaller than a batch is one batch.
        assert [len(labels) for _, labels in train.batches(2000, 0)] == [1438]


class TestFolders:
    @pytest.mark.parametrize("held_out", ["val", "test"])
    def test_split_by_its_owner(self, tmp_path, held_out):
        for part, counts in (("train", (5, 3)), (held_out, (2, 4))):
            for name, count in zip("ba", counts, strict=True):
                write(tmp_path / part / name, count, shade=10 if name == "a" else 20)
        train, test, names = images.load(tmp_path, 6, MEAN, STD, 0)
        assert names == ["a", "b"]
        assert numbers(train) == [(0, n) for n in range(3)] + [(1, n) for n in range(5)]
        assert numbers(test) == [(0, n) for n in range(4)] + [(1, n) for n in range(2)]
        pictures, labels = gathered(train)
        assert pictures.shape == (8, 3, 6, 6)
        shades = torch.where(labels == 0, 10, 20) / 255
        torch.testing.assert_close(pictures[:, 0], ((shades - MEAN[0]) / STD[0])[:, None, None].expand(-1, 6, 6))
        torch.testing.assert_close(pictures[:, 2], torch.full((8, 6, 6), (1 - MEAN[2]) / STD[2]))

    def test_test_comes_before_val(self, tmp_path):
        for part, count in (("train", 3), ("val", 2), ("test", 4)):
            for name in "ab":
                write(tmp_path / part / name, count)
        train, test, _ = images.load(str(tmp_path), 6, MEAN, STD, 0)
        assert (len(train), len(test)) == (6, 8)

    def test_a_fifth_of_each_class_is_held_out(self, tmp_path):
        counts = {"a": 10, "b": 5, "c": 2}
        for name, count in counts.items():
            write(tmp_path / name, count)
        parts = [images.load(tmp_path, 6, MEAN, STD, seed)[:2] for seed in (0, 0, 1)]
        for train, test in parts:
            assert sorted(numbers(train) + numbers(test)) == [
                (label, n) for label, count in enumerate(counts.values()) for n in range(count)
            ]
            assert [label for label, _ in sorted(numbers(test))] == [0, 0, 1, 2]
        assert numbers(parts[0][1]) == numbers(parts[1][1])
        assert numbers(parts[0][1]) != numbers(parts[2][1])

    @pytest.mark.parametrize(("crop", "framed"), [(1.0, True), (0.75, False)])
    def test_the_shorter_side_is_resized_and_the_middle_kept(self, tmp_path, crop, framed):
        # 48 x 24, framed by 3: red to the left, green to the right.
        picture = Image.new("RGB", (48, 24), (0, 0, 255))
        picture.paste((255, 0, 0), (3, 3, 24, 21))
        picture.paste((0, 255, 0), (24, 3, 45, 21))
        for part in ("train", "val"):
            for name in "ab":
                (tmp_path / part / name).mkdir(parents=True)
                picture.save(tmp_path / part / name / "0.png")
        train, _, _ = images.load(tmp_path, 12, (0.0,) * 3, (1.0,) * 3, 0, interpolation="nearest", crop=crop)
        pictures, _ = gathered(train)
        assert pictures.shape == (2, 3, 12, 12)
        red, green, blue = pictures[0]
        assert (red[4:8, :6] == 1).all()
        assert (green[4:8, 6:] == 1).all()
        # The frame above and below is in it only where nothing is cropped; the ends of the longer side never are.
        assert bool(blue[0].all()) == framed
        assert not blue[4:8].any()

    def refused(self, path: Path) -> str:
        with pytest.raises(ValueError, match="must") as caught:
            images.load(path, 6, MEAN, STD, 0)
        return str(caught.value)

    def test_refusals(self, tmp_path):
        assert "must be digits, flowers102 or a folder of images, got 'digit': no folder" in self.refused(Path("digit"))
        empty = tmp_path / "empty"
        empty.mkdir()
        assert f"{empty} must hold one folder of images for each class, got: Couldn't find any class" in self.refused(
            empty
        )
        for split in ("train", "valid"):
            write(tmp_path / "splits" / split / "a", 2)
        assert (
            f"{tmp_path / 'splits'} must hold a folder of images for each class, or the folders train and test (or val)"
            in (self.refused(tmp_path / "splits"))
        )
        write(tmp_path / "one" / "a", 2)
        assert f"{tmp_path / 'one'} must hold the folders of two classes or more" in self.refused(tmp_path / "one")
        write(tmp_path / "hole" / "a", 2)
        (tmp_path / "hole" / "b").mkdir()
        assert "Found no valid file for the classes b" in self.refused(tmp_path / "hole")
        for name, count in (("a", 1), ("b", 3)):
            write(tmp_path / "lone" / name, count)
        assert f"{tmp_path / 'lone' / 'a'} must hold two images or more" in self.refused(tmp_path / "lone")
        for part, names in (("train", "ab"), ("val", "ac")):
            for name in names:
                write(tmp_path / "other" / part / name, 2)
        assert "val must hold the classes of train, ['a', 'b'], got ['a', 'c']" in self.refused(tmp_path / "other")


class TestFlowers:
    def test_absent(self, tmp_path):
        with pytest.raises(ValueError, match=r"flowers102 must lie in .*flowers-102, as jpg/ .* fetches them"):
            images.load("flowers102", 6, MEAN, STD, 0, root=tmp_path)

    def test_read(self, tmp_path, monkeypatch):
        from torchvision.datasets import Flowers102

        scipy_io = pytest.importorskip("scipy.io", reason="scipy is not installed")
        # The files here are small ones of the same form, with other sums.
        monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
        base = tmp_path / "flowers-102"
        (base / "jpg").mkdir(parents=True)
        for number in range(1, 8):
            Image.new("RGB", (12, 10), (0, 30 * number, 0)).save(base / "jpg" / f"image_{number:05d}.jpg", quality=100)
        scipy_io.savemat(base / "imagelabels.mat", {"labels": [[77, 1, 102, 5, 5, 9, 2]]})
        scipy_io.savemat(base / "setid.mat", {"trnid": [[3, 1]], "valid": [[7]], "tstid": [[2, 6, 4]]})
        train, test, names = images.load("flowers102", 6, (0.0,) * 3, (1.0,) * 3, 0, root=tmp_path)
        assert len(names) == 102
        assert names[0] == "pink primrose"
        for split, labels, shades in ((train, [101, 76], [90, 30]), (test, [0, 8, 4], [60, 180, 120])):
            pictures, found = gathered(split)
            assert found.tolist() == labels
            torch.testing.assert_close(pictures[:, 1, 3, 3] * 255, torch.tensor(shades).float(), rtol=0, atol=3)


class TestPicture:
    def test_every_mode_is_rgb(self, tmp_path):
        ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
        Image.fromarray(ramp).save(tmp_path / "deep.png")
        expected = np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, -1)
        assert (np.asarray(images.picture(tmp_path / "deep.png")) == expected).all()
        for mode in ("L", "LA", "RGBA", "P", "1"):
            Image.fromarray(expected).convert(mode).save(tmp_path / f"{mode}.png")
            assert images.picture(tmp_path / f"{mode}.png").mode == "RGB"

    def test_what_cannot_be_read_is_named(self, tmp_path):
        Image.new("RGB", (64, 64), (1, 2, 3)).save(tmp_path / "whole.png")
        (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:80])
        (tmp_path / "text.png").write_text("no image")
        for name in ("half.png", "text.png"):
            with pytest.raises(ValueError, match=f"{name} must be an image that can be read, got: "):
                images.picture(tmp_path / name)
