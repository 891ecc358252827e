"""The checklist before training: is every adapter alive, is the rest frozen, does a step move what should move?"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyfused.lora.base import LoRAModule
from pyfused.lora.targets import heads_of, layers_of
from pyfused.methods.bias_tuning import is_bias
from pyfused.methods.groups import methods_of
from pyfused.methods.presets import RATES
from pyfused.surgery.added import KeepsWide, added_names, added_parameters
from pyfused.surgery.refusals import sharded
from pyfused.surgery.report import elements, table
from pyfused.surgery.watch import calls_watched, module_of, state_kept

_CALLER = "check"
# How many times more or less than a method's learning rate is still usual, where the documents name one.
RATED, RATE_FACTOR = ("lora", "bitfit", "prefix"), 10.0
# A larger share of the parameters than this is no longer parameter-efficient.
LARGE_SHARE = 0.5
# At a layer-scale below this a new adapter behind it does nothing that training could see.
SMALL_SCALE = 1e-4
LARGE_NORM = 1e3


@dataclass(frozen=True)
class CheckRow:
    """One line of the checklist.

    Attributes:
        name: what was checked.
        verdict: "pass", "warn" or "fail".
        finding: what was found, in words and numbers.
    """

    name: str
    verdict: str
    finding: str


@dataclass(frozen=True)
class CheckReport:
    """What `check` found: ``rows`` in order. ``print`` it."""

    rows: tuple[CheckRow, ...]

    @property
    def failed(self) -> tuple[CheckRow, ...]:
        """The rows that failed."""
        return tuple(row for row in self.rows if row.verdict == "fail")

    @property
    def warned(self) -> tuple[CheckRow, ...]:
        """The rows that warn."""
        return tuple(row for row in self.rows if row.verdict == "warn")

    @property
    def passed(self) -> bool:
        """Whether no row failed."""
        return not self.failed

    def __str__(self) -> str:
        rows = [("verdict", "check", "finding"), *((row.verdict, row.name, row.finding) for row in self.rows)]
        return "\n".join(table(rows, "<<<"))


def check(
    model: Callable[..., Any],
    *inputs: Any,
    loss_fn: Callable[[Any], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> CheckReport:
    """Run an adapted model once and say what would keep it from training.

    One forward; with ``loss_fn`` one backward; with ``optimizer`` one step. Afterwards parameters, gradients, buffers,
    the optimizer's state and torch's generators are as they were. The model runs in the mode that it is in: call
    ``train()`` first to see what training sees, in which a sample that drop-path takes out gives its adapter no
    gradient. Reads values, which waits for the device.

    Args:
        model: a module, or a method of one, such as ``clip.encode_image``, with modules of this package in it.
        inputs: its arguments; a single mapping is taken as its keywords, as transformers' tokenizers give it.
        loss_fn: of the model's output -> a scalar tensor. Default None: no backward, and the rows about gradients are
            left out.
        optimizer: the one that training will use; needs ``loss_fn``. Default None: no step, and its rows are left out.

    Returns:
        A `CheckReport`; ``print`` it. Rows, where there is something to check:

        - adapters: modules of this package are there, or biases that train alone.
        - called: each of them that trains ran. Fails where one did not: it would never train.
        - attention adapted: LoRA is in the attentions. Warns where it is in the rest alone.
        - backbone frozen: no weight trains under its own LoRA (fails), and what else trains is named.
        - trainable share: of all parameters. Fails at none, warns above 50 %.
        - head: a classifier head trains. Warns where it is frozen.
        - layer-scale: warns where an adapter stands behind one below 1e-4.
        - finite parameters, finite output, finite loss: fail at NaN and inf.
        - gradients reach every adapter: fails where a LoRA's B, the whole of another adapter, or all trained biases
          of a block, get none or zeros.
        - gradient norm: of all that trains. Warns at 0 and above 1,000; fails where it is not finite.
        - optimizer holds what trains, a step moves every adapter: each B, or some of another adapter; fail.
        - learning rate: warns where it is 10 times from its method's, 2e-4 for LoRA, 1e-3 for BitFit, 5e-4 for a
          prefix, in an optimizer of Adam's kind.

    Raises:
        TypeError: an argument has the wrong type, or the loss is no tensor.
        ValueError: ``optimizer`` without ``loss_fn``, or one that steps by a closure, or the loss is not a scalar, or
            the model is sharded.
    """
    module = module_of(model)
    if module is None:
        raise TypeError(f"{_CALLER}: model must be an nn.Module or a method of one, got {type(model).__name__}")
    shard = sharded(module)
    if shard is not None:
        # Gradients are then elsewhere than at the parameters that forward has gathered.
        raise ValueError(f"{_CALLER}: model must not be sharded, got {shard}; check it before it is")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"{_CALLER}: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if optimizer is not None and loss_fn is None:
        raise ValueError(f"{_CALLER}: optimizer needs loss_fn, whose gradients it steps by; got None")
    args, kwargs = inputs, {}
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        args, kwargs = (), dict(inputs[0])

    closure = None if optimizer is None else inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(f"{_CALLER}: optimizer must step without a closure, got {type(optimizer).__name__}")

    adapters = _Adapters(module)
    rows = [*_standing(module, adapters)]
    trained = set(adapters.alive.values())
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(loss_fn is not None))
        stack.enter_context(state_kept(module, args, kwargs))
        stack.enter_context(_gradients_kept([module.parameters(), _held_by(optimizer), (*args, *kwargs.values())]))
        waiting = stack.enter_context(calls_watched(module, lambda inside: inside in trained))
        output = model(*args, **kwargs)
        if trained:
            dead = list(waiting.values())
            rows.append(_all("called", adapters.alive, dead, "ran", "were never called, so they would never train"))
        rows.append(_finite("finite output", {f"tensor {i}": tensor for i, tensor in enumerate(_tensors(output))}))
        if loss_fn is not None:
            rows += _after_backward(loss_fn(output), adapters)
        if optimizer is not None:
            rows += _after_step(optimizer, adapters)
    return CheckReport(tuple(rows))


class _Adapters:
    """What a model carries of this package.

    Attributes:
        modules: dotted path -> module.
        own: name -> parameter of theirs that trains.
        methods: name -> the method of each parameter that trains.
        telling: name -> parameters of which a first backward must reach one: LoRA's B, A gets zeros while B is 0, and
            whatever trains of another adapter, where again some may rightly get zeros; so with a block's biases.
        biases: name -> bias that trains where nothing else of the model's does.
        others: name -> any other parameter that trains.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = {path: m for path, m in model.named_modules() if isinstance(m, KeepsWide)}
        named = {id(parameter): name for name, parameter in model.named_parameters()}
        own = {id(parameter): parameter for module in self.modules.values() for parameter in added_parameters(module)}
        trains = {named[key]: parameter for key, parameter in own.items() if parameter.requires_grad}
        self.own = dict(sorted(trains.items()))
        self.telling: dict[str, list[nn.Parameter]] = {}
        for path, module in self.modules.items():
            trained = {name: p for name in added_names(module) if (p := module.get_parameter(name)).requires_grad}
            if isinstance(module, LoRAModule):
                pairs = {f"{path}.{name}".lstrip("."): [p] for name, p in trained.items() if name.endswith("lora_b")}
                self.telling |= pairs
            elif trained:
                self.telling[path] = list(trained.values())
        self.methods = methods_of(model)
        beside = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in own}
        self.biases = {name: p for name, p in beside.items() if self.methods[name] == "bitfit"}
        self.others = {name: p for name, p in beside.items() if name not in self.biases}
        for name, bias in self.biases.items():
            # A key's bias alone gets zeros: softmax does not see it.
            self.telling.setdefault("biases of " + ".".join(name.split(".")[:-2]), []).append(bias)

    @property
    def alive(self) -> dict[str, KeepsWide]:
        """Those of ``modules`` that have something to train; all of them where none has."""
        some = {
            path: module
            for path, module in self.modules.items()
            if any(parameter.requires_grad for parameter in added_parameters(module))
        }
        return some or self.modules

    @property
    def trained(self) -> dict[str, Tensor]:
        """Whatever trains."""
        return {**self.own, **self.biases, **self.others}


def _all(name: str, whole: Iterable[str], bad: list[str], done: str, wrong: str) -> CheckRow:
    total = len(list(whole))
    if not bad:
        return CheckRow(name, "pass", f"{total} of {total} {done}")
    return CheckRow(name, "fail", f"{len(bad)} of {total} {wrong}: {_some(bad)}")


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (", ..." if len(listed) > 5 else "")


def _finite(name: str, tensors: Mapping[str, Tensor]) -> CheckRow:
    # What is narrower than 16 bits has no test of its own.
    wide = {key: t.detach().float() if t.dtype.itemsize == 1 else t.detach() for key, t in tensors.items()}
    bad = [key for key, tensor in wide.items() if not torch.isfinite(tensor).all()]
    return _all(name, tensors, bad, "tensors are finite", "hold NaN or inf")


def _tensors(value: object) -> Iterator[Tensor]:
    """Every floating tensor in what a model returned."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


# ---- before anything runs


def _standing(model: nn.Module, adapters: _Adapters) -> Iterator[CheckRow]:
    kinds = sorted({type(module).__name__ for module in adapters.modules.values()})
    found = [f"{len(adapters.modules)}: {', '.join(kinds)}"] if adapters.modules else []
    found += [f"{len(adapters.biases)} biases train"] if adapters.biases else []
    wrong = "the model has no module of this package, and no biases train alone"
    yield CheckRow("adapters", "pass" if found else "fail", "; ".join(found) or wrong)
    yield from _attention(model)
    yield _frozen(adapters)
    total = elements(model.parameters())
    count = elements(adapters.trained.values())
    share = count / max(total, 1)
    verdict = "fail" if not count else "warn" if share > LARGE_SHARE else "pass"
    yield CheckRow("trainable share", verdict, f"{count:,} of {total:,} parameters ({100 * share:.2f} %)")
    yield from _head(model)
    yield from _scales(adapters)
    yield _finite("finite parameters", dict(model.named_parameters()))


def _attention(model: nn.Module) -> Iterator[CheckRow]:
    loras = {id(m) for m in model.modules() if isinstance(m, LoRAModule)}
    layers = [layer for layer in layers_of(model, _CALLER) if layer.group == "attention" and layer.kind != "conv2d"]
    if not loras or not layers:
        return
    adapted = sum(id(layer.module) in loras for layer in layers)
    yield CheckRow(
        "attention adapted", "pass" if adapted else "warn", f"{adapted} of {len(layers)} attention layers carry LoRA"
    )


def _head(model: nn.Module) -> Iterator[CheckRow]:
    parameters = {
        # By its weights: a bias alone is no head that trains.
        path: [
            p for name, p in model.get_submodule(path).named_parameters() if "lora_" not in name and not is_bias(name)
        ]
        for path in sorted(set(heads_of(model).values()))
    }
    frozen = [path for path, own in parameters.items() if own and not any(p.requires_grad for p in own)]
    if frozen:
        finding = (
            f"{_some(frozen)} is frozen, and learns nothing if it is new: train=({frozen[0]!r},) lets it train whole"
        )
        yield CheckRow("head", "warn", finding)
    elif any(parameters.values()):
        yield CheckRow("head", "pass", f"{_some(parameters)} trains")


def _frozen(adapters: _Adapters) -> CheckRow:
    under = [
        f"{path}.{name}"
        for path, module in adapters.modules.items()
        if isinstance(module, LoRAModule)
        for name in module._weight_names(module)
        if (weight := module._parameters.get(name)) is not None and weight.requires_grad
    ]
    if under:
        return CheckRow("backbone frozen", "fail", f"{len(under)} weights train under their own LoRA: {_some(under)}")
    beside = f"; beside the adapters train {len(adapters.others)}: {_some(adapters.others)}" if adapters.others else ""
    return CheckRow("backbone frozen", "pass", f"no weight trains under its own LoRA{beside}")


def _scales(adapters: _Adapters) -> Iterator[CheckRow]:
    scales: dict[str, float] = {}
    frozen = set()
    for path, module in adapters.modules.items():
        gamma = module._parameters.get("gamma")
        # Adapted blocks name an adapter after the layer-scale it stands under: adapter_1 and layer_scale_1.
        block, _, name = path.rpartition(".")
        if gamma is None and name.startswith("adapter"):
            with contextlib.suppress(AttributeError):
                beside = adapters.model.get_submodule(f"{block}.{name.replace('adapter', 'layer_scale')}".lstrip("."))
                gamma = beside._parameters.get("gamma")
        if gamma is not None and gamma.numel():
            scales[path] = float(gamma.detach().abs().max())
            if not gamma.requires_grad:
                frozen.add(path)
    if not scales:
        return
    small = {path: scale for path, scale in scales.items() if scale < SMALL_SCALE}
    finding = f"{len(scales)} adapters, the smallest max |gamma| is {min(scales.values()):.1e}"
    if small:
        train = ", or let it train" if frozen & small.keys() else ""
        finding = (
            f"{len(small)} of {len(scales)} adapters stand behind a gamma below {SMALL_SCALE:g} "
            f"(the smallest {min(small.values()):.1e}) and change nothing that training sees: {_some(small)}; start "
            f"gamma larger{train}"
        )
    yield CheckRow("layer-scale", "warn" if small else "pass", finding)


# ---- after a backward and a step


def _after_backward(loss: object, adapters: _Adapters) -> Iterator[CheckRow]:
    if not isinstance(loss, Tensor):
        raise TypeError(f"{_CALLER}: loss_fn must return a torch.Tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"{_CALLER}: loss_fn must return a scalar, got shape {tuple(loss.shape)}")
    finite = math.isfinite(loss.item())
    yield CheckRow("finite loss", "pass" if finite else "fail", f"{loss.item():.6g}")
    if loss.requires_grad:
        loss.backward()
    missing = [
        name for name, some in adapters.telling.items() if not any(p.grad is not None and p.grad.any() for p in some)
    ]
    yield _all(
        "gradients reach every adapter",
        adapters.telling,
        missing,
        "B or adapters have one",
        "have none, or zeros alone",
    )
    norms = [p.grad.detach().double().norm() for p in adapters.trained.values() if p.grad is not None]
    norm = float(torch.stack([norm.cpu() for norm in norms]).norm()) if norms else 0.0
    verdict = "fail" if not math.isfinite(norm) else "warn" if norm == 0 or norm > LARGE_NORM else "pass"
    yield CheckRow("gradient norm", verdict, f"{norm:.3e}")


def _after_step(optimizer: torch.optim.Optimizer, adapters: _Adapters) -> Iterator[CheckRow]:
    held = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in adapters.trained.items() if id(parameter) not in held]
    yield _all("optimizer holds what trains", adapters.trained, missing, "parameters", "are not in it")
    before = {name: [p.detach().clone() for p in some] for name, some in adapters.telling.items()}
    with _step_undone(optimizer):
        optimizer.step()
        still = [name for name, some in adapters.telling.items() if all(map(torch.equal, some, before[name]))]
    yield _all("a step moves every adapter", adapters.telling, still, "B or adapters moved", "did not move")
    yield from _rates(optimizer, held, adapters)


def _rates(
    optimizer: torch.optim.Optimizer, held: dict[int, dict[str, Any]], adapters: _Adapters
) -> Iterator[CheckRow]:
    # LoRA's by A's: LoRA+ gives B many times its rate.
    found = {
        method: sorted({float(held[id(p)]["lr"]) for name, p in adapters.trained.items()
                        if adapters.methods[name] == method and id(p) in held and not name.endswith("lora_b")})
        for method in RATED
    }  # fmt: skip
    used = {method: rates for method, rates in found.items() if rates}
    if not used:
        return
    known = "adam" in type(optimizer).__name__.lower()
    usual = all(
        RATES[method] / RATE_FACTOR <= rate <= RATES[method] * RATE_FACTOR
        for method, rates in used.items()
        for rate in rates
    )
    told = [
        f"{', '.join(f'{rate:g}' for rate in rates)} for {method}; usual is {RATES[method]:g}"
        for method, rates in used.items()
    ]
    finding = "; ".join(told) + ("" if known else " with Adam")
    yield CheckRow("learning rate", "warn" if known and not usual else "pass", finding)


def _held_by(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    return [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]


@contextlib.contextmanager
def _gradients_kept(tensors: Iterable[Iterable[Any]]) -> Iterator[None]:
    """The leaves among ``tensors`` without gradients meanwhile, and with their own again afterwards."""
    leaves = {id(t): t for some in tensors for t in some if isinstance(t, Tensor) and t.is_leaf}
    before = [(leaf, leaf.grad) for leaf in leaves.values()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in before:
            parameter.grad = grad


@contextlib.contextmanager
def _step_undone(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """What a step changes, parameters and the optimizer's state, as it was afterwards."""
    values = [(p, p.detach().clone()) for p in _held_by(optimizer)]
    state = {parameter: copy.deepcopy(held) for parameter, held in optimizer.state.items()}
    settings = [{k: copy.deepcopy(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in values:
                parameter.copy_(value)
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, before in zip(optimizer.param_groups, settings, strict=True):
            group.update(before)
