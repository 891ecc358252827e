"""The count of a tensor's way through the package (`tests/house/walk.py`), on ways that are known."""

from __future__ import annotations

import subprocess
import sys

import pytest
import walk

pytestmark = pytest.mark.host


def function(file: str, code: str, **names: object):
    """``f`` of a module that seems to lie in ``file``."""
    exec(compile(code, file, "exec"), names)
    return names["f"]


def test_a_move_is_a_call_in_another_room_than_the_call_before():
    inner = function("b", "def f(): pass")
    middle = function("a", "def f(): g(); g()", g=function("a", "def f(): pass"))
    outer = function("a", "def f(): g(); h(); g(); h()", g=inner, h=middle)
    found = walk.watched(outer, lambda file: file if file in ("a", "b") else None)
    assert found.stays == [("a", ["f"]), ("b", ["f"]), ("a", ["f"] * 3), ("b", ["f"]), ("a", ["f"] * 3)]
    assert (len(found.calls), found.moves, found.rooms) == (9, 5, ["a", "b"])


def test_nothing_below_a_launch_counts():
    back = function("a", "def f(): pass")
    launch = function("triton/jit", "def f(): g()", g=function("triton/run", "def f(): g()", g=back))
    outer = function("a", "def f(): g(); h()", g=launch, h=function("b", "def f(): pass"))
    found = walk.watched(outer, lambda file: file, "triton")
    assert found.calls == (("a", "f"), ("b", "f"))


@pytest.mark.parametrize("backend", walk.BACKENDS)
def test_lora_linear_goes_from_its_module_to_its_backend(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    found = walk.walks("lora_linear", backend)
    for way, suffix in (("forward", "_fwd"), ("backward", "_bwd")):
        # In Triton a program does what its implementation did the first time.
        programs = ("kernels/program.py", "__call__")
        last = programs if backend == "triton" else ("portable/lora_linear.py", f"lora_linear{suffix}")
        assert last in found[way].calls
        # Neither device functions nor what interprets them.
        assert not any(name.endswith("_kernel") for _, name in found[way].calls)
    assert any(name == "forward" and "linear" in room for room, name in found["forward"].calls)
    if backend == "triton":
        # A detour that comes back is seen here.
        assert found["forward"].moves <= 10
        assert found["backward"].moves <= 8


def test_the_table_has_a_line_for_each_direction():
    command = [sys.executable, walk.__file__, "projection_residual", "portable"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    assert printed.startswith("| | Python calls | moves | rooms |\n")
    for way in ("forward", "backward"):
        assert f"| {way}, portable | " in printed
        assert f"projection_residual, {way}, portable\n   1 " in printed
