"""`pyfused bench --list` and -k: the names of rows before they are measured, and what a text names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from pyfused import cli
from pyfused.bench.cases import data, operators
from pyfused.bench.record import rows
from pyfused.bench.record.rows import Title, read_rows
from pyfused.bench.run import command, selection, test_machine
from pyfused.bench.run.session import Settings

pytestmark = pytest.mark.host

CPU = torch.device("cpu")
NAMES = [
    "lora_linear 400x768->768 r16 float32, forward",
    "lora_linear 400x768->768 r16 float32, forward+backward",
    "adapter_residual 3152x768 h64 float32, forward",
]


def _selected(*texts):
    return [NAMES.index(name) for name in selection.select(NAMES, texts, lambda name: (name, "file"))]


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ([], [0, 1, 2]),
        (["400x768->768 r16"], [0, 1]),
        (["Forward+BACKWARD"], [1]),
        (["h64", "forward+backward"], [1, 2]),
        (["h64", "h64"], [2]),
        (["FILE"], [0, 1, 2]),
    ],
)
def test_a_text_names_what_has_it_in_a_name(texts, found):
    assert _selected(*texts) == found


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("lora_liner", "near: 'lora_linear'"),
        ("Adaptor_Residual 3152x768", "near: 'adapter_residual 3152x768'"),
        ("400x769->768 r16 float32", "near: '400x768->768 r16 float32', '3152x768 h64 float32'"),
        ("lora_linear or adapter_residual", "--list prints them"),
        ("zzz", "--list prints them"),
        ("", "without -k it is all of them"),
    ],
)
def test_what_names_nothing_is_refused_with_what_is_near(text, near):
    # Also beside a text that names something.
    with pytest.raises(selection.Unnamed) as caught:
        _selected("h64", text)
    assert str(caught.value) == f"-k must be part of a printed name, got {text!r}; {near}"


def _listed(capfd, *arguments) -> dict[str, list[str]]:
    """File -> its rows, as --list prints them."""
    assert cli.main(["bench", "--device", "cpu", "--list", *arguments]) == 0
    found: dict[str, list[str]] = {}
    for line in capfd.readouterr().out.splitlines():
        if line.startswith("  "):
            found[list(found)[-1]].append(line.removeprefix("  "))
        else:
            found[line] = []
    return found


def test_the_list_has_every_row_once_and_measures_nothing(capfd, tmp_path):
    found = _listed(capfd, "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert list(found) == ["test_machine", "test_overhead", "test_operators", "test_models", "test_training"]
    wanted = [f"{case.name}, {how}" for case in operators.timed_cases(CPU) for how in ("forward", "forward+backward")]
    assert sorted(found["test_operators"]) == sorted(wanted)
    assert len(found["test_models"]) == 3
    assert found["test_machine"] == ["matrix product 2048x2048x2048 float32, matrix product", "copy 256 MiB, copy"]
    own = tmp_path / "test_listed.py"
    own.write_text("def test_good(compare):\n    compare('a name', {'pyfused': [lambda: 1]})\n")
    assert _listed(capfd, str(own), "-k", "FASTVIT T8", "-k", "test_listed") == {
        "test_training": ["digits, FastViT T8 with 10 adapters h = C/2, batch 32, 30 steps, training step"],
        "test_listed": ["test_good"],
    }


def test_rows_are_recorded_under_the_names_that_the_list_prints(capfd, monkeypatch, tmp_path):
    monkeypatch.setitem(test_machine.SIDE, "cpu", 24)
    monkeypatch.setitem(test_machine.COPIED, "cpu", 1 << 20)
    select = ["test_machine", "overhead adapter_residual", "overhead projection_residual"]
    found = _listed(capfd, *(word for text in select for word in ("-k", text)))
    assert command.run(Settings(CPU, record=tmp_path, seconds_per_row=0.01), select) == 0
    recorded = [str(row.key) for row in read_rows(tmp_path / "rows.json")]
    assert recorded == found["test_machine"] + found["test_overhead"]
    assert "matrix product 24x24x24 float32, matrix product" in recorded
    # What the record has is skipped before it is prepared, and listed all the same.
    assert command.run(Settings(CPU, record=tmp_path, seconds_per_row=0.01), select) == 0
    printed = capfd.readouterr()
    assert printed.err.count(": the record has this row") == len(recorded)
    assert [str(row.key) for row in read_rows(tmp_path / "rows.json")] == recorded
    assert _listed(capfd, "--record", str(tmp_path), "-k", "copy") == {"test_machine": ["copy 1 MiB, copy"]}


def test_every_row_of_a_gpu_has_a_name_of_its_own(capfd, monkeypatch, tmp_path):
    """As it is listed there, without one."""
    monkeypatch.setattr(rows, "device_name", lambda device: "NVIDIA H200")
    assert command.run(Settings(torch.device("cuda"), record=tmp_path / "none"), listing=True) == 0
    printed = [line.removeprefix("  ") for line in capfd.readouterr().out.splitlines()]
    assert len(set(printed)) == len(printed)
    assert "copy 1024 MiB, copy, graph replay" in printed
    for case in operators.timed_cases(torch.device("cuda")):
        for how in ("forward", "forward+backward"):
            assert {f"{case.name}, {how}, eager launches", f"{case.name}, {how}, graph replay"} < set(printed)
    compiled = printed[printed.index("test_compiled") + 1 :]
    wanted = [f"{case.name}, beside torch.compile" for case in operators.compiled_cases(torch.device("cuda"))]
    assert compiled == [f"{name}, forward+backward, graph replay" for name in wanted]


def test_a_title_says_how_where_it_is_not_by_the_wall_clock():
    assert str(Title("a", "forward")) == "a, forward"
    assert str(Title("a", "forward", "graph replay")) == "a, forward, graph replay"
    assert str(Title("a test", "")) == "a test"


def test_rows_of_models_are_named_by_their_batch():
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL")
    images, labels = data.photographs(8)
    assert len(images) == len(labels) == data.PHOTOGRAPHS


def test_of_a_file_that_cannot_be_collected_the_reason_is_said_and_no_other(tmp_path, capfd):
    (tmp_path / "test_cut_short.py").write_text("def test_cut_short(compare:\n")
    command = ["bench", "--device", "cpu", "--output", str(tmp_path / "out"), str(tmp_path), "-k", "cut_short"]
    assert cli.main(command) == 2
    printed = capfd.readouterr()
    assert "SyntaxError: '(' was never closed" in printed.err
    assert "must be part of a printed name" not in printed.err + printed.out


def test_the_commands_arguments_are_the_runs_settings(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(command, "run", lambda *arguments: ran.append(arguments) or 0)
    given = [
        "--device",
        "cpu",
        "--output",
        "o",
        "--threads",
        "3",
        "--seconds",
        "0.5",
        "--commit",
        "abc",
        "--record",
        "r",
    ]
    assert (
        cli.main(["bench", *given, "--attempts", "4", "--targets", "-k", "a", "-k", "b", str(tmp_path), "--list"]) == 0
    )
    settings = Settings(CPU, Path("o"), 3, 0.5, "abc", Path("r"), attempts=4, targets=True)
    assert ran == [(settings, ["a", "b"], [str(tmp_path)], True)]
