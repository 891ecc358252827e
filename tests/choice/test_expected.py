"""The choices at the targets' sizes, as a table that a change of the model changes on purpose; and what the model must
say of them, whatever its numbers."""

from __future__ import annotations

import expected
import pytest
import torch

from pyfused.bench.targets.numbers import ADAPTER_EAGER_MODEL, LORA_EAGER_MODEL
from pyfused.choice import costs, order
from pyfused.choice.rates import LAUNCH
from pyfused.choice.rule import BOUND

pytestmark = pytest.mark.host


def test_what_is_taken_at_the_targets_sizes():
    """A change of the model, or of a kernel's band, prints another table: ``python tests/choice/expected.py``."""
    assert expected.text() == expected.FILE.read_text()


def _cell(name: str, capability: tuple[int, int], without: str = "") -> tuple[str, list[str]]:
    backend, _, plans = expected.table(without)[name][list(expected.GPUS).index(capability)].partition(" ")
    both = plans.split("/")
    return backend, both * 2 if len(both) == 1 else both


def test_on_hopper_the_librarys_products_are_taken_where_a_gemm_by_pointers_loses():
    there = next(target for target in expected.GPUS if target == (9, 0))
    seen = set()
    for name, operator, sizes, plans in expected.rows(expected.GPUS[there]):
        if operator == "lora_linear" and "4096" in name:
            chosen = order.by_times(operator, there, torch.bfloat16, sizes | {"tma": 0}, plans)
            assert chosen[1:] == ("blas", "blas"), name
            seen.add(order.by_times(operator, there, torch.bfloat16, sizes, plans).forward)
    assert seen == {"one_launch", "blas"}, "one that loads by descriptors wins some of them"
    for wide in ("", ", adapters float32", ", weight float32"):
        assert _cell(f"lora_linear 6304x768->3072{wide}", (9, 0)) == ("triton", ["one_launch", "blas"])


def test_on_hopper_without_triton_the_cuda_kernels_serve_small_lora_layers_alone():
    for name, cells in expected.table("triton").items():
        if name.startswith("lora_linear") and "dropout" not in name:
            assert cells[list(expected.GPUS).index((9, 0))] == "portable blas", name
    small = {"M": 64, "N": 512, "K": 512, "R": 16, "dropout_p": 0.0, "weight_bytes": 2, "adapter_bytes": 2, "tma": 1}
    both = {"cuda": ("one_launch",), "portable": ("blas",)}
    assert order.by_times("lora_linear", (9, 0), torch.bfloat16, small, both).backend == "cuda"


@pytest.mark.parametrize("without", ["", "triton"])
def test_nothing_is_taken_that_may_lose_to_eager(without):
    """But for the library's own plan, and what is no slower than that."""
    for capability, shared_memory in expected.GPUS.items():
        for name, operator, sizes, plans in expected.rows(shared_memory):
            there = {backend: each for backend, each in plans.items() if backend != without}
            chosen = order.by_times(operator, capability, torch.bfloat16, sizes, there)
            like = dict(order._bucketed(sizes)) | {"M": order._stands_for(sizes["M"])}
            for direction, plan in zip(order.times(operator, capability, 2, like, there), chosen[1:], strict=True):
                slow = direction.candidates[chosen.backend, plan].slow
                library = min(each.slow for own, each in direction.candidates.items() if own in costs.LIBRARY)
                assert slow <= BOUND * max(direction.eager, library) or (chosen.backend, plan) in costs.LIBRARY, name


# By hand: the products at 790 TFLOP/s and each tensor's bytes at 4.3 TB/s, as often as the formula reads and writes it.
@pytest.mark.parametrize(("shape", "by_hand"), LORA_EAGER_MODEL.items())
def test_the_eager_lora_formula_by_hand(shape, by_hand):
    m, k, n = shape
    sizes = {"M": m, "N": n, "K": k, "R": 16, "dropout_p": 0.0, "weight_bytes": 2, "adapter_bytes": 2, "tma": 1}
    eager, plans = costs.works("lora_linear", (9, 0), 2, sizes)
    for work, expected_time in zip(eager, by_hand, strict=True):
        assert work.fixed == pytest.approx(expected_time, rel=0.04)
        assert work.on_gpu(1.0) == work.fixed + LAUNCH * work.operations
    # Dropout reads, writes and masks x once more.
    (dropped, _), _ = costs.works("lora_linear", (9, 0), 2, sizes | {"dropout_p": 0.1})
    assert dropped.fixed - eager[0].fixed == pytest.approx(2.5 * m * k * 2 / 4.3e6, rel=0.01)
    # The library's plan does the same products and less of everything else.
    for library in costs.LIBRARY & plans.keys():
        assert all(own.fixed < formula.fixed for own, formula in zip(plans[library], eager, strict=True))


@pytest.mark.parametrize(("shape", "forward"), ADAPTER_EAGER_MODEL.items())
def test_the_eager_adapter_formula_by_hand(shape, forward):
    m, c, h = shape
    sizes = {"M": m, "C": c, "h": h, "dropout_p": 0.0, "weight_bytes": 2, "cuda_rows": 64}
    eager, _ = costs.works("adapter_residual", (9, 0), 2, sizes)
    # The targets leave the narrow middle out where it is half as wide as the rows.
    middle = 4 * m * h * 2 / 4.32e6
    assert forward * 0.97 <= eager[0].fixed <= forward * 1.03 + middle


def test_what_makes_a_call_slower_never_makes_its_time_less():
    base = {"M": 6304, "N": 3072, "K": 768, "R": 16, "dropout_p": 0.0, "weight_bytes": 2, "adapter_bytes": 2, "tma": 1}
    plans = {"cuda": ("one_launch",), "portable": ("blas",), "triton": ("one_launch", "shrink_expand", "blas")}
    for more in ({"M": 8192}, {"N": 4096}, {"K": 1024}, {"R": 64}, {"dropout_p": 0.1}, {"weight_bytes": 4},
                 {"adapter_bytes": 4}):  # fmt: skip
        for capability in expected.GPUS:
            for before, after in zip(
                order.times("lora_linear", capability, 2, base, plans),
                order.times("lora_linear", capability, 2, base | more, plans), strict=True,
            ):  # fmt: skip
                for name, each in before.candidates.items():
                    assert after.candidates[name].slow >= each.slow * 0.999, (more, capability, name)
