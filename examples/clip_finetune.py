"""LoRA, BitFit, prefix tuning, adapters, or everything: fine-tune the image tower of a CLIP, and compare the methods.

    python examples/clip_finetune.py --model tiny --data digits --compare
    python examples/clip_finetune.py --method lora --data PATH --pretrained laion2b_s34b_b79k --precision bfloat16
    python examples/clip_finetune.py --method bitfit --data flowers102 --head zero-shot --pretrained laion2b_s34b_b79k

The text tower is frozen in every method, and gives the zero-shot head. --compare starts all methods from one CLIP and
one head, made from --seed, on the same batches. Before training, the checklist runs one step and takes it back.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import images
import recipe
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfused import BottleneckAdapter, PrefixTuning, Preset, bitfit, inject_lora, param_groups, preset, preset_for
from pyfused.bench import thirdparty
from pyfused.diagnostics import check
from pyfused.methods.presets import PRESETS, RATES
from pyfused.surgery.report import Counts, count

METHODS = ("lora", "bitfit", "prefix", "adapter", "full", "head")
# Of the whole tower; the document has none, and this is what is usual for a CLIP.
_FULL_RATE = 1e-5
# Of a new linear head, the same in every method, so that they differ by what they do to the tower.
_HEAD_RATE = 1e-3
# Of random weights, which have everything to learn. On digits, three seeds, 3 epochs, 30 was the best of 1, 3, 10, 30
# for every method. The attention of a random tower is nearly uniform, so that little reaches a prefix: 300 for it.
_RANDOM_FACTOR, _RANDOM_PREFIX_FACTOR = 30.0, 300.0
_TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def options() -> argparse.ArgumentParser:
    made = recipe.parser(__doc__, epochs=6, output=Path("runs/clip"))
    made.add_argument("--method", choices=METHODS, default="lora", help="what trains beside the head")
    made.add_argument("--compare", action="store_true", help="every method, one after another, from one seed")
    made.add_argument("--preset", choices=("auto", *PRESETS), default="auto", help="of LoRA; auto: by the classes")
    made.add_argument("--model", default="ViT-B-32", help="open_clip's, with a ViT; tiny: a small one, for a trial")
    made.add_argument("--pretrained", metavar="TAG", help="open_clip's, or a file; none: random weights")
    made.add_argument("--data", default="digits", help="digits, flowers102 or a folder: see examples/images.py")
    made.add_argument("--root", type=Path, default=Path("data"), help="folder that holds flowers-102")
    made.add_argument("--workers", type=recipe.natural, default=0, help="processes that decode images")
    made.add_argument("--head", choices=("linear", "zero-shot"), default="linear", help="zero-shot: the classes' texts")
    made.add_argument(
        "--lr", type=recipe.rate, help=f"of the method; none: its own, its preset's, {_FULL_RATE:g} for full"
    )
    made.add_argument("--head-lr", type=recipe.rate, help=f"of a linear head; none: {_HEAD_RATE:g}")
    made.add_argument("--lr-factor", type=recipe.rate, help="of rates that are not given; none: 1, random weights more")
    made.add_argument(
        "--lora-plus", type=recipe.rate, default=1.0, help="LoRA+: B's rate over A's; its authors take 16"
    )
    made.add_argument("--weight-decay", type=recipe.amount, default=0.01, help="of matrices")
    made.add_argument("--warmup", type=recipe.share, default=0.1, help="part of all steps in which rates rise")
    made.add_argument("--clip", type=recipe.rate, default=1.0, help="largest norm of the gradient")
    made.add_argument("--virtual-tokens", type=recipe.positive, default=10, help="of prefix, in each attention")
    made.add_argument("--reduction", type=recipe.rate, default=12.0, help="of adapter: C over its width")
    made.add_argument("--compile", action="store_true", help="run under torch.compile")
    return made


# ---- the model


class ClipClassifier(nn.Module):
    """A CLIP and a head on its image features: (B, 3, H, W) -> (B, classes)."""

    def __init__(self, clip: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.clip, self.head = clip, head

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.clip.encode_image(pictures))


class ZeroShotHead(nn.Module):
    """Features' cosines with those of the classes' texts (width, classes), times CLIP's temperature."""

    def __init__(self, texts: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", scale.detach() * texts.detach())

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1) @ self.weight.to(features.dtype)


@dataclass(frozen=True)
class Clip:
    """A CLIP as made: the model, how its pictures are prepared, and its tokenizer."""

    model: nn.Module
    images: dict[str, Any]
    tokenizer: Callable[[Sequence[str]], Tensor]


def make_clip(name: str, pretrained: str | None) -> Clip:
    """open_clip's model of that name, or the tiny one, on the CPU in float32.

    Raises:
        ValueError: there is no such model or no such weights, or the image tower is no ViT.
        thirdparty.Unavailable: open_clip is missing.
    """
    open_clip = thirdparty.load("open_clip")
    statistics = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    if name == "tiny":
        if pretrained is not None:
            raise ValueError(f"--pretrained must be left out with --model tiny, got {pretrained!r}")
        tokenizer = open_clip.SimpleTokenizer(context_length=_TINY["text_cfg"]["context_length"])
        return Clip(open_clip.CLIP(**_TINY), statistics | {"size": 32}, tokenizer)
    if name not in open_clip.list_models():
        raise ValueError(
            f"--model must be tiny or one of open_clip's {', '.join(open_clip.list_models())}, got {name!r}"
        )
    try:
        model = open_clip.create_model(name, pretrained)
    except Exception as error:
        if pretrained is None:
            raise
        raise ValueError(f"--pretrained must name weights of {name}, got {pretrained!r}: {error}") from error
    if not hasattr(getattr(model.visual, "transformer", None), "resblocks"):
        raise ValueError(f"--model must have a ViT as its image tower, got {name!r}; see examples/fastvit_adapters.py")
    prepared = {key: model.visual.preprocess_cfg[key] for key in ("mean", "std", "interpolation")}
    return Clip(model, prepared | {"size": model.visual.image_size[0]}, open_clip.get_tokenizer(name))


def make_head(clip: Clip, kind: str, names: Sequence[str]) -> nn.Module:
    """A linear head for these classes, or one of their texts."""
    if kind == "linear":
        with torch.no_grad():
            width = (
                clip.model.eval().encode_image(torch.zeros(1, 3, clip.images["size"], clip.images["size"])).shape[-1]
            )
        return nn.Linear(width, len(names))
    open_clip = thirdparty.load("open_clip")
    templates = open_clip.SIMPLE_IMAGENET_TEMPLATES
    texts = open_clip.build_zero_shot_classifier(clip.model.eval(), clip.tokenizer, names, templates)
    return ZeroShotHead(texts, clip.model.logit_scale.exp())


# ---- the methods


def adapt(model: ClipClassifier, method: str, chosen: Preset, args: argparse.Namespace) -> Counts:
    """Freeze ``model`` but its head and what ``method`` trains of the image tower, and put that in; returns the report.

    Raises:
        ValueError: a setting is out of range, or nothing trains.
    """
    train = ("head",) if any(True for _ in model.head.parameters()) else ()
    beside = [name for name, _ in model.named_parameters() if not name.startswith(("clip.visual.", "head."))]
    modules = [f"clip.{name}" for name, _ in model.clip.named_children() if name != "visual"]
    if method == "lora":
        return inject_lora(model, train=train, exclude=modules, **chosen.lora)
    if method == "bitfit":
        return bitfit(model, train, exclude=beside)
    if method == "prefix":
        return PrefixTuning(model, args.virtual_tokens, train=train, exclude=modules).report
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    if method == "full":
        model.clip.visual.requires_grad_(True)
    elif method == "adapter":
        for block in model.clip.visual.transformer.resblocks:
            # After the MLP, before the sum with what went around it, as Houlsby's; U starts at zero.
            width = block.mlp.c_proj.out_features
            block.mlp = nn.Sequential(block.mlp, BottleneckAdapter(width, args.reduction, skip=False))
    elif not train:
        raise ValueError("--head must be linear for method head: of a zero-shot head nothing trains")
    return Counts(**count(model))


def groups_of(model: ClipClassifier, method: str, chosen: Preset, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The optimizer's groups: the tower's by its method's rate, then the head's."""
    rates = {**RATES, "lora": chosen.lr, "whole": _FULL_RATE}
    factor = head_factor = 1.0 if args.lr_factor is None else args.lr_factor
    if _raised(args):
        factor, head_factor = _RANDOM_PREFIX_FACTOR if method == "prefix" else _RANDOM_FACTOR, _RANDOM_FACTOR
    groups: list[dict[str, Any]] = []
    if method != "head":
        scaled = {name: factor * rate if args.lr is None else args.lr for name, rate in rates.items()}
        groups += param_groups(model.clip.visual, scaled, args.weight_decay, args.lora_plus)
    if any(True for _ in model.head.parameters()):
        head_rate = head_factor * _HEAD_RATE if args.head_lr is None else args.head_lr
        groups += param_groups(model.head, head_rate, args.weight_decay)
    return groups


def _raised(args: argparse.Namespace) -> bool:
    """Whether rates are raised because all weights are random."""
    return args.lr_factor is None and args.pretrained is None


@dataclass
class Result:
    """One method, trained: what trains, its losses and times, the share of test images in the right class."""

    report: Counts
    training: recipe.Training
    accuracy: float


class Unsound(recipe.Stopped):
    """The checklist failed before training; the message is its report."""


def train(
    args: argparse.Namespace,
    method: str,
    base: ClipClassifier,
    data: tuple[images.Images, images.Images],
    chosen: Preset,
    device: torch.device,
) -> Result:
    """A copy of ``base``, trained by ``method``; prints what trains and what the checklist warns of.

    Raises:
        Unsound: the checklist failed.
        recipe.NotFinite: a loss or a gradient is NaN or infinite.
        ValueError: a setting is out of range, or the checkpoint to resume is another's.
    """
    model = copy.deepcopy(base)
    torch.manual_seed(args.seed)
    report = adapt(model, method, chosen, args)
    print(f"\n{method}\n{report}")
    model.to(device)
    trained, tested = data
    optimizer = torch.optim.AdamW(groups_of(model, method, chosen, args))
    run = torch.compile(model) if args.compile else model

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        pictures, labels = (part.to(device, non_blocking=True) for part in batch)
        return F.cross_entropy(run(pictures).float(), labels)

    steps = args.epochs * len(trained.batches(args.batch_size, 0))
    training = recipe.Training(
        model,
        loss_of,
        optimizer,
        {"recipe": "clip_finetune", "method": method, "preset": chosen.name}
        | recipe.settings(args, "method", "compare", "root", "compile", "preset"),
        recipe.warm_cosine(optimizer, round(args.warmup * steps), steps),
        clip=args.clip,
        precision=args.precision,
        checkpoint=args.output / f"{method}.pt",
    )
    if args.resume and training.checkpoint.exists():
        training.resume()
    # Nothing of this package is in a model that trains whole, or only its head, and the whole is a large share; a rate
    # that was raised for random weights is far from its preset.
    meant = {"adapters", "trainable share"} if method in ("full", "head") else set()
    meant |= {"learning rate"} if _raised(args) and args.lr is None else set()
    if training.epoch >= args.epochs:
        # Done: the last rates are 0, by which no step moves anything.
        return Result(report, training, _tested(model, training, tested, args, device))
    warn(model, method, training, next(iter(trained.batches(args.batch_size, 0))), device, meant)
    training.run(
        lambda epoch: trained.batches(args.batch_size, epoch, args.workers), args.epochs, method, args.batch_size
    )
    return Result(report, training, _tested(model, training, tested, args, device))


def _tested(
    model: nn.Module, training: recipe.Training, tested: images.Images, args: argparse.Namespace, device: torch.device
) -> float:
    with training.autocast():
        return accuracy(model, tested.batches(args.batch_size, workers=args.workers), device)


def warn(
    model: nn.Module, method: str, training: recipe.Training, batch: Any, device: torch.device, meant: set[str]
) -> None:
    """Print what the checklist warns of, but for the rows in ``meant``.

    Raises:
        Unsound: it failed.
    """
    pictures, labels = (part.to(device) for part in batch)
    with training.autocast():
        report = check(
            model.train(),
            pictures,
            loss_fn=lambda logits: F.cross_entropy(logits.float(), labels),
            optimizer=training.optimizer,
        )
    if any(row.name not in meant for row in report.failed):
        raise Unsound(f"{method}: the checklist failed before training\n{report}")
    for row in report.warned:
        if row.name not in meant:
            print(f"warning: {row.name}: {row.finding}")


@torch.no_grad()
def accuracy(model: nn.Module, batches: Sequence[Any], device: torch.device) -> float:
    """The share of images in the right class."""
    model.eval()
    right = count = 0
    for pictures, labels in batches:
        right += (model(pictures.to(device)).argmax(dim=1) == labels.to(device)).sum()
        count += len(labels)
    return float(right) / count


# ---- the command


def prepare(args: argparse.Namespace) -> tuple[ClipClassifier, tuple[images.Images, images.Images], Preset]:
    """(the model that all methods start from, the data, LoRA's preset).

    Raises:
        ValueError: an argument is not what it must be.
        thirdparty.Unavailable: a package is missing.
    """
    torch.manual_seed(args.seed)
    clip = make_clip(args.model, args.pretrained)
    trained, tested, names = images.load(args.data, seed=args.seed, root=args.root, **clip.images)
    chosen = preset_for(len(names)) if args.preset == "auto" else preset(args.preset)
    return ClipClassifier(clip.model, make_head(clip, args.head, names)), (trained, tested), chosen


def main(argv: Sequence[str] | None = None) -> int:
    parser = options()
    args = parser.parse_args(argv)
    device = recipe.device_of(parser, args.device)
    methods = METHODS if args.compare else (args.method,)
    if args.compare and args.head == "zero-shot":
        # Nothing of it trains alone.
        methods = tuple(method for method in methods if method != "head")
    return recipe.command(parser, lambda: run(args, methods, device))


def run(args: argparse.Namespace, methods: Sequence[str], device: torch.device) -> None:
    """Train by each method, and show how they compare."""
    recipe.begin(args, [f"{method}.pt" for method in methods])
    base, data, chosen = prepare(args)
    results = {method: train(args, method, base, data, chosen, device) for method in methods}
    recipe.curves(args.output / "losses.png", {name: made.training.losses for name, made in results.items()}, "loss")
    recipe.show(
        f"{args.model}, {args.data}, {args.epochs} epochs, preset {chosen.name}",
        (*recipe.MEASURES, "accuracy"),
        [
            (*recipe.measures(name, made.report, made.training), f"{made.accuracy:.3f}")
            for name, made in results.items()
        ],
    )
    print(f"checkpoints and curves: {args.output}")


if __name__ == "__main__":
    sys.exit(main())
