"""AA-CLIP with cross-attention between its towers: both stages, feedback loops, base against feedback.

    python examples/aa_clip.py
    python examples/aa_clip.py --data VisA --test-data mvtec_ad --model ViT-L-14-336 --pretrained openai
    python examples/aa_clip.py --stage 2 --feedback-loops 1 --image-w learnable --base runs/aa_clip/base.pt

Stage 1 trains the text side, which sees the images through cross-attention, stage 2 the image side, which sees the
prompts. From the second loop on stage 1 sees the images as stage 2 has left them. The base model is the same without
cross-attention; both are trained on the same images in the same order. Without --test-data every other test image of
each kind is trained on, and the rest is tested.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aa_clip_data
import numpy as np
import recipe
import torch
from torch import Tensor

from pyfused import files, models
from pyfused.bench import thirdparty
from pyfused.diagnostics import GradientRatio, GradientRatioTable, gradient_ratio

# The original's settings, and those of the small form. There the towers are random and a loop has a few dozen steps:
# at the original's rates, made for trained towers and thousands of steps, nothing would move. 5 divides the 30 images
# of its set: each epoch's mean loss is over the same ones.
SETTINGS: dict[str, dict[str, Any]] = {
    "original": {
        "image_size": 518, "epochs": 20, "text_batch_size": 16, "batch_size": 2, "text_lr": 1e-5, "image_lr": 5e-4,
    },
    "small": {
        "image_size": 64, "epochs": 8, "text_batch_size": 8, "batch_size": 5, "text_lr": 1e-3, "image_lr": 2e-3,
    },
}  # fmt: skip
W: dict[str, dict[str, Any]] = {
    "fixed": {},
    "learnable": {"learnable_weight": True},
    # What starts at 0 has no norm to match.
    "zero-init": {"zero_init": True, "norm_match": False},
}
BETAS = (0.5, 0.999)
FIRST_ADAPTER = {1: "text_adapters.0", 2: "image_adapters.0"}
METRICS = ("pixel AUROC", "pixel AP", "image AUROC", "image AP")
# Width and standard deviation of the blur, in patches.
BLUR, MEDICAL_BLUR = (7, 1.0), (9, 1.5)


def options() -> argparse.ArgumentParser:
    sized = dict.fromkeys(SETTINGS["original"])
    made = recipe.parser(__doc__, output=Path("runs/aa_clip"), **sized)
    made.epilog = (
        "--epochs and --batch-size are stage 2's, --epochs in the first loop: each loop has half as many as the one "
        "before, and stage 1 a quarter of stage 2's, rounded up. Where the default above is None: with a model of "
        f"open_clip {told('original')}; with the small one {told('small')}."
    )
    add = made.add_argument
    add("--stage", choices=("1", "2", "both"), default="both", help="1: text side; 2: image side")
    add("--feedback-loops", type=recipe.positive, default=3, metavar="K", help="how often the stages are trained")
    add("--text-batch-size", type=recipe.positive, help="images in a step of stage 1")
    add("--text-lr", type=recipe.rate, metavar="RATE", help="stage 1's learning rate, halved from loop to loop")
    add("--image-lr", type=recipe.rate, metavar="RATE", help="stage 2's, halved also at 50 and 80 percent of its steps")
    add("--data", default="synthetic", help="folder in MVTec's or VisA's layout; synthetic: textures made here")
    add("--test-data", type=Path, metavar="PATH", help="folder to test on; then all images in --data are trained on")
    add("--names", type=Path, metavar="PATH", help="JSON of what a class is called in prompts, {class: words}")
    add("--model", default="small", help="open_clip's name of a ViT; small: a random one of 4 layers")
    add("--pretrained", metavar="TAG", help="open_clip's tag, or file, of the model's weights; none: random ones")
    add("--image-size", type=recipe.positive, metavar="PIXELS", help="height and width of the images")
    add("--cross-weight", type=float, default=0.1, metavar="W", help="w of both cross-attentions, or its start")
    add("--text-w", choices=W, default="fixed", help="w of stage 1's; zero-init: its output starts at 0, not matched")
    add("--image-w", choices=W, default="fixed", help="w of stage 2's")
    add("--original-context", action="store_true", help="average stage 1's context only where batch sizes differ")
    add("--relu", action="store_true", help="LeakyReLU behind the image side's projections")
    add("--base", type=Path, metavar="PATH", help="adapters of a base model to start from: an earlier run's base.pt")
    add("--compare", action=argparse.BooleanOptionalAction, default=True, help="train the base model first")
    add("--medical", action="store_true", help=f"blur maps by {MEDICAL_BLUR} patches in place of {BLUR}")
    add("--pictures", type=recipe.natural, default=8, metavar="N", help="anomaly maps of each class to write")
    add("--workers", type=recipe.natural, default=0, metavar="N", help="processes that read images")
    return made


def told(form: str) -> str:
    """The settings of a form, as options."""
    return ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in SETTINGS[form].items())


def filled(args: argparse.Namespace) -> argparse.Namespace:
    """With the settings of its model's form where none were given."""
    form = SETTINGS["small" if args.model == "small" else "original"]
    vars(args).update({name: value for name, value in form.items() if getattr(args, name) is None})
    return args


def epochs_of(args: argparse.Namespace, loop: int, stage: int) -> int:
    """5 and 20 in the original's first loop, 3 and 10, 2 and 5; loops and stages are counted from 1."""
    return max(1, math.ceil(args.epochs / 4 / 2 ** (loop - 1)) if stage == 1 else args.epochs >> (loop - 1))


# ---- model and data


def build(
    args: argparse.Namespace, device: torch.device
) -> tuple[models.AdaptedCLIP, Callable[[list[str]], Tensor], Callable[[Any], Tensor]]:
    """The adapted model, what makes tokens of prompts, and what makes a tensor of a PIL image."""
    open_clip = thirdparty.load("open_clip")
    torch.manual_seed(args.seed)
    heads = {}
    if args.model == "small":
        if args.pretrained:
            raise ValueError(f"--pretrained needs a --model of open_clip, got {args.pretrained} for the small one")
        vision = {"image_size": args.image_size, "layers": 4, "width": 64, "head_width": 32, "patch_size": 8}
        text = {"context_length": 16, "width": 64, "heads": 2, "layers": 3}
        clip = open_clip.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text)
        tokenize, heads = open_clip.get_tokenizer("ViT-B-32", context_length=16), {"num_heads": 4, "head_dim": 16}
    else:
        try:
            clip = open_clip.create_model(args.model, args.pretrained, force_image_size=args.image_size)
        except Exception as error:
            # open_clip and torch raise whatever a wrong name or file leads them to.
            raise ValueError(f"--model and --pretrained must be open_clip's, got {error}") from error
        tokenize = open_clip.get_tokenizer(args.model)
    reduce = "mean_if_batches_differ" if args.original_context else "mean"
    try:
        model = models.AdaptedCLIP(
            clip.to(device), relu=args.relu, weight=args.cross_weight, image_cross=W[args.image_w],
            text_cross={"context_reduce": reduce, **W[args.text_w]}, **heads,
        ).eval()  # fmt: skip
    except TypeError as error:
        raise ValueError(f"--model must be a ViT of open_clip, got {args.model}: {error}") from error
    if args.base is not None:
        if not args.base.is_file():
            raise FileNotFoundError(f"--base must be a file, got {args.base}")
        try:
            model.load_adapter_state_dict(files.read_pickled("--base", args.base), cross_attention=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"--base must be a base model's adapters, got {args.base}: {error}") from error
    reach = MEDICAL_BLUR[0] // 2 if args.medical else BLUR[0] // 2
    if min(clip.visual.grid_size) <= reach:
        raise ValueError(
            f"--image-size must give more than {reach} patches a side for the blur of maps, got {clip.visual.grid_size}"
        )
    given = getattr(clip.visual, "preprocess_cfg", {})
    colours = {name: given.get(name) for name in ("mean", "std")}
    transform = open_clip.image_transform(args.image_size, is_train=False, resize_mode="squash", **colours)
    return model, lambda prompts: tokenize(prompts).to(device), transform


def samples_of(args: argparse.Namespace) -> tuple[list[aa_clip_data.Sample], list[aa_clip_data.Sample]]:
    """What is trained on and what is tested."""
    folder = Path(args.data)
    if args.data == "synthetic":
        folder = aa_clip_data.synthesize(args.output / "synthetic", args.seed, args.image_size)
    given = aa_clip_data.read(folder)
    if args.test_data is not None:
        trained, tested = given.train + given.test, aa_clip_data.read(args.test_data).test
    else:
        trained, tested = aa_clip_data.halves(given.test)
        trained = given.train + trained
    aa_clip_data.check_kinds("--data, for training,", trained, classes=False)
    aa_clip_data.check_kinds("the images for testing", tested, classes=True)
    return trained, tested


# ---- one arm


@dataclass
class Arm:
    """One model through all loops, and its test.

    Attributes:
        name: "base" or "feedback"; the second has cross-attention.
        model: trained in place.
        prompts: of each class, its tokens in the normal state and in the abnormal one.
        data: what is trained on.
        args: the options.
        trainings: (loop, stage) -> its training, counted from 1.
        ratios: "loop 1, stage 2" -> the gradient ratio before it; none without cross-attention.
        results: class -> its `METRICS` in percent.
    """

    name: str
    model: models.AdaptedCLIP
    prompts: Sequence[tuple[Tensor, Tensor]]
    data: aa_clip_data.Anomalies
    args: argparse.Namespace
    trainings: dict[tuple[int, int], recipe.Training] = field(default_factory=dict)
    ratios: dict[str, GradientRatio] = field(default_factory=dict)
    results: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def crossed(self) -> bool:
        return self.name == "feedback"

    @property
    def device(self) -> torch.device:
        return self.prompts[0][0].device

    def batch_size(self, stage: int) -> int:
        return self.args.text_batch_size if stage == 1 else self.args.batch_size

    def run(self) -> None:
        """Every loop and stage that the options ask for; then its adapters are written."""
        stages = (1, 2) if self.args.stage == "both" else (int(self.args.stage),)
        for loop in range(1, self.args.feedback_loops + 1):
            for stage in stages:
                training = self.training(loop, stage)
                if self.crossed:
                    batch = next(iter(self.batches(loop, stage, 0)))
                    self.ratios[f"loop {loop}, stage {stage}"] = gradient_ratio(
                        self.model, lambda _, loss=training.loss_of, batch=batch: loss(batch), FIRST_ADAPTER[stage]
                    )
                if self.args.resume and training.checkpoint.is_file():
                    training.resume()
                training.run(
                    lambda epoch, at=(loop, stage): self.batches(*at, epoch),
                    epochs_of(self.args, loop, stage),
                    f"{self.name}, loop {loop}, stage {stage}, epoch",
                    self.batch_size(stage),
                )
                self.trainings[loop, stage] = training
        path = self.args.output / f"{self.name}.pt"
        with files.replacing(path) as partial:
            torch.save(self.model.adapter_state_dict(cross_attention=self.crossed), partial)

    def training(self, loop: int, stage: int) -> recipe.Training:
        """Of one stage, its optimizer anew."""
        rate = (self.args.text_lr, self.args.image_lr)[stage - 1] / 2 ** (loop - 1)
        optimizer = torch.optim.Adam(self.model.set_stage(stage, self.crossed), lr=rate, betas=BETAS)
        scheduler = None
        if stage == 2:
            steps = len(recipe.shuffled(len(self.data), self.batch_size(2), 0)) * epochs_of(self.args, loop, 2)
            scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.5 * steps), int(0.8 * steps)], gamma=0.5)
        # What changes no step, or only how many loops there are.
        settings = recipe.settings(self.args, "compare", "pictures", "medical", "feedback_loops")
        return recipe.Training(
            self.model,
            self.image_loss if stage == 2 else functools.partial(self.text_loss, adapted=loop > 1),
            optimizer,
            settings | {"recipe": "aa_clip", "arm": self.name, "loop": loop, "stage": stage, "stages": self.args.stage},
            scheduler,
            # The original clips no gradient, and trains without dropout.
            clip=float("inf"),
            precision=self.args.precision,
            mode=False,
            checkpoint=self.args.output / f"{self.name}-loop{loop}-stage{stage}.pt",
        )

    def batches(self, loop: int, stage: int, epoch: int) -> Any:
        """An epoch's; stage 2's prompts are encoded here, once, for the text side is frozen."""
        if stage == 2:
            self.encode_prompts()
        seeds = self.args.seed, stage, loop, epoch
        return self.data.batches(self.batch_size(stage), *seeds, workers=self.args.workers)

    @torch.no_grad()
    def encode_prompts(self) -> None:
        """Each class's text (classes, width, 2) and context (classes, prompts x length, width), without images."""
        self.text = torch.stack([self.model.encode_class(*tokens) for tokens in self.prompts])
        self.contexts = torch.cat([self.model.text_context(torch.cat(tokens)) for tokens in self.prompts])

    def text_loss(self, batch: Any, adapted: bool) -> Tensor:
        images, masks, _, classes = (part.to(self.device) for part in batch)
        levels = self.model.image_context(images, adapted)
        context = levels[0] if self.crossed else None
        present, places = classes.unique(return_inverse=True)
        text = [self.model.encode_class(*self.prompts[number], context) for number in present.tolist()]
        return models.text_stage_loss(levels, torch.stack(text), masks, places)

    def image_loss(self, batch: Any) -> Tensor:
        images, masks, labels, classes = (part.to(self.device) for part in batch)
        context = self.contexts[classes] if self.crossed else None
        levels, detection, _ = self.model.encode_image(images, context)
        return models.image_stage_loss(levels, detection, self.text[classes], masks, labels)

    @torch.no_grad()
    def test(self, data: aa_clip_data.Anomalies, categories: Sequence[str]) -> None:
        """The results and pictures of each class; images see the prompts as in training."""
        self.encode_prompts()
        self.model.eval()
        for number in data.classes.unique().tolist():
            context = self.contexts[number : number + 1]
            # K and V of a class's prompts serve all its images.
            prepared = self.model.image_cross_attention.prepare(context) if self.crossed else None
            maps, detections, masks = [], [], []
            places = (data.classes == number).nonzero()[:, 0]
            for part in places.split(self.args.text_batch_size):
                images, mask, _, _ = data[part]
                levels, detection, _ = self.model.encode_image(images.to(self.device), prepared)
                blur = MEDICAL_BLUR if self.args.medical else BLUR
                maps.append(models.anomaly_map(levels, self.text[number], tuple(mask.shape[1:]), *blur).cpu())
                detections.append(models.detection_score(detection, self.text[number]).cpu())
                masks.append(mask)
            whole, wanted = torch.cat(maps), torch.cat(masks)
            scores = models.image_score(whole, torch.cat(detections))
            self.results[categories[number]] = metrics(whole, wanted, scores, data.labels[places])
            samples = [data.samples[place] for place in places.tolist()]
            shades = (whole - whole.min()) / (whole.max() - whole.min())
            folder = self.args.output / "maps" / self.name
            for place in np.linspace(0, len(samples) - 1, min(self.args.pictures, len(samples))).astype(int):
                aa_clip_data.picture(folder, samples[place], wanted[place], shades[place])


def metrics(maps: Tensor, masks: Tensor, scores: Tensor, labels: Tensor) -> tuple[float, ...]:
    """`METRICS` in percent."""
    measures = thirdparty.load("sklearn.metrics")
    return tuple(
        100 * measure(wanted.flatten().numpy(), given.flatten().numpy())
        for wanted, given in ((masks, maps), (labels, scores))
        for measure in (measures.roc_auc_score, measures.average_precision_score)
    )


# ---- all of it


def train(args: argparse.Namespace, device: torch.device) -> dict[str, Arm]:
    """Everything that the options ask for; the arms by name.

    Raises:
        ValueError: data, model, base or checkpoint are not what the options say.
        OSError: one of them is not there, or no image.
        recipe.NotFinite: a number of the training is NaN or infinite.
    """
    recipe.begin(args, ["*-loop*-stage*.pt"])
    trained, tested = samples_of(args)
    categories = sorted({sample.category for sample in trained + tested})
    prompts = [models.anomaly_prompts(name) for name in aa_clip_data.names_of(args.names, categories)]
    arms = {}
    for name in ("base", "feedback") if args.compare else ("feedback",):
        model, tokenize, transform = build(args, device)
        data, held_out = (
            aa_clip_data.Anomalies(samples, categories, transform, args.image_size) for samples in (trained, tested)
        )
        tokens = [tuple(map(tokenize, states)) for states in prompts]
        arm = arms[name] = Arm(name, model, tokens, data, args)
        arm.run()
        arm.test(held_out, categories)
    report(arms, len(trained), len(tested))
    for stage in {stage for _, stage in arms["feedback"].trainings}:
        losses = {
            name: [loss for (_, at), training in arm.trainings.items() if at == stage for loss in training.losses]
            for name, arm in arms.items()
        }
        recipe.curves(args.output / f"stage{stage}.png", losses, f"loss of stage {stage}")
    return arms


def report(arms: Mapping[str, Arm], trained: int, tested: int) -> None:
    """The tables of trainings, of gradient ratios and of the test."""
    rows = []
    for name, arm in arms.items():
        counted = arm.model.report()
        for (loop, stage), training in arm.trainings.items():
            first, last = epoch_losses(training)
            # A step in float16 whose scaled gradients overflow is skipped, and no part of the mean.
            norms = [norm for norm in training.norms if math.isfinite(norm)] or [math.nan]
            ratio = arm.ratios.get(f"loop {loop}, stage {stage}")
            rows.append((
                name, f"{loop}", f"{stage}", f"{first:.4f}", f"{last:.4f}", f"{statistics.mean(norms):.3e}",
                f"{ratio.ratio:.4f}" if ratio else "", *recipe.measures("", counted, training)[3:],
            ))  # fmt: skip
    columns = ("model", "loop", "stage", "first epoch", "last epoch", "mean |grad|", "ratio", *recipe.MEASURES[3:])
    recipe.show(f"AA-CLIP: losses on {trained} images", columns, rows)
    print(
        f"\ngradient of the first adapter with and without cross-attention, before each stage\n"
        f"{GradientRatioTable(arms['feedback'].ratios)}\n"
    )
    rows = []
    for name, arm in arms.items():
        means = tuple(map(statistics.mean, zip(*arm.results.values(), strict=True)))
        for word, values in {**arm.results, "mean": means}.items():
            rows.append((name, word, *(f"{value:.1f}" for value in values)))
    recipe.show(f"test on {tested} images, in percent", ("model", "class", *METRICS), rows)


def epoch_losses(training: recipe.Training) -> tuple[float, float]:
    """The mean losses of its first and of its last epoch."""
    steps = len(training.losses) // training.epoch
    return statistics.mean(training.losses[:steps]), statistics.mean(training.losses[-steps:])


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these options; 0, or 1 where the training stopped."""
    parser = options()
    args = filled(parser.parse_args(argv))
    device = recipe.device_of(parser, args.device)
    return recipe.command(parser, lambda: train(args, device))


if __name__ == "__main__":
    raise SystemExit(main())
