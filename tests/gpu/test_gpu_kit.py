"""A compiled library from elsewhere, and the folder that goes to a machine with a GPU."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tree import ROOT

import pyfused
from pyfused.bench.gpu import kit, library, run
from pyfused.bench.gpu.library import Unfit

pytestmark = pytest.mark.host

LIBRARY = Path(pyfused.__file__).with_name(library.NAME)
needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="pyfused._C is not built here")


def _answer(monkeypatch, targets: list[str], names: list[str]) -> None:
    """The library that is asked says this."""
    said = json.dumps({"targets": targets, "names": names})
    monkeypatch.setattr(library, "_ASK", f"print({said!r})")


@needs_library
def test_the_library_of_this_source_is_fit():
    built = json.loads(sys.modules["pyfused._C"].build_info())["targets"]
    capability = next(name.removeprefix("sm_") for name in built if name.startswith("sm_"))
    library.check(LIBRARY, capability)
    with pytest.raises(Unfit, match=r"has no machine code for compute capability 75: .*sm_"):
        library.check(LIBRARY, "75")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("_C.abi3.so", None, "is not there"),
        ("_C.cpython-39-x86_64-linux-gnu.so", "", "its name does not end in .abi3.so"),
        ("_C.abi3.so", "no library", r"does not load: ImportError: .*(file too short|invalid ELF header)"),
    ],
)
def test_a_file_that_is_no_library_of_this_abi_is_refused(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(Unfit, match=message):
        library.check(tmp_path / name, "90")


def test_a_library_of_another_source_or_architecture_is_refused(tmp_path, monkeypatch):
    path = tmp_path / library.NAME
    path.write_text("")
    own = library._names()
    assert {"lora_linear_fwd", "lora_linear_bwd", "build_info", "kernel_names"} <= set(own)
    _answer(monkeypatch, ["sm_90", "compute_90"], own)
    library.check(path, "90")
    with pytest.raises(Unfit, match=r"has no machine code for compute capability 100: sm_90, compute_90"):
        library.check(path, "100")
    # The driver would compile these at the first call.
    _answer(monkeypatch, ["sm_80", "compute_80"], own)
    with pytest.raises(Unfit, match=r"has no machine code for compute capability 90: sm_80, compute_80"):
        library.check(path, "90")
    library.check(path, "86")
    for absent in (own[0], "build_info"):
        _answer(monkeypatch, ["sm_90"], [name for name in own if name != absent])
        with pytest.raises(Unfit, match=f"is not of this source: it lacks {absent}$"):
            library.check(path, "90")


def test_a_library_that_takes_python_down_is_refused(tmp_path, monkeypatch):
    (tmp_path / library.NAME).write_text("")
    monkeypatch.setattr(library, "_ASK", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(Unfit, match="does not load: Python ended with status -11"):
        library.check(tmp_path / library.NAME, "90")


def test_a_library_is_put_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "ROOT", tmp_path)
    (tmp_path / "pyfused").mkdir()
    given = tmp_path / library.NAME
    given.write_text("new")
    place = tmp_path / "pyfused" / library.NAME
    place.write_text("old")
    library.place(given)
    assert place.read_text() == "new"
    library.place(place)
    assert place.read_text() == "new"
    assert [path.name for path in place.parent.iterdir()] == [library.NAME]


# ---- the kit


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Runs the kit's main in a root of its own; compilers and pip do not run: the commands that they would be."""
    ran = []

    def ran_command(command, **options):
        ran.append((command, options))
        if "build_ext" in command:
            built = Path(options["cwd"], "built", "pyfused", library.NAME)
            built.parent.mkdir(parents=True)
            built.write_text("compiled")
        else:
            Path(command[command.index("--dest") + 1], "one-1.0-py3-none-any.whl").write_text("wheel")

    checked = []
    monkeypatch.setattr(kit, "ROOT", tmp_path)
    monkeypatch.setattr(kit.rows, "provenance", lambda device: {"commit": "abc", "dirty": False})
    monkeypatch.setattr(kit, "run_to_the_end", ran_command)
    monkeypatch.setattr(library, "check", lambda path, capability: checked.append((path.read_text(), capability)))
    for name in kit._SOURCES:
        (tmp_path / name).write_text("")
    return tmp_path, ran, checked


def test_the_kit_has_the_library_and_the_wheels_and_says_what_to_run(made, capsys):
    root, ran, checked = made
    assert kit.main(["--arch", "100"]) == 0
    assert checked == [("compiled", "100")]
    (build, options), (fetch, _) = ran
    assert build[1:] == ["setup.py", "--quiet", "build_ext", "--build-lib", "built"]
    assert options["env"]["PYFUSED_CUDA_ARCHS"] == "100"
    assert options["env"]["PYFUSED_CUDA"] == "1"
    # Objects are kept by architecture, apart from the working tree's, and found again.
    assert options["cwd"] == root / "build" / "sm_100"
    assert (options["cwd"] / "csrc").resolve() == root / "csrc"
    assert "--only-binary=:all:" in fetch
    printed = capsys.readouterr().out
    assert f"0.0 MiB  in {root / 'build' / 'gpu-kit'}, for compute capability 100" in printed
    last = printed.splitlines()[-1]
    assert last.strip() == kit.command(kit.FOLDER, "abc")
    assert "has changes" not in printed
    folder = root / kit.FOLDER
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {library.NAME, "one-1.0-py3-none-any.whl"}
    # Again: nothing of the first is left over.
    (folder / "wheels" / "old.whl").write_text("")
    shutil.rmtree(root / "build" / "sm_100" / "built")
    assert kit.main(["--arch", "100"]) == 0
    assert not (folder / "wheels" / "old.whl").exists()


@pytest.mark.parametrize("output", [None, "somewhere else"])
def test_the_command_runs_as_a_shell_takes_it(tmp_path, output):
    seen = tmp_path / "python3"
    seen.write_text('#!/bin/sh\nprintf "%s\\n" "$PYTHONPATH" "$@" --\n')
    seen.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **({} if output is None else {"OUT": output})}
    command = ["sh", "-c", kit.command(kit.FOLDER, "abc")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path).stdout
    install, (site, *words), _ = [part.splitlines() for part in printed.split("--\n")]
    assert install[1:4] == ["-m", "pip", "install"]
    assert site == install[install.index("--target") + 1] == str(tmp_path / kit.FOLDER / "site")
    assert words[:2] == ["-m", "pyfused.bench.gpu"]
    arguments = run._arguments(words[2:])
    assert arguments.library == kit.FOLDER / library.NAME
    assert arguments.steps == ["truth", "questions", "speed"]
    assert arguments.commit == "abc"
    assert arguments.output == (None if output is None else Path(output))


def test_a_commit_that_the_files_are_not_of_is_left_out(made, monkeypatch, capsys):
    monkeypatch.setattr(kit.rows, "provenance", lambda device: {"commit": "abc", "dirty": True})
    assert kit.main([]) == 0
    printed = capsys.readouterr().out
    assert "the working tree has changes" in printed
    assert "--commit" not in printed


def test_a_kit_that_is_too_large_is_refused(made, monkeypatch, capsys):
    monkeypatch.setattr(kit, "LIMIT", 5)
    assert kit.main([]) == 1
    assert "make gpu-kit: the folder may take 0 MiB" in capsys.readouterr().err


def test_what_fails_is_said(made, monkeypatch, capsys):
    def fails(command, **options):
        raise subprocess.CalledProcessError(2, command)

    monkeypatch.setattr(kit, "run_to_the_end", fails)
    assert kit.main([]) == 1
    assert re.search(r"^make gpu-kit: exit status 2 of .*setup.py", capsys.readouterr().err)

    def unfit(path, capability):
        raise Unfit("it holds nothing")

    monkeypatch.setattr(library, "check", unfit)
    given = made[0] / "given.abi3.so"
    given.write_text("")
    assert kit.main(["--library", str(given)]) == 1
    assert capsys.readouterr().err == "make gpu-kit: it holds nothing\n"
    with pytest.raises(SystemExit):
        kit.main(["--arch", "75"])
    assert "invalid choice: '75'" in capsys.readouterr().err


def test_missing_wheels_are_pinned():
    lines = [line for line in kit.MISSING.read_text().splitlines() if not line.startswith("#")]
    pins = {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(
        r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )}  # fmt: skip
    assert "open_clip_torch" in lines
    direct = {"open_clip_torch", "pytest-benchmark", "pytest-timeout", "pytest-xdist"}
    assert direct <= set(lines)
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in direct} <= pins
