"""A run that is not finished: what it has so far."""

from __future__ import annotations

from pathlib import Path

from stillhouse.data import open_data
from stillhouse.errors import UserError
from stillhouse.fitting import open_student
from stillhouse.models.saving import save_student
from stillhouse.run_folder import read_facts, read_settings
from stillhouse.training.checkpoint import checkpoints, last_checkpoint


def student_so_far(folder: Path) -> None:
    """Writes the student of a run that is not finished into its folder, from the last checkpoint (the moving average if there is one).

    Raises:
        UserError: if the run has no checkpoint yet, or none of a stage in which the student learns.
    """
    facts = read_facts(folder)
    if facts["status"] == "finished":
        return
    stages = {
        stage: found
        for stage in (folder, *sorted(folder.iterdir()))
        if stage.name != "baseline" and (found := checkpoints(stage / "checkpoints"))
    }
    if not stages:
        raise UserError(f"the run in {folder} has no checkpoint yet; wait for its first one (see --save-every)")
    stage = max(stages, key=lambda stage: stages[stage][-1].stat().st_mtime)
    _, parts, _ = last_checkpoint(stage / "checkpoints")  # type: ignore[misc]  # there is one
    own = {name.removeprefix("student."): value for name, value in parts["distiller"].items() if name.startswith("student.")}
    if not own:
        raise UserError(
            f"the run in {folder} is in its stage '{stage.name}', in which the student does not learn yet; wait for the next one"
        )
    job = read_settings(folder / "settings.yaml")
    if job["student"] is None or job["data"] is None:
        raise UserError(f"the run in {folder} was begun in Python with objects that no file names; finish it with resume=True there")
    data = open_data(job["data"], seed=job["seed"], bad_data="skip", task=facts.get("task"))
    student = open_student(job["student"], data, job["student_weights"], job["allow_partial"], job["seed"])
    averaged = {name.removeprefix("student."): value for name, value in parts.get("ema", {}).items() if name.startswith("student.")}
    student.load_state_dict(averaged or own)
    save_student(student, folder / "student")
