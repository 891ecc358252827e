"""Blocks and stages of timm's FastViT with bottleneck adapters after their frozen branches.

In every block the right order: the layer-scale and the drop-path act on the adapter's output, ``x + DP(gamma A(f))``,
so that the branch is linear in gamma and vanishes with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyfused.modules import BottleneckAdapter, ConvLoRA
from pyfused.modules.adapter import check_adapter_settings, drop_path_scale
from pyfused.ops.contract import checks
from pyfused.surgery.added import kept_wide
from pyfused.surgery.change import all_or_nothing
from pyfused.surgery.guards import hold_batchnorms
from pyfused.surgery.variants import take_over

try:
    from timm.layers import DropPath
    from timm.models.fastvit import AttentionBlock, FastVitStage, LayerScale2d, RepMixerBlock
except ImportError as error:
    raise ImportError(f"pyfused.models needs timm, 1.0 or later, for FastViT (pip install timm): {error}") from error

if TYPE_CHECKING:
    from typing_extensions import Self


class BlockAdapter(nn.Module):
    """What both adapted blocks share: a branch is (name of the adapter, of its layer-scale, of its drop-path)."""

    branches: tuple[tuple[str, str, str], ...]
    base_class: type[nn.Module]

    @classmethod
    def from_block(
        cls,
        block: nn.Module,
        reduction: float | None = None,
        skip: bool | float = True,
        *,
        hidden: int | None = None,
        activation: str = "gelu",
        dropout: float = 0.0,
        init_std: float | None = None,
        adapter_dtype: torch.dtype | None = None,
        freeze: bool = True,
        freeze_batchnorm: bool = True,
    ) -> Self:
        """An adapted block on timm's ``block``, whose parameters, submodules and hooks it shares.

        It is a block of timm's class; the names of the block's own children and state-dict keys stay, the adapters add
        theirs. Forward reads gamma and the rate of the layer-scale and drop-path modules and does not call them: hooks
        on those two do not run.

        Args:
            block: timm's, training or reparameterised, on any device.
            reduction: h = max(C // reduction, 8). Default None: 2, unless ``hidden`` is given.
            skip: factor of the branch's output inside the adapter. True (the default) makes the new block equal the
                old one at the start; False is the adapter's original form, which starts without the frozen branch.
            hidden: h, in place of ``reduction``. Default None.
            activation, dropout, init_std: as for `BottleneckAdapter`.
            adapter_dtype: of the adapters' parameters. Default: float32, for a float64 block float64.
            freeze: whether the block's own parameters, gamma among them, stop training. Default True.
            freeze_batchnorm: with ``freeze``, the block's BatchNorms stay in eval mode, also when the block is put in
                training mode: one forward in training mode otherwise moves their statistics. Default True.

        Raises:
            TypeError: a block of another class, or with another forward, layer-scale or drop-path than timm's; a
                setting of the wrong type.
            ValueError: the block carries adapters already, or a setting is out of range.
        """
        caller = f"{cls.__name__}.from_block"
        check_adapter_settings(
            caller, reduction, hidden, activation, skip, dropout, init_std, adapter_dtype,
            freeze=freeze, freeze_batchnorm=freeze_batchnorm,
        )  # fmt: skip
        check_block(caller, block, cls)
        weight = block.get_parameter("mlp.fc2.weight")
        dtype = torch.promote_types(weight.dtype, torch.float32) if adapter_dtype is None else adapter_dtype
        adapted = object.__new__(cls)
        take_over(adapted, block)
        for name, _, _ in cls.branches:
            adapter = BottleneckAdapter(
                weight.shape[0], reduction, hidden, activation, skip, channel_dim=1, dropout=dropout, init_std=init_std,
                device=weight.device, dtype=dtype,
            )  # fmt: skip
            adapted.add_module(name, adapter.train(block.training))
        if freeze:
            with all_or_nothing() as change:
                change.train(block.parameters(), False)
                if freeze_batchnorm:
                    hold_batchnorms(block, change)
        return adapted

    def to_base(self) -> nn.Module:
        """timm's block again, on the same parameters and submodules, without the adapters.

        Raises:
            RuntimeError: the forward was replaced.
        """
        block: nn.Module = object.__new__(self.base_class)
        take_over(block, self)
        for name, _, _ in self.branches:
            del block._modules[name]
        return block

    def layer_scales(self) -> list[nn.Parameter]:
        """The gammas of the adapted branches, (C, 1, 1) each; a block may have none."""
        scales = [self.get_submodule(name) for _, name, _ in self.branches]
        return [scale.gamma for scale in scales if isinstance(scale, LayerScale2d)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scales = [self.get_submodule(name) for _, name, _ in self.branches]
        with kept_wide([(scale, "gamma") for scale in scales if isinstance(scale, LayerScale2d)]):
            return super()._apply(fn, recurse)

    def _add_branch(self, x: Tensor, f: Tensor, branch: tuple[str, str, str]) -> Tensor:
        """``x + DP(gamma A(f))``, (B, C, H, W)."""
        adapter, scale, path = (self.get_submodule(name) for name in branch)
        gamma = scale.gamma.flatten() if isinstance(scale, LayerScale2d) else None
        keep = None
        if isinstance(path, DropPath):
            keep = drop_path_scale(f, path.drop_prob, path.training, path.scale_by_keep)
        y: Tensor = adapter(f, residual=x, layer_scale=gamma, sample_scale=keep)
        return y


class RepMixerBlockAdapter(BlockAdapter, RepMixerBlock):
    """timm's ``RepMixerBlock`` with one `BottleneckAdapter`, ``adapter``, after its convolutional MLP:

        x <- RepMixer(x);  x <- x + DP(gamma A(mlp(x)))

    gamma is the block's own ``layer_scale.gamma``, used in float32 and kept in it when the block is cast to 16 bits;
    the drop-path rate is the block's, its draws those that timm's block makes. Made by `from_block`.

    Source: Vasu et al., "FastViT", 2023; timm, timm/models/fastvit.py.
    """

    base_class = RepMixerBlock
    branches = (("adapter", "layer_scale", "drop_path"),)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("RepMixerBlockAdapter is made from a block: RepMixerBlockAdapter.from_block(block, ...)")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.token_mixer(x)
        return self._add_branch(x, self.mlp(x), self.branches[0])


class AttentionBlockAdapter(BlockAdapter, AttentionBlock):
    """timm's ``AttentionBlock`` with a `BottleneckAdapter` after its attention and one after its convolutional MLP,
    ``adapter_1`` and ``adapter_2``:

        x <- x + DP(gamma_1 A_1(attention(norm(x))));  x <- x + DP(gamma_2 A_2(mlp(x)))

    gamma_i is the block's own ``layer_scale_i.gamma``; else as `RepMixerBlockAdapter`. Made by `from_block`.

    Source: Vasu et al., "FastViT", 2023; timm, timm/models/fastvit.py.
    """

    base_class = AttentionBlock
    branches = (("adapter_1", "layer_scale_1", "drop_path1"), ("adapter_2", "layer_scale_2", "drop_path2"))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("AttentionBlockAdapter is made from a block: AttentionBlockAdapter.from_block(block, ...)")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self._add_branch(x, self.token_mixer(self.norm(x)), self.branches[0])
        return self._add_branch(x, self.mlp(x), self.branches[1])


class ConvLoRAStage(FastVitStage):
    """timm's ``FastVitStage`` with a `ConvLoRA`, ``conv_lora``, after its last block. Made by `from_stage`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("ConvLoRAStage is made from a stage: ConvLoRAStage.from_stage(stage, ...)")

    @classmethod
    def from_stage(
        cls,
        stage: nn.Module,
        rank: int = 8,
        alpha: float = 16,
        kernel_size: int = 3,
        dtype: torch.dtype | None = None,
        freeze: bool = True,
    ) -> Self:
        """A stage on timm's ``stage``, whose parameters, submodules and state-dict keys it shares.

        Args:
            stage: timm's. rank, alpha, kernel_size: as for `ConvLoRA`.
            dtype: of the ConvLoRA. Default: float32, for a float64 stage float64.
            freeze: whether the stage's own parameters stop training, but those of adapters in it. Default True.

        Raises:
            TypeError: a module of another class, or a setting of the wrong type.
            ValueError: the stage carries a ConvLoRA already, or a setting is out of range.
        """
        caller = "ConvLoRAStage.from_stage"
        checks.flag(caller, "freeze", freeze)
        _check_class(caller, stage, FastVitStage, cls)
        last = [None, *stage.get_submodule("blocks").children()][-1]
        if not isinstance(last, RepMixerBlock | AttentionBlock):
            raise TypeError(f"{caller}: expected a stage that ends in timm's block, got {type(last).__name__}")
        weight = last.get_parameter("mlp.fc2.weight")
        dtype = torch.promote_types(weight.dtype, torch.float32) if dtype is None else dtype
        lora = ConvLoRA(weight.shape[0], rank, alpha, kernel_size, weight.device, dtype)
        adapted = object.__new__(cls)
        take_over(adapted, stage)
        if freeze:
            with all_or_nothing() as change:
                inside = (m for m in stage.modules() if isinstance(m, BottleneckAdapter | ConvLoRA))
                added = {id(parameter) for module in inside for parameter in module.parameters()}
                change.train((p for p in stage.parameters() if id(p) not in added), False)
        adapted.add_module("conv_lora", lora.train(stage.training))
        return adapted

    def to_base(self) -> nn.Module:
        """timm's stage again, on the same parameters and submodules, without the ConvLoRA.

        Raises:
            RuntimeError: the forward was replaced.
        """
        stage: nn.Module = object.__new__(FastVitStage)
        take_over(stage, self)
        del stage._modules["conv_lora"]
        return stage

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H', W')."""
        y: Tensor = self.get_submodule("conv_lora")(super().forward(x))
        return y


def _check_class(caller: str, module: nn.Module, kind: type[nn.Module], cls: type[nn.Module]) -> None:
    if isinstance(module, cls):
        raise ValueError(f"{caller}: expected a plain {kind.__name__}, got a {cls.__name__}: already adapted")
    if not isinstance(module, kind):
        raise TypeError(f"{caller}: expected timm's {kind.__name__}, got {type(module).__name__}")
    if type(module).forward is not kind.forward or "forward" in module.__dict__:
        raise TypeError(
            f"{caller}: expected a {kind.__name__} with timm's forward, got {type(module).__name__} with one that "
            "replaces it"
        )


def check_block(caller: str, block: nn.Module, cls: type[BlockAdapter]) -> None:
    _check_class(caller, block, cls.base_class, cls)
    for _, scale, path in cls.branches:
        for name, kind in ((scale, LayerScale2d), (path, DropPath)):
            child = block.get_submodule(name)
            if type(child) not in (kind, nn.Identity):
                raise TypeError(
                    f"{caller}: {name} must be timm's {kind.__name__} or nn.Identity, got {type(child).__name__}"
                )
