"""Images with boxes or masks on their way to a network: the labels move with the pixels they are about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.data import Data
from stillhouse.data.dense_transforms import dense_transforms
from stillhouse.errors import UserError
from stillhouse.models.preprocessing import Preprocessing

PIXELS = Preprocessing((0.0,) * 3, (1.0,) * 3, None)


def scene(side: int = 16) -> Tensor:
    """White where the object is: a box from (2, 4) to (7, 10)."""
    image = torch.zeros(3, side, side, dtype=torch.uint8)
    image[:, 4:10, 2:7] = 255
    return image


def boxes(**more: Tensor) -> dict[str, Tensor]:
    return {"boxes": torch.tensor([[2.0, 4.0, 7.0, 10.0]]), "labels": torch.tensor([1]), **more}


def detecting(*samples: Any) -> Data:
    return Data("boxes", list(samples), list(samples), ["thing"], task="detect")


def segmenting(*samples: Any, size: int | None = 16) -> Data:
    return Data("masks", list(samples), list(samples), ["ground", "thing"], task="segment", size=size)


def test_a_flip_takes_the_box_along() -> None:
    train, val = dense_transforms(PIXELS, detecting((scene(), boxes())), hflip=1.0)
    image, target = train(scene(), boxes())
    assert target["boxes"].tolist() == [[9.0, 4.0, 14.0, 10.0]]
    assert type(target["boxes"]) is Tensor
    assert torch.equal(image, (scene() / 255).flip(-1))
    image, target = val(scene(), boxes())
    assert target["boxes"].tolist() == [[2.0, 4.0, 7.0, 10.0]]
    assert torch.equal(image, scene() / 255)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_crop_keeps_the_box_on_the_object(seed: int) -> None:
    train, _ = dense_transforms(PIXELS, detecting((scene(64), boxes())), hflip=0.5, crop_scale=(0.3, 1.0))
    torch.manual_seed(seed)
    image, target = train(scene(64), boxes())
    assert image.shape == (3, 64, 64)
    bright = (image[0] > 0.5).nonzero()
    for x1, y1, x2, y2 in target["boxes"].tolist():
        assert 0 <= x1 < x2 <= 64
        assert 0 <= y1 < y2 <= 64
        found = [bright[:, 1].min(), bright[:, 0].min(), bright[:, 1].max() + 1, bright[:, 0].max() + 1]
        assert torch.tensor(found).float().sub(torch.tensor([x1, y1, x2, y2])).abs().max() <= 1.5


def test_crowds_are_for_the_metric_only() -> None:
    target = {"boxes": torch.tensor([[2.0, 4.0, 7.0, 10.0], [0.0, 0.0, 9.0, 9.0]]), "labels": torch.tensor([1, 1])}
    target["iscrowd"] = torch.tensor([False, True])
    train, val = dense_transforms(PIXELS, detecting((scene(), target)), hflip=0.0)
    assert train(scene(), target)[1]["boxes"].tolist() == [[2.0, 4.0, 7.0, 10.0]]
    assert val(scene(), target)[1]["iscrowd"].tolist() == [False, True]


def test_an_image_without_boxes_is_an_image() -> None:
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    train, val = dense_transforms(PIXELS, detecting((scene(), boxes())), crop_scale=(0.5, 1.0))
    for transform in (train, val):
        assert transform(scene(), empty)[1]["boxes"].shape == (0, 4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), low=st.sampled_from([0.3, 1.0]))
def test_the_mask_moves_with_its_pixels(seed: int, low: float) -> None:
    image = scene(64)
    train, _ = dense_transforms(PIXELS, segmenting((image, (image[0] > 0).byte()), size=64), crop_scale=(low, 1.0))
    torch.manual_seed(seed)
    moved, mask = train(image, (image[0] > 0).byte())
    assert mask.dtype == torch.long
    assert mask.shape == moved.shape[-2:]
    assert ((moved[0] > 0.5) != (mask == 1)).sum() <= 4 * (mask == 1).sum() ** 0.5 + 4, "all but the edge agrees"


def test_masks_of_several_sizes_are_padded_where_nobody_judges() -> None:
    _, val = dense_transforms(PIXELS, segmenting((scene(), (scene()[0] > 0).byte())))
    wide = torch.zeros(3, 16, 24, dtype=torch.uint8)
    pairs = [val(scene(), (scene()[0] > 0).byte()), val(wide, wide[0])]
    images, masks = val.together(*[list(each) for each in zip(*pairs, strict=True)])
    assert images.shape == (2, 3, 16, 24)
    assert (masks[0, :, 16:] == 255).all()
    assert (masks[:, :, :16] != 255).all()


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"hflip": 1.5}, "hflip is 1.5"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale is"),
        ({"auto_augment": "rand-m9"}, "do not move detect labels"),
        ({"random_erasing": 0.1}, "do not move detect labels"),
    ],
)
def test_what_cannot_be_is_refused(settings_: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        dense_transforms(PIXELS, detecting((scene(), boxes())), **settings_)


def test_a_segmenter_needs_a_size() -> None:
    with pytest.raises(UserError, match="many sizes"):
        dense_transforms(PIXELS, segmenting((scene(), scene()[0] // 255), size=None))
