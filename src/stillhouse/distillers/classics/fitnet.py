"""FitNets: the student's middle layer learns to predict the teacher's (a hint), beside the labels.

Source: Romero et al., arXiv 1412.6550, eq. 3. Nothing is masked.

    stillhouse distill --method fitnet --teacher RUN_OR_SPEC --student SPEC --data SPEC --beta 100

Sure: the hint and its regressor. Our reading: one stage, hint and labels together, as later comparisons (CRD's benchmark, torchdistill)
run it, with their weight 100; the paper first trains on the hint alone. The regressor is linear in the channels (a 1x1 convolution), and
the student's places are resampled to the teacher's grid.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from stillhouse.distillers.base import Distiller
from stillhouse.errors import UserError
from stillhouse.losses.features import hint_loss
from stillhouse.losses.logits import cross_entropy
from stillhouse.models.outputs import logits_of
from stillhouse.models.taps import Tap, as_map, feature_channels, middle_layer, on_grid


class FitNet(Distiller):
    """CE(z_S, y) + beta |r(F_S) - F_T|^2, with r linear in the channels and learned along.

    Args:
        student: a classifier, images [B, C, H, W] to logits [B, K].
        teacher: a network with a middle layer.
        beta: weight of the hint, >= 0.
        student_layer: the name of the student's layer; by default half-way through.
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
        beta: float = 100.0,
        student_layer: str | None = None,
        teacher_layer: str | None = None,
    ) -> None:
        if not 0 <= beta < float("inf"):
            raise UserError(f"beta is {beta}, expected the weight of the hint, a finite number of at least 0")
        super().__init__(student, teacher)
        self.beta = beta
        student_layer, teacher_layer = student_layer or middle_layer(student), teacher_layer or middle_layer(teacher)
        self.regressor = nn.Linear(feature_channels(student, student_layer), feature_channels(teacher, teacher_layer))
        self.feature_S = Tap(student, student_layer)
        self.feature_T = Tap(teacher, teacher_layer)

    def forward(self, batch: tuple[Tensor, Tensor], turn: str = "student") -> dict[str, Tensor]:
        """`ce`: the labels' term; `hint`: the features'."""
        images, labels = batch
        logits_S = logits_of(self.student(images))
        self.teach(images)
        map_T = as_map(self.feature_T.take(), self.teacher)
        tokens_T = map_T.flatten(2).transpose(1, 2)
        tokens_S = on_grid(self.feature_S.take(), self.student, map_T.shape[-2:])
        return {"ce": cross_entropy(logits_S, labels), "hint": self.beta * hint_loss(self.regressor(tokens_S), tokens_T)}
