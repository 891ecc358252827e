"""Learned tokens that an attention sees beside the given ones: as keys and values of its own, or in the sequence."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyfused.lora.called_attention import CalledAttention
from pyfused.surgery.added import KeepsWide, draw, kaiming
from pyfused.surgery.bytecode import reachable
from pyfused.surgery.change import Change
from pyfused.surgery.guards import bar_fast_paths
from pyfused.surgery.variants import Variant, plain_class

# The name that they have in the module that they belong to.
NAME = "virtual_tokens"
# Width between the two layers of a projection, as AdapterHub has it.
_HIDDEN = 512


class VirtualTokens(KeepsWide):
    """``sets`` times n learned tokens of width W, float32 by default, cast to what they are used beside.

    ``tokens`` (sets, n, W), from a normal distribution of standard deviation 0.02. With ``projection``, ``tokens``
    (n, W) go through two linear layers with tanh between, W -> 512 -> sets W: ``hidden_weight``, ``hidden_bias``,
    ``out_weight``, ``out_bias``.

    Args:
        sets: 2 for keys and values, 1 for tokens in the sequence.
        count: n. width: W.
        projection: whether the tokens go through two layers.
        dropout: probability of zeroing an element of the tokens, in training.
        device, dtype: of the parameters.
    """

    tokens: nn.Parameter
    hidden_weight: nn.Parameter
    hidden_bias: nn.Parameter
    out_weight: nn.Parameter
    out_bias: nn.Parameter

    def __init__(
        self,
        sets: int,
        count: int,
        width: int,
        projection: bool,
        dropout: float,
        device: torch.device | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.sets, self.count, self.width, self.projection, self.dropout = sets, count, width, projection, dropout
        shapes: dict[str, tuple[int, ...]] = {"tokens": (sets, count, width)}
        if projection:
            shapes = {
                "tokens": (count, width),
                "hidden_weight": (_HIDDEN, width), "hidden_bias": (_HIDDEN,),
                "out_weight": (sets * width, _HIDDEN), "out_bias": (sets * width,),
            }  # fmt: skip
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()
        # An encoder layer's inference path would bypass the attention that these belong to.
        self.register_forward_pre_hook(bar_fast_paths)

    def reset_parameters(self) -> None:
        """Drawn on the CPU in float32, so that one seed gives the same tokens on every device and in every dtype."""
        starts: dict[str, Callable[[Tensor], object]] = {
            "tokens": lambda drawn: nn.init.normal_(drawn, std=0.02), "weight": kaiming, "bias": nn.init.zeros_,
        }  # fmt: skip
        for name, parameter in self.named_parameters():
            draw(parameter, starts[name.rpartition("_")[2]])

    def forward(self) -> tuple[Tensor, ...]:
        """``sets`` tensors (n, W)."""
        tokens = F.dropout(self.tokens, self.dropout, self.training)
        if self.projection:
            hidden = F.linear(tokens, self.hidden_weight, self.hidden_bias)
            out = F.linear(hidden.tanh(), self.out_weight, self.out_bias)
            return out.chunk(self.sets, dim=-1)
        return tokens.unbind(0)

    def settings(self) -> dict[str, Any]:
        """What gives the parameters their meaning."""
        return {"sets": self.sets, "projection": self.projection, "dropout": self.dropout}

    def extra_repr(self) -> str:
        return f"{self.sets} x {self.count} x {self.width}, projection={self.projection}, dropout={self.dropout:g}"


# ---- in an attention


class PrefixedAttention(Variant):
    """What the attentions with learned keys and values share."""

    _variant_prefix = "Prefixed"
    virtual_tokens: VirtualTokens
    virtual_heads: int

    def _virtual_parts(self) -> list[Tensor]:
        """Keys and values, (H, n, d) each."""
        return [part.unflatten(-1, (self.virtual_heads, -1)).transpose(0, 1) for part in self.virtual_tokens()]


class PrefixedMultiheadAttention(PrefixedAttention, CalledAttention):
    """An nn.MultiheadAttention with learned keys and values. The weights that it returns are those of given keys."""

    def _as_torch(self) -> bool:
        return False

    def _virtual(self, like: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (part.to(like.dtype)[None] for part in self._virtual_parts())
        return k, v


class PrefixedSDPA(PrefixedAttention):
    """A module whose forward calls `torch.nn.functional.scaled_dot_product_attention`, which gets more keys there.

    Raises:
        RuntimeError: its forward did not call it, or with keys of another layout.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As that of the module."""
        more = _MoreKeys(*self._virtual_parts())
        with more:
            output = super().forward(*args, **kwargs)
        if not more.used:
            raise RuntimeError(
                f"{type(self).__name__}: its forward must call scaled_dot_product_attention, which the virtual tokens "
                "go into, got a call that did not; turn eager attention and returned attention weights off"
            )
        return output


class _MoreKeys(TorchFunctionMode):
    """Inside, scaled_dot_product_attention sees keys and values (H, n, d) behind the given ones, masked by nothing."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.used = keys, values, False
        self.trains = torch.is_grad_enabled() and keys.requires_grad

    def __torch_function__(self, func: Any, classes: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        # The method calls super(), which Dynamo cannot follow from inside a mode.
        func = torch.unflatten if func is Tensor.unflatten else func
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **others: Any,
    ) -> Tensor:
        self.used = True
        if self.trains and not torch.is_grad_enabled():
            raise RuntimeError(
                "virtual tokens: expected gradients to be on where the attention is computed, as they are where its "
                "forward begins, got them off; checkpoint around the whole attention, not inside it"
            )
        length, source, added = query.shape[-2], key.shape[-2], self.keys.shape[1]
        if is_causal:
            seen = torch.ones((length, source), dtype=torch.bool, device=query.device).tril()
            if attn_mask is None:
                attn_mask = seen
            elif attn_mask.dtype == torch.bool:
                attn_mask = attn_mask & seen
            else:
                attn_mask = attn_mask.masked_fill(~seen, float("-inf"))
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*attn_mask.shape[:-1], source)
            # In a bool mask True takes part, in a floating one 0 does.
            attn_mask = F.pad(attn_mask, (0, added), value=attn_mask.dtype == torch.bool)
        key = torch.cat([key, _beside(self.keys, key)], dim=-2)
        value = torch.cat([value, _beside(self.values, value)], dim=-2)
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **others)


def _beside(tokens: Tensor, given: Tensor) -> Tensor:
    """(H, n, d) in the dtype and layout of ``given``: (B H, S, d), (B, H, S, d), or with windows before H or after."""
    heads, count, width = tokens.shape
    # Where queries share keys, each may have its copy of them by now.
    places = [0] if given.dim() == 3 else [1] if given.dim() == 4 else [1, given.dim() - 3]
    fitting = [at for at in places if given.shape[at] == heads or (given.dim() < 5 and given.shape[at] % heads == 0)]
    if len(fitting) > 1:
        # As many windows as heads: heads lie beside each other in what the projection gave.
        fitting = [at for at in fitting if given.stride(at) == width]
    if len(fitting) != 1 or given.shape[-1] != width:
        raise RuntimeError(
            f"virtual tokens: expected keys with one dimension of {heads} heads, of width {width}, got shape "
            f"{tuple(given.shape)}; leave this attention out by exclude"
        )
    tokens, times = tokens.to(given.dtype), given.shape[fitting[0]] // heads
    if given.dim() == 3:
        return tokens.repeat(times, 1, 1)
    tokens = tokens.repeat_interleave(times, dim=0)
    shape = [1] * (given.dim() - 2)
    shape[fitting[0]] = len(tokens)
    return tokens.view(*shape, count, width).expand(*given.shape[:-2], count, width)


_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim")
_SHARED = ("num_key_value_heads", "num_kv_heads")
_KEYS = ("k_proj", "key", "k", "k_lin")
_PACKED = {"qkv": 3, "qkv_proj": 3, "c_attn": 3, "Wqkv": 3, "query_key_value": 3, "kv": 2}


def heads_of(attention: nn.Module) -> tuple[int, int]:
    """How many heads the keys of an attention have, and how wide one is.

    Raises:
        ValueError: why that is not known.
    """
    if isinstance(attention, nn.MultiheadAttention):
        return attention.num_heads, attention.head_dim
    config = getattr(attention, "config", None)
    heads = _first(attention, _HEADS) or getattr(config, "num_attention_heads", None)
    width = _first(attention, _WIDTHS)
    key = next((layer for name in _KEYS if isinstance(layer := getattr(attention, name, None), nn.Linear)), None)
    if key is not None and (heads or width):
        width = width or key.out_features // int(heads or 1)
        return key.out_features // width, width
    # Where queries share keys, the packed layer's rows do not tell how.
    shared = _first(attention, _SHARED) or getattr(config, "num_key_value_heads", None)
    packed = [rows // parts for name, parts in _PACKED.items() if (rows := _rows(getattr(attention, name, None)))]
    if heads and (width or packed):
        return shared or heads, width or packed[0] // heads
    raise ValueError("the number and the width of its heads are under no name that is known here")


def _first(module: nn.Module, names: Iterable[str]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(module, name, None), int)), None)


def _rows(layer: Any) -> int | None:
    """The width of what a linear layer gives; transformers' Conv1D calls it nf."""
    return getattr(layer, "out_features", None) or getattr(layer, "nf", None)


# What stands in the code of an attention that calls the operator, itself or by transformers' table.
_CALLS = {"scaled_dot_product_attention", "ALL_ATTENTION_FUNCTIONS"}


def is_attention(module: nn.Module) -> bool:
    """Whether ``module`` is an nn.MultiheadAttention, or its own forward calls scaled_dot_product_attention."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    codes: tuple[types.CodeType, ...] = reachable(plain_class(type(module))[0])  # type: ignore[arg-type]
    # A function beside the class may do it for its forward.
    beside = vars(sys.modules[type(module).__module__]) if type(module).__module__ in sys.modules else {}
    helpers = (beside.get(name) for code in codes for name in code.co_names)
    called = (function.__code__ for function in helpers if isinstance(function, types.FunctionType))
    return any(_CALLS & set(code.co_names) for code in (*codes, *called))


def seems_attention(module: nn.Module) -> bool:
    """Whether ``module`` is called an attention, with none inside it that `is_attention`."""
    named = re.search("attn|attention", type(module).__name__.lower()) is not None
    layered = any(isinstance(child, nn.Linear) for child in module.children())
    return named and layered and not any(is_attention(inside) for inside in module.modules())


def refusal(attention: nn.Module) -> str | None:
    """Why ``attention`` gets no virtual tokens; None where it can."""
    if not is_attention(attention):
        return "its forward does not call scaled_dot_product_attention"
    if "forward" in attention.__dict__:
        return "its forward was replaced, by a hook of accelerate's, say (remove_hook_from_module takes that out)"
    if isinstance(attention, nn.MultiheadAttention):
        own = plain_class(type(attention))[0].forward
        known = own in (nn.MultiheadAttention.forward, CalledAttention.forward)
        return None if known else "an nn.MultiheadAttention with a forward of its own"
    if getattr(attention, "fused_attn", True) is False:
        return "fused_attn is False, and with it scaled_dot_product_attention is not called"
    if getattr(attention, "logit_scale", None) is not None:
        return "its attention is a scaled cosine, which scaled_dot_product_attention does not do"
    implementation = getattr(getattr(attention, "config", None), "_attn_implementation", "sdpa")
    if implementation != "sdpa":
        return f'its attention is "{implementation}": call set_attn_implementation("sdpa") on the model'
    try:
        heads_of(attention)
    except ValueError as error:
        return str(error)
    return None


def put_in(change: Change, attention: nn.Module, tokens: VirtualTokens) -> None:
    """Give ``attention`` learned keys and values."""
    change.add(attention, NAME, tokens)
    heads, _ = heads_of(attention)
    change.add(attention, "virtual_heads", heads)
    whole = isinstance(attention, nn.MultiheadAttention)
    change.as_variant(attention, PrefixedMultiheadAttention if whole else PrefixedSDPA)


# ---- in the sequence


class FirstBlock(Variant):
    """A tower's first block: the tokens join the sequence, at its end."""

    _variant_prefix = "First"
    virtual_tokens: VirtualTokens
    virtual_axis: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x (B, L, C), or (L, B, C)."""
        (tokens,) = self.virtual_tokens()
        axis = self.virtual_axis
        tokens = tokens.to(x.dtype).unsqueeze(1 - axis)
        shape = list(x.shape)
        shape[axis] = self.virtual_tokens.count
        return super().forward(torch.cat([x, tokens.expand(shape)], dim=axis), *args, **kwargs)


class LastBlock(Variant):
    """A tower's last block: the tokens leave the sequence."""

    _variant_prefix = "Last"
    virtual_count: int
    virtual_axis: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As that of the block, with fewer tokens."""
        output = super().forward(*args, **kwargs)
        return output.narrow(self.virtual_axis, 0, output.shape[self.virtual_axis] - self.virtual_count)


def put_before(change: Change, blocks: nn.ModuleList | nn.Sequential, axis: int, tokens: VirtualTokens) -> None:
    """Let tokens go through ``blocks`` with the sequence, which lies along ``axis``."""
    first, last = blocks[0], blocks[-1]
    change.add(first, NAME, tokens)
    for block in {first, last}:
        change.add(block, "virtual_axis", axis)
    change.add(last, "virtual_count", tokens.count)
    change.as_variant(last, LastBlock)
    change.as_variant(first, FirstBlock)


def take_out(change: Change, module: nn.Module) -> None:
    """Make ``module`` what it was before it got virtual tokens or a part in theirs.

    Raises:
        RuntimeError: its forward was replaced since, or its class.
    """
    kinds = [kind for kind in (PrefixedAttention, FirstBlock, LastBlock) if isinstance(module, kind)]
    for kind in kinds:
        change.as_base(module, kind)
    for name in (NAME, "virtual_heads", "virtual_axis", "virtual_count"):
        change.drop(module, name)
