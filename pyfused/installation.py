"""What runs here: versions, devices, libraries, backends, a user's measured rows; and what is wrong with them."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import pyfused
from pyfused.choice import backends, cache

# Distribution -> why somebody would want it.
_OPTIONAL = {
    "triton": "the triton backend",
    "peft": "models with its LoRA",
    "safetensors": "files of what was tuned",
    "open_clip_torch": "the models of the benchmarks",
    "timm": "models",
    "transformers": "models",
    "rich": "pyfused bench, report and tune",
    "scipy": "make bench-compare",
    "shtab": "pyfused completion",
    "tqdm": "bars on a terminal",
}
# What changes how pyfused runs.
_VARIABLES = re.compile("PYFUSED_.*|TRITON_.*|CUDA_VISIBLE_DEVICES")


def facts() -> dict[str, Any]:
    """What is installed and what it runs on, in values that JSON has; `told` puts it in words."""
    found: dict[str, Any] = {
        "pyfused": {"version": pyfused.__version__, "path": str(Path(pyfused.__file__).parent)},
        "python": {"version": platform.python_version(), "platform": platform.platform()},
        "torch": _package("torch") | {"version": torch.__version__, "threads": torch.get_num_threads()},
    }
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    found["devices"] = {f"cuda:{index}": _gpu(index) for index in gpus}
    found["libraries"] = {}
    if "pyfused._C" in sys.modules:
        library = sys.modules["pyfused._C"]
        built = json.loads(library.build_info())
        runs = {f"cuda:{index}": _how_kernels_run(torch.device("cuda", index), built["targets"]) for index in gpus}
        found["libraries"]["pyfused._C"] = built | {"kernels": len(library.kernel_names()), "runs": runs}
    if backends.CPU_REFUSAL is None:
        own = {"instruction_set": backends.cpu_instruction_set()}
        found["libraries"]["pyfused._cpu"] = backends.cpu_build_info() | own
    found["packages"] = {distribution: _package(distribution) for distribution in _OPTIONAL}
    found["backends"] = pyfused.available_backends()
    return found


def told(found: Mapping[str, Any]) -> list[str]:
    """`facts` in lines for a reader."""
    own, python, devices = found["pyfused"], found["python"], found["devices"]
    lines = {
        "pyfused": f"{own['version']} ({own['path']})",
        "python": f"{python['version']} on {python['platform']}",
        "torch": f"{_version_told(found['torch'])}, {found['torch']['threads']} CPU threads",
    }
    if not devices:
        lines["device"] = "cpu: torch sees no CUDA device"
    for name, gpu in devices.items():
        lines[name] = f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB"
    for name, library in found["libraries"].items():
        if name == "pyfused._C":
            what = f"{library['kernels']} kernels by nvcc {library['nvcc']} for {', '.join(library['targets'])}"
        else:
            what = f"{library['instruction_set']} of {', '.join(library['sets'])}, by {library['compiler']}"
        lines[name] = f"{what}, beside torch {library['torch']}"
        lines |= {f"  {device}": how for device, how in library.get("runs", {}).items()}
    for distribution, package in found["packages"].items():
        missing = f"not installed ({_OPTIONAL[distribution]})"
        lines[distribution.removesuffix("_torch")] = _version_told(package) if package["version"] else missing
    return [
        *(f"{name:14s}{value}" for name, value in lines.items()),
        "\nbackends",
        *(
            f"  {name:10s}{'available' if reason is None else f'not available: {reason}'}"
            for name, reason in found["backends"].items()
        ),
    ]


def _version_told(package: Mapping[str, str | None]) -> str:
    least = f" ({package['minimum']} or later)" if package["minimum"] else ""
    return f"{package['version']}{least}"


def _package(distribution: str) -> dict[str, str | None]:
    """Its version, and the least that pyfused supports; None where it is not installed, where nothing says."""
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        version = None
    try:
        wanted = metadata.requires("pyfused") or []
    except metadata.PackageNotFoundError:
        # A checkout that is not installed.
        wanted = []
    found = (re.match(rf"{re.escape(distribution)}\s*>=\s*([\d.]+)", each) for each in wanted)
    return {"version": version, "minimum": next((match[1] for match in found if match), None)}


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    capability = f"{properties.major}.{properties.minor}"
    return {"name": properties.name, "capability": capability, "memory_bytes": properties.total_memory}


def _how_kernels_run(device: torch.device, targets: Sequence[str]) -> str:
    """Which of the library's ``targets`` a GPU runs, or why none."""
    reason = backends.refusal("cuda", device, torch.float16)
    if reason is not None:
        return f"does not run: {reason}"
    code = backends.code_for(torch.cuda.get_device_capability(device), targets)
    if code is not None and code.startswith("sm_"):
        return f"runs {code}"
    # docs/measured.md has what ptxas takes for each module.
    return (
        f"runs what its driver compiles from {code}: the first forward and the first backward of an operator wait for "
        "it, up to about a minute each, once for each user"
    )


# ---- what is wrong


def examined() -> dict[str, Any]:
    """`facts`, the environment, the user's measured rows, a check of every operator at small sizes, and what is wrong;
    `diagnosis` puts it in words."""
    from pyfused.bench.run import small_check

    found = facts()
    found["environment"] = {name: os.environ[name] for name in sorted(os.environ) if _VARIABLES.fullmatch(name)}
    found["measured_rows"] = _measured_rows()
    found["check"] = small_check.rows()
    found["problems"] = list(_problems(found))
    return found


def diagnosis(found: Mapping[str, Any]) -> list[str]:
    """`examined` in lines for a reader."""
    variables = [f"{name}={value}" for name, value in found["environment"].items()]
    kept, count = found["measured_rows"], len(found["problems"])
    lines = [*told(found), "\nenvironment", *(f"  {each}" for each in variables or ["none of its variables is set"])]
    rows = f"{kept['read']} of {kept['rows']} rows in {kept['path']} are read by what is installed here"
    lines += ["\nmeasured by pyfused.tune", f"  {rows}" if kept["rows"] else f"  no rows in {kept['path']}", "\ncheck"]
    verdicts: dict[tuple[str, str], list[bool]] = {}
    for row in found["check"]:
        verdicts.setdefault((row["operator"], row["backend"]), []).append(row["passed"])
    for (operator, backend), passed in verdicts.items():
        lines.append(f"  {operator:26s}{backend:10s}{sum(passed)} of {len(passed)} as close to float64 as plain torch")
    lines += ["", *(f"problem: {problem}" for problem in found["problems"])]
    return [*lines, "verdict: nothing is wrong" if count == 0 else f"verdict: {count} problem{'s' * (count > 1)}"]


def without_home(found: Any) -> Any:
    """``found``, values that JSON has, with ~ in place of the user's home directory: its name is nobody's business."""
    if isinstance(found, dict):
        return {name: without_home(value) for name, value in found.items()}
    if isinstance(found, list):
        return [without_home(value) for value in found]
    try:
        home = str(Path.home())
    except RuntimeError:
        return found
    if not isinstance(found, str) or home == os.sep:
        return found
    return re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", found)


def _measured_rows() -> dict[str, Any]:
    """The user's file: its rows and those that are read here; why it cannot be read or written, else None."""
    place = cache.path()
    found: dict[str, Any] = {"path": None, "rows": 0, "read": 0, "unreadable": None, "unwritable": None}
    if place is None:
        return found | {"unwritable": "there is no home directory, and PYFUSED_CACHE is not set"}
    found["path"] = str(place)
    try:
        for section in cache.read(place):
            found["rows"] += len(section.rows)
            found["read"] += len(section.rows) if section.key == cache.key() else 0
    except (OSError, ValueError) as error:
        found["unreadable"] = str(error)
    try:
        # Of what is there: a question leaves no new folder.
        with tempfile.TemporaryFile(dir=next(folder for folder in place.parents if folder.exists())):
            pass
    except OSError as error:
        found["unwritable"] = error.strerror or str(error)
    return found


def _problems(found: Mapping[str, Any]) -> Iterator[str]:
    for name, package in ({"torch": found["torch"]} | found["packages"]).items():
        if package["version"] and package["minimum"] and _numbers(package["version"]) < _numbers(package["minimum"]):
            yield f"{name} {package['version']} is older than {package['minimum']}"
    folder = Path(pyfused.__file__).parent
    for library, refusal in (("_C", backends.CUDA_REFUSAL), ("_cpu", backends.CPU_REFUSAL)):
        # One that was not built is no fault.
        if refusal is not None and any(folder.glob(f"{library}.*so")):
            yield refusal
    for name in found["devices"]:
        reasons = {each: backends.refusal(each, torch.device(name), torch.float16) for each in ("cuda", "triton")}
        if None not in reasons.values():
            yield f"no kernels run on {name}: " + "; ".join(f"{each}: {why}" for each, why in reasons.items())
    kept = found["measured_rows"]
    if kept["unreadable"] is not None:
        yield f"what pyfused.tune measured cannot be read: {kept['unreadable']}"
    if kept["unwritable"] is not None:
        where = f" {kept['path']}" if kept["path"] else ""
        yield f"what pyfused.tune measures cannot be kept{where}: {kept['unwritable']}"
    for row in found["check"]:
        if not row["passed"]:
            further = "{tensor} ({norm}): error {error:.2e}, limit {limit:.2e}"
            why = row.get("raised") or further.format_map(row)
            yield f"{row['case']}, {row['backend']} {row['plan']} on {row['device']}: {why}"


def _numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13)."""
    numbers = re.split(r"[^\d.]", version)[0]
    return tuple(int(part) for part in re.findall(r"\d+", re.sub(r"(\.0+)+$", "", numbers)))
