"""Data of the AA-CLIP recipe: folders in MVTec's and in VisA's layout, and textures with defects that it makes itself.

MVTec AD, and VisA as its own prepare_data.py writes it, with any names of classes and defects:

    CLASS/train/good/*  CLASS/test/good/*  CLASS/test/DEFECT/NAME.*  CLASS/ground_truth/DEFECT/NAME_mask.* or NAME.*

VisA as it is published, by split_csv/1cls.csv (object, split, label, image, mask) or, without one, by each class's
image_anno.csv (image, label, mask), where all images are test images:

    CLASS/Data/Images/Normal/*  CLASS/Data/Images/Anomaly/NAME.*  CLASS/Data/Masks/Anomaly/NAME.*
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import images
import numpy as np
import recipe
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyfused.bench import thirdparty

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
_SPLIT = Path("split_csv") / "1cls.csv"
_ANNOTATIONS = "image_anno.csv"


class Sample(NamedTuple):
    """One image: its class, "good" or the kind of its defect, and where its mask is; None where it is good."""

    image: Path
    category: str
    defect: str
    mask: Path | None


class Split(NamedTuple):
    """What the folder says is for training, and for testing."""

    train: list[Sample]
    test: list[Sample]


# ---- layouts


def read(folder: Path) -> Split:
    """All images of a folder in one of the layouts above.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no classes, or masks do not match its images; the message names them.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"the data must be a folder, or synthetic, got {folder}")
    if (folder / _SPLIT).is_file():
        return _visa([folder / _SPLIT], folder)
    classes = [child for child in sorted(folder.iterdir()) if child.is_dir()]
    if annotated := [child / _ANNOTATIONS for child in classes if (child / _ANNOTATIONS).is_file()]:
        return _visa(annotated, folder)
    if any((child / "test").is_dir() for child in classes):
        if halves := [child.name for child in classes if (child / "train").is_dir() and not (child / "test").is_dir()]:
            raise ValueError(
                f"the data must have a folder test beside each train, {folder} has none in {_named(halves)}"
            )
        return _mvtec([child for child in classes if (child / "test").is_dir()])
    own = sum(path.suffix.lower() in _SUFFIXES for path in folder.iterdir())
    hint = "; it is a class itself: give the folder above it" if (folder / "test").is_dir() else ""
    raise ValueError(
        f"the data must hold a folder for each class, with test/DEFECT in it, or VisA's {_SPLIT} or {_ANNOTATIONS}, "
        f"got {folder} with {own} images and no class{hint}"
    )


def _mvtec(classes: Sequence[Path]) -> Split:
    split = Split([], [])
    for folder in classes:
        kinds = {path.name for path in folder.glob("ground_truth/*")} - {path.name for path in folder.glob("t*/*")}
        if kinds:
            raise ValueError(
                f"the data must have images for each folder of masks, {folder / 'ground_truth'} has "
                f"{_named(sorted(kinds))} without a folder in test"
            )
        for part, samples in (("train", split.train), ("test", split.test)):
            for kind in sorted(path for path in folder.glob(f"{part}/*") if path.is_dir()):
                images = _images(kind)
                masks: list[Path | None] = [None] * len(images)
                if kind.name != "good":
                    masks = [*_matched(images, kind, folder / "ground_truth" / kind.name)]
                samples += [Sample(i, folder.name, kind.name, m) for i, m in zip(images, masks, strict=True)]
    return split


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)


def _matched(images: Sequence[Path], folder: Path, ground_truth: Path) -> list[Path]:
    """The mask of each image."""
    masks = {path.stem.removesuffix("_mask"): path for path in _images(ground_truth)} if ground_truth.is_dir() else {}
    names = [image.stem for image in images]
    missing, left = sorted(set(names) - masks.keys()), sorted(masks.keys() - set(names))
    if missing or left:
        raise ValueError(
            f"the data must have a mask for each image with a defect: {ground_truth} lacks {_named(missing)} of "
            f"{folder}, and has {_named(left)} without an image"
        )
    return [masks[name] for name in names]


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "none"


def _visa(tables: Sequence[Path], folder: Path) -> Split:
    split = Split([], [])
    absent = []
    for path in tables:
        needed = {"image", "label", "mask"} | ({"object", "split"} if path.name == _SPLIT.name else set())
        # With the mark that some editors put in front of a table.
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if missing := needed - set(rows.fieldnames or ()):
                raise ValueError(f"{path} must have columns {sorted(needed)}, got none of {sorted(missing)}")
            for row in rows:
                defect = "good" if row["label"] == "normal" else row["label"]
                if defect != "good" and not row["mask"]:
                    raise ValueError(f"{path} must have a mask for each image with a defect, got none for {row}")
                sample = Sample(
                    folder / row["image"], row.get("object", path.parent.name), defect,
                    None if defect == "good" else folder / row["mask"],
                )  # fmt: skip
                absent += [str(p) for p in (sample.image, sample.mask) if p is not None and not p.is_file()]
                (split.train if row.get("split") == "train" else split.test).append(sample)
    if absent:
        raise ValueError(f"the data must have the files that {tables[0]} names, {folder} lacks {_named(absent)}")
    return split


def halves(samples: Iterable[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Every other image of each kind of each class, and the rest."""
    kinds: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        kinds[sample.category, sample.defect].append(sample)
    return [s for kind in kinds.values() for s in kind[::2]], [s for kind in kinds.values() for s in kind[1::2]]


def check_kinds(use: str, samples: Sequence[Sample], classes: bool) -> None:
    """Refuses images that are all good, or all with a defect; with ``classes`` of each class, else of all together."""
    if not samples:
        raise ValueError(f"{use} must be at least one good image and one with a defect, got none")
    for category in sorted({sample.category for sample in samples}) if classes else ["all classes"]:
        good = [sample.defect == "good" for sample in samples if not classes or sample.category == category]
        if all(good) or not any(good):
            raise ValueError(
                f"{use} must have good images and images with a defect, got {sum(good)} good and "
                f"{len(good) - sum(good)} with a defect in {category}"
            )


def names_of(path: Path | None, categories: Sequence[str]) -> list[str]:
    """What each class is called in prompts: by a JSON file {class: words}, else by its folder.

    Raises:
        ValueError: the file has something else in it, or names for other classes.
    """
    given = {}
    if path is not None:
        try:
            given = json.loads(path.read_text())
        except (ValueError, OSError) as error:
            raise ValueError(f"--names must be a file of JSON, got {path}: {error}") from error
        words = isinstance(given, dict) and all(isinstance(word, str) for word in given.values())
        if not words or not given.keys() <= set(categories):
            raise ValueError(f"--names must be words for some of the classes {list(categories)}, got {given} in {path}")
    return [given.get(category, category.replace("_", " ")) for category in categories]


# ---- images


class Anomalies(Dataset):
    """``anomalies[numbers]``: images (B, 3, S, S), masks (B, S, S) bool, labels (B,), classes (B,), the last two int64.

    Args:
        samples: read when they are asked for.
        categories: names of the classes, in whose order they are numbered.
        transform: PIL image -> (3, S, S).
        size: S; masks are resized to it without new values.
    """

    def __init__(
        self, samples: Sequence[Sample], categories: Sequence[str], transform: Callable[[Any], Tensor], size: int
    ) -> None:
        self.samples, self.transform, self.size = list(samples), transform, size
        self.labels = torch.tensor([sample.defect != "good" for sample in samples]).long()
        self.classes = torch.tensor([categories.index(sample.category) for sample in samples])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pairs = [self._read(self.samples[number]) for number in numbers.tolist()]
        images, masks = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        return images, masks, self.labels[numbers], self.classes[numbers]

    def _read(self, sample: Sample) -> tuple[Tensor, Tensor]:
        image = images.picture(sample.image)
        given, pixels = image.size, self.transform(image)
        if sample.mask is None:
            return pixels, torch.zeros(self.size, self.size, dtype=torch.bool)
        with Image.open(sample.mask) as mask:
            if mask.size != given:
                raise ValueError(f"{sample.mask} must have its image's size {given}, got {mask.size}")
            # Colours, not their numbers in a palette, and no transparency. VisA numbers the kinds of defects, others
            # write 255.
            colours = {"P": "RGB", "PA": "RGB", "RGBA": "RGB", "LA": "L"}.get(mask.mode)
            values = np.asarray(mask if colours is None else mask.convert(colours))
        if not values.any():
            raise ValueError(f"{sample.mask} must mark a defect, got black alone")
        whole = Image.fromarray((values.any(-1) if values.ndim == 3 else values != 0).astype(np.uint8))
        small = whole.resize((self.size, self.size), Image.Resampling.NEAREST)
        return pixels, torch.from_numpy(np.array(small)).bool()

    def batches(self, size: int, *seeds: int, workers: int = 0) -> DataLoader:
        """``size`` images at a time, in an order that the seeds decide, a smaller rest left; without: all, in order."""
        order = recipe.shuffled(len(self), size, *seeds) if seeds else torch.arange(len(self)).split(size)
        return DataLoader(self, batch_size=None, sampler=order, num_workers=workers, generator=torch.Generator())


def picture(folder: Path, sample: Sample, mask: Tensor, shades: Tensor) -> None:
    """Writes an image, its mask and its map, in 0..1, side by side."""
    with Image.open(sample.image) as image:
        pixels = np.asarray(image.convert("RGB").resize(mask.shape[::-1])) / 255
    colours = thirdparty.load("matplotlib").colormaps["inferno"](shades.numpy())[..., :3]
    strip = np.hstack([pixels, np.repeat(mask.numpy()[..., None], 3, -1), colours])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{sample.category}-{sample.defect}-{sample.image.stem}.png"
    Image.fromarray((255 * strip).astype(np.uint8)).save(path)


# ---- the synthetic set


def synthesize(folder: Path, seed: int, size: int = 64, count: int = 6) -> Path:
    """Striped fabric and grainy stone, good, scratched to the rust and stained, in MVTec's layout.

    Args:
        folder: what is in it under the same names is replaced.
        seed: decides every pixel.
        size: of the square images, in pixels.
        count: of images of each kind: train/good, test/good, test/scratch and test/stain of each class.

    Returns:
        ``folder``.
    """
    random = np.random.default_rng(seed)
    for category, texture in (("striped_fabric", _stripes), ("grainy_stone", _grain)):
        for part, kind in (("train", "good"), ("test", "good"), ("test", "scratch"), ("test", "stain")):
            for number in range(count):
                image = Image.fromarray(texture(random, size))
                place = folder / category / part / kind / f"{number:03d}.png"
                if kind != "good":
                    mask = _damage(image, kind, random)
                    truth = folder / category / "ground_truth" / kind / f"{number:03d}_mask.png"
                    truth.parent.mkdir(parents=True, exist_ok=True)
                    mask.save(truth)
                place.parent.mkdir(parents=True, exist_ok=True)
                image.save(place)
    return folder


def _stripes(random: np.random.Generator, size: int) -> np.ndarray:
    angle, phase, period = random.uniform(0, 0.3), random.uniform(0, 6), random.uniform(6, 9)
    y, x = np.mgrid[:size, :size]
    wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + phase)
    shade = 120 + 40 * wave + random.normal(0, 6, (size, size))
    return np.clip(shade[..., None] * (0.7, 0.9, 1.2), 0, 255).astype(np.uint8)


def _grain(random: np.random.Generator, size: int) -> np.ndarray:
    noise = random.normal(0, 20, (size, size))
    rolled = sum(np.roll(noise, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)) / 3
    return np.clip((140 + rolled)[..., None] * (1.0, 0.95, 0.85), 0, 255).astype(np.uint8)


def _damage(image: Image.Image, kind: str, random: np.random.Generator) -> Image.Image:
    """Draws a defect into the image; its mask, 255 where it is."""
    size = image.width
    mask = Image.new("L", image.size)
    x, y = random.uniform(0.25, 0.75, 2) * size
    if kind == "scratch":
        angle, half = random.uniform(0, np.pi), random.uniform(0.2, 0.35) * size
        dx, dy = half * np.cos(angle), half * np.sin(angle)
        places, colour = (x - dx, y - dy, x + dx, y + dy), (230, 70, 40)
        ImageDraw.Draw(mask).line(places, 255, max(1, size // 16))
    else:
        a, b = random.uniform(0.08, 0.16, 2) * size
        places, colour = (x - a, y - b, x + a, y + b), (40, 20, 10)
        ImageDraw.Draw(mask).ellipse(places, 255)
    image.paste(colour, (0, 0), mask)
    return mask
