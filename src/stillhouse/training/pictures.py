"""Pictures to look at, out of what a network takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import resize

from stillhouse.models.preprocessing import Preprocessing

SHOWN = 400
"""Pixels of the longer side of a stored picture."""


def undone(images: Any, preprocessing: Preprocessing) -> Tensor:
    """Pictures uint8 [n, C, H, W] of images as a network takes them; those of several sizes lie in the upper left of the largest."""
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    pictures = [((image * std + mean) * 255).round().clamp(0, 255).byte() for image in images]
    return torch.stack([F.pad(picture, (0, width - picture.shape[-1], 0, height - picture.shape[-2])) for picture in pictures])


def small(pictures: Tensor) -> Tensor:
    """uint8 [n, C, H, W] with sides of at most `SHOWN` pixels: pictures are to be looked at, not to be learnt from."""
    share = SHOWN / max(pictures.shape[-2:])
    return pictures if share >= 1 else resize(pictures, [max(1, round(side * share)) for side in pictures.shape[-2:]], antialias=True)
