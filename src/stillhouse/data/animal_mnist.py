"""Silhouettes of animals, 28 x 28, grey, ten classes: 9,716 different images of the package animal-mnist (PyPI, version 0.4).

Read where `pip install --no-deps animal-mnist` has put them; the package itself is not imported. Images that are there twice are left out.
Options: `classes=cat+cow` (some of the ten, numbered in the order given), `train=N`, `val=N` (stratified subsets), `size=16` (resized once,
bilinear), `channels=3` (grey repeated).

The package has no split of its own. Here 80 % train and 20 % validate, the same ones whatever the seed and the options, and what is nearly
alike is on one side: two images of a class that share more than 90 % of the pixels that are lit (brighter than half of white) in one of
them at least, as they stand or mirrored, or once their centres of mass are moved to the middle. What hangs together by such pairs goes
where its first image goes. Two drawings that share less, a cow and another cow in the same pose, may stand on both sides.
"""

from __future__ import annotations

import gzip
import io
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from stillhouse.data import Data
from stillhouse.data.arrays import channel_statistics, fingerprint, part_of
from stillhouse.data.installed import installed_files
from stillhouse.data.options import read_options, within
from stillhouse.data.splits import split
from stillhouse.errors import UserError, nearest

CLASSES = ["bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra"]
FILES = tuple(f"animal_mnist/data/Animal_MNIST/animal_{what}_version_3.gz" for what in ("data", "label"))
SIDE, VAL_SHARE, ALIKE = 28, 0.2, 0.9


def open_animal_mnist(text: str, *, seed: int = 0) -> Data:
    """Open `animal-mnist:TEXT`; TEXT may be empty. The subset `train=N` depends on `seed`, `val=N` does not.

    Raises:
        UserError: if the package is not installed (says how to get it) or damaged, or an option is unknown or out of range.
    """
    options = read_options(text, "animal-mnist", classes=str, train=int, val=int, size=int, channels=int)
    size, channels = options.get("size", SIDE), options.get("channels", 1)
    within("size", size, 8, 512)
    within("channels", channels, 1, 3)
    classes = _classes(options["classes"]) if "classes" in options else CLASSES
    every = split_animals("animal-mnist")
    mean, std = channel_statistics(every[0][0].unsqueeze(1))  # of all that may train, so that all networks are normalised alike
    (train_images, train_labels), (val_images, val_labels) = (_of(classes, *part) for part in every)
    train = part_of(train_images, train_labels, size, channels, options.get("train"), (seed, "animal-mnist", "train"))
    val = part_of(val_images, val_labels, size, channels, options.get("val"), ("animal-mnist", "val"))
    return Data(
        name=f"animal-mnist:{text}" if text else "animal-mnist",
        train=train,
        val=val,
        classes=classes,
        channels=channels,
        size=size,
        mean=mean * channels,
        std=std * channels,
        fingerprint=fingerprint(train.images[:, :1], train.labels, val.images[:, :1], val.labels, str(channels)),
    )


def split_animals(need: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images uint8 [N, 28, 28] and class numbers long [N], those that train and those that validate; `need` says what needs them.

    Raises:
        UserError: if the package is not installed or damaged.
    """
    return _split(*installed_files("animal-mnist", *FILES, need=need))


@cache
def _split(image_file: Path, label_file: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    raw, raw_labels = read_array(image_file), read_array(label_file)
    if raw.dtype != np.uint8 or raw.shape != (10_000, SIDE, SIDE) or raw_labels.shape != (10_000,):
        raise UserError(
            f"the installed animal-mnist holds {raw.dtype} {raw.shape}, expected uint8 (10000, {SIDE}, {SIDE}): install version 0.4"
        )
    _, first = np.unique(raw.reshape(len(raw), -1), axis=0, return_index=True)
    first.sort()
    images, labels = torch.from_numpy(raw[first]), torch.from_numpy(raw_labels[first].astype(np.int64))
    leader = leaders(images, labels)
    leads = (leader == torch.arange(len(leader))).nonzero()[:, 0]
    validates = torch.zeros(len(labels), dtype=torch.bool)
    validates[leads[split(labels[leads], VAL_SHARE, "animal-mnist", "split")[1]]] = True
    validates = validates[leader]
    return (images[~validates], labels[~validates]), (images[validates], labels[validates])


def leaders(images: Tensor, labels: Tensor) -> Tensor:
    """For each image [N, H, W] the index of the first of those that hang together with it by being nearly alike; its own if it is alone."""
    found = torch.arange(len(labels))
    for number in labels.unique():
        ids = (labels == number).nonzero()[:, 0]
        lit = (images[ids] > 127).float()
        middle, mirrored = _centred(lit), _centred(lit.flip(2))
        near = (_common(lit, lit) > ALIKE) | (_common(lit, lit.flip(2)) > ALIKE)
        near |= (_common(middle, middle) > ALIKE) | (_common(middle, mirrored) > ALIKE)
        _, group = connected_components(near.numpy(), directed=False)
        _, first = np.unique(group, return_index=True)
        found[ids] = ids[torch.from_numpy(first[group])]
    return found


def _common(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of shapes of zeros and ones [n, H, W] and [m, H, W], as [n, m]."""
    one, other = one.flatten(1), other.flatten(1)
    both = one @ other.T
    return both / (one.sum(1)[:, None] + other.sum(1) - both).clamp(min=1)


def _centred(lit: Tensor) -> Tensor:
    """Shapes [n, H, W] moved, around the border, so that their centre of mass is in the middle, to the pixel."""
    count, height, width = lit.shape
    mass = lit.sum((1, 2)).clamp(min=1)
    down = (lit.sum(2) @ torch.arange(height).float() / mass).round().long() - height // 2
    right = (lit.sum(1) @ torch.arange(width).float() / mass).round().long() - width // 2
    rows, columns = (torch.arange(height) + down[:, None]) % height, (torch.arange(width) + right[:, None]) % width
    return lit[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None]]


def _classes(text: str) -> list[str]:
    names = text.split("+")
    unknown = next((name for name in names if name not in CLASSES), None)
    if unknown is not None:
        raise UserError(f"animal-mnist has no class '{unknown}'{nearest(unknown, CLASSES) or ','} known: {', '.join(CLASSES)}")
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f"animal-mnist: classes={text}, expected two or more different ones, as in classes=cat+cow")
    return names


def _of(classes: list[str], images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    number = torch.tensor([classes.index(name) if name in classes else -1 for name in CLASSES])[labels]
    return images[number >= 0], number[number >= 0]


def read_array(path: Path) -> NDArray[Any]:
    """The array of a gzipped pickle, which may hold an array and nothing else.

    Raises:
        UserError: if it holds something else, or is damaged.
    """
    try:
        array = ArrayUnpickler(io.BytesIO(gzip.decompress(path.read_bytes()))).load()
    except Exception as error:  # an unpickler raises whatever odd bytes make it stumble over
        raise UserError(f"'{path}' is damaged ({error}): install it again") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"'{path}' holds a {type(array).__name__}, expected an array: install it again")
    return array


class ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays and nothing else: a pickle may name three things of numpy's, so that it cannot run anything."""

    def find_class(self, module: str, name: str) -> Any:
        """One of the three.

        Raises:
            pickle.UnpicklingError: for anything else.
        """
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.zeros(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"it names {module}.{name}")
