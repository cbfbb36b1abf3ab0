"""FitNets: the student's maps learn to predict the teacher's (a hint), beside the labels.

Source: Romero et al., arXiv 1412.6550, eq. 3.

Masked: nothing.

    stillhouse distill --method fitnet --teacher RUN_OR_SPEC --student SPEC --data SPEC --beta 100

Sure: the hint and its regressor. Our reading: one stage, hint and labels together, as later comparisons (CRD's benchmark, torchdistill)
run it, with their weight 100; the paper first trains on the hint alone. The regressor is linear in the channels (a 1x1 convolution), and
the student's places are resampled to the teacher's grid. In a classifier the layers are those half-way through; in a detector or
segmenter, which the paper did not have, every level of the neck or the logits: plain feature regression, the mean over the levels.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.distillers.base import Distiller
from stillhouse.errors import UserError
from stillhouse.losses.features import hint_loss
from stillhouse.models.detectors import is_detector
from stillhouse.models.levels import Align, Levels, default_place
from stillhouse.models.taps import middle_layer
from stillhouse.tasks.labels import label_losses


class FitNet(Distiller):
    """L_labels + beta |r(F_S) - F_T|^2, with r linear in the channels and learned along.

    Args:
        student: a classifier, images [B, C, H, W] to logits [B, K]; a segmenter; or a detector.
        teacher: a network with a layer like the student's.
        beta: weight of the hint, >= 0.
        student_layer: the name of the student's layer, several joined by +, or one of neck, backbone, logits; by default a classifier's
            middle layer, a detector's neck, a segmenter's logits.
        teacher_layer: the teacher's, likewise.

    Raises:
        UserError: if beta is negative, a layer does not exist, or the levels do not pair.
    """

    tasks: ClassVar[tuple[str, ...]] = ("classify", "detect", "segment")
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
        self.maps_S = Levels(student, student_layer or _place(student))
        self.maps_T = Levels(teacher, teacher_layer or _place(teacher))
        self.regressor = Align(self.maps_S, self.maps_T, always=True)

    def forward(self, batch: tuple[Any, Any], turn: str = "student") -> dict[str, Tensor]:
        """The labels' terms, and `hint`: the features'."""
        terms = label_losses(self.student, batch)
        maps_S = self.maps_S.take()
        maps_T = self.maps_T.of(self.refeed(batch[0]))
        pairs = zip(self.regressor(maps_S, maps_T), maps_T, strict=True)
        hints = [hint_loss(S.flatten(2).transpose(1, 2), T.flatten(2).transpose(1, 2)) for S, T in pairs]
        return {**terms, "hint": self.beta * torch.stack(hints).mean()}


def _place(network: nn.Module) -> str:
    dense = is_detector(network) or getattr(network, "stillhouse", {}).get("task") == "segment"
    return default_place(network) if dense else middle_layer(network)
