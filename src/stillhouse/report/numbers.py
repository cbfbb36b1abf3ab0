"""How numbers are written for people. None, NaN and infinity become a dash; a space that does not break stands before a unit."""

from __future__ import annotations

import math
from typing import TypeGuard

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
SPACE = "\N{NARROW NO-BREAK SPACE}"


def known(value: object) -> TypeGuard[float]:
    """Whether there is a finite number to show."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def percent(share: float | None, digits: int = 1) -> str:
    """0.921 -> "92.1 %"."""
    return f"{100 * share:.{digits}f}{SPACE}%" if known(share) else DASH


def points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign: 0.03 -> "+3.0"."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}".replace("-", MINUS)


def change(before: float, after: float) -> str:
    """By how much it changed, in percent of what it was: (100, 52) -> "-48 %"."""
    return f"{100 * (after / before - 1):+.0f}{SPACE}%".replace("-", MINUS)


def si(value: float | None) -> str:
    """Three digits and a prefix: 5_717_416 -> "5.72 M", 4.599e9 -> "4.60 G"."""
    if not known(value):
        return DASH
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{_three(value / size)}{SPACE}{prefix}"
    return _three(value) if value != int(value) else f"{value:.0f}"


def milliseconds(value: float | None) -> str:
    """201.3 -> "201 ms"."""
    return f"{_three(value)}{SPACE}ms" if known(value) else DASH


def duration(seconds: float | None) -> str:
    """83 -> "1 min 23 s"."""
    if not known(seconds):
        return DASH
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest if not hours else 0, "s")]
    return " ".join(f"{count}{SPACE}{unit}" for count, unit in parts if count) or f"{seconds:.1f}{SPACE}s"


def plain(value: float | None, digits: int = 3) -> str:
    """0.2514 -> "0.251"."""
    return f"{value:.{digits}f}" if known(value) else DASH


def _three(value: float) -> str:
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"
