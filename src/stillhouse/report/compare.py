"""Several runs side by side: `compare` reads them, `print_table` prints them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.errors import UserError, printable
from stillhouse.report.numbers import DASH, duration, known, milliseconds, percent, plain, si
from stillhouse.report.run_folder import last, read_columns, read_record, results, row_of, task_of

if TYPE_CHECKING:
    from rich.console import Console

SETUP = {"method": "method", "teacher": "teacher", "student": "student", "data": "data", "seed": "seed", "status": "status"}
SHORT = ("method", "seed", "status")  # what fits into a column; the rest is said below the table
Measure = tuple[str, Callable[[float | None], str]]
METRICS: dict[str, dict[str, Measure]] = {
    "classify": {"top1": ("top-1", percent), "nll": ("NLL", plain), "ece": ("ECE", percent), "agreement": ("agrees", percent)},
    "detect": {
        "map": ("mAP", percent),
        "map_50": ("AP50", percent),
        "map_75": ("AP75", percent),
        "map_small": ("AP\nsmall", percent),
        "map_medium": ("AP\nmedium", percent),
        "map_large": ("AP\nlarge", percent),
    },
    "segment": {"miou": ("mIoU", percent), "accuracy": ("pixels", percent), "agreement": ("agrees", percent)},
    "encode": {"probe": ("probe", percent), "knn": ("k-NN", percent)},
    "generate": {
        "coverage": ("covers", percent),
        "precision": ("precise", percent),
        "recall": ("recall", percent),
        "class_accuracy": ("class", percent),
        "frechet": ("Fréchet", plain),
    },
    "regress": {"r2": ("explained", percent), "mse": ("MSE", plain)},
}
"""What is said of each task, in few letters; the first decides. Not taken from `stillhouse.tasks`, which would load torch."""
COSTS: dict[str, Measure] = {
    "teacher_macs": ("teacher\nmult-adds", si),
    "step_ms": ("step", milliseconds),
    "seconds": ("time", duration),
}


def compare(runs: list[str | Path]) -> list[dict[str, Any]]:
    """One row a run, in the order given: "run", "task", the keys of SETUP, those of the task's METRICS and those of COSTS; None if unknown.

    Units: shares in [0,1], nats, multiply-adds an image, milliseconds (step_ms), seconds.
    Metrics are the run's result, never the best of its evaluations. Raises UserError when a folder is not a run's, or the runs are of
    different tasks.
    """
    rows = [_row(Path(run)) for run in runs]
    for row in rows:
        if row["task"] != rows[0]["task"]:
            raise UserError(
                f"'{rows[0]['run']}' is a run to {rows[0]['task']} and '{row['run']}' one to {row['task']}: they have no measure "
                "in common; compare runs of one task"
            )
    return rows


def _row(run_dir: Path) -> dict[str, Any]:
    record = read_record(run_dir)
    task, val = task_of(record), read_columns(run_dir / "val.csv")
    if task not in METRICS:
        raise UserError(f"'{run_dir}' is a run to {task}, of which nothing is known here; compare it with the Stillhouse that made it")
    student = row_of(results(record, val, {}, headline=next(iter(METRICS[task]))), "student")
    models, saved = record.get("models") or {}, record.get("savings") or {}
    teacher = models.get("teacher") or {}
    measured = {key: student[key] if known(student.get(key)) else last(val, key) for key in METRICS[task]}
    return {
        "run": str(run_dir),
        "task": task,
        "method": record.get("method"),
        "teacher": teacher.get("name"),
        "student": (models.get("student") or {}).get("name"),
        "data": (record.get("data") or {}).get("name"),
        "seed": record.get("seed"),
        "status": record.get("status"),
        **measured,
        "teacher_macs": next(
            (value for value in (saved.get("teacher_macs_kept"), teacher.get("macs_kept"), teacher.get("macs")) if known(value)), None
        ),
        "step_ms": student.get("step_ms"),
        "seconds": record.get("seconds"),
    }


def print_table(rows: list[dict[str, Any]], console: Console | None = None) -> None:
    """Print the rows of `compare`. What is the same in all runs is said once, below; what no run knows is left out."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text  # names are printed as they are, never as rich's markup

    differing = [key for key in SETUP if len({str(row.get(key)) for row in rows}) > 1]
    measures = (METRICS[rows[0]["task"]] if rows else {}) | COSTS
    measured = [key for key in measures if any(known(row.get(key)) for row in rows)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("run", *(SETUP[key] for key in differing if key in SHORT)):
        table.add_column(name, overflow="fold")
    for key in measured:
        table.add_column(measures[key][0], justify="right", no_wrap=True)
    for row in rows:
        setup = [Path(row["run"]).name, *(DASH if row.get(key) is None else str(row[key]) for key in differing if key in SHORT)]
        table.add_row(*(Text(printable(cell)) for cell in setup), *(measures[key][1](row.get(key)) for key in measured))
    console = console or Console()
    console.print(table)
    for row in rows:
        setup = [f"{SETUP[key]} {row[key]}" for key in differing if key not in SHORT and row.get(key) is not None]
        console.print(Text(printable(f"{row['run']}: {', '.join(setup)}" if setup else row["run"])), style="dim")
    same = [f"{SETUP[key]} {rows[0][key]}" for key in SETUP if rows and key not in differing and rows[0].get(key) is not None]
    if same:
        console.print(Text(printable(f"{'all' if len(rows) > 1 else 'with'}: {', '.join(same)}")), style="dim")
