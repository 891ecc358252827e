"""The rows of the targets: what the model gives each, forward and backward, and how that compares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from pyfused.bench.cases import operators
from pyfused.bench.cases.adapter_residual import AdapterCase
from pyfused.bench.cases.case import H200_BANDWIDTH, Case
from pyfused.bench.cases.lora_linear import LoRACase
from pyfused.bench.predict import calls, code, model
from pyfused.bench.targets.numbers import ADAPTER_EAGER_MODEL, LORA_EAGER_MODEL
from pyfused.choice.costs import EAGER_DROPOUT
from pyfused.kernels import audit
from pyfused.kernels.recording import Launch, Target
from pyfused.ops.lora_linear import triton_plan

# Of each launch, by its identity.
Codes = dict[int, code.Code]


@dataclass(frozen=True)
class Direction:
    """One direction of a call: its microseconds by the model, what sets most of them, and (what, microseconds, limit)
    of each launch and operation."""

    microseconds: float
    limit: str
    launches: tuple[tuple[str, float, str], ...]


@dataclass(frozen=True)
class Row:
    """A case by the model, microseconds throughout.

    Attributes:
        name: the case's.
        plans: each plan -> forward and backward.
        chosen: the plan of either that "auto" takes of Triton's.
        floor: the least of either on an H200; None of another GPU.
        library: the product alone, of an operator that is one.
        eager: of the eager formula: forward, and backward where a model of it is known.
    """

    name: str
    plans: dict[str, tuple[Direction, Direction]]
    chosen: tuple[str, str]
    floor: tuple[float, float] | None
    library: tuple[float, float] | None
    eager: tuple[float, ...] | None

    @property
    def auto(self) -> tuple[Direction, Direction]:
        return self.plans[self.chosen[0]][0], self.plans[self.chosen[1]][1]

    @property
    def best(self) -> tuple[str, str]:
        """The plan of either direction that the model gives the least time."""
        first, second = (min(self.plans, key=lambda plan: self.plans[plan][i].microseconds) for i in (0, 1))
        return first, second

    def against_eager(self, plans: tuple[str, str] | None = None) -> float | None:
        """How many times faster than eager, forward and, where that is known, backward; of "auto" or of these plans."""
        if self.eager is None:
            return None
        took = (self.plans[plan][i].microseconds for i, plan in enumerate(plans or self.chosen))
        return sum(self.eager) / sum(time for time, _ in zip(took, self.eager, strict=False))


def cases(text: str = "") -> list[Case]:
    """The benchmarks' cases on a GPU, each shape of the targets among them, whose name contains ``text``."""
    return [case for case in operators.timed_cases(torch.device("cuda")) if text in case.name]


def predict(chosen: Sequence[Case], target: Target, jobs: int = 1) -> list[Row]:
    """Rows of these cases on such a GPU; compiles what Triton's cache does not have in ``jobs`` threads (default 1)."""
    made = {(case, plan): calls.directions(case, plan, target) for case in chosen for plan in _plans(case)}
    launches = [
        event for both in made.values() for events in both for event in events if isinstance(event, Launch)
    ]  # fmt: skip
    keys = [audit.specialisation(launch, target).key for launch in launches]
    distinct = dict(zip(keys, launches, strict=True))
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(lambda launch: code.compiled(launch, target), distinct.values())
        codes = dict(zip(distinct, found, strict=True))
    of = {id(launch): codes[key] for launch, key in zip(launches, keys, strict=True)}
    return [_row(case, {plan: made[case, plan] for plan in _plans(case)}, of, target) for case in chosen]


def _plans(case: Case) -> Sequence[str]:
    # Those of the other operators differ in what they keep, or in what the library does.
    return case.plans("triton") if isinstance(case, LoRACase) else ("auto",)


def _row(case: Case, made: dict, codes: Codes, target: Target) -> Row:
    there = model.chip(target.capability)
    plans = {
        plan: (_direction(forward, codes, there), _direction(backward, codes, there))
        for plan, (forward, backward) in made.items()
    }
    floor = library = eager = None
    if target.capability == (9, 0):
        first, second = case.passes()
        floor = 1e6 * first.least_seconds(), 1e6 * second.least_seconds()
        eager = _eager(case)
    if isinstance(case, LoRACase):
        m, n, k = case.rows, case.out_features, case.in_features
        library = model.library_product(m, n, k, there), model.library_product(m, k, n, there)
    return Row(case.name, plans, _chosen(case, target), floor, library, eager)


def _chosen(case: Case, target: Target) -> tuple[str, str]:
    if not isinstance(case, LoRACase):
        return "auto", "auto"
    tensors = case.tensors(torch.device("meta"))

    def plan(raw: str, rows: str) -> str:
        given = {name: tensors[name] for name in ("weight", "lora_a", "lora_b")}
        arguments = {"rows": tensors[rows][None], **given, "dropout_p": case.dropout_p, "channels_first": False}
        return triton_plan(raw, arguments, target.capability)

    return plan("lora_linear_fwd", "x"), plan("lora_linear_bwd", "dy")


def _eager(case: Case) -> tuple[float, ...] | None:
    if isinstance(case, LoRACase):
        shape = case.rows, case.in_features, case.out_features
        if shape not in LORA_EAGER_MODEL:
            return None
        dropped = EAGER_DROPOUT * 2 * case.rows * case.in_features / H200_BANDWIDTH if case.dropout_p else 0.0
        forward, backward = LORA_EAGER_MODEL[shape]
        return forward + 1e6 * dropped, backward + 1e6 * dropped
    if isinstance(case, AdapterCase) and not case.drop_path:
        alone = ADAPTER_EAGER_MODEL.get((case.rows, case.channels, case.hidden))
        return None if alone is None else (alone,)
    return None


def _direction(events: Iterable[calls.Event], codes: Codes, there: model.Chip) -> Direction:
    cache, found = calls.Cache(there.kept), []
    for event in events:
        if isinstance(event, Launch):
            work = calls.work_of(event, cache)
            name = event.kernel.__name__.strip("_")
            try:
                found.append((name, *model.launch_time(codes[id(event)], work, there)))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        else:
            found.append((event.name, *_operation(event, cache, there)))
    spent: dict[str, float] = {}
    for _, microseconds, limit in found:
        spent[limit] = spent.get(limit, 0.0) + microseconds
    return Direction(sum(spent.values()), max(spent, key=spent.__getitem__), tuple(found))


def _operation(event: calls.Operation, cache: calls.Cache, there: model.Chip) -> model.Time:
    moved = model.pass_time(cache.moved(event.reads, event.writes), there)
    product = 0.0
    if event.product is not None:
        batch, m, n, k = event.product
        if event.reads[-1].dtype.itemsize == 2:
            product = model.library_product(m, n, k, there, batch)
        else:
            product = batch * m * n * k / there.rates.wide + model.LAUNCH
    if event.attention:
        product = event.attention / (model.ATTENTION * there.rates.narrow) + model.LAUNCH
    return model.Time(max(moved, product), "memory" if moved >= product else "the library's product")
