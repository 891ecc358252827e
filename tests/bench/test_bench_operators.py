"""What the benchmarks know of each operator: the gate, the cases, the contenders, and the models built from them."""

from __future__ import annotations

import copy
import dataclasses
import sys

import pytest
import torch

import pyfused
from pyfused.bench.cases import operators
from pyfused.bench.cases.adapter_residual import AdapterCase, eager_adapter_residual
from pyfused.bench.cases.baselines import LOOP
from pyfused.bench.cases.case import refusal
from pyfused.bench.cases.cross_attention_residual import SDPA, CrossAttentionCase, eager_cross_attention_residual
from pyfused.bench.cases.lora_linear import LoRACase, MixedLoRACase
from pyfused.bench.cases.projection_residual import ProjectionCase, eager_projection_residual
from pyfused.bench.measure import memory, parity
from pyfused.bench.record.rows import Row
from pyfused.bench.run import check
from pyfused.bench.targets import numbers
from pyfused.choice import backends
from pyfused.ops import cross_attention_residual, decision
from pyfused.ops.cross_attention_residual import PLANS

CPU = torch.device("cpu")
SMALL = LoRACase(33, 40, 24, rank=3)
SMALL_MIXED = MixedLoRACase(33, 40, 24, rank=3, adapters=3)
SMALL_ADAPTER = AdapterCase((3, 11, 24), 5)
SMALL_MAPS = AdapterCase((3, 24, 5, 7), 5, drop_path=0.34)
SMALL_ATTENTION = CrossAttentionCase(2, 11, 24, 3, 5)
SMALL_MATCHED = CrossAttentionCase(2, 11, 24, 3, 5, context_channels=20, head_dim=4, norm_match=True)
SMALL_PROJECTION = ProjectionCase((2, 11, 20), 24)


# ---- the gate


@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        LoRACase(33, 40, 24, 3, torch.bfloat16, torch.float32, dropout_p=0.3),
        SMALL_MIXED,
        SMALL_ADAPTER,
        SMALL_MAPS,
        AdapterCase((3, 24, 5, 7), 5, torch.bfloat16, torch.float32, drop_path=0.34, dropout_p=0.3),
        SMALL_ATTENTION,
        SMALL_MATCHED,
        dataclasses.replace(SMALL_MATCHED, dtype=torch.bfloat16),
        dataclasses.replace(SMALL_MATCHED, dtype=torch.bfloat16, adapter_dtype=torch.float32),
        SMALL_PROJECTION,
        dataclasses.replace(SMALL_PROJECTION, activation="identity", norm_match=False, dtype=torch.bfloat16),
    ],
    ids=lambda case: case.name,
)
def test_the_gate_passes_the_operator(case):
    for plan in case.plans("portable"):
        assert all(item.passed for item in parity.check(case, CPU, plan=plan))


def test_a_mixed_batch_is_beside_loops_that_compute_the_same():
    tensors = SMALL_MIXED.tensors(CPU)
    named = SMALL_MIXED.contenders(tensors).named
    assert LOOP in named
    one_call, *loops = (named[name].call([tensors["x"]], tensors["dy"], True)() for name in ("pyfused", "eager", LOOP))
    for loop in loops:
        for one, other in zip(one_call, loop, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def _flipped(x, weight, lora_a, lora_b, bias, *, scaling, **rest):
    return pyfused.lora_linear(x, weight, lora_a, lora_b, bias, scaling=-scaling, **rest)


def _slightly_scaled(x, weight, lora_a, lora_b, bias, *, scaling, **rest):
    return pyfused.lora_linear(x, weight, lora_a, lora_b, bias, scaling=scaling * 1.00005, **rest)


def _one_nan(x, *arguments, **options):
    y = pyfused.lora_linear(x, *arguments, **options)
    return y + torch.zeros_like(y).index_fill(0, torch.tensor([5]), float("nan"))


def _other_mask(*arguments, seed=None, **options):
    return pyfused.lora_linear(*arguments, seed=None if seed is None else seed + 1, **options)


def _gamma_inside(z, *arguments, layer_scale, channel_dim, **options):
    gamma = layer_scale if channel_dim == -1 else layer_scale[:, None, None]
    return pyfused.adapter_residual(z * gamma, *arguments, channel_dim=channel_dim, **options)


def _tanh_gelu(*arguments, **options):
    return pyfused.adapter_residual(*arguments, activation="gelu_tanh", **options)


def _nothing_dropped(*arguments, sample_scale, **options):
    return pyfused.adapter_residual(*arguments, sample_scale=torch.full_like(sample_scale, 1 / 0.66), **options)


def _without_norms(*arguments, norm_match, **options):
    operator = pyfused.projection_residual if "residual" in options else pyfused.cross_attention_residual
    return operator(*arguments, **options)


def _heads_of_one(*arguments, num_heads, **options):
    return pyfused.cross_attention_residual(*arguments, num_heads=1, **options)


def _no_query_bias(x, context, q_weight, q_bias, *rest, **options):
    return pyfused.cross_attention_residual(x, context, q_weight, 0 * q_bias, *rest, **options)


def _another_weight(*arguments, weight, **options):
    return pyfused.cross_attention_residual(*arguments, weight=weight * 1.0001, **options)


def _factors_swapped(*arguments, gate, skip, **options):
    return pyfused.projection_residual(*arguments, gate=skip, skip=gate, **options)


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        (SMALL, _flipped),
        (SMALL, _slightly_scaled),
        (SMALL, _one_nan),
        (SMALL_ADAPTER, _gamma_inside),
        (SMALL_MAPS, _gamma_inside),
        (SMALL_ADAPTER, _tanh_gelu),
        (SMALL_MAPS, _nothing_dropped),
        (SMALL_MATCHED, _without_norms),
        (SMALL_ATTENTION, _heads_of_one),
        (SMALL_ATTENTION, _no_query_bias),
        (SMALL_ATTENTION, _another_weight),
        (SMALL_PROJECTION, _without_norms),
        (SMALL_PROJECTION, _factors_swapped),
    ],
)
def test_the_gate_rejects_a_wrong_result(case, wrong):
    assert not all(item.passed for item in parity.check(case, CPU, function=wrong))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_rejects_another_dropout_mask(dtype):
    case = LoRACase(33, 40, 24, rank=3, dtype=dtype, dropout_p=0.1)
    assert not all(item.passed for item in parity.check(case, CPU, function=_other_mask))


@pytest.mark.parametrize(
    ("case", "lost"),
    [
        (case, f"d{name}")
        for case in (SMALL, SMALL_ADAPTER, SMALL_ATTENTION, SMALL_MATCHED, SMALL_PROJECTION)
        for name in (*case.inputs, *case.trained)
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_the_gate_looks_at_every_gradient(case, lost):
    tensors = case.tensors(CPU)
    plainest = getattr(pyfused.reference, case.operator)
    exact = parity.results(case, plainest, tensors, double=True)
    plain = parity.results(case, plainest, tensors)
    assert all(item.passed for item in parity.deviations(plain, plain, exact, torch.float32))
    broken = plain | {lost: torch.zeros_like(plain[lost])}
    failed = {item.tensor for item in parity.deviations(broken, plain, exact, torch.float32) if not item.passed}
    assert failed == {lost}


def test_the_limit_is_twice_torchs_error_and_the_floor():
    exact = {"y": torch.tensor([4.0, 0.0], dtype=torch.float64)}
    plain = {"y": torch.tensor([4.0, 0.4])}
    (_, largest) = parity.deviations({"y": torch.tensor([4.0, 0.8])}, plain, exact, torch.float32)
    assert largest.plain == pytest.approx(0.1)
    assert largest.limit == pytest.approx(0.2 + parity.floor(torch.float32), abs=1e-7)
    assert largest.passed
    assert not parity.deviations({"y": torch.tensor([4.0, 0.81])}, plain, exact, torch.float32)[1].passed


def test_the_gate_refuses_results_that_do_not_match():
    exact = {"y": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"ours\['y'\] must have shape \(2, 3\), got \(3, 2\)"):
        parity.deviations({"y": torch.zeros(3, 2)}, exact, exact, torch.float32)
    with pytest.raises(ValueError, match=r"plain\['y'\] must have shape \(2, 3\), got nothing"):
        parity.deviations(exact, {}, exact, torch.float32)


def test_check_reports_a_wrong_backend(monkeypatch, capsys):
    assert check.run(CPU, cases=[SMALL]) == 0
    assert "1 of 1 as close" in capsys.readouterr().out
    right = parity.check
    monkeypatch.setattr(parity, "check", lambda *a, **k: right(*a, **k, function=_flipped))
    assert check.run(CPU, cases=[SMALL]) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert "0 of 1 as close" in printed


def test_check_says_why_a_backend_is_left_out_of_a_case(monkeypatch, capsys, emulator):
    monkeypatch.setattr(check, "absence", lambda name, device: "not now" if name == "triton" else None)
    lora, adapter = (dataclasses.replace(case, dtype=torch.bfloat16) for case in (SMALL, SMALL_MAPS))
    wide = dataclasses.replace(SMALL_ADAPTER, dtype=torch.bfloat16, hidden=257)
    assert check.run(CPU, cases=[SMALL, lora, adapter, wide, SMALL_PROJECTION]) == 0
    printed = capsys.readouterr().out
    assert "skipped triton: not now\n" in printed
    assert f"skipped {SMALL.name}, cuda one_launch: its kernels take float16 and bfloat16, not torch.float32" in printed
    assert f"skipped {SMALL_PROJECTION.operator}, cuda: it has no kernels for projection_residual" in printed
    # Once, and not for every case.
    assert printed.count("skipped lora_linear, cpu: it has no kernels for lora_linear\n") == 1
    assert f"ok     {lora.name}, cuda one_launch: nearest " in printed
    for plan in ("save", "recompute"):
        assert f"ok     {adapter.name}, cuda {plan}: nearest " in printed
        (line,) = [line for line in printed.splitlines() if f"{wide.name}, cuda {plan}" in line]
        assert line.startswith("skipped ")
        assert "h <= 256 there" in line
    for case in (adapter, wide):
        assert f"ok     {case.name}, cpu save: nearest " in printed
    assert "14 of 14 as close" in printed


@pytest.mark.usefixtures("kernels_everywhere")
def test_check_leaves_slow_stand_ins_to_the_tests(monkeypatch):
    assert [check.absence(name, CPU) for name in backends.BACKENDS] == [
        None,
        "its interpreter is too slow for these shapes; the tests run it at small ones",
        "its emulator is too slow for these shapes; the tests run it at small ones",
        backends.CPU_REFUSAL,
    ]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert [check.absence(name, torch.device("cuda", 0)) for name in backends.BACKENDS[:3]] == [None] * 3
    assert check.absence("cpu", torch.device("cuda", 0)) == "it has no kernels for device type 'cuda'"
    monkeypatch.setattr(backends, "CUDA_REFUSAL", "no library")
    assert check.absence("cuda", CPU) == "no library"


# ---- overhead


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tiny_cases_are_all_call(device):
    found = operators.tiny_cases(torch.device(device))
    assert [case.operator for case in found] == list(operators.OPERATORS)
    assert {case.dtype for case in found} == {torch.float32 if device == "cpu" else torch.bfloat16}
    assert all(case.floor_seconds()["forward"] < 0.1e-6 for case in found)


@pytest.mark.usefixtures("kernels_everywhere")
def test_every_backend_that_has_kernels_takes_the_tiny_cases():
    for case in operators.tiny_cases(torch.device("cuda")):
        assert refusal(case, CPU, "triton") is None
        assert (refusal(case, CPU, "cuda") is None) == (case.operator != "projection_residual")


def _overhead_row(test, case, folder):
    """What a test of the benchmark hands over to be timed: name, calls and the rest."""
    pytest.importorskip("pytest_benchmark")
    from pyfused.bench.run import test_overhead as overhead_rows
    from pyfused.bench.run.session import Session, Settings

    rows = []

    def compare(name, calls, **row):
        rows.append((name, calls, row))

    getattr(overhead_rows, test)(case, "portable", compare, Session(Settings(CPU, folder)))
    (found,) = rows
    return found


@pytest.mark.parametrize("case", operators.tiny_cases(CPU), ids=lambda case: case.operator)
def test_an_overhead_row_times_the_bare_call_under_grad(case, tmp_path):
    name, calls, row = _overhead_row("test_one_call", case, tmp_path)
    assert name == f"overhead {case.name}, portable"
    assert (row["kind"], row["measured"], row["clock"].mode) == ("overhead", "forward", "host time")
    assert row["facts"] == case.facts() | {"backend": "portable"}
    assert {item.tensor for item in row["deviations"]} == {"y"}
    assert all(item.passed for item in row["deviations"])
    asked = []
    with decision.observed(lambda told: asked.append((told.operator, told.backend))):
        ours, eager = (calls[key][0]() for key in ("pyfused", "eager"))
    assert asked == [(case.operator, "portable")]
    assert ours.grad_fn is not None
    assert eager.grad_fn is not None
    torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("case", operators.tiny_cases(CPU), ids=lambda case: case.operator)
def test_an_overhead_row_times_a_whole_step(case, tmp_path):
    name, calls, row = _overhead_row("test_one_step", case, tmp_path)
    assert (name, row["measured"]) == (f"overhead {case.name}, portable", "forward+backward")
    assert {item.tensor for item in row["deviations"]} > {"y"}
    assert all(item.passed for item in row["deviations"])
    asked = []
    with decision.observed(lambda told: asked.append((told.operator, told.backend))):
        found = {key: each[0]() for key, each in calls.items()}
    assert asked == [(case.operator, "portable")]
    assert {"pyfused", "eager"} <= found.keys() <= {"pyfused", "eager", "PEFT", "projections + SDPA"}
    for ours, eager in zip(found["pyfused"], found["eager"], strict=True):
        torch.testing.assert_close(ours, eager)


def test_a_refused_overhead_row_is_skipped_with_the_reason(tmp_path):
    pytest.importorskip("pytest_benchmark")
    from pyfused.bench.run import test_overhead as overhead_rows
    from pyfused.bench.run.session import Session, Settings

    with pytest.raises(pytest.skip.Exception, match=r"not torch\.float32|no compiled kernels"):
        overhead_rows.test_one_call(SMALL, "cuda", None, Session(Settings(CPU, tmp_path)))


# ---- cases


@pytest.mark.parametrize(
    "case",
    [SMALL, SMALL_ADAPTER, SMALL_MAPS, SMALL_ATTENTION, SMALL_MATCHED, SMALL_PROJECTION],
    ids=lambda case: case.name,
)
def test_benchmark_inputs_give_nonzero_gradients(case):
    found = parity.results(case, getattr(pyfused, case.operator), case.tensors(CPU))
    assert found.keys() == {"y", *(f"d{name}" for name in (*case.inputs, *case.trained))}
    assert all(value.abs().max() > 0.1 for value in found.values())


def test_neither_term_hides_the_other():
    tensors = SMALL.tensors(CPU)
    full = SMALL.call(pyfused.lora_linear, tensors)
    without = SMALL.call(pyfused.lora_linear, tensors | {"lora_b": torch.zeros_like(tensors["lora_b"])})
    assert (full - without).norm() > 0.3 * without.norm()
    tensors = SMALL_ADAPTER.tensors(CPU)
    full = SMALL_ADAPTER.call(pyfused.adapter_residual, tensors)
    for name in ("up_weight", "z", "residual"):
        without = SMALL_ADAPTER.call(pyfused.adapter_residual, tensors | {name: torch.zeros_like(tensors[name])})
        assert (full - without).norm() > 0.3 * without.norm()
    for case, branch in ((SMALL_ATTENTION, "out_weight"), (SMALL_MATCHED, "out_weight"), (SMALL_PROJECTION, "weight")):
        tensors = case.tensors(CPU)
        operator = getattr(pyfused, case.operator)
        full = case.call(operator, tensors)
        without = case.call(operator, tensors | {branch: torch.zeros_like(tensors[branch])})
        assert (full - without).norm() > 0.3 * without.norm()


@pytest.mark.parametrize("tokens", [2, 16, 77, 1232])
def test_logits_are_of_unit_size_and_the_attended_is_as_large_as_x(tokens):
    case = CrossAttentionCase(2, 64, 256, 4, tokens, context_channels=96, weight=1.0)
    tensors = case.tensors(CPU)
    q = torch.nn.functional.linear(tensors["x"], tensors["q_weight"], tensors["q_bias"])
    k = torch.nn.functional.linear(tensors["context"], tensors["k_weight"], tensors["k_bias"])
    q, k = (tensor.unflatten(-1, (4, 64)).transpose(1, 2) for tensor in (q, k))
    assert (q @ k.mT / 8).std() == pytest.approx(1.0, abs=0.15)
    branch = case.call(pyfused.reference.cross_attention_residual, tensors) - tensors["x"]
    assert 0.7 < branch.std() < 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rounding_decides_on_which_side_of_zero_a_projection_falls(dtype):
    tensors = ProjectionCase((2, 65, 1024), 512, dtype=dtype).tensors(CPU)
    o, weight, bias = (tensors[name].float() for name in ("o", "weight", "bias"))
    exact = torch.nn.functional.linear(o.double(), weight.double(), bias.double())
    for columns in (torch.arange(1024), torch.arange(1023, -1, -1)):
        assert torch.equal(torch.nn.functional.linear(o[..., columns], weight[:, columns], bias).double(), exact)
    assert weight.unique().numel() > 30
    assert o.unique().numel() > 30


def test_plans_are_those_that_the_backend_has():
    assert SMALL.plans("portable") == ("blas",)
    assert SMALL.plans("triton") == ("one_launch", "shrink_expand", "blas")
    assert SMALL.plans("cuda") == ("one_launch",)
    for name in backends.BACKENDS:
        assert SMALL_ADAPTER.plans(name) == ("save", "recompute")
        assert SMALL_ATTENTION.plans(name) == PLANS
        assert SMALL_PROJECTION.plans(name) == ("auto",)


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """Every backend would serve CPU tensors of every operator that is to have CUDA C++ kernels, in the plans of a GPU;
    none is called."""
    monkeypatch.setattr(cross_attention_residual, "ABSORBED_STEPS", {})
    monkeypatch.delitem(sys.modules, "pyfused._C", raising=False)
    served = frozenset(operators.OPERATORS) - {"projection_residual"}
    monkeypatch.setattr(backends, "CUDA_REFUSAL", None)
    monkeypatch.setattr(backends, "CUDA_OPERATORS", {"cpu": served, "cuda": served})
    monkeypatch.setattr(backends, "TRITON_REFUSAL", None)
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", True)


# 16 heads and 5 tokens, padded to 8: 128 columns, the most that Triton has room for in float32; with norms half of it.
_COLUMNS = CrossAttentionCase(2, 11, 32, 16, 5)
_HALF = {"dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("case", "backend", "plan", "reason"),
    [
        (SMALL, "triton", "one_launch", None),
        (SMALL, "cuda", "one_launch", "its kernels take float16 and bfloat16, not torch.float32"),
        (dataclasses.replace(SMALL, **_HALF), "cuda", "one_launch", None),
        (dataclasses.replace(SMALL, **_HALF, adapter_dtype=torch.float32, dropout_p=0.1), "cuda", "auto", None),
        (dataclasses.replace(SMALL, **_HALF, rank=65), "cuda", "auto", "with R <= 64, got R = 65"),
        (dataclasses.replace(SMALL_MAPS, **_HALF), "cuda", "recompute", None),
        (dataclasses.replace(SMALL_ADAPTER, **_HALF, hidden=257), "cuda", "save", "h <= 256 there"),
        (dataclasses.replace(SMALL_ADAPTER, **_HALF, hidden=257), "triton", "save", None),
        (dataclasses.replace(SMALL_ADAPTER, hidden=257), "triton", "save", "h <= 128 there for torch.float32"),
        (AdapterCase((1, 2, 4096), 64, torch.bfloat16), "cuda", "save", "of shared memory there"),
        (dataclasses.replace(SMALL_ATTENTION, **_HALF), "cuda", "absorbed", None),
        (dataclasses.replace(SMALL_ATTENTION, **_HALF), "cuda", "standard", "no kernels for projection_residual"),
        (_COLUMNS, "triton", "absorbed", None),
        (dataclasses.replace(_COLUMNS, norm_match=True), "triton", "absorbed", "at most 64 columns"),
        (dataclasses.replace(_COLUMNS, norm_match=True), "triton", "standard", None),
        (dataclasses.replace(_COLUMNS, tokens=9), "triton", "absorbed_recompute", "at most 128 columns"),
        (dataclasses.replace(_COLUMNS, tokens=9, **_HALF), "triton", "absorbed_recompute", None),
        (dataclasses.replace(SMALL_PROJECTION, **_HALF), "cuda", "auto", "it has no kernels for projection_residual"),
        (SMALL_PROJECTION, "triton", "auto", None),
        (SMALL, "portable", "blas", None),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("kernels_everywhere")
def test_a_case_is_refused_in_the_operators_words(case, backend, plan, reason):
    found = refusal(case, CPU, backend, plan)
    assert found is None if reason is None else reason in found


@pytest.mark.usefixtures("kernels_everywhere")
def test_a_wrong_case_is_an_error_and_no_refusal():
    with pytest.raises(ValueError, match="num_heads"):
        refusal(dataclasses.replace(_COLUMNS, channels=24), CPU, "triton")


@pytest.mark.parametrize("case", [SMALL_ADAPTER, SMALL_MAPS], ids=lambda case: case.name)
@pytest.mark.parametrize(
    "options", [{}, {"skip": 0.0}, {"skip": 0.5, "activation": "relu"}, {"residual": None}, {"layer_scale": "scalar"}]
)
def test_the_eager_adapter_is_the_formula(case, options):
    tensors = case.tensors(CPU)

    def of(function):
        def changed(*arguments, **given):
            scale = torch.tensor(0.7) if "layer_scale" in options else given["layer_scale"]
            return function(*arguments, **given | options | {"layer_scale": scale})

        return case.call(changed, tensors)

    torch.testing.assert_close(of(eager_adapter_residual), of(pyfused.reference.adapter_residual))


@pytest.mark.parametrize(
    "options", [{}, {"gate": torch.linspace(-1, 1, 24)}, {"skip": 1.0, "activation": "gelu"}, {"norm_match": False}]
)
def test_the_eager_projection_is_the_formula(options):
    def of(function):
        return SMALL_PROJECTION.call(lambda *a, **k: function(*a, **k | options), SMALL_PROJECTION.tensors(CPU))

    torch.testing.assert_close(of(eager_projection_residual), of(pyfused.reference.projection_residual))


@pytest.mark.parametrize("case", [SMALL_ATTENTION, SMALL_MATCHED], ids=lambda case: case.name)
def test_the_eager_attention_is_the_formula(case):
    for options in ({}, {"weight": torch.linspace(-1, 1, 24)}, {"eps": 0.3}):

        def of(function, options=options):
            return case.call(lambda *a, **k: function(*a, **k | options), case.tensors(CPU))

        torch.testing.assert_close(of(eager_cross_attention_residual), of(pyfused.reference.cross_attention_residual))


def test_every_contender_computes_the_same(monkeypatch):
    monkeypatch.setattr("pyfused.bench.cases.baselines.compile_refusal", lambda device: "left out here")
    for case in (SMALL, SMALL_ADAPTER, SMALL_MAPS, SMALL_ATTENTION, SMALL_MATCHED, SMALL_PROJECTION):
        tensors = case.tensors(CPU)
        inputs = [tensors[name] for name in case.inputs]
        plan = f"portable {case.plans('portable')[-1]}"
        by_name = ["portable"] if isinstance(case, ProjectionCase) else ["portable", plan]
        found = case.contenders(tensors, by_name)
        assert found.unavailable["torch.compile"] == "left out here"
        assert [name for name in found.named if "pyfused" in name] == ["pyfused", *(f"pyfused {n}" for n in by_name)]
        assert [name for name in case.contenders(tensors).named if "pyfused" in name] == ["pyfused"]
        assert (SDPA in found.named) == isinstance(case, CrossAttentionCase)
        wanted = parity.results(case, getattr(pyfused.reference, case.operator), tensors)
        for name, contender in found.named.items():
            if name == "base GEMM":
                continue
            torch.testing.assert_close(contender.call(inputs, tensors["dy"], backward=False)(), wanted["y"])
            gradients = contender.call(inputs, tensors["dy"], backward=True)()
            for gradient, of in zip(gradients, (*case.inputs, *case.trained), strict=True):
                torch.testing.assert_close(gradient, wanted[f"d{of}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        (LoRACase(8192, 4096, 4096), 351, 353),
        (LoRACase(8192, 4096, 14336), 1224, 1230),
        (LoRACase(6304, 768, 3072), 38.6, 39.6),
        (LoRACase(2740, 1024, 1024), 7.5, 7.7),
        (AdapterCase((32, 197, 768), 64), 6.8, 6.8),
        (AdapterCase((32, 197, 768), 192), 6.9, 11.8),
        (AdapterCase((16, 1370, 1024), 256), 31.6, 72.7),
        (AdapterCase((64, 64, 64, 64), 32), 23.4, 23.4),
        (AdapterCase((64, 128, 32, 32), 64), 11.7, 11.7),
        (AdapterCase((64, 256, 16, 16), 128), 5.9, 6.8),
        (AdapterCase((64, 512, 8, 8), 256), 3.05, 6.8),
        # 48 of 64 samples live: (3 * 48 + 2 * 16) / (3 * 64) of the forward's bytes, (3 * 48 + 16) / (3 * 64).
        (AdapterCase((64, 64, 64, 64), 32, drop_path=0.25), 23.4 * 176 / 192, 23.4 * 160 / 192),
        # M K C = 21920 * 1024 * 1024 in one product forward, in two backward.
        (ProjectionCase((16, 1370, 1024), 1024), 58.2, 116.4),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else None,
)
def test_floors_in_microseconds(case, forward, backward):
    floor = dataclasses.replace(case, dtype=torch.bfloat16).floor_seconds()
    assert floor["forward"] * 1e6 == pytest.approx(forward, rel=0.01)
    assert (floor["forward+backward"] - floor["forward"]) * 1e6 == pytest.approx(backward, rel=0.01)


@pytest.mark.parametrize(
    ("batch", "tokens", "absorbed", "standard"),
    [(16, 2, 22.6, 116.7), (16, 16, 31.5, 119.2), (16, 77, 151.5, 130.0), (2, 2, 4.3, 14.6)],
)
def test_floors_of_attention_in_microseconds(batch, tokens, absorbed, standard):
    case = CrossAttentionCase(batch, 1370, 1024, 16, tokens, dtype=torch.bfloat16)
    floors = {plan: tuple(work.least_seconds() for work in case.plan_passes(plan)) for plan in PLANS}
    for plan, wanted in zip(PLANS, (absorbed, absorbed, standard), strict=True):
        assert floors[plan][0] * 1e6 == pytest.approx(wanted, rel=0.1)
    least = floors["standard" if absorbed > standard else min(PLANS[:2], key=lambda plan: sum(floors[plan]))]
    assert case.floor_seconds() == {"forward": least[0], "forward+backward": sum(least)}
    # Rows and columns meet twice forward; backward twice as often, and once more for logits that were not kept.
    long = dataclasses.replace(case, batch=1, length=1 << 20, tokens=64)
    (forward, kept), (_, again) = (long.plan_passes(plan) for plan in PLANS[:2])
    assert (kept.flops / forward.flops, again.flops / forward.flops) == pytest.approx((2.0, 2.5), rel=0.01)


def _shapes(found, *keys):
    return {tuple(case.facts()[key] for key in keys) for case in found}


def test_timed_cases_are_those_of_the_targets():
    on_cpu, on_gpu = (operators.timed_cases(torch.device(device)) for device in ("cpu", "cuda"))
    assert {case.dtype for case in on_cpu} == {torch.float32}
    assert {case.dtype for case in on_gpu} == {torch.bfloat16}
    assert {case.operator for case in on_cpu} == {case.operator for case in on_gpu} == operators.OPERATORS.keys()

    lora = [[case for case in found if isinstance(case, LoRACase)] for found in (on_cpu, on_gpu)]
    shapes = [_shapes(found, "rows", "in_features", "out_features") for found in lora]
    assert {(400, 768, 2304), (400, 768, 768), (400, 768, 3072), (400, 3072, 768)} < shapes[0]
    mixed = [case for case in lora[0] if isinstance(case, MixedLoRACase)]
    assert {case.rows // case.adapters for case in mixed} == {8}
    assert shapes[1] == set(numbers.LORA_H200)
    assert {case.dropout_p for case in lora[1]} == {0.0, 0.1}

    adapter = [[case for case in found if isinstance(case, AdapterCase)] for found in (on_cpu, on_gpu)]
    shapes = [_shapes([c for c in found if not c.drop_path], "rows", "channels", "hidden") for found in adapter]
    assert set(numbers.ADAPTER_CPU) < shapes[0]
    assert {(25088, 64, 32), (6272, 128, 64), (1568, 256, 128), (392, 512, 256)} < shapes[0]
    assert set(numbers.ADAPTER_H200) | {(4096, 512, 256)} == shapes[1]
    assert all(sum(bool(case.drop_path) for case in found) == 1 for found in adapter)

    attention = [[case for case in found if isinstance(case, CrossAttentionCase)] for found in (on_cpu, on_gpu)]
    assert _shapes([c for c in attention[0] if not c.norm_match], "tokens") == {(t,) for t in numbers.ATTENTION_CPU}
    assert _shapes(attention[1], "batch", "tokens", "norm_match") == set(numbers.ATTENTION_H200)
    for found in (lora[1], adapter[1], attention[1]):
        # Each with the modules' default adapters too, but for drop-path.
        adapters = [case.adapter_dtype for case in found if not case.facts().get("drop_path")]
        assert adapters == [None, torch.float32] * (len(adapters) // 2)
    assert not any(case.adapter_dtype for case in on_cpu)

    wide = {(1370, 1024, 16, 64, 1024)}
    assert [_shapes(found, "length", "channels", "heads", "head_dim", "context_channels") for found in attention] == [
        wide,
        wide | {(1370, 1024, 8, 96, 768)},
    ]


def test_rows_have_names_of_their_own():
    for device in ("cpu", "cuda"):
        for found in (operators.timed_cases(torch.device(device)), list(operators.parity_cases(torch.device(device)))):
            names = [case.name for case in found]
            assert len(set(names)) == len(names)
            assert all(case.name.split()[0] == case.operator for case in found)


def test_saved_bytes_of_lora_linear_is_the_narrow_product():
    tensors = SMALL.tensors(CPU)
    leaves = {name: tensors[name].requires_grad_() for name in ("x", "lora_a", "lora_b")}

    def forward(function):
        return function(leaves["x"], tensors["weight"], leaves["lora_a"], leaves["lora_b"], tensors["bias"])

    assert memory.saved_bytes(lambda: forward(pyfused.lora_linear), tensors.values()) == 4 * SMALL.rows * SMALL.rank
    wide = memory.saved_bytes(lambda: leaves["x"].exp().sin(), tensors.values())
    assert wide == 2 * 4 * SMALL.rows * SMALL.in_features - 4 * SMALL.rows * SMALL.in_features


def test_saved_bytes_of_adapter_residual_is_the_hidden_layer_or_nothing():
    tensors = SMALL_ADAPTER.tensors(CPU)
    for name in (*SMALL_ADAPTER.inputs, *SMALL_ADAPTER.trained):
        tensors[name].requires_grad_()
    for plan, wanted in (("save", 4 * SMALL_ADAPTER.rows * SMALL_ADAPTER.hidden), ("recompute", 0)):
        saved = memory.saved_bytes(
            lambda plan=plan: SMALL_ADAPTER.call(pyfused.adapter_residual, tensors, plan=plan), tensors.values()
        )
        assert saved == wanted


def test_saved_bytes_of_absorbed_attention_are_its_probabilities_and_what_the_context_makes():
    def saved(case, plan):
        tensors = case.tensors(CPU)
        for name in (*case.inputs, *case.trained):
            tensors[name].requires_grad_()
        operator = pyfused.cross_attention_residual
        return memory.saved_bytes(lambda: case.call(operator, tensors, plan=plan), tensors.values())

    for case in (SMALL_ATTENTION, SMALL_MATCHED):
        context = saved(case, "absorbed_recompute")
        assert saved(case, "absorbed") - context == 4 * case.rows * case.heads * case.tokens
        assert saved(dataclasses.replace(case, length=50), "absorbed_recompute") == context


# ---- targets


def _attention_row(tokens, measured, ratio, batch=2, matched=False, peak=(), gpu=None):
    return Row(
        f"cross_attention_residual {batch}x1370x1024 T{tokens}", "operator", measured, mode=gpu or "wall clock",
        facts={"batch": batch, "tokens": tokens, "norm_match": matched}, ratios={"eager": 9.0, SDPA: ratio},
        peak_bytes=dict(zip(("pyfused", "eager", SDPA), peak, strict=False)),
        provenance={"device": "NVIDIA H200" if gpu else "a CPU"},
    )  # fmt: skip


def test_attention_numbers_to_reach_on_a_cpu():
    both = "forward+backward"
    rows = [
        _attention_row(2, both, 7.1, peak=(7, 10)),
        _attention_row(2, "forward", 1.0),
        _attention_row(12, both, 2.4, peak=(76, 100)),
        _attention_row(77, both, 0.98),
        _attention_row(2, both, 1.0, matched=True),
        _attention_row(3, both, 1.0),
    ]
    found = numbers.verdicts(rows)
    assert [(item.wanted, item.measured, item.met) for item in found] == [
        (">= 7x", "7.100x", True),
        (">= 2.5x", "2.400x", False),
        (">= 0.97x", "0.980x", True),
        ("<= 0.75x", "0.760x", False),
    ]
    assert all(SDPA in item.name for item in found[:3])
    assert "largest of 2" in found[3].name


def test_attention_numbers_to_reach_on_an_h200():
    both, graph = "forward+backward", "graph replay"
    rows = [
        _attention_row(2, "forward", 3.9, batch=16, gpu=graph),
        _attention_row(2, both, 4.1, batch=16, gpu=graph),
        _attention_row(2, both, 1.0, batch=16, gpu="eager launches"),
        _attention_row(2, both, 2.6, gpu=graph),
        _attention_row(77, "forward", 1.0, batch=16, gpu=graph),
        _attention_row(77, both, 1.2, batch=16, gpu=graph),
        _attention_row(77, both, 1.2, batch=16, matched=True, gpu=graph),
        _attention_row(12, both, 1.0, batch=16, gpu=graph),
    ]
    found = numbers.verdicts(rows)
    assert [(item.wanted, item.met) for item in found] == [
        (">= 4x", False),
        (">= 4x", True),
        (">= 2.5x", True),
        (">= 1.15x", True),
        (">= 1.3x", False),
    ]
    rows = [
        _attention_row(1232, both, 1.4, matched=True, gpu=mode, peak=(7, 70, 9)) for mode in (graph, "eager launches")
    ]
    found = numbers.verdicts(rows)
    assert [(item.wanted, item.measured, item.met) for item in found] == [
        (">= 1.3x", "1.400x", True),
        ("<= 0.75x", "0.100x", True),
        ("<= 0.7x", "0.778x", False),
    ]


# ---- models


@pytest.mark.parametrize(
    ("operator", "module"),
    [
        ("lora_linear", lambda: pyfused.modules.LoRALinear(8, 4, rank=2)),
        ("adapter_residual", lambda: pyfused.modules.BottleneckAdapter(8, init_std=1.0)),
    ],
)
def test_the_reference_operators_replace_the_modules_own(operator, module):
    from pyfused.bench.models.training import reference_operators

    layer, x = module(), torch.randn(3, 8)
    calls = []
    with decision.observed(lambda told: calls.append(told.operator)):
        with reference_operators():
            plain = layer(x)
        assert calls == []
        assert torch.allclose(layer(x), plain)
        assert calls == [operator]


def test_a_model_with_a_wrong_operator_is_rejected():
    pytest.importorskip("sklearn")
    from pyfused.bench import thirdparty
    from pyfused.bench.cases import data
    from pyfused.bench.models import fastvit, training

    images, labels = (tensor[:4] for tensor in data.digits(32))
    try:
        model = fastvit.with_adapters(fastvit.classifier("fastvit_t8", 10, images))
    except thirdparty.Unavailable as error:
        pytest.skip(str(error))
    found = training.deviations(model, images, labels)
    assert {item.tensor for item in found} == {"logits", *(f"d{name}" for name in model.trained())}
    assert len(model.trained()) == 10 * 4 + 2
    # The whole allowance and as much again: through a network, twice plain torch's error is a matter of luck.
    assert all(parity.strain(item) < 2 for item in found)
    reference = pyfused.reference.adapter_residual

    def swapped(z, *arguments, residual, **options):
        return reference(residual, *arguments, residual=z, **options)

    with training.replaced({"adapter_residual": swapped}):
        ours = training._logits_and_gradients(model, images, labels)
    with training.replaced({"adapter_residual": eager_adapter_residual}):
        eager = training._logits_and_gradients(model, images, labels)
    exact = training._logits_and_gradients(model, images, labels)
    assert all(gradient.abs().max() > 0 for gradient in exact.values())
    assert not all(item.passed for item in parity.deviations(ours, exact, exact, torch.float32))
    for name, value in exact.items():
        assert torch.allclose(eager[name], value, rtol=1e-3, atol=1e-3 * value.abs().max()), name


def test_a_second_stage_with_a_wrong_operator_is_rejected(monkeypatch):
    pytest.importorskip("open_clip")
    from pyfused.bench.models import aa_clip, gradient_ratio, training
    from pyfused.models import aa_clip_parts
    from pyfused.modules import cross_attention

    adapted, images, tokens = gradient_ratio.small_model(CPU)
    with torch.no_grad():
        context = adapted.encode_text(tokens).tokens.flatten(0, 1)[None]
    model = training.Classifier(aa_clip.SecondStage(adapted, context), context.shape[-1], 2)
    labels = torch.tensor([0, 1, 0, 1])
    unused = "text_adapters", "text_cross_attention", "clip", "k_bias"
    found = aa_clip.deviations(model, images, labels)
    assert {item.tensor for item in found} == {"logits", *(f"d{name}" for name in model.trained())}
    assert not any(part in name for name in model.trained() for part in unused)
    assert len(model.trained()) == len(adapted.image_adapters) + len(adapted.projections) + 7 + 2
    assert all(item.passed for item in found)
    # float32 is compared in float64, where the only error is of that size.
    assert max(item.error for item in found) < 1e-9
    assert all(item.limit < 1e-5 for item in found)

    wrong = {
        "projection_residual": (aa_clip_parts, {"eps": 0.1}),
        "cross_attention_residual": (cross_attention, {"norm_match": False}),
    }
    for name, (module, options) in wrong.items():
        right = getattr(module, name)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *a, right=right, options=options, **k: right(*a, **k | options))
            assert not all(item.passed for item in aa_clip.deviations(model, images, labels))


def test_a_step_under_torch_compile_is_the_same_step():
    from pyfused.bench.cases.baselines import compile_refusal
    from pyfused.bench.models.training import Classifier, TrainingStep

    if compile_refusal(CPU) is not None:
        pytest.skip(compile_refusal(CPU))
    torch.manual_seed(0)
    tower = torch.nn.Sequential(torch.nn.Flatten(), pyfused.modules.BottleneckAdapter(12, init_std=0.1))
    batch = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 0, 1])
    model = Classifier(tower, 12, 2)
    steps = [TrainingStep(copy.deepcopy(model), [batch], learning_rate=0.1, compiled=flag) for flag in (False, True)]
    for _ in range(3):
        for step in steps:
            step()
    assert steps[1].losses == pytest.approx(steps[0].losses, rel=1e-5)
    assert steps[0].losses[-1] < steps[0].losses[0]
