from __future__ import annotations

import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from stillhouse.data import Data
from stillhouse.data.arrays import Arrays
from stillhouse.data.transforms import Normalise, PerImage, eval_transform, train_transform
from stillhouse.errors import UserError
from stillhouse.randomness import seeded


@dataclass(frozen=True)
class Wants:
    mean: tuple[float, ...] = (0.5, 0.4, 0.3)
    std: tuple[float, ...] = (0.2, 0.25, 0.5)
    size: int | None = None
    interpolation: str = "bilinear"


class Pictures(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(np.random.default_rng(i).integers(0, 256, (60, 40 + i, 3), dtype=np.uint8)), i


def tensors(channels: int = 3, side: int = 32) -> Data:
    images = torch.randint(0, 256, (4, channels, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    arrays = Arrays(images, torch.tensor([0, 1, 0, 1]))
    return Data("tensors", arrays, arrays, ["a", "b"], channels=channels, size=side)


def pictures() -> Data:
    return Data("pictures", Pictures(), Pictures(), ["a", "b"])


def test_normalise_is_its_formula_on_batches_and_on_one() -> None:
    data, wants = tensors(), Wants()
    transform = eval_transform(wants, data)
    assert isinstance(transform, Normalise)
    images = data.val.images
    expected = (images.double() / 255 - torch.tensor(wants.mean).view(3, 1, 1)) / torch.tensor(wants.std).view(3, 1, 1)
    assert torch.allclose(transform(images).double(), expected, atol=1e-6)
    assert torch.equal(transform(images)[2], transform(images[2]))
    assert transform(images).dtype == torch.float32


def test_another_size_is_resized_as_pillow_does() -> None:
    data = tensors()
    data.val.images.div_(2, rounding_mode="floor").add_(64)  # type: ignore[attr-defined]  # bicubic overshoots, and Pillow clips between its passes
    for interpolation in ("bilinear", "bicubic"):
        got = eval_transform(Wants((0.0,) * 3, (1.0,) * 3, 20, interpolation), data)(data.val.images)
        how = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
        pillow = np.stack([np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((20, 20), how)) for image in data.val.images])
        assert np.abs(got.permute(0, 2, 3, 1).numpy() * 255 - pillow).max() <= 1.01  # a level, of rounding


def test_small_images_are_not_augmented_unless_asked() -> None:
    data = tensors()
    assert isinstance(train_transform(None, data), Normalise)
    for flags in ({"hflip": 0.5}, {"crop_scale": (0.5, 1.0)}, {"auto_augment": "rand-m9-mstd0.5-inc1"}, {"random_erasing": 1.0}):
        transform = train_transform(None, data, **flags)  # type: ignore[arg-type]
        assert isinstance(transform, PerImage)
        assert transform(data.train[0][0]).shape == (3, 32, 32)


def test_large_images_get_deits_augmentations() -> None:
    steps = [type(step).__name__ for step in train_transform(Wants(size=96), pictures()).transform.transforms]  # type: ignore[union-attr]
    expected = ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment", "MaybeToTensor", "Normalize", "RandomErasing"]
    assert steps == expected
    off = train_transform(Wants(size=96), pictures(), hflip=0, crop_scale=(1, 1), auto_augment="", random_erasing=0)
    image = pictures().train[0][0]
    assert torch.equal(off(image), off(image))
    assert off(image).shape == (3, 96, 96)


def test_small_pictures_for_a_large_network_are_resized_and_nothing_else() -> None:
    assert isinstance(train_transform(Wants(size=224), tensors(side=28)), Normalise)


def test_a_certain_flip_flips_exactly() -> None:
    data = tensors()
    image = data.train[1][0]
    flipped = train_transform(Wants(), data, hflip=1.0)(image)
    assert torch.allclose(flipped, eval_transform(Wants(), data)(image).flip(-1), atol=1e-6)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-n15-inc1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_all_augmentations_work_on_grey_and_colour_and_follow_the_seed(channels: int, policy: str) -> None:
    """At magnitude 10, which the default draws now and then, every operation is at its end; some Pillows refuse what timm asks there."""
    data = tensors(channels)
    transform = train_transform(None, data, hflip=0.5, crop_scale=(0.3, 1.0), auto_augment=policy, random_erasing=0.5)
    image = data.train[0][0]

    def draw(seed: int) -> torch.Tensor:
        with seeded(seed):
            return transform(image)

    many = [draw(seed) for seed in range(40)]
    assert all(torch.equal(draw(seed), many[seed]) for seed in range(40))
    assert many[0].shape == image.shape
    assert len({tensor.numpy().tobytes() for tensor in many}) > 30


def test_large_validation_images_lose_their_rim_and_small_ones_nothing() -> None:
    assert [step.size for step in eval_transform(Wants(size=112), pictures()).transform.transforms[:2]] == [128, (112, 112)]  # type: ignore[union-attr]
    assert [step.size for step in eval_transform(Wants(size=32), pictures()).transform.transforms[:2]] == [32, (32, 32)]  # type: ignore[union-attr]


def test_pictures_of_any_mode_are_taken() -> None:
    transform = eval_transform(Wants(size=32), pictures())
    for mode in ("L", "P", "RGBA", "CMYK", "I;16"):
        image = Image.new(mode, (50, 40)) if mode == "I;16" else pictures().train[0][0].convert(mode)
        assert transform(image).shape == (3, 32, 32)


def test_transforms_travel_to_workers() -> None:
    for transform in (eval_transform(None, tensors()), train_transform(Wants(size=96), pictures())):
        pickle.loads(pickle.dumps(transform))


@pytest.mark.parametrize(
    ("wants", "data", "flags", "says"),
    [
        (None, pictures, {}, "many sizes and the student names none: give it one"),
        (Wants(), lambda: tensors(1), {}, "takes 3 channels and 'tensors' has 1: add channels=3"),
        (Wants((0.5,), (0.5,)), tensors, {}, "takes 1 channels and 'tensors' has 3"),
        (None, tensors, {"hflip": 1.5}, "hflip is 1.5, expected a probability"),
        (None, tensors, {"random_erasing": -1}, "random_erasing is -1"),
        (None, tensors, {"crop_scale": (0.0, 1.0)}, "crop_scale is"),
        (None, tensors, {"crop_scale": (0.9, 0.5)}, "crop_scale is"),
        (None, tensors, {"auto_augment": "magic"}, "auto_augment 'magic' is not known to timm"),
        (None, lambda: tensors(5), {"hflip": 0.5}, "5 channels; pictures and augmentations need 1 or 3"),
    ],
)
def test_what_cannot_work_is_said(wants: Wants | None, data: object, flags: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        train_transform(wants, data(), **flags)  # type: ignore[arg-type, operator]
