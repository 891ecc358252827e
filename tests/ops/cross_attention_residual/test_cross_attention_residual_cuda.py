"""The CUDA C++ kernels of absorbed ``cross_attention_residual``, against float64 and across devices and schedules."""

from __future__ import annotations

import pytest
import torch
from cross_attention_cases import ABSORBED, check, draw, padding
from operator_cases import cuda_backend, leaves_of, run, seed
from oracle import randn

import pyfused
from pyfused.choice import backends, measured
from pyfused.ops.contract.cuda_limits import cuda_shared_memory
from pyfused.ops.cross_attention_residual import MAX_CUDA_COLUMNS, MAX_CUDA_COLUMNS_MATCHED

pytestmark = cuda_backend

DTYPES = (torch.bfloat16, torch.float16)
TOKENS = (1, 2, 3, 5, 12, 16)
HEADS = (1, 3, 8, 16)
CHANNELS = (64, 20, 76, 200, 41)
BIASES = ("q_bias", "k_bias", "v_bias", "out_bias")
ABSENT = ((), ("q_bias",), (), ("out_bias",), BIASES)
# Capability, multiprocessors, bytes of shared memory in a block.
DEVICES = [(90, 1, 232_448), (90, 1000, 232_448), (86, 1, 101_376), (86, 1000, 101_376)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_tokens_and_heads(backend, tokens, heads):
    """Each number of tokens and heads; the rest rotates."""
    n = 5 * TOKENS.index(tokens) + HEADS.index(heads)
    dtype = DTYPES[(n + n // 5) % 2]
    norm_match = n % 3 == 1 and tokens * heads <= MAX_CUDA_COLUMNS_MATCHED
    mask = (None, "each", "shared")[n // 2 % 3]
    # Where no key is left and no bias either, the norm's derivative is beyond float16: plain torch makes NaN of it.
    absent = () if dtype == torch.float16 and norm_match and mask == "each" else ABSENT[n % 5]
    tensors = draw(
        2, (37, 70)[n % 2], tokens, CHANNELS[n % 5], heads, 16, dtype, context_batch=1 + n % 2, absent=absent,
        weight=("channels", "scalar", None)[n % 3], logits=(1.0, 3.0, 0.05)[n // 3 % 3],
        projections=torch.float32 if n % 4 == 0 else None,
    )  # fmt: skip
    drop = {"dropout_p": 0.2, "seed": seed()} if n % 4 < 2 else {}
    given = {} if "weight" in tensors else {"weight": -0.6}
    key_padding_mask = None if mask is None else padding(2 if mask == "each" else 1, tokens)
    check(
        tensors, backend, ABSORBED[n // 2 % 2], num_heads=heads, norm_match=norm_match,
        key_padding_mask=key_padding_mask, **drop, **given,
    )  # fmt: skip


@pytest.mark.parametrize("norm_match", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("mask", [None, "each", "shared"])
@pytest.mark.parametrize("plan", ABSORBED)
def test_options_beside_each_other(backend, plan, mask, p, norm_match):
    key_padding_mask = None if mask is None else padding(3 if mask == "each" else 1, 3)
    tensors = draw(3, 35, 3, 36, 4, 8, torch.bfloat16, context_batch=3 if mask == "shared" else 1)
    check(
        tensors, backend, plan, num_heads=4, norm_match=norm_match, key_padding_mask=key_padding_mask, dropout_p=p,
        seed=seed(),
    )  # fmt: skip


@pytest.mark.parametrize("logits", [0.01, 2.0, 10.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_any_size(backend, dtype, logits):
    check(draw(2, 40, 6, 36, 4, 16, dtype, logits=logits), backend, ABSORBED[0], num_heads=4)


@pytest.mark.parametrize("norm_match", [False, True])
def test_a_stream_wider_than_the_products(backend, norm_match):
    """Under autocast x stays float32: its own part of the sum is exact."""
    tensors = draw(2, 40, 3, 36, 4, 16, torch.float32)

    def results(chosen):
        leaves = leaves_of(tensors)
        with torch.autocast("cuda" if leaves["x"].is_cuda else "cpu", torch.bfloat16):
            y = pyfused.cross_attention_residual(
                **leaves, num_heads=4, norm_match=norm_match, plan=ABSORBED[0], backend=chosen
            )
        y.backward(randn(*y.shape, seed=99, device=y.device))
        return {"output": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}

    ours, portable = results(backend), results("portable")
    assert ours["output"].dtype == torch.float32
    for name, expected in portable.items():
        if name != "dk_bias" and name != "k_bias":
            assert (ours[name] - expected).norm() <= 2e-2 * expected.norm(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(("tokens", "heads"), [(3, 4), (12, 8), (16, 12)])
def test_every_tile(backend, emulate, tokens, heads, device, dtype):
    """With as many rows and stages as there is room for."""
    emulate(device)
    n = DEVICES.index(device) + heads
    norm_match = n % 2 == 0 and tokens * heads <= MAX_CUDA_COLUMNS_MATCHED
    tensors = draw(2, 75, tokens, 72, heads, 8, dtype, context_batch=1 + n // 2 % 2)
    check(tensors, backend, ABSORBED[n // 2 % 2], num_heads=heads, norm_match=norm_match)


@pytest.mark.parametrize("plan", ABSORBED)
def test_every_schedule_gives_the_same_bits(backend, emulate, plan):
    tensors = draw(2, 70, 5, 76, 3, 16, torch.bfloat16)
    options = {"num_heads": 3, "norm_match": True, "dropout_p": 0.2, "seed": seed(), "plan": plan, "backend": backend}
    first = run(pyfused.cross_attention_residual, tensors, **options)
    for schedule in (0, 1, 2, 3):
        emulate(schedule=schedule)
        for mine, expected in zip(run(pyfused.cross_attention_residual, tensors, **options), first, strict=True):
            assert torch.equal(mine, expected)


def test_limits_are_named(backend):
    def attend(tokens, **options):
        return pyfused.cross_attention_residual(
            **draw(1, 4, tokens, 16, 16, 4, torch.float16), num_heads=16, plan="absorbed", backend=backend, **options
        )

    most, matched = MAX_CUDA_COLUMNS // 16, MAX_CUDA_COLUMNS_MATCHED // 16
    assert attend(most).isfinite().all()
    assert attend(matched, norm_match=True).isfinite().all()
    with pytest.raises(ValueError, match=rf"at most {MAX_CUDA_COLUMNS} columns H T there, got {16 * most + 16}"):
        attend(most + 1)
    with pytest.raises(ValueError, match=f"at most {MAX_CUDA_COLUMNS_MATCHED} columns H T there with norm_match"):
        attend(matched + 1, norm_match=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [4, 8, 16])
def test_what_a_block_needs_of_shared_memory(backend, emulate, monkeypatch, tokens, dtype):
    """Python's formula is the launcher's: on a device with as much it runs, with less it is refused."""
    # Wide enough to take more than the sums over rows.
    channels = 1216
    needed = cuda_shared_memory(16 * tokens, channels, rows=16, float_middle=True)
    tensors = draw(1, 5, tokens, channels, 16, 4, dtype)
    emulate((86, 4, needed))
    check(tensors, backend, ABSORBED[0], num_heads=16)
    emulate((86, 4, needed - 1))
    options = {"num_heads": 16, "plan": ABSORBED[0], "backend": backend}
    with pytest.raises(RuntimeError, match=f"C = 1216 with H T = {16 * tokens} does not fit into the GPU's shared mem"):
        pyfused.cross_attention_residual(**tensors, **options)
    monkeypatch.setattr(backends, "shared_memory", lambda device: needed - 1)
    measured.changed()
    with pytest.raises(ValueError, match=f"take {needed} bytes of shared memory there, a block has {needed - 1}"):
        pyfused.cross_attention_residual(**tensors, **options)


def test_float32_is_refused(backend):
    with pytest.raises(RuntimeError, match=r"its kernels take float16 and bfloat16, not torch\.float32"):
        pyfused.cross_attention_residual(
            **draw(1, 4, 2, 16, 2, 4), num_heads=2, plan="absorbed", backend=backend
        )  # fmt: skip


def test_plan_standard_has_no_kernels(backend):
    tensors = draw(1, 4, 2, 16, 2, 4, torch.float16)
    assert backends.refusal("cuda", tensors["x"].device, torch.float16, "projection_residual") is not None
    with pytest.raises(RuntimeError, match="it has no kernels for projection_residual"):
        pyfused.cross_attention_residual(**tensors, num_heads=2, plan="standard", backend=backend)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_rows(backend, shape):
    tensors = draw(*shape, 3, 20, 4, 8, torch.float16, context_batch=1)
    y, *gradients = run(pyfused.cross_attention_residual, tensors, num_heads=4, plan="absorbed", backend=backend)
    assert y.shape == tensors["x"].shape
    assert all(not gradient.any() for gradient in gradients)
