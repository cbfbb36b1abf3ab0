"""From raw images with boxes or masks to what a detector or segmenter takes: torchvision's transforms move image and labels together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from stillhouse.data import IGNORED, Data
from stillhouse.data.images import plain
from stillhouse.errors import UserError

if TYPE_CHECKING:
    from stillhouse.models.preprocessing import Preprocessing

LEAST_SIDE = 1.0
"""Pixels; what a crop leaves of a box below this is dropped."""


class WithBoxes:
    """(image, {"boxes", "labels"}) -> (image float [3, H, W] normalised, the boxes moved along). The image's size is its own.

    In training also flipped and cropped at random; crowds are left out of training and kept for the metric.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        channels: int,
        *,
        training: bool,
        hflip: float = 0.0,
        crop_scale: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        self.channels, self.training, self.crop_scale = channels, training, crop_scale
        self.flip = v2.RandomHorizontalFlip(hflip)
        self.normalise = _normalise(preprocessing)

    def __call__(self, image: Image.Image | Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        picture = _picture(image, self.channels)
        crowd = target.get("iscrowd", torch.zeros(len(target["labels"]), dtype=torch.bool))
        wanted = ~crowd if self.training else torch.ones_like(crowd)
        canvas = (picture.shape[-2], picture.shape[-1])
        boxes = tv_tensors.BoundingBoxes(target["boxes"][wanted].float(), format="XYXY", canvas_size=canvas)  # type: ignore[call-overload]
        rest = {"labels": target["labels"][wanted]} | ({} if self.training else {"iscrowd": crowd[wanted]})
        if self.training:
            if self.crop_scale[0] < 1:
                picture, boxes = v2.RandomResizedCrop(canvas, self.crop_scale, antialias=True)(picture, boxes)
            picture, boxes = self.flip(picture, boxes)
            kept = _with_area(boxes)
            boxes, rest = boxes[kept], {name: value[kept] for name, value in rest.items()}
        return self.normalise(picture).as_subclass(Tensor), {"boxes": boxes.as_subclass(Tensor), **rest}

    def together(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """A batch, as lists: a detector takes images of several sizes."""
        return images, targets


class WithMask:
    """(image, mask uint8 [H, W]) -> (image float [C, size, size'] normalised, mask long of the same size).

    The shorter side becomes `size`; in training a random part of the image does, square. The mask takes the nearest pixel's class.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        channels: int,
        size: int,
        *,
        training: bool,
        hflip: float = 0.0,
        crop_scale: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        self.channels = channels
        if not training:
            self.move: Any = v2.Resize(size, antialias=True)
        elif crop_scale[0] < 1:
            self.move = v2.Compose([v2.RandomResizedCrop(size, crop_scale, antialias=True), v2.RandomHorizontalFlip(hflip)])
        else:
            self.move = v2.Compose([v2.Resize(size, antialias=True), v2.RandomCrop(size), v2.RandomHorizontalFlip(hflip)])
        self.normalise = _normalise(preprocessing)

    def __call__(self, image: Image.Image | Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        picture, moved = self.move(_picture(image, self.channels), tv_tensors.Mask(mask))
        return self.normalise(picture).as_subclass(Tensor), moved.as_subclass(Tensor).long()

    def together(self, images: list[Tensor], masks: list[Tensor]) -> tuple[Tensor, Tensor]:
        """A batch [B, C, H, W] and [B, H, W], padded at the right and below to the largest; what was padded is judged by nobody."""
        height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
        rest = [(0, width - image.shape[-1], 0, height - image.shape[-2]) for image in images]
        padded = [F.pad(image, by) for image, by in zip(images, rest, strict=True)]
        return torch.stack(padded), torch.stack([F.pad(mask, by, value=IGNORED) for mask, by in zip(masks, rest, strict=True)])


def dense_transforms(
    preprocessing: Preprocessing,
    data: Data,
    *,
    hflip: float | None = None,
    crop_scale: tuple[float, float] | None = None,
    auto_augment: str | None = None,
    random_erasing: float | None = None,
) -> tuple[WithBoxes | WithMask, WithBoxes | WithMask]:
    """The training and the evaluation transform of a set with boxes or masks.

    Args:
        preprocessing: what the student wants.
        hflip: probability of a horizontal flip; 0.5 by default.
        crop_scale: smallest and largest share of the area that a random crop keeps; by default (1, 1), no crop.
        auto_augment, random_erasing: not for boxes and masks.

    Raises:
        UserError: if a value is out of range or not for this task.
    """
    if auto_augment or random_erasing:
        raise UserError(f"auto_augment and random_erasing do not move {data.task} labels; use hflip and crop_scale")
    hflip = 0.5 if hflip is None else hflip
    low, high = crop_scale or (1.0, 1.0)
    if not 0 <= hflip <= 1:
        raise UserError(f"hflip is {hflip}, expected a probability, 0 to 1")
    if not 0 < low <= high <= 1:
        raise UserError(f"crop_scale is ({low}, {high}), expected two shares of the area, 0 < smallest <= largest <= 1")
    if len(preprocessing.mean) != data.channels:
        raise UserError(f"the student takes {len(preprocessing.mean)} channels and '{data.name}' has {data.channels}")
    moves: dict[str, Any] = {"hflip": hflip, "crop_scale": (low, high)}
    if data.task == "detect":
        return (
            WithBoxes(preprocessing, data.channels, training=True, **moves),
            WithBoxes(preprocessing, data.channels, training=False),
        )
    size = preprocessing.size or data.size
    if size is None:
        raise UserError(f"the images of '{data.name}' have many sizes and the student names none: give the data's or the student's size")
    return (
        WithMask(preprocessing, data.channels, size, training=True, **moves),
        WithMask(preprocessing, data.channels, size, training=False),
    )


def _picture(image: Image.Image | Tensor, channels: int) -> Tensor:
    tensor = image if isinstance(image, Tensor) else v2.functional.pil_to_tensor(plain(image, channels))
    return tv_tensors.Image(tensor)


def _normalise(preprocessing: Preprocessing) -> v2.Compose:
    steps = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(preprocessing.mean), list(preprocessing.std))]
    return v2.Compose(steps)


def _with_area(boxes: Tensor) -> Tensor:
    return ((boxes[:, 2:] - boxes[:, :2]) >= LEAST_SIDE).all(dim=1)
