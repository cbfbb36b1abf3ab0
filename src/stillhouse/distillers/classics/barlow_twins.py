"""An encoder from images alone: two random views of an image give the same features, and no feature says what another does.

There is no teacher and there are no labels: this is how a teacher comes about for the methods that distil features (`krr_st`).

Masked: nothing.
Source: Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021, arXiv 2103.03230.

    stillhouse distill --method barlow_twins --student timm/resnet18 --data imagefolder:DIR --batch 1024

Sure: the loss, its weight, the projector of three layers and its width. Where we depart: both views are made of the run's (already
augmented) image, by a square crop, a flip, contrast and brightness, on the device and drawn by sample, instead of the paper's list of
augmentations (switch the run's own off with `--crop-scale '[1,1]' --auto-augment '' --random-erasing 0`); correlations are those of a
process's part of the batch; the optimiser is the run's, not LARS.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillers.base import Distiller
from stillhouse.errors import UserError
from stillhouse.losses.correlation import redundancy
from stillhouse.models.outputs import logits_of
from stillhouse.randomness import uniform

DRAWN = 6
"""Random numbers a view: size and place of the crop, flip, contrast, brightness."""


class BarlowTwins(Distiller):
    """sum_i (1 - C_ii)^2 + weight sum_{i != j} C_ij^2, C the correlations over the batch of two views' projected features.

    Args:
        student: an encoder, images [B, C, H, W] to features [B, D].
        weight: of the correlations between different features, >= 0.
        width: of the projector's three layers, at least 2.
        crop: the smallest share of the image's area that a view shows, in (0, 1].
        flip: the share of views that are flipped left to right, in [0, 1].
        jitter: how much contrast and brightness vary, in [0, 1).

    Raises:
        UserError: if a setting is out of range.
    """

    off: ClassVar[dict[str, Any]] = {}
    tasks: ClassVar[tuple[str, ...]] = ("encode",)
    projector: Any

    def __init__(
        self, student: nn.Module, *, weight: float = 5e-3, width: int = 8192, crop: float = 0.08, flip: float = 0.5, jitter: float = 0.4
    ) -> None:
        if not 0 <= weight < float("inf") or width < 2:
            raise UserError(f"weight is {weight} and width {width}, expected a finite weight of at least 0 and a width of at least 2")
        if not (0 < crop <= 1 and 0 <= flip <= 1 and 0 <= jitter < 1):
            raise UserError(f"crop is {crop}, flip {flip} and jitter {jitter}, expected shares in (0, 1], [0, 1] and [0, 1)")
        super().__init__(student)
        self.weight, self.width, self.crop, self.flip, self.jitter = weight, width, crop, flip, jitter
        self.projector = None

    def prepare(self, batches: Iterable[tuple[Any, Any]]) -> None:
        """The projector, for as many features as the student has."""
        images = next(iter(batches))[0]
        training = self.student.training
        with torch.no_grad():
            features = logits_of(self.student.eval()(images[:2]))
        self.student.train(training)
        widths = [features.shape[1], self.width, self.width]
        hidden = [
            layer
            for before, after in itertools.pairwise(widths)
            for layer in (nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU())
        ]
        self.projector = nn.Sequential(*hidden, nn.Linear(self.width, self.width, bias=False)).to(images.device)

    def forward(self, batch: tuple[Tensor, Any], turn: str = "student") -> dict[str, Tensor]:
        """`barlow`: of the batch as a whole."""
        first, second = self.views(batch[0])
        projected = [self.projector(logits_of(self.student(view))) for view in (first, second)]
        return {"barlow": redundancy(projected[0], projected[1], self.weight)}

    def views(self, images: Tensor) -> list[Tensor]:
        """Two random views of each image, of its size; what is drawn follows from the sample."""
        numbers = uniform(len(images), 2 * DRAWN, images.device)
        return [self.view(images, some) for some in numbers.to(images.dtype).chunk(2, dim=1)]

    def view(self, images: Tensor, numbers_BN: Tensor) -> Tensor:
        """A square of each image, enlarged, perhaps flipped, with another contrast and brightness."""
        size, x, y, flip, contrast, brightness = numbers_BN.unbind(1)
        side = (self.crop + (1 - self.crop) * size).sqrt()
        nothing = torch.zeros_like(side)
        across = torch.stack([torch.where(flip < self.flip, -side, side), nothing, (1 - side) * (2 * x - 1)], dim=1)
        down = torch.stack([nothing, side, (1 - side) * (2 * y - 1)], dim=1)
        grid = F.affine_grid(torch.stack([across, down], dim=1), list(images.shape), align_corners=False)
        seen = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        scale, shift = (1 + self.jitter * (2 * contrast - 1)), self.jitter * (2 * brightness - 1)
        middle = seen.mean((1, 2, 3), keepdim=True)
        return (seen - middle) * scale.view(-1, 1, 1, 1) + middle + shift.view(-1, 1, 1, 1)
