"""What a text given with -k names: whatever has the text in its printed name, in capitals or not."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")
_NEAR = 5


class Unnamed(ValueError):
    """A text names nothing; the message has the names that are near."""


def select(items: Sequence[_Item], texts: Sequence[str], names: Callable[[_Item], Iterable[str]]) -> list[_Item]:
    """The items that at least one of the texts names; all where there is no text.

    Args:
        items: what there is.
        texts: each is part of a name of at least one item, capitals aside.
        names: the names of an item.

    Raises:
        Unnamed: a text is part of no name.
    """
    found = [(item, [name.casefold() for name in names(item)]) for item in items]
    for text in texts:
        if not text:
            raise Unnamed("-k must be part of a printed name, got ''; without -k it is all of them")
        if not any(text.casefold() in name for _, own in found for name in own):
            near = _near(text, itertools.chain.from_iterable(map(names, items)))
            hint = f"near: {', '.join(map(repr, near))}" if near else "--list prints them"
            raise Unnamed(f"-k must be part of a printed name, got {text!r}; {hint}")
    return [item for item, own in found if not texts or any(text.casefold() in name for text in texts for name in own)]


def _near(text: str, names: Iterable[str]) -> list[str]:
    """Parts of names, of as many words as ``text`` has, that are near it."""
    count = max(1, len(text.split()))
    parts = {}
    for name in names:
        words = name.replace(",", " ").split()
        for start in range(max(1, len(words) - count + 1)):
            part = " ".join(words[start : start + count])
            parts[part.casefold()] = part
    return [parts[part] for part in difflib.get_close_matches(text.casefold(), parts, _NEAR)]
