"""What rides on a data spec after its colon."""

from __future__ import annotations

import os
from typing import Any

from stillhouse.errors import UserError, nearest
from stillhouse.models.specs import parse_options


def read_options(text: str, source: str, **kinds: type) -> dict[str, Any]:
    """`read_options("canvas=16", "digits", canvas=int)` is `{"canvas": 16}`: the options given, each known and of its kind.

    Raises:
        UserError: for an unknown option (naming the known ones) or a value of another kind.
    """
    options = parse_options(text) if text.strip() else {}
    for name, value in options.items():
        if name not in kinds:
            raise UserError(f"'{source}' has no option '{name}'{nearest(name, kinds) or ','} known: {', '.join(kinds)}")
        kind = kinds[name]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{source}: {name}={value!r} is no {kind.__name__}, expected {name}={kind.__name__.upper()}")
    return options


def within(name: str, value: float, low: float, high: float) -> None:
    """Check an option's value.

    Raises:
        UserError: unless low <= value <= high.
    """
    if not low <= value <= high:
        raise UserError(f"{name}={value} is out of range, expected {low} to {high}")


def path_and_options(text: str) -> tuple[str, str]:
    """Cut `PATH:NAME=VALUE,…` at the last colon that an option follows; a path that exists as it stands is taken whole."""
    path, colon, options = text.rpartition(":")
    return (path, options) if colon and "=" in options and not os.path.exists(text) else (text, "")
