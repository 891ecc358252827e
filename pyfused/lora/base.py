"""What every LoRA module shares: its settings, its pairs of low-rank parameters, merging, and its state.

A LoRA module *is* the module it adapts (``LoRALinear`` is an ``nn.Linear``), with the same parameter names and the
same submodules: code that asks for the type, reads ``weight.dtype`` or casts layer by layer finds what it expects.
The price: a tool that swaps every ``nn.Linear`` for a class of its own swaps these too, and loses A and B. Quantise
first, or `remove_lora` first.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfused.ops.contract import checks
from pyfused.ops.lora_linear import MAX_RANK, lora_linear
from pyfused.surgery.added import KeepsWide, added_parameters, draw, kaiming
from pyfused.surgery.guards import bar_fast_paths
from pyfused.surgery.refusals import check_plain, sharded
from pyfused.surgery.variants import dressed, plain_class, take_over

# The name of an adapter to which nobody gave one.
DEFAULT = "default"

if TYPE_CHECKING:
    from typing_extensions import Self

    from pyfused.lora.shared_input import SharedInput

_SETTINGS = (
    "rank", "alpha", "lora_dropout", "use_rslora", "scaling", "_base_weights", "_base_class",
    "_adapter", "_further", "_chosen", "_index", "_inside", "_shared_input",
)  # fmt: skip


class LoRASettings(NamedTuple):
    """What a caller chooses of a low-rank term; `LoRALinear` documents each."""

    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    lora_dtype: torch.dtype | None

    @property
    def scaling(self) -> float:
        """What multiplies the low-rank term."""
        return float(self.alpha) / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class Acting(NamedTuple):
    """The adapters that act in one call as one pair: A, B, their scaling and dropout.

    Of a batch whose samples each have their own A is (G, R, K), B (N, G, R), and ``of_sample`` says whose which is.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dropout: float
    of_sample: Tensor | None


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


def check_adapter_name(caller: str, adapter: object) -> None:
    """Refuse what cannot be the name of an adapter, in the name of ``caller``."""
    if not isinstance(adapter, str):
        raise TypeError(f"{caller}: adapter must be a str, got {type(adapter).__name__}")
    if not re.fullmatch("[A-Za-z0-9_]+", adapter):
        raise ValueError(f"{caller}: adapter must be a name of letters, digits and _, got {adapter!r}")


class LoRAModule(KeepsWide):
    """Base class of the LoRA modules; ``isinstance(m, LoRAModule)`` finds them all in a model.

    The parameters of a module's first adapter are ``lora_a`` and ``lora_b``, those of a further adapter "x"
    ``adapter_x_lora_a`` and ``adapter_x_lora_b``.

    Attributes:
        rank: R. alpha: numerator of the scaling. use_rslora: rank-stabilised scaling.
        scaling: alpha / R, or alpha / sqrt(R) with ``use_rslora``; multiplies the low-rank term.
        lora_dropout: probability of zeroing an element of the low-rank term's input, in training.

    These five are of the first adapter; `lora_settings` has those of each.
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
        module._add_pairs(DEFAULT, settings)
        if freeze:
            module._freeze_base()
        return module

    def _configure(self, settings: LoRASettings, base_class: type[nn.Module]) -> None:
        self._set_first(DEFAULT, settings)
        self._base_weights: dict[str, nn.Parameter] = {}
        self._base_class = base_class
        # Settings of the adapters beside the first, by name.
        self._further: dict[str, LoRASettings] = {}
        # The adapters that act; None: the first alone. With an index, whose each sample's is: a position among them.
        self._chosen: tuple[str, ...] | None = None
        self._index: Tensor | None = None
        # The function whose context this module is in.
        self._inside: str | None = None
        # With whom it computes in one call.
        self._shared_input: SharedInput | None = None
        self.register_forward_pre_hook(bar_fast_paths)

    def _set_first(self, adapter: str, settings: LoRASettings) -> None:
        rank, alpha, dropout, use_rslora, _ = settings
        self._adapter = adapter
        self.rank, self.alpha, self.lora_dropout, self.use_rslora = rank, float(alpha), float(dropout), use_rslora
        self.scaling = settings.scaling

    # ---- adapters

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters whose parameters this module itself holds."""
        return (self._adapter, *self._further) if self._pair_widths() else ()

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """Those of `adapters` that act."""
        return self.adapters[:1] if self._chosen is None else self._chosen

    def _choose(self, names: Iterable[str]) -> None:
        """Those of ``names`` that this module has act, and no other."""
        wanted = set(names)
        chosen = tuple(name for name in self.adapters if name in wanted)
        self._chosen = None if chosen == self.adapters[:1] else chosen

    def settings_of(self, adapter: str) -> LoRASettings:
        """What a caller chose of an adapter that this module has."""
        if adapter == self._adapter:
            return LoRASettings(self.rank, self.alpha, self.lora_dropout, self.use_rslora, None)
        return self._further[adapter]

    def pair_of(self, adapter: str, prefix: str = "") -> tuple[Tensor, Tensor]:
        """A and B of an adapter, beside one of the weights."""
        own = self._prefix_of(adapter) + prefix
        return getattr(self, f"{own}lora_a"), getattr(self, f"{own}lora_b")

    def _prefix_of(self, adapter: str) -> str:
        return "" if adapter == self._adapter else f"adapter_{adapter}_"

    def new_pairs(self, adapter: str, settings: LoRASettings) -> dict[str, nn.Parameter]:
        """The parameters of another adapter by name, not yet this module's; A is drawn, and B zero.

        Raises:
            TypeError: ``lora_dtype`` is neither the weight's dtype nor a wider float32: the operator takes no other
                pairs.
        """
        like, lora_dtype = self.get_parameter(self._weight_names(self)[0]), settings.lora_dtype
        wide = torch.promote_types(like.dtype, torch.float32)
        if lora_dtype not in (None, like.dtype, wide):
            expected = f"{like.dtype}, as the weight" + (f", or {wide}" if wide != like.dtype else "")
            raise TypeError(f"{type(self).__name__}: lora_dtype must be {expected}, got {lora_dtype}")
        if lora_dtype is None:
            # A young delta and its optimiser state are below the resolution of 16-bit numbers.
            lora_dtype = wide
        pairs: dict[str, nn.Parameter] = {}
        for prefix, (out_features, in_features) in self._pair_widths().items():
            own = self._prefix_of(adapter) + prefix
            for name, shape in (("lora_a", (settings.rank, in_features)), ("lora_b", (out_features, settings.rank))):
                pairs[own + name] = nn.Parameter(torch.empty(shape, dtype=lora_dtype, device=like.device))
        _reset(pairs)
        return pairs

    def _add_pairs(self, adapter: str, settings: LoRASettings) -> None:
        for name, parameter in self.new_pairs(adapter, settings).items():
            self.register_parameter(name, parameter)

    def name_first(self, adapter: str, acts: bool) -> None:
        """Name the adapter of a module that has one; one that does not act does not train."""
        self._adapter = adapter
        self._choose((adapter,) * acts)
        for parameter in self.own_lora_parameters().values():
            parameter.requires_grad_(acts)

    def refuse_busy(self, caller: str) -> None:
        """Raise, in the name of ``caller``, where this module is merged or inside a context."""
        if self._inside is not None:
            raise ValueError(f"{caller}: model must be outside {self._inside}, got a {type(self).__name__} inside it")
        if self._base_weights:
            raise ValueError(
                f"{caller}: model must not be merged, got a merged {type(self).__name__}; call its unmerge() first"
            )

    def add_adapter(self, adapter: str, settings: LoRASettings, acts: bool) -> None:
        """Another adapter beside those that are there; one that does not act does not train."""
        active = self.active_adapters
        self._add_pairs(adapter, settings)
        numbers = {"alpha": float(settings.alpha), "dropout": float(settings.dropout)}
        self._further = {**self._further, adapter: settings._replace(lora_dtype=None, **numbers)}
        self._choose((*active, *[adapter] * acts))
        for parameter in self.own_lora_parameters(adapter).values():
            parameter.requires_grad_(acts)

    def drop_adapter(self, adapter: str) -> None:
        """Without one of several adapters. Where it was the first, the next takes its place and its names."""
        left = [name for name in self.active_adapters if name != adapter]
        for name in self.own_lora_parameters(adapter):
            del self._parameters[name]
        if adapter == self._adapter:
            first, settings = next(iter(self._further.items()))
            moved = self.plain_pairs(first)
            for name in self.own_lora_parameters(first):
                del self._parameters[name]
            self._parameters.update(moved)
            self._set_first(first, settings)
            adapter = first
        self._further = {name: settings for name, settings in self._further.items() if name != adapter}
        self._choose(left)

    @contextlib.contextmanager
    def within(self, caller: str, adapters: tuple[str, ...], index: Tensor | None = None) -> Iterator[None]:
        """Unmerged, with these adapters for a while, then as it was."""
        with self.held(merged=False):
            before = self._chosen, self._index, self._inside
            self._chosen, self._index, self._inside = adapters, index, caller
            try:
                yield
            finally:
                self._chosen, self._index, self._inside = before

    def _acting(self, x: Tensor, prefix: str = "", rows: slice | None = None) -> Acting:
        """The adapters that act on ``x``, one or more, beside ``rows`` of a weight."""
        names = self.active_adapters
        settings = [self.settings_of(name) for name in names]
        pairs = [self.pair_of(name, prefix) for name in names]
        if rows is not None:
            pairs = [(lora_a, lora_b[rows]) for lora_a, lora_b in pairs]
        if self.training and len({one.dropout for one in settings}) > 1:
            raise RuntimeError(
                f"{type(self).__name__}: adapters that act together in training must have one dropout, got "
                + ", ".join(f"{name} {one.dropout:g}" for name, one in zip(names, settings, strict=True))
            )
        index, dropout, scaling = self._index, settings[0].dropout, settings[0].scaling
        if len({one.scaling for one in settings}) > 1:
            pairs = [(a, b * one.scaling) for (a, b), one in zip(pairs, settings, strict=True)]
            scaling = 1.0
        if index is None:
            if len(pairs) == 1:
                return Acting(*pairs[0], scaling, dropout, None)
            return Acting(
                torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1), scaling, dropout, None
            )
        if x.dim() < 2 or x.shape[0] != index.shape[0]:
            raise ValueError(
                f"{type(self).__name__}: inside {self._inside} dimension 0 of every adapted module's input must hold "
                f"the {index.shape[0]} samples, got shape {tuple(x.shape)}"
            )
        widest = max(one.rank for one in settings)
        as_wide = [widest - one.rank for one in settings]
        stacked_a = torch.stack([F.pad(a, (0, 0, 0, more)) for (a, _), more in zip(pairs, as_wide, strict=True)])
        stacked_b = torch.stack([F.pad(b, (0, more)) for (_, b), more in zip(pairs, as_wide, strict=True)], dim=1)
        return Acting(stacked_a, stacked_b, scaling, dropout, index.view(-1, *(1 for _ in x.shape[2:])))

    def _pair_widths(self) -> dict[str, tuple[int, int]]:
        """What stands in front of ``lora_a`` and ``lora_b`` in the names of each pair -> its (N, K)."""
        raise NotImplementedError

    def own_lora_parameters(self, adapter: str | None = None) -> dict[str, nn.Parameter]:
        """This module's low-rank parameters by name, of one adapter or of all, without those of its submodules."""
        return {name: p for name in self._pair_names(adapter) if (p := self._parameters.get(name)) is not None}

    def plain_pairs(self, adapter: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters by the names that they would have if it were the first."""
        prefix = self._prefix_of(adapter)
        return {name.removeprefix(prefix): p for name, p in self.own_lora_parameters(adapter).items()}

    def _pair_names(self, adapter: str | None = None) -> list[str]:
        return [
            f"{self._prefix_of(one)}{prefix}{name}"
            for one in (self.adapters if adapter is None else (adapter,))
            for prefix in self._pair_widths()
            for name in ("lora_a", "lora_b")
        ]

    def lora_settings(self, adapter: str | None = None) -> dict[str, Any]:
        """What gives an adapter's parameters their meaning, by the names of the arguments; by default the first's."""
        settings = self.settings_of(self._adapter if adapter is None else adapter)._asdict()
        del settings["lora_dtype"]
        return settings

    def refuse_computed(self, doing: str) -> None:
        """Raise where a weight or a low-rank parameter of this module is none of its parameters, but computed."""
        wanted = (*self._weight_names(self), *self._pair_names())
        named = [name for name in wanted if self._parameters.get(name) is None]
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
        _reset(self.own_lora_parameters())

    def _freeze_base(self) -> None:
        added = {id(parameter) for module in self.modules() for parameter in added_parameters(module)}
        for parameter in self.parameters():
            if id(parameter) not in added:
                parameter.requires_grad_(False)

    def _lora_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "", rows: slice | None = None,
        channel_dim: int = -1,
    ) -> Tensor:  # fmt: skip
        """A linear layer with the adapters that act, one or more; ``rows`` of B where ``weight`` is a part."""
        if self._chosen is None:
            # What most calls come to, with as few steps as there can be.
            lora_a, lora_b = getattr(self, prefix + "lora_a"), getattr(self, prefix + "lora_b")
            return lora_linear(
                x, weight, lora_a, lora_b if rows is None else lora_b[rows], bias, scaling=self.scaling,
                dropout_p=self.lora_dropout, training=self.training, channel_dim=channel_dim,
            )  # fmt: skip
        lora_a, lora_b, scaling, dropout, index = self._acting(x, prefix, rows)
        return lora_linear(
            x, weight, lora_a, lora_b, bias, scaling=scaling, dropout_p=dropout, training=self.training,
            channel_dim=channel_dim, adapter_index=index,
        )  # fmt: skip

    # ---- merging

    def _deltas(self) -> dict[str, Tensor]:
        """Own weight name -> what the low-rank term adds to that weight, in float32 or wider."""
        raise NotImplementedError

    def _delta(self, prefix: str = "") -> Tensor:
        deltas = []
        for adapter in self.active_adapters:
            lora_a, lora_b = self.pair_of(adapter, prefix)
            dtype = torch.promote_types(lora_a.dtype, torch.float32)
            deltas.append((lora_b.to(dtype) @ lora_a.to(dtype)).mul_(self.settings_of(adapter).scaling))
        return functools.reduce(torch.add, deltas)

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
            if part._inside is not None:
                raise RuntimeError(f"{name}: {doing} needs the module outside {part._inside}, got one inside it")
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

        Of several adapters those that act are merged. Merging twice does nothing. A state dict of a merged module is
        that of the unmerged one, and loading, moving or casting a merged module merges again afterwards. With gradients
        on, a merged module's forward raises in training mode, and in any mode when the base weight requires grad.

        Raises:
            RuntimeError: the low-rank term is no change of the weight (a convolution with groups), the module is
                inside `adapters_off` or `adapter_batch`, its forward was replaced, by a hook of accelerate's, say, or a
                parameter is computed or sharded.
        """
        self._refuse_unfit("merging")
        for part in self._parts():
            part._merge()

    def _merge(self) -> None:
        if self._base_weights or not self.active_adapters:
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
            merge: with the low-rank terms of the adapters that act merged into new weights (the default), or left out.

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
        for name in self._pair_names():
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
        if self._shared_input is not None:
            self._shared_input.loosen()
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
        if self._further or self._chosen is not None:
            lora += f", adapters={self.adapters}, active={self.active_adapters}"
        return f"{inherited}, {lora}" if inherited else lora


@torch.no_grad()
def _reset(pairs: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in pairs.items():
        if name.endswith("lora_b"):
            parameter.zero_()
        else:
            draw(parameter, kaiming)
