"""How a method of this package changes a model, and how it is taken out again.

    names -> sites -> checks -> build -> replace -> freeze -> train -> report

`Request` holds the names. Sites, their checks, what is built and the report are the method's own; `adapt` does the
rest. Before it nothing has touched the model, and where something in it raises, the model is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from pyfused.surgery.change import Change, all_or_nothing
from pyfused.surgery.guards import hold_batchnorms, keep_dense, release_batchnorms, release_dense
from pyfused.surgery.paths import Place, names, resolve, under
from pyfused.surgery.refusals import check_parameters


class Request:
    """What a caller named of a model, checked.

    Args:
        caller: in whose name errors are raised. model: one that `check_model` lets pass.
        train: dotted paths of modules and parameters that train whole.
        exclude: dotted paths of modules, and of what else is ``known``, that are left alone.

    Attributes:
        trained: the parameters at or under ``train``.
        notes: what the report says of the change, in words.
    """

    def __init__(
        self,
        caller: str,
        model: nn.Module,
        train: str | Iterable[str],
        exclude: str | Iterable[str],
        known: Iterable[str] = (),
    ) -> None:
        self.caller, self.model = caller, model
        self.train, self.exclude = names(caller, "train", train), names(caller, "exclude", exclude)
        self.notes: list[str] = []
        parameters = dict(model.named_parameters(remove_duplicate=False))
        modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
        resolve(caller, "train", self.train, modules | parameters.keys())
        chosen = {name: parameter for name, parameter in parameters.items() if under(name, self.train)}
        for name, parameter in chosen.items():
            if not parameter.is_floating_point():
                raise TypeError(f"{caller}: train must name floating parameters, got {name} of dtype {parameter.dtype}")
        self.trained = list(chosen.values())
        resolve(caller, "exclude", self.exclude, modules.union(known))
        check_parameters(caller, model)

    def aside(self, *paths: str) -> str | None:
        """Why the method leaves alone what stands at ``paths``; None where it does not."""
        for roots, reason in ((self.train, "trains whole: in train"), (self.exclude, "in exclude")):
            if any(under(path, roots) for path in paths):
                return reason
        return None

    def note_shared(self, place: Place) -> None:
        """Note where else ``place`` is, if anywhere."""
        if len(place.paths) > 1:
            self.notes.append(f"one module stands at {', '.join(place.paths)}: adapted once, for all of them")


def adapt(
    request: Request,
    put: Callable[[Change], None] = lambda change: None,
    also: Callable[[], Iterable[nn.Parameter]] = tuple,
    trial: Callable[[], None] = lambda: None,
    *,
    freeze: bool = True,
    freeze_batchnorm: bool = True,
    stays: bool = False,
) -> None:
    """Change the model of ``request``, all or nothing; what is worth a word goes to its notes.

    Args:
        put: builds what the method adds, and puts it in place.
        also: what of the model itself trains by the method, asked for when all is in place.
        trial: raises where the changed model is no good.
        freeze: whether everything stops training but what this package set to train, now or earlier.
        freeze_batchnorm: with ``freeze``, whether frozen BatchNorms stay in eval mode.
        stays: whether they stay so when what was added is taken out.
    """
    model = request.model
    with all_or_nothing() as change:
        put(change)
        if freeze:
            change.freeze(model)
        change.keep_training(model, request.trained)
        # Before a norm's bias trains by the method: by that alone it is not one that was meant to move.
        if freeze and freeze_batchnorm:
            request.notes += hold_batchnorms(model, change, request.train, stays)
        change.keep_training(model, also())
        request.notes += keep_dense(model, change)
        trial()


def take_out(model: nn.Module, take: Callable[[Change], None]) -> None:
    """Let ``take`` undo what a method put into ``model``, all or nothing; what was frozen stays frozen."""
    with all_or_nothing() as change:
        take(change)
        release_dense(model, change)
        release_batchnorms(model, change)
