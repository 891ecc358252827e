"""*Questions*: the whole program on a CPU, the swapped kernel, and what becomes of a question that has no answer."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import pyfused
from pyfused.bench.gpu.programs import contests, questions
from pyfused.bench.gpu.programs import outcomes as outcomes_format
from pyfused.bench.gpu.programs.contests import Contest, Question
from pyfused.kernels import lora_linear
from pyfused.kernels.recording import INTERPRETER

CPU = torch.device("cpu")
NAMES = ["GEMM", "adapter dtypes", "plans", "wgrad order", "host time"]


@pytest.fixture
def interpreted():
    reason = pyfused.available_backends()["triton"]
    if reason is not None:
        pytest.skip(f"triton: {reason}")
    if torch.cuda.is_available():
        pytest.skip("about Triton's interpreter")


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Runs the program on a CPU, a round each; (exit status, lines printed, the record)."""
    monkeypatch.setattr(questions, "_LEAST_ROUNDS", 1)
    monkeypatch.setattr(questions, "_MOST_ROUNDS", 1)

    def run(*arguments: str) -> tuple[int, list[str], dict]:
        status = questions.main(["--record", str(tmp_path / "record"), "--device", "cpu", *arguments])
        found = json.loads((tmp_path / "record" / "questions.json").read_text())
        return status, capsys.readouterr().out.splitlines(), found

    return run


def test_all_five_are_answered(run, interpreted):
    status, lines, found = run("--seconds", "600")
    assert status == 0, lines
    title, *answers = lines
    assert title.startswith("questions, measured on ")
    assert found["provenance"]["device"] in title
    assert [line.partition(". ")[0] for line in answers] == ["1", "2", "3", "4", "5"]
    assert list(found["outcomes"]) == NAMES
    gemm, dtypes, plans, wgrad, host = found["outcomes"].values()
    for contender in ("128x256/torch.mm", "64x128/torch.mm"):
        assert contender in answers[0]
    assert len(gemm["seconds"]) == 2
    assert {name.rpartition(" ")[2] for name in dtypes["seconds"]} == {"forward", "forward+backward"}
    assert {name.partition(" ")[0] for name in dtypes["seconds"]} == {"lora_linear", "adapter_residual"}
    assert [("dropout" in name) for name in plans["seconds"]] == [False, True]
    assert "swapped/today" in answers[3]
    assert all(set(each) == {"today", "swapped"} for each in wgrad["seconds"].values())
    assert "LoRALinear" in answers[4]
    assert set(host["seconds"]) == set(pyfused.ops.OPERATORS)
    assert all(item["mode"] in line for item, line in zip(found["outcomes"].values(), answers, strict=True))
    # Again, nothing is measured again.
    again = run("--seconds", "600")
    assert again[1] == lines
    assert again[2]["outcomes"] == found["outcomes"]


def test_the_products_are_swapped():
    source = Path(lora_linear.__file__).read_text()
    swapped = contests.swapped_source(source)
    assert sorted(swapped.splitlines()) == sorted(source.splitlines()), "lines were moved, and none changed"
    acc, q = "        acc = tl.dot(tl.trans(kept), p, acc", "            q = tl.dot(t_tile, f"
    assert source.index(acc) < source.index(q)
    assert swapped.index(q) < swapped.index(acc)
    # Nothing else: in front of the loop's end and behind it all is as it was.
    moved = {n for n, (a, b) in enumerate(zip(source.splitlines(), swapped.splitlines(), strict=True)) if a != b}
    assert max(moved) - min(moved) < 12


def test_another_kernel_is_not_swapped():
    source = Path(lora_linear.__file__).read_text()
    with pytest.raises(ValueError, match="0 times, not once"):
        contests.swapped_source(source.replace("q = tl.dot(t_tile, f", "q = tl.dot(t_tile , f"))


def test_the_swapped_kernel_gives_the_same_bits(tmp_path, interpreted):
    torch.manual_seed(0)
    m, n, r = 70, 50, 16
    dy, p, b = torch.randn(1, m, n), torch.randn(m, r), torch.randn(n, r)
    found = []
    swapped = contests.swapped(tmp_path)
    assert swapped._lora_wgrad_kernel is not lora_linear._lora_wgrad_kernel
    for module in (lora_linear, swapped):
        gradient = torch.empty_like(b)
        q = module._wgrad(dy, p, gradient, None, 1.0, 0.0, factor=b)
        found.append((gradient, q))
    torch.testing.assert_close(found[0][0], dy[0].t() @ p)
    torch.testing.assert_close(found[0][1], dy[0] @ b)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_what_is_timed_of_a_launcher_is_one_kernel(interpreted):
    """Alone and within the whole call it computes the same."""
    for contest in contests.gemms(CPU, INTERPRETER):
        want = contest.expected()[0].float()
        assert list(contest.calls) == ["torch.mm", *contests.TILES, "descriptors"]
        for name in list(contest.calls)[1:]:
            (y,) = contest.calls[name]()
            assert questions.difference(y, want) < 0.01, (contest.label, name)


def test_tiles_are_forced(interpreted, monkeypatch):
    asked = []
    whole = contests.launch.launch
    monkeypatch.setattr(
        contests.launch, "launch", lambda kernel, grid, **a: asked.append(a) or whole(kernel, grid, **a)
    )
    contest = next(contests.gemms(CPU, INTERPRETER))
    for tile, config in contests.TILES.items():
        contest.calls[tile]()
        assert (asked[-1]["BLOCK_M"], asked[-1]["BLOCK_N"]) == (config.block_m, config.block_n)
        assert f"{config.block_m}x{config.block_n}" == tile


def _questions(monkeypatch, *found: Question) -> None:
    monkeypatch.setattr(questions, "questions", lambda folder: found)


def _question(name: str, *given: Contest, **options) -> Question:
    return Question(name, f"{name}?", lambda device, target: (each for each in given), **options)


def _ones(scale: float = 1.0):
    return lambda: torch.full((4,), scale)


def _raises() -> object:
    raise RuntimeError("no kernel\nimage")


def test_a_question_without_an_answer_says_why_and_stops_nothing(run, monkeypatch):
    good = Contest("good", {"one": _ones(), "other": _ones()})
    broken = Contest("broken", {"one": _ones(), "other": _raises})
    _questions(
        monkeypatch, _question("first", broken), _question("second", good, broken, good), _question("third", good)
    )
    status, lines, found = run()
    assert status == 1
    assert lines[1] == "1. first? (wall clock): not answered. FAILED 1: broken: RuntimeError: no kernel image"
    assert lines[2].startswith("2. second? (wall clock): other/one ")
    assert lines[2].endswith("FAILED 1: broken: RuntimeError: no kernel image")
    assert [item["status"] for item in found["outcomes"].values()] == ["failed", "failed", "passed"]
    assert "FAILED" not in lines[3]


def test_a_question_that_cannot_be_set_up_says_why(run, monkeypatch):
    def contests_of(device, target):
        if device.type != "meta":
            raise ValueError("cannot be swapped")
        yield Contest("only", {"one": _ones()})

    _questions(monkeypatch, Question("first", "first?", contests_of))
    status, lines, _ = run()
    assert status == 1
    assert lines[-1].endswith("not answered. FAILED 1: number 1 of 1: ValueError: cannot be swapped")


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_what_gives_other_numbers_prints_no_time(run, monkeypatch, wrong):
    _questions(monkeypatch, _question("first", Contest("here", {"one": _ones(), "other": _ones(wrong)})))
    status, lines, found = run()
    assert status == 1
    assert "here: ValueError: other is off by" in lines[-1]
    assert found["outcomes"]["first"]["seconds"] == {}


def test_numbers_are_those_expected_where_they_are_given(run, monkeypatch):
    expected = Contest("here", {"library": _ones(3.0), "ours": _ones(2.0)}, _ones(2.0))
    unlike = Contest("there", {"library": _ones(3.0), "ours": _ones(2.0)}, alike=False)
    _questions(monkeypatch, _question("first", expected, unlike))
    assert run()[0] == 0


def test_results_that_share_memory_are_told_apart(run, monkeypatch):
    memory = torch.empty(4)
    calls = {"one": lambda: memory.fill_(1.0), "other": lambda: memory.fill_(1.1)}
    _questions(monkeypatch, _question("first", Contest("here", calls)))
    assert run()[0] == 1


def test_time_that_is_out_is_told(run, monkeypatch):
    good = [Contest(f"number {i}", {"one": _ones(), "other": _ones()}) for i in range(3)]
    _questions(monkeypatch, _question("first", *good))
    clock = itertools.chain([0.0, 0.0, 0.0, 0.0], itertools.repeat(100.0))
    monkeypatch.setattr(questions.time, "monotonic", lambda: next(clock))
    status, lines, found = run("--seconds", "50")
    assert status == 1
    assert list(found["outcomes"]["first"]["seconds"]) == ["number 0"]
    assert lines[-1].endswith("FAILED 1: no time was left for 2 of 3")


def test_only_what_failed_is_asked_again(run, monkeypatch):
    broken = Contest("here", {"one": _ones(), "other": _raises})
    good = Contest("here", {"one": _ones(), "other": _ones()})
    _questions(monkeypatch, _question("first", good), _question("second", broken))
    _, _, before = run()
    _questions(monkeypatch, _question("first", broken), _question("second", broken))
    assert run("--continued")[2]["outcomes"] == before["outcomes"]
    _questions(monkeypatch, _question("first", broken), _question("second", good))
    status, _, after = run()
    assert status == 0
    assert after["outcomes"]["first"] == before["outcomes"]["first"]
    assert after["outcomes"]["second"]["status"] == "passed"


def test_a_gpu_that_does_not_answer_is_left_to_another_process(run, monkeypatch):
    broken = Contest("here", {"one": _ones(), "other": _raises})
    _questions(monkeypatch, _question("first", broken), _question("second", broken))
    started = []
    monkeypatch.setattr(outcomes_format.os, "execv", lambda path, words: started.append(words) or sys.exit(77))
    monkeypatch.setattr(questions, "answers", lambda device: False)
    with pytest.raises(SystemExit, match="77"):
        run()
    (words,) = started
    assert words[1:3] == ["-m", "pyfused.bench.gpu.programs.questions"]
    assert outcomes_format.arguments_of("questions", "", words[3:]).continued


def test_the_summary_names_the_extremes():
    numbers = {"a": {"one": 1.0, "two": 2.0}, "b": {"one": 2.0, "two": 2.0}, "c": {"one": 1.0, "two": 1.5}}
    assert questions.summary(numbers) == "two/one 1.00 (b) to 2.00 (a), median 1.50"
    assert questions.summary({"a": {"one": 1.0, "two": 2.0}}) == "two/one 2.00, median 2.00"
    host = {"lora_linear": {"eager": 10e-6, "LoRALinear": 25e-6}}
    assert questions.host_summary(host) == "LoRALinear 25 us, eager 10 us (2.50)"


@pytest.mark.parametrize("arguments", [["--seconds", "-1"], ["--workers", "0"]])
def test_arguments_out_of_range(arguments, capsys):
    with pytest.raises(SystemExit):
        questions.main(["--record", "nowhere", *arguments])
    assert arguments[0] in capsys.readouterr().err


def test_a_record_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "questions.json").write_text("{")
    assert questions.main(["--record", str(tmp_path), "--device", "cpu"]) == 1
    assert "questions.json holds no outcomes" in capsys.readouterr().err
