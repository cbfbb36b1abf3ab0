"""Losses between class logits. All are computed in fp32, also under autocast, and averaged over the batch only, never over classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits_BK: Tensor, labels: Tensor) -> Tensor:
    """-sum_k y_k log p_k, mean over the batch; `labels` are classes int64 [B] or soft targets [B, K] that sum to 1."""
    return F.cross_entropy(logits_BK.float(), labels.float() if labels.is_floating_point() else labels)


def kl_divergence(student_BK: Tensor, teacher_BK: Tensor, temperature: float = 1.0) -> Tensor:
    """tau^2 KL(softmax(z_T / tau) || softmax(z_S / tau)), mean over the batch (Hinton et al., arXiv 1503.02531).

    The factor tau^2 keeps the gradient's size independent of the temperature.
    """
    student = F.log_softmax(student_BK.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_BK.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def hard_cross_entropy(student_BK: Tensor, teacher_BK: Tensor) -> Tensor:
    """Cross-entropy with the teacher's most likely class, mean over the batch (DeiT's hard distillation, arXiv 2012.12877, eq. 3)."""
    return F.cross_entropy(student_BK.float(), teacher_BK.argmax(-1))


def mean_probabilities(*logits_BK: Tensor) -> Tensor:
    """mean_k softmax(z_k) [B, K], fp32: what several classifiers say together (MEAL V2, arXiv 2009.08453); not softmax(mean_k z_k)."""
    return torch.stack([each.float().softmax(-1) for each in logits_BK]).mean(0)


def told_apart(verdicts_S_B2: Tensor, verdicts_T_B2: Tensor) -> Tensor:
    """Binary cross-entropy of a discriminator's two outputs, mean over outputs and both batches (MEAL V2, arXiv 2009.08453).

    Both are before their sigmoid; [1, 0] is right for the student's, [0, 1] for the teachers'.
    """
    wrong = torch.stack([-verdicts_S_B2[:, 0], verdicts_S_B2[:, 1], verdicts_T_B2[:, 0], -verdicts_T_B2[:, 1]])
    return F.softplus(wrong.float()).mean()


def target_and_rest(student_BK: Tensor, teacher_BK: Tensor, target_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The two parts KL splits into (DKD, arXiv 2203.08679, eq. 6): TCKD on (target, all others) and NCKD among the others.

    Both times tau^2, mean over the batch. With two classes there is one other class, and NCKD is 0.

    Args:
        target_B: the true class, int64 [B].
    """
    student = F.log_softmax(student_BK.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_BK.float() / temperature, dim=-1)
    (binary_S, others_S), (binary_T, others_T) = _split(student, target_B), _split(teacher, target_B)
    tckd = F.kl_div(binary_S, binary_T, reduction="batchmean", log_target=True)
    nckd = F.kl_div(others_S, others_T, reduction="batchmean", log_target=True)
    return tckd * temperature**2, nckd * temperature**2


def _split(log_p_BK: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor]:
    """log (p_target, 1 - p_target) [B, 2], summed in log space so that neither underflows; and log p among the others [B, K - 1]."""
    others = torch.arange(log_p_BK.shape[-1] - 1, device=log_p_BK.device).expand(len(target_B), -1)
    log_p_others = log_p_BK.gather(1, others + (others >= target_B[:, None]))  # steps over the target
    binary = torch.stack([log_p_BK.gather(1, target_B[:, None])[:, 0], log_p_others.logsumexp(-1)], dim=-1)
    return binary, F.log_softmax(log_p_others, dim=-1)
