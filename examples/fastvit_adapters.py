"""Adapters against ConvLoRA against the frozen head alone, on timm's FastViT or the image tower of a MobileCLIP.

    python examples/fastvit_adapters.py
    python examples/fastvit_adapters.py --method adapters --order broken --layer-scale 1e-5
    python examples/fastvit_adapters.py --model fastvit_sa12 --pretrained apple_in1k --data PATH --precision bfloat16
    python examples/fastvit_adapters.py --model mobileclip_s1 --pretrained datacompdr --data flowers102 --root PATH

All methods start from one tower and one head, made from --seed, and see the same batches. The adapters' layer-scales
train, and --output shows what becomes of them. The order "right" is x + DP(gamma A(f)); "broken", x + DP(A(gamma f)),
is what adapters in FastViT's blocks were first written as. At the start both give the weights of A gradients of order
gamma: neither order makes them larger. What the right one changes: the branch is linear in gamma and vanishes with it,
and gamma is on the biases' gradients too, which in the broken order are nearly the whole gradient where gamma is small.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import math
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

from pyfused import diagnostics, files, models
from pyfused.bench import thirdparty
from pyfused.bench.models.training import Classifier
from pyfused.modules import BottleneckAdapter
from pyfused.surgery.report import Counts, count

# Of random towers. At timm's 1e-5 their blocks do nothing, and adapters behind layer-scales that do not train are no
# better than the head alone; here they do train, and 0.1 lets the blocks act from the start. --pretrained has its own.
LAYER_SCALE = 0.1
# Of those tried on digits (5e-3, 1e-2, 2e-2) the one with which each method is near its best; 2e-2 undoes ConvLoRA,
# which no layer-scale holds back. U and B start at zero, and the random head is far from done.
RATE = 1e-2
METHODS = ("adapters", "conv_lora", "head")
# Images whose statistics a random tower's BatchNorms take: without, it hardly tells images apart, and nothing learns.
_CALIBRATION = 256
_DIGITS_SIZE = 32


def options() -> argparse.ArgumentParser:
    """The recipe's options, all recipes' among them."""
    made = recipe.parser(__doc__, epochs=2, output=Path("runs/fastvit"))
    made.add_argument("--method", nargs="+", choices=METHODS, default=METHODS, help="what to train, one after another")
    made.add_argument("--order", choices=("right", "broken"), default="right", help="where layer-scale acts: see above")
    made.add_argument("--model", default="fastvit_t8", help="timm's fastvit_*, or open_clip's mobileclip*")
    made.add_argument("--pretrained", metavar="TAG", help="timm's or open_clip's, or a file; none: random weights")
    made.add_argument("--data", default="digits", help="digits, flowers102 or a folder: see examples/images.py")
    made.add_argument("--root", type=Path, default=Path("data"), help="folder that holds flowers-102")
    made.add_argument("--image-size", type=recipe.positive, help=f"none: the model's own; {_DIGITS_SIZE} for digits")
    made.add_argument("--workers", type=recipe.natural, default=0, help="processes that decode images")
    made.add_argument("--drop-path", type=recipe.share, default=0.1, help="of the last block; by timm's linear rule")
    made.add_argument(
        "--layer-scale", type=recipe.amount, help=f"at the start; none: {LAYER_SCALE}, pretrained: the weights'"
    )
    made.add_argument("--reduction", type=recipe.rate, default=2.0, help="C over the width of an adapter")
    made.add_argument("--rank", type=recipe.positive, default=8, help="of ConvLoRA, which is scaled by 16 / rank")
    made.add_argument("--lr", type=recipe.rate, default=RATE, help="largest learning rate, after a tenth of all steps")
    return made


# ---- the tower


@dataclass(frozen=True)
class Tower:
    """A frozen image tower (B, 3, H, W) -> (B, width).

    Attributes:
        visual: the tower. width: of its features.
        images: how pictures are prepared: what `images.load` calls size, mean, std, interpolation and crop.
        texts: names of classes -> (width, classes), the text tower's features of each; None where it is no CLIP's.
    """

    visual: nn.Module
    width: int
    images: dict[str, Any]
    texts: Callable[[Sequence[str]], Tensor] | None = None


def tower(model: str, pretrained: str | None, drop_path: float) -> Tower:
    """The tower of that name with drop-path rates from 0 to ``drop_path``, by timm's linear rule.

    Raises:
        ValueError: neither timm nor open_clip has a FastViT of that name (they are listed), or no such weights.
        thirdparty.Unavailable: timm or open_clip is missing.
    """
    timm = thirdparty.load("timm")
    known = timm.list_models("fastvit*")
    if model in known:
        make = functools.partial(_timm_tower, timm, model)
    else:
        open_clip = thirdparty.load("open_clip")
        configs = {name: open_clip.get_model_config(name)["vision_cfg"] for name in open_clip.list_models()}
        clips = {
            _plain(name): name
            for name, config in configs.items()
            if config.get("timm_model_name", "").startswith("fastvit")
        }
        if _plain(model) not in clips:
            raise ValueError(f"--model must be one of {', '.join((*known, *clips))}, got {model!r}")
        make = functools.partial(_clip_tower, open_clip, clips[_plain(model)])
    try:
        return make(pretrained, drop_path)
    except Exception as error:
        if pretrained is None:
            raise
        raise ValueError(f"--pretrained must name weights of {model}, got {pretrained!r}: {error}") from error


def _plain(name: str) -> str:
    """MobileCLIP-S1 as mobileclip_s1."""
    return name.lower().replace("-", "_")


def _timm_tower(timm: Any, model: str, pretrained: str | None, drop_path: float) -> Tower:
    settings: dict[str, Any] = {"pretrained": pretrained is not None, "num_classes": 0, "drop_path_rate": drop_path}
    if pretrained is not None and Path(pretrained).is_file():
        settings["pretrained_cfg_overlay"] = {"file": pretrained}
    elif pretrained is not None:
        model = f"{model}.{pretrained}"
    visual = timm.create_model(model, **settings)
    config = timm.data.resolve_model_data_config(visual)
    prepared = {name: config[name] for name in ("mean", "std", "interpolation")}
    prepared |= {"size": config["input_size"][-1], "crop": config["crop_pct"]}
    return Tower(visual, visual.num_features, prepared)


def _clip_tower(open_clip: Any, name: str, pretrained: str | None, drop_path: float) -> Tower:
    config = open_clip.get_model_config(name)
    clip = open_clip.create_model(name, pretrained, vision_cfg=config["vision_cfg"] | {"timm_drop_path": drop_path})
    tokenizer = open_clip.get_tokenizer(name)

    def texts(names: Sequence[str]) -> Tensor:
        templates = open_clip.SIMPLE_IMAGENET_TEMPLATES
        return open_clip.build_zero_shot_classifier(clip.eval(), tokenizer, names, templates)

    prepared = {name: clip.visual.preprocess_cfg[name] for name in ("mean", "std", "interpolation")}
    prepared |= {"size": clip.visual.image_size[0]}
    return Tower(clip.visual, config["embed_dim"], prepared, texts)


@torch.no_grad()
def settle(visual: nn.Module, sample: Tensor, layer_scale: float) -> None:
    """Make a random tower one that tells images apart: its layer-scales, and in its BatchNorms ``sample``'s statistics.

    Args:
        sample: images (B, 3, H, W).
    """
    for module in visual.modules():
        if type(module).__name__ == "LayerScale2d":
            module.gamma.fill_(layer_scale)
    norms = [module for module in visual.eval().modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    visual(sample)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


# ---- the methods


def adapt(model: Classifier, args: argparse.Namespace, method: str) -> Counts:
    """Freeze the tower of ``model`` and put in what ``method`` trains beside the head; returns the report.

    Raises:
        ValueError: a setting is out of range.
    """
    if method == "head":
        model.visual.requires_grad_(False)
        return Counts(**count(model))
    if method == "conv_lora":
        blocks = [name for name, _ in model.named_modules() if name.endswith(".blocks")]
        return models.add_adapters(model, conv_lora_rank=args.rank, train=("head",), exclude=blocks)
    report = models.add_adapters(model, args.reduction, train=("head",), train_layer_scale=True)
    if args.order == "broken":
        for module in model.modules():
            if isinstance(module, BottleneckAdapter):
                module.register_forward_pre_hook(_gamma_first, with_kwargs=True)
    return report


def _gamma_first(adapter: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A(gamma f) in place of gamma A(f): the order "broken"."""
    gamma = kwargs.pop("layer_scale")
    return (args[0] if gamma is None else args[0] * gamma[:, None, None],), kwargs


@dataclass
class Result:
    """One method, trained.

    Attributes:
        report: what trains. training: its losses and times.
        accuracy: of the test images, by the head. zero_shot: by the texts of the classes, None where there are none.
        history: epochs done -> a row for each adapted layer-scale; empty for a method without adapters.
    """

    report: Counts
    training: recipe.Training
    accuracy: float
    zero_shot: float | None
    history: dict[int, list[dict[str, Any]]]


def train(
    args: argparse.Namespace,
    method: str,
    base: Classifier,
    data: tuple[images.Images, images.Images],
    texts: Tensor | None,
    device: torch.device,
) -> Result:
    """A copy of ``base``, trained by ``method``; writes its checkpoint and the history of its layer-scales.

    Raises:
        recipe.NotFinite: a loss or a gradient is NaN or infinite.
        ValueError: a setting is out of range, or the checkpoint to resume is another's.
    """
    model = copy.deepcopy(base)
    torch.manual_seed(args.seed)
    report = adapt(model, args, method)
    if method != "head":
        print(report)
    model.to(device)
    trained, tested = data
    # No weight decay: it would pull at the layer-scales, whose growth is what is watched.
    optimizer = torch.optim.AdamW(model.trained().values(), lr=args.lr, weight_decay=0.0)
    steps = args.epochs * len(trained.batches(args.batch_size, 0))

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        pictures, labels = (part.to(device, non_blocking=True) for part in batch)
        return F.cross_entropy(model(pictures).float(), labels)

    training = recipe.Training(
        model,
        loss_of,
        optimizer,
        {"recipe": "fastvit_adapters", "method": method} | recipe.settings(args, "method", "root"),
        recipe.warm_cosine(optimizer, steps // 10, steps),
        precision=args.precision,
        # A tower in which nothing trains is frozen as a whole: no drop-path, and no BatchNorm moves.
        mode=method != "head",
        checkpoint=args.output / f"{method}.pt",
    )
    log = args.output / f"{method}-scales.json"
    history: dict[int, list[dict[str, Any]]] = {}
    if args.resume and training.checkpoint.exists():
        training.resume()
        if log.exists():
            history = {int(epoch): rows for epoch, rows in json.loads(log.read_text()).items()}

    probe = next(iter(trained.batches(args.batch_size, 0)))

    def watch(epoch: int) -> None:
        if method == "adapters":
            history[epoch] = scales(model, loss_of, probe)
            log.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(log) as partial:
                partial.write_text(json.dumps(history, indent=1))

    def batches(epoch: int) -> Sequence[Any]:
        watch(epoch)
        return trained.batches(args.batch_size, epoch, args.workers)

    training.run(batches, args.epochs, method, args.batch_size)
    watch(training.epoch)
    with training.autocast():
        accuracy, zero_shot = accuracies(model, tested.batches(args.batch_size, workers=args.workers), device, texts)
    return Result(report, training, accuracy, zero_shot, history)


@torch.no_grad()
def accuracies(
    model: Classifier, batches: Sequence[Any], device: torch.device, texts: Tensor | None
) -> tuple[float, float | None]:
    """The share of images that the head, and that the texts put into the right class."""
    model.eval()
    right = torch.zeros(2, device=device)
    seen = 0
    for pictures, labels in batches:
        features, labels = model.visual(pictures.to(device)), labels.to(device)
        right[0] += (model.head(features).argmax(dim=1) == labels).sum()
        if texts is not None:
            right[1] += ((features.float() @ texts.to(device)).argmax(dim=1) == labels).sum()
        seen += len(labels)
    by_head, by_texts = (right / seen).tolist()
    return by_head, None if texts is None else by_texts


# ---- layer-scales over training


def scales(model: nn.Module, loss_of: Callable[[Any], Tensor], batch: Any) -> list[dict[str, Any]]:
    """A row of `diagnostics.layer_scale_report` for each adapter, of one batch in eval: nothing is drawn or moves."""
    model.eval()
    loss_of(batch).backward()
    rows = [dataclasses.asdict(row) for row in diagnostics.layer_scale_report(model).rows if row.adapted]
    model.zero_grad(set_to_none=True)
    return rows


def shares(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Each adapter's part of the adapters' squared gradient norm; they sum to 1."""
    squares = [row["adapter_grad"] ** 2 for row in rows]
    return [square / (sum(squares) or 1.0) for square in squares]


def show_scales(title: str, history: dict[int, list[dict[str, Any]]]) -> None:
    """A row for each layer-scale: mean |gamma| and its adapter's gradients, before training and after it."""
    first, last = history[min(history)], history[max(history)]
    rows = []
    for before, after, *parts in zip(first, last, shares(first), shares(last), strict=True):
        sizes = [row["gamma_mean"] for row in (before, after)]
        growth = f"{sizes[1] / sizes[0]:.2f}x" if sizes[0] else "-"
        weights = [row["adapter_weight_grad"] for row in (before, after)]
        biases = [
            math.sqrt(max(0.0, row["adapter_grad"] ** 2 - row["adapter_weight_grad"] ** 2)) for row in (before, after)
        ]
        numbers = [f"{number:.1e}" for number in (*sizes, *weights, *biases)]
        rows.append((before["path"].removeprefix("visual."), *numbers, growth, *(f"{part:.1%}" for part in parts)))
    columns = ["|gamma|", "after", "grad D, U", "after", "grad d, u", "after", "growth", "share", "after"]
    recipe.show(title, ["layer-scale", *columns], rows)


def draw_scales(path: Path, history: dict[int, list[dict[str, Any]]]) -> None:
    """A picture of each layer-scale, and of each adapter's share of the gradient, against epochs; dark blocks first."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs = sorted(history)
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    paths = [row["path"] for row in history[epochs[0]]]
    for place, name in enumerate(paths):
        colour = colormaps["viridis"](place / len(paths))
        above.plot(epochs, [history[epoch][place]["gamma_mean"] for epoch in epochs], color=colour, label=name)
        below.plot(epochs, [shares(history[epoch])[place] for epoch in epochs], color=colour)
    above.set_ylabel("mean |gamma|")
    below.set(xlabel="epochs", ylabel="share of the adapters' gradient")
    figure.legend(loc="outside right upper", fontsize=6)
    with files.replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


# ---- the command


def prepare(args: argparse.Namespace) -> tuple[Classifier, tuple[images.Images, images.Images], Tensor | None]:
    """(the model that all methods start from, the data, the texts of the classes or None).

    Raises:
        ValueError: an argument is not what it must be.
        thirdparty.Unavailable: a package is missing.
    """
    if args.pretrained is not None and args.layer_scale is not None:
        raise ValueError(f"--layer-scale must be left out with --pretrained, got {args.layer_scale}")
    torch.manual_seed(args.seed)
    made = tower(args.model, args.pretrained, args.drop_path)
    # On a CPU a step takes half to two thirds of the time so.
    made.visual.to(memory_format=torch.channels_last)
    args.image_size = args.image_size or (_DIGITS_SIZE if args.data == "digits" else made.images["size"])
    settings = made.images | {"size": args.image_size}
    trained, tested, names = images.load(args.data, seed=args.seed, root=args.root, **settings)
    if args.pretrained is None:
        sample, _ = next(iter(trained.batches(_CALIBRATION, 0)))
        settle(made.visual, sample, LAYER_SCALE if args.layer_scale is None else args.layer_scale)
    texts = None if made.texts is None else made.texts(names)
    return Classifier(made.visual, made.width, len(names)), (trained, tested), texts


def main(argv: Sequence[str] | None = None) -> int:
    parser = options()
    args = parser.parse_args(argv)
    device = recipe.device_of(parser, args.device)
    return recipe.command(parser, lambda: run(args, device))


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Train by each method, and show how they compare."""
    recipe.begin(args, [f"{method}{end}" for method in args.method for end in (".pt", "-scales.json")])
    base, data, texts = prepare(args)
    results = {method: train(args, method, base, data, texts, device) for method in dict.fromkeys(args.method)}
    for method, result in results.items():
        if result.history:
            show_scales(f"{method}, {args.order} order: layer-scales, and the gradients on one batch", result.history)
            draw_scales(args.output / f"{method}-scales.png", result.history)
    recipe.curves(
        args.output / "losses.png", {name: result.training.losses for name, result in results.items()}, "loss"
    )
    recipe.show(
        f"{args.model}, {args.data}, {args.image_size} px",
        (*recipe.MEASURES, "accuracy", *(["zero-shot"] if texts is not None else [])),
        [
            (
                *recipe.measures(name, result.report, result.training),
                *(f"{share:.3f}" for share in (result.accuracy, result.zero_shot) if share is not None),
            )
            for name, result in results.items()
        ],
    )
    print(f"checkpoints and pictures: {args.output}")


if __name__ == "__main__":
    sys.exit(main())
