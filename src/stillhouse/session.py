"""One run from its settings to its report: opens the parts, checks them, trains, keeps the student, and says what came of it."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import logging
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
from torch import nn
from torch.utils.data import Subset

import stillhouse
from stillhouse import distillers, tasks
from stillhouse.cache.teacher import CachedTeacher
from stillhouse.caching import cached_teacher
from stillhouse.checking import Finding, check_distiller, some_of
from stillhouse.data import OF_CLASSES, Data, open_data
from stillhouse.data.loading import eval_batches
from stillhouse.distillers.base import Stage, feed, is_data
from stillhouse.errors import UserError
from stillhouse.fitting import (
    OWN,
    fit_of,
    for_method,
    input_of,
    open_student,
    refuse_other_task,
    split_settings,
    task_of_job,
    transforms_of,
)
from stillhouse.interrupted import Interrupted
from stillhouse.measure.precision import PrecisionError, lowered_within
from stillhouse.models.inherit import inherit
from stillhouse.models.opening import open_model
from stillhouse.models.saving import save_student
from stillhouse.models.weights import weights_hash
from stillhouse.randomness import seed_from, seeded
from stillhouse.report import write_report
from stillhouse.results import results
from stillhouse.run_folder import (
    FREE,
    emptied,
    locked,
    remove_unfinished,
    slug,
    status,
    write_facts,
    write_settings,
    write_skipped,
    writing,
)
from stillhouse.tasks.base import Task
from stillhouse.training.batches import on_device
from stillhouse.training.elsewhere import device_of_name, put_elsewhere
from stillhouse.training.failures import explained, undisturbed
from stillhouse.training.loop import Loop
from stillhouse.training.processes import processes

LOG = logging.getLogger("stillhouse")
MIXED = ("same device", "weight type")
"""How PyTorch says that devices are mixed up."""
PROBE = 128
"""Validation images on which a teacher in low precision is compared with the same in full precision."""
KILLED = "this run was killed, most often because memory ran out, or its machine stopped; it goes on after step %d"
"""Told when it goes on: it could not say so itself."""


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
        self.holding = False
        self.method, self.distiller = distillers.name_of(job["method"]), distillers.find(job["method"])
        self.recipe, self.augmentation, self.settings = split_settings(job["method"], job)
        self.job = job
        self.teacher_device = self.device_of_teacher()
        opened = open_data(_needed(job, "data"), seed=self.recipe.seed, bad_data=job["bad_data"], task=task_of_job(job))
        self.data = for_method(job["method"], opened, job["task"])
        refuse_other_task(job["method"], self.data)
        self.unlabelled = self.open_unlabelled()
        self.teacher = self.open_teacher()
        self.student = open_student(_needed(job, "student"), self.data, job["student_weights"], job["allow_partial"], self.recipe.seed)
        self.others = {name: self.open_other(name) for name in distillers.others(job["method"])}
        self.inherit()
        self.preprocessing = input_of(self.student, self.data)
        self.transforms = transforms_of(self.preprocessing, self.data, self.augmentation)
        self.teacher_hash = weights_hash(self.teacher) if self.teacher is not None else None
        self.precision_error = self.lower_teacher()

    def device_of_teacher(self) -> torch.device | None:
        """Where the teacher computes; None: where the student does."""
        named = self.job["teacher_device"]
        if named is None:
            return None
        if "teacher" not in distillers.networks(self.job["method"]):
            raise UserError(f"method {self.method} has no teacher, but --teacher-device {named} was given; leave it out")
        if processes(self.recipe.timeout).num_processes > 1:
            raise UserError(f"--teacher-device {named} is for one process, and these are several, each with a teacher beside its student")
        return device_of_name(named)

    def open_unlabelled(self) -> Data:
        """The images that a stage without labels learns from: those of the data, where no others are named."""
        named = self.job["unlabelled"]
        if named is not None and not self.distiller.unlabelled:
            raise UserError(f"method {self.method} has no stage that learns from unlabelled images: leave --unlabelled out")
        if named is None:
            return dataclasses.replace(self.data, task="encode") if self.data.task in OF_CLASSES else self.data
        found = open_data(named, seed=self.recipe.seed, bad_data=self.job["bad_data"], task="encode")
        if (found.channels, found.size) != (self.data.channels, self.data.size):
            raise UserError(
                f"the images of '{found.name}' have {found.channels} channels and the size {found.size}, those of '{self.data.name}' "
                f"{self.data.channels} and {self.data.size}: one student cannot take both"
            )
        return found

    def open_teacher(self) -> nn.Module | None:
        """The teacher with its weights, if the method has one."""
        named = self.job["teacher"]
        if named is None and "teacher" in distillers.needed(self.job["method"]):
            raise UserError(f"method {self.method} needs a teacher: name it with --teacher, or train without one with --method scratch")
        if named is not None and "teacher" not in distillers.networks(self.job["method"]):
            raise UserError(f"method {self.method} has no teacher, but --teacher {_plain(named) or 'a module'} was given; leave it out")
        return self.open_source(named) if named is not None else None

    def open_other(self, name: str) -> nn.Module | None:
        """A network beside student and teacher: opened as a teacher if it is frozen, otherwise as a student with weights of its own."""
        named = self.job.get(name)
        if named is None and name in distillers.needed(self.job["method"]):
            raise UserError(f"method {self.method} needs a {name}: name it with --{name.replace('_', '-')}")
        if named is None:
            return None
        if name in self.distiller.frozen:
            return self.open_source(named)
        seed = seed_from(self.recipe.seed, name)
        return open_student(named, self.data, self.job["student_weights"], self.job["allow_partial"], seed)

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

    def lower_teacher(self) -> PrecisionError | None:
        """Puts the teacher into low precision, if that is asked for, and says what it lost."""
        precision, limit = self.job["teacher_precision"] or "fp32", self.job["teacher_error"]
        if precision == "fp32":
            return None
        if self.teacher is None:
            raise UserError(f"method {self.method} has no teacher, but --teacher-precision {precision} was given; leave it out")
        if self.data.task not in ("classify", "segment") or self.data.inputs != "images":
            raise UserError(
                f"a teacher in {precision} must be one whose error can be told, which gives logits of images, and '{self.data.name}' has "
                f"{self.data.inputs} to {self.data.task}; leave --teacher-precision out, --precision bf16 holds for all networks"
            )
        batches = eval_batches(some_of(self.data.val, PROBE), self.transforms[1], batch=32)
        device, images = self.teacher_device or processes().device, (images for _, images, _ in batches)
        self.teacher, error = lowered_within(self.teacher, precision, limit, images, feed(self.student, self.teacher), device)
        return error

    def of_precision(self) -> dict[str, str]:
        """What a teacher's answers follow from beside its weights: nothing in full precision."""
        error = self.precision_error
        return {"teacher_precision": f"{error.precision} by {error.by}"} if error is not None else {}

    def stages(self) -> Iterator[Stage]:
        """The parts of the training. What a distiller adds to the networks starts from weights that are a function of the seed."""
        stages = self.distiller.stages(self.student, self.teacher, self.recipe.epochs, **self.others, **self.settings)
        for number in itertools.count():
            with seeded(self.recipe.seed, "stage", number):
                stage = next(stages, None)
            if stage is None:
                return
            yield stage

    def run(self) -> None:
        """Trains stage by stage, then keeps the student and writes the results and the report."""
        self.facts: dict[str, Any] = {}
        with ExitStack() as self.held:
            if (self.folder / "settings.yaml").is_file():
                self.hold()
            self.run_alone()

    def hold(self) -> None:
        """Nobody else trains in the folder until `run` is over."""
        if processes(self.recipe.timeout).is_main_process and not self.holding:
            self.held.enter_context(locked(self.folder))
            self.holding = True

    def run_alone(self) -> None:
        """`run`, once nobody else works in the folder."""
        loop: Loop | None = None
        try:
            with explained(lambda: loop.step if loop is not None else 0):
                for number, stage in enumerate(self.stages()):
                    loop = self.loop(stage, first=number == 0)
                    metrics = loop.run()
                if loop is not None:
                    self.finish(loop, metrics)
        except BaseException as error:
            with undisturbed():
                self.end("interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed")
            raise

    def loop(self, stage: Stage, first: bool) -> Loop:
        """The loop of a stage, where it was stopped if this is a resume. Before the first one all is checked, and nothing written."""
        data = self.data_of(stage)
        self.prepare(stage, data)
        if first:
            for finding in self.findings(stage, data):
                LOG.info("%s: %s", finding.what, finding.seen)
        facts = self.describe(stage)
        settings = {name: str(value) for name, value in {**vars(self.recipe), **self.augmentation, **self.settings}.items()}
        same = {
            "method": self.method,
            "student": _plain(self.job["student"]),
            **facts["hashes"],
            **self.of_precision(),
            "settings": {name: value for name, value in settings.items() if name not in FREE},
        }
        recipe = dataclasses.replace(self.recipe, epochs=stage.epochs)
        folder = self.folder / stage.name
        metric = metric_of(data, self.job["judge"], self.job["data"], self.folder.parent, self.recipe.smoke)
        cache = self.cache(stage, data)
        loop = Loop(stage.distiller, data, self.transforms, self.preprocessing, recipe, folder, same, self.folder.name, metric, cache)
        if self.resume:
            loop.load()
            if first and status(self.folder) == "running" and processes().is_main_process:
                LOG.warning(KILLED, loop.step)
        if first:
            self.begin(facts)
        folder.mkdir(exist_ok=True)
        return loop

    def cache(self, stage: Stage, data: Data) -> CachedTeacher | None:
        """The teacher, if its answers are kept."""
        augmentation = {name: value for name, value in self.augmentation.items() if value is not None}
        follows_from = {"teacher": self.teacher_hash, "images": str(self.preprocessing), "augmentation": augmentation}
        follows_from |= self.of_precision()
        return cached_teacher(stage, data, self.transforms[1], self.recipe, self.folder.parent, follows_from)

    def findings(self, stage: Stage, data: Data) -> list[Finding]:
        """What is seen of a stage that is prepared, before it begins."""
        try:
            found = check_distiller(stage.distiller, data, self.transforms[1], allow_weak_teacher=self.job["allow_weak_teacher"])
        except RuntimeError as error:
            if self.teacher_device is None or not any(sign in str(error) for sign in MIXED):
                raise
            raise UserError(
                f"method {self.method} does not run with its teacher on {self.teacher_device}, which it may ask as a whole only "
                f"({str(error).splitlines()[0]}); leave --teacher-device out"
            ) from error
        asked = {"teacher's precision": self.precision_error, "teacher's device": self.teacher_device}
        return found + [Finding(what, str(seen)) for what, seen in asked.items() if seen is not None]

    def check(self) -> list[Finding]:
        """What is seen of the first stage; nothing is trained or written."""
        stage = next(self.stages())
        data = self.data_of(stage)
        self.prepare(stage, data)
        return self.findings(stage, data)

    def data_of(self, stage: Stage) -> Data:
        """What a stage learns from, for the task that it is judged by."""
        if stage.task == "encode":
            return self.unlabelled
        return dataclasses.replace(self.data, task=stage.task) if stage.task else self.data  # type: ignore[arg-type]

    def prepare(self, stage: Stage, data: Data) -> None:
        """Lets the stage's distiller see the training set before anything is made of its parameters."""
        device = processes(self.recipe.timeout).device
        if self.teacher_device is not None and stage.distiller.teacher is not None:
            put_elsewhere(stage.distiller.teacher, self.teacher_device, device)
        stage.distiller.to(device)
        seen: Any = data.train
        if stage.distiller.prepared_on is not None:
            seen = Subset(seen, range(0, len(seen), -(-len(seen) // stage.distiller.prepared_on)))
        batches = eval_batches(seen, self.transforms[1], batch=self.recipe.batch, workers=self.recipe.workers)
        with seeded(self.recipe.seed, "prepare", stage.name):
            stage.distiller.prepare(on_device((images, targets), device) for _, images, targets in batches)

    def begin(self, facts: dict[str, Any]) -> None:
        """Everything was opened and checked: from here on there is a folder."""
        state, settings = processes(), vars(self.recipe) | self.augmentation | self.settings
        if state.is_main_process:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            self.hold()
            with writing(self.folder):
                if self.overwrite:
                    emptied(self.folder)
                remove_unfinished(self.folder)
            named = {name: _plain(self.job.get(name)) for name in (*OWN, *self.others)}
            of_few = {name for name in ("unlabelled", "judge") if named[name] is None}
            write_settings(self.folder, {name: value for name, value in named.items() if name not in of_few} | settings)
            write_facts(self.folder, facts)
            write_skipped(self.folder, self.skipped)
        self.facts = facts
        state.wait_for_everyone()

    @property
    def skipped(self) -> list[str]:
        """What was left out of the data, and why."""
        return list(dict.fromkeys([*self.data.skipped, *self.unlabelled.skipped]))

    def describe(self, stage: Stage) -> dict[str, Any]:
        """What `run.json` says about a run that begins."""
        return {
            "status": "running",
            "method": self.method,
            "task": self.data.task,
            "title": self.distiller.__name__,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "seed": self.recipe.seed,
            "versions": versions(),
            "hashes": self.hashes(),
            "teacher_precision": dataclasses.asdict(self.precision_error) if self.precision_error else None,
            "data": {
                "name": self.data.name,
                "classes": self.data.classes,
                "train": len(self.data.train),  # type: ignore[arg-type]
                "val": len(self.data.val),  # type: ignore[arg-type]
                "skipped": self.skipped,
            },
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }

    def hashes(self) -> dict[str, str | None]:
        """Of what must be the same when the run is taken up again."""
        frozen = {name: network for name, network in self.others.items() if network is not None and name in self.distiller.frozen}
        found = {"teacher": self.teacher_hash} | {name: weights_hash(network) for name, network in frozen.items()}
        found["data"] = self.data.fingerprint
        return found | ({"unlabelled": self.unlabelled.fingerprint} if self.job["unlabelled"] is not None else {})

    def finish(self, loop: Loop, metrics: dict[str, float]) -> None:
        """Keeps the student, trains the baseline if asked, compares, and writes the report."""
        main, kept = loop.accelerator.is_main_process, loop.kept
        self.facts["metrics"], self.facts["per_class"] = tasks.by_class(metrics)
        self.facts["alarms"], self.facts["news"] = loop.alarms, loop.news
        if main:
            keep(kept, self.folder)
        loop.accelerator.wait_for_everyone()
        self.facts["teacher_cache"] = loop.cached()
        if self.job["baseline"] and self.method != "scratch":
            self.train_baseline()
        if main:
            self.facts |= results(self.folder, loop, metrics)
        self.end("finished")
        if main:
            write_report(self.folder)
        loop.accelerator.wait_for_everyone()

    def train_baseline(self) -> None:
        """The same student, recipe and seed without a teacher, in the folder `baseline`."""
        job = {
            **{name: value for name, value in self.job.items() if name not in self.settings and name not in self.others},
            "method": "scratch",
            "baseline": False,
            "teacher": None,
            "teacher_cache": None,
            "teacher_precision": None,
            "teacher_device": None,
        }
        folder = self.folder / "baseline"
        resume = (folder / "settings.yaml").is_file()
        Session(folder, job, resume).run()

    def end(self, status: str) -> None:
        """Says in `run.json` how the run stands, once there is one."""
        if self.facts and processes().is_main_process:
            self.facts |= {"status": status, "seconds": round(time.time() - self.started, 1)}
            write_facts(self.folder, self.facts)


def keep(products: dict[str, nn.Module], folder: Path) -> None:
    """Writes what a run leaves behind, each in a folder of its own: networks, and sets of data as they say themselves."""
    for name, product in products.items():
        if is_data(product):
            product.write(folder / name)  # type: ignore[operator]
        else:
            save_student(product, folder / name)


def metric_of(data: Data, judge: str | nn.Module | None, source: Any, beside: Path, smoke: bool = False) -> Callable[..., Task]:
    """What makes the metric of the data's task.

    Args:
        judge: a classifier of the same data, in whose eyes generated images are measured; by default one is trained once, `beside`.
        source: the data as they were named.
    """
    kind = tasks.find(data.task)
    if not kind.judged:
        return functools.partial(kind, data.classes)
    network = open_model(judge or str(trained_judge(beside, source, smoke)), **fit_of(dataclasses.replace(data, task="classify")))
    found: Any = kind
    return functools.partial(found, data.classes, judge=network.requires_grad_(False).eval())


def trained_judge(beside: Path, data: Any, smoke: bool) -> Path:
    """The folder of a classifier of these data, trained once, for all runs in a folder.

    Raises:
        UserError: if the data were made in Python and have no name.
    """
    if not isinstance(data, str):
        raise UserError("generated images are measured in the eyes of a classifier of the same data: name its run folder with --judge")
    folder = beside / f"judge-{slug(data)}{'-smoke' if smoke else ''}"
    if not (folder / "run.json").is_file() or status(folder) != "finished":
        LOG.info("training a judge of '%s' in %s", data, folder)
        recipe = {"batch": 64, "epochs": 20, "lr": 2e-3, "eval_every": 20, "trackers": "none", "smoke": smoke}
        own: dict[str, Any] = {"method": "scratch", "student": "timm/test_resnet", "data": data, "task": "classify"}
        own |= {"student_weights": "random", "allow_partial": False, "allow_weak_teacher": True, "baseline": False, "bad_data": "skip"}
        Session(folder, dict.fromkeys(OWN) | own | recipe, resume=(folder / "settings.yaml").is_file()).run()
    return folder


def versions() -> dict[str, str]:
    """What this run was made with."""
    return {
        "stillhouse": stillhouse.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
    }


def _needed(job: dict[str, Any], part: str) -> Any:
    if job[part] is None:
        raise UserError(f"name the {part} with --{part}; or name neither teacher, student nor data to run the embedded job")
    return job[part]


def _plain(value: Any) -> Any:
    """A setting as YAML can hold it: objects given in Python are named, not kept."""
    return value if isinstance(value, (str, int, float, bool, type(None))) else None
