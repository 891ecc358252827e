"""The benchmark's rows on a GPU, without one: what is drawn where, which contenders a row has, and in which order."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyfused
from pyfused.bench.cases import case as cases
from pyfused.bench.cases import operators
from pyfused.bench.cases.adapter_residual import AdapterCase
from pyfused.bench.cases.cross_attention_residual import CrossAttentionCase
from pyfused.bench.cases.lora_linear import LoRACase
from pyfused.bench.cases.projection_residual import ProjectionCase
from pyfused.bench.measure import parity
from pyfused.choice import backends

pytestmark = pytest.mark.host

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HALF = {"dtype": torch.bfloat16, "adapter_dtype": torch.float32}
SMALL = [
    LoRACase(33, 40, 24, rank=3),
    AdapterCase((3, 24, 5, 7), 5, drop_path=0.34),
    CrossAttentionCase(2, 11, 24, 3, 5, context_channels=20, head_dim=4, norm_match=True),
    ProjectionCase((2, 11, 20), 24),
]
MIXED = [dataclasses.replace(case, **HALF) for case in SMALL[:3]]


def ids(case):
    return case.name


# ---- what is drawn


class Watched(TorchDispatchMode):
    """Notes the devices of what torch makes, and how many numbers it draws."""

    def __init__(self):
        super().__init__()
        self.devices, self.numbers = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.devices |= {leaf.device.type for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)}
        if func.overloadpacket in (torch.ops.aten.randn, torch.ops.aten.normal_):
            self.numbers += out.numel()
        return out


@pytest.mark.parametrize("case", [*SMALL, *MIXED, *operators.timed_cases(GPU)], ids=ids)
def test_a_gpu_draws_every_number_of_a_case_itself(monkeypatch, case):
    """On fake tensors, whose generator is the CPU's: this torch may have no other."""
    asked = []

    def generator(device):
        asked.append(torch.device(device))
        return torch._C.Generator("cpu")

    monkeypatch.setattr(cases.torch, "Generator", generator)
    with FakeTensorMode(), Watched() as watched:
        tensors = case.tensors(GPU, seed=3)
    assert asked == [GPU]
    assert watched.devices == {"cuda"}
    assert watched.numbers == case.numbers() == sum(tensor.numel() for tensor in tensors.values())
    assert {tensor.device for tensor in tensors.values()} == {GPU}


@pytest.mark.parametrize("case", [*SMALL, *MIXED], ids=ids)
def test_counting_draws_nothing_and_a_cpu_draws_as_many(case):
    with Watched() as watched:
        numbers = case.numbers()
    assert watched.devices == {"meta"}
    with Watched() as watched:
        case.tensors(CPU)
    assert watched.numbers == numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_draws_in_float32_and_scales_what_it_drew(dtype):
    draw = cases.normal(CPU, 5)
    generator = torch.Generator().manual_seed(5)
    for shape, scale in (((3, 4), 1.0), ((7,), 0.1)):
        wanted = (torch.randn(shape, generator=generator) * scale).to(dtype)
        assert torch.equal(draw(shape, scale, dtype), wanted)


def test_what_a_gpu_draws_has_the_scale_asked_for(monkeypatch):
    """Its own branch, on a device that is a CPU by another name."""
    monkeypatch.setattr(cases.torch, "empty", lambda shape, dtype, device: torch.ones(shape, dtype=dtype))
    monkeypatch.setattr(cases.torch, "Generator", lambda device: torch._C.Generator("cpu"))
    draw, again, other = (cases.normal(GPU, seed) for seed in (1, 1, 2))
    drawn = draw((100, 100), 0.5, torch.float32)
    assert drawn.std() == pytest.approx(0.5, rel=0.05)
    assert abs(drawn.mean()) < 0.05
    assert torch.equal(drawn, again((100, 100), 0.5, torch.float32))
    assert not torch.equal(drawn, other((100, 100), 0.5, torch.float32))


def test_what_two_trees_are_compared_by_is_drawn_where_it_is_judged(monkeypatch, tmp_path):
    pytest.importorskip("scipy")
    from pyfused.bench.gate import compare

    asked, right = [], LoRACase.tensors
    monkeypatch.setattr(LoRACase, "tensors", lambda case, device: asked.append(device) or right(case, CPU))
    compare.write_job(compare.Trial(SMALL[0], backward=True), tmp_path / "job.pt", torch.device("cuda", 1))
    assert asked == [torch.device("cuda", 1)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_a_gpu_draws_the_same_numbers_in_every_run(case):
    for name, tensor in case.tensors(GPU).items():
        assert torch.equal(tensor, case.tensors(GPU)[name])
        assert tensor.isfinite().all()


# ---- which rows, in which order


def test_on_a_gpu_what_drops_something_comes_last_and_the_default_adapters_beside_their_own():
    found = operators.timed_cases(GPU)
    drops = [bool(case.dropout_p or case.facts().get("drop_path")) for case in found]
    assert drops == sorted(drops)
    assert 0 < sum(drops) < len(drops)
    plain = found[: drops.index(True)]
    assert list(dict.fromkeys(case.operator for case in plain)) == list(operators.OPERATORS)
    for case, beside in itertools.pairwise(found):
        if case.adapter_dtype is None and case.operator != "projection_residual" and not case.facts().get("drop_path"):
            assert beside == dataclasses.replace(case, adapter_dtype=torch.float32)
    # On a CPU, as ever: operator by operator, dropped samples among them.
    on_cpu = [case.name for module in operators.OPERATORS.values() for case in module.timed_cases(CPU)]
    assert [case.name for case in operators.timed_cases(CPU)] == on_cpu


def test_compiled_rows_are_those_with_a_number_to_reach_and_one_of_each_operator():
    from pyfused.bench.targets import numbers

    found = operators.compiled_cases(GPU)
    assert operators.compiled_cases(CPU) == []
    assert {case.operator for case in found} == set(operators.OPERATORS)
    assert set(found) < set(operators.timed_cases(GPU))
    adapters = {(case.rows, case.channels, case.hidden) for case in found if case.operator == "adapter_residual"}
    assert adapters == {shape for shape, (*_, compiled) in numbers.ADAPTER_H200.items() if compiled is not None}
    assert not any(case.adapter_dtype or case.dropout_p for case in found)


def test_a_row_beside_torch_compile_answers_its_number_and_no_other():
    from pyfused.bench.record.rows import Row
    from pyfused.bench.targets import numbers

    case = operators.compiled_cases(GPU)[1]
    row = Row(
        f"{case.name}, beside torch.compile", "operator", "forward+backward", mode="graph replay",
        facts={**case.facts(), "floor_seconds": 1e-5}, seconds={"pyfused": 2e-5, "torch.compile": 3.2e-5},
        ratios={"torch.compile": 1.6}, provenance={"device": "NVIDIA H200"},
    )  # fmt: skip
    (verdict,) = numbers.verdicts([row])
    assert (verdict.wanted, verdict.measured, verdict.met) == (">= 1.5x", "1.600x", True)


def test_bytes_of_float32_adapters_count():
    """Both directions read them, backward writes their gradients."""
    parameters = {"lora_linear": 3 * (40 + 24), "adapter_residual": 2 * 24 * 5}
    parameters["cross_attention_residual"] = 2 * 12 * (24 + 20)
    for case in MIXED:
        narrow = dataclasses.replace(case, adapter_dtype=None)
        (f, b), (f16, b16) = case.passes(), narrow.passes()
        more = 2 * parameters[case.operator]
        assert (f.nbytes - f16.nbytes, b.nbytes - b16.nbytes) == (more, 2 * more)
        assert (f.flops, b.flops) == (f16.flops, b16.flops)


# ---- contenders


@pytest.fixture
def card(monkeypatch):
    """An H200 with a library of CUDA C++ kernels, for fake tensors."""
    served = frozenset(operators.OPERATORS) - {"projection_residual"}
    monkeypatch.setattr(backends, "CUDA_REFUSAL", None)
    monkeypatch.setattr(backends, "CUDA_OPERATORS", {"cuda": served})
    monkeypatch.setattr(backends, "TRITON_REFUSAL", None)
    monkeypatch.setattr(backends, "refusal", _refusal)
    properties = SimpleNamespace(name="NVIDIA H200", shared_memory_per_block_optin=232_448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def _refusal(backend, device, dtype, operator=None):
    """`backend.refusal` without a look at the device itself."""
    if backend == "cuda" and operator == "projection_residual":
        return "it has no kernels for projection_residual"
    return "it is for CPUs" if backend == "cpu" else None


@pytest.mark.usefixtures("card")
def test_every_backend_and_every_plan_of_it_is_named():
    found = [cases.refusals(dataclasses.replace(case, dtype=torch.bfloat16), GPU) for case in SMALL]
    assert [each.pop("cpu") for each in found] == ["it is for CPUs"] * 4
    lora, adapter, attention, projection = found
    assert lora == dict.fromkeys(
        ["portable", "triton", "triton one_launch", "triton shrink_expand", "triton blas", "cuda"]
    )
    plans = ("", " save", " recompute")
    assert adapter == dict.fromkeys(f"{backend}{plan}" for backend in ("portable", "triton", "cuda") for plan in plans)
    refused = {name: reason for name, reason in attention.items() if reason is not None}
    assert len(attention) == 12
    # Which plan "auto" is at this size too.
    assert refused.keys() == {"cuda", "cuda standard"}
    assert "no kernels for projection_residual" in refused["cuda standard"]
    assert projection == {"portable": None, "triton": None, "cuda": "it has no kernels for projection_residual"}


@pytest.mark.usefixtures("card")
def test_a_plan_that_the_sizes_forbid_is_refused_in_the_operators_words():
    found = cases.refusals(CrossAttentionCase(2, 11, 32, 16, 77, dtype=torch.bfloat16), GPU)
    for name in ("triton absorbed", "triton absorbed_recompute"):
        assert "takes at most 256 columns" in found[name]
    assert found["triton standard"] is None
    assert found["portable absorbed"] is None


def test_on_a_cpu_no_kernels_are_timed(monkeypatch):
    rows = pytest.importorskip("pyfused.bench.run.test_operators")
    monkeypatch.setattr(rows, "refusals", lambda case, device: {"triton": None})
    assert rows._refusals(SMALL[0], CPU) == {}
    assert rows._refusals(SMALL[0], GPU) == {"triton": None}


@pytest.mark.parametrize("case", MIXED, ids=ids)
def test_contenders_take_float32_adapters_and_give_float32_gradients(monkeypatch, case):
    monkeypatch.setattr("pyfused.bench.cases.baselines.compile_refusal", lambda device: "left out here")
    tensors = case.tensors(CPU)
    found = case.contenders(tensors, ["portable"])
    wanted = parity.results(case, getattr(pyfused.reference, case.operator), tensors)
    own = {name for name in found.named if name != "base GEMM"}
    if case.operator == "lora_linear":
        assert {name for name in own if "PEFT" in name} == {"PEFT", "PEFT (autocast)"}
    for name in own:
        contender = found.named[name]
        assert {parameter.dtype for parameter in contender.trained} <= {torch.float32, torch.bfloat16}
        gradients = contender.call([tensors[x] for x in case.inputs], tensors["dy"], backward=True)()
        for gradient, of in zip(gradients, (*case.inputs, *case.trained), strict=True):
            assert gradient.dtype == tensors[of].dtype, (name, of)
            assert (gradient - wanted[f"d{of}"]).norm() < 0.05 * wanted[f"d{of}"].norm(), (name, of)


def test_peft_with_16_bit_adapters_stands_beside_16_bit_adapters(monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr("pyfused.bench.cases.baselines.compile_refusal", lambda device: "left out here")

    def peft(**changes):
        case = dataclasses.replace(SMALL[0], **changes)
        return {name for name in case.contenders(case.tensors(CPU)).named if "PEFT" in name}

    assert peft() == {"PEFT"}
    assert peft(dtype=torch.bfloat16) == {"PEFT (autocast_adapter_dtype=False)"}


# ---- rows


class Compared:
    """Takes the place of `Compare`: keeps what it is given."""

    def __init__(self):
        self.given = {}

    def __call__(self, name, calls, **row):
        self.given = {"name": name, "calls": calls, **row}


def _without_norms(*arguments, norm_match, **options):
    operator = pyfused.projection_residual if "residual" in options else pyfused.cross_attention_residual
    return operator(*arguments, **options)


@pytest.mark.parametrize("case", [SMALL[2], SMALL[3]], ids=ids)
@pytest.mark.parametrize("broken", [None, "off", "crash"])
def test_a_plan_that_is_wrong_has_no_time_and_the_row_fails_for_it(monkeypatch, case, broken):
    """Kernels played by the portable backend, but for the contender's name."""
    pytest.importorskip("pytest_benchmark")
    from pyfused.bench.run import test_operators as rows

    right = parity.Judge.check

    def check(judge, backend="auto"):
        if backend == "portable" and broken == "crash":
            raise RuntimeError("out of resources")
        return right(judge, function=_without_norms if backend == "portable" and broken == "off" else None)

    monkeypatch.setattr("pyfused.bench.cases.baselines.compile_refusal", lambda device: "left out here")
    monkeypatch.setattr(rows, "_refusals", lambda case, device: {"triton": "too wide", "portable": None})
    monkeypatch.setattr(parity.Judge, "check", check)
    prepared = rows.Prepared(case, CPU)
    for measured in ("forward", "forward+backward"):
        compare = Compared()
        if broken is None:
            rows._checked_row(prepared, compare, False, measured)
        else:
            words = "not close enough to float64: y" if broken == "off" else "RuntimeError: out of resources"
            with pytest.raises(pytest.fail.Exception, match=f"timed without\npyfused portable: {words}"):
                rows._checked_row(prepared, compare, False, measured)
            assert words in compare.given["unavailable"]["pyfused portable"]
        assert compare.given["wrong"] == ([] if broken is None else ["pyfused portable"])
        assert ("pyfused portable" in compare.given["calls"]) == (broken is None)
        assert compare.given["unavailable"]["pyfused triton"] == "too wide"
        tensors = {item.tensor for item in compare.given["deviations"]}
        assert "y" in tensors
        assert ("y (portable)" in tensors) == (broken is None)
        assert all(item.passed for item in compare.given["deviations"])
        assert any(name.startswith("d") for name in tensors) == (measured != "forward")


def test_a_case_is_drawn_once_for_its_rows(monkeypatch):
    pytest.importorskip("pytest_benchmark")
    from pyfused.bench.run import test_operators as rows

    drawn, right = [], LoRACase.tensors
    monkeypatch.setattr("pyfused.bench.cases.baselines.compile_refusal", lambda device: "left out here")
    monkeypatch.setattr(LoRACase, "tensors", lambda *arguments: drawn.append(1) or right(*arguments))
    prepared = rows.Prepared(SMALL[0], CPU)
    for measured in ("forward", "forward+backward"):
        rows._checked_row(prepared, Compared(), False, measured)
    assert len(drawn) == 1


@pytest.mark.parametrize("case", [*SMALL, *MIXED], ids=ids)
def test_on_a_gpu_input_sets_take_turns_that_are_drawn_apart(monkeypatch, case):
    pytest.importorskip("pytest_benchmark")
    from pyfused.bench.run import test_operators as rows

    asked = []
    monkeypatch.setattr(rows, "normal", lambda device, seed: asked.append((device, seed)) or cases.normal(CPU, seed))
    prepared = rows.Prepared(case, CPU)
    assert prepared.tensors
    # On a GPU but in name.
    prepared.device = SimpleNamespace(type="cuda")
    first, second = prepared.inputs
    assert asked == [(prepared.device, 1)]
    for own, other in zip(first, second, strict=True):
        assert (own.shape, own.dtype) == (other.shape, other.dtype)
        assert not torch.equal(own, other)
        assert own.float().std() == pytest.approx(other.float().std(), rel=0.25)


def test_on_a_gpu_torch_compile_has_rows_of_its_own(monkeypatch):
    """On a GPU that is a CPU but in name."""
    pytest.importorskip("pytest_benchmark")
    from pyfused.bench.run import test_compiled
    from pyfused.bench.run import test_operators as rows

    monkeypatch.setattr("pyfused.bench.cases.baselines.compile_refusal", lambda device: None)
    prepared = rows.Prepared(SMALL[3], CPU)
    assert "torch.compile" in prepared.contenders.named
    prepared = rows.Prepared(SMALL[3], CPU)
    assert prepared.tensors
    assert len(prepared.inputs) == 1
    prepared.device = SimpleNamespace(type="cuda")
    prepared.__dict__["_judged"], prepared.__dict__["_refusals"] = ([], {}), {}
    assert "torch.compile" not in prepared.contenders.named
    assert "test_compiled" in prepared.contenders.unavailable["torch.compile"]

    compare = Compared()
    session = SimpleNamespace(settings=SimpleNamespace(device=CPU))
    test_compiled.test_compiled_forward_backward(SMALL[3], compare, session)
    assert compare.given["calls"].keys() == {"pyfused", "torch.compile"}
    assert compare.given["name"] == f"{SMALL[3].name}, beside torch.compile"
    assert {item.tensor for item in compare.given["deviations"]} == {"y", "do", "dresidual", "dweight", "dbias"}
    assert compare.given["graph"]


# ---- what is counted ahead


@pytest.mark.parametrize("case", [*SMALL, *MIXED], ids=ids)
def test_triton_calls_are_the_operators_own_directions_on_meta(case):
    raw = []

    class Raw(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.namespace.startswith("pyfused_"):
                assert {leaf.device.type for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)} == {"meta"}
                raw.append(str(func).partition(".")[2].partition(".")[0])
            return out

    found = dict(cases.triton_calls(case))
    assert list(found) == [*dict.fromkeys(("auto", *case.plans("triton")))]
    for plan, call in found.items():
        raw.clear()
        with Raw():
            call()
        standard = plan == "standard" or (plan == "auto" and case.operator == "cross_attention_residual")
        operator = "projection_residual" if standard else case.operator
        assert raw == [f"{operator}_fwd", f"{operator}_bwd"]


def test_triton_calls_leave_out_plans_that_the_kernels_do_not_take():
    case = CrossAttentionCase(2, 11, 32, 16, 77, dtype=torch.bfloat16)
    assert [plan for plan, _ in cases.triton_calls(case)] == ["auto", "standard"]
