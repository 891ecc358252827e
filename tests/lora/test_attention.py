"""LoRAMultiheadAttention: everything nn.MultiheadAttention does, with the low-rank terms as if they were merged."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
import warnings

import pytest
import torch
from models_setup import wake
from torch import nn

from pyfused.modules import LoRALinear, LoRAMultiheadAttention
from pyfused.ops import decision

E, H, L, S, B = 16, 4, 5, 6, 3
GEOMETRIES = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim": {"kdim": 10},
    "kdim vdim": {"kdim": 10, "vdim": 12, "add_bias_kv": True},
}
MASKS = ("none", "bool", "float", "per head", "causal", "padding", "float padding", "both", "causal padding")


def build(geometry: dict, **settings) -> tuple[nn.MultiheadAttention, LoRAMultiheadAttention]:
    """An attention with random biases, and the adapted one beside it (not on its parameters)."""
    mha = nn.MultiheadAttention(E, H, **geometry)
    with torch.no_grad():
        for parameter in mha.parameters():
            if parameter.dim() == 1:
                parameter.normal_()
    return mha, wake(LoRAMultiheadAttention.from_mha(copy.deepcopy(mha), **{"rank": 3, "alpha": 6, **settings}))


@torch.no_grad()
def fold(mha: nn.MultiheadAttention, lora: LoRAMultiheadAttention) -> nn.MultiheadAttention:
    """``mha`` with weights W + s B A, formed here and not by merge()."""
    folded = copy.deepcopy(mha)
    scaling = lora.alpha / lora.rank
    if lora.qkv == "joint":
        folded.in_proj_weight += scaling * lora.in_proj_lora_b @ lora.in_proj_lora_a
    elif lora.qkv == "split":
        for i, letter in enumerate("qkv"):
            delta = scaling * getattr(lora, f"{letter}_proj_lora_b") @ getattr(lora, f"{letter}_proj_lora_a")
            if folded._qkv_same_embed_dim:
                folded.in_proj_weight[i * E : (i + 1) * E] += delta
            else:
                getattr(folded, f"{letter}_proj_weight").add_(delta)
    if isinstance(lora.out_proj, LoRALinear):
        folded.out_proj.weight += scaling * lora.out_proj.lora_b @ lora.out_proj.lora_a
    return folded


def inputs(mha, kind: str, batched: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def draw(length: int, width: int) -> torch.Tensor:
        shape = (length, width)
        if batched:
            shape = (B, length, width) if mha.batch_first else (length, B, width)
        return torch.randn(shape, requires_grad=True)

    query = draw(L, E)
    if kind == "self":
        return query, query, query
    key = draw(S, mha.kdim)
    return query, key, key if kind == "cross" else draw(S, mha.vdim)


def masks(kind: str, batched: bool, length: int, source: int) -> dict:
    blocked = torch.rand(length, source) > 0.7
    blocked[:, 0] = False
    padding = torch.zeros((B, source) if batched else (source,), dtype=torch.bool)
    padding[..., -2:] = True
    causal = torch.ones(length, source, dtype=torch.bool).triu(1)
    floating = torch.randn(length, source)
    per_head = torch.randn((B if batched else 1) * H, length, source)
    return {
        "none": {},
        "bool": {"attn_mask": blocked},
        "float": {"attn_mask": floating},
        "per head": {"attn_mask": per_head},
        "causal": {"attn_mask": causal, "is_causal": True},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.randn(padding.shape)},
        "both": {"attn_mask": floating, "key_padding_mask": padding.float() * -3},
        "causal padding": {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding},
    }[kind]


def cases() -> list[tuple]:
    """Every geometry with every mask; the plain one with every kind of input, the other choices drawn once for all."""
    rng = random.Random(0)
    drawn = []
    for geometry, mask in itertools.product(GEOMETRIES, MASKS):
        kinds = ["self", "cross", "three"] if geometry == "plain" else [rng.choice(["self", "cross", "three"])]
        for kind in ["three"] if "dim" in geometry else kinds:
            qkv = "split" if "dim" in geometry else rng.choice(["joint", "split"])
            flags = {"need_weights": rng.random() < 0.5, "average_attn_weights": rng.random() < 0.5}
            drawn.append((geometry, mask, kind, qkv, rng.random() < 0.5, rng.random() < 0.75, flags))
    return drawn


@pytest.mark.parametrize(("geometry", "mask", "kind", "qkv", "batch_first", "batched", "flags"), cases())
def test_equals_the_attention_with_folded_weights(geometry, mask, kind, qkv, batch_first, batched, flags):
    mha, lora = build({**GEOMETRIES[geometry], "batch_first": batch_first}, qkv=qkv)
    folded = fold(mha, lora)
    q, k, v = inputs(mha, kind, batched)
    kwargs = {**masks(mask, batched, L, L if kind == "self" else S), **flags}
    leaves = list({id(t): t for t in (q, k, v)}.values())
    expected, expected_weights = folded(q, k, v, **kwargs)
    y, weights = lora(q, k, v, **kwargs)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(y)
    for grad, wanted in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_starts_as_its_base(geometry):
    mha = nn.MultiheadAttention(E, H, **GEOMETRIES[geometry])
    lora = LoRAMultiheadAttention.from_mha(mha, qkv="split" if "dim" in geometry else "joint")
    q, k, v = inputs(mha, "three", batched=True)
    expected, weights = mha(q, k, v)
    y, own_weights = lora(q, k, v)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own_weights, weights, rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    for name, parameter in lora.named_parameters():
        if name.endswith("lora_a"):
            assert parameter.grad.abs().max() == 0, name
        elif name.endswith("lora_b"):
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_parameter_gradients_are_those_of_the_folded_weight():
    mha, lora = build({"batch_first": True})
    folded = fold(mha, lora)
    x, dy = torch.randn(B, L, E), torch.randn(B, L, E)
    folded(x, x, x)[0].backward(dy)
    lora(x, x, x)[0].backward(dy)
    scaling = lora.alpha / lora.rank
    for weight, a, b in (
        (folded.in_proj_weight, lora.in_proj_lora_a, lora.in_proj_lora_b),
        (folded.out_proj.weight, lora.out_proj.lora_a, lora.out_proj.lora_b),
    ):
        torch.testing.assert_close(a.grad, scaling * b.T @ weight.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(b.grad, scaling * weight.grad @ a.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "calls"), [("self", 1), ("cross", 2), ("three", 3)])
def test_inputs_that_are_one_tensor_share_one_product(kind, calls):
    _, lora = build({"batch_first": True})
    seen = []
    with decision.observed(lambda told: seen.append(told.sizes["N"] // E)):
        lora(*inputs(lora, kind, batched=True), need_weights=False)
    assert len(seen) == calls + 1
    assert sum(seen) == 4


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ({"out_proj": False}, ["in_proj_lora_a", "in_proj_lora_b"]),
        ({"in_proj": False}, ["out_proj.lora_a", "out_proj.lora_b"]),
    ],
)
def test_one_projection_alone(parts, names):
    mha, lora = build({"batch_first": True}, **parts)
    assert [name for name, p in lora.named_parameters() if p.requires_grad] == names
    x = torch.randn(B, L, E)
    expected = fold(mha, lora)(x, x, x)[0]
    torch.testing.assert_close(lora(x, x, x)[0], expected, rtol=1e-4, atol=1e-5)
    lora.merge()
    assert lora.merged
    torch.testing.assert_close(lora.eval()(x, x, x)[0], expected, rtol=1e-4, atol=1e-5)


def test_parameter_counts_at_width_768():
    with torch.device("meta"):
        mha = nn.MultiheadAttention(768, 12)
        joint = LoRAMultiheadAttention.from_mha(mha, rank=16)
        split = LoRAMultiheadAttention.from_mha(mha, rank=16, qkv="split")

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    assert count(joint) - count(joint.out_proj) == 49_152
    assert count(joint.out_proj) == 24_576
    assert count(split) - count(split.out_proj) == 73_728


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_dropout_acts_in_training_alone(need_weights):
    mha, lora = build({"batch_first": True, "dropout": 0.5})
    x = torch.randn(B, L, E)
    torch.manual_seed(1)
    y, weights = lora(x, x, x, need_weights=need_weights, average_attn_weights=False)
    torch.manual_seed(1)
    assert torch.equal(y, lora(x, x, x, need_weights=need_weights)[0])
    assert not torch.allclose(y, lora(x, x, x, need_weights=need_weights)[0])
    if need_weights:
        assert 0.2 < (weights == 0).float().mean() < 0.8
    expected = fold(mha, lora).eval()(x, x, x)[0]
    torch.testing.assert_close(lora.eval()(x, x, x, need_weights=need_weights)[0], expected, rtol=1e-4, atol=1e-5)


def test_lora_dropout_leaves_the_attention_weights_of_the_base_alone():
    mha, lora = build({"batch_first": True}, dropout=0.5)
    x = torch.randn(B, L, E)
    assert lora.dropout == 0.0
    assert not torch.allclose(lora(x, x, x)[0], lora(x, x, x)[0])
    with torch.no_grad():
        lora.in_proj_lora_b.zero_()
        lora.out_proj.lora_b.zero_()
    torch.testing.assert_close(lora(x, x, x)[0], mha(x, x, x)[0], rtol=1e-4, atol=1e-5)


class TestMerge:
    @pytest.mark.parametrize(
        ("geometry", "qkv"), [("plain", "joint"), ("bias_kv zero_attn", "joint"), *((g, "split") for g in GEOMETRIES)]
    )
    def test_merged_equals_unmerged_and_unmerge_is_bit_exact(self, geometry, qkv):
        _, lora = build(GEOMETRIES[geometry], qkv=qkv)
        lora.eval()
        before = {name: value.clone() for name, value in lora.state_dict().items()}
        q, k, v = inputs(lora, "three", batched=True)
        expected, weights = lora(q, k, v)
        lora.merge()
        assert lora.merged
        merged, merged_weights = lora(q, k, v)
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merged_weights, weights, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(value, before[name]) for name, value in lora.state_dict().items())
        plain = lora.to_base()
        assert type(plain) is nn.MultiheadAttention
        torch.testing.assert_close(plain(q, k, v)[0], expected, rtol=1e-4, atol=1e-5)
        lora.unmerge()
        assert all(torch.equal(value, before[name]) for name, value in dict(lora.named_parameters()).items())
        assert torch.equal(lora(q, k, v)[0], expected)

    def test_to_base_gives_back_the_original(self):
        mha = nn.MultiheadAttention(E, H)
        plain = wake(LoRAMultiheadAttention.from_mha(mha)).to_base(merge=False)
        assert plain.__dict__.keys() == mha.__dict__.keys()
        assert type(plain.out_proj) is type(mha.out_proj)
        assert dict(plain.named_parameters()).keys() == dict(mha.named_parameters()).keys()
        assert all(a is b for a, b in zip(plain.parameters(), mha.parameters(), strict=True))

    def test_a_merged_module_refuses_to_train(self):
        _, lora = build({})
        x = torch.randn(L, B, E)
        lora.merge()
        with pytest.raises(RuntimeError, match=r"merged.*unmerge\(\)"):
            lora(x, x, x)
        lora.unmerge()
        lora.out_proj.merge()
        assert not lora.merged
        with pytest.raises(RuntimeError, match="LoRALinear: a merged module cannot train"):
            lora(x, x, x)

    def test_half_merged_modules_still_compute_the_same(self):
        _, lora = build({})
        lora.eval()
        x = torch.randn(L, B, E)
        expected = lora(x, x, x)[0]
        lora.out_proj.merge()
        torch.testing.assert_close(lora(x, x, x)[0], expected, rtol=1e-4, atol=1e-5)
        lora.merge()
        lora.out_proj.unmerge()
        assert not lora.merged
        torch.testing.assert_close(lora(x, x, x)[0], expected, rtol=1e-4, atol=1e-5)


class TestState:
    def test_loads_the_original_state_dict(self):
        mha, other = nn.MultiheadAttention(E, H), nn.MultiheadAttention(E, H)
        lora = LoRAMultiheadAttention.from_mha(mha)
        result = lora.load_state_dict(other.state_dict(), strict=False)
        assert result.unexpected_keys == []
        assert sorted(result.missing_keys) == [
            "in_proj_lora_a", "in_proj_lora_b", "out_proj.lora_a", "out_proj.lora_b",
        ]  # fmt: skip
        x = torch.randn(L, B, E)
        torch.testing.assert_close(lora(x, x, x)[0], other(x, x, x)[0])

    @pytest.mark.parametrize("merged", [True, False])
    def test_round_trip_copy_and_pickle(self, merged):
        _, lora = build({"add_bias_kv": True})
        lora.eval()
        if merged:
            lora.merge()
        x = torch.randn(L, B, E)
        expected = lora(x, x, x)[0]
        _, loaded = build({"add_bias_kv": True})
        loaded.load_state_dict(lora.state_dict())
        torch.testing.assert_close(loaded(x, x, x)[0], expected, rtol=1e-4, atol=1e-5)
        for twin in (copy.deepcopy(lora), pickle.loads(pickle.dumps(lora))):
            assert twin.merged == merged
            assert torch.equal(twin(x, x, x)[0], expected)
            twin.unmerge()
            assert all(torch.equal(t, lora.state_dict()[name]) for name, t in twin.named_parameters())

    def test_moving_to_another_dtype(self):
        _, lora = build({})
        lora.eval().merge()
        lora.double()
        x = torch.randn(L, B, E, dtype=torch.float64)
        merged = lora(x, x, x)[0]
        lora.unmerge()
        torch.testing.assert_close(lora(x, x, x)[0], merged)
        assert lora.in_proj_weight.dtype == lora.in_proj_lora_a.dtype == torch.float64

    def test_compiles_without_a_graph_break(self):
        _, lora = build({"batch_first": True})
        x = torch.randn(B, L, E)
        compiled = torch.compile(lora, fullgraph=True, backend="aot_eager")
        y, _ = compiled(x, x, x, need_weights=False)
        torch.testing.assert_close(y, lora(x, x, x, need_weights=False)[0])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("autocast", [True, False])
    def test_16_bit(self, dtype, autocast):
        mha, lora = build({"batch_first": True, "add_bias_kv": True})
        mask = torch.randn(L, L)
        x = torch.randn(B, L, E)
        expected = fold(mha, lora)(x, x, x, attn_mask=mask, need_weights=False)[0]
        if autocast:
            with torch.autocast("cpu", dtype):
                y, _ = lora(x, x, x, attn_mask=mask, need_weights=False)
        else:
            half = copy.deepcopy(lora).to(dtype)
            half.in_proj_lora_a.data = lora.in_proj_lora_a.data
            half.in_proj_lora_b.data = lora.in_proj_lora_b.data
            x = x.to(dtype)
            y, _ = half(x, x, x, attn_mask=mask, need_weights=False)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=5e-2, atol=5e-2)


@pytest.fixture
def fast_path_calls(monkeypatch) -> list:
    """How often torch's fused encoder layer ran."""
    calls, genuine = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *args: (calls.append(1), genuine(*args))[1], raising=True
    )
    return calls


class TestEncoderFastPath:
    """nn.TransformerEncoderLayer reads its submodules' weights in eval mode: it must call adapted ones instead."""

    @staticmethod
    def layer() -> nn.TransformerEncoderLayer:
        return nn.TransformerEncoderLayer(E, H, dim_feedforward=24, batch_first=True).eval()

    @torch.no_grad()
    def test_a_plain_layer_takes_it(self, fast_path_calls):
        self.layer()(torch.randn(B, L, E))
        assert fast_path_calls == [1]

    @pytest.mark.parametrize("part", ["attention", "out_proj alone", "linear1", "linear2"])
    @torch.no_grad()
    def test_an_adapted_layer_declines(self, part, fast_path_calls):
        layer, x = self.layer(), torch.randn(B, L, E)
        base = layer(x)
        fast_path_calls.clear()
        folded = copy.deepcopy(layer)
        if part.startswith("linear"):
            adapted = wake(LoRALinear.from_linear(getattr(layer, part), rank=3))
            setattr(layer, part, adapted)
            getattr(folded, part).weight += adapted.scaling * adapted.lora_b @ adapted.lora_a
        else:
            layer.self_attn = wake(
                LoRAMultiheadAttention.from_mha(layer.self_attn, rank=3, in_proj=part == "attention")
            )
            folded.self_attn = fold(folded.self_attn, layer.self_attn)
        y = layer(x)
        assert fast_path_calls == []
        torch.testing.assert_close(y, folded(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(y, base, atol=1e-3)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            fast_path_calls.clear()
            torch.testing.assert_close(twin(x), y)
            assert fast_path_calls == []

    @torch.no_grad()
    def test_a_nested_tensor_is_refused_in_words(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            encoder = nn.TransformerEncoder(self.layer(), 2).eval()
            encoder.layers[0].self_attn = LoRAMultiheadAttention.from_mha(encoder.layers[0].self_attn)
            padding = torch.zeros(B, L, dtype=torch.bool)
            padding[1:, -2:] = True
            with pytest.raises(TypeError, match=r"query must be a dense tensor.*use_nested_tensor = False"):
                encoder(torch.randn(B, L, E), src_key_padding_mask=padding)


def test_open_clip_block():
    transformer = pytest.importorskip("open_clip.transformer", reason="open_clip is not installed")
    block = transformer.ResidualAttentionBlock(E, H).double()
    folded = copy.deepcopy(block)
    block.attn = wake(LoRAMultiheadAttention.from_mha(block.attn, rank=3))
    folded.attn = fold(folded.attn, block.attn)
    x, mask = torch.randn(B, L, E).double(), torch.full((L, L), float("-inf")).double().triu(1)
    torch.testing.assert_close(block(x, attn_mask=mask), folded(x, attn_mask=mask))
    torch.testing.assert_close(block(x), folded(x))


class Subclass(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)


class TestRefusals:
    def test_wrong_bases_and_settings(self):
        mha = nn.MultiheadAttention(E, H)
        make = LoRAMultiheadAttention.from_mha
        with pytest.raises(TypeError, match=r"from_mha: expected an nn.MultiheadAttention, got Linear"):
            make(nn.Linear(4, 4))
        with pytest.raises(TypeError, match=r"got .*Subclass with a forward that replaces it"):
            make(Subclass(E, H))
        with pytest.raises(ValueError, match="already wrapped"):
            make(make(mha))
        with pytest.raises(ValueError, match=r"qkv must be one of \('joint', 'split'\), got 'both'"):
            make(mha, qkv="both")
        with pytest.raises(ValueError, match=r"qkv must be 'split' for separate projections .*kdim 10"):
            make(nn.MultiheadAttention(E, H, kdim=10))
        with pytest.raises(ValueError, match="in_proj or out_proj must be True"):
            make(mha, in_proj=False, out_proj=False)
        with pytest.raises(ValueError, match=r"rank must be in 1\.\.256, got 0"):
            make(mha, rank=0)
        with pytest.raises(ValueError, match="alpha must be finite"):
            make(mha, alpha=float("nan"))
        with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
            make(mha, dropout=1.5)
        with pytest.raises(TypeError, match="from_mha"):
            LoRAMultiheadAttention(E, H)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"query": torch.randn(E)}, ValueError, "must all have 3 dimensions, or 2 without a batch"),
            ({"key": torch.randn(S, E)}, ValueError, "must all have 3 dimensions"),
            ({"query": torch.randn(L, B, E + 1)}, ValueError, rf"query must have width {E}, got shape"),
            ({"value": torch.randn(S, B, E + 1)}, ValueError, rf"value must have width {E}"),
            ({"value": torch.randn(S + 1, B, E)}, ValueError, "key and value must have one length, and query's batch"),
            ({"query": torch.randn(L, B + 1, E)}, ValueError, "and query's batch"),
            ({"query": [1.0]}, TypeError, r"query must be a torch.Tensor, got list"),
            ({"attn_mask": torch.zeros(S, L)}, ValueError, r"attn_mask must have shape \(5, 6\) or \(12, 5, 6\)"),
            ({"attn_mask": torch.zeros(B, L, S)}, ValueError, r"got \(3, 5, 6\)"),
            ({"attn_mask": torch.zeros(L, S, dtype=torch.int64)}, TypeError, "attn_mask must be bool or floating"),
            ({"key_padding_mask": torch.zeros(S, B)}, ValueError, r"key_padding_mask must have shape \(3, 6\)"),
            ({"is_causal": True}, ValueError, "is_causal is a hint about attn_mask"),
        ],
    )
    def test_wrong_inputs(self, change, error, message):
        _, lora = build({})
        good = {"query": torch.randn(L, B, E), "key": torch.randn(S, B, E), "value": torch.randn(S, B, E)}
        lora(**good)
        with pytest.raises(error, match=message):
            lora(**{**good, **change})
