"""Every measured figure in a document comes from a committed record."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import import_table
import pytest
from tree import ROOT

from pyfused.bench.record.rows import Row, RowFile
from pyfused.bench.show import document
from pyfused.ops import OPERATORS

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
# What was measured by hand, each fact with its date. No other document has a figure of its own.
BY_HAND = ROOT / "docs" / "measured.md"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()

_NUMBER = r"(?<![\w.])\d+(?:[.,]\d+)?"
_QUANTITY = rf"(?:{_NUMBER}(?: times)?|\w+ times|twice|half|a third|a quarter)"
# What a measured figure looks like. Minutes (how long a build takes) and kilobytes (what a chip has) are none, and an x
# after a number is a ratio unless another number follows, as in a shape.
FIGURE = re.compile(
    "|".join(
        (
            rf"{_NUMBER} ?[x\u00d7](?! ?\d|\w)",
            rf"{_NUMBER}[- ]?(?:[num\u00b5\u03bc]?s|(?:nano|micro|milli)?seconds?)\b",
            rf"{_NUMBER} ?(?:%|per ?cent\b)",
            rf"{_NUMBER} ?[MGT]i?B\b",
            rf"{_NUMBER} ?\w+/s",
            rf"{_QUANTITY} (?:as (?:fast|slow|quick|much|little)|faster|slower|quicker|less|more)\b",
            rf"{_QUANTITY}(?: of)?(?: [\w']+)? (?:speed|memory|time|throughput|bandwidth)\b",
            rf"\b(?:speed-?ups?|faster|slower|quicker) (?:of|by) {_QUANTITY}",
        )
    ),
    re.IGNORECASE,
)


def written_by_hand(text: str) -> list[str]:
    """The figures in prose: outside the generated block and outside code that a reader runs."""
    before, _, rest = text.partition(document.BEGIN)
    prose = before + rest.partition(document.END)[2]
    prose = re.sub(r"^```.*?^```", "", prose, flags=re.MULTILINE | re.DOTALL)
    # A line break is a space like any other.
    return [match[0] for match in FIGURE.finditer(" ".join(prose.split()))]


@pytest.mark.host
@pytest.mark.parametrize("name", document.GENERATED, ids=lambda name: name.name)
def test_documents_show_the_newest_committed_records(name):
    if not (ROOT / ".git").exists():
        pytest.skip("which records are committed is known in a git checkout only")
    text = (ROOT / name).read_text()
    made = document.GENERATED[name](document.committed_records())
    assert text == document.inserted(text, made), "make document"


@pytest.mark.host
def test_the_plot_is_of_the_record_that_the_readme_shows():
    if not (ROOT / ".git").exists():
        pytest.skip("which records are committed is known in a git checkout only")
    drawn = ROOT / document.PLOT
    assert f"]({document.PLOT.as_posix()})" in (ROOT / "README.md").read_text().partition("\n## ")[0]
    assert drawn.stat().st_size < 60_000
    records = document.committed_records()
    (title,) = re.findall(r"<dc:title>(bench/results/.*)</dc:title>", document.plot(records))
    assert f"<dc:title>{title}</dc:title>" in drawn.read_text(), "make document"
    assert ROOT / title / "rows.json" in records


@pytest.mark.host
def test_what_can_be_drawn_anew_is_not_in_git():
    if not (ROOT / ".git").exists():
        pytest.skip("what git tracks is known in a git checkout only")
    command = ["git", "-C", str(ROOT), "ls-files"]
    tracked = {
        Path(name) for name in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    }
    pictures = {path for path in tracked if path.suffix in (".png", ".svg", ".html", ".jpg", ".gif", ".pdf")}
    assert pictures == {document.PLOT}
    results = {path for path in tracked if path.is_relative_to("bench/results")}
    assert {path.name for path in results} == {"rows.json"}


@pytest.mark.host
@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path != BY_HAND], ids=lambda path: path.name)
def test_no_figure_is_written_by_hand(path):
    assert written_by_hand(path.read_text()) == []


@pytest.mark.host
def test_what_was_measured_by_hand_has_its_date():
    facts = re.findall(r"^- .*", BY_HAND.read_text(), flags=re.MULTILINE)
    assert facts
    assert [fact for fact in facts if not re.match(r"- \d{4}-\d\d-\d\d[:,] ", fact)] == []


@pytest.mark.host
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_links_of_a_document_lead_somewhere(path):
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in target]
    assert [target for target in targets if not (path.parent / target.partition("#")[0]).exists()] == []


@pytest.mark.host
def test_the_documents_are_looked_at():
    looked_at = {path.relative_to(ROOT).as_posix() for path in DOCUMENTS}
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/decisions.md", "docs/next.md"} <= looked_at
    assert BY_HAND in DOCUMENTS


@pytest.mark.parametrize(
    "text",
    [
        "it is 1.3x eager",
        "it is 12 x as fast",
        "a step takes 12 ms",
        "a call takes 7.5us",
        "a step of 0.7 s",
        "300 GFLOP/s",
        "450 images/s",
        "90 % of the bandwidth",
        "saves 25% of memory",
        "231 MiB at the peak",
        "up to 1.3 times as fast as plain PyTorch",
        "with 0.6 to 0.9 of its memory",
        "several times the speed of projections",
        "twice as\nfast",
        "half the memory",
        "half of eager's memory",
        "2 times faster",
        "a speedup of 2",
    ],
)
def test_a_figure_is_found(text):
    assert written_by_hand(text)


@pytest.mark.parametrize(
    "text",
    [
        "images of 224x224, 7x7 feature maps, 2740 x 1024 rows",
        "about 15 minutes on two CPU cores",
        "blocks of at most 64 KB",
        "compute capability 8.0 to 12.0, nvcc 12.0, PyTorch 2.10",
        "rank from 1 to 256, h up to 512",
        "float32 and bfloat16, 16 heads and 2 tokens",
        "instead of twice 1024 columns",
        "error at most twice that of plain torch",
        "`y = x W^T + b + s (drop(x) A^T) B^T`",
        "```python\nx = 0.5 # 3 ms\n```",
        f"{document.BEGIN}\n| 12 ms | 1.3x |\n{document.END}",
    ],
)
def test_what_is_no_figure_is_not(text):
    assert written_by_hand(text) == []


# ---- what CONTRIBUTING says


@pytest.mark.host
def test_contributing_has_the_rooms_and_the_imports_of_test_house():
    assert import_table.inserted(CONTRIBUTING) == CONTRIBUTING, "python tests/house/import_table.py"


def test_a_document_without_the_markers_is_refused():
    with pytest.raises(ValueError, match="in this order"):
        import_table.inserted(f"{import_table.END} {import_table.BEGIN}")


@pytest.mark.host
@pytest.mark.parametrize("path", [ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")], ids=lambda path: path.name)
def test_lines_fit_a_screen(path):
    """But for rows of tables, which cannot be broken."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.host
def test_ci_runs_what_contributing_says():
    wanted = re.findall(r"^    make (\w+)", CONTRIBUTING.partition("All four must pass")[0], flags=re.MULTILINE)
    run = re.findall(r"^make (\w+)", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    assert len(wanted) == 4
    assert wanted == run


@pytest.mark.host
def test_every_file_that_contributing_names_is_there():
    """A path in backticks with a folder in it; <op> stands for an operator that has such a file."""
    paths = re.findall(r"`((?:\.?[\w<>*.-]+/)+[\w<>*.-]*)`", CONTRIBUTING)
    assert len(paths) > 20
    assert [path for path in paths if not list(ROOT.glob(re.sub("<op>|<family>", "*", path).rstrip("/")))] == []


@pytest.mark.host
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_kernel_file_has_its_device_functions_before_its_launchers(operator):
    tree = ast.parse((ROOT / "kernels" / f"{operator}.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    on_device = [any(ast.unparse(mark).startswith("triton.") for mark in node.decorator_list) for node in functions]
    assert on_device == sorted(on_device, reverse=True)
    names = [node.name for node in functions]
    assert names.index(f"{operator}_fwd") < names.index(f"{operator}_bwd")


# ---- what is generated


def _row(name: str = "lora_linear 8x4->2", **changes) -> Row:
    fields = {
        "kind": "operator",
        "measured": "forward+backward",
        "seconds": {"pyfused": 0.002, "eager": 0.003},
        "ratios": {"eager": 1.5, "PEFT": 1.25, "base GEMM": 0.5},
        "peak_bytes": {"pyfused": 300, "eager": 400},
        "provenance": {
            "device": "a CPU", "threads": 2, "torch": "2.13", "date": "2026-01-02T03:04:05", "commit": "abcdef0123456",
            "dirty": False,
        },
    }  # fmt: skip
    return Row(name, **(fields | changes))


def _record(root: Path, device: str, date: str, *rows: Row) -> Path:
    file = RowFile(root / "bench" / "results" / device / date)
    for row in rows:
        file.append(row)
    return file.path


def test_tables_are_made_of_rows_with_times(tmp_path):
    rows = [
        _row(),
        _row("lora_linear broken", passed=False, seconds={}, ratios={}),
        _row("lora_linear broken, with times", passed=False),
        _row("lora_linear without times", seconds={}, ratios={}),
        _row("lora_linear forward", measured="forward"),
        _row("adapter_residual 8x4 h2", ratios={"eager": 0.9}, peak_bytes={}),
        _row("tower", kind="model", measured="training step", ratios={"reference": 1.01}, peak_bytes={}),
    ]
    record = _record(tmp_path, "cpu-2x-a", "2026-01-02-000000", *rows)
    parts = document.tables([record], tmp_path).split("\n\n")
    assert parts[:2] == [
        "On a GPU: not yet measured.",
        "On a CPU, 2 threads, torch 2.13, 2026-01-02, commit abcdef012\n(`bench/results/cpu-2x-a/2026-01-02-000000`):",
    ]
    rule = "| --- |"
    tables = [[line for line in part.splitlines() if not line.startswith(rule)] for part in parts[2:5]]
    assert tables == [
        ["| `lora_linear` | time | plain PyTorch | PEFT | memory |", "| 8x4->2 | 2.0 ms | 1.50x | 1.25x | 0.75x |"],
        ["| `adapter_residual` | time | plain PyTorch |", "| 8x4 h2 | 2.0 ms | 0.90x |"],
        ["| model | time | plain PyTorch |", "| tower | 2.0 ms | 1.01x |"],
    ]
    assert len(parts) == 6


def test_the_summary_has_a_line_for_all_rows_of_an_operator(tmp_path):
    rows = [
        _row(),
        _row("lora_linear wide", ratios={"eager": 0.96, "torch.compile": 2.0}, peak_bytes={"pyfused": 9, "eager": 8}),
        _row("lora_linear broken", passed=False),
        _row("adapter_residual 8x4 h2", ratios={"eager": 0.9}, peak_bytes={}),
        _row("tower", kind="model", measured="training step", ratios={"reference": 1.01}, peak_bytes={}),
    ]
    record = _record(tmp_path, "cpu-2x-a", "2026-01-02-000000", *rows)
    lines = document.summary([record], tmp_path).split("\n\n")[2].splitlines()
    assert lines[0].endswith("| plain PyTorch | `torch.compile` | PEFT | memory |")
    assert lines[2:] == [
        "| `lora_linear`, 2 sizes | 0.96x to 1.50x | 2.00x | 1.25x | 0.75x to 1.12x |",
        "| `adapter_residual`, 1 size | 0.90x |  |  |  |",
        "| tower | 1.01x |  |  |  |",
    ]


def test_a_gpu_record_shows_its_launches_by_graph(tmp_path):
    modes = [_row(mode="eager launches"), _row(mode="graph replay", seconds={"pyfused": 0.001})]
    gpu = _record(tmp_path, "nvidia-a", "2026-01-01-000000", *modes)
    text = document.tables([gpu], tmp_path)
    assert "On a CPU, graph replay, torch" in text
    assert text.count("8x4->2") == 1
    assert "| 1.0 ms |" in text
    assert "On a CPU: not yet measured." in text


def test_a_record_without_times_is_refused(tmp_path):
    record = _record(tmp_path, "cpu-2x-a", "2026-01-02-000000", _row(passed=False, seconds={}, ratios={}))
    with pytest.raises(ValueError, match=r"no row of .*rows\.json that passed parity has times"):
        document.tables([record], tmp_path)


@pytest.mark.host
def test_records_are_the_tracked_ones_oldest_first(tmp_path):
    with pytest.raises(ValueError, match="git checkout"):
        document.committed_records(tmp_path)
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    newer = _record(tmp_path, "cpu-2x-a", "2026-01-03-000000", _row())
    older = _record(tmp_path, "cpu-2x-b", "2026-01-02-000000", _row())
    subprocess.run(["git", "-C", str(tmp_path), "add", "."], check=True)
    untracked = _record(tmp_path, "cpu-2x-a", "2026-01-04-000000", _row())
    assert untracked.exists()
    assert document.committed_records(tmp_path) == [older, newer]


def test_the_newest_record_of_any_cpu_is_taken(tmp_path):
    older = _record(tmp_path, "cpu-2x-b", "2026-01-02-000000", _row("lora_linear old"))
    newer = _record(tmp_path, "cpu-2x-a", "2026-01-03-000000", _row("lora_linear new"))
    text = document.tables([older, newer], tmp_path)
    assert "| new |" in text
    assert "| old |" not in text


def test_figures_replace_what_stood_between_the_markers():
    text = f"before\n{document.BEGIN}\nold\n{document.END}\nafter\n"
    once = document.inserted(text, "new")
    assert once == f"before\n{document.BEGIN}\n\nnew\n\n{document.END}\nafter\n"
    assert document.inserted(once, "new") == once


@pytest.mark.parametrize(
    "text", ["", document.BEGIN, document.END + document.BEGIN, 2 * (document.BEGIN + document.END)]
)
def test_missing_or_repeated_markers_are_refused(text):
    with pytest.raises(ValueError, match="once each, in this order"):
        document.inserted(text, "new")
