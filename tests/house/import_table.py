"""Writes the rooms of the package and the imports that `tests/house/test_house.py` allows them into CONTRIBUTING.md.

python tests/house/import_table.py
"""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_house import MAY_IMPORT, MAY_IMPORT_LATE, ROOT, THIRD_PARTY

DOCUMENT = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- imports: begin -->", "<!-- imports: end -->"


def module_of(room: str) -> Path | None:
    """The file whose docstring says what the room holds; None for a room that is not built."""
    folder = ROOT / "pyfused"
    path = "" if room == "face" else room.replace(".", "/")
    candidates = [folder / path / "__init__.py", folder / f"{path}.py"]
    return next((path for path in candidates if path.exists()), None)


def block() -> str:
    """A list of what each room holds, then a table of what it may import."""
    rooms = {room: path for room in MAY_IMPORT if (path := module_of(room)) is not None}
    lines = []
    for room, path in rooms.items():
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        text = " ".join(docstring.partition("\n\n")[0].split()).replace("``", "`")
        lines += textwrap.wrap(f"- `{room}`: {text}", 120, subsequent_indent="  ", break_on_hyphens=False)
    lines += ["", "| room | may import | inside functions also | packages besides torch |", "|---|---|---|---|"]
    for room in rooms:
        others = set(rooms) - {room}
        allowed, late = MAY_IMPORT[room] & others, MAY_IMPORT_LATE.get(room, set()) & others
        packages = THIRD_PARTY.get(room, set())
        cells = [_names(allowed, others), _names(late, others), "any" if packages is None else _names(packages)]
        lines.append(f"| `{room}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _names(names: Iterable[str], every: Iterable[str] = ()) -> str:
    """Those names, or where they are most of ``every``, the names that are missing."""
    names, missing = set(names), set(every) - set(names)
    if every and len(names) >= 2 * len(missing):
        return "all" + (f" but {', '.join(sorted(missing))}" if missing else "")
    return ", ".join(sorted(names))


def inserted(text: str) -> str:
    """The text with the block between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"CONTRIBUTING.md must hold {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n\n{block()}\n\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(inserted(DOCUMENT.read_text()))
