"""Which of the collected tests the steps of `make gpu` select, by pytest's own rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from _pytest.mark import deselect_by_keyword, deselect_by_mark

from pyfused.bench.gpu.schedule import TESTS


def is_every_test(config: pytest.Config) -> bool:
    """Whether a run has collected the whole suite."""
    option = config.option
    return not (option.keyword or option.markexpr or option.deselect) and list(config.args) == config.getini(
        "testpaths"
    )


def by_step(items: Sequence[pytest.Item]) -> dict:
    """Step -> ids of its tests; "all" -> all that share the GPU, "" -> how many there are."""
    found: dict = {"": len(items)}
    for name, step in (TESTS | {"all": dataclasses.replace(TESTS["tests"], named="")}).items():
        chosen = [item for item in items if item.nodeid.startswith(step.paths)]
        config = SimpleNamespace(
            option=SimpleNamespace(markexpr=step.marked, keyword=step.named),
            hook=SimpleNamespace(pytest_deselected=lambda items: None),
            getini=lambda name: False,
        )
        deselect_by_mark(chosen, config)
        deselect_by_keyword(chosen, config)
        found[name] = [item.nodeid for item in chosen]
    return found
