"""scikit-learn's 1,797 digits of 8 x 8 pixels, plain or pasted at a random place of a noisy canvas among fragments of other digits.

`digits` is the plain set. `digits:canvas=16,clutter=2` is the cluttered one (after the "smallest honest experiment" on MaskedKD's card,
arXiv 2302.10494): the digit covers a quarter of a 16 x 16 canvas, or a ninth of a 24 x 24 one, so most patches say nothing, or mislead.
Options: `canvas` (side in pixels), `clutter` (4 x 4 fragments a canvas, by default 2), `noise` (standard deviation of the ground as a share
of full white, by default 0.1; both defaults are 0 without a larger canvas), `step` (the digits' places are multiples of so many pixels, by
default 1; on the grid of its patches a small transformer learns in a minute), `train` (how many digits to train on).

60 % of the digits train, 40 % validate, the same ones whatever the seed: what a student is judged on, its teacher has never seen either.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset

from stillhouse.data import Data
from stillhouse.data.arrays import Arrays, channel_statistics, fingerprint
from stillhouse.data.options import read_options, within
from stillhouse.data.splits import split, subset
from stillhouse.randomness import seed_from

DIGIT, FRAGMENT = 8, 4
VAL_SHARE = 0.4


def open_digits(text: str, *, seed: int = 0) -> Data:
    """Open `digits:TEXT`; TEXT may be empty. Images have one channel; `train` takes a subset that depends on `seed`.

    Raises:
        UserError: for unknown options or values out of range.
    """
    options = read_options(text, "digits", canvas=int, clutter=int, noise=float, step=int, train=int)
    raw = load_digits()
    images = torch.from_numpy(raw.images * (255 / 16)).round().byte().unsqueeze(1)
    labels = torch.from_numpy(raw.target).long()
    all_train_ids, val_ids = split(labels, VAL_SHARE, "digits", "split")
    train_ids = all_train_ids
    if "train" in options:
        within("train", options["train"], 10, len(train_ids))
        train_ids = train_ids[subset(labels[train_ids], options["train"], seed, "digits", "subset")]
    canvas = options.setdefault("canvas", DIGIT)
    within("canvas", canvas, DIGIT, 256)
    within("clutter", options.setdefault("clutter", 2 if canvas > DIGIT else 0), 0, 64)
    within("noise", options.setdefault("noise", 0.1 if canvas > DIGIT else 0.0), 0.0, 1.0)
    within("step", options.setdefault("step", 1), 1, canvas)
    plain = canvas == DIGIT and not options["clutter"] and not options["noise"]

    def part(ids: Tensor, *where: int | str, fresh: bool = False) -> Arrays | CanvasDigits:
        if plain:
            return Arrays(images[ids], labels[ids])
        return CanvasDigits(images[ids], labels[ids], canvas, options["clutter"], options["step"], options["noise"], where, fresh)

    # of all that may train, whatever the seed and `train`: a teacher and its student are normalised alike
    mean, std = channel_statistics(part(all_train_ids, "digits", "statistics").draw_batch(torch.arange(len(all_train_ids)), 0)[0])
    return Data(
        name=f"digits:{text}" if text else "digits",
        train=part(train_ids, seed, "digits", "train", fresh=True),
        val=part(val_ids, "digits", "val"),
        classes=[str(digit) for digit in range(10)],
        channels=1,
        size=canvas,
        mean=mean,
        std=std,
        fingerprint=fingerprint(images[train_ids], images[val_ids], repr(sorted(options.items())), str(seed)),
    )


class CanvasDigits(Dataset[tuple[Tensor, int]]):
    """Digits on canvases: place, noise and fragments are drawn from (where, epoch, sample), or from (where, sample) when not `fresh`.

    The canvases of an epoch are drawn together on first use (some microseconds each) and kept until another epoch is asked for.
    """

    def __init__(
        self, digits: Tensor, labels: Tensor, canvas: int, clutter: int, step: int, noise: float, where: tuple[int | str, ...], fresh: bool
    ) -> None:
        self.digits, self.labels = digits, labels
        self.canvas, self.clutter, self.step, self.noise = canvas, clutter, step, noise
        self.where, self.fresh = where, fresh
        self._drawn: tuple[int, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.draw(i, 0)

    def draw(self, i: int, epoch: int) -> tuple[Tensor, int]:
        """Sample `i` as epoch `epoch` sees it: image uint8 [1, canvas, canvas], label."""
        return self._canvases(epoch)[0][i], int(self.labels[i])

    def draw_batch(self, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Images uint8 [b, 1, canvas, canvas] and labels [b]."""
        return self._canvases(epoch)[0][ids], self.labels[ids]

    def boxes(self, ids: Tensor, epoch: int = 0) -> Tensor:
        """Where the digits are: boxes long [b, 4] as x1, y1, x2, y2 in pixels, the ends outside."""
        return self._canvases(epoch)[1][ids]

    def _canvases(self, epoch: int) -> tuple[Tensor, Tensor]:
        epoch = epoch if self.fresh else 0
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, *self._paint(torch.Generator().manual_seed(seed_from(*self.where, "canvas", epoch))))
        return self._drawn[1:]

    def _paint(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        count = len(self)
        canvases = torch.randn(count, self.canvas, self.canvas, generator=generator).abs_().mul_(255 * self.noise).clamp_(max=255).byte()
        for _ in range(self.clutter):
            other = (torch.arange(count) + torch.randint(1, count, (count,), generator=generator)) % count
            corner = torch.randint(0, DIGIT - FRAGMENT + 1, (count, 2), generator=generator)
            fragments = _window(self.digits[other, 0], corner, FRAGMENT)
            _paste(canvases, fragments, torch.randint(0, self.canvas - FRAGMENT + 1, (count, 2), generator=generator))
        place = torch.randint(0, (self.canvas - DIGIT) // self.step + 1, (count, 2), generator=generator) * self.step
        _paste(canvases, self.digits[:, 0], place)
        return canvases.unsqueeze(1), torch.cat([place.flip(1), place.flip(1) + DIGIT], dim=1)


def _grid(corner: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices [N, side, side] of a square at `corner` (row, column) [N, 2] of each image."""
    steps = torch.arange(side)
    rows, columns = corner[:, 0, None, None] + steps[:, None], corner[:, 1, None, None] + steps
    return torch.arange(len(corner))[:, None, None], rows, columns


def _window(images: Tensor, corner: Tensor, side: int) -> Tensor:
    return images[_grid(corner, side)]


def _paste(canvases: Tensor, squares: Tensor, corner: Tensor) -> None:
    """Lay squares [N, s, s] on canvases [N, H, W], the lighter pixel winning: strokes stay whole, and the ground keeps its noise."""
    where = _grid(corner, squares.shape[-1])
    canvases[where] = torch.maximum(canvases[where], squares)
