"""What came of the experiments, as Markdown: means over seeds with their spread, paired differences, the teacher's cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from stillhouse.evidence.experiment import Arm, Study, curriculum
from stillhouse.report.numbers import si


def write_evidence(path: Path, name: str, claim: str, studies: Sequence[Study]) -> Path:
    """Writes the tables of all studies of a method to `path`."""
    parts = [f"# Evidence for `{name}`", f"    stillhouse reproduce {name}", "## What the paper claims", claim]
    for study in studies:
        parts += [f"## {study.experiment.name}", *_study(study)]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _study(study: Study) -> list[str]:
    first = study.experiment.arms[0].name
    reference = _top1(study, first)
    steps = _steps(study)
    rows = [_row(study, arm, reference if arm.name != first else None, steps) for arm in study.experiment.arms]
    columns = ("arm", "top-1, %", f"minus {first}, paired", "teacher, multiply-adds an image", "step, × labels only [quartiles]")
    header = f"| {' | '.join(columns)} | teacher's top-1 on what it saw, first → last |"
    teacher = study.teacher
    recipe = {key: value for key, value in study.experiment.recipe.items() if key not in ("eval_every", "save_every")}
    shared = ", ".join(f"{key} {value}" for key, value in recipe.items())
    setting = (
        f"{study.experiment.title}. Student `{study.experiment.student}`; teacher `{study.experiment.teacher}`, "
        f"top-1 {100 * teacher.metrics['top1']:.1f} %. {shared}. Mean ± standard deviation over seeds {', '.join(map(str, study.seeds))}; "
        f"{teacher.facts['data']['val']} validation images; the last epoch, never the best."
    )
    return [setting, "\n".join([header, "|---|---|---|---|---|---|", *rows])]


def _row(study: Study, arm: Arm, reference: list[float] | None, steps: dict[str, str]) -> str:
    runs, top1 = study.runs[arm.name], _top1(study, arm.name)
    difference = _spread([a - b for a, b in zip(top1, reference, strict=True)], sign=True) if reference else ""
    macs = (runs[0].facts["models"].get("teacher") or {}).get("macs_kept")
    moments = [curriculum(run) for run in runs]
    shown = "" if None in moments else " → ".join(f"{100 * statistics.mean(m[end] for m in moments if m):.0f}" for end in (0, 1))
    return f"| {arm.name} | {_spread(top1)} | {difference} | {si(macs) if macs else ''} | {steps.get(arm.name, '')} | {shown} |"


def _steps(study: Study) -> dict[str, str]:
    """The time of a step as a multiple of labels only, measured side by side now, for the arms that are plain, KD, or MaskedKD itself."""
    from stillhouse.measure.estimate import estimate

    keeps = {arm.settings["keep"]: arm.name for arm in study.experiment.arms if arm.method == "masked_kd" and "by" not in arm.settings}
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


def _top1(study: Study, arm: str) -> list[float]:
    return [100 * run.metrics["top1"] for run in study.runs[arm]]


def _spread(values: list[float], sign: bool = False) -> str:
    mean = statistics.mean(values)
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean:+.1f}{deviation}" if sign else f"{mean:.1f}{deviation}"
