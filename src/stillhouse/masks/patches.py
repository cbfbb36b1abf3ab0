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
    count = visible_count(masked, patches)
    shuffle = uniform(batch, patches, device).argsort(dim=1, stable=True)
    keep = shuffle[:, :count]
    mask = torch.ones(batch, patches, device=device).scatter(1, keep, 0.0)
    return Masking(keep, mask, shuffle.argsort(dim=1))
