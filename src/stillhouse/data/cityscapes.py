"""Cityscapes (arXiv 1604.01685) as its archives unpack, to segment: `cityscapes:DIR`.

DIR holds `leftImg8bit/{train,val}/CITY/*_leftImg8bit.png` and `gtFine/{train,val}/CITY/*_gtFine_labelIds.png`, whose 34 labels become the
19 classes that the benchmark judges; the others are ignored. `labels=labelTrainIds` reads `*_gtFine_labelTrainIds.png` instead, which
the benchmark's own scripts write. Images have 2048 x 1024 pixels.
"""

from __future__ import annotations

from pathlib import Path

from stillhouse.data import BadData, Data
from stillhouse.data.boxes import SHARE, folder_of
from stillhouse.data.masks import Pair, mask_data, number_table, pair_up
from stillhouse.data.options import path_and_options, read_options
from stillhouse.errors import UserError

IDS = {
    **{"road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19, "traffic sign": 20},
    **{"vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31},
    **{"motorcycle": 32, "bicycle": 33},
}
"""The labels of the classes, in the order of their training numbers."""
LABELS = 34
KINDS = ("labelIds", "labelTrainIds")


def open_cityscapes(text: str, *, bad_data: BadData = "refuse") -> Data:
    """Open `cityscapes:TEXT`. Files are looked at as by `masks.open_masks`.

    Raises:
        UserError: if the folders are missing or empty, or an image or a mask has no other, is broken, they differ in size, or a mask has
            values that are no labels (these are left out and named if `bad_data` is "skip").
    """
    path, rest = path_and_options(text)
    kind = read_options(rest, "cityscapes", labels=str).get("labels", KINDS[0])
    if kind not in KINDS:
        raise UserError(f"labels={kind}, expected {' or '.join(KINDS)}")
    root = folder_of(path, "cityscapes:DIR with leftImg8bit and gtFine")
    numbers = number_table(list(IDS.values()) if kind == "labelIds" else range(len(IDS)))
    if kind == "labelIds":
        numbers[:LABELS][numbers[:LABELS] < 0] = 255
    faults: list[str] = []
    parts = [_pairs(root, part, kind, faults) for part in ("train", "val")]
    return mask_data(f"cityscapes:{text}", root, parts, list(IDS), numbers, share=SHARE, faults=faults, bad_data=bad_data)


def _pairs(root: Path, part: str, kind: str, faults: list[str]) -> list[Pair]:
    images = _files(root, f"leftImg8bit/{part}", "_leftImg8bit.png")
    masks = _files(root, f"gtFine/{part}", f"_gtFine_{kind}.png")
    return pair_up(images, masks, faults)


def _files(root: Path, folder: str, end: str) -> dict[str, list[str]]:
    """The files of every city, by city and frame."""
    found = {
        file.relative_to(root / folder).as_posix().removesuffix(end): [file.relative_to(root).as_posix()]
        for file in sorted((root / folder).glob(f"*/*{end}"))
    }
    if not found:
        raise UserError(f"'{root / folder}' has no CITY/*{end}, expected Cityscapes as its archives unpack")
    return found
