"""What every LoRA module shares: how it is made, merging, and its state.

A LoRA module *is* the module it adapts (``LoRALinear`` is an ``nn.Linear``), with the same parameter names and the
same submodules: code that asks for the type, reads ``weight.dtype`` or casts layer by layer finds what it expects.
The price: a tool that swaps every ``nn.Linear`` for a class of its own swaps these too, and loses A and B. Quantise
first, or `remove_lora` first.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyfused.lora.pairs import DEFAULT, HoldsPairs, LoRASettings, check_lora_settings, reset
from pyfused.ops.decision import LeftToTorch, notify
from pyfused.ops.lora_linear import lora_linear
from pyfused.surgery.added import added_parameters
from pyfused.surgery.guards import bar_fast_paths
from pyfused.surgery.refusals import check_plain, sharded
from pyfused.surgery.variants import check_own_forward, dressed, plain_class, take_over

if TYPE_CHECKING:
    from typing_extensions import Self

    from pyfused.lora.shared_input import SharedInput

_SETTINGS = (
    "rank", "alpha", "lora_dropout", "use_rslora", "scaling", "_base_weights", "_base_class",
    "_adapter", "_further", "_chosen", "_index", "_inside", "_shared_input",
)  # fmt: skip


class LoRAModule(HoldsPairs):
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
        self._further = {}
        self._chosen = None
        self._index = None
        self._inside = None
        # With whom it computes in one call.
        self._shared_input: SharedInput | None = None
        self.register_forward_pre_hook(bar_fast_paths)

    def refuse_busy(self, caller: str) -> None:
        """Raise, in the name of ``caller``, where this module is merged or inside a context."""
        if self._inside is not None:
            raise ValueError(f"{caller}: model must be outside {self._inside}, got a {type(self).__name__} inside it")
        if self._base_weights:
            raise ValueError(
                f"{caller}: model must not be merged, got a merged {type(self).__name__}; call its unmerge() first"
            )

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
        reset(self.own_lora_parameters())

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
            check_own_forward(part, doing)
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

    def _begin_merged(self) -> None:
        """Where it is merged: says that no operator serves it, and refuses to train."""
        if not self._base_weights:
            return
        notify(LeftToTorch(type(self).__name__, why="it is merged, and so a plain layer"))
        if not torch.is_grad_enabled():
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
