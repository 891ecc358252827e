"""``pyfused convert``: files of what was tuned, from one package's format to another's.

Every conversion goes through what `save_tuned` writes, so that each format is described once, in a file of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

from pyfused import files
from pyfused.integrations import aa_clip_format, adapterhub_format, fastvit_fork_format, lora_files, peft_format
from pyfused.methods import files as tuned_files
from pyfused.methods.tuned import OUT_PROJ, Tuned
from pyfused.ops.contract import checks

FORMATS = {
    "pyfused": "a folder that save_tuned wrote",
    "peft": "a folder of PEFT's with a LoRA, which save_lora writes too",
    "adapterhub": "a folder of AdapterHub's with a bottleneck adapter",
    "aa-clip": "a checkpoint of AA-CLIP, a file",
    "fastvit-fork": "a checkpoint of the ml-fastvit fork with adapters, a file",
}
# Their files hold more than what was tuned, which is taken from another file of the format.
LIKE = ("adapterhub", "fastvit-fork")
ORDERS = fastvit_fork_format.ORDERS
_CALLER = "convert"


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    from_format: str,
    to_format: str,
    like: str | os.PathLike[str] | None = None,
    order: str | None = None,
) -> list[str]:
    """Write ``source``, of one format, as ``target`` of another, whole or not at all.

    Args:
        source: what is read, as `FORMATS` says. No pickle is run.
        target: what is written, the same.
        from_format, to_format: names in `FORMATS`.
        like: a file or folder of the target's format, for the formats in `LIKE`: what was not tuned is taken from it.
        order: for the fork of ml-fastvit, "right" or "broken": how its adapters were trained, which its files do not
            say.

    Returns:
        What is to be said of the conversion, in sentences.

    Raises:
        ImportError: the package safetensors is not installed.
        TypeError: an argument has the wrong type.
        ValueError: a format is unknown, a file is missing or damaged, or something has no form in the target's format;
            it is named.
    """
    for argument, value in (("from_format", from_format), ("to_format", to_format)):
        checks.one_of(_CALLER, argument, value, tuple(FORMATS))
    if from_format == to_format:
        raise ValueError(f"{_CALLER}: to_format must be another format than from_format, got {to_format!r} twice")
    if (like is not None) != (to_format in LIKE):
        needs = "given" if to_format in LIKE else "None"
        raise ValueError(
            f"{_CALLER}: like must be {needs} for {to_format!r}, got {None if like is None else str(like)!r}"
        )
    if (order is not None) and from_format != "fastvit-fork":
        raise ValueError(f"{_CALLER}: order must be None but for 'fastvit-fork', got {order!r}")
    if order is not None:
        checks.one_of(_CALLER, "order", order, ORDERS)
    given, place = files.as_path(_CALLER, "source", source), files.as_path(_CALLER, "target", target)
    if not given.exists():
        raise ValueError(f"{_CALLER}: source must be there, got nothing at {str(given)!r}")
    if place.resolve() == given.resolve():
        raise ValueError(f"{_CALLER}: target must be another place than source, got {str(place)!r} twice")
    tuned, notes = _read(given, from_format, order)
    template = None if like is None else files.as_path(_CALLER, "like", like)
    return [*notes, *_write(tuned, place, to_format, template)]


def _read(source: Path, kind: str, order: str | None) -> tuple[Tuned, list[str]]:
    if kind == "pyfused":
        return tuned_files.read(_CALLER, files.folder_with(_CALLER, source, tuned_files.FILE)), []
    if kind == "peft":
        tuned = peft_format.from_peft(*lora_files.read(_CALLER, source), _CALLER)
        return tuned, _twice(tuned, "doubled")
    if kind == "adapterhub":
        return adapterhub_format.read(_CALLER, source)
    if kind == "aa-clip":
        return aa_clip_format.read(_CALLER, source), [aa_clip_format.UNSTATED]
    return fastvit_fork_format.read(_CALLER, source, order)


def _write(tuned: Tuned, target: Path, kind: str, like: Path | None) -> list[str]:
    if kind == "pyfused":
        tuned_files.write(_CALLER, target, tuned, tuned.tensors)
        return []
    if kind == "peft":
        config, state = peft_format.to_peft(tuned, caller=_CALLER)
        lora_files.write(_CALLER, target, config, state)
        return _twice(tuned, "halved")
    if kind == "aa-clip":
        return aa_clip_format.write(_CALLER, tuned, target)
    assert like is not None
    write = adapterhub_format.write if kind == "adapterhub" else fastvit_fork_format.write
    return write(_CALLER, tuned, target, like)


def _twice(tuned: Tuned, what: str) -> list[str]:
    count = sum(own["kind"] == OUT_PROJ for own in tuned.modules.values())
    return [f"{peft_format.TWICE} {what}, in {count} attentions: the outputs are equal"] if count else []
