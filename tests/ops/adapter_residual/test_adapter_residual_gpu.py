"""``adapter_residual`` where only a CUDA device can tell: sizes, devices, streams, graphs."""

from __future__ import annotations

import pytest
import torch
from adapter_residual_cases import check, draw, every_backend, every_plan, sample_scale
from operator_cases import plain_dtype, planned, seed

import pyfused
from pyfused.choice import backends
from pyfused.ops.adapter_residual import MAX_CUDA_HIDDEN, MAX_KERNEL_HIDDEN, PLANS
from pyfused.portable.philox import dropout_

pytestmark = pytest.mark.gpu


def _compare(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within bfloat16's rounding, piece by piece: the tensors fill a good part of the device."""
    assert actual.shape == expected.shape
    actual, expected = actual.flatten().split(1 << 28), expected.flatten().split(1 << 28)
    scale = max(part.abs().max().item() for part in expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.float() - theirs.float()).abs().max().item() <= 2.0**-6 * scale


# Elements of z, the stride of C, and those of h, beyond what 32 bits hold.
LARGE = {
    "rows": ((2, 1_050_000, 1040), 16, -1),
    "channels": ((1, 64, (1 << 25) + 8, 2), 16, 1),
    "hidden": ((2, 4_200_000, 32), 256, -1),
}
every_large = pytest.mark.parametrize("large", LARGE)
every_kernel_plan = planned(dict.fromkeys(("triton", "cuda"), PLANS))


def _large(large: str) -> tuple[dict[str, torch.Tensor], int]:
    shape, hidden, channel_dim = LARGE[large]
    small = [1] * len(shape)
    small[channel_dim] = shape[channel_dim]
    tensors = draw(tuple(small), hidden, torch.bfloat16, channel_dim=channel_dim, device="cuda")
    tensors["z"] = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    return {name: value.requires_grad_() for name, value in tensors.items() if value is not None}, channel_dim


def _run(leaves: dict[str, torch.Tensor], **options) -> list[torch.Tensor]:
    y = pyfused.adapter_residual(**leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), y.detach())]


@every_large
@every_kernel_plan
def test_more_than_2_31_elements(backend, plan, large):
    leaves, channel_dim = _large(large)
    ours = _run(leaves, channel_dim=channel_dim, backend=backend, plan=plan)
    for actual, expected in zip(
        ours, _run(leaves, channel_dim=channel_dim, backend="portable", plan=plan), strict=True
    ):
        _compare(actual, expected)


@every_kernel_plan
def test_dropout_of_more_than_2_31_elements(backend, plan):
    """The last rows against the formula: the mask of all of them would take plain torch minutes."""
    leaves, _ = _large("hidden")
    p, rows = 0.3, 1000
    options = {"skip": 0.5, "activation": "relu", "dropout_p": p, "seed": 7}
    y, dz, *_ = _run(leaves, **options, backend=backend, plan=plan)

    def tail(value: torch.Tensor) -> torch.Tensor:
        return value.detach().flatten(0, -2)[-rows:].float()

    d, d_bias, u, u_bias, gamma = (
        leaves[name].detach().float() for name in ("down_weight", "down_bias", "up_weight", "up_bias", "layer_scale")
    )
    z, dy = tail(leaves["z"]), tail(y)
    h = z @ d.T + d_bias
    keep = dropout_(torch.ones_like(h), seed(7), p, leaves["z"].shape[:-1].numel() - rows)
    _compare(tail(y), z + gamma * (0.5 * z + (keep * h.relu()) @ u.T + u_bias))
    dh = keep * ((dy * gamma) @ u) * (h > 0)
    _compare(tail(dz), dy + 0.5 * gamma * dy + dh @ d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channel_dim", [-1, 1])
@every_kernel_plan
def test_the_widest_hidden_of_each_dtype_fits(backend, plan, channel_dim, dtype):
    dtype = plain_dtype(backend, dtype)
    shape = (3, 100, 640) if channel_dim == -1 else (3, 640, 10, 10)
    widest = MAX_CUDA_HIDDEN if backend == "cuda" else MAX_KERNEL_HIDDEN[dtype.itemsize]
    tensors = draw(shape, widest, dtype, channel_dim=channel_dim)
    check(
        tensors, backend, plan, channel_dim=channel_dim, sample_scale=sample_scale(3, "some"), dropout_p=0.2,
        seed=seed(),
    )  # fmt: skip


@every_plan
def test_many_rows_for_few_weights(backend, plan):
    """The sums over rows are cut into many splits, which are added up in groups: the same bits every time."""
    leaves = {name: v.requires_grad_() for name, v in draw((64, 1000, 24), 8, torch.bfloat16).items() if v is not None}
    first = _run(leaves, sample_scale=sample_scale(64, "some"), backend=backend, plan=plan)
    for _ in range(5):
        again = _run(leaves, sample_scale=sample_scale(64, "some"), backend=backend, plan=plan)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    tensors = {name: value.detach() for name, value in leaves.items()}
    check(tensors | {"residual": None}, backend, plan, sample_scale=sample_scale(64, "some"))


@every_plan
def test_a_device_that_is_not_current(backend, plan):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    tensors = draw((3, 70, 50), 40, torch.bfloat16, residual=torch.float32, device="cuda:1")
    scale, key = sample_scale(3, "some").to("cuda:1"), seed().to("cuda:1")
    with torch.cuda.device(0):
        results = check(tensors, backend, plan, sample_scale=scale, dropout_p=0.3, seed=key)
    assert {value.device for value in results.values()} == {torch.device("cuda:1")}


@every_plan
def test_a_side_stream(backend, plan):
    """The side stream is kept busy: a launch on any other stream would read z before it is written."""
    tensors = draw((4, 512, 256), 64, torch.bfloat16)
    leaves = {name: value.requires_grad_() for name, value in tensors.items() if value is not None}
    expected = _run(leaves, backend=backend, plan=plan)
    z = leaves["z"].detach()
    late = leaves | {"z": torch.zeros_like(z).requires_grad_()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late["z"].data.copy_(z)
        results = _run(late, backend=backend, plan=plan)
    stream.synchronize()
    for actual, value in zip(results, expected, strict=True):
        assert torch.equal(actual, value)


@every_plan
def test_graph_replays_draw_fresh_masks(backend, plan):
    """The seed is drawn inside the graph from the registered generator; both directions use the same one."""
    like = {"dtype": plain_dtype(backend), "device": "cuda"}
    eye = torch.eye(64, **like)
    z = torch.ones(128, 64, **like, requires_grad=True)
    zero = torch.zeros(128, 64, **like)
    scale = torch.ones(128, device="cuda")

    def step():
        y = pyfused.adapter_residual(
            z, eye, None, eye, None, residual=zero, sample_scale=scale, skip=0.0, activation="identity", dropout_p=0.5,
            backend=backend, plan=plan,
        )  # fmt: skip
        (dz,) = torch.autograd.grad(y, z, torch.ones_like(y))
        return y.detach(), dz

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dz = step()
    replays = []
    for start in (11, None, 11):
        if start is not None:
            torch.cuda.manual_seed(start)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, dz)
        assert set(y.unique().tolist()) == {0.0, 2.0}
        replays.append(y.clone())
    assert not torch.equal(replays[0], replays[1])
    assert torch.equal(replays[0], replays[2]), "manual_seed governs the replays"
    # The captured launches read sample_scale anew: samples dropped between replays are dropped.
    scale[::2] = 0.0
    graph.replay()
    torch.cuda.synchronize()
    assert y[::2].count_nonzero() == dz[::2].count_nonzero() == 0
    assert y[1::2].count_nonzero() > 0


@every_backend
def test_dropped_samples_cost_no_synchronisation(backend):
    tensors, scale = draw((8, 64, 48), 12, torch.bfloat16), sample_scale(8, "some")
    leaves = {name: value.requires_grad_() for name, value in tensors.items() if value is not None}
    _run(leaves, sample_scale=scale, dropout_p=0.1, backend=backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _run(leaves, sample_scale=scale, dropout_p=0.1, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_auto_takes_no_backend_beyond_its_width():
    widest = {"portable": 2000, "triton": MAX_KERNEL_HIDDEN[2], "cuda": MAX_CUDA_HIDDEN}
    device = torch.device("cuda")
    refused = {name: backends.refusal(name, device, torch.bfloat16, "adapter_residual") for name in widest}
    for hidden in sorted({16, *(most + more for most in widest.values() for more in (0, 1) if most < 2000)}):
        tensors = draw((64, 64), hidden, torch.bfloat16)
        (call,) = pyfused.explain(pyfused.adapter_residual, **tensors).calls
        able = {name for name in widest if hidden <= widest[name] and refused[name] is None}
        assert call.backend in able
        expected = call.backend
        y = pyfused.adapter_residual(**tensors)
        assert torch.equal(y, pyfused.adapter_residual(**tensors, backend=expected)), (hidden, expected)
