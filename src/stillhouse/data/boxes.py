"""Images whose annotations are in files beside them: boxes on images as a data set, and what the readers of boxes and of masks share."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import Dataset

from stillhouse.data import SLACK, BadData, Data
from stillhouse.data.images import open_image, opened, plain, why_broken
from stillhouse.data.options import within
from stillhouse.data.splits import split
from stillhouse.errors import UserError
from stillhouse.models.specs import parse_options

Item = TypeVar("Item")
Result = TypeVar("Result")
Size = tuple[int, int]
Corners = tuple[float, float, float, float]
SHARE = 0.2
ORIENTED = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")


class Box(NamedTuple):
    """A box as annotated: `id` is how a fault names it, `corners` are x1, y1, x2, y2 in pixels from the image's top left corner."""

    id: str
    corners: Corners
    category: str
    crowd: bool = False


@dataclass
class Picture:
    """An image file, `path` below the data's root, with its boxes; `size` is (width, height) as annotated, `where` how a fault names it."""

    path: str
    where: str
    size: Size | None = None
    boxes: list[Box] = field(default_factory=list)


class BoxFiles(Dataset[tuple[Image.Image, dict[str, Tensor]]]):
    """Image files with their boxes: {"boxes" float [n, 4], "labels" long [n] in 1..K, "iscrowd" bool [n]}; images are read when asked for.

    The boxes are in a few arrays, not an object each, which every worker process would come to copy.
    """

    def __init__(self, root: Path, pictures: Sequence[Picture], classes: list[str]) -> None:
        label = {name: i + 1 for i, name in enumerate(classes)}
        boxes = [box for picture in pictures for box in picture.boxes]
        self.root, self.names, self.sizes = root, [picture.path for picture in pictures], [picture.size for picture in pictures]
        self.starts = np.cumsum([0] + [len(picture.boxes) for picture in pictures])
        self.boxes = np.array([box.corners for box in boxes], np.float32).reshape(-1, 4)
        self.labels = np.array([label[box.category] for box in boxes], np.int64)
        self.iscrowd = np.array([box.crowd for box in boxes], bool)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Image.Image, dict[str, Tensor]]:
        i = range(len(self))[i]
        here = slice(self.starts[i], self.starts[i + 1])
        target = {name: torch.from_numpy(getattr(self, name)[here].copy()) for name in ("boxes", "labels", "iscrowd")}
        return read_image(self.root / self.names[i], self.sizes[i]), target


def box_data(
    name: str, root: Path, parts: list[list[Picture]], classes: list[str], *, share: float, faults: list[str], bad_data: BadData
) -> Data:
    """`Data` of a training and a validation part, or of one part that is split (by image, the same way each time).

    Every file is looked at once (`look`). Images without boxes stay. A box that reaches out of its image is cut, and named; what cannot
    be used is left out, and named. `faults` are what the reader has found already.

    Raises:
        UserError: if anything is wrong (unless `bad_data` is "skip"), or nothing is left.
    """
    faults = list(faults)
    parts = [_usable(root, pictures, faults) for pictures in parts]
    refuse_faults(faults, root, bad_data)
    parts = two_parts(parts, share, root)
    train, val = (BoxFiles(root, pictures, classes) for pictures in parts)
    refuse_shared(train.names, val.names, root)
    digest = hashlib.sha256(repr(classes).encode())
    for files in (train, val):
        digest.update(f"{[(file, os.path.getsize(root / file)) for file in files.names]}".encode(errors="surrogateescape"))
        for array in (files.starts, files.boxes, files.labels, files.iscrowd):
            digest.update(array.tobytes())
    return Data(
        name=name,
        train=train,
        val=val,
        classes=classes,
        size=side_of([*train.sizes, *val.sizes]),
        skipped=faults,
        fingerprint=digest.hexdigest(),
        task="detect",
    )


def _usable(root: Path, pictures: list[Picture], faults: list[str]) -> list[Picture]:
    """The pictures whose files are there, whole and of the annotated size, with their boxes cut to them; sorted by name."""
    found = in_threads(lambda picture: look(root / picture.path, picture.size), pictures)
    usable = []
    for picture, size in zip(pictures, found, strict=True):
        if isinstance(size, str):
            named = os.path.basename(picture.path) in picture.where
            faults.append(f"{picture.where} ({size})" if named else f"{picture.where}: {picture.path} ({size})")
            continue
        boxes = []
        for box in picture.boxes:
            corners, fault = cut(box.corners, size)
            if fault:
                x1, y1, x2, y2 = (f"{x:.6g}" for x in box.corners)
                told = f"its box from ({x1}, {y1}) to ({x2}, {y2}) {fault}{', to which it can be cut' if corners else ''}"
                faults.append(f"{picture.where}: {box.id} ({told})")
            if corners:
                boxes.append(box._replace(corners=corners))
        usable.append(Picture(picture.path, picture.where, size, boxes))
    return sorted(usable, key=lambda picture: picture.path)


def cut(corners: Corners, size: Size) -> tuple[Corners | None, str]:
    """The box cut to an image of this size (None if nothing is left), in single precision, and what is wrong with it, if anything."""
    if not all(map(math.isfinite, corners)):
        return None, "is not of finite numbers"
    x1, y1, x2, y2 = corners
    if x1 >= x2 or y1 >= y2:
        return None, "has no area"
    width, height = size
    inside = tuple(float(np.float32(min(max(x, 0), limit))) for x, limit in zip(corners, (width, height) * 2, strict=True))
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        return None, f"has no area in the image of {width} x {height}"
    far = max(-x1, -y1, x2 - width, y2 - height) > SLACK
    return (inside[0], inside[1], inside[2], inside[3]), f"reaches out of the image of {width} x {height}" if far else ""


def look(path: Path, size: Size | None = None) -> Size | str:
    """The size (width, height) in which an image fits its annotations, or what is wrong with its file; `size` is what they say.

    An image is taken upright by its EXIF tag, but as it is stored if only that is the annotated size: some tools draw on it so.
    """
    if not os.path.isfile(path):
        return "there is no such file"
    why = why_broken(path)
    if why:
        return why
    try:
        upright, stored = _sizes(path)
    except (OSError, SyntaxError, ValueError) as error:
        return f"its metadata cannot be read: {error}"
    if size not in (None, upright, stored):
        return f"it is {upright[0]} x {upright[1]}, but annotated as {size[0]} x {size[1]}"
    return size or upright


def _sizes(path: Path) -> tuple[Size, Size]:
    """(width, height) upright and as stored, from the header alone."""
    with opened(path) as image:
        known = image.format != "PNG" or any(name in image.info for name in ORIENTED)  # asking a PNG that has none would decode it
        turned = known and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (image.size[::-1] if turned else image.size), image.size


def read_image(path: Path, size: Size | None = None) -> Image.Image:
    """The image in RGB in the size in which it fits its annotations, as `look` found it.

    Raises:
        UserError: if it cannot be read, or is of another size.
    """
    try:
        image = open_image(path)
        if size in (None, image.size):
            return image
        with opened(path) as stored:
            image = stored.copy()
        for name in ORIENTED:
            image.info.pop(name, None)
        if image.size != size:
            raise ValueError(f"it is {image.width} x {image.height}, but annotated as {size[0]} x {size[1]}")
        return plain(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): repair or delete it, and resume or start again") from error


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`function` of each item, in threads: reading and decoding release Python's lock."""
    listed = list(items)
    chunks = [listed[i : i + 256] for i in range(0, len(listed), 256)]
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks about odd metadata
        return [result for results in pool.map(lambda chunk: [function(item) for item in chunk], chunks) for result in results]


def refuse_faults(faults: list[str], root: Path, bad_data: BadData) -> None:
    """Stop at faults, if that is what was asked for.

    Raises:
        UserError: naming the first few.
    """
    if faults and bad_data == "refuse":
        named = "; ".join(faults[:5]) + ("; …" if len(faults) > 5 else "")
        count = "1 thing is" if len(faults) == 1 else f"{len(faults)} things are"
        advice = "put it right, or cut and leave out what is wrong with bad_data='skip' (--bad-data skip)"
        raise UserError(f"{count} wrong in '{root}': {named}; {advice}")


def two_parts(parts: list[list[Item]], share: float, root: Path) -> list[list[Item]]:
    """Training and validation part; a single one is split by image, which depends on their number alone.

    Raises:
        UserError: if there is nothing in one.
    """
    if not all(parts):
        raise UserError(f"no image of '{root}' can be used {'to train' if not parts[0] else 'to validate'}, expected at least one")
    if len(parts) == 2:
        return parts
    if len(parts[0]) == 1:
        raise UserError(f"'{root}' has one image that can be used, expected at least two to split into train and val")
    return [[parts[0][i] for i in indices.tolist()] for indices in split([0] * len(parts[0]), share, "dense", "split")]


def refuse_shared(train: Iterable[str], val: Iterable[str], root: Path) -> None:
    """Stop if images are to train and to validate.

    Raises:
        UserError: naming one of them.
    """
    shared = sorted(set(train) & set(val))
    if shared:
        raise UserError(f"{len(shared)} images of '{root}' are both to train and to validate, such as '{shared[0]}': expected none")


def side_of(sizes: Iterable[Size | None]) -> int | None:
    """The side in pixels of images that are all square and alike, None for others."""
    distinct = set(sizes)
    size = distinct.pop()
    return size[0] if size and not distinct and size[0] == size[1] else None


def folder_of(path: str, expected: str) -> Path:
    """The folder that a spec names.

    Raises:
        UserError: if there is none.
    """
    root = Path(path).expanduser()
    if not path or not root.is_dir():
        raise UserError(f"there is no folder '{path}', expected {expected}")
    return root


def val_kind(options: str) -> type:
    """`float` where the options say `val=0.1`, a share; `str` where they say `val=FILE`."""
    return str if options.strip() and isinstance(parse_options(options).get("val"), str) else float


def val_share(options: dict[str, object]) -> float:
    """The share of the images that validates where there is no part for it.

    Raises:
        UserError: if it is out of range.
    """
    share = options.get("val", SHARE)
    if not isinstance(share, (int, float)):
        return SHARE
    within("val", share, 0.001, 0.999)
    return share
