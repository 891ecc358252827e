"""What a document shows runs as it stands there: Python, its output, and the arguments of commands."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex

import blocks
import pytest
import torch
from tree import ROOT

from pyfused import cli
from pyfused.choice import measured

pytestmark = pytest.mark.host

WITH_CODE = [path for path in blocks.DOCUMENTS if blocks.python(path)]
_CHECKER = doctest.OutputChecker()
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run(document):
    # One namespace: a later block continues an earlier one.
    namespace: dict[str, object] = {"__name__": "document"}
    for block in blocks.python(document):
        said = io.StringIO()
        # Empty lines in front of it, so that a traceback has the document's own line.
        source = "\n" * (block.line - 1) + block.code
        with contextlib.redirect_stdout(said):
            exec(compile(source, str(document), "exec"), namespace)
        if block.output is not None and not _CHECKER.check_output(block.output, said.getvalue(), _FLAGS):
            example = doctest.Example(block.code, block.output)
            pytest.fail(f"{document}:{block.line}\n" + _CHECKER.output_difference(example, said.getvalue(), _FLAGS))


@pytest.mark.parametrize("document", WITH_CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_of_a_document_runs_and_prints_what_it_shows(document, tmp_path, monkeypatch):
    # It writes files, and what it tunes is no part of another test.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYFUSED_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    try:
        run(document)
    finally:
        measured.use(())


@pytest.mark.parametrize(
    ("shown", "passes"), [("1\n", True), ("2\n", False), ("...\n", True), (None, True), ("", False)]
)
def test_a_wrong_output_is_found(shown, passes, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n" + ("" if shown is None else f"\n```text\n{shown}```\n"))
    if passes:
        run(page)
    else:
        with pytest.raises(pytest.fail.Exception, match=r"page\.md:2"):
            run(page)


def test_text_that_does_not_follow_a_block_is_no_output(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\nSomething else:\n\n```text\n2\n```\n")
    assert [block.output for block in blocks.python(page)] == [None]


def taken(arguments):
    """Whether `pyfused` takes them; --help ends its parser with 0."""
    try:
        cli._parser().parse_args(arguments)
    except SystemExit as stopped:
        return stopped.code == 0
    return True


@pytest.mark.parametrize("document", blocks.DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_that_a_document_shows_are_there(document):
    """`make` has the target, `pyfused` takes the arguments, a Python file exists."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for command in blocks.commands(document):
        words = [word for word in shlex.split(command) if not re.fullmatch(r"\w+=.*", word)]
        if words[:1] == ["make"]:
            assert set(words[1:]) <= targets, command
        elif words[:1] == ["pyfused"] and not {"SRC", "RECORD", "FILE"} & set(words):
            assert taken(words[1:]), command
        elif words and words[0].endswith(("python", "python3")):
            assert all((ROOT / word).exists() for word in words[1:2] if word.endswith(".py")), command
