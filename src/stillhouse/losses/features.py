"""Losses between features of places: tokens [B, N, D] (patches of a transformer, or the places of a flattened feature map)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def hint_loss(student_BND: Tensor, teacher_BND: Tensor) -> Tensor:
    """Mean squared difference over batch, places and channels (FitNets, arXiv 1412.6550, eq. 3; theirs is half the sum)."""
    return F.mse_loss(student_BND.float(), teacher_BND.float())


def attention_transfer_loss(student_BND: Tensor, teacher_BND: Tensor) -> Tensor:
    """Mean squared difference of the two normalised activation maps, over batch and places (arXiv 1612.03928, eq. 2, as its code averages).

    The channels of student and teacher need not match; their places must.
    """
    return (activation_map(student_BND) - activation_map(teacher_BND)).square().mean()


def activation_map(tokens_BND: Tensor) -> Tensor:
    """mean_c |A_c|^2 at each place, normalised to length 1 over the places: fp32 [B, N]."""
    return F.normalize(tokens_BND.float().square().mean(-1), dim=-1)
