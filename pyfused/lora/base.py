"""What every LoRA module shares: its settings, its pairs of low-rank parameters, merging, and its state.

A LoRA module *is* the module it adapts (``LoRALinear`` is an ``nn.Linear``), with the same parameter names and the
same submodules: code that asks for the type, reads ``weight.dtype`` or casts layer by layer finds what it expects.
The price: a tool that swaps every ``nn.Linear`` for a class of its own swaps these too, and loses A and B. Quantise
first, or `remove_lora` first.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from pyfused.ops.contract import checks
from pyfused.ops.lora_linear import MAX_RANK, lora_linear
from pyfused.surgery.added import KeepsWide, added_parameters, draw, kaiming
from pyfused.surgery.guards import bar_fast_paths
from pyfused.surgery.refusals import check_plain, sharded
from pyfused.surgery.variants import dressed, plain_class, take_over

if TYPE_CHECKING:
    from typing_extensions import Self

_SETTINGS = ("rank", "alpha", "lora_dropout", "use_rslora", "scaling", "_base_weights", "_base_class")


class LoRASettings(NamedTuple):
    """What a caller chooses of a low-rank term; `LoRALinear` documents each."""

    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    lora_dtype: torch.dtype | None


def check_lora_settings(
    caller: str, rank: int, alpha: float, dropout: float, lora_dtype: torch.dtype | None = None, **flags: bool
) -> None:
    """Refuse LoRA settings that are out of range, in the name of ``caller``.

    Raises:
        TypeError: a setting has the wrong type, ``lora_dtype`` is no floating dtype, or one of ``flags`` no bool.
        ValueError: rank not in 1..256, alpha not finite and positive, or dropout not in [0, 1).
    """
    checks.integer(caller, "rank", rank)
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"{caller}: rank must be in 1..{MAX_RANK}, got {rank}")
    checks.finite(caller, "alpha", alpha)
    if alpha <= 0:
        raise ValueError(f"{caller}: alpha must be positive, got {alpha}")
    checks.probability(caller, "dropout", dropout)
    if lora_dtype is not None and lora_dtype not in checks.FLOATING:
        raise TypeError(f"{caller}: lora_dtype must be None or one of {checks.FLOATING}, got {lora_dtype!r}")
    for name, value in flags.items():
        checks.flag(caller, name, value)


class LoRAModule(KeepsWide):
    """Base class of the LoRA modules; ``isinstance(m, LoRAModule)`` finds them all in a model.

    Attributes:
        rank: R. alpha: numerator of the scaling. use_rslora: rank-stabilised scaling.
        scaling: alpha / R, or alpha / sqrt(R) with ``use_rslora``; multiplies the low-rank term.
        lora_dropout: probability of zeroing an element of the low-rank term's input, in training.
    """

    base_class: type[nn.Module]

    @staticmethod
    def _weight_names(base: Any) -> tuple[str, ...]:
        """The weights of ``base`` that low-rank terms are added to."""
        return ("weight",)

    @classmethod
    def _adopt(cls, caller: str, base: nn.Module, settings: LoRASettings, freeze: bool) -> Self:
        """A ``cls`` that shares base's parameters and submodules, and copies its settings, hooks and mode."""
        rank, alpha, dropout, use_rslora, lora_dtype = settings
        check_lora_settings(caller, rank, alpha, dropout, lora_dtype, use_rslora=use_rslora, freeze=freeze)
        check_plain(caller, base, cls.base_class, cls._weight_names(base))
        plain, kinds = plain_class(type(base))
        module = object.__new__(dressed(cls, kinds))
        take_over(module, base)
        module._configure(settings, plain)
        return module

    @classmethod
    def _adopt_with_pair(cls, caller: str, base: nn.Module, settings: LoRASettings, freeze: bool) -> Self:
        """`_adopt`, with one pair of low-rank parameters beside ``weight``."""
        module = cls._adopt(caller, base, settings, freeze)
        module._add_pair("", *module._widths(), module.get_parameter("weight"), settings.lora_dtype)
        module.reset_lora_parameters()
        if freeze:
            module._freeze_base()
        return module

    def _widths(self) -> tuple[int, int]:
        """(N, K) of the one pair."""
        raise NotImplementedError

    def _configure(self, settings: LoRASettings, base_class: type[nn.Module]) -> None:
        rank, alpha, dropout, use_rslora, _ = settings
        self.rank, self.alpha, self.lora_dropout, self.use_rslora = rank, float(alpha), float(dropout), use_rslora
        self.scaling = self.alpha / (math.sqrt(rank) if use_rslora else rank)
        self._base_weights: dict[str, nn.Parameter] = {}
        self._base_class = base_class
        self.register_forward_pre_hook(bar_fast_paths)

    def _add_pair(
        self, prefix: str, out_features: int, in_features: int, like: Tensor, lora_dtype: torch.dtype | None
    ) -> None:
        """Parameters ``<prefix>lora_a`` (R, K) and ``<prefix>lora_b`` (N, R) on like's device.

        Raises:
            TypeError: ``lora_dtype`` is neither like's dtype nor a wider float32: the operator takes no other pairs.
        """
        wide = torch.promote_types(like.dtype, torch.float32)
        if lora_dtype not in (None, like.dtype, wide):
            expected = f"{like.dtype}, as the weight" + (f", or {wide}" if wide != like.dtype else "")
            raise TypeError(f"{type(self).__name__}: lora_dtype must be {expected}, got {lora_dtype}")
        if lora_dtype is None:
            # A young delta and its optimiser state are below the resolution of 16-bit numbers.
            lora_dtype = wide
        lora_a = torch.empty((self.rank, in_features), dtype=lora_dtype, device=like.device)
        lora_b = torch.empty((out_features, self.rank), dtype=lora_dtype, device=like.device)
        self.register_parameter(f"{prefix}lora_a", nn.Parameter(lora_a))
        self.register_parameter(f"{prefix}lora_b", nn.Parameter(lora_b))

    def _pair_prefixes(self) -> tuple[str, ...]:
        """What stands in front of ``lora_a`` and ``lora_b`` in the names of each pair."""
        return ("",)

    def own_lora_parameters(self) -> dict[str, nn.Parameter]:
        """This module's low-rank parameters by name, without those of its submodules."""
        names = [prefix + name for prefix in self._pair_prefixes() for name in ("lora_a", "lora_b")]
        return {name: p for name in names if (p := self._parameters.get(name)) is not None}

    def lora_settings(self) -> dict[str, Any]:
        """What gives this module's low-rank parameters their meaning, by the names of the arguments."""
        return {"rank": self.rank, "alpha": self.alpha, "dropout": self.lora_dropout, "use_rslora": self.use_rslora}

    def refuse_computed(self, doing: str) -> None:
        """Raise where a weight or a low-rank parameter of this module is none of its parameters, but computed."""
        pairs = [prefix + name for prefix in self._pair_prefixes() for name in ("lora_a", "lora_b")]
        named = [name for name in (*self._weight_names(self), *pairs) if self._parameters.get(name) is None]
        parametrized = self._modules.get("parametrizations")
        for name in (*named, *(parametrized._modules if parametrized is not None else ())):
            raise RuntimeError(
                f"{type(self).__name__}: {doing} needs {name} as a parameter of the module, got a computed one; take "
                "it out first (torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove)"
            )

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """A from the Kaiming-uniform distribution with a = sqrt(5), B zero: the adapted module equals the base.

        A is drawn on the CPU in float32, so that one seed gives the same adapter on every device and in every dtype.
        """
        self._unmerge()
        for name, parameter in self.own_lora_parameters().items():
            if name.endswith("lora_b"):
                parameter.zero_()
            else:
                draw(parameter, kaiming)

    def _freeze_base(self) -> None:
        added = {id(parameter) for module in self.modules() for parameter in added_parameters(module)}
        for parameter in self.parameters():
            if id(parameter) not in added:
                parameter.requires_grad_(False)

    def _lora_linear(
        self, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, channel_dim: int = -1
    ) -> Tensor:
        return lora_linear(
            x, weight, lora_a, lora_b, bias, scaling=self.scaling, dropout_p=self.lora_dropout, training=self.training,
            channel_dim=channel_dim,
        )  # fmt: skip

    # ---- merging

    def _deltas(self) -> dict[str, Tensor]:
        """Own weight name -> what the low-rank term adds to that weight, in float32 or wider."""
        raise NotImplementedError

    def _delta(self, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        dtype = torch.promote_types(lora_a.dtype, torch.float32)
        return (lora_b.to(dtype) @ lora_a.to(dtype)).mul_(self.scaling)

    @property
    def merged(self) -> bool:
        """Whether the low-rank term now is part of the weight."""
        return bool(self._base_weights)

    def _parts(self) -> list[LoRAModule]:
        """This module and those inside it that are merged with it."""
        return [self]

    def _refuse_unfit(self, doing: str) -> None:
        """Raise where a part has another forward, which may do anything with the weights, or not all of its numbers."""
        for part in self._parts():
            name = type(part).__name__
            if "forward" in part.__dict__:
                hooked = "; accelerate.hooks.remove_hook_from_module takes accelerate's out"
                raise RuntimeError(
                    f"{name}: {doing} needs the module's own forward, got one that replaces it; "
                    f"take it out first{hooked * ('_hf_hook' in part.__dict__)}"
                )
            part.refuse_computed(doing)
            shard = sharded(part)
            if shard is not None:
                raise RuntimeError(
                    f"{name}: {doing} needs whole parameters, got {shard}; gather them first "
                    "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True)"
                )

    @torch.no_grad()
    def merge(self) -> None:
        """Put ``W + scaling B A`` in the weight's place: inference then costs what the base module costs.

        The merged weight is a new parameter and the base weight is kept beside it until `unmerge` puts that very
        parameter back, bit for bit in every dtype; tied weights elsewhere never see the merge. The price is one more
        copy of the weight while merged; `to_base` gives a merged module without it. The sum is formed in float32
        (float64 for float64) and rounded once: exact to that rounding in float32, while in bfloat16 or float16 the
        part of B A below half a unit in the last place of W is lost, so a merged output differs from the unmerged one
        by about eps(dtype) of the base output, which for a young adapter can be most of its effect.

        Merging twice does nothing. A state dict of a merged module is that of the unmerged one, and loading, moving or
        casting a merged module merges again afterwards. With gradients on, a merged module's forward raises in training
        mode, and in any mode when the base weight requires grad.

        Raises:
            RuntimeError: the low-rank term is no change of the weight (a convolution with groups), the module's
                forward was replaced, by a hook of accelerate's, say, or a parameter is computed or sharded.
        """
        self._refuse_unfit("merging")
        for part in self._parts():
            part._merge()

    def _merge(self) -> None:
        if self._base_weights:
            return
        # Normal tensors, whoever asks: what is merged for inference may be trained later.
        with torch.inference_mode(False), torch.no_grad():
            for name, delta in self._deltas().items():
                base = self.get_parameter(name)
                merged = base.to(torch.promote_types(base.dtype, delta.dtype)).add(delta.view_as(base)).to(base.dtype)
                self._base_weights[name] = base
                self._parameters[name] = nn.Parameter(merged, requires_grad=False)

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit. Does nothing when not merged."""
        for part in self._parts():
            part._unmerge()

    def _unmerge(self) -> None:
        self._parameters.update(self._base_weights)
        self._base_weights.clear()

    def _refuse_merged_training(self) -> None:
        if not (self._base_weights and torch.is_grad_enabled()):
            return
        if any(base.requires_grad for base in self._base_weights.values()):
            raise RuntimeError(
                f"{type(self).__name__}: a merged module cannot train, its base weight requires grad and would get no "
                "gradient; call unmerge() first, or use no_grad() for inference"
            )
        if self.training and any(p.requires_grad for p in self.own_lora_parameters().values()):
            raise RuntimeError(
                f"{type(self).__name__}: a merged module cannot train, its low-rank parameters would get no gradient; "
                "call unmerge() first, or eval() for inference"
            )

    def to_base(self, merge: bool = True) -> nn.Module:
        """A plain module of the type that was adapted, sharing everything but the LoRA parameters.

        Args:
            merge: with the low-rank term merged into new weights (the default), or left out.

        Raises:
            RuntimeError: as `merge`, and without ``merge`` too where the forward was replaced or a parameter is
                computed or sharded.
        """
        self._refuse_unfit("to_base()")
        with torch.inference_mode(False), self.held(merged=merge):
            module: nn.Module = object.__new__(dressed(self._base_class, plain_class(type(self))[1]))
            take_over(module, self)
            for name, base in self._base_weights.items():
                # A parameter of its own: this module, when it stays merged, keeps one that never trains.
                merged = self.get_parameter(name).detach()
                module._parameters[name] = nn.Parameter(merged, requires_grad=base.requires_grad)
        for name in _SETTINGS:
            del module.__dict__[name]
        for name in self.own_lora_parameters():
            del module._parameters[name]
        for key, hook in self._forward_pre_hooks.items():
            if hook is bar_fast_paths:
                del module._forward_pre_hooks[key]
        return module

    # ---- state

    @contextlib.contextmanager
    def held(self, merged: bool) -> Iterator[None]:
        """This module's own weights merged or not for a while, then as they were."""
        before = bool(self._base_weights)
        (self._merge if merged else self._unmerge)()
        try:
            yield
        finally:
            (self._merge if before else self._unmerge)()

    def _wide_names(self) -> Iterable[str]:
        return self.own_lora_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with self.held(merged=False):
            return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self.held(merged=False):
            super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, base in self._base_weights.items():
            destination[prefix + name] = base if keep_vars else base.detach()

    def extra_repr(self) -> str:
        inherited = super().extra_repr()
        lora = f"rank={self.rank}, alpha={self.alpha:g}, lora_dropout={self.lora_dropout:g}, merged={self.merged}"
        return f"{inherited}, {lora}" if inherited else lora
