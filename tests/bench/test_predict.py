"""The static model: its parts with numbers made by hand, what it is fitted to, and the rows that it is asked for."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from pyfused.bench.cases.adapter_residual import AdapterCase
from pyfused.bench.cases.lora_linear import LoRACase
from pyfused.bench.predict import __main__ as command
from pyfused.bench.predict import calls, model, rows
from pyfused.bench.predict.code import Code, Loop, loop_of
from pyfused.bench.predict.model import Chip, Work, launch_time, library_product
from pyfused.bench.predict.rows import Direction, Row
from pyfused.bench.targets import numbers
from pyfused.choice.rates import LAUNCH, Gpu
from pyfused.kernels.audit import TARGETS
from pyfused.kernels.recording import Launch

pytestmark = pytest.mark.host

H200 = next(target for target in TARGETS if target.capability == (9, 0))
# 10 multiprocessors of 1000 multiply-adds a cycle, 1000 cycles in a microsecond; 200 bytes a cycle out of the cache.
ROUND = Chip(Gpu(0.95 * 10 * 1000 * 1000, 1.0, 1e6, 200 * 1000, 10), 1000.0, 1e6)
# A step: 900 cycles of the tensor cores at 0.88 of their rate, 100 of issue, 50 of the port to the cache.
LOOP = Loop(instructions=100, products=792_000, shared=0, moved=3200, copies="async", drains=False)
CODE = Code(warps=4, stages=3, blocks=1, loops=(LOOP,), outside=50, moved=0)


def test_a_loop_of_machine_code_is_read():
    lines = [
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24",
        "HGMMA.64x32x16.F32.BF16 R24, R36, gdesc[UR8], R24, gsb0",
        "LDGSTS.E.BYPASS.128 [R227], desc[UR16][R214.64], P6",
        "LDSM.16.M88.4 R8, [R9]",
        "STS.64 [R9], R8",
        "@!PT LDS RZ, [RZ]",
        "WARPGROUP.DEPBAR.LE gsb0, 0x1",
    ]
    # 8 warps are two groups. A of the second product comes out of registers.
    products, operands = 2 * (64 * 256 * 16 + 64 * 32 * 16), 2 * (64 + 256 + 32) * 16 * 2
    expected = Loop(7, products, operands + 8 * 32 * (4 * 4 + 8), 8 * 32 * 16, "async", False, True)
    assert loop_of(lines, 8) == expected
    drained = loop_of([*lines[1:], "LDG.E.U16 R1, desc[UR16][R2.64]", "WARPGROUP.DEPBAR.LE gsb0, 0x0"], 8)
    assert (drained.drains, drained.only_copies, drained.moved) == (True, False, 8 * 32 * (16 + 2))
    assert loop_of(["HMMA.16816.F32.BF16 R4, R8, R10, R4"], 4).products == 4 * 16 * 8 * 16
    assert loop_of(["UTMALDG.2D [UR8], [UR4]"], 4).copies == "tma"


def test_a_launch_takes_the_time_of_its_busiest_multiprocessor():
    # Two tiles of 7 steps on some multiprocessor: each waits 600 cycles for its first operands and issues 50.
    time = launch_time(CODE, Work(programs=11, tiles=11, steps=7, nbytes=0, through_cache=0), ROUND)
    assert time.microseconds == pytest.approx(2 * (0.650 + 7 * 0.900) + LAUNCH)
    assert time.limit == "tensor cores"
    # A persistent kernel does the same with 10 programs.
    assert launch_time(CODE, Work(10, 11, 7, 0, 0), ROUND) == time


@pytest.mark.parametrize(
    ("change", "cycles", "limit"),
    [
        ({"instructions": 1000}, 1000, "instructions"),
        ({"shared": 160_000}, (160_000 + 3200) / 128, "shared memory"),
        # Two of three stages are under way: 300 cycles of waiting behind the products of a step that drains.
        ({"drains": True}, 1200, "latency"),
        ({"drains": True, "only_copies": False}, 1500, "latency"),
    ],
    ids=str,
)
def test_a_step_takes_what_it_asks_most_of(change, cycles, limit):
    code = dataclasses.replace(CODE, loops=(dataclasses.replace(LOOP, **change),))
    time = launch_time(code, Work(10, 10, 10, 0, 0), ROUND)
    assert time.microseconds == pytest.approx(0.650 + cycles / 100 + LAUNCH)
    assert time.limit == limit


def test_one_multiprocessor_has_no_more_of_the_cache_than_its_port_gives():
    code = dataclasses.replace(CODE, loops=(dataclasses.replace(LOOP, moved=80_000),))
    time = launch_time(code, Work(1, 1, 10, 0, 0), ROUND)
    assert time == (pytest.approx(0.650 + 12.5 + LAUNCH), "second-level cache")


def test_blocks_of_a_multiprocessor_share_what_it_has_and_wait_together():
    code = dataclasses.replace(CODE, blocks=2, loops=(dataclasses.replace(LOOP, drains=True),))
    # Two blocks: 1800 cycles of products, no longer the 1200 of one that waits.
    assert launch_time(code, Work(20, 20, 1, 0, 0), ROUND).microseconds == pytest.approx(0.7 + 1.8 + LAUNCH)
    # A third tile of each comes behind them, alone.
    third = launch_time(code, Work(30, 30, 1, 0, 0), ROUND).microseconds
    assert third == pytest.approx(0.7 + 1.8 + 0.65 + 1.2 + LAUNCH)


def test_memory_and_passes():
    # 0.85 of a byte a picosecond.
    slow = launch_time(CODE, Work(10, 10, 1, 8.5e7, 0), ROUND)
    assert slow == (pytest.approx(0.6 + 100 + LAUNCH), "memory")
    # 100 steps of 20,000 bytes out of a cache that gives 200 in a cycle.
    wide = dataclasses.replace(CODE, loops=(dataclasses.replace(LOOP, moved=20_000),))
    starved = launch_time(wide, Work(10, 10, 10, 0, 0), ROUND)
    assert starved == (pytest.approx(0.6 + 10 + LAUNCH), "second-level cache")
    # A kernel without products is a pass over its tensors.
    plain = launch_time(dataclasses.replace(CODE, loops=()), Work(10, 10, 1, 0, 2e6), ROUND)
    assert plain == (pytest.approx(0.6 + 10 + LAUNCH), "second-level cache")


def test_more_bytes_or_fewer_multiprocessors_are_never_faster():
    there = model.chip((9, 0))
    loops = [LOOP, dataclasses.replace(LOOP, moved=400_000), dataclasses.replace(LOOP, drains=True)]
    for loop, tiles, blocks in itertools.product(loops, (1, 7, 131, 133, 300, 1000), (1, 2, 3)):
        code = dataclasses.replace(CODE, loops=(loop,), blocks=blocks)
        times = []
        for processors in (132, 131, 99, 66, 20):
            fewer = there.rates.narrow * processors / 132
            chip = there._replace(rates=there.rates._replace(multiprocessors=processors, narrow=fewer))
            times.append(launch_time(code, Work(tiles, tiles, 9, 0, 0), chip).microseconds)
        assert times == sorted(times), (loop, tiles, blocks)
        wider = dataclasses.replace(code, loops=(dataclasses.replace(loop, moved=loop.moved * 2),))
        for work in (Work(tiles, tiles, 9, 0, 0), Work(tiles, tiles, 9, 1e9, 0)):
            more = dataclasses.replace(work, nbytes=work.nbytes + 1e6)
            took = launch_time(code, work, there).microseconds
            assert launch_time(wider, work, there).microseconds >= took
            assert launch_time(code, more, there).microseconds >= took


def test_the_model_gives_the_published_ratios_and_its_docstring_the_models():
    found = model.calibration()
    assert {each.k for each in found} == {512, 1024, 4096}
    for each in found:
        assert each.least - model.TOLERANCE <= each.model <= each.most + model.TOLERANCE, each
        kind = {"async": "pointers", "tma": "descriptors"}[each.loads]
        (line,) = [line for line in model.__doc__.splitlines() if line.split()[:2] == [str(each.k), kind]]
        assert line.split()[-1] == f"{each.model:.2f}"
    # What was measured on an H200: 790 TFLOP/s.
    rate = 2 * 8192**3 / library_product(8192, 8192, 8192, model.chip((9, 0))) / 1e6
    assert rate == pytest.approx(790, rel=0.01)


def test_a_capability_that_the_model_does_not_know_is_named():
    with pytest.raises(ValueError, match=r"capability must be one of .*, got \(10, 0\)"):
        model.chip((10, 0))


def test_a_loop_inside_the_end_of_a_tile_has_steps_of_its_own():
    inner = dataclasses.replace(LOOP, copies="", only_copies=False)
    code = dataclasses.replace(CODE, loops=(LOOP, inner))
    with pytest.raises(ValueError, match="work must have steps"):
        launch_time(code, Work(10, 10, 7, 0, 0), ROUND)
    time = launch_time(code, Work(10, 10, 7, 0, 0, inner=2), ROUND)
    assert time.microseconds == pytest.approx(0.650 + 9 * 0.900 + LAUNCH)
    # One that is alone has the launch's.
    alone = launch_time(dataclasses.replace(CODE, loops=(inner,)), Work(10, 10, 7, 0, 0), ROUND)
    assert alone.microseconds == pytest.approx(0.650 + 7 * 0.900 + LAUNCH)


@pytest.mark.parametrize(("copies", "steps"), [("async", 0), ("tma", 7)])
def test_a_kernel_whose_work_is_not_known_is_no_guess(copies, steps):
    code = dataclasses.replace(CODE, loops=(dataclasses.replace(LOOP, copies=copies),))
    with pytest.raises(ValueError, match="work must have steps, and bytes by descriptor"):
        launch_time(code, Work(10, 10, steps, 0, 0), ROUND)


def test_the_cache_keeps_what_fits():
    cache = calls.Cache(1000)
    a, b = torch.empty(400, dtype=torch.uint8), torch.empty(700, dtype=torch.uint8)
    assert cache.moved([a]) == 400
    assert cache.moved([a[:100]]) == 0
    # Written bytes reach the memory, and push out what does not fit beside them.
    assert cache.moved([a], [b]) == 700
    assert cache.moved([b, a]) == 400
    assert cache.moved([torch.empty(1, dtype=torch.uint8).expand(500)]) == 1


def test_operations_of_torch_are_noted_and_views_are_not():
    x, w, bias = torch.empty(2, 3, 8), torch.empty(5, 8), torch.empty(5)
    aten = torch.ops.aten

    def noted(func, *arguments):
        return calls.operation(func, (arguments, None), func(*arguments))

    assert noted(aten.linear.default, x, w, bias).product == (1, 6, 5, 8)
    assert noted(aten.addmm.default, bias, x[0], w.t()).product == (1, 3, 5, 8)
    assert noted(aten.bmm.default, x, w.t().expand(2, 8, 5)).product == (2, 3, 5, 8)
    assert noted(aten.addmm_.default, torch.empty(3, 5), x[0], w.t()).product == (1, 3, 5, 8)
    assert noted(aten.mul.Tensor, bias, bias).product is None
    assert noted(aten.t.default, w) is None
    assert noted(aten.new_empty.default, x, [2]) is None
    # 2 heads of 4: 16 queries, 32 keys; two products.
    q, k = torch.empty(1, 2, 16, 4, device="meta"), torch.empty(1, 2, 32, 4, device="meta")
    flash = noted(aten._scaled_dot_product_flash_attention.default, q, k, k)
    assert flash.attention == 2 * (2 * 16 * 32 * 4)


def test_the_work_of_a_product_follows_from_its_launch():
    case = LoRACase(8192, 4096, 4096, dtype=torch.bfloat16)
    forward, backward = calls.directions(case, "shrink_expand", H200)
    launch = next(each for each in forward if isinstance(each, Launch) and "BLOCK_N" in each.arguments)
    work = calls.work_of(launch, calls.Cache(0))
    # A persistent kernel: 64 by 16 tiles of 128x256.
    assert (work.programs, work.tiles, work.steps) == (132, 1024, 64)
    # x, W, y; P, B, a bias, and A, which it is handed too.
    nbytes = 2 * (4096 * 4096 + 2 * 8192 * 4096) + 2 * (16 * (8192 + 4096 + 4096) + 4096)
    assert work.nbytes == work.through_cache == nbytes
    assert work.by_descriptor == 2 * (128 + 256) * 64
    # x and A, which the pass before has left in the cache, are not read again.
    warm = calls.Cache(1e9)
    shrunk = next(each for each in forward if isinstance(each, Launch))
    calls.work_of(shrunk, warm)
    assert calls.work_of(launch, warm).nbytes == nbytes - 2 * 4096 * (8192 + 16)
    names = [each.kernel.__name__ for each in backward if isinstance(each, Launch)]
    assert names.count("_lora_wgrad_kernel") == 2


def test_what_is_written_in_place_reaches_the_memory_again():
    case = LoRACase(2740, 1024, 1024, dtype=torch.bfloat16, dropout_p=0.1)
    _, backward = calls.directions(case, "blas", H200)
    (launch,) = [each for each in backward if isinstance(each, Launch) and "expand" in each.kernel.__name__]
    warm = calls.Cache(1e9)
    first = calls.work_of(launch, warm).nbytes
    assert calls.work_of(launch, warm).nbytes == 2 * 2740 * 1024
    assert first > 2 * 2 * 2740 * 1024


def test_every_row_of_the_targets_is_asked_for():
    found = rows.cases()
    facts = [case.facts() for case in found]

    def shapes(*names):
        return {tuple(each[name] for name in names) for each in facts if all(name in each for name in names)}

    assert numbers.LORA_H200.keys() == numbers.LORA_EAGER_MODEL.keys()
    for dropout in (0.0, 0.1):
        wanted = {(*shape, dropout) for shape in numbers.LORA_H200}
        assert wanted <= shapes("rows", "in_features", "out_features", "dropout_p")
    assert numbers.ADAPTER_H200.keys() <= numbers.ADAPTER_EAGER_MODEL.keys() <= shapes("rows", "channels", "hidden")
    assert numbers.ATTENTION_H200.keys() <= shapes("batch", "tokens", "norm_match")
    # With the adapters' dtype that the modules have by default, too.
    for operator in ("lora_linear", "adapter_residual", "cross_attention_residual"):
        names = [case.name for case in found if case.operator == operator and "drop" not in case.name]
        assert sum("adapters float32" in name for name in names) == len(names) / 2


def test_eager_is_the_targets_with_dropout_added():
    shape = (6304, 768, 3072)
    plain, dropped = (rows._eager(LoRACase(*shape, dtype=torch.bfloat16, dropout_p=p)) for p in (0.0, 0.1))
    assert plain == numbers.LORA_EAGER_MODEL[shape]
    # A pass reads and writes x and writes a mask: 5.6 us at 4.3 TB/s.
    assert [b - a for a, b in zip(plain, dropped, strict=True)] == pytest.approx([5.63, 5.63], abs=0.01)
    assert rows._eager(AdapterCase((32, 197, 768), 64, torch.bfloat16)) == (21,)
    assert rows._eager(LoRACase(10, 10, 10)) is None


def _row(name="lora_linear 8x8->8", forward=10.0, backward=20.0):
    def direction(time, limit="memory"):
        return Direction(time, limit, (("lora_gemm_kernel", time, limit),))

    plans = {
        "blas": (direction(forward), direction(backward, "tensor cores")),
        "one_launch": (direction(forward - 2), direction(backward + 1)),
    }
    return Row(name, plans, ("blas", "blas"), (5.0, 10.0), (8.0, 16.0), (15.0, 30.0))


def test_a_row_is_one_line():
    head, line = command.table([_row()])
    assert head.split()[:5] == ["row", "plan", "fwd", "floor", "cuBLAS"]
    assert line.split() == [
        *("lora_linear", "8x8->8", "blas", "10.0", "50%", "1.25x", "20.0", "50%", "1.25x", "1.50x"),
        *("one_launch/blas", "1.61x", "memory,", "tensor", "cores"),
    ]  # fmt: skip
    alone = dataclasses.replace(_row(), eager=(15.0,), library=None, floor=None)
    assert "1.50x fwd" in command.table([alone])[1]
    assert len(command.table([_row()], launches=True)) == 4


def test_what_changed_is_said_row_by_row():
    before = {row.name: command.saved(row) for row in (_row(), _row("gone"))}
    assert command.changes(before, [_row(forward=5.0), _row("new row")]) == [
        "lora_linear 8x8->8: forward 10.0 -> 5.0 (0.50x), backward 20.0 -> 20.0 (1.00x)",
        "new row: new",
        "gone: gone",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "100"], "--target must be one of [80, 86, 89, 90, 120], got 100"),
        (["--rows", "nothing like it"], "--rows must be part of the name of a row, got 'nothing like it'"),
        (["--against", "{here}/none.json"], "--against must be a file that --json wrote, got {here}/none.json"),
        (["--against", "{here}/list.json"], "--against must be a file that --json wrote, got {here}/list.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(tmp_path, capsys, arguments, message):
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(SystemExit) as ended:
        command.main([argument.format(here=tmp_path) for argument in arguments])
    assert ended.value.code == 2
    assert message.format(here=tmp_path) in capsys.readouterr().err


def test_the_command_predicts_a_row_and_compares_it(tmp_path):
    """In a process of its own: where kernels are interpreted none is compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    file, name = tmp_path / "before.json", "lora_linear 2740x1024->1024 r16 bfloat16"

    def run(*arguments):
        command_line = [sys.executable, "-m", "pyfused.bench.predict", "--rows", f"{name} adapters float32", *arguments]
        done = subprocess.run(command_line, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    plain, dropped = run("--json", str(file))[2:]
    assert plain.startswith(f"{name} adapters float32 ")
    assert dropped.startswith(f"{name} adapters float32 dropout 0.1 ")
    saved = json.loads(file.read_text())
    plans = saved[f"{name} adapters float32"]["model"]["plans"]
    kernels = [launch[0] for launch in plans["shrink_expand"][0]["launches"]]
    assert kernels == ["prepare_kernel", "lora_shrink_kernel", "sum_partials_kernel", "lora_tma_kernel"]
    # More than the floor, and not ten times as much.
    floor = LoRACase(2740, 1024, 1024, dtype=torch.bfloat16).floor_seconds()["forward"] * 1e6
    assert floor < saved[f"{name} adapters float32"]["forward"] < 10 * floor
    changed = run("--against", str(file))[-2:]
    assert all(line.count("(1.00x)") == 2 for line in changed)
