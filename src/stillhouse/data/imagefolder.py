"""A folder of images, a sub-folder a class: `imagefolder:DIR`.

DIR holds `train` and `val` (or `valid`, `validation`, `test`, `testing`; `training` for `train`), or the classes themselves, which are
then split, stratified, the same way each time. Options: `imagefolder:DIR:val=0.2` (the share of each class that validates when there is
no such folder), `channels=1` (grey). Classes are numbered in the order of their names, as torchvision's ImageFolder does.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from stillhouse.data import BadData, Data
from stillhouse.data.images import SUFFIXES, find_broken, find_images, open_image, refuse_or_skip
from stillhouse.data.options import path_and_options, read_options, within
from stillhouse.data.splits import split
from stillhouse.errors import UserError

TRAIN, VAL = ("train", "training"), ("val", "valid", "validation", "test", "testing")


class Files(Dataset[tuple[Image.Image, int]]):
    """Image files `root/names[i]` with their labels; images are read when asked for, in RGB or grey."""

    def __init__(self, root: Path, names: list[str], labels: list[int], channels: int = 3) -> None:
        self.root, self.names, self.labels, self.channels = root, names, labels, channels

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        path = os.path.join(self.root, self.names[i])
        try:
            return open_image(path, self.channels), self.labels[i]
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"'{path}' cannot be read ({error}): repair or delete it, and resume or start again") from error


def open_imagefolder(text: str, *, bad_data: BadData = "refuse") -> Data:
    """Open `imagefolder:TEXT`. Every file is looked at once (`images.why_broken`): a JPEG in 0.1 ms, a PNG in half of what decoding takes.

    Raises:
        UserError: if the folder is missing or empty, a class has no image, images are broken (unless `bad_data` is "skip"), all of
            them are, or the classes of train and val differ.
    """
    path, rest = path_and_options(text)
    options = read_options(rest, "imagefolder", val=float, channels=int)
    share, channels = options.get("val", 0.2), options.get("channels", 3)
    within("val", share, 0.001, 0.999)
    if channels not in (1, 3):
        raise UserError(f"channels={channels}, expected 1 (grey) or 3 (RGB)")
    root = Path(path).expanduser()
    if not path or not root.is_dir():
        raise UserError(f"there is no folder '{path}', expected imagefolder:DIR with a sub-folder of images a class")
    train_folder = _part(root, TRAIN)
    train_folder, val_folder = (train_folder, _val_part(root)) if train_folder else (root, None)
    train_classes, found = _scan(root, train_folder)
    val_classes, val_found = _scan(root, val_folder) if val_folder else (train_classes, [])
    if train_classes != val_classes:
        raise UserError(_differ(train_folder, train_classes, val_folder, val_classes))
    skipped = _leave_out_broken(root, train_classes, [found, val_found] if val_folder else [found], bad_data)
    if val_folder is None:
        _refuse_single(train_classes, found)
        first, second = split([label for _, label in found], share, "imagefolder", "split")
        found, val_found = [found[i] for i in first.tolist()], [found[i] for i in second.tolist()]
    return Data(
        name=f"imagefolder:{text}",
        train=Files(root, [name for name, _ in found], [label for _, label in found], channels),
        val=Files(root, [name for name, _ in val_found], [label for _, label in val_found], channels),
        classes=train_classes,
        channels=channels,
        skipped=skipped,
        fingerprint=_fingerprint(root, found, val_found),
    )


def _part(root: Path, names: tuple[str, ...]) -> Path | None:
    """The sub-folder of this name, if it holds folders: a class may be called `train` too."""
    folders = (root / name for name in names)
    return next((folder for folder in folders if folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir())), None)


def _val_part(root: Path) -> Path | None:
    """The folder that validates. One that holds its images without sub-folders, as ImageNet's comes, must not be passed over in silence."""
    flat = next((root / name for name in VAL if (root / name).is_dir()), None)
    folder = _part(root, VAL)
    if flat and not folder:
        raise UserError(f"'{flat}' has no sub-folders, expected one a class with its images, as in the training folder")
    return folder


def _scan(root: Path, folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Class names, and (file name below root, label) of every image, both sorted."""
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"'{folder}' has no sub-folders, expected one a class with its images")
    found = []
    for label, name in enumerate(classes):
        images = sorted(os.path.relpath(file, root) for file in find_images(folder / name))
        if not images:
            raise UserError(
                f"class '{name}' has no image in '{folder / name}', expected {', '.join(sorted(SUFFIXES))}: add some or delete the folder"
            )
        found += [(image, label) for image in images]
    return classes, found


def _differ(train_folder: Path, train: list[str], val_folder: Path | None, val: list[str]) -> str:
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    return (
        f"the classes of '{train_folder}' and '{val_folder}' differ (only in the first: {', '.join(only_train[:5]) or 'none'}; "
        f"only in the second: {', '.join(only_val[:5]) or 'none'}), expected the same sub-folders in both"
    )


def _leave_out_broken(root: Path, classes: list[str], parts: list[list[tuple[str, int]]], bad_data: str) -> list[str]:
    """Take the broken images out of `parts`, and name them with what is wrong."""
    reasons = [find_broken(part, lambda item: root / item[0]) for part in parts]
    skipped = [
        f"{name} ({why})" for part, whys in zip(parts, reasons, strict=True) for (name, _), why in zip(part, whys, strict=True) if why
    ]
    refuse_or_skip(skipped, sum(map(len, parts)), bad_data)
    for part, whys in zip(parts, reasons, strict=True):
        part[:] = [item for item, why in zip(part, whys, strict=True) if not why]
        left = Counter(label for _, label in part)
        for label, name in enumerate(classes):
            if not left[label]:
                raise UserError(f"class '{name}' has no readable image left: repair some, or delete the folder")
    return skipped


def _refuse_single(classes: list[str], found: list[tuple[str, int]]) -> None:
    count = Counter(label for _, label in found)
    for label, name in enumerate(classes):
        if count[label] < 2:
            raise UserError(f"class '{name}' has one image, expected at least two to split into train and val")


def _fingerprint(root: Path, *parts: list[tuple[str, int]]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}\n".encode())
        for name, _ in part:
            digest.update(f"{Path(name).as_posix()} {(root / name).stat().st_size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
