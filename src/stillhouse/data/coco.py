"""Boxes in COCO's form, an instances JSON and a folder of images: `coco:DIR`.

In DIR, `annotations/instances_train2017.json` and `…_val2017.json` (any year, or none) with the images in `train2017` or `images/train2017`
(or `images/train`, `train`, `images`, `data`); or `train/_annotations.coco.json` and `valid/…` with the images beside, as Roboflow writes
it; or a single JSON file, which is split by image, the same way each time. Options: `train=FILE` and `val=FILE` name JSON files, and
`images=FOLDER` the images' folder, below DIR; `val=0.1` splits the training file instead of using another (0.2 where there is no other).

Classes are the categories in the order of their ids, used or not. Crowds stay, marked `iscrowd`, and so do images without annotations.
"""

from __future__ import annotations

import itertools
import json
import os
import reprlib
from collections import Counter
from pathlib import Path, PureWindowsPath
from typing import Any

from stillhouse.data import BadData, Data
from stillhouse.data.boxes import Box, Corners, Picture, Size, box_data, folder_of, val_kind, val_share
from stillhouse.data.imagefolder import TRAIN, VAL
from stillhouse.data.options import path_and_options, read_options
from stillhouse.errors import UserError

PATTERNS = (
    "annotations/instances_{}*.json",
    "{}/_annotations.coco.json",
    "instances_{}*.json",
    "annotations/{}.json",
    "{}.json",
    "{}/*.json",
)
ANY = ("*.json", "*/*.json")
LISTS = ("images", "annotations", "categories")
GLANCE = 50
Json = dict[str, Any]


def open_coco(text: str, *, bad_data: BadData = "refuse") -> Data:
    """Open `coco:TEXT`. Every image file is looked at once (`boxes.look`).

    With `bad_data="skip"`, boxes that reach out of their image are cut to it; boxes without area or with numbers that are not finite,
    annotations of unknown images or categories or with an id that was there before, and images that are missing, broken, of another size
    than the file says, outside DIR or listed twice are left out; all are named in `Data.skipped`.

    Raises:
        UserError: if no COCO file is found, or it cannot be told which one is meant; if a file is not COCO's or names its categories
            ambiguously, or train and val have other ones; if anything of the above is found (unless `bad_data` is "skip").
    """
    path, rest = path_and_options(text)
    options = read_options(rest, "coco", train=str, val=val_kind(rest), images=str)
    root = folder_of(path, "coco:DIR with annotations/instances_*.json and folders of images")
    files = _files(root, options)
    contents = [_load(root, file) for file in files]
    named = [_categories(content["categories"], file) for content, file in zip(contents, files, strict=True)]
    classes = list(named[0].values())
    for file, names in zip(files, named, strict=True):
        differing = sorted(set(classes) ^ set(names.values()))
        if differing:
            raise UserError(f"'{files[0]}' and '{file}' differ in the categories {_short(differing)}, expected the same names in both")
    faults: list[str] = []
    parts = [
        _pictures(root, file, content, names, options.get("images"), faults)
        for file, content, names in zip(files, contents, named, strict=True)
    ]
    return box_data(f"coco:{text}", root, parts, classes, share=val_share(options), faults=faults, bad_data=bad_data)


def _files(root: Path, options: dict[str, Any]) -> list[str]:
    """The JSON files below root: the training and the validation file, or one that is to be split."""
    val, train = options.get("val"), options.get("train") or _find(root, TRAIN, "train")
    if isinstance(val, str) or (val is None and train):
        train, val = train or _only(root), val or _find(root, VAL, "val")
        if val == options.get("val", "") == train:
            raise UserError(f"'{train}' is to train and to validate, expected two files, or val=0.2 to split one")
        files = [train, *([val] if val not in (None, train) else [])]
    else:
        files = [train or _find(root, VAL, "val") or _only(root)]
    for file in files:
        if not (root / file).is_file():
            raise UserError(f"there is no file '{root / file}', expected a COCO file of instances")
    return files


def _find(root: Path, parts: tuple[str, ...], option: str) -> str | None:
    for part, pattern in itertools.product(parts, PATTERNS):
        found = _below(root, pattern.format(part))
        if len(found) > 1:
            raise UserError(f"'{root}' has several files that may be meant ({', '.join(found[:5])}): name one with {option}=FILE")
        if found:
            return found[0]
    return None


def _only(root: Path) -> str:
    found = [file for pattern in ANY for file in _below(root, pattern)]
    if len(found) != 1:
        what = f"{len(found)} JSON files, none of them clearly to train with" if found else "no JSON file"
        expected = "annotations/instances_train….json, train/_annotations.coco.json, or one JSON file"
        raise UserError(f"'{root}' has {what}, expected {expected}; or name it with coco:{root}:train=FILE")
    return found[0]


def _below(root: Path, pattern: str) -> list[str]:
    return sorted(file.relative_to(root).as_posix() for file in root.glob(pattern) if not file.name.startswith("."))


def _load(root: Path, file: str) -> Json:
    try:
        content = json.loads((root / file).read_bytes(), object_hook=_without_outline)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{root / file}' cannot be read as JSON ({error}): repair it, or name another file") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in LISTS):
        missing = [name for name in LISTS if not (isinstance(content, dict) and isinstance(content.get(name), list))]
        raise UserError(f"'{root / file}' is no COCO file of instances: it has no list {' and no list '.join(map(repr, missing))}")
    return content


def _without_outline(entry: Json) -> Json:
    entry.pop("segmentation", None)  # most of a file's size, dropped while it is read
    return entry


def _categories(entries: list[Any], file: str) -> dict[int, str]:
    """The names by id, in the order of the ids."""
    for entry in entries:
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or not isinstance(entry.get("name"), str):
            raise UserError(f"'{file}' has the category {_short(entry)}, expected a number as 'id' and a word as 'name'")
    for key in ("id", "name"):
        value, times = Counter(entry[key] for entry in entries).most_common(1)[0] if entries else (None, 0)
        if times > 1:
            raise UserError(f"'{file}' has {times} categories with the {key} {_short(value)}, expected one: nobody knows which is meant")
    if not entries:
        raise UserError(f"'{file}' has no categories, expected at least one")
    return {entry["id"]: entry["name"] for entry in sorted(entries, key=lambda entry: entry["id"])}


def _pictures(root: Path, file: str, content: Json, names: dict[int, str], images: str | None, faults: list[str]) -> list[Picture]:
    """The images that a file lists, with their boxes; entries that cannot be are named in `faults`."""
    folder = _folder(root, file, content["images"], images)
    pictures: dict[Any, Picture] = {}
    times = Counter(_id(entry, "id") for entry in content["images"])
    listed: set[str] = set()
    for entry in content["images"]:
        key, name = _id(entry, "id"), _image_name(entry)
        fault = _image_fault(entry, name) or ("another image has its id" if times[key] > 1 else "")
        fault = fault or ("another image has its file" if name in listed else "")
        where = f"{file}: image {_short(key)}" + (f" {_short(name)}" if name else "")
        if fault:
            faults.append(f"{where} ({fault})")
        else:
            listed.add(name)
            pictures[key] = Picture(os.path.relpath(folder / name, root), where, _size(entry))
    used: set[Any] = set()
    for i, entry in enumerate(content["annotations"]):
        key, owner = _id(entry, "id"), _id(entry, "image_id")
        where = f"annotation {_short(key)}" if key is not None else f"annotation at place {i}"  # some tools give them no id: no harm
        fault = _annotation_fault(entry, names) or ("an earlier annotation has its id" if key in used else "")
        fault = fault or (f"no image has its image_id {_short(owner)}" if owner is None or owner not in times else "")
        if key is not None:
            used.add(key)
        if fault:
            faults.append(f"{file}: {where} ({fault})")
        elif owner in pictures:  # if not, its image is left out, and named
            pictures[owner].boxes.append(Box(where, _corners(entry["bbox"]), names[entry["category_id"]], bool(entry.get("iscrowd"))))
    return list(pictures.values())


def _folder(root: Path, file: str, entries: list[Any], images: str | None) -> Path:
    """The folder that most of the first images are in, among those they are usually in."""
    if images is not None:
        return folder_of(str(root / images), "the images' folder as images=FOLDER, below the data's")
    part = Path(file).stem.removeprefix("instances_")
    bare = part.rstrip("0123456789_-")
    folders = [(root / file).parent, *(root / name for name in (part, f"images/{part}", bare, f"images/{bare}", "images", "data", "."))]
    names = [name for name in map(_image_name, entries[:GLANCE]) if name]
    found = [sum(os.path.isfile(folder / name) for name in names) for folder in folders]
    if names and not any(found):
        tried = ", ".join(dict.fromkeys(f"'{folder}'" for folder in folders))
        raise UserError(f"none of the images of '{root / file}', such as {_short(names[0])}, is in {tried}: say where with images=FOLDER")
    return folders[found.index(max(found))]


def _image_name(entry: Any) -> str:
    """The file's path below the images' folder, "" if it names none there."""
    name = entry.get("file_name") if isinstance(entry, dict) else None
    path = PureWindowsPath(name if isinstance(name, str) else "")  # reads both slashes, and C:
    return "" if path.anchor or ".." in path.parts or not path.parts else path.as_posix()


def _image_fault(entry: Any, name: str) -> str:
    if _id(entry, "id") is None:
        return f"{_short(entry)} has no id"
    if not name:
        return f"its file_name is {_short(entry.get('file_name'))}, expected one below the images' folder"
    if not all(_positive(entry[side]) for side in ("width", "height") if side in entry):
        return f"it is {_short(entry.get('width'))} x {_short(entry.get('height'))}, expected positive numbers"
    return ""


def _annotation_fault(entry: Any, names: dict[int, str]) -> str:
    if not isinstance(entry, dict):
        return f"it is {_short(entry)}, expected an object"
    category, box = entry.get("category_id"), entry.get("bbox")
    if not isinstance(category, (int, float)) or category not in names:
        return f"no category has its category_id {_short(category)}"
    if not isinstance(box, list) or len(box) != 4 or not all(type(x) in (int, float) for x in box):
        return f"its bbox is {_short(box)}, expected [x, y, width, height]"
    if entry.get("iscrowd") not in (None, 0, 1):
        return f"its iscrowd is {_short(entry['iscrowd'])}, expected 0 or 1"
    return ""


def _id(entry: Any, key: str) -> int | float | str | None:
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if isinstance(value, (int, float, str)) else None


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _size(entry: Json) -> Size | None:
    return (int(entry["width"]), int(entry["height"])) if "width" in entry and "height" in entry else None


def _corners(box: list[float]) -> Corners:
    """x, y, width, height as corners; numbers beyond what a float holds are infinite."""
    x, y, width, height = (float("inf") if abs(value) > 1e300 else float(value) for value in box)
    return x, y, x + width, y + height


def _short(value: Any) -> str:
    return reprlib.repr(value)
