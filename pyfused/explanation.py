"""``explain``: which backend and plan every operator call of a model gets, and why."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from pyfused.choice import backends, order
from pyfused.integrations.peft import left_to_peft
from pyfused.ops import decision
from pyfused.ops.decision import Decision, LeftToTorch, OneCall, Told
from pyfused.surgery import watch
from pyfused.surgery.report import folded, table
from pyfused.surgery.variants import Variant


@dataclass(frozen=True)
class OperatorCall:
    """One call of an operator.

    Attributes:
        module: path of the module that made the call, "" for the one that was explained or for a plain function.
        operator: the operator's name.
        shapes: the operator's letters and their sizes, such as ``(("M", 400), ("K", 768), ("N", 3072), ("R", 16))``.
        dtype: dtype the call computes in.
        device: device of its input.
        backend: the backend that served it.
        plan: the plan of forward, "auto" resolved.
        backward_plan: the plan of backward.
        why: reason for the plan, a row that was measured say; on a GPU, for each direction, the time by the model, in
            microseconds, of what serves it, of the runner-up and of the eager formula; then why the other backends
            cannot, or were not asked.
        saved_bytes: what a training step keeps for backward, in bytes, beyond the call's own inputs.
    """

    module: str
    operator: str
    shapes: tuple[tuple[str, int], ...]
    dtype: torch.dtype
    device: torch.device
    backend: str
    plan: str
    backward_plan: str
    why: tuple[str, ...]
    saved_bytes: int


@dataclass(frozen=True)
class PlainPart(LeftToTorch):
    """What a module leaves to plain torch, and the path of that module, "" for the one explained.

    It is a module of pyfused, or a LoRA layer of PEFT's that no operator serves.
    """

    module: str


@dataclass(frozen=True)
class SharedCall(OneCall):
    """Layers that may share a call (``group=True`` of `inject_lora`), and the path of the one that runs first."""

    module: str


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns: the operator calls in the order they were made, and what went beside them.

    ``print`` shows them as a table, with calls that differ only in numbers of their paths on one line.
    """

    calls: list[OperatorCall] = field(default_factory=list)
    plain: list[PlainPart] = field(default_factory=list)
    shared: list[SharedCall] = field(default_factory=list)

    @property
    def saved_bytes(self) -> int:
        """Sum over all calls of what a training step keeps for backward, in bytes, beyond the calls' own inputs."""
        return sum(call.saved_bytes for call in self.calls)

    def __str__(self) -> str:
        beside = [f"plain torch: {where}: {part.what}: {part.why}" for part, where in _alike(self.plain)] + [
            f"one call for {', '.join(part.names)}: {where}"
            if part.why is None
            else f"a call each for {', '.join(part.names)}: {where}: {part.why}"
            for part, where in _alike(self.shared)
        ]
        if not self.calls:
            return "\n".join(["no operator of pyfused was called", *beside])
        alike: dict[OperatorCall, list[OperatorCall]] = {}
        for call in self.calls:
            alike.setdefault(replace(call, module=folded(call.module)), []).append(call)
        notes: dict[tuple[str, ...], int] = {}
        rows = [("module", "operator", "calls", "shapes", "dtype", "backend", "plan", "saved", "why")]
        for call, calls in alike.items():
            rows.append(
                (
                    (call if len(calls) > 1 else calls[0]).module or "-",
                    call.operator,
                    str(len(calls)),
                    " ".join(f"{letter}={size}" for letter, size in call.shapes),
                    str(call.dtype).removeprefix("torch."),
                    call.backend,
                    call.plan if call.plan == call.backward_plan else f"{call.plan} / {call.backward_plan}",
                    _bytes(len(calls) * call.saved_bytes),
                    f"[{notes.setdefault(call.why, len(notes) + 1)}]",
                )
            )
        lines = table(rows, "<" * len(rows[0]))
        lines += ["", f"{len(self.calls)} calls; a training step saves {_bytes(self.saved_bytes)} beyond their inputs"]
        lines += [f"[{number}] {'; '.join(why)}" for why, number in notes.items()]
        return "\n".join([*lines, *beside])


def explain(model_or_function: Callable, *example_inputs: Any, **kwargs: Any) -> Explanation:
    """Run one call under ``no_grad`` and report the backend and plan of every pyfused operator inside it.

    The model stays as it was: its mode is kept, its buffers (a BatchNorm's running statistics in train mode) are
    copies during the call, and torch's random generators are put back afterwards. What was compiled with
    ``torch.compile`` runs eagerly meanwhile.

    Args:
        model_or_function: a module, a bound method of a module (``model.encode_image``) or any callable.
        example_inputs, kwargs: passed on; tensors of the shapes, dtypes and device to be explained. Call it under
            ``torch.autocast`` to see what autocast gives.

    Returns:
        An `Explanation`: ``.calls``, ``.plain``, ``.shared``, ``.saved_bytes``; it prints as a table.

    Raises:
        TypeError: ``model_or_function`` cannot be called, or has a module made by torch.jit in it.
        Exception: whatever the call itself raises.

    Example:
        ``print(pyfused.explain(model, images))``
    """
    watch.check_callable("explain", model_or_function)
    model = watch.module_of(model_or_function)
    scripted = [
        type(inside).__name__
        for inside in (model.modules() if model is not None else ())
        if isinstance(inside, torch.jit.ScriptModule)
    ]
    if scripted:
        raise TypeError(
            f"explain: model_or_function must be Python, which can be watched, got a {scripted[0]}; explain the module "
            "that it was made from"
        )
    explanation = Explanation()
    path: list[str] = []

    def observer(told: Told) -> None:
        module = path[-1] if path else ""
        if isinstance(told, LeftToTorch):
            explanation.plain.append(PlainPart(told.what, told.why, module))
        elif isinstance(told, OneCall):
            explanation.shared.append(SharedCall(told.names, told.why, module))
        else:
            explanation.calls.append(_call(module, told))

    with torch.no_grad(), _path_tracked(model, path), decision.observed(observer):
        watch.undisturbed(model_or_function, example_inputs, kwargs)
    return explanation


def _alike(parts: list) -> list[tuple[Any, str]]:
    """Each of ``parts`` that differs in more than numbers of its path, with that path and how often it was there."""
    found = Counter(replace(part, module=folded(part.module)) for part in parts)
    return [(part, f"{part.module or '-'}{f' ({times} calls)' if times > 1 else ''}") for part, times in found.items()]


def _call(module: str, decided: Decision) -> OperatorCall:
    names = {field.name for field in fields(OperatorCall)} - {"module", "why"}
    same = {name: getattr(decided, name) for name in names}
    return OperatorCall(module=module, why=(*decided.reasons, *_not_taken(decided)), **same)


@contextlib.contextmanager
def _path_tracked(model: nn.Module | None, path: list[str]) -> Iterator[None]:
    """Keeps the path of the module that is running at the end of ``path``."""
    handles = []
    modules = [] if model is None else list(model.named_modules())
    # A module that stands for others would find hooks on them, and act otherwise than it does without.
    inside = {
        id(part)
        for _, module in modules
        if isinstance(module, Variant) and module._variant_whole
        for part in module.modules()
        if part is not module
    }
    try:
        for name, module in modules:
            if id(module) in inside:
                continue
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: path.append(name)))
            left = left_to_peft(module)
            if left is not None:
                handles.append(module.register_forward_pre_hook(lambda *_, left=left: decision.notify(left)))
            handles.append(module.register_forward_hook(lambda *_: _drop_last(path), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _drop_last(path: list[str]) -> None:
    # Not `path.pop` itself: what a forward hook returns replaces the module's output.
    path.pop()


def _not_taken(decided: Decision) -> list[str]:
    """Where backends can be chosen between, what decided; then for each backend that did not serve the call, but for
    those that would have taken longer, why."""
    device, chosen, kernels = decided.device, decided.backend, decided.kernels
    found = backends.available(device, decided.dtype, kernels, decided.limits, decided.plans)
    reasons: list[str] = []
    best = chosen
    if set(found) != {"portable"}:
        call = kernels, device, decided.dtype, decided.sizes, found
        reasons += order.reasons(*call, decided.choice)
        best = decided.measured_backend if decided.measured_backend in found else backends.planned(*call).backend
    # A GPU is none of its affairs.
    for_cpus = ("cpu",) if device.type == "cpu" else ()
    for name in ("cuda", *for_cpus, "triton", "portable"):
        reason = backends.refusal(name, device, decided.dtype, kernels) or decided.limits.get(name)
        if reason is None and device.type == "cpu" and name in _ON_A_CPU:
            # Interpreter and emulator serve a CPU tensor only on request.
            reason = f"on a CPU it is {_ON_A_CPU[name]}, and used only by name"
        if reason is None and name == "cpu":
            reason = (backends.CPU_BY_NAME if name not in found else order.slow_on_a_cpu(decided.sizes)) or None
        if reason is None and name == best:
            reason = "not asked for"
        if name != chosen and reason is not None:
            reasons.append(f"not {name}: {reason}")
    return reasons


_ON_A_CPU = {"triton": "interpreted", "cuda": "emulated"}


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
