"""Focal and global distillation: its four terms, and where the boxes lie on the maps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse.distillers.dense.fgd import FGD, Context
from stillhouse.errors import UserError
from stillhouse.losses.maps import focal_distances, squared_distance
from tests.conftest import SIDE, boxes, images, tiny_detector, tiny_segmenter

BATCH = list(images(3).sigmoid()), boxes(3)
TERMS = "foreground", "background", "attention", "relation"
ONE = dict.fromkeys(("alpha", "beta", "gamma", "relation"), 1.0)


def without_boxes(batch: tuple[Any, Any]) -> tuple[Any, Any]:
    return batch[0], [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in batch[1]]


def test_the_formula() -> None:
    student, teacher = tiny_detector(1), tiny_detector(2, width=16)
    distiller = FGD(student, teacher, alpha=2.0, beta=3.0, gamma=4.0, relation=5.0, temperature=0.8)
    terms = distiller(BATCH)
    maps_S, maps_T = ([*net.backbone(net.transform(BATCH[0])[0].tensors).values()] for net in (student, teacher))
    aligned, expected = distiller.align(maps_S, maps_T), torch.zeros(4)
    for S, T in zip(aligned, maps_T, strict=True):
        focal = focal_distances(S, T, [each["boxes"] for each in BATCH[1]], (SIDE, SIDE), 0.8)
        expected = expected + torch.stack([*focal, squared_distance(S, T)])  # the blocks begin as the identity
    torch.testing.assert_close(torch.stack([terms[name] for name in TERMS]), expected * torch.tensor([2.0, 3.0, 4.0, 5.0]))
    assert set(terms) == {"classification", "bbox_regression", *TERMS}


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    student = tiny_detector(1)
    terms = FGD(student, copy.deepcopy(student), **ONE)(BATCH)
    assert [terms[name].item() for name in TERMS] == [0, 0, 0, 0]


def test_images_without_boxes_are_background() -> None:
    student, teacher = tiny_detector(1), tiny_detector(2)
    terms = FGD(student, teacher, **ONE)(without_boxes(BATCH))
    assert terms["foreground"].item() == 0
    assert terms["background"] > 0
    assert all(terms[name].isfinite() for name in terms)


def test_each_weight_weighs_its_own_term() -> None:
    student, teacher = tiny_detector(1), tiny_detector(2)
    full = FGD(student, teacher, **ONE)(BATCH)
    for setting, name in zip(ONE, TERMS, strict=True):
        terms = FGD(student, teacher, **{**ONE, setting: 0.0})(BATCH)
        for other in TERMS:
            torch.testing.assert_close(terms[other], 0.0 * full[other] if other == name else full[other])


def test_a_context_block_begins_as_the_identity_and_learns() -> None:
    block, maps = Context(6), torch.randn(2, 6, 5, 7)
    assert torch.equal(block(maps), maps)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    added = block(maps) - maps
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added), msg="one vector an image, at every place")
    shuffled = maps.flatten(2)[:, :, torch.randperm(35)].view_as(maps)
    torch.testing.assert_close(block(shuffled) - shuffled, added, rtol=1e-4, atol=1e-5)
    assert Context(1)(torch.randn(1, 1, 3, 3)).shape == (1, 1, 3, 3)


def test_boxes_lie_where_the_teacher_put_them() -> None:
    """Images of two sizes, resized and padded to one: a box is moved as its image is, padding moves nothing, and a crowd is no object."""
    student, teacher = tiny_detector(1), tiny_detector(2)
    teacher.transform.min_size, teacher.transform.max_size = (64,), 128
    distiller = FGD(student, teacher)
    pictures = [torch.rand(3, 32, 48), torch.rand(3, 40, 20)]
    corners = [torch.tensor([[3.0, 4.0, 30.0, 20.0]]), torch.tensor([[0.0, 0.0, 20.0, 40.0], [5.0, 5.0, 9.0, 9.0]])]
    targets = [{"boxes": each, "labels": torch.ones(len(each), dtype=torch.int64)} for each in corners]
    targets[1]["iscrowd"] = torch.tensor([False, True])
    assert all(term.isfinite() for term in distiller((pictures, targets)).values())
    found, canvas = distiller.boxes((pictures, targets))
    assert canvas == (128, 96)
    torch.testing.assert_close(found[0], 2 * corners[0])
    torch.testing.assert_close(found[1], torch.tensor([[0.0, 0.0, 64.0, 128.0]]))


@pytest.mark.parametrize("kind", ["detr", "rt_detr"])
def test_boxes_lie_where_transformers_put_them(kind: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.models.test_detr import batch, detector

    network = detector(kind, ",size=64")
    distiller, given = FGD(network, copy.deepcopy(network)), batch()
    distiller(given)
    found, canvas = distiller.boxes(given)
    sizes = [(64, 82), (82, 64)]
    assert canvas == ((82, 82) if kind == "detr" else (96, 96))
    for picture, target, moved, (height, width) in zip(*given, found, sizes, strict=True):
        by_x, by_y = width / picture.shape[2], height / picture.shape[1]
        torch.testing.assert_close(moved, target["boxes"] * torch.tensor([by_x, by_y, by_x, by_y]))


def test_a_brighter_corner_under_a_box_is_foreground_at_any_size() -> None:
    """The same picture and boxes at twice the size, for a detector that resizes both to one size, gives the same terms."""
    student, teacher = tiny_detector(1), tiny_detector(2)
    larger: list[Tensor] = [nn.functional.interpolate(image[None], scale_factor=2, mode="nearest")[0] for image in BATCH[0]]
    half: list[Tensor] = [nn.functional.interpolate(image[None], size=(SIDE, SIDE), mode="bilinear")[0] for image in larger]
    doubled = larger, [{**target, "boxes": 2 * target["boxes"]} for target in BATCH[1]]
    distiller = FGD(student, teacher, **ONE)
    terms, same = distiller(doubled), distiller((half, BATCH[1]))
    for name in TERMS:
        torch.testing.assert_close(terms[name], same[name], rtol=1e-4, atol=1e-5)


def test_what_is_drawn() -> None:
    maps = FGD(tiny_detector(1), tiny_detector(2)).eval().look(BATCH)
    assert {name: tuple(drawn.shape) for name, drawn in maps.items()} == {"attention": (3, 8, 8), "foreground": (3, 8, 8)}
    assert maps["attention"].amax((1, 2)).tolist() == [1, 1, 1]
    assert maps["foreground"].unique().tolist() == [0, 1]


def test_the_published_weights() -> None:
    weights = FGD(tiny_detector(1), tiny_detector(2), gamma=7.0).weights
    assert weights == {"alpha": 1e-3, "beta": 5e-4, "gamma": 7.0, "relation": 5e-6}


def test_a_segmenter_has_no_boxes() -> None:
    with pytest.raises(UserError, match="Segmenter is no detector"):
        FGD(tiny_segmenter(), tiny_segmenter())


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma", "relation", "temperature"])
@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_bad_settings_get_one_sentence(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^{name} is {value}, expected"):
        FGD(tiny_detector(), tiny_detector(), **{name: value})
