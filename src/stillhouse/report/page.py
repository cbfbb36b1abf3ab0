"""Run folder -> the text of report.html: what the page says is decided here, how it looks in page.html and page.css."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from stillhouse.report.chart import Chart, Line, chart
from stillhouse.report.numbers import change, duration, known, milliseconds, percent, plain, points, si
from stillhouse.report.pictures import Snapshot, masks_left_out, picture_cards, read_snapshots, sheet
from stillhouse.report.run_folder import Columns, last, read_columns, read_record, results, row_of, task_of
from stillhouse.tasks import find

if TYPE_CHECKING:
    from stillhouse.tasks.base import Task

Record = dict[str, Any]
Column = tuple[str, str, Callable[[float | None], str]]
NOT_LOSSES = {"step", "epoch", "lr", "images_per_second"}
MOST_SKIPPED = 200
MOST_CLASSES = 100
MOST_COLOURS = 24
COLOURED = ("detect", "segment")
"""The tasks whose answers are drawn in the colours of the classes."""
COLLAPSED = 0.05
COSTS: list[Column] = [
    ("params", "parameters", si),
    ("macs", "multiply\N{NON-BREAKING HYPHEN}adds / image", si),
    ("step_ms", "training step", milliseconds),
]


def render(run_dir: Path) -> str:
    """The whole page as HTML. The template engine escapes all that came from a user. Raises UserError when `run_dir` is no run."""
    record = read_record(run_dir)
    train, val = read_columns(run_dir / "train.csv"), read_columns(run_dir / "val.csv")
    watch = read_columns(run_dir / "watch.csv")
    baseline_val = read_columns(run_dir / "baseline" / "val.csv")
    task = find(task_of(record))
    rows = results(record, val, baseline_val, task.headline)
    columns = metric_columns(task) + COSTS
    snapshots, notes = read_snapshots(run_dir)
    data = record.get("data") or {}
    settings = run_dir / "settings.yaml"
    skipped = [str(name) for name in data.get("skipped") or []]
    environment = Environment(
        loader=PackageLoader("stillhouse", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        title=title_of(record),
        status=str(record.get("status", "unknown")),
        sentence=sentence(record, rows, val, task),
        alarms=[str(alarm) for alarm in record.get("alarms") or []],
        news=[str(each) for each in record.get("news") or []],
        who=who(record),
        columns=[(key, name) for key, name, _ in columns if any(known(row.get(key)) for row in rows)],
        rows=[{**row, "cells": {key: (row.get(key), write(row.get(key))) for key, _, write in columns}} for row in rows],
        savings=savings(record),
        cheaper=cheaper(record),
        kept=kept(record),
        class_title=f"{task.per_class} of each class",
        **class_table(run_dir, record, rows),
        charts=charts(record, rows, train, val, baseline_val, task),
        mask_charts=mask_charts(watch),
        watched="What the masks do" if any(name.startswith(tuple(MASK_CHARTS)) for name in watch) else "What the method watches",
        sheet=sheet(run_dir),
        cards=picture_cards(snapshots, [str(name) for name in data.get("classes") or []]),
        legend=legend(snapshots, [str(name) for name in data.get("classes") or []]) if task_of(record) in COLOURED else [],
        masks_left_out=masks_left_out(snapshots),
        moments=moments([snapshot.step for snapshot in snapshots], str(record.get("status"))),
        settings=settings.read_text(encoding="utf-8", errors="replace") if settings.is_file() else "",
        facts=facts(record),
        skipped=skipped[:MOST_SKIPPED],
        skipped_count=len(skipped),
        notes=notes,
    )


def title_of(record: Record) -> str:
    """The method's name as its paper writes it."""
    return str(record.get("title") or record.get("method") or "A run")


def kept(record: Record) -> str:
    """ "8 of 16 patches", or "" when the teacher saw everything."""
    keep = record.get("keep") or {}
    return f"{keep['kept']} of {keep['patches']} patches" if {"kept", "patches"} <= keep.keys() else ""


def metric_columns(task: type[Task]) -> list[Column]:
    """The task's metrics as columns: shares in percent, but for those whose title names a unit."""
    return [(key, title, plain if "," in title else percent) for key, title in task.titles.items()]


def sentence(record: Record, rows: list[Record], val: Columns, task: type[Task]) -> str:
    """The result of the run in one sentence, from what is known of it; it stands under the method's name."""
    reached: dict[str, Any] = {role: row_of(rows, role).get(task.headline) for role in ("student", "baseline", "teacher")}
    student, baseline, teacher = reached["student"], reached["baseline"], reached["teacher"]
    if not known(student):
        return "Not evaluated yet."
    text = f"Student {percent(student)} {task.titles[task.headline]}"
    if not record.get("result"):
        step = last(val, "step")
        text += " so far" + (f" (step {step:.0f})" if step is not None else "")
    if known(baseline):
        text += f", {points(student - baseline)} points over labels only"
    if known(teacher):
        text += f", teacher {percent(teacher)}"
    for row in [row for row in rows if row["role"] == "student"][1:]:
        text += f", {row['row'].partition(' (')[0]} {percent(row.get(task.headline))}"
    if kept(record):
        text += f"; the teacher computed on {kept(record)}"
        saved = record.get("savings") or {}
        full, part = saved.get("teacher_macs_full"), saved.get("teacher_macs_kept")
        if known(full) and known(part) and full:
            text += f": {percent(part / full, 0)} of its multiply-adds"
    return text + "."


def class_table(run_dir: Path, record: Record, rows: list[Record]) -> dict[str, Any]:
    """The values of each class, in the order of the data: `class_columns` (title, role), `class_rows` (class, [(value, text)]), `classes`.

    Of the student from the record, of the baseline from its own, of the teacher from its row of the result.
    """
    baseline = read_record(run_dir / "baseline") if (run_dir / "baseline" / "run.json").is_file() else {}
    found = {
        "student": record.get("per_class"),
        "baseline": baseline.get("per_class"),
        "teacher": row_of(rows, "teacher").get("per_class"),
    }
    titles = {"student": "student", "baseline": "labels only", "teacher": "teacher"}
    shown = {role: values for role, values in found.items() if isinstance(values, dict) and values}
    named = [str(name) for name in (record.get("data") or {}).get("classes") or []]
    names = list(dict.fromkeys([*named, *(name for values in shown.values() for name in values)])) if shown else []
    names = [name for name in names if any(known(values.get(name)) for values in shown.values())]
    return {
        "class_columns": [(titles[role], role) for role in shown],
        "class_rows": [(name, [(v.get(name), percent(v.get(name))) for v in shown.values()]) for name in names[:MOST_CLASSES]],
        "class_count": len(names),
    }


def who(record: Record) -> list[tuple[str, str]]:
    """The teacher, the student, what else took part or was kept, and the data, as far as they are named: (role, name)."""
    models, data = record.get("models") or {}, record.get("data") or {}
    roles = ["teacher", "student", *(role for role in models if role not in ("teacher", "student", "data", "autoencoder"))]
    named = {role: (models.get(role) or {}).get("name") for role in roles} | {"data": data.get("name")}
    return [(role.replace("_", " "), str(name)) for role, name in named.items() if name]


def savings(record: Record) -> list[tuple[str, str, str, str]]:
    """What masking saved: (what, on all patches, on the kept ones, the difference)."""
    saved = record.get("savings") or {}
    found = []
    for what, key, write in (("teacher's multiply-adds", "teacher_macs", si), ("training step", "step_ms", milliseconds)):
        full, part = saved.get(f"{key}_full"), saved.get(f"{key}_kept")
        if kept(record) and known(full) and known(part) and full:
            found.append((what, write(full), write(part), change(full, part)))
    return found


def cheaper(record: Record) -> list[str]:
    """What low precision and kept answers did to the teacher, a sentence each."""
    low, cache = record.get("teacher_precision") or {}, record.get("teacher_cache") or {}
    said = []
    if known(low.get("kl")):
        said.append(
            f"The teacher computed in {low.get('precision')} ({low.get('by')}): KL {low['kl']:.1g} nats from full precision, the same "
            f"first class in {percent(low.get('agreement'))} of {low.get('images')} validation images."
        )
    if known(cache.get("steps")):
        moved = ((cache.get("errors") or {}).get("probability moved") or {}).get("max")
        said.append(
            f"The teacher did not run in {cache.get('steps_without_teacher'):,} of {cache['steps']:,} steps: its answers were kept in "
            f"{cache.get('storage')}, {si(cache.get('bytes'))}B on the disk"
            + (f", which moved {moved:.1g} of probability at most." if known(moved) else ".")
        )
    return said


def charts(record: Record, rows: list[Record], train: Columns, val: Columns, baseline_val: Columns, task: type[Task]) -> list[Chart]:
    """The curves for which there are numbers."""
    key = task.headline
    title = "Validation accuracy" if key == "top1" else f"Validation {task.titles[key]}"
    teacher = row_of(rows, "teacher").get(key)
    level = 100 * teacher if known(teacher) else None
    terms = [name for name in train if name not in NOT_LOSSES]
    terms += [name.removeprefix("val_") for name in val if name.startswith("val_") and name.removeprefix("val_") not in terms]
    style = {"total": "total"} | {name: f"term-{i % 6}" for i, name in enumerate(name for name in terms if name != "total")}
    reached = [curve("student", "student", val, key, 100), curve("student, labels only", "baseline", baseline_val, key, 100)]
    beside = [name for name in val if name.endswith(f"_{key}") and name != f"teacher_{key}"]
    reached += [curve(name.removesuffix(f"_{key}"), f"term-{i}", val, name, 100) for i, name in enumerate(beside)]
    shown = [curve(f"teacher on {kept(record)}", "teacher", val, "teacher_top1", 100)] if kept(record) else []
    curriculum = "The teacher's own accuracy on the patches it was shown. The paper saw it rise as the student learns to look."
    found = [
        chart(title, [*reached, Line("teacher", "teacher", level=level)], unit="%"),
        chart(
            "The teacher on what it was shown",
            [*shown, Line("teacher on whole pictures", "teacher level", level=level)],
            unit="%",
            note=curriculum,
        ),
        chart("Training loss", [curve(name, style[name], train, name) for name in style]),
        chart("Validation loss", [curve(name, style[name], val, f"val_{name}") for name in style]),
    ]
    return [drawn for drawn in found if drawn]


MASK_CHARTS = {
    "mask_mean": ("Mean value of the masks", "Near 0 nothing is copied: the masks have collapsed."),
    "dice": ("How alike the masks are", "Dice coefficient, mean over pairs: 1 when all masks are the same."),
    "corr": (
        "Masks and difference",
        "Correlation of the masks with |F_T \N{MINUS SIGN} F_S|: above 0 they are on what the student still lacks.",
    ),
}


def mask_charts(watch: Columns) -> list[Chart]:
    """What the method watches, over the training: figures of one kind (mask_mean_spatial, mask_mean_channel) share a chart."""
    kinds: dict[str, list[str]] = {}
    for name in watch:
        if name not in ("step", "epoch"):
            kinds.setdefault(next((kind for kind in MASK_CHARTS if name.startswith(kind)), name), []).append(name)
    found = []
    for kind in sorted(kinds, key=lambda kind: [*MASK_CHARTS, kind].index(kind)):
        title, note = MASK_CHARTS.get(kind, (kind.replace("_", " "), ""))
        lines = [
            curve(name.removeprefix(kind).strip("_").replace("_", " ") or kind.replace("_", " "), f"term-{i % 6}", watch, name)
            for i, name in enumerate(kinds[kind])
        ]
        warning = [Line("collapse below", "warn level", level=COLLAPSED)] if kind == "mask_mean" else []
        found.append(chart(title, [*lines, *warning], note=note))
    return [drawn for drawn in found if drawn]


def legend(snapshots: list[Snapshot], classes: list[str]) -> list[tuple[str, str]]:
    """The colours of the classes where pictures have labels drawn in: (name, CSS colour). None if there are too many to tell apart."""
    if not snapshots or not snapshots[-1].drawn or len(classes) > MOST_COLOURS:
        return []
    from stillhouse.tasks.colours import BACKGROUND, colours

    painted = zip(classes, colours(len(classes)), strict=True)
    return [(name, f"rgb{colour}") for name, colour in painted if name.lower() not in BACKGROUND]


def curve(name: str, style: str, columns: Columns, column: str, scale: float = 1) -> Line:
    """A column over the steps (over the row numbers in a file without steps)."""
    values = [scale * value for value in columns.get(column, [])]
    steps = columns.get("step") or [float(i) for i in range(len(values))]
    return Line(name, style, steps[: len(values)], values)


def moments(steps: list[int], status: str) -> list[tuple[str, str]]:
    """What the pictures' columns are called: (start | middle | end, step)."""
    end = "end" if status == "finished" else "latest"
    names = {1: [end], 2: ["start", end], 3: ["start", "middle", end]}
    return [(name, f"step {step}") for name, step in zip(names.get(len(steps), []), steps, strict=True)]


def facts(record: Record) -> list[tuple[str, str]]:
    """What is needed to run it again and to know that it is the same: (name, value)."""
    data = record.get("data") or {}
    found = [("command", shlex.join(map(str, record.get("command") or [])))]
    found += [(name, str(record[name])) for name in ("seed", "started") if record.get(name) is not None]
    found += [("took", duration(record["seconds"]))] if known(record.get("seconds")) else []
    train, val = data.get("train"), data.get("val")
    if known(train) and known(val):
        found.append(("data", f"{data.get('name', '')}: {train:,} to train, {val:,} to validate"))
    found += [(str(name), str(version)) for name, version in (record.get("versions") or {}).items()]
    found += [(f"{name}, SHA-256", str(value)) for name, value in (record.get("hashes") or {}).items() if value]
    return [(name, value) for name, value in found if value]
