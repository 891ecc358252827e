"""Builds `pyfused._C`, the CUDA C++ kernels, where nvcc is; all else about the package stands in pyproject.toml.

PYFUSED_CUDA=1 turns what is missing into an error, PYFUSED_CUDA=0 leaves the kernels out. PYFUSED_CUDA_ARCHS, by
default "80;90", names the compute capabilities to compile for; the newest is added as PTX. MAX_JOBS is how many
compilers run at once. Objects stay in build/cuda with what ptxas says of each kernel (*.log): only what changed is
compiled again.
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
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, LinkError

MIN_NVCC = (12, 0)
MIN_TORCH = (2, 10)
OBJECTS = Path("build", "cuda")
# What says why the build made no pyfused._C; pyfused/backend.py reads it.
ABSENT = "_C.absent"


class Missing(Exception):
    """Something that the kernels need to be built."""


@dataclass(frozen=True)
class Toolchain:
    """What builds the kernels here, and for which GPUs."""

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
        return cls(nvcc, nvcc_version, cxx, Path(torch.origin).parent, torch_version, _architectures())

    @property
    def targets(self) -> list[str]:
        return [*(f"sm_{name}" for name in self.architectures), f"compute_{self.architectures[-1]}"]

    def compile_command(self, source: str, target: Path) -> list[str]:
        outputs = ["-c", source, "-o", str(target), "-MMD", "-MF", f"{target}.d"]
        if source.endswith(".cpp"):
            return [
                self.cxx, "-std=c++17", "-O2", "-Wall", "-fPIC", "-fvisibility=hidden", "-DUSE_CUDA",
                "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(self.torch / "include"), *outputs,
            ]  # fmt: skip
        # Hidden: symbols of inline variables are else one for the whole process, another library's included.
        command = [self.nvcc, "-ccbin", self.cxx, "-std=c++17", "-O3", "-Xcompiler", "-Wall,-fPIC,-fvisibility=hidden"]
        for name in self.architectures:
            command += ["-gencode", f"arch=compute_{name},code=sm_{name}"]
        newest = self.architectures[-1]
        command += ["-gencode", f"arch=compute_{newest},code=compute_{newest}", "-Xptxas", "-v"]
        return [*command, "-I", sysconfig.get_path("include"), "-I", str(OBJECTS), *outputs]

    def link_command(self, objects: list[Path], target: Path) -> list[str]:
        # libtorch brings libtorch_cuda along where there is one; no symbol of it is needed to link.
        return [
            self.nvcc, "-ccbin", self.cxx, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL",
            "-Xlinker", "--no-as-needed", *map(str, objects), "-L", str(self.torch / "lib"), "-ltorch", "-ltorch_cpu",
            "-o", str(target),
        ]  # fmt: skip

    def build_info(self) -> str:
        return json.dumps({"nvcc": self.nvcc_version, "targets": self.targets, "torch": self.torch_version})


def _at_least(name: str, version: str, least: tuple[int, int]) -> None:
    if tuple(int(part) for part in version.split(".")[:2]) < least:
        raise Missing(f"{name} {version} is older than {least[0]}.{least[1]}")


def _architectures() -> tuple[str, ...]:
    given = os.environ.get("PYFUSED_CUDA_ARCHS", "80;90")
    names = given.split(";")
    if not all(re.fullmatch(r"[1-9]\d+", name) and int(name) >= 80 for name in names):
        raise SystemExit(f'pyfused: PYFUSED_CUDA_ARCHS must be capabilities from 80 on such as "80;90", got {given!r}')
    return tuple(sorted(names, key=int))


def build(toolchain: Toolchain, sources: list[str], target: Path) -> None:
    """Compile what changed, and link.

    Compilers write into a folder of this build alone: those that outlive a build that was killed spoil nothing.
    """
    OBJECTS.mkdir(parents=True, exist_ok=True)
    info, literal = OBJECTS / "build_info.h", json.dumps(toolchain.build_info())
    if not info.exists() or literal not in info.read_text():
        info.write_text(f"#define PYFUSED_BUILD_INFO {literal}\n")
    objects = [OBJECTS / f"{Path(source).name}.o" for source in sources]
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=OBJECTS) as folder:
        unfinished = Path(folder)
        with ThreadPoolExecutor(jobs) as pool:
            failures = list(filter(None, pool.map(partial(_compile, toolchain, unfinished), sources, objects)))
        if failures:
            raise CompileError("\n".join([*failures, "PYFUSED_CUDA=0 installs pyfused without the CUDA C++ kernels"]))
        linked = subprocess.run(
            toolchain.link_command(objects, unfinished / target.name), capture_output=True, text=True
        )  # fmt: skip
        if linked.returncode:
            raise LinkError(f"pyfused._C does not link\n{linked.stdout}{linked.stderr}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(unfinished / target.name, target)


def _compile(toolchain: Toolchain, unfinished: Path, source: str, target: Path) -> str | None:
    """What the compiler said when it failed."""
    identity = toolchain.build_info() + shlex.join(toolchain.compile_command(source, target))
    if _up_to_date(target, identity):
        return None
    identified = target.with_suffix(".command")
    identified.unlink(missing_ok=True)
    # One write: several threads print.
    print(f"compiling {source}\n", end="", flush=True)
    made = unfinished / target.name
    done = subprocess.run(toolchain.compile_command(source, made), capture_output=True, text=True)
    target.with_suffix(".log").write_text(done.stdout + done.stderr)
    said = "\n".join(line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("ptxas info"))
    if done.returncode:
        return f"{source} does not compile\n{said}"
    for path in (Path(f"{made}.d"), made):
        path.replace(OBJECTS / path.name)
    identified.write_text(identity)
    return None


def _up_to_date(target: Path, identity: str) -> bool:
    try:
        if target.with_suffix(".command").read_text() != identity:
            return False
        _, _, sources = Path(f"{target}.d").read_text().replace("\\\n", " ").partition(": ")
        return all(os.path.getmtime(source) <= os.path.getmtime(target) for source in shlex.split(sources))
    except OSError:
        return False


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
