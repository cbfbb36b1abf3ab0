"""Images that fit in memory: a whole batch is one indexing."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import resize

from stillhouse.data.options import within
from stillhouse.data.splits import subset


class Arrays(Dataset[tuple[Tensor, Any]]):
    """Images uint8 [N, C, H, W], or floats with 1 for white, and class numbers long [N], or floats [N, D]."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        return self.images[i], self.labels[i] if self.labels.is_floating_point() else int(self.labels[i])

    def draw_batch(self, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The images [b, C, H, W] and labels of these samples, the same in every epoch."""
        return self.images[ids], self.labels[ids]


def part_of(images: Tensor, labels: Tensor, size: int, channels: int, count: int | None, where: tuple[int | str, ...]) -> Arrays:
    """Grey images uint8 [N, H, W] as a data set: `count` of them, drawn by `where`, whose last word is the option's name, or all.

    Raises:
        UserError: unless there are so many, and at least one for each class.
    """
    labels = labels.long()
    if count is not None:
        within(str(where[-1]), count, len(labels.unique()), len(labels))
        chosen = subset(labels, count, *where)
        images, labels = images[chosen], labels[chosen]
    images = images.unsqueeze(1)
    if size != images.shape[-1]:
        images = torch.cat([resize(part, [size, size], antialias=True) for part in images.split(4096)])
    return Arrays(images.expand(-1, channels, -1, -1), labels)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images [N, C, H, W], for pixels in [0, 1]; from 10,000 images at most."""
    pixels = images[:10_000].double() / 255
    std, mean = torch.std_mean(pixels, dim=(0, 2, 3))
    return tuple(round(m, 4) for m in mean.tolist()), tuple(round(s, 4) for s in std.tolist())


def fingerprint(*parts: Tensor | str) -> str:
    """sha256 of tensors (shapes and bytes) and texts."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(repr((part.dtype, tuple(part.shape))).encode())
            digest.update(part.contiguous().view(-1).numpy().data)
        else:
            digest.update(part.encode())
    return digest.hexdigest()
