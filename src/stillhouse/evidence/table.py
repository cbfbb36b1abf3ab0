"""What came of the experiments, as Markdown: means over seeds with their spread, paired differences, the teacher's cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from stillhouse import tasks
from stillhouse.evidence.curves import write_curves
from stillhouse.evidence.experiment import Arm, Experiment, Study, curriculum
from stillhouse.report.numbers import si
from stillhouse.training.log import read_table


def write_evidence(path: Path, name: str, claim: str, studies: Sequence[Any], showed: str = "") -> Path:
    """Writes the tables of all studies of a method to `path`.

    Args:
        studies: each a `Study`, or what an experiment of another kind returned: with `experiment.name` and its own `table()`.
        showed: what the last complete run showed, in a sentence.
    """
    parts = [f"# Evidence for `{name}`", f"    stillhouse reproduce {name}", "## What the paper claims", claim]
    parts += ["## What showed when it was last run in full", f"{showed[:1].upper()}{showed[1:]}."] if showed else []
    for study in studies:
        parts += [f"## {study.experiment.name}", *(study.table() if hasattr(study, "table") else _study(study))]
        drawn = path.with_name(f"{name}-{study.experiment.name}.svg")
        runs = {arm: study.runs[arm] for arm in getattr(study.experiment, "drawn", ())}
        if write_curves(drawn, runs, FIGURES | RATES):
            parts.append(f"![What the masks did during training, mean over seeds]({drawn.name})")
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _study(study: Study) -> list[str]:
    experiment = study.experiment
    first = experiment.arms[0].name
    task = tasks.find(experiment.task)
    extra = _extra(study)
    title = task.titles[task.headline]
    columns = ("arm", f"{title}, %", f"minus {first}, paired", *(["of the teacher's, %"] if experiment.retained else []), *extra[0])
    rows = [_row(study, arm, extra[1](arm)) for arm in experiment.arms]
    return [setting(study), markdown(columns, rows)]


def setting(study: Study) -> str:
    """What was done, in a paragraph."""
    experiment, task = study.experiment, tasks.find(study.experiment.task)
    shared = ", ".join(f"{key} {value}" for key, value in experiment.recipe.items() if not key.endswith("_every"))
    return (
        f"{experiment.title}. Student `{experiment.student}`; teacher `{_teacher(experiment)}`, "
        f"{task.titles[task.headline]} {100 * experiment.headline(study.teacher):.1f} %. {shared}. Mean ± standard deviation over seeds "
        f"{', '.join(map(str, study.seeds))}; {study.teacher.facts['data']['val']} validation images; the last epoch, never the best."
        f"{_how_searched(experiment)}"
    )


def _how_searched(experiment: Experiment) -> str:
    if experiment.searched is not None:
        return f" Every arm's learning rate and weight are those found for {experiment.searched.name}."
    search = experiment.search
    if search is None:
        return ""
    rates, scales = ("{" + ", ".join(f"{value:g}" for value in values) + "}" for values in (search.rates, (1.0, *search.scales)))
    weights = f", then the factor on its loss weights the best of {scales}" if search.scales else ""
    return (
        f" Every arm's learning rate is the best of {rates}{weights}, each tried once with seed {search.seed} in {search.share:.0%} "
        "of the epochs."
    )


def _row(study: Study, arm: Arm, extra: list[str]) -> list[str]:
    values, first = _headlines(study, arm.name), study.experiment.arms[0].name
    reference, teacher = _headlines(study, first), 100 * study.experiment.headline(study.teacher)
    difference = spread([a - b for a, b in zip(values, reference, strict=True)], sign=True) if arm.name != first else ""
    retained = [spread([100 * value / teacher for value in values])] if study.experiment.retained else []
    return [arm.name, spread(values), difference, *retained, *extra]


SECOND = ("map_50", "accuracy")
"""What is told of a detector or segmenter beside the headline."""
Extra = tuple[list[str], Callable[[Arm], list[str]]]
"""Columns of a task's own, and an arm's cells in them."""


def _teacher(experiment: Experiment) -> str:
    """The teacher's spec; of one that was prepared that of its network."""
    prepared = {f"@{arm.name}": str(arm.settings.get("student", experiment.student)) for arm in experiment.prepared}
    return prepared.get(experiment.teacher, experiment.teacher)


def _extra(study: Study) -> Extra:
    """The columns that the arms give something to put in."""
    if study.experiment.task != "classify":
        return _of_dense(study)
    if any(arm.method == "masked_kd" for arm in study.experiment.arms):
        return _of_masked_tokens(study)
    return _of_before(study)


def _of_before(study: Study) -> Extra:
    """What the runs that came before were worth when they ended."""
    runs = [run for each in study.before.values() for run in each]
    if not runs:
        return [], lambda arm: []
    task = tasks.find(runs[0].facts["task"])

    def cells(arm: Arm) -> list[str]:
        values = [100 * run.metrics[task.headline] for run in study.before.get(arm.name, [])]
        return [spread(values)]

    return [f"{task.titles[task.headline]} before, %"], cells


def _of_masked_tokens(study: Study) -> Extra:
    steps = _steps(study)

    def cells(arm: Arm) -> list[str]:
        runs = study.runs[arm.name]
        macs = (runs[0].facts["models"].get("teacher") or {}).get("macs_kept")
        moments = [curriculum(run) for run in runs]
        shown = "" if None in moments else " → ".join(f"{100 * statistics.mean(m[end] for m in moments if m):.0f}" for end in (0, 1))
        return [si(macs) if macs else "", steps.get(arm.name, ""), shown]

    columns = ["teacher, multiply-adds an image", "step, × labels only [quartiles]", "teacher's top-1 on what it saw, first → last"]
    return columns, cells


FIGURES = {"mask_mean_spatial": "mean mask, places", "dice_spatial": "Dice, places", "corr": "correlation with the difference"}
"""What ACAM-KD watches, as a table calls it."""
RATES = {"keep": "share of the patches kept", "turned": "how far that turns the teacher's pull"}
"""What MaskedKD watches where its keep rate finds itself."""


def _of_dense(study: Study) -> Extra:
    titles = {key: title for key, title in tasks.find(study.experiment.task).titles.items() if key in SECOND}

    def cells(arm: Arm) -> list[str]:
        runs, found = study.runs[arm.name], study.found[arm.name]
        others = [spread([100 * run.metrics[key] for run in runs]) for key in titles]
        tables = [read_table(run.folder / "watch.csv") for run in runs]
        last = [table[-1] for table in tables if table]
        figures = [f"{statistics.mean(float(row[key]) for row in last):.2f}" if last and key in last[0] else "" for key in FIGURES]
        return [*others, *(f"{found[key]:g}" if found else "" for key in ("lr", "scale")), *figures]

    return [*(f"{title}, %" for title in titles.values()), "lr", "× weight", *FIGURES.values()], cells


def _steps(study: Study) -> dict[str, str]:
    """The time of a step as a multiple of labels only, measured side by side now, for the arms that are plain, KD, or MaskedKD itself."""
    from stillhouse.measure.estimate import estimate

    keeps = {arm.settings["keep"]: arm.name for arm in study.experiment.arms if arm.method == "masked_kd" and set(arm.settings) == {"keep"}}
    student, teacher = study.runs["labels only"][0].student, study.teacher.student
    classes, network = len(study.teacher.facts["data"]["classes"]), cast(Any, student)
    batch = study.experiment.recipe["batch"]
    rows = estimate(
        teacher, student, image_size=network.patch_embed.img_size[0], channels=1, classes=classes, batch=batch, keeps=list(keeps), rounds=15
    )
    names = {"plain training": "labels only", "full KD": "KD"}
    return {
        names.get(row["name"], keeps.get(row["keep"], "")): "{:.2f} [{:.2f}, {:.2f}]".format(*row["of_plain"])
        for row in rows
        if not row["refused"]
    }


def _headlines(study: Study, arm: str) -> list[float]:
    return [100 * study.experiment.headline(run) for run in study.runs[arm]]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in rows)])


def spread(values: Sequence[float], sign: bool = False, digits: int = 1) -> str:
    """Mean ± standard deviation, as a cell; "" where there is nothing."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{'+' if sign else ''}.{digits}f}{deviation}"
