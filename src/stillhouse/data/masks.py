"""Images with a mask each, to segment: `masks:DIR`.

DIR holds `images/train`, `images/val` and `masks/train`, `masks/val`; or `train/images`, `train/masks` and `val/images`, `val/masks`; or
just `images` and `masks`, which are then split by image, the same way each time (`val=0.2`, the share that validates). The folders may
also be called `labels` or `annotations`, and `training`, `valid`, `validation`, `test`. An image and its mask have the same name but for
the suffix, or for a `_mask`, `_labels` or `_gt` at the mask's end.

A mask is a palette or grey image of one class number a pixel; 255 is where nobody is judged, as is `ignore=N`. How many classes there
are is said by `classes=N`, or by DIR's file `classes.txt` with one name a line, or else by the masks themselves, which are all read then:
one more than their highest number. `values=[0,255]` says which value stands for which class where they are not counted from 0.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from stillhouse.data import IGNORED, BadData, Data
from stillhouse.data.boxes import Size, folder_of, in_threads, look, read_image, refuse_faults, refuse_shared, side_of, two_parts, val_share
from stillhouse.data.imagefolder import TRAIN, VAL
from stillhouse.data.images import find_images, opened
from stillhouse.data.options import path_and_options, read_options, within
from stillhouse.errors import UserError

IMAGES, MASKS = ("images", "image", "imgs"), ("masks", "mask", "labels", "annotations")
ENDS = ("_mask", "_labels", "_gt")
MODES = ("1", "L", "P", "I", "I;16", "I;16B")
SAMPLED = 64
UNKNOWN = -1
Numbers = NDArray[np.int16]
"""[256]: the class number of each value in a mask, `IGNORED`, or `UNKNOWN`."""


class Pair(NamedTuple):
    """An image and its mask: files below the data's root."""

    image: str
    mask: str


class MaskFiles(Dataset[tuple[Image.Image, Tensor]]):
    """Image files with their masks of class numbers, uint8 [H, W], `IGNORED` where nobody is judged; both are read when asked for."""

    def __init__(self, root: Path, pairs: Sequence[Pair], numbers: Numbers) -> None:
        self.root, self.pairs, self.numbers = root, list(pairs), numbers

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Image.Image, Tensor]:
        pair = self.pairs[i]
        try:
            mask = read_mask(self.root / pair.mask, self.numbers)
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"'{self.root / pair.mask}' cannot be used ({error}): put it right, and resume or start again") from error
        return read_image(self.root / pair.image, (mask.shape[1], mask.shape[0])), torch.from_numpy(mask)


def read_mask(path: Path, numbers: Numbers) -> NDArray[np.uint8]:
    """A mask's class numbers, uint8 [H, W].

    Raises:
        OSError, SyntaxError: Pillow's, if it cannot be read.
        ValueError: if it is no mask, or has values that `numbers` does not know.
    """
    values = _values(path)
    found = numbers[values] if values.dtype == np.uint8 else np.where((values >= 0) & (values < 256), numbers[values.clip(0, 255)], UNKNOWN)
    if (found == UNKNOWN).any():
        known = np.flatnonzero(numbers != UNKNOWN)
        runs = np.split(known, np.flatnonzero(np.diff(known) > 1) + 1)
        expected = ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
        strange = np.unique(values[found == UNKNOWN]).tolist()
        raise ValueError(f"it has the value {', '.join(map(str, strange[:5]))}{', …' * (len(strange) > 5)}, expected {expected}")
    return found.astype(np.uint8)


def _values(path: Path) -> NDArray[Any]:
    with opened(path) as mask:
        _refuse_colours(mask)
        return np.asarray(mask).astype(np.uint8) if mask.mode == "1" else np.asarray(mask)


def _refuse_colours(mask: Image.Image) -> None:
    if mask.format == "JPEG":
        raise ValueError("it is a JPEG, which does not keep class numbers, expected PNG")
    if mask.mode not in MODES:
        raise ValueError(f"its pixels are {mask.mode} colours, expected one class number a pixel, a palette or grey image")


def open_masks(text: str, *, bad_data: BadData = "refuse") -> Data:
    """Open `masks:TEXT`. Every file is looked at once, without decoding it (`images.why_broken`, and the sizes).

    The values in a mask are checked whenever it is read; before that in a sample of 64 masks a part, or in all where they say how many
    classes there are, or `bad_data` is "skip".

    Raises:
        UserError: if no folders are found, or nothing says what the classes are; if an image or a mask has no other, is broken, or they
            differ in size, or a mask is of colours or has unknown values (these are left out and named if `bad_data` is "skip").
    """
    path, rest = path_and_options(text)
    options = read_options(rest, "masks", val=float, classes=int, ignore=int, values=list)
    share = val_share(options)
    root = folder_of(path, "masks:DIR with folders of images and of masks")
    faults: list[str] = []
    parts = [_pairs(root, images, masks, faults) for images, masks in _folders(root)]
    ignored, values = options.get("ignore"), options.get("values")
    _check_values(ignored, values)
    classes = _names(root, options.get("classes"), values) or _found(root, parts, ignored, faults)
    numbers = number_table(range(len(classes)) if values is None else values, ignored)
    return mask_data(f"masks:{text}", root, parts, classes, numbers, share=share, faults=faults, bad_data=bad_data)


def mask_data(
    name: str,
    root: Path,
    parts: list[list[Pair]],
    classes: list[str],
    numbers: Numbers,
    *,
    share: float,
    faults: list[str],
    bad_data: BadData,
) -> Data:
    """`Data` of a training and a validation part, or of one part that is split (by image, the same way each time).

    `faults` are what the reader has found already. Which masks are read here is said at `open_masks`.

    Raises:
        UserError: if anything is wrong (unless `bad_data` is "skip"), or nothing is left of a part that counts.
    """
    faults, usable, sizes = list(faults), [], set()
    for pairs in parts:
        every = 1 if bad_data == "skip" else -(-len(pairs) // SAMPLED)
        listed = list(enumerate(pairs))
        found = in_threads(lambda item, every=every: _look(root, item[1], numbers if item[0] % every == 0 else None), listed)  # type: ignore[misc]
        faults += [why for why in found if isinstance(why, str)]
        usable.append([pair for pair, why in zip(pairs, found, strict=True) if not isinstance(why, str)])
        sizes |= {size for size in found if not isinstance(size, str)}
    refuse_faults(faults, root, bad_data)
    train, val = (MaskFiles(root, pairs, numbers) for pairs in two_parts(usable, share, root))
    refuse_shared([pair.image for pair in train.pairs], [pair.image for pair in val.pairs], root)
    for part, purpose in ((train, "train"), (val, "validate")):
        if not any((part[i][1] != IGNORED).any() for i in range(len(part))):  # as a rule the first mask settles it
            raise UserError(f"the masks of '{root}' to {purpose} with have no pixel that counts, expected class numbers beside {IGNORED}")
    facts = [[(file, os.path.getsize(root / file)) for pair in files.pairs for file in pair] for files in (train, val)]
    return Data(
        name=name,
        train=train,
        val=val,
        classes=classes,
        size=side_of(sizes),
        skipped=faults,
        fingerprint=hashlib.sha256(repr((classes, numbers.tolist(), facts)).encode(errors="surrogateescape")).hexdigest(),
        task="segment",
    )


def number_table(values: Sequence[int], ignored: int | None = None) -> Numbers:
    """The table by which value `values[k]` is class k; 255 is ignored unless it is among them, and so is `ignored`."""
    table = np.full(256, UNKNOWN, np.int16)
    table[IGNORED] = IGNORED
    table[list(values)] = range(len(values))
    if ignored is not None:
        table[ignored] = IGNORED
    return table


def pair_up(images: dict[str, list[str]], masks: dict[str, list[str]], faults: list[str]) -> list[Pair]:
    """The pairs of an image and a mask of the same key, sorted; what has no other, or several, is named in `faults`."""
    pairs = []
    for key in sorted(images.keys() | masks.keys()):
        here, there = images.get(key, []), masks.get(key, [])
        if len(here) == len(there) == 1:
            pairs.append(Pair(here[0], there[0]))
        elif here and there:
            faults.append(f"{', '.join(here + there)} (it cannot be told which mask is of which image)")
        else:
            faults += [f"{name} (it has no {'mask' if here else 'image'})" for name in here + there]
    return pairs


def _look(root: Path, pair: Pair, numbers: Numbers | None) -> Size | str:
    """The size of image and mask, or what is wrong with one; with `numbers` the mask's values are looked at too."""
    path = root / pair.mask
    why = look(path)
    if isinstance(why, str):
        return f"{pair.mask} ({why})"
    try:
        with opened(path) as mask:
            _refuse_colours(mask)
            size = mask.size
        if numbers is not None:
            read_mask(path, numbers)
    except (OSError, SyntaxError, ValueError) as error:
        return f"{pair.mask} ({error})"
    found = look(root / pair.image, size)
    return f"{pair.image} ({found})" if isinstance(found, str) else found


def _folders(root: Path) -> list[tuple[Path, Path]]:
    """The folders of images and masks to train and to validate with, or those that are to be split."""
    images, masks = _first(root, IMAGES), _first(root, MASKS)
    if images and masks:
        found = [(_first(images, names), _first(masks, names)) for names in (TRAIN, VAL)]
        if not any(map(any, found)):
            return [(images, masks)]
    else:
        parts = [_first(root, names) for names in (TRAIN, VAL)]
        found = [(_first(part, IMAGES), _first(part, MASKS)) if part else (None, None) for part in parts]
    for one, other in found:
        if bool(one) != bool(other):
            raise UserError(f"there is '{one or other}' but no such folder of {'masks' if one else 'images'}, expected both")
    pairs = [(one, other) for one, other in found if one and other]
    if not all(found[0]):
        layouts = "images/train and masks/train, train/images and train/masks, or images and masks"
        raise UserError(f"'{root}' has no folders of images and masks to train with, expected {layouts}")
    return pairs


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _pairs(root: Path, image_folder: Path, mask_folder: Path, faults: list[str]) -> list[Pair]:
    images, masks = _files(root, image_folder), dict[str, list[str]]()
    for stem, files in _files(root, mask_folder).items():
        bare = next((stem.removesuffix(end) for end in ENDS if stem.endswith(end)), stem)
        masks.setdefault(stem if stem in images else bare, []).extend(files)
    return pair_up(images, masks, faults)


def _files(root: Path, folder: Path) -> dict[str, list[str]]:
    """The image files in a folder and its sub-folders, as paths below root, by their path below the folder without suffix."""
    found: dict[str, list[str]] = {}
    for file in find_images(folder):
        found.setdefault(os.path.relpath(os.path.splitext(file)[0], folder), []).append(os.path.relpath(file, root))
    return found


def _check_values(ignored: int | None, values: list[Any] | None) -> None:
    if ignored is not None:
        within("ignore", ignored, 0, 255)
    if values is not None and not (
        len(values) == len(set(map(repr, values))) >= 2 and all(type(value) is int and 0 <= value <= 255 for value in values)
    ):
        raise UserError(f"values={values}, expected the value of each class, at least two different numbers from 0 to 255")
    if ignored in (values or []):
        raise UserError(f"ignore={ignored} is among values={values}, expected a value that is no class's")


def _names(root: Path, count: int | None, values: list[int] | None) -> list[str]:
    """The classes' names as far as file and options say, else none."""
    names = class_names(root) or []
    told = (("classes", count), ("values", None if values is None else len(values)), ("classes.txt", len(names) or None))
    counts = {what: number for what, number in told if number is not None}
    for number in counts.values():
        within("classes", number, 2, 255)
    if len(set(counts.values())) > 1:
        what = ", ".join(f"{number} by {what}" for what, number in counts.items())
        raise UserError(f"'{root}' has so many classes: {what}; expected one number")
    return names or [f"class {i}" for i in range(max(counts.values(), default=0))]


def class_names(root: Path) -> list[str] | None:
    """The lines of `classes.txt`, if there is one.

    Raises:
        UserError: if it cannot be read, is empty, or names a class twice.
    """
    file = root / "classes.txt"
    if not file.is_file():
        return None
    try:
        names = [line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{file}' cannot be read ({error}), expected one name a line") from error
    if not names or len(set(names)) < len(names):
        raise UserError(f"'{file}' has {'a name twice' if names else 'no names'}, expected each class once, one a line")
    within(f"'{file}': number of classes", len(names), 2, 255)
    return names


def _found(root: Path, parts: list[list[Pair]], ignored: int | None, faults: list[str]) -> list[str]:
    """As many classes as the masks have; those that cannot be read are taken out of `parts`, and named."""
    most = 0
    for pairs in parts:
        highest = in_threads(lambda pair: _highest(root / pair.mask, ignored), pairs)
        faults += [f"{pair.mask} ({found})" for pair, found in zip(pairs, highest, strict=True) if isinstance(found, str)]
        pairs[:] = [pair for pair, found in zip(pairs, highest, strict=True) if not isinstance(found, str)]
        most = max([most, *(found for found in highest if not isinstance(found, str))])
    if most < 1 and not faults:
        hint = "if 255 is a class here, say masks:DIR:values=[0,255]"
        raise UserError(f"the masks of '{root}' have no class number but 0, expected at least 0 and 1; 255 is ignored: {hint}")
    return [f"class {i}" for i in range(most + 1)]


def _highest(path: Path, ignored: int | None) -> int | str:
    """The highest class number in a mask, or what is wrong with it."""
    why = look(path)
    if isinstance(why, str):
        return why
    try:
        values = _values(path)
    except (OSError, SyntaxError, ValueError) as error:
        return str(error)
    numbers = np.unique(values[(values != IGNORED) & (values != (IGNORED if ignored is None else ignored))])
    if len(numbers) and not 0 <= numbers[0] <= numbers[-1] < IGNORED:
        return f"it has the values {numbers[0]} to {numbers[-1]}, expected class numbers from 0 to 254"
    return int(numbers[-1]) if len(numbers) else 0
