"""The job that runs when nothing is named: cluttered digits out of scikit-learn, a teacher trained on the spot, half its patches masked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillhouse.distillers.base import Distiller

DATA = "digits:canvas=24,clutter=2,step=4"
VIT = "timm/vit_tiny_patch16_224:img_size=24,patch_size=4,weight_init=jax"  # timm's own initialisation learns slowly when so narrow
TEACHER = f"{VIT},embed_dim=64,depth=3,num_heads=4"
STUDENT = f"{VIT},embed_dim=32,depth=2,num_heads=2"
RECIPE: dict[str, Any] = {"batch": 64, "log_every": 20, "save_every": 300}
TEACHER_RECIPE: dict[str, Any] = RECIPE | {"epochs": 50, "lr": 1.5e-3, "warmup_epochs": 5, "eval_every": 10}
STUDENT_RECIPE: dict[str, Any] = RECIPE | {"epochs": 150, "lr": 3e-3, "warmup_epochs": 15, "eval_every": 10}


def embedded_job(method: str | type[Distiller], given: dict[str, Any], beside: Path, train: Callable[..., Any]) -> dict[str, Any]:
    """The settings of the job, where the user names no others: a student on 300 digits, its teacher on a thousand.

    The teacher is trained once, into the folder `digits-teacher` beside the run, and used again by later runs.

    Args:
        given: what the user named.
        beside: the folder of runs.
        train: `stillhouse.distill`, for the teacher.

    Raises:
        UserError: if a setting cannot work, before the teacher is trained.
    """
    job = {"student": STUDENT, "data": f"{DATA},train=300", **STUDENT_RECIPE}
    if method == "scratch":
        return job | given
    _refuse_what_cannot_work(method, given)
    smoke = bool(given.get("smoke"))
    return job | {"teacher": str(teacher_on_digits(beside, train, smoke)), "baseline": True, "allow_weak_teacher": smoke} | given


def teacher_on_digits(beside: Path, train: Callable[..., Any], smoke: bool = False) -> Path:
    """The folder of the embedded teacher, trained first if it is not there or not finished."""
    folder = beside / ("digits-teacher-smoke" if smoke else "digits-teacher")
    if (folder / "settings.yaml").is_file():
        train(out=str(folder), resume=True)
    else:
        train("scratch", student=TEACHER, data=DATA, out=str(folder), smoke=smoke, **TEACHER_RECIPE)
    return folder


def _refuse_what_cannot_work(method: str | type[Distiller], given: dict[str, Any]) -> None:
    from stillhouse import distillers
    from stillhouse.models.opening import open_model
    from stillhouse.session import split_settings

    _, _, settings = split_settings(method, given)
    student, teacher = (open_model(spec, classes=10, channels=1) for spec in (STUDENT, TEACHER))
    next(distillers.find(method).stages(student, teacher, 1, **settings))
