"""Every public call over Triton's own JIT, binder and launcher, for GPUs that are not there: a driver that checks each
launch and runs nothing (tests/stub_driver/) stands below them.

A change that makes other launches or compilations changes the tables: ``python tests/stub_driver/pins.py`` prints them
anew, with ``--why`` also what makes each compilation another one.
"""

from __future__ import annotations

import itertools
import zlib

import pytest

pytest.importorskip("triton")

import torch
from stub_driver.build import REFUSAL
from stub_driver.session import GPUS, compilations, over_stub

from pyfused.kernels.lora_linear_config import TMA_TILES

pytestmark = [pytest.mark.host, pytest.mark.skipif(REFUSAL is not None, reason=f"the stub driver {REFUSAL}")]

# Each call at a ViT-B/16's sizes: Triton's launches forward and backward, torch's own operators forward and backward.
# A residual's gradient is the upstream one itself, which torch copies for a leaf.
LAUNCHES = {
    "lora_linear one_launch": [2, 6, 0, 0],
    "lora_linear shrink_expand": [4, 7, 0, 0],
    "lora_linear blas": [3, 6, 2, 2],
    "lora_linear blas, dropout": [3, 7, 3, 1],
    "lora_linear one_launch, mixed": [2, 6, 0, 0],
    "lora_linear shrink_expand, mixed": [4, 8, 0, 0],
    "adapter_residual save": [2, 3, 0, 1],
    "adapter_residual recompute": [2, 3, 0, 1],
    "cross_attention_residual absorbed": [1, 2, 17, 28],
    "cross_attention_residual absorbed_recompute": [1, 2, 17, 28],
    "cross_attention_residual standard": [1, 1, 25, 36],
    "cross_attention_residual absorbed, norms": [1, 2, 17, 40],
    "projection_residual": [1, 1, 2, 7],
    "projection_residual norms": [2, 1, 2, 6],
}
# What varies from call to call: value -> compilations that it adds to those of the values before it.
SERIES = {
    "lora_linear one_launch, M": {
        1576: 6, 1379: 0, 197: 2, 394: 0, 788: 1, 3152: 1, 6304: 0, 12608: 0, 50: 2, 100: 0, 1000: 0, 16: 0, 3: 0, 1: 0,
    },
    "lora_linear shrink_expand, M": {
        1576: 8, 1379: 0, 197: 2, 394: 0, 788: 1, 3152: 1, 6304: 0, 12608: 1, 50: 2, 1000: 0, 1: 0,
    },
    "lora_linear, p": {0.1: 8, 0.5: 0, 0.6: 0},
    "lora_linear, scaling": {2.0: 6, 0.5: 0, 1.0: 0},
    "lora_linear, R": {16: 6, 8: 0, 4: 1, 1: 0, 13: 0, 32: 4, 20: 0},
    "lora_linear mixed, G": {8: 9, 7: 0, 4: 6, 5: 0},
    "lora_linear mixed, R": {16: 9, 8: 6, 12: 0},
    "adapter_residual, M": {1576: 5, 1379: 0, 197: 0, 394: 0, 6304: 2, 50: 0, 1000: 0, 16: 0, 1: 0},
    "adapter_residual, p": {0.1: 5, 0.5: 0},
    "adapter_residual NCHW, B": {8: 5, 64: 0, 4: 0, 2: 2, 1: 2, 63: 0},
    "adapter_residual NCHW, H": {56: 5, 28: 2, 14: 3, 7: 0},
    "cross_attention_residual, B": {8: 3, 7: 0, 32: 2, 2: 0, 1: 3},
    "cross_attention_residual, L": {197: 3, 50: 0, 1370: 2, 16: 0, 1: 0},
    "projection_residual, M": {1576: 3, 1379: 0, 197: 1, 394: 0, 6304: 0, 12608: 0, 50: 0, 1000: 1, 16: 0, 1: 0},
}  # fmt: skip
# The whole models in bfloat16, in this order: launches of a step, and compilations that it adds.
MODELS = {
    "CLIP ViT-B/16, LoRA": {"train 8": [396, 11], "train 7": [396, 0], "train 32": [396, 0], "eval 8": [108, 2]},
    "FastViT SA12, adapters": {"train 8": [56, 15], "train 7": [56, 0], "train 32": [56, 7], "eval 8": [14, 5]},
    "AdaptedCLIP, stage 2": {"train 8": [21, 6], "train 7": [21, 0], "train 32": [21, 1], "eval 8": [13, 1]},
}


def _reached(share: int) -> dict[str, object]:
    """A GPU's share of every call, drawn from the call's name: which GPU it is decides sizes of blocks alone."""
    from stub_driver import calls

    return _faults(call for call in calls.every_call() if zlib.crc32(call.label.encode()) % len(GPUS) == share)


def _compiled(turns: list[int]) -> dict[str, object]:
    from stub_driver import calls

    return _faults(call for turn in turns for call in calls.compiled_calls(turn))


def _faults(chosen) -> dict[str, object]:
    """What went wrong in the calls, which kernels they did not start, and how many they were."""
    from stub_driver import inside

    faults, started, count = [], set(), 0
    for call in chosen:
        count += 1
        try:
            with inside.watch() as seen:
                call()
        except Exception as error:
            # Of a call that the driver refused the fault says more.
            if not seen.faults:
                faults.append(f"{call.label}: {type(error).__name__}: {error}")
        started.update(seen.launches)
        faults += [f"{call.label}: {fault}" for fault in seen.faults]
    idle = {kernel.__name__ for kernel in inside.kernels()} - started
    if torch.cuda.get_device_capability()[0] not in TMA_TILES:
        idle.discard("_lora_tma_kernel")
    return {"faults": faults, "idle": sorted(idle), "count": count}


@pytest.mark.parametrize(("share", "gpu"), [*enumerate(GPUS)], ids=map(str, GPUS))
def test_every_call_reaches_the_driver(share, gpu):
    found = over_stub(_reached, share, gpu=gpu)
    assert found["count"] > 3600 / len(GPUS) - 100
    assert not found["faults"], _some(found["faults"])
    assert not found["idle"], "no call starts these kernels"


# The turns of all GPUs together meet every dtype and layout.
TURNS = {80: [0, 4], 90: [1, 5], 100: [2], 120: [3]}
assert sorted(itertools.chain(*TURNS.values())) == list(range(6))


@pytest.mark.parametrize("gpu", GPUS)
def test_every_kernel_compiled_fits(gpu):
    found = over_stub(_compiled, TURNS[gpu], gpu=gpu, compiling=True)
    assert not found["faults"], _some(found["faults"])
    assert not found["idle"], "no call starts these kernels"


def _some(faults: list[str]) -> str:
    return "\n".join([f"{len(faults)} calls failed, the first of them:", *faults[:20]])


# As many images as a grid's second and third dimension do not reach.
MANY = 66_000


def _many_images() -> dict[str, list[str]]:
    from stub_driver import inside, pins

    found = {}
    for name, call in {
        "adapter_residual": lambda: pins.adapter("save", MANY, 64, 1, 2),
        "lora_linear": lambda: pins.lora("shrink_expand", MANY * 128, p=0.1),
        "lora_linear blas": lambda: pins.lora("blas", MANY * 128, p=0.1),
        "cross_attention_residual": lambda: pins.attention("absorbed", MANY, 2),
        "cross_attention_residual norms": lambda: pins.attention("absorbed_recompute", MANY, 2, norm_match=True),
        "projection_residual": lambda: pins.projection(MANY * 128),
    }.items():
        try:
            with inside.watch() as seen:
                y = call()
                y.backward(torch.empty_like(y))
        except RuntimeError:
            # What the driver refused stands in the faults.
            if not seen.faults:
                raise
        found[name] = seen.faults
    return found


def _answers() -> dict[str, dict]:
    from stub_driver import pins

    return {
        "launches": pins.launches(),
        "series": pins.series(),
        "many images": _many_images(),
        "mistakes": _mistakes(),
    }


@pytest.fixture(scope="module")
def answers() -> dict[str, dict]:
    """Of one process: most of its time is the import of torch."""
    return over_stub(_answers)


def test_no_grid_grows_beyond_its_limit_with_the_batch(answers):
    assert {operator: faults for operator, faults in answers["many images"].items() if faults} == {}


def test_launches_of_a_call(answers):
    assert answers["launches"] == LAUNCHES


def test_compilations_that_another_call_adds(answers):
    assert {label: dict(map(tuple, pairs)) for label, pairs in answers["series"].items()} == SERIES


def _model_steps() -> dict[str, dict[str, list[int]]]:
    from stub_driver import pins

    return {model: pins.model_steps(model) for model in MODELS}


def test_launches_and_compilations_of_training_steps():
    for package in ("timm", "open_clip"):
        pytest.importorskip(package)
    # Of one process: importing open_clip takes as long as a model's steps.
    assert over_stub(_model_steps) == MODELS


# What the stub and its harness are there to find, made on purpose.


def _mistakes() -> dict[str, list]:
    """Mistake -> the error that a user would see, and the faults recorded."""
    from stub_driver import inside, nothing

    x, found = torch.empty(8, device=inside.DEVICE), {}
    for name, launch in nothing.MISTAKES.items():
        error = None
        with inside.watch() as seen:
            try:
                launch(x)
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
        found[name] = [error, seen.faults]
    return found


# Mistake -> what the error says, and the fault.
MISTAKES = {
    "none": (None, None),
    "longest grid": (None, None),
    "grid y": ("invalid argument", "grid (1, 65536, 1)"),
    "grid z": ("invalid argument", "grid (1, 1, 65536)"),
    "shared memory": ("invalid argument", "49153 bytes of shared memory, at most 49152"),
    # Its 2^31 programs are a negative number to Triton's launcher.
    "lost": (None, "1 launches never reached the driver"),
    "threads": ("out of resource: threads", None),
    "another GPU": ("no kernel image is available", None),
    "no such argument": ("KeyError", None),
    "too few arguments": ("TypeError", None),
}


def test_mistakes_are_found(answers):
    found = answers["mistakes"]
    assert found.keys() == MISTAKES.keys()
    for mistake, (error, fault) in MISTAKES.items():
        message, faults = found[mistake]
        assert faults == ([] if fault is None else [f"_nothing_kernel: {fault}"]), mistake
        assert (message is None) if error is None else error in str(message), mistake


def _too_much_shared_memory() -> str:
    from stub_driver import pins

    from pyfused.kernels import lora_linear
    from pyfused.kernels.lora_linear_config import GemmConfig

    lora_linear.gemm_config = lambda *_, **__: GemmConfig(128, 128, 64, num_warps=8, num_stages=4)
    try:
        pins.lora("one_launch")
    except Exception as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(("gpu", "fits"), [(90, True), (120, False)])
def test_shared_memory_is_the_gpus(gpu, fits):
    message = over_stub(_too_much_shared_memory, gpu=gpu, compiling=True)
    assert message == "no error" if fits else "Hardware limit: 101376" in message


def test_an_error_over_the_stub_is_an_error_here():
    with pytest.raises(RuntimeError, match="got 'no such plan'"):
        over_stub(_unknown_plan)


def _unknown_plan() -> None:
    from stub_driver import pins

    pins.lora("no such plan")


def _rows(*counts: int) -> None:
    from stub_driver import pins

    for count in counts:
        y = pins.adapter("save", count, 768)
        y.backward(torch.empty_like(y))


def test_compilations_are_told_by_their_keys():
    once, other = compilations(_rows, 1576, 1576), compilations(_rows, 1576, 6304)
    assert [key.split()[0] for key in once] == [
        "_prepare_kernel", "_adapter_fwd_kernel", "_prepare_kernel", "_adapter_bwd_rows_kernel",
        "_adapter_bwd_weights_kernel",
    ]  # fmt: skip
    assert len(set(other)) == len(other) > len(once)
    assert "bf16" in once[0]
