from __future__ import annotations

import subprocess
import sys

import pytest
from torch import nn

from stillhouse.errors import UserError
from stillhouse.tasks import TASKS, by_class, find


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_the_same_face(name: str) -> None:
    task = find(name)
    assert task.__name__ == TASKS[name]
    assert next(iter(task.titles)) == task.headline
    judge = {"judge": nn.Linear(2, 2)} if task.judged else {}
    assert task(["a", "b"], **judge).classes == ["a", "b"]


def test_an_unknown_task_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="there is no task 'segmnt', did you mean 'segment'"):
        find("segmnt")


def test_values_of_classes_are_told_apart_whatever_the_classes_are_called() -> None:
    assert by_class({"miou": 0.5, "iou/a": 0.4, "iou/b/c": 0.6}) == ({"miou": 0.5}, {"a": 0.4, "b/c": 0.6})


def test_what_is_measured_class_by_class_needs_different_names() -> None:
    for name in ("detect", "segment"):
        with pytest.raises(UserError, match="two classes of the data are called 'crane'"):
            find(name)(["crane", "car", "crane"])
    find("classify")(["crane", "crane"])


def test_importing_the_package_imports_no_torch() -> None:
    subprocess.run([sys.executable, "-c", "import sys, stillhouse.tasks; assert 'torch' not in sys.modules"], check=True)
