"""``tune`` and ``tuning``: what a model calls is timed in every way that serves it, and the fastest is kept."""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfused.choice import cache, measured
from pyfused.choice.measured import Row
from pyfused.ops import decision
from pyfused.surgery import watch
from pyfused.tuner.clocks import cold_and_warm
from pyfused.tuner.recorder import Recorder
from pyfused.tuner.report import TuningReport
from pyfused.tuner.session import Session

_alone = threading.Lock()


class Tuning:
    """What ``with tuning() as found`` gives.

    Attributes:
        report: a `TuningReport` once the block has ended, else None.
    """

    def __init__(self) -> None:
        self.report: TuningReport | None = None

    def __str__(self) -> str:
        return "the block has not ended" if self.report is None else str(self.report)


def tune(
    model_or_function: Callable,
    *example_inputs: Any,
    seconds: float = 60.0,
    loss_fn: Callable[[Any], Tensor] | None = None,
    **kwargs: Any,
) -> TuningReport:
    """Find what serves a model's calls the fastest on this machine, and let ``"auto"`` take that from now on.

    One forward, and a backward where something requires grad, show which calls the model makes and how often. Then each
    call is made again, on random tensors of the same shapes, strides and dtypes, by every backend and plan that can
    serve it: those first in which the model spends most of its time. What differs from pyfused's own choice by more
    than rounding is dropped. The rest is timed, forward and backward, with cold and with warm caches, beside that
    choice, and takes its place where it needs less time by 3 % in two races and is slower by neither clock. The plan
    that leaves the products to the library, as plain torch does, takes its place wherever it needs less time.
    Plans that only trade memory for time ("save", "recompute") stay as they are.

    What was found holds in this process at once, and on this machine in every later one: it is kept in the user's cache
    directory (``PYFUSED_CACHE``, or else the platform's), until the driver, torch, triton or pyfused changes. ``pyfused
    tune --list`` shows it, ``--clear`` removes it. In a distributed job all ranks call this; rank 0 times, and all take
    and keep what it found.

    The model stays as it was: parameters, gradients, buffers, mode, and torch's random generators. On a terminal, where
    tqdm is installed, a bar on stderr shows how far it is.

    Args:
        model_or_function: a module, a bound method of one or any callable.
        example_inputs, kwargs: passed on; tensors of the shapes, dtypes and device that training has. Call it under
            ``torch.autocast`` to tune what autocast gives.
        seconds: after so many nothing new is begun. Default 60.
        loss_fn: makes a scalar of the output, for backward. None (the default) adds up all its floating tensors.

    Returns:
        A `TuningReport`: ``.calls``, ``.seconds``, ``.path``, ``.notes``; it prints as a table.

    Raises:
        TypeError: ``model_or_function`` or ``loss_fn`` cannot be called, or ``seconds`` is no number.
        ValueError: ``seconds`` is not positive and finite, or ``loss_fn`` returns no scalar tensor.
        RuntimeError: inside another `tune` or `tuning`, or the model's checkpoints are reentrant.
        Exception: whatever the call itself raises.

    Example:
        ``print(pyfused.tune(model, images))``
    """
    watch.check_callable("tune", model_or_function)
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"tune: loss_fn must be a callable or None, got {type(loss_fn).__name__}")
    _check_seconds("tune", seconds)
    recorder = Recorder()
    model = watch.module_of(model_or_function)
    # Of DistributedDataParallel: a forward without it would wait for a backward of its own.
    unsynchronised = getattr(model, "no_sync", contextlib.nullcontext)
    with (
        _the_only_one("tune"),
        watch.state_kept(model, example_inputs, kwargs),
        unsynchronised(),
        decision.observed(recorder),
    ):
        _backward(_loss(model_or_function(*example_inputs, **kwargs), loss_fn))
    return _tuned("tune", recorder, seconds)


@contextlib.contextmanager
def tuning(seconds: float = 60.0) -> Iterator[Tuning]:
    """Inside, a step of your own is watched; when it ends, what it called is tuned as `tune` does.

    The step itself runs as it would without: forward, backward, an optimizer's step. What was compiled with
    ``torch.compile`` runs eagerly meanwhile. Where the block raises nothing is tuned.

    Args:
        seconds: of tuning after the block; see `tune`. Default 60.

    Returns:
        A context manager that gives a `Tuning`, whose ``report`` is there once the block has ended.

    Raises:
        TypeError, ValueError, RuntimeError: as `tune`.

    Example:
        ``with pyfused.tuning() as found: step()``, then ``print(found.report)``
    """
    _check_seconds("tuning", seconds)
    recorder, found = Recorder(), Tuning()
    with _the_only_one("tuning"), watch.eagerly(), decision.observed(recorder):
        yield found
    found.report = _tuned("tuning", recorder, seconds)


def _check_seconds(caller: str, seconds: Any) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"{caller}: seconds must be a number, got {type(seconds).__name__}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"{caller}: seconds must be positive and finite, got {seconds}")


@contextlib.contextmanager
def _the_only_one(caller: str) -> Iterator[None]:
    if not _alone.acquire(blocking=False):
        raise RuntimeError(f"{caller}: another tune() or tuning() of this process has not ended")
    try:
        yield
    finally:
        _alone.release()


def _loss(output: Any, loss_fn: Callable[[Any], Tensor] | None) -> Tensor | None:
    """None where nothing wants a gradient."""
    if loss_fn is not None:
        loss = loss_fn(output)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"tune: loss_fn must return a tensor of one element, got {got}")
        return loss if loss.requires_grad else None
    parts = [part.float().sum() for part in _tensors(output) if part.requires_grad]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum() if parts else None


def _tensors(output: Any) -> Iterator[Tensor]:
    """All tensors in an output of lists, dictionaries and dataclasses."""
    inside: Iterable[Any] = ()
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        inside = output.values()
    elif isinstance(output, list | tuple | set):
        inside = output
    elif is_dataclass(output) and not isinstance(output, type):
        inside = [getattr(output, field.name) for field in fields(output)]
    for each in inside:
        yield from _tensors(each)


def _backward(loss: Tensor | None) -> None:
    """Runs it, and leaves no gradient: what hangs on one, a step of an optimizer say, does not run."""
    if loss is None or loss.grad_fn is None:
        return
    leaves: dict[int, Tensor] = {}
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            leaves[id(variable)] = variable
        waiting += [following for following, _ in node.next_functions]
    try:
        torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    except RuntimeError as error:
        if "heckpoint" not in str(error):
            raise
        raise RuntimeError(
            "tune: the model's checkpoints must be made with use_reentrant=False, or a step of your own be put inside "
            f"`with pyfused.tuning():`, got {error}"
        ) from error


# ---- from what was recorded to what is kept


class _Found(NamedTuple):
    """What rank 0 hands to all ranks."""

    report: TuningReport
    rows: list[Row]
    key: cache.Key


def _tuned(caller: str, recorder: Recorder, seconds: float) -> TuningReport:
    """Rank 0 times; all ranks take what it found, and keep it: each may have a cache directory of its own."""

    def timed() -> _Found:
        used = [count.told.device for count in recorder.calls.values()]
        devices = sorted({device.index or 0 for device in used if device.type == "cuda"})
        # Tensors made in inference mode would give no gradients.
        with torch.inference_mode(False), torch.random.fork_rng(devices=devices), watch.eagerly():
            session = Session(seconds, cold_and_warm)
            calls = session.tune(recorder)
        notes = (
            [f"prepared contexts keep their plan: {recorder.prepared} calls were not compared"]
            if recorder.prepared
            else []
        )
        return _Found(TuningReport(calls, session.spent, None, tuple(notes)), session.rows, cache.key())

    with _the_only_one(caller):
        report, rows, key = _from_rank_0(caller, timed)
        if not rows:
            return report
        measured.use(measured.merged(measured.own, rows))
        # On another machine of the job other software may run.
        path, notes = _kept(rows) if key == cache.key() else (None, ("it holds in this process alone here",))
        return replace(report, path=path, notes=(*report.notes, *notes))


def _kept(rows: list[Row]) -> tuple[Path | None, tuple[str, ...]]:
    """(the file, what to say of it)."""
    try:
        return cache.keep(rows), ()
    except OSError as error:
        why = f"it holds in this process alone: {error}"
        warnings.warn(f"pyfused: what was tuned cannot be kept, {why}", stacklevel=4)
        return None, (why,)


def _from_rank_0(caller: str, make: Callable[[], _Found]) -> _Found:
    """What rank 0 makes, on every rank; here where there are no ranks."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return make()
    # An error too: the others would wait for an answer.
    box: list[Any] = [None]
    error: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            box = [make()]
        except BaseException as raised:
            error, box = raised, [f"{type(raised).__name__}: {raised}"]
    dist.broadcast_object_list(box, src=0)
    if error is not None:
        raise error
    if isinstance(box[0], str):
        raise RuntimeError(f"{caller}: rank 0 could not tune: {box[0]}")
    report, rows, key = box[0]
    return _Found(replace(report, notes=(*report.notes, "timed by rank 0")), rows, key)
