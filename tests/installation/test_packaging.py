"""Every kind of installation carries the whole package, also when Python starts in the repository root."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import processes
import pytest
from tree import ROOT

import pyfused

pytestmark = pytest.mark.host

OFFLINE = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation")

# Where the parts of the package come from, and every module file that is loaded under more than one name.
MODULES = """
import collections, json, os, sys
import pyfused, pyfused.bench, pyfused.kernels
import pyfused.kernels.launch, pyfused.bench.cases.case
where = {name: os.path.realpath(sys.modules[name].__file__) for name in ("pyfused", "pyfused.kernels", "pyfused.bench")}
names = collections.defaultdict(list)
for name, module in list(sys.modules.items()):
    if name != "__main__" and getattr(module, "__file__", None):
        names[os.path.realpath(module.__file__)].append(name)
double = [group for group in names.values() if len(group) > 1 and any("pyfused" in name for name in group)]
print(json.dumps({"where": where, "double": double}))
"""
# What it says of a row that is slower than wanted, in the terminal and on the page.
REPORT = """
import json, sys
from pathlib import Path
from pyfused import cli
from pyfused.bench.record.rows import Row, RowFile
from pyfused.bench.show.terminal import print_table
row = Row(
    "lora_linear 8x8->8", "operator", "forward+backward", seconds={"pyfused": 1.0}, ratios={"eager": 0.5},
    provenance={"commit": "of a checkout"},
)
RowFile(Path("record")).append(row)
assert cli.main(["report", "record"]) == 0
print_table([row], sys.stdout, targets=True)
print(Path("record", "report", "index.html").read_text())
"""
METADATA = """
import importlib.metadata, json, pyfused
about = importlib.metadata.metadata("pyfused")
print(json.dumps({
    "licence": about["License-Expression"],
    "version": about["Version"],
    "files": [str(file) for file in importlib.metadata.files("pyfused")],
    "console": [entry.value for entry in importlib.metadata.entry_points(group="console_scripts", name="pyfused")],
    "kernels": [pyfused.available_backends()[name] for name in ("cuda", "cpu")],
    "needs": [line for line in importlib.metadata.requires("pyfused") if "extra" not in line],
}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "PYFUSED"))}
    # Kernels take long to compile: test_cuda_build.py builds a small one, test_cpu_build.py those for CPUs.
    environment |= {"PYFUSED_CUDA": "0", "PYFUSED_CPU": "0"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def modules(package: Path) -> set[str]:
    """Files of a package directory, links followed."""
    return {
        os.path.relpath(Path(folder, file), package)
        for folder, _, files in os.walk(package, followlinks=True)
        for file in files
        if file.endswith((".py", ".typed", ".jinja"))
    }


def clone(copy: Path) -> Path:
    """A copy of what a clone holds: builds leave folders behind, and editable installs point into it."""
    skip = shutil.ignore_patterns(
        ".git", ".venv", ".peft", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "_C.*", "_cpu.*"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=skip)
    return copy


def tracked() -> set[str]:
    """What git has, or would take."""
    command = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    return {name for name in run(*command, cwd=ROOT).split("\0") if name and os.path.lexists(ROOT / name)}


def installation(kind: str, home: Path) -> tuple[Path, Path, Path]:
    """(checkout, python, site-packages) of a virtual environment with pyfused in that kind of installation."""
    checkout = clone(home / "clone")
    venv.create(home / "venv", with_pip=False, symlinks=True)
    python = home / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    # torch and setuptools come from the environment that runs the tests. A .pth file's folder is searched after the
    # new environment's own, and the .pth files inside it, an editable pyfused among them, are not read.
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def pip(*arguments: str | Path) -> None:
        run(sys.executable, "-m", "pip", "--python", python, *arguments, cwd=home)

    def install(*arguments: str | Path) -> None:
        # The outer environment's pyfused is visible here, and must not count as installed.
        pip("install", *OFFLINE, "--ignore-installed", *arguments)

    if kind == "editable":
        install("-e", checkout)
    elif kind == "editable-compat":
        install("--config-settings", "editable_mode=compat", "-e", checkout)
    elif kind == "plain":
        install(checkout)
    else:
        # The wheel is made from the unpacked sdist.
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", home, checkout, cwd=home)
        release = f"pyfused-{pyfused.__version__}"
        with tarfile.open(home / f"{release}.tar.gz") as archive:
            packed = {member.name.removeprefix(f"{release}/") for member in archive if not member.isdir()}
        made = {name for name in packed if name in ("PKG-INFO", "setup.cfg") or name.startswith("pyfused.egg-info/")}
        if (ROOT / ".git").exists():
            assert packed - made == tracked()
        install(home / f"{release}-py3-none-any.whl")
    return checkout, python, site


@pytest.mark.parametrize("name", ["kernels", "bench"])
def test_links_are_relative(name):
    assert os.readlink(ROOT / "pyfused" / name) == f"../{name}"


# Of a folder pip makes a wheel before it installs it ("plain").
@pytest.mark.parametrize("kind", ["editable", "editable-compat", "plain", "sdist-wheel"])
def test_installation(kind, tmp_path):
    checkout, python, site = installation(kind, tmp_path)
    editable = kind.startswith("editable")
    # One process for all that is asked outside the checkout: most of its time is the import of torch.
    outside, about, said = run(python, "-c", MODULES + METADATA + REPORT, cwd=tmp_path).split("\n", 2)
    for cwd, found in ((checkout, run(python, "-c", MODULES, cwd=checkout)), (tmp_path, outside)):
        report = json.loads(found)
        assert report["double"] == []
        # `python -c` puts its folder first: in the repository root the checkout itself is imported, whatever the kind.
        from_checkout = editable or cwd == checkout
        parts = {"pyfused": "pyfused", "pyfused.kernels": "kernels", "pyfused.bench": "bench"}
        for name, folder in parts.items():
            home = checkout / folder if from_checkout else site / name.replace(".", "/")
            assert report["where"][name] == os.path.realpath(home / "__init__.py")
    # The project's own numbers to reach, and the model of them, are not the user's.
    own = {f"bench/targets/{name}.py" for name in ("__init__", "numbers")}
    own |= {f"bench/predict/{name}.py" for name in ("__init__", "__main__", "calls", "code", "model", "rows")}
    if not editable:
        assert modules(site / "pyfused") == modules(checkout / "pyfused") - own
    assert "8x8-&gt;8" in said
    assert [text in said for text in ("NOT MET", 'id="targets"')] == [editable, editable]

    about = json.loads(about)
    assert about["licence"] == "MIT"
    assert any(file.endswith("licenses/LICENSE") for file in about["files"])
    assert about["version"] == pyfused.__version__
    for library, variable, why in zip(("_C", "_cpu"), ("PYFUSED_CUDA", "PYFUSED_CPU"), about["kernels"], strict=True):
        assert why.endswith(f"(pyfused.{library}): when it was built, {variable} was 0")
    assert set(about["console"]) == {"pyfused.cli:main"}
    assert about["needs"] == [f"torch>={'.'.join(map(str, pyfused._MIN_TORCH))}"]


@pytest.mark.parametrize(
    ("version", "refused"),
    [
        ("1.13.1", True), ("2.9.1", True), ("2.9.1+cpu", True), ("2.10.0.dev2026", False), ("2.11.0a0+git123", False),
        ("2.13.0+cpu", False), ("3.0.0", False),
    ],
)  # fmt: skip
def test_a_torch_that_is_too_old_is_one_line(tmp_path, version, refused):
    torch = f"__version__ = {version!r}\ndef __getattr__(name): raise ImportError('more of torch is wanted')\n"
    (tmp_path / "torch.py").write_text(torch)
    command = (sys.executable, "-c", "import pyfused")
    *_, last = processes.run(*command, cwd=ROOT, fails=True, PYTHONPATH=str(tmp_path)).splitlines()
    said = f"pyfused needs torch 2.10 or later, found {version}" if refused else "more of torch is wanted"
    assert last == f"ImportError: {said}"


def test_extras_have_the_names_that_every_pip_finds():
    """pip before 23.3 installs nothing for an extra whose name is not normalised, and says so in a warning alone."""
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    names = re.findall(r"^([\w-]+) = \[", section, re.MULTILINE)
    assert {"open-clip", "bench", "dev"} <= set(names)
    asked = [name for listed in re.findall(r"pyfused\[([^]]+)\]", text) for name in listed.split(",")]
    assert [name for name in [*names, *asked] if name != re.sub(r"[-_.]+", "-", name).lower()] == []
    assert set(asked) <= set(names)
