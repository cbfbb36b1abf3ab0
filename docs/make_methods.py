"""Makes docs/methods/: a page a method out of its module's docstring, its class's docstring and its signature, and the table of all.

python docs/make_methods.py
"""

from __future__ import annotations

import inspect
import re
from importlib.util import find_spec
from pathlib import Path

import docstring_parser

from stillhouse import distillers
from stillhouse.catalogue import Card, cards

DOCS = Path(__file__).parent


def pages() -> dict[str, str]:
    """The text of each page by its file name in docs/methods/."""
    every = cards()
    return {"index.md": _index(every), **{f"{card.name}.md": _page(card) for card in every}}


def _index(every: list[Card]) -> str:
    rows = [f"| {' | '.join(map(_cell, _row(card)))} |" for card in every]
    heads = ("method", "family", "for", "what it does", "needs", "masked", "what its evidence showed")
    return "\n".join(["# Methods", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows]) + "\n"


def _row(card: Card) -> list[str]:
    needs = ", ".join(card.needs) or "no teacher"
    return [f"[`{card.name}`]({card.name}.md)", card.family, ", ".join(card.tasks), card.sentence, needs, card.masked, card.showed]


def _page(card: Card) -> str:
    kind = distillers.find(card.name)
    about = docstring_parser.parse(inspect.getdoc(kind) or "")
    texts = {each.arg_name: each.description or "" for each in about.params}
    networks = [f"- `{name}`: {_line(texts[name])}" for name in distillers.networks(card.name)]
    own = distillers.settings(card.name)
    rows = [f"| `{_flag(name)}` | `{each.default!r}` | {_cell(texts[name])} |" for name, each in own.items()]
    table = ["In Python by keyword, with underscores.", "", "| flag | default | meaning |", "|---|---|---|", *rows] if rows else ["None."]
    parts = [
        f"# {card.sentence.partition(':')[0]}",
        f"`{card.name}`, in Python `stillhouse.distillers.{kind.__name__}`; family {card.family}.",
        re.sub(r"(?<!\n)\n(?=(?:Source|Sure|Our reading)\b)", "\n\n", card.text),
        "## What is minimised",
        f"    {(about.short_description or '').rstrip('.')}",
        "\n".join(networks),
        "## Settings",
        "\n".join(table),
        "## Evidence",
        _evidence(card.name),
    ]
    return "\n\n".join(parts) + "\n"


def _evidence(name: str) -> str:
    if find_spec(f"stillhouse.evidence.{name}") is None:
        return "None of its own."
    command = f"`stillhouse reproduce {name}` runs it."
    there = (DOCS / "evidence" / f"{name}.md").exists()
    table = f"The last table: [evidence](../evidence/{name}.md)." if there else "No table is kept here yet."
    return f"{command} {table}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


if __name__ == "__main__":
    for old in (DOCS / "methods").glob("*.md"):
        old.unlink()
    for name, text in pages().items():
        (DOCS / "methods" / name).write_text(text, encoding="utf-8")
