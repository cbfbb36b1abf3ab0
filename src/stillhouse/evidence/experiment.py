"""An experiment: one teacher, one student, several arms, each with the same seeds, data and number of updates."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.distillers.base import Distiller
from stillhouse.run import Run, distill
from stillhouse.training.log import read_table

LOG = logging.getLogger("stillhouse")
SMOKE = {"smoke": True, "allow_weak_teacher": True}


@dataclass(frozen=True)
class Arm:
    """A way to train the student.

    Attributes:
        name: what the table calls it.
        method: a method's name, or a distiller class of the experiment's own (an ablation that is no method).
        settings: of the method.
    """

    name: str
    method: str | type[Distiller]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """What came of an experiment: `runs[arm]` has one run a seed, in the order of the seeds."""

    experiment: Experiment
    teacher: Run
    seeds: Sequence[int]
    runs: dict[str, list[Run]]


@dataclass(frozen=True)
class Experiment:
    """What is compared, on what.

    Attributes:
        name: also the folder's name.
        title: what it is, in a sentence for the table.
        data: the student's data, a spec.
        teacher_data: the teacher's, a spec with the same validation images.
        student: a spec.
        teacher: a spec; trained once, on labels.
        recipe: settings of the loop, the same for all arms.
        teacher_recipe: what differs for the teacher.
        arms: the first one is what differences are taken from.
    """

    name: str
    title: str
    data: str
    teacher_data: str
    student: str
    teacher: str
    recipe: dict[str, Any]
    teacher_recipe: dict[str, Any]
    arms: Sequence[Arm]

    def run(self, out: Path, seeds: Sequence[int], smoke: bool) -> Study:
        """All runs of all arms, seed by seed, so that an interrupted experiment has whole seeds."""
        folder = out / (f"{self.name}-smoke" if smoke else self.name)
        tiny = SMOKE if smoke else {}
        recipe = self.recipe | self.teacher_recipe | tiny
        teacher = _finished("scratch", folder / "teacher", student=self.teacher, data=self.teacher_data, **recipe)
        runs: dict[str, list[Run]] = {arm.name: [] for arm in self.arms}
        for seed in seeds:
            for arm in self.arms:
                settings = {"student": self.student, "data": self.data, "seed": seed, **self.recipe, **arm.settings, **tiny}
                if arm.method != "scratch":
                    settings["teacher"] = str(teacher.folder)
                run = _finished(arm.method, folder / f"{_slug(arm.name)}-{seed}", **settings)
                LOG.info("%s, %s, seed %d: top-1 %.4f", self.name, arm.name, seed, run.metrics["top1"])
                runs[arm.name].append(run)
        return Study(self, teacher, seeds, runs)


def curriculum(run: Run) -> tuple[float, float] | None:
    """The teacher's top-1 on what it was shown, at the first and the last evaluation; None without a teacher."""
    rows = [row for row in read_table(run.folder / "val.csv") if "teacher_top1" in row]
    return (float(rows[0]["teacher_top1"]), float(rows[-1]["teacher_top1"])) if rows else None


def _finished(method: str | type[Distiller], folder: Path, **settings: Any) -> Run:
    begun = (folder / "settings.yaml").is_file()
    return distill(method, out=str(folder), resume=begun, **({} if begun and isinstance(method, str) else settings))


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())
