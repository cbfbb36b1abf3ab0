"""Hard distillation: the teacher's most likely class is a second label.

Source: DeiT, arXiv 2012.12877, eq. 3 (without its distillation token: one head learns from both labels).

Masked: nothing.

    stillhouse distill --method hard_kd --teacher RUN_OR_SPEC --student SPEC --data SPEC
"""

from __future__ import annotations

from torch import Tensor, nn

from stillhouse.distillers.base import Distiller
from stillhouse.distillers.classics.kd import check_weighting
from stillhouse.losses.logits import cross_entropy, hard_cross_entropy
from stillhouse.models.outputs import logits_of


class HardKD(Distiller):
    """(1 - alpha) CE(z_S, y) + alpha CE(z_S, argmax z_T).

    Args:
        student: a classifier, images [B, C, H, W] to logits [B, K].
        teacher: a classifier of the same classes.
        alpha: weight of the teacher, in [0, 1]; the paper's 1/2.

    Raises:
        UserError: if alpha is out of range.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, *, alpha: float = 0.5) -> None:
        check_weighting(alpha)
        super().__init__(student, teacher)
        self.alpha = alpha

    def forward(self, batch: tuple[Tensor, Tensor], turn: str = "student") -> dict[str, Tensor]:
        """`ce`: the labels' term; `kd`: the teacher's."""
        images, labels = batch
        logits_S = logits_of(self.student(images))
        logits_T = logits_of(self.teach(images))
        return {
            "ce": (1 - self.alpha) * cross_entropy(logits_S, labels),
            "kd": self.alpha * hard_cross_entropy(logits_S, logits_T),
        }
