"""Lets `explain` watch which backend and plan each operator call gets. The list is empty in normal running."""

from __future__ import annotations

from collections.abc import Callable

observers: list[Callable[..., None]] = []


def notify(operator: str, **facts) -> None:
    for observer in observers:
        observer(operator, **facts)
