"""The pictures of a run as data URIs: each image, and over the training what the student looked at, answered and chose to copy."""

from __future__ import annotations

import base64
import io
import math
import re
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
MAP_TITLES = {"saliency": "student looks", "shown": "teacher sees", "visible": "left visible"}
SEEN = ("shown", "visible")
"""The maps by which a picture is cut: what they leave out is transparent."""
DRAWN_SIDE, DRAWN_QUALITY = 192, 75  # boxes and masks over photographs: larger, so that they can be told apart, and as JPEG
MOST_MASKS, MASK_SIDE, MOST_CHANNELS = 8, 40, 160  # of each picture and moment; a strip has a pixel a channel
MASK_RAMP = ((20, 22, 26), (112, 48, 20), STUDENT_COLOUR, (255, 236, 205))
DIFFERENCE_RAMP = ((20, 22, 26), (43, 100, 168), (232, 241, 250))

Values = NDArray[np.floating[Any]]


BYTES, NUMBERS, FLOATS = ("U8",), ("I64", "I32", "U8"), ("F64", "F32", "F16", "U8", "BOOL")
"""What pictures, labels and maps may be stored as."""


@dataclass(frozen=True)
class Snapshot:
    """What was stored at one step.

    Images uint8 [n,C,H,W]; labels int [n] or None; maps to lay over them {name: float [n,h,w]}; `drawn`, ready pictures of labels and
    answers {name: uint8 [n,3,H,W]}; masks in [0,1] in order [float [n,h,w]]; their difference float [n,h,w]; channel masks float [n,M,C].
    """

    step: int
    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    maps: dict[str, Values]
    drawn: dict[str, NDArray[np.uint8]]
    masks: list[Values]
    difference: Values | None
    channels: Values | None


def read_snapshots(run_dir: Path) -> tuple[list[Snapshot], list[str]]:
    """The first, the middle and the last snapshot of a run, and a sentence for every file that could not be read."""
    found, notes = {}, []
    for path in sorted((run_dir / "pictures").glob("step-*.safetensors")):
        try:
            step = int(path.stem.removeprefix("step-"))
            with safe_open(path, framework="numpy") as file:
                _check_shapes({name: file.get_slice(name) for name in file.keys()})  # noqa: SIM118 (safe_open is no dict)
            found[step] = path
        except (ValueError, OSError, SafetensorError) as error:
            notes.append(f"pictures/{path.name} was left out: {error}")
    steps = sorted(found)
    if not steps:
        return [], notes
    middle = min(steps, key=lambda step: abs(step - (steps[0] + steps[-1]) / 2))
    return [_read(found[step], step) for step in sorted({steps[0], middle, steps[-1]})], notes


def _check_shapes(tensors: dict[str, Any]) -> None:
    """Refuses pictures that are none of what a `Snapshot` holds: a run folder may come from anybody.

    Raises:
        ValueError: naming the first one.
    """
    if "images" not in tensors:
        raise ValueError("it holds no images")
    count = tensors["images"].get_shape()[:1]
    for name, tensor in tensors.items():
        shape, kind = tensor.get_shape(), tensor.get_dtype()
        dims, kinds = (4, BYTES) if name == "images" or name.startswith("drawn/") else (1, NUMBERS) if name == "labels" else (3, FLOATS)
        three = shape[1:2] == [3] or not name.startswith("drawn/")
        if len(shape) != dims or shape[:1] != count or 0 in shape or kind not in kinds or not three:
            raise ValueError(f"its '{name}' is {kind} {shape}, which no run draws")


def _read(path: Path, step: int) -> Snapshot:
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    images, labels, channels, difference = (tensors.pop(name, None) for name in ("images", "labels", "channels", "difference"))
    drawn = {name.removeprefix("drawn/"): tensors.pop(name) for name in list(tensors) if name.startswith("drawn/")}
    numbers = sorted(int(name.removeprefix("mask ")) for name in tensors if re.fullmatch(r"mask \d+", name))
    masks = [tensors.pop(f"mask {number}") for number in numbers]
    maps = {name: values for name, values in tensors.items() if values.ndim == 3}
    assert images is not None
    return Snapshot(step, images, labels, maps, drawn, masks, difference, channels)


def picture_cards(snapshots: list[Snapshot], classes: list[str]) -> list[dict[str, Any]]:
    """One card an image.

    `label`, its class ("" where a picture has none); `picture`; `rows`, a row a map with a picture for each snapshot; `answers`, the ready
    pictures: (title, place among the moments or None, picture); `masks`, a row a snapshot (`_mask_rows`), and `columns`, their heads.
    """
    if not snapshots:
        return []
    names = [name for name in sorted(snapshots[0].maps) if all(name in snapshot.maps for snapshot in snapshots)]
    count = min(MOST_IMAGES, *(len(snapshot.images) for snapshot in snapshots))
    last = snapshots[-1]
    store = photograph if last.drawn else data_uri
    cards = []
    for i in range(count):
        rows = [
            {
                "title": MAP_TITLES.get(name, name),
                "name": name,
                "cut": name in SEEN,
                "pictures": [store(drawn(s.images[i], name, s.maps[name][i])) for s in snapshots],
            }
            for name in names
        ]
        image = as_rgb(last.images[i], DRAWN_SIDE if last.drawn else LONGEST_SIDE)
        cards.append(
            {
                "label": _label(last.labels, i, classes),
                "picture": store(image),
                "pixelated": max(image.size) < PIXELATED_BELOW,
                "rows": rows,
                "answers": _answers(snapshots, i),
                "columns": _mask_columns(snapshots),
                "masks": _mask_rows(snapshots, i),
            }
        )
    return cards


def masks_left_out(snapshots: list[Snapshot]) -> int:
    """How many masks are not in the cards."""
    return max([0, *(len(snapshot.masks) - MOST_MASKS for snapshot in snapshots)])


def _label(labels: NDArray[np.int64] | None, i: int, classes: list[str]) -> str:
    if labels is None:
        return ""
    label = int(labels[i])
    return classes[label] if 0 <= label < len(classes) else str(label)


def _answers(snapshots: list[Snapshot], i: int) -> list[tuple[str, int | None, str]]:
    """Labels and the frozen teacher's answer once, the student's at every moment: (title, moment, picture)."""
    found: list[tuple[str, int | None, str]] = []
    for name in ("labels", "teacher"):
        if name in snapshots[-1].drawn:
            found.append((name, None, photograph(as_rgb(snapshots[-1].drawn[name][i], DRAWN_SIDE))))
    for moment, snapshot in enumerate(snapshots):
        if "student" in snapshot.drawn:
            found.append(("student", moment, photograph(as_rgb(snapshot.drawn["student"][i], DRAWN_SIDE))))
    return found


def _mask_columns(snapshots: list[Snapshot]) -> list[str]:
    masks = min([MOST_MASKS, *(len(snapshot.masks) for snapshot in snapshots)])
    compared = all(snapshot.difference is not None for snapshot in snapshots)
    return ["difference"] * compared + [f"mask {number + 1}" for number in range(masks)]


def _mask_rows(snapshots: list[Snapshot], i: int) -> list[dict[str, Any]]:
    """A row a snapshot: `pictures` of the columns, `channels` (a strip, or "")."""
    columns = _mask_columns(snapshots)
    rows = []
    for snapshot in snapshots:
        pictures = [] if "difference" not in columns else [data_uri(heat(own_scale(snapshot.difference[i]), DIFFERENCE_RAMP))]  # type: ignore[index]
        masks = snapshot.masks[: len(columns) - len(pictures)]
        strip = "" if snapshot.channels is None else data_uri(channel_strip(snapshot.channels[i]))
        rows.append({"pictures": pictures + [data_uri(heat(mask[i], MASK_RAMP)) for mask in masks], "channels": strip})
    return rows if columns or any(row["channels"] for row in rows) else []


def heat(values: Values, ramp: tuple[tuple[int, int, int], ...], longest: int = MASK_SIDE) -> Image.Image:
    """Values [h,w] as colours of a ramp, 0 its first and 1 its last, one pixel each; more than `longest` a side are averaged."""
    height, width = values.shape
    scale = max(1.0, max(height, width) / longest)
    finite = Image.fromarray(np.clip(np.nan_to_num(values.astype(np.float32)), 0, 1))
    if scale > 1:
        finite = finite.resize((max(1, round(width / scale)), max(1, round(height / scale))), Image.Resampling.BOX)
    picture = Image.fromarray((255 * np.asarray(finite)).round().astype(np.uint8)).convert("P")
    stops = np.linspace(0, 255, len(ramp))
    picture.putpalette(
        np.stack([np.interp(np.arange(256), stops, channel) for channel in zip(*ramp, strict=True)], 1).round().astype(np.uint8).tobytes()
    )
    return picture


def own_scale(values: Values) -> Values:
    """Values between their least and their largest as shares in [0,1]; 0 where all are alike or none is finite."""
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    return (values - low) / (high - low) if math.isfinite(high - low) and high > low else np.zeros_like(values)


def channel_strip(values: Values) -> Image.Image:
    """Channel masks [M,C] in [0,1]: a row of pixels a mask, a pixel a channel; more than MOST_CHANNELS are averaged with neighbours."""
    group = -(-values.shape[1] // MOST_CHANNELS)
    edges = np.arange(0, values.shape[1], group)
    means = np.add.reduceat(np.nan_to_num(values.astype(np.float64)), edges, axis=1) / np.diff([*edges, values.shape[1]])
    return heat(means, MASK_RAMP, longest=MOST_CHANNELS)


def drawn(image: NDArray[np.uint8], name: str, values: NDArray[np.floating[Any]]) -> Image.Image:
    """An image with a map: of those in `SEEN` hidden patches are transparent, any other map is laid over the greyed picture."""
    return what_was_shown(image, values) if name in SEEN else overlaid(image, values)


def as_rgb(image: NDArray[np.uint8], longest: int = LONGEST_SIDE) -> Image.Image:
    """uint8 [C,H,W] to a picture of at most `longest` a side; other than three channels are shown as their mean, in grey."""
    pixels = image.transpose(1, 2, 0) if len(image) == 3 else np.repeat(image.mean(0).round().astype(np.uint8)[..., None], 3, axis=2)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if max(picture.size) > longest:
        picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return picture


def what_was_shown(image: NDArray[np.uint8], shown: NDArray[np.floating[Any]]) -> Image.Image:
    """The picture where `shown` [h,w] is 1, nothing (transparent) where it is 0."""
    picture = as_rgb(image).convert("RGBA")
    picture.putalpha(_grid(np.clip(np.nan_to_num(shown), 0, 1), picture.size))
    return picture


def overlaid(image: NDArray[np.uint8], saliency: NDArray[np.floating[Any]]) -> Image.Image:
    """The picture in dim grey under the student's colour, which is the stronger the higher the saliency [h,w]."""
    share = own_scale(saliency)
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


def photograph(picture: Image.Image) -> str:
    """A JPEG that needs no file, or a PNG where pixels are to be seen or some are transparent."""
    if max(picture.size) < PIXELATED_BELOW or picture.mode == "RGBA":
        return data_uri(picture)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=DRAWN_QUALITY, optimize=True, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def sheet(run_dir: Path) -> str:
    """The picture of the images that a run has made, as a data URI; "" if it made none."""
    path = run_dir / "data" / "images.png"
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() if path.is_file() else ""
