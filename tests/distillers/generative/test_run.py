"""From labelled images to a generator of few steps, by the command's own way: trained, distilled, opened again, drawn from."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import stillhouse as sh
from stillhouse.errors import UserError
from stillhouse.models.sampling import FlowNetwork, Sampling
from stillhouse.models.saving import load_student
from stillhouse.run_folder import read_facts
from stillhouse.training.log import read_table

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'stillhouse[generative]'")
SPEC = "diffusers/dit:width=16,depth=1,heads=2,patch=4,levels=3,guidance=1.5"
RECIPE: dict[str, Any] = {"batch": 16, "epochs": 3, "lr": 1e-2, "trackers": "none", "log_every": 3, "warmup_epochs": 0.0, "eval_every": 3}
LABELS = torch.arange(10)


@cache
def teacher(folder: Path) -> sh.Run:
    return sh.distill("flow", student=SPEC, data="digits:train=64", out=str(folder / "teacher"), **RECIPE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generators")


def distilled(folder: Path, name: str, **settings: Any) -> sh.Run:
    job = {"student": SPEC, "teacher": str(teacher(folder).folder), "data": "digits:train=64", "out": str(folder / name), **RECIPE}
    return sh.distill("decoupled_dmd", **job | {"levels": (1.0, 0.5), "ratio": 2} | settings)


def test_a_teacher_is_trained_and_opens_again(folder: Path) -> None:
    run = teacher(folder)
    assert set(run.metrics) >= {"coverage", "precision", "recall", "class_accuracy", "frechet", "val_flow"}
    network = load_student(run.folder)
    assert isinstance(network, FlowNetwork)
    assert network.sampling == Sampling(3, 1.5)
    assert network.sample(LABELS).shape == (10, 1, 8, 8)


def test_a_student_is_distilled_and_draws_in_few_steps(folder: Path) -> None:
    run = distilled(folder, "few")
    network = load_student(run.folder)
    assert isinstance(network, FlowNetwork)
    assert network.sampling == Sampling((1.0, 0.5), renoise=True)
    noise = torch.randn(2, 10, 1, 8, 8)
    assert torch.equal(network.sample(LABELS, noise), load_student(run.folder).sample(LABELS, noise))  # type: ignore[operator]
    taught = load_student(teacher(folder).folder).state_dict()
    assert any(not torch.equal(value, taught[name]) for name, value in network.state_dict().items())
    assert {"dm", "ca", "fake", "total"} <= set(read_table(run.folder / "train.csv")[-1])
    sizes = [float(row["size"]) for row in read_table(run.folder / "watch.csv")]
    assert all(0.2 < size < 5 for size in sizes), "figures are of the generator's steps alone"
    assert read_facts(run.folder)["task"] == "generate"
    assert (run.folder / "report.html").is_file()


def test_the_moving_average_is_what_draws(folder: Path) -> None:
    run = distilled(folder, "averaged", ema=0.9)
    network = load_student(run.folder)
    assert isinstance(network, FlowNetwork)
    assert network.sampling.renoise


def test_a_student_of_another_architecture_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="give --student the teacher's own spec"):
        distilled(folder, "other", student=SPEC.replace("width=16", "width=32"))
    assert not (folder / "other").exists()
