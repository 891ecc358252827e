"""Use for hours: memory stays as it was, and threads and streams do not meet."""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from operator_cases import DEVICE
from oracle import cotangent, randn
from torch import Tensor, nn

import pyfused
from pyfused.choice import backends
from pyfused.models import AdapterBlend
from pyfused.modules import BottleneckAdapter, LoRALinear, ScaledCrossAttention
from pyfused.ops import cross_attention_residual
from pyfused.ops.contract import checks

psutil = pytest.importorskip("psutil")


@pytest.fixture
def served_by(monkeypatch) -> Callable[[str], None]:
    """Makes a backend the default, which is what modules take; skips where it is not."""

    def serve(backend: str) -> None:
        reason = backends.refusal(backend, torch.device(DEVICE), torch.bfloat16)
        if reason is not None:
            pytest.skip(f"{backend}: {reason}")
        monkeypatch.setattr(backends, "DEFAULT_BACKEND", backend)

    return serve


# ---- thousands of training steps

STEPS, WARM_UP = 800, 160
# (B, L), and so the shapes that anything keyed on shapes meets.
SHAPES = ((2, 7), (1, 12), (3, 5), (2, 3))
C = 16
Step = Callable[[int], None]


def _dropout(number: int) -> float:
    """In every eighth step: drawing a mask takes most of a step so small."""
    return 0.1 * (number % 8 == 0)


def _rows(step: int, dtype: torch.dtype) -> Tensor:
    return randn(*SHAPES[step % len(SHAPES)], C, dtype=dtype, seed=step % 64, device=DEVICE)


def _trains(module: Callable[[Tensor], Tensor], parameters, dtype: torch.dtype) -> Step:
    optimizer = torch.optim.SGD(parameters, lr=1e-3)

    def step(number: int) -> None:
        optimizer.zero_grad()
        module(_rows(number, dtype)).square().mean().backward()
        optimizer.step()

    return step


def _lora_steps(dtype: torch.dtype) -> Step:
    module = LoRALinear(C, 12, rank=4, device=DEVICE, dtype=dtype)
    step = _trains(module, [module.lora_a, module.lora_b], dtype)

    def mixed(number: int) -> None:
        # Every other step under autocast, which keeps a cast copy of the frozen weight; the weight itself changes.
        module.lora_dropout = _dropout(number)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=number % 2 == 1):
            step(number)
        if number % 16 == 0:
            with torch.no_grad():
                module.weight.mul_(1.0)

    return mixed


def _adapter_steps(dtype: torch.dtype) -> Step:
    module = BottleneckAdapter(C, layer_scale=0.1, drop_path=0.3, device=DEVICE)
    step = _trains(module, module.parameters(), dtype)

    def mixed(number: int) -> None:
        module.dropout = _dropout(number)
        step(number)

    return mixed


def _attention_steps(dtype: torch.dtype) -> Step:
    """A module that trains, then a frozen one that gets a new prepared context every eighth step."""
    trained = ScaledCrossAttention(C, 8, 2, device=DEVICE)
    frozen = ScaledCrossAttention(C, 8, 2, learnable_weight=True, device=DEVICE).requires_grad_(False)
    frozen.gate.requires_grad_()
    contexts = [randn(1, 3, 8, dtype=dtype, seed=i, device=DEVICE) for i in range(4)]
    prepared = frozen.prepare(contexts[0], plan="absorbed")
    calls = 0

    def module(x: Tensor) -> Tensor:
        nonlocal prepared, calls
        context = contexts[calls // 8 % 4]
        if calls % 8 == 0:
            prepared = frozen.prepare(context, plan="absorbed")
        trained.dropout = _dropout(calls)
        calls += 1
        return frozen(trained(x, context), prepared=prepared)

    return _trains(module, [*trained.parameters(), frozen.gate], dtype)


def _projection_steps(dtype: torch.dtype) -> Step:
    module = AdapterBlend(C, device=DEVICE)
    return _trains(module, module.parameters(), dtype)


TRAINING = {
    "lora_linear": _lora_steps,
    "adapter_residual": _adapter_steps,
    "cross_attention_residual": _attention_steps,
    "projection_residual": _projection_steps,
}


def _tracked() -> tuple[int, int]:
    """Tensors, and objects that Python's garbage collector knows; cycles that wait for it are among them."""
    objects = gc.get_objects()
    # Not isinstance: it would ask lazy modules, which then load themselves.
    return sum(issubclass(type(item), Tensor) for item in objects), len(objects)


def _growth(step: Step, other: Callable[[], int]) -> tuple[int, int, int]:
    """How many tensors, objects and bytes by ``other`` there are more after `STEPS` steps than after `WARM_UP`."""
    for number in range(WARM_UP):
        step(number)
    with _uncollected():
        before = (*_tracked(), other())
        for number in range(WARM_UP, STEPS):
            step(number)
        return tuple(after - start for start, after in zip(before, (*_tracked(), other()), strict=True))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection: a cycle would hold its memory, a GPU's too, until one happens to run."""
    # Two: what the first gives back to the system would hide as much growth.
    gc.collect()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("operator", TRAINING)
def test_training_does_not_grow(operator, served_by):
    served_by("portable")
    tensors, objects, resident = _growth(TRAINING[operator](torch.float32), lambda: psutil.Process().memory_info().rss)
    assert tensors == 0
    # One of any kind in a hundred steps would be twenty; none has been seen.
    assert objects < 20
    # The smallest tensor takes some 700 bytes with what torch keeps of it: one a step would be 1.4 MB. The allocator's
    # own growth, which ends, was seen to be 82 to 574 kB.
    assert resident < 1024 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("operator", TRAINING)
@pytest.mark.parametrize("kernels", ["triton", "cuda"])
def test_training_does_not_grow_on_a_gpu(operator, kernels, served_by):
    served_by(kernels)
    if operator not in backends.CUDA_OPERATORS["cuda"] and kernels == "cuda":
        pytest.skip(f"pyfused._C has no kernels for {operator}")
    reserved = []

    def allocated() -> int:
        reserved.append(torch.cuda.memory_reserved())
        return torch.cuda.memory_allocated()

    tensors, objects, device_bytes = _growth(TRAINING[operator](torch.bfloat16), allocated)
    assert (tensors, device_bytes) == (0, 0)
    assert objects < 20
    assert reserved[0] == reserved[1]


def test_modules_leave_nothing_behind(served_by):
    """1,000 modules in turn, each used in every way that something is remembered of it."""
    served_by("portable")
    x, context = randn(2, 5, C), randn(1, 3, 8)
    alive: list[weakref.ref] = []

    def use(number: int) -> None:
        kind = number % 4
        if kind == 0:
            module = LoRALinear(C, 12, rank=4)
            with torch.autocast("cpu", torch.bfloat16):
                module(x).sum().backward()
        elif kind == 1:
            module = BottleneckAdapter(C)
            module(x).sum().backward()
        elif kind == 2:
            module = ScaledCrossAttention(C, 8, 2).requires_grad_(False)
            prepared = module.prepare(context)
            torch.optim.SGD(module.parameters()).step()
            module(x, prepared=module.prepare(context))
            alive.append(weakref.ref(prepared))
        else:
            module = nn.Sequential(nn.Linear(C, C))
            pyfused.inject_lora(module, target_modules=["0"], rank=2)
            pyfused.explain(module, x)
        alive.extend(weakref.ref(item) for item in (module, *module.parameters()))

    for number in range(8):
        use(number)
    alive.clear()
    with _uncollected():
        tensors, objects = _tracked()
        for number in range(1000):
            use(number)
        assert [reference() for reference in alive if reference() is not None] == []
        # The references themselves are objects too.
        assert abs(_tracked()[1] - objects - len(alive)) < 20
        assert _tracked()[0] == tensors


# ---- threads and streams

THREADS, JOBS = 8, 64


@contextlib.contextmanager
def _autocast() -> Iterator[None]:
    with torch.autocast(DEVICE, torch.bfloat16):
        yield


# How a job runs, and whether it has gradients.
MODES = {
    "grad": (contextlib.nullcontext, True),
    "autocast": (_autocast, True),
    "no_grad": (torch.no_grad, False),
    "inference": (torch.inference_mode, False),
}


@dataclass(frozen=True)
class Job:
    """One call of a module in one mode."""

    call: Callable[[Tensor], Tensor]
    leaves: list[nn.Parameter]
    x: Tensor
    mode: str

    def run(self) -> list[Tensor]:
        """The output and the gradients of x and the parameters."""
        context, has_gradients = MODES[self.mode]
        with context():
            y = self.call(self.x)
        assert y.requires_grad == has_gradients
        assert y.is_inference() == (self.mode == "inference")
        if not has_gradients:
            return [y]
        return [y.detach(), *torch.autograd.grad(y, [self.x, *self.leaves], cotangent(y))]


def _jobs(widths: range, dtype: torch.dtype, operators: int) -> list[Job]:
    """Of ``operators`` kinds, in random sizes; those on autocast that have a frozen weight share it."""
    draw = random.Random(0)
    base = nn.Linear(widths[-1], widths[0], device=DEVICE, dtype=dtype)
    jobs = []
    for number in range(JOBS):
        mode = list(MODES)[number // operators % len(MODES)]
        width, tokens, dropout = draw.choice(widths), draw.randint(1, 4), draw.choice((0.0, 0.3))
        settings = {"dropout": dropout, "device": DEVICE}
        kind = number % operators
        if kind == 0 and mode == "autocast":
            width = base.in_features
            module = LoRALinear.from_linear(base, rank=draw.randint(1, 16), dropout=dropout)
        elif kind == 0:
            module = LoRALinear(width, draw.choice(widths), rank=draw.randint(1, 16), dtype=dtype, **settings)
        elif kind == 1:
            module = BottleneckAdapter(width, hidden=draw.randint(1, 64), layer_scale=0.5, init_std=0.5, **settings)
        elif kind == 2:
            heads = draw.choice((1, 2))
            # Wide heads: with narrow ones plan "standard", which has no kernels in "cuda", would cost less.
            module = ScaledCrossAttention(width, 8, heads, head_dim=width, **settings)
        else:
            module = AdapterBlend(width, device=DEVICE)
        context = randn(1, tokens, 8, dtype=dtype, seed=number, device=DEVICE)
        call = partial(module, context=context) if kind == 2 else module
        x = randn(draw.randint(1, 3), draw.randint(1, 40), width, dtype=dtype, seed=number, device=DEVICE)
        leaves = [parameter for parameter in module.parameters() if parameter.requires_grad]
        jobs.append(Job(call, leaves, x.requires_grad_(), mode))
    return jobs


@pytest.fixture
def one_seed(monkeypatch):
    """One dropout mask for all calls: threads would draw their seeds in another order every time.

    Not in attention of plan "standard", where torch draws: few rows take plan "absorbed" here.
    """
    monkeypatch.setattr(cross_attention_residual, "ABSORBED_STEPS", {})
    monkeypatch.setattr(checks, "seed", lambda operator, value, device: torch.full((1,), 7, device=device))


@pytest.fixture
def restless():
    """Threads take turns every ten microseconds."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def _assert_as_alone(jobs: list[Job], run: Callable[[Job], list[Tensor]], rounds: int) -> None:
    order = random.Random(1).sample(jobs * rounds, rounds * len(jobs))
    # A product rounds by how many cores share it, and torch does not tell a new thread what another one was set to.
    cores = torch.get_num_threads()
    with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(cores,)) as pool:
        # Before each runs alone: what the first call fills in has to be filled in by several.
        together = list(pool.map(run, order))
    alone = {id(job): job.run() for job in jobs}
    for job, results in zip(order, together, strict=True):
        for actual, expected in zip(results, alone[id(job)], strict=True):
            assert actual.dtype == expected.dtype
            assert torch.equal(actual, expected), f"{job.call} in mode {job.mode}"


def test_threads_compute_what_each_would_alone(served_by, one_seed, restless):
    """Not in the interpreter or the emulator: tools for tests, they hold the one thread that they run in globals."""
    served_by("portable")
    _assert_as_alone(_jobs(range(8, 49), torch.float32, len(TRAINING)), Job.run, rounds=4)


@pytest.mark.gpu
@pytest.mark.parametrize(("kernels", "operators"), [("triton", 4), ("cuda", 3)])
def test_streams_compute_what_the_default_one_does(kernels, operators, served_by, one_seed, restless):
    served_by(kernels)
    # Wide enough that some blocks need more shared memory than the default, each width another amount.
    jobs = _jobs(range(16, 513, 8), torch.bfloat16, operators)
    streams, draw = [torch.cuda.Stream() for _ in range(4)], random.Random(2)
    torch.cuda.synchronize()

    def on_a_stream(job: Job) -> list[Tensor]:
        with torch.cuda.stream(draw.choice(streams)):
            results = job.run()
            torch.cuda.current_stream().synchronize()
            return results

    _assert_as_alone(jobs, on_a_stream, rounds=4)


def test_threads_prepare_contexts_while_others_step(served_by, restless):
    served_by("portable")
    start = threading.Barrier(THREADS)

    def work(number: int) -> None:
        module = ScaledCrossAttention(C, 8, 2).requires_grad_(False)
        optimizer = torch.optim.SGD(module.parameters())
        x, prepared = randn(2, 5, C), []
        start.wait()
        for i in range(50):
            prepared = [*prepared[-8:], module.prepare(randn(1, 3, 8, seed=i))]
            module(x, prepared=prepared[-1])
            optimizer.step()
            with pytest.raises(RuntimeError, match="has changed since the context was prepared"):
                module(x, prepared=prepared[-1])

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))
