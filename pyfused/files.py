"""Files that are whole at every moment, and the tensors and settings in them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, in ``path``'s directory; what is there afterwards takes ``path``'s place.

    Where the body raises, ``path`` is as it was and nothing is left beside it.

    Raises:
        OSError: as the body, or the disk, does; its file name is ``path``.
    """
    # Of a link, what it leads to.
    place = path.resolve()
    partial = place.with_name(f"{place.name}.partial")
    try:
        yield partial
        partial.replace(place)
    except OSError as error:
        if error.filename not in (None, str(partial)):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_in(caller: str, folder: Path, *names: str) -> Iterator[list[Path]]:
    """Gives a path to write to for each of ``names`` in ``folder``, which is made where it is not there.

    Where the body raises, all of them are as they were, and a folder that was made is gone.

    Raises:
        ValueError: ``folder`` is a file.
        OSError: as `replacing`.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{caller}: folder must be a folder, got the file {str(folder)!r}")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(replacing(folder / name)) for name in names]
    except BaseException:
        for path in made:
            # What somebody else has put there meanwhile stays.
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def folder_with(caller: str, folder: str | os.PathLike[str], *names: str) -> Path:
    """The first of ``names`` that is in ``folder``.

    Raises:
        TypeError: ``folder`` is no path.
        ValueError: it is no folder, or none of them is there.
    """
    place = as_path(caller, "folder", folder)
    if not place.is_dir():
        kind = "the file" if place.exists() else "nothing at"
        raise ValueError(f"{caller}: folder must be a folder, got {kind} {str(place)!r}")
    for name in names:
        if (place / name).is_file():
            return place / name
    there = ", ".join(sorted(path.name for path in place.iterdir())[:8]) or "nothing"
    raise ValueError(f"{caller}: folder must hold {' or '.join(names)}, got {str(place)!r} with {there}")


def as_path(caller: str, argument: str, given: str | os.PathLike[str]) -> Path:
    """``given`` as a path."""
    if not isinstance(given, str | os.PathLike):
        raise TypeError(f"{caller}: {argument} must be a path, got {type(given).__name__}")
    return Path(given)


# ---- tensors


def need_safetensors(caller: str) -> Any:
    """The package safetensors.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"{caller}: files of tensors need the package safetensors (pip install safetensors): {error}"
        ) from error
    return safetensors


def write_tensors(caller: str, path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """``tensors`` and the strings ``notes`` as a safetensors file; copies of what shares memory."""
    package = need_safetensors(caller)
    dense = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    package.torch.save_file(dense, path, metadata=dict(notes))


def read_tensors(caller: str, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its notes.

    Raises:
        ValueError: it is no whole safetensors file.
    """
    package = need_safetensors(caller)
    try:
        with package.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except package.SafetensorError as error:
        raise ValueError(f"{caller}: {str(path)!r} must be a whole safetensors file, got {error}") from error


def read_pickled(caller: str, path: Path) -> Any:
    """What `torch.save` wrote: tensors and plain containers alone, on the CPU.

    Raises:
        ValueError: it is another file, a damaged one, or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # Bytes that are no checkpoint lead torch to whatever error they spell.
        raise ValueError(
            f"{caller}: {str(path)!r} must be tensors that torch.save wrote, got {type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}"
        ) from error


def read_json(caller: str, path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: it holds none.
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{caller}: {str(path)!r} must hold a JSON object, got {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{caller}: {str(path)!r} must hold a JSON object, got {type(read).__name__}")
    return read
