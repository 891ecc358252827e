"""`pyfused report`: records read and compared, the figures, and the page as a browser shows it."""

from __future__ import annotations

import copy
import dataclasses
import errno
import html.parser
import os
import re
import types
import xml.etree.ElementTree
from pathlib import Path

import browser
import pytest
import torch
from tree import ROOT

from pyfused import cli

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("rich")

from pyfused.bench.cases.baselines import BASE
from pyfused.bench.cases.lora_linear import LoRACase
from pyfused.bench.record import records, rows
from pyfused.bench.record.rows import Row
from pyfused.bench.show import captions, document, figures, page, rates, sentences, style, tables

pytestmark = pytest.mark.host

CPU = torch.device("cpu")
OLD_RECORD = ROOT / "bench/results/cpu-2x-intel-r-xeon-r-processor-2-50ghz/2026-11-21-115040"
WHERE = {"device": "a CPU", "threads": 2, "torch": "2.13", "date": "2026-01-01", "pyfused": "0.1.0", "commit": "abc"}
CASES = [LoRACase(400, 768, n) for n in (768, 2304, 3072)]


def _row(name: str, kind: str = "operator", measured: str = "forward", **changes) -> Row:
    seconds = {"pyfused": 0.010, "eager": 0.012}
    return Row(name, kind, measured, **{"seconds": seconds, "ratios": {"eager": 1.2}, "provenance": WHERE} | changes)


def _machine(gflops: float = 100.0) -> list[Row]:
    product = {"torch.mm": 2e9 / (0.5e9 * gflops), "oneDNN": 2e9 / (1e9 * gflops)}
    facts = {"dtype": "float32", "flops": 2 * 10**9, "bytes": 10**7}
    where = {"kind": "machine", "ratios": {}, "subject": "torch.mm"}
    return [
        _row("matrix product", measured="matrix product", seconds=product, facts=facts, **where),
        _row("copy", measured="copy", seconds={"copy": 0.1}, facts={"flops": 0, "bytes": 2 * 10**9}, **where),
    ]


def _rows() -> list[Row]:
    """A small run with a row of each kind, one that failed, and a contender that could not run."""
    found = _machine()
    for case in CASES:
        for measured, work in case.work().items():
            facts = case.facts() | {"flops": work.flops, "bytes": work.nbytes, "floor_seconds": None}
            seconds = {"pyfused": work.flops / 80e9, "eager": 1.2 * work.flops / 80e9}
            ratios = {"eager": 0.9 if case is CASES[0] else 1.2}
            memory = {"peak_bytes": {"pyfused": 2 << 20, "eager": 3 << 20}}
            memory |= {"saved_bytes": {"pyfused": 1 << 20, "eager": 2 << 20}}
            missing = {"torch.compile": "no compiler"}
            given = {"facts": facts, "seconds": seconds, "ratios": ratios, "unavailable": missing, **memory}
            found.append(_row(case.name, measured=measured, **given))
    wrong = {"tensor": "dx", "norm": "maximum", "error": 0.5, "plain": 1e-7, "limit": 1e-6}
    found.append(_row("lora_linear <b>wrong</b> & more", seconds={}, ratios={}, passed=False, parity=[wrong]))
    counted = {"bytes": 2 * 10**6, "read_bytes": 3 * 10**6, "written_bytes": 10**6, "kernels": 2}
    found.append(_row("lora_linear", "traffic", seconds={}, ratios={}, mode="hardware counters", facts=counted))
    losses = {"pyfused": [2.0, 1.0, 0.5], "eager": [2.0, 1.0, 0.6]}
    found.append(_row("tower", "model", "training step", facts={"how": {"eager": "plain formulas"}}))
    found.append(_row("digits", "training", "training step", loss=losses))
    return found


def _record(found: list[Row], directory: Path = Path("new")) -> records.Record:
    return records.Record(directory / "rows.json", found)


def _written(found: list[Row], directory: Path) -> Path:
    file = rows.RowFile(directory)
    for row in found:
        file.append(row)
    return directory


def _changed(found: list[Row], name: str, **fields) -> list[Row]:
    """The rows, in those of this name the numbers of pyfused times these."""
    found = copy.deepcopy(found)
    touched = [row for row in found if row.name == name]
    assert touched
    for row in touched:
        for field, factor in fields.items():
            contender = "eager" if field == "ratios" else "pyfused"
            getattr(row, field)[contender] *= factor
    return found


# ---- reading


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected a directory with rows.json in it, or that file; there is none"),
        ("", "no JSON: Expecting value"),
        ("[", "no JSON"),
        ("[]", "got none"),
        ('{"rows": []}', "got something else than a list of objects"),
        ("[1]", "got something else than a list of objects"),
        ('[{"name": "a", "kind": "operator"}]', "missing 1 required positional argument: 'measured'"),
        (
            '[{"name": "a", "kind": "operator", "measured": "forward", "speed": 1}]',
            "unexpected keyword argument 'speed'",
        ),
        ('[{"name": "a", "kind": "operator", "measured": 3}]', "row 0: expected measured to be str, got 3"),
        (
            '[{"name": "a", "kind": "operator", "measured": "b", "seconds": {"pyfused": "1 s"}}]',
            "row 0: expected seconds['pyfused'] to be a number from 0 on, got '1 s'",
        ),
        (
            '[{"name": "a", "kind": "operator", "measured": "b", "seconds": {"pyfused": -1}}]',
            "row 0: expected seconds['pyfused'] to be a number from 0 on, got -1",
        ),
        (
            '[{"name": "a", "kind": "operator", "measured": "b", "seconds": {"pyfused": true}}]',
            "row 0: expected seconds['pyfused'] to be a number from 0 on, got True",
        ),
        (
            '[{"name": "a", "kind": "machine", "measured": "copy", "seconds": {"copy": 1}}]',
            "row 0: expected facts['flops'] to be a number, got None",
        ),
        (
            '[{"name": "a", "kind": "traffic", "measured": "b", "facts": {"read_bytes": "many"}}]',
            "row 0: expected facts['read_bytes'] to be a number, got 'many'",
        ),
        ('[{"name": "a\\u0000b", "kind": "operator", "measured": "b"}]', "row 0: expected name to be printable text"),
        ("[" * 100_000, "no JSON"),
    ],
)
@pytest.mark.parametrize("named", ["directory", "file"])
def test_what_is_no_record_is_named(text, message, named, tmp_path, capsys):
    file = tmp_path / "rows.json"
    if text is not None:
        file.write_text(text)
    given = file if named == "file" else tmp_path
    assert cli.main(["report", str(given), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pyfused report: {given if text is None else file}: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_the_output_is_a_directory(tmp_path, capsys):
    directory = _written([_row("mine")], tmp_path)
    assert cli.main(["report", str(directory), "--output", str(directory / "rows.json")]) == 2
    assert f"--output must be a directory, got {str(directory / 'rows.json')!r}" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("seconds", 0.0), ("seconds", 1e308), ("ratios", float("nan"))])
def test_what_is_no_time_is_shown_as_none(value, name, tmp_path, capsys):
    numbers = {name: {"pyfused": 0.01, "eager": value}}
    rows = [*_machine(), _row("mine"), _row("lora_linear 1x1->1 r1 float32", **numbers)]
    directory = _written(rows, tmp_path)
    assert cli.main(["report", str(directory)]) == 0
    page = (directory / "report" / "index.html").read_text()
    assert f"its {name} were recorded as {value}" in page


@pytest.mark.parametrize("name", ["costs $5 and $x^", "lora_linear $\\frac", "a_very_long_name " * 300, "<b>&amp;"])
def test_any_name_is_drawn(name, tmp_path, capsys):
    directory = _written(
        [*_machine(), _row(name), _row(name, kind="training", loss={"pyfused": [1.0, float("nan")]})], tmp_path
    )
    assert cli.main(["report", str(directory)]) == 0
    drawn = [path for path in (directory / "report").glob("*.png") if path.stat().st_size > 0]
    assert len(drawn) == 3


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    directory = _written([*_machine(), _row("mine")], tmp_path)
    assert cli.main(["report", str(directory)]) == 0
    before = {file.name: file.read_bytes() for file in (directory / "report").iterdir()}
    written = Path.write_text

    def full(path, text, **options):
        if "index.html" in path.name:
            written(path, text[:100], **options)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    capsys.readouterr()
    assert cli.main(["report", str(directory)]) == 2
    page = directory / "report" / "index.html"
    assert capsys.readouterr().err == f"pyfused report: {page}: No space left on device\n"
    after = {file.name: file.read_bytes() for file in (directory / "report").iterdir()}
    assert after.keys() == before.keys()
    assert after["index.html"] == before["index.html"]


def test_a_report_needs_its_packages(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jinja2" else object())
    assert cli.main(["report", str(OLD_RECORD)]) == 2
    assert 'pyfused report needs jinja2; pip install "pyfused[bench]"' in capsys.readouterr().err


def test_rows_come_back_as_they_were_written(tmp_path):
    found = _rows()
    record = records.load(_written(found, tmp_path / "2026"))
    assert record.rows == found
    assert records.load(record.path) == record
    assert record.name == "a CPU, 2026"


# ---- what rows compute, and what their machine can


def test_operator_rows_record_their_work():
    from pyfused.bench.run import test_operators as operator_rows

    case = LoRACase(5, 16, 8, rank=2)
    contenders = types.SimpleNamespace(unavailable={})
    nothing = {name: lambda *_: {} for name in ("calls", "peak_bytes", "saved_bytes")}
    prepared = types.SimpleNamespace(case=case, device=CPU, deviations=[], contenders=contenders, **nothing)
    for measured, products in (("forward", 1), ("forward+backward", 2)):
        given = {}
        operator_rows._row(prepared, lambda *a, given=given, **options: given.update(options), False, measured)
        narrow = 2 * 5 * 2 * (16 + 8)
        assert given["facts"]["flops"] == products * 2 * 5 * 16 * 8 + (1 if products == 1 else 3) * narrow
        assert given["facts"]["bytes"] == case.work()[measured].nbytes
        assert given["facts"]["floor_seconds"] is None
    x, y, p, parameters = 5 * 16, 5 * 8, 5 * 2, 8 * 16 + 2 * (16 + 8)
    assert case.work()["forward"].nbytes == 4 * (x + y + p + parameters)
    assert case.work()["forward+backward"] == sum(case.passes()[1:], case.passes()[0])


def test_machine_rows_measure_a_product_and_a_copy(monkeypatch, tmp_path):
    pytest.importorskip("pytest_benchmark")
    from pyfused.bench.run import test_machine as machine_rows
    from pyfused.bench.run.session import Session, Settings

    monkeypatch.setitem(machine_rows.SIDE, "cpu", 24)
    monkeypatch.setitem(machine_rows.COPIED, "cpu", 1 << 20)
    found = []
    session = Session(Settings(CPU, tmp_path))

    def compare(name, calls, **row):
        results = [call() for (call,) in calls.values()]
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4)
        found.append((name, list(calls), results[0], row))

    machine_rows.test_matrix_product(torch.float32, compare, session)
    machine_rows.test_copy(compare, session)
    (name, calls, _, product), (copied, _, target, facts) = found
    assert (name, copied) == ("matrix product 24x24x24 float32", "copy 1 MiB")
    assert calls == ["torch.mm", "oneDNN"][: 1 + torch.backends.mkldnn.is_available()]
    assert product["facts"] == {"dtype": "float32", "flops": 2 * 24**3, "bytes": 3 * 24 * 24 * 4}
    assert facts["facts"] == {"flops": 0, "bytes": 2 << 20}
    assert target.eq(1).all()
    assert product["kind"] == facts["kind"] == "machine"


def test_limits_are_those_of_the_faster_library():
    limits = _record(_machine(gflops=100.0)).limits()
    assert limits.flops == {"float32": pytest.approx(100e9)}
    assert limits.bandwidth == pytest.approx(2e10)
    assert _record(_machine()[:1]).limits() is None
    assert _record(_machine()[1:]).limits() is None


def test_a_roofline_is_left_out_with_the_reason():
    limits = _record(_rows()).limits()
    timed = [row for row in _rows() if row.name == CASES[0].name]
    assert rates.missing(timed, limits) is None
    assert "has no machine rows" in rates.missing(timed, None)
    assert "no matrix product in float32" in rates.missing(timed, dataclasses.replace(limits, flops={"float16": 1.0}))
    assert rates.missing([_row("lora_linear", seconds={})], limits) == "no row has a time of pyfused or of eager"
    for row in timed:
        del row.facts["flops"]
    assert "do not say how much they compute" in rates.missing(timed, limits)


def test_a_committed_record_of_old_is_shown_without_what_it_lacks():
    record = records.load(OLD_RECORD)
    for title, own in sentences.groups(record.rows).items():
        section = page._section(title, own, record)
        wanted = title in ("Models", "Training runs")
        assert wanted != any("do not say how much they compute and move" in note for note in section.notes)
        assert not any("roofline" in picture.name for picture in section.pictures)


# ---- two records


def test_records_are_paired_by_name_measured_and_mode():
    old = [_row("a"), _row("a", measured="forward+backward"), _row("gone"), _row("twice"), _row("twice")]
    new = [
        _row("new"),
        _row("twice", seconds={"pyfused": 1.0}),
        _row("twice"),
        _row("a"),
        _row("a", mode="graph replay"),
    ]
    found = records.compare(_record(old), _record(new))
    assert [(pair.old, pair.new) for pair in found.pairs] == [(old[3], new[1]), (old[4], new[2]), (old[0], new[3])]
    assert found.only_old == [old[1], old[2]]
    assert found.only_new == [new[0], new[4]]
    assert found.pairs[0].change("seconds") == {"pyfused": 100.0}


@pytest.mark.parametrize(
    ("fields", "worse", "better"),
    [
        ({"seconds": 1.10}, [("time of pyfused", "1.100")], []),
        ({"seconds": 1.05}, [("time of pyfused", "1.050")], []),
        ({"seconds": 1.049}, [], []),
        ({"seconds": 0.90}, [], [("time of pyfused", "0.900")]),
        ({"ratios": 0.90}, [("lead over plain PyTorch", "0.900")], []),
        ({"ratios": 1.10}, [], [("lead over plain PyTorch", "1.100")]),
        ({"peak_bytes": 1.5, "saved_bytes": 0.5}, [("peak memory of pyfused", "1.500")],
         [("saved memory of pyfused", "0.500")]),
    ],
)  # fmt: skip
def test_a_known_change_of_one_row_is_found(fields, worse, better):
    old = [row for row in _rows() if row.name != CASES[1].name or row.measured != "forward"]
    new = _changed(old, CASES[1].name, **fields)
    comparison = records.compare(_record(old), _record(new))
    where = (CASES[1].name, "forward+backward")
    assert tables.judged(comparison, "worse") == [(*where, *change) for change in worse]
    assert tables.judged(comparison, "better") == [(*where, *change) for change in better]
    marked = [
        cell.verdict
        for content in page._compared(_record(old), _record(new)).tables
        for *_, cells in content.lines
        for cell in cells
        if cell.verdict
    ]
    assert sorted(marked) == ["better"] * len(better) + ["worse"] * len(worse)


def test_a_slower_baseline_is_no_regression():
    old = [_row("a")]
    new = [_row("a", seconds={"pyfused": 0.010, "eager": 0.024})]
    comparison = records.compare(_record(old), _record(new))
    assert tables.judged(comparison, "worse") == []
    (table,) = page._compared(_record(old), _record(new)).tables
    assert table.lines == [("a", "forward", [tables.Cell("1.000"), tables.Cell("2.000"), tables.Cell("1.000")])]


def test_other_backends_and_the_machine_are_not_judged_by_their_lead():
    """A faster Triton backend is no loss of the automatic choice's, a slower machine no loss of pyfused's."""
    both = {"pyfused": 0.010, "pyfused triton": 0.020}
    faster = both | {"pyfused triton": 0.010}
    old = [_row("a", seconds=both, ratios={"pyfused triton": 2.0}), *_machine(100.0)]
    new = [_row("a", seconds=faster, ratios={"pyfused triton": 1.0}), *_machine(50.0)]
    comparison = records.compare(_record(old), _record(new))
    assert len(comparison.pairs) == 3
    assert tables.judged(comparison, "worse") == []
    assert tables.judged(comparison, "better") == [("a", "forward", "time of pyfused triton", "0.500")]


@pytest.mark.parametrize("change", [{"device": "another CPU"}, {"threads": 4}])
def test_between_machines_nothing_is_judged(change):
    old = _rows()
    new = _changed(old, CASES[1].name, seconds=3.0)
    for row in new:
        row.provenance = WHERE | change
    comparison = records.compare(_record(old), _record(new))
    assert list(comparison.differences) == list(change)
    assert tables.judged(comparison, "worse") == tables.judged(comparison, "better") == []
    text = page.render([_record(old, Path("old")), _record(new)], [])
    assert "Not the same machine." in text
    assert "old is of another machine: nothing is judged against it." in text
    assert 'class="worse"' not in text.partition('id="targets"')[0]
    same = page.render([_record(old, Path("old")), _record(old)], [])
    assert "Not the same machine." not in same
    assert "Against old, by 5 % or more: 0 figures worse, 0 better." in same


def test_a_row_that_failed_in_one_record_has_no_change():
    failed = _row("a", seconds={}, ratios={}, passed=False)
    assert records.Pair(_row("a"), failed).change("seconds") == {}
    assert records.Pair(failed, _row("a")).change("ratios") == {}


# ---- figures


def test_contenders_look_the_same_in_every_figure_and_differ():
    known = [style.look(name) for name in style._CONTENDERS]
    assert len({colour for colour, _ in known}) == len(known)
    own = style.look("my kernel")
    assert own == style.look("my kernel")
    assert own[0] not in {colour for colour, _ in known}
    timed = [row for row in _rows() if row.kind == "operator" and row.seconds]
    limits = _record(_rows()).limits()
    colour = style.look("eager")[0]
    for picture in (
        figures.summary(timed), figures.bars(timed, "a"), figures.memory(timed, "b"),
        rates.roofline(timed, limits, "c"), rates.scaling(timed, limits, "d"),
    ):  # fmt: skip
        assert colour in picture.svg(), picture.name
        classes: dict[str, str] = {}
        assert picture.inline(classes).startswith("<svg ")
        assert any(colour in css for css in classes), picture.name


def test_a_figure_inside_the_page_says_the_same_in_less():
    name = "lora_linear 0.12345 <i> & $x$ font-family: none;"
    picture = figures.bars([_row(name, ratios={"eager": 1.5}), _row("lora_linear b", ratios={"PEFT": 0.9})], "a-name")
    classes: dict[str, str] = {}
    inline = picture.inline(classes)
    whole, short = (xml.etree.ElementTree.fromstring(text) for text in (picture.svg(), inline))
    written = [
        ["".join(element.itertext()) for element in tree.iter() if element.tag.endswith("text")]
        for tree in (whole, short)
    ]
    assert written[0] == written[1]
    assert {name.partition(" ")[2], "1.50x", "0.90x", "plain PyTorch", "PEFT"} <= set(written[1])
    assert len(inline) < 0.3 * len(picture.svg())
    assert "style=" not in inline
    assert set(re.findall(r'class="([^"]+)"', inline)) == set(classes.values())
    # Of a second figure the same look has the same class.
    assert picture.inline(classes) == inline
    # Names of parts, such as clips, are the figure's own: a page holds many.
    ids = [set(re.findall(r' id="([^"]+)"', dataclasses.replace(picture, name=each).inline({}))) for each in ("a", "b")]
    assert ids[0]
    assert not ids[0] & ids[1]
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', inline))
    assert used <= set(re.findall(r' id="([^"]+)"', inline))


def test_the_bars_of_a_row_carry_its_names_and_numbers():
    """Three rows, of which two have one name in a figure; bars on both sides of 1x."""
    given = [
        _row("lora_linear a float32", facts={"dtype": "float32"}, ratios={"eager": 1.2, "PEFT": 0.5, BASE: 0.9}),
        _row("lora_linear a bfloat16", facts={"dtype": "bfloat16"}, ratios={"eager": 1.0, "pyfused triton": 2.0}),
        _row("lora_linear b", ratios={"eager": 1.3}, measured="forward+backward"),
    ]
    picture = figures.bars(given, "bars")
    left, right = picture.figure.axes
    assert [bar.get_width() for bar in left.patches] == pytest.approx([0.2, -0.5, 0.0])
    assert [text.get_text() for text in left.get_yticklabels()] == ["plain PyTorch", "PEFT", "plain PyTorch"]
    assert [text.get_text() for text in left.texts] == ["a", "a", "1.20x", "0.50x", "1.00x"]
    assert [text.get_text() for text in right.texts] == ["b", "1.30x"]
    # Bars of one length are one ratio.
    assert left.get_xlim() == right.get_xlim()
    assert picture.figure.legends == []
    assert figures.bars([_row("a", ratios={BASE: 0.9, "pyfused cuda": 1.1})], "bars") is None


def test_labels_of_a_crowded_roofline_do_not_overlap():
    """Twelve shapes of nearly one intensity and speed."""
    crowded = []
    for index in range(12):
        facts = {"dtype": "float32", "flops": 10**9 + index * 10**6, "bytes": 10**8}
        seconds = {"pyfused": 0.020 + index * 1e-5, "eager": 0.021}
        crowded.append(_row(f"lora_linear {index}x8", facts=facts, seconds=seconds))
    picture = rates.roofline(crowded, records.Limits({"float32": 1e11}, 2e10), "crowded")
    picture.figure.draw_without_rendering()
    (axes,) = picture.figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 12
    for index, box in enumerate(boxes):
        assert box.count_overlaps(boxes[index + 1 :]) == 0
        assert axes.get_window_extent().count_contains([box.min, box.max]) == 2
    numbers = [text.get_text() for text in axes.texts]
    (_, key) = picture.figure.legends
    assert [text.get_text() for text in key.get_texts()] == [f"{number}: {int(number) - 1}x8" for number in numbers]


def test_a_roofline_shows_the_rate_of_the_least_work():
    (row,) = [row for row in _rows() if row.name == CASES[0].name and row.measured == "forward"]
    picture = rates.roofline([row], records.Limits({"float32": 1e11}, 2e10), "one")
    (axes,) = picture.figure.axes
    points = {line.get_color(): line.get_xydata()[0] for line in axes.get_lines() if len(line.get_xdata()) == 1}
    work = CASES[0].work()["forward"]
    for name, speed in (("pyfused", 80e9), ("eager", 80e9 / 1.2)):
        assert points[style.look(name)[0]] == pytest.approx((work.flops / work.nbytes, speed))
    roof = max((line for line in axes.get_lines()), key=lambda line: len(line.get_xdata()))
    assert roof.get_ydata().max() == 1e11
    assert roof.get_ydata()[0] == pytest.approx(roof.get_xdata()[0] * 2e10)


def test_graph_replay_shares_the_memory_of_eager_launches():
    peak = {"pyfused": 2 << 20, "eager": 3 << 20}
    both = [_row("lora_linear a", mode=mode, peak_bytes=peak) for mode in ("eager launches", "graph replay")]
    picture = figures.memory(both, "memory")
    (axes,) = picture.figure.axes
    assert [patch.get_width() for patch in axes.patches] == [2.0, 3.0]
    assert figures.memory([_row("a")], "memory") is None


# ---- sentences


def test_sentences_of_an_operator():
    """Ratios above, at and below 1, a baseline that one row lacks, and a row that failed."""
    both = {"measured": "forward+backward"}
    peaks = {"peak_bytes": {"pyfused": 3 << 20, "eager": 4 << 20, "PEFT": 2 << 20, BASE: 1}}
    given = [
        _row("lora_linear a", ratios={"eager": 1.5, "PEFT": 0.95, BASE: 0.8, "pyfused triton": 0.1}, **both, **peaks),
        _row("lora_linear b", ratios={"eager": 0.8, "PEFT": 0.7}, **both),
        _row(
            "lora_linear c", ratios={"eager": 0.996}, unavailable={"PEFT": "no PEFT", "pyfused cuda": "no GPU"}, **both
        ),
        _row("lora_linear a", ratios={"eager": 1.25}),
        _failed("lora_linear d"),
    ]
    found = sentences.finding("lora_linear", given)
    assert found.said == [
        "Forward and backward, 3 rows: pyfused is 0.80x to 1.50x as fast as plain PyTorch and 0.70x to 0.95x as fast "
        "as PEFT (in 2 of 3).",
        "Forward alone, 1 row: pyfused is 1.25x as fast as plain PyTorch.",
        "At its peak pyfused holds 0.75x the memory of plain PyTorch and 1.50x the memory of PEFT.",
        "PEFT was not measured in 1 of 5 rows: no PEFT.",
    ]
    assert found.lists == {
        "Slower than a baseline, 2 of 4 rows": [
            "b, forward+backward: 0.80x as fast as plain PyTorch and 0.70x as fast as PEFT",
            "a, forward+backward: 0.95x as fast as PEFT",
        ],
        "More memory than a baseline, 1 of 1 row": ["a, forward+backward: 1.50x the memory of PEFT"],
    }
    assert found.failed == ["lora_linear d, forward: dx, maximum: error 0.5, limit 1e-06"]
    (why,) = found.why
    assert "oneDNN" in why


def _failed(name: str) -> Row:
    wrong = {"tensor": "dx", "norm": "maximum", "error": 0.5, "plain": 1e-7, "limit": 1e-6}
    return _row(name, seconds={}, ratios={}, passed=False, parity=[wrong])


def test_nothing_slower_is_said_too():
    found = sentences.finding("mine", [_row("mine", ratios={"eager": 1.0})])
    assert found.said == [
        "Forward alone, 1 row: pyfused is 1.00x as fast as plain PyTorch.",
        "No row is slower than a baseline.",
    ]
    assert found.lists == {}
    assert found.why == []


@pytest.mark.parametrize("row", [_failed("lora_linear a"), _row("lora_linear a", ratios={BASE: 0.9})])
def test_rows_without_a_baseline_are_said_to_have_none(row):
    found = sentences.finding("lora_linear", [row])
    assert found.said == ["No row has the times of pyfused and of a baseline."]
    assert found.why == []


def test_sentences_of_a_gpu_give_no_reason_of_a_cpu():
    """Eager launches and graph replay apart; the memory of a call is counted once."""
    where = WHERE | {"capability": "9.0"}
    peaks = {"peak_bytes": {"pyfused": 4 << 20, "eager": 2 << 20}}
    given = [
        _row("lora_linear a", mode=mode, ratios={"eager": ratio}, provenance=where, **peaks)
        for mode, ratio in (("eager launches", 0.5), ("graph replay", 2.0))
    ]
    found = sentences.finding("lora_linear", given)
    assert found.said == [
        "Forward alone, eager launches, 1 row: pyfused is 0.50x as fast as plain PyTorch.",
        "Forward alone, graph replay, 1 row: pyfused is 2.00x as fast as plain PyTorch.",
        "At its peak pyfused holds 2.00x the memory of plain PyTorch.",
    ]
    assert found.lists == {
        "Slower than a baseline, 1 of 2 rows": ["a, forward, eager launches: 0.50x as fast as plain PyTorch"],
        "More memory than a baseline, 1 of 1 row": ["a, forward, eager launches: 2.00x the memory of plain PyTorch"],
    }
    assert found.why == []
    (always,) = sentences.finding("cross_attention_residual", given).why
    assert "short context" in always
    assert "CPU" not in always


def test_sentences_of_the_host_are_about_time_that_it_takes():
    given = [
        _row(
            f"overhead {name} 16x64, portable", "overhead", mode="host time", seconds={"pyfused": seconds},
            ratios=ratios,
        )
        for name, seconds, ratios in (("adapter", 1e-4, {"eager": 2.0}), ("lora", 2e-4, {"eager": 0.5, "PEFT": 0.8}))
    ]  # fmt: skip
    found = sentences.finding("Host overhead", given)
    assert found.said == [
        "Forward alone, 2 small calls: pyfused takes the host 100.0 us to 200.0 us, 0.50x to 2.00x the time of plain "
        "PyTorch and 1.25x the time of PEFT (in 1 of 2)."
    ]
    assert found.lists == {
        "Longer than a baseline, 1 of 2 rows": [
            "lora 16x64, portable, forward: 2.00x the time of plain PyTorch and 1.25x the time of PEFT"
        ]
    }


def test_sentences_of_models_and_training():
    """The plain formula is called eager in one row and reference in another."""
    given = [_row("a", "model", "training step"), _row("b", "model", "training step", ratios={"reference": 0.9})]
    assert sentences.finding("Models", given).said == [
        "A training step, 2 rows: pyfused is 0.90x to 1.20x as fast as plain PyTorch."
    ]
    losses = {"pyfused": [2.0, 1.0, 0.5], "eager": [2.0, 1.0, 0.625], "PEFT": [2.0, 1.0, 0.5]}
    run = sentences.finding("Training runs", [_row("digits", "training", "training step", loss=losses)])
    assert run.said[-1] == (
        "digits: the loss goes from 2.000 to 0.500; it parts from that of plain PyTorch by at most 1.2e-01 and from "
        "that of PEFT by nothing."
    )


def test_the_first_sentences_count():
    """A record of few rows, and one of which nothing can be said."""
    parity = [{"tensor": "y", "norm": "maximum", "error": 1e-7, "plain": 1e-7, "limit": 1e-6}]
    given = [
        _row("a", ratios={"eager": 1.5, "PEFT": 1.1}, parity=parity), _row("b", ratios={"eager": 1.5, "PEFT": 0.9}),
        _row("c", ratios={"eager": 1.002}), _row("c", ratios={"eager": 1.1}), _failed("d"),
        _row("overhead e", "overhead", ratios={"eager": 0.1}),
    ]  # fmt: skip
    first, explained, held, failed = sentences.lead(_record(given), [])
    assert first == (
        "On a CPU with 2 threads, of 4 rows of operators and models pyfused is faster than every baseline in 2, as "
        "fast as the fastest baseline in 1 and slower than a baseline in 1."
    )
    assert "1.20 times as long" in explained
    assert held == "Against float64 the errors of 1 row are within their limits."
    assert failed == "The errors of 1 row are not; such a row has no times."
    assert sentences.lead(_record([_row("a", provenance={})]), [])[0].startswith(
        "On an unknown device, of 1 row of operators and models pyfused is faster than every baseline in 1."
    )
    assert sentences.lead(_record(_machine()), []) == []


def test_every_reason_is_of_something_that_is_measured():
    from pyfused.bench.cases.operators import OPERATORS

    assert sentences._WHY.keys() == {*OPERATORS, "Models", "Training runs", "Host overhead"}
    # Figures come from records.
    assert [
        said for reasons in sentences._WHY.values() for said in reasons if re.search(r"\dx\b|\d ?(%|ms)", said)
    ] == []


def test_captions_hold_numbers_of_their_rows():
    given = [row for row in _rows() if row.kind == "operator"]
    said = captions.of_ratios("lora_linear", given)
    assert f"from 0.90x (plain PyTorch, {style.short_name(given[0])}, forward)" in said
    assert f"to 1.20x (plain PyTorch, {style.short_name(given[2])}, forward)" in said
    assert "from 2.00 MiB" in captions.of_memory("lora_linear", given)
    limits = _record(_rows()).limits()
    shares = rates.shares([row for row in given if row.seconds], limits)
    assert shares == {"pyfused": pytest.approx((0.8, 0.8)), "eager": pytest.approx((0.8 / 1.2, 0.8 / 1.2))}
    assert "pyfused 80 % to 80 % and plain PyTorch 67 % to 67 %" in captions.of_roofline("lora_linear", shares)
    assert "500000.00 of its limit (<b>wrong</b> & more, forward)" in captions.of_parity("lora_linear", given)


# ---- the page


class _Page(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The page of two small records, by the command."""
    home = tmp_path_factory.mktemp("report")
    old = _written(_changed(_rows(), CASES[1].name, seconds=0.8), home / "2026-01-01")
    new = _written(_rows(), home / "2026-01-02")
    assert cli.main(["report", str(old), str(new / "rows.json")]) == 0
    return new / "report" / "index.html"


def test_the_page_holds_everything(report):
    text = report.read_text()
    found = _Page(text)
    assert found.open == []
    assert "http" not in text
    assert all(len(image["aria-label"]) > 20 for image in found.all("svg"))
    assert all(cell.get("scope") for cell in found.all("th"))
    identifiers = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    links = {link["href"] for link in found.all("a")}
    assert links <= {f"#{name}" for name in identifiers}
    assert {"#lora-linear", "#models", "#comparison-1", "#dram-traffic", "#targets", "#provenance"} <= links
    drawn = {path.stem for path in report.parent.glob("*.png")}
    assert drawn == {
        "curves", "models-ratios", "training-runs-ratios",
        *(f"lora-linear-{name}" for name in ("roofline", "scaling", "ratios", "memory")),
    }  # fmt: skip
    assert len(found.all("svg")) == len(drawn)
    for said in (
        "lora_linear &lt;b&gt;wrong&lt;/b&gt; &amp; more, forward: dx, maximum: error 0.5, limit 1e-06",
        "torch.compile, in 6 rows: no compiler",
        "plain formulas",
        "100.0 GFLOP/s by oneDNN",
        "lora_linear, forward: 2.00 times the 2.0 MB that it must move: 3.0 MB read, 1.0 MB written, 2 kernels.",
        "Against 2026-01-01, by 5 % or more: 2 figures worse, 0 better.",
        "Worse: 2",
        'better">met<',
        'worse">not met<',
    ):
        assert said in text, said
    assert text.count('class="worse">1.250') == 4


def test_the_page_begins_with_sentences_and_ends_with_provenance(report):
    text = report.read_text()
    body = text[text.index("<main>") :]
    order = re.findall(r'<section id="([^"]+)"', body)
    assert order == [
        "summary", "comparison-1", "lora-linear", "models", "training-runs", "dram-traffic", "targets", "provenance"
    ]  # fmt: skip
    summary = body[: body.index("</section>")]
    assert "<svg" not in summary
    assert "<table" not in summary
    assert "pyfused is 0.90x to 1.20x as fast as plain PyTorch." in summary
    assert (
        f"{CASES[0].name.partition(' ')[2].replace('->', '-&gt;')}, forward: 0.90x as fast as plain PyTorch" in summary
    )


def test_one_plot_a_section_is_open_and_each_caption_is_its_own(report):
    text = report.read_text()
    captions_found = re.findall(r"<figcaption>(.*?)</figcaption>", text, re.DOTALL)
    assert len(set(captions_found)) == len(captions_found) == 11
    shown = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    sections = re.findall(r'<section id="([^"]+)">(.*?)</section>', shown, re.DOTALL)
    assert {name: part.count("<svg") for name, part in sections if "<svg" in part} == {
        "lora-linear": 1, "models": 1, "training-runs": 1
    }  # fmt: skip
    titles = re.findall(r"<summary>(.*?)</summary>", text)
    assert titles[:6] == ["Every row in both", "All numbers", "Memory", "Roofline", "Time against size", "Parity"]
    assert "Loss curves" in titles
    assert "Developers' targets" in titles[-1].replace("&#39;", "'")


def test_targets_are_for_those_who_have_a_checkout():
    with_targets = page.render([_record(_rows())], [])
    assert "targets" in with_targets
    installed = _rows()
    for row in installed:
        row.provenance = WHERE | {"commit": None}
    assert "targets" not in page.render([_record(installed)], [])


@pytest.fixture(scope="module")
def committed(tmp_path_factory) -> Path:
    """The page of the newest committed record."""
    newest = document.committed_records()[-1] if (ROOT / ".git").exists() else None
    if newest is None:
        pytest.skip("which records are committed is known in a git checkout only")
    out = tmp_path_factory.mktemp("committed")
    assert cli.main(["report", str(newest), "--output", str(out)]) == 0
    return out / "index.html"


def test_a_whole_record_makes_a_small_page(committed):
    assert committed.stat().st_size < 500_000
    text = committed.read_text()
    for operator in sentences._WHY:
        assert f">{operator}</a></dt>" in text


def test_one_record_is_compared_with_nothing(tmp_path, capsys):
    directory = _written([_row("mine")], tmp_path / "2026")
    assert cli.main(["report", str(directory), "--output", str(tmp_path / "out")]) == 0
    assert f"written: {tmp_path / 'out' / 'index.html'}" in capsys.readouterr().out
    text = (tmp_path / "out" / "index.html").read_text()
    assert "comparison-1" not in text
    assert "No roofline, and no figure of time against size: this record" in text


# ---- the page in a browser


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    if browser.find() is None:
        pytest.skip(f"needs a browser: none of {', '.join(browser.NAMES)} is on PATH")
    with browser.Browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


def _faults(shown: browser.Browser, address: str) -> list[str]:
    """What is wrong with the page that is shown, and with what a reader opens in it."""
    shown.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    found = [f"console: {text}" for text in shown.said]
    found += [f"asks for {url}" for url in shown.requested if url != address and not url.startswith("data:")]
    broken = "[...document.images].filter(i => !(i.naturalWidth * i.naturalHeight * i.width * i.height))"
    found += [f"no image: {alt}" for alt in shown.evaluate(f"{broken}.map(i => i.alt)")]
    empty = "[...document.querySelectorAll('svg')].filter(s => !(s.clientWidth * s.getBBox().width))"
    found += [f"no figure: {label}" for label in shown.evaluate(f"{empty}.map(s => s.ariaLabel)")]
    widths = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    needed, there = shown.evaluate(widths)
    found += [f"{needed} px wide in a window of {there}"] if needed > there else []
    # What is wider than the window must be in something that scrolls.
    clipped = (
        "[...document.querySelectorAll('table, svg')].filter(e => e.getBoundingClientRect().right > innerWidth"
        " && getComputedStyle(e.closest('.scroll') ?? document.body).overflowX != 'auto')"
    )
    return found + [f"clipped: {tag}" for tag in shown.evaluate(f"{clipped}.map(e => e.tagName)")]


# Pairs of texts of one figure that lie on one another, in the reader's own font.
_OVERLAPS = """
[...document.querySelectorAll('section > figure svg')].flatMap(figure => {
  const texts = [...figure.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
  const both = (r, s, low, high) => Math.min(r[high], s[high]) - Math.max(r[low], s[low]);
  return texts.flatMap(([a, r], i) => texts.slice(i + 1).filter(
    ([b, s]) => both(r, s, "left", "right") > 1 && both(r, s, "top", "bottom") > 1
  ).map(([b]) => `${a} on ${b}`));
})
"""


def test_no_text_of_a_plot_lies_on_another(shown, committed):
    shown.open(committed.as_uri(), 1280)
    assert shown.evaluate("document.querySelectorAll('section > figure svg').length") == 7
    assert shown.evaluate("document.querySelectorAll('section > figure svg text').length") > 200
    assert shown.evaluate(_OVERLAPS) == []
    assert _faults(shown, committed.as_uri()) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page(shown, report, width, dark, tmp_path):
    image = pytest.importorskip("PIL.Image")
    shown.open(report.as_uri(), width, dark)
    assert shown.evaluate("document.querySelectorAll('svg').length") == 7
    assert _faults(shown, report.as_uri()) == []
    # Text is as dark as its background is light, or the other way round, in the page and in its figures.
    page_colour, ink = shown.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (_lightness(page_colour) < 60) == (_lightness(ink) > 200) == dark
    assert (_lightness(page_colour) > 200) == (_lightness(ink) < 60) == (not dark)
    letters = "[...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fill)"
    assert {_lightness(colour) > 200 for colour in shown.evaluate(letters)} == {dark}
    shown.evaluate("document.querySelector('#lora-linear svg[aria-label^=\"Roofline\"]').scrollIntoView()")
    seen = image.open(shown.screenshot(tmp_path / "page.png", whole=False)).convert("RGB")
    assert seen.width == width
    colours = {colour: count for count, colour in seen.getcolors(1 << 24)}
    for wanted in (style.look("pyfused")[0], style.look("eager")[0], style._DARK[style.INK] if dark else style.INK):
        near = sum(count for colour, count in colours.items() if _distance(colour, wanted) < 12)
        assert near > 50, wanted


def _lightness(colour: str) -> float:
    return sum(map(float, re.findall(r"\d+", colour)[:3])) / 3


def _distance(colour: tuple[int, int, int], wanted: str) -> int:
    return max(abs(part - int(wanted[at : at + 2], 16)) for part, at in zip(colour, (1, 3, 5), strict=True))


def test_the_browser_sees_what_is_wrong(shown, tmp_path):
    """That the checks above can fail."""
    head = '<!DOCTYPE html><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
    bad = tmp_path / "bad.html"
    bad.write_text(
        f'{head}<img alt="gone" src="data:image/png;base64,AAAA">'
        '<img alt="outside" src="other.png"><table style="width: 2000px"><tr><td>wide</table>'
        '<details><svg aria-label="blank"></svg></details>'
        '<script>console.error("trouble"); throw new Error("stop")</script>'
    )
    shown.open(bad.as_uri(), 390)
    text = "\n".join(_faults(shown, bad.as_uri()))
    for wanted in ("console: trouble", "console: Uncaught", "other.png", "no image: gone", "no image: outside", "390",
                   "no figure: blank", "clipped: TABLE"):  # fmt: skip
        assert wanted in text
    blank = tmp_path / "blank.html"
    blank.write_text(f"{head}<p>nothing")
    shown.open(blank.as_uri(), 390)
    assert _faults(shown, blank.as_uri()) == []
