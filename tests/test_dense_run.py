"""Detectors and segmenters from words to report: the same command, folder and page as for classifiers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import stillhouse as sh
from stillhouse import tasks
from stillhouse.errors import UserError
from stillhouse.interrupted import Interrupted
from stillhouse.models.saving import load_student
from stillhouse.training.checkpoint import checkpoints, load_checkpoint
from tests.conftest import SIDE
from tests.runs import dense_data, files, interrupt

SPECS = {
    "detect": "torchvision/fcos:backbone=timm/test_resnet,channels=8,levels=2,stride=8,convs=1",
    "segment": "torchvision/lraspp:backbone=timm/test_resnet,channels=8",
}
RECIPE: dict[str, Any] = {
    "batch": 16,
    "epochs": 2,
    "lr": 1e-3,
    "trackers": "none",
    "log_every": 2,
    "warmup_epochs": 0,
    "allow_weak_teacher": True,
}
TASK = pytest.mark.parametrize("task", ["detect", "segment"])


@cache
def teacher(task: str, folder: str) -> str:
    run = sh.distill("scratch", student=SPECS[task], data=dense_data(task), out=f"{folder}/teacher-{task}", seed=1, **RECIPE)
    return str(run.folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("dense"))


def distil(what: str, folder: str, out: Path, **settings: Any) -> sh.Run:
    job = {"teacher": teacher(what, folder), "student": SPECS[what], "data": dense_data(what), "out": str(out), **RECIPE}
    return sh.distill(**job | settings)


@TASK
def test_a_run_is_whole(task: str, folder: str, tmp_path: Path) -> None:
    run = distil(task, folder, tmp_path / "run", baseline=True, inherit="teacher")
    facts = run.facts
    headline = tasks.find(task).headline
    assert (facts["status"], facts["task"], facts["method"]) == ("finished", task, "acam_kd")
    assert [row["row"] for row in facts["result"]] == ["teacher", "student (acam_kd)", "student, labels only"]
    assert all(0 <= row[headline] <= 1 for row in facts["result"])
    assert facts["per_class"]
    assert run.metrics[headline] == facts["result"][1][headline]
    watched = (run.folder / "watch.csv").read_text().splitlines()
    assert {"mask_mean_spatial", "mask_mean_channel", "dice_spatial", "corr"} <= set(watched[0].split(","))
    assert len(list((run.folder / "pictures").iterdir())) == 3
    drawn = load_file(sorted((run.folder / "pictures").iterdir())[-1])
    assert {"images", "drawn/labels", "drawn/student", "difference", "mask 1", "channels"} <= drawn.keys()
    assert "What the masks do" in run.report.read_text()
    measured = sh.evaluate(run.folder, dense_data(task))
    assert measured[headline] == pytest.approx(run.metrics[headline], abs=1e-6)


@TASK
def test_the_exported_student_is_the_trained_one_and_nothing_else(task: str, folder: str, tmp_path: Path) -> None:
    run = distil(task, folder, tmp_path / "run")
    out = sh.export(run.folder, to="torch", out=tmp_path / "alone")
    parts, _ = load_checkpoint(checkpoints(run.folder / "checkpoints")[-1])
    trained = {name.removeprefix("student."): value for name, value in parts["distiller"].items() if name.startswith("student.")}
    beside = {name.split(".")[0] for name in parts["distiller"]} - {"student"}
    assert {"units", "fusion"} <= beside
    alone = load_file(out / "model.safetensors")
    assert alone.keys() == trained.keys()
    assert all(torch.equal(alone[name], value) for name, value in trained.items())
    pictures: Any = torch.rand(2, 3, SIDE, SIDE)
    pictures = list(pictures) if task == "detect" else pictures
    with torch.no_grad():
        answers = [network.eval()(pictures) for network in (load_student(out), run.student)]
    for first, second in zip(*(torch.utils._pytree.tree_leaves(each) for each in answers), strict=True):
        assert torch.equal(first, second)


@TASK
def test_switched_off_it_is_the_undistilled_run_bit_for_bit(task: str, folder: str, tmp_path: Path) -> None:
    off = distil(task, folder, tmp_path / "off", alpha=0.0, diversity=0.0)
    plain = sh.distill("scratch", student=SPECS[task], data=dense_data(task), out=str(tmp_path / "plain"), **RECIPE)
    ours, theirs = (load_file(run.folder / "student" / "model.safetensors") for run in (off, plain))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@TASK
@pytest.mark.parametrize("method", ["acam_kd", "maskd"])
def test_stopped_and_resumed_it_is_the_same_run(
    task: str, method: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"data": dense_data(task), "teacher": teacher(task, folder)}
    whole = distil(task, folder, tmp_path / "whole", method=method)
    for step in (2, 5):
        interrupt(monkeypatch, step)
        begun = (tmp_path / "stopped").exists()
        with pytest.raises(Interrupted):
            distil(task, folder, tmp_path / "stopped", method=method, resume=begun)
    again = sh.distill(out=str(tmp_path / "stopped"), resume=True, **data)
    ours, theirs = (load_file(run.folder / "student" / "model.safetensors") for run in (again, whole))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    for name in ("train.csv", "val.csv", "watch.csv"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_the_teacher_may_have_another_size_and_stride(folder: str, tmp_path: Path) -> None:
    coarse = "torchvision/lraspp:backbone=timm/test_resnet,channels=8,stride=32"
    run = distil("segment", folder, tmp_path / "run", student=coarse, max_steps=2)
    assert run.facts["status"] == "finished"
    small = f"{SPECS['detect']},min_size=64,max_size=64"
    run = distil("detect", folder, tmp_path / "small", student=small, max_steps=2)
    assert run.facts["status"] == "finished"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "kd"}, "method kd is for images to classify, and 'squares to segment' has images to segment"),
        ({"method": "fgd"}, "method fgd is for images to detect"),
        ({"task": "detect"}, "are to segment, not to detect"),
        ({"mixup": 0.2}, "mixup, cutmix and smoothing are for images to classify"),
        ({"random_erasing": 0.2}, "do not move segment labels"),
        ({"student": "timm/resnet18"}, "torchvision/deeplabv3:backbone=timm/resnet18"),
        ({"student": SPECS["detect"]}, "is there to detect images"),
        ({"units": -1}, "units"),
        ({"reading": "d"}, "reading is 'd'"),
        ({"where": "neck"}, "has no neck that is known here"),
        ({"alpha": float("nan")}, "alpha is nan"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(settings: dict[str, Any], said: str, folder: str, tmp_path: Path) -> None:
    before = files(tmp_path)
    with pytest.raises(UserError, match=said):
        distil("segment", folder, tmp_path / "run", **settings)
    assert files(tmp_path) == before


def test_a_run_that_left_out_what_was_wrong_is_evaluated_on_the_rest(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for kind, mode, colour in (("images", "RGB", (9, 9, 9)), ("masks", "L", 1)):
            folder = tmp_path / "pairs" / kind / part
            folder.mkdir(parents=True)
            for i in range(5):
                Image.new(mode, (SIDE, SIDE), colour).save(folder / f"{i}.png")
        Image.new("L", (SIDE, SIDE), 7).save(folder / "4.png")
    data = f"masks:{tmp_path / 'pairs'}:classes=2"
    settings = {"student": SPECS["segment"], "data": data, "bad_data": "skip", "max_steps": 1, **RECIPE, "batch": 2}
    run = sh.distill("scratch", out=str(tmp_path / "run"), **settings)
    assert sh.evaluate(run.folder)["miou"] == pytest.approx(run.metrics["miou"], abs=1e-6)
    with pytest.raises(UserError, match="it has the value 7, expected 0 to 1"):
        sh.evaluate(run.folder, data)


def test_an_alarm_is_told_once_and_kept(folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from stillhouse.distillers.dense.acam_kd import ACAMKD

    class Closing(ACAMKD):
        def watch(self) -> dict[str, torch.Tensor]:
            return {"mask_mean_spatial": torch.tensor(0.01)}

    run = distil("segment", folder, tmp_path / "run", method=Closing)
    (alarm,) = run.facts["alarms"]
    assert alarm.startswith("step 2: the spatial masks have closed")
    assert sum("have closed" in record.message for record in caplog.records) == 1
    assert "have closed" in run.report.read_text()
    state = json.loads((checkpoints(run.folder / "checkpoints")[-1] / "state.json").read_text())
    assert state["alarms"] == [alarm]
