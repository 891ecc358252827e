"""timm's FastViT and MobileCLIP image towers with bottleneck adapters: how a model gets and loses them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from pyfused.lora.pairs import check_lora_settings
from pyfused.models.fastvit_blocks import (
    AttentionBlock,
    AttentionBlockAdapter,
    BlockAdapter,
    ConvLoRAStage,
    FastVitStage,
    RepMixerBlock,
    RepMixerBlockAdapter,
    check_block,
)
from pyfused.models.report import AdapterReport, AdapterRow
from pyfused.modules import BottleneckAdapter, ConvLoRA
from pyfused.modules.adapter import check_adapter_settings
from pyfused.surgery.change import Change
from pyfused.surgery.paths import Place, close, places
from pyfused.surgery.procedure import Request, adapt, take_out
from pyfused.surgery.refusals import check_model, check_module
from pyfused.surgery.report import count, elements

_CALLER = "add_adapters"


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
    check_model(_CALLER, model)
    check_adapter_settings(
        _CALLER, reduction, hidden, activation, skip, dropout, init_std, adapter_dtype,
        freeze=freeze, freeze_batchnorm=freeze_batchnorm, train_layer_scale=train_layer_scale,
    )  # fmt: skip
    if conv_lora_rank is not None:
        check_lora_settings(_CALLER, conv_lora_rank, conv_lora_alpha, 0.0)
    request = Request(_CALLER, model, train, exclude)
    sites = _find(request, conv_lora_rank is not None)
    built: list[nn.Module] = []

    def build(block: nn.Module) -> nn.Module:
        if conv_lora_rank is not None and isinstance(block, FastVitStage):
            return ConvLoRAStage.from_stage(
                block, conv_lora_rank, conv_lora_alpha, conv_lora_kernel, adapter_dtype, freeze=False
            )
        return _kind(block).from_block(
            block, reduction, skip, hidden=hidden, activation=activation, dropout=dropout, init_std=init_std,
            adapter_dtype=adapter_dtype, freeze=False,
        )  # fmt: skip

    def put(change: Change) -> None:
        # Stages first: one seed gives the same numbers with and without their blocks.
        sites.sort(key=lambda place: not isinstance(place.module, FastVitStage))
        built.extend(build(place.module) for place in sites)
        # A stage's `blocks` is the same object in the stage that takes its place.
        for place, adapted in zip(sites, built, strict=True):
            change.replace(place, adapted)

    def scales() -> list[nn.Parameter]:
        blocks = [block for block in built if isinstance(block, BlockAdapter)]
        return [scale for block in blocks for scale in block.layer_scales()] if train_layer_scale else []

    adapt(request, put, also=scales, freeze=freeze, freeze_batchnorm=freeze_batchnorm)
    return adapter_report(model, request.notes)


def remove_adapters(model: nn.Module) -> None:
    """Put timm's blocks and stages back in place of adapted ones, in place, and BatchNorms back under ``train()``.

    The model is then what it was before `add_adapters`, but for what trained besides the adapters. What was frozen
    stays frozen. All or nothing.

    Args:
        model: a model with adapted blocks or stages somewhere inside it.

    Raises:
        TypeError: ``model`` is not an nn.Module.
        ValueError: there is no adapted block or stage in it, or it is one itself; call its ``to_base()``.
        RuntimeError: the forward of one was replaced.
    """
    caller = "remove_adapters"
    check_module(caller, model)
    adapted = [place for place in places(model) if isinstance(place.module, BlockAdapter | ConvLoRAStage)]
    if not adapted or not adapted[0].spots:
        raise ValueError(
            f"{caller}: model must contain blocks with adapters, got a {type(model).__name__} "
            + ("with none" if not adapted else "itself; use its to_base()")
        )

    def take(change: Change) -> None:
        for place in adapted:
            if isinstance(place.module, BlockAdapter | ConvLoRAStage):
                change.replace(place, place.module.to_base())

    take_out(model, take)


def adapter_report(model: nn.Module, notes: Sequence[str] = ()) -> AdapterReport:
    """What adapters ``model`` carries now; ``notes`` are passed on."""
    rows: list[AdapterRow] = []
    kinds: Counter[type] = Counter()
    for path, module in model.named_modules():
        kinds[type(module)] += 1
        prefix = f"{path}." if path else ""
        if isinstance(module, BlockAdapter):
            for name, _, _ in module.branches:
                adapter = module.get_submodule(name)
                assert isinstance(adapter, BottleneckAdapter)
                kind, size = module.base_class.__name__, elements(adapter.parameters())
                rows.append(AdapterRow(prefix + name, kind, adapter.channels, adapter.hidden, size))
        elif isinstance(module, ConvLoRA):
            rows.append(AdapterRow(path, "ConvLoRA", module.channels, module.rank, elements(module.parameters())))
    return AdapterReport(
        **count(model, notes),
        rows=tuple(rows),
        repmixer_blocks=kinds[RepMixerBlockAdapter],
        attention_blocks=kinds[AttentionBlockAdapter],
        stages=kinds[ConvLoRAStage],
        adapter_parameters=sum(row.parameters for row in rows),
    )


# ---- finding


def _find(request: Request, conv_lora: bool) -> list[Place]:
    """Blocks to adapt and, with ``conv_lora``, stages, which alone will do."""
    model = request.model
    sites: list[Place] = []
    wrapped = 0
    for place in places(model):
        module = place.module
        wrapped += isinstance(module, BlockAdapter)
        if isinstance(module, BlockAdapter | ConvLoRAStage) or request.aside(*place.paths):
            continue
        if not isinstance(module, RepMixerBlock | AttentionBlock | FastVitStage):
            continue
        if not place.spots:
            raise ValueError(
                f"{_CALLER}: model must contain the blocks to adapt, got a {type(module).__name__} itself; "
                "use RepMixerBlockAdapter.from_block, AttentionBlockAdapter.from_block or ConvLoRAStage.from_stage"
            )
        if not isinstance(module, FastVitStage):
            check_block(f"{_CALLER}: {place.paths[0]}", module, _kind(module))
        elif not conv_lora:
            continue
        sites.append(place)
        request.note_shared(place)
    if not sites:
        classes = {type(module).__name__ for module in model.modules()}
        near = dict.fromkeys(close("RepMixerBlock", classes) + close("AttentionBlock", classes))
        carried = f" ({wrapped} blocks carry adapters already)" if wrapped else ""
        raise ValueError(
            f"{_CALLER}: model must contain timm's RepMixerBlock or AttentionBlock outside train and exclude, got a "
            f"{type(model).__name__} with none{carried}; near class names: "
            f"{', '.join(near) or 'none of ' + ', '.join(sorted(classes)[:12])}"
        )
    return sites


def _kind(block: nn.Module) -> type[BlockAdapter]:
    return RepMixerBlockAdapter if isinstance(block, RepMixerBlock) else AttentionBlockAdapter
