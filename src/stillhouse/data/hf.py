"""Hugging Face data sets: `hf:DIR_OR_NAME`, by the library `datasets` (extra "datasets").

A folder that `save_to_disk` wrote, a folder of images or parquet files, or a name on the hub. Options, after a colon: `image=COLUMN`,
`label=COLUMN` when there are several, `config=NAME`, `val=0.2` (the share of each class that validates when there is no such split),
`channels=1` (grey).
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from stillhouse.data import BadData, Data
from stillhouse.data.images import find_broken, open_image, refuse_or_skip
from stillhouse.data.options import path_and_options, read_options, within
from stillhouse.data.splits import split
from stillhouse.errors import UserError, nearest

VAL = ("validation", "val", "valid", "test")
PACKED = re.compile(r"\.(zip|tar|tgz|gz|bz2|xz|lzma|zst|lz4|7z|rar|eval)$")
LABELS = ("label", "labels", "class", "target", "category")


class Rows(Dataset[tuple[Image.Image, int]]):
    """Rows of a `datasets.Dataset` whose images are left encoded ({"bytes", "path"}), decoded when asked for."""

    def __init__(self, rows: Any, image: str, labels: list[int], channels: int) -> None:
        self.rows, self.image, self.labels, self.channels = rows, image, labels, channels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        encoded = self.rows[int(i)][self.image]
        try:
            return open_image(_source(encoded), self.channels), self.labels[i]
        except (OSError, SyntaxError, ValueError) as error:
            name = f" '{encoded['path']}'" if encoded and encoded.get("path") else ""
            raise UserError(f"image {i}{name} cannot be read ({error}): leave it out of the data set, and start again") from error


def open_hf(text: str, *, bad_data: BadData = "refuse") -> Data:
    """Open `hf:TEXT`. Every image's bytes are looked at once (`images.why_broken`).

    Raises:
        UserError: if `datasets` is missing, nothing is there or the network is not, the columns cannot be told, images are broken
            (unless `bad_data` is "skip"), or all are.
    """
    path, rest = path_and_options(text)
    options = read_options(rest, "hf", image=str, label=str, config=str, val=float, channels=int)
    share, channels = options.get("val", 0.2), options.get("channels", 3)
    within("val", share, 0.001, 0.999)
    if channels not in (1, 3):
        raise UserError(f"channels={channels}, expected 1 (grey) or 3 (RGB)")
    splits = _load(path, options.get("config"))
    train_name = "train" if "train" in splits else next(iter(splits))
    val_name = next((name for name in VAL if name in splits and name != train_name), None)
    names = [train_name] + ([val_name] if val_name else [])
    image, label = _columns(path, splits[train_name], options.get("image"), options.get("label"))
    classes = _classes(path, splits[train_name], label)
    skipped: list[str] = []
    parts = [_readable(splits[name], name, image, bad_data, skipped) for name in names]
    if not val_name:
        first, second = split(_labels(path, parts[0], label, classes), share, "hf", "split")
        parts = [parts[0].select(first.tolist()), parts[0].select(second.tolist())]
    train, val = (Rows(part, image, _labels(path, part, label, classes), channels) for part in parts)
    marks = [splits[name]._fingerprint for name in names]  # of its files, by the library
    return Data(
        name=f"hf:{text}",
        train=train,
        val=val,
        classes=classes,
        channels=channels,
        skipped=skipped,
        fingerprint=hashlib.sha256(f"{marks}{skipped}{train.labels}{val.labels}".encode()).hexdigest(),
    )


def _library() -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise UserError("hf: needs datasets: pip install 'stillhouse[datasets]'") from None
    return datasets


def _load(path: str, config: str | None) -> dict[str, Any]:
    """The splits, by name."""
    datasets = _library()
    folder = Path(path).expanduser()
    if not path:
        raise UserError("hf: names no data set, expected hf:DIR_OR_NAME")
    if not folder.is_dir() and (folder.is_absolute() or path.startswith((".", "~"))):
        raise UserError(f"there is no folder '{path}', expected hf:DIR or hf:NAME of a data set on the hub")
    packed = next((file for file in folder.rglob("*") if PACKED.search(file.name.lower())), None) if folder.is_dir() else None
    if packed is not None:
        raise UserError(f"'{packed}' is an archive, and what it unpacks to has no bound: unpack it yourself and name that folder")
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(str(folder) if folder.is_dir() else path, config)
    except Exception as error:  # the library raises a dozen kinds, its own, the hub's and the http client's, for the same few causes
        if folder.is_dir():
            expected = "what save_to_disk wrote, or images or parquet files"
            raise UserError(f"'{path}' cannot be read as a data set ({_first_line(error)}): expected {expected}") from error
        raise UserError(
            f"data set '{path}' is no folder here and could not be had from the hub ({_first_line(error)}): "
            "check the name and the network, or name a folder with hf:DIR"
        ) from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def _columns(path: str, rows: Any, image: str | None, label: str | None) -> tuple[str, str]:
    """The image column and the label column: those named, or the only ones that can be meant."""
    datasets = _library()
    features = rows.features
    for name in (image, label):
        if name is not None and name not in features:
            raise UserError(f"'{path}' has no column '{name}'{nearest(name, features)}: it has {', '.join(features)}")
    images = [image] if image else [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [label] if label else [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = labels or [name for name in LABELS if name in features]
    for kind, found in (("image", images), ("label", labels)):
        if len(found) != 1:
            what = f"several {kind} columns ({', '.join(found)})" if found else f"no column that is clearly the {kind}"
            raise UserError(f"'{path}' has {what} among {', '.join(features)}: name it with hf:{path}:{kind}=COLUMN")
    if not isinstance(features[images[0]], datasets.Image):
        raise UserError(f"column '{images[0]}' of '{path}' is {features[images[0]]}, expected images")
    return images[0], labels[0]


def _classes(path: str, rows: Any, label: str) -> list[str]:
    """The names a ClassLabel column carries; else the distinct values of the training split, sorted."""
    names = getattr(rows.features[label], "names", None)
    if names:
        return list(names)
    values = set(rows.unique(label))
    if None in values or not all(isinstance(value, (int, str)) for value in values):
        raise UserError(
            f"column '{label}' of '{path}' is not one class an image, expected numbers or names: name another with hf:{path}:label=COLUMN"
        )
    return [str(value) for value in sorted(values)]


def _labels(path: str, rows: Any, label: str, classes: list[str]) -> list[int]:
    values = list(rows[label])
    if getattr(rows.features[label], "names", None):
        numbers = [-1 if value is None else int(value) for value in values]
    else:
        number = {name: i for i, name in enumerate(classes)}
        numbers = [number.get(str(value), -1) for value in values]
    if -1 in numbers:
        where = numbers.index(-1)
        raise UserError(
            f"'{path}' has the label {values[where]!r} at image {where}, which is none of the training classes: leave such images out"
        )
    return numbers


def _readable(rows: Any, name: str, image: str, bad_data: str, skipped: list[str]) -> Any:
    """The rows whose images can be read, with the images left encoded; the others are refused or named in `skipped`."""
    rows = rows.cast_column(image, _library().Image(decode=False))
    whys = find_broken(range(len(rows)), lambda i: _source(rows[i][image]))
    broken = [f"image {i} of {name} ({why})" for i, why in enumerate(whys) if why]
    refuse_or_skip(broken, len(rows), bad_data)
    skipped += broken
    return rows.select([i for i, why in enumerate(whys) if not why]) if broken else rows


def _source(encoded: dict[str, Any] | None) -> str | bytes:
    """The bytes or the path of an image that `datasets` left encoded; nothing at all counts as an empty image."""
    return (encoded or {}).get("bytes") or (encoded or {}).get("path") or b""
