"""An experiment: one teacher, one student, several arms, each with the same seeds, data and number of updates."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse import distillers, tasks
from stillhouse.distillers.base import Distiller
from stillhouse.run import Run, distill
from stillhouse.run_folder import slug
from stillhouse.training.log import read_table

LOG = logging.getLogger("stillhouse")
SMOKE = {"smoke": True, "allow_weak_teacher": True}


@dataclass(frozen=True)
class Arm:
    """A way to train the student.

    Attributes:
        name: what the table calls it.
        method: a method's name, or a distiller class of the experiment's own (an ablation that is no method).
        settings: of the method, and what differs from the experiment's recipe, data and networks.
        weights: the names of those settings that weigh its loss terms; a search scales them together.
        before: a run that comes first, with the same seed; this arm's student begins as what it has kept.
    """

    name: str
    method: str | type[Distiller]
    settings: dict[str, Any] = field(default_factory=dict)
    weights: tuple[str, ...] = ()
    before: Arm | None = None


@dataclass(frozen=True)
class Search:
    """Every arm's own learning rate and loss weight, found on a seed and in a share of the updates that count for nothing else.

    First the rates at the method's own weights, then, at the best rate, the scales of those weights.
    """

    rates: Sequence[float]
    scales: Sequence[float]
    share: float = 1 / 3
    seed: int = 1000


@dataclass(frozen=True)
class Study:
    """What came of an experiment: `runs[arm]` has one run a seed, in the order of the seeds; `found[arm]` what the search chose.

    `before[arm]` has the runs that came before them, of the arms that have any.
    """

    experiment: Experiment
    teacher: Run
    seeds: Sequence[int]
    runs: dict[str, list[Run]]
    found: dict[str, dict[str, float]]
    before: dict[str, list[Run]] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class Experiment:
    """What is compared, on what.

    Attributes:
        name: also the folder's name.
        title: what it is, in a sentence for the table.
        data: the student's data, a spec.
        teacher_data: the teacher's, a spec with the same validation images.
        student: a spec.
        teacher: a spec; trained once, on labels; or what is prepared, such as "@mae".
        recipe: settings of the loop, the same for all arms.
        teacher_recipe: what differs for the teacher.
        arms: the first one is what differences are taken from.
        task: classify, detect or segment.
        inherit: whether all students begin with the teacher's neck and head.
        search: how every arm's learning rate and weight are found; by default all have the recipe's and their own.
        searched: another experiment of the same arms, whose search counts for this one.
        drawn: the arms whose masks are drawn over the training.
        prepared: runs that are made once, in their order, before the teacher's. Any setting that begins with @NAME means the folder of the
            one of that name: "@mae", "@mae/autoencoder"; @teacher is the teacher's.
        retained: whether the table also gives each figure as a share of the teacher's.
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
    task: str = "classify"
    inherit: bool = False
    search: Search | None = None
    searched: Experiment | None = None
    drawn: Sequence[str] = ()
    prepared: Sequence[Arm] = ()
    retained: bool = False

    def run(self, out: Path, seeds: Sequence[int], smoke: bool) -> Study:
        """All runs of all arms, seed by seed, so that an interrupted experiment has whole seeds."""
        tiny, folder = SMOKE if smoke else {}, self._folder(out, smoke)
        teacher = self._taught(out, smoke)
        found = (self.searched or self).find(out, smoke)
        runs: dict[str, list[Run]] = {arm.name: [] for arm in self.arms}
        before: dict[str, list[Run]] = {arm.name: [] for arm in self.arms if arm.before is not None}
        for seed in seeds:
            for arm in self.arms:
                begun = self._begun(arm, teacher, folder, {"seed": seed, **tiny})
                settings = self.settings(arm, teacher, **found[arm.name]) | begun | {"seed": seed, **tiny}
                runs[arm.name].append(self._trained(arm, folder / f"{slug(arm.name.lower())}-{seed}", settings))
                if begun:
                    before[arm.name].append(Run(Path(begun["student"])))
        return Study(self, teacher, seeds, runs, found, before=before)

    def find(self, out: Path, smoke: bool) -> dict[str, dict[str, float]]:
        """What the search chose for each arm."""
        teacher, folder = self._taught(out, smoke), self._folder(out, smoke)
        return {arm.name: self._searched(arm, teacher, folder, SMOKE if smoke else {}) for arm in self.arms}

    def _folder(self, out: Path, smoke: bool) -> Path:
        return out / (f"{self.name}-smoke" if smoke else self.name)

    def _taught(self, out: Path, smoke: bool) -> Run:
        folder, tiny = self._folder(out, smoke), SMOKE if smoke else {}
        for arm in self.prepared:
            finished(arm.method, folder / slug(arm.name.lower()), **self._located(self._shared(arm) | tiny, folder))
        recipe = {"task": self.task} | self.recipe | self.teacher_recipe | tiny
        settings = self._located({"student": self.teacher, "data": self.teacher_data, **recipe}, folder)
        return finished("scratch", folder / "teacher", **settings)

    def _begun(self, arm: Arm, teacher: Run, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
        """The student that an arm begins with, if a run comes before it; made now."""
        if arm.before is None:
            return {}
        first = self.settings(arm.before, teacher) | settings
        return {"student": str(finished(arm.before.method, folder / f"{slug(arm.name.lower())}-{first['seed']}-before", **first).folder)}

    def _located(self, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
        """The settings, with folders for what begins with @."""

        def path(value: str) -> str:
            name, slash, part = value.removeprefix("@").partition("/")
            return f"{folder / slug(name.lower())}{slash}{part}"

        return {key: path(value) if isinstance(value, str) and value.startswith("@") else value for key, value in settings.items()}

    def _shared(self, arm: Arm) -> dict[str, Any]:
        task = {"task": self.task} if self.task in distillers.find(arm.method).tasks else {}
        return {"student": self.student, "data": self.data, **task, **self.recipe, **arm.settings}

    def _searched(self, arm: Arm, teacher: Run, folder: Path, tiny: dict[str, Any]) -> dict[str, float]:
        """The learning rate and the scale of the weights that did best in short runs."""
        if self.search is None:
            return {}

        def score(rate: float, scale: float) -> float:
            own = {"seed": self.search.seed, **tiny}  # type: ignore[union-attr]
            settings = self.settings(arm, teacher, lr=rate, scale=scale) | self._begun(arm, teacher, folder, own) | own
            settings["epochs"] = max(1, round(settings["epochs"] * self.search.share))  # type: ignore[union-attr]
            settings["eval_every"] = settings["epochs"]
            return self.headline(self._trained(arm, folder / f"search-{slug(arm.name.lower())}-{rate:g}-{scale:g}", settings))

        rate = max(self.search.rates, key=lambda rate: score(rate, 1.0))
        scale = max((1.0, *(self.search.scales if arm.weights else ())), key=lambda scale: score(rate, scale))
        return {"lr": rate, "scale": scale}

    def settings(self, arm: Arm, teacher: Run, lr: float | None = None, scale: float = 1.0) -> dict[str, Any]:
        """What an arm's run is made with; at the method's own loss weights times `scale`."""
        settings = self._shared(arm)
        defaults = distillers.settings(arm.method)
        settings |= {name: scale * arm.settings.get(name, defaults[name].default) for name in arm.weights}
        settings |= {"lr": lr} if lr is not None else {}
        settings |= {"inherit": str(teacher.folder)} if self.inherit else {}
        if "teacher" in distillers.networks(arm.method):
            settings.setdefault("teacher", str(teacher.folder))
        return self._located(settings, teacher.folder.parent)

    def _trained(self, arm: Arm, folder: Path, settings: dict[str, Any]) -> Run:
        run = finished(arm.method, folder, **settings)
        LOG.info("%s: %s %.4f", folder.name, tasks.find(self.task).titles[tasks.find(self.task).headline], self.headline(run))
        return run

    def headline(self, run: Run) -> float:
        """The metric that decides, of a run's last evaluation."""
        return run.metrics[tasks.find(self.task).headline]


ALMOST_NOTHING: dict[str, Any] = {"epochs": 1, "max_steps": 1, "lr": 1e-9, "min_lr": 0.0}
"""One step that changes nothing: a network as it begins, with what its method makes of it."""


def fine_tuned(name: str, method: str | type[Distiller], settings: dict[str, Any]) -> Arm:
    """An arm that learns from labels, on top of what a method has pre-trained."""
    return Arm(name, "scratch", before=Arm(name, method, settings))


def curriculum(run: Run) -> tuple[float, float] | None:
    """The teacher's top-1 on what it was shown, at the first and the last evaluation; None without a teacher."""
    rows = [row for row in read_table(run.folder / "val.csv") if "teacher_top1" in row]
    return (float(rows[0]["teacher_top1"]), float(rows[-1]["teacher_top1"])) if rows else None


def finished(method: str | type[Distiller], folder: Path, **settings: Any) -> Run:
    """The run in a folder; taken up where it is, and refused if it was begun with other settings."""
    return distill(method, out=str(folder), resume=(folder / "settings.yaml").is_file(), **settings)
