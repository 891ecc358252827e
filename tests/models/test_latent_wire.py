"""LatentWire's stage 1: counts, the adapter's formula and all gradients, the loss, pads, labels."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate_as_torch, randn
from torch import Tensor, nn

import pyfused
from pyfused.models import LatentWireAdapter, latent_wire_loss, left_padded_labels

SMALL = 12, 20, 28


def adapter(dropout: float = 0.0, **settings) -> LatentWireAdapter:
    """A small one in which no parameter is at a start value."""
    module = LatentWireAdapter(*SMALL, dropout, **settings)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return module


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    away = x - x.mean(-1, keepdim=True)
    return away / (away.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def plain(c: Tensor, kept: Tensor | float = 1.0, **parameters: Tensor) -> Tensor:
    """The formula of systems.md in c's dtype, norms in float32 or wider; ``kept``: what dropout multiplies g with."""
    p = parameters

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ p[f"{name}_weight"].to(x.dtype).t() + p[f"{name}_bias"].to(x.dtype)

    n = norm(c, p["norm_weight"], p["norm_bias"]).to(c.dtype)
    g = gelu(linear(gelu(linear(n, "first")), "second")) * kept
    o = linear(g, "third") + linear(n, "skip")
    o = o * torch.sigmoid(linear(c, "gate")) + linear(c, "shift")
    return (norm(o, p["output_norm_weight"], p["output_norm_bias"]) * p["scale"]).to(c.dtype)


class TestAdapter:
    def test_counts(self):
        module = LatentWireAdapter(device="meta")
        assert sum(p.numel() for p in module.parameters()) == 19_952_641
        assert all(p.requires_grad for p in module.parameters())
        assert (module.compressed, module.hidden, module.embedding, module.dropout) == (512, 2048, 4096, 0.1)
        k, h, d = SMALL
        count = 2 * k + h * (k + 1) + h * (h + 1) + d * (h + 1) + 3 * d * (k + 1) + 2 * d + 1
        assert sum(p.numel() for p in LatentWireAdapter(*SMALL).parameters()) == count

    def test_shape_at_the_documents_widths(self):
        module = LatentWireAdapter()
        out = module(randn(8, 20, 512))
        assert out.shape == (8, 20, 4096)
        # Its rows are 120 times as long as those of Llama's embeddings, about 0.53, until they are matched.
        assert out.detach().norm(dim=-1).mean().item() == pytest.approx(64, rel=1e-3)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_formula_and_every_gradient(self, dtype):
        module = adapter(dtype=torch.promote_types(dtype, torch.float32))
        parameters = dict(module.named_parameters())

        def ours(c: Tensor, **given: Tensor) -> Tensor:
            return torch.func.functional_call(module, given, (c,))

        tensors = {"c": randn(3, 7, SMALL[0], dtype=dtype)} | parameters
        unrounded = [name for name in parameters if "norm" in name or name == "scale"]
        assert_as_accurate_as_torch(ours, plain, tensors, dtype, unrounded=unrounded)

    def test_dropout_is_of_g_and_in_training_alone(self):
        module, c = adapter(0.4).double(), randn(2, 5, SMALL[0], dtype=torch.float64)
        torch.manual_seed(5)
        kept = F.dropout(torch.ones(2, 5, SMALL[1], dtype=torch.float64), 0.4)
        assert 0 < (kept == 0).sum() < kept.numel()
        torch.manual_seed(5)
        torch.testing.assert_close(module(c), plain(c, kept, **dict(module.named_parameters())))
        torch.testing.assert_close(module.eval()(c), plain(c, **dict(module.named_parameters())))

    def test_autocast_makes_the_products_in_its_dtype(self):
        module, c = adapter(), randn(4, 9, SMALL[0], seed=2).requires_grad_()
        exact = module(c)
        with torch.autocast("cpu", torch.bfloat16):
            out = module(c)
        assert out.dtype == torch.float32
        error = (out - exact).norm() / exact.norm()
        assert 1e-4 < error < 2e-2
        for name, one, other in zip(
            ("c", *dict(module.named_parameters())),
            torch.autograd.grad(out, (c, *module.parameters()), randn(*out.shape)),
            torch.autograd.grad(exact, (c, *module.parameters()), randn(*out.shape)),
            strict=True,
        ):
            assert one.dtype == torch.float32
            assert (one - other).norm() < 5e-2 * other.norm(), name

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_casts_leave_the_parameters_in_float32(self, dtype):
        model = nn.Sequential(nn.Linear(4, SMALL[0]), adapter())
        before = copy.deepcopy(model[1].state_dict())
        model.to(dtype)
        assert model[0].weight.dtype == dtype
        assert all(torch.equal(value, before[name]) for name, value in model[1].state_dict().items())
        out = model(randn(3, 4, dtype=dtype))
        assert out.dtype == dtype
        out.sum().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model[1].parameters())
        assert all(p.dtype == dtype for p in LatentWireAdapter(*SMALL, dtype=dtype).parameters())

    def test_the_last_norm_and_the_scale_are_never_narrow(self):
        module, c = adapter(), randn(3, SMALL[0], dtype=torch.float16)
        expected = module(c)
        with torch.no_grad():
            # Below what float16 resolves, until the scale.
            module.output_norm_weight.mul_(2.0**-40)
            module.output_norm_bias.mul_(2.0**-40)
            module.scale.mul_(2.0**40)
        assert torch.equal(module(c), expected)

    def test_start_is_that_of_linear_layers_whatever_the_dtype(self):
        torch.manual_seed(3)
        module = LatentWireAdapter(100, 300, 200)
        for name, parameter in module.named_parameters():
            if "norm" in name or name == "scale":
                assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name
            else:
                bound = module.get_parameter(name.replace("bias", "weight")).shape[1] ** -0.5
                assert 0.95 * bound < parameter.abs().max() <= bound, name
        torch.manual_seed(3)
        narrow = LatentWireAdapter(100, 300, 200, dtype=torch.bfloat16)
        assert all(torch.equal(p.bfloat16(), q) for p, q in zip(module.parameters(), narrow.parameters(), strict=True))

    def test_matched_statistics_are_those_of_the_output(self):
        module, std = LatentWireAdapter(16, 64, 256), 0.01 * (1 + torch.rand(256))
        mean = 0.002 * torch.randn(256)
        module.match_statistics(mean, std)
        out = module(randn(4000, 16)).detach()
        assert (out.mean(0) - mean).norm() < 0.75 * std.norm()
        assert out.norm(dim=-1).mean().item() == pytest.approx(
            (std.square() + mean.square()).sum().sqrt().item(), rel=0.02
        )
        assert module.output_norm_weight.requires_grad
        assert module.scale == 1.0

    @pytest.mark.parametrize("pad", [0.0, -3.0, 1e30, float("nan"), float("inf")])
    def test_pads_change_no_bit(self, pad):
        module, mask = adapter(), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])

        def run(c: Tensor) -> list[Tensor]:
            c = c.clone().requires_grad_()
            out = module(c, mask)
            gradients = torch.autograd.grad(out[mask.bool()].square().sum(), (c, *module.parameters()))
            return [out, *gradients]

        c = randn(3, 5, SMALL[0])
        expected, actual = run(c), run(torch.where(mask.bool()[..., None], c, pad))
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
        assert (actual[1][mask == 0] == 0).all()
        assert torch.equal(actual[0][mask == 1], module(c)[mask == 1])

    def test_explain_shows_the_two_calls_that_fit_and_what_does_not(self):
        explanation = pyfused.explain(adapter(), randn(2, 5, SMALL[0]))
        calls = explanation.calls
        assert [(call.operator, call.shapes) for call in calls] == [
            ("projection_residual", (("M", 10), ("K", 20), ("C", 28))),
            ("projection_residual", (("M", 10), ("K", 12), ("C", 28))),
        ]
        assert {call.saved_bytes for call in calls} == {0}
        assert [part.what for part in explanation.plain] == ["W1, W2 and their GELUs", "o * sigmoid(Wf c)"]
        assert "plain torch: -: W1, W2 and their GELUs: they have no residual to add to" in str(explanation)

    def test_20_steps_are_those_of_the_formula(self):
        module, target = adapter(), 0.02 * randn(8, 6, SMALL[2], seed=4)
        parameters = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
        c, mask = randn(8, 6, SMALL[0], seed=3), torch.ones(8, 6, dtype=torch.bool)

        def losses(make, trained) -> list[float]:
            optimizer, found = torch.optim.Adam(trained, 1e-2), []
            for _ in range(20):
                optimizer.zero_grad()
                loss = latent_wire_loss(make(c), target, mask)
                loss.backward()
                optimizer.step()
                found.append(loss.item())
            return found

        fused = losses(module, module.parameters())
        assert fused == pytest.approx(losses(lambda c: plain(c, **parameters), parameters.values()), rel=1e-4)
        assert fused[-1] < 0.6 * fused[0]

    def test_compiles_whole(self):
        module, c, mask = adapter(), randn(2, 5, SMALL[0]), torch.ones(2, 5, dtype=torch.bool)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(c, mask), module(c, mask))

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda: LatentWireAdapter(0), ValueError, "LatentWireAdapter: compressed must be at least 1, got 0"),
            (lambda: LatentWireAdapter(hidden=2.0), TypeError, "LatentWireAdapter: hidden must be an int, got float"),
            (lambda: LatentWireAdapter(4, 4, -1), ValueError, "LatentWireAdapter: embedding must be at least 1"),
            (lambda: LatentWireAdapter(4, 4, 4, 1.0), ValueError, r"LatentWireAdapter: dropout must be in \[0, 1\)"),
            (lambda: LatentWireAdapter(4, 4, 4, dtype=torch.int8), TypeError, "LatentWireAdapter: dtype must be one"),
            (lambda: adapter()(randn(2, 11)), ValueError, r"c must have shape \(..., compressed\) = \(2, 12\), got"),
            (lambda: adapter()(torch.ones(2, 12).long()), TypeError, "LatentWireAdapter: c must have dtype"),
            (lambda: adapter()([1.0]), TypeError, "LatentWireAdapter: c must be a torch.Tensor, got list"),
            (lambda: adapter()(randn(2, 3, 12), torch.ones(2, 4)), TypeError, "mask must be bool or of whole numbers"),
            (lambda: adapter()(randn(2, 3, 12), torch.ones(2, 4).long()), ValueError, r"mask must have shape .*2, 3\)"),
            (lambda: adapter().match_statistics(randn(3), randn(28)), ValueError, r"mean must have shape .*28,\), got"),
            (lambda: adapter().match_statistics(randn(28), 0.1), TypeError, "std must be a torch.Tensor, got float"),
        ],
    )  # fmt: skip
    def test_bad_input(self, call, error, message):
        with pytest.raises(error, match=message):
            call()


ROWS, ONES = randn(3, 4), torch.ones(3)
MASK = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]])


def plain_loss(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Token by token."""
    losses = []
    for p, t, valid in zip(pred.flatten(0, -2), target.flatten(0, -2), mask.flatten(), strict=True):
        if valid:
            cosine = (p * t).sum() / (p.square().sum().sqrt() * t.square().sum().sqrt())
            losses.append((1 - cosine) + 0.1 * (p - t).square().sum() / len(p))
    return torch.stack(losses).sum() / len(losses)


class TestLoss:
    def pair(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        made = (randn(*MASK.shape, 10, dtype=dtype, seed=seed).requires_grad_() for seed in (1, 2))
        return tuple(made)

    def test_formula_and_gradients(self):
        pair = self.pair(torch.float64)
        actual, expected = latent_wire_loss(*pair, MASK), plain_loss(*pair, MASK)
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
        for one, other in zip(torch.autograd.grad(actual, pair), torch.autograd.grad(expected, pair), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(latent_wire_loss(pair[0], pair[0], MASK), torch.zeros((), dtype=torch.float64))

    @pytest.mark.parametrize("pad", [0.0, -7.0, 1e38, float("nan"), float("inf")])
    def test_pads_change_no_bit_and_get_no_gradient(self, pad):
        pair = self.pair()
        loss = latent_wire_loss(*pair, MASK)
        gradients = torch.autograd.grad(loss, pair)
        valid = MASK.bool()[..., None]
        padded = [torch.where(valid, x, pad).detach().requires_grad_() for x in pair]
        other = latent_wire_loss(*padded, MASK)
        assert torch.equal(other, loss)
        for one, expected in zip(torch.autograd.grad(other, padded), gradients, strict=True):
            assert torch.equal(one, expected)
            assert (one[MASK == 0] == 0).all()
            assert (one[MASK == 1] != 0).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_narrow_embeddings_are_reduced_in_float32(self, dtype):
        # Their squares overflow float16, and sums of them lose their digits in bfloat16.
        pred, target = (300 * x.detach() for x in self.pair())
        pred, target = pred.to(dtype).requires_grad_(), target.to(dtype)
        loss = latent_wire_loss(pred, target, MASK)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), plain_loss(pred.double(), target.double(), MASK), rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(loss, pred)
        assert gradient.dtype == dtype
        with torch.autocast("cpu", dtype):
            assert torch.equal(latent_wire_loss(pred, target, MASK), loss)

    def test_masks_of_every_kind(self):
        pair = self.pair()
        losses = [latent_wire_loss(*pair, MASK.to(kind)) for kind in (torch.bool, torch.int64, torch.uint8)]
        assert losses[0] == losses[1] == losses[2]

    def test_without_a_valid_token_it_is_0(self):
        pair = self.pair()
        loss = latent_wire_loss(*pair, torch.zeros_like(MASK))
        assert loss == 0
        assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, pair))

    @pytest.mark.parametrize(
        ("pred", "target", "mask", "error", "message"),
        [
            (ROWS, randn(3, 5), ONES.long(), ValueError, r"target must have shape \(..., C\) = \(3, 4\), got \(3, 5\)"),
            (ROWS, ROWS, torch.ones(4).long(), ValueError, r"mask must have shape \(...\) = \(3,\), got \(4,\)"),
            (ROWS, ROWS, ONES, TypeError, r"mask must be bool or of whole numbers, 0 at pads, got torch\.float32"),
            (ROWS, ROWS, [1, 1, 1], TypeError, "mask must be a torch.Tensor, got list"),
            (ROWS.long(), ROWS, ONES.bool(), TypeError, "pred must have dtype"),
            (ROWS, ROWS.long(), ONES.bool(), TypeError, "target must have dtype"),
            (ONES[0], ONES[0], ONES[0].bool(), ValueError, r"pred must have shape \(..., C\), got \(\)"),
        ],
    )
    def test_bad_input(self, pred, target, mask, error, message):
        with pytest.raises(error, match=f"latent_wire_loss: {message}"):
            latent_wire_loss(pred, target, mask)


class TestLabels:
    def test_pads_to_the_left_and_labels_answers_alone(self):
        ids, mask, labels = left_padded_labels([[5, 6, 7], [8]], [[1], [2, 3]], pad_token_id=9)
        assert ids.tolist() == [[5, 6, 7, 1], [9, 8, 2, 3]]
        assert mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
        assert labels.tolist() == [[-100, -100, -100, 1], [-100, -100, 2, 3]]
        assert ids.dtype == mask.dtype == labels.dtype == torch.int64

    def test_a_prompt_may_hold_the_pads_token(self):
        ids, mask, _ = left_padded_labels([[0, 4], [0]], [(0,), (0,)], pad_token_id=0)
        assert ids.tolist() == [[0, 4, 0], [0, 0, 0]]
        assert mask.tolist() == [[1, 1, 1], [0, 1, 1]]

    @pytest.mark.parametrize(
        ("prompts", "answers", "message"),
        [
            ([], [], "must be as many, at least one, got 0 prompts and 0 answers"),
            ([[1]], [[1], [2]], "must be as many, at least one, got 1 prompts and 2 answers"),
            ([[1], []], [[1], [2]], r"prompts\[1\] must have at least one token, got none"),
            ([[1], [1]], [[], [2]], r"answers\[0\] must have at least one token, got none"),
        ],
    )
    def test_bad_input(self, prompts, answers, message):
        with pytest.raises(ValueError, match=f"left_padded_labels: .*{message}"):
            left_padded_labels(prompts, answers, 0)
