"""Small runs: the smallest networks and data that a training can be shown on."""

from __future__ import annotations

import atexit
import dataclasses
import shutil
import signal
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stillhouse as sh
from stillhouse import distillers, tasks
from stillhouse.data import Data, open_data
from stillhouse.data.loading import eval_batches
from stillhouse.distillers.base import Distiller
from stillhouse.fitting import input_of, open_student, transforms_of
from stillhouse.models.preprocessing import preprocessing_of
from stillhouse.training.loop import Loop
from stillhouse.training.recipe import Recipe
from tests.conftest import CLASSES, SIDE, tiny
from tests.parts import OF_ITS_OWN, SMALL, networks_for

STUDENT = "timm/vit_tiny_patch16_224:img_size=8,patch_size=2,embed_dim=16,depth=1,num_heads=2"
TEACHER = "timm/vit_tiny_patch16_224:img_size=8,patch_size=4,embed_dim=24,depth=2,num_heads=2"
DATA = "digits:train=64"
RECIPE: dict[str, Any] = {"batch": 16, "epochs": 3, "lr": 1e-2, "trackers": "none", "log_every": 3, "warmup_epochs": 1.0}
"""Four steps an epoch, twelve in all."""


@cache
def data() -> Data:
    return open_data(DATA)


@cache
def dense_data(task: str) -> Data:
    """64 images to train on, 16 to validate: one bright square each, of a size and place of its own."""
    random = torch.Generator().manual_seed(0)
    samples = []
    for number in range(80):
        image, mask = torch.randint(60, (3, SIDE, SIDE), generator=random).byte(), torch.zeros(SIDE, SIDE, dtype=torch.uint8)
        (x, y), side, kind = torch.randint(16, (2,), generator=random).tolist(), 6 + number % 9, 1 + number % (CLASSES - 1)
        image[kind % 3, y : y + side, x : x + side] = 255
        mask[y : y + side, x : x + side] = kind
        box = {"boxes": torch.tensor([[x, y, x + side, y + side]]).float(), "labels": torch.tensor([kind])}
        samples.append((image, {"detect": box, "segment": mask}.get(task, kind)))
    names = [f"kind {number}" for number in range(CLASSES)]
    return Data(f"squares to {task}", samples[:64], samples[64:], names, task=task, size=SIDE)  # type: ignore[arg-type]


def network(spec: str = STUDENT, seed: int = 0) -> nn.Module:
    return open_student(spec, data(), "random", False, seed)


def distiller(name: str, **settings: Any) -> Distiller:
    kind = distillers.find(name)
    torch.manual_seed(0)
    if kind.tasks[0] == "classify" and not distillers.others(name) and name not in OF_ITS_OWN:
        teacher = {} if "teacher" not in distillers.networks(name) else {"teacher": network(TEACHER, 1)}
        return kind(network(), **teacher, **SMALL.get(name, {}), **settings)
    return kind(**networks_for(name), **SMALL.get(name, {}), **settings)


def data_for(learner: Distiller) -> Data:
    """The smallest data that the networks of `parts` or of this module take."""
    task = learner.tasks[0]
    if task in ("detect", "segment"):
        return dense_data(task)
    channels = len(getattr(preprocessing_of(learner.student), "mean", (0,)))
    return dataclasses.replace(data() if channels == 1 and task != "generate" else dense_data("classify"), task=task)


def loop(learner: Distiller, folder: Path, **recipe: Any) -> Loop:
    """A loop in a new folder; with `resume=True` as its last checkpoint left it."""
    folder.mkdir(parents=True, exist_ok=True)
    used = data_for(learner)
    resume, preprocessing = recipe.pop("resume", False), input_of(learner.student, used)
    transforms, settings = transforms_of(preprocessing, used, {}), Recipe(**RECIPE | recipe)
    torch.manual_seed(0)
    learner.prepare((images, targets) for _, images, targets in eval_batches(used.train, transforms[1], batch=16))
    task = tasks.find(used.task)
    judged = {"judge": tiny(seed=5)} if task.judged else {}
    metric = partial(task, used.classes, **judged)
    made = Loop(learner, used, transforms, preprocessing, settings, folder, {"method": type(learner).__name__}, metric=metric)
    if resume:
        made.load()
    return made


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """The signal arrives while this many updates are done, in whichever loop comes first there."""
    update = Loop.update

    def stopping(self: Loop, at: int, *batch: Tensor) -> None:
        update(self, at, *batch)
        if at + 1 == step:
            monkeypatch.setattr(Loop, "update", update)
            signal.raise_signal(number)

    monkeypatch.setattr(Loop, "update", stopping)


def weights(learner: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in learner.state_dict().items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


@cache
def teacher() -> str:
    """The folder of a teacher that knows some digits."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    run = sh.distill(
        "scratch",
        student=TEACHER,
        data="digits:train=512",
        out=str(folder / "teacher"),
        **RECIPE | {"batch": 32, "epochs": 10, "eval_every": 10},
    )
    assert run.metrics["top1"] > 0.4
    return str(run.folder)


def distil(folder: Path, method: Any = "masked_kd", **settings: Any) -> sh.Run:
    """A small run from words to report."""
    job = {"teacher": teacher(), "student": STUDENT, "data": DATA, "out": str(folder), **RECIPE, "max_steps": 6}
    return sh.distill(method, **job | settings)
