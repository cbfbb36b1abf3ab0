"""What a user is told when something cannot work: one sentence, before any work is spent."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of what steers a terminal, turns the direction of a text, ends its line, or is no character at all."""


class UserError(ValueError):
    """Input that cannot work. Its message says what was wrong, what was expected and what to do; the command prints just that."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """A text of one line as it can be shown anywhere: a file's or a class's name may hold line breaks and commands to a terminal."""
    return "".join(letter.encode("unicode_escape").decode() if unicodedata.category(letter) in UNPRINTABLE else letter for letter in text)


def nearest(name: str, options: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the option nearest to `name`, or `""` when none is near."""
    match = difflib.get_close_matches(name, list(options), n=1)
    return f", did you mean '{match[0]}'?" if match else ""
