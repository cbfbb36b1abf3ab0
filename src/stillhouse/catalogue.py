"""The methods there are, read from their own modules: name, family, docstring, settings. What a module says is all there is to say."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass

from stillhouse import distillers


@dataclass(frozen=True)
class Card:
    """What a method says about itself."""

    name: str
    family: str
    sentence: str
    text: str
    settings: dict[str, str]


def cards(name: str | None = None) -> list[Card]:
    """One method's card, or all, family by family.

    Raises:
        UserError: if there is no such method, with the nearest name.
    """
    names = [name] if name else sorted(distillers.modules(), key=lambda each: (_family(each), each))
    return [_card(each) for each in names]


def _card(name: str) -> Card:
    module = sys.modules[distillers.find(name).__module__]
    text = inspect.getdoc(module) or ""
    title = text.split("\n\n")[0].replace("\n", " ")
    settings = {key: str(parameter.default) for key, parameter in distillers.settings(name).items()}
    return Card(name, _family(name), title, text, settings)


def _family(name: str) -> str:
    return distillers.modules().get(name, "").split(".")[2] if name in distillers.modules() else ""
