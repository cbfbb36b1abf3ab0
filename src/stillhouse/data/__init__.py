"""The users' data by one short spec, or by the torch datasets they already have."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from stillhouse.errors import UserError, nearest

BadData = Literal["refuse", "skip"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FORMS = {"digits": "digits", "fashion-mnist": "fashion-mnist", "imagefolder": "imagefolder:DIR", "hf": "hf:DIR_OR_NAME"}


@dataclass(frozen=True)
class Data:
    """A training and a validation set of raw images: what `open_data` returns, and what users build from torch datasets of their own.

    `dataset[i]` is `(image, label)`: a PIL image or a uint8 tensor [C, H, W], before any transform, and a class number in [0, K).

    Example:
        >>> from torchvision.datasets import CIFAR10
        >>> cifar = [CIFAR10("data", train=part, download=True) for part in (True, False)]
        >>> data = Data("cifar10", train=cifar[0], val=cifar[1], classes=cifar[0].classes, size=32)

    Attributes:
        size: the images' side in pixels, None if it varies.
        mean, std: of the channels, for pixels in [0, 1]. By default ImageNet's for three channels, one half for any other number.
        skipped: the bad files that were left out, each with what is wrong with it.
        fingerprint: sha256 of file names and sizes, or of the arrays; of what is known without reading the images for a user's own sets.

    Raises:
        UserError: if a set is empty or a first sample is not what is said above, or there are fewer than two classes.
    """

    name: str
    train: Dataset[Any]
    val: Dataset[Any]
    classes: list[str]
    channels: int = 3
    size: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    skipped: list[str] = field(default_factory=list)
    fingerprint: str = ""

    def __post_init__(self) -> None:
        known = (IMAGENET_MEAN, IMAGENET_STD) if self.channels == 3 else ((0.5,) * self.channels,) * 2
        facts = repr((self.name, [_length(self.train), _length(self.val)], self.classes, self.channels, self.size))
        defaults = {"mean": known[0], "std": known[1], "fingerprint": hashlib.sha256(facts.encode()).hexdigest()}
        for name, value in defaults.items():
            object.__setattr__(self, name, getattr(self, name) or value)
        if len(self.classes) < 2:
            raise UserError(f"data '{self.name}' has the classes {self.classes}, expected at least two")
        for part in ("train", "val"):
            self._look_at_first(part)

    def _look_at_first(self, part: str) -> None:
        dataset = getattr(self, part)
        if not _length(dataset):
            raise UserError(f"the {part} set of '{self.name}' is empty, expected at least one image")
        sample = dataset[0]
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            raise UserError(f"the {part} set of '{self.name}' gives a {type(sample).__name__}, expected a pair (image, label)")
        image, label = sample
        if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3:
            if image.shape[0] != self.channels:
                raise UserError(f"the {part} set of '{self.name}' has {image.shape[0]} channels, expected {self.channels}: say channels=…")
        elif not isinstance(image, Image.Image):
            kind = f"{image.dtype} tensor of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise UserError(
                f"the {part} set of '{self.name}' gives images as {kind}, expected PIL images or uint8 tensors [C, H, W]; "
                "leave its transforms out: images are resized, augmented and normalised afterwards"
            )
        if not 0 <= int(label) < len(self.classes):
            raise UserError(f"the {part} set of '{self.name}' has the label {label}, expected 0 to {len(self.classes) - 1}")


def _length(dataset: Any) -> int:
    try:
        return len(dataset)
    except TypeError:
        raise UserError(
            f"{type(dataset).__name__} has no length: streaming sets are not supported, give a set with len() and [i]"
        ) from None


def open_data(spec: str | Data, *, seed: int = 0, bad_data: BadData = "refuse") -> Data:
    """Open a data set by its spec; a `Data` passes through.

    `digits`, `fashion-mnist`, `imagefolder:DIR` and `hf:DIR_OR_NAME`, each with options after a colon:
    `digits:canvas=16,clutter=2,train=300`, `fashion-mnist:size=32,channels=3`, `imagefolder:DIR:val=0.1`, `hf:NAME:label=fine_label`
    (see the modules of this package).

    Args:
        seed: picks the subset that `train=N` leaves, and what generated sets draw. Never the split into train and val, nor the
            validation images: runs are compared on the same images, and a teacher trained with one seed has not seen another's val.
        bad_data: "refuse" stops at broken images and names them, "skip" leaves them out and names them in `Data.skipped`.

    Raises:
        UserError: if there is no such data set or option, or nothing usable in it.
    """
    from stillhouse.data import digits, fashion_mnist, hf, imagefolder

    if isinstance(spec, Data):
        return spec
    if bad_data not in ("refuse", "skip"):
        raise UserError(f"bad_data is '{bad_data}', expected 'refuse' or 'skip'")
    source, _, rest = spec.partition(":")
    if source == "digits":
        return digits.open_digits(rest, seed=seed)
    if source == "fashion-mnist":
        return fashion_mnist.open_fashion_mnist(rest, seed=seed)
    if source == "imagefolder":
        return imagefolder.open_imagefolder(rest, bad_data=bad_data)
    if source == "hf":
        return hf.open_hf(rest, bad_data=bad_data)
    hint = f", did you mean 'imagefolder:{spec}'?" if Path(spec).is_dir() else nearest(source, FORMS)
    raise UserError(f"unknown data set '{spec}'{hint or ':'} expected one of {', '.join(FORMS.values())}")
