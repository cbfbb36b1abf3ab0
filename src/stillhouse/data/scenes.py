"""Scenes put together from real parts, with exact boxes and masks: handwritten digits, clothes or animals on crops of photographs.

`scenes` is for detection and segmentation alike; `scenes:task=detect` and `scenes:task=segment` say which, the images are the same.
1 to `objects` shapes are scaled, turned, filled with a tint and a texture and laid over each other on a crop of a photograph, among
`clutter` fragments of other shapes that are of no class. Boxes and masks are of what can be seen of an object, which is 40 % of it at
least: one that would leave less is not put there. Options: `size` (side in pixels, by default 96), `objects` (at most, 4), `clutter` (2),
`noise` (in grey levels, 8), `train` and `val` (how many scenes, 1000 and 300), `sprites` (`digits`, `fashion-mnist` or `animals`),
`classes` (the first so many, 4), `task` (`segment`, unless told).

Nothing in a validation scene has been seen in training: its shapes and its photographs (scikit-image's) are others, whatever the seed.
Scene i of a part is a function of the seed and i (of i alone in val), in integers only: the same on every machine, and the first 150 of
`train=4000` are those of `train=150`. The set is fixed, it does not change by epoch: `train` is how much a student has to learn from.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stillhouse.data import Data
from stillhouse.data.arrays import channel_statistics, fingerprint
from stillhouse.data.composed import Bytes, Composed, Draws, Ints, noisy
from stillhouse.data.installed import installed_files
from stillhouse.data.options import read_options, within
from stillhouse.data.sprites import Sprites, open_sprites
from stillhouse.errors import UserError
from stillhouse.randomness import seed_from

PHOTOGRAPHS = {
    "train": ("astronaut", "brick", "camera", "chelsea", "gravel", "ihc", "motorcycle_left"),
    "val": ("coffee", "coins", "grass", "moon"),
}
"""All PNG, in the wheel, and lossless: JPEG is not decoded alike everywhere."""
DEFAULTS = {"size": 96, "objects": 4, "clutter": 2, "noise": 8, "train": 1000, "val": 300, "classes": 4}
RANGES = {
    "size": (32, 256),
    "objects": (1, 16),
    "clutter": (0, 16),
    "noise": (0, 64),
    "train": (1, 20_000),
    "val": (1, 20_000),
    "classes": (1, 10),
}
TRIES = 4
STATISTICS = 100
CONTRAST = 200
"""How far a tint is from the ground at least, summed over the channels."""

Stencil = tuple[Ints, Ints]


def open_scenes(text: str, *, seed: int = 0, task: Literal["detect", "segment"] | None = None) -> Data:
    """Open `scenes:TEXT`; TEXT may be empty. `seed` draws the training scenes, never the validation scenes.

    Raises:
        UserError: for unknown options, values out of range, two different tasks, or sprites that are not on this machine.
    """
    given = read_options(text, "scenes", sprites=str, task=str, **dict.fromkeys(DEFAULTS, int))
    options = {**DEFAULTS, "sprites": "digits", **given, "task": _task(given.get("task"), task)}
    for name, (low, high) in RANGES.items():
        within(name, options[name], low, high)
    sprites = open_sprites(options["sprites"])
    names = sprites.names[: options["classes"]]
    drawing = {key: options[key] for key in ("classes", "size", "objects", "clutter", "noise", "task")}
    train = Scenes(sprites, "train", ("scenes", "train", seed), options["train"], **drawing)
    val = Scenes(sprites, "val", ("scenes", "val"), options["val"], **drawing)
    # of scenes of their own, whatever the seed and `train`: a teacher and its student are normalised alike
    some = Scenes(sprites, "train", ("scenes", "statistics"), STATISTICS, **drawing)
    mean, std = channel_statistics(torch.stack([some[i][0] for i in range(STATISTICS)]))
    return Data(
        name=f"scenes:{text}" if text else "scenes",
        train=train,
        val=val,
        classes=names if options["task"] == "detect" else ["background", *names],
        size=options["size"],
        mean=mean,
        std=std,
        fingerprint=fingerprint(*train.parts(), *val.parts(), repr(sorted(options.items())), str(seed)),
        task=options["task"],
    )


def _task(given: str | None, asked: str | None) -> str:
    if given is not None and given not in ("detect", "segment"):
        raise UserError(f"scenes have no task '{given}', expected task=detect or task=segment")
    if given and asked in ("detect", "segment") and given != asked:
        raise UserError(f"scenes:task={given} are asked to {asked}: say the same, or leave one out")
    return given or ("detect" if asked == "detect" else "segment")


class Scenes(Composed):
    """Scenes `(image uint8 [3, size, size], target)`, each drawn when it is first asked for and then kept.

    The target is {"boxes": float [n, 4] as x1, y1, x2, y2, the ends outside, "labels": long [n] from 1} or a mask uint8 [size, size].

    Args:
        part: whose sprites and photographs are taken.
        where: what scene i is drawn from, besides i.
        classes: so many of the sprites' classes are taken.
    """

    def __init__(
        self,
        sprites: Sprites,
        part: Literal["train", "val"],
        where: tuple[int | str, ...],
        count: int,
        *,
        classes: int,
        size: int,
        objects: int,
        clutter: int,
        noise: int,
        task: Literal["detect", "segment"],
    ) -> None:
        shapes, labels = getattr(sprites, part)
        self.shapes, self.labels = shapes[labels < classes], labels[labels < classes]
        self.level, self.degrees, self.mirrored = sprites.level, sprites.degrees, sprites.mirrored
        self.photographs = _photographs(part)
        super().__init__(count)
        self.where, self.task = where, task
        self.size, self.objects, self.clutter, self.noise = size, objects, clutter, noise

    def scene(self, i: int) -> tuple[Bytes, Any]:
        """Scene i: image [size, size, 3] and target."""
        image, owner, labels = self.compose(i)
        return image, _mask(owner, labels) if self.task == "segment" else _boxes(owner, labels)

    def parts(self) -> list[Tensor | str]:
        """What the scenes are made of, and the first one, for a fingerprint."""
        photographs = [torch.from_numpy(scales[0]) for scales in self.photographs]
        return [torch.from_numpy(self.shapes), torch.from_numpy(self.labels), *photographs, self[0][0]]

    def compose(self, i: int) -> tuple[Bytes, Ints, list[int]]:
        """Scene i: image [size, size, 3], the number of the object seen at each pixel (-1: none) [size, size], and the objects' labels."""
        draws = Draws(seed_from(*self.where, i))
        canvas = self._ground(draws)
        for _ in range(self.clutter):
            stencil = self._stencil(_fragment(self._sprite(draws)[0], draws), draws, divisor=2)
            self._paint(canvas, draws, stencil, self._corner(draws, stencil))
        owner = np.full((self.size, self.size), -1, np.int32)
        labels: list[int] = []
        wholes: list[int] = []
        for _ in range(1 + draws.below(self.objects)):
            shape, label = self._sprite(draws)
            stencil = self._stencil(shape, draws)
            for _ in range(TRIES):
                corner = self._corner(draws, stencil)
                after = _covered(owner, stencil, corner, len(labels))
                whole = int((stencil[0] >= 128).sum())
                if _enough(after, [*wholes, whole]):
                    self._paint(canvas, draws, stencil, corner)
                    owner, labels, wholes = after, [*labels, label], [*wholes, whole]
                    break
        return noisy(canvas, self.noise, draws), owner, labels

    def _ground(self, draws: Draws) -> Ints:
        """A crop of a photograph, each channel brighter or darker: int32 [size, size, 3]."""
        fitting = [scale for scale in draws.one_of(self.photographs) if min(scale.shape[:2]) >= self.size]
        crop = _crop(draws.one_of(fitting), self.size, draws)[:, :: 1 - 2 * draws.below(2)].astype(np.int32)
        gain = np.array([160 + draws.below(161) for _ in range(3)], np.int32)
        return (crop * gain >> 8) + draws.below(49) - 24

    def _sprite(self, draws: Draws) -> tuple[Bytes, int]:
        which = draws.below(len(self.shapes))
        return self.shapes[which], int(self.labels[which]) + 1

    def _stencil(self, shape: Bytes, draws: Draws, divisor: int = 1) -> Stencil:
        side = (self.size // 4 + draws.below(self.size // 4 + 1)) // divisor
        degrees = draws.below(2 * self.degrees + 1) - self.degrees
        if self.mirrored and draws.below(2):
            shape = shape[:, ::-1]
        return _turned(shape, side, degrees, self.level)

    def _corner(self, draws: Draws, stencil: Stencil) -> tuple[int, int]:
        """A place where three quarters of the stencil's sides at least are on the canvas: row, column of its corner."""
        quarter = len(stencil[0]) // 4
        span = self.size - len(stencil[0]) + 2 * quarter + 1
        return draws.below(span) - quarter, draws.below(span) - quarter

    def _paint(self, canvas: Ints, draws: Draws, stencil: Stencil, corner: tuple[int, int]) -> None:
        """Lay a shape on the canvas, in a tint that is not that of the ground under it, with some of a photograph's texture."""
        alpha, grey = stencil
        tint = np.array([draws.below(256) for _ in range(3)], np.int32)
        texture = _crop(draws.one_of(self.photographs)[0], len(alpha), draws).astype(np.int32)
        strength = draws.below(97)
        there, part = _window(self.size, len(alpha), corner)
        ground, alpha = canvas[there], alpha[part][..., None]
        mean = (ground * alpha).sum((0, 1)) // max(int(alpha.sum()), 1)
        if np.abs(tint - mean).sum() < CONTRAST:
            tint = (tint + 128) % 256
        colour = (tint + ((texture[part] - 128) * strength >> 8)) * (grey[part][..., None] + 255) // 510
        canvas[there] = ground + ((colour - ground) * alpha >> 8)


@functools.cache
def _photographs(part: str) -> list[list[Bytes]]:
    """uint8 [H, W, 3] of each photograph of a part at scales 1, 1/2 and 1/3."""
    names = [f"skimage/data/{name}.png" for name in PHOTOGRAPHS[part]]
    images = [np.asarray(Image.open(path).convert("RGB")) for path in installed_files("scikit-image", *names, need="a scene's ground")]
    return [[_reduced(image, times) for times in (1, 2, 3)] for image in images]


def _reduced(image: Bytes, times: int) -> Bytes:
    """The image `times` smaller: means of squares."""
    height, width = (length // times for length in image.shape[:2])
    squares = image[: height * times, : width * times].reshape(height, times, width, times, 3)
    return (squares.sum((1, 3), dtype=np.int32) // times**2).astype(np.uint8)


def _crop(image: Bytes, side: int, draws: Draws) -> Bytes:
    y, x = (draws.below(length - side + 1) for length in image.shape[:2])
    return image[y : y + side, x : x + side]


def _fragment(shape: Bytes, draws: Draws) -> Bytes:
    """A quarter of a shape: it looks like a piece of an object, and is none."""
    half = len(shape) // 2
    y, x = draws.below(half + 1), draws.below(half + 1)
    return shape[y : y + half, x : x + half]


def _turned(shape: Bytes, side: int, degrees: int, level: int) -> Stencil:
    """A shape [n, n] as wide as `side` and turned: how much it covers, 0 to 256, and how bright it is, 0 to 255; int32 squares.

    Bilinear in 1/256 of a pixel; sine and cosine are rounded to 14 bits, which every machine does alike.
    """
    n = len(shape)
    padded = np.pad(shape, 1).astype(np.int32).ravel()
    cosine, sine = (round(f(math.radians(degrees)) * 2**14) for f in (math.cos, math.sin))
    frame = side * (n + 2) // n  # an edge goes on for half a pixel of the shape
    width = (frame * (abs(cosine) + abs(sine)) + 2**14 - 1) >> 14
    steps = (2 * np.arange(width, dtype=np.int64) - width + 1) * (n * 2**15 // side)  # from the middle, in 2**-16 pixels of the shape
    rows, columns = steps[:, None], steps[None]
    y, x = (columns * -sine + rows * cosine >> 14), (columns * cosine + rows * sine >> 14)
    y, x = ((place + (n + 1) * 2**15).clip(0, (n + 1) * 2**16 - 1) for place in (y, x))
    corner, down, right = (y >> 16) * (n + 2) + (x >> 16), y >> 8 & 255, x >> 8 & 255
    top = padded[corner] * (256 - right) + padded[corner + 1] * right
    bottom = padded[corner + n + 2] * (256 - right) + padded[corner + n + 3] * right
    grey = (top * (256 - down) + bottom * down >> 16).astype(np.int32)
    return ((grey - level) * 4).clip(0, 256), grey


def _window(size: int, width: int, corner: tuple[int, int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a square lies on the canvas, and which part of the square that is."""
    (top, left), (bottom, right) = corner, (place + width for place in corner)
    there = slice(max(top, 0), min(bottom, size)), slice(max(left, 0), min(right, size))
    return there, (slice(there[0].start - top, there[0].stop - top), slice(there[1].start - left, there[1].stop - left))


def _covered(owner: Ints, stencil: Stencil, corner: tuple[int, int], number: int) -> Ints:
    """Which object is seen where once object `number` lies at `corner`."""
    there, part = _window(len(owner), len(stencil[0]), corner)
    after = owner.copy()
    after[there][stencil[0][part] >= 128] = number
    return after


def _enough(owner: Ints, wholes: list[int]) -> bool:
    """Whether of every object, `wholes` pixels large, 40 % can be seen."""
    seen = np.bincount(owner.ravel() + 1, minlength=len(wholes) + 1)[1:]
    return all(5 * part >= 2 * whole > 0 for part, whole in zip(seen.tolist(), wholes, strict=True))


def _mask(owner: Ints, labels: list[int]) -> Tensor:
    """Classes uint8 [H, W], 0 where there is no object."""
    return torch.from_numpy(np.array([0, *labels], np.uint8)[owner + 1])


def _boxes(owner: Ints, labels: list[int]) -> dict[str, Tensor]:
    """The tight boxes of what is seen of each object."""
    boxes = []
    for number in range(len(labels)):
        rows, columns = ((owner == number).any(axis).nonzero()[0] for axis in (1, 0))
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64)}
