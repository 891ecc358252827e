"""The pairs of low-rank parameters that a LoRA module holds: one for each of its adapters and weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfused.ops.contract import checks
from pyfused.ops.lora_linear import MAX_RANK
from pyfused.surgery.added import KeepsWide, draw, kaiming

# The name of an adapter to which nobody gave one.
DEFAULT = "default"


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


class HoldsPairs(KeepsWide):
    """A module with one or more adapters: their parameters and settings, and which of them act."""

    _adapter: str
    # Settings of the adapters beside the first, by name.
    _further: dict[str, LoRASettings]
    # The adapters that act; None: the first alone. With an index, whose each sample's is: a position among them.
    _chosen: tuple[str, ...] | None
    _index: Tensor | None
    # The function whose context this module is in.
    _inside: str | None

    @staticmethod
    def _weight_names(base: Any) -> tuple[str, ...]:
        """The weights of ``base`` that low-rank terms are added to."""
        return ("weight",)

    def _set_first(self, adapter: str, settings: LoRASettings) -> None:
        rank, alpha, dropout, use_rslora, _ = settings
        self._adapter = adapter
        self.rank, self.alpha, self.lora_dropout, self.use_rslora = rank, float(alpha), float(dropout), use_rslora
        self.scaling = settings.scaling

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
        reset(pairs)
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

    def add_adapter(self, adapter: str, settings: LoRASettings, acts: bool) -> None:
        """Another adapter beside those that are there; one that does not act does not train."""
        active = self.active_adapters
        self._add_pairs(adapter, settings)
        kept = settings._replace(alpha=float(settings.alpha), dropout=float(settings.dropout), lora_dtype=None)
        self._further = {**self._further, adapter: kept}
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
        if any(one.rank < widest for one in settings):
            pairs = [(F.pad(a, (0, 0, 0, widest - len(a))), F.pad(b, (0, widest - len(a)))) for a, b in pairs]
        stacked_a, stacked_b = torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs], dim=1)
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

    def _wide_names(self) -> Iterable[str]:
        return self.own_lora_parameters()


@torch.no_grad()
def reset(pairs: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in pairs.items():
        if name.endswith("lora_b"):
            parameter.zero_()
        else:
            draw(parameter, kaiming)
