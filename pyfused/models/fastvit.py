"""timm's FastViT and MobileCLIP image towers with bottleneck adapters after their frozen branches.

In every block the right order: the layer-scale and the drop-path act on the adapter's output, ``x + DP(gamma A(f))``,
so that the branch is linear in gamma and vanishes with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyfused.models.report import AdapterReport, AdapterRow
from pyfused.modules import BottleneckAdapter, ConvLoRA, surgery
from pyfused.modules.adapter import check_settings, drop_path_scale
from pyfused.modules.counts import count
from pyfused.modules.lora import check_settings as check_lora_settings
from pyfused.modules.lora import take_over
from pyfused.modules.targets import places
from pyfused.modules.wide import kept_wide
from pyfused.ops.contract import checks

try:
    from timm.layers import DropPath
    from timm.models.fastvit import AttentionBlock, FastVitStage, LayerScale2d, RepMixerBlock
except ImportError as error:
    raise ImportError(f"pyfused.models needs timm, 1.0 or later, for FastViT (pip install timm): {error}") from error

if TYPE_CHECKING:
    from typing_extensions import Self

_CALLER = "add_adapters"


class _BlockAdapter(nn.Module):
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
        check_settings(
            caller, reduction, hidden, activation, skip, dropout, init_std, adapter_dtype,
            freeze=freeze, freeze_batchnorm=freeze_batchnorm,
        )  # fmt: skip
        _check_block(caller, block, cls)
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
            with surgery.all_or_nothing() as change:
                change.train(block.parameters(), False)
                if freeze_batchnorm:
                    surgery.hold_batchnorms(block, change)
        return adapted

    def to_base(self) -> nn.Module:
        """timm's block again, on the same parameters and submodules, without the adapters."""
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


class RepMixerBlockAdapter(_BlockAdapter, RepMixerBlock):
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


class AttentionBlockAdapter(_BlockAdapter, AttentionBlock):
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
            with surgery.all_or_nothing() as change:
                change.freeze(stage, _of_adapters(stage))
        adapted.add_module("conv_lora", lora.train(stage.training))
        return adapted

    def to_base(self) -> nn.Module:
        """timm's stage again, on the same parameters and submodules, without the ConvLoRA."""
        stage: nn.Module = object.__new__(FastVitStage)
        take_over(stage, self)
        del stage._modules["conv_lora"]
        return stage

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H', W')."""
        y: Tensor = self.get_submodule("conv_lora")(super().forward(x))
        return y


def add_adapters(
    model: nn.Module,
    reduction: float | None = None,
    skip: bool | float = True,
    *,
    hidden: int | None = None,
    activation: str = "gelu",
    dropout: float = 0.0,
    init_std: float | None = None,
    adapter_dtype: torch.dtype | None = None,
    conv_lora_rank: int | None = None,
    conv_lora_alpha: float = 16,
    conv_lora_kernel: int = 3,
    freeze: bool = True,
    train: Sequence[str] = (),
    exclude: Sequence[str] = (),
    train_layer_scale: bool = False,
    freeze_batchnorm: bool = True,
) -> AdapterReport:
    """Put adapters into every RepMixer and attention block of timm's FastViTs in ``model``, in place; freeze the rest.

    All or nothing: when this raises, the model is as it was. With the defaults the output does not change until an
    adapter has been trained.

    Args:
        model: timm's FastViT or MobileCLIP image tower (``fastvit_*``), or anything that contains one (an open_clip
            model, say), training or reparameterised, on any device.
        reduction, skip, hidden, activation, dropout, init_std, adapter_dtype: as for `RepMixerBlockAdapter.from_block`.
        conv_lora_rank: R of a `ConvLoRA` after the last block of each stage. Default None: none.
        conv_lora_alpha: its low-rank term is scaled by alpha / R. Default 16.
        conv_lora_kernel: its k. Default 3.
        freeze: whether everything in ``model`` stops training but the adapters, the ConvLoRAs and ``train``. What an
            earlier call of this package set to train goes on training. Default True.
        train: dotted paths, from ``model``, of modules or parameters that train whole, e.g. ("head",). Blocks and
            stages there get no adapters.
        exclude: dotted paths, from ``model``, of modules where nothing is adapted. All blocks of a stage may be left
            out: with ``conv_lora_rank`` the stage then gets its ConvLoRA alone.
        train_layer_scale: whether the layer-scales of the adapted branches train. Default False.
        freeze_batchnorm: with ``freeze``, a BatchNorm that has nothing to train stays in eval mode, also when the
            model is put in training mode. Default True: one forward in training mode would move its running mean,
            variance and count although it is frozen.

    Returns:
        An `AdapterReport`; ``print`` it.

    Raises:
        ImportError: timm is not installed.
        TypeError: an argument has the wrong type, or a block's forward, layer-scale or drop-path is not timm's.
        ValueError: there is no block to adapt (near class names are listed) or all carry adapters already, a path
            selects nothing, a setting is out of range, ``model`` itself is a block, or a parameter of ``model`` is
            uninitialized or made under inference_mode, or ``model`` is PEFT's or sharded.
    """
    surgery.check_model(_CALLER, model)
    check_settings(
        _CALLER, reduction, hidden, activation, skip, dropout, init_std, adapter_dtype,
        freeze=freeze, freeze_batchnorm=freeze_batchnorm, train_layer_scale=train_layer_scale,
    )  # fmt: skip
    if conv_lora_rank is not None:
        check_lora_settings(_CALLER, conv_lora_rank, conv_lora_alpha, 0.0)
    train, exclude, trained = surgery.asked(_CALLER, model, train, exclude)
    blocks, stages = _find(model, (*train, *exclude), conv_lora_rank is not None)
    surgery.check_parameters(_CALLER, model)
    built: list[tuple[surgery.Place, nn.Module]] = []
    if conv_lora_rank is not None:
        for place in stages:
            with_lora = ConvLoRAStage.from_stage(
                place.module, conv_lora_rank, conv_lora_alpha, conv_lora_kernel, adapter_dtype, freeze=False
            )
            built.append((place, with_lora))
    for place in blocks:
        adapted_block = _kind(place.module).from_block(
            place.module, reduction, skip, hidden=hidden, activation=activation, dropout=dropout, init_std=init_std,
            adapter_dtype=adapter_dtype, freeze=False,
        )  # fmt: skip
        built.append((place, adapted_block))

    notes = [
        f"one module stands at {', '.join(place.paths)}: adapted once, for all"
        for place in (*stages, *blocks)
        if len(place.paths) > 1
    ]
    kept = surgery.trained_before(model)
    with surgery.all_or_nothing() as change:
        # A stage's `blocks` is the same object in the stage that takes its place.
        for place, adapted in built:
            change.replace(place, adapted)
        if freeze:
            change.freeze(model, [*kept, *_of_adapters(model)])
        change.keep_training(model, trained)
        if train_layer_scale:
            for _, adapted in built:
                change.keep_training(adapted, adapted.layer_scales() if isinstance(adapted, _BlockAdapter) else ())
        if freeze and freeze_batchnorm:
            notes += surgery.hold_batchnorms(model, change, train)
    return adapter_report(model, notes)


def remove_adapters(model: nn.Module) -> None:
    """Put timm's blocks and stages back in place of adapted ones, in place, and BatchNorms back under ``train()``.

    The model is then what it was before `add_adapters`, but for what trained besides the adapters. What was frozen
    stays frozen. All or nothing.

    Args:
        model: a model with adapted blocks or stages somewhere inside it.

    Raises:
        TypeError: ``model`` is not an nn.Module.
        ValueError: there is no adapted block or stage in it, or it is one itself; call its ``to_base()``.
    """
    caller = "remove_adapters"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be an nn.Module, got {type(model).__name__}")
    adapted = [place for place in places(model) if isinstance(place.module, _BlockAdapter | ConvLoRAStage)]
    if not adapted or not adapted[0].spots:
        raise ValueError(
            f"{caller}: model must contain blocks with adapters, got a {type(model).__name__} "
            + ("with none" if not adapted else "itself; use its to_base()")
        )
    with surgery.all_or_nothing() as change:
        for place in adapted:
            if isinstance(place.module, _BlockAdapter | ConvLoRAStage):
                change.replace(place, place.module.to_base())
        surgery.release_batchnorms(model, change)


def adapter_report(model: nn.Module, notes: Sequence[str] = ()) -> AdapterReport:
    """What adapters ``model`` carries now; ``notes`` are passed on."""
    rows: list[AdapterRow] = []
    kinds: Counter[type] = Counter()
    for path, module in model.named_modules():
        kinds[type(module)] += 1
        prefix = f"{path}." if path else ""
        if isinstance(module, _BlockAdapter):
            for name, _, _ in module.branches:
                adapter = module.get_submodule(name)
                assert isinstance(adapter, BottleneckAdapter)
                kind = module.base_class.__name__
                rows.append(AdapterRow(prefix + name, kind, adapter.channels, adapter.hidden, _size(adapter)))
        elif isinstance(module, ConvLoRA):
            rows.append(AdapterRow(path, "ConvLoRA", module.channels, module.rank, _size(module)))
    return AdapterReport(
        **count(model),
        rows=tuple(rows),
        repmixer_blocks=kinds[RepMixerBlockAdapter],
        attention_blocks=kinds[AttentionBlockAdapter],
        stages=kinds[ConvLoRAStage],
        adapter_parameters=sum(row.parameters for row in rows),
        notes=tuple(notes),
    )


# ---- finding


def _find(
    model: nn.Module, left_out: tuple[str, ...], conv_lora: bool
) -> tuple[list[surgery.Place], list[surgery.Place]]:
    """(blocks, stages) to adapt; ``conv_lora``: stages alone will do."""
    blocks: list[surgery.Place] = []
    stages: list[surgery.Place] = []
    wrapped = 0
    for place in places(model):
        module, paths = place.module, place.paths
        wrapped += isinstance(module, _BlockAdapter)
        if isinstance(module, _BlockAdapter | ConvLoRAStage) or any(surgery.under(path, left_out) for path in paths):
            continue
        if not isinstance(module, RepMixerBlock | AttentionBlock | FastVitStage):
            continue
        if not place.spots:
            raise ValueError(
                f"{_CALLER}: model must contain the blocks to adapt, got a {type(module).__name__} itself; "
                "use RepMixerBlockAdapter.from_block, AttentionBlockAdapter.from_block or ConvLoRAStage.from_stage"
            )
        if isinstance(module, FastVitStage):
            stages.append(place)
            continue
        _check_block(f"{_CALLER}: {paths[0]}", module, _kind(module))
        blocks.append(place)
    if not blocks and not (conv_lora and stages):
        classes = {type(module).__name__ for module in model.modules()}
        near = dict.fromkeys(surgery.close("RepMixerBlock", classes) + surgery.close("AttentionBlock", classes))
        carried = f" ({wrapped} blocks carry adapters already)" if wrapped else ""
        raise ValueError(
            f"{_CALLER}: model must contain timm's RepMixerBlock or AttentionBlock outside train and exclude, got a "
            f"{type(model).__name__} with none{carried}; near class names: "
            f"{', '.join(near) or 'none of ' + ', '.join(sorted(classes)[:12])}"
        )
    return blocks, stages


def _kind(block: nn.Module) -> type[_BlockAdapter]:
    return RepMixerBlockAdapter if isinstance(block, RepMixerBlock) else AttentionBlockAdapter


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


def _check_block(caller: str, block: nn.Module, cls: type[_BlockAdapter]) -> None:
    _check_class(caller, block, cls.base_class, cls)
    for _, scale, path in cls.branches:
        for name, kind in ((scale, LayerScale2d), (path, DropPath)):
            child = block.get_submodule(name)
            if type(child) not in (kind, nn.Identity):
                raise TypeError(
                    f"{caller}: {name} must be timm's {kind.__name__} or nn.Identity, got {type(child).__name__}"
                )


def _of_adapters(model: nn.Module) -> list[nn.Parameter]:
    return [p for m in model.modules() if isinstance(m, BottleneckAdapter | ConvLoRA) for p in m.parameters()]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
