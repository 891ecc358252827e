"""Files that are whole at every moment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, in ``path``'s directory; what is there afterwards takes ``path``'s place.

    Where the body raises, ``path`` is as it was and nothing is left beside it.

    Raises:
        OSError: as the body, or the disk, does; its file name is ``path``.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
