"""Losses under soft masks: what a masked difference of features costs, and how alike masks are. In fp32, mean over batch and masks.

Source: ACAM-KD, arXiv 2503.06307, eq. 4-6, and the code of MasKD (arXiv 2205.14589), whose losses these were.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reading = Literal["a", "b", "c"]


def masked_square(squares_BX: Tensor, masks_BMX: Tensor, reading: Reading) -> Tensor:
    """A difference under M masks, in one of three readings of the published line "1/M sum_m 1/C sum M |M * difference|^2".

    - a, as printed: sum_x M_x * sum_x M_x^2 d_x. Of degree 3 in the masks, grows with the square of the map.
    - b, the sum of M in the denominator, as MasKD's code has it: sum_x M_x^2 d_x / sum_x M_x. Of degree 1: smaller masks, smaller loss.
    - c, a weighted mean (not published): sum_x M_x^2 d_x / sum_x M_x^2. Of degree 0: only where masks are counts, not how large.

    Args:
        squares_BX: d, the squared difference at each place, mean over channels; or in each channel, mean over places.
        masks_BMX: M, in (0, 1), over the same places or channels.
    """
    masks = masks_BMX.float()
    total_BM = (masks.square() * squares_BX.float().unsqueeze(1)).sum(-1)
    if reading == "a":
        return (total_BM * masks.sum(-1)).mean()
    mass_BM = masks.sum(-1) if reading == "b" else masks.square().sum(-1)
    return (total_BM / mass_BM.clamp_min(1e-12)).mean()


def dice(masks_BMX: Tensor) -> Tensor:
    """How alike masks are: 2 <M_i, M_j> / (|M_i|^2 + |M_j|^2), mean over the pairs i != j; 1 when all are equal, 0 when none overlap.

    One mask alone has no pair: 0. As printed (eq. 4) it is a sum over pairs over a sum of squares, about M times this mean.
    """
    masks, count = masks_BMX.float(), masks_BMX.shape[1]
    with torch.autocast(masks.device.type, enabled=False):
        products_BMM = masks @ masks.transpose(1, 2)
    norms_BM = masks.square().sum(-1)
    alike_BMM = 2 * products_BMM / (norms_BM.unsqueeze(1) + norms_BM.unsqueeze(2) + 1e-12)
    others = 1 - torch.eye(count, device=masks.device)
    return (alike_BMM * others).sum((1, 2)).mean() / max(1, count * (count - 1))


def map_scale(teacher_BNC: Tensor) -> Tensor:
    """The root mean square of the teacher's map, image by image: fp32 [B, 1, 1], never 0. Both maps are divided by it.

    The student has no scale of its own there, so that the loss is 0 only where it equals the teacher; one number serves all channels, as
    a channel that is silent in an image has no scale; no mean is taken away, as it cancels in the difference and makes channel masks.
    """
    return teacher_BNC.float().square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-6)
