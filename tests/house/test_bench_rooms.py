"""The rooms of bench/: which may import which, and that none is a hall or hides a module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from test_house import ROOT, imports_of

pytestmark = pytest.mark.host

# Room -> the other rooms that it may import. What lies in bench/ itself, such as third-party packages, is everybody's.
MAY_IMPORT: dict[str, set[str]] = {
    "": set(),
    "cases": set(),
    "measure": {"cases"},
    "models": {"cases", "measure"},
    "record": set(),
    "show": {"cases", "record"},
    "run": {"cases", "measure", "models", "record", "show"},
    "gate": {"cases", "measure", "show"},
    "tune": {"cases", "measure", "record"},
    "gpu": {"record"},
    "gpu.programs": {"gpu", "cases", "measure", "record", "show", "run"},
    "targets": {"cases", "record"},
    "predict": {"cases", "gpu.programs", "targets", "tune"},
}
# The same, inside a function only: an installed package has no such room.
MAY_IMPORT_LATE = {"show": {"targets"}}
# pytest looks for it at the top of what it is given.
_CONFTEST = "bench/conftest.py"
_MOST_FILES = 12


def room_of(name: str) -> str:
    """Of a module's dotted name below `pyfused.bench`; "" where it lies in bench/ itself."""
    inside = [room for room in MAY_IMPORT if room and f"{name}.".startswith(f"{room}.")]
    return max(inside, key=len, default="")


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted((root / "bench").rglob("*.py")):
        where = path.relative_to(root)
        folder = ".".join(where.parent.parts[1:])
        if folder not in MAY_IMPORT:
            found.append(f"{where}: {folder!r} has no place in MAY_IMPORT")
            continue
        for name, late, line in imports_of(path, root):
            if name.startswith("pyfused.bench.") and str(where) != _CONFTEST:
                room = room_of(name.removeprefix("pyfused.bench."))
                allowed = MAY_IMPORT[folder] | {folder, ""}
                if room not in allowed | (MAY_IMPORT_LATE.get(folder, set()) if late else set()):
                    found.append(f"{where}:{line}: {folder or 'bench'} imports {room}")
    return found


def test_imports_between_rooms_point_one_way():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("bench/cases/a.py", "from pyfused.bench.measure import timing", "cases imports measure"),
        ("bench/measure/a.py", "def f():\n    import pyfused.bench.run.plugin", "measure imports run"),
        ("bench/show/a.py", "from pyfused.bench import gate", "show imports gate"),
        ("bench/show/a.py", "from pyfused.bench.targets import numbers", "show imports targets"),
        ("bench/gpu/a.py", "from pyfused.bench.gpu.programs.truth import main", "gpu imports gpu.programs"),
        ("bench/signals.py", "from pyfused.bench.record import rows", "bench imports record"),
        ("bench/novel/a.py", "", "'novel' has no place in MAY_IMPORT"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, path, code, message):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(code)
    (violation,) = violations(tmp_path)
    assert violation.startswith(path)
    assert violation.endswith(message)


def test_no_room_imports_back():
    """The rooms have an order in which each imports earlier ones alone."""
    left = dict(MAY_IMPORT)
    while left:
        ready = [room for room, others in left.items() if not others & left.keys()]
        assert ready, f"a circle: {left}"
        for room in ready:
            del left[room]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_is_no_hall_and_hides_no_module(room):
    folder = ROOT.joinpath("bench", *room.split("."))
    files = [path for path in folder.iterdir() if path.is_file() and path.name != "__init__.py"]
    assert 0 < len(files) <= _MOST_FILES
    # A name that the package exports would stand in the place of its module: `import a.b.c as c` would give it.
    opening = ast.parse((folder / "__init__.py").read_text())
    assert not [node for node in ast.walk(opening) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert not [name for name, *_ in imports_of(folder / "__init__.py", ROOT) if name.startswith("pyfused")]
    for path in files:
        if path.suffix == ".py":
            functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
            assert path.stem not in functions
