"""Builds `pyfused._C`, the CUDA C++ kernels, where nvcc is and torch has CUDA, and `pyfused._cpu`, the C++ kernels for
CPUs, where a C++ compiler is; all else about the package stands in pyproject.toml, and in MANIFEST.in.

PYFUSED_CUDA=1 and PYFUSED_CPU=1 turn what is missing into an error, PYFUSED_CUDA=0 and PYFUSED_CPU=0 leave the kernels
out. A torch without CUDA is enough for PYFUSED_CUDA=1. PYFUSED_CUDA_ARCHS, by default "80;90;100;120", or "80;90" where
nvcc is older than 12.8, names the compute capabilities to compile for; the newest is added as PTX. MAX_JOBS is how many
compilers run at once. ninja keeps the objects in build/cuda and build/cpu, with what ptxas says of each kernel (*.log),
and compiles again what changed. `rm -rf build` starts anew.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import runpy
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
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError

MIN_NVCC = (12, 0)
# As pyproject.toml and pyfused/__init__.py have it.
MIN_TORCH = (2, 10)
# The first nvcc that knows the last two of them.
BLACKWELL_NVCC = (12, 8)
ARCHITECTURES, OLDER_ARCHITECTURES = "80;90;100;120", "80;90"
# Of a processor, the compilers' options by the name of each instruction set; a library has kernels for all, and takes
# those that the machine runs. Others have the compiler's default alone.
INSTRUCTION_SETS = {
    "x86_64": {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
    }
}


class Missing(Exception):
    """Something that the kernels need to be built."""


@dataclass(frozen=True)
class Toolchain:
    """What builds kernels here.

    Attributes:
        name: of the library, a module of pyfused's.
        kernels: what the library holds, in words.
        variable: that forces or forbids it.
        objects: the folder of its objects.
    """

    ninja: str
    cxx: str
    torch: Path
    torch_version: str

    # No fields: without an annotation they stay the class's own, also where setuptools executes this file as no module.
    name, kernels, variable, objects = "", "", "", Path()

    @classmethod
    def find(cls, asked: bool = True) -> Toolchain:
        """Raises `Missing`, which names the first thing that is not there.

        ``asked``: whether somebody asks for the kernels; where nobody does, torch must also be able to run them.
        """
        if sys.platform != "linux":
            raise Missing(f"sys.platform was {sys.platform}, not linux")
        torch = importlib.util.find_spec("torch")
        if torch is None:
            raise Missing("torch was not found (pip builds apart from it unless told --no-build-isolation)")
        folder, torch_version = Path(torch.origin).parent, importlib.metadata.version("torch")
        _at_least("torch", torch_version, MIN_TORCH)
        if not asked:
            cls.check_use(folder)
        own = cls.find_own()
        cxx = os.environ.get("CXX", "g++")
        if shutil.which(cxx) is None:
            raise Missing(f"the C++ compiler {cxx!r} was not found (CXX names another)")
        # Beside the Python that runs this, whose environment may not be on PATH.
        ninja = shutil.which("ninja", path=sysconfig.get_path("scripts")) or shutil.which("ninja")
        if ninja is None:
            raise Missing("ninja, which builds the kernels, was not found (pip install ninja)")
        return cls(ninja, cxx, folder, torch_version, *own)

    @classmethod
    def check_use(cls, torch: Path) -> None:
        """Raises `Missing` where the torch in this folder cannot run the kernels."""

    @classmethod
    def find_own(cls) -> tuple:
        """What this library needs beside a compiler and torch: the values of its own fields."""
        return ()

    @classmethod
    def absent(cls) -> str:
        """The file that says why the build made no library; pyfused/choice/backends.py reads it."""
        return f"{cls.name}.absent"

    @classmethod
    def sources(cls) -> list[str]:
        raise NotImplementedError

    def rules(self) -> dict[str, list[str]]:
        """ninja's rule -> its command, of ninja's variables and words for a shell."""
        raise NotImplementedError

    def steps(self, sources: list[str]) -> dict[str, tuple[str, str]]:
        """Object -> (the rule that makes it, its source)."""
        return {f"{Path(source).name}.o": (Path(source).suffix[1:], source) for source in sources}

    def build_info(self) -> str:
        raise NotImplementedError

    @property
    def options(self) -> list[str]:
        # Hidden: symbols of inline variables are else one for the whole process, another library's included.
        return ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall"]

    @property
    def outputs(self) -> list[str]:
        return ["-c", "$in", "-o", "$out.part", "-MMD", "-MF", "$out.d", "-MT", "$out"]

    @property
    def torch_side(self) -> list[str]:
        """The command for sources that include torch's headers."""
        return [
            self.cxx, *self.options, "-O2", f"-DTORCH_TARGET_VERSION=0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}{0:012x}",
            "-isystem", str(self.torch / "include"), "-I", str(self.objects), *self.outputs,
        ]  # fmt: skip

    @property
    def linked(self) -> list[str]:
        # libtorch brings libtorch_cuda along where there is one; no symbol of it is needed to link.
        return ["$in", "-L", str(self.torch / "lib"), "-ltorch", "-ltorch_cpu", "-o", "$out.part"]


@dataclass(frozen=True)
class Cuda(Toolchain):
    """Builds for GPUs of some architectures."""

    nvcc: str
    nvcc_version: str
    architectures: tuple[str, ...]

    name = "_C"
    kernels = "the CUDA C++ kernels"
    variable = "PYFUSED_CUDA"
    objects = Path("build", "cuda")

    @classmethod
    def check_use(cls, torch: Path) -> None:
        # Not imported, which takes seconds.
        said = runpy.run_path(str(torch / "version.py"))
        if said["cuda"] is None:
            version = said["__version__"]
            raise Missing(f"torch {version} had no CUDA to run them ({cls.variable}=1 builds them all the same)")

    @classmethod
    def find_own(cls) -> tuple:
        home = os.environ.get("CUDA_HOME")
        places = [f"{home}/bin"] if home else [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
        nvcc = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
        if nvcc is None:
            where = f"CUDA_HOME={home}" if home else "PATH and /usr/local/cuda/bin; CUDA_HOME is not set"
            raise Missing(f"nvcc was not found (looked in {where})")
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            raise Missing("Python.h was not found: Python's development files are not installed")
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        nvcc_version = re.search(r"V([\d.]+)", said).group(1)
        _at_least("nvcc", nvcc_version, MIN_NVCC)
        return nvcc, nvcc_version, _architectures(nvcc_version)

    @classmethod
    def sources(cls) -> list[str]:
        return sorted(str(path) for pattern in ("*.cu", "*.cpp") for path in Path("csrc").glob(pattern))

    @property
    def targets(self) -> list[str]:
        return [*(f"sm_{name}" for name in self.architectures), f"compute_{self.architectures[-1]}"]

    def rules(self) -> dict[str, list[str]]:
        cu = [self.nvcc, "-ccbin", self.cxx, self.options[0], "-O3", "-Xcompiler", ",".join(self.options[1:])]
        for name in self.architectures:
            cu += ["-gencode", f"arch=compute_{name},code=sm_{name}"]
        newest = self.architectures[-1]
        cu += ["-gencode", f"arch=compute_{newest},code=compute_{newest}", "-Xptxas", "-v"]
        cu += ["-I", sysconfig.get_path("include"), "-I", str(self.objects), *self.outputs]
        link = [
            self.nvcc, "-ccbin", self.cxx, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL",
            "-Xlinker", "--no-as-needed", *self.linked,
        ]  # fmt: skip
        return {"cpp": [*self.torch_side, "-DUSE_CUDA"], "cu": cu, "link": link}

    def build_info(self) -> str:
        return json.dumps({"nvcc": self.nvcc_version, "targets": self.targets, "torch": self.torch_version})


@dataclass(frozen=True)
class Cpu(Toolchain):
    """Builds for every instruction set of this machine's kind of processor."""

    name = "_cpu"
    kernels = "the C++ kernels for CPUs"
    variable = "PYFUSED_CPU"
    objects = Path("build", "cpu")

    @classmethod
    def sources(cls) -> list[str]:
        return [*sorted(str(path) for path in Path("csrc", "cpu").glob("*.cpp")), "csrc/activation.cpp"]

    @property
    def sets(self) -> dict[str, list[str]]:
        return {"baseline": [], **INSTRUCTION_SETS.get(platform.machine(), {})}

    def rules(self) -> dict[str, list[str]]:
        rules = {"cpp": self.torch_side, "link": [self.cxx, "-shared", "-Wl,--no-as-needed", *self.linked]}
        for name, options in self.sets.items():
            rules[name] = [
                self.cxx, "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-exceptions",
                *self.options, *options,
                f"-DPYFUSED_KERNELS=kernels_{name}", *self.outputs,
            ]  # fmt: skip
        return rules

    def steps(self, sources: list[str]) -> dict[str, tuple[str, str]]:
        steps = {}
        for made, (rule, source) in super().steps(sources).items():
            if source.endswith("_kernels.cpp"):
                steps |= {f"{Path(source).stem}.{name}.o": (name, source) for name in self.sets}
            else:
                steps[made] = rule, source
        return steps

    def build_info(self) -> str:
        said = subprocess.run([self.cxx, "--version"], capture_output=True, text=True, check=True).stdout
        return json.dumps({"compiler": said.splitlines()[0], "sets": list(self.sets), "torch": self.torch_version})


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
    toolchain.objects.mkdir(parents=True, exist_ok=True)
    plan, library = _write_plan(toolchain, sources)
    # ninja prints by itself: what was printed before must not come after.
    sys.stdout.flush()
    if subprocess.run([toolchain.ninja, "-f", str(plan), "-j", jobs, "-k", "0"]).returncode:
        raise CompileError(f"see above; {toolchain.variable}=0 installs pyfused without {toolchain.kernels}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(library, target)


def _write_plan(toolchain: Toolchain, sources: list[str]) -> tuple[Path, Path]:
    """What ninja reads, and the library that it makes."""
    # Every object depends on it: other versions of compilers and torch make something else of the same command.
    info = toolchain.objects / "build_info.h"
    text = f"#define PYFUSED_BUILD_INFO {json.dumps(toolchain.build_info())}\n"
    if not info.exists() or info.read_text() != text:
        info.write_text(text)
    plan, library = toolchain.objects / "build.ninja", toolchain.objects / f"{toolchain.name}.so"
    lines = [f"builddir = {toolchain.objects}"]
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
    steps = {toolchain.objects / made: step for made, step in toolchain.steps(sources).items()}
    for made, (rule, source) in steps.items():
        lines.append(f"build {made}: {rule} {source} | {info}")
    lines.append(f"build {library}: link {' '.join(map(str, steps))}")
    plan.write_text("\n".join(lines) + "\n")
    return plan, library


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        (kind,) = (kind for kind in TOOLCHAINS if ext.name == f"pyfused.{kind.name}")
        build(kind.find(), ext.sources, Path(self.get_ext_fullpath(ext.name)))
        print(f"pyfused.{kind.name}, {kind.kernels}, is built ({kind.variable}=0 leaves it out)", flush=True)


class BuildPackage(build_py):
    """Also leaves word of why there are no kernels."""

    def run(self) -> None:
        super().run()
        package = Path(self.get_package_dir("pyfused") if self.editable_mode else f"{self.build_lib}/pyfused")
        for kind, absence in ABSENCES.items():
            (package / kind.absent()).unlink(missing_ok=True)
            if absence is not None:
                print(f"pyfused.{kind.name}, {kind.kernels}, is left out: {absence}", flush=True)
                (package / kind.absent()).write_text(f"when it was built, {absence}\n")
                for old in package.glob(f"{kind.name}.*so"):
                    old.unlink()


class SourceArchive(sdist):
    """Holds the links inside the package as links."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        for link in filter(Path.is_symlink, Path("pyfused").iterdir()):
            Path(base_dir, link).symlink_to(link.readlink())


def _absence(kind: type[Toolchain]) -> str | None:
    """Why the kernels are not built; None when they are."""
    wanted = os.environ.get(kind.variable, "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"pyfused: {kind.variable} must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return f"{kind.variable} was 0"
    try:
        kind.find(asked=wanted == "1")
    except Missing as missing:
        if wanted == "1":
            raise SystemExit(f"pyfused: {kind.variable}=1, but {missing}") from None
        return str(missing)
    return None


TOOLCHAINS = (Cuda, Cpu)
ABSENCES = {kind: _absence(kind) for kind in TOOLCHAINS}
extensions = [
    Extension(f"pyfused.{kind.name}", kind.sources(), py_limited_api=True)
    for kind, absence in ABSENCES.items()
    if absence is None
]
setup(
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPackage, "sdist": SourceArchive},
    ext_modules=extensions,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
