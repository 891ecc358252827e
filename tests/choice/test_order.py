"""What "auto" takes where kernels could serve a call: a measured row's backend, or else what arithmetic chooses."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from pyfused.choice import backends, measured, order
from pyfused.choice.backends import choose
from pyfused.choice.measured import Row, Table
from pyfused.ops.contract.cuda_limits import cuda_rows, cuda_shared_memory
from pyfused.ops.decision import Decision
from pyfused.ops.lora_linear import candidates

GPU = torch.device("cuda", 0)
LORA = {"M": 6304, "N": 2304, "K": 768, "R": 16, "dropout_p": 0.0, "weight_bytes": 2, "adapter_bytes": 4, "tma": 1}
ADAPTER = {"M": 6304, "C": 768, "h": 64, "dropout_p": 0.0, "weight_bytes": 4, "cuda_rows": 64}
ATTENTION = {"M": 21920, "C": 1024, "J": 32, "dropout_p": 0.0, "norm_match": False, "cuda_rows": 64}
PROJECTION = {"M": 21920, "C": 1024, "K": 768, "norm_match": True}
SIZES = {
    "lora_linear": LORA,
    "mixed_lora_linear": LORA,
    "adapter_residual": ADAPTER,
    "cross_attention_residual": ATTENTION,
    "projection_residual": PROJECTION,
}
ROW = Row("NVIDIA H200", (9, 0), "adapter_residual", "bfloat16", 6304, order.others(ADAPTER), {}, {})


@pytest.fixture
def gpu(monkeypatch):
    """A machine with an H200 and kernels of both kinds for every operator."""

    def device(capability, name="NVIDIA H200"):
        properties = types.SimpleNamespace(name=name, shared_memory_per_block_optin=232_448)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)

    # A library that is there would be asked for what it was built for, and launched.
    monkeypatch.delitem(sys.modules, "pyfused._C", raising=False)
    monkeypatch.setattr(backends, "TRITON_REFUSAL", None)
    monkeypatch.setattr(backends, "CUDA_REFUSAL", None)
    monkeypatch.setattr(backends, "DEFAULT_BACKEND", "auto")
    operators = frozenset(SIZES) - {"projection_residual", "mixed_lora_linear"}
    monkeypatch.setattr(backends, "CUDA_OPERATORS", {"cpu": frozenset(), "cuda": operators})
    monkeypatch.setattr(measured, "TABLE", Table())
    device((9, 0))
    return device


def plans(operator):
    return candidates("auto", 16) if operator.endswith("lora_linear") else backends.NO_PLANS


def chosen(operator, dtype=torch.bfloat16, **sizes):
    return choose("auto", GPU, dtype, operator, SIZES[operator] | sizes, None, plans(operator))


def why(operator, dtype=torch.bfloat16, **sizes):
    """What `explain` says of the call."""
    found = SIZES[operator] | sizes
    there = backends.available(GPU, dtype, operator, {}, plans(operator))
    return list(order.reasons(operator, GPU, dtype, found, there, chosen(operator, dtype, **sizes)))


@pytest.mark.parametrize("operator", SIZES)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0), (11, 0)])
def test_both_directions_are_explained_by_times(gpu, operator, capability):
    gpu(capability)
    taken = chosen(operator)
    told = why(operator)
    assert [line.partition(" ")[0] for line in told] == ["forward", "backward"]
    like = dict(order._bucketed(SIZES[operator])) | {"M": order._stands_for(SIZES[operator]["M"])}
    found = order.times(operator, capability, 2, like, {taken.backend: taken[1:]})
    for line, plan, direction in zip(told, taken[1:], found, strict=True):
        own, runner_up, eager = line.partition(" takes ")[2].split(", ")
        assert own.endswith(f" {direction.candidates[taken.backend, plan].slow:.1f} us")
        assert eager == f"eager {direction.eager:.1f} us (model)"
        assert own.startswith(f"{taken.backend} {plan}".strip() + " ")
        assert runner_up.endswith(" us")
        assert not runner_up.startswith(f"{taken.backend} {plan} ")


def test_what_was_asked_for_by_name_is_explained_beside_what_auto_chooses_from(gpu):
    asked = order.Choice("triton", "shrink_expand", "shrink_expand")
    there = {"portable": ("blas",), "triton": ("one_launch",)}
    told = list(order.reasons("lora_linear", GPU, torch.bfloat16, LORA, there, asked))
    assert [line.partition(" takes ")[2].startswith("triton shrink_expand ") for line in told] == [True, True]


def test_a_plan_asked_for_leaves_the_backends_that_have_it(gpu):
    for plan, allowed in (("one_launch", {"cuda", "triton"}), ("shrink_expand", {"triton"})):
        taken = choose("auto", GPU, torch.bfloat16, "lora_linear", LORA, None, candidates(plan, 16))
        assert taken.backend in allowed
        assert taken[1:] == (plan, plan)
    taken = choose("auto", GPU, torch.bfloat16, "lora_linear", LORA, {"triton": "no"}, candidates("shrink_expand", 16))
    assert taken.backend == "portable", "the operator says of it that it has no such plan"


def test_a_backend_asked_for_has_its_plans_chosen(gpu):
    for backend, known in candidates("auto", 16).items():
        taken = choose(backend, GPU, torch.bfloat16, "lora_linear", LORA, None, candidates("auto", 16))
        assert taken.backend == backend
        assert set(taken[1:]) <= set(known)


def test_ranks_beyond_a_tile_have_no_plan_of_one_launch():
    assert "one_launch" in candidates("auto", 64)["triton"]
    assert "one_launch" not in candidates("auto", 65)["triton"]


def test_rows_of_a_tile_follow_from_shared_memory(gpu, monkeypatch):
    for there, expected in (
        (232_448, 64),
        (cuda_shared_memory(64, 768, rows=64), 64),
        (cuda_shared_memory(64, 768, rows=64) - 1, 32),
        (cuda_shared_memory(64, 768, rows=32) - 1, 0),
    ):
        monkeypatch.setattr(backends, "shared_memory", lambda device, there=there: there)
        assert cuda_rows(64, 768, GPU, rows=(64, 32), float_middle=False) == expected


def test_a_measured_row_comes_before_arithmetic(gpu, monkeypatch):
    by_arithmetic = chosen("adapter_residual").backend
    other = "cuda" if by_arithmetic == "triton" else "triton"
    found = {other: 30.0, by_arithmetic: 31.0, "portable": 90.5}
    monkeypatch.setattr(measured, "TABLE", Table([replace(ROW, found=found)]))
    assert chosen("adapter_residual").backend == other
    assert (
        why("adapter_residual")[0]
        == f"measured at M = 6304: {other} 30.0 us, {by_arithmetic} 31.0 us, portable 90.5 us"
    )
    # Another type, width, parameters' type, M by more than a factor of two, or GPU.
    for dtype, sizes in (
        (torch.float16, {}), (torch.bfloat16, {"h": 65}), (torch.bfloat16, {"weight_bytes": 2}),
        (torch.bfloat16, {"M": 6304 * 2 + 1}),
    ):  # fmt: skip
        assert why("adapter_residual", dtype, **sizes)[0].startswith("forward takes ")
    gpu((9, 0), "NVIDIA H100 80GB HBM3")
    assert chosen("adapter_residual").backend == by_arithmetic


def test_a_backend_that_was_slower_than_plain_torch_is_not_taken(gpu, monkeypatch):
    monkeypatch.setattr(measured, "TABLE", Table([replace(ROW, found={"portable": 10.0, "triton": 30.0})]))
    assert chosen("adapter_residual").backend == "portable"
    # Of those that can serve the call the row knows none.
    monkeypatch.setattr(measured, "TABLE", Table([replace(ROW, found={"cuda": 10.0})]))
    limits = {"cuda": "no"}
    assert choose("auto", GPU, torch.bfloat16, "adapter_residual", ADAPTER, limits).backend == "triton"


def test_a_measured_backend_has_its_plans_by_arithmetic(gpu, monkeypatch):
    row = replace(ROW, subject="lora_linear", sizes=order.others(LORA), found={"triton": 1.0, "portable": 2.0})
    monkeypatch.setattr(measured, "TABLE", Table([row]))
    own = choose("triton", GPU, torch.bfloat16, "lora_linear", LORA, None, candidates("auto", 16))
    assert chosen("lora_linear") == own


def test_a_row_with_plans_decides_each_direction(gpu, monkeypatch):
    mixed = {"triton": ("shrink_expand", "one_launch")}
    row = replace(ROW, subject="lora_linear", sizes=order.others(LORA), found={"triton": 1.0, "cuda": 2.0}, plans=mixed)
    monkeypatch.setattr(measured, "TABLE", Table([row]))
    assert chosen("lora_linear") == ("triton", "shrink_expand", "one_launch")
    assert why("lora_linear")[0] == "measured at M = 6304: triton shrink_expand / one_launch 1.0 us, cuda 2.0 us"
    # As well where the backend was asked for.
    asked = choose("triton", GPU, torch.bfloat16, "lora_linear", LORA, None, candidates("auto", 16))
    assert asked == chosen("lora_linear")
    # Of another backend the row names no plans, and where a plan was asked for it knows of others alone.
    other = choose("portable", GPU, torch.bfloat16, "lora_linear", LORA, None, candidates("auto", 16))
    assert other == ("portable", "blas", "blas")
    there = {"triton": ("blas",), "portable": ("blas",), "cuda": ()}
    by_row = choose("auto", GPU, torch.bfloat16, "lora_linear", LORA, None, there)
    monkeypatch.setattr(measured, "TABLE", Table())
    assert by_row == choose("auto", GPU, torch.bfloat16, "lora_linear", LORA, None, there)


def test_a_row_of_a_call_decides_its_plan_and_then_its_backend(gpu, monkeypatch):
    """Of an operator whose plans are made of other operators' kernels."""
    sizes = {"M": 100, "C": 64, "H": 2, "d": 32, "T": 3}
    row = replace(
        ROW, subject="cross_attention_residual", rows=100, sizes=order.others(sizes),
        found={"cuda": 1.0, "triton": 2.0, "portable": 3.0},
        plans={"triton": ("standard", "standard"), "cuda": ("absorbed", "absorbed")},
    )  # fmt: skip
    monkeypatch.setattr(measured, "TABLE", Table([row]))
    call = "cross_attention_residual", GPU, torch.bfloat16, sizes

    def found(backend):
        known = order.measured_plan(*call, backend)
        return known and known[0]

    assert found("auto") == ("cuda", "absorbed", "absorbed")
    assert found("triton") == ("triton", "standard", "standard")
    assert found("portable") is None
    assert order.measured_plan(*call[:3], sizes | {"T": 4}, "auto") is None
    monkeypatch.setattr(backends, "_absence", lambda device: None)
    assert backends.measured_plan("auto", *call)[0] == found("auto")
    monkeypatch.setattr(backends, "DEFAULT_BACKEND", "triton")
    assert backends.measured_plan("auto", *call)[0] == found("triton")
    monkeypatch.setattr(backends, "DEFAULT_BACKEND", "auto")
    # Then the backend: it comes first where it can serve the call.
    chosen_by_times = chosen("projection_residual").backend
    for first in ("cuda", "triton", "portable", ""):
        taken = choose("auto", GPU, torch.bfloat16, "projection_residual", PROJECTION, None, None, first)
        assert taken.backend == (first if first in ("triton", "portable") else chosen_by_times)
    assert choose("portable", GPU, torch.bfloat16, "projection_residual", PROJECTION, first="triton")[0] == "portable"
    # Fake tensors can be on a GPU where there is none, and rows are of CPUs and GPUs alone.
    monkeypatch.setattr(backends, "_absence", lambda device: "torch has no such GPU")
    assert backends.measured_plan("auto", *call) is None
    assert backends.measured_plan("auto", call[0], torch.device("meta"), *call[2:]) is None


@pytest.mark.parametrize(
    ("rows", "nearest"),
    [
        (499, None),
        (500, 1000),
        (1000, 1000),
        (1001, 1000),
        (1600, 3000),
        (3000, 3000),
        (3001, 4000),
        (8000, 4000),
        (8001, None),
    ],
)
def test_the_nearest_row(rows, nearest):
    table = Table([replace(ROW, rows=count) for count in (4000, 1000, 3000)])
    found = table.nearest(ROW.gpu, ROW.subject, ROW.dtype, rows, ROW.sizes)
    assert (found and found.rows) == nearest


def test_measured_rows_are_explained(gpu, monkeypatch):
    from pyfused.explanation import _not_taken

    monkeypatch.setattr(measured, "TABLE", Table([replace(ROW, found={"triton": 30.0, "cuda": 31.0})]))
    name, dtype = "adapter_residual", torch.bfloat16
    reasons = _not_taken(Decision(name, name, (), ADAPTER, dtype, GPU, "cuda", "save", "save", (), 0, {}))
    assert reasons[0] == "measured at M = 6304: triton 30.0 us, cuda 31.0 us"
    assert reasons[-1] == "not triton: not asked for"


def test_what_times_would_take_was_not_asked_for_where_a_row_of_the_call_decides(gpu):
    from pyfused.explanation import _not_taken

    by_times = chosen("projection_residual").backend
    other = "portable" if by_times != "portable" else "triton"
    call = "cross_attention_residual", "projection_residual", (), PROJECTION, torch.bfloat16, GPU, other
    made = Decision(*call, "standard", "standard", (), 0, {})
    assert f"not {by_times}: not asked for" in _not_taken(made)
    assert not any("not asked for" in reason for reason in _not_taken(replace(made, measured_backend=other)))


def switches(operator):
    """The numbers of rows up to which one choice holds, all but the last."""
    there = backends.available(GPU, torch.bfloat16, operator, {}, plans(operator))
    constant = tuple((name, tuple(each)) for name, each in there.items())
    found = order._choices(operator, (9, 0), 2, order._bucketed(SIZES[operator]), constant)
    return [most for most, _ in found[:-1]]


@pytest.mark.parametrize("others_measured", [False, True])
@pytest.mark.parametrize("operator", SIZES)
def test_traced_code_compiles_again_only_where_the_choice_changes(gpu, monkeypatch, operator, others_measured):
    if others_measured:
        row = replace(
            ROW, subject=operator, sizes=order.others(SIZES[operator]), found={"triton": 1.0, "portable": 2.0}
        )
        monkeypatch.setattr(measured, "TABLE", Table([replace(row, gpu="NVIDIA H100")]))

    def number(choice):
        # No two backends and no two plans have names as long as each other.
        return 10_000 * len(choice.backend) + 100 * len(choice.forward) + len(choice.backward)

    def call(x):
        sizes = SIZES[operator] | {"M": x.shape[0]}
        return x + number(choose("auto", GPU, torch.bfloat16, operator, sizes, None, plans(operator)))

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    ends = switches(operator)
    # At both sides of where the choice changes, and between.
    rows = sorted({100, 1000, 5000, 6304, *(end + more for end in ends if 1 < end < 1 << 16 for more in (0, 1))})
    for count in rows:
        same = number(chosen(operator, M=count))
        assert compiled(torch.zeros(count))[0].item() == same, "the same choice as without tracing"
    assert counter.frame_count <= len({sum(count > end for end in ends) for count in rows})
    assert counter.frame_count <= 8


def test_traced_code_follows_a_measured_row(gpu, monkeypatch):
    monkeypatch.setattr(measured, "TABLE", Table([replace(ROW, found={"portable": 30.0, "cuda": 31.0})]))

    def call(x):
        sizes = ADAPTER | {"M": x.shape[0]}
        return (
            x
            + {"cuda": 1, "triton": 2, "portable": 3}[
                choose("auto", GPU, torch.bfloat16, "adapter_residual", sizes).backend
            ]
        )

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    beyond = {"cuda": 1, "triton": 2}[chosen("adapter_residual", M=2000).backend]
    assert [compiled(torch.zeros(rows))[0].item() for rows in (4000, 5000, 6304, 2000)] == [3, 3, 3, beyond]
    assert counter.frame_count == 2, "once inside the row's range, and once outside"


@pytest.mark.parametrize("operator", SIZES)
def test_arithmetic_is_traced_with_sizes_that_change(gpu, operator):
    gpu((8, 0))

    def call(x):
        sizes = {
            name: x.shape[0] if name in ("M", "N", "K", "C", "h", "J") else size
            for name, size in SIZES[operator].items()
        }
        return x + len(choose("auto", GPU, torch.bfloat16, operator, sizes, None, plans(operator)))

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    assert [compiled(torch.zeros(rows)).shape[0] for rows in (37, 38, 39, 40)] == [37, 38, 39, 40]
    assert counter.frame_count == 1


def test_a_program_for_any_number_of_rows_has_no_bound_on_them(gpu, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert {chosen("lora_linear", M=rows) for rows in (1, 100, 8192, 1 << 20)} == {chosen("lora_linear", M=8192)}


def test_rows_survive_the_file(tmp_path):
    path = tmp_path / "measured.json"
    assert measured.read(path) == []
    rows = [replace(ROW, rows=count, found={"cuda": 1.5}) for count in (2, 1)]
    measured.write(rows, path)
    assert measured.read(path) == rows[::-1]
    assert len(path.read_text().splitlines()) == len(rows) + 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["measured.json"]


@pytest.mark.parametrize("text", ["{", '{"a": 1}', '[{"gpu": "x"}]'])
def test_a_broken_file_is_an_error_that_names_it(tmp_path, text):
    path = tmp_path / "measured.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"measured\.json must hold a list of rows"):
        measured.read(path)


def test_the_committed_rows_name_where_they_were_measured():
    for row in measured.read():
        assert row.gpu
        assert row.source.keys() >= {"date", "torch", "commit"}, json.dumps(row.sizes)
        if row.subject in SIZES:
            assert list(row.found.values()) == sorted(row.found.values())


def test_nothing_is_reckoned_for_a_cpu(gpu, monkeypatch):
    monkeypatch.setattr(order, "choose", None)
    cpu = torch.device("cpu")
    assert choose("auto", cpu, torch.float32, "lora_linear", LORA, None, plans("lora_linear")).backend == "portable"
