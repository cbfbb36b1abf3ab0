"""What edges there are in a place of a picture, as histograms of oriented gradients: a target that no network has to make."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def oriented_gradients(images_BCHW: Tensor, cell: int, bins: int = 9) -> Tensor:
    """Histograms [B, H / cell, W / cell, C, bins], fp32, of the directions of a picture's slopes, in each channel for itself.

    A slope is x[i + 1] - x[i - 1], 0 at the borders, in both directions. Its angle, without a sign, in [0, 180) degrees, has one of the
    bins, to which it adds its length; a cell's sums are divided by its pixels. Not normalised over blocks of cells.
    """
    pixels = images_BCHW.float()
    down = F.pad(pixels[:, :, 2:] - pixels[:, :, :-2], (0, 0, 1, 1))
    right = F.pad(pixels[..., 2:] - pixels[..., :-2], (1, 1))
    angle = torch.atan2(down, right) % math.pi
    number, length = (angle * (bins / math.pi)).long() % bins, torch.hypot(down, right)  # % for an angle that is rounded to pi
    sums = [F.avg_pool2d(length * (number == which), cell) for which in range(bins)]
    return torch.stack(sums, dim=-1).permute(0, 2, 3, 1, 4)


def edges_of_patches(images_BCHW: Tensor, grid: tuple[int, int], cell: int, bins: int = 9) -> Tensor:
    """`oriented_gradients` of each patch [B, N, cells C bins], every histogram with mean 0 and variance 1.

    Its eps of 1e-5 is for pixels of 0 to 255. What masked patches are asked about (MaskFeat, arXiv 2112.09133; so whitened in DMJD,
    arXiv 2301.00230).
    """
    found = oriented_gradients(images_BCHW, cell, bins)
    whitened = F.layer_norm(found, (bins,), eps=1e-5)
    rows, columns = grid
    batch, down, right, channels, _ = whitened.shape
    patches = whitened.reshape(batch, rows, down // rows, columns, right // columns, channels, bins).permute(0, 1, 3, 2, 4, 5, 6)
    return patches.reshape(batch, rows * columns, -1)
