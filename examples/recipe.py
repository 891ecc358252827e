"""What the recipes share: options, a training loop that stops at the first bad number, checkpoints, tables, curves."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from pyfused import files
from pyfused.bench import thirdparty
from pyfused.bench.measure import memory
from pyfused.diagnostics.checklist import LARGE_NORM
from pyfused.surgery.report import Counts

# Of the loss in float16, at the start. At torch's 65,536 the first steps of a short run overflow and train nothing.
_SCALE = 4096.0
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Stopped(RuntimeError):
    """The training must not go on; the message says why."""


class NotFinite(Stopped):
    """A number of the training is NaN or infinite; the message says at which step, and which tensor was the first."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults, and the description as it was written."""


def parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options that every recipe has; ``defaults`` by their names."""
    made = argparse.ArgumentParser(description=description, formatter_class=_Formatter)
    made.add_argument("--epochs", type=positive, default=10, help="passes over the training data")
    made.add_argument("--batch-size", type=positive, default=32, help="samples in a step")
    made.add_argument("--seed", type=natural, default=0, help="of new parameters, of the order of samples, of dropout")
    made.add_argument("--device", default="auto", help="such as cpu or cuda:0; auto: a GPU where there is one")
    made.add_argument("--precision", choices=PRECISIONS, default="float32", help="autocast's dtype; float32: none")
    made.add_argument("--output", type=Path, help="folder of checkpoints and pictures")
    made.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    made.set_defaults(**defaults)
    return made


def positive(text: str) -> int:
    """An int of at least 1."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """An int of at least 0."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return int(text)


def rate(text: str) -> float:
    """A finite number above 0."""
    return _number(text, "a positive number", lambda value: 0 < value < math.inf)


def amount(text: str) -> float:
    """A finite number of at least 0."""
    return _number(text, "a number of at least 0", lambda value: 0 <= value < math.inf)


def share(text: str) -> float:
    """A number in [0, 1)."""
    return _number(text, "a number in [0, 1)", lambda value: 0 <= value < 1)


def _number(text: str, expected: str, fits: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def begin(args: argparse.Namespace, names: Iterable[str]) -> None:
    """Make the folder of --output, and look at the checkpoints in it: ``names``, or patterns of them.

    With --resume there must be one; without it those of an older run go, so that no later --resume takes them for this
    run's.

    Raises:
        ValueError: there is none to go on from.
        OSError: the folder cannot be made or written to.
    """
    args.output.mkdir(parents=True, exist_ok=True)
    there = [path for name in names for path in args.output.glob(name)]
    if args.resume and not there:
        raise ValueError(f"--resume must find a checkpoint in --output, got {args.output}, which holds none")
    for path in there if not args.resume else ():
        path.unlink()
    with files.replacing(args.output / ".writable") as partial:
        partial.touch()
    (args.output / ".writable").unlink()


def command(parser: argparse.ArgumentParser, run: Callable[[], object]) -> int:
    """Run, and give the exit status: 0, 1 where the training stopped, 130 where it was interrupted.

    What is wrong with the options or the files that they name ends the program with status 2.
    """
    try:
        run()
    except (ValueError, OSError, thirdparty.Unavailable) as error:
        parser.error(str(error))
    except Stopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last whole epoch", file=sys.stderr)
        return 130
    return 0


def settings(args: argparse.Namespace, *without: str) -> dict[str, Any]:
    """The options that a checkpoint must agree with: all but where it runs, and those that change no step."""
    left_out = {"device", "output", "resume", "workers", *without}
    plain = bool | int | float | str | None
    return {
        name: value if isinstance(value, plain) else str(value)
        for name, value in vars(args).items()
        if name not in left_out
    }


def device_of(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """The device that ``--device`` names; ends the program where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        parser.error(f"--device must be a device of this machine, got {name!r}: {str(error).splitlines()[0]}")
    return device


# ---- training


@dataclass
class Training:
    """One model in training: its steps, its checkpoint, what was measured.

    Attributes:
        model: its parameters with requires_grad are trained, and stored in the checkpoint with all buffers.
        loss_of: a batch -> a scalar tensor.
        optimizer: steps once for each batch.
        identity: what a checkpoint must agree with to be resumed: the method and its settings.
        scheduler: steps with the optimizer. Default None.
        clip: largest norm of all gradients together. Default 1.
        precision: one of `PRECISIONS`; float16 scales the loss.
        mode: what ``model.train`` gets: False trains without dropout and drop-path. Default True.
        checkpoint: file that is written after each epoch. Default None: none.
        epoch: epochs done. losses: of each step. norms: of all gradients at each step, before the clip.
        seconds: of each step but the first two. peak_bytes: of the second step, beyond what was held before it.
    """

    model: nn.Module
    loss_of: Callable[[Any], Tensor]
    optimizer: torch.optim.Optimizer
    identity: Mapping[str, Any]
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    clip: float = 1.0
    precision: str = "float32"
    mode: bool = True
    checkpoint: Path | None = None
    epoch: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self._parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._device = next(iter(self._parameters.values())).device
        self._cuda = self._device.type == "cuda"
        self._scaler = torch.amp.GradScaler(self._device.type, init_scale=_SCALE, enabled=self.precision == "float16")

    def autocast(self) -> contextlib.AbstractContextManager:
        """What ``precision`` means for a forward."""
        dtype = PRECISIONS[self.precision]
        return contextlib.nullcontext() if dtype is None else torch.autocast(self._device.type, dtype)

    def run(self, batches: Callable[[int], Sequence[Any]], epochs: int, title: str, samples: int) -> None:
        """Train until ``epochs`` are done.

        Args:
            batches: the number of an epoch -> its batches, the same whenever it is asked.
            epochs: in all, those of a resumed checkpoint included.
            title: of the progress bar.
            samples: in a batch, for the bar's rate.

        Raises:
            NotFinite: the loss, or with it a gradient, is NaN or infinite; the last checkpoint stays.
        """
        while self.epoch < epochs:
            about = f"{title} {self.epoch + 1}/{epochs}"
            bar = tqdm(batches(self.epoch), desc=about, unit="step", leave=False, disable=None)
            waiting, done = iter(bar), len(self.losses)
            if not self.losses:
                # What the first step allocates stays; the second shows what each step needs.
                first = list(itertools.islice(waiting, 2))
                steps = map(self._step, first)
                if len(first) == 2:
                    self.peak_bytes = memory.peak_bytes(functools.partial(next, steps), self._device)
                else:
                    next(steps)
            for batch in waiting:
                start = time.perf_counter()
                self._step(batch)
                self.seconds.append(time.perf_counter() - start)
                bar.set_postfix_str(f"loss {self.losses[-1]:.4f}, {samples / self.seconds[-1]:.0f} samples/s")
            self.epoch += 1
            self.save()
            worst = max((norm for norm in self.norms[done:] if math.isfinite(norm)), default=0.0)
            if worst > LARGE_NORM:
                print(f"warning: {about}: the gradient's norm rose to {worst:.3g}")

    def _step(self, batch: Any) -> None:
        self.model.train(self.mode)
        with self.autocast():
            loss = self.loss_of(batch)
        # Read at each step: it waits for the device, and no later step runs on a bad number.
        value = loss.item()
        if not math.isfinite(value):
            raise NotFinite(self._told("the loss", value, self._first_bad(batch)))
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(self.optimizer)
        trained = {name: p for name, p in self._parameters.items() if p.grad is not None}
        total = nn.utils.get_total_norm([p.grad for p in trained.values()])
        norm = total.item()
        if not math.isfinite(norm):
            bad = (f"the gradient of {name}" for name, p in trained.items() if not p.grad.isfinite().all())
            first = next(bad, "none: only their norm overflows")
            # In float16 the scaler leaves such a step out and halves the scale, which helps or reaches 1.
            if not self._scaler.is_enabled() or self._scaler.get_scale() <= 1:
                raise NotFinite(self._told("the norm of the gradients", norm, first))
        nn.utils.clip_grads_with_norm_(trained.values(), self.clip, total)
        scale = self._scaler.get_scale()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        # A step that the scaler left out, because float16 overflowed, is none of the schedule's.
        if self.scheduler is not None and self._scaler.get_scale() >= scale:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(value)
        self.norms.append(norm)

    def _told(self, what: str, value: float, first: str) -> str:
        rates = ", ".join(f"{group['lr']:.3g}" for group in self.optimizer.param_groups)
        kept = f"; {self.checkpoint} holds epoch {self.epoch}" if self.checkpoint and self.epoch else ""
        return (
            f"{what} is {value} at step {len(self.losses) + 1}, learning rate {rates}; the first bad tensor is "
            f"{first}{kept}"
        )

    def _first_bad(self, batch: Any) -> str:
        """The first tensor that is not finite: of the parameters, of the batch, then of the modules' outputs."""
        state = {f"the parameter {name}": tensor for name, tensor in self.model.named_parameters()}
        parts = batch if isinstance(batch, tuple | list) else (batch,)
        state |= {f"input {place} of the batch": part for place, part in enumerate(parts) if isinstance(part, Tensor)}
        for name, tensor in state.items():
            if not tensor.isfinite().all():
                return name
        found: list[str] = []

        def look(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                outputs = output if isinstance(output, tuple | list) else (output,)
                if any(isinstance(part, Tensor) and not part.isfinite().all() for part in outputs):
                    found.append(f"the output of {name or 'the model'}")

            return hook

        hooks = [module.register_forward_hook(look(name)) for name, module in self.model.named_modules()]
        try:
            with torch.no_grad(), self.autocast():
                self.loss_of(batch)
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if found else "the loss itself"

    @property
    def step_ms(self) -> float:
        """Median time of a step in milliseconds; NaN before the third step."""
        return 1e3 * statistics.median(self.seconds) if self.seconds else math.nan

    # ---- checkpoints

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        if self.checkpoint is None:
            return
        frozen = {name for name, _ in self.model.named_parameters()} - self._parameters.keys()
        state = {
            "identity": dict(self.identity),
            "model": {name: value for name, value in self.model.state_dict().items() if name not in frozen},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
            "generators": [torch.get_rng_state(), *([torch.cuda.get_rng_state(self._device)] if self._cuda else [])],
            "epoch": self.epoch,
            "losses": self.losses,
            "norms": self.norms,
        }
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(self.checkpoint) as partial:
            torch.save(state, partial)

    def resume(self) -> None:
        """Go on from the checkpoint.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is of another method, of other settings, or no checkpoint of a recipe.
        """
        assert self.checkpoint is not None
        state = files.read_pickled("--resume", self.checkpoint)
        if not isinstance(state, dict) or "identity" not in state:
            raise ValueError(f"{self.checkpoint} must be a checkpoint that a recipe wrote, got another file")
        given, own = state["identity"], dict(self.identity)
        differing = [
            f"{key} {given.get(key)!r}, this run has {own.get(key)!r}"
            for key in sorted(given.keys() | own.keys())
            if given.get(key) != own.get(key)
        ]
        if differing:
            raise ValueError(f"{self.checkpoint} must be of this run's method and settings, got {'; '.join(differing)}")
        self.model.load_state_dict(state["model"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self._scaler.load_state_dict(state["scaler"])
        own, *cuda = (generator.cpu() for generator in state["generators"])
        torch.set_rng_state(own)
        for generator in cuda if self._cuda else ():
            torch.cuda.set_rng_state(generator, self._device)
        self.epoch, self.losses, self.norms = state["epoch"], state["losses"], state["norms"]


def warm_cosine(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Each group's rate: linear from 0 in the first ``warmup`` steps, then half a cosine to 0 at ``steps``."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def shuffled(count: int, size: int, *seeds: int) -> list[Tensor]:
    """The numbers 0 to ``count`` - 1 in an order that the seeds decide, ``size`` at a time; a smaller rest is left.

    Each tuple of seeds, a run's and an epoch's say, has an order of its own.
    """
    order = torch.from_numpy(numpy.random.default_rng(seeds).permutation(count))
    return list(order.split(size))[: max(1, count // size)]


# ---- what is shown


MEASURES = ("method", "trainable", "percent", "step ms", "peak MiB")


def measures(method: str, report: Counts, training: Training) -> tuple[str, ...]:
    """A method's cells under `MEASURES`; a run that was resumed at its end has measured nothing."""
    time = f"{training.step_ms:.1f}" if training.seconds else "-"
    memory = f"{training.peak_bytes / 2**20:.1f}" if training.peak_bytes else "-"
    return method, f"{report.trainable_parameters:,}", f"{report.trainable_percent:.2f}", time, memory


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; the first column to the left, the others to the right."""
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    console.print(table)


def curves(path: Path, series: Mapping[str, Sequence[float]], label: str) -> None:
    """A picture of each series against its step, written whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel=label)
    for name, values in series.items():
        axes.plot(range(1, len(values) + 1), values, label=name)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
