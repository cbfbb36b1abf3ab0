"""Decoupled knowledge distillation: what the teacher knows about the target class and about the others, weighted apart.

Source: Zhao et al., arXiv 2203.08679, eq. 7; the official code's CIFAR defaults.

Masked: nothing.

    stillhouse distill --method dkd --teacher RUN_OR_SPEC --student SPEC --data SPEC

Sure: the two terms. Where we depart: the official code ramps the distillation up over the first 20 epochs; we do not. Soft labels (mixup,
smoothing), which the paper does not have, take their largest class as the target.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from stillhouse.distillers.base import Distiller
from stillhouse.distillers.classics.kd import check_weighting
from stillhouse.errors import UserError
from stillhouse.losses.logits import cross_entropy, target_and_rest
from stillhouse.models.outputs import logits_of


class DKD(Distiller):
    """CE(z_S, y) + alpha TCKD + beta NCKD, both times tau^2.

    Args:
        student: a classifier, images [B, C, H, W] to logits [B, K].
        teacher: a classifier of the same classes.
        alpha: weight of the target-class part, in [0, 1].
        beta: weight of the other classes' part, >= 0.
        temperature: tau > 0.

    Raises:
        UserError: if a setting is out of range.
    """

    off: ClassVar[dict[str, Any]] = {"alpha": 0.0, "beta": 0.0}

    def __init__(self, student: nn.Module, teacher: nn.Module, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        check_weighting(alpha, temperature)
        if not 0 <= beta < float("inf"):
            raise UserError(f"beta is {beta}, expected the weight of the other classes, a finite number of at least 0")
        super().__init__(student, teacher)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(self, batch: tuple[Tensor, Tensor], turn: str = "student") -> dict[str, Tensor]:
        """`ce`: the labels' term; `tckd` and `nckd`: the teacher's."""
        images, labels = batch
        logits_S = logits_of(self.student(images))
        logits_T = logits_of(self.teach(images))
        target = labels.argmax(-1) if labels.is_floating_point() else labels
        tckd, nckd = target_and_rest(logits_S, logits_T, target, self.temperature)
        return {"ce": cross_entropy(logits_S, labels), "tckd": self.alpha * tckd, "nckd": self.beta * nckd}
