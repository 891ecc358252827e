"""Several named LoRA adapters in one model: which of them act, which samples they serve, and how they are joined."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pyfused.lora.attention import LoRAProjections
from pyfused.lora.base import LoRAModule
from pyfused.lora.pairs import LoRASettings, check_adapter_name
from pyfused.lora.report import LoRAReport, lora_report
from pyfused.lora.state import adapters_of, known_adapter, lora_modules
from pyfused.lora.targets import lora_places
from pyfused.ops.contract import checks
from pyfused.ops.lora_linear import MAX_RANK
from pyfused.surgery.change import Change, all_or_nothing
from pyfused.surgery.paths import Place
from pyfused.surgery.procedure import take_out
from pyfused.surgery.refusals import sharded


def set_adapter(model: nn.Module, adapter: str | Sequence[str]) -> None:
    """Choose which of the model's LoRA adapters act and train; all others do neither.

    Several act as the sum of their low-rank terms, in one call of `lora_linear` for each layer. In training they must
    share their dropout, of which one mask serves them all. A layer that has none of them is the base layer. What else
    trains (``train`` of `inject_lora`) is left alone, and so are modules of this package that have no name, such as
    `ConvLoRA`. All or nothing.

    Args:
        model: a model with LoRA, neither merged nor inside `adapters_off` or `adapter_batch`.
        adapter: a name as `inject_lora` was given it, or several.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``model`` has no LoRA or is merged, a name is none of its adapters, or the ranks of those of one
            layer come to more than 256.
    """
    caller = "set_adapter"
    modules = _idle(caller, model)
    known = adapters_of(module for _, module in modules)
    given = (adapter,) if isinstance(adapter, str) else adapter
    if not isinstance(given, Sequence) or not given:
        raise TypeError(f"{caller}: adapter must be a name or a sequence of names, got {adapter!r}")
    names = [known_adapter(caller, "adapter", name, known) for name in given]
    for path, module in modules:
        rank = sum(module.settings_of(name).rank for name in module.adapters if name in names)
        _check_rank(caller, path, rank, "act one at a time, or merge_adapters(..., rank=...) joins them")
    with all_or_nothing() as change:
        for _, module in modules:
            change.keep(module)
            module._choose(names)
            for name in module.adapters:
                change.train(module.own_lora_parameters(name).values(), name in names)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` computes what it computed before `inject_lora`: no LoRA adapter acts.

    Merged weights are the base weights meanwhile. Afterwards, also after an exception, all is as it was; contexts nest,
    and the innermost counts. Modules of this package that have no name, `BottleneckAdapter` and `ConvLoRA`, stay on.

    Raises:
        TypeError: ``model`` is no nn.Module.
        ValueError: it has no LoRA.
    """
    caller = "adapters_off"
    with contextlib.ExitStack() as stack:
        for _, module in lora_modules(caller, model):
            stack.enter_context(module.within(caller, ()))
        yield


@contextlib.contextmanager
def adapter_batch(model: nn.Module, adapters: Sequence[str | None]) -> Iterator[None]:
    """Inside, every sample of a batch has an adapter of its own: sample i that which ``adapters[i]`` names.

    Each layer makes one call of `lora_linear` for all samples, forward and backward. The gradients are exact, and those
    of parameters that do not train are not formed: `set_adapter` with all the names lets them train. The input of every
    adapted layer must hold the samples in dimension 0. Merged weights are the base weights meanwhile. Afterwards, also
    after an exception, all is as it was; contexts nest, and the innermost counts.

        with pyfused.adapter_batch(model, ["german", "french", None]):
            y = model(x)  # x: three samples

    Args:
        model: a model with LoRA.
        adapters: one name for each sample; None is the base model. A layer that lacks a sample's adapter is the base
            layer for it.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``model`` has no LoRA, or a module with batch_first=False, a name is none of its adapters, or in a
            layer their number times the largest rank is more than 256. In the model's forward: an input has another
            number of samples.
    """
    caller = "adapter_batch"
    modules = lora_modules(caller, model)
    known = adapters_of(module for _, module in modules)
    if isinstance(adapters, str) or not isinstance(adapters, Sequence) or not adapters:
        raise TypeError(f"{caller}: adapters must be a sequence with a name or None for each sample, got {adapters!r}")
    given = [None if name is None else known_adapter(caller, "adapters", name, known) for name in adapters]
    for path, inside in model.named_modules():
        if getattr(inside, "batch_first", True) is False:
            raise ValueError(
                f"{caller}: model must hold samples in dimension 0, got the {type(inside).__name__} {path!r} with "
                "batch_first=False"
            )
    made: dict[tuple[tuple[str, ...], torch.device], Tensor] = {}
    with contextlib.ExitStack() as stack:
        for path, module in modules:
            used = tuple(name for name in module.adapters if name in given)
            widest = max((module.settings_of(name).rank for name in used), default=0)
            _check_rank(caller, path, len(used) * widest, "use fewer adapters in one batch")
            index = None
            if used:
                key = used, next(iter(module.own_lora_parameters().values())).device
                if key not in made:
                    positions = [used.index(name) if name in used else -1 for name in given]
                    made[key] = torch.tensor(positions, device=key[1])
                index = made[key]
            stack.enter_context(module.within(caller, used, index))
        yield


def merge_adapters(
    model: nn.Module, weights: Mapping[str, float], adapter: str = "merged", rank: int | None = None
) -> LoRAReport:
    """Join LoRA adapters into a new one, whose change of each weight is the weighted sum of theirs.

    Without ``rank`` it is exact: their A and B are concatenated, and a layer's rank is the sum of theirs. The new
    adapter has scaling 1, and their dropout where they share it, else none. It neither acts nor trains until
    `set_adapter` chooses it. All or nothing.

    Args:
        model: a model with LoRA, neither merged, sharded, nor inside `adapters_off` or `adapter_batch`.
        weights: name of an adapter -> its factor, any finite number.
        adapter: the new one's name. Default "merged".
        rank: R, 1 to 256: the sum's best approximation of this rank in the Frobenius norm, by a singular value
            decomposition in float64. Default None: the exact sum.

    Returns:
        A `LoRAReport` of the new adapter.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a name is unknown or taken, a number is out of range, the ranks come to more than 256 without
            ``rank``, or ``model`` has no LoRA, is merged or sharded.
        RuntimeError: a LoRA parameter is computed (parametrized, pruned).
    """
    caller = "merge_adapters"
    modules = _idle(caller, model)
    known = adapters_of(module for _, module in modules)
    if not isinstance(weights, Mapping) or not weights:
        raise TypeError(f"{caller}: weights must be a mapping of adapters to numbers, got {weights!r}")
    for name, weight in weights.items():
        known_adapter(caller, "weights", name, known)
        checks.finite(caller, f"weights[{name!r}]", weight)
    check_adapter_name(caller, adapter)
    if adapter in known:
        raise ValueError(f"{caller}: adapter must be a new name, got {adapter!r}, which the model has")
    if rank is not None:
        checks.integer(caller, "rank", rank, 1)
        _check_rank(caller, "every layer", rank, "take less")
    shard = sharded(model)
    if shard is not None:
        raise ValueError(f"{caller}: model must not be sharded, got {shard}; merge before sharding")
    chosen = [(module, [name for name in module.adapters if name in weights]) for _, module in modules]
    for (path, module), (_, names) in zip(modules, chosen, strict=True):
        module.refuse_computed(caller)
        if rank is None:
            total = sum(module.settings_of(name).rank for name in names)
            _check_rank(caller, path, total, "give a rank to which they are joined")
    with all_or_nothing() as change:
        for module, names in chosen:
            if names:
                change.keep(module)
                _join(module, names, weights, adapter, rank)
    return lora_report(model, adapter=adapter)


def remove_adapter(model: nn.Module, adapter: str) -> None:
    """Take one LoRA adapter out of a model; a layer that had no other becomes the plain layer that it was.

    Where others are left beside it, those that act go on acting; where it acted alone, none does until `set_adapter`. A
    layer's next adapter takes the place of a first one that goes, and its names in a state dict. All or nothing.

    Args:
        model: a model with LoRA, neither merged nor inside `adapters_off` or `adapter_batch`.
        adapter: its name.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``model`` has no LoRA, no such adapter, is merged, or is itself a LoRA module with this one alone.
        RuntimeError: a module that becomes a plain one cannot; see `remove_lora`.
    """
    caller = "remove_adapter"
    modules = _idle(caller, model)
    known_adapter(caller, "adapter", adapter, adapters_of(module for _, module in modules))
    if isinstance(model, LoRAModule) and adapters_of(model._parts()) == [adapter]:
        raise ValueError(f"{caller}: model must contain LoRA modules, got one itself; use its to_base(merge=False)")

    def take(change: Change) -> None:
        for place in lora_places(model):
            module = place.module
            if isinstance(module, LoRAModule):
                _take(change, place, module, adapter)

    take_out(model, take)


def _take(change: Change, place: Place, module: LoRAModule, adapter: str) -> None:
    if adapters_of(module._parts()) == [adapter]:
        change.replace(place, module.to_base(merge=False))
        return
    for part in module._parts():
        if part.adapters == (adapter,):
            if isinstance(part, LoRAProjections):
                change.keep(part)
                for name in part.own_lora_parameters():
                    del part._parameters[name]
                part.qkv = None
                part._choose(())
            else:
                spot = Place(part, [f"{place.paths[0]}.out_proj"], [(module, "out_proj")])
                change.replace(spot, part.to_base(merge=False))
        elif adapter in part.adapters:
            change.keep(part)
            part.drop_adapter(adapter)


def _idle(caller: str, model: nn.Module) -> list[tuple[str, LoRAModule]]:
    """The LoRA modules of a model that is neither merged nor inside a context."""
    modules = lora_modules(caller, model)
    for _, module in modules:
        module.refuse_busy(caller)
    return modules


def _check_rank(caller: str, path: str, rank: int, instead: str) -> None:
    if rank > MAX_RANK:
        raise ValueError(
            f"{caller}: the ranks that act together must come to at most {MAX_RANK}, got {rank} in {path or 'model'}; "
            f"{instead}"
        )


@torch.no_grad()
def _join(module: LoRAModule, names: list[str], weights: Mapping[str, float], adapter: str, rank: int | None) -> None:
    """Give ``module`` the weighted sum of its adapters ``names`` as a further one."""
    settings = [module.settings_of(name) for name in names]
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for prefix in module._pair_widths():
        given = [module.pair_of(name, prefix) for name in names]
        factors = [weights[name] * one.scaling for name, one in zip(names, settings, strict=True)]
        lora_a = torch.cat([a.double() for a, _ in given])
        lora_b = torch.cat([b.double() * factor for (_, b), factor in zip(given, factors, strict=True)], dim=1)
        pairs[prefix] = (lora_a, lora_b) if rank is None else _closest(lora_a, lora_b, rank)
    joint = sum(one.rank for one in settings) if rank is None else rank
    dropouts = {one.dropout for one in settings}
    first_a, _ = module.pair_of(names[0], next(iter(pairs)))
    module.add_adapter(
        adapter,
        # With alpha = R its scaling is 1.
        LoRASettings(joint, float(joint), dropouts.pop() if len(dropouts) == 1 else 0.0, False, first_a.dtype),
        acts=False,
    )
    for prefix, pair in pairs.items():
        for parameter, value in zip(module.pair_of(adapter, prefix), pair, strict=True):
            parameter.copy_(value)


def _closest(lora_a: Tensor, lora_b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The pair of this rank whose product is the closest to B A; (R, K) and (N, R)."""
    # Of the small matrix between two orthonormal ones: the product itself is as large as the weight.
    q_b, r_b = torch.linalg.qr(lora_b)
    q_a, r_a = torch.linalg.qr(lora_a.t())
    u, s, v = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    root = s[:rank].sqrt()
    missing = rank - len(root)
    a, b = root[:, None] * (v[:rank] @ q_a.t()), (q_b @ u[:, :rank]) * root
    return torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
