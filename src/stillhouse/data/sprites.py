"""Small grey shapes with a class, to be pasted into scenes: handwritten digits, clothes, silhouettes of animals.

Those that train and those that validate are different ones, the same whatever the seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from stillhouse.data.animal_mnist import CLASSES, split_animals
from stillhouse.data.fashion_mnist import open_fashion_mnist
from stillhouse.data.splits import split
from stillhouse.errors import UserError, nearest

VAL_SHARE = 0.4


@dataclass(frozen=True)
class Sprites:
    """Shapes uint8 [N, n, n], 0 where there is nothing, and their classes int64 [N], for training and for validation.

    Attributes:
        level: a pixel brighter than `level + 32` belongs to the shape.
        degrees: how far a shape may be turned either way and still be what it is.
        mirrored: whether its mirror image is of the same class.
    """

    train: tuple[NDArray[np.uint8], NDArray[np.int64]]
    val: tuple[NDArray[np.uint8], NDArray[np.int64]]
    names: list[str]
    level: int
    degrees: int
    mirrored: bool


def open_sprites(name: str) -> Sprites:
    """`digits` (scikit-learn's, 8 x 8), `fashion-mnist` (28 x 28, split as published) or `animals` (28 x 28, split as `animal-mnist`).

    Raises:
        UserError: for another name, or if the files are not on this machine (says how to get them) or damaged.
    """
    if name not in _KINDS:
        raise UserError(f"there are no sprites '{name}'{nearest(name, _KINDS) or ':'} expected one of {', '.join(_KINDS)}")
    return _KINDS[name]()


def _digits() -> Sprites:
    raw = load_digits()
    shapes = (raw.images.astype(np.int64) * 255 // 16).astype(np.uint8)
    return _split(shapes, raw.target.astype(np.int64), [str(digit) for digit in range(10)], level=64, degrees=20, mirrored=False)


def _fashion_mnist() -> Sprites:
    try:
        data = open_fashion_mnist("")
    except UserError as error:
        raise UserError(f"sprites=fashion-mnist reads only what a package or a download has put in place; {error}") from None
    parts: list[Any] = [data.train, data.val]
    train, val = ((part.images[:, 0].numpy(), part.labels.numpy()) for part in parts)
    return Sprites(train, val, data.classes, level=0, degrees=30, mirrored=True)


def _animals() -> Sprites:
    train, val = ((images.numpy(), labels.numpy()) for images, labels in split_animals("sprites=animals"))
    return Sprites(train, val, CLASSES, level=8, degrees=30, mirrored=True)


_KINDS = {"digits": _digits, "fashion-mnist": _fashion_mnist, "animals": _animals}


def _split(shapes: NDArray[np.uint8], labels: NDArray[np.int64], names: list[str], *, level: int, degrees: int, mirrored: bool) -> Sprites:
    train, val = split(torch.from_numpy(labels), VAL_SHARE, "scenes", "sprites")
    return Sprites((shapes[train], labels[train]), (shapes[val], labels[val]), names, level, degrees, mirrored)
