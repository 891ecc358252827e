"""Images for the recipes that classify: scikit-learn's digits, Flowers102 from a local folder, or a folder of pictures.

`load` gives the images to train with, those to test with and the names of the classes; `Images.batches` their batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import recipe
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyfused.bench import thirdparty
from pyfused.bench.cases import data

_HELD_OUT = 0.2
# What no class is called.
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def picture(path: str | Path) -> Any:
    """A file as a PIL image in RGB; 16-bit greyscale keeps its upper 8 bits.

    Raises:
        ValueError: it cannot be read; the message names it.
    """
    pillow = thirdparty.load("PIL.Image")
    try:
        with pillow.open(path) as image:
            if image.mode.startswith("I"):
                return pillow.fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8)).convert("RGB")
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} must be an image that can be read, got: {error}") from error


class Images(Dataset):
    """One split: ``images[numbers]`` is (float32 images (B, 3, size, size), normalised, and int64 labels (B,)).

    Pictures are resized, and those of a folder decoded, when they are asked for.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int, epoch: int | None = None, workers: int = 0) -> DataLoader:
        """Batches of ``size`` samples on the CPU.

        Args:
            size: of a batch.
            epoch: the seed and this number decide the order, and a smaller rest is left. None: all, in their own order.
            workers: processes that decode. Default 0: this one.
        """
        order = None if epoch is None else recipe.shuffled(len(self), size, self.seed, epoch)
        return DataLoader(
            self,
            batch_size=None,
            sampler=torch.arange(len(self)).split(size) if order is None else order,
            num_workers=workers,
            # Torch's own generator, which draws dropout, is left alone.
            generator=torch.Generator(),
        )


class _Digits(Images):
    def __init__(self, pixels: Tensor, labels: Tensor, size: int, mean: Tensor, std: Tensor, seed: int) -> None:
        super().__init__(len(labels), seed)
        self.pixels, self.labels, self.size, self.mean, self.std = pixels, labels, size, mean, std

    def __getitem__(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        pixels = F.interpolate(self.pixels[numbers], size=(self.size, self.size), mode="bilinear", antialias=True)
        return (pixels - self.mean) / self.std, self.labels[numbers]


class _Files(Images):
    def __init__(self, pictures: Dataset, numbers: Sequence[int], seed: int) -> None:
        super().__init__(len(numbers), seed)
        self.pictures, self.numbers = pictures, numbers

    def __getitem__(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = zip(*(self.pictures[self.numbers[number]] for number in numbers.tolist()), strict=True)
        return torch.stack(images), torch.tensor(labels)


def load(
    name_or_path: str | Path,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    *,
    root: str | Path = "data",
    interpolation: str = "bicubic",
    crop: float = 1.0,
) -> tuple[Images, Images, list[str]]:
    """(training images, test images, names of the classes by label).

    Args:
        name_or_path: "digits": scikit-learn's 1,797, a fifth held out. "flowers102": torchvision's Flowers102, its
            splits train and test. Else a folder: of ``train`` and ``test`` (or ``val``), each with one folder of images
            per class; or of these class folders alone, a fifth of each class held out.
        size: height and width in pixels.
        mean, std: of each channel, as the model wants it, for values in [0, 1].
        seed: of the order of the training images, and of what is held out.
        root: folder that holds ``flowers-102``. Default "data".
        interpolation: of files: torchvision's name. Default "bicubic". Digits are resized bilinearly.
        crop: of files, which part of the shorter side is kept, in (0, 1]. Default 1.

    Raises:
        ValueError: nothing has that name, Flowers102 is not there, or a folder has no two classes, an empty class, a
            class of one image where some are held out, or other classes for the test than for training.
        pyfused.bench.thirdparty.Unavailable: scikit-learn or torchvision is missing.
    """
    if str(name_or_path) == "digits":
        return _digits(size, mean, std, seed)
    transforms = thirdparty.load("torchvision.transforms.v2")
    transform = transforms.Compose(
        [
            transforms.Resize(round(size / crop), transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(size),
            transforms.PILToTensor(),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(list(mean), list(std)),
        ]
    )
    if str(name_or_path) == "flowers102":
        return _flowers(Path(root), transform, seed)
    return _folder(Path(name_or_path), transform, seed)


def _digits(size: int, mean: Sequence[float], std: Sequence[float], seed: int) -> tuple[Images, Images, list[str]]:
    pixels, labels = data.digits(8)
    # From [-1, 1] to [0, 1].
    pixels = (pixels + 1) / 2
    statistics = (torch.tensor(values)[:, None, None] for values in (mean, std))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out = round(_HELD_OUT * len(labels))
    mean, std = statistics
    parts = (order[held_out:], order[:held_out])
    train, test = (_Digits(pixels[part], labels[part], size, mean, std, seed) for part in parts)
    return train, test, [str(digit) for digit in range(10)]


def _flowers(root: Path, transform: Any, seed: int) -> tuple[Images, Images, list[str]]:
    Flowers102 = thirdparty.load("torchvision.datasets").Flowers102
    try:
        train, test = (Flowers102(root, split, transform) for split in ("train", "test"))
    except RuntimeError as error:
        raise ValueError(
            f"flowers102 must lie in {root / 'flowers-102'}, as jpg/ (of 102flowers.tgz), imagelabels.mat and "
            f"setid.mat, got none or others; torchvision.datasets.Flowers102({str(root)!r}, download=True) fetches them"
        ) from error
    return _Files(train, range(len(train)), seed), _Files(test, range(len(test)), seed), list(Flowers102.classes)


def _folder(path: Path, transform: Any, seed: int) -> tuple[Images, Images, list[str]]:
    if not path.is_dir():
        raise ValueError(f"data must be digits, flowers102 or a folder of images, got {str(path)!r}: no folder")
    held_out = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    if held_out is not None and (path / "train").is_dir():
        train, test = (_pictures(folder, transform) for folder in (path / "train", held_out))
        if train.classes != test.classes:
            raise ValueError(f"{held_out} must hold the classes of train, {train.classes}, got {test.classes}")
        return _Files(train, range(len(train)), seed), _Files(test, range(len(test)), seed), train.classes
    pictures = _pictures(path, transform)
    labels = torch.tensor(pictures.targets)
    kept: list[int] = []
    tested: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    for label, name in enumerate(pictures.classes):
        (numbers,) = torch.where(labels == label)
        if len(numbers) < 2:
            raise ValueError(f"{path / name} must hold two images or more, one of them to be held out, got 1")
        numbers = numbers[torch.randperm(len(numbers), generator=generator)]
        count = max(1, round(_HELD_OUT * len(numbers)))
        tested += numbers[:count].tolist()
        kept += numbers[count:].tolist()
    return _Files(pictures, kept, seed), _Files(pictures, tested, seed), pictures.classes


def _pictures(path: Path, transform: Any) -> Any:
    """torchvision's ImageFolder of two classes or more, none of them empty."""
    try:
        pictures = thirdparty.load("torchvision.datasets").ImageFolder(path, transform, loader=picture)
    except FileNotFoundError as error:
        raise ValueError(f"{path} must hold one folder of images for each class, got: {error}") from error
    splits = [name for name in pictures.classes if name.lower() in _SPLITS]
    if splits:
        raise ValueError(
            f"{path} must hold a folder of images for each class, or the folders train and test (or val), got {splits}"
        )
    if len(pictures.classes) < 2:
        raise ValueError(
            f"{path} must hold the folders of two classes or more (or train with test or val beside it), got "
            f"{pictures.classes}"
        )
    return pictures
