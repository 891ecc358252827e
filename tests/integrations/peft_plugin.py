"""A plugin for PEFT's own tests: `fuse` after every injection with --fuse, and a record of outcomes and calls.

Loaded by `peft_suite.py`, with ``-p peft_plugin``.
"""

from __future__ import annotations

import collections
import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch

# torchvision registers shapes for compiled operators that it lacks beside a CPU build of torch; no test calls them.
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
torch.set_num_threads(1)

# What PEFT's tests import at their top and the chosen ones do not call.
_STUBS = {"diffusers": ("StableDiffusionPipeline",), "datasets": ("Dataset", "load_dataset")}
_missing = [name for name in _STUBS if importlib.util.find_spec(name) is None]


def _stub() -> None:
    # transformers and PEFT ask first whether these are there: they are not.
    import peft  # noqa: F401
    import transformers  # noqa: F401

    for name in _missing:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__version__ = "0"
        for member in _STUBS[name]:
            setattr(module, member, type(member, (), {}))
        sys.modules[name] = module


def pytest_addoption(parser):
    parser.addoption("--fuse", action="store_true", help="call fuse(attention=True) after every injection")
    parser.addoption("--every", type=int, default=1, help="run one of so many tests")
    parser.addoption("--record", type=Path, help="the file that outcomes and calls go to")


def pytest_configure(config):
    _stub()
    config.pluginmanager.register(_Record(config), "peft-record")
    if config.getoption("--fuse"):
        _fuse_injections()


def _fuse_injections() -> None:
    from peft.tuners.tuners_utils import BaseTuner

    import pyfused

    inject = BaseTuner.inject_adapter
    fusing = []

    def then_fuse(self, model, *args, **kwargs):
        result = inject(self, model, *args, **kwargs)
        # fuse injects too, to see what PEFT does.
        if not fusing:
            fusing.append(model)
            try:
                pyfused.fuse(model, attention=True)
            except ValueError as error:
                # Another method's layers.
                if "must hold LoRA layers" not in str(error):
                    raise
            finally:
                fusing.clear()
        return result

    BaseTuner.inject_adapter = then_fuse


def _about_lora(item: pytest.Item) -> bool:
    """Whether a test of all methods is for this one; a test without a configuration among its parameters is."""
    callspec = getattr(item, "callspec", None)
    values = callspec.params.values() if callspec else ()
    kinds = {value.__name__ for value in values if isinstance(value, type) and value.__name__.endswith("Config")}
    return not kinds or kinds == {"LoraConfig"}


class _Everything(collections.Counter):
    def __contains__(self, key: object) -> bool:
        return True


def pytest_collection_modifyitems(config, items):
    shared = sys.modules.get("tests.testing_utils")
    if shared is not None:
        # PEFT's tests go to the hub for a model that they have not seen yet, whatever HF_HUB_OFFLINE says.
        shared._HUB_MODEL_ACCESSES = _Everything()
    items[:] = [item for item in items if _about_lora(item)][:: config.getoption("--every")]


class _Record:
    """Outcomes by test, and what every call of a fused layer became; a worker of xdist sends its part."""

    def __init__(self, config: pytest.Config) -> None:
        from pyfused.ops import decision

        self.config = config
        self.outcomes: dict[str, str] = {}
        self.fused, self.left = 0, collections.Counter()
        decision.observers.append(self._told)

    def _told(self, told) -> None:
        why = getattr(told, "why", None)
        if why is None:
            self.fused += 1
        else:
            self.left[why] += 1

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_collectreport(self, report):
        if report.failed:
            self.outcomes[report.nodeid] = "failed"

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error):
        part = getattr(node, "workeroutput", {})
        self.fused += part.get("fused", 0)
        self.left.update(part.get("left", {}))

    def pytest_sessionfinish(self):
        output = getattr(self.config, "workeroutput", None)
        if output is not None:
            output.update(fused=self.fused, left=dict(self.left))

    def pytest_unconfigure(self, config):
        if not hasattr(config, "workeroutput") and config.getoption("--record"):
            found = {"outcomes": self.outcomes, "fused": self.fused, "left": dict(self.left)}
            config.getoption("--record").write_text(json.dumps(found))
