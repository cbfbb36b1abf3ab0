"""What a student is for: a module a task, each with one metric that says how well the student does it. Importing this imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from stillhouse.errors import UserError, nearest

if TYPE_CHECKING:
    from stillhouse.tasks.base import Task

TASKS = {name: name.capitalize() for name in ("classify", "detect", "segment", "encode", "generate", "regress")}


def find(name: str) -> type[Task]:
    """The metric of a task by the task's name.

    Raises:
        UserError: if there is no such task, with the nearest name.
    """
    if name not in TASKS:
        raise UserError(f"there is no task '{name}'{nearest(name, TASKS)}; use {', '.join(TASKS)}")
    task: type[Task] = getattr(importlib.import_module(f"{__name__}.{name}"), TASKS[name])
    return task


def by_class(metrics: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """What `Task.compute` returned, in two: the metrics, and the values of single classes (keys such as "iou/NAME") by the class's name."""
    whole = {key: value for key, value in metrics.items() if "/" not in key}
    return whole, {key.split("/", 1)[1]: value for key, value in metrics.items() if "/" in key}
