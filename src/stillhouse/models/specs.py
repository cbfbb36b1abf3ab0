"""A model named by one short string, `timm/vit_tiny_patch16_224:img_size=28,patch_size=4`: literals only, never an import path."""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass, field

from stillhouse.errors import UserError

FAMILIES = ("timm", "torchvision", "transformers", "smp", "mae", "diffusers", "pyg")
LONGEST = 255
"""Bytes in the name of a file or folder."""
_WORD = re.compile(r"[\w./+-]+")
_PAIRS = {")": "(", "]": "[", "}": "{"}


@dataclass(frozen=True)
class Spec:
    """A library (one of `FAMILIES`) or `run` for a folder, a name in it, options; `parse_spec(str(spec)) == spec`."""

    family: str
    name: str
    options: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        text = self.name if self.family == "run" else f"{self.family}/{self.name}"
        return f"{text}:{','.join(f'{key}={value!r}' for key, value in self.options.items())}" if self.options else text


def parse_spec(text: str) -> Spec:
    """Read `FAMILY/NAME` or `FAMILY/NAME:KEY=VALUE,...`; what does not start with a library's name is a run folder, which takes no options.

    Raises:
        UserError: if there is no name, or the options cannot be read.
    """
    if not isinstance(text, str):
        raise UserError(f"a model is named by a {type(text).__name__}, expected words such as timm/vit_tiny_patch16_224")
    family, slash, rest = text.strip().partition("/")
    if family not in FAMILIES or not slash:
        return _run_folder(text.strip())
    name, colon, options = rest.partition(":")
    if not name:
        raise UserError(f"model '{text}' names no model, expected for example '{family}/NAME' or '{family}/NAME:img_size=28'")
    return Spec(family, name, parse_options(options) if colon else {})


def _run_folder(text: str) -> Spec:
    if not text:
        raise UserError(f"the model's name is empty, expected {', '.join(f'{family}/NAME' for family in FAMILIES)} or a run folder")
    if any(len(part.encode(errors="replace")) > LONGEST for part in text.split("/")):
        raise UserError(f"the model's name begins '{text[:40]}' and is longer than a file's can be ({LONGEST} bytes)")
    return Spec("run", text)


def parse_options(text: str) -> dict[str, object]:
    """Read `"img_size=28,mean=(0.5,0.5),pool=avg,flag=true"` as `{"img_size": 28, "mean": (0.5, 0.5), "pool": "avg", "flag": True}`.

    Values are Python literals (numbers, quoted strings, lists, tuples, dicts, None), `true`, `false`, or plain words, which stay strings.

    Raises:
        UserError: for an option without a value or a name, a repeated option, or a value that is none of these.
    """
    options: dict[str, object] = {}
    for part in _split(text):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if not key.isidentifier():
            raise UserError(f"cannot read '{part}' in the options '{text}', expected NAME=VALUE pairs separated by commas")
        if not value:
            raise UserError(f"option '{key}' has no value, write {key}=VALUE")
        if key in options:
            raise UserError(f"option '{key}' is given twice in '{text}', give it once")
        options[key] = _value(key, value)
    return options


def _split(text: str) -> list[str]:
    """Cut at the commas outside brackets and quotes."""
    parts, start, quote, opened, i = [], 0, "", "", 0
    while i < len(text):
        char = text[i]
        if quote:
            i += char == "\\"  # the character after a backslash does not close the string
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            opened += char
        elif char in _PAIRS:
            if not opened.endswith(_PAIRS[char]):
                raise UserError(f"'{char}' closes nothing in the options '{text}'")
            opened = opened[:-1]
        elif char == "," and not opened:
            parts.append(text[start:i])
            start = i + 1
        i += 1
    if quote or opened:
        raise UserError(f"'{quote or opened[-1]}' is never closed in the options '{text}'")
    return [*parts, text[start:]]


def _value(key: str, text: str) -> object:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's remarks about odd literals such as '\d'
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        if _WORD.fullmatch(text):
            return text
        raise UserError(f"cannot read {key}={text}, expected a number, a word, true, false, a quoted string, or a list of these") from None
    if not _plain(value):
        raise UserError(f"cannot use {key}={text}, expected a number, a word, true, false, a quoted string, or a list of these")
    return value


def _plain(value: object) -> bool:
    """Whether JSON could hold it: no bytes, sets, complex numbers or Ellipsis."""
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str))
