"""The rows that `pyfused.tune` measured for one user: a file in the cache directory, by machine and version.

Rows hold for the software that measured them: the driver, torch, triton, this package and the source of its kernels.
The device is in each row. What other software measured stays in the file, up to a bound, and is not read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from pyfused import files
from pyfused.choice import measured
from pyfused.choice.measured import Row

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

NAME = "measured.json"
# How many other versions of the software keep their rows.
_MOST_KEYS = 8
# Seconds that a writer waits for another; a process that died holds no lock.
_PATIENCE = 20.0


@dataclass(frozen=True)
class Key:
    """By what rows hold, besides the device: versions, and a hash of the kernels' source."""

    driver: str
    torch: str
    triton: str
    pyfused: str
    source: str

    def __str__(self) -> str:
        driver = f", driver {self.driver}" if self.driver else ""
        triton = f", triton {self.triton}" if self.triton else ""
        return f"pyfused {self.pyfused} ({self.source}), torch {self.torch}{triton}{driver}"


@dataclass(frozen=True)
class Section:
    """What one version of the software measured."""

    key: Key
    rows: list[Row]


def directory() -> Path | None:
    """``PYFUSED_CACHE``, or else pyfused's folder in the platform's directory for caches; None where there is none."""
    given = os.environ.get("PYFUSED_CACHE")
    try:
        if given:
            return Path(given).expanduser()
        if sys.platform == "win32":
            local = os.environ.get("LOCALAPPDATA")
            return (Path(local) if local else Path.home() / "AppData" / "Local") / "pyfused" / "Cache"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "pyfused"
        # A relative path in it is to be ignored: XDG Base Directory Specification.
        xdg = Path(os.environ.get("XDG_CACHE_HOME") or "")
        return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "pyfused"
    except RuntimeError:
        # No home.
        return None


def path() -> Path | None:
    """The file of this user's rows."""
    place = directory()
    return None if place is None else place / NAME


@functools.cache
def key() -> Key:
    """Of the software that runs."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    package = sys.modules[__name__.partition(".")[0]]
    return Key(_driver(), torch.__version__, triton, package.__version__, _source())


def _driver() -> str:
    """The GPU's driver, without waking the GPU; "" where there is none."""
    with contextlib.suppress(OSError):
        found = re.search(r"Module\s+(\d[\d.]*)", Path("/proc/driver/nvidia/version").read_text())
        if found is not None:
            return found[1]
    # torch's type stubs lack it.
    version = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)() if torch.version.cuda else 0
    return str(version or "")


def _source() -> str:
    """A hash of what computes: the backends' Python files, and the compiled libraries by size and date."""
    package = Path(__file__).parent.parent
    found = hashlib.sha256()
    for folder in ("kernels", "portable"):
        for file in sorted((package / folder).glob("*.py")):
            found.update(file.name.encode() + file.read_bytes())
    for library in sorted([*package.glob("_C.*"), *package.glob("_cpu.*")]):
        status = library.stat()
        found.update(f"{library.name} {status.st_size} {status.st_mtime_ns}".encode())
    return found.hexdigest()[:12]


def read(place: Path) -> list[Section]:
    """The sections of a file, the latest first; none where there is no file.

    Raises:
        ValueError: it is not such a file.
        OSError: it cannot be read.
    """
    try:
        sections = json.loads(place.read_text(encoding="utf-8"))
        return [Section(Key(**each["key"]), measured.parse(each["rows"])) for each in sections]
    except FileNotFoundError:
        return []
    except measured.DAMAGE as error:
        raise ValueError(
            f"{place} must hold what pyfused.tune wrote, got {type(error).__name__}: {error}; "
            "`pyfused tune --clear` removes it"
        ) from None


def rows() -> list[Row]:
    """The user's rows that hold here; none, with a warning, where the file is damaged."""
    place = path()
    try:
        # Most users have none: the kernels' source is not read for nothing.
        if place is None or not place.exists():
            return []
        return next((section.rows for section in read(place) if section.key == key()), [])
    except (OSError, ValueError) as error:
        warnings.warn(f"pyfused: what pyfused.tune measured is left out: {error}", stacklevel=2)
        return []


def keep(new: Sequence[Row]) -> Path:
    """Writes ``new`` into the user's file, in the place of rows for the same, and takes all that is there.

    Where the file is damaged it is written anew.

    Raises:
        OSError: it cannot be written, or another process holds it for too long.
    """
    place = path()
    if place is None:
        raise OSError("there is no home directory, and PYFUSED_CACHE is not set")
    place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(place):
        try:
            sections = read(place)
        except ValueError:
            sections = []
        here = next((section.rows for section in sections if section.key == key()), [])
        others = [section for section in sections if section.key != key()]
        kept = measured.merged(here, new)
        _write([Section(key(), kept), *others[:_MOST_KEYS]], place)
    return place


def clear() -> Path | None:
    """Removes the user's file; its path, or None where there was none.

    Raises:
        OSError: it cannot be removed.
    """
    place = path()
    if place is None or not place.exists():
        return None
    with _locked(place):
        place.unlink(missing_ok=True)
    return place


def _write(sections: Sequence[Section], place: Path) -> None:
    """A file that is whole at every moment, one row a line."""
    blocks = []
    for section in sections:
        lines = ",".join(f"\n  {json.dumps(measured.as_item(row))}" for row in section.rows)
        blocks.append(f'\n {{"key": {json.dumps(asdict(section.key))}, "rows": [{lines}\n ]}}')
    with files.replacing(place) as partial:
        partial.write_text(f"[{','.join(blocks)}\n]\n", encoding="utf-8")


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Alone with the file among all processes that ask for it so.

    The system lets go of the lock when its process ends, however it ends: none is ever stale.

    Raises:
        TimeoutError: another process holds it for too long.
    """
    with place.with_name(f"{place.name}.lock").open("a+b") as file:
        end = time.monotonic() + _PATIENCE
        while not _taken(file):
            if time.monotonic() > end:
                raise TimeoutError(f"another process has held it for {_PATIENCE:g} s")
            time.sleep(0.02)
        try:
            yield
        finally:
            _release(file)


if sys.platform == "win32":

    def _taken(file: IO[Any]) -> bool:
        file.seek(0)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _release(file: IO[Any]) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)

else:

    def _taken(file: IO[Any]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _release(file: IO[Any]) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)
