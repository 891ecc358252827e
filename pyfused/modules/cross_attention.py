"""``ScaledCrossAttention``: cross-attention, its output scaled and added to the rows that asked, in one call."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from pyfused.ops.contract import checks
from pyfused.ops.cross_attention_residual import PLANS, attend, choose_backend, cross_attention_residual, resolve_plan
from pyfused.ops.prepared_context import PROJECTIONS, PreparedContext, Projections, check_context, prepare_context
from pyfused.ops.projection_residual import check_eps
from pyfused.surgery.added import KeepsWide, draw
from pyfused.surgery.refusals import check_plain

if TYPE_CHECKING:
    from typing_extensions import Self

_NAME = "ScaledCrossAttention"
_REDUCTIONS = (None, "mean", "mean_if_batches_differ")
# What of the module's attributes has a part in a prepared context.
_PREPARED_BY = ("num_heads", "norm_match", "normalize_context", "context_reduce", "batch_first")


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a `ScaledCrossAttention` keeps of a context that does not change. Made by its ``prepare``.

    Attributes:
        module: the one that made it, and the only one that takes it.
        context: K and V, or E, c and F: of one dtype, on one device, without gradients.
        sources: name -> (parameter, its values' alias, its version) of what these were made of. The alias keeps the
            memory from being handed out again, so that its address tells new values from old.
        settings: name -> value of the module's attributes that these were made by.
        loses_gradient: whether the context required grad, and grad mode was on.
    """

    module: ScaledCrossAttention
    context: PreparedContext
    sources: Mapping[str, tuple[Tensor, Tensor, int]]
    settings: Mapping[str, Any]
    loses_gradient: bool


# By id. A dictionary lists its references at once, where a set that another thread adds to fails its iterators.
_alive: weakref.WeakValueDictionary[int, Prepared] = weakref.WeakValueDictionary()


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_count_step)


def _count_step(optimizer: Optimizer, *_: Any) -> None:
    """The steps of torch's fused optimisers, and of many others', leave the version of a parameter as it was."""
    if _alive:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for reference in _alive.valuerefs():
            if (prepared := reference()) is not None:
                increment_version([p for p, _, _ in prepared.sources.values() if id(p) in stepped])


class ScaledCrossAttention(KeepsWide):
    """``x + w match(CrossAttention(x, context))`` as one `pyfused.cross_attention_residual`.

    Parameters, float32 by default, H d = num_heads * head_dim: ``q_weight`` (H d, query_dim), ``k_weight`` and
    ``v_weight`` (H d, context_dim), ``out_weight`` (query_dim, H d), ``q_bias``, ``k_bias``, ``v_bias`` (H d,),
    ``out_bias`` (query_dim,), and with ``learnable_weight`` ``gate``, w, (1,) or (query_dim,). float32 parameters serve
    x of any dtype. Casting the module to 16 bits leaves them in float32; ``dtype`` makes all but gate narrower.

    Starts with Xavier-uniform weights and zero biases.

    Args:
        query_dim: width of x and of the result.
        context_dim: width of the context.
        num_heads: H.
        head_dim: d, the width of a head. Default None: query_dim // num_heads, which must divide. The logits are scaled
            by d^-0.5.
        weight: w, or its start value where it is learnable; a Python number. Default 0.1.
        learnable_weight: whether w is a parameter, ``gate``. Default False.
        norm_match: scale each row of the attention's output to the norm of its row of x, ``|x| / (|c| + eps)``.
            Default False.
        normalize_context: divide each token of the context by its norm first. Default False.
        dropout: probability of zeroing an attention probability, in [0, 1), in training. Default 0.
        zero_init: start with ``out_weight`` and ``out_bias`` zero, so that y = x. Refused with ``norm_match``, which
            would divide 0 by eps. Default False.
        eps: of ``norm_match``, from 0 on. Default 1e-6.
        bias: whether there are biases. Default True.
        context_reduce: "mean" averages the context over its batch, before it is normalised; "mean_if_batches_differ"
            only where its batch is not x's; None (the default) leaves it alone, and its batch must be x's or 1.
        per_channel: whether ``gate`` has one number per channel. Default False.
        batch_first: True (the default) for x (B, L, query_dim) and context (B, T, context_dim), False for
            (L, B, query_dim) and (T, B, context_dim).
        device: of all parameters. Default torch's.
        dtype: of all parameters but gate. Default float32.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or two of them contradict each other.

    Source: the cross-attention between the towers of AA-CLIP (Ma et al., 2025).
    """

    q_weight: nn.Parameter
    q_bias: nn.Parameter | None
    k_weight: nn.Parameter
    k_bias: nn.Parameter | None
    v_weight: nn.Parameter
    v_bias: nn.Parameter | None
    out_weight: nn.Parameter
    out_bias: nn.Parameter | None
    gate: nn.Parameter | None

    def __init__(
        self,
        query_dim: int,
        context_dim: int,
        num_heads: int,
        head_dim: int | None = None,
        weight: float = 0.1,
        learnable_weight: bool = False,
        norm_match: bool = False,
        normalize_context: bool = False,
        dropout: float = 0.0,
        zero_init: bool = False,
        *,
        eps: float = 1e-6,
        bias: bool = True,
        context_reduce: str | None = None,
        per_channel: bool = False,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        sizes = {"query_dim": query_dim, "context_dim": context_dim, "num_heads": num_heads, "head_dim": head_dim}
        for argument, value in sizes.items():
            if value is not None or argument != "head_dim":
                checks.integer(_NAME, argument, value, 1)
        if head_dim is None and query_dim % num_heads:
            raise ValueError(
                f"{_NAME}: num_heads must divide query_dim = {query_dim} where head_dim is None, got {num_heads}"
            )
        checks.finite(_NAME, "weight", weight)
        checks.probability(_NAME, "dropout", dropout)
        check_eps(_NAME, eps)
        checks.one_of(_NAME, "context_reduce", context_reduce, _REDUCTIONS)
        flags = {
            "learnable_weight": learnable_weight, "norm_match": norm_match, "normalize_context": normalize_context,
            "zero_init": zero_init, "bias": bias, "per_channel": per_channel, "batch_first": batch_first,
        }  # fmt: skip
        for argument, flag in flags.items():
            checks.flag(_NAME, argument, flag)
        if zero_init and norm_match:
            raise ValueError(
                f"{_NAME}: zero_init must be False with norm_match, got True: matching the norm of an output that is 0 "
                f"divides 0 by eps = {eps:g}, and the gradient of out_weight by as much"
            )
        if per_channel and not learnable_weight:
            raise ValueError(f"{_NAME}: per_channel must be False without learnable_weight, got True: w is one number")
        if dtype not in checks.FLOATING:
            raise TypeError(f"{_NAME}: dtype must be one of {checks.FLOATING}, got {dtype!r}")
        self.query_dim, self.context_dim, self.num_heads = query_dim, context_dim, num_heads
        self.head_dim = query_dim // num_heads if head_dim is None else head_dim
        self.weight, self.norm_match, self.normalize_context = float(weight), norm_match, normalize_context
        self.dropout, self.zero_init, self.eps = float(dropout), zero_init, float(eps)
        self.context_reduce, self.batch_first = context_reduce, batch_first

        inner = self.num_heads * self.head_dim
        shapes = {"q": (inner, query_dim), "k": (inner, context_dim), "v": (inner, context_dim)}
        for name, shape in (shapes | {"out": (query_dim, inner)}).items():
            for kind, size in (("weight", shape), ("bias", shape[:1] if bias else None)):
                parameter = None if size is None else nn.Parameter(torch.empty(size, device=device, dtype=dtype))
                self.register_parameter(f"{name}_{kind}", parameter)
        gate = None
        if learnable_weight:
            wide = torch.promote_types(dtype, torch.float32)
            gate = nn.Parameter(torch.empty(query_dim if per_channel else 1, device=device, dtype=wide))
        self.register_parameter("gate", gate)
        self.reset_parameters()

    @classmethod
    def from_module(
        cls,
        mha: nn.MultiheadAttention,
        weight: float = 0.1,
        learnable_weight: bool = False,
        norm_match: bool = False,
        normalize_context: bool = False,
        *,
        eps: float = 1e-6,
        context_reduce: str | None = None,
        per_channel: bool = False,
    ) -> Self:
        """``x + weight * match(mha(x, context, context))``, on copies of ``mha``'s parameters, which all train.

        Heads, biases, dropout, layout, dtype, device and mode are mha's, the settings those of the class.

        Args:
            mha: a torch.nn.MultiheadAttention, kdim equal to vdim, without bias_k, bias_v and add_zero_attn.

        Raises:
            TypeError: not an nn.MultiheadAttention, or a subclass with another forward; a setting of the wrong type.
            ValueError: kdim is not vdim, mha adds keys of its own or carries LoRA, or a setting is out of range.
        """
        caller = f"{_NAME}.from_module"
        packed = getattr(mha, "_qkv_same_embed_dim", True)
        own = ("in_proj_weight",) if packed else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        check_plain(caller, mha, nn.MultiheadAttention, own)
        if mha.kdim != mha.vdim:
            raise ValueError(
                f"{caller}: kdim must equal vdim, keys and values are one context; got {mha.kdim} and {mha.vdim}"
            )
        for argument, added in (("bias_k", mha.bias_k is not None), ("add_zero_attn", mha.add_zero_attn)):
            if added:
                raise ValueError(f"{caller}: mha must not add keys to the context's, got one with {argument}")
        joint = mha.in_proj_weight
        weights = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight) if joint is None else joint.chunk(3)
        biases = (None, None, None) if mha.in_proj_bias is None else mha.in_proj_bias.chunk(3)
        out = mha.out_proj
        module = cls(
            mha.embed_dim, mha.kdim, mha.num_heads, mha.head_dim, weight, learnable_weight, norm_match,
            normalize_context, mha.dropout, eps=eps, bias=not (biases[0] is None and out.bias is None),
            context_reduce=context_reduce, per_channel=per_channel, batch_first=mha.batch_first,
            device=out.weight.device, dtype=out.weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            for name, w, b in zip(("q", "k", "v", "out"), (*weights, out.weight), (*biases, out.bias), strict=True):
                module.get_parameter(f"{name}_weight").copy_(w)
                if b is not None:
                    module.get_parameter(f"{name}_bias").copy_(b)
        return module.train(mha.training)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew, the rest as at the start.

        Drawn on the CPU in float32: one seed gives the same module on every device and in every dtype.
        """
        for name in PROJECTIONS:
            parameter = getattr(self, name)
            zero = name.endswith("bias") or (name == "out_weight" and self.zero_init)
            if parameter is not None:
                draw(parameter, nn.init.zeros_ if zero else nn.init.xavier_uniform_)
        if self.gate is not None:
            self.gate.fill_(self.weight)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        prepared: Prepared | None = None,
    ) -> Tensor:
        """x (B, L, query_dim) -> the same shape and dtype; (L, B, query_dim) without ``batch_first``.

        Args:
            x: the rows that ask.
            context: (B or 1, T, context_dim), any batch with a ``context_reduce``; (T, B, context_dim) without
                ``batch_first``. x's dtype.
            key_padding_mask: bool (B or 1, T), B that of x, True for tokens to ignore. Default None.
            prepared: in place of context and mask, what `prepare` made of them.

        Raises:
            ValueError: both or none of context and prepared, a mask beside prepared, a prepared context of another
                module, batch or device; and as `pyfused.cross_attention_residual`.
            TypeError: a prepared context in another dtype; and as `pyfused.cross_attention_residual`.
            RuntimeError: a parameter or a setting has changed since the context was prepared, or a gradient would be
                lost in it.
        """
        if (context is None) == (prepared is None):
            given = "neither" if context is None else "both"
            raise ValueError(f"{_NAME}: exactly one of context and prepared must be given, got {given}")
        x = self._batched("x", x, self.query_dim, "L")
        weight = self.weight if self.gate is None else self.gate
        dropout_p = self.dropout if self.training else 0.0
        if prepared is not None:
            if key_padding_mask is not None:
                raise ValueError(f"{_NAME}: key_padding_mask must be None beside prepared, got one: prepare() takes it")
            projections = self._check_prepared(x, prepared)
            backend = choose_backend(x, prepared.context, projections, weight, self.norm_match, dropout_p, "auto")
            y = attend(x, prepared.context, projections, weight, self.norm_match, self.eps, dropout_p, None, backend)
        else:
            y = cross_attention_residual(
                x,
                self._reduced(context, len(x)),
                *(getattr(self, name) for name in PROJECTIONS),
                num_heads=self.num_heads,
                weight=weight,
                norm_match=self.norm_match,
                eps=self.eps,
                normalize_context=self.normalize_context,
                key_padding_mask=key_padding_mask,
                dropout_p=dropout_p,
            )
        return y if self.batch_first else y.transpose(0, 1)

    def prepare(self, context: Tensor, key_padding_mask: Tensor | None = None, plan: str = "auto") -> Prepared:
        """What forward would compute of a context that does not change, once, for ``forward(x, prepared=...)``.

        No gradient passes through it: with grad mode on, forward refuses it while one of the parameters in it requires
        grad, or where the context did. Plan "standard" has k and v in it, the absorbed plans all but ``out_bias`` and
        ``gate``. Refused too, once one of these parameters has been written to (an optimiser's step, a state dict),
        replaced, cast or moved. What is written past torch's version counters goes unseen: through ``parameter.data``,
        by the replay of a CUDA graph, by the compiled step of a fused optimiser. A copy of the module needs a
        `prepare` of its own. Under torch.compile these checks run outside the graph: fullgraph=True refuses them.

        Args:
            context: as for `forward`; its dtype, or under autocast autocast's, is the one that x must have.
            key_padding_mask: as for `forward`, of the context's batch or 1. Default None.
            plan: "auto" (the default) takes the plan that costs least once this is done; or a plan of
                `pyfused.cross_attention_residual` by name.

        Raises:
            ValueError: a shape, device or plan is wrong, or ``context_reduce`` is "mean_if_batches_differ".
            TypeError: a dtype or an argument's type is wrong.
        """
        lost = torch.is_grad_enabled() and isinstance(context, Tensor) and context.requires_grad
        # Not inference tensors, even under inference mode: training x with this may come later.
        with torch.inference_mode(False), torch.no_grad():
            if self.context_reduce == "mean_if_batches_differ":
                raise ValueError(
                    f"{_NAME}: context_reduce must be None or 'mean' to prepare, got {self.context_reduce!r}: what it "
                    "does depends on x's batch"
                )
            context = self._reduced(context, None)
            projections = self._projections()
            check_context(_NAME, context, key_padding_mask, projections, None)
            checks.one_of(_NAME, "plan", plan, ("auto", *PLANS))
            cast = checks.autocast_dtype(context)
            dtype = cast or context.dtype
            allowed = tuple(dict.fromkeys((dtype, torch.promote_types(dtype, torch.float32))))
            if cast:
                allowed = tuple(narrow for narrow in checks.FLOATING if narrow != torch.float64)
            for name, parameter in self._sources(PROJECTIONS).items():
                checks.tensor(_NAME, name, parameter)
                checks.dtype(_NAME, name, parameter, allowed)
                checks.same_device(_NAME, name, parameter, context.device, "context")
            mask = None if key_padding_mask is None else key_padding_mask.clone()
            plan, reason = resolve_plan(
                projections, None, context.shape[1], self.norm_match, dtype, context.device, plan, seeded=False
            )
            kept = prepare_context(
                _NAME, context.to(dtype), projections, mask, self.normalize_context, plan, f"prepared; {reason}"
            )
            # Nothing here gets a gradient.
            kept = replace(kept, keys=kept.keys.to(dtype), values=kept.values.to(dtype))
            sources = {
                name: (parameter, parameter.detach(), parameter._version)
                for name, parameter in self._sources(_kept_names(plan)).items()
            }
            settings = {name: getattr(self, name) for name in _PREPARED_BY}
        prepared = Prepared(self, kept, sources, settings, lost)
        _watch_optimizers()
        _alive[id(prepared)] = prepared
        return prepared

    def _check_prepared(self, x: Tensor, prepared: Prepared) -> Projections:
        """Refuses a prepared context that does not serve x now; the projections, some of which it leaves to do."""
        if not isinstance(prepared, Prepared):
            raise TypeError(f"{_NAME}: prepared must be what prepare() returned, got {type(prepared).__name__}")
        if prepared.module is not self:
            raise ValueError(f"{_NAME}: prepared must come from this module's prepare(), got another module's")
        for name, value in prepared.settings.items():
            if getattr(self, name) != value:
                raise RuntimeError(
                    f"{_NAME}: {name} was {value!r} when the context was prepared and is {getattr(self, name)!r}; "
                    "prepare it again"
                )
        current = self._sources(_kept_names(prepared.context.plan))
        for name, (parameter, values, version) in prepared.sources.items():
            now = current.get(name)
            if now is not parameter or now.data_ptr() != values.data_ptr() or now._version != version:
                raise RuntimeError(f"{_NAME}: {name} has changed since the context was prepared; prepare it again")
        if torch.is_grad_enabled():
            losing = [name for name, parameter in current.items() if parameter.requires_grad]
            if prepared.loses_gradient:
                losing.append("context")
            if losing:
                raise RuntimeError(
                    f"{_NAME}: a prepared context in plan {prepared.context.plan!r} passes no gradient to "
                    f"{', '.join(losing)}, which require grad; give the context itself, freeze or detach these, or use "
                    "no_grad()"
                )
        keys = prepared.context.keys
        if prepared.context.dtype != (checks.autocast_dtype(x) or x.dtype):
            raise TypeError(
                f"{_NAME}: prepared must have the dtype that x is computed in, {checks.autocast_dtype(x) or x.dtype}, "
                f"got {prepared.context.dtype}"
            )
        checks.same_device(_NAME, "prepared", keys, x.device)
        if len(keys) not in (1, len(x)):
            raise ValueError(f"{_NAME}: prepared must have x's batch B = {len(x)} or 1, got {len(keys)}")
        return self._projections()

    def _projections(self) -> Projections:
        tensors: dict[str, Any] = {name: getattr(self, name) for name in PROJECTIONS}
        return Projections(**tensors, num_heads=self.num_heads)

    def _sources(self, names: tuple[str, ...] | list[str]) -> dict[str, Tensor]:
        """Those of the parameters that there are."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _batched(self, argument: str, tokens: Tensor, width: int, length: str) -> Tensor:
        """``tokens`` with the batch first."""
        checks.tensor(_NAME, argument, tokens)
        checks.dtype(_NAME, argument, tokens, checks.FLOATING)
        if tokens.dim() != 3 or tokens.shape[2] != width:
            letters = f"B, {length}" if self.batch_first else f"{length}, B"
            raise ValueError(f"{_NAME}: {argument} must have shape ({letters}, {width}), got {tuple(tokens.shape)}")
        return tokens if self.batch_first else tokens.transpose(0, 1)

    def _reduced(self, given: Any, batch: int | None) -> Tensor:
        """The context with its batch first, averaged over it where that is the setting; ``batch`` is x's."""
        context = self._batched("context", given, self.context_dim, "T")
        if self.context_reduce is None or (self.context_reduce != "mean" and len(context) == batch):
            return context
        if len(context) == 0:
            raise ValueError(f"{_NAME}: context must have a batch of at least 1 to be averaged, got 0")
        return context.mean(0, keepdim=True)

    def settings(self) -> dict[str, Any]:
        """What gives the parameters their meaning, by the names of the arguments."""
        names = ("num_heads", "norm_match", "normalize_context", "dropout", "eps", "context_reduce")
        # A gate starts at the weight, and is in the parameters.
        weight = {} if self.gate is not None else {"weight": self.weight}
        return weight | {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        gate = "" if self.gate is None else f"gate={tuple(self.gate.shape)}, "
        return (
            f"{self.query_dim}, {self.context_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"weight={self.weight:g}, {gate}norm_match={self.norm_match}, normalize_context={self.normalize_context}, "
            f"dropout={self.dropout:g}, context_reduce={self.context_reduce}, batch_first={self.batch_first}"
        )


def _kept_names(plan: str) -> tuple[str, ...]:
    """The projections whose values are in a prepared context."""
    return PROJECTIONS[2:6] if plan == "standard" else PROJECTIONS[:-1]
