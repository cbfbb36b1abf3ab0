"""The methods there are, read from their own modules: name, family, docstring, settings. What a module says is all there is to say."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from dataclasses import dataclass
from importlib.util import find_spec

from stillhouse import distillers


@dataclass(frozen=True)
class Card:
    """What a method says about itself.

    Attributes:
        sentence: what it does.
        text: all that its module says.
        masked: what is masked and by whom, or "nothing".
        tasks: what it is for; of images, unless it says otherwise.
        needs: the networks it takes beside the student.
        showed: what its evidence showed, "" where there is none of its own.
    """

    name: str
    family: str
    sentence: str
    text: str
    masked: str
    tasks: tuple[str, ...]
    needs: list[str]
    showed: str
    settings: dict[str, str]


def cards(name: str | None = None) -> list[Card]:
    """One method's card, or all, family by family.

    Raises:
        UserError: if there is no such method, with the nearest name.
    """
    names = [name] if name else sorted(distillers.modules(), key=lambda each: (_family(each), each))
    return [_card(each) for each in names]


def _card(name: str) -> Card:
    kind = distillers.find(name)
    module = sys.modules[kind.__module__]
    text = inspect.getdoc(module) or ""
    title = text.split("\n\n")[0].replace("\n", " ")
    settings = {key: str(parameter.default) for key, parameter in distillers.settings(name).items()}
    masked = re.search(r"^Masked: (.+?)[.;](?:\s|$)", text, re.MULTILINE | re.DOTALL)
    return Card(
        name=name,
        family=_family(name),
        sentence=title,
        text=text,
        masked=" ".join(masked[1].split()) if masked else "",
        tasks=tuple(f"{task} graphs" if "images" not in kind.inputs else task for task in kind.tasks),
        needs=[network for network in distillers.needed(name) if network != "student"],
        showed=_showed(name),
        settings=settings,
    )


def _showed(name: str) -> str:
    if find_spec(f"stillhouse.evidence.{name}") is None:
        return ""
    return str(getattr(importlib.import_module(f"stillhouse.evidence.{name}"), "SHOWED", ""))


def _family(name: str) -> str:
    return distillers.modules().get(name, "").split(".")[2] if name in distillers.modules() else ""
