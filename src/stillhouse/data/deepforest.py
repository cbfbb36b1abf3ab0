"""Trees seen from the air, with a box around every crown: 914 boxes on photographs of three places in two forests.

Read from where PyPI's package `deepforest` (2.1.0) is installed, without importing it. `tile` cuts the photographs into squares of so many
pixels, by default 200, which are resized to `size`, by default 128; what is left over at the right and below is left out. Training tiles
may overlap: they begin every `stride` pixels, by default `tile`. `train=N` takes so many of them.

To train: one photograph of Yellowstone (574 trees; by default 132 tiles, 23 of them without a tree). To validate: another of Yellowstone
and one of Ordway-Swisher in Florida (279 and 61 trees, 34 tiles). So few places say little about others; who drew the boxes is not said.
Of a tree at a tile's edge the part inside is the object; with less than 40 % of its box inside it is not asked for, although something of
it can be seen.

There is one class. The package's photograph with the classes Dead and Alive (SOAP_061, 37 boxes) is left out: it has no other to be
compared with, and dead trees are simply trees in the others.
"""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from stillhouse.data import Data
from stillhouse.data.arrays import channel_statistics, fingerprint
from stillhouse.data.installed import installed_files
from stillhouse.data.options import read_options, within
from stillhouse.errors import UserError
from stillhouse.randomness import seed_from

TRAIN = ("2019_YELL_2_528000_4978000_image_crop2",)
VAL = ("2019_YELL_2_541000_4977000_image_crop", "OSBS_029")
INSIDE = 0.4


def open_deepforest(text: str, *, seed: int = 0) -> Data:
    """Open `deepforest:TEXT`; TEXT may be empty. `train=N` takes N training tiles that depend on `seed`.

    Raises:
        UserError: if the package is not installed or holds something else, or an option is unknown or out of range.
    """
    options = read_options(text, "deepforest", tile=int, size=int, stride=int, train=int)
    tile, size = options.setdefault("tile", 200), options.setdefault("size", 128)
    within("tile", tile, 50, 400)
    within("size", size, 32, 1024)
    within("stride", options.setdefault("stride", tile), 10, tile)
    names = [f"deepforest/data/{name}{suffix}" for name in (*TRAIN, *VAL) for suffix in (".png", ".xml")]
    files = installed_files("deepforest", *names, need="deepforest")
    sites = list(zip(files[::2], files[1::2], strict=True))
    images, targets = _tiles(sites[: len(TRAIN)], tile, options["stride"], size)
    mean, std = channel_statistics(images)  # of all that may train, whatever `train`: a teacher and its student are normalised alike
    if "train" in options:
        within("train", options["train"], 1, len(images))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed_from(seed, "deepforest", "subset")))
        chosen = order[: options["train"]].sort().values
        images, targets = images[chosen], [targets[i] for i in chosen.tolist()]
    return Data(
        name=f"deepforest:{text}" if text else "deepforest",
        train=Tiles(images, targets),
        val=Tiles(*_tiles(sites[len(TRAIN) :], tile, tile, size)),
        classes=["tree"],
        size=size,
        mean=mean,
        std=std,
        fingerprint=fingerprint(
            *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files), repr(sorted(options.items())), str(seed)
        ),
        task="detect",
    )


class Tiles(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images uint8 [N, 3, H, W] and what is on each, {"boxes", "labels"}."""

    def __init__(self, images: Tensor, targets: list[dict[str, Tensor]]) -> None:
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.images[i], self.targets[i]


def _tiles(sites: list[tuple[Path, Path]], tile: int, stride: int, size: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images uint8 [N, 3, size, size] and their targets, row by row."""
    images, targets = [], []
    for picture, annotation in sites:
        photograph, boxes = _read(picture, annotation)
        for y in range(0, photograph.height - tile + 1, stride):
            for x in range(0, photograph.width - tile + 1, stride):
                square = photograph.resize((size, size), Image.Resampling.BILINEAR, box=(x, y, x + tile, y + tile))
                images.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
                found = cut(boxes, x, y, tile) * (size / tile)
                targets.append({"boxes": found, "labels": torch.ones(len(found), dtype=torch.int64)})
    return torch.stack(images).contiguous(), targets


def cut(boxes: Tensor, x: int, y: int, tile: int) -> Tensor:
    """What of boxes [n, 4] is inside a tile at (x, y), in its pixels: boxes [m, 4] of those that are so with 40 % of their area."""
    inside = (boxes - boxes.new_tensor([x, y, x, y])).clamp(0, tile)
    return inside[_area(inside) >= INSIDE * _area(boxes)]


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _read(picture: Path, annotation: Path) -> tuple[Image.Image, Tensor]:
    """A photograph and its boxes float [n, 4]. VOC counts pixels from 1 and includes the last one."""
    try:
        photograph = Image.open(picture).convert("RGB")
        found = [[int(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax")] for box in ET.parse(annotation).iter("bndbox")]
        boxes = torch.tensor(found, dtype=torch.float32) - torch.tensor([1.0, 1, 0, 0])
        if not ((boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all() and (boxes[:, 2:] <= torch.tensor(photograph.size)).all()):
            raise ValueError("a box is empty or outside")
    except (OSError, ET.ParseError, ValueError, RuntimeError) as error:
        raise UserError(
            f"'{annotation}' or its image is not as in deepforest 2.1.0 ({error}): pip install --no-deps deepforest==2.1.0"
        ) from error
    return photograph, boxes
