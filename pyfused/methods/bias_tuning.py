"""BitFit: only biases train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pyfused.ops.contract import checks
from pyfused.surgery.added import added_parameters
from pyfused.surgery.procedure import Request, adapt
from pyfused.surgery.refusals import check_model
from pyfused.surgery.report import Counts, count, table_of_alike
from pyfused.surgery.variants import plain_class

_CALLER = "bitfit"


@dataclass(frozen=True)
class BiasRow:
    """One bias: its dotted path, the class of the module that it belongs to, and its elements."""

    path: str
    kind: str
    parameters: int


@dataclass(frozen=True, kw_only=True)
class BitFitReport(Counts):
    """What `bitfit` did.

    Attributes:
        rows: one `BiasRow` per bias that trains.
        trainable_parameters, total_parameters, notes: see `pyfused.surgery.report.Counts`.
    """

    rows: tuple[BiasRow, ...]

    @property
    def bias_parameters(self) -> int:
        """Elements of all biases that train."""
        return sum(row.parameters for row in self.rows)

    def _found(self) -> list[str]:
        alike = [(row.kind, row.path.rpartition(".")[2], f"{row.parameters:,}", row.parameters) for row in self.rows]
        return [
            *table_of_alike(("module", "bias", "elements", "count", "parameters"), alike, "<<>>>"),
            f"bias parameters       {self.bias_parameters:,} in {len(self.rows)} biases",
        ]


def is_bias(name: str) -> bool:
    """Whether a parameter of this name is a bias: "bias" itself, or what ends in "_bias"."""
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias")


def bitfit(
    model: nn.Module, train: Sequence[str] = (), exclude: Sequence[str] = (), freeze_batchnorm: bool = True
) -> BitFitReport:
    """Train the biases of ``model``, and freeze the rest.

    All or nothing: when this raises, the model is as it was. Nothing is added to the model. What an earlier call of
    this package set to train goes on training.

    Args:
        model: any module, on any device, e.g. ``clip.visual`` for one tower.
        train: dotted paths, from ``model``, of modules or parameters that train whole, e.g. ("head",).
        exclude: dotted paths, from ``model``, of modules and parameters whose biases stay frozen.
        freeze_batchnorm: a BatchNorm stays in eval mode, also when the model is put in training mode, so that its
            running statistics stay; its bias trains. Default True.

    Returns:
        A `BitFitReport`; ``print`` it.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``model`` has no bias outside ``train`` and ``exclude``, a path names nothing (near names are
            listed), ``model`` is PEFT's, sharded or in DistributedDataParallel, or a parameter of it is uninitialized
            or made under inference_mode.

    Source: Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
    Language-models", 2022.
    """
    check_model(_CALLER, model)
    checks.flag(_CALLER, "freeze_batchnorm", freeze_batchnorm)
    named = dict(model.named_parameters(remove_duplicate=False))
    request = Request(_CALLER, model, train, exclude, named)
    aside = {id(parameter) for name, parameter in named.items() if request.aside(name)}
    # What this package has added is no bias of the model's.
    aside |= {id(parameter) for module in model.modules() for parameter in added_parameters(module)}
    biases = {
        name: parameter
        for name, parameter in model.named_parameters()
        if is_bias(name) and parameter.is_floating_point() and id(parameter) not in aside
    }
    if not biases:
        raise ValueError(
            f"{_CALLER}: model must have biases outside train and exclude, got a {type(model).__name__} with none; "
            "many language models have none at all: inject_lora adapts their weights"
        )
    adapt(request, also=biases.values, freeze_batchnorm=freeze_batchnorm, stays=True)
    narrow = sorted({str(p.dtype) for p in biases.values() if p.dtype in (torch.float16, torch.bfloat16)})
    if narrow:
        request.notes.append(
            f"biases of dtype {', '.join(narrow)} train in it: small steps are lost, and GradScaler takes no float16; "
            "keep the model in float32 and run it under autocast"
        )
    kinds = {
        f"{path}.{name}".lstrip("."): plain_class(type(module))[0].__name__
        for path, module in model.named_modules()
        for name in module._parameters
    }
    rows = tuple(BiasRow(name, kinds[name], parameter.numel()) for name, parameter in biases.items())
    return BitFitReport(**count(model, request.notes), rows=rows)
