"""What two processes train together: DistributedDataParallel, FSDP, tensor parallelism, and tuning."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("torch has no torch.distributed", allow_module_level=True)
pytest.importorskip("peft", reason="peft is not installed")

import ddp_cases
import fsdp_cases
import tensor_parallel_cases
import torch.distributed.checkpoint as dcp
import trained
import tuning_cases
from pair import together
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

MODULES = {module.__name__: module for module in (ddp_cases, fsdp_cases, tensor_parallel_cases, tuning_cases)}


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory) -> Path:
    """Where the two processes leave what they write; one folder for all workers of xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / request.module.__name__
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def outcomes(request, folder) -> dict[str, str]:
    """What became of each case: of several workers of xdist one starts the processes, and the others wait."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        report = folder / "outcomes.json"
        if not report.exists():
            report.write_text(json.dumps(together(list(MODULES), folder)))
    return json.loads(report.read_text())


@pytest.mark.parametrize("case", [f"{name}: {case}" for name, module in MODULES.items() for case in module.CASES])
def test_two_processes(case, outcomes):
    assert not outcomes[case], outcomes[case]


def test_one_process_loads_what_two_have_saved(folder, outcomes):
    assert not outcomes["fsdp_cases: saved"], outcomes["fsdp_cases: saved"]
    alone = trained.made("everything")
    trained.train(alone, *trained.data(), steps=1)
    model = trained.made("everything", seed=9)
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    set_model_state_dict(model, state["model"])
    trained.assert_equal(trained.trainable(model), trained.trainable(alone))
