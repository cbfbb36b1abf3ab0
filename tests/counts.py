"""How many bad and hostile inputs the tests have tried, for the line that pytest ends with."""

from __future__ import annotations

from collections import Counter

TRIED: Counter[str] = Counter()
"""By kind. Processes of pytest-xdist count for themselves: run without it to see the numbers."""


def tried(kind: str, count: int = 1) -> None:
    """Note that inputs of a kind were tried, once what came of them has been checked."""
    TRIED[kind] += count
