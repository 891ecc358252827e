"""A compiled `_C.abi3.so` that somebody else has built: whether it serves here, and putting it where pyfused looks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pyfused import files
from pyfused.bench import ROOT
from pyfused.choice.backends import code_for

NAME = "_C.abi3.so"
# Apart from this process and from pyfused, which may hold another library with the same operators. torch is loaded
# first, as pyfused does: the library takes torch's functions from it.
_ASK = """
import importlib.machinery, importlib.util, json, sys
import torch
loader = importlib.machinery.ExtensionFileLoader("pyfused._C", sys.argv[1])
library = importlib.util.module_from_spec(importlib.util.spec_from_loader("pyfused._C", loader))
loader.exec_module(library)
names = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
own = [name.removeprefix("pyfused_cuda::") for name in names if name.startswith("pyfused_cuda::")]
print(json.dumps({"targets": json.loads(library.build_info())["targets"], "names": own + dir(library)}))
"""


class Unfit(ValueError):
    """A library that cannot serve here, and why."""


def check(path: Path, capability: str) -> None:
    """Loads the library in a process of its own.

    Args:
        path: the file.
        capability: of the GPU that it is for, such as "90".

    Raises:
        Unfit: it is not there, is of another ABI, does not load, is of another source or holds no machine code for
            that GPU.
    """
    if not path.is_file():
        raise Unfit(f"{path} is not there")
    if not path.name.endswith(".abi3.so"):
        raise Unfit(f"{path.name} is not of Python's stable ABI: its name does not end in .abi3.so")
    asked = subprocess.run([sys.executable, "-c", _ASK, str(path.resolve())], capture_output=True, text=True)
    if asked.returncode:
        said = asked.stderr.strip().splitlines() or [f"Python ended with status {asked.returncode}"]
        raise Unfit(f"{path} does not load: {said[-1]}")
    found = json.loads(asked.stdout.splitlines()[-1])
    missing = sorted(set(_names()) - set(found["names"]))
    if missing:
        raise Unfit(f"{path} is not of this source: it lacks {', '.join(missing)}")
    # PTX alone the driver would have to compile first, for minutes.
    code = code_for(divmod(int(capability), 10), found["targets"])
    if code is None or not code.startswith("sm_"):
        raise Unfit(f"{path} has no machine code for compute capability {capability}: {', '.join(found['targets'])}")


def _names() -> list[str]:
    """The operators and the functions of a library of this source."""
    operators = re.findall(r"PYFUSED_IMPL\((\w+)\);", (ROOT / "csrc" / "binding.cpp").read_text())
    return operators + re.findall(
        r"^ +\{\"(\w+)\", \w+, METH_", (ROOT / "csrc" / "module.cu").read_text(), re.MULTILINE
    )


def place(path: Path) -> None:
    """Copies the library to where pyfused looks, whole at every moment.

    Raises:
        OSError: it cannot be written.
    """
    target = ROOT / "pyfused" / NAME
    if target.exists() and path.samefile(target):
        return
    with files.replacing(target) as partial:
        shutil.copy(path, partial)
