"""How much the times of a row vary, what is measured again for it, and where it is said."""

from __future__ import annotations

import io
import json
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from rich.console import Console

from pyfused.bench.measure import timing
from pyfused.bench.record import records, rows
from pyfused.bench.record.rows import NOISY, Row, RowFile
from pyfused.bench.run import command, plugin, test_models
from pyfused.bench.run.session import Session, Settings
from pyfused.bench.show import document, sentences, tables, terminal

pytestmark = pytest.mark.host

CPU = torch.device("cpu")
STEADY, WILD = (1.0, 1.01, 1.02, 1.03), (1.0, 1.1, 1.3, 1.5)


class Clock:
    """The subject takes a second; the others as many as the next of ``script`` says, which is gone through in turn."""

    mode = "wall clock"

    def __init__(self, *script):
        self.script, self.rounds = [number for part in script for number in part], 0

    def round(self, calls):
        others = self.script[self.rounds % len(self.script)]
        self.rounds += 1
        return {name: 1.0 if name == "pyfused" else others for name in calls}


class Benchmark:
    """As pytest-benchmark's fixture: it takes rounds once."""

    def __init__(self):
        self.extra_info, self.used = {}, False

    def pedantic(self, target, setup, rounds):
        assert not self.used
        self.used = True
        for _ in range(rounds):
            setup()
            target()


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Measures one row by a clock, four rounds an attempt after two that do not count; (the row, what the bar said)."""
    monkeypatch.setattr(timing, "rounds_within", lambda budget, each: 4)
    monkeypatch.setattr(plugin.os, "getloadavg", lambda: (2.5, 0.0, 0.0))

    def measure(clock, contenders=("pyfused", "eager"), attempts=2, **settings):
        record = tmp_path / str(attempts)
        session, said = Session(Settings(CPU, record=record, attempts=attempts)), []
        session.on_round = lambda *told: said.append(told)
        compare = plugin.Compare(Benchmark(), session)
        row = compare("a row", {name: [lambda: None] for name in contenders}, clock=clock, **settings)
        assert rows.read_rows(record / "rows.json") == [row]
        return row, said

    return measure


def test_a_steady_row_is_measured_once(measured):
    clock = Clock(STEADY)
    row, said = measured(clock)
    assert row.ratios == {"eager": pytest.approx(1.015)}
    assert row.ratio_quartiles == {"eager": pytest.approx([1.0075, 1.0225])}
    assert row.quartiles == {"eager": pytest.approx([1.0075, 1.0225]), "pyfused": [1.0, 1.0]}
    assert (row.rounds, row.attempts, row.noisy) == (4, 1, False)
    assert row.load == {"before": 2.5, "after": 2.5}
    assert clock.rounds == 2 + 4
    assert said == [("a row, call", number, 4) for number in range(4)]


def test_a_disturbed_row_is_measured_again_and_the_bar_says_so(measured):
    clock = Clock((1.0, 1.0), WILD, STEADY)
    row, said = measured(clock)
    assert row.ratios == {"eager": pytest.approx(1.015)}
    assert (row.rounds, row.attempts, row.noisy) == (4, 2, False)
    assert clock.rounds == 2 + 4 + 4
    assert said[4:] == [("a row, call, again for noise", number, 4) for number in range(4)]


@pytest.mark.parametrize("wilder", [0, 1])
def test_of_two_noisy_attempts_the_less_noisy_one_is_recorded_and_marked(measured, wilder):
    attempts = [WILD, WILD]
    attempts[wilder] = (1.0, 1.5, 2.0, 4.0)
    clock = Clock((1.0, 1.0), *attempts)
    row, _ = measured(clock)
    assert row.ratios == {"eager": pytest.approx(1.2)}
    assert row.spread == pytest.approx(math.log(1.35 / 1.075))
    assert (row.attempts, row.noisy) == (2, True)
    # No third time.
    assert clock.rounds == 2 + 4 + 4


def test_a_row_whose_every_round_counts_is_marked_but_not_run_again(measured):
    clock = Clock(WILD)
    row, _ = measured(clock, rounds=4)
    assert (row.rounds, row.attempts, row.noisy) == (4, 1, True)
    assert clock.rounds == 4


def test_the_widest_ratio_counts_and_where_nothing_is_compared_the_seconds():
    where = {"ratios": {"eager": 2.0, "PEFT": 4.0}, "ratio_quartiles": {"eager": [1.9, 2.1], "PEFT": [3.0, 5.0]}}
    row = Row("a", "operator", "forward", seconds={"pyfused": 1.0}, quartiles={"pyfused": [1.0, 9.0]}, **where)
    assert row.spread == pytest.approx(math.log(5 / 3))
    row.ratio_quartiles = {"PEFT": [1 / 5, 1 / 3]}
    assert row.spread == pytest.approx(math.log(5 / 3)), "the same for the inverse"
    row.ratios, row.ratio_quartiles = {}, {}
    assert row.spread == pytest.approx(math.log(9))
    row.quartiles = {"pyfused": [0.0, 9.0]}
    assert row.spread == math.inf
    assert Row("a", "operator", "forward", seconds={"pyfused": 1.0}, ratios={"eager": 2.0}).spread == 0.0


def test_quartiles_of_few_rounds():
    assert timing._quartiles([3.0]) == [3.0, 3.0]
    assert timing._quartiles([4.0, 2.0]) == [2.5, 3.5]
    assert timing._quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 4.0]


# ---- where it is said


def _row(name="a row", measured="forward", **changes):
    fields = {"seconds": {"pyfused": 0.0164}, "ratios": {"eager": 1.2}, "ratio_quartiles": {"eager": [1.1, 1.5]}}
    fields["quartiles"] = {"pyfused": [0.0163, 0.0169]}
    return Row(name, "operator", measured, **(fields | changes))


def _printed(found, stream=None, **settings):
    stream = io.StringIO() if stream is None else stream
    terminal.print_table(found, stream, **settings)
    return stream.getvalue()


def test_the_table_marks_noisy_rows_and_the_last_line_counts_them():
    printed = _printed([_row("steady"), _row("wild", noisy=True)])
    lines = {name: line for line in printed.splitlines() for name in ("steady", "wild") if line.startswith(f" {name}")}
    assert " 16.4 ms ±0.3" in lines["steady"]
    assert "~" not in lines["steady"]
    assert "~16.4 ms ±0.3" in lines["wild"]
    summary = " ".join(printed.split())
    assert "1 of 2 rows are noisy (~): between the quartiles of their rounds a ratio" in summary
    assert summary.endswith(f"varies by more than {NOISY:.0%}: wild, forward.")
    assert "noisy" not in _printed([_row("steady")])


def test_a_row_of_an_older_record_has_a_time_and_no_spread():
    printed = _printed([_row(quartiles={}, ratio_quartiles={})])
    assert "16.4 ms" in printed
    assert "±0" not in printed


@pytest.mark.parametrize(
    ("seconds", "quartiles", "text"),
    [
        (25e-6, [24.5e-6, 26.5e-6], "25.0 us ±1.0"),
        (2.0, [1.9, 2.0], "2.00 s ±0.05"),
        (0.5, [0.1, 2.1], "500.0 ms ±1000.0"),
    ],
)
def test_the_spread_has_the_unit_of_the_time(seconds, quartiles, text):
    assert text in _printed([_row(seconds={"pyfused": seconds}, quartiles={"pyfused": quartiles})])


def test_a_narrow_terminal_gets_no_spread_and_a_wide_one_does(monkeypatch):
    def printed(width):
        def console(file=None, width=None, own=width):
            return Console(file=file, width=own if width is None else width, force_terminal=True, color_system=None)

        monkeypatch.setattr(terminal, "Console", console)
        return _printed([_row("n" * 45)])

    full = Console(width=10_000).measure(terminal.table([_row("n" * 45)], spread=True)).maximum
    assert "±0.3" in printed(full)
    assert "±0.3" not in printed(full - 1)


def test_numbers_to_reach_are_printed_when_they_are_asked_for(monkeypatch):
    slow = _row("lora_linear 8x8->8", measured="forward+backward", ratios={"eager": 0.5}, ratio_quartiles={})
    assert "NOT MET" not in _printed([slow])
    assert "NOT MET" in _printed([slow], targets=True)
    monkeypatch.setattr(terminal, "has_targets", lambda: False)
    printed = _printed([slow], targets=True)
    assert "NOT MET" not in printed
    assert "numbers to reach are in a checkout" in printed


def test_a_run_without_a_terminal_says_noisy_beside_the_row(capsys):
    watcher = SimpleNamespace(
        progress=SimpleNamespace(console=SimpleNamespace(is_terminal=False)),
        _say=lambda text, style: print(text),
    )
    command.Watcher._on_row(watcher, _row(noisy=True))
    command.Watcher._on_row(watcher, _row())
    assert capsys.readouterr().out == "a row, forward: 1.20x eager, noisy\na row, forward: 1.20x eager\n"


# ---- records


def test_a_record_of_before_loads_and_a_new_one_is_checked(tmp_path):
    file = rows.RowFile(tmp_path)
    file.append(_row(noisy=True, load={"before": 1.0, "after": 2.0}))
    assert records.load(tmp_path).rows == file.rows
    (item,) = json.loads(file.path.read_text())
    assert item["noisy"] is True
    old = {name: value for name, value in item.items() if name not in ("noisy", "load", "attempts")}
    old = {name: value for name, value in old.items() if not name.endswith("quartiles")}
    file.path.write_text(json.dumps([old]))
    (row,) = records.load(tmp_path).rows
    assert (row.noisy, row.quartiles, row.load, row.spread) == (False, {}, {}, 0.0)
    for name, value, wanted in (
        ("noisy", 1, "expected noisy to be bool"),
        ("load", {"before": -1.0}, r"load\['before'\] to be a number from 0 on"),
        ("quartiles", {"pyfused": [1.0]}, r"quartiles\['pyfused'\] to be two numbers from 0 on"),
        ("ratio_quartiles", {"eager": ["a", "b"]}, r"ratio_quartiles\['eager'\] to be two numbers from 0 on"),
        ("ratio_quartiles", {"eager": 1.0}, r"ratio_quartiles\['eager'\] to be two numbers from 0 on"),
    ):
        file.path.write_text(json.dumps([old | {name: value}]))
        with pytest.raises(records.Unreadable, match=wanted):
            records.load(tmp_path)


def test_settings_say_how_often_a_noisy_row_is_measured(measured):
    clock = Clock((1.0, 1.0), WILD, WILD, STEADY)
    row, _ = measured(clock, attempts=1)
    assert (row.attempts, row.noisy, clock.rounds) == (1, True, 2 + 4)
    row, _ = measured(Clock((1.0, 1.0), WILD, WILD, STEADY), attempts=3)
    assert (row.attempts, row.noisy) == (3, False)


def test_documents_and_the_page_mark_noisy_rows(tmp_path):
    rows_ = [_row("lora_linear steady"), _row("lora_linear wild", noisy=True)]
    record = tmp_path / "bench" / "results" / "cpu-1x-a" / "2026-01-01-000000"
    provenance = {"device": "a", "threads": 1, "torch": "2", "date": "2026-01-01", "commit": "a", "dirty": False}
    for row in rows_:
        row.measured, row.provenance = "forward+backward", provenance
        RowFile(record).append(row)
    for made in document.GENERATED.values():
        text = made([record / "rows.json"], tmp_path)
        assert "1 of 2 rows are noisy (~)" in text
        assert text.count("lora_linear wild, forward+backward.") == 1
    assert "| wild | ~16.4 ms |" in document.tables([record / "rows.json"], tmp_path)
    assert any("1 of 2 rows are noisy" in said for said in sentences.lead(records.load(record), []))
    table = tables.of_rows("lora_linear", rows_)
    assert table.groups[0] == ("", ["parity", "rounds", "spread"])
    assert [cells[2].verdict for _, _, cells in table.lines] == ["", "worse"]


@pytest.mark.parametrize(("attempts", "steps"), [(1, 9), (2, 9), (3, 9)])
def test_models_are_compared_at_the_end_of_the_first_attempt(attempts, steps):
    row = _row(rounds=5, attempts=attempts)
    assert test_models._before_repeats(4 + 5 * attempts, row) == steps
