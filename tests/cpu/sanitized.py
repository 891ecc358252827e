"""The C++ kernels for CPUs under sanitizers: `make sanitize`.

AddressSanitizer and UndefinedBehaviorSanitizer watch the small set of tests, ThreadSanitizer calls on two threads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cpu import library
from tree import ROOT

# Three lines of a report say where; -O1 keeps them true.
COMMON = ("-g", "-O1", "-fno-omit-frame-pointer")
# Torch's threads are not instrumented: what they wait for would be unknown to it.
THREADS = (*COMMON, "-fsanitize=thread", "-DPYFUSED_OWN_THREADS")
MEMORY = (*COMMON, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
SMALL = (
    "tests/ops/adapter_residual", "tests/ops/lora_linear/test_lora_linear_cpu.py", "-k",
    "cpu and (several_tiles or smallest_shapes) or every_instruction_set or same_bits or dropped_sample_holds and cpu",
)  # fmt: skip


def preloaded(name: str) -> str:
    said = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return said.stdout.strip()


def run(folder: Path, runtime: str, *command: str, **variables: str) -> int:
    library.installed(folder)
    environment = os.environ | variables | {
        "LD_PRELOAD": preloaded(runtime),
        # Python starts with what is there: the checkout must not come first.
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT / 'tests'}",
        "PYTHONSAFEPATH": "1",
    }  # fmt: skip
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment).returncode


def main() -> int:
    build = ROOT / "build" / "sanitized"
    memory, threads = build / "memory", build / "threads"
    library.build(memory, more=MEMORY)
    library.build(threads, more=THREADS)
    # Python and torch end without giving back what they hold.
    failed = run(
        memory, "libasan.so", "-m", "pytest", "-q", "-p", "no:cacheprovider", *SMALL,
        ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="print_stacktrace=1",
    )  # fmt: skip
    failed |= run(threads, "libtsan.so", "-m", "cpu.two_threads", TSAN_OPTIONS="halt_on_error=1:exitcode=66")
    return failed


if __name__ == "__main__":
    sys.exit(main())
