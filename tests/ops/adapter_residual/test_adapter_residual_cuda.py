"""The CUDA C++ kernels of ``adapter_residual`` where the tests of every backend do not reach."""

from __future__ import annotations

import pytest
import torch
from adapter_residual_cases import FORMATS, check, check_drawn, draw, image, sample_scale
from operator_cases import DEVICE, cuda_backend, leaves_of, run, seed
from oracle import randn

import pyfused
from pyfused.choice import backends
from pyfused.ops.adapter_residual import ACTIVATIONS, MAX_CUDA_HIDDEN, PLANS
from pyfused.ops.contract.cuda_limits import cuda_shared_memory
from pyfused.portable.philox import dropout_

pytestmark = cuda_backend

DTYPES = (torch.bfloat16, torch.float16)
# At and around the widths that the kernels are compiled for.
HIDDEN = (1, 8, 17, 64, 65, 128, 200, 256)
CHANNELS = (76, 20, 129, 64, 1, 40, 100)
# Capability, multiprocessors, bytes of shared memory in a block. Few multiprocessors make the tiles of rows tall and
# the sums' parts few, many the other way round.
DEVICES = {
    f"sm_{capability}, {multiprocessors} multiprocessors": (capability, multiprocessors, shared_memory)
    for capability, shared_memory in ((90, 232_448), (86, 101_376))
    for multiprocessors in (1, 1000)
}


@pytest.mark.parametrize("layout", [(7, "rows"), (7, "NCHW"), (8, "NCHW"), (7, "channels_last")], ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_every_width(backend, hidden, layout):
    side, layout = layout
    n = HIDDEN.index(hidden) + 9 * FORMATS.index(layout) + 5 * (side == 8)
    dtype = DTYPES[(n + n // 8) % 2]
    options = {
        "dtype": dtype,
        "layout": layout,
        "plan": PLANS[n // 2 % 2],
        "activation": ACTIVATIONS[n % 7],
        "skip": (1.0, -0.5, 0.0)[n % 3],
        "layer_scale": ("channels", None, "scalar")[n // 2 % 3],
        "drop": (None, "some", "kept")[(n + n // 3) % 3],
        "bias": n % 4 != 0,
        "p": (0.0, 0.3)[n // 3 % 2],
        "residual": (None, torch.float32, dtype, DTYPES[n % 2])[(n + n // 4) % 4],
        "adapters": (None, torch.float32)[(n + n // 4) % 2],
    }
    check_drawn(*image(side, CHANNELS[n % 7], layout), hidden, backend, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("hidden", [20, 100, 190])
def test_every_tile(backend, emulate, hidden, device, dtype):
    """With as many stages as there is room for: on the smaller devices the rows of z leave little."""
    emulate(DEVICES[device])
    n = hidden // 90 + list(DEVICES).index(device)
    channels = 400 if DEVICES[device][2] < 200_000 else 72
    check(
        draw((2, 67, channels), hidden, dtype, residual=(None, torch.float32)[n // 2 % 2]), backend,
        PLANS[n % 2], sample_scale=sample_scale(2, "some" if n % 3 == 0 else "kept"), dropout_p=0.2, seed=seed(),
    )  # fmt: skip


@pytest.mark.parametrize("hidden", HIDDEN)
def test_what_a_block_needs_of_shared_memory(backend, emulate, hidden):
    """Python's formula is the launcher's: on a device with as much it runs, with less it is refused."""
    # Wide enough to take more than the sums over rows.
    channels = 703
    needed = cuda_shared_memory(hidden, channels, rows=32)
    tensors = draw((3, channels), hidden, torch.float16)
    emulate((86, 4, needed))
    check(tensors, backend)
    emulate((86, 4, needed - 1))
    with pytest.raises(RuntimeError, match=f"C = 703 with h = {hidden} does not fit into the GPU's shared memory of "):
        pyfused.adapter_residual(**tensors, backend=backend)


def test_limits_are_named(backend, monkeypatch):
    refused = r"^backend 'cuda' cannot serve this call: adapter_residual: "
    tensors = draw((5, 18), MAX_CUDA_HIDDEN + 1, torch.float16)
    with pytest.raises(ValueError, match=refused + r"down_weight \(h, C\) must have h <= 256 .*, got h = 257$"):
        pyfused.adapter_residual(**tensors, backend=backend)
    tensors = draw((5, 203), 100, torch.float16)
    there = cuda_shared_memory(100, 203, rows=32) - 1
    monkeypatch.setattr(backends, "shared_memory", lambda device: there)
    with pytest.raises(ValueError, match=refused + f".* C = 203 .* h = 100 take {there + 1} bytes .* has {there}$"):
        pyfused.adapter_residual(**tensors, backend=backend)


def test_float32_is_refused(backend):
    with pytest.raises(RuntimeError, match=r"cuda: its kernels take float16 and bfloat16, not torch\.float32"):
        pyfused.adapter_residual(**draw((5, 18), 7), backend=backend)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("hidden", [40, 100])
def test_same_bits_under_every_schedule(backend, emulate, hidden, plan):
    tensors = draw((3, 70, 5, 9), hidden, torch.bfloat16, residual=torch.float32, channel_dim=1)
    options = {"sample_scale": sample_scale(3, "some"), "dropout_p": 0.2, "seed": 5, "channel_dim": 1, "plan": plan}
    runs = []
    for schedule in (0, 0, 1, 2, 2**63 + 1):
        emulate(schedule=schedule)
        runs.append(run(pyfused.adapter_residual, tensors, **options, backend=backend))
    for again in runs[1:]:
        for first, value in zip(runs[0], again, strict=True):
            assert torch.equal(first, value)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("width", [5, 64, 100, 200])
def test_the_mask_is_philoxs(backend, width, p):
    """Identities for both weights: y and dz are the mask itself, that of every backend."""
    z = torch.ones(3, 23, width, dtype=torch.float16, device=DEVICE, requires_grad=True)
    eye = torch.eye(width, dtype=z.dtype, device=DEVICE)
    y = pyfused.adapter_residual(
        z, eye, None, eye, None, residual=torch.zeros_like(z), skip=0.0, activation="identity", dropout_p=p,
        seed=seed(), backend=backend,
    )  # fmt: skip
    y.backward(torch.ones_like(y))
    mask = dropout_(torch.ones(69, width, dtype=z.dtype, device=DEVICE), seed(), p).view_as(y)
    assert torch.equal(y, mask)
    assert torch.equal(z.grad, mask)


def _within_nan(x: torch.Tensor, dim: int, margin: int) -> torch.Tensor:
    """x with NaN behind each stretch of ``dim`` and behind the last of them."""
    shape = list(x.shape)
    shape[dim] += margin
    order = [i for i in range(x.dim()) if i != dim % x.dim()] + [dim % x.dim()]
    storage = torch.full([shape[i] for i in order], torch.nan, dtype=x.dtype, device=x.device)
    storage = storage.permute([order.index(i) for i in range(x.dim())])
    return storage.narrow(dim, 0, x.shape[dim]).copy_(x)


# Stretches that 16 bytes at a time can be read of, and such that cannot.
@pytest.mark.parametrize("margin", [4, 7])
@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize("plan", PLANS)
def test_what_lies_behind_the_inputs_is_not_read(backend, plan, channel_dim, margin):
    """Nor does it matter: the same bits as without. Plain torch's own products read it."""
    shape = (2, 37, 76) if channel_dim == -1 else (2, 76, 36)
    tensors = draw(shape, 20, torch.bfloat16, residual=torch.bfloat16, channel_dim=channel_dim)
    wide = tensors | {
        name: _within_nan(tensors[name], -1, margin) for name in ("z", "residual", "down_weight", "up_weight")
    }
    for name in ("down_bias", "up_bias", "layer_scale"):
        wide[name] = torch.stack([tensors[name], torch.full_like(tensors[name], torch.nan)], -1)[:, 0]
    options = {"sample_scale": sample_scale(2, "kept"), "dropout_p": 0.3, "seed": seed(), "channel_dim": channel_dim}
    dy = randn(*shape, dtype=torch.bfloat16, seed=8, device=DEVICE)
    runs = []
    for given, cotangent in ((tensors, dy), (wide, _within_nan(dy, -1, margin))):
        leaves = leaves_of(given)
        y = pyfused.adapter_residual(**leaves, **options, plan=plan, backend=backend)
        runs.append((y, *torch.autograd.grad(y, list(leaves.values()), cotangent)))
    for expected, actual in zip(*runs, strict=True):
        assert torch.equal(actual, expected)


def test_dropped_samples_read_no_weight(backend):
    """Nor h: their tiles are copies, whatever the weights hold."""
    tensors = leaves_of(draw((3, 70, 40), 20, torch.float16))
    with torch.no_grad():
        for name in ("down_weight", "down_bias", "up_weight", "up_bias"):
            tensors[name].fill_(torch.nan)
    y = pyfused.adapter_residual(**tensors, sample_scale=sample_scale(3, "all"), backend=backend)
    assert torch.equal(y, tensors["z"])
    dy = randn(*y.shape, dtype=y.dtype, device=DEVICE)
    y.backward(dy)
    assert torch.equal(tensors["z"].grad, dy)
    for name in ("down_weight", "down_bias", "up_weight", "up_bias"):
        assert tensors[name].grad.eq(0).all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_gates_of_every_dtype(backend, dtype):
    tensors = draw((4, 9, 20), 34, torch.float16, residual=torch.float32)
    tensors["layer_scale"] = tensors["layer_scale"].to(dtype)
    check(tensors, backend, sample_scale=sample_scale(4, "some", dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_stay_in_their_row(backend, dtype):
    tensors = draw((70, 20), 19, dtype)
    expected = pyfused.adapter_residual(**tensors, backend=backend)
    tensors["z"][5, 7] = torch.inf
    y = pyfused.adapter_residual(**tensors, backend=backend)
    assert not y[5].isfinite().any()
    others = torch.arange(70, device=DEVICE) != 5
    assert torch.equal(y[others], expected[others])
