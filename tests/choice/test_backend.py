from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from torch._subclasses import FakeTensorMode

import pyfused
from pyfused.choice import backends, order
from pyfused.choice.backends import available_backends, refusal
from pyfused.choice.order import Choice
from pyfused.ops.adapter_residual import PLANS as ADAPTER_PLANS
from pyfused.ops.cross_attention_residual import PLANS as ATTENTION_PLANS
from pyfused.ops.lora_linear import PLANS as LORA_PLANS

CPU, GPU, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")
OPERATOR = "lora_linear"


def choose(requested, device, dtype, operator, limits=None):
    return backends.choose(requested, device, dtype, operator, {}, limits).backend


def first(operator, device, dtype, sizes, candidates):
    """In the place of `order.choose`: what is tested here is who may be asked, not who is faster."""
    return Choice(next(iter(candidates)), "", "")


@pytest.fixture
def modern(monkeypatch):
    """A machine with a current triton and an H100, whatever this one has; no CUDA C++ kernels. Where these are, they
    come first."""
    monkeypatch.setattr(order, "choose", first)
    monkeypatch.setattr(backends, "TRITON_REFUSAL", None)
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", False)
    monkeypatch.setattr(backends, "CUDA_REFUSAL", "this installation has no compiled kernels (pyfused._C)")
    monkeypatch.setattr(backends, "CUDA_OPERATORS", {"cpu": frozenset(), "cuda": frozenset()})
    monkeypatch.setattr(backends, "DEFAULT_BACKEND", "auto")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return monkeypatch


class Library:
    """`pyfused._C` without a GPU: what it was built for, what the driver is, and what comes of launches."""

    def __init__(self):
        self.targets = ["sm_80", "sm_90", "compute_90"]
        self.driver, self.runtime = 13000, 12080
        self.answers: dict[int, str] = {}
        self.current = 0
        self.launches: list[int] = []

    def build_info(self) -> str:
        return json.dumps({"nvcc": "12.8.93", "targets": self.targets, "torch": "2.10.0"})

    def versions(self) -> tuple[int, int]:
        return self.driver, self.runtime

    def probe(self) -> str | None:
        self.launches.append(self.current)
        return self.answers.get(self.current)

    @contextlib.contextmanager
    def device(self, index: int):
        """`torch.cuda.device`."""
        before, self.current = self.current, index
        yield
        self.current = before


@pytest.fixture
def library(modern):
    """The library that `compiled` has, which has not been asked for anything."""
    library = Library()
    modern.setitem(sys.modules, "pyfused._C", library)
    modern.setattr(torch.cuda, "device", library.device)
    modern.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    modern.setattr(backends, "_PROBED", {})
    backends._unfit.cache_clear()
    yield library
    backends._unfit.cache_clear()


@pytest.fixture
def compiled(modern, library):
    """The same with CUDA C++ kernels for one operator."""
    modern.setattr(backends, "CUDA_REFUSAL", None)
    modern.setitem(backends.CUDA_OPERATORS, "cuda", frozenset([OPERATOR]))
    return modern


@pytest.fixture
def ampere(compiled):
    """The same on a GPU of compute capability 8.0."""
    compiled.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    return compiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_auto_takes_triton_without_compiled_kernels(modern, dtype):
    assert choose("auto", GPU, dtype, OPERATOR) == "triton"
    modern.setattr(backends, "TRITON_REFUSAL", "no")
    assert choose("auto", GPU, dtype, OPERATOR) == "portable"


def test_auto_takes_compiled_kernels_first(ampere):
    assert choose("auto", GPU, torch.float16, OPERATOR) == "cuda"
    assert choose("auto", GPU, torch.bfloat16, OPERATOR) == "cuda"
    assert choose("auto", GPU, torch.float32, OPERATOR) == "triton"
    assert choose("auto", GPU, torch.float16, "adapter_residual") == "triton"
    assert choose("auto", CPU, torch.float16, OPERATOR) == "portable"


@pytest.mark.parametrize(
    ("device", "dtype", "operator", "reason"),
    [
        (GPU, torch.bfloat16, OPERATOR, None),
        (GPU, torch.bfloat16, None, None),
        (GPU, torch.float32, OPERATOR, "its kernels take float16 and bfloat16, not torch.float32"),
        (GPU, torch.float16, "adapter_residual", "it has no kernels for adapter_residual"),
        (CPU, torch.float16, OPERATOR, "it has no kernels for device type 'cpu'"),
        (META, torch.float16, OPERATOR, "it has no kernels for device type 'meta'"),
    ],
)
def test_what_compiled_kernels_serve(compiled, device, dtype, operator, reason):
    assert refusal("cuda", device, dtype, operator) == reason


def test_compiled_kernels_refuse_old_gpus(compiled):
    compiled.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert refusal("cuda", GPU, torch.float16) == "it needs compute capability (8, 0), cuda:0 has (7, 5)"


OLD_DRIVER = "the CUDA driver 12.8 is older than the runtime 13.0 that its library was built with"
NO_CODE = (
    "its library has no code for this GPU: it was built for sm_80, sm_90, compute_90; the device has {0}.{1}"
)  # fmt: skip


@pytest.mark.parametrize(
    ("driver", "runtime", "reason"),
    [
        (12080, 13000, OLD_DRIVER),
        (0, 12080, "there is no CUDA driver here"),
        (12020, 12080, None),
        (13000, 13000, None),
        (13010, 12080, None),
    ],
)
def test_a_library_that_the_driver_cannot_run_is_refused(ampere, library, driver, runtime, reason):
    library.driver, library.runtime = driver, runtime
    assert refusal("cuda", GPU, torch.float16, OPERATOR) == reason
    assert choose("auto", GPU, torch.float16, OPERATOR) == ("cuda" if reason is None else "triton")
    assert library.launches == ([0] if reason is None else []), "what cannot run is not launched"
    if reason is not None:
        with pytest.raises(RuntimeError, match=f"cuda: {reason}"):
            choose("cuda", GPU, torch.float16, OPERATOR)


@pytest.mark.parametrize(
    ("targets", "capability", "code"),
    [
        (("sm_80", "sm_90", "compute_90"), (8, 0), "sm_80"),
        (("sm_80", "sm_86", "compute_86"), (8, 9), "sm_86"),
        (("sm_80", "sm_86", "compute_86"), (8, 0), "sm_80"),
        (("sm_80", "sm_90", "compute_90"), (9, 0), "sm_90"),
        (("sm_80", "sm_90", "compute_90"), (10, 0), "compute_90"),
        (("sm_80", "sm_90", "compute_90"), (12, 1), "compute_90"),
        (("sm_80", "sm_90", "sm_100", "sm_120", "compute_120"), (10, 3), "sm_100"),
        (("sm_80", "sm_90", "sm_100", "sm_120", "compute_120"), (12, 0), "sm_120"),
        (("sm_80", "sm_90", "sm_100", "sm_120", "compute_120"), (11, 0), None),
        (("sm_90", "compute_90"), (8, 0), None),
        (("sm_86", "compute_86"), (8, 0), None),
        (("compute_80",), (8, 0), "compute_80"),
    ],
)
def test_which_code_of_a_library_a_gpu_runs(targets, capability, code):
    assert backends.code_for(capability, targets) == code


@pytest.mark.parametrize("capability", [(10, 0), (12, 0)])
def test_a_library_without_code_for_the_gpu_is_refused(compiled, library, capability):
    compiled.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert refusal("cuda", GPU, torch.float16) is None, "the driver compiles its PTX"
    library.targets.pop()
    library.targets.append("compute_121")
    backends._unfit.cache_clear()
    expected = NO_CODE.format(*capability).replace("compute_90", "compute_121")
    assert refusal("cuda", GPU, torch.float16) == expected
    assert choose("auto", GPU, torch.float16, OPERATOR) == "triton"
    with pytest.raises(RuntimeError, match="has no code for this GPU: it was built for sm_80, sm_90, compute_121"):
        choose("cuda", GPU, torch.float16, OPERATOR)
    assert library.launches == [0]


def test_each_gpu_is_asked_once_and_has_an_answer_of_its_own(ampere, library):
    other = torch.device("cuda", 1)
    library.answers[1] = "unspecified launch failure (cudaErrorLaunchFailure)"
    refused = "an empty kernel of its library failed there: unspecified launch failure (cudaErrorLaunchFailure)"
    for _ in range(3):
        assert refusal("cuda", GPU, torch.float16, OPERATOR) is None
        assert refusal("cuda", other, torch.bfloat16, OPERATOR) == refused
        assert choose("auto", GPU, torch.float16, OPERATOR) == "cuda"
        assert choose("auto", other, torch.float16, OPERATOR) == "triton"
        with pytest.raises(RuntimeError) as caught:
            choose("cuda", other, torch.float16, OPERATOR)
        assert f"cuda: {refused}" in str(caught.value)
    assert library.launches == [0, 1]
    assert library.current == 0


def test_a_full_gpu_is_asked_again(ampere, library):
    library.answers[0] = "out of memory (cudaErrorMemoryAllocation)"
    assert choose("auto", GPU, torch.float16, OPERATOR) == "triton"
    del library.answers[0]
    assert choose("auto", GPU, torch.float16, OPERATOR) == "cuda"
    assert library.launches == [0, 0]


def test_a_second_gpu_that_is_not_there_is_a_reason(ampere, library):
    """torch has started CUDA, and answers for the first."""

    def capability(device=None):
        if torch.device(device).index == 1:
            raise AssertionError("Invalid device id")
        return 8, 0

    ampere.setattr(torch.cuda, "get_device_capability", capability)
    ampere.setattr(torch.cuda, "is_initialized", lambda: True)
    ampere.setattr(torch.cuda, "device_count", lambda: 1)
    assert refusal("cuda", GPU, torch.float16) is None
    assert refusal("cuda", torch.device("cuda", 1), torch.float16) == "torch has no cuda:1 here: Invalid device id"
    assert choose("auto", torch.device("cuda", 1), torch.float16, OPERATOR) == "portable"


def test_a_library_of_an_older_version_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyfused._C", types.ModuleType("pyfused._C"))
    assert "older than this version: they have to be built again" in backends._cuda_refusal()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about GPUs that are not there")
def test_fake_tensors_on_a_gpu_that_is_not_there_are_served_by_portable():
    from pyfused.bench.cases import operators

    for case in operators.tiny_cases(torch.device("cuda")):
        shapes = case.tensors(torch.device("meta"))
        with FakeTensorMode():
            tensors = {name: torch.empty(x.shape, dtype=x.dtype, device="cuda") for name, x in shapes.items()}
            function = getattr(pyfused, case.operator)
            for backend in ("auto", "portable"):
                y = case.call(function, tensors, backend=backend)
                assert y.device.type == "cuda"
            with pytest.raises(RuntimeError, match="triton: torch has no cuda:0 here"):
                case.call(function, tensors, backend="triton")


def test_a_gpu_without_an_index_is_the_current_one(compiled, library):
    compiled.setattr(torch.cuda, "current_device", lambda: 3)
    for device in (torch.device("cuda"), torch.device("cuda", 3)):
        assert refusal("cuda", device, torch.float16) is None
    assert library.launches == [3]


def test_nothing_is_launched_for_what_is_refused_anyway(compiled, library):
    assert refusal("cuda", GPU, torch.float32) is not None
    assert refusal("cuda", GPU, torch.float16, "adapter_residual") is not None
    assert refusal("cuda", CPU, torch.float16) is not None
    assert refusal("triton", GPU, torch.float16) is None
    assert refusal("portable", GPU, torch.float16) is None
    assert library.launches == []


def test_nothing_is_launched_while_a_graph_is_captured(ampere, library):
    capturing = [True]
    ampere.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    library.answers[0] = "unspecified launch failure (cudaErrorLaunchFailure)"
    # By what it was built for it would run.
    assert choose("auto", GPU, torch.float16, OPERATOR) == "cuda"
    assert library.launches == []
    capturing[0] = False
    assert choose("auto", GPU, torch.float16, OPERATOR) == "triton"
    capturing[0] = True
    assert choose("auto", GPU, torch.float16, OPERATOR) == "triton", "what is known is known in a capture too"
    assert library.launches == [0]


@pytest.mark.parametrize("answer", [None, "no kernel image is available (cudaErrorNoKernelImageForDevice)"])
def test_the_launch_is_a_constant_to_traced_code(ampere, library, answer):
    if answer is not None:
        library.answers[0] = answer
    chosen = []

    def call(x):
        chosen.append(choose("auto", GPU, torch.float16, OPERATOR))
        return x + 1

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="eager", fullgraph=True, dynamic=False)
    for size in (2, 3):
        compiled(torch.zeros(size))
    assert chosen == ["cuda" if answer is None else "triton"] * 2
    assert library.launches == [0]


def test_what_makes_an_answer_constant_is_torchs_own():
    marks = vars(torch.compiler.assume_constant_result(lambda: None))
    for function in (backends._absence, backends._gpu_refusal):
        assert vars(function) == marks


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"),
        AssertionError("Torch not compiled with CUDA enabled"),
    ],
)
def test_a_gpu_that_is_not_there_is_a_reason(compiled, library, error):
    """Fake tensors can be on one."""

    def fail(device=None):
        raise error

    compiled.setattr(torch.cuda, "get_device_capability", fail)
    first = str(error).partition(". ")[0]
    for name in ("triton", "cuda"):
        assert refusal(name, GPU, torch.float16, OPERATOR) == f"torch has no cuda:0 here: {first}"
        with pytest.raises(RuntimeError, match=f"{name}: torch has no cuda:0 here: {first}"):
            choose(name, GPU, torch.float16, OPERATOR)
    assert choose("auto", GPU, torch.float16, OPERATOR) == "portable"
    assert library.launches == []


def test_emulated_kernels_serve_cpu_tensors_only_by_name(compiled):
    compiled.setitem(backends.CUDA_OPERATORS, "cpu", frozenset([OPERATOR]))
    assert choose("auto", CPU, torch.float16, OPERATOR) == "portable"
    assert choose("cuda", CPU, torch.float16, OPERATOR) == "cuda"
    assert available_backends()["cuda"] is None


def test_choice_is_traced_without_a_break(ampere):
    ampere.setitem(backends.CUDA_OPERATORS, "cpu", frozenset([OPERATOR]))
    chosen = []

    def call(x):
        chosen.extend(choose("auto", GPU, dtype, OPERATOR) for dtype in (torch.float16, torch.float32))
        chosen.append(choose("cuda", x.device, x.dtype, OPERATOR))
        return x + len(chosen)

    torch._dynamo.reset()
    x = torch.zeros(2, dtype=torch.float16)
    assert torch.compile(call, backend="eager", fullgraph=True)(x).tolist() == [3.0, 3.0]
    assert chosen == ["cuda", "triton", "cuda"]


def test_auto_serves_float64_old_gpus_and_other_devices_portably(modern):
    assert choose("auto", GPU, torch.float64, OPERATOR) == "portable"
    assert choose("auto", META, torch.float32, OPERATOR) == "portable"
    modern.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert choose("auto", GPU, torch.float32, OPERATOR) == "portable"
    assert refusal("triton", GPU, torch.float32) == "it needs compute capability (8, 0), cuda:0 has (7, 5)"


def test_interpreter_serves_cpu_tensors_only_by_name(modern):
    modern.setattr(backends, "TRITON_INTERPRETED", True)
    assert choose("auto", CPU, torch.float32, OPERATOR) == "portable"
    assert choose("triton", CPU, torch.float32, OPERATOR) == "triton"


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "reason"),
    [
        ("triton", CPU, torch.float32, "triton: a CPU tensor needs TRITON_INTERPRET=1, set before Python starts"),
        ("triton", GPU, torch.float64, "triton: its kernels take float32, float16 and bfloat16, not torch.float64"),
        ("triton", META, torch.float32, "triton: it has no kernels for device type 'meta'"),
        ("cuda", GPU, torch.float16, "cuda: this installation has no compiled kernels"),
    ],
)
def test_explicit_request_never_falls_back(modern, requested, device, dtype, reason):
    with pytest.raises(RuntimeError, match=f"backend '{requested}' cannot serve") as error:
        choose(requested, device, dtype, OPERATOR)
    assert error.match(reason)
    # Every backend is accounted for, the ones that could have served included.
    assert error.match("portable: available")
    assert all(f"{name}: " in str(error.value) for name in backends.BACKENDS)


def test_default_backend_never_falls_back_either(modern):
    modern.setattr(backends, "DEFAULT_BACKEND", "triton")
    assert choose("auto", GPU, torch.float32, OPERATOR) == "triton"
    assert choose("portable", GPU, torch.float32, OPERATOR) == "portable"
    with pytest.raises(RuntimeError, match="backend 'triton' cannot serve"):
        choose("auto", CPU, torch.float32, OPERATOR)


def test_a_call_beyond_a_backends_limits_goes_to_the_next(modern, library):
    limits = {"triton": "operator: width must be <= 512 there, got 513"}
    assert choose("auto", GPU, torch.float32, OPERATOR, limits) == "portable"
    assert choose("auto", GPU, torch.float32, OPERATOR, {}) == "triton"
    assert choose("portable", GPU, torch.float32, OPERATOR, limits) == "portable"
    modern.setattr(backends, "CUDA_REFUSAL", None)
    modern.setitem(backends.CUDA_OPERATORS, "cuda", frozenset([OPERATOR]))
    assert choose("auto", GPU, torch.float16, OPERATOR, limits) == "cuda"
    assert choose("auto", GPU, torch.float16, OPERATOR, limits | {"cuda": "no"}) == "portable"


@pytest.mark.parametrize("requested", ["triton", "auto"])
def test_a_backend_asked_for_is_an_error_beyond_its_limits(modern, requested):
    limits = {"triton": "operator: width must be <= 512 there, got 513"}
    modern.setattr(backends, "DEFAULT_BACKEND", "triton")
    with pytest.raises(
        ValueError, match=r"^backend 'triton' cannot serve this call: operator: .* <= 512 there, got 513$"
    ):
        choose(requested, GPU, torch.float32, OPERATOR, limits)
    # What the backend cannot serve at all comes first: another size would not help.
    with pytest.raises(RuntimeError, match="its kernels take float32") as caught:
        choose(requested, GPU, torch.float64, OPERATOR, limits)
    assert "width" not in str(caught.value)


def test_a_way_out_is_named_where_only_the_operator_is_missing(compiled):
    limits = {"cuda": "operator: plan 'a' has no kernels there; plan='b' has"}
    with pytest.raises(RuntimeError) as caught:
        choose("cuda", GPU, torch.float16, "adapter_residual", limits)
    assert "; cuda: it has no kernels for adapter_residual; " in str(caught.value)
    assert str(caught.value).endswith(f"; {limits['cuda']}")
    with pytest.raises(RuntimeError, match=r"not torch\.float32; ") as caught:
        choose("cuda", GPU, torch.float32, "adapter_residual", limits)
    assert limits["cuda"] not in str(caught.value)


def _half(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16)


def _lora(**options):
    return pyfused.lora_linear(_half(5, 16), _half(8, 16), _half(4, 16), _half(8, 4), **options)


def _adapter(**options):
    return pyfused.adapter_residual(_half(5, 16), _half(4, 16), None, _half(16, 4), None, **options)


def _attention(tokens: int = 3, heads: int = 2, **options):
    projections = [weight for width in (16, 8, 8, 16) for weight in (_half(16, width), None)]
    return pyfused.cross_attention_residual(
        _half(2, 5, 16), _half(2, tokens, 8), *projections, num_heads=heads, **options
    )


# Operator -> a call of it, and the plans that each backend has.
PLANS = {
    "lora_linear": (_lora, LORA_PLANS),
    "adapter_residual": (_adapter, dict.fromkeys(backends.BACKENDS, ADAPTER_PLANS)),
    "cross_attention_residual": (
        _attention,
        {"portable": ATTENTION_PLANS, "triton": ATTENTION_PLANS, "cuda": ATTENTION_PLANS[:2]},
    ),
}


@pytest.fixture
def everywhere(modern):
    """Every backend would serve CPU tensors; CUDA C++ kernels there are of what has some."""
    modern.setattr(backends, "TRITON_INTERPRETED", True)
    modern.setattr(backends, "CUDA_REFUSAL", None)
    modern.setitem(backends.CUDA_OPERATORS, "cpu", frozenset(PLANS))
    return modern


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    ("operator", "backend", "plan"),
    [
        (operator, backend, plan)
        for operator, (_, plans) in PLANS.items()
        for backend in plans
        for plan in sorted(set().union(*plans.values()))
    ],
)
def test_a_plan_that_a_backend_lacks_is_named_with_one_that_it_has(operator, backend, plan):
    function, plans = PLANS[operator]
    with FakeTensorMode():
        if plan in plans[backend]:
            assert function(plan=plan, backend=backend).dtype == torch.float16
            return
        with pytest.raises((RuntimeError, ValueError)) as caught:
            function(plan=plan, backend=backend)
    assert repr(plan) in str(caught.value)
    assert repr(plans[backend][0]) in str(caught.value)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    ("tokens", "heads", "norm_match", "absorbed"),
    [(77, 2, False, True), (77, 4, False, False), (77, 1, True, True), (77, 2, True, False)],
)
def test_a_plan_chosen_for_the_call_is_named_too(tokens, heads, norm_match, absorbed):
    """H T of 154 and 308, of which 256 would fit; with norms of 77 and 154, of which 128 would."""
    call = {"tokens": tokens, "heads": heads, "norm_match": norm_match}
    with FakeTensorMode():
        with pytest.raises(RuntimeError) as caught:
            _attention(**call, backend="cuda")
        message = str(caught.value)
        assert "; cuda: it has no kernels for projection_residual; " in message
        assert "; cross_attention_residual: " in message
        assert f"plan 'standard' (absorbing costs more with H T = {tokens * heads} columns" in message
        if absorbed:
            assert message.endswith("; plan='absorbed' has, and backend='auto' serves plan 'standard' too")
            _attention(**call, plan="absorbed", backend="cuda")
        else:
            assert message.endswith("; backend='auto' serves it")
            with pytest.raises(ValueError, match="takes at most"):
                _attention(**call, plan="absorbed", backend="cuda")
        _attention(**call, backend="auto")


@pytest.mark.parametrize("name", ["Triton", "cpus", "", None])
def test_unknown_backend(name):
    with pytest.raises(
        ValueError, match=r"backend must be one of \('portable', 'triton', 'cuda', 'cpu', 'auto'\), got"
    ):
        choose(name, CPU, torch.float32, OPERATOR)


@pytest.mark.parametrize(
    ("version", "reason"),
    [("3.5.1", "triton 3.5.1 is older than 3.6"), ("3.6.0", None), ("3.10.0+git1234", None), ("4.0", None)],
)
def test_triton_version(monkeypatch, version, reason):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert backends._triton_refusal() == reason


def test_triton_missing(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert backends._triton_refusal() == "triton is not installed"


def _no_kernels(monkeypatch, tmp_path, error: ImportError) -> None:
    def fail(name):
        assert name == "pyfused._C"
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "choice" / "backends.py"))


def test_missing_kernels_are_explained_by_the_build(monkeypatch, tmp_path):
    _no_kernels(monkeypatch, tmp_path, ModuleNotFoundError("No module named 'pyfused._C'"))
    assert backends._cuda_refusal() == "this installation has no compiled kernels (pyfused._C)"
    (tmp_path / "_C.absent").write_text("nvcc was away\n")
    assert backends._cuda_refusal() == "this installation has no compiled kernels (pyfused._C): nvcc was away"


def test_kernels_that_do_not_load_are_no_error_at_import(monkeypatch, tmp_path):
    _no_kernels(monkeypatch, tmp_path, ImportError("undefined symbol: torch_library_impl"))
    expected = "its compiled kernels (pyfused._C) do not load: undefined symbol: torch_library_impl"
    assert backends._cuda_refusal() == expected


def test_library_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="no_library"):
        backends.load_cuda(tmp_path / "no_library.so")


def test_available_backends_agree_with_what_runs():
    reasons = available_backends()
    assert list(reasons) == list(backends.BACKENDS)
    assert reasons["portable"] is None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, reason in reasons.items():
        there = CPU if name == "cpu" else device
        assert refusal(name, there, torch.float16) == reason
        if reason is None:
            operators = {"cuda": backends.CUDA_OPERATORS[device.type], "cpu": backends.CPU_OPERATORS}.get(
                name, [OPERATOR]
            )
            assert {choose(name, there, torch.float16, operator) for operator in operators} == {name}


def _fresh(code: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYFUSED_BACKEND", *variables)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment | variables, capture_output=True, text=True, timeout=120
    )


def test_environment_is_read_once_at_import():
    code = """
import os, torch, pyfused
from pyfused.choice.backends import choose
cpu = torch.device("cpu")
print(choose("auto", torch.device("cuda"), torch.float32, "lora_linear", {}).backend)
os.environ["PYFUSED_BACKEND"] = "triton"
print(choose("auto", cpu, torch.float32, "lora_linear", {}).backend)
"""
    run = _fresh(code, PYFUSED_BACKEND="portable")
    assert run.stdout.split() == ["portable", "portable"], run.stderr


def test_environment_with_an_unknown_backend():
    code = "from pyfused.choice import backends; print(backends.DEFAULT_BACKEND)"
    assert _fresh(code, PYFUSED_BACKEND="").stdout == "auto\n"
    run = _fresh("import pyfused", PYFUSED_BACKEND="fast")
    assert run.returncode != 0
    assert "ValueError: PYFUSED_BACKEND must be one of" in run.stderr
    assert "got 'fast'" in run.stderr


def test_triton_refuses_cpu_tensors_when_it_is_not_interpreted():
    code = """
import torch, pyfused
x = torch.randn(2, 16)
pyfused.lora_linear(x, torch.randn(8, 16), torch.randn(4, 16), torch.randn(8, 4), backend="triton")
"""
    run = _fresh(code, TRITON_INTERPRET="0")
    assert "RuntimeError: backend 'triton' cannot serve torch.float32 tensors on cpu" in run.stderr
