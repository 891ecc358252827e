"""``lora_linear`` where only a CUDA device can tell: sizes, devices, streams, graphs, TF32."""

from __future__ import annotations

import pytest
import torch
from lora_linear_cases import check, draw, every_plan
from operator_cases import every_backend, plain_dtype, planned, seed

import pyfused
from pyfused import reference
from pyfused.choice.backends import refusal
from pyfused.ops.lora_linear import PLANS
from pyfused.portable.philox import dropout_

pytestmark = pytest.mark.gpu


def _compare(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within bfloat16's rounding, piece by piece: the tensors fill a good part of the device."""
    assert actual.shape == expected.shape
    actual, expected = actual.flatten().split(1 << 28), expected.flatten().split(1 << 28)
    scale = max(part.abs().max().item() for part in expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.float() - theirs.float()).abs().max().item() <= 2.0**-6 * scale


def _large(large: str) -> tuple[dict[str, torch.Tensor], int]:
    shape, n, channel_dim = LARGE[large]
    tensors = draw((1, 1, shape[channel_dim]), n, 16, torch.bfloat16, device="cuda")
    tensors["x"] = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    return {name: value.requires_grad_(name != "weight") for name, value in tensors.items()}, channel_dim


def _run(leaves: dict[str, torch.Tensor], **options) -> list[torch.Tensor]:
    y = pyfused.lora_linear(**leaves, **options)
    gradients = torch.autograd.grad(y, [leaves[name] for name in ("x", "lora_a", "lora_b")], y.detach())
    return [y.detach(), *gradients]


# Elements of x, of y, and the stride of K beyond what 32 bits hold.
LARGE = {
    "x": ((2_100_000, 1040), 48, -1),
    "y": ((2_100_000, 48), 1040, -1),
    "channels": ((1, 64, (1 << 26) + 8), 16, 1),
}
every_large = pytest.mark.parametrize("large", LARGE)
every_kernel_plan = planned({backend: PLANS[backend] for backend in ("triton", "cuda")})


@every_large
@every_kernel_plan
def test_more_than_2_31_elements(backend, plan, large):
    leaves, channel_dim = _large(large)
    ours = _run(leaves, channel_dim=channel_dim, backend=backend, plan=plan)
    for actual, expected in zip(ours, _run(leaves, channel_dim=channel_dim, backend="portable"), strict=True):
        _compare(actual, expected)


@every_large
@every_kernel_plan
def test_dropout_of_more_than_2_31_elements(backend, plan, large):
    """The last rows against the formula: the mask of all of them would take plain torch minutes."""
    leaves, channel_dim = _large(large)
    p, rows = 0.3, 1000
    y, dx, _, _ = _run(leaves, channel_dim=channel_dim, dropout_p=p, seed=7, backend=backend, plan=plan)

    def tail(value: torch.Tensor) -> torch.Tensor:
        by_row = value.detach().movedim(channel_dim, -1)
        return by_row.narrow(-2, by_row.shape[-2] - rows, rows).reshape(rows, -1).float()

    weight, a, b, bias = (leaves[name].detach().float() for name in ("weight", "lora_a", "lora_b", "bias"))
    x, dy = tail(leaves["x"]), tail(y)
    first = leaves["x"].numel() // x.shape[1] - rows
    keep = dropout_(torch.ones_like(x), seed(7), p, first)
    _compare(tail(y), x @ weight.T + bias + (x * keep) @ a.T @ b.T)
    _compare(tail(dx), dy @ weight + keep * (dy @ b @ a))


@every_plan
def test_a_device_that_is_not_current(backend, plan):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    tensors = {name: value.to("cuda:1") for name, value in draw((70, 50), 90, 16, torch.bfloat16).items()}
    with torch.cuda.device(0):
        results = check(tensors, backend, plan, dropout_p=0.3, seed=seed().to("cuda:1"))
    assert {value.device for value in results.values()} == {torch.device("cuda:1")}


@every_plan
def test_a_side_stream(backend, plan):
    """The side stream is kept busy: a launch on any other stream would read x before it is written."""
    tensors = draw((512, 256), 384, 16, torch.bfloat16)
    expected = pyfused.lora_linear(**tensors, backend=backend, plan=plan)
    late = tensors | {"x": torch.zeros_like(tensors["x"])}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late["x"].copy_(tensors["x"])
        y = pyfused.lora_linear(**late, backend=backend, plan=plan)
    stream.synchronize()
    assert torch.equal(y, expected)


@every_plan
def test_graph_replays_draw_fresh_masks(backend, plan):
    """The seed is drawn inside the graph from the registered generator; both directions use the same one."""
    eye = torch.eye(64, dtype=plain_dtype(backend), device="cuda")
    x = torch.ones(128, 64, dtype=eye.dtype, device="cuda", requires_grad=True)

    def step():
        y = pyfused.lora_linear(x, torch.zeros_like(eye), eye, eye, dropout_p=0.5, backend=backend, plan=plan)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        return y.detach(), dx

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = step()
    replays = []
    for start in (11, None, 11):
        if start is not None:
            torch.cuda.manual_seed(start)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, dx)
        assert set(y.unique().tolist()) == {0.0, 2.0}
        replays.append(y.clone())
    assert not torch.equal(replays[0], replays[1])
    assert torch.equal(replays[0], replays[2]), "manual_seed governs the replays"


@every_backend
def test_float32_follows_the_tf32_setting(backend):
    if backend == "cuda":
        pytest.skip("its kernels take float16 and bfloat16")
    tensors = draw((300, 768), 256, 16)
    exact = reference.lora_linear(**{name: value.double() for name, value in tensors.items()})
    previous = torch.backends.cuda.matmul.allow_tf32
    errors = {}
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            y = pyfused.lora_linear(**tensors, backend=backend)
            errors[allowed] = ((y - exact).norm() / exact.norm()).item()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = previous
    assert errors[False] < 2e-6
    assert 1e-5 < errors[True] < 2e-3


@pytest.mark.parametrize(("x_shape", "out_features"), [((64, 64), 64), ((300, 768), 2304)])
def test_auto_gives_the_bits_of_the_backend_that_explain_names(x_shape, out_features):
    """Which one depends on the GPU and on what was measured there."""
    tensors = draw(x_shape, out_features, 16, torch.bfloat16)
    (call,) = pyfused.explain(pyfused.lora_linear, **tensors).calls
    assert torch.equal(pyfused.lora_linear(**tensors), pyfused.lora_linear(**tensors, backend=call.backend))
    assert refusal(call.backend, tensors["x"].device, torch.bfloat16, "lora_linear") is None
