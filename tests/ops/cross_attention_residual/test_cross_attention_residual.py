"""``cross_attention_residual`` against float64: output and every gradient, on every backend and plan present."""

from __future__ import annotations

import itertools

import pytest
import torch
from cross_attention_cases import (
    ABSORBED,
    EVERY,
    EVERY_ABSORBED,
    check,
    draw,
    every_absorbed_plan,
    every_plan,
    padding,
)
from operator_cases import DEVICE, LAYOUTS, cast, far_apart, leaves_of, rotated, run, seed
from oracle import cotangent, randn

import pyfused
from pyfused import reference
from pyfused.ops.cross_attention_residual import PLANS

TOKENS = (1, 2, 3, 12, 77, 1232)
HEADS = (1, 8, 12, 16)
WIDTHS = (32, 64, 96)
LENGTHS = (1, 77, 1370)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BIASES = ("q_bias", "k_bias", "v_bias", "out_bias")
ABSENT = ((), ("q_bias",), (), ("out_bias",), (), ("k_bias", "v_bias"), BIASES)
WEIGHTS = ("channels", "scalar", None)
LOGITS = (1.0, 3.0, 0.05)


def _mask(kind: str | None, batch: int, tokens: int):
    return None if kind is None else padding(batch if kind == "each" else 1, tokens)


def _check(batch, length, tokens, heads, width, backend, plan, n, **drawn):
    """One case; what is not given rotates with ``n``."""
    dtype = drawn["dtype"]
    # In the absorbed plans the norm costs the square of the columns.
    norm_match = bool(n // 3 % 2) and (plan == "standard" or heads * tokens <= 2048)
    p = 0.2 if plan in ABSORBED and n % 3 == 1 else 0.0
    mask, absent = (None, "each", "shared")[n // 4 % 3], ABSENT[n % 7]
    if dtype == torch.float16 and norm_match and mask == "each":
        # Where no key is left c would be 0 and the derivative |x| / eps beyond float16: plain torch makes NaN of it.
        absent = ()
    tensors = draw(
        batch, length, tokens, heads=heads, width=width, context_batch=batch if n % 2 else 1, absent=absent,
        weight=WEIGHTS[n % 3], logits=LOGITS[(n // 2) % 3],
        projections=torch.float32 if dtype.itemsize == 2 and n % 5 < 2 else None, **drawn,
    )  # fmt: skip
    options = {} if "weight" in tensors else {"weight": -0.6}
    return check(
        tensors, backend, plan, num_heads=heads, norm_match=norm_match, normalize_context=n % 5 == 3,
        key_padding_mask=_mask(mask, batch, tokens), dropout_p=p,
        **({"seed": seed()} if p else {}), **options,
    )  # fmt: skip


def _grid():
    """Every (plan, T, H), but of the longest contexts every other H; the rest rotates."""
    for n, (plan, tokens, heads) in enumerate(itertools.product(PLANS, TOKENS, HEADS)):
        if tokens == TOKENS[-1] and n % 2:
            continue
        # What does not fit the time of a test takes a shorter L.
        lengths = [length for length in LENGTHS if length * tokens * heads <= 1 << 17]
        length = lengths[(n + n // 4) % len(lengths)]
        dtype, width = DTYPES[(n + n // 4 + n // 24) % 4], WIDTHS[(n + n // 3) % 3]
        name = f"{plan}-T{tokens}-H{heads}-d{width}-L{length}-{str(dtype)[6:]}"
        yield pytest.param(plan, tokens, heads, width, length, dtype, n, id=name)


@pytest.mark.parametrize(("plan", "tokens", "heads", "width", "length", "dtype", "n"), list(_grid()))
def test_portable_grid(plan, tokens, heads, width, length, dtype, n):
    batch = max(1, min(3, (1 << 17) // (length * tokens * heads)))
    results = _check(
        batch, length, tokens, heads, width, "portable", plan, n,
        dtype=dtype, channels=(48, 64)[n % 2], context_channels=(64, 40)[n // 2 % 2],
    )  # fmt: skip
    assert results["output"].is_contiguous()


# (T, H): H T padded to a power of two each takes one block of columns, or three; rows and C are two tiles and a tail.
COLUMNS = ((3, 5), (1, 16), (12, 3), (2, 1), (5, 8))


@pytest.mark.sanitize
@rotated(EVERY, columns=COLUMNS, dtype=DTYPES[:3])
def test_several_tiles_and_a_tail(backend, plan, dtype, columns):
    tokens, heads = columns
    n = COLUMNS.index((tokens, heads)) + 5 * DTYPES.index(dtype) + 15 * PLANS.index(plan)
    _check(2, 37, tokens, heads, 24, backend, plan, n, dtype=dtype, channels=41, context_channels=28)


@rotated(
    EVERY_ABSORBED, mask=(None, "each", "shared"), match=((0.3, True), (0.0, True), (0.3, False), (0.0, False))
)  # fmt: skip
def test_options_beside_each_other(backend, plan, mask, match):
    p, norm_match = match
    weight = WEIGHTS[((None, "each", "shared").index(mask) + norm_match + (p > 0.0)) % 3]
    tensors = draw(3, 35, 3, 36, 4, 8, weight=weight, context_batch=3 if mask == "shared" else 1)
    check(
        tensors, backend, plan, num_heads=4, norm_match=norm_match, key_padding_mask=_mask(mask, 3, 3), dropout_p=p,
        seed=seed(),
    )  # fmt: skip


@rotated(EVERY, dtype=DTYPES[1:3], norm_match=(False, True))
def test_float32_projections_beside_16_bits(backend, plan, dtype, norm_match):
    length = 700 if backend == "portable" else 40
    tensors = draw(2, length, 3, 36, 4, 16, dtype, projections=torch.float32, weight="channels")
    results = check(tensors, backend, plan, num_heads=4, norm_match=norm_match)
    assert results["output"].dtype == dtype
    assert results["dq_weight"].dtype == results["dout_bias"].dtype == torch.float32


@rotated(EVERY, dtype=DTYPES[:3], logits=(10.0, 0.01, 2.0))
def test_logits_of_any_size(backend, plan, dtype, logits):
    tensors = draw(2, 40, 6, 36, 4, 16, dtype, logits=logits)
    q, k = tensors["x"] @ tensors["q_weight"].T, tensors["context"] @ tensors["k_weight"].T
    size = (q[..., :16].double() @ k[..., :16].double().mT / 4).std().item()
    assert logits / 2 < size < 2 * logits
    check(tensors, backend, plan, num_heads=4)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("batch", "length", "channels", "heads", "width", "tokens"),
    [(1, 1, 1, 1, 1, 1), (1, 1, 3, 1, 2, 5), (2, 33, 1, 3, 1, 2), (0, 5, 6, 2, 3, 2), (3, 0, 5, 2, 2, 3)],
    ids=str,
)
@pytest.mark.parametrize("norm_match", [False, True])
@every_plan
def test_smallest_shapes(backend, plan, norm_match, batch, length, channels, heads, width, tokens):
    tensors = draw(batch, length, tokens, channels, heads, width, torch.float16, context_batch=1, weight="scalar")
    check(tensors, backend, plan, num_heads=heads, norm_match=norm_match)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if LAYOUTS[name]().dim() == 3])
@every_plan
def test_layouts_of_x(backend, plan, name):
    x = cast(LAYOUTS[name](), torch.bfloat16)
    tensors = draw(*x.shape[:2], 3, 20, 4, 8, torch.bfloat16, context_batch=1 if x.shape[0] == 0 else None) | {"x": x}
    results = check(tensors, backend, plan, num_heads=4, norm_match=True, key_padding_mask=_mask("shared", 1, 3))
    assert results["output"].is_contiguous()


STRIDED = {
    "context permuted": ("context", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)),
    "context every other column": ("context", lambda t: t.repeat_interleave(2, dim=2)[..., ::2]),
    "context expanded": ("context", lambda t: t[:1].expand_as(t)),
    "q_weight transposed": ("q_weight", lambda w: w.t().contiguous().t()),
    "out_weight expanded": ("out_weight", lambda w: w[:1].expand_as(w)),
    "out_bias every other element": ("out_bias", lambda b: b.repeat_interleave(2)[::2]),
    "weight every other element": ("weight", lambda w: w.repeat_interleave(2)[::2]),
    "weight expanded": ("weight", lambda w: w[:1].expand_as(w)),
    "weight of one element": ("weight", lambda w: w[:1].clone()),
}


@pytest.mark.parametrize("case", STRIDED)
@every_plan
def test_strided_context_and_parameters(backend, plan, case):
    tensors, (name, restride) = draw(2, 9, 3, 20, 4, 8, context_channels=12), STRIDED[case]
    tensors[name] = restride(tensors[name])
    check(tensors, backend, plan, num_heads=4, norm_match=True)


@pytest.mark.usefixtures("overflow_checked")
@every_plan
def test_offsets_beyond_32_bits(backend, plan):
    """The elements of x lie over 2**31 elements apart."""
    if DEVICE != "cpu":
        pytest.skip("sparse memory is the host's")
    far = 2**27
    batch, length, strides = (35, 1, (far, 20, 1)) if plan == "absorbed" else (1, 35, (0, far, 1))
    tensors = draw(batch, length, 3, 20, 2, 8, torch.float16, context_batch=1)
    tensors["x"] = far_apart(tensors["x"], strides)
    check(tensors, backend, plan, num_heads=2, norm_match=True)


@rotated(EVERY, dtype=DTYPES[:3], norm_match=(True, False))
def test_a_sample_without_any_key_gets_out_bias_alone(backend, plan, dtype, norm_match):
    tensors = draw(3, 17, 5, 20, 2, 8, dtype, weight="scalar", context_batch=1)
    mask = padding(3, 5)
    assert mask.all(1).tolist() == [False, False, True]
    options = {"num_heads": 2, "norm_match": norm_match, "key_padding_mask": mask}
    results = check(tensors, backend, plan, **options)
    for name, value in results.items():
        assert value.isfinite().all(), name
    c = tensors["out_bias"].double().expand(17, 20)
    if norm_match:
        c = c * tensors["x"][2].double().norm(dim=-1, keepdim=True) / (c.norm(dim=-1, keepdim=True) + 1e-6)
    expected = tensors["x"][2].double() + tensors["weight"].double() * c
    torch.testing.assert_close(results["output"][2], expected.to(dtype))
    # Without a bias nothing is left: x itself comes back, and its gradient is the output's.
    leaves = leaves_of(tensors | {"out_bias": None})
    y = pyfused.cross_attention_residual(**leaves, **options, backend=backend, plan=plan)
    assert torch.equal(y[2], tensors["x"][2])
    dy = cotangent(y)
    gradients = torch.autograd.grad(y, [leaf for leaf in leaves.values() if leaf is not None], dy)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert torch.equal(gradients[0][2], dy[2])


@rotated(EVERY, zero=("x", "attention"), eps=(0.0, 1e-6))
def test_a_norm_of_zero_has_gradient_zero(backend, plan, eps, zero):
    tensors = draw(2, 35, 3, 20, 4, 8, absent=("out_bias",) if zero == "attention" else (), weight="scalar")
    if zero == "x":
        tensors["x"][0] = 0.0
    else:
        tensors["out_weight"].zero_()
    results = check(tensors, backend, plan, num_heads=4, norm_match=True, eps=eps)
    for name, value in results.items():
        assert value.isfinite().all(), name
    rows = slice(0, 1) if zero == "x" else slice(None)
    assert torch.equal(results["output"][rows], tensors["x"][rows]), "0 |x| / eps, or c 0 / |c|"


@pytest.mark.parametrize("norm_match", [False, True])
@every_absorbed_plan
def test_dropout_draws_one_mask_whatever_the_plan_and_the_backend(backend, plan, norm_match):
    tensors = draw(2, 17, 3, 20, 3, 8)
    options = {"num_heads": 3, "norm_match": norm_match, "dropout_p": 0.4, "seed": 2**40 + 7}
    ours = run(pyfused.cross_attention_residual, tensors, plan=plan, backend=backend, **options)
    options["seed"] = torch.tensor([options["seed"]], device=DEVICE)
    for actual, expected in zip(ours, run(reference.cross_attention_residual, tensors, **options), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    seeded = run(pyfused.cross_attention_residual, tensors, plan="auto", backend=backend, **options)
    torch.testing.assert_close(seeded[0], ours[0])
    assert not torch.equal(run(pyfused.cross_attention_residual, tensors, **(options | {"seed": 8}))[0], ours[0])


@every_plan
def test_dropout_acts_in_training_only(backend, plan):
    tensors = draw(2, 17, 3, 20, 4, 8)
    options = {"num_heads": 4, "plan": plan, "backend": backend}
    plain = pyfused.cross_attention_residual(**tensors, **options)
    assert torch.equal(pyfused.cross_attention_residual(**tensors, **options, dropout_p=0.5, training=False), plain)
    assert not torch.equal(pyfused.cross_attention_residual(**tensors, **options, dropout_p=0.5), plain)


@every_plan
def test_dropout_without_a_seed_follows_torchs_generator_and_is_the_same_in_backward(backend, plan):
    """Under one mask the branch is linear in v: it equals its own derivative along v."""
    tensors = draw(2, 17, 3, 20, 4, 8, absent=("v_bias", "out_bias"), weight="channels")
    ys = []
    for _ in range(2):
        torch.manual_seed(11)
        leaves = leaves_of(tensors, ("v_weight",))
        y = pyfused.cross_attention_residual(**leaves, num_heads=4, dropout_p=0.5, plan=plan, backend=backend)
        dy = cotangent(y)
        (gradient,) = torch.autograd.grad(y, leaves["v_weight"], dy)
        torch.testing.assert_close((gradient * tensors["v_weight"]).sum(), (dy * (y - tensors["x"])).sum())
        ys.append(y.detach())
    assert torch.equal(*ys)
    again = pyfused.cross_attention_residual(**tensors, num_heads=4, dropout_p=0.5, plan=plan, backend=backend)
    assert not torch.equal(again, ys[0])


@rotated(EVERY, columns=((1, 3), (3, 5), (7, 6)), norm_match=(True, False))
def test_plans_agree(backend, plan, columns, norm_match):
    tokens, heads = columns
    tensors = draw(2, 17, tokens, 20, heads, 8, context_channels=12)
    options = {"num_heads": heads, "norm_match": norm_match, "key_padding_mask": padding(2, tokens)}
    expected = run(pyfused.cross_attention_residual, tensors, plan="standard", backend="portable", **options)
    actual = run(pyfused.cross_attention_residual, tensors, plan=plan, backend=backend, **options)
    for mine, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", [None, "each", "shared"])
@every_plan
def test_a_context_of_batch_1_is_the_expanded_one(backend, plan, mask):
    tensors = draw(3, 17, 4, 20, 2, 8, context_batch=1)
    options = {"num_heads": 2, "norm_match": True, "normalize_context": True, "plan": plan, "backend": backend}
    options["key_padding_mask"] = _mask(mask, 3, 4)
    shared = run(pyfused.cross_attention_residual, tensors, **options)
    expanded = tensors | {"context": tensors["context"].expand(3, -1, -1).contiguous()}
    each = list(run(pyfused.cross_attention_residual, expanded, **options))
    each[2] = each[2].sum(0, keepdim=True)
    for actual, expected in zip(shared, each, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@every_plan
def test_the_order_of_the_context_does_not_matter(backend, plan):
    tensors, order = draw(2, 17, 7, 20, 2, 8), torch.randperm(7, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    mask = padding(2, 7)
    options = {"num_heads": 2, "norm_match": True, "plan": plan, "backend": backend}
    expected = list(run(pyfused.cross_attention_residual, tensors, key_padding_mask=mask, **options))
    permuted = tensors | {"context": tensors["context"][:, order]}
    actual = run(pyfused.cross_attention_residual, permuted, key_padding_mask=mask[:, order], **options)
    expected[2] = expected[2][:, order]
    for mine, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@every_plan
def test_matched_norms(backend, plan):
    """|c^| is |x|, and neither a larger output projection nor the gradient into c sees c's length."""
    tensors = draw(2, 17, 3, 20, 4, 8, torch.float32, absent=("out_bias",))
    tensors["weight"] = torch.tensor(1.0, device=DEVICE)
    options = {"num_heads": 4, "norm_match": True, "plan": plan, "backend": backend}
    y, *gradients = run(pyfused.cross_attention_residual, tensors, **options)
    norms = [value.norm(dim=-1) for value in (y - tensors["x"], tensors["x"])]
    torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-4)
    larger = pyfused.cross_attention_residual(**(tensors | {"out_weight": 3 * tensors["out_weight"]}), **options)
    torch.testing.assert_close(larger, y, rtol=1e-4, atol=1e-4)
    names = [name for name, value in tensors.items() if value is not None]
    d_out = gradients[names.index("out_weight")]
    assert (d_out * tensors["out_weight"]).sum().abs() < 1e-4 * d_out.norm() * tensors["out_weight"].norm()
    assert gradients[names.index("k_bias")].norm() < 1e-4 * gradients[names.index("v_bias")].norm()


@every_absorbed_plan
def test_rows_in_several_blocks(backend, plan, monkeypatch):
    if backend != "portable":
        pytest.skip("its tiles are many anyway")
    from pyfused.portable import cross_attention_residual as portable

    for block in (20 * 16, 20 * 90):
        # Blocks of part of a sample, then of two samples; the last one is shorter.
        monkeypatch.setattr(portable, "_CPU_BLOCK", block)
        monkeypatch.setattr(portable, "_BLOCK", block)
        for context_batch, mask in ((1, None), (3, "each"), (1, "each")):
            tensors = draw(3, 41, 3, 20, 4, 8, context_batch=context_batch)
            check(
                tensors, backend, plan, num_heads=4, norm_match=True, key_padding_mask=_mask(mask, 3, 3), dropout_p=0.3,
                seed=seed(),
            )  # fmt: skip


def test_reference_is_the_formula():
    """The oracle itself, against the formula written with loops over heads and samples, and torch's own attention."""
    t = draw(2, 6, 4, 10, 3, 5, torch.float64, context_channels=7)
    mask = torch.tensor([[False, True, False, False], [True, False, False, True]], device=DEVICE)
    context = t["context"] / t["context"].norm(dim=-1, keepdim=True)
    q, k, v = (
        tokens @ t[f"{part}_weight"].T + t[f"{part}_bias"]
        for part, tokens in (("q", t["x"]), ("k", context), ("v", context))
    )
    attended = torch.zeros(2, 6, 15, dtype=torch.float64, device=DEVICE)
    for sample, head in itertools.product(range(2), range(3)):
        kept, part = ~mask[sample], slice(5 * head, 5 * head + 5)
        weights = torch.exp(q[sample, :, part] @ k[sample, kept, part].T / 5**0.5)
        attended[sample, :, part] = weights / weights.sum(1, keepdim=True) @ v[sample, kept, part]
    c = attended @ t["out_weight"].T + t["out_bias"]
    c = c * t["x"].norm(dim=-1, keepdim=True) / (c.norm(dim=-1, keepdim=True) + 1e-6)
    options = {"num_heads": 3, "norm_match": True, "normalize_context": True, "key_padding_mask": mask}
    y = reference.cross_attention_residual(**t, **options)
    torch.testing.assert_close(y, t["x"] + t["weight"] * c)

    attention = torch.nn.MultiheadAttention(10, 2, batch_first=True, kdim=7, vdim=7, dtype=torch.float64).to(DEVICE)
    q_bias, k_bias, v_bias = attention.in_proj_bias.data.normal_().chunk(3)
    projections = (
        attention.q_proj_weight, q_bias, attention.k_proj_weight, k_bias, attention.v_proj_weight, v_bias,
        attention.out_proj.weight, attention.out_proj.bias,
    )  # fmt: skip
    expected, _ = attention(t["x"], t["context"], t["context"], key_padding_mask=mask)
    y = reference.cross_attention_residual(
        t["x"], t["context"], *projections, num_heads=2, weight=1.0, key_padding_mask=mask
    )
    torch.testing.assert_close(y, t["x"] + expected)


def test_reference_dropout_keeps_the_mean():
    x, context = randn(1, 200, 4, device=DEVICE), randn(1, 50, 4, device=DEVICE)
    eye = torch.eye(4, device=DEVICE)
    projections = (0 * eye, None, eye, None, eye, None, eye, None)
    y = reference.cross_attention_residual(
        x, context, *projections, num_heads=2, weight=1.0, dropout_p=0.5, seed=seed()
    )  # fmt: skip
    branch, mean = y - x, context.mean(1, keepdim=True)
    assert branch.std(1).min() > 0.05
    torch.testing.assert_close(branch.mean(1, keepdim=True), mean, rtol=0, atol=0.05)
