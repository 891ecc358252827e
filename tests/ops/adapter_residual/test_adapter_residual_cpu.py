"""The C++ kernels for CPUs: every instruction set, any number of threads, dropped samples, and their library."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from adapter_residual_cases import FORMATS, check, draw, sample_scale
from cpu import library
from cpu.machine import every_instruction_set, take, taken, threads
from operator_cases import IMAGES, LAYOUTS, run, seed, skips
from oracle import randn
from tree import ROOT

import pyfused
from pyfused.choice import backends, measured, order
from pyfused.ops.adapter_residual import ACTIVATIONS, PLANS

pytestmark = skips("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU = torch.device("cpu")


def _calls():
    """Tails of every vector and panel, several blocks of rows, several chunks of sums and parts of them."""
    for n, (rows, channels, hidden) in enumerate(
        [
            (1, 1, 1),
            (7, 5, 3),
            (13, 17, 9),
            (97, 31, 33),
            (200, 70, 65),
            (131, 129, 260),
            (2100, 33, 18),
            (300, 270, 40),
        ]
    ):
        layout, dtype = FORMATS[n % 3], DTYPES[n // 2 % 3]
        shape = (rows, channels) if layout == "rows" else (3, channels, rows, 1)
        yield shape, hidden, layout, dtype, ACTIVATIONS[n % 7], PLANS[n % 2], (0.0, 0.3)[n // 3 % 2]


def check_calls() -> None:
    for shape, hidden, layout, dtype, activation, plan, p in _calls():
        channel_dim = -1 if layout == "rows" else 1
        tensors = draw(shape, hidden, dtype, residual=torch.float32, channel_dim=channel_dim)
        if layout == "channels_last":
            tensors = {
                name: value.to(memory_format=torch.channels_last) if value is not None and value.dim() == 4 else value
                for name, value in tensors.items()
            }
        scale = sample_scale(shape[0], "some") if shape[0] > 1 else None
        check(
            tensors, "cpu", plan, activation=activation, channel_dim=channel_dim, sample_scale=scale, dropout_p=p,
            seed=seed(), skip=0.5,
        )  # fmt: skip


@every_instruction_set
def test_every_instruction_set(instruction_set):
    with taken(instruction_set):
        check_calls()


@pytest.mark.parametrize("dtype", DTYPES[1:])
@every_instruction_set
def test_numbers_of_16_bits_are_read_and_rounded_as_torch_does(instruction_set, dtype):
    z = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 8)
    z = z.nan_to_num(7.0, 7.0, 7.0).requires_grad_()
    # Every number of the type, the middles between two and what is next to them.
    near = torch.cat(
        [z.detach().float().view(torch.int32) + step for step in (-4097, -4096, -1, 0, 1, 4095, 4096, 32768)]
    )
    near = near.view(torch.float32).nan_to_num(7.0)
    zeros = torch.zeros(2, 8, dtype=dtype), None, torch.zeros(8, 2, dtype=dtype), None
    with taken(instruction_set):
        y = pyfused.adapter_residual(z, *zeros, residual=torch.zeros(z.shape), backend="cpu")
        assert torch.equal(y, z.float())
        for dy in near.split(z.shape[0]):
            (dz,) = torch.autograd.grad(y, [z], dy, retain_graph=True)
            assert torch.equal(dz, dy.to(dtype))


def test_an_unknown_instruction_set_is_not_taken():
    before = backends.cpu_instruction_set()
    assert not take("avx1024")
    assert backends.cpu_instruction_set() == before


# Their arithmetic without their instructions, which few machines have.
WIDER = """
import test_adapter_residual_cpu, test_lora_linear_cpu
from cpu.machine import taken
with taken("baseline"):
    test_adapter_residual_cpu.check_calls()
    test_lora_linear_cpu.check_calls()
print("right")
"""


@pytest.mark.host
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH")
@pytest.mark.skipif(backends.cpu_instruction_set() != "avx2", reason="of use where AVX2 is, and AVX-512 is not")
def test_vectors_of_sixteen_lanes(tmp_path):
    options = ["-mavx2", "-mfma", "-mf16c", "-DPYFUSED_LANES=16", "-Wno-psabi", "-O1"]
    library.build(tmp_path, {"baseline": options, "avx2": ["-O0"], "avx512": ["-O0"]})
    library.installed(tmp_path)
    paths = [tmp_path, ROOT / "tests", Path(__file__).parent, Path(__file__).parent.with_name("lora_linear")]
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", WIDER], cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "right\n"


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("shape", "hidden", "channel_dim"), [((2500, 40), 24, -1), ((900, 96), 48, -1), ((9, 48, 15, 15), 20, 1)], ids=str
)
def test_the_same_bits_on_any_number_ofthreads(shape, hidden, channel_dim, plan):
    tensors = draw(shape, hidden, residual=torch.float32, channel_dim=channel_dim)
    options = {
        "sample_scale": sample_scale(shape[0], "some"), "dropout_p": 0.1, "seed": seed(), "channel_dim": channel_dim,
        "plan": plan, "backend": "cpu",
    }  # fmt: skip
    found = []
    for count in (1, 2, 3, 5):
        with threads(count):
            found.append(run(pyfused.adapter_residual, tensors, **options))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_dropped_samples_take_no_time(channel_dim):
    shape = (4, 400, 256) if channel_dim == -1 else (4, 256, 20, 20)
    # What is done beside the products takes little.
    tensors = draw(shape, 512, residual=torch.float32, channel_dim=channel_dim)

    def taken(scale) -> float:
        options = {"sample_scale": torch.tensor(scale), "channel_dim": channel_dim, "backend": "cpu"}
        start = time.thread_time()
        run(pyfused.adapter_residual, tensors, **options)
        return time.thread_time() - start

    # The best of several rounds: what else the machine does takes time of caches and memory.
    with threads(1):
        rounds = [(taken([1.0, 2.0, 1.0, 1.0]), taken([0.0, 2.0, 0.0, 0.0]), taken([0.0] * 4)) for _ in range(8)]
    every, one, none = map(min, zip(*rounds, strict=True))
    assert one < 0.6 * every
    assert none < 0.4 * every


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("shape", "channel_dim"), [((70, 1024), -1), ((2, 40, 32, 32), 1)], ids=["rows", "NCHW"])
def test_whole_pages_apart(shape, channel_dim, plan):
    tensors = draw(shape, 24, residual=torch.float32, channel_dim=channel_dim)
    check(tensors, "cpu", plan, channel_dim=channel_dim, sample_scale=sample_scale(shape[0], "some"))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("by_channels", [("z",), ("residual",), ("dy",), ("z", "dy"), ("residual", "dy")], ids=str)
def test_images_of_two_formats_in_one_call(by_channels, plan):
    tensors = {**draw((3, 37, 9, 11), 21, residual=torch.float32, channel_dim=1), "dy": randn(3, 37, 9, 11, seed=9)}
    for name in by_channels:
        tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
    dy = tensors.pop("dy")

    def gradients(function, **options):
        leaves = {name: value.detach().requires_grad_() for name, value in tensors.items()}
        y = function(**leaves, channel_dim=1, sample_scale=torch.tensor([1.5, 0.0, 0.5]), **options)
        return y, *torch.autograd.grad(y, list(leaves.values()), dy)

    found = gradients(pyfused.adapter_residual, backend="cpu", plan=plan)
    expected = gradients(pyfused.reference.adapter_residual)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["dtype", "layout"])
def test_forward_without_backward_equals_forward_with_it(what):
    cases = {"dtype": [(LAYOUTS["3-D"](), -1, dtype) for dtype in DTYPES]}
    cases["layout"] = [(make(), 1, torch.float32) for name, make in IMAGES.items() if "empty" not in name]
    for z, channel_dim, dtype in cases[what]:
        z = z.to(dtype)
        weights = [randn(9, 20, dtype=dtype), randn(9, dtype=dtype), randn(20, 9, dtype=dtype), randn(20, dtype=dtype)]
        options = {"channel_dim": channel_dim, "backend": "cpu"}
        with torch.no_grad():
            alone = pyfused.adapter_residual(z, *weights, **options)
        y = pyfused.adapter_residual(z.requires_grad_(), *weights, **options)
        assert torch.equal(alone, y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_from_zero_are_finite(activation):
    z = torch.tensor([[-1e30, -300.0, -20.0, 0.0, 20.0, 300.0, 1e18]]).T.requires_grad_()
    one = torch.ones(1, 1)
    y = pyfused.adapter_residual(z, one, None, one, None, skip=0.0, activation=activation, backend="cpu")
    expected = pyfused.reference.adapter_residual(z, one, None, one, None, skip=0.0, activation=activation)
    (found,), (wanted,) = torch.autograd.grad(y.sum(), [z]), torch.autograd.grad(expected.sum(), [z])
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(found[1:-1], wanted[1:-1], rtol=1e-5, atol=1e-5)


def test_nan_stays_nan():
    z = torch.full((1, 3), math.nan)
    y = pyfused.adapter_residual(z, torch.ones(2, 3), None, torch.ones(3, 2), None, activation="relu", backend="cpu")
    assert y.isnan().all()


def test_where_it_serves():
    assert backends.refusal("cpu", CPU, torch.float32, "adapter_residual") is None
    assert backends.refusal("cpu", CPU, torch.float32, "lora_linear") == "it has no kernels for lora_linear"
    assert "not torch.float64" in backends.refusal("cpu", CPU, torch.float64, "adapter_residual")
    assert backends.refusal("cpu", torch.device("cuda"), torch.float32) == "it has no kernels for device type 'cuda'"
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot serve .* cpu: it has no kernels for lora_linear"):
        pyfused.lora_linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1), backend="cpu")


@pytest.mark.parametrize(
    ("by_name", "hidden", "why"),
    [
        ("", 512, None),
        ("", 513, "beyond h = 512 the library's products are faster"),
        ("it is slow here", 6, "it is slow here"),
    ],
)
def test_auto_takes_it_where_it_was_measured_to_be_faster(monkeypatch, by_name, hidden, why):
    monkeypatch.setattr(backends, "CPU_BY_NAME", by_name)
    tensors = draw((5, 20), hidden)
    (call,) = pyfused.explain(pyfused.adapter_residual, **tensors).calls
    assert call.backend == ("cpu" if why is None else "portable")
    assert [reason for reason in call.why if reason.startswith("not cpu: ")] == ([f"not cpu: {why}"] if why else [])
    (named,) = pyfused.explain(pyfused.adapter_residual, **tensors, backend="cpu").calls
    assert named.backend == "cpu"


def test_a_measured_row_decides_on_a_cpu_too(monkeypatch):
    # An emulator, if another test has loaded it, has tiles of rows, which are among the sizes.
    monkeypatch.setitem(backends.CUDA_OPERATORS, "cpu", frozenset())
    tensors = draw((5, 20), 6)
    (call,) = pyfused.explain(pyfused.adapter_residual, **tensors).calls
    sizes = {"C": 20, "h": 6, "dropout_p": 0.0, "cuda_rows": 0, "weight_bytes": 4}
    found = {"portable": 1.0, "cpu": 2.0}
    row = measured.Row(order.device_name(CPU), (0, 0), "adapter_residual", "float32", 5, sizes, found, source={})
    monkeypatch.setattr(measured, "TABLE", measured.Table([row]))
    measured.changed()
    (now,) = pyfused.explain(pyfused.adapter_residual, **tensors).calls
    assert (call.backend, now.backend) == ("cpu", "portable")
    assert "measured at M = 5: portable 1.0 us, cpu 2.0 us" in now.why


def test_what_the_library_says_of_itself():
    built = backends.cpu_build_info()
    assert backends.cpu_instruction_set() in built["sets"]
    assert built["torch"]


REFUSED = """
import json, torch, pyfused
y = pyfused.adapter_residual(torch.ones(2, 3), torch.ones(1, 3), None, torch.ones(3, 1), None)
print(json.dumps([pyfused.available_backends()["cpu"], y.shape]))
"""


@pytest.mark.host
@pytest.mark.parametrize("library_is", ["no library", "absent", "of another torch", "of another version"])
def test_a_library_that_does_not_load_is_a_refusal(library_is, tmp_path):
    (tmp_path / "pyfused").mkdir()
    library.installed(tmp_path)
    built = tmp_path / "pyfused" / "_cpu.so"
    if library_is == "no library":
        built.write_bytes(b"\x7fELF not one")
    elif library_is == "absent":
        (tmp_path / "pyfused" / "_cpu.absent").write_text("no compiler\n")
    else:
        function = "a_function_of_another_torch"
        needs = (
            f'extern "C" void {function}(); void* x = (void*){function};' if library_is == "of another torch" else ""
        )
        source = tmp_path / "other.cpp"
        source.write_text(needs)
        subprocess.run(["g++", "-shared", "-fPIC", source, "-o", built], check=True)
    done = subprocess.run(
        [sys.executable, "-c", REFUSED], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reason, shape = json.loads(done.stdout)
    assert shape == [2, 3]
    said = {
        "no library": "do not load", "absent": ": no compiler", "of another torch": "undefined symbol",
        "of another version": "have to be built again",
    }[library_is]  # fmt: skip
    assert "pyfused._cpu" in reason
    assert said in reason
