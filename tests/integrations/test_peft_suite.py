"""Some of PEFT's own tests, plain and with `fuse` after every injection; `make peft-tests` runs them all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft_suite  # noqa: E402


@pytest.mark.host
@pytest.mark.skipif(
    not peft_suite.source().exists(), reason="needs PEFT's tests: peft_suite.py --fetch, by `make test`"
)
def test_a_part_of_pefts_tests_ends_alike():
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(peft_suite.run, way, ("test_custom_models",), every=14, workers=0) for way in (False, True)]
        plain, fused = (run.result() for run in runs)
    assert peft_suite.compare(plain, fused) == []
    assert sum(outcome == "passed" for outcome in plain["outcomes"].values()) >= 150
    assert plain["fused"] == 0
    assert fused["fused"] >= 40


def test_outcomes_that_differ_are_named():
    plain, fused = {"outcomes": {"a": "passed", "b": "failed"}}, {"outcomes": {"a": "failed", "b": "failed"}}
    assert peft_suite.compare(plain, fused) == ["a: passed without fuse, failed with it"]
    assert peft_suite.compare(plain, {"outcomes": {"a": "passed"}}) == ["b: failed without fuse, not run with it"]
