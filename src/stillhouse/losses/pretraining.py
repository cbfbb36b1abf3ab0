"""Losses of pre-training on pictures of which most patches are hidden. All in fp32, also under autocast; each says its mean."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def patchify(images_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """The pixels of each patch [B, N, p q C] of a grid of rows and columns: row by row, within a patch pixel by pixel, channels last."""
    batch, channels, height, width = images_BCHW.shape
    rows, columns = grid
    patches = images_BCHW.reshape(batch, channels, rows, height // rows, columns, width // columns)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def normalised_pixels(patches_BNP: Tensor) -> Tensor:
    """Each patch with mean 0 and (unbiased) variance 1: (y - mean) / sqrt(var + 1e-6) (MAE, arXiv 2111.06377)."""
    pixels = patches_BNP.float()
    return (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()


def hidden_pixels_loss(predicted_BNP: Tensor, target_BNP: Tensor, mask_BN: Tensor) -> Tensor:
    """sum mask mean_p (predicted - target)^2 / sum mask: over the hidden patches (mask 1) of the batch, and the pixels of each."""
    squared = (predicted_BNP.float() - target_BNP.float()).square().mean(-1)
    return (squared * mask_BN).sum() / mask_BN.sum()


def direction_distance(student_BND: Tensor, teacher_BND: Tensor, squared: bool = False) -> Tensor:
    """mean |u(t) - u(s)|, or of its square, with u(z) = z / |z|, over batch, tokens and channels (DMAE, arXiv 2208.12256)."""
    return feature_distance(F.normalize(student_BND.float(), dim=-1), F.normalize(teacher_BND.float(), dim=-1), squared)


def feature_distance(student_BND: Tensor, teacher_BND: Tensor, squared: bool = False) -> Tensor:
    """mean |t - s|, or of its square, over batch, tokens and channels."""
    distance = F.mse_loss if squared else F.l1_loss
    return distance(student_BND.float(), teacher_BND.float())


def squared_length(difference: Tensor) -> Tensor:
    """|z|^2, a sum over channels (the last), mean over the rest (self-distillation, arXiv 2210.02871): D times a mean square."""
    return difference.float().square().sum(-1).mean()


def whitened_smooth_l1(predicted: Tensor, hidden: Tensor, beta: float = 2.0) -> Tensor:
    """smooth L1 between a prediction and LayerNorm(hidden) without affine (eps 1e-6), mean over all (G2SD, arXiv 2302.14771).

    With e their difference: e^2 / (2 beta) where |e| < beta, |e| - beta / 2 elsewhere.
    """
    target = F.layer_norm(hidden.float(), hidden.shape[-1:], eps=1e-6)
    return F.smooth_l1_loss(predicted.float(), target, beta=beta)


def normalised_kd(
    student_BK: Tensor, teacher_BK: Tensor, target_B: Tensor, alpha: float = 1.0, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """NKD's two parts, means over the batch (after Yang et al., arXiv 2303.13005): the target's and that of all other classes.

    -T_t log S_t, weighted with the teacher's probability of the target; and -alpha tau^2 sum_{c != t} T'_c log S'_c, with T' and S' the
    softmax at temperature tau among the classes that are not the target. A cross-entropy: its least value is the teacher's entropy, not 0.

    Args:
        target_B: the true class, int64 [B].
    """
    student, teacher = student_BK.float(), teacher_BK.float()
    column = target_B[:, None]
    log_S = student.log_softmax(-1).gather(1, column)
    right = -(teacher.softmax(-1).gather(1, column) * log_S).mean()
    others = torch.arange(student.shape[-1] - 1, device=student.device).expand(len(target_B), -1)
    others = others + (others >= column)  # steps over the target
    rest_S, rest_T = ((logits.gather(1, others) / temperature) for logits in (student, teacher))
    rest = -(rest_T.softmax(-1) * rest_S.log_softmax(-1)).sum(-1).mean()
    return right, alpha * temperature**2 * rest
