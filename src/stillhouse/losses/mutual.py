"""Losses between two that learn together: a value at each place, so that a mask can say where the one teaches the other.

All are computed in fp32, also under autocast. The first argument learns; whoever teaches comes detached.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Distance = Literal["cosine", "mse", "kl"]


def place_distance(student_BCHW: Tensor, teacher_BCHW: Tensor, by: Distance = "cosine") -> Tensor:
    """How far two maps are apart at each place, over the channels: fp32 [B, H, W].

    - cosine: 1 - cos;
    - mse: the mean over channels of (S / |S| - T / |T|)^2, that is 2 / C (1 - cos);
    - kl: KL(softmax(T) || softmax(S)) over the channels.
    """
    student, teacher = student_BCHW.float(), teacher_BCHW.float()
    if by == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=1)
    if by == "mse":
        return (F.normalize(student, dim=1) - F.normalize(teacher, dim=1)).square().mean(1)
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True).sum(1)


def pixel_divergence(student_BKHW: Tensor, teacher_BKHW: Tensor, temperature: float = 1.0) -> Tensor:
    """tau^2 KL(softmax(z_T / tau) || softmax(z_S / tau)) over the classes, at each pixel: fp32 [B, H, W]."""
    student = F.log_softmax(student_BKHW.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_BKHW.float() / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1) * temperature**2


def affinity_distance(student_BRC: Tensor, teacher_BRC: Tensor, counts_BR: Tensor) -> Tensor:
    """How differently a region is like the others: the mean over regions that count of (cos(S_r, S_q) - cos(T_r, T_q))^2, fp32 [B, R].

    The channels of both need not match.

    Args:
        counts_BR: bool, which regions there are.
    """
    student, teacher = (F.normalize(each.float(), dim=-1) for each in (student_BRC, teacher_BRC))
    with torch.autocast(student.device.type, enabled=False):
        squares_BRR = (student @ student.mT - teacher @ teacher.mT).square()
    counts = counts_BR.float()
    return (squares_BRR * counts[:, None]).sum(-1) / counts.sum(-1, keepdim=True).clamp_min(1.0)


def masked_mean(values: Tensor, mask: Tensor, over: Tensor | None = None) -> Tensor:
    """sum(mask * values) / sum(over), `over` being the mask unless it is given; 0, with gradient, where that sum is 0."""
    mask = mask.float()
    # not mask * values: what is not looked at may be infinite
    return torch.where(mask > 0, values, 0.0).mul(mask).sum() / (mask if over is None else over.float()).sum().clamp_min(1e-12)
