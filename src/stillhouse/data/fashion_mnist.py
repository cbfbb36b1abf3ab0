"""Fashion-MNIST (arXiv 1708.07747): 60,000 training and 10,000 test images of clothes, 28 x 28, grey, ten classes.

Read from the folder named by `root=DIR`, from Debian's package `dataset-fashion-mnist`, or from what torchvision downloaded;
`download=true` downloads it. Options: `train=N`, `val=N` (stratified subsets), `size=32` (resized once, bilinear), `channels=3` (grey
repeated).
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import FashionMNIST

from stillhouse.data import Data
from stillhouse.data.arrays import fingerprint, part_of
from stillhouse.data.options import read_options, within
from stillhouse.errors import UserError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CLASSES = ["T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
MEAN, STD = 0.2860, 0.3530
LARGEST = 16 + 60_000 * 28 * 28
IMAGES, LABELS = 2051, 2049  # the magic numbers of idx files with three and one dimensions of bytes


def open_fashion_mnist(text: str, *, seed: int = 0) -> Data:
    """Open `fashion-mnist:TEXT`; TEXT may be empty. The subset `train=N` depends on `seed`, `val=N` does not.

    Raises:
        UserError: if the files are nowhere (says how to get them) or damaged, or an option is unknown or out of range.
    """
    options = read_options(text, "fashion-mnist", train=int, val=int, size=int, channels=int, root=str, download=bool)
    size, channels = options.get("size", 28), options.get("channels", 1)
    within("size", size, 8, 512)
    within("channels", channels, 1, 3)
    folder = _folder(options.get("root"), options.get("download", False))
    train_images, train_labels, val_images, val_labels = (_read_idx(folder, name) for name in FILES)
    train = part_of(train_images, train_labels, size, channels, options.get("train"), (seed, "fashion-mnist", "train"))
    val = part_of(val_images, val_labels, size, channels, options.get("val"), ("fashion-mnist", "val"))
    return Data(
        name=f"fashion-mnist:{text}" if text else "fashion-mnist",
        train=train,
        val=val,
        classes=CLASSES,
        channels=channels,
        size=size,
        mean=(MEAN,) * channels,
        std=(STD,) * channels,
        fingerprint=fingerprint(train.images[:, :1], train.labels, val.images[:, :1], val.labels, str(channels)),
    )


def _folder(root: str | None, download: bool) -> Path:
    cache = Path(torch.hub.get_dir()).parent / "datasets"  # ~/.cache/torch/datasets, unless TORCH_HOME says otherwise
    downloaded = cache / "FashionMNIST" / "raw"
    given = Path(root).expanduser() if root else None
    for folder in [given, given / "FashionMNIST" / "raw"] if given else [DEBIAN, downloaded]:
        if all(_file(folder, name) for name in FILES):
            return folder
    if given:
        raise UserError(f"no Fashion-MNIST in '{given}', expected {', '.join(FILES)} (.gz or not) in it")
    if not download:
        raise UserError(
            "Fashion-MNIST is not on this machine: apt-get install dataset-fashion-mnist, or name a folder with fashion-mnist:root=DIR, "
            "or download it with fashion-mnist:download=true"
        )
    try:
        FashionMNIST(str(cache), download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"Fashion-MNIST could not be downloaded ({error}): check the network, or name a folder with fashion-mnist:root=DIR"
        ) from error
    return downloaded


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def _read_idx(folder: Path, name: str) -> Tensor:
    """The bytes of an idx file as a uint8 tensor [N] or [N, H, W]."""
    path = _file(folder, name)
    assert path is not None  # _folder has looked
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError("it is larger than the largest of the four files")
        magic = struct.unpack_from(">i", content)[0]
        if magic != (IMAGES if "images" in name else LABELS):
            raise ValueError("it is no idx file of this kind")
        shape = struct.unpack_from(">iii" if magic == IMAGES else ">i", content, 4)
        return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy())
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f"'{path}' is damaged ({error}): get it again") from error
