"""Prefix tuning: learned tokens that every attention of a model sees, or that go through it with the input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyfused.methods import virtual_tokens
from pyfused.methods.virtual_tokens import VirtualTokens
from pyfused.ops.contract import checks
from pyfused.surgery import checkpoint
from pyfused.surgery.change import Change
from pyfused.surgery.paths import under
from pyfused.surgery.procedure import Request, adapt, take_out
from pyfused.surgery.refusals import check_model
from pyfused.surgery.report import Counts, count, elements, table_of_alike
from pyfused.surgery.variants import plain_class

_CALLER = "PrefixTuning"
# The entry of a checkpoint that holds the settings.
_SETTINGS = "prefix_settings"
# Towers that tokens can go through with the input, (module, name) -> where their blocks are, and their width.
_TOWERS: dict[tuple[str, str], tuple[str, Callable[[Any], int]]] = {
    ("timm.models.vision_transformer", "VisionTransformer"): ("blocks", lambda tower: tower.embed_dim),
    ("open_clip.transformer", "VisionTransformer"): ("transformer.resblocks", lambda tower: tower.conv1.out_channels),
}


@dataclass(frozen=True)
class PrefixRow:
    """Virtual tokens of one module: its dotted path, its class, tokens n, their width, and their parameters."""

    path: str
    kind: str
    tokens: int
    width: int
    parameters: int


@dataclass(frozen=True, kw_only=True)
class PrefixReport(Counts):
    """What `PrefixTuning` did.

    Attributes:
        rows: one `PrefixRow` per attention, or one for the sequence.
        trainable_parameters, total_parameters, notes: see `pyfused.surgery.report.Counts`.
    """

    rows: tuple[PrefixRow, ...]

    @property
    def prefix_parameters(self) -> int:
        """Elements of all parameters of virtual tokens."""
        return sum(row.parameters for row in self.rows)

    def _found(self) -> list[str]:
        alike = [(row.kind, row.tokens, row.width, row.parameters) for row in self.rows]
        return [
            *table_of_alike(("module", "tokens", "width", "count", "parameters"), alike, "<>>>>"),
            f"prefix parameters     {self.prefix_parameters:,} in {len(self.rows)} modules",
        ]


class PrefixTuning:
    """Give ``model`` virtual tokens, in place, and freeze the rest.

    Deep (the default): every attention gets n learned keys and values of its own, which all its queries see beside the
    given ones: y = softmax(q [K, P_k]^T) [V, P_v]. They have no position and no mask hides them. Attentions are every
    nn.MultiheadAttention and every module whose forward calls ``scaled_dot_product_attention``: timm's, open_clip's and
    transformers'. Shallow: n learned tokens join the input sequence before the first block and leave it after the last;
    who reads the sequence between blocks (``forward_intermediates``) sees them too.

    All or nothing: when this raises, the model is as it was. The tokens are parameters of the model, in submodules
    named ``virtual_tokens``, so that its own state dict, copies and pickles hold them. What an earlier call of this
    package set to train, LoRA say, goes on training, and LoRA may come later as well. The output changes at once, by
    little: tokens start at a standard deviation of 0.02.

    Args:
        model: any module with attentions, on any device, e.g. ``clip.visual`` for one tower.
        num_virtual_tokens: n, at least 1. Default 10.
        deep: keys and values in every attention (the default), or tokens in the sequence, for timm's and open_clip's
            VisionTransformer.
        prefix_projection: whether the tokens go through two linear layers with tanh between them, of width 512, which
            train too. Default False.
        dropout: probability of zeroing an element of the tokens in training, in [0, 1). Default 0.
        freeze: whether everything else stops training but ``train``. Default True.
        train: dotted paths, from ``model``, of modules or parameters that train whole, e.g. ("head",).
        exclude: dotted paths, from ``model``, of modules whose attentions get no tokens; deep alone.
        freeze_batchnorm: with ``freeze``, a BatchNorm that has nothing to train stays in eval mode, also when the model
            is put in training mode. Default True.

    Attributes:
        model: the model. report: a `PrefixReport`; ``print`` it.

    Raises:
        TypeError: an argument has the wrong type, or a shallow prefix for a tower of another kind.
        ValueError: no attention can carry tokens (the reasons are listed), one has some already, a path names nothing,
            a setting is out of range, ``model`` is PEFT's, sharded or in DistributedDataParallel, or a parameter of it
            is uninitialized or made under inference_mode.

    Source: Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021 (deep); Jia et al.,
    "Visual Prompt Tuning", 2022 (shallow: VPT-Shallow).
    """

    def __init__(
        self,
        model: nn.Module,
        num_virtual_tokens: int = 10,
        deep: bool = True,
        prefix_projection: bool = False,
        dropout: float = 0.0,
        freeze: bool = True,
        train: Sequence[str] = (),
        exclude: Sequence[str] = (),
        freeze_batchnorm: bool = True,
    ) -> None:
        check_model(_CALLER, model)
        if torch.is_inference_mode_enabled():
            raise ValueError(
                f"{_CALLER}: model must get virtual tokens outside torch.inference_mode(), which never train"
            )
        checks.integer(_CALLER, "num_virtual_tokens", num_virtual_tokens, 1)
        flags = {"deep": deep, "prefix_projection": prefix_projection, "freeze": freeze}
        for name, flag in {**flags, "freeze_batchnorm": freeze_batchnorm}.items():
            checks.flag(_CALLER, name, flag)
        checks.probability(_CALLER, "dropout", dropout)
        request = Request(_CALLER, model, train, exclude)
        for path, module in model.named_modules():
            if isinstance(module, VirtualTokens):
                raise ValueError(f"{_CALLER}: model must have no virtual tokens yet, got {path!r}; remove() them first")
        if not deep and request.exclude:
            raise ValueError(f"{_CALLER}: exclude must be empty where deep is False, got {request.exclude!r}")

        def tokens(sets: int, width: int, like: nn.Module) -> VirtualTokens:
            # Float32 beside weights that are quantised; torch's device beside none.
            tensors = [*like.parameters(), *like.buffers()]
            wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
            device = tensors[0].device if tensors else None
            made = VirtualTokens(sets, num_virtual_tokens, width, prefix_projection, dropout, device, wide)
            return made.train(like.training)

        if deep:
            attentions = _attentions(request)
        else:
            blocks, axis, width = _blocks(model)

        def put(change: Change) -> None:
            if not deep:
                virtual_tokens.put_before(change, blocks, axis, tokens(1, width, blocks[0]))
                return
            for attention in attentions:
                heads, size = virtual_tokens.heads_of(attention)
                virtual_tokens.put_in(change, attention, tokens(2, heads * size, attention))

        adapt(request, put, freeze=freeze, freeze_batchnorm=freeze_batchnorm)
        self.model = model
        self.report = _report(model, request.notes)

    def state_dict(self) -> dict[str, Tensor]:
        """The virtual tokens by their full names, and their settings: what a prefix checkpoint holds.

        The tensors are detached and share memory with the model. "prefix_settings" is JSON in a tensor of bytes.

        Raises:
            ValueError: the tokens were removed.
        """
        return checkpoint.packed(*_own_state("PrefixTuning.state_dict", self.model), _SETTINGS)

    def load_state_dict(self, state: Mapping[str, Tensor], check_settings: bool = True) -> None:
        """Copy a checkpoint, as `state_dict` gives it, into the model; all or nothing.

        Args:
            state: the checkpoint.
            check_settings: whether the settings of the checkpoint must be there. Where they are there they must be the
                model's in either case. Default True.

        Raises:
            TypeError: an argument has the wrong type, or a tensor is not a dense floating one.
            ValueError: names are missing or unknown, shapes or settings differ, settings are missing, the model is
                sharded or on device meta, or the tokens were removed.
        """
        caller = "PrefixTuning.load_state_dict"
        own, settings = _own_state(caller, self.model)
        checkpoint.load(caller, self.model, own, settings, _SETTINGS, state, check_settings)

    def remove(self) -> None:
        """Take the virtual tokens out. What was frozen stays frozen, and what trained trains. All or nothing.

        Raises:
            ValueError: the tokens were removed already.
            RuntimeError: what carries tokens was changed since: its forward was replaced, or its class (fully_shard, a
                parametrization).
        """
        _own_state("PrefixTuning.remove", self.model)

        def take(change: Change) -> None:
            for module in list(self.model.modules()):
                virtual_tokens.take_out(change, module)

        take_out(self.model, take)


def _attentions(request: Request) -> list[nn.Module]:
    """The attentions that get tokens; what is to be said of others goes to the notes."""
    model = request.model
    found: list[nn.Module] = []
    why: Counter[tuple[str, str]] = Counter()
    everywhere = model.named_modules(remove_duplicate=False)
    aside = {id(module) for path, module in everywhere if under(path, request.exclude)}
    for module in model.modules():
        meant = virtual_tokens.is_attention(module) or virtual_tokens.seems_attention(module)
        if not meant or id(module) in aside:
            continue
        reason = virtual_tokens.refusal(module)
        if reason is None:
            found.append(module)
        else:
            why[type(module).__name__, reason] += 1
    request.notes += [f"{times} {kind} got no virtual tokens: {reason}" for (kind, reason), times in why.items()]
    if not found:
        because = f" ({'; '.join(request.notes)})" if request.notes else ""
        raise ValueError(
            f"{_CALLER}: model must have attentions outside exclude, nn.MultiheadAttention or modules whose forward "
            f"calls scaled_dot_product_attention, got a {type(model).__name__} with none{because}"
        )
    return found


def _blocks(model: nn.Module) -> tuple[Any, int, int]:
    """The blocks of a tower, the axis along which the sequence lies in them, and its width."""
    for module, name in ((base.__module__, base.__qualname__) for base in type(model).__mro__):
        if (module, name) in _TOWERS:
            path, width = _TOWERS[module, name]
            blocks: Any = model.get_submodule(path)
            if not len(blocks) or any("forward" in block.__dict__ for block in (blocks[0], blocks[-1])):
                raise ValueError(f"{_CALLER}: model must have blocks with a forward of their own, got a {name} without")
            batch_first = getattr(getattr(model, "transformer", None), "batch_first", True)
            return blocks, 1 if batch_first else 0, width(model)
    raise TypeError(
        f"{_CALLER}: model must be timm's or open_clip's VisionTransformer where deep is False, got "
        f"{type(model).__module__}.{type(model).__name__}"
    )


def _virtual(model: nn.Module) -> Iterator[tuple[str, VirtualTokens]]:
    return ((path, module) for path, module in model.named_modules() if isinstance(module, VirtualTokens))


def _own_state(caller: str, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    state: dict[str, Tensor] = {}
    settings: dict[str, dict[str, Any]] = {}
    for path, module in _virtual(model):
        state |= {f"{path}.{name}": parameter.detach() for name, parameter in module.named_parameters()}
        settings[checkpoint.plain_name(path)] = module.settings()
    if not state:
        raise ValueError(f"{caller}: model must have virtual tokens, got a {type(model).__name__} with none left")
    return state, settings


def _report(model: nn.Module, notes: list[str]) -> PrefixReport:
    rows = []
    for path, module in _virtual(model):
        owner = path.rpartition(".")[0]
        kind = plain_class(type(model.get_submodule(owner)))[0].__name__
        rows.append(PrefixRow(owner, kind, module.count, module.width, elements(module.parameters())))
    return PrefixReport(**count(model, notes), rows=tuple(rows))
