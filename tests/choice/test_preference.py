"""The order in which "auto" takes backends, and the measured rows that it prefers to arithmetic."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from pyfused.choice import backends, measured
from pyfused.choice import order as preference
from pyfused.choice.backends import choose
from pyfused.choice.costs import costs
from pyfused.choice.measured import Row, Table
from pyfused.ops.contract.cuda_limits import cuda_rows, cuda_shared_memory
from pyfused.ops.decision import Decision

GPU = torch.device("cuda", 0)
LORA = {"M": 6304, "N": 2304, "K": 768, "R": 16, "dropout_p": 0.0}
ADAPTER = {"M": 6304, "C": 768, "h": 64, "dropout_p": 0.0, "cuda_rows": 64}
ATTENTION = {"M": 21920, "C": 1024, "J": 32, "dropout_p": 0.0, "norm_match": False, "cuda_rows": 64}
PROJECTION = {"M": 21920, "C": 1024, "K": 768, "norm_match": True}
SIZES = {
    "lora_linear": LORA,
    "adapter_residual": ADAPTER,
    "cross_attention_residual": ATTENTION,
    "projection_residual": PROJECTION,
}
ROW = Row("NVIDIA H200", (9, 0), "adapter_residual", "bfloat16", 6304, preference.others(ADAPTER), {}, {})


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
    operators = frozenset(SIZES) - {"projection_residual"}
    monkeypatch.setattr(backends, "CUDA_OPERATORS", {"cpu": frozenset(), "cuda": operators})
    monkeypatch.setattr(measured, "TABLE", Table())
    device((9, 0))
    return device


def first(operator, **sizes):
    return preference.preference(operator, GPU, torch.bfloat16, SIZES[operator] | sizes)[0][0]


@pytest.mark.parametrize("operator", SIZES)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_every_backend_has_a_place_and_the_order_a_reason(gpu, operator, capability):
    gpu(capability)
    order, why = preference.preference(operator, GPU, torch.bfloat16, SIZES[operator])
    assert sorted(order) == sorted(backends.BACKENDS)
    assert why().endswith("(not measured)")
    assert choose("auto", GPU, torch.bfloat16, operator, SIZES[operator]) in ("cuda", "triton")


@pytest.mark.parametrize(
    ("sizes", "backend"),
    [
        ({}, "cuda"),
        ({"R": 1}, "cuda"),
        ({"N": 3072}, "triton"),
        ({"N": 768, "R": 17}, "triton"),
        ({"N": 367, "R": 64}, "cuda"),
        ({"N": 369, "R": 64}, "triton"),
        ({"N": 768, "dropout_p": 0.1}, "triton"),
        ({"N": 256, "dropout_p": 0.1}, "cuda"),
    ],
)
def test_lora_linear_goes_by_what_is_done_twice(gpu, sizes, backend):
    for capability in ((8, 0), (12, 0)):
        gpu(capability)
        assert first("lora_linear", **sizes) == backend
    for capability in ((9, 0), (10, 0)):
        gpu(capability)
        faster = sizes == {"N": 256, "dropout_p": 0.1}
        assert first("lora_linear", **sizes) == ("cuda" if faster else "triton")


def test_products_of_lora_linear():
    # N, and rank 16 for each of 9 columns of tiles; mma.sync has 1 / 1.6 of wgmma's rate, the mask costs 320.
    for capability, dropout_p, expected in (
        ((8, 0), 0.0, (2448, 2448)),
        ((9, 0), 0.0, (1.6 * 2448, 2448)),
        ((9, 0), 0.1, (1.6 * 2448 + 9 * 320, 2304 + 184 + 320)),
    ):
        cuda, triton, why = costs("lora_linear", capability, LORA | {"dropout_p": dropout_p})
        assert (cuda, triton) == pytest.approx(expected)
        rows, k = LORA["M"], LORA["K"]
        times = [rows * k * cost / 156e6 for cost in (cuda, triton)]
        assert why() == "forward takes {:.1f} us with cuda, {:.1f} us with triton (model, an A100)".format(*times)


@pytest.mark.parametrize(
    ("operator", "sizes", "backend"),
    [
        # cuda 64 rows, triton 128: it reads the rows once more, and the weights half as often.
        ("adapter_residual", {"h": 48}, "cuda"),
        ("adapter_residual", {"h": 64}, "cuda"),
        ("adapter_residual", {"h": 192}, "cuda"),
        ("adapter_residual", {"h": 64, "cuda_rows": 32}, "triton"),
        ("adapter_residual", {"h": 8, "cuda_rows": 32}, "cuda"),
        ("adapter_residual", {"h": 300, "cuda_rows": 0}, "triton"),
        ("cross_attention_residual", {}, "cuda"),
        ("cross_attention_residual", {"J": 256, "cuda_rows": 16}, "triton"),
    ],
)
def test_the_bottleneck_family_goes_by_bytes_on_chip(gpu, operator, sizes, backend):
    assert first(operator, **sizes) == backend


def test_bytes_on_chip():
    # z, residual, y, and 2 x 64 x 2 bytes of each of 768 columns of the weights for 64 rows; z twice, for 128.
    cuda, triton, why = costs("adapter_residual", (9, 0), ADAPTER)
    assert (cuda, triton) == (768 * (6 + 4), 768 * (8 + 2))
    assert why() == f"forward moves {cuda:.0f} bytes a row on chip with cuda, {triton:.0f} with triton"


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
    assert first("adapter_residual") == "cuda"
    monkeypatch.setattr(
        measured, "TABLE", Table([replace(ROW, found={"triton": 30.0, "cuda": 31.0, "portable": 90.5})])
    )
    order, why = preference.preference("adapter_residual", GPU, torch.bfloat16, ADAPTER)
    assert order == ("triton", "cuda", "portable")
    assert why() == "measured at M = 6304: triton 30.0 us, cuda 31.0 us, portable 90.5 us"
    assert choose("auto", GPU, torch.bfloat16, "adapter_residual", ADAPTER) == "triton"
    # Another type, width, M by more than a factor of two, or GPU.
    for dtype, other in ((torch.float16, {}), (torch.bfloat16, {"h": 65}), (torch.bfloat16, {"M": 6304 * 2 + 1})):
        assert preference.preference("adapter_residual", GPU, dtype, ADAPTER | other)[1]().endswith("(not measured)")
    gpu((9, 0), "NVIDIA H100 80GB HBM3")
    assert preference.preference("adapter_residual", GPU, torch.bfloat16, ADAPTER)[1]().endswith("(not measured)")


def test_a_backend_that_was_slower_than_plain_torch_is_not_taken(gpu, monkeypatch):
    monkeypatch.setattr(measured, "TABLE", Table([replace(ROW, found={"portable": 10.0, "triton": 30.0})]))
    assert preference.preference("adapter_residual", GPU, torch.bfloat16, ADAPTER)[0] == ("portable", "triton", "cuda")
    assert choose("auto", GPU, torch.bfloat16, "adapter_residual", ADAPTER) == "portable"


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
    assert reasons == ["measured at M = 6304: triton 30.0 us, cuda 31.0 us", "not triton: not asked for"]


def test_choice_is_traced_with_any_number_of_rows(gpu, monkeypatch):
    monkeypatch.setattr(measured, "TABLE", Table([replace(ROW, found={"portable": 30.0, "cuda": 31.0})]))

    def call(x):
        sizes = ADAPTER | {"M": x.shape[0]}
        return x + {"cuda": 1, "portable": 2}[choose("auto", GPU, torch.bfloat16, "adapter_residual", sizes)]

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    assert [compiled(torch.zeros(rows))[0].item() for rows in (4000, 5000, 6304, 100)] == [2, 2, 2, 1]
    assert counter.frame_count == 2, "once inside the row's range, and once outside"


@pytest.mark.parametrize("operator", SIZES)
@pytest.mark.parametrize("others_measured", [False, True])
def test_arithmetic_is_traced_with_sizes_that_change(gpu, monkeypatch, operator, others_measured):
    gpu((8, 0))
    if others_measured:
        found = {"cuda": 1.0, "triton": 2.0}
        row = replace(ROW, subject=operator, sizes=preference.others(SIZES[operator]), found=found)
        monkeypatch.setattr(measured, "TABLE", Table([replace(row, gpu="NVIDIA H100")]))

    def call(x):
        sizes = {name: x.shape[0] if type(size) is int else size for name, size in SIZES[operator].items()}
        return x + len(choose("auto", GPU, torch.bfloat16, operator, sizes))

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="eager", fullgraph=True, dynamic=True)
    assert [compiled(torch.zeros(rows)).shape[0] for rows in (40, 41)] == [40, 41]


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


def test_no_order_for_a_cpu():
    assert "only by name" in preference.preference("lora_linear", torch.device("cpu"), torch.float32, LORA)[1]()
