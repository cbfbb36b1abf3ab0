"""Attention transfer: the student's activations are strong where the teacher's are.

Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", arXiv 1612.03928, eq. 2.

Masked: nothing.

    stillhouse distill --method attention_transfer --teacher RUN_OR_SPEC --student SPEC --data SPEC

Sure: the maps and their normalisation. Our reading: one layer (the last) of each network by default, where the paper pairs the ends of
several stages; squares are averaged over places as in the official code, with its weight beta = 1000.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from stillhouse.distillers.base import Distiller
from stillhouse.errors import UserError
from stillhouse.losses.features import attention_transfer_loss
from stillhouse.losses.logits import cross_entropy
from stillhouse.models.outputs import logits_of
from stillhouse.models.taps import Tap, as_map, last_layer, on_grid


class AttentionTransfer(Distiller):
    """CE(z_S, y) + beta mean (Q_S / |Q_S| - Q_T / |Q_T|)^2 with Q = mean_c |A_c|^2 over places.

    Args:
        student: a classifier, images [B, C, H, W] to logits [B, K].
        teacher: a network whose layer has places; channels need not match.
        beta: weight of the transfer, >= 0.
        student_layer: the name of the student's layer; by default its last with places.
        teacher_layer: the name of the teacher's.

    Raises:
        UserError: if beta is negative or a layer does not exist.
    """

    off: ClassVar[dict[str, Any]] = {"beta": 0.0}

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        beta: float = 1000.0,
        student_layer: str | None = None,
        teacher_layer: str | None = None,
    ) -> None:
        if not 0 <= beta < float("inf"):
            raise UserError(f"beta is {beta}, expected the weight of the transfer, a finite number of at least 0")
        super().__init__(student, teacher)
        self.beta = beta
        self.feature_S = Tap(student, student_layer or last_layer(student))
        self.feature_T = Tap(teacher, teacher_layer or last_layer(teacher))

    def forward(self, batch: tuple[Tensor, Tensor], turn: str = "student") -> dict[str, Tensor]:
        """`ce`: the labels' term; `attention`: the maps'."""
        images, labels = batch
        logits_S = logits_of(self.student(images))
        self.teach(images)
        map_T = as_map(self.feature_T.take(), self.teacher)
        tokens_T = map_T.flatten(2).transpose(1, 2)
        tokens_S = on_grid(self.feature_S.take(), self.student, map_T.shape[-2:])
        return {"ce": cross_entropy(logits_S, labels), "attention": self.beta * attention_transfer_loss(tokens_S, tokens_T)}
