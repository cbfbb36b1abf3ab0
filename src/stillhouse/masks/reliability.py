"""Which of two students teaches the other, place by place: the one whose error there is smaller. Nobody does where both err alike.

The error is the cross-entropy with the label, so this is for labelled images only. What is not labelled takes no part. No gradient.
Source: after "A Good Student is Cooperative and Reliable", arXiv 2307.12574, whose abstract says that a direction is chosen for each
region and each pixel, and not how: errors, grids and ties are our reading.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError


class Regions(NamedTuple):
    """What is in R regions of each image."""

    means_BRC: Tensor
    """fp32; 0 in a region without labels."""
    counts_BR: Tensor
    """bool: whether a region has labels."""


@torch.no_grad()
def pixel_errors(logits_BKHW: Tensor, labels_BHW: Tensor, ignored: int = 255) -> Tensor:
    """-log p(label) at each pixel, fp32 [B, H, W]; 0 where the label is `ignored`."""
    return F.cross_entropy(logits_BKHW.float(), labels_BHW.long(), ignore_index=ignored, reduction="none")


def directions(errors_S: Tensor, errors_P: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Where the first is taught by the second, and where it is the other way round: bool masks that never overlap.

    Args:
        errors_S, errors_P: theirs, of equal shape.
        counts: bool, of that shape: where there are labels.
    """
    return (errors_P < errors_S) & counts, (errors_S < errors_P) & counts


def leads(errors_S: Tensor, errors_P: Tensor, labels_BHW: Tensor, ignored: int = 255) -> Tensor:
    """Who errs less on the pixels of each class, [ignored + 1]: 1 the first, -1 the second, 0 where both do alike or the class is not."""
    gaps = (errors_P - errors_S).masked_fill(labels_BHW == ignored, 0.0)
    return gaps.new_zeros(ignored + 1).scatter_add(0, labels_BHW.flatten().long(), gaps.flatten()).sign()


def region_means(maps_BCHW: Tensor, labels_BHW: Tensor, of: Literal["grid", "classes"], number: int, ignored: int = 255) -> Regions:
    """The means of a map over the labelled part of every region, and which regions have one.

    Args:
        of: "grid", cells of `number` x `number`, which overlap where the map does not divide, as in adaptive pooling; "classes", the pixels
            of each of `number` classes, image by image.

    Raises:
        UserError: if the grid has more cells a side than the map has places.
    """
    grid = (maps_BCHW.shape[-2], maps_BCHW.shape[-1])
    if of == "classes":
        numbers = torch.arange(number, device=labels_BHW.device).view(-1, 1, 1)
        masks_BRHW = F.adaptive_avg_pool2d((labels_BHW.unsqueeze(1) == numbers).float(), grid)
        return Regions(class_means(maps_BCHW, masks_BRHW), masks_BRHW.sum((2, 3)) > 0)
    if number > min(grid):
        raise UserError(f"regions is {number} and a high-layer map has {grid[0]} x {grid[1]} places, expected at most {min(grid)}")
    weights_B1HW = F.adaptive_avg_pool2d((labels_BHW != ignored).float().unsqueeze(1), grid)
    masses = F.adaptive_avg_pool2d(weights_B1HW, number)
    means = F.adaptive_avg_pool2d(maps_BCHW.float() * weights_B1HW, number) / masses.clamp_min(1e-12)
    return Regions(means.flatten(2).mT, masses.flatten(1) > 0)


def class_means(values_BCHW: Tensor, weights_BRHW: Tensor) -> Tensor:
    """Means under each of R soft masks: fp32 [B, R, C]; 0 where a mask is empty."""
    weights = weights_BRHW.float().flatten(2)
    with torch.autocast(weights.device.type, enabled=False):
        sums = weights @ values_BCHW.float().flatten(2).mT
    return sums / weights.sum(-1, keepdim=True).clamp_min(1e-12)
