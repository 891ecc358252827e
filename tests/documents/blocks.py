"""The code that documents show: every Python block, what it prints, and every command."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from tree import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^(?: {4}.+\n)+", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of Python, and the text that the document shows as its output; None where it shows none."""

    code: str
    line: int
    output: str | None


def python(document: Path) -> list[Block]:
    """The blocks of a document in order; a `text` block that follows one, with nothing between, is its output."""
    text = document.read_text()
    fences = list(_FENCE.finditer(text))
    blocks = []
    for fence, after in itertools.zip_longest(fences, fences[1:]):
        if fence[1] != "python":
            continue
        shown = after is not None and after[1] == "text" and not text[fence.end() : after.start()].strip()
        line = text.count("\n", 0, fence.start(2)) + 1
        blocks.append(Block(fence[2], line, after[2] if shown else None))
    return blocks


def commands(document: Path) -> list[str]:
    """The lines of `sh` blocks and of blocks that are indented, without comments."""
    text = document.read_text()
    shells = [fence[2] for fence in _FENCE.finditer(text) if fence[1] == "sh"]
    lines = "\n".join([*shells, *_INDENTED.findall(_FENCE.sub("", text))]).splitlines()
    return [line.partition(" # ")[0].strip() for line in lines if line.strip() and not line.strip().startswith("#")]
