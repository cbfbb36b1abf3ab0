"""The jobs that run when nothing but a task is named: data out of installed packages, and a teacher trained on the spot.

To classify: cluttered digits, half the teacher's patches masked. To detect or segment: digits on photographs, ACAM-KD.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillhouse.data import TaskName
    from stillhouse.distillers.base import Distiller


@dataclass(frozen=True)
class Job:
    """A teacher that sees much, and a student that sees little.

    Attributes:
        folder: where the teacher is kept, beside the runs.
        same: settings of both trainings.
    """

    folder: str
    data: str
    teacher_data: str
    student: str
    teacher: str
    same: dict[str, Any]
    recipe: dict[str, Any]
    teacher_recipe: dict[str, Any]


VIT = "timm/vit_tiny_patch16_224:img_size=24,patch_size=4,weight_init=jax"  # timm's own initialisation learns slowly when so narrow
DIGITS = "digits:canvas=24,clutter=2,step=4"
SCENES = "scenes:size=48,classes=3,clutter=0,noise=0"  # easy enough for networks that learn in a minute
FCOS = "torchvision/fcos:channels=64,levels=2,stride=8,convs=2"
LRASPP = "torchvision/lraspp:channels=64,stride=16"
DENSE = {"hflip": 0.0, "log_every": 25, "save_every": 500}  # a digit in a mirror is no digit
JOBS = {
    "classify": Job(
        folder="digits-teacher",
        data=f"{DIGITS},train=300",
        teacher_data=DIGITS,
        student=f"{VIT},embed_dim=32,depth=2,num_heads=2",
        teacher=f"{VIT},embed_dim=64,depth=3,num_heads=4",
        same={"batch": 64, "log_every": 20, "save_every": 300},
        recipe={"epochs": 150, "lr": 3e-3, "warmup_epochs": 15, "eval_every": 10},
        teacher_recipe={"epochs": 50, "lr": 1.5e-3, "warmup_epochs": 5, "eval_every": 10},
    ),
    "detect": Job(
        folder="detect-teacher",
        data=f"{SCENES},train=300",
        teacher_data=f"{SCENES},train=2000",
        student=f"{FCOS},backbone=timm/test_resnet",
        teacher=f"{FCOS},backbone=timm/resnet10t",
        same={"batch": 8, **DENSE},
        recipe={"epochs": 12, "lr": 4e-3, "warmup_epochs": 1, "eval_every": 4},
        teacher_recipe={"epochs": 5, "lr": 2e-3, "warmup_epochs": 0.5},
    ),
    "segment": Job(
        folder="segment-teacher",
        data=f"{SCENES},train=200",
        teacher_data=f"{SCENES},train=2000",
        student=f"{LRASPP},backbone=timm/test_efficientnet",
        teacher=f"{LRASPP},backbone=timm/resnet10t",
        same={"batch": 8, **DENSE},
        recipe={"epochs": 20, "lr": 6e-3, "warmup_epochs": 2, "eval_every": 5},
        teacher_recipe={"epochs": 6, "lr": 3e-3, "warmup_epochs": 1},
    ),
}


def embedded_job(
    method: str | type[Distiller], task: TaskName, given: dict[str, Any], beside: Path, train: Callable[..., Any]
) -> dict[str, Any]:
    """The settings of a task's job, where the user names no others. Its teacher is trained once, into a folder beside the run, and used
    again by later runs.

    Args:
        given: what the user named.
        beside: the folder of runs.
        train: `stillhouse.distill`, for the teacher.

    Raises:
        UserError: if a setting cannot work, before the teacher is trained.
    """
    job = JOBS[task]
    settings = {"student": job.student, "data": job.data, "task": task, **job.same, **job.recipe}
    if method == "scratch":
        return settings | given
    _refuse_what_cannot_work(method, task, given)
    smoke = bool(given.get("smoke"))
    teacher = embedded_teacher(task, beside, train, smoke)
    start = {} if task == "classify" else {"inherit": "teacher"}
    return settings | {"teacher": str(teacher), "baseline": True, "allow_weak_teacher": smoke} | start | given


def embedded_teacher(task: TaskName, beside: Path, train: Callable[..., Any], smoke: bool = False) -> Path:
    """The folder of a job's teacher, trained first if it is not there or not finished."""
    job = JOBS[task]
    folder = beside / (f"{job.folder}-smoke" if smoke else job.folder)
    if (folder / "settings.yaml").is_file():
        train(out=str(folder), resume=True)
    else:
        settings = job.same | job.teacher_recipe
        train("scratch", student=job.teacher, data=job.teacher_data, task=task, out=str(folder), smoke=smoke, **settings)
    return folder


def _refuse_what_cannot_work(method: str | type[Distiller], task: TaskName, given: dict[str, Any]) -> None:
    from stillhouse import distillers
    from stillhouse.data import open_data
    from stillhouse.fitting import open_student, refuse_other_task, split_settings

    job = JOBS[task]
    _, _, settings = split_settings(method, given)
    data = open_data(job.data, task=task)
    refuse_other_task(method, data)
    student, teacher = (open_student(spec, data, "random", False, 0) for spec in (job.student, job.teacher))
    next(distillers.find(method).stages(student, teacher, 1, **settings))
