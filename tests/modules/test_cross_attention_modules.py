"""ScaledCrossAttention: what it computes, how it starts, what it prepares, and how it travels."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pyfused
from pyfused.models import TextCrossAttention
from pyfused.modules import LoRAMultiheadAttention, ScaledCrossAttention
from pyfused.modules.cross_attention import Prepared
from pyfused.ops import cross_attention_residual as ops
from pyfused.ops.contract import checks
from pyfused.ops.prepared_context import PROJECTIONS
from pyfused.reference.cross_attention import cross_attention_residual

B, L, C, WIDTH, HEADS = 3, 11, 32, 24, 4
# Tokens of a context that the absorbed plan, and that the standard plan serves.
FEW, MANY = 2, 40
both_plans = pytest.mark.parametrize("tokens", [FEW, MANY])
prepared_plans = pytest.mark.parametrize("plan", ["absorbed", "absorbed_recompute", "standard"])
KEPT = {"standard": PROJECTIONS[2:6], "absorbed": PROJECTIONS[:7], "absorbed_recompute": PROJECTIONS[:7]}


@pytest.fixture(autouse=True)
def _few_rows_take_either_plan(monkeypatch):
    """What the absorbed plan costs to begin with is left aside."""
    monkeypatch.setattr(ops, "ABSORBED_STEPS", {})


def inputs(tokens: int, batch: int = B, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x, context = torch.randn(B, L, C, dtype=dtype), torch.randn(batch, tokens, WIDTH, dtype=dtype)
    return x.requires_grad_(), context.requires_grad_()


def build(size: float = 3.0, dtype: torch.dtype = torch.float64, **settings) -> ScaledCrossAttention:
    """With random biases and gate, and logits of about ``size`` for the `inputs`."""
    module = ScaledCrossAttention(C, WIDTH, HEADS, dtype=dtype, **settings)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5) if name == "gate" else parameter.normal_()
        x, context = inputs(50, dtype=dtype)
        factor = size / logits(module, x, context).std()
        module.q_weight.mul_(factor)
        if module.q_bias is not None:
            module.q_bias.mul_(factor)
    return module


def logits(module: ScaledCrossAttention, x: Tensor, context: Tensor) -> Tensor:
    if module.normalize_context:
        context = nn.functional.normalize(context, dim=-1)
    q = nn.functional.linear(x, module.q_weight, module.q_bias).unflatten(-1, (HEADS, -1))
    k = nn.functional.linear(context, module.k_weight, module.k_bias).unflatten(-1, (HEADS, -1))
    return torch.einsum("blhd,bthd->bhlt", q, k) / math.sqrt(module.head_dim)


def reference(module: ScaledCrossAttention, x: Tensor, context: Tensor, **options) -> Tensor:
    return cross_attention_residual(
        x,
        context,
        *(getattr(module, name) for name in PROJECTIONS),
        num_heads=module.num_heads,
        weight=module.weight if module.gate is None else module.gate,
        norm_match=module.norm_match,
        eps=module.eps,
        normalize_context=module.normalize_context,
        **options,
    )


def assert_same(y: Tensor, expected: Tensor, leaves: list[Tensor], rtol: float = 1e-9, atol: float = 1e-9) -> None:
    """Equal outputs, and equal gradients of the leaves."""
    torch.testing.assert_close(y, expected, rtol=rtol, atol=atol)
    dy = torch.randn_like(y)
    actual, wanted = (torch.autograd.grad(output, leaves, dy) for output in (y, expected))
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def same_memory(module: nn.Module, name: str) -> None:
    """Another parameter at the old one's address, written to as often."""
    new, version = nn.Parameter(getattr(module, name).data), getattr(module, name)._version
    while new._version < version:
        new.mul_(2)
    setattr(module, name, new)


class TestForward:
    @both_plans
    @pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"weight": -2.5, "bias": False},
            {"norm_match": True},
            {"norm_match": True, "normalize_context": True, "learnable_weight": True, "eps": 1e-3},
            {"learnable_weight": True, "per_channel": True, "head_dim": 5},
            {"norm_match": True, "learnable_weight": True, "per_channel": True, "bias": False},
        ],
        ids=lambda settings: "-".join(settings) or "plain",
    )
    def test_is_the_reference(self, tokens, size, settings):
        module, (x, context) = build(size, **settings), inputs(tokens)
        assert 0.5 * size < logits(module, x, context).std() < 2 * size
        assert_same(module(x, context), reference(module, x, context), [x, context, *module.parameters()])

    def test_the_token_counts_reach_both_plans(self):
        module = build()
        for tokens, plan in ((FEW, "absorbed"), (MANY, "standard")):
            (call,) = pyfused.explain(module, *inputs(tokens)).calls
            assert call.plan == plan
            assert dict(call.shapes) == {"M": B * L, "C": C, "H": HEADS, "d": C // HEADS, "T": tokens}

    @both_plans
    @pytest.mark.parametrize("norm_match", [False, True])
    def test_mask(self, tokens, norm_match):
        module, (x, context) = build(norm_match=norm_match), inputs(tokens)
        mask = torch.zeros(B, tokens, dtype=torch.bool)
        mask[0, 1:] = True
        mask[2] = True
        y = module(x, context, mask)
        assert_same(y, reference(module, x, context, key_padding_mask=mask), [x, context, *module.parameters()])
        if not norm_match:
            torch.testing.assert_close(y[2], x[2] + 0.1 * module.out_bias)
        shared = module(x, context, key_padding_mask=mask[:1])
        torch.testing.assert_close(shared, reference(module, x, context, key_padding_mask=mask[:1]))

    @both_plans
    def test_length_first(self, tokens):
        module, (x, context) = build(batch_first=False), inputs(tokens)
        mask = torch.rand(B, tokens) < 0.3
        turned = module(x.transpose(0, 1), context.transpose(0, 1), mask)
        assert turned.shape == (L, B, C)
        expected = reference(module, x, context, key_padding_mask=mask)
        assert_same(turned.transpose(0, 1), expected, [x, context, *module.parameters()])
        with torch.no_grad():
            again = module(x.transpose(0, 1), prepared=module.prepare(context.transpose(0, 1), mask))
        torch.testing.assert_close(again, turned)

    @both_plans
    def test_a_context_averaged_over_its_batch(self, tokens):
        module, (x, context) = build(context_reduce="mean", normalize_context=True), inputs(tokens, batch=5)
        expected = reference(module, x, context.mean(0, keepdim=True))
        assert_same(module(x, context), expected, [x, context, *module.parameters()])
        with torch.no_grad():
            torch.testing.assert_close(module(x, prepared=module.prepare(context)), expected)

    @both_plans
    def test_a_context_shared_by_the_batch_gets_the_sum_of_gradients(self, tokens):
        module, (x, context) = build(), inputs(tokens, batch=1)
        assert_same(module(x, context), module(x, context.expand(B, -1, -1)), [x, context, *module.parameters()])

    @both_plans
    def test_dropout(self, tokens):
        module, (x, context) = build(dropout=0.3), inputs(tokens)
        expected = reference(module, x, context)
        state = torch.get_rng_state()
        torch.testing.assert_close(module.eval()(x, context), expected)
        assert torch.equal(torch.get_rng_state(), state)
        module.train()
        assert not torch.equal(module(x, context), module(x, context))
        torch.manual_seed(5)
        y = module(x, context)
        torch.manual_seed(5)
        assert torch.equal(module(x, context), y)
        if tokens == FEW:
            torch.manual_seed(5)
            seed = checks.seed("", None, x.device)
            expected = reference(module, x, context, dropout_p=0.3, seed=seed)
            assert_same(y, expected, [x, context, *module.parameters()])
        else:
            with torch.no_grad():
                mean = torch.stack([module(x, context) for _ in range(300)]).mean(0)
            assert (mean - expected).norm() < 0.2 * (expected - x).norm()


class TestProperties:
    """What `match` and softmax promise, whatever the reference does."""

    @both_plans
    def test_the_branch_has_the_norm_of_x(self, tokens):
        module, (x, context) = build(norm_match=True, weight=0.7), inputs(tokens)
        branch = (module(x, context) - x) / 0.7
        torch.testing.assert_close(branch.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0)

    @both_plans
    @pytest.mark.parametrize("factor", [1e-2, 30.0])
    def test_a_positive_factor_of_the_output_projection_cancels(self, tokens, factor):
        module, (x, context) = build(norm_match=True), inputs(tokens)
        y = module(x, context)
        with torch.no_grad():
            module.out_weight.mul_(factor)
            module.out_bias.mul_(factor)
        torch.testing.assert_close(module(x, context), y, rtol=1e-4, atol=1e-5)

    @both_plans
    def test_the_gradient_into_c_is_orthogonal_to_c(self, tokens):
        module, (x, context) = build(norm_match=True), inputs(tokens)
        # One row: the gradient of out_bias is the one into c.
        x, context = x[:1, :1].detach(), context[:1].detach()
        (gradient,) = torch.autograd.grad((module(x, context) * torch.randn(C)).sum(), module.out_bias)
        module.norm_match, module.weight = False, 1.0
        c = (module(x, context) - x).flatten()
        assert gradient.norm() > 1e-3
        assert abs(gradient @ c) < 1e-5 * gradient.norm() * c.norm()

    @both_plans
    def test_the_bias_of_the_keys_gets_no_gradient(self, tokens):
        module, (x, context) = build(), inputs(tokens)
        module(x, context).square().sum().backward()
        assert module.k_bias.grad.abs().max() < 1e-12 * module.q_bias.grad.abs().max()

    @both_plans
    def test_the_order_of_tokens_is_no_matter(self, tokens):
        module, (x, context) = build(norm_match=True), inputs(tokens)
        order = torch.randperm(tokens) if tokens > 2 else torch.tensor([1, 0])
        mask = torch.rand(B, tokens) < 0.3
        assert_same(
            module(x, context[:, order], mask[:, order]), module(x, context, mask), [x, context, *module.parameters()]
        )


class TestStart:
    @pytest.mark.parametrize(
        ("arguments", "count"), [((1024, 768, 8, 96), 2_755_840), ((768, 768, 8), 2_362_368)], ids=["image", "text"]
    )
    def test_parameter_counts(self, arguments, count):
        with torch.device("meta"):
            module = ScaledCrossAttention(*arguments)
        assert sum(p.numel() for p in module.parameters()) == count
        assert module.head_dim == 96

    def test_xavier_weights_and_zero_biases(self):
        module = ScaledCrossAttention(64, 128, 4, 20)
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        assert shapes == {
            "q_weight": (80, 64), "q_bias": (80,), "k_weight": (80, 128), "k_bias": (80,),
            "v_weight": (80, 128), "v_bias": (80,), "out_weight": (64, 80), "out_bias": (64,),
        }  # fmt: skip
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any()
            else:
                bound = math.sqrt(6 / sum(parameter.shape))
                assert 0.95 * bound < parameter.abs().max() <= bound
        assert all(p.dtype == torch.float32 and p.requires_grad for p in module.parameters())

    def test_gate(self):
        assert ScaledCrossAttention(C, WIDTH, HEADS).gate is None
        scalar = ScaledCrossAttention(C, WIDTH, HEADS, weight=0.25, learnable_weight=True)
        assert scalar.gate.tolist() == [0.25]
        channels = ScaledCrossAttention(C, WIDTH, HEADS, weight=-1.0, learnable_weight=True, per_channel=True)
        assert channels.gate.shape == (C,)
        assert (channels.gate == -1.0).all()

    def test_zero_init_starts_as_the_identity_and_learns(self):
        module, (x, context) = ScaledCrossAttention(C, WIDTH, HEADS, zero_init=True), inputs(FEW, dtype=torch.float32)
        y = module(x, context)
        assert torch.equal(y, x)
        y.square().sum().backward()
        assert module.out_weight.grad.abs().max() > 0
        assert not module.q_weight.grad.any()

    def test_one_seed_gives_one_module_in_every_dtype(self):
        weights = []
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            torch.manual_seed(1)
            weights.append(ScaledCrossAttention(C, WIDTH, HEADS, dtype=dtype).v_weight.bfloat16())
        assert all(torch.equal(weight, weights[0]) for weight in weights)

    def test_meta_then_reset(self):
        with torch.device("meta"):
            module = ScaledCrossAttention(C, WIDTH, HEADS, weight=0.25, learnable_weight=True)
        module.to_empty(device="cpu")
        torch.manual_seed(2)
        module.reset_parameters()
        torch.manual_seed(2)
        twin = ScaledCrossAttention(C, WIDTH, HEADS, weight=0.25, learnable_weight=True)
        for parameter, wanted in zip(module.parameters(), twin.parameters(), strict=True):
            assert torch.equal(parameter, wanted)


class TestPrepared:
    @prepared_plans
    @pytest.mark.parametrize("tokens", [1, FEW, 7, MANY])
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("settings", [{}, {"norm_match": True, "normalize_context": True, "bias": False}], ids=str)
    def test_is_the_reference_with_all_gradients_that_are_left(self, plan, tokens, masked, settings):
        module, (x, context) = build(learnable_weight=True, **settings), inputs(tokens)
        context = context.detach()
        kept = KEPT[plan]
        for name in kept:
            if getattr(module, name) is not None:
                getattr(module, name).requires_grad_(False)
        mask = torch.rand(B, tokens) < 0.3 if masked else None
        prepared = module.prepare(context, mask, plan)
        assert prepared.context.plan == plan
        left = [parameter for parameter in module.parameters() if parameter.requires_grad]
        assert len(left) == (1 if "bias" in settings else 2) + (plan == "standard") * (2 if "bias" in settings else 3)
        expected = reference(module, x, context, key_padding_mask=mask)
        assert_same(module(x, prepared=prepared), expected, [x, *left])

    @pytest.mark.parametrize("batch", [1, B])
    def test_auto_takes_the_cheapest_plan_and_is_explained(self, batch):
        module, (x, _) = build(dtype=torch.float32), inputs(FEW, dtype=torch.float32)
        for tokens, plan in ((FEW, "absorbed"), (5, "absorbed_recompute"), (MANY, "standard")):
            _, context = inputs(tokens, batch, torch.float32)
            with torch.no_grad():
                prepared = module.prepare(context)
                torch.testing.assert_close(module(x, prepared=prepared), reference(module, x, context))
            (call,) = pyfused.explain(module, x, prepared=prepared).calls
            assert call.plan == prepared.context.plan == plan
            assert call.why[0].startswith("prepared; ")

    @prepared_plans
    def test_what_the_caller_does_to_its_tensors_afterwards_is_no_matter(self, plan):
        module, (x, context) = build(), inputs(FEW)
        mask = torch.tensor([[True, False]])
        with torch.no_grad():
            prepared = module.prepare(context, mask, plan)
            y = module(x, prepared=prepared)
            context.zero_()
            mask.zero_()
            assert torch.equal(module(x, prepared=prepared), y)

    @both_plans
    def test_dropout_acts_in_training(self, tokens):
        module, (x, context) = build(dropout=0.4), inputs(tokens)
        with torch.no_grad():
            prepared = module.prepare(context)
            torch.manual_seed(5)
            y = module(x, prepared=prepared)
            torch.manual_seed(5)
            torch.testing.assert_close(module(x, context), y)
            assert not torch.equal(module(x, prepared=prepared), y)
            torch.testing.assert_close(module.eval()(x, prepared=prepared), reference(module, x, context))

    def test_prepared_under_inference_mode_serves_training(self):
        module, (x, context) = build(), inputs(FEW)
        module.requires_grad_(False)
        with torch.inference_mode():
            prepared = module.prepare(context + 0)
        assert_same(module(x, prepared=prepared), reference(module, x, context), [x])

    @prepared_plans
    @pytest.mark.parametrize(
        "change",
        [
            lambda module: module.k_weight.add_(1e-3),
            lambda module: module.load_state_dict(copy.deepcopy(module.state_dict())),
            lambda module: module.load_state_dict(copy.deepcopy(module.state_dict()), assign=True),
            lambda module: setattr(module.v_bias, "data", module.v_bias.data.clone()),
            lambda module: setattr(module, "k_bias", nn.Parameter(module.k_bias.clone())),
            lambda module: same_memory(module, "k_bias"),
            lambda module: module.register_parameter("v_bias", None),
            lambda module: module.reset_parameters(),
            lambda module: module.float().double(),
            lambda module: module.half(),
        ],
        ids=[
            "in place",
            "loaded",
            "assigned",
            "data",
            "replaced",
            "same memory",
            "removed",
            "reset",
            "cast and back",
            "cast",
        ],
    )
    def test_changed_parameters_are_refused(self, plan, change):
        module, (x, context) = build(), inputs(FEW)
        with torch.no_grad():
            prepared = module.prepare(context, plan=plan)
            module(x, prepared=prepared)
            change(module)
            with pytest.raises(RuntimeError, match=r"[qkv]_(weight|bias) has changed since .* prepare it again"):
                module(x, prepared=prepared)

    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
    @pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=["foreach", "fused"])
    def test_an_optimizers_step_makes_it_stale(self, optimizer, options):
        module, (x, context) = build(dtype=torch.float32), inputs(FEW, dtype=torch.float32)
        with torch.no_grad():
            prepared = module.prepare(context)
        module(x, context).sum().backward()
        optimizer([module.out_bias], lr=0.1, **options).step()
        with torch.no_grad():
            torch.testing.assert_close(module(x, prepared=prepared), reference(module, x, context))
        optimizer([module.v_weight, module.out_bias], lr=0.1, **options).step()
        with torch.no_grad(), pytest.raises(RuntimeError, match="v_weight has changed"):
            module(x, prepared=prepared)

    @prepared_plans
    def test_parameters_that_are_not_in_it_may_change(self, plan):
        module, (x, context) = build(learnable_weight=True), inputs(FEW)
        with torch.no_grad():
            prepared = module.prepare(context, plan=plan)
            for name, parameter in module.named_parameters():
                if name not in KEPT[plan]:
                    parameter.mul_(1.5)
            torch.testing.assert_close(module(x, prepared=prepared), reference(module, x, context))

    @prepared_plans
    def test_a_gradient_that_would_be_lost_is_refused(self, plan):
        module, (x, context) = build(), inputs(FEW)
        context = context.detach()
        prepared = module.prepare(context, plan=plan)
        names = ", ".join(KEPT[plan])
        with pytest.raises(RuntimeError, match=f"plan '{plan}' passes no gradient to {names}, which require grad"):
            module(x, prepared=prepared)
        with torch.no_grad():
            torch.testing.assert_close(module(x, prepared=prepared), reference(module, x, context))
        module.requires_grad_(False)
        module(x, prepared=prepared).sum().backward()
        assert x.grad is not None
        module.v_weight.requires_grad_()
        with pytest.raises(RuntimeError, match="passes no gradient to v_weight, which"):
            module(x, prepared=prepared)

    def test_the_gradient_of_the_context_is_refused(self):
        module, (x, context) = build(), inputs(FEW)
        module.requires_grad_(False)
        prepared = module.prepare(context)
        with pytest.raises(RuntimeError, match="passes no gradient to context, which"):
            module(x, prepared=prepared)
        with torch.no_grad():
            expected = module(x, prepared=prepared)
            # Asked for without gradients: none is lost.
            prepared = module.prepare(context)
        torch.testing.assert_close(module(x, prepared=prepared), expected)

    @both_plans
    def test_dtypes(self, tokens):
        module, (x, context) = build(1.0, torch.float32), inputs(tokens, dtype=torch.float32)
        with torch.no_grad():
            expected = reference(module, x, context)
            plain, half = module.prepare(context), module.prepare(context.bfloat16())
            with torch.autocast("cpu", torch.bfloat16):
                cast = module.prepare(context)
                y = module(x, prepared=cast)
                with pytest.raises(TypeError, match=r"computed in, torch\.bfloat16, got torch\.float32"):
                    module(x, prepared=plain)
            assert y.dtype == torch.float32
            torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)
            with pytest.raises(TypeError, match=r"computed in, torch\.float32, got torch\.bfloat16"):
                module(x, prepared=cast)
            y = module(x.bfloat16(), prepared=half)
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y.float(), expected, rtol=3e-2, atol=3e-2)
            with pytest.raises(TypeError, match=r"computed in, torch\.float64, got torch\.float32"):
                module(x.double(), prepared=plain)

    def test_what_does_not_belong_to_it_is_refused(self):
        module, (x, context) = build(), inputs(FEW)
        with torch.no_grad():
            prepared = module.prepare(context)
            with pytest.raises(ValueError, match="exactly one of context and prepared must be given, got both"):
                module(x, context, prepared=prepared)
            with pytest.raises(ValueError, match="exactly one of context and prepared must be given, got neither"):
                module(x)
            with pytest.raises(ValueError, match="key_padding_mask must be None beside prepared"):
                module(x, key_padding_mask=torch.zeros(B, FEW, dtype=torch.bool), prepared=prepared)
            with pytest.raises(TypeError, match=r"prepared must be what prepare\(\) returned, got Tensor"):
                module(x, prepared=context)
            with pytest.raises(ValueError, match="must come from this module's"):
                copy.deepcopy(module)(x, prepared=prepared)
            with pytest.raises(ValueError, match="prepared must have x's batch B = 2 or 1, got 3"):
                module(x[:2], prepared=prepared)
            with pytest.raises(ValueError, match="prepared must be on meta like x, got cpu"):
                module(x.to("meta"), prepared=prepared)
            with pytest.raises(ValueError, match=r"x must have shape \(B, L, 32\), got \(11, 32\)"):
                module(x[0], prepared=prepared)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"context": None}, TypeError, r"context must be a torch\.Tensor, got NoneType"),
            ({"context": torch.ones(2, 3, WIDTH, dtype=torch.int64)}, TypeError, "context must have dtype"),
            ({"context": torch.ones(2, 3, 9)}, ValueError, r"context must have shape \(B, T, 24\), got \(2, 3, 9\)"),
            ({"context": torch.ones(2, 0, WIDTH)}, ValueError, "context must have shape .* T >= 1"),
            ({"context": torch.ones(2, 3, WIDTH).double()}, TypeError, r"q_weight must have dtype torch\.float64, got"),
            ({"context": torch.ones(2, 3, WIDTH, device="meta")}, ValueError, "q_weight must be on meta like context"),
            ({"key_padding_mask": torch.ones(2, 3)}, TypeError, r"key_padding_mask must have dtype torch\.bool"),
            (
                {"key_padding_mask": torch.ones(3, 3, dtype=torch.bool)},
                ValueError,
                r"key_padding_mask must have shape .* \(2 or 1, 3\), got \(3, 3\)",
            ),
            ({"plan": "fast"}, ValueError, "plan must be one of .*'standard'.*, got 'fast'"),
        ],
    )
    def test_prepare_refuses(self, arguments, error, message):
        module = ScaledCrossAttention(C, WIDTH, HEADS)
        with pytest.raises(error, match=f"^ScaledCrossAttention: {message}"):
            module.prepare(**{"context": torch.ones(2, 3, WIDTH)} | arguments)

    def test_prepare_refuses_parameters_that_forward_would(self):
        module = ScaledCrossAttention(C, WIDTH, HEADS, dtype=torch.bfloat16)
        with pytest.raises(TypeError, match=r"q_weight must have dtype torch\.float32, got torch\.bfloat16"):
            module.prepare(torch.ones(2, 3, WIDTH))
        assert isinstance(module.prepare(torch.ones(2, 3, WIDTH, dtype=torch.bfloat16)), Prepared)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_heads", 1), ("normalize_context", True), ("norm_match", True), ("context_reduce", "mean"),
        ("batch_first", False),
    ],
)  # fmt: skip
def test_a_changed_setting_is_refused(setting, value):
    module = ScaledCrossAttention(WIDTH, WIDTH, 2).eval()
    context = torch.ones(1, 3, WIDTH)
    with torch.no_grad():
        prepared = module.prepare(context)
        before = getattr(module, setting)
        setattr(module, setting, value)
        with pytest.raises(RuntimeError, match=rf"{setting} was {before!r} when .* is {value!r}; prepare it again"):
            module(torch.ones(1, 1, WIDTH), prepared=prepared)
        setattr(module, setting, before)
        module(torch.ones(1, 1, WIDTH), prepared=prepared)


class TestContextReduce:
    """The original averages its context only where the batch sizes differ."""

    @staticmethod
    def original(module, x, context):
        plain = ScaledCrossAttention(WIDTH, WIDTH, 2, context_reduce=None)
        plain.load_state_dict(module.state_dict())
        return plain(x, context if len(context) == len(x) else context.mean(0, keepdim=True))

    @pytest.mark.parametrize("batch", [1, 2, 4])
    def test_as_the_original(self, batch):
        torch.manual_seed(0)
        module = ScaledCrossAttention(WIDTH, WIDTH, 2, context_reduce="mean_if_batches_differ")
        x, context = torch.randn(4, 5, WIDTH), torch.randn(batch, 3, WIDTH)
        torch.testing.assert_close(module(x, context), self.original(module, x, context))

    def test_the_default_averages_equal_batches_too(self):
        torch.manual_seed(0)
        ours = TextCrossAttention(WIDTH, WIDTH, 2, WIDTH // 2, dropout=0.0)
        theirs = TextCrossAttention(WIDTH, WIDTH, 2, WIDTH // 2, dropout=0.0, context_reduce="mean_if_batches_differ")
        theirs.load_state_dict(ours.state_dict())
        x, context = torch.randn(4, 5, WIDTH), torch.randn(4, 3, WIDTH)
        assert not torch.allclose(ours(x, context), theirs(x, context), atol=1e-3)
        torch.testing.assert_close(ours(x, context[:3]), theirs(x, context[:3]))

    def test_it_cannot_be_prepared(self):
        module = ScaledCrossAttention(WIDTH, WIDTH, 2, context_reduce="mean_if_batches_differ")
        with pytest.raises(ValueError, match="context_reduce must be None or 'mean' to prepare"):
            module.prepare(torch.ones(2, 3, WIDTH))


@pytest.mark.parametrize(
    "flag", ["learnable_weight", "norm_match", "normalize_context", "zero_init", "bias", "per_channel", "batch_first"]
)
def test_flags_are_bools(flag):
    for value in (1, "no"):
        with pytest.raises(TypeError, match=rf"ScaledCrossAttention: {flag} must be a bool, got {value!r}"):
            ScaledCrossAttention(WIDTH, WIDTH, 2, **{flag: value})


class TestFromModule:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("geometry", [{}, {"kdim": WIDTH, "vdim": WIDTH}, {"bias": False}], ids=str)
    @both_plans
    def test_equals_the_attention(self, dtype, batch_first, geometry, tokens):
        mha = nn.MultiheadAttention(C, HEADS, batch_first=batch_first, dtype=dtype, **geometry)
        with torch.no_grad():
            for parameter in mha.parameters():
                if parameter.dim() == 1:
                    parameter.normal_()
        module = ScaledCrossAttention.from_module(mha, 0.7)
        x, context = torch.randn(B, L, C, dtype=dtype), torch.randn(B, tokens, mha.kdim, dtype=dtype)
        mask = torch.rand(B, tokens) < 0.3
        mask[:, 0] = False
        if not batch_first:
            x, context = x.transpose(0, 1), context.transpose(0, 1)
        for key_padding_mask in (None, mask):
            expected = x + 0.7 * mha(x, context, context, key_padding_mask=key_padding_mask)[0]
            torch.testing.assert_close(module(x, context, key_padding_mask), expected)
        own = {parameter.data_ptr() for parameter in module.parameters()}
        assert own.isdisjoint(parameter.data_ptr() for parameter in mha.parameters())

    def test_settings(self):
        mha = nn.MultiheadAttention(C, HEADS, dropout=0.2, kdim=WIDTH, vdim=WIDTH, dtype=torch.bfloat16).eval()
        mha.requires_grad_(False)
        module = ScaledCrossAttention.from_module(
            mha, 0.3, True, True, True, eps=1e-4, context_reduce="mean", per_channel=True
        )
        assert repr(module) == (
            "ScaledCrossAttention(32, 24, num_heads=4, head_dim=8, weight=0.3, gate=(32,), norm_match=True, "
            "normalize_context=True, dropout=0.2, context_reduce=mean, batch_first=False)"
        )
        assert module.eps == 1e-4
        assert not module.training
        assert all(parameter.requires_grad for parameter in module.parameters())
        assert module.gate.dtype == torch.float32
        assert module.k_weight.dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: nn.Linear(3, 3), TypeError, r"expected an nn\.MultiheadAttention, got Linear"),
            (
                lambda: LoRAMultiheadAttention.from_mha(nn.MultiheadAttention(8, 2)),
                ValueError,
                "got a LoRAMultiheadAttention: already wrapped",
            ),
            (lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4), ValueError, "kdim must equal vdim, .* got 6 and 4"),
            (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True), ValueError, "got one with bias_k"),
            (lambda: nn.MultiheadAttention(8, 2, add_zero_attn=True), ValueError, "got one with add_zero_attn"),
        ],
    )
    def test_refusals(self, make: Callable[[], nn.Module], error, message):
        with pytest.raises(error, match=rf"^ScaledCrossAttention\.from_module: .*{message}"):
            ScaledCrossAttention.from_module(make())


class TestTravel:
    def test_deepcopy_pickle_and_state_dict(self):
        module, (x, context) = build(learnable_weight=True, dropout=0.1).eval(), inputs(FEW)
        other = ScaledCrossAttention(C, WIDTH, HEADS, learnable_weight=True, dtype=torch.float64).eval()
        other.load_state_dict(module.state_dict())
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other]
        for twin in [*copies, torch.load(buffer, weights_only=False)]:
            assert torch.equal(twin(x, context), module(x, context))
            assert twin.gate is not module.gate
        assert list(module.state_dict()) == [*PROJECTIONS, "gate"]

    @pytest.mark.parametrize(("cast", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
    def test_a_cast_leaves_what_trains_in_float32(self, cast, dtype):
        module, (x, context) = ScaledCrossAttention(C, WIDTH, HEADS, learnable_weight=True), inputs(FEW)
        module(x.float(), context.float()).sum().backward()
        grad = module.gate.grad.clone()
        getattr(module, cast)()
        assert module.gate.dtype == torch.float32
        assert module.gate.item() == torch.tensor(0.1).item()
        assert torch.equal(module.gate.grad, grad)
        parameters = list(module.parameters())
        assert {p.dtype for p in parameters} == {p.grad.dtype for p in parameters} == {torch.float32}
        assert module(x.to(dtype), context.to(dtype)).dtype == dtype
        assert module.double().gate.dtype == torch.float64

    @both_plans
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_float32_parameters_serve_16_bit_inputs(self, tokens, dtype):
        module = build(1.0, torch.float32, learnable_weight=True)
        x, context = (tensor.detach().to(dtype) for tensor in inputs(tokens))
        y = module(x, context)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), reference(module, x.float(), context.float()), rtol=3e-2, atol=5e-2)
        y.float().sum().backward()
        assert {p.grad.dtype for p in module.parameters()} == {torch.float32}

    @both_plans
    def test_autocast_keeps_the_residual_stream(self, tokens):
        module, (x, context) = build(1.0, torch.float32), inputs(tokens, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x, context)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, reference(module, x, context), rtol=3e-2, atol=5e-2)
        module.weight = 0.0
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x, context), x)

    @both_plans
    def test_compiles_whole(self, tokens):
        module, (x, context) = build(norm_match=True, learnable_weight=True), inputs(tokens)
        mask = torch.rand(B, tokens) < 0.3
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert_same(compiled(x, context, mask), module(x, context, mask), [x, context, *module.parameters()])

    @prepared_plans
    def test_compiled_code_still_refuses_a_stale_context(self, plan):
        module, (x, context) = build(), inputs(FEW)
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="aot_eager")
        with torch.no_grad():
            prepared = module.prepare(context, plan=plan)
            for _ in range(2):
                torch.testing.assert_close(compiled(x, prepared=prepared), reference(module, x, context))
            module.k_weight.add_(1e-3)
            with pytest.raises(RuntimeError, match="k_weight has changed"):
                compiled(x, prepared=prepared)
            prepared = module.prepare(context, plan=plan)
            torch.testing.assert_close(compiled(x, prepared=prepared), reference(module, x, context))


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"query_dim": 4.0}, TypeError, "query_dim must be an int, got float"),
            ({"context_dim": 0}, ValueError, "context_dim must be at least 1, got 0"),
            ({"num_heads": True}, TypeError, "num_heads must be an int, got bool"),
            ({"num_heads": 3}, ValueError, "num_heads must divide query_dim = 8 where head_dim is None, got 3"),
            ({"head_dim": -1}, ValueError, "head_dim must be at least 1, got -1"),
            ({"weight": float("nan")}, ValueError, "weight must be finite, also in float32, got nan"),
            ({"weight": torch.ones(8)}, TypeError, "weight must be a Python number, got Tensor"),
            ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
            ({"eps": -1e-6}, ValueError, "eps must be"),
            ({"context_reduce": "sum"}, ValueError, r"context_reduce must be one of \(None, 'mean', .*\), got 'sum'"),
            ({"zero_init": True, "norm_match": True}, ValueError, "zero_init must be False .* divides 0 by eps"),
            ({"per_channel": True}, ValueError, "per_channel must be False without learnable_weight, got True"),
            ({"dtype": torch.int8}, TypeError, "dtype must be one of .*, got torch.int8"),
        ],
    )
    def test_settings(self, arguments, error, message):
        with pytest.raises(error, match=f"^ScaledCrossAttention: {message}"):
            ScaledCrossAttention(**{"query_dim": 8, "context_dim": 6, "num_heads": 2} | arguments)

    def test_head_dim_need_not_divide(self):
        assert ScaledCrossAttention(8, 6, 3, 5).q_weight.shape == (15, 8)

    def test_inputs(self):
        module, (x, context) = ScaledCrossAttention(C, WIDTH, HEADS), inputs(FEW, dtype=torch.float32)
        with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list"):
            module([1.0], context)
        with pytest.raises(TypeError, match=r"context must be a torch\.Tensor, got int"):
            module(x, 3)
        with pytest.raises(TypeError, match="x must have dtype"):
            module(x.int(), context)
        with pytest.raises(ValueError, match=r"x must have shape \(B, L, 32\), got \(32,\)"):
            module(x[0, 0], context)
        with pytest.raises(ValueError, match=r"context must have shape \(B, T, 24\), got \(3, 2, 23\)"):
            module(x, context[..., 1:])
        with pytest.raises(ValueError, match=r"^cross_attention_residual: context must have x's batch B = 3 or 1"):
            module(x, context[:2])
        with pytest.raises(TypeError, match=r"context must have dtype torch\.float32, got torch\.float64"):
            module(x, context.double())
        with pytest.raises(ValueError, match="key_padding_mask must have shape"):
            module(x, context, torch.zeros(2, FEW, dtype=torch.bool))
        turned = ScaledCrossAttention(C, WIDTH, HEADS, batch_first=False)
        with pytest.raises(ValueError, match=r"x must have shape \(L, B, 32\), got \(11, 31\)"):
            turned(x[0, :, 1:], context)
        with pytest.raises(ValueError, match=r"context must have shape \(T, B, 24\), got \(3, 2, 23\)"):
            turned(x, context[..., 1:])
        averaged = ScaledCrossAttention(C, WIDTH, HEADS, context_reduce="mean")
        with pytest.raises(ValueError, match="context must have a batch of at least 1 to be averaged, got 0"):
            averaged(x, context[:0])
