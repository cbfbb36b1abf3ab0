from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from sample_run import METRICS, RECORD, write_dense_run, write_sample_run

from stillhouse.errors import UserError
from stillhouse.report.compare import METRICS as METRICS_SHOWN
from stillhouse.report.compare import compare, print_table
from stillhouse.tasks import TASKS, find


def printed(rows: list[dict], width: int = 160) -> str:
    out = io.StringIO()
    print_table(rows, Console(file=out, width=width))
    return out.getvalue()


def test_rows_hold_what_the_runs_recorded(tmp_path: Path) -> None:
    first = write_sample_run(tmp_path / "a", pictures=False)
    second = write_sample_run(tmp_path / "b", pictures=False, seed=1, keep=None, savings=None, seconds=100.0)
    rows = compare([first, str(second)])
    student, teacher = RECORD["result"][1], RECORD["models"]["teacher"]
    assert rows[0] == {
        "run": str(first),
        "task": "classify",
        "method": "masked_kd",
        "teacher": teacher["name"],
        "student": RECORD["models"]["student"]["name"],
        "data": "digits",
        "seed": 0,
        "status": "finished",
        **{key: student[key] for key in ("top1", "nll", "ece", "agreement", "step_ms")},
        "teacher_macs": teacher["macs_kept"],
        "seconds": 83.4,
    }
    assert (rows[1]["run"], rows[1]["seed"], rows[1]["seconds"]) == (str(second), 1, 100.0)


def test_a_run_without_a_result_has_its_last_evaluation_and_never_its_best(tmp_path: Path) -> None:
    run = write_sample_run(tmp_path, pictures=False, result=[], models={}, savings=None)
    (run / "val.csv").write_text("step,top1,nll\n10,0.9,0.2\n20,0.8,0.3\n")
    row = compare([run])[0]
    assert (row["top1"], row["nll"], row["ece"], row["teacher_macs"]) == (0.8, 0.3, None, None)


def test_table_says_once_what_is_the_same(tmp_path: Path) -> None:
    runs = [write_sample_run(tmp_path / str(seed), pictures=False, seed=seed) for seed in (0, 1)]
    text = printed(compare([*runs]))
    assert text.count("masked_kd") == 1
    assert "all: method masked_kd" in text
    head = " ".join(text.splitlines()[:2]).split()
    assert head == ["teacher", "run", "seed", "top-1", "NLL", "ECE", "agrees", "mult-adds", "step", "time"]


def test_numbers_are_whole_on_a_narrow_terminal(tmp_path: Path) -> None:
    text = printed(compare([write_sample_run(tmp_path, pictures=False)]), width=80)
    assert all(number in text for number in ("92.1", "0.284", "3.1", "93.4", "775", "12.4", "1\N{NARROW NO-BREAK SPACE}min 23"))
    assert "\N{HORIZONTAL ELLIPSIS}" not in text


@pytest.mark.parametrize(
    ("task", "head"),
    [("detect", ["AP", "AP", "run", "mAP", "AP50", "AP75", "small", "medium", "step", "time"]), ("segment", ["mIoU", "pixels", "agrees"])],
)
def test_other_tasks_are_compared_by_their_own_metrics(tmp_path: Path, task: str, head: list[str]) -> None:
    rows = compare([write_dense_run(tmp_path, task, pictures=0)])
    assert {key: rows[0][key] for key in METRICS[task]} == METRICS[task]
    shown = " ".join(printed(rows).splitlines()[:2]).split()
    assert [word for word in shown if word in head] == head
    assert "top-1" not in shown


def test_every_metric_of_every_task_is_one_the_task_has() -> None:
    assert METRICS_SHOWN.keys() == TASKS.keys()
    for task, measures in METRICS_SHOWN.items():
        assert measures.keys() <= find(task).titles.keys()
        assert next(iter(measures)) == find(task).headline


def test_runs_of_different_tasks_are_not_compared(tmp_path: Path) -> None:
    runs = [write_sample_run(tmp_path / "a", pictures=False), write_dense_run(tmp_path / "b", "segment", pictures=0)]
    with pytest.raises(UserError, match=r"a' is a run to classify and '.*b' one to segment: .*; compare runs of one task"):
        compare([*runs])


def test_a_task_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a run to restore, of which nothing is known here"):
        compare([write_sample_run(tmp_path, pictures=False, task="restore")])


def test_names_are_not_markup(tmp_path: Path) -> None:
    run = write_sample_run(tmp_path / "[red]run[", pictures=False, method="[bold]kd[/bold]")
    text = printed(compare([run]), width=400)
    assert "[red]run[" in text
    assert "[bold]kd[/bold]" in text


def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere' is not a run folder: it holds no run\.json; give"):
        compare([tmp_path / "nowhere"])


def test_nothing_heavy_is_imported() -> None:
    heavy = "{'torch', 'numpy', 'rich', 'jinja2', 'PIL', 'safetensors'}"
    subprocess.run([sys.executable, "-c", f"import sys, stillhouse.report.compare; assert not {heavy} & set(sys.modules)"], check=True)
