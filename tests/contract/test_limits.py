"""Limits are known in one place: a call at a limit works, one beyond it is refused by the same sentence everywhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import adapter_residual_cases
import cross_attention_cases
import lora_linear_cases
import pytest
import torch
from operator_cases import DEVICE, fresh_compiler, leaves_of, skips
from operators import OPERATORS
from oracle import cotangent
from torch import Tensor
from torch._subclasses import FakeTensorMode

import pyfused
from pyfused.choice import backends
from pyfused.ops.adapter_residual import MAX_CUDA_HIDDEN, MAX_KERNEL_HIDDEN
from pyfused.ops.contract.cuda_limits import MAX_ROWS, cuda_rows
from pyfused.ops.cross_attention_residual import (
    MAX_CUDA_COLUMNS,
    MAX_CUDA_COLUMNS_MATCHED,
    MAX_CUDA_CONTEXTS,
    MAX_KERNEL_COLUMNS,
)
from pyfused.ops.lora_linear import MAX_RANK, MAX_RANK_ONE_LAUNCH

HALF = torch.float16


@dataclass(frozen=True)
class Limit:
    """``draw(size)`` makes the tensors of a call; ``limit`` is the largest size, ``refusal`` what is said beyond.

    An option that is a function makes a tensor, where the call is: among fake ones, or in traced code.
    """

    operator: str
    backend: str
    limit: int
    refusal: str
    draw: Callable[[int], dict[str, Tensor | None]]
    options: dict[str, object]
    runs: bool = True  # whether a call at the limit fits this machine

    def call(self, tensors, **more):
        return getattr(pyfused, self.operator)(**tensors, backend=self.backend, **self.made(), **more)

    def made(self):
        return {name: value() if callable(value) else value for name, value in self.options.items()}


def _lora(dtype=HALF, mixed=None):
    return lambda rank: lora_linear_cases.draw((3, 6), 7, rank, dtype, mixed=mixed)


def _adapter(dtype=HALF, channels=6):
    return lambda hidden: adapter_residual_cases.draw((3, channels), hidden, dtype)


def _cross(dtype=HALF):
    return lambda tokens: cross_attention_cases.draw(1, 2, tokens, 6, 2, 3, dtype)


def _widest(hidden: int) -> int:
    """The largest C that the CUDA C++ adapter takes."""
    device = torch.device(DEVICE)
    fits, beyond = 1, 1 << 14
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        taken = cuda_rows(hidden, middle, device, rows=(64, 32), float_middle=False)
        fits, beyond = (middle, beyond) if taken else (fits, middle)
    return fits


def _limits() -> dict[str, Limit]:
    found = {}
    one_launch = f"plan 'one_launch' takes lora_a (R, K) with R <= {MAX_RANK_ONE_LAUNCH}, got R = "
    for backend in ("triton", "cuda"):
        options = {"plan": "one_launch"}
        found[f"rank, one launch, {backend}"] = Limit(
            "lora_linear", backend, MAX_RANK_ONE_LAUNCH, one_launch, _lora(), options
        )
    found["rank, cuda's only plan"] = Limit("lora_linear", "cuda", MAX_RANK_ONE_LAUNCH, one_launch, _lora(), {})
    any_rank = f"lora_a must have shape (R, K) with 1 <= R <= {MAX_RANK}, got "
    for backend, plan in (("portable", "blas"), ("triton", "shrink_expand"), ("triton", "blas"), ("triton", "auto")):
        found[f"rank, {backend} {plan}"] = Limit("lora_linear", backend, MAX_RANK, any_rank, _lora(), {"plan": plan})
    # Adapters beside an index share the rank.
    index = {"adapter_index": lambda: torch.zeros(3, dtype=torch.int64, device=DEVICE)}
    shared_rank = f"lora_a must have shape (G, R, K) with 1 <= G R <= {MAX_RANK} beside adapter_index, got "
    for backend, plan, most, refusal in (
        ("portable", "blas", MAX_RANK, shared_rank),
        ("triton", "auto", MAX_RANK, shared_rank),
        ("triton", "one_launch", MAX_RANK_ONE_LAUNCH, one_launch),
    ):
        found[f"rank, index, {backend} {plan}"] = Limit(
            "lora_linear", backend, most, refusal, _lora(mixed=1), {"plan": plan, **index}
        )
    for plan in ("save", "recompute"):
        options = {"plan": plan}
        for dtype, most in ((HALF, MAX_KERNEL_HIDDEN[2]), (torch.float32, MAX_KERNEL_HIDDEN[4])):
            found[f"h, triton {plan} {dtype}"] = Limit(
                "adapter_residual", "triton", most, f"must have h <= {most} there for {dtype}, got h = ",
                _adapter(dtype), options,
            )  # fmt: skip
        found[f"h, cuda {plan}"] = Limit(
            "adapter_residual", "cuda", MAX_CUDA_HIDDEN, f"must have h <= {MAX_CUDA_HIDDEN} there", _adapter(), options
        )
    widest = _widest(64)
    found["C, cuda"] = Limit(
        "adapter_residual", "cuda", widest, "bytes of shared memory there, a block has",
        lambda channels: adapter_residual_cases.draw((1, channels), 64, HALF), {},
    )  # fmt: skip
    for match in (False, True):
        for plan in ("absorbed", "absorbed_recompute"):
            options = {"num_heads": 2, "plan": plan, "norm_match": match}
            for dtype in (HALF, torch.float32):
                most = MAX_KERNEL_COLUMNS[dtype.itemsize] // (1 + match)
                found[f"columns, triton {plan} {dtype} match {match}"] = Limit(
                    "cross_attention_residual", "triton", most // 2,
                    f"plan '{plan}' takes at most {most} columns H T there in {dtype}", _cross(dtype), options,
                )  # fmt: skip
            most = MAX_CUDA_COLUMNS_MATCHED if match else MAX_CUDA_COLUMNS
            found[f"columns, cuda {plan} match {match}"] = Limit(
                "cross_attention_residual", "cuda", most // 2, f"plan '{plan}' takes at most {most} columns H T there",
                _cross(), options,
            )  # fmt: skip
    found["contexts, cuda"] = Limit(
        "cross_attention_residual", "cuda", MAX_CUDA_CONTEXTS, f"takes at most {MAX_CUDA_CONTEXTS} contexts there",
        lambda contexts: cross_attention_cases.draw(1, 1, 1, 1, 1, 1, HALF) | {
            name: torch.zeros((contexts, 1, 1), dtype=HALF, device=DEVICE) for name in ("x", "context")
        },
        {"num_heads": 1, "plan": "absorbed"}, runs=False,
    )  # fmt: skip
    rows = f"takes at most {MAX_ROWS} rows there, got "

    def many(name, draw):
        def drawn(count):
            tensors = draw(1)
            return tensors | {name: tensors[name].reshape(1, -1).expand(count, -1)}

        return drawn

    found["rows, cuda lora_linear"] = Limit(
        "lora_linear", "cuda", MAX_ROWS, rows, many("x", lambda _: lora_linear_cases.draw((1, 2), 2, 1, HALF)), {},
        runs=False,
    )  # fmt: skip
    found["rows, cuda adapter_residual"] = Limit(
        "adapter_residual", "cuda", MAX_ROWS, rows,
        many("z", lambda _: adapter_residual_cases.draw((1, 2), 1, HALF)), {}, runs=False,
    )  # fmt: skip
    return found


LIMITS = _limits()
every_limit = pytest.mark.parametrize(
    ("backend", "name"),
    [pytest.param(limit.backend, name, marks=skips(limit.backend), id=name) for name, limit in LIMITS.items()],
)


@every_limit
def test_at_the_limit_it_works(backend, name):
    limit = LIMITS[name]
    if not limit.runs:
        pytest.skip("it would take minutes, or more memory than this machine has")
    leaves = leaves_of(limit.draw(limit.limit))
    y = limit.call(leaves)
    y.backward(cotangent(y))
    assert y.isfinite().all()


@every_limit
@pytest.mark.parametrize("tensors", ["real", "fake", "compiled"])
def test_beyond_it_is_refused_by_the_same_sentence(backend, name, tensors):
    limit = LIMITS[name]
    drawn, refusal = limit.draw(limit.limit + 1), re.escape(limit.refusal)
    if tensors == "real":
        with pytest.raises(ValueError, match=refusal):
            limit.call(drawn)
    elif tensors == "fake":
        mode = FakeTensorMode()
        drawn = {name: None if value is None else mode.from_tensor(value) for name, value in drawn.items()}
        with mode, pytest.raises(ValueError, match=refusal):
            limit.call(drawn)
    else:
        # What traced code raises torch quotes.
        compiled = torch.compile(limit.call, fullgraph=True, backend=fresh_compiler("eager"))
        with pytest.raises(torch._dynamo.exc.Unsupported, match=f"ValueError.*{refusal}"):
            compiled(drawn)


@every_limit
def test_auto_goes_elsewhere(backend, name):
    """What one backend refuses for its size another serves."""
    limit = LIMITS[name]
    if "R <= 256" in limit.refusal or not limit.runs:
        pytest.skip("no backend takes more, or no machine")
    y = getattr(pyfused, limit.operator)(
        **limit.draw(limit.limit + 1),
        **{name: value for name, value in limit.made().items() if name != "plan"},
    )
    assert y.isfinite().all()


def test_the_limits_name_every_backend_and_plan():
    seen = {(limit.operator, limit.backend, limit.options.get("plan")) for limit in LIMITS.values()}
    wanted = {
        (row.name, backend, plan)
        for row in OPERATORS.values()
        for backend, plans in row.plans.items()
        for plan in plans
        if backend != "portable"
    }
    # Their kernels take any size.
    wanted -= {("projection_residual", "triton", ""), ("cross_attention_residual", "triton", "standard")}
    wanted = {(operator, backend, plan) for operator, backend, plan in wanted if backend != "cpu"}
    assert seen >= wanted
    assert set(backends.BACKENDS) == {"portable", "triton", "cuda", "cpu"}
