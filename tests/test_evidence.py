"""An experiment: every arm has the same start, budget and search; what comes of it is a table that says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stillhouse import distillers
from stillhouse.evidence import acam_kd
from stillhouse.evidence.experiment import Arm, Experiment, Search, Study
from stillhouse.evidence.table import spread, write_evidence
from tests.runs import dense_data
from tests.test_dense_run import SPECS

RECIPE: dict[str, Any] = {"epochs": 2, "batch": 16, "lr": 1e-3, "trackers": "none", "log_every": 2, "allow_weak_teacher": True}
ARMS = (Arm("labels only", "scratch"), Arm("masks", "acam_kd", {"alpha": 1.0}, ("alpha",)), Arm("printed", "acam_kd", {"reading": "a"}))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    data: Any = dense_data("segment")
    experiment = Experiment(
        **{
            "name": "tiny",
            "title": "Squares",
            "data": data,
            "teacher_data": data,
            "student": SPECS["segment"],
            "teacher": SPECS["segment"],
        },
        **{"recipe": RECIPE, "teacher_recipe": {"epochs": 1}, "arms": ARMS, "task": "segment", "inherit": True, "drawn": ("masks",)},
        search=Search(rates=(1e-3, 1e-2), scales=(10.0,), share=0.5),
    )
    return experiment.run(tmp_path_factory.mktemp("evidence"), range(2), smoke=False)


def test_every_arm_is_searched_alike(study: Study) -> None:
    folder = study.teacher.folder.parent
    searched = {arm.name: sorted(path.name for path in folder.glob(f"search-{arm.name.replace(' ', '-')}*")) for arm in ARMS}
    assert len(searched["labels only"]) == 2, "two rates"
    assert len(searched["masks"]) == 3, "two rates, and the best one with another weight"
    assert len(searched["printed"]) == 2, "no weight is named"
    for arm in ARMS:
        assert study.found[arm.name]["lr"] in (1e-3, 1e-2)
        assert [run.facts["seed"] for run in study.runs[arm.name]] == [0, 1]


def test_the_table_tells_all_arms(study: Study, tmp_path: Path) -> None:
    text = write_evidence(tmp_path / "tiny.md", "tiny", "A claim.", [study]).read_text()
    for arm in ARMS:
        assert f"| {arm.name} |" in text
    assert "best of {0.001, 0.01}" in text
    assert "mIoU, %" in text
    assert (tmp_path / "tiny-tiny.svg").read_text().startswith("<svg")
    assert "tiny-tiny.svg" in text


def test_what_is_retained_of_the_teachers_figure_is_told_where_asked(study: Study, tmp_path: Path) -> None:
    title = "| of the teacher's, % |"
    assert title not in write_evidence(tmp_path / "tiny.md", "tiny", "A claim.", [study]).read_text()
    asked = replace(study, experiment=replace(study.experiment, retained=True))
    text = write_evidence(tmp_path / "tiny.md", "tiny", "A claim.", [asked]).read_text()
    assert title in text
    teacher = study.experiment.headline(study.teacher)
    for arm in ARMS:
        shares = [100 * study.experiment.headline(run) / teacher for run in study.runs[arm.name]]
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {arm.name} |")]
        assert row.split(" | ")[3] == spread(shares)


def test_finished_runs_are_not_run_again(study: Study) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in study.teacher.folder.parent.rglob("run.json")}
    again = replace(study.experiment).run(study.teacher.folder.parents[1], range(2), smoke=False)
    assert again.found == study.found
    assert stamps == {path: path.stat().st_mtime_ns for path in study.teacher.folder.parent.rglob("run.json")}


def test_the_arms_of_acam_kd_are_settings_that_exist() -> None:
    for experiment in acam_kd.EXPERIMENTS:
        assert set(experiment.drawn) <= {arm.name for arm in experiment.arms}
        for arm in experiment.arms:
            assert set(arm.weights) <= set(arm.settings) <= set(distillers.settings(arm.method)), arm.name
            assert experiment.task in distillers.find(arm.method).tasks
