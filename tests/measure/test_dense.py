"""What ACAM-KD costs a detector or segmenter: the table's arithmetic and what is refused; never how fast anything was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import stillhouse as sh
from stillhouse.errors import UserError
from stillhouse.measure.dense import batch_of, estimate_dense
from tests.conftest import CLASSES, SIDE, tiny_detector, tiny_segmenter

SPECS = {
    "detect": "torchvision/fcos:backbone=timm/test_resnet,channels=8,levels=1,stride=16,convs=1",
    "segment": "torchvision/lraspp:backbone=timm/test_resnet,channels=8",
}
SETTING: dict[str, Any] = {"image_size": SIDE, "classes": CLASSES, "batch": 2, "rounds": 1}


@pytest.mark.parametrize("task", SPECS)
def test_the_task_is_told_by_the_networks(task: str) -> None:
    rows = sh.estimate(SPECS[task], SPECS[task], classes=3, size=64, batch=2, rounds=2)
    assert [row["name"] for row in rows] == ["plain training", "plain feature KD", "ACAM-KD"]
    plain, features, _ = rows
    assert tuple(plain["of_plain"]) == tuple(features["of_features"]) == (1, 1, 1)
    assert [row["above_plain"] for row in rows] == [row["memory_bytes"] - plain["memory_bytes"] for row in rows]


def test_networks_are_untouched_and_images_need_not_be_square() -> None:
    teacher, student = tiny_segmenter(1), tiny_segmenter(2)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    assert len(estimate_dense(teacher, student, **SETTING | {"image_size": (SIDE, 2 * SIDE)})) == 3
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for network in (teacher, student) for parameter in network.parameters())


@pytest.mark.parametrize("size", [SIDE, (24, 60)])
def test_made_up_boxes_lie_in_their_images(size: Any) -> None:
    images, targets = batch_of(True, size, CLASSES, 3)
    for image, target in zip(images, targets, strict=True):
        boxes = target["boxes"]
        assert image.shape[1:] == (size if isinstance(size, tuple) else (size, size))
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes[:, 2:] <= torch.tensor([image.shape[2], image.shape[1]])).all()
        assert 1 <= target["labels"].min() <= target["labels"].max() <= CLASSES


@pytest.mark.parametrize(
    ("networks", "change", "sentence"),
    [
        ((tiny_detector, tiny_segmenter), {}, "one network is a detector and the other is not"),
        ((tiny_segmenter, tiny_segmenter), {"image_size": (32, 0)}, r"image_size is \(32, 0\)"),
        ((tiny_segmenter, tiny_segmenter), {"batch": 0}, "batch is 0"),
        ((tiny_segmenter, tiny_segmenter), {"rounds": 0}, "rounds must be at least 1"),
    ],
)
def test_what_cannot_work_is_one_sentence(networks: tuple[Any, Any], change: dict[str, Any], sentence: str) -> None:
    pair: list[nn.Module] = [make() for make in networks]
    with pytest.raises(UserError, match=sentence):
        estimate_dense(*pair, **SETTING | change)
