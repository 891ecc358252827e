"""A bar on stderr while something takes long: on a terminal, and where tqdm is installed."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from typing import TypeVar

_Item = TypeVar("_Item")


def bar(items: Collection[_Item], what: str) -> Iterable[_Item]:
    """``items``, with a bar that is gone when they have ended.

    Args:
        items: what is gone through.
        what: stands before the bar.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items

    class Unwatched(tqdm):
        # tqdm's thread would draw beside a clock; without it the bar moves between items alone.
        monitor_interval = 0

    return Unwatched(items, desc=what, file=sys.stderr, leave=False, miniters=1, dynamic_ncols=True)
