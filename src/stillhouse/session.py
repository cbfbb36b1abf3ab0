"""One run from its settings to its report: opens the parts, checks them, trains, keeps the student, and says what came of it."""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import itertools
import logging
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
from accelerate import PartialState
from torch import nn

import stillhouse
from stillhouse import distillers, tasks
from stillhouse.checking import check_distiller
from stillhouse.data import Data, TaskName, open_data
from stillhouse.data.dense_transforms import dense_transforms
from stillhouse.data.transforms import eval_transform, train_transform
from stillhouse.distillers.base import Distiller, Stage
from stillhouse.errors import UserError, nearest
from stillhouse.interrupted import Interrupted
from stillhouse.models.detectors import is_detector
from stillhouse.models.inherit import inherit
from stillhouse.models.opening import open_model, task_of
from stillhouse.models.preprocessing import Preprocessing, preprocessing_of, set_preprocessing
from stillhouse.models.saving import save_student
from stillhouse.models.weights import weights_hash
from stillhouse.randomness import seeded
from stillhouse.report import write_report
from stillhouse.results import results
from stillhouse.run_folder import FREE, read_facts, read_settings, write_facts, write_settings, writing
from stillhouse.training.checkpoint import checkpoints, load_checkpoint
from stillhouse.training.loop import Loop, on_cpu
from stillhouse.training.recipe import NAMES, Recipe

LOG = logging.getLogger("stillhouse")
AUGMENTATION = frozenset(inspect.signature(train_transform).parameters) - {"preprocessing", "data"}
OWN = (
    *("method", "teacher", "student", "data", "task", "teacher_weights", "student_weights", "inherit"),
    *("allow_partial", "allow_weak_teacher", "baseline", "bad_data"),
)
"""The settings that are `stillhouse.distill`'s own, not the loop's, the augmentation's or the method's."""
OF_SEVERAL_TASKS = ("scenes", "voc")
"""The data that are there to detect as well as to segment."""


class Session:
    """A run in its folder.

    Args:
        folder: the run folder; made when the parts are known to work.
        job: the settings by name: of `stillhouse.distill`, the recipe, the augmentation and the method.
        resume: go on from the folder's last checkpoint.
        overwrite: remove what is in the folder, once everything is known to work.

    Raises:
        UserError: if a setting is unknown or a part cannot be opened.
    """

    def __init__(self, folder: Path, job: dict[str, Any], resume: bool = False, overwrite: bool = False) -> None:
        self.folder, self.resume, self.overwrite, self.started = folder, resume, overwrite, time.time()
        self.method, self.distiller = distillers.name_of(job["method"]), distillers.find(job["method"])
        self.recipe, self.augmentation, self.settings = split_settings(job["method"], job)
        self.job = job
        self.data = open_data(_needed(job, "data"), seed=self.recipe.seed, bad_data=job["bad_data"], task=task_of_job(job))
        refuse_other_task(job["method"], self.data)
        self.teacher = self.open_teacher()
        self.student = open_student(_needed(job, "student"), self.data, job["student_weights"], job["allow_partial"], self.recipe.seed)
        self.inherit()
        self.preprocessing = input_of(self.student, self.data)
        self.transforms = transforms_of(self.preprocessing, self.data, self.augmentation)

    def open_teacher(self) -> nn.Module | None:
        """The teacher with its weights, if the method has one."""
        needs = "teacher" in inspect.signature(self.distiller.__init__).parameters
        named = self.job["teacher"]
        if needs and named is None:
            raise UserError(f"method {self.method} needs a teacher: name it with --teacher, or train without one with --method scratch")
        if not needs and named is not None:
            raise UserError(f"method {self.method} has no teacher, but --teacher {_plain(named) or 'a module'} was given; leave it out")
        if not needs:
            return None
        return self.open_source(named)

    def open_source(self, named: str | nn.Module) -> nn.Module:
        """A network that knows the data's classes, with the weights that the teacher is to have."""
        job = self.job
        return open_model(named, **fit_of(self.data), weights=job["teacher_weights"], allow_partial=job["allow_partial"])

    def inherit(self) -> None:
        """Neck and head of the student begin as those of another network, if that is asked for."""
        named = self.job["inherit"]
        if named is None:
            return
        if named == "teacher":
            named = self.job["inherit"] = self.job["teacher"]  # by its own name, for the baseline has no teacher but the same start
        if named is None:
            raise UserError(f"--inherit teacher, but method {self.method} has no teacher: name the network to inherit from")
        taken = inherit(self.student, self.open_source(named))
        LOG.info("the student begins with the neck and head of %s: %d tensors", _plain(named) or type(named).__name__, len(taken))

    def stages(self) -> Iterator[Stage]:
        """The parts of the training. What a distiller adds to the networks starts from weights that are a function of the seed."""
        stages = self.distiller.stages(self.student, self.teacher, self.recipe.epochs, **self.settings)
        for number in itertools.count():
            with seeded(self.recipe.seed, "stage", number):
                stage = next(stages, None)
            if stage is None:
                return
            yield stage

    def first_stage(self) -> Stage:
        """The first part of the training, as it would begin."""
        return next(self.stages())

    def run(self) -> None:
        """Trains stage by stage, then keeps the student and writes the results and the report."""
        self.facts: dict[str, Any] = {}
        try:
            for number, stage in enumerate(self.stages()):
                loop = self.loop(stage, first=number == 0)
                metrics = loop.run()
            self.finish(loop, metrics)
        except BaseException as error:
            self.end("interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed")
            raise

    def loop(self, stage: Stage, first: bool) -> Loop:
        """The loop of a stage, where it was stopped if this is a resume. Before the first one all is checked, and nothing written."""
        if first:
            stage.distiller.to(PartialState(cpu=on_cpu()).device)
            weak = self.job["allow_weak_teacher"]
            for finding in check_distiller(stage.distiller, self.data, self.transforms[1], allow_weak_teacher=weak):
                LOG.info("%s: %s", finding.what, finding.seen)
        facts = self.describe(stage)
        settings = {name: str(value) for name, value in {**vars(self.recipe), **self.augmentation, **self.settings}.items()}
        same = {
            "method": self.method,
            "student": _plain(self.job["student"]),
            **facts["hashes"],
            "settings": {name: value for name, value in settings.items() if name not in FREE},
        }
        recipe = dataclasses.replace(self.recipe, epochs=stage.epochs)
        folder = self.folder / stage.name
        loop = Loop(stage.distiller, self.data, self.transforms, self.preprocessing, recipe, folder, same, title=self.folder.name)
        if self.resume:
            loop.load()
        if first:
            self.begin(facts)
        folder.mkdir(exist_ok=True)
        return loop

    def begin(self, facts: dict[str, Any]) -> None:
        """Everything was opened and checked: from here on there is a folder."""
        state, settings = PartialState(), vars(self.recipe) | self.augmentation | self.settings
        if state.is_main_process:
            with writing(self.folder):
                if self.overwrite and self.folder.exists():
                    shutil.rmtree(self.folder)
                self.folder.mkdir(parents=True, exist_ok=True)
            write_settings(self.folder, {name: _plain(self.job[name]) for name in OWN} | settings)
            write_facts(self.folder, facts)
        self.facts = facts
        state.wait_for_everyone()

    def describe(self, stage: Stage) -> dict[str, Any]:
        """What `run.json` says about a run that begins."""
        return {
            "status": "running",
            "method": self.method,
            "task": self.data.task,
            "title": type(stage.distiller).__name__,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "seed": self.recipe.seed,
            "versions": versions(),
            "hashes": {"teacher": weights_hash(self.teacher) if self.teacher is not None else None, "data": self.data.fingerprint},
            "data": {
                "name": self.data.name,
                "classes": self.data.classes,
                "train": len(self.data.train),  # type: ignore[arg-type]
                "val": len(self.data.val),  # type: ignore[arg-type]
                "skipped": self.data.skipped,
            },
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }

    def finish(self, loop: Loop, metrics: dict[str, float]) -> None:
        """Keeps the student, trains the baseline if asked, compares, and writes the report."""
        main, kept = loop.accelerator.is_main_process, loop.kept
        self.facts["metrics"], self.facts["per_class"] = tasks.by_class(metrics)
        self.facts["alarms"] = loop.alarms
        if main:
            save_student(kept, self.folder / "student")
        loop.accelerator.wait_for_everyone()
        if self.job["baseline"] and self.method != "scratch":
            self.train_baseline()
        if main:
            self.facts |= results(self.folder, loop.distiller, kept, self.data, self.transforms[1], self.recipe, metrics, loop.accelerator)
        self.end("finished")
        if main:
            write_report(self.folder)
        loop.accelerator.wait_for_everyone()

    def train_baseline(self) -> None:
        """The same student, recipe and seed without a teacher, in the folder `baseline`."""
        job = {
            **{name: value for name, value in self.job.items() if name not in self.settings},
            "method": "scratch",
            "baseline": False,
            "teacher": None,
        }
        folder = self.folder / "baseline"
        resume = (folder / "settings.yaml").is_file()
        Session(folder, job, resume).run()

    def end(self, status: str) -> None:
        """Says in `run.json` how the run stands, once there is one."""
        if self.facts and PartialState().is_main_process:
            self.facts |= {"status": status, "seconds": round(time.time() - self.started, 1)}
            write_facts(self.folder, self.facts)


def split_settings(method: str | type[Distiller], settings: dict[str, Any]) -> tuple[Recipe, dict[str, Any], dict[str, Any]]:
    """The recipe, the augmentation and the method's own settings (with their defaults) out of one flat list.

    Raises:
        UserError: for a name none of them knows, with the nearest one.
    """
    own = distillers.settings(method)
    settings = {name: value for name, value in settings.items() if name not in OWN}
    for name in settings:
        if name not in NAMES | AUGMENTATION | set(own):
            known = [*own, *NAMES, *AUGMENTATION]
            raise UserError(
                f"'{name}' is no setting of {distillers.name_of(method)} or of the training{nearest(name, known)}; "
                f"the method's own are {', '.join(own) or 'none'}"
            )
    recipe = Recipe(**{name: value for name, value in settings.items() if name in NAMES})
    augmentation = {name: value for name, value in settings.items() if name in AUGMENTATION}
    return recipe, augmentation, {name: settings.get(name, parameter.default) for name, parameter in own.items()}


def task_of_job(job: dict[str, Any]) -> TaskName | None:
    """The task asked for; where none is and the data allow several, what the student is there for."""
    data, student = job["data"], job["student"]
    open_question = job["task"] is None and isinstance(data, str) and data.partition(":")[0] in OF_SEVERAL_TASKS and "task=" not in data
    if not open_question or student is None:
        return job["task"]  # type: ignore[no-any-return]
    found = ("detect" if is_detector(student) else None) if isinstance(student, nn.Module) else task_of(student)
    return found if found in ("detect", "segment") else None


def refuse_other_task(method: str | type[Distiller], data: Data) -> None:
    """Refuses data that are not what the method is for.

    Raises:
        UserError: naming the methods that are.
    """
    kind = distillers.find(method)
    if data.task not in kind.tasks:
        fitting = [name for name in distillers.modules() if data.task in distillers.find(name).tasks]
        raise UserError(
            f"method {distillers.name_of(method)} is for data to {' or '.join(kind.tasks)}, and '{data.name}' is to {data.task}; "
            f"use one of {', '.join(sorted(fitting))}"
        )


def fit_of(data: Data) -> dict[str, Any]:
    """What the data ask of a network, as `open_model` wants to hear it. Classifiers know their own image size."""
    size = {} if data.task == "classify" else {"image_size": data.size, "names": data.classes}
    return {"classes": len(data.classes), "channels": data.channels, "task": data.task, **size}


def transforms_of(preprocessing: Preprocessing, data: Data, augmentation: dict[str, Any]) -> tuple[Any, Any]:
    """The training and the evaluation transform."""
    if data.task != "classify":
        return dense_transforms(preprocessing, data, **augmentation)
    return train_transform(preprocessing, data, **augmentation), eval_transform(preprocessing, data)


def open_student(spec: str | nn.Module, data: Data, weights: str, allow_partial: bool, seed: int) -> nn.Module:
    """The student with a head that fits the data. With random weights it takes images normalised by the data's own mean and std."""
    student = open_model(spec, **fit_of(data), weights=weights, allow_partial=allow_partial, seed=seed, new_head=True)
    normalises_itself = data.task == "detect"
    if weights == "random" and isinstance(spec, str) and student.stillhouse["weights"] == "random" and not normalises_itself:  # type: ignore[index]
        own = preprocessing_of(student)
        size = own.size if own and hasattr(student, "patch_embed") else getattr(getattr(student, "config", None), "image_size", None)
        set_preprocessing(student, Preprocessing(data.mean, data.std, size or data.size or (own.size if own else None) or SIZES[data.task]))
    return student


def input_of(student: nn.Module, data: Data) -> Preprocessing:
    """What the data's images are made into: what the student was trained with, or the data's own statistics."""
    known = preprocessing_of(student)
    if data.task == "detect":
        return known or Preprocessing((0.0,) * data.channels, (1.0,) * data.channels, None)
    known = known or Preprocessing(data.mean, data.std, data.size or SIZES[data.task])
    return known if known.size or data.task == "classify" else dataclasses.replace(known, size=data.size or SIZES[data.task])


def student_so_far(folder: Path) -> None:
    """Writes the student of a run that is not finished into its folder, from the last checkpoint (the moving average if there is one).

    Raises:
        UserError: if the run has no checkpoint yet, or none of a stage in which the student learns.
    """
    facts = read_facts(folder)
    if facts["status"] == "finished":
        return
    found = [
        path for stage in (folder, *sorted(folder.iterdir())) for path in checkpoints(stage / "checkpoints") if stage.name != "baseline"
    ]
    if not found:
        raise UserError(f"the run in {folder} has no checkpoint yet; wait for its first one (see --save-every)")
    last = max(found, key=lambda path: path.stat().st_mtime)
    parts, _ = load_checkpoint(last)
    own = {name.removeprefix("student."): value for name, value in parts["distiller"].items() if name.startswith("student.")}
    if not own:
        stage = last.parent.parent.name
        raise UserError(f"the run in {folder} is in its stage '{stage}', in which the student does not learn yet; wait for the next one")
    job = read_settings(folder / "settings.yaml")
    if job["student"] is None or job["data"] is None:
        raise UserError(f"the run in {folder} was begun in Python with objects that no file names; finish it with resume=True there")
    data = open_data(job["data"], seed=job["seed"], bad_data="skip", task=facts.get("task"))
    student = open_student(job["student"], data, job["student_weights"], job["allow_partial"], job["seed"])
    student.load_state_dict(parts.get("ema", own))
    shutil.rmtree(folder / "student", ignore_errors=True)
    save_student(student, folder / "student")


def versions() -> dict[str, str]:
    """What this run was made with."""
    return {
        "stillhouse": stillhouse.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
    }


SIZES = {"classify": 224, "segment": 512}
"""The side of the images, in pixels, where neither data nor network name one."""


def _needed(job: dict[str, Any], part: str) -> Any:
    if job[part] is None:
        raise UserError(f"name the {part} with --{part}; or name neither teacher, student nor data to run the embedded job")
    return job[part]


def _plain(value: Any) -> Any:
    """A setting as YAML can hold it: objects given in Python are named, not kept."""
    return value if isinstance(value, (str, int, float, bool, type(None))) else None
