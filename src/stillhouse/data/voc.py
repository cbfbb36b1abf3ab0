"""Pascal VOC's form: `voc:DIR`, boxes in an XML file an image, or, `voc:DIR:task=segment`, masks.

DIR holds `Annotations/*.xml`, `JPEGImages` and lists in `ImageSets/Main`: `train.txt` and `val.txt`, else `trainval.txt` and `test.txt`,
else one of them, which is split by image, the same way each time (`val=0.2`); `train=trainval,val=test` names others. Without lists the
XML files of `train` and `val` (or `valid`, `test`, …) are taken, or those of DIR, with the images beside them or in `images`.

Classes are VOC's 20 if all names are theirs, else the names found, sorted. Objects marked `difficult` become `iscrowd`: training leaves
them out, and finding them or not does not count. VOC counts pixels from 1 and a box holds its last pixel: (xmin, ymin, xmax, ymax) becomes
(xmin - 1, ymin - 1, xmax, ymax). `origin=0` is for files that count from 0, up to the box's edge: they are taken as they stand.

Masks are `SegmentationClass/*.png` by the lists of `ImageSets/Segmentation`: 0 is background, 1 to 20 VOC's classes (or the lines of
DIR's `classes.txt`, background first), 255 is ignored.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from stillhouse.data import BadData, Data, TaskName
from stillhouse.data.boxes import Box, Corners, Picture, Size, box_data, folder_of, val_kind, val_share
from stillhouse.data.imagefolder import TRAIN, VAL
from stillhouse.data.images import SUFFIXES
from stillhouse.data.masks import Pair, class_names, mask_data, number_table, pair_up
from stillhouse.data.options import path_and_options, read_options, within
from stillhouse.errors import UserError

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse", "motorbike"),
    *("person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
PARTNERS = {"train": "val", "trainval": "test"}
XML, IMAGES = ("Annotations", "annotations", "."), ("JPEGImages", "images", ".")


class _NoDoctype(ET.TreeBuilder):
    """VOC needs no document type, and its entities can be made to fill the memory."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it declares a document type, which no annotation needs: it is not read")


def open_voc(text: str, *, bad_data: BadData = "refuse", task: TaskName | None = None) -> Data:
    """Open `voc:TEXT`. Every image file is looked at once (`boxes.look`, or as by `masks.open_masks`).

    With `bad_data="skip"`, boxes that reach out of their image are cut to it; boxes without area, without name or numbers, XML files that
    cannot be read or have no image, images that have no XML file, are broken or of another size than it says are left out; all are named
    in `Data.skipped`.

    Raises:
        UserError: if folders, lists or objects are missing, two different tasks are asked for, or anything of the above is found (unless
            `bad_data` is "skip").
    """
    path, rest = path_and_options(text)
    options = read_options(rest, "voc", task=str, train=str, val=val_kind(rest), origin=int)
    wanted = {options.get("task"), task} - {None} or {"detect"}
    if len(wanted) > 1 or not wanted <= {"detect", "segment"}:
        raise UserError(f"voc: the task is {' and '.join(sorted(map(str, wanted)))}, expected detect or segment")
    origin, share = options.get("origin", 1), val_share(options)
    within("origin", origin, 0, 1)
    root = folder_of(path, "voc:DIR with Annotations, JPEGImages and ImageSets")
    faults: list[str] = []
    common: dict[str, Any] = {"share": share, "faults": faults, "bad_data": bad_data}
    if wanted == {"segment"}:
        classes = class_names(root) or ["background", *CLASSES]
        pairs = [_pairs(root, name, faults) for name in _lists(root, "Segmentation", options)]
        return mask_data(f"voc:{text}", root, pairs, classes, number_table(range(len(classes))), **common)
    lists = _lists(root, "Main", options)
    if lists:
        parts = [_pictures(root, root, origin, faults, _listed(root, "Main", name)) for name in lists]
    else:
        folders = [next((root / name for name in names if (root / name).is_dir()), None) for names in (TRAIN, VAL)]
        parts = [_pictures(root, folder, origin, faults) for folder in (folders if folders[0] else [root]) if folder]
    found = {box.category for part in parts for picture in part for box in picture.boxes}
    if not found and not faults:
        raise UserError(f"'{root}' has no objects in its annotations, expected at least one")
    return box_data(f"voc:{text}", root, parts, list(CLASSES) if found <= set(CLASSES) else sorted(found), **common)


def _lists(root: Path, kind: str, options: dict[str, Any]) -> list[str]:
    """The names of the lists to train and to validate with, or of one that is to be split; none if there are no lists of boxes."""
    folder, val = root / "ImageSets" / kind, options.get("val")
    there = [name for name in ("train", "trainval", "val", "test") if (folder / f"{name}.txt").is_file()]
    usual = [name for name in there if PARTNERS.get(name) in there] or there
    train = options.get("train") or (usual[0] if usual else "")
    if val is None and PARTNERS.get(train) in there:
        val = PARTNERS[train]
    if not train and (isinstance(val, str) or kind != "Main"):
        raise UserError(f"'{folder}' has no train.txt, expected lists of image names")
    if train == val:
        raise UserError(f"the list '{train}' is to train and to validate, expected two lists, or val=0.2 to split one")
    return [name for name in (train, val) if name and isinstance(name, str)]


def _listed(root: Path, kind: str, name: str) -> list[str]:
    """The image names in a list."""
    file = root / "ImageSets" / kind / f"{name}.txt"
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{file}' cannot be read ({error}), expected one image name a line") from error
    return list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))  # a class's list has a second column


def _pairs(root: Path, name: str, faults: list[str]) -> list[Pair]:
    stems = _listed(root, "Segmentation", name)
    images, masks = (_by_stem(root, root / folder, SUFFIXES) for folder in ("JPEGImages", "SegmentationClass"))
    faults += [f"{name}.txt: {stem!r} (there is no such image)" for stem in stems if stem not in images and stem not in masks]
    listed = [{stem: files[stem] for stem in stems if stem in files} for files in (images, masks)]
    return pair_up(listed[0], listed[1], faults)


def _pictures(root: Path, folder: Path, origin: int, faults: list[str], stems: list[str] | None = None) -> list[Picture]:
    """The images of these names, or of all XML files in a folder, with their boxes; what cannot be is named in `faults`."""
    files = next((files for files in (_by_stem(root, folder / name, {".xml"}) for name in XML) if files), {})
    images = next((files for files in (_by_stem(root, folder / name, SUFFIXES) for name in IMAGES) if files), {})
    if not files or not images:
        raise UserError(f"'{folder}' has no {'images' if files else 'XML files'}, expected Annotations/*.xml and JPEGImages, or both in it")
    pictures: dict[str, Picture] = {}
    for stem in sorted(files) if stems is None else stems:
        try:
            picture = _picture(root, stem, files, images, origin, faults)
            if picture.path in pictures:
                raise ValueError(f"{pictures[picture.path].where} has its image '{picture.path}' too")
        except (OSError, SyntaxError, ValueError, LookupError) as error:
            faults.append(f"{files.get(stem, [repr(stem)])[0]} ({error})")
        else:
            pictures[picture.path] = picture
    if stems is None:
        named = {file for stem, found in images.items() if stem in files for file in found} | pictures.keys()
        faults += [f"{file} (it has no XML file)" for found in images.values() for file in found if file not in named]
    return list(pictures.values())


def _by_stem(root: Path, folder: Path, suffixes: set[str]) -> dict[str, list[str]]:
    """The files in a folder, as paths below root, by their names without suffix."""
    found: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in suffixes and not name.startswith("."):
            found.setdefault(stem, []).append(os.path.relpath(folder / name, root))
    return found


def _picture(root: Path, stem: str, files: dict[str, list[str]], images: dict[str, list[str]], origin: int, faults: list[str]) -> Picture:
    """One image with its boxes.

    Raises:
        OSError, SyntaxError, ValueError, LookupError: if its XML file is missing or cannot be used.
    """
    if stem not in files:
        raise ValueError("it is listed, but has no XML file")
    file = files[stem][0]
    annotation = ET.fromstring((root / file).read_bytes(), parser=ET.XMLParser(target=_NoDoctype()))
    if annotation.tag != "annotation":
        raise ValueError(f"it is <{annotation.tag}>, expected Pascal VOC's <annotation>")
    name = (annotation.findtext("filename") or "").strip()
    found = images.get(stem) or images.get(os.path.splitext(name)[0], [])
    found = [image for image in found if os.path.basename(image) == name] or found
    if len(found) != 1:
        raise ValueError(f"it has {'several images: ' + ', '.join(found) if found else f'no image, neither {stem!r} nor {name!r}'}")
    picture = Picture(found[0], file, _size(annotation))
    for i, element in enumerate(annotation.iterfind("object"), 1):
        category = (element.findtext("name") or "").strip()
        corners = _corners(element, origin)
        if category and corners:
            crowd = (element.findtext("difficult") or "").strip() == "1"
            picture.boxes.append(Box(f"object {i} {category!r}", corners, category, crowd))
        else:
            faults.append(f"{file}: object {i} (it has no {'box of four numbers' if category else 'name'})")
    return picture


def _size(annotation: ET.Element) -> Size | None:
    """(width, height) as written; None if it is missing or 0, which some tools write."""
    width, height = ((annotation.findtext(f"size/{side}") or "0").strip() for side in ("width", "height"))
    if not (width.isdecimal() and height.isdecimal() and max(len(width), len(height)) < 10):
        raise ValueError(f"its size is {width} x {height}, expected numbers of pixels")
    return (int(width), int(height)) if int(width) and int(height) else None


def _corners(element: ET.Element, origin: int) -> Corners | None:
    try:
        x1, y1, x2, y2 = (float(element.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        return None
    return x1 - origin, y1 - origin, x2, y2
