"""Losses between feature maps [B, C, H, W] of equal shape, and what they weigh places and channels by.

All are computed in fp32, also under autocast, and averaged over the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def channel_divergence(student_BCHW: Tensor, teacher_BCHW: Tensor, temperature: float = 1.0) -> Tensor:
    """tau^2 KL(softmax(T_c / tau) || softmax(S_c / tau)) over the places of each channel c, mean over channels (CWD, arXiv 2011.13256)."""
    student = F.log_softmax(student_BCHW.float().flatten(2) / temperature, dim=-1)
    teacher = F.log_softmax(teacher_BCHW.float().flatten(2) / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2 / max(1, student.shape[0] * student.shape[1])


def squared_distance(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """The sum over channels and places of (S - T)^2 (MGD, arXiv 2205.01529; FGD's global term, arXiv 2111.11837)."""
    return (student_BCHW.float() - teacher_BCHW.float()).square().flatten(1).sum(1).mean()


def focal_distances(
    student_BCHW: Tensor, teacher_BCHW: Tensor, boxes: list[Tensor], image: tuple[int, int], temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What maps differ by in the foreground, in the background, and in their attentions (FGD, arXiv 2111.11837, section 3.1).

    The first two are the sums over channels and places of (S - T)^2, weighted by the teacher's attention to the place and to the channel,
    and by `foreground_scale` or `background_scale`.

    Args:
        boxes: xyxy [n, 4] in pixels, an image each; n may be 0.
        image: height and width in pixels of what the maps cover.
        temperature: of the attentions, > 0.
    """
    places, channels = spatial_attention(teacher_BCHW, temperature), channel_attention(teacher_BCHW, temperature)
    difference_BHW = ((student_BCHW.float() - teacher_BCHW.float()).square() * channels[:, :, None, None]).sum(1) * places
    foreground = foreground_scale(boxes, image, (teacher_BCHW.shape[-2], teacher_BCHW.shape[-1]))
    inside, outside = ((difference_BHW * scale).sum((1, 2)).mean() for scale in (foreground, background_scale(foreground)))
    return inside, outside, attention_distance(student_BCHW, teacher_BCHW, temperature)


def token_distance(student_BCHW: Tensor, teacher_BCHW: Tensor, masks_BTHW: Tensor, weights_BT: Tensor | None = None) -> Tensor:
    """What student and teacher differ by under each of T masks m (MasKD, arXiv 2205.14589).

    The mean over channels of sum_places m^2 (S - T)^2 / sum_places m, then over the tokens: their mean, or their sum weighted by
    `weights_BT`.
    """
    difference = (student_BCHW.float() - teacher_BCHW.float()).square().mean(1, keepdim=True)
    masks = masks_BTHW.float()
    distances = (masks.square() * difference).sum((2, 3)) / masks.sum((2, 3)).clamp_min(1e-5)
    return distances.mean() if weights_BT is None else (distances * weights_BT.float()).sum(1).mean()


def spatial_attention(maps_BCHW: Tensor, temperature: float) -> Tensor:
    """H W softmax over places of mean_c |A_c| / tau: fp32 [B, H, W], 1 on average (FGD, arXiv 2111.11837)."""
    strength = maps_BCHW.float().abs().mean(1)
    attention = (strength.flatten(1) / temperature).softmax(-1) * strength[0].numel()
    return attention.view_as(strength)


def channel_attention(maps_BCHW: Tensor, temperature: float) -> Tensor:
    """C softmax over channels of mean_places |A_c| / tau: fp32 [B, C], 1 on average (FGD, arXiv 2111.11837)."""
    strength = maps_BCHW.float().abs().mean((2, 3))
    return (strength / temperature).softmax(-1) * strength.shape[1]


def attention_distance(student_BCHW: Tensor, teacher_BCHW: Tensor, temperature: float) -> Tensor:
    """The sums over places and over channels of what the two attentions differ by (FGD, arXiv 2111.11837)."""
    places = spatial_attention(student_BCHW, temperature) - spatial_attention(teacher_BCHW, temperature)
    channels = channel_attention(student_BCHW, temperature) - channel_attention(teacher_BCHW, temperature)
    return places.abs().flatten(1).sum(1).mean() + channels.abs().sum(1).mean()


def foreground_scale(boxes: list[Tensor], image: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """1 / (h w) at the places under a box of h x w places, the largest where boxes overlap, 0 elsewhere (FGD, arXiv 2111.11837).

    A box covers every place it touches and, as in the official code, one more to the right and below; what lies beyond the grid is lost.

    Args:
        boxes: xyxy [n, 4] in pixels, an image each; n may be 0.
        image: height and width in pixels of what the maps cover (the padded batch).
        grid: height and width of the maps.

    Returns:
        fp32 [B, H, W].
    """
    return torch.stack([_scale(each.float(), image, grid) for each in boxes])


def _scale(boxes: Tensor, image: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    inside, sides = [], []
    for axis in (1, 0):  # rows, then columns
        places, pixels = grid[1 - axis], image[1 - axis]
        first = (boxes[:, axis] * (places / pixels)).floor()
        last = (boxes[:, axis + 2] * (places / pixels)).ceil()
        at = torch.arange(places, device=boxes.device)
        inside.append((at >= first[:, None]) & (at <= last[:, None]))
        sides.append(last + 1 - first)
    scales = (inside[0][:, :, None] & inside[1][:, None, :]) / (sides[0] * sides[1])[:, None, None]
    return torch.cat([scales, scales.new_zeros(1, *grid)]).amax(0)


def background_scale(foreground_BHW: Tensor) -> Tensor:
    """The same weight at every place that is no foreground, 1 in sum; all 0 where there is none (FGD, arXiv 2111.11837)."""
    background = (foreground_BHW == 0).float()
    return background / background.sum((1, 2), keepdim=True).clamp_min(1.0)
