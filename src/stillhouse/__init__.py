"""Stillhouse distils: a small model out of a large one, by the published ways, under one interface.

    import stillhouse as sh

    run = sh.distill("masked_kd", teacher="timm/deit_base_patch16_224", student="timm/deit_tiny_patch16_224", data="imagefolder:DIR")
    distiller = sh.distillers.MaskedKD(student, teacher, keep=0.5)  # in your own loop: sum(distiller((images, labels)).values()).backward()

Names are loaded on first use: importing the package imports neither torch nor timm nor Accelerate.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from stillhouse import distillers
    from stillhouse.commands import check, compare, estimate, evaluate, export, methods, reproduce
    from stillhouse.data import Data, open_data
    from stillhouse.errors import UserError
    from stillhouse.interrupted import Interrupted
    from stillhouse.models.opening import open_model
    from stillhouse.run import Run, distill

__all__ = [
    "Data",
    "Interrupted",
    "Run",
    "UserError",
    "check",
    "compare",
    "distill",
    "distillers",
    "estimate",
    "evaluate",
    "export",
    "methods",
    "open_data",
    "open_model",
    "reproduce",
]

_HOMES = {
    "Data": "data",
    "Interrupted": "interrupted",
    "Run": "run",
    "UserError": "errors",
    "distill": "run",
    "open_data": "data",
    "open_model": "models.opening",
}


def __getattr__(name: str) -> Any:
    if name == "distillers":
        return importlib.import_module("stillhouse.distillers")
    if name not in __all__:
        raise AttributeError(f"module 'stillhouse' has no attribute {name!r}")
    return getattr(importlib.import_module(f"stillhouse.{_HOMES.get(name, 'commands')}"), name)
