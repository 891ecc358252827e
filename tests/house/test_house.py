"""The rules of the house: what may import what, what `import pyfused` costs, and that the documents run."""

from __future__ import annotations

import ast
import fnmatch
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tree import ROOT

host = pytest.mark.host

# Room, a folder or a file of pyfused -> the other rooms that it may import. A room inside a room has a dot. "face" is
# `pyfused` itself: the names that users import.
MAY_IMPORT: dict[str, set[str]] = {
    "files": set(),
    "choice.measured": {"files"},
    "choice.cache": {"files", "choice.measured"},
    "choice": {"choice.cache", "choice.measured"},
    "reference": set(),
    "portable": set(),
    "cpu": {"portable"},
    "kernels": {"choice.measured"},
    "ops.contract": {"choice", "choice.measured"},
    "ops": {"choice", "ops.contract"},
    "surgery": {"ops.contract"},
    "lora": {"surgery", "ops", "ops.contract"},
    "modules": {"lora", "surgery", "ops", "ops.contract"},
    "methods": {"files", "lora", "modules", "surgery", "ops.contract"},
    "models": {"lora", "modules", "surgery", "ops", "ops.contract"},
    "diagnostics": {"methods", "lora", "modules", "surgery", "ops.contract"},
    "integrations": {"files", "lora", "methods", "surgery", "ops", "ops.contract"},
    "explanation": {"choice", "integrations", "ops", "surgery"},
    "progress": set(),
    "tuner": {"choice", "choice.cache", "choice.measured", "ops", "progress", "surgery"},
    "face": {
        "choice",
        "ops",
        "lora",
        "modules",
        "models",
        "diagnostics",
        "explanation",
        "methods",
        "integrations",
        "tuner",
    },
    "installation": {"face", "choice", "choice.cache"},
    "cli": {"face", "installation", "choice", "choice.cache", "choice.measured"},
    "bench": {
        "face",
        "choice",
        "choice.cache",
        "choice.measured",
        "files",
        "ops",
        "ops.contract",
        "modules",
        "models",
        "diagnostics",
        "lora",
        "reference",
        "kernels",
        "progress",
        "tuner",
    },
}
# The same, inside a function only: code that must not be loaded with the package.
MAY_IMPORT_LATE = {
    "ops": {"portable", "kernels"},
    "ops.contract": {"portable", "cpu", "kernels"},
    "tuner": {"kernels"},
    "installation": {"bench"},
    "cli": {"bench", "integrations", "kernels"},
}
# Component -> third-party packages besides torch; None: any.
THIRD_PARTY: dict[str, set[str] | None] = {
    "files": {"safetensors"},
    "kernels": {"triton", "numpy"},
    "models": {"timm"},
    "diagnostics": {"matplotlib"},
    "integrations": {"peft"},
    "progress": {"tqdm"},
    "cli": None,
    "bench": None,
}


def room_of(name: str) -> str:
    """The room of a module by its dotted name, without the file's own."""
    parts = name.split(".")[1:]
    return next((room for n in (2, 1) if (room := ".".join(parts[:n])) in MAY_IMPORT), "face")


def component_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    if parts[0] != "pyfused":
        return parts[0]
    if parts[1:] == ("__init__",):
        return "face"
    name = ".".join(parts).removesuffix(".__init__")
    # What has no place in the table keeps its own name, which is then reported.
    return parts[1] if room_of(name) == "face" else room_of(name)


def imports_of(path: Path, root: Path) -> Iterator[tuple[str, bool, int]]:
    """(full dotted name, inside a function, line) of every import that runs; ``from a import b`` counts as ``a.b``."""
    relative = path.relative_to(root).with_suffix("").parts
    package = list(relative[:-1] if relative[0] == "pyfused" else ("pyfused", *relative[:-1]))

    def visit(node: ast.AST, late: bool) -> Iterator[tuple[str, bool, int]]:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, late, node.lineno
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}", late, node.lineno
        late = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, late)

    yield from visit(ast.parse(path.read_text()), late=False)


def violations(root: Path) -> list[str]:
    found = []
    # kernels/ and bench/ are read where they lie, not through the links inside pyfused/.
    links = (root / "pyfused" / "kernels", root / "pyfused" / "bench")
    paths = [path for path in (root / "pyfused").rglob("*.py") if not any(link in path.parents for link in links)]
    paths += [path for folder in ("kernels", "bench") for path in (root / folder).rglob("*.py")]
    for path in sorted(paths):
        component = component_of(path, root)
        where = path.relative_to(root)
        if component not in MAY_IMPORT:
            found.append(f"{where}: {component!r} has no place in MAY_IMPORT")
            continue
        for name, late, line in imports_of(path, root):
            top = name.partition(".")[0]
            if top in ("kernels", "bench", "tests"):
                found.append(f"{where}:{line}: {component} imports {name} past the package")
            elif top == "pyfused":
                target = room_of(name)
                allowed = (
                    MAY_IMPORT[component] | {component} | (MAY_IMPORT_LATE.get(component, set()) if late else set())
                )
                if target not in allowed:
                    found.append(f"{where}:{line}: {component} imports {target}")
            elif top not in sys.stdlib_module_names and top != "torch":
                third_party = THIRD_PARTY.get(component, set())
                if third_party is not None and top not in third_party:
                    found.append(f"{where}:{line}: {component} imports {top}")
    return found


@host
def test_imports_point_one_way():
    assert violations(ROOT) == []


def hidden_modules(root: Path) -> list[str]:
    """Modules that a function or class of their own name hides: ``import pyfused.a.b as b`` would give that."""
    found = []
    for init in sorted(root.rglob("__init__.py")):
        inside = {path.stem for path in init.parent.iterdir() if path.suffix == ".py" or path.is_dir()}
        for name, _, line in imports_of(init, root.parent):
            home, _, last = name.rpartition(".")
            if last in inside and home.endswith(f".{last}"):
                found.append(f"{init.relative_to(root.parent)}:{line}: {last} hides the module {home}")
    return found


@host
@pytest.mark.parametrize("room", ["pyfused", "bench", "kernels"])
def test_no_name_hides_its_module(room):
    assert hidden_modules(ROOT / room) == []


@host
def test_a_hidden_module_is_found(tmp_path):
    package = tmp_path / "pyfused"
    package.mkdir()
    (package / "__init__.py").write_text("from pyfused.check import check\nfrom pyfused.check import other\n")
    (package / "check.py").write_text("")
    assert hidden_modules(package) == ["pyfused/__init__.py:1: check hides the module pyfused.check"]


@host
@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("pyfused/portable/a.py", "from pyfused.reference import philox", "portable imports reference"),
        ("pyfused/reference/a.py", "import numpy", "reference imports numpy"),
        ("pyfused/ops/a.py", "from pyfused import kernels", "ops imports kernels"),
        ("pyfused/ops/a.py", "from ..modules import LoRALinear", "ops imports modules"),
        ("pyfused/ops/a.py", "def f():\n    import pyfused.reference", "ops imports reference"),
        ("pyfused/modules/a.py", "from pyfused import lora_linear", "modules imports face"),
        ("pyfused/modules/a.py", "def f():\n    from pyfused.portable import philox", "modules imports portable"),
        ("pyfused/explanation.py", "from pyfused.kernels import launch", "explanation imports kernels"),
        ("kernels/a.py", "from pyfused.choice.backends import choose", "kernels imports choice"),
        ("kernels/a.py", "from ..portable import philox", "kernels imports portable"),
        ("bench/a.py", "from kernels import launch", "bench imports kernels.launch past the package"),
        ("pyfused/novel.py", "", "'novel' has no place in MAY_IMPORT"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, path, code, message):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(code)
    (violation,) = violations(tmp_path)
    assert violation.startswith(path)
    assert violation.endswith(message)


@host
@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("pyfused/ops/a.py", "def f():\n    from pyfused.kernels import lora_linear"),
        ("pyfused/ops/a.py", "if TYPE_CHECKING:\n    from typing_extensions import Self"),
        ("pyfused/ops/a.py", "import math, torch.nn\nfrom . import decision\nfrom pyfused.choice import backends"),
        ("kernels/a.py", "import triton\nfrom .launch import target\nfrom pyfused.kernels import launch"),
    ],
)
def test_a_right_import_is_not(tmp_path, path, code):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(code)
    assert violations(tmp_path) == []


def fresh(code: str, *arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@host
def test_import_and_training_step_need_torch_alone():
    code = """
import sys, torch

class OnlyTorch:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ("torch", "pyfused"):
            raise ModuleNotFoundError(f"{name} is not part of torch", name=name)

sys.meta_path.insert(0, OnlyTorch())
import pyfused

x, w = torch.randn(3, 16), torch.randn(8, 16)
a, b = torch.randn(4, 16, requires_grad=True), torch.randn(8, 4, requires_grad=True)
pyfused.lora_linear(x, w, a, b, dropout_p=0.1).sum().backward()
print(pyfused.explain(pyfused.lora_linear, x, w, a, b))
print(pyfused.available_backends())
loaded = [name for name in sys.modules if name.startswith(("pyfused.kernels", "pyfused.bench", "triton"))]
assert not loaded, loaded
assert a.grad.abs().sum() > 0
print("done")
"""
    assert fresh(code).endswith("done\n")


@host
def test_import_takes_no_longer_than_torch_and_300_ms():
    code = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import pyfused
print(middle - start, time.perf_counter() - middle)
"""
    # One of a few: the machine may be busy with other tests, of which torch, 1 s on a quiet one, tells how much.
    runs = (tuple(map(float, fresh(code).split())) for _ in range(3))
    assert any(own < 0.3 * max(1.0, torchs) for torchs, own in runs)


def test_allocations_are_poisoned():
    x = torch.zeros(2, 3)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for tensor in (
            torch.empty(5, dtype=dtype),
            x.new_empty(5, dtype=dtype),
            torch.empty_like(x, dtype=dtype),
            torch.empty_strided((2, 2), (1, 2), dtype=dtype),
        ):
            assert tensor.isnan().all()
    assert (torch.empty(5, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


@host
def test_every_test_file_is_collected_and_tracked(pytestconfig):
    """pytest passes by folders of some names, and git by what it ignores, without a word."""
    passed_by = pytestconfig.getini("norecursedirs")
    folders = {part for path in (ROOT / "tests").rglob("test_*.py") for part in path.relative_to(ROOT).parts[:-1]}
    assert len(folders) > 15
    assert [name for name in folders if any(fnmatch.fnmatch(name, pattern) for pattern in passed_by)] == []
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
        assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == ""


@host
def test_every_test_dependency_is_pinned():
    pins = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    wanted = {re.match(r"[\w.-]+", line)[0] for line in importlib.metadata.requires("pyfused")}
    wanted = {name.replace("_", "-").lower() for name in wanted} - {"pyfused"}
    assert len(wanted) > 10
    assert wanted <= pins


@host
def test_public_names_are_documented():
    import pyfused

    for name in pyfused.__all__:
        value = getattr(pyfused, name)
        assert name == "__version__" or (value.__doc__ and len(value.__doc__) > 40), name


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="no worker")
def test_a_worker_has_one_thread():
    assert torch.get_num_threads() == 1
