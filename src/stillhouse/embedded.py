"""The job that runs when nothing is named: cluttered digits out of scikit-learn, a teacher trained on the spot, half its patches masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DATA = "digits:canvas=24,clutter=2"
TEACHER = "timm/vit_tiny_patch16_224:img_size=24,patch_size=4,embed_dim=64,depth=4,num_heads=4"
STUDENT = "timm/vit_tiny_patch16_224:img_size=24,patch_size=4,embed_dim=32,depth=2,num_heads=2"
RECIPE: dict[str, Any] = {"batch": 64, "lr": 2e-3, "warmup_epochs": 5, "log_every": 20, "eval_every": 20, "save_every": 400}


def embedded_job(method: str, given: dict[str, Any], out: str | None) -> dict[str, Any]:
    """The settings of the job, where the user names no others: a student on 300 digits, its teacher on a thousand.

    The teacher is trained once, into the folder `digits-teacher` beside the run, and used again by later runs.
    """
    job = {"student": STUDENT, "data": f"{DATA},train=300", "epochs": 225, **RECIPE}
    if method == "scratch":
        return job | given
    smoke = bool(given.get("smoke"))
    teacher = teacher_on_digits(Path(out).parent if out else Path("runs"), smoke)
    return job | {"teacher": str(teacher), "baseline": True, "allow_weak_teacher": smoke} | given


def teacher_on_digits(beside: Path, smoke: bool = False) -> Path:
    """The folder of the embedded teacher, trained first if it is not there or not finished."""
    from stillhouse.run import distill

    folder = beside / ("digits-teacher-smoke" if smoke else "digits-teacher")
    started = (folder / "settings.yaml").is_file()
    job = {} if started else {"student": TEACHER, "data": DATA, "epochs": 150, **RECIPE, "smoke": smoke}
    return distill("scratch", out=str(folder), resume=started, **job).folder
