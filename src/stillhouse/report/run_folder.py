"""Reading a run folder: its record (`run.json`) and its tables of numbers (CSV). Nothing heavy is imported here."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

from stillhouse.errors import UserError
from stillhouse.run_folder import checked_facts

Columns = dict[str, list[float]]


def read_record(run_dir: str | Path) -> dict[str, Any]:
    """The record of a run, `RUN/run.json`. Raises UserError when the folder is not a run's or its record cannot be read."""
    path = Path(run_dir) / "run.json"
    if not path.is_file():
        raise UserError(
            f"'{run_dir}' is not a run folder: it holds no run.json; give a folder that 'stillhouse distill --out FOLDER' wrote."
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be read as JSON ({error}); restore it, or run the distillation again.") from None
    return checked_facts(record, path)


def task_of(record: dict[str, Any]) -> str:
    """What the run is for; runs of before there was a choice classify."""
    return str(record.get("task") or "classify")


def read_columns(path: Path) -> Columns:
    """The columns of a CSV file of numbers, all of one length; {} without the file. What is no number is NaN (a run may be writing)."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in (rows[0] if rows else {}) if name]
    return {name: [_number(row.get(name)) for row in rows] for name in names}


def _number(text: object) -> float:
    try:
        return float(str(text))
    except ValueError:
        return math.nan


def last(columns: Columns, name: str) -> float | None:
    """The last finite value of a column; None when there is none."""
    return next((value for value in reversed(columns.get(name, [])) if math.isfinite(value)), None)


def role_of(row: str) -> str:
    """Whose numbers a row of the result holds: "teacher", "student", or "baseline" (the student without distillation)."""
    if row.startswith("teacher"):
        return "teacher"
    return "baseline" if "labels only" in row else "student"


def results(record: dict[str, Any], val: Columns, baseline_val: Columns, headline: str) -> list[dict[str, Any]]:
    """The rows of the result, each with its "role". Before there is one: the models' sizes and the last evaluations of the headline."""
    rows = record.get("result")
    if not rows:
        models = record.get("models") or {}
        method = record.get("method", "distilled")
        rows = [
            {"row": "teacher", **(models.get("teacher") or {})},
            {"row": f"student ({method})", **(models.get("student") or {}), headline: last(val, headline)},
            {"row": "student, labels only", **(models.get("student") or {}), headline: last(baseline_val, headline)},
        ]
        rows = [row for row in rows if row.get(headline) is not None or ("params" in row and "labels only" not in row["row"])]
    named = [row | {"row": str(row.get("row") or "")} for row in rows]
    return [{**row, "role": role_of(row["row"])} for row in named]


def row_of(rows: list[dict[str, Any]], role: str) -> dict[str, Any]:
    """The first row of a role; {} when there is none."""
    return next((row for row in rows if row["role"] == role), {})
