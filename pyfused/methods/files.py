"""``save_tuned`` and ``load_tuned``: what was tuned in a model, by any method, as one file.

The file is a safetensors file: tensors by their full names. The settings are JSON in its header, so that no moment
exists at which tensors lie beside the settings of others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pyfused import files
from pyfused.methods.tuned import Tuned, collect, put
from pyfused.surgery.refusals import check_module

FILE = "tuned.safetensors"
# The entry of the header that holds the settings.
_HEADER = "pyfused"
_VERSION = 1


def save_tuned(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write what was tuned in ``model``, by whatever methods of this package, into ``folder`` as "tuned.safetensors".

    That is: the parameters of every module that this package has added or put in another's place (LoRA of every kind,
    `BottleneckAdapter`, `ConvLoRA`, `ScaledCrossAttention`, virtual tokens, what `AdaptedCLIP` adds), their settings,
    and what of the model itself trains: biases (`bitfit`), ``train=``, or what requires grad now, of modules with their
    buffers. What is frozen is not in it.

    A file that was there is replaced whole, or stays where this raises. Tensors are written whole where FSDP2 or
    another user of DTensor has sharded them: then every process calls this, and the first writes.

    Args:
        model: a model that something was tuned in, on any device, compiled by `torch.compile` or not.
        folder: where to write; made where it is not there.

    Raises:
        ImportError: the package safetensors is not installed.
        TypeError: an argument has the wrong type.
        ValueError: nothing was tuned in ``model``, a module of this package keeps buffers (a fitted PCACompressor),
            ``model`` is in DistributedDataParallel or FullyShardedDataParallel, or ``folder`` is a file.
        RuntimeError: a LoRA parameter is computed (parametrized, pruned), or the first process could not write.
        OSError: the disk is full, or the folder may not be written to.
    """
    caller = "save_tuned"
    place = files.as_path(caller, "folder", folder)
    tuned = collect(caller, model, trains=True)
    if not tuned.tensors:
        raise ValueError(
            f"{caller}: model must have something tuned in it, got a {type(model).__name__} with nothing; call "
            "inject_lora, bitfit, PrefixTuning or add_adapters first"
        )
    write_whole(caller, model, tuned.tensors, lambda tensors: write(caller, place, tuned, tensors))


def load_tuned(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Put what `save_tuned` wrote into ``model``.

    All or nothing: when this raises, the model is as it was. LoRA, virtual tokens and what trained of the model itself
    are put into a model that has none of them yet, as `inject_lora`, `PrefixTuning` and ``train=`` do, and the rest of
    it is frozen; adapters and cross-attention must be there. What is there must have the settings of the file.

    Args:
        model: the model that the file was written of, or one of the same architecture, on any device, before sharding
            or after it.
        folder: as `save_tuned`, or `pyfused convert`, wrote it.

    Raises:
        ImportError: the package safetensors is not installed.
        TypeError: an argument has the wrong type, or a tensor has the wrong dtype.
        ValueError: ``folder`` is a file, or has not the file, which is damaged or not of this package; names, shapes
            or settings differ (near names are listed); or ``model`` lacks modules that cannot be put into it here.
    """
    caller = "load_tuned"
    check_module(caller, model)
    put(caller, model, read(caller, files.folder_with(caller, folder, FILE)))


def write(caller: str, folder: Path, tuned: Tuned, tensors: dict[str, Tensor]) -> None:
    """The file, with ``tensors`` in place of those of ``tuned``."""
    header = {
        "version": _VERSION,
        "modules": tuned.modules,
        "trained_modules": tuned.trained_modules,
        "trained_parameters": tuned.trained_parameters,
        "partial": tuned.partial,
    }
    with files.replacing_in(caller, folder, FILE) as (path,):
        files.write_tensors(caller, path, tensors, {_HEADER: json.dumps(header, sort_keys=True)})


def read(caller: str, path: Path) -> Tuned:
    """What is in the file.

    Raises:
        ValueError: it is damaged, or not of this package.
    """
    tensors, notes = files.read_tensors(caller, path)
    try:
        header = json.loads(notes[_HEADER])
        if header["version"] != _VERSION:
            raise ValueError(f"version {header['version']!r}, this pyfused reads {_VERSION}")
        modules, partial = header["modules"], header["partial"]
        roots, single = header["trained_modules"], header["trained_parameters"]
        kinds = [own["kind"] for own in modules.values()]
        if not all(isinstance(name, str) for name in (*kinds, *roots, *single)) or partial not in (True, False):
            raise ValueError("settings of another kind")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{caller}: {str(path)!r} must hold the settings that save_tuned wrote in its header, got {error!r}"
        ) from None
    tuned = Tuned(tensors, modules, tuple(roots), tuple(single), partial)
    stray = sorted(name for name in tuned.added() if name.rpartition(".")[0] not in modules)
    if stray or not tensors:
        what = f"{stray[0]!r}, which belongs to none" if stray else "none"
        raise ValueError(f"{caller}: {str(path)!r} must hold the tensors of its modules, got {what}")
    return tuned


# ---- sharded models


def write_whole(
    caller: str, model: nn.Module, tensors: dict[str, Tensor], write: Callable[[dict[str, Tensor]], None]
) -> None:
    """Let ``write`` write ``tensors``; whole, and in the first process alone, where they are sharded.

    Raises:
        ValueError: ``model`` is in DistributedDataParallel, which names its parameters anew, or in
            FullyShardedDataParallel, whose parameters are parts of what they are called.
        RuntimeError: in other processes than the first, where that could not write.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"{caller}: model must not be in DistributedDataParallel, got {path or 'model'!r}; give its .module"
            )
        if any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__):
            raise ValueError(
                f"{caller}: model must not be in FullyShardedDataParallel, got {path or 'model'!r}; shard by "
                "fully_shard, or save inside FullyShardedDataParallel.summon_full_params the module that it wraps"
            )
    # Looked up by name: torch.distributed may not be there, and is slow to import.
    if not any(hasattr(tensor, "full_tensor") for tensor in tensors.values()):
        write(tensors)
        return
    from torch import distributed

    # In one order everywhere: each is a collective call.
    whole = {name: _full(tensors[name]) for name in sorted(tensors)}
    failed: list[Any] = [None]
    if distributed.get_rank() == 0:
        try:
            write(whole)
        except Exception as error:
            failed = [f"{type(error).__name__}: {error}"]
            distributed.broadcast_object_list(failed)
            raise
    distributed.broadcast_object_list(failed)
    if failed[0] is not None:
        raise RuntimeError(f"{caller}: the first process could not write: {failed[0]}")


def _full(tensor: Tensor) -> Tensor:
    whole: Any = getattr(tensor, "full_tensor", None)
    return whole() if whole is not None else tensor
