"""Stratified splits and subsets of labelled samples, functions of the labels and a seed alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.randomness import seed_from


def split(labels: Tensor | Sequence[int], share: float, *where: int | str) -> tuple[Tensor, Tensor]:
    """Two sorted index tensors, the second with `share` of each class, rounded, but at least one and not all of it.

    Raises:
        UserError: if a class has a single sample.
    """
    place, size = _places(labels, *where)
    if size.numel() and int(size.min()) < 2:
        raise UserError(
            f"class number {int(torch.as_tensor(labels)[size.argmin()])} has one image, expected at least two to split into train and val"
        )
    second = place < (size * share).round().clamp(min=1).minimum(size - 1)
    return (~second).nonzero()[:, 0], second.nonzero()[:, 0]


def subset(labels: Tensor | Sequence[int], count: int, *where: int | str) -> Tensor:
    """Sorted indices of `count` samples, each class in proportion."""
    place, size = _places(labels, *where)
    return torch.argsort((place + 0.5) / size, stable=True)[:count].sort().values


def _places(labels: Tensor | Sequence[int], *where: int | str) -> tuple[Tensor, Tensor]:
    """For each sample its place in a seeded order of its class, and the size of its class."""
    classes = torch.as_tensor(labels)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed_from(*where)))
    order = order[torch.argsort(classes[order], stable=True)]
    _, which, sizes = torch.unique(classes, return_inverse=True, return_counts=True)
    starts = sizes.cumsum(0) - sizes
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) - starts[which[order]]
    return place, sizes[which]
