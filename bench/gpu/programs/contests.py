"""What *questions* times: for each question, ways to compute the same thing beside each other at several shapes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import pyfused
from pyfused.bench.cases import adapter_residual, cross_attention_residual, projection_residual
from pyfused.bench.cases import lora_linear as lora
from pyfused.bench.cases.adapter_residual import AdapterCase
from pyfused.bench.cases.case import Case, normal
from pyfused.bench.cases.lora_linear import LoRACase
from pyfused.bench.gpu.programs import ahead
from pyfused.kernels import launch, lora_linear, lora_linear_tma, recording
from pyfused.kernels.lora_linear_config import GemmConfig
from pyfused.kernels.recording import INTERPRETER, Target, record
from pyfused.models.aa_clip_parts import AdapterBlend

Call = Callable[[], object]
BF16, FP32 = torch.bfloat16, torch.float32
# The tiles between which the model of L2's bandwidth decides: 48 and 112 bytes a cycle and multiprocessor (model).
TILES = {
    "128x256": GemmConfig(128, 256, 64, num_warps=8, num_stages=3),
    "64x128": GemmConfig(64, 128, 64, num_warps=4, num_stages=3),
}
RANK, SEED = 16, 20_240_607
# Where kernels are interpreted: tails, and next to no time.
_SMALL_LORA, _SMALL_ADAPTER = ((132, 24, 40),), (((2, 10, 24), 16),)
_SWAPPED = "pyfused_wgrad_swapped"


@dataclass(frozen=True)
class Contest:
    """Ways to compute the same thing.

    Attributes:
        label: the shape, and what of it.
        calls: name -> call; the others are compared with the first.
        expected: what the others must give, but for two roundings to 16 bits; None for the first one's results, or
            with ``alike`` False for anything.
    """

    label: str
    calls: Mapping[str, Call]
    expected: Call | None = None
    alike: bool = True


@dataclass(frozen=True)
class Question:
    """One of the five.

    Attributes:
        name: in the record.
        text: what is asked.
        contests: (device, the GPU) -> contests, whose tensors live as long as they do.
        host: the host's time of a call is asked for, and not the GPU's.
    """

    name: str
    text: str
    contests: Callable[[torch.device, Target], Generator[Contest, None, None]]
    host: bool = False


def _shapes(target: Target) -> tuple[tuple[int, int, int], ...]:
    """(M, K, N)."""
    return _SMALL_LORA if target == INTERPRETER else lora.GPU_SHAPES


def _alone(kernel: str, call: Call, target: Target, outputs: tuple[str, ...]) -> Call:
    """The one launch of ``kernel`` in a call of a launcher, without what else that does; gives what it writes."""
    with record(target) as launches:
        call()
    (one,) = (item for item in launches if item.kernel.__name__ == kernel)
    settings: dict[str, Any] = {"num_warps": one.num_warps, "num_stages": one.num_stages, "maxnreg": one.maxnreg}

    written = [one.arguments[name] for name in outputs]

    def run() -> tuple[object, ...]:
        launch.launch(one.kernel, one.grid, **settings, **one.arguments)
        return tuple(value.ptr if isinstance(value, launch.Mat) else value for value in written)

    return run


def gemms(device: torch.device, target: Target) -> Generator[Contest, None, None]:
    """y = x W^T + s P B^T and dx = dy W + Q A, P and Q given, by pointers in each tile and by tensor descriptors, and
    the product alone by the library."""
    for (m, k, n), direction in itertools.product(_shapes(target), ("y", "dx")):
        draw = normal(device, 0)
        inner, outer = (k, n) if direction == "y" else (n, k)
        x, p = draw((m, inner), 1.0, BF16), draw((m, RANK), 1.0, BF16)
        stored = draw((n, k), k**-0.5, BF16)
        weight = stored if direction == "y" else stored.t()
        a, b = draw((RANK, inner), 1.0, BF16), draw((outer, RANK), RANK**-0.5, BF16)
        out = torch.empty((m, outer), dtype=BF16, device=device)

        # Not public calls, which would make P as well.
        given = x[None], weight, a, b, None, p, torch.empty((1, m, outer), dtype=BF16, device=device), None, 1.0, 0.0
        settings: dict[str, Any] = {
            "own_p": False, "save_p": False, "saved_scaling": 1.0, "drop_p": False, "transposed": False,
            "mixed": lora_linear._UNMIXED,
        }  # fmt: skip

        def by_pointers(tile: str, given=given, settings=settings) -> Call:
            make = functools.partial(lora_linear.pointer_gemm, *given, drop_x=False, **settings)
            with record(target), recording.forced({}) as found:
                make()
            with recording.forced({found[0]: TILES[tile]}):
                return _alone("_lora_gemm_kernel", make, target, ("y",))

        calls: dict[str, Call] = {"torch.mm": functools.partial(torch.mm, x, weight.t(), out=out)}
        calls |= {tile: by_pointers(tile) for tile in TILES}
        with record(target):
            fits = lora_linear_tma.tma_fits(x[None], weight, given[6], None, RANK)
        if fits:
            make = functools.partial(lora_linear_tma.tma_gemm, *given, **settings)
            calls["descriptors"] = _alone("_lora_tma_kernel", make, target, ("y",))
        yield Contest(f"{m}x{inner}->{outer} {direction}", calls, _with_term(x, weight, b, p))


def _with_term(x: Tensor, weight: Tensor, b: Tensor, p: Tensor) -> Call:
    return lambda: (torch.addmm(x @ weight.t(), p, b.t()),)


def _passes(case: Case, tensors: Mapping[str, Tensor], backward: bool, plan: str = "auto", **options) -> Call:
    """Forward, or forward and backward to inputs and parameters, by Triton's kernels in this plan."""
    leaves = {name: tensors[name].detach().requires_grad_() for name in (*case.inputs, *case.trained)}
    meta = tensors["dy"].device.type == "meta"
    if case.dropout_p:
        options["seed"] = torch.full((1,), SEED, device=tensors["dy"].device)
    options |= {"backend": "portable", "plan": "auto"} if meta else {"backend": "triton", "plan": plan}

    def call() -> object:
        y = case.call(getattr(pyfused, case.operator), {**tensors, **leaves}, **options)
        return torch.autograd.grad(y, list(leaves.values()), tensors["dy"]) if backward else (y.detach(),)

    return ahead.launching(call, plan) if meta else call


def _widened(case: Case, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers with parameters in float32."""
    return {name: value.float() if name in case.trained else value for name, value in tensors.items()}


_DIRECTIONS = {"forward": False, "forward+backward": True}


def adapter_dtypes(device: torch.device, target: Target) -> Generator[Contest, None, None]:
    """`one_launch` and `adapter_residual` over bfloat16 rows, with parameters of 16 bits and of 32."""
    cases: list[tuple[Case, str]]
    cases = [(LoRACase(m, k, n, RANK, dtype=BF16), "one_launch") for m, k, n in _shapes(target)]
    rows = _SMALL_ADAPTER if target == INTERPRETER else adapter_residual.GPU_ROWS
    cases += [(AdapterCase(shape, hidden, BF16), "auto") for shape, hidden in rows]
    for (case, plan), (direction, backward) in itertools.product(cases, _DIRECTIONS.items()):
        tensors = case.tensors(device)
        calls = {
            "16-bit": _passes(case, tensors, backward, plan),
            "float32": _passes(case, _widened(case, tensors), backward, plan),
        }
        yield Contest(f"{case.name} {direction}", calls)


def plans(device: torch.device, target: Target) -> Generator[Contest, None, None]:
    """Plan "auto" and plan "blas", forward and backward, float32 adapters."""
    for p, (m, k, n) in itertools.product((0.0, 0.1), _shapes(target)):
        case = LoRACase(m, k, n, RANK, dtype=BF16, adapter_dtype=FP32, dropout_p=p)
        tensors = case.tensors(device)
        yield Contest(case.name, {plan: _passes(case, tensors, True, plan) for plan in ("auto", "blas")})


def swapped_source(source: str) -> str:
    """Of kernels/lora_linear.py, with Q's product before dB's in the loop of `_lora_wgrad_kernel`.

    Raises:
        ValueError: the lines are not there as they were when this was written.
    """
    pattern = re.compile(
        r"(?P<acc>(?: {8}#.*\n)? {8}acc = tl\.dot\(tl\.trans\(kept\), p, acc,.*\n)"
        r"(?P<q> {8}if f_ptr is not None:\n {12}q = tl\.dot\(t_tile, f,.*\n(?: {12}.*\n)+)"
    )
    swapped, count = pattern.subn(r"\g<q>\g<acc>", source)
    if count != 1:
        raise ValueError(f"_lora_wgrad_kernel has the products to swap {count} times, not once: adapt `swapped_source`")
    return swapped


@functools.cache
def swapped(folder: Path) -> ModuleType:
    """`pyfused.kernels.lora_linear` from `swapped_source`, out of a file in ``folder``."""
    file = folder / f"{_SWAPPED}.py"
    file.write_text(swapped_source(Path(lora_linear.__file__).read_text()))
    return ahead.loaded(_SWAPPED, str(file))


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for as long as the contests run: a compiler reads kernels out of their files."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def wgrad_orders(folder: Path, device: torch.device, target: Target) -> Generator[Contest, None, None]:
    """One pass over dy for dB and Q: its two products in today's order, and Q's first."""
    for m, _, n in _shapes(target):
        draw = normal(device, 0)
        dy, p, b = draw((1, m, n), 1.0, BF16), draw((m, RANK), 1.0, BF16), draw((n, RANK), RANK**-0.5, BF16)
        gradient, calls = torch.empty((n, RANK), dtype=FP32, device=device), {}
        for name, module in (("today", lora_linear), ("swapped", swapped(folder))):
            make = functools.partial(module._wgrad, dy, p, torch.empty_like(gradient), None, 1.0, 0.0, factor=b)
            calls[name] = _alone("_lora_wgrad_kernel", make, target, ("g_ptr", "q_ptr"))
        yield Contest(f"dy {m}x{n}", calls)


def host_times(device: torch.device, target: Target) -> Generator[Contest, None, None]:
    """A training call of each operator's module, and of the formula as people write it, where nothing is computed."""
    dtype = FP32 if device.type == "cpu" else BF16
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    base = nn.Linear(64, 64, **where)
    modules: tuple[tuple[ModuleType, str, nn.Module], ...] = (
        (lora, "x", pyfused.LoRALinear.from_linear(base, lora_dtype=FP32)),
        (adapter_residual, "z", pyfused.BottleneckAdapter(64, hidden=16, device=device)),
        (cross_attention_residual, "x context", pyfused.ScaledCrossAttention(64, 64, 4, **where)),
        (projection_residual, "o", AdapterBlend(64, **where)),
    )
    for home, names, module in modules:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # The formula has parameters of the module's dtype, and casts them as plain torch must.
        case = dataclasses.replace(home.TINY, dtype=dtype)
        if parameters[0].dtype != dtype:
            case = dataclasses.replace(case, adapter_dtype=parameters[0].dtype)
        tensors = case.tensors(device)
        leaves = [tensors[name].requires_grad_() for name in (*case.inputs, *case.trained)]
        bound = case.call(functools.partial(functools.partial, getattr(home, f"eager_{case.operator}")), tensors)
        inputs = [tensors[name] for name in names.split()]
        ours = _training(functools.partial(module, *inputs), [*inputs, *parameters])
        calls = {"eager": _training(_narrowing(bound, dtype), leaves), type(module).__name__: ours}
        if device.type == "meta":
            calls[type(module).__name__] = ahead.launching(ours)
        yield Contest(case.operator, calls, alike=False)


def _narrowing(call: functools.partial, dtype: torch.dtype) -> Callable[[], Tensor]:
    """``call``, with float32 tensors among its arguments cast in every call."""
    wide = [isinstance(value, Tensor) and value.dtype != dtype for value in call.args]
    if not any(wide):
        return call

    def narrowed() -> Tensor:
        values = (value.to(dtype) if cast else value for value, cast in zip(call.args, wide, strict=True))
        return call.func(*values, **call.keywords)

    return narrowed


def _training(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Call:
    def call() -> object:
        y = forward()
        return torch.autograd.grad(y, leaves, torch.empty_like(y), allow_unused=True)

    return call


def questions(folder: Path) -> tuple[Question, ...]:
    """The five, most decisive first; ``folder`` is `scratch`'s."""
    return (
        Question("GEMM", "the time of our GEMM over torch.mm's, by pointers in each tile and by descriptors", gemms),
        Question("adapter dtypes", "the time with float32 parameters over that with 16-bit ones", adapter_dtypes),
        Question("plans", "lora_linear forward+backward, the time of plan blas over that of auto", plans),
        Question(
            "wgrad order", "the wgrad kernel's time with dB's product first over today's order",
            functools.partial(wgrad_orders, folder),
        ),
        Question("host time", "the host's time of a training call, module over eager launches", host_times, host=True),
    )  # fmt: skip


def every_call(found: Iterable[Question], target: Target) -> Iterator[Call]:
    """All that the questions call, on meta tensors, for `ahead.specialisations`."""
    for question in found:
        for contest in question.contests(torch.device("meta"), target):
            yield from contest.calls.values()
