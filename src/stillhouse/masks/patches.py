"""Random masking of a picture's patches: most are taken away, another choice for every sample and step, and how to lay them back.

Source: masked autoencoders, arXiv 2111.06377, section 3 (shuffle, keep the first, unshuffle).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.randomness import uniform


class Masking(NamedTuple):
    """Which patches of a batch are visible.

    Attributes:
        keep: indices of the visible patches, int64 [B, K], in the order of the shuffle.
        mask: 1.0 where a patch is hidden, 0.0 where it is visible, fp32 [B, N].
        restore: the inverse of the shuffle, int64 [B, N]: visible patches first, then hidden ones, gathered by it lie in their places.
    """

    keep: Tensor
    mask: Tensor
    restore: Tensor

    @property
    def hidden(self) -> Tensor:
        """Indices of the hidden patches, int64 [B, N - K], in the order of their places. Does not wait for the device."""
        return self.mask.argsort(dim=1, descending=True, stable=True)[:, : self.mask.shape[1] - self.keep.shape[1]]


def visible_count(masked: float, patches: int) -> int:
    """How many of `patches` stay visible: int(patches (1 - masked)), as MAE's code rounds.

    Raises:
        UserError: unless that leaves at least one visible and one hidden patch.
    """
    count = int(patches * (1 - masked)) if 0 < masked < 1 else 0
    if not 1 <= count < patches:
        raise UserError(
            f"masked={masked} does not leave both visible and hidden ones of {patches} patches; expected a share in (0, 1) such as 0.75"
        )
    return count


def random_masking(batch: int, patches: int, masked: float, device: torch.device) -> Masking:
    """A uniform choice of visible patches for each sample, a function of (seed, step, sample) within `stillhouse.randomness.samples`.

    Raises:
        UserError: as `visible_count`.
    """
    return _first(uniform(batch, patches, device).argsort(dim=1, stable=True), visible_count(masked, patches))


def disjoint_maskings(
    batch: int, grid: tuple[int, int], masked: float, device: torch.device, predicted: float = 1.0, block: int = 1
) -> tuple[Masking, Masking]:
    """Two choices for each sample that hide as many patches, and between them the share `predicted` of all (DMJD, arXiv 2301.00230).

    Of what the first shows the second hides as much as it takes, drawn at random as all the rest is; with `predicted` 1 and at least half
    hidden, what they show is disjoint. Blocks of patches, `block` x `block`, are shown or hidden together.

    Raises:
        UserError: as `visible_count`; if the grid does not divide into blocks; or `predicted` is not in [masked, 1].
    """
    rows, columns = grid
    if block < 1 or rows % block or columns % block:
        raise UserError(f"a grid of {rows} x {columns} patches does not divide into blocks of {block} x {block}; expected another block")
    if not masked <= predicted <= 1:
        raise UserError(f"predicted is {predicted}, expected a share of the patches from masked={masked} to 1")
    count = rows * columns // block**2
    shown = visible_count(masked, count)
    hidden = count - shown
    new = max(0, min(int(predicted * count + 1e-9) - hidden, hidden))  # shown by the first, hidden by the second
    one = uniform(batch, count, device).argsort(dim=1, stable=True)
    kept, turned, taken, rest = one.split([shown - new, new, new, hidden - new], dim=1)
    other = torch.cat([kept, taken, turned, rest], dim=1)
    return tuple(_first(_blocks(order, grid, block), shown * block**2) for order in (one, other))  # type: ignore[return-value]


def _first(shuffle: Tensor, count: int) -> Masking:
    """What shows the first `count` patches of a shuffle [B, N]."""
    keep = shuffle[:, :count]
    mask = torch.ones_like(shuffle, dtype=torch.float32).scatter(1, keep, 0.0)
    return Masking(keep, mask, shuffle.argsort(dim=1))


def _blocks(order: Tensor, grid: tuple[int, int], block: int) -> Tensor:
    """The patches of blocks that are counted row by row, in the blocks' order."""
    places = torch.arange(grid[0] * grid[1], device=order.device).view(grid[0] // block, block, grid[1] // block, block)
    return places.permute(0, 2, 1, 3).reshape(-1, block**2)[order].flatten(1)
