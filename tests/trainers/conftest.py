"""Fixtures of this folder."""

from pair import folder, outcomes  # noqa: F401
