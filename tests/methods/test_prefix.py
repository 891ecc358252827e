"""`pyfused.PrefixTuning`: every query sees the learned keys and values, as plain attention with more of them would."""

from __future__ import annotations

import copy
import math
import pickle

import models_setup
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyfused import LoRALinear, LoRAMultiheadAttention, PrefixTuning, inject_lora, remove_lora
from pyfused.methods.virtual_tokens import VirtualTokens

E, H, N = 24, 3, 4


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(q k^T + mask) v on (..., L, d), and the weights."""
    scores = q @ k.transpose(-2, -1) * (scale or q.shape[-1] ** -0.5)
    weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
    return weights @ v, weights


def heads(tokens: Tensor, count: int) -> Tensor:
    """(n, H d) -> (H, n, d)."""
    return torch.stack(tokens.chunk(count, dim=-1))


def alive(model: nn.Module) -> nn.Module:
    """Tokens large enough to matter."""
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, VirtualTokens):
            nn.init.normal_(module.tokens)
    return model


def gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tensors, retain_graph=True))


class TestMultiheadAttention:
    @pytest.mark.parametrize("mask", [None, "bool", "float per head", "causal", "padding", "both"])
    @pytest.mark.parametrize("need_weights", [False, True])
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_equals_the_formula(self, mask, need_weights, batch_first):
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(E, H, batch_first=batch_first, dtype=torch.float64)
        prefix = PrefixTuning(attention, N)
        alive(attention)
        tokens = attention.virtual_tokens.tokens
        x = torch.randn(2, 5, E, dtype=torch.float64, requires_grad=True)
        attn_mask = padding = None
        total = torch.zeros(2, H, 5, 5, dtype=torch.float64)
        if mask == "bool":
            attn_mask = torch.rand(5, 5) < 0.3
            total = total.masked_fill(attn_mask, -math.inf)
        elif mask == "float per head":
            attn_mask = torch.randn(2 * H, 5, 5, dtype=torch.float64)
            total = total + attn_mask.view(2, H, 5, 5)
        elif mask in ("causal", "both"):
            attn_mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
            total = total + attn_mask
        if mask in ("padding", "both"):
            padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
            total = total.masked_fill(padding[:, None, None], -math.inf)
        given = x if batch_first else x.transpose(0, 1)
        y, weights = attention(given, given, given, padding, need_weights, attn_mask, is_causal=mask == "causal")
        y = y if batch_first else y.transpose(0, 1)

        q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).unflatten(-1, (3, H, -1)).unbind(2)
        k, v = (
            torch.cat([part.transpose(1, 2), heads(own, H).expand(2, -1, -1, -1)], dim=2)
            for part, own in ((k, tokens[0]), (v, tokens[1]))
        )
        attended, seen = plain(q.transpose(1, 2), k, v, F.pad(total, (0, N)))
        expected = attention.out_proj(attended.transpose(1, 2).flatten(2))
        torch.testing.assert_close(y, expected)
        if need_weights:
            torch.testing.assert_close(weights, seen.mean(1)[..., :5])
        else:
            assert weights is None
        ones = torch.randn_like(y)
        for ours, oracle in zip(
            gradients((y * ones).sum(), x, tokens), gradients((expected * ones).sum(), x, tokens), strict=True
        ):
            torch.testing.assert_close(ours, oracle)
        assert prefix.report.prefix_parameters == 2 * N * E

    def test_rarer_forms(self):
        """Widths of their own, extra positions, no batch, a cross-attention: against one key and value at a time."""
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(
            E, H, kdim=10, vdim=14, add_bias_kv=True, add_zero_attn=True, bias=False, dtype=torch.float64
        )
        PrefixTuning(attention, N)
        alive(attention)
        q, k, v = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, E), (7, 10), (7, 14)))
        y, weights = attention(q, k, v)
        assert weights.shape == (5, 7 + 2)
        own_k, own_v = attention.virtual_tokens()
        keys = torch.cat([k @ attention.k_proj_weight.T, attention.bias_k[0], torch.zeros(1, E), own_k])
        values = torch.cat([v @ attention.v_proj_weight.T, attention.bias_v[0], torch.zeros(1, E), own_v])
        attended, _ = plain(heads(q @ attention.q_proj_weight.T, H), heads(keys, H), heads(values, H))
        torch.testing.assert_close(y, attention.out_proj(torch.cat([*attended], dim=-1)))

    def test_an_encoder_with_padding_takes_no_path_around_it(self):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(E, 4, 32, batch_first=True, dropout=0.0)
        encoder = nn.TransformerEncoder(layer, 2).eval()
        prefix = PrefixTuning(encoder, N)
        alive(encoder)
        assert any("nested tensors" in note for note in prefix.report.notes)
        x, padding = torch.randn(2, 5, E), torch.tensor([[False] * 5, [False, False, False, True, True]])
        with torch.no_grad():
            quick = encoder(x, src_key_padding_mask=padding)
        slow = encoder(x, src_key_padding_mask=padding)
        torch.testing.assert_close(quick, slow)
        prefix.remove()
        assert encoder.use_nested_tensor
        with torch.no_grad():
            bare = encoder(x, src_key_padding_mask=padding)
        # The first sample has no padding.
        assert not torch.allclose(quick[0], bare[0], atol=1e-3)


def attend(x: Tensor, key: Tensor) -> Tensor:
    """(B, L, E) each, as H heads."""
    query, key = (part.unflatten(-1, (H, -1)).transpose(1, 2) for part in (x, key))
    return F.scaled_dot_product_attention(query, key, key)


class Attention(nn.Module):
    """Calls the operator, with what a test wants of its layout."""

    def __init__(self, num_heads: int = H, key_heads: int = H, width: int = 8, layout: str = "heads") -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.layout = num_heads, width, layout
        self.q_proj = nn.Linear(E, num_heads * width, dtype=torch.float64)
        self.k_proj = nn.Linear(E, key_heads * width, dtype=torch.float64)
        self.v_proj = nn.Linear(E, key_heads * width, dtype=torch.float64)

    def forward(self, x: Tensor, fused: bool = True, windows: int = 2, copied: bool = False, **settings) -> Tensor:
        parts = [
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        ]
        if self.layout == "flat":
            parts = [part.flatten(0, 1) for part in parts]
        elif self.layout == "windows":
            parts = [part.unflatten(2, (windows, -1)) for part in parts]
        elif self.layout == "windows first":
            parts = [part.unflatten(2, (windows, -1)).transpose(1, 2) for part in parts]
        if self.layout == "repeated":
            parts = [part.repeat_interleave(self.num_heads // part.shape[1], dim=1) for part in parts]
        if copied:
            parts = [part.contiguous() for part in parts]
        if not fused:
            return plain(*parts)[0]
        return F.scaled_dot_product_attention(*parts, **settings)


def expected_of(attention: Attention, x: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """(B, H, L, d), by the formula."""
    q, k, v = (
        layer(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    own = [heads(part, k.shape[1]).expand(len(x), -1, -1, -1) for part in attention.virtual_tokens()]
    k, v = (
        torch.cat([part, more], dim=2).repeat_interleave(q.shape[1] // part.shape[1], dim=1)
        for part, more in zip((k, v), own, strict=True)
    )
    return plain(q, k, v, None if mask is None else F.pad(mask, (0, N)), scale)[0]


class TestOperator:
    @pytest.mark.parametrize("settings", ["none", "bool", "float", "per sample", "causal", "scale"])
    @pytest.mark.parametrize("layout", ["heads", "shared", "repeated"])
    def test_equals_the_formula(self, settings, layout):
        torch.manual_seed(0)
        attention = Attention(4, 4 if layout == "heads" else 2, layout=layout)
        PrefixTuning(attention, N)
        alive(attention)
        x = torch.randn(2, 6, E, dtype=torch.float64, requires_grad=True)
        given: dict = {"enable_gqa": True} if layout == "shared" else {}
        mask = scale = None
        if settings == "bool":
            allowed = torch.rand(6, 6) < 0.7
            mask = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~allowed, -math.inf)
            given["attn_mask"] = allowed
        elif settings == "float":
            given["attn_mask"] = mask = torch.randn(6, 6, dtype=torch.float64)
        elif settings == "per sample":
            allowed = torch.rand(2, 1, 1, 6) < 0.7
            mask = torch.zeros(2, 1, 1, 6, dtype=torch.float64).masked_fill(~allowed, -math.inf)
            given["attn_mask"] = allowed
        elif settings == "causal":
            mask = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
            given["is_causal"] = True
        elif settings == "scale":
            given["scale"] = scale = 0.7
        y, expected = attention(x, **given), expected_of(attention, x, mask, scale)
        torch.testing.assert_close(y, expected)
        tokens, weights = attention.virtual_tokens.tokens, torch.randn_like(y)
        for ours, oracle in zip(
            gradients((y * weights).sum(), x, tokens), gradients((expected * weights).sum(), x, tokens), strict=True
        ):
            torch.testing.assert_close(ours, oracle)

    def test_a_mask_and_causal_together(self):
        torch.manual_seed(0)
        attention = Attention(4, 4)
        PrefixTuning(attention, N)
        alive(attention)
        x = torch.randn(2, 6, E, dtype=torch.float64)
        causal = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
        given = torch.randn(6, 6, dtype=torch.float64)
        y = attention(x, attn_mask=given, is_causal=True)
        torch.testing.assert_close(y, expected_of(attention, x, given + causal))
        allowed = torch.rand(6, 6) < 0.7
        hidden = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~allowed, -math.inf)
        y = attention(x, attn_mask=allowed, is_causal=True)
        torch.testing.assert_close(y, expected_of(attention, x, hidden + causal))

    def test_a_checkpoint_inside_the_forward_is_an_error(self):
        class Inner(Attention):
            def attend(self, x):
                return super().forward(x)

            def forward(self, x):
                return checkpoint(self.attend, x, use_reentrant=True)

        attention = Inner()
        PrefixTuning(attention)
        x = torch.randn(1, 6, E, dtype=torch.float64, requires_grad=True)
        with pytest.raises(RuntimeError, match="checkpoint around the whole attention, not inside it"):
            attention(x)
        with torch.no_grad():
            attention(x)

    def test_layouts_without_a_dimension_of_heads_at_its_place(self):
        torch.manual_seed(0)
        x = torch.randn(2, 6, E, dtype=torch.float64)
        flat = Attention(layout="flat")
        PrefixTuning(flat, N)
        alive(flat)
        torch.testing.assert_close(flat(x), expected_of(flat, x).flatten(0, 1))
        windows = Attention(layout="windows")
        PrefixTuning(windows, N)
        alive(windows)
        halves = [expected_of(windows, half) for half in x.chunk(2, dim=1)]
        torch.testing.assert_close(windows(x), torch.stack(halves, dim=2))
        # Windows before the heads, as in Twins, as many as the heads or not.
        first = Attention(layout="windows first")
        PrefixTuning(first, N)
        alive(first)
        halves = [expected_of(first, half) for half in x.chunk(2, dim=1)]
        torch.testing.assert_close(first(x), torch.stack(halves, dim=1))
        # As many windows as heads.
        longer = torch.cat([x, x[:, :3]], dim=1)
        parts = [expected_of(first, part) for part in longer.chunk(3, dim=1)]
        torch.testing.assert_close(first(longer, windows=3), torch.stack(parts, dim=1))
        torch.testing.assert_close(
            windows(longer, windows=3), torch.stack([expected_of(windows, p) for p in longer.chunk(3, dim=1)], dim=2)
        )
        with pytest.raises(RuntimeError, match="expected keys with one dimension of 3 heads"):
            first(longer, windows=3, copied=True)

    def test_a_call_without_the_operator_is_an_error(self):
        attention = Attention()
        PrefixTuning(attention)
        with pytest.raises(RuntimeError, match="must call scaled_dot_product_attention"):
            attention(torch.randn(1, 6, E, dtype=torch.float64), fused=False)

    def test_keys_of_other_heads_are_an_error(self):
        attention = Attention()
        PrefixTuning(attention)
        attention.head_dim = 4
        with pytest.raises(RuntimeError, match=r"one dimension of 3 heads, of width 8, got shape \(1, 6, 6, 4\)"):
            attention(torch.randn(1, 6, E, dtype=torch.float64))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(E, H, batch_first=True)
        self.attn = Attention().float()
        self.out = nn.Linear(E, E)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = x + self.mha(x, x, x, need_weights=False)[0]
        return x + self.out(self.attn(x).transpose(1, 2).flatten(2))


def block(**settings) -> tuple[Block, PrefixTuning, Tensor]:
    torch.manual_seed(0)
    model = Block().eval()
    prefix = PrefixTuning(model, N, **settings)
    return alive(model), prefix, torch.randn(2, 5, E)


class TestModel:
    def test_what_trains(self):
        model, prefix, x = block(train=["out"])
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        tokens = {"mha.virtual_tokens.tokens", "attn.virtual_tokens.tokens"}
        assert trained == tokens | {"out.weight", "out.bias"}
        assert prefix.report.prefix_parameters == 2 * (2 * N * E)
        assert prefix.report.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert prefix.report.total_parameters == sum(p.numel() for p in model.parameters())
        assert "prefix parameters     384 in 2 modules" in str(prefix.report)
        assert any("BatchNorm" in note for note in prefix.report.notes)
        assert not model.train().norm.training
        model(x).square().mean().backward()
        for name in tokens:
            assert (model.get_parameter(name).grad.abs().amax(dim=-1) > 0).all()
        assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)

    @pytest.mark.parametrize("projection", [False, True])
    def test_a_projection_gives_the_tokens(self, projection):
        model, prefix, x = block(prefix_projection=projection)
        own = model.mha.virtual_tokens
        k, v = own()
        if projection:
            hidden = torch.tanh(own.tokens @ own.hidden_weight.T + own.hidden_bias)
            both = hidden @ own.out_weight.T + own.out_bias
            torch.testing.assert_close(k, both[:, :E])
            torch.testing.assert_close(v, both[:, E:])
            assert prefix.report.rows[0].parameters == N * E + 512 * E + 512 + 2 * E * 512 + 2 * E
        model(x).square().mean().backward()
        assert all(p.grad is not None and p.grad.any() for p in own.parameters())

    def test_dropout_acts_in_training_alone(self):
        model, _, x = block(dropout=0.5)
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))
        k, _ = model.mha.virtual_tokens()
        kept = k != 0
        assert 0 < kept.float().mean() < 1
        torch.testing.assert_close(k[kept], 2 * model.mha.virtual_tokens.tokens[0][kept])

    def test_removing_gives_the_model_back(self):
        torch.manual_seed(0)
        model = Block()
        before, types = model.state_dict(), [type(module) for module in model.modules()]
        prefix = PrefixTuning(model)
        prefix.remove()
        assert [type(module) for module in model.modules()] == types
        assert model.state_dict().keys() == before.keys()
        assert not any(name.startswith("virtual") for module in model.modules() for name in vars(module))
        with pytest.raises(ValueError, match="none left"):
            prefix.remove()
        with pytest.raises(ValueError, match="none left"):
            prefix.state_dict()

    @pytest.mark.parametrize("first", ["lora", "prefix"])
    def test_beside_lora(self, first):
        torch.manual_seed(0)
        model, x = Block().eval(), torch.randn(2, 5, E)
        for step in (first, "prefix" if first == "lora" else "lora"):
            if step == "lora":
                inject_lora(model, rank=2)
            else:
                prefix = PrefixTuning(model, N)
        alive(model)
        nn.init.normal_(model.mha.in_proj_lora_b)
        assert isinstance(model.mha, LoRAMultiheadAttention)
        assert isinstance(model.attn.q_proj, LoRALinear)
        # Both train, whichever came first.
        trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {"tokens", "lora_a", "lora_b", "in_proj_lora_a", "in_proj_lora_b"}
        y = model(x)
        y.square().mean().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        model.mha.merge()
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError, match="cannot train"):
            model.train()(x)
        model.eval()
        remove_lora(model)
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
        assert type(model.mha).__name__ == "PrefixedMultiheadAttention"
        prefix.remove()
        assert type(model.mha) is nn.MultiheadAttention
        assert not torch.allclose(model(x), y, atol=1e-3)

    def test_removing_the_prefix_first_leaves_lora(self):
        model, prefix, x = block()
        inject_lora(model, rank=2)
        prefix.remove()
        assert type(model.mha) is LoRAMultiheadAttention
        model(x)

    def test_copies_and_pickles_keep_it(self):
        model, _, x = block()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), model(x))
            nn.init.zeros_(other.mha.virtual_tokens.tokens)
            assert not torch.equal(other(x), model(x))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_tokens_stay_float32(self, dtype):
        model, _, x = block()
        y = model(x)
        model.to(dtype)
        assert model.mha.virtual_tokens.tokens.dtype == torch.float32
        low = model(x.to(dtype))
        assert low.dtype == dtype
        assert (low.float() - y).norm() <= 20 * torch.finfo(dtype).eps * y.norm()
        low.float().square().mean().backward()
        assert model.attn.virtual_tokens.tokens.grad.dtype == torch.float32

    def test_modes(self):
        model, _, x = block()
        y = model(x)
        with torch.no_grad():
            assert torch.equal(model(x), y)
        with torch.inference_mode():
            assert torch.equal(model(x), y)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), y)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), y)
        torch.testing.assert_close(checkpoint(model, x, use_reentrant=False), y)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
        assert (low.float() - y).norm() <= 0.02 * y.norm()

    def test_one_seed_gives_one_prefix(self):
        tokens = []
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            model = Block().to(dtype)
            torch.manual_seed(5)
            PrefixTuning(model)
            tokens.append(model.mha.virtual_tokens.tokens.detach().float())
        assert torch.equal(tokens[0], tokens[1])
        assert torch.equal(tokens[0], tokens[2])


class TestShallow:
    @pytest.mark.parametrize("layers", [1, 3])
    def test_open_clip_against_the_blocks_by_hand(self, layers):
        torch.manual_seed(0)
        tower = models_setup.small_vit(layers=layers).eval()
        x = torch.randn(2, 3, 16, 16)
        transformer = copy.deepcopy(tower.transformer)
        prefix = PrefixTuning(tower, N, deep=False)
        alive(tower)
        (row,) = prefix.report.rows
        assert (row.tokens, row.width, row.parameters) == (N, 32, 32 * N)
        tokens = tower.transformer.resblocks[0].virtual_tokens.tokens[0]
        y = tower(x)
        stream = tower._embeds(x)
        longer = torch.cat([stream, tokens.expand(2, -1, -1)], dim=1)
        pooled, _ = tower._pool(transformer(longer)[:, :-N])
        torch.testing.assert_close(y, pooled @ tower.proj)
        y.square().mean().backward()
        assert (tower.transformer.resblocks[0].virtual_tokens.tokens.grad.abs().amax(-1) > 0).all()
        assert [name for name, p in tower.named_parameters() if p.requires_grad] == [
            "transformer.resblocks.0.virtual_tokens.tokens"
        ]
        for other in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
            assert torch.equal(other(x), tower(x))
        prefix.remove()
        pooled, _ = tower._pool(transformer(stream))
        torch.testing.assert_close(tower(x), pooled @ tower.proj)

    def test_sequence_first(self):
        torch.manual_seed(0)
        transformer = pytest.importorskip("open_clip.transformer", reason="open_clip is not installed")
        tower = transformer.VisionTransformer(16, 8, 32, 2, 4, 2.0, output_dim=8).eval()
        turned = copy.deepcopy(tower)
        turned.transformer.batch_first = False
        for part in turned.transformer.resblocks:
            part.attn.batch_first = False
        x = torch.randn(2, 3, 16, 16)
        for model in (tower, turned):
            PrefixTuning(model, N, deep=False)
            alive(model)
        torch.testing.assert_close(turned(x), tower(x))

    def test_timm(self):
        timm = pytest.importorskip("timm", reason="timm is not installed")
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()
        x = torch.randn(2, 3, 32, 32)
        plain_model = copy.deepcopy(model)
        PrefixTuning(model, N, deep=False, train=["head"])
        alive(model)
        tokens = model.blocks[0].virtual_tokens.tokens[0]
        stream = torch.cat([plain_model._pos_embed(plain_model.patch_embed(x)), tokens.expand(2, -1, -1)], dim=1)
        expected = plain_model.forward_head(plain_model.norm(plain_model.blocks(stream)[:, :-N]))
        torch.testing.assert_close(model(x), expected)
        # Whoever pools over the sequence does not see them.
        assert model.forward_features(x).shape == (2, 5, 192)
        wide = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, norm_layer="rmsnorm", qk_norm=True)
        assert PrefixTuning(wide, N, deep=False).report.rows[0].width == 192
        wide(x)
        model.set_grad_checkpointing()
        torch.testing.assert_close(model(x), expected)

    def test_other_towers_are_refused(self):
        with pytest.raises(TypeError, match="must be timm's or open_clip's VisionTransformer where deep is False, got"):
            PrefixTuning(Block(), deep=False)
        with pytest.raises(ValueError, match="exclude must be empty where deep is False"):
            PrefixTuning(models_setup.small_vit(), deep=False, exclude=["transformer"])


class TestCheckpoint:
    @pytest.mark.parametrize("settings", [{}, {"prefix_projection": True, "dropout": 0.1}])
    def test_round_trip(self, settings, tmp_path):
        model, prefix, x = block(**settings)
        torch.save(prefix.state_dict(), tmp_path / "prefix.pt")
        other, again, _ = block(**settings)
        nn.init.ones_(other.mha.virtual_tokens.tokens)
        assert not torch.equal(other(x), model(x))
        again.load_state_dict(torch.load(tmp_path / "prefix.pt", weights_only=True))
        assert torch.equal(other(x), model(x))

    def test_of_a_compiled_model(self):
        _, prefix, x = block()
        state = prefix.state_dict()
        other, _, _ = block()
        compiled = torch.compile(other, backend="eager")
        again = PrefixTuning.__new__(PrefixTuning)
        again.model = compiled
        nn.init.ones_(other.mha.virtual_tokens.tokens)
        again.load_state_dict(state)
        assert torch.equal(other.mha.virtual_tokens.tokens, prefix.model.mha.virtual_tokens.tokens)
        compiled(x)

    def test_another_one_is_refused_and_nothing_changes(self):
        model, prefix, x = block()
        before = model(x)
        _, wider, _ = block(prefix_projection=True)
        _, dropping, _ = block(dropout=0.25)
        bad = {
            "expected": PrefixTuning(Block(), N + 1).state_dict(),
            "missing": wider.state_dict(),
            "dropout 0.25 in the state": dropping.state_dict(),
            "must hold the settings": {k: v for k, v in prefix.state_dict().items() if k != "prefix_settings"},
        }
        for message, state in bad.items():
            with pytest.raises(ValueError, match=message):
                prefix.load_state_dict(state)
        assert torch.equal(model(x), before)


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"num_virtual_tokens": 0}, ValueError, "num_virtual_tokens must be at least 1, got 0"),
            ({"num_virtual_tokens": 2.0}, TypeError, "num_virtual_tokens must be an int, got float"),
            ({"deep": 1}, TypeError, "deep"),
            ({"freeze_batchnorm": None}, TypeError, "freeze_batchnorm"),
            ({"dropout": 1.0}, ValueError, "dropout"),
            ({"train": ["haed"]}, ValueError, "train must hold dotted paths inside the model, got 'haed'"),
            ({"exclude": ["mah"]}, ValueError, "near names: mha"),
            ({"exclude": ["mha", "attn"]}, ValueError, "must have attentions outside exclude"),
        ],
    )
    def test_settings(self, settings, error, message):
        model = Block()
        before = [(type(module), dict(vars(module)).keys()) for module in model.modules()]
        with pytest.raises(error, match=message):
            PrefixTuning(model, **settings)
        assert [(type(module), dict(vars(module)).keys()) for module in model.modules()] == before
        assert all(p.requires_grad for p in model.parameters())

    def test_what_is_no_model_or_has_no_attention(self):
        with pytest.raises(TypeError, match=r"model must be an nn.Module"):
            PrefixTuning("model")
        with pytest.raises(ValueError, match="got a Linear with none"):
            PrefixTuning(nn.Linear(3, 3))

    def test_a_second_prefix(self):
        model, _, _ = block()
        with pytest.raises(ValueError, match=r"no virtual tokens yet, got 'mha.virtual_tokens'; remove\(\) them first"):
            PrefixTuning(model)

    def test_what_cannot_carry_tokens_is_said(self):
        class Own(nn.MultiheadAttention):
            def forward(self, x):
                return x

        model = nn.ModuleDict({"own": Own(E, H), "slow": Attention(), "hooked": Attention(), "good": Attention()})
        model["slow"].fused_attn = False
        model["hooked"].forward = lambda x: x
        del model["hooked"].k_proj, model["hooked"].v_proj
        report = PrefixTuning(model).report
        assert [row.path for row in report.rows] == ["good"]
        for reason in ("a forward of its own", "fused_attn is False", "its forward was replaced"):
            assert any(reason in note for note in report.notes)

    def test_forwards_that_call_another(self):
        class Sub(Attention):
            def forward(self, x):
                return super().forward(x) * 2

        class Beside(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.num_heads, self.k_proj = H, nn.Linear(E, E)

            def forward(self, x):
                return attend(x, self.k_proj(x))

        model = nn.ModuleDict({"sub": Sub(), "beside": Beside()})
        assert [row.path for row in PrefixTuning(model).report.rows] == ["sub", "beside"]
        assert model["sub"](torch.randn(1, 6, E, dtype=torch.float64)).shape == (1, H, 6, 8)
        assert model["beside"](torch.randn(1, 6, E)).shape == (1, H, 6, 8)

    def test_under_inference_mode(self):
        with torch.inference_mode(), pytest.raises(ValueError, match=r"outside torch.inference_mode\(\)"):
            PrefixTuning(Block())

    def test_a_member_of_that_name_is_kept(self):
        attention = Attention()
        attention.virtual_tokens = nn.Parameter(torch.ones(3))
        with pytest.raises(ValueError, match="without a member 'virtual_tokens'"):
            PrefixTuning(attention)
        assert torch.equal(attention.virtual_tokens, torch.ones(3))
        assert type(attention) is Attention

    def test_members_of_any_name_go_on_working(self):
        class Own(Attention):
            def __init__(self) -> None:
                super().__init__()
                self.prefix, self.plain, self._kind = nn.Identity(), nn.Identity(), nn.Identity()

            def _heads(self, x):
                return self.prefix(self.plain(self._kind(x)))

            def forward(self, x):
                return self._heads(super().forward(x))

        attention = Own()
        PrefixTuning(attention)
        attention(torch.randn(1, 6, E, dtype=torch.float64))

    def test_what_changed_since_is_not_taken_apart(self):
        model, prefix, _ = block()
        model.attn.forward = lambda x: x
        with pytest.raises(RuntimeError, match="take it out first"):
            prefix.remove()
        del model.attn.forward
        model.mha.__class__ = type("Later", (type(model.mha),), {})
        with pytest.raises(RuntimeError, match="got one on top of it"):
            prefix.remove()
        # All or nothing: the other attention too has its tokens still.
        assert len([module for module in model.modules() if isinstance(module, VirtualTokens)]) == 2
        assert type(model.attn).__name__ == "PrefixedAttention"

    def test_quantised_attentions(self):
        class Frozen(Attention):
            def __init__(self) -> None:
                super().__init__()
                for layer in (self.q_proj, self.k_proj, self.v_proj):
                    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
                    layer.bias = None

        attention = Frozen()
        PrefixTuning(attention)
        assert attention.virtual_tokens.tokens.dtype == torch.float32

    def test_lora_made_by_hand_leaves_the_tokens_training(self):
        attention = nn.MultiheadAttention(E, H)
        PrefixTuning(attention)
        adapted = LoRAMultiheadAttention.from_mha(attention, 2)
        assert adapted.virtual_tokens.tokens.requires_grad
        assert not adapted.out_proj.weight.requires_grad

    def test_eager_attention_of_transformers(self):
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        config = transformers.LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            attn_implementation="eager",
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        with pytest.raises(ValueError, match=r'its attention is "eager": call set_attn_implementation\("sdpa"\)'):
            PrefixTuning(model)
        model.set_attn_implementation("sdpa")
        PrefixTuning(model, N)
        alive(model.eval())
        # With a cache: what one token at a time gives is what all of them at once do.
        tokens = torch.randint(20, (1, 6))
        whole = model(tokens).logits
        cache, steps = None, []
        for place in range(6):
            output = model(tokens[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_counts_of_vit_b_32():
    model = models_setup.vit_b_32("meta")
    report = PrefixTuning(model.clip.visual, 10).report
    assert len(report.rows) == 12
    assert report.prefix_parameters == report.trainable_parameters == 12 * 2 * 10 * 768
    shallow = PrefixTuning(models_setup.vit_b_32("meta").clip.visual, 10, deep=False).report
    assert shallow.trainable_parameters == 7680
