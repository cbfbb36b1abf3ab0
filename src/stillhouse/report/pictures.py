"""The pictures of a run as data URIs: each image, and over the training its saliency and what the teacher was shown of it."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open

MOST_IMAGES = 6
LONGEST_SIDE = 160  # pixels of a stored picture: the page shows them smaller, and stays a file one can mail
PIXELATED_BELOW = 65  # a longer side than this is shown smoothly
STUDENT_COLOUR = (224, 112, 40)
MAP_TITLES = {"saliency": "student looks", "shown": "teacher sees"}


@dataclass(frozen=True)
class Snapshot:
    """What was stored at one step: images uint8 [n,C,H,W], labels int [n], maps {name: float [n,h,w]}."""

    step: int
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    maps: dict[str, NDArray[np.floating[Any]]]


def read_snapshots(run_dir: Path) -> tuple[list[Snapshot], list[str]]:
    """The first, the middle and the last snapshot of a run, and a sentence for every file that could not be read."""
    found, notes = {}, []
    for path in sorted((run_dir / "pictures").glob("step-*.safetensors")):
        try:
            step = int(path.stem.removeprefix("step-"))
            with safe_open(path, framework="numpy") as file:
                missing = {"images", "labels"} - set(file.keys())
            if missing:
                raise ValueError(f"it holds no {' and no '.join(sorted(missing))}")
            found[step] = path
        except (ValueError, OSError, SafetensorError) as error:
            notes.append(f"pictures/{path.name} was left out: {error}")
    steps = sorted(found)
    if not steps:
        return [], notes
    middle = min(steps, key=lambda step: abs(step - (steps[0] + steps[-1]) / 2))
    return [_read(found[step], step) for step in sorted({steps[0], middle, steps[-1]})], notes


def _read(path: Path, step: int) -> Snapshot:
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    images, labels = tensors.pop("images"), tensors.pop("labels")
    return Snapshot(step, images, labels, {name: values for name, values in tensors.items() if values.ndim == 3})


def picture_cards(snapshots: list[Snapshot], classes: list[str]) -> list[dict[str, Any]]:
    """One card an image: its class, the plain picture, and one row a map with a picture for each snapshot."""
    if not snapshots:
        return []
    names = [name for name in sorted(snapshots[0].maps) if all(name in snapshot.maps for snapshot in snapshots)]
    count = min(MOST_IMAGES, *(len(snapshot.images) for snapshot in snapshots))
    cards = []
    for i in range(count):
        label = int(snapshots[-1].labels[i])
        rows = [
            {
                "title": MAP_TITLES.get(name, name),
                "name": name,
                "pictures": [data_uri(drawn(s.images[i], name, s.maps[name][i])) for s in snapshots],
            }
            for name in names
        ]
        image = as_rgb(snapshots[-1].images[i])
        cards.append(
            {
                "label": classes[label] if 0 <= label < len(classes) else str(label),
                "picture": data_uri(image),
                "pixelated": max(image.size) < PIXELATED_BELOW,
                "rows": rows,
            }
        )
    return cards


def drawn(image: NDArray[np.uint8], name: str, values: NDArray[np.floating[Any]]) -> Image.Image:
    """An image with a map: "shown" leaves hidden patches transparent, any other map is laid over the greyed picture."""
    return what_was_shown(image, values) if name == "shown" else overlaid(image, values)


def as_rgb(image: NDArray[np.uint8]) -> Image.Image:
    """uint8 [C,H,W] to a picture of at most LONGEST_SIDE; other than three channels are shown as their mean, in grey."""
    pixels = image.transpose(1, 2, 0) if len(image) == 3 else np.repeat(image.mean(0).round().astype(np.uint8)[..., None], 3, axis=2)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if max(picture.size) > LONGEST_SIDE:
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return picture


def what_was_shown(image: NDArray[np.uint8], shown: NDArray[np.floating[Any]]) -> Image.Image:
    """The picture where `shown` [h,w] is 1, nothing (transparent) where it is 0."""
    picture = as_rgb(image).convert("RGBA")
    picture.putalpha(_grid(np.clip(np.nan_to_num(shown), 0, 1), picture.size))
    return picture


def overlaid(image: NDArray[np.uint8], saliency: NDArray[np.floating[Any]]) -> Image.Image:
    """The picture in dim grey under the student's colour, which is the stronger the higher the saliency [h,w]."""
    values = saliency.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    share = (values - low) / (high - low) if math.isfinite(high - low) and high > low else np.zeros_like(values)
    picture = as_rgb(image)
    grey = picture.convert("L").point(lambda v: round(0.75 * v)).convert("RGB")
    colour = Image.new("RGB", picture.size, STUDENT_COLOUR)
    return Image.composite(colour, grey, _grid(0.85 * np.nan_to_num(share), picture.size))


def _grid(values: NDArray[Any], size: tuple[int, int]) -> Image.Image:
    """Values in [0,1] on a grid [h,w] as an 8-bit picture of `size` with hard edges: a patch is seen as a patch."""
    return Image.fromarray((255 * values).round().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


def data_uri(picture: Image.Image) -> str:
    """A PNG that needs no file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
