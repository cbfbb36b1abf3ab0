"""Nuclei on one stained section of an ovarian carcinoma (H&E, 1500 x 1500 pixels), a class for each pixel.

Read from where PyPI's package `histolytics` (0.3.0) is installed, without importing it. `tile` cuts it into squares of so many pixels, by
default 96, which are resized to `size`, by default `tile`. Training tiles may overlap: they begin every `stride` pixels, by default `tile`.
`train=N` takes so many of them.

The upper 1000 rows train, the lower 400 validate (150 and 60 tiles by default), and the 100 between are left out, so that no nucleus is in
both. (Cut the other way, nearly all that is not connective would be on one side: the right 400 columns have 0.4 % inflammatory pixels.)
It is one section of one patient: a student that does well here need not do well on another.

The mask has numbers, no names. They are those of the package's own polygons of the same nuclei, by their counts: 373 objects of number 1
(374 connective polygons), 633 of number 2 (633 inflammatory), 288 of number 3 (288 neoplastic). Who or what drew them is not said; they
look like a network's, looked through by hand, and blurred nuclei are missed: the scores say how well a student agrees with them.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from stillhouse.data import Data
from stillhouse.data.arrays import channel_statistics, fingerprint
from stillhouse.data.installed import installed_files
from stillhouse.data.options import read_options, within
from stillhouse.errors import UserError
from stillhouse.randomness import seed_from

FILES = ("histolytics/data/hgsc_nest.jpg", "histolytics/data/hgsc_nest_type_mask.npz")
CLASSES = ["background", "connective", "inflammatory", "neoplastic"]
SIDE = 1500
TRAIN_ROWS, VAL_ROWS = (0, 1000), (1100, SIDE)


def open_histolytics(text: str, *, seed: int = 0) -> Data:
    """Open `histolytics:TEXT`; TEXT may be empty. `train=N` takes N training tiles that depend on `seed`.

    Raises:
        UserError: if the package is not installed or holds something else, or an option is unknown or out of range.
    """
    options = read_options(text, "histolytics", tile=int, size=int, stride=int, train=int)
    tile = options.setdefault("tile", 96)
    within("tile", tile, 32, 400)
    within("size", options.setdefault("size", tile), 32, 1024)
    within("stride", options.setdefault("stride", tile), 8, tile)
    files = installed_files("histolytics", *FILES, need="histolytics")
    image, mask = _read(*files)
    images, masks = _tiles(image, mask, TRAIN_ROWS, tile, options["stride"], options["size"])
    mean, std = channel_statistics(images)  # of all that may train, whatever `train`: a teacher and its student are normalised alike
    if "train" in options:
        within("train", options["train"], 1, len(images))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed_from(seed, "histolytics", "subset")))
        chosen = order[: options["train"]].sort().values
        images, masks = images[chosen], masks[chosen]
    return Data(
        name=f"histolytics:{text}" if text else "histolytics",
        train=TensorDataset(images, masks),
        val=TensorDataset(*_tiles(image, mask, VAL_ROWS, tile, tile, options["size"])),
        classes=CLASSES,
        size=options["size"],
        mean=mean,
        std=std,
        # of the files: a JPEG is not decoded to quite the same pixels everywhere
        fingerprint=fingerprint(
            *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files), repr(sorted(options.items())), str(seed)
        ),
        task="segment",
    )


def _tiles(image: Image.Image, mask: Image.Image, rows: tuple[int, int], tile: int, stride: int, size: int) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, size, size] and masks uint8 [N, size, size] of the tiles within some rows, row by row."""
    first, end = rows
    corners = [(x, y) for y in range(first, end - tile + 1, stride) for x in range(0, SIDE - tile + 1, stride)]
    boxes = [(x, y, x + tile, y + tile) for x, y in corners]
    images = [np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box)) for box in boxes]
    masks = [np.asarray(mask.resize((size, size), Image.Resampling.NEAREST, box=box)) for box in boxes]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(np.stack(masks))


def _read(picture: Path, raster: Path) -> tuple[Image.Image, Image.Image]:
    """The section and its mask."""
    try:
        image = Image.open(picture).convert("RGB")
        with np.load(raster, allow_pickle=False) as arrays:
            mask = arrays["nuc_raster"]
        if image.size != (SIDE, SIDE) or mask.shape != (SIDE, SIDE) or set(np.unique(mask)) != set(range(len(CLASSES))):
            raise ValueError(f"{image.size} pixels and a mask {mask.shape} of {np.unique(mask)[:9]}")
    except (OSError, ValueError, LookupError, zipfile.BadZipFile) as error:
        raise UserError(
            f"'{raster}' or its image is not as in histolytics 0.3.0 ({error}): pip install --no-deps histolytics==0.3.0"
        ) from error
    return image, Image.fromarray(mask.astype(np.uint8))
