"""Every public name is in the reference, and in a page that users read."""

from __future__ import annotations

import re

import pytest
from tree import ROOT

import pyfused
from pyfused import diagnostics, models

pytestmark = pytest.mark.host

PAGES = [ROOT / "README.md", *(ROOT / "docs" / "guides").glob("*.md"), *(ROOT / "docs" / "operators").glob("*.md")]
PUBLIC = {
    "pyfused": set(pyfused.__all__) - {"__version__", "diagnostics", "models"},
    "pyfused.diagnostics": set(diagnostics.__all__),
    "pyfused.models": set(models.__all__),
}


def referenced() -> dict[str, set[str]]:
    """Module -> the names that docs/api.md has directives for."""
    found: dict[str, set[str]] = {}
    module = ""
    for directive, value in re.findall(r"^\.\. (\w+):: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE):
        if directive == "currentmodule":
            module = value
        else:
            found.setdefault(module, set()).add(value)
    return found


def test_the_reference_has_all_public_names_and_no_other():
    assert referenced() == PUBLIC


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_a_page(module):
    words = set(re.findall(r"\w+", " ".join(page.read_text() for page in PAGES)))
    assert sorted(PUBLIC[module] - words) == []
