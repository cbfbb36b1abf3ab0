"""What makes a distillation silently useless is seen before it, and looking changes nothing."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import stillhouse as sh
from stillhouse.checking import check_distiller
from stillhouse.data.transforms import eval_transform
from stillhouse.distillers.base import Distiller
from stillhouse.distillers.classics.kd import KD
from stillhouse.errors import UserError
from stillhouse.fitting import input_of
from stillhouse.models.opening import open_model
from stillhouse.models.preprocessing import Preprocessing, set_preprocessing
from tests.runs import STUDENT, TEACHER, assert_equal, data, network, teacher


def checked(distiller: Distiller, **settings: Any) -> dict[str, str]:
    transform = eval_transform(input_of(distiller.student, data()), data())
    return {finding.what: finding.seen for finding in check_distiller(distiller, data(), transform, **settings)}


def good_teacher() -> nn.Module:
    return open_model(teacher(), classes=10, channels=1)


def test_a_good_pair_passes_and_what_was_seen_is_said() -> None:
    seen = {finding.what: finding.seen for finding in sh.check(teacher(), STUDENT, "digits:train=64")}
    assert list(seen) == ["networks", "classes", "teacher", "normalisation", "teacher's accuracy", "one step"]
    assert "the teacher sees 2 of its 4 patches" in seen["networks"]
    assert seen["classes"] == "10, known to student and teacher"
    assert seen["teacher"] == "frozen, in eval mode"
    assert seen["normalisation"] == "the same for both networks"
    assert float(seen["teacher's accuracy"].split()[1]) > 0.4
    assert "on 256 validation images (chance reaches 0.138)" in seen["teacher's accuracy"]
    assert seen["one step"] == "finite gradients where they belong, none in the teacher"


def test_a_teacher_near_chance_is_refused_unless_told() -> None:
    untrained = KD(network(), network(TEACHER, 1))
    with pytest.raises(UserError, match=r"no better than chance: top-1 0\.\d+ on 256 .*--allow-weak-teacher"):
        checked(untrained)
    assert "top-1" in checked(untrained, allow_weak_teacher=True)["teacher's accuracy"]


def test_another_normalisation_is_said() -> None:
    other = good_teacher()
    set_preprocessing(other, Preprocessing((0.0,), (2.0,), 8))
    assert "mean (0.0,), std (2.0,), 8 px" in checked(KD(network(), other), allow_weak_teacher=True)["normalisation"]
    bare = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert "not known for both" in checked(KD(network(), bare), allow_weak_teacher=True)["normalisation"]


class Awake(KD):
    """A distiller that does not keep its teacher in eval mode."""

    def train(self, mode: bool = True) -> Distiller:
        return nn.Module.train(self, mode)


class Thawed(KD):
    """A distiller whose teacher learns."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__(*networks)
        self.teacher.requires_grad_(True)


@pytest.mark.parametrize("kind", [Awake, Thawed])
def test_a_teacher_that_is_not_frozen_is_refused(kind: type[KD]) -> None:
    with pytest.raises(UserError, match="not frozen or not in eval mode"):
        checked(kind(network(), good_teacher()))


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_nan_weights_are_refused(role: str) -> None:
    distiller = KD(network(), good_teacher())
    with torch.no_grad():
        getattr(distiller, role).blocks[0].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=rf"the {role} answers NaN or infinity.*--{role}-weights"):
        checked(distiller, allow_weak_teacher=True)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_other_classes_are_refused(role: str) -> None:
    networks = {"student": network(), "teacher": good_teacher()}
    networks[role] = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=2, embed_dim=16, depth=1, num_heads=2, in_chans=1)
    with pytest.raises(UserError, match=rf"the {role} knows 1000 classes, the data has 10.*--{role}"):
        checked(KD(**networks))


class Loose(KD):
    """A distiller whose loss does not depend on the student."""

    def forward(self, batch: tuple[Tensor, Tensor], turn: str = "student") -> dict[str, Tensor]:
        return {"kd": torch.ones((), requires_grad=True) * 2}


class Infinite(KD):
    """A loss that is not finite."""

    def forward(self, batch: tuple[Tensor, Tensor], turn: str = "student") -> dict[str, Tensor]:
        return {**super().forward(batch, turn), "extra": self.student(batch[0]).sum() * float("inf")}


class Steep(KD):
    """A finite loss whose gradient is not."""

    def forward(self, batch: tuple[Tensor, Tensor], turn: str = "student") -> dict[str, Tensor]:
        return {"kd": (self.student(batch[0]).sum() * 0).sqrt()}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Loose, "does not depend on the student"),
        (Infinite, "the loss term 'extra' is (-?inf|nan)"),
        (Steep, "gradient of .* is not finite"),
    ],
)
def test_a_step_that_cannot_teach_is_refused_and_leaves_no_trace(kind: type[KD], message: str) -> None:
    distiller = kind(network(), good_teacher())
    before = copy.deepcopy(distiller.state_dict())
    with pytest.raises(UserError, match=message):
        checked(distiller)
    assert_equal(dict(distiller.state_dict()), before)
    assert all(parameter.grad is None for parameter in distiller.parameters())


@pytest.mark.parametrize("method", ["masked_kd", "kd", "fitnet"])
@pytest.mark.parametrize("training", [True, False])
def test_everything_is_afterwards_what_it_was(method: str, training: bool) -> None:
    student = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)
    )
    settings = {"student_layer": "0"} if method == "fitnet" else {"by": "random"} if method == "masked_kd" else {}
    distiller = sh.distillers.find(method)(student, good_teacher(), **settings).train(training)
    student[5].eval()
    student[1].weight.grad = torch.full((8,), 3.0)
    state = copy.deepcopy(distiller.state_dict())
    frozen = copy.deepcopy(distiller.teacher.state_dict())
    modes = {name: module.training for name, module in distiller.named_modules()}
    draws = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    checked(distiller)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert after[:2] == draws[:2]
    assert torch.equal(after[2], draws[2])
    assert_equal(dict(distiller.state_dict()), state)
    assert_equal(dict(distiller.teacher.state_dict()), frozen)
    assert {name: module.training for name, module in distiller.named_modules()} == modes
    assert {name: p.grad.sum().item() for name, p in distiller.named_parameters() if p.grad is not None} == {"student.1.weight": 24.0}
