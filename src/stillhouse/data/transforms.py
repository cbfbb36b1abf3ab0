"""From raw images to what a network takes: resized, augmented (by timm), normalised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import InterpolationMode, resize, to_pil_image

from stillhouse.data import Data
from stillhouse.data.images import plain
from stillhouse.errors import UserError

if TYPE_CHECKING:
    from stillhouse.models.preprocessing import Preprocessing

LARGE = 96  # from this side on, DeiT's augmentations are the default; below, none
CROP_SHARE = 0.875  # of the shorter side, what validation looks at in large images


class Normalise:
    """uint8 images [..., C, H, W] to floats [..., C, size, size], whole batches at once: resized (antialiased) if they must be, then
    (x / 255 - mean) / std. Of floats 1 is white, not 255.
    """

    def __init__(self, size: int, mean: tuple[float, ...], std: tuple[float, ...], interpolation: str) -> None:
        self.size, self.interpolation = size, InterpolationMode(interpolation)
        self.scale = torch.tensor([1 / (255 * s) for s in std]).view(-1, 1, 1)
        self.shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (self.size, self.size):
            images = resize(images, [self.size, self.size], self.interpolation, antialias=True)
        return torch.addcmul(self.shift, images.float(), self.scale * 255 if images.is_floating_point() else self.scale)


class PerImage:
    """A transform made by timm, for one image of any kind: PIL of any mode, or a tensor [C, H, W], uint8 or floats with 1 for white."""

    def __init__(self, transform: Any, channels: int) -> None:
        self.transform, self.channels = transform, channels

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        picture = to_pil_image(_in_range(image)) if isinstance(image, Tensor) else plain(image, self.channels)
        result: Tensor = self.transform(picture)
        return result


def _in_range(image: Tensor) -> Tensor:
    return image.clamp(0, 1) if image.is_floating_point() else image  # beyond white a picture would begin at black again


Transform = Normalise | PerImage


def train_transform(
    preprocessing: Preprocessing | None,
    data: Data,
    *,
    hflip: float | None = None,
    crop_scale: tuple[float, float] | None = None,
    auto_augment: str | None = None,
    random_erasing: float | None = None,
) -> Transform:
    """The transform of training images. What is None follows from the size: DeiT's augmentations from 96 pixels on, none below.

    Args:
        preprocessing: what the student wants; None: the data's own size, mean and std.
        hflip: probability of a horizontal flip; 0.5 for large images.
        crop_scale: smallest and largest share of the area that a random crop keeps; (0.08, 1) for large images, (1, 1) is no crop.
        auto_augment: timm's name of an augmentation policy; "rand-m9-mstd0.5-inc1" for large images, "" is none.
        random_erasing: probability that a rectangle is erased with noise; 0.25 for large images.

    Raises:
        UserError: if the size is unknown, the channels disagree, or a value is out of range.
    """
    size, mean, std, interpolation = _target(preprocessing, data)
    large = _large(size, data)
    hflip = (0.5 if large else 0.0) if hflip is None else _share("hflip", hflip)
    low, high = ((0.08, 1.0) if large else (1.0, 1.0)) if crop_scale is None else crop_scale
    if not 0 < low <= high <= 1:
        raise UserError(f"crop_scale is ({low}, {high}), expected two shares of the area, 0 < smallest <= largest <= 1")
    policy = ("rand-m9-mstd0.5-inc1" if large else "") if auto_augment is None else auto_augment
    erasing = (0.25 if large else 0.0) if random_erasing is None else _share("random_erasing", random_erasing)
    if not (hflip or low < 1 or policy or erasing):
        return _without_augmentation(preprocessing, data, data.train)
    _refuse_unless_pictures(data)
    ratio = (3 / 4, 4 / 3) if low < 1 else (1.0, 1.0)
    try:
        transform = create_transform(
            size, is_training=True, scale=(low, high), ratio=ratio, hflip=hflip, color_jitter=0.0, auto_augment=policy or None,
            interpolation=interpolation, mean=mean, std=std, re_prob=erasing, re_mode="pixel",
        )  # fmt: skip
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(
            f"auto_augment '{policy}' is not known to timm ({error}), expected for example 'rand-m9-mstd0.5-inc1' or ''"
        ) from error
    return PerImage(transform, data.channels)


def eval_transform(preprocessing: Preprocessing | None, data: Data) -> Transform:
    """The transform of validation images: the middle 0.875 of large images, all of small ones; sets of one size are only resized.

    Raises:
        UserError: as `train_transform`.
    """
    return _without_augmentation(preprocessing, data, data.val)


def _without_augmentation(preprocessing: Preprocessing | None, data: Data, dataset: Dataset[Any]) -> Transform:
    size, mean, std, interpolation = _target(preprocessing, data)
    if data.size is not None and isinstance(dataset[0][0], Tensor):
        return Normalise(size, mean, std, interpolation)
    _refuse_unless_pictures(data)
    share = CROP_SHARE if data.size is None and _large(size, data) else 1.0
    return PerImage(create_transform(size, crop_pct=share, interpolation=interpolation, mean=mean, std=std), data.channels)


def _target(preprocessing: Preprocessing | None, data: Data) -> tuple[int, tuple[float, ...], tuple[float, ...], str]:
    """Size, mean, std and interpolation."""
    size = (preprocessing.size if preprocessing else None) or data.size
    mean, std = (preprocessing.mean, preprocessing.std) if preprocessing else (data.mean, data.std)
    if size is None:
        raise UserError(f"the images of '{data.name}' have many sizes and the student names none: give it one with img_size=SIDE")
    if len(mean) != data.channels or len(std) != data.channels:
        grey = len(mean) == 3 and data.channels == 1
        advice = "add channels=3 to the data's spec" if grey else "open the model with as many input channels"
        raise UserError(f"the student takes {len(mean)} channels and '{data.name}' has {data.channels}: {advice}")
    return size, tuple(mean), tuple(std), preprocessing.interpolation if preprocessing else "bilinear"


def _large(size: int, data: Data) -> bool:
    """Small pictures that are blown up for a large network stay small pictures."""
    return min(size, data.size or size) >= LARGE


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value}, expected a probability, 0 to 1")
    return value


def _refuse_unless_pictures(data: Data) -> None:
    if data.channels not in (1, 3):
        raise UserError(f"'{data.name}' has {data.channels} channels; pictures and augmentations need 1 or 3: switch augmentation off")
