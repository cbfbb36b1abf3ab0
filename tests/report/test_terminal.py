from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from sample_run import ALARM, write_dense_run, write_sample_run

from stillhouse.measure.timing import Ratio
from stillhouse.report.terminal import show


def shown(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    show("distill", SimpleNamespace(facts=json.loads((run / "run.json").read_text()), report=run / "report.html"))
    return capsys.readouterr().out


@pytest.mark.parametrize(("task", "title", "value"), [("detect", "mAP", "34.7"), ("segment", "mIoU", "61.2")])
def test_a_run_is_summed_up_by_the_metric_of_its_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, title: str, value: str
) -> None:
    text = shown(write_dense_run(tmp_path, task, pictures=0, collapsed=True), capsys)
    assert text.split()[0] == title
    assert value in text
    assert f"warning: {ALARM}" in text


def test_a_run_without_a_task_classifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(write_sample_run(tmp_path, pictures=False), capsys)
    assert text.split()[0] == "top-1"
    assert "warning" not in text


def test_metrics_are_a_column_however_long_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    show("evaluate", {"miou": 0.5, "iou/a very long name": 0.25})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["0.5000", "0.2500"]
    assert len({len(line) for line in lines}) == 1


def test_what_dense_steps_cost_is_beside_plain_and_feature_distillation(capsys: pytest.CaptureFixture[str]) -> None:
    even = Ratio(1.0, 0.9, 1.1)
    common = {"memory_of": "process", "step_s": Ratio(0.25, 0.2, 0.3), "of_plain": even}
    rows = [
        {"name": "plain training", "of_features": Ratio(0.8, 0.75, 0.85), "memory_bytes": 2_000_000_000, "above_plain": 0, **common},
        {"name": "ACAM-KD", "of_features": Ratio(1.3, 1.2, 1.4), "memory_bytes": 3_500_000_000, "above_plain": 1_500_000_000, **common},
    ]
    show("estimate", rows)
    text = capsys.readouterr().out
    assert all(
        figure in text for figure in ("250", "0.80±0.05", "1.30±0.10", "3.50\N{NARROW NO-BREAK SPACE}GB", "1.50\N{NARROW NO-BREAK SPACE}GB")
    )
