"""The published ways to distil: one module a method, a folder a family. The folders are the registry.

A method's name is its module's name; its class is the `Distiller` of that name (underscores and case aside) that module defines, or the
only one.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any

from stillhouse.errors import UserError, nearest

if TYPE_CHECKING:
    from stillhouse.distillers.base import Distiller


@cache
def modules() -> dict[str, str]:
    """`{method name: module path}` of every method there is, by looking into the families' folders. Imports none of them."""
    found = {}
    for family in pkgutil.iter_modules(__path__):
        if family.ispkg:
            paths = [f"{__path__[0]}/{family.name}"]
            found.update({module.name: f"{__name__}.{family.name}.{module.name}" for module in pkgutil.iter_modules(paths)})
    return found


def name_of(method: str | type[Distiller]) -> str:
    """A method's name: its module's; for a class that lives elsewhere, the class's own."""
    if isinstance(method, str):
        return method
    return next((name for name, path in modules().items() if path == method.__module__), method.__name__)


def find(name: str | type[Distiller]) -> type[Distiller]:
    """The class of a method by name; a class of the user's own passes through.

    Raises:
        UserError: if there is no such method, with the nearest name.
    """
    if not isinstance(name, str):
        return name
    if name not in modules():
        known = ", ".join(sorted(modules()))
        raise UserError(f"there is no method '{name}'{nearest(name, modules())}; `stillhouse methods` lists all: {known}")
    from stillhouse.distillers.base import Distiller

    path = modules()[name]
    classes = [each for _, each in inspect.getmembers(importlib.import_module(path), inspect.isclass)]
    own = [each for each in classes if issubclass(each, Distiller) and each.__module__ == path]
    return next((each for each in own if each.__name__.lower() == name.replace("_", "")), own[0])


def settings(name: str | type[Distiller]) -> dict[str, inspect.Parameter]:
    """A method's settings: the keyword-only parameters of its class."""
    parameters = inspect.signature(find(name).__init__).parameters
    return {key: parameter for key, parameter in parameters.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY}


def networks(name: str | type[Distiller]) -> dict[str, inspect.Parameter]:
    """A method's networks: the positional parameters of its class, `student` and mostly `teacher` among them."""
    parameters = list(inspect.signature(find(name).__init__).parameters.items())[1:]
    return {key: parameter for key, parameter in parameters if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD}


def needed(name: str | type[Distiller]) -> list[str]:
    """The networks without which a method cannot be made: those without a default."""
    return [key for key, parameter in networks(name).items() if parameter.default is inspect.Parameter.empty]


def others(name: str | type[Distiller]) -> dict[str, inspect.Parameter]:
    """A method's networks beside student and teacher."""
    return {key: parameter for key, parameter in networks(name).items() if key not in ("student", "teacher")}


def __getattr__(attribute: str) -> Any:
    """`stillhouse.distillers.MaskedKD`: every method's class by its own name, imported on first use."""
    if not attribute.startswith("_"):
        for name in modules():
            if name.replace("_", "") == attribute.lower():
                return find(name)
    raise AttributeError(f"there is no distiller {attribute!r} in {__name__}")
