"""Channel-wise distillation against its formula, for detectors and segmenters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from stillhouse.distillers.classics.cwd import CWD
from stillhouse.errors import UserError
from stillhouse.losses.maps import channel_divergence
from stillhouse.tasks.labels import label_losses
from tests.conftest import boxes, images, masks, tiny_detector, tiny_segmenter

SEGMENT = images(3), masks(3)
DETECT = list(images(3).sigmoid()), boxes(3)


def test_the_formula_for_a_segmenter() -> None:
    student, teacher = tiny_segmenter(1), tiny_segmenter(2, width=16)
    terms = CWD(student, teacher, alpha=2.0, temperature=3.0)(SEGMENT)
    logits_S, logits_T = (network.classifier(network.backbone(SEGMENT[0])) for network in (student, teacher))
    torch.testing.assert_close(terms["cwd"], 2.0 * channel_divergence(logits_S, logits_T, 3.0))
    torch.testing.assert_close(terms["ce"], label_losses(student, SEGMENT)["ce"])


def test_a_detectors_levels_are_summed() -> None:
    student, teacher = tiny_detector(1), tiny_detector(2, width=16)
    distiller = CWD(student, teacher, alpha=2.0)
    terms = distiller(DETECT)
    maps = [network.backbone(network.transform(DETECT[0])[0].tensors).values() for network in (student, teacher)]
    pairs = zip(distiller.align(list(maps[0]), list(maps[1])), maps[1], strict=True)
    torch.testing.assert_close(terms["cwd"], 2.0 * sum(channel_divergence(S, T) for S, T in pairs))
    assert set(terms) == {"classification", "bbox_regression", "cwd"}


@pytest.mark.parametrize(("network", "data"), [(tiny_segmenter, SEGMENT), (tiny_detector, DETECT)], ids=["segment", "detect"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(network: Any, data: Any) -> None:
    student = network(1)
    assert CWD(student, copy.deepcopy(student))(data)["cwd"].item() == pytest.approx(0, abs=1e-5)


def test_what_is_added_to_every_place_of_a_channel_changes_nothing() -> None:
    student, teacher = tiny_segmenter(1), tiny_segmenter(2)
    before = CWD(student, teacher)(SEGMENT)["cwd"]
    with torch.no_grad():
        teacher.classifier[2].bias.add_(torch.randn(5))
    torch.testing.assert_close(CWD(student, teacher)(SEGMENT)["cwd"], before)


@pytest.mark.parametrize(
    ("network", "where", "usual"),
    [(tiny_detector, "", (5.0, 1.0)), (tiny_segmenter, "", (3.0, 4.0)), (tiny_segmenter, "backbone", (50.0, 4.0))],
    ids=["detector", "logits", "features"],
)
def test_the_published_weights(network: Any, where: str, usual: tuple[float, float]) -> None:
    distiller = CWD(network(1), network(2), where=where)
    assert (distiller.alpha, distiller.temperature) == usual


def test_places_by_name() -> None:
    student, teacher = tiny_segmenter(1), tiny_segmenter(2, width=16)
    distiller = CWD(student, teacher, where="backbone.0", teacher_where="backbone")
    assert isinstance(distiller.align.levels[0], nn.Conv2d)
    distiller(SEGMENT)["cwd"].backward()
    assert student.backbone[0].weight.grad.abs().sum() > 0
    assert student.backbone[2].weight.grad is None, "a comparison in the middle teaches nothing behind it"
    with pytest.raises(UserError, match="levels"):
        CWD(student, teacher, where="backbone.0+backbone", teacher_where="backbone")


@pytest.mark.parametrize(
    "setting",
    [{"alpha": value} for value in (-1.0, float("inf"), float("nan"))] + [{"temperature": value} for value in (0.0, float("nan"))],
)
def test_bad_settings_get_one_sentence(setting: dict[str, float]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(UserError, match=f"^{name} is {value}, expected"):
        CWD(tiny_segmenter(), tiny_segmenter(), **setting)
