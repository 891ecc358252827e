"""PEFT's own tests of LoRA, plain and with `fuse` after every injection: the same ones must fail, and calls be fused.

python tests/integrations/peft_suite.py            # `make peft-tests`
python tests/integrations/peft_suite.py --fetch    # only what it needs: the source of the PEFT that is installed
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Those of PEFT's tests that are about LoRA and run without network and without more packages.
FILES = (
    "test_custom_models", "test_initialization", "test_lora_ga", "test_lora_variants", "test_low_level_api",
    "test_loraplus", "test_lorafa", "test_mapping", "test_bdlora", "test_riemannian_lora",
)  # fmt: skip
LEAST_CALLS = 800


def source() -> Path:
    """Where the tests of the installed PEFT lie, or would lie."""
    return ROOT / ".peft" / importlib.metadata.version("peft")


def fetch() -> None:
    """Get PEFT's tests out of its source distribution, once, by pip."""
    target = source()
    if target.exists():
        return
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        # Without isolation: pip asks a source distribution for its name, and needs no more for it than setuptools.
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary",
            ":all:", "--dest", scratch, f"peft=={target.name}",
        ]  # fmt: skip
        subprocess.run(command, check=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        (tests,) = Path(scratch).glob("*/tests")
        # A package, by which they import one another; the archive leaves the empty file out.
        (tests / "__init__.py").touch()
        (Path(scratch) / "kept").mkdir()
        tests.rename(Path(scratch) / "kept" / "tests")
        (Path(scratch) / "kept").rename(target)


def run(fused: bool, files: tuple[str, ...], every: int = 1, workers: int = 2) -> dict:
    """The record of `peft_plugin.py`: outcomes by test, and how many calls were fused."""
    with tempfile.TemporaryDirectory() as scratch:
        record = Path(scratch) / "record.json"
        command = [
            sys.executable, "-m", "pytest", "-p", "peft_plugin", "-p", "no:cacheprovider", "-c", os.devnull, "-q",
            "--rootdir", str(source()), "--tb", "no", "--disable-warnings", "--no-header", "-n", str(workers),
            "--every", str(every), "--timeout", "300", "--record", str(record), *(["--fuse"] if fused else []),
            *(str(source() / "tests" / f"{name}.py") for name in files),
        ]  # fmt: skip
        path = os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, env=environment, cwd=scratch, stdout=subprocess.PIPE, text=True)
        if not record.exists():
            raise RuntimeError(f"PEFT's tests did not run:\n{ended.stdout}")
        return json.loads(record.read_text())


def compare(plain: dict, fused: dict) -> list[str]:
    """Tests whose outcome differs, in words."""
    before, after = plain["outcomes"], fused["outcomes"]
    return [
        f"{test}: {before.get(test, 'not run')} without fuse, {after.get(test, 'not run')} with it"
        for test in sorted(before.keys() | after.keys())
        if before.get(test) != after.get(test)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fetch", action="store_true", help="get the tests and run none")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    arguments = parser.parse_args()
    fetch()
    if arguments.fetch:
        return 0
    plain, fused = (run(way, FILES, workers=arguments.workers) for way in (False, True))
    for name, record in (("plain", plain), ("fused", fused)):
        outcomes = Counter(record["outcomes"].values())
        print(f"{name}: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    for why, times in Counter(fused["left"]).most_common():
        print(f"left to PEFT, {times} calls: {why}")
    different = compare(plain, fused)
    print("\n".join(different))
    failures = [sum(outcome == "failed" for outcome in record["outcomes"].values()) for record in (plain, fused)]
    same = "the same" if not different else f"{len(different)} differ"
    print(f"failures without fusing: {failures[0]}, with fusing: {failures[1]}; outcomes of tests: {same}")
    print(f"fused calls: {fused['fused']} (at least {LEAST_CALLS})")
    return int(bool(different) or fused["fused"] < LEAST_CALLS)


if __name__ == "__main__":
    sys.exit(main())
