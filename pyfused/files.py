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
