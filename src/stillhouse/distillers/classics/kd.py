"""Knowledge distillation: the student matches the teacher's softened class probabilities.

Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.

Masked: nothing.

    stillhouse distill --method kd --teacher RUN_OR_SPEC --student SPEC --data SPEC --temperature 4

Sure: the loss. Our reading: the two terms are mixed as (1 - alpha) and alpha, as DeiT's and MaskedKD's code do, with their defaults; the
paper only says "a weighted average".
"""

from __future__ import annotations

from torch import Tensor, nn

from stillhouse.distillers.base import Distiller
from stillhouse.errors import UserError
from stillhouse.losses.logits import cross_entropy, kl_divergence
from stillhouse.models.outputs import logits_of


class KD(Distiller):
    """(1 - alpha) CE(z_S, y) + alpha tau^2 KL(softmax(z_T / tau) || softmax(z_S / tau)).

    Args:
        student: a classifier, images [B, C, H, W] to logits [B, K].
        teacher: a classifier of the same classes.
        alpha: weight of the teacher, in [0, 1]; 0 is plain training.
        temperature: tau > 0; higher shows more of the teacher's small probabilities.

    Raises:
        UserError: if alpha or temperature is out of range.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, *, alpha: float = 0.5, temperature: float = 1.0) -> None:
        check_weighting(alpha, temperature)
        super().__init__(student, teacher)
        self.alpha = alpha
        self.temperature = temperature

    def forward(self, batch: tuple[Tensor, Tensor], turn: str = "student") -> dict[str, Tensor]:
        """`ce`: the labels' term; `kd`: the teacher's."""
        images, labels = batch
        logits_S = logits_of(self.student(images))
        logits_T = logits_of(self.teach(images))
        return {
            "ce": (1 - self.alpha) * cross_entropy(logits_S, labels),
            "kd": self.alpha * kl_divergence(logits_S, logits_T, self.temperature),
        }


def check_weighting(alpha: float, temperature: float = 1.0) -> None:
    """Refuses a weight outside [0, 1], a temperature that is not positive and finite, and what is no number.

    Raises:
        UserError: naming the value and what was expected.
    """
    for name, value in (("alpha", alpha), ("temperature", temperature)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{name} is {value!r}, expected a number, such as 0.5")
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is {alpha}, expected the teacher's share of the loss in [0, 1], such as 0.5")
    if not 0 < temperature < float("inf"):
        raise UserError(f"temperature is {temperature}, expected a positive finite number, such as 1 or 4")
