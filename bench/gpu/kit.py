"""`make gpu-kit`: in one folder what a bare GPU machine needs beside the checkout, and the command to run there.

Compiles the CUDA C++ kernels for one architecture, apart from the working tree's own, and fetches the wheels of
missing.txt. Needs nvcc and pip's index; the machine with the GPU then needs neither.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pyfused.bench import ROOT
from pyfused.bench.gpu import library
from pyfused.bench.record import rows
from pyfused.bench.signals import run_to_the_end

FOLDER = Path("build", "gpu-kit")
LIMIT = 60 << 20
ARCHITECTURES = ("80", "90", "100", "120")
MISSING = Path(__file__).with_name("missing.txt")
# What setup.py reads.
_SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "pyfused", "kernels", "bench")
# Steps of a first call.
_STEPS = "truth,questions,speed"


def build(architecture: str, target: Path) -> None:
    """Compiles the kernels for one architecture into ``target``.

    In a tree of links, whose own build/cuda keeps its objects: the working tree's stay as they are.

    Raises:
        subprocess.CalledProcessError: they do not compile, or what compiles them is not there; setup.py has said so.
    """
    tree = ROOT / "build" / f"sm_{architecture}"
    tree.mkdir(parents=True, exist_ok=True)
    for name in _SOURCES:
        link = tree / name
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(ROOT / name, tree))
    environment = os.environ | {"PYFUSED_CUDA": "1", "PYFUSED_CUDA_ARCHS": architecture}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", "built"]
    run_to_the_end(command, cwd=tree, env=environment)
    shutil.copy(tree / "built" / "pyfused" / library.NAME, target)


def fetch(folder: Path) -> None:
    """Downloads the wheels of missing.txt, in the versions of constraints.txt.

    Raises:
        subprocess.CalledProcessError: pip cannot; it has said why.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "py", "--platform", "any"]
    command += ["--dest", str(folder), "-c", str(ROOT / "constraints.txt"), "-r", str(MISSING)]
    run_to_the_end(command)


def command(folder: Path, commit: str | None) -> str:
    """What is run in the checkout's root there, without make and git.

    Args:
        folder: of the kit, relative to the root.
        commit: of the checkout; None where there is none that its files are of.
    """
    site = f"$PWD/{folder}/site"
    install = f'python3 -m pip install --quiet --no-index --no-deps --upgrade --target "{site}" {folder}/wheels/*.whl'
    options = f"--library {folder}/{library.NAME} --steps {_STEPS}{f' --commit {commit}' if commit else ''}"
    return f'{install} && PYTHONPATH="{site}" python3 -m pyfused.bench.gpu {options} ${{OUT:+--output "$OUT"}}'


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu-kit", description=__doc__)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="90", help="the card's architecture (default 90)")
    parser.add_argument("--library", type=Path, metavar="FILE", help="a compiled _C.abi3.so, in place of the build")
    arguments = parser.parse_args(argv)
    folder = ROOT / FOLDER
    try:
        # Anew: no wheel of an earlier kit may stay, and no library if there is no new one.
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "wheels").mkdir(parents=True)
        if arguments.library is None:
            build(arguments.arch, folder / library.NAME)
        else:
            shutil.copy(arguments.library, folder / library.NAME)
        library.check(folder / library.NAME, arguments.arch)
        fetch(folder / "wheels")
    except subprocess.CalledProcessError as error:
        print(f"make gpu-kit: exit status {error.returncode} of {shlex.join(map(str, error.cmd))}", file=sys.stderr)
        return 1
    except (library.Unfit, OSError) as error:
        print(f"make gpu-kit: {error}", file=sys.stderr)
        return 1
    sizes = {path: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    taken = sum(sizes.values())
    for path, size in sizes.items():
        print(f"{size / 2**20:6.1f} MiB  {path.relative_to(ROOT)}")
    print(f"{taken / 2**20:6.1f} MiB  in {folder}, for compute capability {arguments.arch}")
    if taken > LIMIT:
        print(f"make gpu-kit: the folder may take {LIMIT >> 20} MiB", file=sys.stderr)
        return 1
    made = rows.provenance(torch.device("cpu"))
    if made["dirty"]:
        print("the working tree has changes: the record will name no commit")
    commit = None if made["dirty"] else made["commit"]
    print("A second call with --resume RECORD does what the record lacks. Where OUT is set, records lie there.")
    print(f"Copy the checkout with {FOLDER}, which git ignores, and run in its root, in ten minutes a call:")
    print(f"    {command(FOLDER, commit)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
