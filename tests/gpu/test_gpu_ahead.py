"""Compiling ahead: the same specialisations as Triton's own, found in its cache by the launch that follows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from pyfused.bench.gpu.programs import ahead
from pyfused.kernels.recording import SHARED_MEMORY, Target

H200 = Target((9, 0), 132, SHARED_MEMORY[9, 0], "NVIDIA H200")
# Triton's own JIT, which asks a driver for no more than this where nothing is launched.
_JIT = """
import json, sys, torch, triton
from triton.backends.compiler import GPUTarget
from pyfused.bench.gpu.programs import ahead, truth_cases
from pyfused.kernels.launch import Mat
from pyfused.kernels.recording import SHARED_MEMORY, Target, record

H200 = Target((9, 0), 132, SHARED_MEMORY[9, 0], "NVIDIA H200")

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

def launched(calls):
    for call in calls:
        with record(H200) as launches:
            call.launches()()
        yield from launches

def jit(launch, **settings):
    def real(value):
        # What the caching allocator gives is aligned; a view of it begins where it begins.
        if isinstance(value, Mat):
            return value._replace(ptr=real(value.ptr))
        if not isinstance(value, torch.Tensor):
            return value
        memory = torch.empty(value.data_ptr() + 64, dtype=torch.uint8)
        offset = (-memory.data_ptr()) % 16 + value.data_ptr()
        return memory[offset:offset + 16].view(value.dtype)
    arguments = {name: real(value) for name, value in launch.arguments.items()}
    settings = dict(num_warps=launch.num_warps, num_stages=launch.num_stages, maxnreg=launch.maxnreg) | settings
    return launch.kernel.run(grid=launch.grid, warmup=True, **arguments, **settings)
"""
_KEYS = """
seen, hits = set(), []
def hook(*, key, fn, **_):
    seen.add((fn.name, str(key)))
    return True
triton.runtime.driver.set_active(Driver())
triton.knobs.runtime.jit_cache_hook = hook
calls = [call for call in truth_cases.calls() if call.backend == "triton"]
found = ahead.specialisations([call.launches() for call in calls], H200)
for launch in launched(calls):
    jit(launch)
print(json.dumps([len(found), len(seen), len(list(launched(calls)))]))
"""
_COMPILE = """
def misaligned():
    # A view that begins at no multiple of 16 bytes.
    from pyfused.kernels import lora_linear, sums
    parts = torch.empty(129, device="meta")[1:].view(2, 64)
    sums.sum_partials(parts, torch.empty(64, device="meta"), 1.0)

if __name__ == "__main__":
    # The adapter's registers are bounded, which the cache must tell apart too.
    names = "projection_residual triton auto bfloat16 rows", "adapter_residual triton save bfloat16 rows forward"
    calls = [call.launches() for call in truth_cases.calls() if call.name.startswith(names)]
    found = ahead.specialisations([*calls, misaligned], H200)
    done = ahead.compile_ahead(found, H200, 2, 300.0)
    triton.runtime.driver.set_active(Driver())
    with ahead.compilations() as late:
        for launch in found.values():
            jit(launch)
    with ahead.compilations() as other:
        jit(launch, num_warps=2 * launch.num_warps)
    print(json.dumps([len(found), done.compiled, done.failed, done.unfinished, late, other]))
"""


def _python(program: str, cache: Path, *arguments: str) -> list:
    """What a program prints last, in a process where kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    file = cache / "program.py"
    file.write_text(program)
    done = subprocess.run(
        [sys.executable, str(file), *arguments], capture_output=True, text=True, timeout=600,
        env=environment | {"TRITON_CACHE_DIR": str(cache / "triton")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_specialisations_are_those_that_triton_tells_apart(tmp_path):
    found, of_triton, launches = _python(_JIT + _KEYS, tmp_path)
    assert found == of_triton
    assert found < launches, "no two launches share a compilation: nothing is shown"


def test_a_launch_finds_what_was_compiled_ahead(tmp_path):
    count, compiled, failed, unfinished, late, other = _python(_JIT + _COMPILE, tmp_path)
    assert count == 6
    assert (compiled, failed, unfinished) == (count, [], 0)
    assert late == [], "a launch compiled again what was compiled ahead"
    assert other == ["_sum_partials_kernel"], "a compilation that nothing was made ahead for did not show"


_FAULTS = """
import dataclasses, json, multiprocessing, os, sys
from pathlib import Path
import torch
from pyfused.bench.gpu.programs import ahead
from pyfused.kernels import lora_linear, sums
from pyfused.kernels.recording import SHARED_MEMORY, Target

H200 = Target((9, 0), 132, SHARED_MEMORY[9, 0], "NVIDIA H200")
# Its kernel, as a compiler that dies has it.
DEADLY = '''
import multiprocessing, os
import triton
@triton.jit
def _deadly_kernel(x_ptr):
    pass
if multiprocessing.parent_process() is not None:
    os._exit(3)
'''

if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(DEADLY)
    deadly = ahead.loaded("pyfused_deadly", str(file))
    def good():
        sums.sum_partials(torch.empty((2, 64), device="meta"), torch.empty(64, device="meta"), 1.0)
    ((key, launch),) = ahead.specialisations([good], H200).items()
    # No power of two.
    broken = dataclasses.replace(launch, arguments=launch.arguments | {"BLOCK": 100})
    pointer = {"x_ptr": torch.empty(1, device="meta")}
    dying = dataclasses.replace(launch, kernel=deadly._deadly_kernel, arguments=pointer)
    launches = {("dying",): dying, ("broken",): broken, key: launch}
    done = ahead.compile_ahead(launches, H200, 1, 300.0)
    late = ahead.compile_ahead(launches, H200, 2, 0.0)
    print(json.dumps([done.compiled, done.failed, done.unfinished, late.compiled, late.failed, late.unfinished]))
"""


def test_what_fails_to_compile_is_told_and_stops_nothing(tmp_path):
    compiled, failed, unfinished, *late = _python(_FAULTS, tmp_path, str(tmp_path / "pyfused_deadly.py"))
    assert compiled == 1
    assert unfinished == 0
    (dying, exit_status), (broken, reason) = failed
    assert dying.startswith("_deadly_kernel")
    assert "exit status 3" in exit_status
    assert "BLOCK=100" in broken
    assert "power of 2" in reason
    assert late == [0, [], 3], "time was out before anything began"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="about Triton's interpreter")
def test_interpreted_kernels_have_no_specialisations():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        ahead.specialisations([], H200)


def test_a_module_that_fails_is_not_left_behind(tmp_path):
    file = tmp_path / "pyfused_half_a_module.py"
    file.write_text("raise ValueError('half')")
    with pytest.raises(ValueError, match="half"):
        ahead.loaded("pyfused_half_a_module", str(file))
    assert "pyfused_half_a_module" not in sys.modules


def test_the_summary_names_what_failed():
    told = str(ahead.Ahead(2, [("_kernel", "no reason")], 3, 1.25))
    assert told == "2 kernels compiled ahead in 1.2 s, 3 not reached, _kernel does not compile: no reason"
