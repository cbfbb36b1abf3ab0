"""Labels only: no teacher. The baseline every distillation must beat, and how a user trains a teacher on their own data.

    stillhouse distill --method scratch --student timm/vit_small_patch16_224 --data imagefolder:DIR

Nothing is masked, and no paper is needed.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from stillhouse.distillers.base import Distiller
from stillhouse.losses.logits import cross_entropy
from stillhouse.models.outputs import logits_of


class Scratch(Distiller):
    """Plain training: cross-entropy with the labels, hard int64 [B] or soft [B, K].

    Args:
        student: a classifier, images [B, C, H, W] to logits [B, K].
    """

    off: ClassVar[dict[str, Any]] = {}

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)

    def forward(self, batch: tuple[Tensor, Tensor], turn: str = "student") -> dict[str, Tensor]:
        """`ce`: the cross-entropy."""
        images, labels = batch
        return {"ce": cross_entropy(logits_of(self.student(images)), labels)}
