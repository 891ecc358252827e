"""The compiled library `pyfused._C`: what is installed here, and how setup.py builds it, shown on a small kernel."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import re
import runpy
import shutil
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import processes
import pytest
import torch
from torch._subclasses import FakeTensorMode
from tree import ROOT

import pyfused
from pyfused.choice import backends

# Stands in for the operators, on everything that they are built upon.
PROBE = {
    "operators.h": """
#pragma once
#include <string>
#include <tuple>
#include "call.h"
namespace pyfused {
std::tuple<Tensor, Tensor> probe_fwd(const Tensor& x, const OptionalTensor& seed, double factor,
                                     const std::string& kind, bool channels_first);
}
""",
    "probe.h": """
#pragma once
#include "types.h"
namespace pyfused {
struct ProbeParameters {
  Rows x, y;
  Dropout dropout;
  float factor;
};
void probe(const ProbeParameters& parameters, void* stream);
}
""",
    "probe.cu": """
#include "probe.h"
#include "device.cuh"
#include "launch.h"
namespace pyfused {
template <class T, int kWidth>
__global__ void probe_kernel(const ProbeParameters p) {
  const T* x = static_cast<const T*>(p.x.data) + threadIdx.x % kWidth;
  store_global(static_cast<T*>(p.y.data) + threadIdx.x, from_float<T>(to_float(load_global(x)) * p.factor));
}
void probe(const ProbeParameters& p, void* stream) {
  launch<probe_kernel<bfloat16, 8>>(dim3(1), 32, 0, stream, p);
  launch<probe_kernel<float, 16>>(dim3(1), 32, 0, stream, p);
}
}
""",
    "probe.cpp": """
#include "probe.h"
#include "operators.h"
namespace pyfused {
std::tuple<Tensor, Tensor> probe_fwd(const Tensor& x, const OptionalTensor& seed, double factor,
                                     const std::string& kind, bool channels_first) {
  const Call call(x);
  const Tensor y = rows_like(x, 8, channels_first), rest = empty({x.size(0), 2}, Number::kFloat32, x);
  probe({const_rows(x), mutable_rows(y), dropout(seed, 0.5), static_cast<float>(factor)}, call.stream());
  return {y, rest};
}
}
""",
}
# Imports the library of a probe without pyfused's own schemas in the way, and runs it as far as a machine without a
# GPU can.
TRY_PROBE = """
import json, sys, torch
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("pyfused._C", sys.argv[1])
library = module_from_spec(spec)
spec.loader.exec_module(library)
schemas = torch.library.Library("pyfused_cuda", "DEF")
schemas.define("probe_fwd(Tensor x, Tensor? seed, float factor, str kind, bool channels_first) -> (Tensor y, Tensor z)")
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
try:
    torch.ops.pyfused_cuda.probe_fwd.default.redispatch(cuda, torch.ones(1, 2, 8), None, 2.0, "kind", True)
except RuntimeError as error:
    print(json.dumps([json.loads(library.build_info()), library.kernel_names(), str(error)]))
"""

needs_library = pytest.mark.skipif(
    "pyfused._C" not in sys.modules, reason=str(backends.CUDA_REFUSAL or "pyfused._C is not loaded")
)
host = pytest.mark.host


def registered() -> list[str]:
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    return sorted(name for name in names if name.startswith("pyfused_cuda::"))


@needs_library
def test_the_library_lists_its_kernels():
    library = sys.modules["pyfused._C"]
    names = library.kernel_names()
    assert len(set(names)) == len(names)
    assert [name for name in names if not re.fullmatch(r"\w+_kernel(<.*>)?", name)] == []
    built = json.loads(library.build_info())
    assert re.fullmatch(r"\d+\.\d+\.\d+", built["nvcc"])
    assert any(target.startswith("sm_") for target in built["targets"])
    assert built["targets"][-1].startswith("compute_")


@needs_library
def test_kernel_attributes():
    library = sys.modules["pyfused._C"]
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"^kernel_attributes needs a GPU: "):
            library.kernel_attributes()
        return
    attributes = library.kernel_attributes()
    assert attributes.keys() == set(library.kernel_names())
    for name, found in attributes.items():
        assert 0 < found["registers"] <= 255, name
        assert found["local_memory"] <= 64, name
        assert found["max_threads"] % 32 == 0, name


@needs_library
def test_the_library_says_whether_it_runs():
    library = sys.modules["pyfused._C"]
    driver, runtime = library.versions()
    nvcc = json.loads(library.build_info())["nvcc"]
    assert nvcc.startswith(f"{runtime // 1000}.{runtime % 1000 // 10}.")
    if torch.cuda.is_available():
        assert driver >= 12000
        assert library.probe() is None
    else:
        # cudaErrorInsufficientDriver where there is no driver, cudaErrorNoDevice beside one.
        assert re.fullmatch(r".+ \(cudaError(InsufficientDriver|NoDevice)\)", library.probe())


@needs_library
def test_the_library_fits_its_wheel():
    # In which it is compressed.
    assert Path(sys.modules["pyfused._C"].__file__).stat().st_size < 60_000_000


@needs_library
def test_every_implementation_has_its_schema_and_its_other_direction():
    assert "pyfused_cuda::" not in "\n".join(torch._C._dispatch_find_dangling_impls())
    names = {name.removeprefix("pyfused_cuda::") for name in registered()}
    assert names == {f"{operator}_{way}" for operator in backends.CUDA_OPERATORS["cuda"] for way in ("fwd", "bwd")}


@needs_library
@pytest.mark.parametrize("optional", ["absent", "present"])
def test_every_implementation_takes_what_its_schema_says(optional):
    """Each is called with CPU tensors, past the dispatcher, and gets as far as refusing them."""
    if not registered():
        pytest.skip("pyfused._C has no operator")
    sample = {"Tensor": torch.zeros(1, 1, 1), "float": 0.5, "bool": False, "str": "", "int": 1}
    sample["Optional[Tensor]"] = None if optional == "absent" else torch.zeros(1)
    for name in registered():
        overload = getattr(torch.ops.pyfused_cuda, name.removeprefix("pyfused_cuda::")).default
        arguments = [sample[str(argument.type)] for argument in overload._schema.arguments]
        with pytest.raises(RuntimeError, match="the kernels take CUDA tensors"):
            overload.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments)


CALLS = {
    "lora_linear": (
        pyfused.lora_linear,
        {"x": (2, 5, 16), "weight": (8, 16), "lora_a": (4, 16), "lora_b": (8, 4), "bias": (8,)},
        {},
    ),
    "adapter_residual": (
        pyfused.adapter_residual,
        {"z": (2, 5, 16), "down_weight": (4, 16), "down_bias": (4,), "up_weight": (16, 4), "up_bias": (16,)},
        {},
    ),
    "cross_attention_residual": (
        pyfused.cross_attention_residual,
        {
            "x": (2, 5, 16), "context": (2, 3, 8), "q_weight": (16, 16), "q_bias": (16,), "k_weight": (16, 8),
            "k_bias": (16,), "v_weight": (16, 8), "v_bias": (16,), "out_weight": (16, 16), "out_bias": (16,),
        },
        {"num_heads": 2, "plan": "absorbed"},
    ),
    "projection_residual": (
        pyfused.projection_residual,
        {"o": (2, 5, 8), "weight": (16, 8), "bias": (16,), "residual": (2, 5, 16)},
        {},
    ),
}  # fmt: skip


def fake_step(operator: str, backend: str) -> list[tuple]:
    """Shape, strides and dtype of the output and of each gradient, computed on fake tensors."""
    function, shapes, options = CALLS[operator]
    with FakeTensorMode():
        leaves = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        for leaf in leaves.values():
            leaf.requires_grad_()
        y = function(**leaves, **options, backend=backend)
        gradients = torch.autograd.grad(y, list(leaves.values()), torch.empty_like(y))
    return [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in (y, *gradients)]


@pytest.mark.parametrize("operator", CALLS)
def test_fake_tensors_pass_through(operator, monkeypatch):
    if operator not in backends.CUDA_OPERATORS["cuda"]:
        pytest.skip(f"pyfused._C has no kernels for {operator}")
    # On CPU tensors, which autograd takes without a GPU; fake ones ask no library.
    monkeypatch.setitem(backends.CUDA_OPERATORS, "cpu", backends.CUDA_OPERATORS["cuda"])
    assert fake_step(operator, "cuda") == fake_step(operator, "portable")


# test_cpu_build.py has the kernels for CPUs.
run = functools.partial(processes.run, PYFUSED_CPU="0")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A checkout whose only kernels are the probe's."""
    copy = tmp_path_factory.mktemp("probe") / "checkout"
    (copy / "csrc").mkdir(parents=True)
    for name in (
        "LICENSE", "MANIFEST.in", "Makefile", "README.md", "constraints.txt", "pyfused/__init__.py", "pyproject.toml",
        "setup.py",
    ):  # fmt: skip
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    for path in (ROOT / "csrc").iterdir():
        if path.suffix in (".h", ".cuh") or path.name in ("launch.cu", "module.cu"):
            shutil.copy2(path, copy / "csrc")
    for name, text in PROBE.items():
        (copy / "csrc" / name).write_text(text)
    binding = (ROOT / "csrc" / "binding.cpp").read_text()
    binding, count = re.subn(r"\{[^{}]*\}\s*$", "{ PYFUSED_IMPL(probe_fwd); }\n", binding)
    assert count == 1
    (copy / "csrc" / "binding.cpp").write_text(binding)
    return copy


def build(checkout: Path, *, fails: bool = False, **variables: str) -> str:
    return run(
        sys.executable, "setup.py", "build_ext", "--inplace",
        cwd=checkout, fails=fails, PYFUSED_CUDA="1", PYFUSED_CUDA_ARCHS="80", **variables,
    )  # fmt: skip


def make(*arguments: str, checkout: Path, **variables: str) -> str:
    return run("make", *arguments, cwd=checkout, PYFUSED_CUDA_ARCHS="80", PIP_NO_INDEX="1", **variables)


@host
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
class TestBuild:
    """setup.py where nvcc is; the tests share one checkout, whose objects are compiled once."""

    def test_library_loads_without_a_gpu_and_takes_every_kind_of_argument(self, checkout):
        printed = build(checkout)
        assert "\npyfused._C, the CUDA C++ kernels, is built (PYFUSED_CUDA=0 leaves it out)\n" in printed
        library = checkout / "pyfused" / "_C.abi3.so"
        built, names, refusal = json.loads(run(sys.executable, "-c", TRY_PROBE, library, cwd=checkout))
        assert built["targets"] == ["sm_80", "compute_80"]
        assert sorted(names) == ["probe_kernel<bfloat16, 8>", "probe_kernel<float, 16>"]
        assert refusal == "pyfused: the kernels take CUDA tensors, got one elsewhere"
        log = (checkout / "build" / "cuda" / "probe.cu.o.log").read_text()
        assert log.count("0 bytes spill stores") == 2

    def test_only_what_changed_is_compiled_again(self, checkout):
        build(checkout)
        assert "compiling" not in build(checkout)
        os.utime(checkout / "csrc" / "probe.h")
        assert set(re.findall(r"compiling csrc/(\S+)", build(checkout))) == {"probe.cu", "probe.cpp"}

    def test_wheel_is_for_every_python_and_holds_the_library(self, checkout, tmp_path):
        build(checkout)
        # In the environment of the tests, which counts as made.
        make("wheel-cuda", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed", checkout=checkout)
        (wheel,) = checkout.glob("dist/*-cp310-abi3-*.whl")
        assert wheel.name.endswith(f"-cp310-abi3-linux_{platform.machine()}.whl")
        shutil.unpack_archive(wheel, tmp_path / "site", "zip")
        _, names, _ = json.loads(
            run(sys.executable, "-c", TRY_PROBE, tmp_path / "site/pyfused/_C.abi3.so", cwd=tmp_path)
        )
        assert len(names) == 2
        assert not (tmp_path / "site/pyfused/_C.absent").exists()

    def test_compilers_message_is_shown(self, checkout):
        build(checkout)
        probe = checkout / "csrc" / "probe.cu"
        right = probe.read_text()
        try:
            probe.write_text(right.replace("threadIdx.x % kWidth", "threadIndex.x % kWidth"))
            printed = build(checkout, fails=True)
        finally:
            probe.write_text(right)
        assert "FAILED: build/cuda/probe.cu.o" in re.sub(r"\[code=\d+\] ", "", printed)
        assert re.search(r'csrc/probe\.cu\(\d+\): error: identifier "threadIndex" is undefined', printed)
        assert "Traceback" not in printed
        assert not re.search(r"^ptxas info", printed, re.MULTILINE)


@host
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"PYFUSED_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "PYFUSED_CUDA=1, but nvcc was not found (looked in CUDA_HOME=",
        ),
        ({"PYFUSED_CUDA": "yes"}, "PYFUSED_CUDA must be 0 or 1, got 'yes'"),
    ],
)
def test_build_that_cannot_be_done(checkout, variables, message):
    assert f"pyfused: {message}" in run(sys.executable, "setup.py", "--name", cwd=checkout, fails=True, **variables)


@host
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("given", ["sm_90", "75", "80,90", ""])
def test_architectures_that_are_none(checkout, given):
    variables = {"PYFUSED_CUDA": "1", "PYFUSED_CUDA_ARCHS": given}
    printed = run(sys.executable, "setup.py", "--name", cwd=checkout, fails=True, **variables)
    assert f"PYFUSED_CUDA_ARCHS must be capabilities from 80 on such as \"80;90\", got '{given}'" in printed


@host
@pytest.mark.parametrize(
    ("nvcc", "expected"),
    [
        ("12.0.140", ("80", "90")),
        ("12.6.85", ("80", "90")),
        ("12.8.61", ("80", "90", "100", "120")),
        ("13.0.88", ("80", "90", "100", "120")),
    ],
)
def test_architectures_that_this_nvcc_knows(monkeypatch, nvcc, expected):
    monkeypatch.setattr("setuptools.setup", lambda **settings: None)
    monkeypatch.setenv("PYFUSED_CUDA", "0")
    monkeypatch.setenv("PYFUSED_CPU", "0")
    monkeypatch.delenv("PYFUSED_CUDA_ARCHS", raising=False)
    build = runpy.run_path(str(ROOT / "setup.py"))
    assert build["MIN_TORCH"] == pyfused._MIN_TORCH
    assert build["_architectures"](nvcc) == expected
    toolchain = build["Cuda"]("ninja", "g++", ROOT, "2.10.0", nvcc, nvcc, expected)
    assert toolchain.targets == [*(f"sm_{name}" for name in expected), f"compute_{expected[-1]}"]
    monkeypatch.setenv("PYFUSED_CUDA_ARCHS", "120;86")
    assert build["_architectures"](nvcc) == ("86", "120"), "what is asked for is nvcc's to refuse"


@host
def test_an_isolated_build_without_torch_says_so(checkout, tmp_path):
    # An environment of setuptools alone, as pip makes one.
    for found in importlib.metadata.files("setuptools"):
        name = found.parts[0]
        if name.startswith(("setuptools", "_distutils_hack")) and not (tmp_path / name).exists():
            (tmp_path / name).symlink_to(sysconfig.get_path("purelib") + f"/{name}")
    alone = {"cwd": checkout, "PYTHONPATH": str(tmp_path)}
    # An empty variable is one that is not set.
    run(sys.executable, "-S", "setup.py", "bdist_wheel", "--dist-dir", tmp_path, PYFUSED_CPU="", **alone)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    for library in ("_C", "_cpu"):
        why = zipfile.ZipFile(wheel).read(f"pyfused/{library}.absent").decode()
        assert re.fullmatch(r"when it was built, torch was not found \(.* unless told --no-build-isolation\)\n", why)
    printed = run(sys.executable, "-S", "setup.py", "--name", fails=True, PYFUSED_CUDA="1", **alone)
    assert "PYFUSED_CUDA=1, but torch was not found (" in printed
    assert "--no-build-isolation" in printed


@host
def test_a_wheel_without_kernels_is_for_every_platform(checkout):
    gone = checkout / "build" / "lib" / "pyfused" / "gone.py"
    gone.parent.mkdir(parents=True, exist_ok=True)
    gone.touch()
    # "0" is how pip is told so by a variable.
    make("wheel", f"PYTHON={sys.executable}", checkout=checkout, PIP_NO_BUILD_ISOLATION="0")
    (wheel,) = checkout.glob("dist/*-none-*.whl")
    assert wheel.name == f"pyfused-{pyfused.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {"pyfused/_C.absent", "pyfused/_cpu.absent"} <= set(names)
    assert "pyfused/gone.py" not in names


@pytest.fixture
def nvcc(tmp_path) -> Path:
    """A folder like CUDA_HOME."""
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    processes.script(tmp_path / "cuda" / "bin" / "nvcc", "print('Cuda compilation tools, release 13.0, V13.0.88')")
    return tmp_path / "cuda"


@host
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH")
@pytest.mark.parametrize(("cuda", "asked"), [(None, ""), (None, "1"), ("13.0", "")])
def test_kernels_are_built_where_torch_runs_them_or_they_are_asked_for(checkout, nvcc, tmp_path, cuda, asked):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('the build imports no torch')\n")
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2.12.0+some'\ncuda = {cuda!r}\n")
    (tmp_path / "torch-2.12.0.dist-info").mkdir()
    (tmp_path / "torch-2.12.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.12.0\n")
    printed = run(
        sys.executable, "setup.py", "build_py", "--build-lib", tmp_path / "built", cwd=checkout,
        PYTHONPATH=str(tmp_path), CUDA_HOME=str(nvcc), PYFUSED_CUDA=asked,
    )  # fmt: skip
    record = tmp_path / "built" / "pyfused" / "_C.absent"
    why = "torch 2.12.0+some had no CUDA to run them (PYFUSED_CUDA=1 builds them all the same)\n"
    left_out = cuda is None and not asked
    assert (f"\npyfused._C, the CUDA C++ kernels, is left out: {why}" in printed) == left_out
    assert (record.read_text() if record.exists() else None) == (f"when it was built, {why}" if left_out else None)


@host
@pytest.mark.parametrize(("home", "given", "expected"), [("", None, "1"), ("nowhere", None, ""), ("", "0", "0")])
def test_make_asks_for_the_kernels_where_nvcc_is(checkout, nvcc, home, given, expected):
    variables = {} if given is None else {"PYFUSED_CUDA": given}
    printed = make("-n", "-B", ".venv/.installed", checkout=checkout, CUDA_HOME=str(nvcc / home), **variables)
    assert re.search(rf"^PYFUSED_CUDA={expected} .* pip install .* -e '\.\[dev\]'$", printed, re.MULTILINE)


@host
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_a_missing_ninja_is_named(checkout, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("nvcc", "g++"):
        # Not a link: nvcc looks for its own beside itself.
        (programs / name).write_text(f'#!/bin/sh\nexec {shutil.which(name)} "$@"\n')
        (programs / name).chmod(0o755)
    printed = run(
        tmp_path / "venv" / "bin" / "python", "setup.py", "--name", cwd=checkout, fails=True,
        PYFUSED_CUDA="1", PATH=str(programs), PYTHONPATH=sysconfig.get_path("purelib"),
    )  # fmt: skip
    assert "PYFUSED_CUDA=1, but ninja, which builds the kernels, was not found" in printed


@host
def test_editable_installation_without_kernels_drops_old_ones(checkout, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    (site,) = tmp_path.glob("venv/lib/python*/site-packages")
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    old = checkout / "pyfused" / "_C.abi3.so"
    old.touch()
    printed = run(
        sys.executable, "-m", "pip", "--python", tmp_path / "venv/bin/python", "install", "-v", "--no-index",
        "--no-deps", "--no-build-isolation", "-e", checkout, cwd=tmp_path, PYFUSED_CUDA="0",
    )  # fmt: skip
    assert "pyfused._C, the CUDA C++ kernels, is left out: PYFUSED_CUDA was 0\n" in printed
    assert (checkout / "pyfused" / "_C.absent").read_text() == "when it was built, PYFUSED_CUDA was 0\n"
    assert not old.exists()
