"""DRAM bytes by Nsight Compute, for which a script stands."""

from __future__ import annotations

import re

import pytest
import torch
from processes import script

from pyfused.bench.cases import operators
from pyfused.bench.gpu import schedule
from pyfused.bench.gpu.programs import traffic
from pyfused.bench.record import rows

CPU = torch.device("cpu")


_HEAD = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
)
_HEAD += '"CC","dram__bytes_read.sum","dram__bytes_write.sum"'
_FLUSH = "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<int, at::native::MaxNanFunctor<int>>>(T3)"


def _table(*launches: tuple[str, str, str], units: tuple[str, str] = ("byte", "byte")) -> str:
    lines = ["==PROF== Connected to process 4242 (/usr/bin/python3.12)", _HEAD]
    lines.append('"","","","","","","","","","","","{}","{}"'.format(*units))
    for number, (name, read, written) in enumerate(launches):
        lines.append(
            f'"{number}","4242","python3.12","127.0.0.1","{name}","1","7","(512, 1, 1)","(264, 1, 1)","0","9.0",'
            f'"{read}","{written}"'
        )
    return "\n".join([*lines, "==PROF== Disconnected from process 4242", ""])


def test_the_table_of_ncu_is_read():
    text = _table(("_lora_gemm_kernel", "1,234,567", "89.00"), ("pyfused::rows_kernel<64, true>(Adapter)", "0", "5"))
    assert traffic.kernels_of(text) == [
        traffic.Kernel("_lora_gemm_kernel", 1_234_567, 89),
        traffic.Kernel("pyfused::rows_kernel<64, true>(Adapter)", 0, 5),
    ]
    (scaled,) = traffic.kernels_of(_table(("one", "1.50", "2,000.25"), units=("Mbyte", "Kbyte")))
    assert (scaled.read, scaled.written) == (1_500_000, 2_000_250)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("==WARNING== No kernels were profiled.\n", "ncu printed no table"),
        (_table(), "ncu printed no table"),
        (_table(("one", "1", "2")).replace("dram__bytes_write", "dram__sectors"), "ncu printed no table"),
        (_table(("one", "1", "2"), units=("byte", "sector")), "must be in one of .* got 'sector'"),
        (_table(("one", "n/a", "2")), "could not convert"),
    ],
)
def test_a_table_that_says_nothing_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        traffic.kernels_of(text)


def test_bytes_are_summed_over_the_kernels_of_each_call():
    launches = [(_FLUSH, 9000, 7), ("one", 100, 10), ("two", 200, 20), (_FLUSH, 9000, 5)]
    launches += [(_FLUSH, 9000, 0), ("three", 300, 30), (_FLUSH, 9000, 1)]
    kernels = [traffic.Kernel(*launch) for launch in launches]
    assert traffic.by_call(kernels, 2) == [
        {"kernels": 2, "read_bytes": 300, "written_bytes": 35},
        {"kernels": 1, "read_bytes": 300, "written_bytes": 31},
    ]
    with pytest.raises(ValueError, match="two flushes for each of 3 calls, got 4"):
        traffic.by_call(kernels, 3)


def test_one_case_of_each_operator_is_larger_than_the_cache():
    cases = traffic.measured_cases(CPU, 1 << 20)
    assert [case.operator for case in cases] == list(operators.OPERATORS)
    first = [module.timed_cases(CPU)[0] for module in operators.OPERATORS.values()]
    assert cases == first
    assert traffic.measured_cases(CPU, 1 << 40) != first


_NCU = """
import json, sys
assert sys.argv[sys.argv.index("--clock-control") + 1] == "none", sys.argv
calls = [{{"name": "a call", "measured": "forward", "facts": {{"dtype": "bfloat16", "bytes": 1000}}}}]
open(sys.argv[sys.argv.index("--calls") + 1], "w").write(json.dumps(calls))
print({table!r})
sys.exit({status})
"""


def test_rows_of_bytes_join_the_record(tmp_path, monkeypatch, capsys):
    table = _table((_FLUSH, "5", "5"), ("one", "1,100", "0"), (_FLUSH, "5", "150"))
    ncu = script(tmp_path / "ncu", _NCU.format(table=table, status=0))
    monkeypatch.setattr(rows, "provenance", lambda device, commit: {"device": device.type, "commit": commit})
    rows.RowFile(tmp_path / "record").append(rows.Row("timed", "operator", "forward"))
    arguments = ["--record", str(tmp_path / "record"), "--ncu", str(ncu), "--commit", "abc"]
    assert traffic.main(arguments) == 0
    timed, row = rows.read_rows(tmp_path / "record" / "rows.json")
    assert (timed.name, row.name, row.kind, row.measured) == ("timed", "a call", "traffic", "forward")
    counts = {"kernels": 1, "read_bytes": 1100, "written_bytes": 150, "bytes": 1000}
    assert row.facts == {"dtype": "bfloat16"} | counts
    assert row.provenance == {"device": "cuda", "commit": "abc"}
    assert "a call, forward: 1.25 times the 0.0 MB that it must move" in capsys.readouterr().out


def test_counters_that_cannot_be_read_are_a_reason_to_skip(tmp_path, capsys):
    said = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access GPU Performance Counters."
    ncu = script(tmp_path / "ncu", _NCU.format(table=said, status=1))
    assert traffic.main(["--record", str(tmp_path / "record"), "--ncu", str(ncu)]) == 1
    printed = capsys.readouterr().out
    assert f"exit status 1 of {ncu} --csv --page raw" in printed
    machine = schedule.Machine("NVIDIA H200", "90", 132, frozenset(), 6, None, str(ncu))
    (step,) = schedule.steps(machine, tmp_path, None, ["bytes"])
    assert [re.search(pattern, printed)[1] for pattern in step.refusals[:1]] == [said]
    assert not (tmp_path / "record").exists()
