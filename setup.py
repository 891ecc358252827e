"""Builds `pyfused._C`, the CUDA C++ kernels, where nvcc is; all else about the package stands in pyproject.toml.

PYFUSED_CUDA=1 turns what is missing into an error, PYFUSED_CUDA=0 leaves the kernels out. PYFUSED_CUDA_ARCHS, by
default "80;90;100;120", or "80;90" where nvcc is older than 12.8, names the compute capabilities to compile for; the
newest is added as PTX. MAX_JOBS is how many compilers run at once. ninja keeps the objects in build/cuda, with what
ptxas says of each kernel (*.log), and compiles again what changed. `rm -rf build` starts anew.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

MIN_NVCC = (12, 0)
MIN_TORCH = (2, 10)
# The first nvcc that knows the last two of them.
BLACKWELL_NVCC = (12, 8)
ARCHITECTURES, OLDER_ARCHITECTURES = "80;90;100;120", "80;90"
OBJECTS = Path("build", "cuda")
# What says why the build made no pyfused._C; pyfused/choice/backends.py reads it.
ABSENT = "_C.absent"


class Missing(Exception):
    """Something that the kernels need to be built."""


@dataclass(frozen=True)
class Toolchain:
    """What builds the kernels here, and for which GPUs."""

    ninja: str
    nvcc: str
    nvcc_version: str
    cxx: str
    torch: Path
    torch_version: str
    architectures: tuple[str, ...]

    @classmethod
    def find(cls) -> Toolchain:
        """Raises `Missing`, which names the first thing that is not there."""
        if sys.platform != "linux":
            raise Missing(f"the kernels are built on Linux, this is {sys.platform}")
        home = os.environ.get("CUDA_HOME")
        places = [f"{home}/bin"] if home else [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
        nvcc = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
        if nvcc is None:
            where = f"CUDA_HOME={home}" if home else "PATH and /usr/local/cuda/bin; CUDA_HOME is not set"
            raise Missing(f"nvcc was not found (looked in {where})")
        cxx = os.environ.get("CXX", "g++")
        if shutil.which(cxx) is None:
            raise Missing(f"the C++ compiler {cxx!r} was not found (CXX names another)")
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            raise Missing("Python.h was not found: Python's development files are not installed")
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        nvcc_version = re.search(r"V([\d.]+)", said).group(1)
        _at_least("nvcc", nvcc_version, MIN_NVCC)
        torch = importlib.util.find_spec("torch")
        if torch is None:
            raise Missing("torch is not installed where the package is built (pip builds apart from it unless told "
                          "--no-build-isolation)")  # fmt: skip
        torch_version = importlib.metadata.version("torch")
        _at_least("torch", torch_version, MIN_TORCH)
        # Beside the Python that runs this, whose environment may not be on PATH.
        ninja = shutil.which("ninja", path=sysconfig.get_path("scripts")) or shutil.which("ninja")
        if ninja is None:
            raise Missing("ninja, which builds the kernels, was not found (pip install ninja)")
        return cls(
            ninja, nvcc, nvcc_version, cxx, Path(torch.origin).parent, torch_version, _architectures(nvcc_version)
        )

    @property
    def targets(self) -> list[str]:
        return [*(f"sm_{name}" for name in self.architectures), f"compute_{self.architectures[-1]}"]

    def rules(self) -> dict[str, list[str]]:
        """ninja's rule -> its command, of ninja's variables and words for a shell."""
        # Hidden: symbols of inline variables are else one for the whole process, another library's included.
        options = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall"]
        outputs = ["-c", "$in", "-o", "$out.part", "-MMD", "-MF", "$out.d", "-MT", "$out"]
        cpp = [
            self.cxx, *options, "-O2", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000",
            "-isystem", str(self.torch / "include"), *outputs,
        ]  # fmt: skip
        cu = [self.nvcc, "-ccbin", self.cxx, options[0], "-O3", "-Xcompiler", ",".join(options[1:])]
        for name in self.architectures:
            cu += ["-gencode", f"arch=compute_{name},code=sm_{name}"]
        newest = self.architectures[-1]
        cu += ["-gencode", f"arch=compute_{newest},code=compute_{newest}", "-Xptxas", "-v"]
        cu += ["-I", sysconfig.get_path("include"), "-I", str(OBJECTS), *outputs]
        # libtorch brings libtorch_cuda along where there is one; no symbol of it is needed to link.
        link = [
            self.nvcc, "-ccbin", self.cxx, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL",
            "-Xlinker", "--no-as-needed", "$in", "-L", str(self.torch / "lib"), "-ltorch", "-ltorch_cpu", "-o",
            "$out.part",
        ]  # fmt: skip
        return {"cpp": cpp, "cu": cu, "link": link}

    def build_info(self) -> str:
        return json.dumps({"nvcc": self.nvcc_version, "targets": self.targets, "torch": self.torch_version})


def _older(version: str, least: tuple[int, int]) -> bool:
    return tuple(int(part) for part in version.split(".")[:2]) < least


def _at_least(name: str, version: str, least: tuple[int, int]) -> None:
    if _older(version, least):
        raise Missing(f"{name} {version} is older than {least[0]}.{least[1]}")


def _architectures(nvcc_version: str) -> tuple[str, ...]:
    default = OLDER_ARCHITECTURES if _older(nvcc_version, BLACKWELL_NVCC) else ARCHITECTURES
    given = os.environ.get("PYFUSED_CUDA_ARCHS", default)
    names = given.split(";")
    if not all(re.fullmatch(r"[1-9]\d+", name) and int(name) >= 80 for name in names):
        raise SystemExit(f'pyfused: PYFUSED_CUDA_ARCHS must be capabilities from 80 on such as "80;90", got {given!r}')
    return tuple(sorted(names, key=int))


def build(toolchain: Toolchain, sources: list[str], target: Path) -> None:
    """Compile what changed, and link."""
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    if not re.fullmatch(r"[1-9]\d*", jobs):
        raise SystemExit(f"pyfused: MAX_JOBS must be a number from 1 on, got {jobs!r}")
    OBJECTS.mkdir(parents=True, exist_ok=True)
    plan, library = _write_plan(toolchain, sources)
    # ninja prints by itself: what was printed before must not come after.
    sys.stdout.flush()
    if subprocess.run([toolchain.ninja, "-f", str(plan), "-j", jobs, "-k", "0"]).returncode:
        raise CompileError("see above; PYFUSED_CUDA=0 installs pyfused without the CUDA C++ kernels")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(library, target)


def _write_plan(toolchain: Toolchain, sources: list[str]) -> tuple[Path, Path]:
    """What ninja reads, and the library that it makes."""
    # Every object depends on it: other versions of nvcc and torch make something else of the same command.
    info = OBJECTS / "build_info.h"
    text = f"#define PYFUSED_BUILD_INFO {json.dumps(toolchain.build_info())}\n"
    if not info.exists() or info.read_text() != text:
        info.write_text(text)
    plan, library = OBJECTS / "build.ninja", OBJECTS / "_C.so"
    lines = [f"builddir = {OBJECTS}"]
    for name, command in toolchain.rules().items():
        words = " ".join(word if word[0] == "$" else shlex.quote(word).replace("$", "$$") for word in command)
        # Only a whole file gets its name: ninja would take half a library for a whole one where its log knows the
        # library from an earlier build. What ptxas says of every kernel, wrong or not, stays in the log.
        done = "mv $out.part $out; code=$$?; grep -Ev '^ptxas info|bytes stack frame' $out.log; exit $$code"
        lines += [f"rule {name}", f"  command = {words} > $out.log 2>&1 && {done}"]
        if name == "link":
            lines.append("  description = linking $out")
        else:
            lines += ["  description = compiling $in", "  depfile = $out.d", "  deps = gcc"]
    objects = {source: str(OBJECTS / f"{Path(source).name}.o") for source in sources}
    for source, target in objects.items():
        lines.append(f"build {target}: {Path(source).suffix[1:]} {source} | {info}")
    lines.append(f"build {library}: link {' '.join(objects.values())}")
    plan.write_text("\n".join(lines) + "\n")
    return plan, library


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        build(Toolchain.find(), ext.sources, Path(self.get_ext_fullpath(ext.name)))


class BuildPackage(build_py):
    """Also leaves word of why there are no kernels."""

    def run(self) -> None:
        super().run()
        package = Path(self.get_package_dir("pyfused") if self.editable_mode else f"{self.build_lib}/pyfused")
        (package / ABSENT).unlink(missing_ok=True)
        if ABSENCE is not None:
            print(f"pyfused._C, the CUDA C++ kernels, is not built: {ABSENCE}", flush=True)
            (package / ABSENT).write_text(ABSENCE + "\n")
            for old in package.glob("_C.*so"):
                old.unlink()


def _absence() -> str | None:
    """Why the kernels are not built; None when they are."""
    wanted = os.environ.get("PYFUSED_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"pyfused: PYFUSED_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return "it was installed with PYFUSED_CUDA=0"
    try:
        Toolchain.find()
    except Missing as missing:
        if wanted == "1":
            raise SystemExit(f"pyfused: PYFUSED_CUDA=1, but {missing}") from None
        return f"when it was installed, {missing}"
    return None


ABSENCE = _absence()
if ABSENCE is None:
    sources = sorted(str(path) for pattern in ("*.cu", "*.cpp") for path in Path("csrc").glob(pattern))
    kernels = {
        "ext_modules": [Extension("pyfused._C", sources, py_limited_api=True)],
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }
else:
    kernels = {}
setup(cmdclass={"build_ext": BuildKernels, "build_py": BuildPackage}, **kernels)
