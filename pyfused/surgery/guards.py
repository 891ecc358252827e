"""What of a model must behave otherwise for what was put into it: frozen BatchNorms, encoders, fast paths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from pyfused.surgery.added import KeepsWide
from pyfused.surgery.change import Change
from pyfused.surgery.paths import under
from pyfused.surgery.variants import Variant

if TYPE_CHECKING:
    from typing_extensions import Self


def bar_fast_paths(module: nn.Module, args: tuple) -> None:
    """A forward pre-hook that does nothing: ``nn.TransformerEncoderLayer``'s inference path, which reads the weights of
    its submodules and never calls them, declines as soon as one of them has a hook."""


class _NotABatchNorm(type):
    """Makes a class of norms that are what they were, ``nn.BatchNorm2d`` say, but not torch's ``_BatchNorm``.

    By that name `nn.SyncBatchNorm.convert_sync_batchnorm` finds what it puts another module in the place of, and
    `torch.optim.swa_utils.update_bn` what it restarts. What fuses a norm into a convolution asks for the former.
    """

    def mro(cls) -> list[type]:
        return [base for base in super().mro() if base is not _BatchNorm]


class DenseEncoder(Variant):
    """An nn.TransformerEncoder that makes no nested tensors of padded batches, which no layer of this package takes."""

    _variant_prefix = "Dense"

    @property
    def use_nested_tensor(self) -> bool:
        """torch's switch."""
        return False


def keep_dense(model: nn.Module, change: Change) -> list[str]:
    """nn.TransformerEncoder must not turn padded batches into nested tensors: only its layers' fast path takes them.

    Returns notes for a report.
    """
    dense = 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor and _holds_ours(module):
            change.as_variant(module, DenseEncoder)
            dense += 1
    return [f"{dense} nn.TransformerEncoder no longer use nested tensors"] if dense else []


def release_dense(model: nn.Module, change: Change) -> None:
    """What `keep_dense` changed as it was, where nothing of this package is left in it."""
    for module in model.modules():
        if isinstance(module, DenseEncoder) and not _holds_ours(module):
            change.as_base(module, DenseEncoder)


def _holds_ours(module: nn.Module) -> bool:
    return any(isinstance(inside, KeepsWide) for inside in module.modules())


class FrozenNorm(Variant):
    """A norm that is in eval mode for good."""

    _variant_prefix = "Frozen"

    @classmethod
    def _variant_made(cls, base: type[nn.Module]) -> Any:
        members = cls._variant_members(base)
        # torch.fx goes by the module whether to look into a forward.
        if base.forward is _BatchNorm.forward:
            members["forward"] = base.forward
        return _NotABatchNorm(f"{cls._variant_prefix}{base.__name__}", (cls, base), members)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


# On a norm: it stays as it is also when nothing that was added to the model is left.
_STAYS = "_stays_frozen"


def hold_batchnorms(model: nn.Module, change: Change, train: Iterable[str] = (), stays: bool = False) -> list[str]:
    """Frozen norms with running statistics to eval for good: see `FrozenNorm`; ``stays``: `release_batchnorms` too.

    Norms under ``train``, or with a parameter that trains, are left. Returns notes for a report.
    """
    held = 0
    for path, module in model.named_modules():
        if not isinstance(module, _NormBase) or not module.track_running_stats or under(path, train):
            continue
        if not any(parameter.requires_grad for parameter in module.parameters()):
            change.set(module, "training", False)
            change.as_variant(module, FrozenNorm)
            held += 1
            if stays and _STAYS not in module.__dict__:
                change.add(module, _STAYS, True)
    return [f"{held} frozen BatchNorm stay in eval mode (freeze_batchnorm=False lets them move)"] if held else []


def release_batchnorms(model: nn.Module, change: Change) -> None:
    """What `hold_batchnorms` holds back under ``train()``, unless something of this package is left that needs it."""
    if _holds_ours(model):
        return
    for module in model.modules():
        if isinstance(module, FrozenNorm) and _STAYS not in module.__dict__:
            change.as_base(module, FrozenNorm)
            change.set(module, "training", model.training)
