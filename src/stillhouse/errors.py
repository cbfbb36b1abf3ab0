"""What a user is told when something cannot work: one sentence, before any work is spent."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Input that cannot work. Its message says what was wrong, what was expected and what to do; the command prints just that."""


def nearest(name: str, options: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the option nearest to `name`, or `""` when none is near."""
    match = difflib.get_close_matches(name, list(options), n=1)
    return f", did you mean '{match[0]}'?" if match else ""
