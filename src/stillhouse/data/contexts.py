"""Scenes whose classes are told by what is near or by what is far: textured discs, and plain discs named by the colour of a far marker.

Two classes, `across` and `down`, are discs of stripes that lean one way or the other: a few pixels tell them. The other two, `warm` and
`cold`, are plain grey discs alike in every respect: what they are is said by the colour of a square marker in a corner of the image, at
least `reach` pixels away, nearest edge to nearest edge. A network that sees only a neighbourhood cannot know; to it they are one class.
Every scene has a marker; markers, too, are background. Masks are exact.

`contexts` is for segmentation. Options: `size` (side in pixels, by default 32), `objects` (discs at most, 3), `noise` (in grey levels, 32),
`reach` (12), `train` and `val` (how many scenes, 400 and 400).

Scene i of a part is a function of the seed and i (of i alone in val), in integers only: the same on every machine, and the first scenes of
a larger set are those of a smaller one. Validation scenes are drawn from a stream of their own, whatever the seed.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.data import Data
from stillhouse.data.arrays import channel_statistics, fingerprint
from stillhouse.data.composed import Bytes, Composed, Draws, Ints, noisy
from stillhouse.data.options import read_options, within
from stillhouse.errors import UserError
from stillhouse.randomness import seed_from

CLASSES = ["background", "across", "down", "warm", "cold"]
LOCAL, GLOBAL = ("across", "down"), ("warm", "cold")
"""The classes that a neighbourhood tells, and those that only the marker tells."""
DEFAULTS = {"size": 32, "objects": 3, "noise": 32, "reach": 12, "train": 400, "val": 400}
RANGES = {"size": (24, 256), "objects": (1, 16), "noise": (0, 64), "reach": (0, 128), "train": (1, 20_000), "val": (1, 20_000)}
WARM, COLD = (216, 96, 64), (64, 96, 216)
TRIES = 16
STATISTICS = 100


def open_contexts(text: str, *, seed: int = 0) -> Data:
    """Open `contexts:TEXT`; TEXT may be empty. `seed` draws the training scenes, never the validation scenes.

    Raises:
        UserError: for unknown options, values out of range, or a marker that no disc of such a scene could be far enough from.
    """
    options = {**DEFAULTS, **read_options(text, "contexts", **dict.fromkeys(DEFAULTS, int))}
    for name, (low, high) in RANGES.items():
        within(name, options[name], low, high)
    most = options["size"] * 5 // 8
    if options["reach"] > most:
        raise UserError(f"reach={options['reach']} is more than a scene of size={options['size']} has room for, expected at most {most}")
    drawing = {key: options[key] for key in ("size", "objects", "noise", "reach")}
    train = Contexts(("contexts", "train", seed), options["train"], **drawing)
    val = Contexts(("contexts", "val"), options["val"], **drawing)
    some = Contexts(("contexts", "statistics"), STATISTICS, **drawing)
    mean, std = channel_statistics(torch.stack([some[i][0] for i in range(STATISTICS)]))
    return Data(
        name=f"contexts:{text}" if text else "contexts",
        train=train,
        val=val,
        classes=CLASSES,
        size=options["size"],
        mean=mean,
        std=std,
        fingerprint=fingerprint(train[0][0], val[0][0], repr(sorted(options.items())), str(seed)),
        task="segment",
    )


class Contexts(Composed):
    """Scenes `(image uint8 [3, size, size], mask uint8 [size, size])`, each drawn when it is first asked for and then kept.

    Args:
        where: what scene i is drawn from, besides i.
    """

    def __init__(self, where: tuple[int | str, ...], count: int, *, size: int, objects: int, noise: int, reach: int) -> None:
        super().__init__(count)
        self.where = where
        self.size, self.objects, self.noise, self.reach = size, objects, noise, reach

    def scene(self, i: int) -> tuple[Bytes, Tensor]:
        """Scene i: image [size, size, 3] and mask."""
        image, mask = self.compose(i)
        return image, torch.from_numpy(mask)

    def compose(self, i: int) -> tuple[Bytes, Bytes]:
        """Scene i: image [size, size, 3] and classes [size, size]."""
        draws = Draws(seed_from(*self.where, i))
        canvas = np.full((self.size, self.size, 3), 72 + draws.below(32), np.int32)
        mask = np.zeros((self.size, self.size), np.uint8)
        said, side = draws.below(2), self.size // 8
        top, left = ((self.size - side) * draws.below(2) for _ in range(2))
        canvas[top : top + side, left : left + side] = (WARM, COLD)[said]
        taken = np.zeros((self.size, self.size), bool)
        taken[top : top + side, left : left + side] = True
        for _ in range(1 + draws.below(self.objects)):
            kind, radius = draws.below(4), self.size // 8 + draws.below(self.size // 16 + 1)
            colour = self._stripes(draws, 1 - 2 * kind) if kind < 2 else np.full((self.size, self.size), 144 + draws.below(32), np.int32)
            away = self.reach if kind >= 2 else 1
            disc = self._place(draws, radius, taken, (top, left, side), away)
            if disc is not None:
                canvas[disc] = colour[disc][:, None]
                mask[disc] = 1 + kind if kind < 2 else 3 + said
                taken |= disc
        return noisy(canvas, self.noise, draws), mask

    def _stripes(self, draws: Draws, lean: int) -> Ints:
        """Diagonal stripes, two pixels wide, that fall to the right (1) or to the left (-1), as bright on average as plain discs."""
        rows, columns = np.mgrid[: self.size, : self.size].astype(np.int32)
        bright = (rows - lean * columns + draws.below(4)) % 4 < 2
        middle, swing = 144 + draws.below(32), 48
        return np.where(bright, middle + swing, middle - swing).astype(np.int32)

    def _place(
        self, draws: Draws, radius: int, taken: NDArray[np.bool_], marker: tuple[int, int, int], away: int
    ) -> NDArray[np.bool_] | None:
        """A disc wholly on the canvas that overlaps nothing and is at least `away` pixels from the marker; None if none was found."""
        rows, columns = np.mgrid[: self.size, : self.size].astype(np.int32)
        top, left, side = marker
        for _ in range(TRIES):
            y, x = (radius + draws.below(self.size - 2 * radius) for _ in range(2))
            disc = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
            down = max(top - y, y - (top + side - 1), 0)
            right = max(left - x, x - (left + side - 1), 0)
            if not (disc & taken).any() and down**2 + right**2 >= (away + radius) ** 2:
                return disc
        return None
