"""Magnitudes: each tensor of a call 1e-4 to 1e2 times its usual size, in 16 bits, on every backend, against float64.

What plain torch holds in the dtype every backend holds: no squared, summed or unscaled quantity is kept in 16 bits.
"""

from __future__ import annotations

import functools

import pytest
import torch
from adapter_residual_cases import draw as draw_adapter
from cross_attention_cases import PROJECTIONS, draw, draw_projection
from lora_linear_cases import draw as draw_lora
from operator_cases import DEVICE, FAST
from operators import OPERATORS, every_call, function_of
from oracle import cotangent, exact, forward_backward, randn

import pyfused
from pyfused import reference

MAGNITUDES = (1e-4, 1e-2, 1e2)
DTYPES = [torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Operator -> its calls: a function of the dtype that draws the tensors, and options.
CALLS = {
    "lora_linear": [(lambda dtype: draw_lora((37, 24), 20, 5, dtype), {"scaling": 1.5})],
    "lora_linear mixed": [
        (
            lambda dtype: draw_lora((13, 3, 24), 20, 5, dtype, mixed=2),
            {"scaling": 1.5, "adapter_index": OPERATORS["lora_linear mixed"].options["adapter_index"]},
        )
    ],
    "adapter_residual": [
        (lambda dtype: draw_adapter((37, 24), 20, dtype), {}),
        (lambda dtype: draw_adapter((37, 24), 20, dtype, residual=torch.float32), {"skip": 0.0}),
    ],
    # Logits of 0.1, and thus of 10: beyond 50 a rounding of a logit is no longer a small one of its probability.
    "cross_attention_residual absorbed": [
        (lambda dtype: draw(1, 41, 3, 24, 2, 8, dtype, logits=0.1), {"num_heads": 2, "norm_match": match})
        for match in (False, True)
    ],
    "cross_attention_residual standard": [
        (lambda dtype: draw(1, 41, 3, 24, 2, 8, dtype), {"num_heads": 2, "norm_match": True})
    ],
    "projection_residual": [
        (lambda dtype, gate=gate: draw_projection((37, 24), 20, dtype, gate=gate), {"activation": phi, "norm_match": m})
        for phi, m, gate in (("identity", False, None), ("leaky_relu", False, "channels"), ("identity", True, "scalar"))
    ],
}


def _magnitudes(backend, dtype, i):
    """Interpreted or emulated kernels meet the ends: both in float16, one in turn in bfloat16, which has the range."""
    if backend in FAST:
        return MAGNITUDES
    return MAGNITUDES[::2] if dtype == torch.float16 else (MAGNITUDES[2 * (i % 2)],)


def _times(tensor, magnitude):
    return (tensor.double() * magnitude).to(tensor.dtype)


@every_dtype
@every_call
def test_each_tensor_at_each_magnitude(operator, backend, plan, dtype):
    plans = OPERATORS[operator].plans[backend]
    if backend not in FAST and len(plans) > 1 and plans.index(plan) % 2 == DTYPES.index(dtype):
        pytest.skip("interpreted and emulated, an operator's plans share the dtypes")
    broken = []
    for drawn, options in CALLS[operator]:
        tensors = drawn(dtype)
        for i, name in enumerate((*(name for name, value in tensors.items() if value is not None), "dy")):
            for magnitude in _magnitudes(backend, dtype, i):
                changed = tensors if name == "dy" else tensors | {name: _times(tensors[name], magnitude)}
                upstream = (lambda y, m=magnitude: _times(cotangent(y), m)) if name == "dy" else cotangent
                try:
                    OPERATORS[operator].check(changed, backend, plan, dy=upstream, **options)
                except AssertionError as error:
                    broken.append(f"{name} x {magnitude:g}, {options}: {error}")
    assert not broken, "\n".join(broken)


SETTINGS = {
    "lora_linear": {"scaling": (1e-4, 1e-2, 1e2)},
    "lora_linear mixed": {"scaling": (1e-4, 1e-2, 1e2)},
    "projection_residual": {"gate": (1e-4, 1e-2, 1e2)},
}


@every_dtype
@every_call
def test_each_number_at_each_magnitude(operator, backend, plan, dtype):
    if operator not in SETTINGS:
        pytest.skip("no number of it scales a sum")
    drawn, options = CALLS[operator][0]
    for setting, values in SETTINGS[operator].items():
        for value in values:
            OPERATORS[operator].check(drawn(dtype), backend, plan, **options | {setting: value})


# Operator -> the number that scales its branch, as an option or a tensor.
SCALES = {
    "lora_linear": "scaling",
    "lora_linear mixed": "scaling",
    "adapter_residual": "layer_scale",
    "cross_attention_residual absorbed": "weight",
    "cross_attention_residual standard": "weight",
    "projection_residual": "gate",
}
assert SCALES.keys() == OPERATORS.keys()


def _scaled(operator, tensors, value):
    """(tensors, options) of a call whose branch is scaled by ``value``."""
    name, options = SCALES[operator], {key: o for key, o in OPERATORS[operator].options.items() if key == "num_heads"}
    if name == "layer_scale":
        return tensors | {name: torch.full_like(tensors[name], value)}, options
    return {key: tensor for key, tensor in tensors.items() if key != name}, options | {name: value}


@every_dtype
@every_call
def test_a_sum_is_scaled_before_it_is_rounded(operator, backend, plan, dtype):
    """Of terms with one sign, whose unscaled sum over rows is beyond float16 and whose scaled one is not."""
    row = OPERATORS[operator]
    drawn = {name: None if t is None else t.abs() for name, t in row.rows(64, dtype).items()}
    tensors, options = _scaled(operator, drawn, 2.0**-7)
    function = function_of(operator, backend, plan, **options)
    bare = functools.partial(getattr(reference, row.name), **row.options | options)
    dy = torch.full_like(bare(**tensors), 2000.0)
    ours = forward_backward(function, tensors, dy)
    oracle = exact(bare, tensors, dtype, dy, unrounded=row.unrounded)
    beyond = set()
    for name, right in oracle.items():
        # What the branch adds is a sum over all rows, scaled; the stream's own gradients are not.
        if right.abs().max() > 3e4:
            beyond.add(name)
            continue
        assert ours[name].isfinite().all(), name
        # Those of the logits are differences, not sums of one sign.
        if "cross_attention" not in operator or name.startswith(("dv_", "dout_")):
            assert (ours[name].double() - right).norm() <= 0.03 * right.norm() + 1e-6, name
    assert beyond != oracle.keys()


@every_dtype
@every_call
def test_small_numbers_are_scaled_before_they_are_rounded(operator, backend, plan, dtype):
    """dy and what it meets first far smaller, which a large number makes as large as ever: no product is subnormal."""
    drawn, options = CALLS[operator][0]
    tensors = drawn(dtype)
    # Cross-attention's kernels share the number out by its root, between what would overflow and what would vanish.
    small = 1e-2 if "cross_attention" in operator else 1e-3
    name = {
        "lora_linear": "lora_b",
        "lora_linear mixed": "lora_b",
        "adapter_residual": "up_weight",
        "projection_residual": "weight",
    }.get(operator, "out_weight")
    tensors, scaled = _scaled(operator, tensors | {name: _times(tensors[name], small)}, 50.0)
    OPERATORS[operator].check(
        tensors, backend, plan, dy=lambda y: _times(cotangent(y), small), **{**options, **scaled}
    )  # fmt: skip


@pytest.mark.parametrize("rows", [1, 19])
@pytest.mark.parametrize("magnitude", [1e-5, 1e-6, 1e-7, 1e-8])
@every_dtype
@every_call
def test_an_output_far_below_eps_matches_norms_as_plain_torch(operator, backend, plan, dtype, magnitude, rows):
    """rho is |x| / eps there, beyond float16."""
    if "absorbed" not in operator:
        pytest.skip("it has no sums of rho")
    tensors = draw(2, rows, 3, 24, 2, 8, dtype, projections=torch.float32, absent=("out_bias",))
    tensors["out_weight"] *= magnitude
    options = {"num_heads": 2, "norm_match": True}
    function = functools.partial(pyfused.cross_attention_residual, backend=backend, plan=plan)
    dy = 1e-3 * cotangent(reference.cross_attention_residual(**tensors, **options))
    ours = forward_backward(function, tensors, dy, **options)
    plain = forward_backward(reference.cross_attention_residual, tensors, dy, **options)
    oracle = exact(
        reference.cross_attention_residual, tensors, dtype, dy, unrounded=("weight", *PROJECTIONS), **options
    )
    for name, right in oracle.items():
        # k_bias has none: a softmax does not see a shift.
        if name != "dk_bias" and plain[name].isfinite().all():
            error, allowed = (ours[name].double() - right).norm(), (plain[name].double() - right).norm()
            assert error <= 2 * allowed + 0.01 * right.norm(), name


@every_call
def test_values_that_cancel(operator, backend, plan):
    """|o| a thousandth of |F|: in float32 its norm is that of o, not of a F F^T a^T, hundreds of roundings off."""
    if "absorbed" not in operator or backend == "cuda":
        pytest.skip("it has no norm of a sum of values in float32")
    absent = ("q_bias", "k_bias", "v_bias", "out_bias")
    tensors = draw(1, 50, 2, 64, 4, 16, context_channels=48, absent=absent, weight="channels")
    half = randn(1, 1, 48, seed=3, device=DEVICE)
    tensors |= {"context": torch.cat((half, -half), dim=1), "q_weight": 1e-3 * tensors["q_weight"]}
    options = {"num_heads": 4, "norm_match": True}
    function = functools.partial(pyfused.cross_attention_residual, backend=backend, plan=plan)
    dy = cotangent(reference.cross_attention_residual(**tensors, **options))
    ours = forward_backward(function, tensors, dy, **options)
    plain = forward_backward(reference.cross_attention_residual, tensors, dy, **options)
    oracle = exact(reference.cross_attention_residual, tensors, torch.float32, dy, **options)
    for name, right in oracle.items():
        error, allowed = (ours[name].double() - right).norm(), (plain[name].double() - right).norm()
        # Gradients of what makes F are differences between tokens here, which autograd adds up from E and F's.
        # Triton's interpreter has numpy's exp, with AVX-512 up to 2.4 units of the last place off, torch's 0.6.
        interpreted = backend == "triton" and DEVICE == "cpu"
        factor = 16 if name in ("dout_weight", "dv_weight") else 8 if interpreted else 4
        assert error <= factor * allowed + 1e-6 * right.norm(), f"{name}: {error:.2g}, plain torch {allowed:.2g}"


@pytest.mark.parametrize("rows", [1, 8])
def test_the_branch_is_there_where_the_values_are_large(rows):
    """Their squares are beyond float16, and so was the Gram matrix that gave their norm."""
    shapes = {"x": (1, rows, 64), "context": (1, 2, 48), "q": (64, 64), "k": (64, 48), "v": (64, 48), "out": (64, 64)}
    x, context, q, k, v, out = (
        (randn(*shape, seed=i, device=DEVICE) / (1 if i < 2 else shape[1] ** 0.5)).half()
        for i, shape in enumerate(shapes.values())
    )
    for backend in ("portable", *(["triton"] if pyfused.available_backends()["triton"] is None else [])):
        y = pyfused.cross_attention_residual(
            x, context, q, None, k, None, v, None, 60 * out, None, num_heads=4, norm_match=True, plan="absorbed",
            backend=backend,
        )  # fmt: skip
        branch = (y - x).float().norm() / x.float().norm()
        assert abs(branch - 0.1) < 1e-3, backend
